//! `cargo xtask bench hooks`: what a call costs with socklb's programs, beside programs that do less.
//!
//! All targets are measured in one run: each on a cgroup of its own, in blocks of calls that take turns, so that
//! whatever else the machine does meets all of them alike. Times are the caller's: from before the first system call
//! to after the last.
#![expect(clippy::print_stdout, reason = "the result goes to standard output")]

mod programs;
mod work;

use std::{collections::BTreeMap, env, net::SocketAddr, sync::mpsc, thread};

use anyhow::Context as _;
use lb_tests::{Sandbox, cgroup::ThreadCgroup};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use crate::work::Work;

/// Calls of one target before the next one's turn.
const BLOCK: usize = 200;
/// Calls of each target and kind of work.
const CALLS: usize = 40_000;
/// TCP connects, which are dear.
const TCP_CALLS: usize = 4_000;
/// Services that are loaded, each with ten endpoints.
const SERVICES: u32 = 10_000;

/// A program or set of programs to measure.
struct Target {
    name: &'static str,
    /// Attaches to the cgroup; what it returns keeps it attached.
    attach: programs::Attach,
}

fn main() -> anyhow::Result<()> {
    let scale: usize = env::var("BENCH_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let object =
        env::var("SOCKLB_BENCH_OBJECT").context("SOCKLB_BENCH_OBJECT must name the object lb-bench")?;
    let object = std::fs::read(&object).with_context(|| object.clone())?;
    Sandbox::run(|sandbox| {
        let servers = work::Servers::start()?;
        // Each target takes room in the caches that the others would have.
        let only: Option<Vec<String>> = env::var("BENCH_ONLY")
            .ok()
            .filter(|names| !names.is_empty())
            .map(|names| names.split(',').map(str::to_owned).collect());
        let mut targets = programs::targets(&object, &servers);
        targets.retain(|target| {
            only.as_ref()
                .is_none_or(|only| target.name == "empty" || only.iter().any(|name| name == target.name))
        });
        let mut results: BTreeMap<(&str, usize), Vec<u64>> = BTreeMap::new();
        thread::scope(|scope| -> anyhow::Result<()> {
            let mut workers = Vec::new();
            for target in targets {
                let (orders, incoming) = mpsc::channel::<(Work, usize)>();
                let (outgoing, answers) = mpsc::channel();
                let servers = &servers;
                let _joined_by_scope = scope.spawn(move || -> anyhow::Result<()> {
                    stay_on(0)?;
                    let cgroup = ThreadCgroup::enter()?;
                    let _attached = (target.attach)(sandbox, cgroup.path())?;
                    let mut worker = work::Worker::new(servers)?;
                    outgoing.send(Vec::new())?;
                    for (work, n_calls) in incoming {
                        outgoing.send(worker.run(work, n_calls)?)?;
                    }
                    Ok(())
                });
                let _ready =
                    answers.recv().with_context(|| format!("{}: cannot be attached", target.name))?;
                workers.push((target.name, orders, answers));
            }
            for work in Work::ALL {
                let n_calls = if work.is_tcp() { TCP_CALLS } else { CALLS } / scale;
                for _ in 0..n_calls / BLOCK {
                    for (name, orders, answers) in &workers {
                        orders.send((work, BLOCK))?;
                        results.entry((name, work as usize)).or_default().extend(answers.recv()?);
                    }
                }
            }
            let names: Vec<&str> = workers.iter().map(|(name, ..)| *name).collect();
            print(&names, &mut results);
            Ok(())
        })
    })
}

/// Keeps the calling thread on one CPU, the same for all callers: two CPUs of one machine differ in what else they do and
/// in what their caches hold.
fn stay_on(cpu: usize) -> anyhow::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("cannot stay on CPU {cpu}"))
}

/// Prints medians as differences to the programs that do nothing, and the p99 of each.
fn print(names: &[&str], results: &mut BTreeMap<(&str, usize), Vec<u64>>) {
    print!("{:<24}", "ns: median over empty");
    for work in Work::ALL {
        print!("{:>15}", work.title());
    }
    println!();
    let mut quantile = |name: &str, work: Work, q: f64| -> i64 {
        let Some((_, samples)) = results.iter_mut().find(|((n, w), _)| *n == name && *w == work as usize)
        else {
            return 0;
        };
        samples.sort_unstable();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index"
        )]
        let index = ((samples.len() - 1) as f64 * q) as usize;
        samples[index].cast_signed()
    };
    for name in names {
        print!("{name:<24}");
        for work in Work::ALL {
            let floor = quantile("empty", work, 0.5);
            let median = quantile(name, work, 0.5);
            let p99 = quantile(name, work, 0.99);
            if *name == "none" || *name == "empty" {
                print!("{:>15}", format!("{median} ({p99})"));
            } else {
                print!("{:>15}", format!("{:+} ({p99})", median - floor));
            }
        }
        println!();
    }
}

/// The frontend that the benches call, as a socket address.
fn vip() -> SocketAddr {
    ([10, 96, 0, 1], 80).into()
}
