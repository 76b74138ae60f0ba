//! Loads and attaches the programs, and applies plans to the maps.

mod audit;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError},
    programs::{Program, ProgramError},
    sys::SyscallError,
};
use lb_common::{
    address::{Address, Octets6, mapped_ipv4},
    hooks::{self, HookSpec},
    layout::{
        self, AddressKey, ClusterIp, Endpoint4, Endpoint6, EndpointStats, Frontend, FrontendKey4,
        FrontendKey6, FrontendRef, MapValue, Meta, Network4, Network6, NodeAddr, Run, ServiceCidrs,
        ServiceStats,
    },
    limits,
    maps::{self, MAPS, Size, Sizing},
};
use lb_core::{
    desired::FrontendAddress,
    model::{Cidr, Protocol},
    plan::{self, Capacity, Op, Plan, StillRead, audit::Suspects},
    tables::{AddressTable, Entry, Image, wire_protocol},
};
use tracing::{info, warn};

pub use self::audit::{Findings, Repaired};

use self::audit::ForeignKey;
use super::{
    Features, KernelError,
    attach::{Hook, Hooks},
    cgroup,
    counters::{self, Counters},
    fault,
    grace::{Pending, Grace},
    host,
    layouts::{self, Directory, Held},
    lock::{Change, Lock},
    mapped::Mapped,
    object, pins,
    pod::Plain,
    syscall,
    adoption::{self, Adoption, TooSmall},
};

/// How to load and where to attach.
#[derive(Clone, Debug)]
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
    /// Whether the programs write diagnostic lines for [`Kernel::take_log`].
    pub log: bool,
}

/// The maps, open for reading and writing.
pub struct Maps {
    services4: HashMap<MapData, Plain<FrontendKey4>, Plain<FrontendRef>>,
    services6: HashMap<MapData, Plain<FrontendKey6>, Plain<FrontendRef>>,
    node_addrs: HashMap<MapData, Plain<AddressKey>, Plain<NodeAddr>>,
    cluster_ips: HashMap<MapData, Plain<AddressKey>, Plain<ClusterIp>>,
    service_cidrs: Mapped<ServiceCidrs>,
    service_stats: Counters<ServiceStats>,
    endpoint_stats: Counters<EndpointStats>,
    frontends: Mapped<Frontend>,
    endpoints4: Mapped<Endpoint4>,
    endpoints6: Mapped<Endpoint6>,
    capacity: Capacity,
    pinned_meta: Array<MapData, Plain<Meta>>,
    meta: Meta,
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
    maps: Maps,
    grace: Grace,
    unsettled: StillRead,
    /// Pending grace-period requests.
    asked: Pending,
    /// Number of the last applied plan. `settled` is the last plan followed by a grace period.
    applied: u64,
    settled: u64,
    features: Features,
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
        let mut takeover = Adoption::of(&former.pin_states(&sizing(options.capacity)?)?);
        let (mut capacity, mut too_small) = (options.capacity, Vec::new());
        match takeover.image {
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
            takeover = Adoption::of(&former.pin_states(&sizing(capacity)?)?);
        }
        let options = &Options { capacity, ..options.clone() };
        let maps_path = if takeover.made.is_empty() {
            pin_path.clone()
        } else {
            let next = pins::stage(pin_path)?;
            pins::share(pin_path, &next, &takeover.kept)?;
            if takeover.waits() {
                info!(
                    image = ?takeover.image,
                    maps = takeover.made.join(" "),
                    "maps are missing or have another layout or size: new ones are filled beside them"
                );
            } else if !takeover.kept.is_empty() {
                info!(maps = takeover.made.join(" "), "recreating these maps, keeping the others");
            }
            next
        };
        raise_memlock();
        let mut object = load(object, options, Some(&maps_path))?;
        let mut directory = Directory::open(&maps_path)?;
        let held = directory.record()?;
        let mut maps = Maps::take(&mut object, options)?;
        maps.fill_from(&former, &directory, &takeover)?;
        let mut programs = Vec::new();
        for hook in pins::hooks(options.features) {
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
            grace,
            unsettled: StillRead::Anything,
            asked: Pending::default(),
            applied: 0,
            settled: 0,
            features: options.features,
            log: options.log,
            object,
            pin_path: pin_path.clone(),
            held,
            hooks,
            is_staged: takeover.waits(),
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
        let _removed = pins::remove_former(&self.pin_path, maps::REMOVED, hooks::REMOVED)?;
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
        if !lock.is_in_place() || !pins::names(self.features).any(is_there) {
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
        for hook in pins::hooks(self.features) {
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
    fn freed(&mut self) {
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

/// Loads the programs of every hook to run the verifier, then discards them. Nothing is attached or pinned,
/// and the maps have minimal sizes.
///
/// # Errors
///
/// As [`Kernel::open`]: the errors that prevent loading.
pub fn try_programs(features: Features) -> Result<(), KernelError> {
    raise_memlock();
    let options = Options {
        pin_path: PathBuf::new(),
        cgroup: PathBuf::new(),
        capacity: Capacity { services: 1, endpoints: 1 },
        node_ports: limits::NODE_PORTS,
        localhost_nodeports: true,
        node_netns: None,
        features,
        // The larger programs.
        excludes: true,
        log: false,
    };
    let mut object = load(object::bytes()?, &options, None)?;
    for hook in pins::hooks(features) {
        let _verified = load_program(&mut object, hook, &program_of(hook, features, false))?;
    }
    Ok(())
}

fn load_program(object: &mut Ebpf, hook: &'static HookSpec, name: &str) -> Result<Hook, KernelError> {
    let missing = KernelError::Missing { kind: "program", name: hook.name };
    let Some(program) = object.program_mut(name) else { return Err(missing) };
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => return Err(missing),
    }
    .map_err(|source| match source {
        // Without the capability, the verifier rejects valid programs and returns its whole log.
        ProgramError::LoadError { io_error, .. }
            if io_error.kind() == io::ErrorKind::PermissionDenied && !may_load_programs() =>
        {
            KernelError::NotPermitted { what: format!("program {}", hook.name) }
        }
        source => KernelError::program(hook.name, source, &host::kernel()),
    })?;
    let refused = |source| KernelError::Program { name: hook.name, source: Box::new(source) };
    let fd = program.fd().map_err(refused)?.as_fd().try_clone_to_owned();
    Ok(Hook {
        spec: hook,
        program: fd.map_err(|source| KernelError::Link { name: hook.name, source })?,
        program_id: program.info().map_err(refused)?.id(),
    })
}

/// Whether this process has `CAP_PERFMON`, or `CAP_SYS_ADMIN`, which includes it.
fn may_load_programs() -> bool {
    const PERFMON_OR_SYS_ADMIN: u64 = 1 << 38 | 1 << 21;
    host::capabilities() & PERFMON_OR_SYS_ADMIN != 0
}

/// The name of the program for a hook: with slots, with socket storage alone, or with diagnostics.
fn program_of(hook: &HookSpec, features: Features, log: bool) -> String {
    let mode = match (features.has_slots(), log) {
        _ if !hook.has_modes => "",
        (true, false) => "",
        (true, true) => "_l",
        // These kernels have no program with diagnostics.
        (false, _) => "_s",
    };
    format!("{}{mode}", hook.name)
}

/// The inputs from which map sizes are computed.
fn sizing(Capacity { services, endpoints }: Capacity) -> Result<Sizing, KernelError> {
    Ok(Sizing { services, endpoints, n_cpus: counters::n_cpus()? })
}

/// Loads the object with all settings, adopting the maps pinned in a directory and pinning the others there.
fn load(object: &[u8], options: &Options, pin_path: Option<&Path>) -> Result<Ebpf, KernelError> {
    let Options { capacity, node_ports, .. } = options;
    let node_netns = options.node_netns.unwrap_or_default();
    let (set_retval, localhost) =
        (u8::from(options.features.set_retval), u8::from(options.localhost_nodeports));
    let excludes = u8::from(options.excludes);
    let (has_fields, fields) =
        (options.features.sock_fields.is_some(), options.features.sock_fields.unwrap_or_default());
    let (has_fields, mptcp) = (u8::from(has_fields), u8::from(options.features.mptcp));
    let sizing = sizing(*capacity)?;
    let n_counted = |name| maps::find(name).map_or(0, |map| map.max_entries(&sizing) / sizing.n_cpus);
    let (services, endpoints) = (n_counted("service_stats"), n_counted("endpoint_stats"));
    let mut loader = EbpfLoader::new();
    let _: &mut EbpfLoader<'_> = loader
        .override_global("HAS_SET_RETVAL", &set_retval, true)
        .override_global("HAS_SOCK_FIELDS", &has_fields, true)
        .override_global("HAS_MPTCP", &mptcp, true)
        .override_global("CONTEXT_SOCK", &fields.context_sock, true)
        .override_global("SOCK_COOKIE", &fields.cookie, true)
        .override_global("SOCK_STATE", &fields.state, true)
        .override_global("SOCK_KERNEL", &fields.kernel, true)
        .override_global("SOCK_KERNEL_MASK", &fields.kernel_mask, true)
        .override_global("NODE_PORT_FIRST", &node_ports.0, true)
        .override_global("NODE_PORT_LAST", &node_ports.1, true)
        .override_global("LOCALHOST_NODEPORTS", &localhost, true)
        .override_global("COUNTED_SERVICES", &services, true)
        .override_global("COUNTED_ENDPOINTS", &endpoints, true)
        .override_global("NODE_NETNS", &node_netns, true)
        .override_global("EXCLUDES", &excludes, true);
    for map in MAPS {
        if !matches!(map.size, Size::Fixed(_)) {
            loader.map_max_entries(map.name, map.max_entries(&sizing));
        }
        if let Some(pin_path) = pin_path {
            loader.map_pin_path(map.name, pin_path.join(map.name));
        }
    }
    if !options.log {
        // The programs refer to aya-log's ring buffer, so it must exist. One page is the minimum.
        loader.map_max_entries("AYA_LOGS", 4096);
    }
    loader.load(object).map_err(|source| KernelError::load(source, &host::kernel()))
}

/// Lifts `RLIMIT_MEMLOCK`: kernels before 5.11 charge BPF maps against it.
fn raise_memlock() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    // Fails without CAP_SYS_RESOURCE. If the limit matters, loading fails and reports it.
    let _not_needed_on_new_kernels = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}

impl Maps {
    /// Opens the pinned maps without loading or changing anything.
    ///
    /// # Errors
    ///
    /// [`KernelError::NothingPinned`], [`KernelError::NotPinned`], [`KernelError::Layout`],
    /// [`KernelError::Mixed`], or a failing system call.
    pub fn open(pin_path: &Path) -> Result<Self, KernelError> {
        let directory = Directory::open(pin_path)?;
        Self::open_each(|_name| &directory).map_err(|error| match error {
            KernelError::NotPinned { .. } if !MAPS.iter().any(|map| pin_path.join(map.name).exists()) => {
                KernelError::NothingPinned { path: pin_path.to_owned() }
            }
            error => error,
        })
    }

    /// Opens the maps; `place` returns the directory of each.
    fn open_each<'a>(place: impl Fn(&'static str) -> &'a Directory) -> Result<Self, KernelError> {
        let (pinned_meta, _): (Array<MapData, Plain<Meta>>, _) = place("meta").typed("meta")?;
        let Plain(meta) = pinned_meta.get(&0, 0).map_err(|source| KernelError::map("meta", source))?;
        let (services4, shape4) = place("services4").typed("services4")?;
        let (services6, shape6) = place("services6").typed("services6")?;
        let (frontends, frontends_shape) = place("frontends").map("frontends")?;
        let (endpoints4, endpoints4_shape) = place("endpoints4").map("endpoints4")?;
        let (endpoints6, endpoints6_shape) = place("endpoints6").map("endpoints6")?;
        let capacity = Capacity { services: shape4.max_entries, endpoints: endpoints4_shape.max_entries };
        let of_one_image = shape6.max_entries == capacity.services
            && frontends_shape.max_entries == capacity.services.saturating_mul(2)
            && endpoints6_shape.max_entries == capacity.endpoints;
        if !of_one_image {
            return Err(KernelError::Mixed { path: place("services4").path().to_owned() });
        }
        Ok(Self {
            services4,
            services6,
            node_addrs: place("node_addrs").typed("node_addrs")?.0,
            cluster_ips: place("cluster_ips").typed("cluster_ips")?.0,
            service_cidrs: map_memory("service_cidrs", &place("service_cidrs").map("service_cidrs")?.0)?,
            service_stats: map_counters("service_stats", &place("service_stats").map("service_stats")?.0)?,
            endpoint_stats: map_counters(
                "endpoint_stats",
                &place("endpoint_stats").map("endpoint_stats")?.0,
            )?,
            frontends: map_memory("frontends", &frontends)?,
            endpoints4: map_memory("endpoints4", &endpoints4)?,
            endpoints6: map_memory("endpoints6", &endpoints6)?,
            capacity,
            pinned_meta,
            meta,
        })
    }

    /// Takes the maps out of a loaded object.
    fn take(object: &mut Ebpf, options: &Options) -> Result<Self, KernelError> {
        let capacity = options.capacity;
        let meta = Meta {
            layout_version: maps::find("meta").map_or(0, fault::layout),
            max_services: capacity.services,
            max_endpoints: capacity.endpoints,
            localhost_nodeports: options.localhost_nodeports.into(),
            node_netns: options.node_netns.unwrap_or_default(),
            node_port_first: options.node_ports.0,
            node_port_last: options.node_ports.1,
            reserved: 0,
        };
        Ok(Self {
            services4: take_map(object, "services4")?,
            services6: take_map(object, "services6")?,
            node_addrs: take_map(object, "node_addrs")?,
            cluster_ips: take_map(object, "cluster_ips")?,
            service_cidrs: map_memory("service_cidrs", map_data(object, "service_cidrs")?)?,
            service_stats: map_counters("service_stats", map_data(object, "service_stats")?)?,
            endpoint_stats: map_counters("endpoint_stats", map_data(object, "endpoint_stats")?)?,
            frontends: map_memory("frontends", map_data(object, "frontends")?)?,
            endpoints4: map_memory("endpoints4", map_data(object, "endpoints4")?)?,
            endpoints6: map_memory("endpoints6", map_data(object, "endpoints6")?)?,
            capacity,
            pinned_meta: take_map(object, "meta")?,
            meta,
        })
    }

    /// Records the settings that the programs were loaded with.
    fn write_meta(&mut self) -> Result<(), KernelError> {
        self.pinned_meta.set(0, Plain(self.meta), 0).map_err(|source| KernelError::map("meta", source))
    }

    /// Fills recreated maps from earlier ones of the same layout, as far as entries fit: frontends, endpoints
    /// and nodes under their ids, and counters.
    fn fill_from(
        &mut self,
        former: &Directory,
        made: &Directory,
        takeover: &Adoption,
    ) -> Result<(), KernelError> {
        if takeover.image == adoption::Image::Moves {
            // A map that is new in this version is read from the new directory, where it is empty.
            let place = |name| if takeover.known.contains(&name) { former } else { made };
            let image = plan::transfer(&Self::open_each(place)?.image()?, self.capacity);
            for op in plan::diff(&Image::default(), &image).ops() {
                fault::point();
                self.apply(op)?;
            }
        }
        if takeover.refills("service_stats") {
            let former = map_counters("service_stats", &former.map("service_stats")?.0)?;
            for frontend in self.image()?.frontends.values() {
                self.service_stats.copy_from(&former, frontend.service_id);
            }
        }
        if takeover.refills("endpoint_stats") {
            let former = map_counters("endpoint_stats", &former.map("endpoint_stats")?.0)?;
            let image = self.image()?;
            let runs = [false, true].into_iter().flat_map(|ipv6| image.runs(ipv6).values());
            for entry in runs.flat_map(|run| run.iter()) {
                self.endpoint_stats.copy_from(&former, entry.endpoint_id);
            }
        }
        Ok(())
    }

    /// The sizes of the maps.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The settings that the programs were loaded with.
    #[must_use]
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    fn apply(&mut self, op: &Op) -> Result<(), KernelError> {
        match op {
            Op::WriteRun { ipv6, offset, entries } => self.write_run(*ipv6, *offset, entries),
            Op::WriteFrontend { id, frontend } => {
                in_range("frontends", *id, self.frontends.write(*id, *frontend))
            }
            Op::SetFrontend { id, frontend } => {
                // Words 0 and 1 are the run, which has its own operation.
                let words = [
                    (2, frontend.service_id),
                    (3, frontend.affinity_seconds),
                    (4, frontend.flags),
                    (5, frontend.reserved),
                ];
                let done = words.iter().all(|&(word, value)| self.frontends.store_u32(*id, word, value));
                in_range("frontends", *id, done)
            }
            Op::SwitchRun { id, run } => {
                in_range("frontends", *id, self.frontends.store_u64(*id, 0, run.to_word()))
            }
            Op::ResetService(id) => {
                self.service_stats.reset(*id);
                Ok(())
            }
            Op::ResetEndpoints(ids) => {
                ids.iter().for_each(|id| self.endpoint_stats.reset(*id));
                Ok(())
            }
            Op::InsertAddress { table, address, flag } => {
                let (key, flag) = (Plain(address_key(*address)), u32::from(*flag));
                let inserted = match table {
                    AddressTable::Nodes => self.node_addrs.insert(key, Plain(NodeAddr { own: flag }), 0),
                    AddressTable::ClusterIps => {
                        self.cluster_ips.insert(key, Plain(ClusterIp { served: flag }), 0)
                    }
                };
                inserted.map_err(|source| KernelError::map(table.map(), source))
            }
            Op::DeleteAddress(table, address) => {
                let key = Plain(address_key(*address));
                let removed = match table {
                    AddressTable::Nodes => self.node_addrs.remove(&key),
                    AddressTable::ClusterIps => self.cluster_ips.remove(&key),
                };
                ignore_missing(table.map(), removed)
            }
            Op::SetServiceCidrs(networks) => self.write_service_cidrs(networks),
            Op::InsertService { address, frontend_id } => {
                let value = Plain(FrontendRef { frontend_id: *frontend_id });
                match key(address) {
                    Some(Key::V4(key)) => self
                        .services4
                        .insert(Plain(key), value, 0)
                        .map_err(|source| KernelError::map("services4", source)),
                    Some(Key::V6(key)) => self
                        .services6
                        .insert(Plain(key), value, 0)
                        .map_err(|source| KernelError::map("services6", source)),
                    None => Ok(()),
                }
            }
            Op::DeleteService(address) => match key(address) {
                Some(Key::V4(key)) => ignore_missing("services4", self.services4.remove(&Plain(key))),
                Some(Key::V6(key)) => ignore_missing("services6", self.services6.remove(&Plain(key))),
                None => Ok(()),
            },
            // Unreferenced entries stay until they are overwritten.
            Op::DropRun { .. } | Op::DropFrontend(_) => Ok(()),
        }
    }

    /// Writes the networks while their counts are 0, then stores the counts.
    fn write_service_cidrs(&mut self, networks: &[Cidr]) -> Result<(), KernelError> {
        let cidrs = service_cidrs(networks);
        let hidden = ServiceCidrs { n_v4: 0, n_v6: 0, ..cidrs };
        let done = (networks.is_empty() || self.service_cidrs.write(0, hidden))
            && self.service_cidrs.store_u32(0, 0, cidrs.n_v4)
            && self.service_cidrs.store_u32(0, 1, cidrs.n_v6);
        in_range("service_cidrs", 0, done)
    }

    fn write_run(&mut self, ipv6: bool, offset: u32, entries: &[Entry]) -> Result<(), KernelError> {
        for (index, entry) in (offset..).zip(entries) {
            let (port, endpoint_id) = (entry.address.port(), entry.endpoint_id);
            let done = match entry.address.ip() {
                IpAddr::V4(ip) if !ipv6 => self
                    .endpoints4
                    .write(index, Endpoint4 { address: ip.octets(), port, reserved: 0, endpoint_id }),
                IpAddr::V6(ip) if ipv6 => self
                    .endpoints6
                    .write(index, Endpoint6 { address: ip.octets(), port, reserved: 0, endpoint_id }),
                _ => false,
            };
            in_range(if ipv6 { "endpoints6" } else { "endpoints4" }, index, done)?;
        }
        Ok(())
    }

    /// Reads the tables: every frontend that a call can find, and the runs they refer to.
    ///
    /// Not a snapshot: while an agent applies plans, entries read early may be older than entries read late.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn image(&self) -> Result<Image, KernelError> {
        self.read().map(|(image, _strays)| image)
    }

    /// As [`Self::image`], with the keys that name no frontend.
    fn read(&self) -> Result<(Image, Vec<ForeignKey>), KernelError> {
        let (mut image, mut strays) = (Image::default(), Vec::new());
        for item in &self.services4 {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("services4", source))?;
            match address(Ipv4Addr::from(key.address).into(), key.port, key.protocol, key.reserved) {
                Some(address) => self.read_frontend(&mut image, address, value),
                None => strays.push(ForeignKey::V4(key)),
            }
        }
        for item in &self.services6 {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("services6", source))?;
            match address(Ipv6Addr::from(key.address).into(), key.port, key.protocol, key.reserved) {
                Some(address) => self.read_frontend(&mut image, address, value),
                None => strays.push(ForeignKey::V6(key)),
            }
        }
        for item in &self.node_addrs {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("node_addrs", source))?;
            image.node_addrs.insert(ip_of(&key.address), value.own != 0);
        }
        for item in &self.cluster_ips {
            let (Plain(key), Plain(value)) =
                item.map_err(|source| KernelError::map("cluster_ips", source))?;
            image.cluster_ips.insert(ip_of(&key.address), value.served != 0);
        }
        image.service_cidrs = self.read_service_cidrs();
        Ok((image, strays))
    }

    fn read_service_cidrs(&self) -> Vec<Cidr> {
        self.service_cidrs.read(0).as_ref().map(networks).unwrap_or_default()
    }

    fn read_frontend(&self, image: &mut Image, address: FrontendAddress, value: FrontendRef) {
        image.services.insert(address, value.frontend_id);
        let Some(frontend) = self.frontends.read(value.frontend_id) else { return };
        image.frontends.insert(value.frontend_id, frontend);
        let ipv6 = address.ip.is_ipv6();
        if frontend.run.len > 0
            && !image.runs(ipv6).contains_key(&frontend.run.offset)
            && let Some(entries) = self.read_run(ipv6, frontend.run)
        {
            image.runs_mut(ipv6).insert(frontend.run.offset, entries.into());
        }
    }

    fn read_run(&self, ipv6: bool, run: Run) -> Option<Vec<Entry>> {
        let end = run.offset.checked_add(run.len)?;
        if end > self.capacity.endpoints {
            return None;
        }
        (run.offset..end).map(|index| self.read_entry(ipv6, index)).collect()
    }

    /// Calls to a service port since it got its id, summed over all CPUs. Zero for an id beyond the map,
    /// which is not counted.
    #[must_use]
    pub fn service_stats(&self, service_id: u32) -> ServiceStats {
        self.service_stats.read(service_id).fold(ServiceStats::default(), |sum, cpu| ServiceStats {
            connects: sum.connects.wrapping_add(cpu.connects),
            refusals: sum.refusals.wrapping_add(cpu.refusals),
            datagrams: sum.datagrams.wrapping_add(cpu.datagrams),
        })
    }

    /// Calls to an endpoint since it got its id, summed over all CPUs. Zero for an id beyond the map, which
    /// is not counted.
    #[must_use]
    pub fn endpoint_stats(&self, endpoint_id: u32) -> EndpointStats {
        self.endpoint_stats.read(endpoint_id).fold(EndpointStats::default(), |sum, cpu| EndpointStats {
            connects: sum.connects.wrapping_add(cpu.connects),
            datagrams: sum.datagrams.wrapping_add(cpu.datagrams),
        })
    }
}

fn take_map<T: TryFrom<Map, Error = MapError>>(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<T, KernelError> {
    let map = object.take_map(name).ok_or(KernelError::Missing { kind: "map", name })?;
    T::try_from(map).map_err(|source| KernelError::map(name, source))
}

fn map_data<'a>(object: &'a Ebpf, name: &'static str) -> Result<&'a MapData, KernelError> {
    match object.map(name) {
        Some(Map::Array(data)) => Ok(data),
        _ => Err(KernelError::Missing { kind: "map", name }),
    }
}

fn map_memory<T: MapValue>(name: &'static str, map: &MapData) -> Result<Mapped<T>, KernelError> {
    let n = map.info().map_err(|source| KernelError::map(name, source))?.max_entries();
    Mapped::new(map.fd().as_fd(), n).map_err(|source| KernelError::Mmap { name, source })
}

fn map_counters<T: MapValue + Default>(
    name: &'static str,
    map: &MapData,
) -> Result<Counters<T>, KernelError> {
    let n = map.info().map_err(|source| KernelError::map(name, source))?.max_entries();
    Counters::new(name, map.fd().as_fd(), n)
}

fn in_range(name: &'static str, index: u32, done: bool) -> Result<(), KernelError> {
    if done { Ok(()) } else { Err(KernelError::OutOfRange { name, index }) }
}

/// Accepts that the entry is deleted already.
fn ignore_missing(name: &'static str, result: Result<(), MapError>) -> Result<(), KernelError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| KernelError::map(name, source)),
    }
}

/// The frontend that a key names; `None` if no call can match it. No agent writes such a key.
fn address(ip: IpAddr, port: u16, protocol: u8, reserved: u8) -> Option<FrontendAddress> {
    let protocol = match layout::Protocol(protocol) {
        layout::Protocol::TCP => Protocol::Tcp,
        layout::Protocol::UDP => Protocol::Udp,
        _ => return None,
    };
    (reserved == 0).then_some(FrontendAddress { ip, port, protocol })
}

enum Key {
    V4(FrontendKey4),
    V6(FrontendKey6),
}

/// The key of a frontend; `None` for protocols that no hook serves.
fn key(address: &FrontendAddress) -> Option<Key> {
    let protocol = wire_protocol(address.protocol)?.0;
    Some(match address.ip {
        IpAddr::V4(ip) => {
            Key::V4(FrontendKey4 { address: ip.octets(), port: address.port, protocol, reserved: 0 })
        }
        IpAddr::V6(ip) => {
            Key::V6(FrontendKey6 { address: ip.octets(), port: address.port, protocol, reserved: 0 })
        }
    })
}

fn address_key(address: IpAddr) -> AddressKey {
    let address = match address {
        IpAddr::V4(ip) => ip.octets().to_mapped(),
        IpAddr::V6(ip) => ip.octets(),
    };
    AddressKey { address }
}

/// Networks in the layout of the map. `Encoder` guarantees that they fit.
fn service_cidrs(networks: &[Cidr]) -> ServiceCidrs {
    let mut cidrs = ServiceCidrs::default();
    for network in networks {
        match (network.address, network.mask()) {
            (IpAddr::V4(address), IpAddr::V4(mask)) => {
                if let Some(place) = cidrs.v4.get_mut(cidrs.n_v4 as usize) {
                    *place = Network4 { address: address.octets(), mask: mask.octets() };
                    cidrs.n_v4 += 1;
                }
            }
            (IpAddr::V6(address), IpAddr::V6(mask)) => {
                if let Some(place) = cidrs.v6.get_mut(cidrs.n_v6 as usize) {
                    *place = Network6 { address: address.octets(), mask: mask.octets() };
                    cidrs.n_v6 += 1;
                }
            }
            _ => {}
        }
    }
    cidrs
}

/// The active networks, IPv4 first. Content that no agent writes yields 0.0.0.0/0, which no setting allows.
fn networks(cidrs: &ServiceCidrs) -> Vec<Cidr> {
    let prefix_len = |mask: &[u8]| {
        let n_ones: u32 = mask.iter().map(|octet| octet.count_ones()).sum();
        u8::try_from(n_ones).unwrap_or(u8::MAX)
    };
    let v4 = cidrs.v4.iter().take(cidrs.n_v4 as usize).map(|network| Cidr {
        address: Ipv4Addr::from(network.address).into(),
        prefix_len: prefix_len(&network.mask),
    });
    let v6 = cidrs.v6.iter().take(cidrs.n_v6 as usize).map(|network| Cidr {
        address: Ipv6Addr::from(network.address).into(),
        prefix_len: prefix_len(&network.mask),
    });
    let found: Vec<Cidr> = v4.chain(v6).collect();
    let written = service_cidrs(&found);
    let is_same = (written.n_v4, written.n_v6) == (cidrs.n_v4, cidrs.n_v6)
        && written.v4.iter().zip(&cidrs.v4).take(written.n_v4 as usize).all(|(a, b)| a == b)
        && written.v6.iter().zip(&cidrs.v6).take(written.n_v6 as usize).all(|(a, b)| a == b);
    if is_same { found } else { vec![Cidr { address: Ipv4Addr::UNSPECIFIED.into(), prefix_len: 0 }] }
}

fn ip_of(octets: &Octets6) -> IpAddr {
    match mapped_ipv4(octets) {
        Some(ip) => Ipv4Addr::from(ip).into(),
        None => Ipv6Addr::from(*octets).into(),
    }
}
