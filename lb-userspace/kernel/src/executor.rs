//! Opens the kernel's side and applies plans: adopts or recreates maps, attaches programs, waits for grace
//! periods.

use std::{collections::BTreeMap, fs::File, os::fd::AsFd as _, path::PathBuf};

use aya::{Ebpf, maps::MapError, sys::SyscallError};
use lb_common::{hooks, maps};
use lb_core::plan::{Capacity, Plan, StillRead, audit::Suspects};
use tracing::{info, warn};

use crate::{
    Features, KernelError, Maps, Observations,
    adoption::{self, Adoption, TooSmall},
    attach::Hooks,
    cgroup, fault,
    grace::{Grace, Pending},
    layouts::{self, Directory, Held},
    loader::{load, load_program, program_of, raise_memlock, sizing},
    lock::{Change, Lock},
    object, pins, syscall,
};

/// How to load and where to attach.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent settings")]
pub struct Options {
    /// Directory on a BPF file system for maps and links.
    pub pin_path: PathBuf,
    /// The cgroup whose processes are served.
    pub cgroup: PathBuf,
    /// Sizes of the maps.
    pub capacity: Capacity,
    /// First and last node port.
    pub node_ports: (u16, u16),
    /// Whether node ports answer on loopback.
    pub localhost_nodeports: bool,
    /// Cookie of the node's network namespace; `None` means the initial one.
    pub node_netns: Option<u64>,
    /// The kernel's features.
    pub features: Features,
    /// Whether cgroups may be excluded ([`super::exclusion`]). If not, the programs contain no code for it.
    pub excludes: bool,
    /// Whether the programs observe connections and eject endpoints ([`lb_common::health`]). If not, the
    /// programs contain no code for it, and `sock_ops` is not attached.
    pub passive_health: bool,
    /// Whether the programs write diagnostic lines for [`Kernel::take_log`].
    pub log: bool,
}

/// The result of applying a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Number of operations applied.
    pub n_ops: usize,
    /// Keys that were not inserted because the map is full of foreign entries. An audit finds those;
    /// [`Kernel::repair`] removes them and inserts these keys.
    pub no_room: Suspects,
}

/// The maps and programs of this node.
pub struct Kernel {
    pub(crate) maps: Maps,
    observations: Observations,
    grace: Grace,
    unsettled: StillRead,
    /// Pending grace-period requests.
    asked: Pending,
    /// Number of the last applied plan. `settled` is the last plan followed by a grace period.
    applied: u64,
    settled: u64,
    features: Features,
    passive_health: bool,
    log: bool,
    object: Ebpf,
    pin_path: PathBuf,
    /// The maps that the programs use.
    held: Vec<Held>,
    hooks: Hooks,
    /// Whether the programs and maps of an earlier agent still serve.
    is_staged: bool,
    too_small: Vec<TooSmall>,
}

/// The state of an agent's pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pins {
    /// All pins are in place.
    InPlace,
    /// These pins were removed or replaced, or these links were detached or run another program.
    Lost(Vec<&'static str>),
    /// No pin is left, or the directory was removed or replaced.
    Gone,
}

impl Kernel {
    /// Loads the programs, adopts or creates the pinned maps, and attaches the programs or replaces the
    /// attached ones.
    ///
    /// A map of another layout or size is recreated; the others are kept. If it is part of the image, all
    /// maps of the image are recreated. They are filled from the old ones if those have the same layout. The
    /// old maps and programs serve until the first plan ([`Self::apply`]) switches to the new ones: see
    /// [`Self::is_staged`]. A size too small for the entries served is not used: see [`Self::too_small`].
    ///
    /// `on_grace` is called on another thread after each grace period: see [`Self::settled`].
    ///
    /// # Errors
    ///
    /// See [`KernelError`]. After an error, pins and attachments are as before the call.
    ///
    /// # Kernel
    ///
    /// 5.10
    pub fn open(options: &Options, on_grace: impl Fn() + Send + 'static) -> Result<Self, KernelError> {
        let object = object::bytes()?;
        let cgroup = cgroup::open(&options.cgroup)?;
        let pin_path = &options.pin_path;
        pins::prepare(pin_path)?;
        pins::recover(pin_path)?;
        let kernel = Self::begin(options, object, cgroup, on_grace);
        if kernel.is_err() {
            // Maps created for programs that were not attached.
            let _next_start_does = pins::forget(pin_path);
        }
        kernel
    }

    fn begin(
        options: &Options,
        object: &[u8],
        cgroup: File,
        on_grace: impl Fn() + Send + 'static,
    ) -> Result<Self, KernelError> {
        let pin_path = &options.pin_path;
        let former = Directory::open(pin_path)?;
        let mut adoption = Adoption::of(&former.pin_states(&sizing(options.capacity)?)?);
        let (mut capacity, mut too_small) = (options.capacity, Vec::new());
        match adoption.image {
            adoption::Image::Stays => {}
            // A map that cannot be opened is reported by `fill_from` below.
            adoption::Image::Moves => {
                if let Ok(found) = Maps::open_each(|_| &former) {
                    (capacity, too_small) =
                        adoption::sizes(options.capacity, found.capacity, &found.image()?);
                }
            }
            adoption::Image::Anew => {
                (capacity, too_small) = adoption::sizes_unread(options.capacity, former.sizes()?);
            }
        }
        if capacity != options.capacity {
            adoption = Adoption::of(&former.pin_states(&sizing(capacity)?)?);
        }
        let options = &Options { capacity, ..options.clone() };
        let maps_path = if adoption.made.is_empty() {
            pin_path.clone()
        } else {
            let next = pins::stage(pin_path)?;
            pins::share(pin_path, &next, &adoption.kept)?;
            if adoption.waits() {
                info!(
                    image = ?adoption.image,
                    maps = adoption.made.join(" "),
                    "maps are missing or have another layout or size: new ones are filled beside them"
                );
            } else if !adoption.kept.is_empty() {
                info!(maps = adoption.made.join(" "), "recreating these maps, keeping the others");
            }
            next
        };
        raise_memlock();
        let mut object = load(object, options, Some(&maps_path))?;
        let mut directory = Directory::open(&maps_path)?;
        let held = directory.record()?;
        let mut maps = Maps::take(&mut object, options)?;
        maps.fill_from(&former, &directory, &adoption)?;
        let observations = Observations::of(&directory)?;
        observations.fill_from(&former, &adoption, &maps)?;
        let mut programs = Vec::new();
        for hook in pins::hooks(options.features, options.passive_health) {
            // Loaded now even if attached later, so that a verifier error is reported at once.
            programs.push(load_program(&mut object, hook, &program_of(hook, options.features, options.log))?);
        }
        let hooks = Hooks::new(pin_path, cgroup, &options.cgroup, programs)?;
        let not_made = |io_error| MapError::SyscallError(SyscallError { call: "bpf_map_create", io_error });
        let periods =
            syscall::MapOfMaps::new().map_err(|source| KernelError::map("socklb_grace", not_made(source)))?;
        let grace = Grace::start(move || periods.wait_for_grace_period(), on_grace);
        let grace = grace.map_err(KernelError::Thread)?;
        let mut kernel = Self {
            maps,
            observations,
            grace,
            unsettled: StillRead::Anything,
            asked: Pending::default(),
            applied: 0,
            settled: 0,
            features: options.features,
            passive_health: options.passive_health,
            log: options.log,
            object,
            pin_path: pin_path.clone(),
            held,
            hooks,
            is_staged: adoption.waits(),
            too_small,
        };
        kernel.ask_grace();
        if !kernel.is_staged {
            kernel.switch()?;
        }
        Ok(kernel)
    }

    /// Whether the pinned programs and maps of an earlier agent still serve, because their image cannot be
    /// kept. The maps of this agent take effect when the first plan is applied.
    #[must_use]
    pub const fn is_staged(&self) -> bool {
        self.is_staged
    }

    /// Configured sizes that are not used, because the entries served at start do not fit.
    #[must_use]
    pub fn too_small(&self) -> &[TooSmall] {
        &self.too_small
    }

    /// Where the maps are pinned now. The path changes when the first plan ends [`Self::is_staged`].
    #[must_use]
    pub fn maps_path(&self) -> PathBuf {
        if self.is_staged { self.pin_path.join(pins::NEXT) } else { self.pin_path.clone() }
    }

    /// Switches every hook to this agent's programs and maps, and replaces the pinned maps.
    ///
    /// Each step can be repeated, by this agent or the next one.
    fn switch(&mut self) -> Result<(), KernelError> {
        // First, since it may fail: nothing has changed yet.
        let made = self.hooks.create_missing()?;
        self.maps.write_meta()?;
        pins::commit(&self.pin_path)?;
        self.hooks.install(made)?;
        pins::promote(&self.pin_path)?;
        let unused = hooks::HOOKS
            .iter()
            .filter(|hook| hook.needs == hooks::Requirement::PassiveHealth && !self.passive_health);
        let links: Vec<&str> = hooks::REMOVED.iter().copied().chain(unused.map(|hook| hook.name)).collect();
        let _removed = pins::remove_former(&self.pin_path, maps::REMOVED, &links)?;
        if std::mem::take(&mut self.is_staged) {
            info!("switched to the new maps");
        }
        let forgotten = Directory::open(&self.pin_path).and_then(|mut directory| directory.forget_unpinned());
        if let Err(error) = forgotten {
            warn!(%error, "layouts of removed maps are still recorded: the next start tries again");
        }
        Ok(())
    }

    /// Checks the pins and the programs of the links, which others may have removed or replaced. `lock` is
    /// the lock of the pin directory.
    #[must_use]
    pub fn pins(&self, lock: &Lock) -> Pins {
        let is_there = |name: &str| std::fs::symlink_metadata(self.pin_path.join(name)).is_ok();
        if !lock.is_in_place() || !pins::names(self.features, self.passive_health).any(is_there) {
            return Pins::Gone;
        }
        if self.is_staged {
            // The pins are those of the earlier agent.
            return Pins::InPlace;
        }
        let is_lost = |held: &&Held| layouts::pinned_id(&self.pin_path.join(held.name)) != Some(held.id);
        let maps = self.held.iter().filter(is_lost).map(|held| held.name);
        let lost: Vec<&str> = maps.chain(self.hooks.lost()).collect();
        if lost.is_empty() { Pins::InPlace } else { Pins::Lost(lost) }
    }

    /// Restores the pins that [`Self::pins`] reports as lost, from the maps and programs that this agent
    /// holds. Returns the restored names; after an error, others may still be lost.
    ///
    /// Does nothing if no pin is left: they were removed on purpose, by `socklb cleanup` or by hand.
    pub fn restore_pins(&mut self, lock: &Lock) -> (Vec<&'static str>, Result<(), KernelError>) {
        let (mut restored, mut result) = (Vec::new(), Ok(()));
        // Not during a removal by another process.
        let Some(_alone) = Change::try_begin(&self.pin_path) else { return (restored, result) };
        let Pins::Lost(lost) = self.pins(lock) else { return (restored, result) };
        for name in lost {
            fault::point();
            let done = match self.held.iter().find(|held| held.name == name) {
                Some(held) => pins::replace(&self.pin_path.join(name), held.fd.as_fd(), name),
                None => self.hooks.restore(name),
            };
            match done {
                Ok(()) => restored.push(name),
                Err(error) => result = Err(error),
            }
        }
        (restored, result)
    }

    /// Instructions that the verifier processed for the program of each hook.
    ///
    /// # Errors
    ///
    /// [`KernelError::Program`] if the kernel does not report the number.
    pub fn verified_instructions(&self) -> Result<BTreeMap<&'static str, u32>, KernelError> {
        let mut counts = BTreeMap::new();
        for hook in pins::hooks(self.features, self.passive_health) {
            let name = hook.name;
            let missing = KernelError::Missing { kind: "program", name };
            let program = self.object.program(&program_of(hook, self.features, self.log)).ok_or(missing)?;
            let info =
                program.info().map_err(|source| KernelError::Program { name, source: Box::new(source) })?;
            counts.insert(name, info.verified_instruction_count().unwrap_or_default());
        }
        Ok(counts)
    }

    /// Applies a plan. Entries that do not fit into a map affect only their own callers; the rest is applied.
    ///
    /// Waits for a grace period first if the plan may overwrite memory that a program still reads
    /// (docs/decisions/0001): before the first plan, since an earlier agent may just have freed entries, and
    /// before inserting hash elements after deletions, since the kernel reuses them at once.
    ///
    /// # Errors
    ///
    /// The first failing operation stops the plan. While [`Self::is_staged`], the earlier maps keep serving.
    /// The state in between is safe; read the image and plan again.
    pub fn apply(&mut self, plan: &Plan) -> Result<Done, KernelError> {
        if self.unsettled.must_wait(plan) {
            self.settle();
        }
        let (mut done, mut result) = (Done::default(), Ok(()));
        for op in plan.ops() {
            fault::point();
            self.observations.apply(op);
            match self.maps.apply(op) {
                Ok(()) => done.n_ops += 1,
                Err(KernelError::MapFull { .. }) if done.no_room.insert_key_of(op) => {}
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.applied = self.applied.max(plan.number());
        if plan.frees() {
            self.freed();
        }
        result?;
        // Entries without room do not delay the switch: they would not fit after a restart either.
        if self.is_staged {
            self.switch()?;
        }
        Ok(done)
    }

    /// Records that entries were freed which programs may still read.
    pub(crate) fn freed(&mut self) {
        if self.unsettled == StillRead::Nothing {
            self.unsettled = StillRead::Elements;
        }
        self.ask_grace();
    }

    fn ask_grace(&mut self) {
        self.asked.push(self.grace.ask(), self.applied);
    }

    /// Number of the last plan followed by a grace period: no program reads what it or earlier plans freed.
    /// Grace periods of later plans are pending.
    pub fn settled(&mut self) -> u64 {
        let passed = self.grace.passed();
        if let Some(plan) = self.asked.pop(passed) {
            self.settled = plan;
        }
        if self.asked.is_empty() {
            self.unsettled = StillRead::Nothing;
        }
        self.settled
    }

    /// Waits for the grace period of the last plan that freed entries. Afterwards no program reads them.
    pub fn settle(&mut self) {
        self.grace.wait();
        let _plan = self.settled();
    }

    /// The maps, for reading.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// What the programs observe of the ids in these maps. Use a clone elsewhere, which costs no memory.
    #[must_use]
    pub fn observations(&self) -> &Observations {
        &self.observations
    }

    /// Takes the object's ring buffer of diagnostic lines, once, if it was loaded with [`Options::log`].
    ///
    /// # Errors
    ///
    /// [`KernelError::Missing`] if the object has none.
    pub fn take_log(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>, KernelError> {
        aya_log::EbpfLogger::init(&mut self.object)
            .map_err(|_no_ring| KernelError::Missing { kind: "map", name: "AYA_LOGS" })
    }
}
