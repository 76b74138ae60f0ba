//! `socklb self-test-calls`, which the agent runs.

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use clap::Args;
use lb_agent::self_test::calls::{make, make_excluded};
use lb_core::model::Family;

/// Flags of the hidden command.
#[derive(Debug, Args)]
pub struct CallsArgs {
    /// The cgroup to enter first.
    #[arg(long)]
    cgroup: Option<PathBuf>,
    /// Whether to call over IPv6 too.
    #[arg(long)]
    ipv6: bool,
    /// Whether this cgroup is excluded, so that calls must pass unchanged.
    #[arg(long)]
    excluded: bool,
}

/// Makes the calls and prints the results as JSON.
///
/// # Errors
///
/// If standard output is closed.
pub fn calls(args: &CallsArgs) -> anyhow::Result<ExitCode> {
    let families = if args.ipv6 { &[Family::V4, Family::V6][..] } else { &[Family::V4] };
    let cgroup = args.cgroup.as_ref();
    let report = if args.excluded { make_excluded(cgroup) } else { make(cgroup, families) };
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&report)?)?;
    Ok(ExitCode::SUCCESS)
}
