//! `cargo xtask chaos`: kills, stops and replaces agents under load.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::build;
use crate::process::{self, step};
use crate::setup::{self, Purpose};
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
    let toolchain = setup::ensure(&[Purpose::Build, Purpose::Run])?;
    let object = build::bpf_object(workspace, &toolchain)?;
    step("building socklb twice: with and without the feature to kill itself");
    let directory = workspace.target.join("chaos");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}: check its owner and the disk", directory.display()))?;
    let mut binaries = Vec::new();
    for (name, features) in [("socklb-plain", None), ("socklb", Some(FEATURES))] {
        let built = build(workspace, &object, features)?;
        let kept = directory.join(name);
        // A running program cannot be overwritten: a new file replaces the old one.
        let new = kept.with_extension("new");
        fs::copy(&built, &new)
            .and_then(|_bytes| fs::rename(&new, &kept))
            .with_context(|| format!("cannot write {}: check its owner and the disk", kept.display()))?;
        // The binary with the kill feature comes first.
        binaries.insert(0, kept);
    }
    let program = workspace.target.join("debug/bench-churn");
    let mut chaos = if process::is_root() {
        Command::new(program)
    } else {
        step("agents need root to attach BPF programs: starting with sudo");
        let mut sudo = Command::new("sudo");
        sudo.arg("--").arg(program);
        sudo
    };
    for binary in binaries {
        chaos.arg("--socklb").arg(binary);
    }
    chaos.arg(format!("--seed={}", options.seed)).arg(format!("--events={}", options.events));
    chaos.arg(format!("--seconds={}", options.seconds));
    process::run(&mut chaos, "see the message above")
}

/// Builds `socklb` with the tests' features, and the chaos program.
fn build(workspace: &Workspace, object: &Path, features: Option<&str>) -> Result<PathBuf> {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).args(["build", "--package", "lb-tests", "--package", "lb-userspace"]);
    cargo.args(["--bin", "socklb", "--bin", "bench-churn"]).env(build::OBJECT_VARIABLE, object);
    if let Some(features) = features {
        cargo.args(["--features", features]);
    }
    process::run(&mut cargo, "correct the errors above")?;
    Ok(workspace.socklb(false))
}
