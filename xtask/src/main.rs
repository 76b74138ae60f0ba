//! The runner of the workspace: every task of a developer or of CI is a command of `cargo xtask`.
//!
//! Progress goes to standard error, results to standard output. Each command checks what it needs, reports
//! what is missing and why, and installs only that.
#![expect(clippy::print_stdout, reason = "a command-line tool reports its results on standard output")]

use std::io::{self, ErrorKind};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod build;
mod chaos;
mod fuzz;
mod image;
mod kernel_matrix;
mod lint;
mod process;
mod run;
mod setup;
mod test;
mod toolchain;
mod tree;
mod workspace;

use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Sets up, builds, runs and tests socklb")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs what this machine lacks for building, running, testing and linting
    Setup,
    /// Builds the BPF object and the `socklb` binary around it
    Build {
        /// Builds `target/release/socklb` instead of `target/debug/socklb`
        #[arg(long)]
        release: bool,
    },
    /// Sets up, builds and runs: `socklb-demo` without arguments, `socklb run ARGS` with arguments
    Run {
        /// Arguments of `socklb run`
        #[arg(last = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Sets up, builds and runs every test
    Test {
        /// Filters and options of the test executables
        #[arg(last = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Checks format, clippy on the host and on the BPF target, and text rules
    Lint,
    /// Measures costs, side by side in one run
    Bench(bench::Options),
    /// Kills, stops and replaces agents at random under load; checks every call and the final maps
    Chaos(chaos::Options),
    /// Searches for objects and DNS messages that make ingest, the tables, a plan or the name server fail
    Fuzz(fuzz::Options),
    /// Writes a container image of `socklb` as an archive, without a container engine
    Image(image::Options),
    /// Runs the kernel tests on other kernels, in QEMU
    KernelMatrix(kernel_matrix::Options),
}

fn dispatch(command: Command) -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    match command {
        Command::Setup => setup::command(),
        Command::Build { release } => build::command(&workspace, release),
        Command::Run { args } => run::command(&workspace, &args),
        Command::Test { args } => test::command(&workspace, &args),
        Command::Lint => lint::command(&workspace),
        Command::Bench(options) => bench::command(&workspace, &options),
        Command::Chaos(options) => chaos::command(&workspace, &options),
        Command::Fuzz(options) => fuzz::command(&workspace, &options),
        Command::Image(options) => image::command(&workspace, &options),
        Command::KernelMatrix(options) => kernel_matrix::command(&workspace, &options),
    }
}

/// What to do about an error of a file, whose message names the file.
fn remedy(error: &anyhow::Error) -> &'static str {
    match error.chain().find_map(|cause| Some(cause.downcast_ref::<io::Error>()?.kind())) {
        Some(ErrorKind::PermissionDenied) => "; check its owner",
        Some(ErrorKind::StorageFull) => "; free some space on its disk",
        _ => "",
    }
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}{}", remedy(&error));
            ExitCode::FAILURE
        }
    }
}
