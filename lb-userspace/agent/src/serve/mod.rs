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
//! - A question to the agent's loop is answered in bounded time, even if the loop is stuck.
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

use lb_kernel::{KernelError, Maps};
use tokio::{
    net::TcpListener,
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinSet,
    time::{self, Instant},
};
use tracing::info;

use self::{
    agent_socket::AgentPages,
    known::{Known, Which},
    pages::{HealthPages, MetricsPages},
};
use crate::telemetry::{Metrics, health::Vitals, scrape::View};

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

/// A question about the agent's state, with the channel for its answer.
#[derive(Debug)]
pub enum Question {
    /// From a scrape.
    View(oneshot::Sender<View>),
    /// From a command.
    Known(Which, oneshot::Sender<Known>),
}

/// Timeout of the loop's answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause after an answer: as long as the answer took, within these bounds. The loop answers questions before
/// it applies changes, and endless questions must not starve the changes.
const PAUSE: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(10)];

/// Asks the agent's loop, one question at a time.
#[derive(Clone, Debug)]
pub struct LoopHandle {
    questions: mpsc::Sender<Question>,
    turn: Arc<Mutex<()>>,
}

impl LoopHandle {
    /// Sends questions to this channel.
    #[must_use]
    pub fn new(questions: mpsc::Sender<Question>) -> Self {
        Self { questions, turn: Arc::default() }
    }

    /// The loop's answer; `None` on a timeout.
    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Option<T> {
        let asked = async {
            let turn = Arc::clone(&self.turn).lock_owned().await;
            let (answer, answered) = oneshot::channel();
            let asked = Instant::now();
            self.questions.send(question(answer)).await.ok()?;
            let answered = answered.await.ok();
            let [least, most] = PAUSE;
            let pause = asked.elapsed().clamp(least, most);
            // The answer is returned without the pause.
            let _pausing = tokio::spawn(async move {
                time::sleep(pause).await;
                drop(turn);
            });
            answered
        };
        time::timeout(PATIENCE, asked).await.ok().flatten()
    }
}

/// What servers read of the agent's loop.
#[derive(Clone, Debug)]
pub struct LoopView {
    /// The loop's heartbeat.
    pub vitals: watch::Receiver<Vitals>,
    /// Number of syncs.
    pub changes: watch::Receiver<u64>,
    /// Sends questions to the loop.
    pub asker: LoopHandle,
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
    /// `state_dir`. Questions go to the agent's loop.
    ///
    /// # Errors
    ///
    /// If the pinned maps, whose counters `/metrics` reads, cannot be opened.
    pub fn serve(
        mut self,
        pin_path: &Path,
        state_dir: &Path,
        metrics: &Metrics,
        insight: LoopView,
    ) -> Result<JoinSet<()>, KernelError> {
        let LoopView { vitals, changes, asker } = insight;
        let config = self.config.to_string();
        let pages = MetricsPages::new(metrics.clone(), Maps::open(pin_path)?, asker.clone(), config);
        let pages = Arc::new(pages);
        let health = HealthPages { vitals, metrics: metrics.clone() };
        let _first = self.metrics.set(Arc::clone(&pages));
        let _first = self.healthz.set(Arc::new(health.clone()));
        let pages = Arc::new(AgentPages::new(pages, health, asker, changes));
        self.serving.spawn(agent_socket::serve(state_dir.to_owned(), pages));
        Ok(self.serving)
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
    use std::time::Duration;

    use tokio::time;

    use super::*;

    /// However many clients ask endlessly, the loop has time for changes between two answers.
    #[tokio::test]
    async fn questions_leave_the_loop_time() {
        let (questions, mut heard) = mpsc::channel(4);
        let asker = LoopHandle::new(questions);
        let mut asking = JoinSet::new();
        for _ in 0..64 {
            let asker = asker.clone();
            asking.spawn(async move {
                loop {
                    let _answer = asker.ask(Question::View).await;
                }
            });
        }
        let (started, mut n_heard) = (Instant::now(), 0);
        while started.elapsed() < Duration::from_millis(200) {
            if let Some(Question::View(answer)) = heard.recv().await {
                n_heard += 1;
                let _gone = answer.send(View::default());
            }
        }
        let most = started.elapsed().as_millis() / PAUSE[0].as_millis() + 1;
        assert!(n_heard > 1 && n_heard <= most, "{n_heard} questions, {most} at most");
    }

    #[tokio::test]
    async fn a_loop_that_is_gone_or_loses_a_question_is_not_waited_for() {
        let (questions, mut heard) = mpsc::channel(4);
        let asker = LoopHandle::new(questions);
        let losing = tokio::spawn(async move { drop(heard.recv().await) });
        assert_eq!(asker.ask(Question::View).await, None);
        losing.await.unwrap();
        assert_eq!(asker.ask(Question::View).await, None);
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
