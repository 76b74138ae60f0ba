//! Logs, metrics and health.
//!
//! # Purpose
//!
//! Log setup; [`metrics`], the agent's values, and [`scrape`], which renders them with values read per
//! scrape; [`health`], which evaluates the loop's heartbeat; [`away`], which describes an outage of the
//! source.
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

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Plain text.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts logging to standard error. `RUST_LOG` is the filter if set, else `verbosity`: 0 changes of state, 1
/// their details, 2 everything.
///
/// Call it once: a second call changes nothing.
pub fn start_log(format: LogFormat, verbosity: u8) {
    let default = match verbosity {
        // kube's client logs each failed request as an error; `cluster` logs an outage once.
        0 => "info,kube_client=off",
        // The names of all crates here begin with `lb_`.
        1 => "info,kube_client=off,lb_=debug",
        // aya logs each relocation at this level, which is noise for an operator who watches calls.
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
