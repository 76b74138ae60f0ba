//! Points at which a test has the agent killed. Without the feature `fault-points`, as in every release, there are none.

/// A point between two changes to the kernel. The process kills itself at the one whose number, from 1, is in the variable
/// `SOCKLB_FAULT_AT`.
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
        // As real as a kill from outside: nothing runs after it, no destructor and no other thread.
        let _ends_here = kill(nix::unistd::getpid(), Signal::SIGKILL);
    }
}

/// Nothing.
#[cfg(not(feature = "fault-points"))]
pub(super) const fn point() {}

/// The layout version that the variable `SOCKLB_LAYOUT_VERSION` has this agent write, for a test of what an agent does
/// that finds another one's maps.
#[cfg(feature = "fault-points")]
pub(super) fn layout_version() -> u32 {
    let version = std::env::var("SOCKLB_LAYOUT_VERSION").ok().and_then(|version| version.parse().ok());
    version.unwrap_or(lb_common::limits::LAYOUT_VERSION)
}

/// The layout version.
#[cfg(not(feature = "fault-points"))]
pub(super) const fn layout_version() -> u32 {
    lb_common::limits::LAYOUT_VERSION
}
