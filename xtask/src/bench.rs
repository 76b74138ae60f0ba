//! `cargo xtask bench`: what it costs, measured side by side.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::build;
use crate::process::{self, step};
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;

/// Arguments of `cargo xtask bench`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Cost of a call with each hook, beside an empty program, a plain look-up and other ways to keep records
    Hooks {
        /// A compiled object of another balancer, whose `connect4` program is measured too, with empty tables
        #[arg(long, value_name = "FILE")]
        peer: Option<PathBuf>,
        /// Measures these targets only, and always the empty program: names separated by commas
        #[arg(long, value_name = "NAMES", default_value = "")]
        only: String,
        /// Divides the number of calls, for a quick look
        #[arg(long, value_name = "N", default_value_t = 1)]
        scale: u32,
    },
}

/// Runs `cargo xtask bench`. Needs root: it attaches programs, in namespaces and cgroups of its own.
///
/// # Errors
/// When setting up or building fails, or the bench does.
pub(crate) fn command(workspace: &Workspace, options: &Options) -> Result<()> {
    let toolchain = setup::ensure(&[Purpose::Build, Purpose::Run])?;
    let object = build::bpf_object(workspace, &toolchain)?;
    let Suite::Hooks { peer, only, scale } = &options.suite;
    step("building the bench");
    let mut cargo = process::cargo();
    cargo
        .current_dir(&workspace.root)
        .args(["build", "--release", "--package", "lb-tests", "--bin", "bench-hooks"])
        .env(build::OBJECT_VARIABLE, &object);
    process::run(&mut cargo, "correct the errors above")?;
    let binary = workspace.target.join("release/bench-hooks");
    let mut bench = if process::is_root() {
        Command::new(binary)
    } else {
        step("the bench attaches BPF programs, which needs root: starting it with sudo");
        let mut sudo = Command::new("sudo");
        sudo.arg("--preserve-env=SOCKLB_BENCH_OBJECT,SOCKLB_PEER_OBJECT,BENCH_SCALE,BENCH_ONLY")
            .arg("--")
            .arg(binary);
        sudo
    };
    bench
        .env(
            "SOCKLB_BENCH_OBJECT",
            workspace.target.join("bpf").join(build::BPF_TARGET).join("release/lb-bench"),
        )
        .env("BENCH_SCALE", scale.to_string())
        .env("BENCH_ONLY", only);
    if let Some(peer) = peer {
        bench.env("SOCKLB_PEER_OBJECT", peer);
    }
    process::run(&mut bench, "see the message above")
}
