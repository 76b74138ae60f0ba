//! HTTP servers.
//!
//! # Purpose
//!
//! [`Listeners`] answers scrapes and health checks of the agent, [`agent_socket`] requests of commands on the
//! same host, [`health_ports`] health checks of single Services.
//!
//! # Invariants
//!
//! - No client can block the agent or exhaust its memory: connections, header sizes and times are bounded,
//!   and request bodies are not read.
//! - No request waits for the agent's loop, except for the end of a sync in progress, in bounded time.
//! - An empty address opens no listener.
//!
//! # Depends on
//!
//! `telemetry`, `kernel` for counters, `desired`, `model`.

pub mod agent_socket;
pub mod health_ports;
pub mod http;
pub mod known;
pub mod pages;

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use lb_core::{
    model::Issue,
    state::{State, View},
    tables::MapUse,
};
use lb_kernel::Observations;
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::watch, task::JoinSet, time};
use tracing::info;

use self::{
    agent_socket::AgentPages,
    pages::{HealthPages, MetricsPages},
};
use crate::{
    names,
    source::Contact,
    telemetry::{Metrics, health::Vitals},
};

/// Listen addresses, and the settings that `/configz` shows.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `--metrics-bind-address`
    pub metrics: Option<SocketAddr>,
    /// `--healthz-bind-address`
    pub healthz: Option<SocketAddr>,
    /// Body of `/configz`.
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

/// How long a reader waits for a sync that is being applied.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the loop publishes after each sync, for pages and commands. A clone costs a few references.
#[derive(Clone, Debug)]
pub struct Published {
    /// The objects and the maps after the last sync.
    pub view: Arc<View>,
    /// Number of successful syncs. Before the first, the view has no objects, and the maps may have entries
    /// of an earlier agent.
    pub n_syncs: u64,
    /// The issues.
    pub issues: Arc<[Issue]>,
    /// Why the last snapshot was not written.
    pub save_problem: Option<String>,
    /// The rules for packets; `None` with `--packets=off`.
    pub packets: Option<PacketStatus>,
    /// How full the maps are, also after grace periods.
    pub maps: [MapUse; 7],
    /// Whether a sync is changing the maps, so that they may be newer than the view.
    pub is_syncing: bool,
}

/// The state of the rules, for pages and commands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketStatus {
    /// The tables that the agent keeps in the kernel, such as `ip socklb`.
    pub tables: Vec<String>,
    /// Number of frontends in the tables.
    pub n_frontends: usize,
    /// Number of elements that these have in the tables' sets.
    pub n_elements: usize,
    /// The last transaction.
    pub last: Option<LastTransaction>,
    /// Why the rules are not up to date.
    pub problem: Option<Arc<str>>,
}

/// A transaction that the kernel has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastTransaction {
    /// Number of changes; many elements of one set are one change.
    pub n_changes: usize,
    /// How long it took, from its encoding to the kernel's answer.
    pub took: Duration,
    /// When it ended.
    pub at: std::time::SystemTime,
}

impl Published {
    /// The state before the first sync.
    #[must_use]
    pub fn new(state: &State) -> Self {
        Self {
            view: Arc::new(state.view()),
            n_syncs: 0,
            issues: Arc::default(),
            save_problem: None,
            packets: None,
            maps: state.map_use(),
            is_syncing: false,
        }
    }
}

/// What is published now, or once the sync in progress is. So an answer is never older than maps that were
/// read before it, and a further sync does not delay it. `None` if the sync takes too long, or the agent
/// exits during it.
async fn current(published: &mut watch::Receiver<Published>) -> Option<Published> {
    let former = Arc::clone(&published.borrow().view);
    let is_current = |now: &Published| !now.is_syncing || !Arc::ptr_eq(&now.view, &former);
    let current = time::timeout(PATIENCE, published.wait_for(is_current)).await;
    current.ok()?.ok().map(|published| published.clone())
}

/// What servers read of the agent's loop.
#[derive(Clone, Debug)]
pub struct LoopView {
    /// The loop's heartbeat.
    pub vitals: watch::Receiver<Vitals>,
    /// The state after the last sync.
    pub published: watch::Receiver<Published>,
    /// The source's last answers; `None` for a source without outages.
    pub contact: Option<Contact>,
    /// The settings of the name server; `None` without one.
    pub names: Option<names::Options>,
}

/// Open sockets. Until [`Self::serve`] they answer that the agent is starting: a client such as a kubelet's
/// probe would time out before the programs are loaded.
pub struct Listeners {
    metrics: Arc<OnceLock<Arc<MetricsPages>>>,
    healthz: Arc<OnceLock<Arc<HealthPages>>>,
    config: serde_json::Value,
    serving: JoinSet<()>,
}

impl Listeners {
    /// Opens the sockets and answers: `/livez` with 200, other pages with 503.
    ///
    /// # Errors
    ///
    /// [`ListenError`], for example if kube-proxy listens there.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn open(options: &Options) -> Result<Self, ListenError> {
        let metrics = listen("--metrics-bind-address", options.metrics).await?;
        let healthz = listen("--healthz-bind-address", options.healthz).await?;
        let mut listeners = Self {
            metrics: Arc::default(),
            healthz: Arc::default(),
            config: options.config.clone(),
            serving: JoinSet::new(),
        };
        if let Some(listener) = metrics {
            let pages = pages::FromStart::new(Arc::clone(&listeners.metrics));
            listeners.serving.spawn(http::serve(listener, Arc::new(pages)));
        }
        if let Some(listener) = healthz {
            let pages = pages::FromStart::new(Arc::clone(&listeners.healthz));
            listeners.serving.spawn(http::serve(listener, Arc::new(pages)));
        }
        Ok(listeners)
    }

    /// Serves the pages of a started agent until the returned value is dropped, also at the socket in
    /// `state_dir`.
    #[must_use]
    pub fn serve(
        mut self,
        observations: Observations,
        state_dir: &Path,
        metrics: &Metrics,
        insight: LoopView,
    ) -> JoinSet<()> {
        let LoopView { vitals, published, contact, names } = insight;
        let config = self.config.to_string();
        let pages = MetricsPages::new(metrics.clone(), observations, published.clone(), contact, config);
        let pages = Arc::new(pages);
        let health = HealthPages { vitals, metrics: metrics.clone() };
        let _first = self.metrics.set(Arc::clone(&pages));
        let _first = self.healthz.set(Arc::new(health.clone()));
        let pages = Arc::new(AgentPages::new(pages, health, published, names));
        self.serving.spawn(agent_socket::serve(state_dir.to_owned(), pages));
        self.serving
    }
}

/// Answers health checks of an agent that waits for another one to exit: live and not ready. `None` without
/// an address, or if it is in use, for example by the other agent.
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
                "another program, such as kube-proxy or another agent, listens there: stop it, or use another address, or \
                 \"\" for none"
            }
            io::ErrorKind::AddrNotAvailable => "use an address of this host, or \"\" for none",
            _ => "use another address, or \"\" for none",
        };
        ListenError { flag, address, source, remedy }
    };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    // The kernel chooses the port if it is 0.
    let address = listener.local_addr().map_err(error)?;
    info!(%address, flag, "listening");
    Ok(Some(listener))
}

#[cfg(test)]
mod tests {
    use lb_core::{desired::Settings, plan::Capacity, tables::Image};

    use super::*;

    fn published(state: &State) -> (watch::Sender<Published>, watch::Receiver<Published>) {
        watch::channel(Published::new(state))
    }

    fn state() -> State {
        State::new(Settings::of_node("node"), Vec::new(), Capacity::default(), &Image::default())
    }

    /// A command reads the maps and then asks: the answer has at least what the maps had.
    #[tokio::test]
    async fn a_sync_in_progress_is_waited_for() {
        let (publishing, mut reading) = published(&state());
        assert_eq!(current(&mut reading).await.unwrap().n_syncs, 0);
        publishing.send_modify(|published| published.is_syncing = true);
        let mut other = reading.clone();
        let waiting = tokio::spawn(async move { current(&mut other).await });
        let early = time::timeout(Duration::from_millis(50), current(&mut reading)).await;
        assert!(early.is_err(), "an answer during a sync");
        // The next sync has begun before the waiting reader runs.
        let is_syncing = true;
        publishing.send_modify(|now| *now = Published { n_syncs: 1, is_syncing, ..Published::new(&state()) });
        assert_eq!(waiting.await.unwrap().unwrap().n_syncs, 1);
    }

    #[tokio::test]
    async fn a_loop_that_is_gone_or_does_not_end_its_sync_is_not_waited_for() {
        let (publishing, mut reading) = published(&state());
        publishing.send_modify(|published| published.is_syncing = true);
        assert!(current(&mut reading).await.is_none(), "the sync does not end");
        drop(publishing);
        assert!(current(&mut reading).await.is_none(), "the sync never ends");
        let (publishing, mut reading) = published(&state());
        drop(publishing);
        assert!(current(&mut reading).await.is_some(), "the maps stay as published");
    }

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

    /// A kubelet's probe waits for a second, and the programs may take longer to load.
    #[tokio::test]
    async fn pages_answer_from_the_first_moment() {
        let address = || {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap()
        };
        let options = Options { metrics: Some(address()), healthz: Some(address()), ..Options::default() };
        let _listeners = Listeners::open(&options).await.unwrap();
        for (address, path, status) in [
            (options.healthz, "/livez", "200"),
            (options.healthz, "/healthz", "503"),
            (options.metrics, "/metrics", "503"),
            (options.metrics, "/healthz", "503"),
        ] {
            let request = http::tests::get(address.unwrap(), path);
            let answer = time::timeout(Duration::from_secs(10), request).await.expect("an answer");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {answer}");
            assert!(answer.contains("programs"), "{path} has no reason: {answer}");
        }
    }
}
