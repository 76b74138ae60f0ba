//! `cargo xtask bench churn`: changes of everything with faults and calls, for as long as wanted.
#![expect(clippy::print_stdout, reason = "the result goes to standard output")]

use std::{path::PathBuf, time::Duration};

use clap::Parser;
use lb_tests::churn::{self, Options};

/// Changes objects at random while watches are cut, versions expire, the API server restarts, and calls are made.
#[derive(Parser)]
struct Args {
    /// The agent's binary
    #[arg(long, value_name = "FILE")]
    socklb: PathBuf,
    /// Decides about objects and changes
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let options = Options::long(args.seed, Duration::from_secs(args.seconds));
    println!("seed {}, {} s", args.seed, args.seconds);
    println!("{}", churn::run(&args.socklb, &options)?);
    Ok(())
}
