//! `cargo xtask bench sync`: the time from the API server to the kernel's maps, and the cost of the agent.
//!
//! The agent is the real one, `socklb run --source kube`, in its own sandbox. The API server is the test
//! server, in this process. The pinned maps are read.

mod agent;
mod load;
mod objects;
pub(crate) mod octets;
mod report;
mod tables;
mod traffic;

use std::{path::PathBuf, thread, time::Duration};

use anyhow::Context as _;
use clap::Args;
use lb_kernel::sockets;
use lb_tests::{Sandbox, apiserver::ApiServer};

use self::{agent::Agent, objects::Size, report::Report, tables::Tables};
use crate::{
    Common,
    result::{ResultFile, Run, Suite},
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
    let mut report = Report::new(&mut run);
    if wants("sync") || wants("traffic") {
        usual(options, &scale, &mut report, wants("sync"), wants("traffic"))?;
    }
    if wants("services") {
        large(options, &scale, scale.many_services, &mut report)?;
    }
    if wants("endpoints") {
        large(options, &scale, scale.many_endpoints, &mut report)?;
    }
    if wants("octets") {
        for size in scale.nodes {
            octets::run(options, size, &mut report)?;
        }
    }
    Ok(run.finish())
}

/// Measures a start, changes and memory for several numbers of services: the agent's part of `scale`.
pub(crate) fn growth(
    socklb: &std::path::Path,
    sizes: &[u32],
    time: Duration,
    run: &mut Run,
) -> anyhow::Result<()> {
    let options = Options { socklb: socklb.to_owned(), only: None, starts: 1 };
    let mut report = Report::new(run);
    for &n_services in sizes {
        let size = Size { n_services, n_endpoints: 5, n_nodes: 1000 };
        eprintln!("agent: {size}");
        report.part("agent", Some(n_services));
        Sandbox::run(|sandbox| {
            let server = server(size);
            let (agent, mut tables) = cold_starts(&options, sandbox, &server, size, 1, &mut report)?;
            report.memory("memory after start", &agent.memory()?);
            let rate = load::Rate { n_changing: 100.min(n_services), per_second: 50, time };
            let (latencies, _share) = load::churn(&server, &agent, &mut tables, size, &rate)?;
            report.times(ONE_BY_ONE, &latencies);
            agent.end()
        })?;
    }
    Ok(())
}

/// An API server with all objects of a size.
fn server(size: Size) -> ApiServer {
    let server = ApiServer::start();
    // A real server sends a bookmark about once a minute; the tests' default would keep an idle agent busy.
    server.set_faults(|faults| faults.bookmark_interval = Duration::from_secs(60));
    server.set(&size.cluster());
    server
}

/// The size that most clusters stay below.
fn usual(
    options: &Options,
    scale: &Scale,
    report: &mut Report,
    sync: bool,
    traffic: bool,
) -> anyhow::Result<()> {
    let size = scale.usual;
    report.part(&size.to_string(), None);
    Sandbox::run(|sandbox| {
        let server = server(size);
        let n_starts = if sync { scale.n_starts } else { 1 };
        let (agent, mut tables) = cold_starts(options, sandbox, &server, size, n_starts, report)?;
        if sync {
            thread::sleep(scale.settle);
            report.share(IDLE, agent.cpu_share(scale.idle)?);
            report.memory("memory after start", &agent.memory()?);
            let rate = load::Rate {
                n_changing: scale.n_changing,
                per_second: scale.changes_per_second,
                time: scale.churn,
            };
            let (latencies, share) = load::churn(&server, &agent, &mut tables, size, &rate)?;
            report.times(UNDER_LOAD, &latencies);
            report.share("CPU while many change", share);
            report.memory("memory after changes", &agent.memory()?);
        }
        if traffic {
            let (ready, unready) = traffic::flips(&server, scale.n_flips)?;
            report.times(READY, &ready);
            report.times(UNREADY, &unready);
            if sockets::check().is_ok() {
                report.times(MOVED, &traffic::moves(&server, scale.n_flips)?);
            }
        }
        agent.end()
    })
}

/// A size that few clusters reach.
fn large(options: &Options, scale: &Scale, size: Size, report: &mut Report) -> anyhow::Result<()> {
    report.part(&size.to_string(), None);
    Sandbox::run(|sandbox| {
        let server = server(size);
        let (agent, mut tables) = cold_starts(options, sandbox, &server, size, scale.n_starts, report)?;
        report.memory("memory after start", &agent.memory()?);
        let rate = load::Rate {
            n_changing: 100.min(size.n_services),
            per_second: 20,
            time: Duration::from_secs(1) * scale.n_single_changes / 20,
        };
        let (latencies, _share) = load::churn(&server, &agent, &mut tables, size, &rate)?;
        report.times(ONE_BY_ONE, &latencies);
        report.memory("memory after changes", &agent.memory()?);
        agent.end()
    })
}

/// Starts the agent with empty maps a few times and returns the last one.
fn cold_starts(
    options: &Options,
    sandbox: &Sandbox,
    server: &ApiServer,
    size: Size,
    n_starts: u32,
    report: &mut Report,
) -> anyhow::Result<(Agent, Tables)> {
    let (mut times, mut attached) = (report::Times::new(), report::Times::new());
    for left in (0..n_starts).rev() {
        let agent = Agent::start(&options.socklb, sandbox, server)?;
        let (mut tables, opened) = agent.tables()?;
        tables.until_right(size).with_context(|| agent.last_words())?;
        report::record(&mut times, agent.started.elapsed());
        report::record(&mut attached, opened);
        if left == 0 {
            report.times("process start to maps that exist", &attached);
            report.times(COLD_START, &times);
            report.time("CPU time of a start", agent.cpu_time()?);
            return Ok((agent, tables));
        }
        drop(tables);
        agent.end_and_clean(&options.socklb)?;
    }
    anyhow::bail!("--starts 0: at least one start is needed")
}
