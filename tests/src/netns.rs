//! Network namespaces for tests: nothing that a test sends leaves the namespaces that it created.

use std::{
    io,
    process::{Child, Command},
};

pub use lb_netns::NetNs;

/// A process in a network namespace, through which the agent finds it. Killed on drop.
#[derive(Debug)]
pub struct Resident(Child);

impl Resident {
    /// Starts the process.
    ///
    /// # Errors
    ///
    /// If `sleep` cannot be started.
    pub fn of(netns: &NetNs) -> io::Result<Self> {
        netns.run(|| Command::new("sleep").arg("1000").spawn()).map(Self)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _ended_already = self.0.wait();
    }
}

/// Lets processes of any group create ICMP sockets in the calling thread's namespace.
///
/// # Errors
///
/// If `/proc/sys` cannot be written.
pub fn allow_ping() -> io::Result<()> {
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
}
