//! `cargo xtask bench churn` and `cargo xtask chaos`: changes of everything with faults and calls, for as long as wanted.
#![expect(clippy::print_stdout, reason = "the result goes to standard output")]

use std::{path::PathBuf, time::Duration};

use clap::Parser;
use lb_tests::churn::{self, Options};

/// Changes objects at random while watches are cut, versions expire, the API server restarts, and calls are made.
#[derive(Parser)]
struct Args {
    /// The agent's binary; several are builds that replace each other
    #[arg(long, value_name = "FILE", required = true)]
    socklb: Vec<PathBuf>,
    /// Decides about objects and changes
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u64,
    /// How many agents are killed, ended and replaced
    #[arg(long, value_name = "N", default_value_t = 0)]
    events: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let options = Options::chaos(args.seed, args.events, Duration::from_secs(args.seconds));
    println!("seed {}, {} s at most", args.seed, args.seconds);
    println!("{}", churn::run(&args.socklb, &options)?);
    Ok(())
}
