//! The competitors, each set up in its own network namespace and cgroup.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::fd::AsFd as _,
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail, ensure};
use lb_kernel::links;
use lb_tests::{Sandbox, apiserver::ApiServer, netns::NetNs, process::Memory};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::Pid,
};

use super::client::{Answer, Order, Place};
use crate::{
    daemon::Daemon,
    objects::{POD_NETWORK, PORT, SERVICE_NETWORK, Size, cluster_ip},
    sync::{self, traffic},
    turns::Work,
};

const PATIENCE: Duration = Duration::from_secs(150);
/// The pods of the service that changes. The server's namespace has their addresses.
pub(crate) const CHANGING: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 255, 0, 1)), 8001),
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 255, 0, 2)), 8001),
];

/// What redirects calls to endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Competitor {
    /// Nothing: the client knows the endpoints.
    Direct,
    /// The agent's binary.
    Socklb(PathBuf),
    /// The binary of kube-proxy, and its mode.
    KubeProxy(PathBuf, &'static str),
}

impl Competitor {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Socklb(_) => "socklb",
            Self::KubeProxy(_, mode) => mode,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) size: Size,
    /// Number of changes of one endpoint, to measure their time.
    pub(crate) n_changes: u32,
    pub(crate) patience: Duration,
    pub(crate) server: Pid,
}

pub(crate) struct Ready {
    pub(crate) netns: NetNs,
    /// Ids of its BPF programs.
    pub(crate) programs: Vec<u32>,
    pub(crate) programming: Option<Programming>,
}

/// How long it takes until rules are in force, and what holds them.
pub(crate) struct Programming {
    /// From the start of the process until a call to the last service is answered.
    pub(crate) everything: Duration,
    /// From the event of the API server until the end of the first call that reaches a new endpoint.
    pub(crate) added: Vec<Duration>,
    /// From the event until the beginning of the last call that reaches a removed one.
    pub(crate) removed: Vec<Duration>,
    /// The memory of the process.
    pub(crate) memory: Memory,
}

/// The client's process, in the competitor's namespace and cgroup. Killed on drop.
pub(crate) struct Client {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Client {
    /// Starts a client in the namespaces and cgroup of the calling thread.
    pub(crate) fn start(place: Place) -> anyhow::Result<Self> {
        let Place { size, to_endpoint, server, node } = place;
        // Not by its path, which may differ in the thread's mount namespace.
        let mut child = Command::new("/proc/self/exe")
            .arg("client")
            .arg(format!("--services={}", size.n_services))
            .arg(format!("--endpoints={}", size.n_endpoints))
            .arg(format!("--server={server}"))
            .arg(format!("--node={node}"))
            .args(to_endpoint.then_some("--to-endpoint"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the client cannot be started")?;
        let answers = BufReader::new(child.stdout.take().context("a pipe")?);
        Ok(Self { child, answers })
    }

    /// Sends an order and waits for the answer.
    ///
    /// # Errors
    ///
    /// If the client fails or does not answer in time.
    pub(crate) fn work(&mut self, order: &Order) -> anyhow::Result<Answer> {
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        self.child.stdin.as_mut().context("a pipe")?.write_all(line.as_bytes())?;
        let time = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(self.answers.get_ref().as_fd(), PollFlags::POLLIN)], time)? == 0 {
            bail!("no answer within {} s: does anything redirect to the endpoints?", PATIENCE.as_secs());
        }
        line.clear();
        self.answers.read_line(&mut line)?;
        let answer: Answer = serde_json::from_str(&line).context("the client has exited")?;
        match answer.error {
            Some(error) => bail!(error),
            None => Ok(answer),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}

/// Sets up a competitor in a sandbox. `number` selects its network.
pub(crate) fn set_up(
    competitor: &Competitor,
    setup: Setup,
    sandbox: &Sandbox,
    server_netns: &NetNs,
    number: u8,
) -> anyhow::Result<(Ready, Work<Order, Answer>)> {
    let [here, there] = [1, 2].map(|end| Ipv4Addr::from([10, 0, number, end]));
    let [ends, peers] = [[here.into()], [there.into()]];
    sandbox.netns().join("eth0", &ends, server_netns, &format!("client-{number}"), &peers)?;
    // Service addresses need a route too, because NAT is done after routing. The server's namespace refuses
    // calls to them.
    for network in [POD_NETWORK, SERVICE_NETWORK] {
        ip(&["route", "add", network, "via", &there.to_string()])?;
    }
    let server = || sync::server(&setup.size.cluster_with_udp());
    let running = match competitor {
        Competitor::Direct => None,
        Competitor::Socklb(program) => {
            let server = server();
            Some((Daemon::socklb(program, sandbox, &server, &[])?, server))
        }
        Competitor::KubeProxy(program, mode) => {
            let server = server();
            Some((Daemon::kube_proxy(program, mode, &server)?, server))
        }
    };
    let programming = match &running {
        Some((daemon, server)) => Some(
            program(setup, daemon, server).map_err(|error| anyhow!("{error:#}; {}", daemon.last_words()))?,
        ),
        None => None,
    };
    let links = links::read_all(&sandbox.pin_path(), Some(sandbox.cgroup().path()), true);
    let programs = links.into_iter().filter_map(|(_, link)| Some(link.ok()?.program_id)).collect();
    let to_endpoint = *competitor == Competitor::Direct;
    let mut client =
        Client::start(Place { size: setup.size, to_endpoint, server: setup.server, node: here })?;
    let work: Work<Order, Answer> = Box::new(move |order| {
        let _runs_as_long = &running;
        client.work(&order)
    });
    Ok((Ready { netns: NetNs::current()?, programs, programming }, work))
}

/// Waits until a process has written all rules, and measures changes.
fn program(setup: Setup, daemon: &Daemon, server: &ApiServer) -> anyhow::Result<Programming> {
    let last = SocketAddr::from((cluster_ip(setup.size.n_services - 1), PORT));
    while TcpStream::connect_timeout(&last, Duration::from_secs(1)).is_err() {
        let seconds = setup.patience.as_secs();
        ensure!(daemon.started.elapsed() < setup.patience, "{last} is not answered within {seconds} s");
        // A fiftieth of the time is exact enough, and leaves the CPU to the process.
        thread::sleep((daemon.started.elapsed() / 50).min(Duration::from_millis(50)));
    }
    let everything = daemon.started.elapsed();
    let (added, removed) = traffic::flips(server, CHANGING, setup.n_changes, setup.patience)?;
    Ok(Programming { everything, added, removed, memory: daemon.memory()? })
}

/// Runs `ip` in the namespace of the calling thread.
pub(crate) fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("ip cannot be started")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    /// Packets of the device, in both directions.
    pub(crate) packets: u64,
    /// Packets that conntrack has counted in its entries, if it counts them.
    pub(crate) tracked: u64,
    /// Entries of conntrack, without those of the service that changed before: these expire meanwhile.
    pub(crate) entries: u64,
    /// Runs of the competitor's BPF programs, if they are counted.
    pub(crate) program_runs: u64,
}

impl Ready {
    pub(crate) fn counters(&self) -> Counters {
        let mut counters = self.netns.run(|| {
            let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
            let entries = read("/proc/thread-self/net/nf_conntrack");
            Counters {
                packets: device_packets(&read("/proc/thread-self/net/dev"), "eth0"),
                tracked: tracked_packets(&entries),
                entries: n_entries(&entries, traffic::SERVICE),
                program_runs: 0,
            }
        });
        if !self.programs.is_empty() {
            let counts: BTreeMap<u32, u64> = aya::programs::loaded_programs()
                .filter_map(Result::ok)
                .map(|program| (program.id(), program.run_count()))
                .collect();
            counters.program_runs = self.programs.iter().filter_map(|id| counts.get(id)).sum();
        }
        counters
    }

    pub(crate) fn count_packets(&self) -> std::io::Result<()> {
        self.netns.run(|| fs::write("/proc/sys/net/netfilter/nf_conntrack_acct", "1"))
    }
}

/// Packets that a device has received and sent, from `/proc/net/dev`.
fn device_packets(text: &str, device: &str) -> u64 {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    let numbers: Vec<u64> =
        line.unwrap_or_default().split_whitespace().filter_map(|number| number.parse().ok()).collect();
    // Eight columns for each direction; the second of each is packets.
    [1, 9].iter().filter_map(|column| numbers.get(*column)).sum()
}

fn n_entries(text: &str, but_to: Ipv4Addr) -> u64 {
    let destination = format!(" dst={but_to} ");
    text.lines().map(|line| u64::from(!line.contains(&destination))).sum()
}

fn tracked_packets(text: &str) -> u64 {
    text.split_whitespace().filter_map(|word| word.strip_prefix("packets=")?.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_the_kernel_are_read() {
        let devices = "Inter-|   Receive\n face |bytes\n    lo:  1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n  eth0: 10 20 0 0 0 0 0 0 30 40 0 0 0 0 0 0\n";
        assert_eq!(device_packets(devices, "eth0"), 60);
        assert_eq!(device_packets(devices, "eth1"), 0);
        let entries = "ipv4 2 tcp 6 9 ESTABLISHED src=10.0.0.1 dst=10.96.0.1 packets=7 bytes=500 src=1 packets=5 bytes=4 [ASSURED]\n";
        assert_eq!(tracked_packets(entries), 12);
        assert_eq!(tracked_packets(""), 0);
        assert_eq!(n_entries(entries, Ipv4Addr::new(10, 96, 0, 10)), 1);
        assert_eq!(n_entries(entries, Ipv4Addr::new(10, 96, 0, 1)), 0);
    }
}
