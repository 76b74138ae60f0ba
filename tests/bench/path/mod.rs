//! `cargo xtask bench path`: the same work to an endpoint's own address and through socklb, nftables and
//! iptables.
//!
//! Each competitor has a client process in its own network namespace and cgroup. A veth pair connects each to
//! one namespace with one server process, which answers at all endpoint addresses; there are no other routes.
//! The competitors alternate in small blocks and use the same services in the same order, so that other load
//! of the machine affects all alike. Client and server share one CPU: they never work at the same time, and
//! so all of its CPU time, including softirqs, is theirs.

mod client;
mod competitor;
mod cpu;
mod iptables;
mod nftables;
mod server;
mod town;

use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use lb_tests::{Sandbox, netns::NetNs};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use crate::{
    Common,
    machine::versions,
    quantile::real,
    result::{Better, Key, ResultFile, Run, Suite, Unit},
};
use client::{Order, Place, Work};
use competitor::{Competitor, Ready, Setup};
use town::{MAX_ENDPOINTS, MAX_SERVICES, POD_NETWORK, Town};

const CPU: usize = 0;

/// Options of `path`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Numbers of services, one measurement for each
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 1_000, 10_000, 30_000])]
    services: Vec<u32>,
    /// Endpoints of each service
    #[arg(long, value_name = "N", default_value_t = 3)]
    endpoints: u32,
    /// Number of turns of each competitor for each kind of work
    #[arg(long, value_name = "N", default_value_t = 50)]
    rounds: u32,
    /// Number of changes of one endpoint, to measure their time
    #[arg(long, value_name = "N", default_value_t = 3)]
    changes: u32,
    /// Seconds after which a tool that loads rules is killed
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
}

pub(crate) fn client(args: &ClientArgs) -> anyhow::Result<()> {
    let town = Town { n_services: args.services, n_endpoints: args.endpoints };
    client::run(Place { town, to_endpoint: args.to_endpoint, server: Pid::from_raw(args.server) })
}

pub(crate) fn server() -> anyhow::Result<()> {
    server::run()
}

/// Pins the calling thread, and those that it starts, to [`CPU`].
fn stay_on_one_cpu() -> anyhow::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(CPU)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("cannot stay on CPU {CPU}"))
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
    }
    let largest = options.services.iter().copied().max().unwrap_or_default();
    anyhow::ensure!(
        options.services.iter().all(|n| (1..=MAX_SERVICES).contains(n))
            && options.endpoints > 0
            && u64::from(largest) * u64::from(options.endpoints) <= u64::from(MAX_ENDPOINTS),
        "--services and --endpoints: 1 to {MAX_SERVICES} services, {MAX_ENDPOINTS} endpoints together"
    );
    let mut run = common.start(Suite::Path);
    run.setting("services", options.services.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
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
    run.versions(versions(&["nft", "ip"]));
    if let Ok(tool) = competitor::iptables_tool() {
        run.versions(
            [("iptables-restore".to_owned(), crate::machine::version(tool).unwrap_or_default())].into(),
        );
    }
    for &n_services in &options.services {
        let town = Town { n_services, n_endpoints: options.endpoints };
        size(town, n_services == largest, &options, common.smoke, &mut run)?;
    }
    Ok(run.finish())
}

/// The server's process. Killed on drop.
struct Server(Child);

impl Server {
    /// Starts it in a namespace with all endpoint addresses.
    fn start(netns: &NetNs) -> anyhow::Result<Self> {
        netns.run(|| {
            competitor::ip(&["route", "add", "local", POD_NETWORK, "dev", "lo"])?;
            let child = Command::new("/proc/self/exe").arg("server").stdin(Stdio::piped()).spawn()?;
            Ok(Self(child))
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _ended_already = self.0.wait();
    }
}

fn size(
    town: Town,
    is_largest: bool,
    options: &Options,
    is_smoke: bool,
    run: &mut Run,
) -> anyhow::Result<()> {
    let n_services = town.n_services;
    eprintln!("{n_services} services with {} endpoints each", town.n_endpoints);
    let netns = NetNs::new()?;
    let server = Server::start(&netns)?;
    let pid = server.0.id();
    let setup = Setup { town, n_changes: options.changes, patience: Duration::from_secs(options.patience) };
    thread::scope(|scope| -> anyhow::Result<()> {
        // A thread stays with each sandbox until its sender is dropped: after the clients, which are declared
        // later, because only an empty cgroup can be removed.
        let mut stop = Vec::new();
        let mut ready = Vec::new();
        for (competitor, number) in Competitor::ALL.into_iter().zip(1..) {
            let (sender, receiver) = mpsc::channel();
            let (stopper, end) = mpsc::channel::<()>();
            let netns = &netns;
            let _joined_by_scope = scope.spawn(move || {
                Sandbox::run(move |sandbox| {
                    let made = competitor::set_up(competitor, setup, sandbox, (netns, pid), number);
                    let (ready, kept) = match made {
                        Ok((ready, kernel)) => (Ok(ready), kernel),
                        Err(error) => (Err(error), None),
                    };
                    if sender.send(ready).is_ok() {
                        let _sender_is_gone = end.recv();
                    }
                    drop(kept);
                });
            });
            match receiver.recv().context("the competitor's thread has exited")? {
                Ok(made) => {
                    eprintln!(
                        "  {}: programmed in {:.2} s",
                        competitor.name(),
                        made.programming.unwrap_or_default().as_secs_f64()
                    );
                    ready.push((competitor, made));
                    stop.push(stopper);
                }
                Err(error) => run.unavailable(competitor.name(), Some(n_services), format!("{error:#}")),
            }
        }
        for work in Work::ALL {
            turns(work, &mut ready, n_services, options.rounds, is_smoke, run)?;
        }
        for (competitor, made) in &ready {
            programming(*competitor, made, n_services, run);
        }
        if is_largest {
            packet_work(&mut ready, n_services, if is_smoke { 50 } else { 1000 }, run)?;
        }
        drop(ready);
        drop(stop);
        Ok(())
    })
}

fn key(work: Work, what: &str, competitor: Competitor, n_services: u32) -> Key {
    Key::new(&format!("{}: {what}", work.name()), competitor.name()).at(n_services)
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// Records how long the rules took.
fn programming(competitor: Competitor, made: &Ready, n_services: u32, run: &mut Run) {
    let key = |measure| Key::new(measure, competitor.name()).at(n_services);
    if let Some(time) = made.programming {
        run.figure(key("programming: everything"), Unit::Nanoseconds, Better::Lower, nanoseconds(time));
    }
    if let Some(time) = made.loading {
        run.figure(
            key("programming: loading the programs"),
            Unit::Nanoseconds,
            Better::Lower,
            nanoseconds(time),
        );
    }
    let changes: Vec<Vec<f64>> = made.changes.iter().map(|time| vec![nanoseconds(*time)]).collect();
    run.series(key("programming: one endpoint"), Unit::Nanoseconds, Better::Lower, &changes);
}

#[derive(Default)]
struct Blocks {
    whole: Vec<Vec<f64>>,
    connect: Vec<Vec<f64>>,
    rate: Vec<Vec<f64>>,
    cpu: Vec<Vec<f64>>,
}

fn turns(
    work: Work,
    ready: &mut [(Competitor, Ready)],
    n_services: u32,
    rounds: u32,
    is_smoke: bool,
    run: &mut Run,
) -> anyhow::Result<()> {
    let n = block(work, is_smoke);
    let mut blocks: BTreeMap<Competitor, Blocks> = BTreeMap::new();
    let entries_before: Vec<u64> = ready.iter().map(|(_, made)| made.counters().entries).collect();
    let n_ready = ready.len().max(1);
    for round in 0..=rounds {
        for turn in 0..ready.len() {
            // The order rotates, because the first finds the caches as the last left them.
            let (competitor, made) = &mut ready[(turn + round as usize) % n_ready];
            let answer = made
                .client
                .work(&Order { work, n, seed: u64::from(round) })
                .with_context(|| format!("{}, {}, {n_services} services", competitor.name(), work.name()))?;
            // The first round is a warm-up: addresses are resolved, memory is allocated.
            if round == 0 {
                continue;
            }
            let blocks = blocks.entry(*competitor).or_default();
            let pieces = |times: &[u64]| times.iter().copied().map(real).collect::<Vec<f64>>();
            blocks.whole.push(pieces(&answer.whole));
            blocks.connect.push(pieces(&answer.connect));
            blocks.rate.push(vec![f64::from(n) * 1e9 / real(answer.wall.max(1))]);
            blocks.cpu.push(vec![real(answer.cpu) / f64::from(n)]);
        }
    }
    for (competitor, blocks) in &blocks {
        let key = |what| key(work, what, *competitor, n_services);
        if work == Work::Stream {
            run.series(key("throughput"), Unit::MebibytesPerSecond, Better::Higher, &blocks.rate);
            run.series(key("CPU per MiB"), Unit::Nanoseconds, Better::Lower, &blocks.cpu);
        } else {
            run.series(key("latency"), Unit::Nanoseconds, Better::Lower, &blocks.whole);
            run.series(key("connect()"), Unit::Nanoseconds, Better::Lower, &blocks.connect);
            run.series(key("rate"), Unit::PerSecond, Better::Higher, &blocks.rate);
            run.series(key("CPU"), Unit::Nanoseconds, Better::Lower, &blocks.cpu);
        }
    }
    if matches!(work, Work::Connection | Work::FreshDatagram) {
        let n_done = f64::from((rounds + 1) * n);
        for ((competitor, made), before) in ready.iter().zip(entries_before) {
            let entries = real(made.counters().entries.saturating_sub(before)) / n_done;
            run.figure(
                key(work, "conntrack entries", *competitor, n_services),
                Unit::Count,
                Better::Lower,
                entries,
            );
        }
    }
    Ok(())
}

/// Counts the work per packet of one open connection.
fn packet_work(
    ready: &mut [(Competitor, Ready)],
    n_services: u32,
    n: u32,
    run: &mut Run,
) -> anyhow::Result<()> {
    // Counting costs time, so it is enabled only here. conntrack does not start counting for existing
    // entries.
    let _counted_while_open = aya::sys::enable_stats(aya::sys::Stats::RunTime).ok();
    for (competitor, made) in ready {
        let _no_conntrack = made.count_packets();
        let before = made.counters();
        let answer = made.client.work(&Order { work: Work::KeepAlive, n, seed: 1 });
        let _time_is_not_asked = answer.with_context(|| competitor.name())?;
        let after = made.counters();
        let of = |read: fn(&competitor::Counters) -> u64| {
            real(read(&after).saturating_sub(read(&before))) / f64::from(n)
        };
        for (what, value) in [
            ("packets", of(|counters| counters.packets)),
            ("packets tracked", of(|counters| counters.tracked)),
            ("BPF program runs", of(|counters| counters.program_runs)),
        ] {
            let better = if what == "packets" { Better::Neither } else { Better::Lower };
            run.figure(key(Work::KeepAlive, what, *competitor, n_services), Unit::Count, better, value);
        }
    }
    Ok(())
}
