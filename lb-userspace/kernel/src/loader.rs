//! Loads the object and its programs, with settings as read-only globals.

use std::{
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError},
};
use lb_common::{
    hooks::HookSpec,
    limits,
    maps::{self, MAPS, Size, Sizing},
};
use lb_core::plan::Capacity;

use crate::{Features, KernelError, Options, attach::Hook, counters, host, object, pins};

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
        passive_health: true,
        log: false,
    };
    let mut object = load(object::bytes()?, &options, None)?;
    for hook in pins::hooks(features, options.passive_health) {
        let _verified = load_program(&mut object, hook, &program_of(hook, features, false))?;
    }
    Ok(())
}

pub(crate) fn load_program(
    object: &mut Ebpf,
    hook: &'static HookSpec,
    name: &str,
) -> Result<Hook, KernelError> {
    let missing = KernelError::Missing { kind: "program", name: hook.name };
    let Some(program) = object.program_mut(name) else { return Err(missing) };
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SockOps(program) => program.load(),
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
pub(crate) fn program_of(hook: &HookSpec, features: Features, log: bool) -> String {
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
pub(crate) fn sizing(Capacity { services, endpoints }: Capacity) -> Result<Sizing, KernelError> {
    Ok(Sizing { services, endpoints, n_cpus: counters::n_cpus()? })
}

/// Loads the object with all settings, adopting the maps pinned in a directory and pinning the others there.
pub(crate) fn load(object: &[u8], options: &Options, pin_path: Option<&Path>) -> Result<Ebpf, KernelError> {
    let Options { capacity, node_ports, .. } = options;
    let node_netns = options.node_netns.unwrap_or_default();
    let (set_retval, localhost) =
        (u8::from(options.features.set_retval), u8::from(options.localhost_nodeports));
    let (excludes, passive_health) = (u8::from(options.excludes), u8::from(options.passive_health));
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
        .override_global("SOCK_ERROR", &fields.error, true)
        .override_global("PASSIVE_HEALTH", &passive_health, true)
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
pub(crate) fn raise_memlock() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    // Fails without CAP_SYS_RESOURCE. If the limit matters, loading fails and reports it.
    let _not_needed_on_new_kernels = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}
