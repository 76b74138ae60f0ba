//! `cargo xtask bench sync`: how long it takes from the API server to the kernel's maps, and what the agent costs.
//!
//! The agent is the real one, `socklb run --source kube`, in a sandbox of its own; the API server is the one of the
//! tests, in this process. What is asked of the maps is asked of the pinned ones. A figure is never asserted: each is
//! printed beside its target, with the load of the machine, and written as JSON if asked for.
#![expect(clippy::print_stdout, reason = "the result goes to standard output")]
#![expect(clippy::expect_used, reason = "a bench that cannot go on has failed")]

mod agent;
mod load;
mod objects;
mod report;
mod tables;
mod traffic;

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Parser;
use lb_tests::{Sandbox, apiserver::ApiServer};

use crate::{agent::Agent, objects::Size, report::Report, tables::Tables};

/// Measures from the API server's events to the kernel's maps.
#[derive(Parser)]
struct Args {
    /// The agent's binary
    #[arg(long, value_name = "FILE")]
    socklb: PathBuf,
    /// Small and short: shows that it works, not how fast it is
    #[arg(long)]
    smoke: bool,
    /// Writes the figures here, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only the parts whose name holds this: sync, traffic, services, endpoints
    #[arg(long, value_name = "PART")]
    only: Option<String>,
    /// How often cold starts are repeated
    #[arg(long, value_name = "N", default_value_t = 3)]
    starts: u32,
}

/// What is done of everything.
struct Scale {
    usual: Size,
    many_services: Size,
    many_endpoints: Size,
    n_changing: u32,
    changes_per_second: u32,
    churn: Duration,
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
            n_changing: 1000,
            changes_per_second: 500,
            churn: Duration::from_secs(20),
            idle: Duration::from_secs(30),
            n_single_changes: 300,
            n_flips: 200,
            n_starts,
        }
    }

    fn smoke() -> Self {
        Self {
            usual: Size { n_services: 500, n_endpoints: 10, n_nodes: 20 },
            many_services: Size { n_services: 2_000, n_endpoints: 2, n_nodes: 20 },
            many_endpoints: Size { n_services: 100, n_endpoints: 50, n_nodes: 100 },
            n_changing: 100,
            changes_per_second: 100,
            churn: Duration::from_secs(2),
            idle: Duration::from_secs(2),
            n_single_changes: 20,
            n_flips: 10,
            n_starts: 1,
        }
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let scale = if args.smoke { Scale::smoke() } else { Scale::full(args.starts) };
    let wants = |part: &str| args.only.as_deref().is_none_or(|only| part.contains(only));
    let mut report = Report::start();
    if wants("sync") || wants("traffic") {
        usual(&args, &scale, &mut report, wants("sync"), wants("traffic"))?;
    }
    if wants("services") {
        large(&args, &scale, scale.many_services, &mut report)?;
    }
    if wants("endpoints") {
        large(&args, &scale, scale.many_endpoints, &mut report)?;
    }
    report.finish(args.json.as_deref())
}

/// An API server with everything of a size.
fn server(size: Size) -> ApiServer {
    let server = ApiServer::start();
    // A real server sends a bookmark about once a minute; the tests' default would keep an idle agent busy.
    server.set_faults(|faults| faults.bookmark_interval = Duration::from_secs(60));
    server.set(&size.cluster());
    server
}

/// The size that most clusters stay below.
fn usual(args: &Args, scale: &Scale, report: &mut Report, sync: bool, traffic: bool) -> anyhow::Result<()> {
    let size = scale.usual;
    report.part(&format!("{size}"));
    Sandbox::run(|sandbox| {
        let server = server(size);
        let n_starts = if sync { scale.n_starts } else { 1 };
        let (agent, mut tables) = cold_starts(args, sandbox, &server, size, n_starts, 2.0, report)?;
        if sync {
            report.share("CPU while idle", agent.cpu_share(scale.idle)?, Some(0.005));
            report.memory("memory after start", &agent.memory()?, Some(60.0));
            let rate = load::Rate {
                n_changing: scale.n_changing,
                per_second: scale.changes_per_second,
                time: scale.churn,
            };
            let (latencies, share) = load::churn(&server, &agent, &mut tables, size, &rate)?;
            let title = format!("event to map, {} changes/s of {} slices", rate.per_second, rate.n_changing);
            report.times(&title, &latencies, &[(0.5, 2.0), (0.99, 10.0)]);
            report.share("CPU meanwhile", share, None);
            report.memory("memory after changes", &agent.memory()?, Some(60.0));
        }
        if traffic {
            let (ready, unready) = traffic::flips(&server, scale.n_flips)?;
            report.times("event to the first call that reaches a ready pod", &ready, &[(1.0, 50.0)]);
            report.times("event to the last new call to an unready pod", &unready, &[(1.0, 50.0)]);
        }
        agent.end()
    })
}

/// A size that few clusters reach.
fn large(args: &Args, scale: &Scale, size: Size, report: &mut Report) -> anyhow::Result<()> {
    report.part(&format!("{size}"));
    Sandbox::run(|sandbox| {
        let server = server(size);
        let (agent, mut tables) = cold_starts(args, sandbox, &server, size, scale.n_starts, 10.0, report)?;
        report.memory("memory after start", &agent.memory()?, None);
        let rate = load::Rate {
            n_changing: 100.min(size.n_services),
            per_second: 20,
            time: Duration::from_secs(1) * scale.n_single_changes / 20,
        };
        let (latencies, _share) = load::churn(&server, &agent, &mut tables, size, &rate)?;
        report.times("event to map, one change at a time", &latencies, &[(0.99, 20.0)]);
        report.memory("memory after changes", &agent.memory()?, None);
        agent.end()
    })
}

/// Starts the agent over empty tables a few times and returns the last one.
fn cold_starts(
    args: &Args,
    sandbox: &Sandbox,
    server: &ApiServer,
    size: Size,
    n_starts: u32,
    target_seconds: f64,
    report: &mut Report,
) -> anyhow::Result<(Agent, Tables)> {
    let (mut times, mut attached) = (report::times(), report::times());
    for left in (0..n_starts).rev() {
        let agent = Agent::start(&args.socklb, sandbox, server)?;
        let (mut tables, opened) = agent.tables()?;
        tables.until_right(size).with_context(|| agent.last_words())?;
        report::record(&mut times, agent.started.elapsed());
        report::record(&mut attached, opened);
        if left == 0 {
            report.times("process start to maps that exist", &attached, &[]);
            report.times("process start to maps that are right", &times, &[(1.0, target_seconds * 1e3)]);
            report.share("CPU time of that start, in seconds", agent.cpu_time()?.as_secs_f64(), None);
            return Ok((agent, tables));
        }
        drop(tables);
        agent.end_and_clean(args)?;
    }
    anyhow::bail!("--starts 0: at least one start is needed")
}
