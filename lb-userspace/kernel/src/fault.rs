//! Points at which a test kills the agent. Without the feature `fault-points`, as in every release, there are
//! none.

use lb_common::maps::MapSpec;

/// A point between two changes to the kernel. The process kills itself at the point whose number, from 1, is
/// in `SOCKLB_FAULT_AT`.
#[cfg(feature = "fault-points")]
pub(super) fn point() {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    use nix::sys::signal::{Signal, kill};

    static AT: LazyLock<Option<u64>> =
        LazyLock::new(|| std::env::var("SOCKLB_FAULT_AT").ok().and_then(|at| at.parse().ok()));
    static N_PASSED: AtomicU64 = AtomicU64::new(0);
    if let Some(at) = *AT
        && N_PASSED.fetch_add(1, Ordering::Relaxed) + 1 == at
    {
        // Like a kill from outside: no destructor and no other thread runs afterwards.
        let _ends_here = kill(nix::unistd::getpid(), Signal::SIGKILL);
    }
}

/// Does nothing.
#[cfg(not(feature = "fault-points"))]
pub(super) const fn point() {}

/// The layout number of a map. `SOCKLB_LAYOUT`, such as `sockets:7,frontends:9`, overrides it, to test an
/// agent that finds the maps of another version.
#[cfg(feature = "fault-points")]
pub(super) fn layout(map: &MapSpec) -> u32 {
    let others = std::env::var("SOCKLB_LAYOUT").unwrap_or_default();
    let other =
        others.split(',').filter_map(|other| other.split_once(':')).find(|(name, _)| *name == map.name);
    other.and_then(|(_, layout)| layout.parse().ok()).unwrap_or(map.layout)
}

/// The layout number of a map.
#[cfg(not(feature = "fault-points"))]
pub(super) const fn layout(map: &MapSpec) -> u32 {
    map.layout
}
