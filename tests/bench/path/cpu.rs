//! CPU time.
//!
//! On kernels without `CONFIG_IRQ_TIME_ACCOUNTING` the packet work of softirqs counts for the thread during whose system call it
//! is done; what is left over, the kernel's thread `ksoftirqd` of the CPU does.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The file with the run time of the softirq thread of a CPU; `None` where it is not found.
pub(crate) fn softirq_thread(cpu: usize) -> Option<PathBuf> {
    let wanted = format!("ksoftirqd/{cpu}\n");
    // Threads of the kernel come first; one of the first few hundred process ids.
    let candidates = (2..500).map(|pid| PathBuf::from(format!("/proc/{pid}")));
    let mut found =
        candidates.filter(|path| fs::read_to_string(path.join("comm")).is_ok_and(|name| name == wanted));
    Some(found.next()?.join("schedstat"))
}

/// The time that a thread has run, ns, by its file `schedstat`; 0 where the kernel does not count.
pub(crate) fn thread_time(schedstat: &Path) -> u64 {
    let text = fs::read_to_string(schedstat).unwrap_or_default();
    text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or_default()
}
