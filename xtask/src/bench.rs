//! `cargo xtask bench`: measures costs, side by side.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use fs_err as fs;

use crate::build;
use crate::process::{self, step};
use crate::setup::Purpose;
use crate::workspace::Workspace;

/// The results that the documents show.
const RESULTS: &str = "docs/benchmarks";

/// Arguments of `cargo xtask bench`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    what: What,
    /// Suites: `--smoke`, `--json FILE`, `--markdown FILE`, `--svg DIR`, and the suite's own: `-- --help`
    /// lists them. `all`: `--smoke` for a short run that checks the bench, with results in the target folder.
    /// `compare`: `OLD NEW`. `churn`: `--seed N`, `--seconds N`; for figures over time `--services N`,
    /// `--endpoints N`, `--changes-per-second N` and `--kill-every SECONDS`: `-- --help` lists all.
    /// `outside`: `--rate N`, `--seconds N`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Cost of a call with each hook, against an empty program, a plain lookup and other ways to keep records
    Hooks,
    /// From API server events to the kernel's maps, cold starts, memory and CPU of the agent
    Sync,
    /// The same work sent directly to an endpoint, and through socklb, nftables and iptables
    Path,
    /// Growth of costs with services and endpoints
    Scale,
    /// What rules for packets cost the agent and the kernel: all at once, one change, reading them
    Packets,
    /// What callers notice of an endpoint that dies, with passive health and without
    Health,
    /// All six suites: writes results to docs/benchmarks, and updates the documents
    All,
    /// Compares two results of one suite; exits with 1 on a regression of more than 10 %
    Compare,
    /// Rewrites plots and tables of the documents from docs/benchmarks, without measuring
    Render,
    /// Connections from outside, served as packets, while endpoints, services and agents change; exits with 1
    /// if one fails
    Outside,
    /// Long run: changes of everything, with API server faults and calls in progress
    Churn,
}

/// Runs `cargo xtask bench`. Suites need root: they attach programs, in their own namespaces and cgroups.
///
/// # Errors
/// If setup or building fails, the bench fails, or `compare` finds a regression.
pub(crate) fn command(workspace: &Workspace, options: &Options) -> Result<()> {
    let Options { what, arguments } = options;
    let purposes: &[Purpose] = match what {
        What::Compare | What::Render => &[Purpose::Build],
        // `path` measures other programs.
        What::Path | What::All => &[Purpose::Build, Purpose::Run, Purpose::BenchPath],
        What::Hooks
        | What::Sync
        | What::Scale
        | What::Packets
        | What::Health
        | What::Outside
        | What::Churn => &[Purpose::Build, Purpose::Run],
    };
    build(workspace, if *what == What::Churn { "bench-churn" } else { "bench" }, purposes)?;
    match what {
        What::Hooks => suite(workspace, "hooks", arguments),
        What::Sync => suite(workspace, "sync", arguments),
        What::Path => suite(workspace, "path", arguments),
        What::Scale => suite(workspace, "scale", arguments),
        What::Packets => suite(workspace, "packets", arguments),
        What::Health => suite(workspace, "health", arguments),
        What::All => all(workspace, arguments),
        What::Compare => {
            let mut bench = Command::new(workspace.target.join("release/bench"));
            process::run(bench.arg("compare").args(arguments), "see the lines above")
        }
        What::Outside => {
            let mut bench = start(workspace, "bench");
            bench.arg("outside").arg("--socklb").arg(workspace.socklb(true)).args(arguments);
            process::run(&mut bench, "see the lines above")
        }
        What::Render => render(workspace),
        What::Churn => {
            let mut bench = start(workspace, "bench-churn");
            bench.arg("--socklb").arg(workspace.socklb(true)).args(arguments);
            process::run(&mut bench, "see the message above")
        }
    }
}

/// Measures one suite.
fn suite(workspace: &Workspace, name: &str, arguments: &[String]) -> Result<()> {
    step(&format!("measuring: {name}"));
    let rustc = process::capture(Command::new("rustc").arg("--version")).unwrap_or_default();
    let mut bench = start(workspace, "bench");
    bench.arg(name).arg(format!("--commit={}", commit(workspace))).arg(format!("--rustc={}", rustc.trim()));
    if matches!(name, "hooks" | "scale") {
        bench.arg("--object").arg(bench_object(workspace));
    }
    if matches!(name, "sync" | "path" | "scale") {
        bench.arg("--socklb").arg(workspace.socklb(true));
    }
    process::run(bench.args(arguments), "see the message above")
}

/// Runs all suites and updates the documents.
fn all(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let is_smoke = match arguments {
        [] => false,
        [smoke] if smoke == "--smoke" => true,
        _ => bail!("bench all {}: takes nothing but --smoke", arguments.join(" ")),
    };
    let directory = workspace.root.join(RESULTS);
    let directory = if is_smoke { workspace.target.join("bench-smoke") } else { directory };
    fs::create_dir_all(&directory)?;
    for name in ["hooks", "sync", "path", "scale", "packets", "health"] {
        let json = format!("--json={}", directory.join(name).with_extension("json").display());
        suite(workspace, name, &[&[json], arguments].concat())?;
    }
    if is_smoke { Ok(()) } else { render(workspace) }
}

fn render(workspace: &Workspace) -> Result<()> {
    let mut bench = Command::new(workspace.target.join("release/bench"));
    process::run(bench.arg("render").arg("--root").arg(&workspace.root), "see the message above")
}

/// The competing programs, which are built with the product's.
pub(crate) fn bench_object(workspace: &Workspace) -> PathBuf {
    workspace.target.join("bpf").join(build::BPF_TARGET).join("release/lb-bench")
}

/// The commit of the tree, with `-dirty` if files differ from it; `unknown` outside a repository.
///
/// Results do not count as a difference: a run of all suites writes them one after the other.
fn commit(workspace: &Workspace) -> String {
    let git =
        |args: &[&str]| process::capture(Command::new("git").current_dir(&workspace.root).args(args)).ok();
    let Some(revision) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let others = format!(":(exclude){RESULTS}");
    let changed = git(&["status", "--porcelain", "--", ".", &others]).unwrap_or_default();
    let suffix = if changed.trim().is_empty() { "" } else { "-dirty" };
    format!("{}{suffix}", revision.trim())
}

/// Builds a bench, and the `socklb` that it measures, in release mode.
fn build(workspace: &Workspace, program: &str, purposes: &[Purpose]) -> Result<()> {
    let object = build::object(workspace, purposes)?;
    step("building the bench");
    // One command: with other packages selected, cargo enables other features and rebuilds many crates.
    let args =
        ["--release", "--package", "lb-tests", "--package", "lb-userspace", "--bin", "socklb", "--bin"];
    build::programs(workspace, &object, &[&args[..], &[program]].concat())
}

/// A command that runs a bench as root.
fn start(workspace: &Workspace, program: &str) -> Command {
    let binary = workspace.target.join("release").join(program);
    process::as_root(binary, "the bench needs root to attach BPF programs")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn what_a_suite_takes_reaches_it() {
        for given in
            [&["--smoke"][..], &["--json", "new.json", "--services", "1,5"], &["--smoke", "--svg", "x"], &[]]
        {
            let cli = Cli::try_parse_from(["bench", "path"].iter().chain(given)).unwrap();
            assert_eq!(cli.options.what, What::Path);
            assert_eq!(cli.options.arguments, given);
        }
    }
}
