//! `outside`: connections from outside, with `--packets=all`, while endpoints, Services and agents change.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use lb_tests::outside::{self, Outcome};

/// Options of `outside`.
#[derive(Args)]
pub(crate) struct Options {
    /// The agent's binary
    #[arg(long, value_name = "FILE")]
    socklb: PathBuf,
    /// New connections per second
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    rate: u32,
    /// Duration in seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Changes per second
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    changes_per_second: u32,
    /// Seconds until an agent is killed or stopped, and the next one starts
    #[arg(long, value_name = "N", default_value_t = 10)]
    agent_seconds: u64,
    /// Determines the changes
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> Outcome {
    outside::run(
        &options.socklb,
        &outside::Options {
            rate: options.rate,
            time: Duration::from_secs(options.seconds),
            seed: options.seed,
            change: Duration::from_secs(1) / options.changes_per_second,
            agent: Duration::from_secs(options.agent_seconds),
        },
    )
}
