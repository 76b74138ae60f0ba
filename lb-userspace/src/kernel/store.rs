//! Loading, attaching, and carrying out plans.

mod audit;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues},
    programs::{
        CgroupAttachMode, Program, ProgramError,
        links::{FdLink, LinkError, PinnedLink},
    },
    sys::SyscallError,
};
use lb_common::{
    address::{Address, Octets6, mapped_ipv4},
    layout::{
        self, Endpoint4, Endpoint6, EndpointStats, Frontend, FrontendKey4, FrontendKey6, FrontendRef,
        MapValue, Meta, NodeAddr, NodeAddrKey, Run, ServiceStats,
    },
    limits,
};
use tracing::info;

use self::audit::Stray;
pub use self::audit::{Findings, Repaired};
use super::{
    Features, KernelError, cgroup, fault, grace::Grace, host, mapped::Mapped, object, pins, pod::Plain,
    syscall,
};
use crate::{
    desired::FrontendAddress,
    model::Protocol,
    plan::{self, Capacity, Op, Plan, Unsettled, audit::Suspects},
    tables::{Entry, Image, wire_protocol},
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
    /// What the kernel can do.
    pub features: Features,
    /// Whether cgroups may be excluded ([`super::exclusion`]). Without, the programs have no instruction for it.
    pub excludes: bool,
    /// Whether the programs write diagnostic lines for [`Kernel::take_log`].
    pub log: bool,
}

/// The maps, open for reading and writing.
pub struct Maps {
    services4: HashMap<MapData, Plain<FrontendKey4>, Plain<FrontendRef>>,
    services6: HashMap<MapData, Plain<FrontendKey6>, Plain<FrontendRef>>,
    node_addrs: HashMap<MapData, Plain<NodeAddrKey>, Plain<NodeAddr>>,
    service_stats: PerCpuArray<MapData, Plain<ServiceStats>>,
    endpoint_stats: PerCpuArray<MapData, Plain<EndpointStats>>,
    frontends: Mapped<Frontend>,
    endpoints4: Mapped<Endpoint4>,
    endpoints6: Mapped<Endpoint6>,
    meta: Meta,
}

/// What carrying out a plan came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Operations.
    pub n_ops: usize,
    /// Keys for which a map had no room: it is full of entries that are not the agent's. An audit removes those, and
    /// [`Kernel::repair`] inserts these.
    pub no_room: Suspects,
}

/// The maps and programs of this node.
pub struct Kernel {
    maps: Maps,
    grace: Grace,
    unsettled: Unsettled,
    /// What was asked of `grace`, with the number of the last plan before.
    asked: VecDeque<(u64, u64)>,
    /// The number of the last plan, and of the last one since which a grace period has passed.
    carried_out: u64,
    settled: u64,
    features: Features,
    log: bool,
    object: Ebpf,
    pin_path: PathBuf,
    /// The cgroup to attach to, as long as other programs and maps than these serve.
    staged: Option<File>,
}

/// What was found where the maps are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Nothing that serves.
    Nothing,
    /// Maps to go on with.
    Ours,
    /// Maps of this layout in other sizes.
    OtherSizes,
    /// Maps that cannot be read: of this layout version, or of none that is known.
    OtherLayout(Option<u32>),
}

impl Kernel {
    /// Loads the programs, adopts the pinned maps or creates them, and attaches the programs or replaces the
    /// attached ones.
    ///
    /// Maps of another layout or in other sizes are left to serve, with their programs. New ones are made beside them and
    /// filled with what the old ones hold, if their layout is the same; [`Self::apply`] switches to them with its first
    /// plan. See [`Self::is_staged`].
    ///
    /// `on_grace` is called, on another thread, each time a grace period has passed: see [`Self::settled`].
    ///
    /// # Errors
    ///
    /// See [`KernelError`]; nothing that was attached before is detached.
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
        let found = look(pin_path, options.capacity)?;
        let maps_path = match found {
            Found::Ours => pin_path.clone(),
            Found::Nothing => {
                // An agent that ended before it wrote anything may have asked for other sizes.
                pins::remove_maps(pin_path)?;
                pin_path.clone()
            }
            Found::OtherSizes | Found::OtherLayout(_) => pins::stage(pin_path)?,
        };
        let is_staged = maps_path != *pin_path;
        if found == Found::OtherSizes {
            pins::share(pin_path, &maps_path)?;
        }
        raise_memlock();
        let mut object = load(object, options, Some(&maps_path))?;
        let mut maps = Maps::take(&mut object, options)?;
        if is_staged {
            info!(?found, "the maps have another layout or other sizes: new ones are filled beside them");
        }
        if found == Found::OtherSizes {
            maps.fill_from(&Maps::open(pin_path)?)?;
        }
        let not_made = |io_error| MapError::SyscallError(SyscallError { call: "bpf_map_create", io_error });
        let periods =
            syscall::MapOfMaps::new().map_err(|source| KernelError::map("socklb_grace", not_made(source)))?;
        let grace = Grace::start(move || periods.wait_for_grace_period(), on_grace);
        let grace = grace.map_err(KernelError::Thread)?;
        let mut kernel = Self {
            maps,
            grace,
            unsettled: Unsettled::Anything,
            asked: VecDeque::new(),
            carried_out: 0,
            settled: 0,
            features: options.features,
            log: options.log,
            object,
            pin_path: pin_path.clone(),
            staged: None,
        };
        kernel.ask_grace();
        for hook in pins::hooks(options.features) {
            // Also when they are attached later: what the verifier refuses is to be known now.
            let name = program_of(hook, kernel.features, kernel.log);
            let _verified = load_program(&mut kernel.object, hook, &name)?;
        }
        if is_staged {
            kernel.staged = Some(cgroup);
        } else {
            kernel.attach_all(&cgroup)?;
        }
        Ok(kernel)
    }

    /// Whether other programs and maps serve still: the pinned ones, which this agent cannot go on with. What is written
    /// serves nobody before the first plan is carried out.
    #[must_use]
    pub const fn is_staged(&self) -> bool {
        self.staged.is_some()
    }

    /// Where the maps are pinned now. After a first plan that ends [`Self::is_staged`] they are elsewhere.
    #[must_use]
    pub fn maps_path(&self) -> PathBuf {
        if self.is_staged() { self.pin_path.join(pins::NEXT) } else { self.pin_path.clone() }
    }

    /// Has the programs of every hook run on these maps, which take the place of the pinned ones.
    ///
    /// Each step can be repeated, by this agent or the next one.
    fn switch(&mut self) -> Result<(), KernelError> {
        let Some(cgroup) = self.staged.take() else { return Ok(()) };
        let switched = pins::commit(&self.pin_path)
            .and_then(|()| self.attach_all(&cgroup))
            .and_then(|()| pins::promote(&self.pin_path));
        match &switched {
            Ok(()) => info!("switched to the new maps"),
            Err(_again) => self.staged = Some(cgroup),
        }
        switched
    }

    fn attach_all(&mut self, cgroup: &File) -> Result<(), KernelError> {
        for hook in pins::hooks(self.features) {
            fault::point();
            self.attach(hook, cgroup)?;
        }
        Ok(())
    }

    /// Puts the loaded program of a hook into the hook's link.
    fn attach(&mut self, hook: &'static str, cgroup: &File) -> Result<(), KernelError> {
        let pin = &self.pin_path.join(hook);
        let missing = KernelError::Missing { kind: "program", name: hook };
        let name = program_of(hook, self.features, self.log);
        let program = self.object.program_mut(&name).ok_or(missing)?;
        let refused = |source| KernelError::Program { name: hook, source: Box::new(source) };
        let link_error = |source| KernelError::Link { name: hook, source };
        match syscall::open_pin(pin) {
            Ok(link) => {
                let fd = program.fd().map_err(refused)?;
                return syscall::replace_program(link.as_fd(), fd.as_fd()).map_err(link_error);
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(link_error(error)),
            Err(_not_pinned) => {}
        }
        // Links are always "multi": a flag for it makes bpf_link_create fail with EINVAL.
        let mode = CgroupAttachMode::default();
        let link: Result<FdLink, LinkError> = match program {
            Program::CgroupSockAddr(program) => {
                let id = program.attach(cgroup, mode).map_err(refused)?;
                program.take_link(id).map_err(refused)?.try_into()
            }
            Program::CgroupSock(program) => {
                let id = program.attach(cgroup, mode).map_err(refused)?;
                program.take_link(id).map_err(refused)?.try_into()
            }
            _ => return Err(KernelError::Missing { kind: "program", name: hook }),
        };
        let link = link.map_err(|error| link_error(io::Error::other(error)))?;
        let _pinned: PinnedLink = link.pin(pin).map_err(|error| link_error(io::Error::other(error)))?;
        Ok(())
    }

    /// The instructions that the verifier walked through for the program of each hook.
    ///
    /// # Errors
    ///
    /// [`KernelError::Program`] if the kernel does not tell.
    pub fn verified_instructions(&self) -> Result<BTreeMap<&'static str, u32>, KernelError> {
        let mut counts = BTreeMap::new();
        for name in pins::hooks(self.features) {
            let missing = KernelError::Missing { kind: "program", name };
            let program = self.object.program(&program_of(name, self.features, self.log)).ok_or(missing)?;
            let info =
                program.info().map_err(|source| KernelError::Program { name, source: Box::new(source) })?;
            counts.insert(name, info.verified_instruction_count().unwrap_or_default());
        }
        Ok(counts)
    }

    /// Carries out a plan. What finds no room in a map is missed by its own callers only: the rest is done.
    ///
    /// Waits for a grace period first if the plan may write over what a program still reads (docs/decisions/0001): the
    /// first plan, since an agent before this one may have freed anything a moment ago, and one that takes hash elements
    /// when some were freed, since the kernel reuses them at once.
    ///
    /// # Errors
    ///
    /// A failing operation ends the plan, and other maps that serve still go on doing so: see [`Self::is_staged`]. The
    /// state in between is safe; read the image and plan again.
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
        self.carried_out = self.carried_out.max(plan.number());
        if plan.frees() {
            self.freed();
        }
        result?;
        // What has no room is no reason to stay with the former maps: it would have none after the next restart either.
        self.switch()?;
        Ok(done)
    }

    /// Something was freed that programs may still read.
    fn freed(&mut self) {
        if self.unsettled == Unsettled::Nothing {
            self.unsettled = Unsettled::Elements;
        }
        self.ask_grace();
    }

    fn ask_grace(&mut self) {
        self.asked.push_back((self.grace.ask(), self.carried_out));
    }

    /// The number of a plan since which a grace period has passed: nobody reads what it and those before it freed. Later
    /// plans may have freed more, for which a grace period is under way.
    pub fn settled(&mut self) -> u64 {
        let passed = self.grace.passed();
        while let Some(&(_, plan)) = self.asked.front().filter(|(asked, _)| *asked <= passed) {
            let _passed = self.asked.pop_front();
            self.settled = plan;
        }
        if self.asked.is_empty() {
            self.unsettled = Unsettled::Nothing;
        }
        self.settled
    }

    /// Waits until a grace period has passed since the last plan that freed something: then nobody reads it.
    pub fn settle(&mut self) {
        self.grace.wait();
        let _plan = self.settled();
    }

    /// The maps, for reading.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The object's ring buffer of diagnostic lines, once, if it was loaded with [`Options::log`].
    ///
    /// # Errors
    ///
    /// [`KernelError::Missing`] if the object has none.
    pub fn take_log(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>, KernelError> {
        aya_log::EbpfLogger::init(&mut self.object)
            .map_err(|_no_ring| KernelError::Missing { kind: "map", name: "AYA_LOGS" })
    }
}

/// Has the verifier judge the programs of every hook, and leaves nothing behind: nothing is attached or pinned, and maps
/// are as small as they can be.
///
/// # Errors
///
/// As [`Kernel::open`]: what would keep the agent from loading them.
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

/// Loads the program of a hook.
fn load_program<'a>(
    object: &'a mut Ebpf,
    hook: &'static str,
    name: &str,
) -> Result<&'a mut Program, KernelError> {
    let missing = KernelError::Missing { kind: "program", name: hook };
    let Some(program) = object.program_mut(name) else { return Err(missing) };
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => return Err(missing),
    }
    .map_err(|source| match source {
        // The verifier then refuses one program or another for what it would allow, and shows its whole log.
        ProgramError::LoadError { io_error, .. }
            if io_error.kind() == io::ErrorKind::PermissionDenied && !may_load_programs() =>
        {
            KernelError::NotPermitted { what: format!("program {hook}") }
        }
        source => KernelError::program(hook, source, &host::kernel()),
    })?;
    Ok(program)
}

/// Whether this process has `CAP_PERFMON`, or `CAP_SYS_ADMIN`, which it is a part of.
fn may_load_programs() -> bool {
    const PERFMON_OR_SYS_ADMIN: u64 = 1 << 38 | 1 << 21;
    host::capabilities() & PERFMON_OR_SYS_ADMIN != 0
}

/// The name of the program for a hook: with slots, with socket storage alone, or with diagnostics.
fn program_of(hook: &str, features: Features, log: bool) -> String {
    let mode = match (features.has_slots(), log) {
        _ if hook == "sock_release" => "",
        (true, false) => "",
        (true, true) => "_l",
        // There is none with diagnostics for these kernels.
        (false, _) => "_s",
    };
    format!("{hook}{mode}")
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
    let n_cpus = aya::util::nr_cpus().map_err(|(_path, error)| KernelError::Thread(error))?;
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
        .override_global("NODE_NETNS", &node_netns, true)
        .override_global("EXCLUDES", &excludes, true)
        .map_max_entries("services4", capacity.services)
        .map_max_entries("services6", capacity.services)
        .map_max_entries("frontends", n_frontends(*capacity))
        .map_max_entries(
            "service_stats",
            n_counted(n_frontends(*capacity), size_of::<ServiceStats>(), n_cpus),
        )
        .map_max_entries("endpoints4", capacity.endpoints)
        .map_max_entries("endpoints6", capacity.endpoints)
        .map_max_entries("endpoint_stats", n_counted(capacity.endpoints, size_of::<EndpointStats>(), n_cpus));
    if !options.log {
        // The ring buffer of aya-log must exist for the programs that name it; a page is the least.
        loader.map_max_entries("AYA_LOGS", 4096);
    }
    for (name, pin_path) in pin_path.into_iter().flat_map(|path| pins::MAPS.map(|name| (name, path))) {
        loader.map_pin_path(name, pin_path.join(name));
    }
    loader.load(object).map_err(|source| KernelError::load(source, &host::kernel()))
}

/// Entries of `frontends`: those of both families.
fn n_frontends(capacity: Capacity) -> u32 {
    capacity.services.saturating_mul(2)
}

/// Most bytes that a map of counters takes, over all CPUs.
const MOST_COUNTERS: usize = 64 << 20;

/// Entries of a map of counters, which has a value for each possible CPU: so many as fit into [`MOST_COUNTERS`]. What has
/// a higher id is served and not counted; ids are given out from 0.
fn n_counted(wanted: u32, size: usize, n_cpus: usize) -> u32 {
    let most = MOST_COUNTERS / size / n_cpus.max(1);
    u32::try_from(most).map_or(wanted, |most| wanted.min(most))
}

/// Lets BPF maps count against a limit that is not there (kernels before 5.11 charge them to the process).
fn raise_memlock() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    // Without CAP_SYS_RESOURCE this fails, and from 5.11 on it is not needed: loading tells.
    let _not_needed_on_new_kernels = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}

/// Looks at what is pinned.
fn look(pin_path: &Path, capacity: Capacity) -> Result<Found, KernelError> {
    let meta = match read_meta(pin_path) {
        // Of a layout in which `meta` has another size.
        Err(KernelError::Map { source, .. })
            if matches!(*source, MapError::InvalidKeySize { .. } | MapError::InvalidValueSize { .. }) =>
        {
            return Ok(Found::OtherLayout(None));
        }
        meta => meta?.unwrap_or_default(),
    };
    Ok(if meta == Meta::default() {
        // Made by an agent that ended before it wrote anything, unless somebody has damaged it.
        if pins::any_link(pin_path) { Found::OtherLayout(None) } else { Found::Nothing }
    } else if meta.layout_version != fault::layout_version() {
        Found::OtherLayout(Some(meta.layout_version))
    } else if (meta.max_services, meta.max_endpoints) == (capacity.services, capacity.endpoints) {
        Found::Ours
    } else {
        Found::OtherSizes
    })
}

/// The pinned `meta`, or `None` if nothing is pinned.
fn read_meta(pin_path: &Path) -> Result<Option<Meta>, KernelError> {
    let pin = pin_path.join("meta");
    match std::fs::symlink_metadata(&pin) {
        Ok(_exists) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(KernelError::PinPath { path: pin_path.to_owned(), source }),
    }
    let array: Array<MapData, Plain<Meta>> = open_pinned(pin_path, "meta")?;
    Ok(Some(array.get(&0, 0).map_err(|source| KernelError::map("meta", source))?.0))
}

/// Opens a pinned map as a typed one.
pub(super) fn open_pinned<T: TryFrom<Map, Error = MapError>>(
    pin_path: &Path,
    name: &'static str,
) -> Result<T, KernelError> {
    let wrap = |source| KernelError::map(name, source);
    let data = MapData::from_pin(pin_path.join(name)).map_err(wrap)?;
    Map::from_map_data(data).and_then(T::try_from).map_err(wrap)
}

impl Maps {
    /// Opens the pinned maps without loading or changing anything.
    ///
    /// # Errors
    ///
    /// [`KernelError::NothingPinned`], [`KernelError::Layout`], or a failing system call.
    pub fn open(pin_path: &Path) -> Result<Self, KernelError> {
        let nothing = || KernelError::NothingPinned { path: pin_path.to_owned() };
        let meta = read_meta(pin_path)?.ok_or_else(nothing)?;
        if meta == Meta::default() {
            return Err(nothing());
        }
        let ours = fault::layout_version();
        if meta.layout_version != ours {
            return Err(KernelError::Layout { path: pin_path.to_owned(), found: meta.layout_version, ours });
        }
        let capacity = Capacity { services: meta.max_services, endpoints: meta.max_endpoints };
        let data =
            |name| MapData::from_pin(pin_path.join(name)).map_err(|source| KernelError::map(name, source));
        Ok(Self {
            services4: open_pinned(pin_path, "services4")?,
            services6: open_pinned(pin_path, "services6")?,
            node_addrs: open_pinned(pin_path, "node_addrs")?,
            service_stats: open_pinned(pin_path, "service_stats")?,
            endpoint_stats: open_pinned(pin_path, "endpoint_stats")?,
            frontends: map_memory("frontends", &data("frontends")?, n_frontends(capacity))?,
            endpoints4: map_memory("endpoints4", &data("endpoints4")?, capacity.endpoints)?,
            endpoints6: map_memory("endpoints6", &data("endpoints6")?, capacity.endpoints)?,
            meta,
        })
    }

    /// Takes the maps out of a loaded object and writes `meta`.
    fn take(object: &mut Ebpf, options: &Options) -> Result<Self, KernelError> {
        let capacity = options.capacity;
        let meta = Meta {
            layout_version: fault::layout_version(),
            max_services: capacity.services,
            max_endpoints: capacity.endpoints,
            localhost_nodeports: options.localhost_nodeports.into(),
            node_netns: options.node_netns.unwrap_or_default(),
            node_port_first: options.node_ports.0,
            node_port_last: options.node_ports.1,
            reserved: 0,
        };
        let mut pinned_meta: Array<MapData, Plain<Meta>> = take_map(object, "meta")?;
        pinned_meta.set(0, Plain(meta), 0).map_err(|source| KernelError::map("meta", source))?;
        Ok(Self {
            services4: take_map(object, "services4")?,
            services6: take_map(object, "services6")?,
            node_addrs: take_map(object, "node_addrs")?,
            service_stats: take_map(object, "service_stats")?,
            endpoint_stats: take_map(object, "endpoint_stats")?,
            frontends: map_memory("frontends", map_data(object, "frontends")?, n_frontends(capacity))?,
            endpoints4: map_memory("endpoints4", map_data(object, "endpoints4")?, capacity.endpoints)?,
            endpoints6: map_memory("endpoints6", map_data(object, "endpoints6")?, capacity.endpoints)?,
            meta,
        })
    }

    /// Fills new maps with what others of the same layout hold, as far as it fits: frontends, endpoints and nodes under
    /// their ids, and counters.
    fn fill_from(&mut self, former: &Self) -> Result<(), KernelError> {
        let image = plan::transfer(&former.image()?, self.capacity());
        for op in plan::diff(&Image::default(), &image).ops() {
            fault::point();
            self.apply(op)?;
        }
        let service_ids: BTreeSet<u32> =
            image.frontends.values().map(|frontend| frontend.service_id).collect();
        copy("service_stats", &former.service_stats, &mut self.service_stats, service_ids)?;
        let runs = [false, true].into_iter().flat_map(|ipv6| image.runs(ipv6).values());
        let endpoint_ids: BTreeSet<u32> =
            runs.flat_map(|run| run.iter().map(|entry| entry.endpoint_id)).collect();
        copy("endpoint_stats", &former.endpoint_stats, &mut self.endpoint_stats, endpoint_ids)
    }

    /// The sizes that the maps were made with.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        Capacity { services: self.meta.max_services, endpoints: self.meta.max_endpoints }
    }

    /// Layout version, sizes, and the settings that the programs were loaded with.
    #[must_use]
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Carries out one operation.
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
            Op::ResetService(id) => reset(&mut self.service_stats, "service_stats", *id),
            Op::ResetEndpoints(ids) => {
                ids.iter().try_for_each(|&id| reset(&mut self.endpoint_stats, "endpoint_stats", id))
            }
            Op::InsertNode { address, own } => self
                .node_addrs
                .insert(Plain(node_key(*address)), Plain(NodeAddr { own: u32::from(*own) }), 0)
                .map_err(|source| KernelError::map("node_addrs", source)),
            Op::DeleteNode(address) => {
                gone_is_fine("node_addrs", self.node_addrs.remove(&Plain(node_key(*address))))
            }
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
                Some(Key::V4(key)) => gone_is_fine("services4", self.services4.remove(&Plain(key))),
                Some(Key::V6(key)) => gone_is_fine("services6", self.services6.remove(&Plain(key))),
                None => Ok(()),
            },
            // What nothing refers to stays as it is until it is written anew.
            Op::DropRun { .. } | Op::DropFrontend(_) => Ok(()),
        }
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

    /// Reads what the tables hold: every frontend that a call can find, and the runs they refer to.
    ///
    /// Not a snapshot: with an agent at work, entries read early may be older than entries read late.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn image(&self) -> Result<Image, KernelError> {
        self.read().map(|(image, _strays)| image)
    }

    /// As [`Self::image`], and the keys that stand for no frontend.
    fn read(&self) -> Result<(Image, Vec<Stray>), KernelError> {
        let (mut image, mut strays) = (Image::default(), Vec::new());
        for item in &self.services4 {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("services4", source))?;
            match address(Ipv4Addr::from(key.address).into(), key.port, key.protocol, key.reserved) {
                Some(address) => self.read_frontend(&mut image, address, value),
                None => strays.push(Stray::V4(key)),
            }
        }
        for item in &self.services6 {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("services6", source))?;
            match address(Ipv6Addr::from(key.address).into(), key.port, key.protocol, key.reserved) {
                Some(address) => self.read_frontend(&mut image, address, value),
                None => strays.push(Stray::V6(key)),
            }
        }
        for item in &self.node_addrs {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("node_addrs", source))?;
            image.node_addrs.insert(ip_of(&key.address), value.own != 0);
        }
        Ok((image, strays))
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
        if end > self.meta.max_endpoints {
            return None;
        }
        (run.offset..end).map(|index| self.read_entry(ipv6, index)).collect()
    }

    /// The calls of a service port since it got its id, over all CPUs; zero for an id beyond the map, which is not
    /// counted.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn service_stats(&self, service_id: u32) -> Result<ServiceStats, KernelError> {
        if service_id >= self.service_stats.len() {
            return Ok(ServiceStats::default());
        }
        let per_cpu = self
            .service_stats
            .get(&service_id, 0)
            .map_err(|source| KernelError::map("service_stats", source))?;
        Ok(per_cpu.iter().fold(ServiceStats::default(), |sum, Plain(cpu)| ServiceStats {
            connects: sum.connects.wrapping_add(cpu.connects),
            refusals: sum.refusals.wrapping_add(cpu.refusals),
            datagrams: sum.datagrams.wrapping_add(cpu.datagrams),
        }))
    }

    /// The calls to an endpoint since it got its id, over all CPUs; zero for an id beyond the map, which is not
    /// counted.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn endpoint_stats(&self, endpoint_id: u32) -> Result<EndpointStats, KernelError> {
        if endpoint_id >= self.endpoint_stats.len() {
            return Ok(EndpointStats::default());
        }
        let per_cpu = self
            .endpoint_stats
            .get(&endpoint_id, 0)
            .map_err(|source| KernelError::map("endpoint_stats", source))?;
        Ok(per_cpu.iter().fold(EndpointStats::default(), |sum, Plain(cpu)| EndpointStats {
            connects: sum.connects.wrapping_add(cpu.connects),
            datagrams: sum.datagrams.wrapping_add(cpu.datagrams),
        }))
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

fn map_memory<T: MapValue>(name: &'static str, data: &MapData, n: u32) -> Result<Mapped<T>, KernelError> {
    Mapped::new(data.fd().as_fd(), n).map_err(|source| KernelError::Mmap { name, source })
}

fn in_range(name: &'static str, index: u32, done: bool) -> Result<(), KernelError> {
    if done { Ok(()) } else { Err(KernelError::OutOfRange { name, index }) }
}

/// An entry that somebody else deleted is as gone as it should be.
fn gone_is_fine(name: &'static str, result: Result<(), MapError>) -> Result<(), KernelError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| KernelError::map(name, source)),
    }
}

/// Copies counters, as far as both maps have them.
fn copy<T: MapValue>(
    name: &'static str,
    from: &PerCpuArray<MapData, Plain<T>>,
    to: &mut PerCpuArray<MapData, Plain<T>>,
    ids: BTreeSet<u32>,
) -> Result<(), KernelError> {
    let wrap = |source| KernelError::map(name, source);
    let n_counted = from.len().min(to.len());
    for id in ids.into_iter().filter(|id| *id < n_counted) {
        to.set(id, from.get(&id, 0).map_err(wrap)?, 0).map_err(wrap)?;
    }
    Ok(())
}

fn reset<T: MapValue + Default>(
    map: &mut PerCpuArray<MapData, Plain<T>>,
    name: &'static str,
    id: u32,
) -> Result<(), KernelError> {
    if id >= map.len() {
        return Ok(());
    }
    let n_cpus = aya::util::nr_cpus().map_err(|(_path, error)| KernelError::Thread(error))?;
    let zeroes = PerCpuValues::try_from(vec![Plain(T::default()); n_cpus]).map_err(KernelError::Thread)?;
    map.set(id, zeroes, 0).map_err(|source| KernelError::map(name, source))
}

/// The frontend that a key stands for; `None` if no call can match it: nobody but a hand with bpftool writes such a
/// key.
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

fn node_key(address: IpAddr) -> NodeAddrKey {
    let address = match address {
        IpAddr::V4(ip) => ip.octets().to_mapped(),
        IpAddr::V6(ip) => ip.octets(),
    };
    NodeAddrKey { address }
}

fn ip_of(octets: &Octets6) -> IpAddr {
    match mapped_ipv4(octets) {
        Some(ip) => Ipv4Addr::from(ip).into(),
        None => Ipv6Addr::from(*octets).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_take_a_bounded_room() {
        for (wanted, size, n_cpus, expected) in [
            (262_144, 16, 1, 262_144),
            (262_144, 16, 16, 262_144),
            (262_144, 16, 32, 131_072),
            (131_072, 24, 21, 131_072),
            (131_072, 24, 22, 127_100),
            (1 << 24, 16, 1024, 4096),
            (1, 24, 1, 1),
            (5, 16, 0, 5),
        ] {
            assert_eq!(n_counted(wanted, size, n_cpus), expected, "{wanted} of {size} on {n_cpus}");
        }
    }
}
