//! `cargo xtask bench churn` and `cargo xtask chaos`: random changes with faults and calls, for any time.
#![expect(clippy::print_stdout, reason = "the result goes to standard output")]

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use lb_tests::churn::{self, Options};

/// Changes objects at random while watches are cut, versions expire, the API server restarts, and calls are
/// made.
#[derive(Parser)]
struct Args {
    /// The agent's binary; several are builds that replace each other
    #[arg(long, value_name = "FILE", required = true)]
    socklb: Vec<PathBuf>,
    /// Determines objects and changes
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Duration in seconds
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u64,
    /// Number of agents to kill, stop and replace
    #[arg(long, value_name = "N", default_value_t = 0)]
    events: u64,
    #[command(flatten)]
    large: Large,
}

/// Options of a large run. With any of these figures are printed, and the exit status is 1 if one of them is
/// out of bounds.
#[derive(clap::Args)]
struct Large {
    /// Number of services; API server faults are rarer then [default: 56 of every kind]
    #[arg(long, value_name = "N", conflicts_with = "events")]
    services: Option<usize>,
    /// Endpoints of each service [default: 6]
    #[arg(long, value_name = "N", requires = "services")]
    endpoints: Option<usize>,
    /// Changes per second [default: 100]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    changes_per_second: Option<u32>,
    /// Mean interval of kills of the agent; every tenth agent lives twelve times as long
    #[arg(long, value_name = "SECONDS", conflicts_with = "events")]
    kill_every: Option<u64>,
    /// Interval of lines of figures [default: 60]
    #[arg(long, value_name = "SECONDS")]
    report_every: Option<u64>,
}

impl Large {
    fn add_to(&self, mut options: Options) -> Options {
        let Self { services, endpoints, changes_per_second, kill_every, report_every } = *self;
        if let Some(services) = services {
            options = options.large(services, endpoints.unwrap_or(options.n_endpoints));
        }
        if let Some(changes) = changes_per_second {
            options.change = Duration::from_secs(1) / changes;
        }
        options.kill = kill_every.map(Duration::from_secs);
        let is_large = services.is_some() || changes_per_second.is_some() || kill_every.is_some();
        options.report =
            report_every.or(is_large.then_some(60)).map(|seconds| Duration::from_secs(seconds.max(1)));
        options
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let options =
        args.large.add_to(Options::chaos(args.seed, args.events, Duration::from_secs(args.seconds)));
    println!("seed {}, {} s at most, {} services", args.seed, args.seconds, options.n_services);
    let outcome = churn::run(&args.socklb, &options)?;
    println!("{outcome}");
    let flaws = outcome.observed.map(|observed| observed.flaws()).unwrap_or_default();
    // The lines above report them.
    Ok(if flaws.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
