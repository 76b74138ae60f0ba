//! `cargo xtask bench`: costs measured side by side, in one result format.
//!
//! # Purpose
//!
//! - [`hooks`], [`sync`], [`path`], [`scale`], [`packets`], [`health`]: the suites. Each fills a [`result`].
//! - [`outside`]: no suite, since a failed connection is a fault and not a figure.
//! - [`turns`], [`calls`], [`daemon`], [`objects`]: what several of them use.
//! - [`quantile`], [`compare`]: pure functions on numbers.
//! - [`markdown`], [`plot`], [`pages`]: tables, plots and the documents with them, all from result files.
//!
//! # Invariants
//!
//! - No time is asserted.
//! - Everything runs in namespaces and cgroups that the bench created, isolated from other networks, and
//!   stops with the process.
#![expect(clippy::print_stdout, reason = "the result goes to standard output")]

mod calls;
mod compare;
mod daemon;
mod health;
mod hooks;
mod machine;
mod markdown;
mod objects;
mod outside;
mod packets;
mod pages;
mod path;
mod plot;
mod quantile;
mod result;
mod scale;
mod sync;
mod turns;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};

use crate::result::{ResultFile, Run, Suite};

/// Measures socklb.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Cost of a call with each hook
    Hooks(Measured<hooks::Options>),
    /// From the API server's events to the kernel's maps
    Sync(Measured<sync::Options>),
    /// The same work to an endpoint itself and through socklb, nftables and iptables
    Path(Measured<path::Options>),
    /// How costs grow with services and endpoints
    Scale(Measured<scale::Options>),
    /// What rules for packets cost the agent and the kernel
    Packets(Measured<packets::Options>),
    /// What callers notice of an endpoint that dies, with passive health and without
    Health(Measured<health::Options>),
    /// Connections from outside while endpoints, Services and agents change; exits with 1 if one fails
    Outside(outside::Options),
    /// Compares two results; exits with 1 on a regression
    Compare {
        #[arg(value_name = "OLD")]
        old: PathBuf,
        #[arg(value_name = "NEW")]
        new: PathBuf,
    },
    /// Rewrites plots and tables of documents from result files
    Render {
        /// The directory with the documents
        #[arg(long, value_name = "DIR")]
        root: PathBuf,
    },
    /// A client process of `path`
    #[command(hide = true)]
    Client(path::ClientArgs),
    /// The server process of `path`
    #[command(hide = true)]
    Server,
}

/// The options of a suite.
#[derive(Args)]
struct Measured<O: Args> {
    #[command(flatten)]
    options: O,
    #[command(flatten)]
    common: Common,
}

/// Options of every suite.
#[derive(Args)]
pub(crate) struct Common {
    /// Small and short: shows that it works, not how fast it is
    #[arg(long)]
    smoke: bool,
    /// Writes the result to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes the tables to this file instead of printing them
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Writes the plots to this directory
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// The measured commit
    #[arg(long, value_name = "REVISION", default_value = "unknown")]
    commit: String,
    /// The compiler of this program
    #[arg(long, value_name = "VERSION", default_value = "")]
    rustc: String,
}

impl Common {
    fn start(&self, suite: Suite) -> Run {
        Run::start(suite, self.smoke, &self.commit, &self.rustc)
    }

    /// Writes a result as requested.
    fn finish(&self, result: &ResultFile) -> anyhow::Result<()> {
        if let Some(path) = &self.json {
            result.write(path)?;
        }
        if let Some(directory) = &self.svg {
            write_plots(directory, result)?;
        }
        let tables = markdown::suite(result);
        if let Some(path) = &self.markdown {
            fs::write(path, tables).with_context(|| format!("{}: cannot be written", path.display()))?;
        } else {
            println!("{tables}");
        }
        Ok(())
    }
}

fn write_plots(directory: &Path, result: &ResultFile) -> anyhow::Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("{}: cannot be made", directory.display()))?;
    for (name, picture) in plot::suite(result)? {
        let path = directory.join(name);
        fs::write(&path, picture).with_context(|| format!("{}: cannot be written", path.display()))?;
    }
    Ok(())
}

fn main() -> anyhow::Result<ExitCode> {
    match Cli::parse().command {
        Command::Hooks(Measured { options, common }) => common.finish(&hooks::run(&options, &common)?)?,
        Command::Sync(Measured { options, common }) => common.finish(&sync::run(&options, &common)?)?,
        Command::Path(Measured { options, common }) => common.finish(&path::run(&options, &common)?)?,
        Command::Scale(Measured { options, common }) => common.finish(&scale::run(&options, &common)?)?,
        Command::Packets(Measured { options, common }) => common.finish(&packets::run(&options, &common)?)?,
        Command::Health(Measured { options, common }) => common.finish(&health::run(&options, &common)?)?,
        Command::Outside(options) => {
            let outcome = outside::run(&options);
            println!("{outcome}");
            if !outcome.failures.is_empty() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Client(args) => path::client(&args)?,
        Command::Server => path::server()?,
        Command::Render { root } => pages::render(&root)?,
        Command::Compare { old, new } => {
            let comparison = compare::compare(&ResultFile::read(&old)?, &ResultFile::read(&new)?)?;
            print!("{}", comparison.text);
            if comparison.n_regressions > 0 {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
