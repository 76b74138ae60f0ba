//! What is answered over HTTP.
//!
//! # Purpose
//!
//! [`Listeners`] answers scrapes and health checks of the agent, [`agent_socket`] what commands on the same host ask,
//! [`health_ports`] health checks of single Services.
//!
//! # Invariants
//!
//! - Nobody who connects can hold up the agent or fill its memory: connections, header sizes and times are bounded, and
//!   bodies of requests are not read.
//! - What is asked of the agent's loop has an answer in bounded time, with or without the loop.
//! - Nothing listens that was not asked for: an empty address is no listener.
//!
//! # Depends on
//!
//! `telemetry`, `kernel` for counters, `desired`, `model`.

pub mod agent_socket;
pub mod health_ports;
pub mod http;
pub mod known;
pub mod pages;

use std::{io, net::SocketAddr, path::Path, sync::Arc};

use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};
use tracing::info;

use self::{
    agent_socket::AgentPages,
    known::{Known, Which},
    pages::{HealthPages, MetricsPages},
};
use crate::{
    kernel::{KernelError, store::Maps},
    telemetry::{Metrics, health::Vitals, scrape::View},
};

/// Where to listen, and what to say of the settings.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `--metrics-bind-address`
    pub metrics: Option<SocketAddr>,
    /// `--healthz-bind-address`
    pub healthz: Option<SocketAddr>,
    /// What `/configz` says.
    pub config: serde_json::Value,
}

/// A listener cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{flag} {address}: {source}: {remedy}")]
pub struct ListenError {
    /// The flag that names the address.
    pub flag: &'static str,
    /// The address.
    pub address: SocketAddr,
    /// The cause.
    pub source: io::Error,
    /// What to do about it.
    pub remedy: &'static str,
}

/// A question for what the agent knows at the moment, with the way for the answer.
#[derive(Debug)]
pub enum Question {
    /// A scrape's.
    View(oneshot::Sender<View>),
    /// A command's.
    Known(Which, oneshot::Sender<Known>),
}

/// What the agent's loop lets others see.
#[derive(Clone, Debug)]
pub struct Insight {
    /// Its signs of life.
    pub vitals: watch::Receiver<Vitals>,
    /// How often it brought the kernel up to date.
    pub changes: watch::Receiver<u64>,
    /// Where it hears questions.
    pub questions: mpsc::Sender<Question>,
}

/// Open sockets that nobody answers yet.
#[derive(Debug)]
pub struct Listeners {
    metrics: Option<TcpListener>,
    healthz: Option<TcpListener>,
    config: serde_json::Value,
}

impl Listeners {
    /// Opens the sockets.
    ///
    /// # Errors
    ///
    /// [`ListenError`], for example if kube-proxy listens there.
    pub async fn open(options: &Options) -> Result<Self, ListenError> {
        Ok(Self {
            metrics: listen("--metrics-bind-address", options.metrics).await?,
            healthz: listen("--healthz-bind-address", options.healthz).await?,
            config: options.config.clone(),
        })
    }

    /// Answers until the value that is returned is dropped, also at the socket in `state_dir`. Questions go to the agent's
    /// loop.
    ///
    /// # Errors
    ///
    /// If the pinned maps, whose counters `/metrics` reads, cannot be opened.
    pub fn serve(
        self,
        pin_path: &Path,
        state_dir: &Path,
        metrics: &Metrics,
        insight: Insight,
    ) -> Result<JoinSet<()>, KernelError> {
        let Insight { vitals, changes, questions } = insight;
        let mut serving = JoinSet::new();
        let config = self.config.to_string();
        let pages = MetricsPages::new(metrics.clone(), Maps::open(pin_path)?, questions.clone(), config);
        let pages = Arc::new(pages);
        let health = HealthPages { vitals, metrics: metrics.clone() };
        if let Some(listener) = self.metrics {
            serving.spawn(http::serve(listener, Arc::clone(&pages)));
        }
        if let Some(listener) = self.healthz {
            serving.spawn(http::serve(listener, Arc::new(health.clone())));
        }
        let pages = Arc::new(AgentPages::new(pages, health, questions, changes));
        serving.spawn(agent_socket::serve(state_dir.to_owned(), pages));
        Ok(serving)
    }
}

/// Answers health checks of an agent that waits for another one to end: it is alive and not ready. `None` if nobody asked
/// for such answers, or if the address is taken, as by the agent that is waited for.
pub async fn answer_while_waiting(options: &Options) -> Option<JoinSet<()>> {
    let listener = TcpListener::bind(options.healthz?).await.ok()?;
    let mut serving = JoinSet::new();
    serving.spawn(http::serve(listener, Arc::new(pages::WaitingPages)));
    Some(serving)
}

async fn listen(flag: &'static str, address: Option<SocketAddr>) -> Result<Option<TcpListener>, ListenError> {
    let Some(address) = address else { return Ok(None) };
    let error = |source: io::Error| {
        let remedy = match source.kind() {
            io::ErrorKind::AddrInUse => {
                "another program, such as kube-proxy or another agent, listens there: end it, or name another address, or \
                 \"\" for none"
            }
            io::ErrorKind::AddrNotAvailable => "name an address of this host, or \"\" for none",
            _ => "name another address, or \"\" for none",
        };
        ListenError { flag, address, source, remedy }
    };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    // The port may have been left to the kernel.
    let address = listener.local_addr().map_err(error)?;
    info!(%address, flag, "listening");
    Ok(Some(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_in_use_is_an_error_with_a_remedy_and_none_is_no_listener() {
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let taken = listen("--healthz-bind-address", Some(any)).await.unwrap().unwrap();
        let address = taken.local_addr().unwrap();
        let error = listen("--healthz-bind-address", Some(address)).await.unwrap_err().to_string();
        for part in ["--healthz-bind-address", &address.to_string(), "in use", "kube-proxy", "\"\""] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
        assert!(listen("--healthz-bind-address", None).await.unwrap().is_none());
    }
}
