//! `cargo xtask bench hooks`: the cost of a call with socklb's programs, compared with programs that do less.
//!
//! All targets are measured in one run: each in its own cgroup, in alternating blocks of calls, so that other
//! load of the machine affects all alike. Times are the caller's: from before the first system call until
//! after the last.

mod programs;
mod work;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::mpsc, thread};

use anyhow::Context as _;
use clap::Args;
use lb_tests::{Sandbox, cgroup::ThreadCgroup};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use crate::{
    Common,
    quantile::real,
    result::{Better, Key, ResultFile, Suite, Unit},
};
pub(crate) use work::Work;

const BLOCK: usize = 200;
const CALLS: usize = 40_000;
/// TCP connects, which are expensive.
const TCP_CALLS: usize = 4_000;
/// Loaded services, each with ten endpoints.
const SERVICES: u32 = 10_000;

/// Options of `hooks`.
#[derive(Args)]
pub(crate) struct Options {
    /// The compiled programs to compare with
    #[arg(long, value_name = "FILE")]
    object: PathBuf,
    /// A compiled object of another balancer, whose `connect4` program is measured with empty maps
    #[arg(long, value_name = "FILE")]
    peer: Option<PathBuf>,
    /// Measures only these targets and the empty program: names separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Divides the number of calls, for a quick run
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=50))]
    scale: u32,
}

struct Target {
    name: &'static str,
    /// Attaches to the cgroup; the result keeps it attached.
    attach: programs::Attach,
}

pub(crate) fn run(options: &Options, common: &Common) -> anyhow::Result<ResultFile> {
    let (block, n_services) = if common.smoke { (10, 20) } else { (BLOCK, SERVICES) };
    let n_calls = |work: Work| match (common.smoke, work.is_tcp()) {
        (true, _) => 2 * block,
        (false, true) => TCP_CALLS / options.scale as usize,
        (false, false) => CALLS / options.scale as usize,
    };
    let mut result = common.start(Suite::Hooks);
    result.setting("services", n_services);
    result.setting("endpoints of each service", 10);
    result.setting("calls in a block", block);
    result.setting("calls", n_calls(Work::FreshMiss));
    result.setting("TCP connections", n_calls(Work::TcpMiss));
    let object = std::fs::read(&options.object).with_context(|| options.object.display().to_string())?;
    Sandbox::run(|sandbox| {
        let servers = work::Servers::start()?;
        let mut targets = programs::targets(&object, &servers, options.peer.as_deref(), n_services);
        // Each target occupies CPU cache that the others would use.
        targets.retain(|target| {
            let is_wanted = options.only.iter().any(|name| name == target.name);
            options.only.is_empty() || target.name == programs::EMPTY || is_wanted
        });
        let mut results: BTreeMap<(&str, usize), Vec<Vec<f64>>> = BTreeMap::new();
        thread::scope(|scope| -> anyhow::Result<()> {
            let mut workers = Vec::new();
            for target in targets {
                let (orders, incoming) = mpsc::channel::<(Work, usize)>();
                let (outgoing, answers) = mpsc::channel();
                let servers = &servers;
                let _joined_by_scope = scope.spawn(move || -> anyhow::Result<()> {
                    stay_on(0)?;
                    let cgroup = ThreadCgroup::enter()?;
                    let _attached = match (target.attach)(sandbox, cgroup.path()) {
                        Ok(attached) => attached,
                        Err(error) => return Ok(outgoing.send(Err(error))?),
                    };
                    let mut worker = work::Worker::new(servers)?;
                    outgoing.send(Ok(Vec::new()))?;
                    for (work, n_calls) in incoming {
                        outgoing.send(worker.run(work, n_calls).map_err(Into::into))?;
                    }
                    Ok(())
                });
                match answers.recv().with_context(|| format!("{}: thread has exited", target.name))? {
                    Ok(_ready) => workers.push((target.name, orders, answers)),
                    Err(error) => result.unavailable(target.name, None, format!("{error:#}")),
                }
            }
            for work in Work::ALL {
                for _ in 0..n_calls(work) / block {
                    for (name, orders, answers) in &workers {
                        orders.send((work, block))?;
                        let times = answers.recv()??.into_iter().map(real).collect();
                        results.entry((name, work as usize)).or_default().push(times);
                    }
                }
            }
            for work in Work::ALL {
                for (name, ..) in &workers {
                    let blocks = results.remove(&(*name, work as usize)).unwrap_or_default();
                    result.series(Key::new(work.title(), name), Unit::Nanoseconds, Better::Lower, &blocks);
                }
            }
            Ok(())
        })
    })?;
    Ok(result.finish())
}

/// Pins the calling thread to one CPU, the same for all callers: CPUs of one machine differ in other load and
/// in cache contents.
pub(crate) fn stay_on(cpu: usize) -> anyhow::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("cannot stay on CPU {cpu}"))
}

fn vip() -> SocketAddr {
    ([10, 96, 0, 1], 80).into()
}
