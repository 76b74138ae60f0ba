//! `cargo xtask bench`: what it costs, measured side by side.

use std::path::{Path, PathBuf};
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
    /// Changes of everything with faults of the API server and calls under way, for a long time
    Churn {
        /// Decides about objects and changes; a failure names it
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
        /// For how long
        #[arg(long, value_name = "N", default_value_t = 600)]
        seconds: u64,
    },
    /// From the API server's events to the kernel's maps, cold starts, memory and CPU of the agent, beside targets
    Sync {
        /// Small and short: shows that it works, not how fast it is
        #[arg(long)]
        smoke: bool,
        /// Writes the figures here, too
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Only the parts whose name holds this: sync, traffic, services, endpoints
        #[arg(long, value_name = "PART")]
        only: Option<String>,
        /// How often cold starts are repeated
        #[arg(long, value_name = "N", default_value_t = 3)]
        starts: u32,
    },
}

/// Runs `cargo xtask bench`. Needs root: it attaches programs, in namespaces and cgroups of its own.
///
/// # Errors
/// When setting up or building fails, or the bench does.
pub(crate) fn command(workspace: &Workspace, options: &Options) -> Result<()> {
    let toolchain = setup::ensure(&[Purpose::Build, Purpose::Run])?;
    let object = build::bpf_object(workspace, &toolchain)?;
    let mut bench = match &options.suite {
        Suite::Hooks { peer, only, scale } => {
            build(workspace, &object, &["bench-hooks"])?;
            let mut bench = start(workspace, "bench-hooks");
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
            bench
        }
        Suite::Churn { seed, seconds } => {
            build(workspace, &object, &["bench-churn", "socklb"])?;
            let mut bench = start(workspace, "bench-churn");
            bench.arg("--socklb").arg(workspace.socklb(true));
            bench.arg(format!("--seed={seed}")).arg(format!("--seconds={seconds}"));
            bench
        }
        Suite::Sync { smoke, json, only, starts } => {
            build(workspace, &object, &["bench-sync", "socklb"])?;
            let mut bench = start(workspace, "bench-sync");
            bench.arg("--socklb").arg(workspace.socklb(true)).arg(format!("--starts={starts}"));
            if *smoke {
                bench.arg("--smoke");
            }
            if let Some(json) = json {
                bench.arg("--json").arg(json);
            }
            if let Some(only) = only {
                bench.arg("--only").arg(only);
            }
            bench
        }
    };
    process::run(&mut bench, "see the message above")
}

/// Builds programs as they are released.
fn build(workspace: &Workspace, object: &Path, programs: &[&str]) -> Result<()> {
    step("building the bench");
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).args(["build", "--release"]).env(build::OBJECT_VARIABLE, object);
    // One command: with other packages selected, cargo enables other features and compiles many crates anew.
    cargo.args(["--package", "lb-tests", "--package", "lb-userspace"]);
    for program in programs {
        cargo.args(["--bin", program]);
    }
    process::run(&mut cargo, "correct the errors above")
}

/// A command that runs a bench as root.
fn start(workspace: &Workspace, program: &str) -> Command {
    let binary = workspace.target.join("release").join(program);
    if process::is_root() {
        return Command::new(binary);
    }
    step("the bench attaches BPF programs, which needs root: starting it with sudo");
    let mut sudo = Command::new("sudo");
    sudo.arg("--preserve-env=SOCKLB_BENCH_OBJECT,SOCKLB_PEER_OBJECT,BENCH_SCALE,BENCH_ONLY")
        .arg("--")
        .arg(binary);
    sudo
}
