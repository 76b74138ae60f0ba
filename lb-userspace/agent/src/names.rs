//! The node's name server as a part of the agent.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use lb_core::{
    model::ServiceKey,
    names::{
        Answer, Question, Record, RecordType, Records,
        reach::Clients,
        upstream,
        zone::{self, Zone},
    },
    state::View,
};
use lb_kernel::addresses;
use lb_names::{Authority, Listener, Server};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{self, MissedTickBehavior},
};
use tracing::{info, warn};

use crate::serve::Published;

/// Settings of the name server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `--cluster-domain`, in lower case, without a final dot.
    pub domain: Arc<str>,
    /// `--names-service`
    pub service: ServiceKey,
    /// `--names-upstream`; empty for the endpoints of `service`.
    pub upstreams: Vec<SocketAddr>,
    /// `--names-forward`
    pub forward: Vec<Arc<str>>,
    /// `--names-bind-address`
    pub bind: Vec<SocketAddr>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            domain: "cluster.local".into(),
            service: ServiceKey::new("kube-system", "kube-dns"),
            upstreams: Vec::new(),
            forward: Vec::new(),
            bind: Vec::new(),
        }
    }
}

/// What the node answers to a question, as commands show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// The name asked for, lower case, without the final dot.
    pub name: String,
    /// The type asked for.
    pub record_type: String,
    /// How the node answers.
    pub outcome: Outcome,
    /// Records of the answer section, as lines of a master file.
    pub answers: Vec<String>,
    /// Records of the additional section.
    pub additional: Vec<String>,
    /// Servers that are asked for the rest of the answer, or for all of it.
    pub forwarded_to: Vec<SocketAddr>,
}

/// How the node answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// With records of its own.
    Answered,
    /// The name exists without a record of this type.
    NoData,
    /// `NXDOMAIN`
    NoSuchName,
    /// As the upstream servers do.
    Forwarded,
}

/// Answers a question from the objects of a view, as the server does now.
#[must_use]
pub fn resolve(options: &Options, view: &View, name: &str, record_type: RecordType) -> Resolution {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let labels: Vec<&[u8]> = name.split('.').filter(|label| !label.is_empty()).map(str::as_bytes).collect();
    let answer = zone(options, view).answer(&Question { labels: &labels, record_type });
    let upstreams = || upstreams(options, view);
    let lines = |records: Vec<Record>| records.iter().map(|record| record.line(&name)).collect();
    let (outcome, answers, additional, forwarded_to) = match answer {
        Answer::Forward => (Outcome::Forwarded, Vec::new(), Vec::new(), upstreams()),
        Answer::NoData { .. } => (Outcome::NoData, Vec::new(), Vec::new(), Vec::new()),
        Answer::NxDomain { .. } => (Outcome::NoSuchName, Vec::new(), Vec::new(), Vec::new()),
        Answer::Records(Records { answers, additional, chase }) => {
            let rest = if chase.is_some() { upstreams() } else { Vec::new() };
            (Outcome::Answered, lines(answers), lines(additional), rest)
        }
    };
    let record_type = record_type.to_string();
    Resolution { record_type, outcome, answers, additional, forwarded_to, name: name.clone() }
}

fn upstreams(options: &Options, view: &View) -> Vec<SocketAddr> {
    if options.upstreams.is_empty() {
        upstream::endpoints(&view.store, &options.service, &options.bind)
    } else {
        options.upstreams.clone()
    }
}

/// How often the interfaces are read, and addresses that could not be bound are tried again.
const INTERVAL: Duration = Duration::from_secs(5);

/// Answers names after the first sync, until the returned set is dropped.
///
/// # Panics
///
/// Outside a tokio runtime.
pub(crate) fn start(options: Options, published: watch::Receiver<Published>) -> JoinSet<()> {
    let mut task = JoinSet::new();
    let _aborted_on_drop = task.spawn(follow(options, published));
    task
}

async fn follow(options: Options, mut published: watch::Receiver<Published>) {
    let mut names: Option<Names> = None;
    let mut timer = time::interval(INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    published.mark_changed();
    loop {
        tokio::select! {
            changed = published.changed() => {
                if changed.is_err() {
                    return;
                }
                let Published { view, n_syncs, .. } = published.borrow_and_update().clone();
                match &mut names {
                    Some(names) => names.publish(view),
                    // Before the lists are complete, a name that is missing may exist.
                    None if n_syncs == 0 => {}
                    None => names.insert(Names::new(options.clone(), view)).refresh(),
                }
            }
            _ = timer.tick() => if let Some(names) = &mut names { names.refresh() },
        }
    }
}

/// Whom the server answers, as of the last look at the interfaces.
#[derive(Debug, Default)]
struct CurrentClients(RwLock<Clients>);

impl lb_names::Clients for CurrentClients {
    fn admits(&self, source: IpAddr, interface_index: u32) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).admits(source, interface_index)
    }
}

/// The zone of a view. Its serial number is the time, which grows over restarts too.
fn zone(options: &Options, view: &View) -> Zone {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let settings = zone::Settings {
        domain: Arc::clone(&options.domain),
        forward: options.forward.clone(),
        dns_service: options.service.clone(),
        // Serial numbers wrap (RFC 1982).
        serial: u32::try_from(now & u64::from(u32::MAX)).unwrap_or_default(),
    };
    Zone::new(view.store.clone(), settings)
}

struct Names {
    options: Options,
    /// The objects that the zone follows.
    view: Arc<View>,
    zone: watch::Sender<Arc<dyn Authority>>,
    upstreams: watch::Sender<Vec<SocketAddr>>,
    clients: Arc<CurrentClients>,
    /// `None` while an address cannot be bound.
    server: Option<Server>,
    /// Why there is no server, as the log has it.
    problem: Option<String>,
}

impl Names {
    fn new(options: Options, view: Arc<View>) -> Self {
        let first: Arc<dyn Authority> = Arc::new(zone(&options, &view));
        let upstreams = watch::channel(upstreams(&options, &view)).0;
        let zone = watch::channel(first).0;
        let clients = Arc::default();
        Self { options, view, zone, upstreams, clients, server: None, problem: None }
    }

    /// Answers by these objects from now on.
    fn publish(&mut self, view: Arc<View>) {
        // Issues are published too.
        if Arc::ptr_eq(&view, &self.view) {
            return;
        }
        self.zone.send_replace(Arc::new(zone(&self.options, &view)));
        self.upstreams.send_replace(upstreams(&self.options, &view));
        self.view = view;
    }

    /// Looks at the interfaces, and opens the sockets if they are not open.
    fn refresh(&mut self) {
        let own = addresses::read();
        let clients =
            Clients { uplinks: addresses::uplinks(&[]), own: own.into_iter().collect(), foreign: Vec::new() };
        *self.clients.0.write().unwrap_or_else(PoisonError::into_inner) = clients;
        if self.server.is_some() {
            return;
        }
        match self.open() {
            Ok(server) => {
                info!(addresses = ?self.options.bind, domain = &*self.options.domain, "answering names");
                (self.server, self.problem) = (Some(server), None);
            }
            Err(problem) => {
                if self.problem.as_ref() != Some(&problem) {
                    warn!("names are not answered: {problem}; retrying");
                }
                self.problem = Some(problem);
            }
        }
    }

    fn open(&self) -> Result<Server, String> {
        let bind = |address: &SocketAddr| {
            let remedy = "stop what listens there, or use another address";
            Listener::bind(*address)
                .map_err(|error| format!("--names-bind-address {address}: {error}: {remedy}"))
        };
        let listeners = self.options.bind.iter().map(bind).collect::<Result<_, _>>()?;
        let clients: Arc<dyn lb_names::Clients> = Arc::clone(&self.clients) as _;
        let (zone, upstreams) = (self.zone.subscribe(), self.upstreams.subscribe());
        Server::start(listeners, zone, clients, upstreams, lb_names::Options::default(), Box::new(|| {}))
            .map_err(|error| error.to_string())
    }
}
