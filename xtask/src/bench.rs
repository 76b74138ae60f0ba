//! `cargo xtask bench`: measures costs, side by side.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};

use crate::build;
use crate::process::{self, find_program, step};
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;

/// The results that the documents show.
const RESULTS: &str = "docs/benchmarks";

/// Arguments of `cargo xtask bench`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Cost of a call with each hook, against an empty program, a plain lookup and other ways to keep records
    Hooks(Arguments),
    /// From API server events to the kernel's maps, cold starts, memory and CPU of the agent
    Sync(Arguments),
    /// The same work sent directly to an endpoint, and through socklb, nftables and iptables
    Path(Arguments),
    /// Growth of costs with services and endpoints
    Scale(Arguments),
    /// All four suites: writes results to docs/benchmarks, and updates the documents
    All {
        /// A short run that checks the bench, with results in the target folder
        #[arg(long)]
        smoke: bool,
    },
    /// Compares two results of one suite; exits with 1 on a regression of more than 10 %
    Compare {
        #[arg(value_name = "OLD")]
        old: PathBuf,
        #[arg(value_name = "NEW")]
        new: PathBuf,
    },
    /// Rewrites plots and tables of the documents from docs/benchmarks, without measuring
    Render,
    /// Long run: changes of everything, with API server faults and calls in progress
    Churn(ChurnArguments),
}

/// Arguments of one suite.
#[derive(Debug, Args)]
struct Arguments {
    /// `--smoke`, `--json FILE`, `--markdown FILE`, `--svg DIR`, and the suite's own: `-- --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

/// Arguments of `churn`.
#[derive(Debug, Args)]
struct ChurnArguments {
    /// `--seed N`, `--seconds N`; for figures over time `--services N`, `--endpoints N`,
    /// `--changes-per-second N` and `--kill-every SECONDS`: `-- --help` lists all
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

/// The suites in execution order. Only `path` needs extra tools.
const SUITES: [(&str, &[Purpose]); 4] = [
    ("hooks", &[Purpose::Build, Purpose::Run]),
    ("sync", &[Purpose::Build, Purpose::Run]),
    ("path", &[Purpose::Build, Purpose::Run, Purpose::BenchPath]),
    ("scale", &[Purpose::Build, Purpose::Run]),
];

/// Runs `cargo xtask bench`. Suites need root: they attach programs, in their own namespaces and cgroups.
///
/// # Errors
/// If setup or building fails, the bench fails, or `compare` finds a regression.
pub(crate) fn command(workspace: &Workspace, options: &Options) -> Result<()> {
    match &options.what {
        What::Hooks(arguments) => suites(workspace, &["hooks"], &[&arguments.arguments]),
        What::Sync(arguments) => suites(workspace, &["sync"], &[&arguments.arguments]),
        What::Path(arguments) => suites(workspace, &["path"], &[&arguments.arguments]),
        What::Scale(arguments) => suites(workspace, &["scale"], &[&arguments.arguments]),
        What::All { smoke } => all(workspace, *smoke),
        What::Compare { old, new } => {
            plain(workspace)?;
            let mut bench = Command::new(workspace.target.join("release/bench"));
            process::run(bench.arg("compare").arg(old).arg(new), "see the lines above")
        }
        What::Render => {
            plain(workspace)?;
            render(workspace)
        }
        What::Churn(ChurnArguments { arguments }) => {
            let toolchain = setup::ensure(&[Purpose::Build, Purpose::Run])?;
            let object = build::bpf_object(workspace, &toolchain)?;
            build(workspace, &object, &["bench-churn", "socklb"])?;
            let mut bench = start(workspace, "bench-churn");
            bench.arg("--socklb").arg(workspace.socklb(true)).args(arguments);
            process::run(&mut bench, "see the message above")
        }
    }
}

/// Builds the part that needs neither root nor a kernel, which is the same program.
fn plain(workspace: &Workspace) -> Result<()> {
    let toolchain = setup::ensure(&[Purpose::Build])?;
    let object = build::bpf_object(workspace, &toolchain)?;
    build(workspace, &object, &["bench", "socklb"])
}

/// Runs suites one after the other, each with its arguments.
fn suites(workspace: &Workspace, names: &[&str], arguments: &[&[String]]) -> Result<()> {
    let suites = || SUITES.iter().filter(|(name, _)| names.contains(name));
    let purposes: Vec<Purpose> = suites().flat_map(|(_, purposes)| purposes.iter().copied()).collect();
    let toolchain = setup::ensure(&purposes)?;
    let object = build::bpf_object(workspace, &toolchain)?;
    build(workspace, &object, &["bench", "socklb"])?;
    let commit = commit(workspace);
    let rustc = process::capture(Command::new("rustc").arg("--version")).unwrap_or_default();
    for ((name, _), arguments) in suites().zip(arguments) {
        step(&format!("measuring: {name}"));
        let mut bench = start(workspace, "bench");
        bench.arg(name).arg(format!("--commit={commit}")).arg(format!("--rustc={}", rustc.trim()));
        if matches!(*name, "hooks" | "scale") {
            bench.arg("--object").arg(bench_object(workspace));
        }
        if matches!(*name, "sync" | "scale") {
            bench.arg("--socklb").arg(workspace.socklb(true));
        }
        process::run(bench.args(*arguments), "see the message above")?;
    }
    Ok(())
}

/// Runs all suites and updates the documents.
fn all(workspace: &Workspace, smoke: bool) -> Result<()> {
    let directory = if smoke { workspace.target.join("bench-smoke") } else { workspace.root.join(RESULTS) };
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}: check its owner", directory.display()))?;
    let names = SUITES.map(|(name, _)| name);
    let arguments = names.map(|name| {
        let mut arguments =
            vec!["--json".to_owned(), directory.join(name).with_extension("json").display().to_string()];
        if smoke {
            arguments.push("--smoke".to_owned());
        }
        arguments
    });
    suites(workspace, &names, &arguments.each_ref().map(Vec::as_slice))?;
    if smoke { Ok(()) } else { render(workspace) }
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
    let git = |args: &[&str]| {
        find_program("git")?;
        process::capture(Command::new("git").current_dir(&workspace.root).args(args)).ok()
    };
    let Some(revision) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let others = format!(":(exclude){RESULTS}");
    let changed = git(&["status", "--porcelain", "--", ".", &others]).unwrap_or_default();
    let suffix = if changed.trim().is_empty() { "" } else { "-dirty" };
    format!("{}{suffix}", revision.trim())
}

/// Builds programs in release mode.
fn build(workspace: &Workspace, object: &Path, programs: &[&str]) -> Result<()> {
    step("building the bench");
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).args(["build", "--release"]).env(build::OBJECT_VARIABLE, object);
    // One command: with other packages selected, cargo enables other features and rebuilds many crates.
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
    step("the bench needs root to attach BPF programs: starting it with sudo");
    let mut sudo = Command::new("sudo");
    sudo.arg("--").arg(binary);
    sudo
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
            let What::Path(Arguments { arguments }) = cli.options.what else { panic!("another suite") };
            assert_eq!(arguments, given);
        }
    }
}
