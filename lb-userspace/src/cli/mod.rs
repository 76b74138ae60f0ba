//! The command line.
#![expect(clippy::doc_markdown, reason = "clap prints these as they are: help texts, not Markdown")]

mod agent;
pub mod check;
pub mod complete;
pub mod config;
pub mod explain;
pub mod inspect;
pub mod listing;
pub mod monitor;
mod objects;
pub mod resolve;
pub mod run;
mod sample;
pub mod self_test;
pub mod status;
pub mod top;

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use lb_kernel::chain;

/// Socket-level service load balancer for Kubernetes.
///
/// Redirects connect() and sendto() from a service address to a ready endpoint, inside the system call: no
/// NAT, no conntrack, no work per packet.
#[derive(Debug, Parser)]
#[command(name = "socklb", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent.
    Run(Box<run::RunArgs>),
    /// List every frontend that the kernel holds, with its endpoints.
    Services(inspect::ServicesArgs),
    /// Say where a call would go now, and why.
    Explain(inspect::ExplainArgs),
    /// Say how this node answers the question for a name.
    Resolve(resolve::ResolveArgs),
    /// Say whether this host is able to run the agent, and what its kernel offers.
    Check(check::CheckArgs),
    /// Say whether the agent runs and serves: source, maps, hooks, issues.
    Status(status::StatusArgs),
    /// Watch calls by service and endpoint: rates, refusals, open sockets.
    ///
    /// On a terminal: a table that is kept up to date; keys sort, filter and quit. Otherwise, with --count,
    /// or with -o json or yaml: one report per interval. The first comes at once, with totals since each port
    /// is served and without rates. Needs no running agent.
    ///
    /// SOCKETS counts open sockets that last called a service. Listing them needs CAP_BPF and CAP_PERFMON.
    Top(top::TopArgs),
    /// Watch connections as they are made: a sample.
    ///
    /// Polls the records that sockets get when a call is redirected, and prints new ones: time, service,
    /// called address, endpoint and node, socket. It adds no cost to a call.
    ///
    /// Not shown: sockets opened and closed between two polls, refused calls, and further datagrams to the
    /// same endpoint. Every ten seconds and at exit, a line that begins with # (in JSON: event summary) says
    /// how many calls the counters saw and how many of them were not shown. The first such lines name the
    /// columns.
    Monitor(monitor::MonitorArgs),
    /// Detach the programs and delete the agent's state: maps, nftables rules, snapshot, socket.
    Cleanup(PinArgs),
    /// Print a completion script for a shell, to be sourced or installed.
    Completions(complete::CompletionsArgs),
    /// Write the manual pages of all commands into a folder.
    Man(complete::ManArgs),
    /// The calls of the agent's self-test.
    #[command(hide = true)]
    SelfTestCalls(self_test::CallsArgs),
}

/// Where pinned state is.
#[derive(Clone, Debug, Args)]
pub struct PinArgs {
    /// Directory of the pinned maps and links, on a BPF file system.
    #[arg(long, env = "SOCKLB_PIN_PATH", default_value = config::PIN_PATH, value_name = "DIR")]
    pub pin_path: PathBuf,
    /// Directory of the snapshot of objects, and of the agent's socket for commands.
    #[arg(long, env = "SOCKLB_STATE_DIR", default_value = config::STATE_DIR, value_name = "DIR")]
    pub state_dir: PathBuf,
}

/// Parses the command line and runs the command.
///
/// Exit status: 0 done or stopped by a signal, 1 failed, 2 wrong usage. An error is one line on standard
/// error.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Services(args) => inspect::services(&args),
        Command::Explain(args) => inspect::explain(&args),
        Command::Resolve(args) => resolve::resolve(&args),
        Command::Check(args) => check::check(&args),
        Command::Status(args) => status::status(&args),
        Command::Top(args) => top::top(&args),
        Command::Monitor(args) => monitor::monitor(&args),
        Command::Completions(args) => complete::completions(&args, Cli::command()),
        Command::Man(args) => complete::man(&args, Cli::command()),
        Command::Cleanup(args) => inspect::cleanup(&args),
        Command::SelfTestCalls(args) => self_test::calls(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("socklb: {}", chain(error.as_ref()));
            let is_usage = error.is::<config::UsageError>();
            if is_usage { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Writes text to standard output. A closed pipe is no error (`socklb services | head`); `print!` would
/// panic.
///
/// # Errors
///
/// If standard output cannot be written, for example because the disk is full.
fn show(text: &str) -> anyhow::Result<()> {
    show_more(text).map(drop)
}

/// [`show`] for a stream: `false` once the reader has closed standard output.
fn show_more(text: &str) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}

#[cfg(test)]
mod tests;
