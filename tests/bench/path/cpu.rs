//! CPU time.
//!
//! Without `CONFIG_IRQ_TIME_ACCOUNTING` the kernel charges the packet work of softirqs to the thread in whose
//! system call it runs. The rest runs in the CPU's kernel thread `ksoftirqd`.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The `schedstat` file of a CPU's softirq thread; `None` if it is not found.
pub(crate) fn softirq_thread(cpu: usize) -> Option<PathBuf> {
    let wanted = format!("ksoftirqd/{cpu}\n");
    // Kernel threads start first: it is one of the first few hundred process ids.
    let candidates = (2..500).map(|pid| PathBuf::from(format!("/proc/{pid}")));
    let mut found =
        candidates.filter(|path| fs::read_to_string(path.join("comm")).is_ok_and(|name| name == wanted));
    Some(found.next()?.join("schedstat"))
}

/// The run time of a thread in ns, from its `schedstat` file; 0 if the kernel does not count it.
pub(crate) fn thread_time(schedstat: &Path) -> u64 {
    let text = fs::read_to_string(schedstat).unwrap_or_default();
    text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or_default()
}
