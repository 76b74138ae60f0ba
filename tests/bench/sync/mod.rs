//! `cargo xtask bench sync`: the time from the API server to the kernel's maps, and the cost of the agent.
//!
//! The agent is the real one, `socklb run --source kube`, in its own sandbox. The API server is the test
//! server, in this process. The pinned maps are read.

mod load;
pub(crate) mod octets;
mod tables;
pub(crate) mod traffic;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use lb_kernel::sockets;
use lb_tests::{Sandbox, apiserver::ApiServer, cluster::Cluster, server::Servers};

use self::{
    load::Rate,
    tables::{PATIENCE, Tables},
};
use crate::{
    Common,
    daemon::Daemon,
    objects::Size,
    result::{Report, ResultFile, Run, Suite, Unit},
};

/// From the server's event until calls may reach the new endpoint, while many endpoints change.
pub(crate) const UNDER_LOAD: &str = "event to map, many changes at once";
/// The same with one change at a time.
pub(crate) const ONE_BY_ONE: &str = "event to map, one change at a time";
/// From the start of the process until the maps are right.
pub(crate) const COLD_START: &str = "process start to maps that are right";
/// From the server's event that the pod of a connected UDP socket is gone until an answer of the replacement.
pub(crate) const MOVED: &str = "event to the answer of another pod, connected UDP socket";
/// From the server's event until the end of the first call that reaches a pod.
pub(crate) const READY: &str = "event to the first call that reaches a ready pod";
/// From the server's event until the beginning of the last call that reaches a pod.
pub(crate) const UNREADY: &str = "event to the last new call to an unready pod";
/// Memory of a just started agent; the agent's own part of it follows a colon.
pub(crate) const MEMORY: &str = "memory after start: resident without BPF maps";
/// The share of a core that an agent uses without changes.
pub(crate) const IDLE: &str = "CPU while idle";

/// Options of `sync`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// The agent's binary
    #[arg(long, value_name = "FILE")]
    pub(crate) socklb: PathBuf,
    /// Only the parts whose name contains this: sync, traffic, services, endpoints, octets
    #[arg(long, value_name = "PART")]
    only: Option<String>,
    /// Number of cold starts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    starts: u32,
}

/// The sizes of all parts.
struct Scale {
    usual: Size,
    many_services: Size,
    many_endpoints: Size,
    /// For the measurement of what is read from the API server.
    nodes: [Size; 2],
    n_changing: u32,
    changes_per_second: u32,
    churn: Duration,
    /// Time for what the agent does after a start: the snapshot, the first sweep.
    settle: Duration,
    idle: Duration,
    n_single_changes: u32,
    n_flips: u32,
    n_starts: u32,
}

impl Scale {
    fn full(n_starts: u32) -> Self {
        Self {
            usual: Size { n_services: 10_000, n_endpoints: 10, n_nodes: 1000 },
            many_services: Size { n_services: 44_000, n_endpoints: 5, n_nodes: 1000 },
            many_endpoints: Size { n_services: 5_000, n_endpoints: 50, n_nodes: 5000 },
            nodes: [1000, 5000].map(|n_nodes| Size { n_services: 5_000, n_endpoints: 10, n_nodes }),
            n_changing: 1000,
            changes_per_second: 500,
            churn: Duration::from_secs(20),
            settle: Duration::from_secs(3),
            idle: Duration::from_secs(15),
            n_single_changes: 300,
            n_flips: 200,
            n_starts,
        }
    }

    fn smoke() -> Self {
        Self {
            usual: Size { n_services: 100, n_endpoints: 10, n_nodes: 20 },
            many_services: Size { n_services: 300, n_endpoints: 2, n_nodes: 20 },
            many_endpoints: Size { n_services: 20, n_endpoints: 50, n_nodes: 100 },
            nodes: [5, 10].map(|n_nodes| Size { n_services: 20, n_endpoints: 10, n_nodes }),
            n_changing: 50,
            changes_per_second: 100,
            churn: Duration::from_millis(500),
            settle: Duration::from_millis(100),
            idle: Duration::from_millis(200),
            n_single_changes: 10,
            n_flips: 5,
            n_starts: 1,
        }
    }
}

pub(crate) fn run(options: &Options, common: &Common) -> anyhow::Result<ResultFile> {
    let scale = if common.smoke { Scale::smoke() } else { Scale::full(options.starts) };
    let wants = |part: &str| options.only.as_deref().is_none_or(|only| part.contains(only));
    let mut run = common.start(Suite::Sync);
    run.setting("usual size", scale.usual);
    run.setting("many services", scale.many_services);
    run.setting("many endpoints", scale.many_endpoints);
    run.setting("changes in a second", scale.changes_per_second);
    run.setting("slices that change", scale.n_changing);
    run.setting("seconds of changes", scale.churn.as_secs_f64());
    run.setting("cold starts", scale.n_starts);
    run.setting("parts", options.only.as_deref().unwrap_or("all"));
    let mut part = |name: &str, part: &Part| -> anyhow::Result<()> {
        let mut report = run.of(&part.size.to_string(), None);
        if wants(name) { part.measure(&options.socklb, &mut report) } else { Ok(()) }
    };
    let few_changes = |size: Size| Part {
        n_starts: scale.n_starts,
        changes: Some((
            ONE_BY_ONE,
            Rate {
                n_changing: 100.min(size.n_services),
                per_second: 20,
                time: Duration::from_secs(1) * scale.n_single_changes / 20,
            },
        )),
        ..Part::of(size)
    };
    let rate = Rate { n_changing: scale.n_changing, per_second: scale.changes_per_second, time: scale.churn };
    let usual = Part {
        n_starts: scale.n_starts,
        idle: Some((scale.settle, scale.idle)),
        changes: Some((UNDER_LOAD, rate)),
        ..Part::of(scale.usual)
    };
    part("sync", &usual)?;
    part("traffic", &Part { n_flips: scale.n_flips, ..Part::of(scale.usual) })?;
    part("services", &few_changes(scale.many_services))?;
    part("endpoints", &few_changes(scale.many_endpoints))?;
    if wants("octets") {
        for size in scale.nodes {
            octets::run(&options.socklb, size, &mut run)?;
        }
    }
    Ok(run.finish())
}

/// Measures a start, changes and memory for several numbers of services: the agent's part of `scale`.
pub(crate) fn growth(socklb: &Path, sizes: &[u32], time: Duration, run: &mut Run) -> anyhow::Result<()> {
    for &n_services in sizes {
        let size = Size { n_services, n_endpoints: 5, n_nodes: 1000 };
        let rate = Rate { n_changing: 100.min(n_services), per_second: 50, time };
        let part = Part { n_starts: 1, changes: Some((ONE_BY_ONE, rate)), ..Part::of(size) };
        part.measure(socklb, &mut run.of("agent", Some(n_services)))?;
    }
    Ok(())
}

/// An API server with these objects.
pub(crate) fn server(cluster: &Cluster) -> ApiServer {
    let server = ApiServer::start();
    // A real server sends a bookmark about once a minute; the tests' default would keep an idle agent busy.
    server.set_faults(|faults| faults.bookmark_interval = Duration::from_secs(60));
    server.set(cluster);
    server
}

/// What is measured with one agent and its objects.
struct Part {
    size: Size,
    /// Cold starts that are recorded.
    n_starts: u32,
    /// The time before an agent counts as idle, and the time of that measurement.
    idle: Option<(Duration, Duration)>,
    /// The measure and the load.
    changes: Option<(&'static str, Rate)>,
    n_flips: u32,
}

impl Part {
    const fn of(size: Size) -> Self {
        Self { size, n_starts: 0, idle: None, changes: None, n_flips: 0 }
    }

    fn measure(&self, socklb: &Path, report: &mut Report<'_>) -> anyhow::Result<()> {
        eprintln!("{}", self.size);
        Sandbox::run(|sandbox| {
            let server = server(&self.size.cluster());
            let (mut agent, mut tables) = self.cold_starts(socklb, sandbox, &server, report)?;
            if let Some((settle, time)) = self.idle {
                thread::sleep(settle);
                report.figure(IDLE, Unit::Ratio, agent.cpu_share(time)?);
            }
            if let Some((measure, rate)) = &self.changes {
                report.memory("memory after start", &agent.memory()?);
                let (latencies, share) = load::churn(&server, &agent, &mut tables, self.size, rate)?;
                report.times(measure, &latencies);
                report.figure("CPU while many change", Unit::Ratio, share);
                report.memory("memory after changes", &agent.memory()?);
            }
            if self.n_flips > 0 {
                // Two pods of one slice have the same port number, so each has its own loopback address.
                let pods = [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2)];
                let pods = pods.map(|ip| SocketAddr::from((ip, 8001)));
                let _servers = Servers::tcp(pods);
                let (ready, unready) = traffic::flips(&server, pods, self.n_flips, PATIENCE)?;
                report.times(READY, &ready);
                report.times(UNREADY, &unready);
                if sockets::check().is_ok() {
                    report.times(MOVED, &traffic::moves(&server, pods, self.n_flips)?);
                }
            }
            agent.end()
        })
    }

    /// Starts the agent with empty maps a few times and returns the last one.
    fn cold_starts(
        &self,
        socklb: &Path,
        sandbox: &Sandbox,
        server: &ApiServer,
        report: &mut Report<'_>,
    ) -> anyhow::Result<(Daemon, Tables)> {
        let (mut times, mut attached) = (Vec::new(), Vec::new());
        loop {
            let agent = Daemon::socklb(socklb, sandbox, server, &[])?;
            let tables = Tables::of(&agent, sandbox, self.size);
            let (tables, opened) = tables.with_context(|| agent.last_words())?;
            times.push(agent.started.elapsed());
            attached.push(opened);
            if times.len() >= self.n_starts as usize {
                if self.n_starts > 0 {
                    report.times("process start to maps that exist", &attached);
                    report.times(COLD_START, &times);
                    report.times("CPU time of a start", &[agent.cpu_time()?]);
                }
                return Ok((agent, tables));
            }
            drop(tables);
            agent.end_and_clean(socklb, sandbox)?;
        }
    }
}
