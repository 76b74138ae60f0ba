//! `cargo xtask chaos`: kills, stops and replaces agents under load.

use anyhow::Result;
use clap::Args;
use fs_err as fs;

use crate::build;
use crate::process::{self, step};
use crate::setup::Purpose;
use crate::test::FEATURES;
use crate::workspace::Workspace;

/// Arguments of `cargo xtask chaos`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Seed of objects, changes and what happens to agents; a failure prints it
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Number of agents to kill, stop and replace
    #[arg(long, value_name = "N", default_value_t = 200)]
    events: u64,
    /// Time limit in seconds
    #[arg(long, value_name = "N", default_value_t = 900)]
    seconds: u64,
}

/// Runs `cargo xtask chaos`. Needs root: agents attach programs, in the run's own namespace and cgroup.
///
/// # Errors
/// If setup or building fails, a call fails or reaches a wrong endpoint, or the maps are wrong at the end.
pub(crate) fn command(workspace: &Workspace, options: &Options) -> Result<()> {
    let object = build::object(workspace, &[Purpose::Build, Purpose::Run])?;
    step("building socklb twice: with and without the feature to kill itself");
    let directory = workspace.target.join("chaos");
    fs::create_dir_all(&directory)?;
    let programs =
        ["--package", "lb-tests", "--package", "lb-userspace", "--bin", "socklb", "--bin", "bench-churn"];
    let keep = |name: &str, features: &[&str]| {
        build::programs(workspace, &object, &[&programs, features].concat())?;
        // A running program cannot be overwritten: a new file replaces the old one.
        let (new, kept) = (directory.join("new"), directory.join(name));
        fs::copy(workspace.socklb(false), &new)?;
        fs::rename(new, &kept)?;
        anyhow::Ok(kept)
    };
    let plain = keep("socklb-plain", &[])?;
    let fault_points = keep("socklb", &["--features", FEATURES])?;
    let program = workspace.target.join("debug/bench-churn");
    let mut chaos = process::as_root(program, "agents need root to attach BPF programs");
    // The binary with the kill feature comes first.
    chaos.arg("--socklb").arg(fault_points).arg("--socklb").arg(plain);
    chaos.arg(format!("--seed={}", options.seed)).arg(format!("--events={}", options.events));
    chaos.arg(format!("--seconds={}", options.seconds));
    process::run(&mut chaos, "see the message above")
}
