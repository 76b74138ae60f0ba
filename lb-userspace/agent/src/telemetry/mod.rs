//! Telling people and dashboards what the agent does.
//!
//! # Purpose
//!
//! Log lines; [`metrics`], which the agent keeps, and [`scrape`], which writes them down with what is read at that
//! moment; [`health`], which judges the agent's heartbeat, with [`away`], what is served while the source is.
//!
//! # Depends on
//!
//! `source`, `plan`, `desired`, `model`.

pub mod away;
pub mod health;
pub mod metrics;
pub mod scrape;

use std::io::IsTerminal as _;

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

pub use self::metrics::Metrics;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object on each line.
    Json,
}

/// Starts logging to standard error. `RUST_LOG` decides what is logged if it is set, else `verbosity`: 0 changes of
/// state, 1 their details, 2 everything.
///
/// Does nothing if logging has been started before.
pub fn start_log(format: LogFormat, verbosity: u8) {
    let default = match verbosity {
        // Each failed request is an error to kube's client; `cluster` says once what it means.
        0 => "info,kube_client=off",
        // `lb_` is how the names of all crates here begin.
        1 => "info,kube_client=off,lb_=debug",
        // aya tells each relocation at this level, which nobody who watches calls wants to read.
        _ => "debug,lb_=trace,lb_ebpf=debug,aya=info,aya_obj=info",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| EnvFilter::new(default));
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        LogFormat::Text => registry
            .with(
                fmt::layer()
                    .with_target(false)
                    .with_ansi(std::io::stderr().is_terminal())
                    .with_writer(std::io::stderr),
            )
            .try_init(),
        LogFormat::Json => registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init(),
    };
    debug_assert!(started.is_ok(), "logging is started once: {started:?}");
}
