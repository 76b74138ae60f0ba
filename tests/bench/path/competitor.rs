//! The competitors, each set up in its own network namespace and cgroup.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use lb_common::layout::{Frontend, Run};
use lb_core::{
    desired::FrontendAddress,
    model,
    plan::{Capacity, diff},
    tables::{Entry, Image},
};
use lb_kernel::{Kernel, Options, links};
use lb_tests::{Sandbox, agent, netns::NetNs};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    client::{Answer, Order},
    iptables, nftables,
    town::{POD_NETWORK, PORT, Protocol, SERVICE_NETWORK, TARGET_PORT, Town},
};

const PATIENCE: Duration = Duration::from_secs(150);
/// Service ports in one transaction of nft: see [`nftables::services`].
const TRANSACTION: usize = 1000;

/// What redirects calls to endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Competitor {
    /// Nothing: the client knows the endpoints.
    Direct,
    Socklb,
    Nftables,
    Iptables,
}

impl Competitor {
    pub(crate) const ALL: [Self; 4] = [Self::Direct, Self::Socklb, Self::Nftables, Self::Iptables];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Socklb => "socklb",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) town: Town,
    /// Number of changes of one endpoint, to measure their time.
    pub(crate) n_changes: u32,
    pub(crate) patience: Duration,
}

pub(crate) struct Ready {
    pub(crate) client: Client,
    pub(crate) netns: NetNs,
    /// Ids of its BPF programs, by hook.
    pub(crate) programs: Vec<(String, u32)>,
    /// From the first call of the tool until everything is in force. `None` if there is nothing to load.
    pub(crate) programming: Option<Duration>,
    /// Loading and attaching programs, which the agent does once when it starts.
    pub(crate) loading: Option<Duration>,
    /// The time to replace one endpoint by another.
    pub(crate) changes: Vec<Duration>,
}

/// The client's process, in the competitor's namespace and cgroup. Killed on drop.
pub(crate) struct Client {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Client {
    /// Starts a client in the namespaces and cgroup of the calling thread.
    fn start(town: Town, to_endpoint: bool, server: u32) -> anyhow::Result<Self> {
        // Not by its path, which may differ in the thread's mount namespace.
        let mut child = Command::new("/proc/self/exe")
            .arg("client")
            .arg(format!("--services={}", town.n_services))
            .arg(format!("--endpoints={}", town.n_endpoints))
            .arg(format!("--server={server}"))
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

/// Sets up a competitor in a sandbox and returns it with the resources that it needs. `number` selects its
/// network.
pub(crate) fn set_up(
    competitor: Competitor,
    setup: Setup,
    sandbox: &Sandbox,
    (server_netns, server): (&NetNs, u32),
    number: u8,
) -> anyhow::Result<(Ready, Option<Kernel>)> {
    let [here, there] = [1, 2].map(|end| IpAddr::from([10, 0, number, end]));
    sandbox.netns().join("eth0", &[here], server_netns, &format!("client-{number}"), &[there])?;
    // Service addresses need a route too, because NAT is done after routing. Packets that no rule rewrites
    // end at the server's namespace, which lacks their address and forwards nothing.
    for network in [POD_NETWORK, SERVICE_NETWORK] {
        ip(&["route", "add", network, "via", &there.to_string()])?;
    }
    let (mut kernel, mut programs, mut loading) = (None, Vec::new(), None);
    let (programming, changes) = match competitor {
        Competitor::Direct => (None, Vec::new()),
        Competitor::Socklb => {
            let (made, load, programming, changes) = socklb(setup, sandbox)?;
            (kernel, loading) = (Some(made), Some(load));
            let found = links::read_all(&sandbox.pin_path(), Some(sandbox.cgroup().path()));
            programs.extend(
                found.into_iter().filter_map(|(hook, link)| Some((hook.to_owned(), link.ok()?.program_id))),
            );
            (Some(programming), changes)
        }
        Competitor::Nftables => {
            let (programming, changes) = nft(setup)?;
            (Some(programming), changes)
        }
        Competitor::Iptables => {
            let (programming, changes) = iptables(setup)?;
            (Some(programming), changes)
        }
    };
    let client = Client::start(setup.town, competitor == Competitor::Direct, server)?;
    let ready = Ready { client, netns: NetNs::current()?, programs, loading, programming, changes };
    Ok((ready, kernel))
}

/// Runs `ip` in the namespace of the calling thread.
pub(crate) fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("ip cannot be started")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The image of a town. Services in `changed` have the spare endpoint in place of the first, and another
/// position in the endpoint table.
fn image(town: Town, changed: Option<u32>) -> Image {
    let mut image = Image::default();
    let (mut id, mut offset) = (0, 0);
    let spare_place = 2 * town.n_services * town.n_endpoints;
    for port in town.ports() {
        let is_changed = changed == Some(port.service) && port.protocol == Protocol::Tcp;
        let place = if is_changed { spare_place } else { offset };
        let mut entries: Vec<Entry> = (0..town.n_endpoints)
            .map(|endpoint| {
                let endpoint = if is_changed && endpoint == 0 { town.n_endpoints } else { endpoint };
                let address = SocketAddr::from((town.endpoint(port.service, endpoint), TARGET_PORT));
                let endpoint_id = if endpoint == town.n_endpoints { spare_place } else { offset + endpoint };
                Entry { endpoint_id, address }
            })
            .collect();
        entries.sort_by_key(|entry| entry.endpoint_id);
        image.runs4.insert(place, entries.into());
        let run = Run { offset: place, len: town.n_endpoints };
        image.frontends.insert(id, Frontend { run, service_id: id, ..Frontend::default() });
        let protocol = match port.protocol {
            Protocol::Tcp => model::Protocol::Tcp,
            Protocol::Udp => model::Protocol::Udp,
        };
        let ip = IpAddr::V4(Town::service(port.service));
        image.services.insert(FrontendAddress { ip, port: PORT, protocol }, id);
        id += 1;
        offset += town.n_endpoints;
    }
    image
}

/// The product: programs and maps, as the agent loads them.
fn socklb(setup: Setup, sandbox: &Sandbox) -> anyhow::Result<(Kernel, Duration, Duration, Vec<Duration>)> {
    let town = setup.town;
    let default = Capacity::default();
    let n_places = 2 * town.n_services * town.n_endpoints + town.n_endpoints + 1;
    let options = Options {
        // The default sizes, unless they are too small.
        capacity: Capacity {
            services: default.services.max(2 * town.n_services),
            endpoints: default.endpoints.max(n_places),
        },
        ..agent::options(sandbox)
    };
    let whole = image(town, None);
    let plan = diff(&Image::default(), &whole);
    let began = Instant::now();
    let mut kernel = Kernel::open(&options, || {})?;
    let loading = began.elapsed();
    let began = Instant::now();
    let _done = kernel.apply(&plan)?;
    let programming = began.elapsed();
    let mut changes = Vec::new();
    for change in 0..setup.n_changes {
        let other = image(town, Some(change % town.n_services));
        for (from, to) in [(&whole, &other), (&other, &whole)] {
            let plan = diff(from, to);
            let began = Instant::now();
            let _done = kernel.apply(&plan)?;
            changes.push(began.elapsed());
            // The agent waits before it reuses freed entries. That is not part of the measured time.
            kernel.settle();
        }
    }
    Ok((kernel, loading, programming, changes))
}

fn nft(setup: Setup) -> anyhow::Result<(Duration, Vec<Duration>)> {
    let parts = nftables::services(setup.town, TRANSACTION);
    let mut sum = Duration::ZERO;
    for rules in std::iter::once(&nftables::base()).chain(&parts) {
        let left = setup.patience.saturating_sub(sum);
        sum += feed(&mut Command::new("nft"), &["-f", "-"], rules, left)
            .with_context(|| format!("of {} s all together", setup.patience.as_secs()))?;
    }
    let changes = change(setup, |service, is_back| {
        let rules = nftables::change(setup.town, service, is_back);
        feed(&mut Command::new("nft"), &["-f", "-"], &rules, setup.patience)
    })?;
    Ok((sum, changes))
}

/// The tool that loads iptables rules: the legacy one if the kernel has its tables, because it is much
/// faster.
pub(crate) fn iptables_tool() -> anyhow::Result<&'static str> {
    let mut reasons = Vec::new();
    for tool in ["iptables-legacy-restore", "iptables-nft-restore", "iptables-restore"] {
        match feed(
            &mut Command::new(tool),
            &["--test"],
            "*nat\nCOMMIT\n*filter\nCOMMIT\n",
            Duration::from_secs(10),
        ) {
            Ok(_) => return Ok(tool),
            Err(error) => reasons.push(format!("{error:#}")),
        }
    }
    bail!(reasons.join("; "))
}

fn iptables(setup: Setup) -> anyhow::Result<(Duration, Vec<Duration>)> {
    let tool = iptables_tool()?;
    let load = |rules: &str| feed(&mut Command::new(tool), &["--noflush", "--wait"], rules, setup.patience);
    let programming = load(&iptables::services(setup.town))?;
    let changes = change(setup, |service, is_back| load(&iptables::change(setup.town, service, is_back)))?;
    Ok((programming, changes))
}

/// Times of changes and their reversals, of one service after the other.
fn change(
    setup: Setup,
    mut load: impl FnMut(u32, bool) -> anyhow::Result<Duration>,
) -> anyhow::Result<Vec<Duration>> {
    let mut changes = Vec::new();
    for change in 0..setup.n_changes {
        for is_back in [false, true] {
            changes.push(load(change % setup.town.n_services, is_back)?);
        }
    }
    Ok(changes)
}

/// Runs a tool with rules in a file, which is written before the time starts, and returns its run time.
fn feed(tool: &mut Command, args: &[&str], rules: &str, patience: Duration) -> anyhow::Result<Duration> {
    let name = tool.get_program().to_string_lossy().into_owned();
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), rules)?;
    let began = Instant::now();
    let mut child = tool
        .args(args)
        .stdin(fs::File::open(file.path())?)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{name} cannot be started"))?;
    // A tool whose output exceeds the pipe's buffer would block, so a thread reads it. It is not waited for.
    let mut stderr = child.stderr.take().context("a pipe")?;
    let words = thread::spawn(move || {
        let mut text = String::new();
        let _not_text = std::io::Read::read_to_string(&mut stderr, &mut text);
        text
    });
    loop {
        // Polls quickly at first, because some changes take a millisecond.
        let pause = (began.elapsed() / 50).clamp(Duration::from_micros(50), Duration::from_millis(50));
        if let Some(status) = child.try_wait()? {
            let taken = began.elapsed();
            if status.success() {
                return Ok(taken);
            }
            let words = words.join().unwrap_or_default();
            bail!("{name}: {}", words.lines().next().unwrap_or("no message"));
        }
        if began.elapsed() > patience {
            child.kill()?;
            let _killed = child.wait()?;
            bail!("{name} does not exit within {:.1} s", patience.as_secs_f64());
        }
        thread::sleep(pause);
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    /// Packets of the device, in both directions.
    pub(crate) packets: u64,
    /// Packets that conntrack has counted in its entries, if it counts them.
    pub(crate) tracked: u64,
    pub(crate) entries: u64,
    /// Runs of the competitor's BPF programs, if they are counted.
    pub(crate) program_runs: u64,
}

impl Ready {
    pub(crate) fn counters(&self) -> Counters {
        let mut counters = self.netns.run(|| {
            let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
            let entries = read("/proc/sys/net/netfilter/nf_conntrack_count");
            Counters {
                packets: device_packets(&read("/proc/thread-self/net/dev"), "eth0"),
                tracked: tracked_packets(&read("/proc/thread-self/net/nf_conntrack")),
                entries: entries.trim().parse().unwrap_or_default(),
                program_runs: 0,
            }
        });
        if !self.programs.is_empty() {
            let counts: BTreeMap<u32, u64> = aya::programs::loaded_programs()
                .filter_map(Result::ok)
                .map(|program| (program.id(), program.run_count()))
                .collect();
            counters.program_runs = self.programs.iter().filter_map(|(_, id)| counts.get(id)).sum();
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
    }

    #[test]
    fn a_changed_image_differs_in_one_run() {
        let town = Town { n_services: 20, n_endpoints: 3 };
        let whole = image(town, None);
        assert_eq!(whole.services.len(), town.ports().count());
        let plan = diff(&whole, &image(town, Some(7)));
        assert!(plan.ops().len() <= 6, "{plan:?}");
    }
}
