//! `cargo xtask bench path`: the same work to an endpoint's own address and through socklb, nftables and
//! iptables.
//!
//! Each competitor has a client process in its own network namespace and cgroup. A veth pair connects each to
//! one namespace with one server process, which answers at all endpoint addresses; there are no other routes.
//! The competitors alternate in small blocks and use the same services in the same order, so that other load
//! of the machine affects all alike. Client and server share one CPU: they never work at the same time, and
//! so all of its CPU time, including softirqs, is theirs.

pub(crate) mod behind;
pub(crate) mod client;
mod competitor;
mod server;

use std::{
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use lb_tests::{netns::NetNs, server::Servers};
use nix::unistd::Pid;

use crate::{
    Common, daemon,
    machine::versions,
    objects::{MAX_ENDPOINTS, MAX_LOAD_BALANCERS, MAX_SERVICES, POD_NETWORK, SERVICE_NETWORK, Size},
    quantile::real,
    result::{Better, ResultFile, Run, Suite, Unit},
    turns::{self, Caller},
};
use client::{Answer, By, Order, Place, Work};
use competitor::{CHANGING, Competitor, Programming, Ready, Setup};

const CPU: usize = 0;

/// Options of `path`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// The agent's binary
    #[arg(long, value_name = "FILE")]
    socklb: PathBuf,
    /// Numbers of services, one measurement for each
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 1_000, 10_000])]
    services: Vec<u32>,
    /// Numbers of services for clients behind the node
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 1_000])]
    behind: Vec<u32>,
    /// Endpoints of each service
    #[arg(long, value_name = "N", default_value_t = 3)]
    endpoints: u32,
    /// Number of turns of each competitor for each kind of work
    #[arg(long, value_name = "N", default_value_t = 50)]
    rounds: u32,
    /// Number of changes of one endpoint, to measure their time
    #[arg(long, value_name = "N", default_value_t = 3)]
    changes: u32,
    /// Seconds in which kube-proxy and the agent must write all rules, and each change
    #[arg(long, value_name = "N", default_value_t = 240)]
    patience: u64,
}

/// Arguments of a client process.
#[derive(Args)]
pub(crate) struct ClientArgs {
    #[arg(long)]
    services: u32,
    #[arg(long)]
    endpoints: u32,
    #[arg(long)]
    server: i32,
    #[arg(long)]
    to_endpoint: bool,
    #[arg(long)]
    node: Ipv4Addr,
}

pub(crate) fn client(args: &ClientArgs) -> anyhow::Result<()> {
    let size = Size { n_services: args.services, n_endpoints: args.endpoints, n_nodes: 1 };
    let ClientArgs { to_endpoint, node, .. } = *args;
    client::run(Place { size, to_endpoint, server: Pid::from_raw(args.server), node })
}

pub(crate) fn server() -> anyhow::Result<()> {
    server::run()
}

/// A kind of work, and how its measures begin.
#[derive(Clone, Debug)]
struct Kind {
    work: Work,
    by: By,
    title: String,
}

/// Pieces of work per block: a block takes some milliseconds.
const fn block(work: Work, is_smoke: bool) -> u32 {
    match (work, is_smoke) {
        (Work::Stream, false) => 32,
        (Work::Stream, true) => 1,
        (_, true) => 5,
        (Work::Connection | Work::FreshDatagram, false) => 40,
        (Work::KeepAlive | Work::ConnectedDatagram | Work::SentDatagram, false) => 100,
    }
}

pub(crate) fn run(options: &Options, common: &Common) -> anyhow::Result<ResultFile> {
    let mut options = options.clone();
    if common.smoke {
        (options.services, options.rounds, options.changes) = (vec![1, 40], 2, 1);
        options.behind = vec![1, 40];
    }
    let largest = options.services.iter().copied().max().unwrap_or_default();
    let largest_behind = options.behind.iter().copied().max().unwrap_or_default();
    anyhow::ensure!(
        options.services.iter().chain(&options.behind).all(|n| (1..=MAX_SERVICES).contains(n))
            && largest_behind <= MAX_LOAD_BALANCERS
            && options.endpoints > 0
            && u64::from(largest.max(largest_behind)) * u64::from(options.endpoints)
                <= u64::from(MAX_ENDPOINTS),
        "--services, --behind and --endpoints: 1 to {MAX_SERVICES} services, behind the node {MAX_LOAD_BALANCERS}, \
         {MAX_ENDPOINTS} endpoints together"
    );
    let mut run = common.start(Suite::Path);
    let list = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    run.setting("services", list(&options.services));
    run.setting("endpoints of each service", options.endpoints);
    run.setting("rounds", options.rounds);
    for work in Work::ALL {
        let unit = if work == Work::Stream { " MiB" } else { "" };
        run.setting(&format!("block: {}", work.name()), format!("{}{unit}", block(work, common.smoke)));
    }
    run.setting(
        "CPU time is that of",
        "client process, server process and ksoftirqd of their CPU; both stay on one CPU, softirqs in their system calls included",
    );
    run.setting("programming", "from the start of the process, and from the event, until a call is answered");
    run.versions(versions(&["nft", "ip", "iptables-legacy", "iptables"]));
    run.setting(
        "services for clients behind the node",
        format!("{}, half of each external policy (at 1, one of each)", list(&options.behind)),
    );
    let kube_proxy = daemon::kube_proxy()?;
    let mut competitors = vec![Competitor::Direct, Competitor::Socklb(options.socklb.clone())];
    match &kube_proxy {
        Some(program) => {
            run.versions(
                versions(&[&program.to_string_lossy()])
                    .into_values()
                    .map(|version| ("kube-proxy".to_owned(), version))
                    .collect(),
            );
            competitors
                .extend(["nftables", "iptables"].map(|mode| Competitor::KubeProxy(program.clone(), mode)));
        }
        None => {
            for mode in ["nftables", "iptables"] {
                run.unavailable(mode, None, "no kube-proxy in PATH or KUBE_BIN; KUBE_PROXY may name it");
            }
        }
    }
    for &n_services in &options.services {
        let size = Size { n_services, n_endpoints: options.endpoints, n_nodes: 1 };
        measure(size, n_services == largest, &competitors, &options, common.smoke, &mut run)?;
    }
    for &n_services in &options.behind {
        behind::measure(n_services, &options, kube_proxy.as_deref(), common.smoke, &mut run)?;
    }
    Ok(run.finish())
}

/// The server's process. Killed on drop.
struct Server(Child);

impl Server {
    /// Starts it in a namespace with all endpoint addresses. It has the services' addresses too, where
    /// nothing listens: it refuses calls that no rule rewrites.
    fn start(netns: &NetNs) -> anyhow::Result<Self> {
        netns.run(|| {
            for network in [POD_NETWORK, SERVICE_NETWORK] {
                competitor::ip(&["route", "add", "local", network, "dev", "lo"])?;
            }
            let child = Command::new("/proc/self/exe").arg("server").stdin(Stdio::piped()).spawn()?;
            Ok(Self(child))
        })
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _ended_already = self.0.wait();
    }
}

/// The competitors of one size, each with the thread that works for it.
type Targets = [((&'static str, Ready), Caller<Order, Answer>)];

fn measure(
    size: Size,
    is_largest: bool,
    competitors: &[Competitor],
    options: &Options,
    is_smoke: bool,
    run: &mut Run,
) -> anyhow::Result<()> {
    let n_services = size.n_services;
    eprintln!("{n_services} services with {} endpoints each", size.n_endpoints);
    let netns = NetNs::new()?;
    let server = Server::start(&netns)?;
    let _servers = netns.run(|| Servers::tcp([(Ipv4Addr::UNSPECIFIED, CHANGING[0].port()).into()]));
    let patience = Duration::from_secs(options.patience);
    let setup = Setup { size, n_changes: options.changes, patience, server: server.pid() };
    thread::scope(|scope| -> anyhow::Result<()> {
        let mut ready = Vec::new();
        for (competitor, number) in competitors.iter().zip(1..) {
            let name = competitor.name();
            let netns = &netns;
            match Caller::start(scope, move |sandbox| {
                competitor::set_up(competitor, setup, sandbox, netns, number)
            }) {
                Ok((caller, made)) => {
                    if let Some(made) = &made.programming {
                        eprintln!("  {name}: programmed in {:.2} s", made.everything.as_secs_f64());
                        programming(made, name, n_services, run);
                    }
                    ready.push(((name, made), caller));
                }
                Err(error) => run.unavailable(name, Some(n_services), format!("{error:#}")),
            }
        }
        for work in Work::ALL {
            let kind = Kind { work, by: By::ClusterIp, title: work.name().to_owned() };
            take_turns(&kind, &ready, n_services, options.rounds, is_smoke, run)?;
        }
        if is_largest {
            packet_work(&ready, n_services, if is_smoke { 50 } else { 1000 }, run)?;
        }
        Ok(())
    })
}

/// Records how long the rules took, and the memory of what wrote them.
fn programming(made: &Programming, name: &str, n_services: u32, run: &mut Run) {
    let mut report = run.of(name, Some(n_services));
    report.times("programming: everything", &[made.everything]);
    report.times("programming: one endpoint", &made.added);
    report.times("programming: one endpoint removed", &made.removed);
    report.memory("memory", &made.memory);
}

fn take_turns(
    Kind { work, by, title }: &Kind,
    ready: &Targets,
    n_services: u32,
    rounds: u32,
    is_smoke: bool,
    run: &mut Run,
) -> anyhow::Result<()> {
    let (work, by, n) = (*work, *by, block(*work, is_smoke));
    let entries_before: Vec<u64> = ready.iter().map(|((_, made), _)| made.counters().entries).collect();
    let answers = turns::take(ready, rounds, |round| Order { work, by, n, seed: round.into() })
        .with_context(|| format!("{title}, {n_services} services"))?;
    for ((((name, made), _), answers), before) in ready.iter().zip(answers).zip(entries_before) {
        let mut report = run.of(name, Some(n_services));
        let mut series = |what: &str, unit, better, of: &dyn Fn(&Answer) -> Vec<f64>| {
            let blocks: Vec<Vec<f64>> = answers.iter().map(of).collect();
            report.series(&format!("{title}: {what}"), unit, better, &blocks);
        };
        let rate = |answer: &Answer| vec![f64::from(n) * 1e9 / real(answer.wall.max(1))];
        let cpu = |answer: &Answer| vec![real(answer.cpu) / f64::from(n)];
        let pieces = |times: &[u64]| times.iter().copied().map(real).collect();
        if work == Work::Stream {
            series("throughput", Unit::MebibytesPerSecond, Better::Higher, &rate);
            series("CPU per MiB", Unit::Nanoseconds, Better::Lower, &cpu);
        } else {
            series("latency", Unit::Nanoseconds, Better::Lower, &|answer| pieces(&answer.whole));
            series("connect()", Unit::Nanoseconds, Better::Lower, &|answer| pieces(&answer.connect));
            series("rate", Unit::PerSecond, Better::Higher, &rate);
            series("CPU", Unit::Nanoseconds, Better::Lower, &cpu);
        }
        if matches!(work, Work::Connection | Work::FreshDatagram) {
            let entries = real(made.counters().entries.saturating_sub(before));
            let entries = entries / f64::from((rounds + 1) * n);
            report.figure(&format!("{title}: conntrack entries"), Unit::Count, entries);
        }
    }
    Ok(())
}

/// Counts the work per packet of one open connection.
fn packet_work(ready: &Targets, n_services: u32, n: u32, run: &mut Run) -> anyhow::Result<()> {
    // Counting costs time, so it is enabled only here. conntrack does not start counting for existing
    // entries.
    let _counted_while_open = aya::sys::enable_stats(aya::sys::Stats::RunTime).ok();
    for ((name, made), caller) in ready {
        let _no_conntrack = made.count_packets();
        let before = made.counters();
        let _time_is_not_asked = caller
            .carry_out(Order { work: Work::KeepAlive, by: By::ClusterIp, n, seed: 1 })
            .context(*name)?;
        let after = made.counters();
        let mut report = run.of(name, Some(n_services));
        for (what, better, before, after) in [
            ("packets", Better::Neither, before.packets, after.packets),
            ("packets tracked", Better::Lower, before.tracked, after.tracked),
            ("BPF program runs", Better::Lower, before.program_runs, after.program_runs),
        ] {
            let each = real(after.saturating_sub(before)) / f64::from(n);
            report.series(&format!("{}: {what}", Work::KeepAlive.name()), Unit::Count, better, &[vec![each]]);
        }
    }
    Ok(())
}
