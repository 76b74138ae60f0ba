//! The agent's loop: the only place that connects source, state, kernel and clock.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use lb_core::state::State;
use lb_core::{
    desired::{NodePortAddresses, Settings},
    model::{
        Issue, IssueKind, ObjectRef,
        notification::{EndpointState, HealthChange, NodeEvent, NotificationLog},
    },
    plan::audit::Faults,
};
use lb_kernel::{
    self, Findings, Kernel, KernelError, Maps, Pins, Repaired, lock::Lock, nftables::NftablesError,
};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet, spawn_blocking},
    time::{self, Instant, Interval, MissedTickBehavior},
};
use tracing::{debug, error, info, warn};

use super::{
    Latency,
    issues::{IssueChanges, LoggedIssues, MAX_LINES},
    lock_wait,
    save::SnapshotSchedule,
    start::{PATIENCE, Phase},
};
use crate::{
    names, self_test,
    serve::{
        self, ListenError, Listeners, LoopView, Published,
        health_ports::{self, HealthChecks},
    },
    snapshot::{self, Found, Snapshot, SnapshotError, Writer, Written},
    source::{Contact, Exclusions, Source},
    telemetry::{
        Metrics,
        away::{Away, Serves},
        health::{SelfTest, Vitals},
        metrics::AuditResult,
    },
};

mod addresses;
mod ejections;
mod exclude;
mod packets;
mod self_tests;
mod stale;

use self::{
    addresses::Addresses,
    exclude::ExcludedPods,
    packets::{PacketRules, Probed},
    self_tests::SelfTests,
    stale::Sweep,
};

const RETRY: Duration = Duration::from_secs(1);
/// How often the pins are checked, and the node's own addresses read if netlink does not report changes.
const INTERFACES: Duration = Duration::from_secs(5);
/// How often the programs' log is flushed.
const PROGRAM_LOG: Duration = Duration::from_millis(100);
/// How often the snapshot is written, if it is outdated.
const SNAPSHOT: Duration = Duration::from_secs(2);

/// Options of the loop.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to load and where to attach.
    pub kernel: lb_kernel::Options,
    /// Directory of the snapshot.
    pub state_dir: PathBuf,
    /// Minimum time between two syncs. The first change after a pause is synced at once.
    pub min_sync_interval: Duration,
    /// Time between two audits; zero for none.
    pub audit_interval: Duration,
    /// Time between two self-tests; zero for none.
    pub self_test_interval: Duration,
    /// Directories of cgroups to exclude. A missing one is excluded once it exists.
    pub exclude_cgroups: Vec<PathBuf>,
    /// Whether the source names pods to exclude.
    pub exclude_pods: bool,
    /// The node's name server; `None` without one.
    pub names: Option<names::Options>,
    /// Listen addresses of the HTTP servers.
    pub http: serve::Options,
}

/// Why the agent did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A call to the kernel failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Cannot listen on an address.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The kernel cannot have the rules of `--packets`.
    #[error("--packets: {0}; --packets=off leaves packets to another proxy")]
    Packets(#[from] NftablesError),
    /// The self-test's endpoints cannot listen.
    #[error("the self-test cannot listen on a loopback address: {0}; --self-test-interval=0 turns it off")]
    SelfTest(#[source] std::io::Error),
}

/// Waits until no other agent holds the same pins, then runs until `stop` turns true.
///
/// Stopping changes nothing in the kernel: links and maps stay pinned.
///
/// Blocks its thread while it loads programs and changes maps. So call it from `Runtime::block_on`, which
/// polls it on the caller's thread. The background tasks (HTTP, watches, files) have the runtime's worker
/// threads.
///
/// # Errors
///
/// Only at start: see [`RunError`]. Later errors are logged and retried.
pub async fn run(
    mut source: Box<dyn Source>,
    options: Options,
    settings: Settings,
    mut stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    // Before attaching: an agent that fails for lack of nftables or of a port has changed nothing. The first
    // of them need not wait for another agent's exit.
    let probed = Probed::new(settings.packets)?;
    let turn = lock_wait::wait_for_lock(&options.kernel.pin_path, &options.http, &mut stop).await?;
    // Dropped last: the ports are free and no work is left when the lock is released.
    let Some((lock, listeners)) = turn else { return Ok(()) };
    let mut proof = SelfTests::start(options.self_test_interval, options.kernel.cgroup.clone())
        .await
        .map_err(RunError::SelfTest)?;
    let (mut agent, beside) = Agent::attach(options, settings, probed, &*source, listeners, proof.as_mut())?;
    // Whether the adopted tables already lead the self-test's calls to this agent, before any sync.
    let has_adopted_endpoints = proof.as_ref().is_some_and(SelfTests::is_found);
    let Background { mut graces, mut port_issues, health_ports, mut ejections, _working } = beside;
    let Timers { mut interfaces, mut snapshots, mut audits } = Timers::start(agent.options.audit_interval);
    // Maps that could not be read keep serving. They too are at least as new as the snapshot.
    let has_adopted = agent.kernel.is_staged() || !agent.state.image().services.is_empty();
    let found = if has_adopted { Serves::Found } else { Serves::Nothing };
    let started = Instant::now();
    agent.forward_program_log();
    let mut not_before = started;
    // Not a phase: the maps still follow the last objects, for example when an interface's address changes.
    let mut has_source_ended = false;
    let mut phase = Phase::Waiting;
    loop {
        phase = phase.listed(source.is_complete());
        let may_sync = phase.may_sync() && agent.state.needs_sync();
        agent.metrics.source(phase == Phase::Following, phase == Phase::Snapshot);
        agent.heartbeat(may_sync);
        agent.publish_outage(
            &*source,
            match phase {
                Phase::Snapshot => Serves::Snapshot,
                _ => found,
            },
        );
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            () = time::sleep_until(not_before), if may_sync => {
                let pause = if agent.sync(&*source) { agent.options.min_sync_interval } else { RETRY };
                not_before = Instant::now() + pause;
            }
            () = time::sleep_until(started + PATIENCE), if phase == Phase::Waiting => {
                phase = agent.serve_without_source(&*source, found).await;
            }
            // While maps are staged, the sockets' records are in maps that cannot be read, or in maps that
            // the switch keeps.
            swept = agent.sweep.step(), if !agent.kernel.is_staged() => agent.sweep.advance(swept, &mut agent.state, &agent.metrics),
            more = source.changed(), if !has_source_ended => {
                if !more {
                    warn!(
                        source = source.describe(),
                        "the source has ended: entries in the kernel stay unchanged; restart the agent to \
                         follow changes"
                    );
                    has_source_ended = true;
                    continue;
                }
                phase = phase.answered();
                agent.apply_source_changes(&mut *source);
            }
            on_self_test = next_self_test(&mut proof), if agent.n_syncs > 0 || has_adopted_endpoints => agent.on_self_test(on_self_test),
            Some(()) = graces.recv() => agent.on_grace_period(),
            event = agent.packets.next() => agent.on_packets(&*source, event),
            () = until(agent.state.next_share_due()), if phase.may_sync() => agent.state.advance(Instant::now().into_std()),
            () = next_change(&mut port_issues) => agent.report(&*source),
            Some(changes) = ejections.recv() => agent.on_ejections(&*source, changes),
            compared = ended(&mut agent.auditing), if agent.auditing.is_some() => agent.finish_audit(&*source, compared),
            written = ended(&mut agent.writing), if agent.writing.is_some() => agent.on_snapshot_written(&*source, written),
            () = agent.addresses.changed() => agent.read_addresses(),
            _ = interfaces.tick() => {
                agent.refresh_node_addresses(&lock);
                agent.report(&*source);
                agent.send_notifications(&*source);
            }
            _ = snapshots.tick() => agent.save(),
            () = tick(&mut audits) => {
                agent.restore_pins(&lock);
                agent.compare();
                agent.packets.audit(&mut agent.state);
            }
        }
    }
    agent.flush_snapshot(&*source).await;
    drop(agent);
    // Frees its ports. A panic of the task no longer matters.
    let _ended = health_ports.await;
    info!("stopped; the kernel keeps serving what it has");
    Ok(())
}

struct Timers {
    interfaces: Interval,
    snapshots: Interval,
    /// `None` without audits.
    audits: Option<Interval>,
}

impl Timers {
    fn start(audit_interval: Duration) -> Self {
        let mut timers = Self {
            interfaces: time::interval(INTERFACES),
            snapshots: time::interval(SNAPSHOT),
            audits: (!audit_interval.is_zero())
                .then(|| time::interval_at(Instant::now() + audit_interval, audit_interval)),
        };
        for interval in [&mut timers.interfaces, &mut timers.snapshots].into_iter().chain(&mut timers.audits)
        {
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        timers
    }
}

/// Why a source's lists are not complete.
fn problem(source: &dyn Source) -> Arc<str> {
    let outage = source.contact().and_then(Contact::outage);
    outage.map_or_else(|| format!("{} has not answered", source.describe()).into(), |outage| outage.problem)
}

/// The next self-test's result; never resolves without one.
async fn next_self_test(proof: &mut Option<SelfTests>) -> SelfTest {
    match proof {
        Some(proof) => proof.next().await,
        None => std::future::pending().await,
    }
}

/// Waits for a change; never resolves once the sender is gone.
async fn next_change<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits until a time; never resolves without one.
async fn until(due: Option<std::time::Instant>) {
    match due {
        Some(due) => time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// The next tick; never resolves without an interval.
async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// Work on a blocking thread.
type Task<T, E> = JoinHandle<Result<T, E>>;

/// Waits for a task; never resolves without one. Returns its result or error text.
async fn ended<T, E: fmt::Display>(task: &mut Option<Task<T, E>>) -> Result<T, String> {
    let Some(running) = task else { return std::future::pending().await };
    let result = running.await;
    *task = None;
    match result {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(stopped) => Err(stopped.to_string()),
    }
}

struct Agent {
    state: State,
    addresses: Addresses,
    kernel: Kernel,
    sweep: Sweep,
    options: Options,
    metrics: Metrics,
    vitals: watch::Sender<Vitals>,
    /// What pages and commands read.
    published: watch::Sender<Published>,
    health_checks: watch::Sender<HealthChecks>,
    excluding: watch::Sender<ExcludedPods>,
    port_issues: watch::Receiver<Vec<Issue>>,
    /// Issues already logged.
    reported: LoggedIssues,
    /// Notifications sent so far, those about self-tests among them.
    ledger: NotificationLog,
    saving: SnapshotSchedule,
    /// The snapshot's writer, and the write in progress.
    writer: Arc<Mutex<Writer>>,
    writing: Option<Task<Written, SnapshotError>>,
    save_problem: Option<String>,
    packets: PacketRules,
    auditing: Option<Task<Findings, KernelError>>,
    /// Number of successful syncs.
    n_syncs: u64,
    latency: Latency,
    /// State of the pins at the last check.
    pins: Pins,
}

/// Background tasks and their channels. Dropping this stops those that serve and exclude.
struct Background {
    /// One message per expired grace period.
    graces: mpsc::Receiver<()>,
    port_issues: watch::Receiver<Vec<Issue>>,
    health_ports: JoinHandle<()>,
    /// Endpoints that were ejected and restored. Closed without passive health.
    ejections: mpsc::Receiver<Vec<HealthChange>>,
    _working: [JoinSet<()>; 4],
}

impl Agent {
    /// Loads and attaches the programs, adopts what is pinned, and starts the background tasks.
    fn attach(
        options: Options,
        settings: Settings,
        probed: Option<Probed>,
        source: &dyn Source,
        listeners: Listeners,
        proof: Option<&mut SelfTests>,
    ) -> Result<(Self, Background), RunError> {
        let (on_grace_period, graces) = mpsc::channel(1);
        let kernel = Kernel::open(&options.kernel, move || {
            // A pending message has the same effect.
            let _full = on_grace_period.try_send(());
        })?;
        let mut addresses = Addresses::start();
        let capacity = kernel.maps().capacity();
        let mut state = State::new(settings, addresses.read(), capacity, &kernel.maps().image()?);
        let mut packets = PacketRules::start(&mut state, probed, &options.kernel.pin_path);
        if !options.audit_interval.is_zero() {
            packets.watch();
        }
        info!(
            cgroup = %options.kernel.cgroup.display(),
            covers = %lb_kernel::cgroup::extent(&options.kernel.cgroup),
            pins = %options.kernel.pin_path.display(),
            source = source.describe(),
            adopted = state.image().services.len(),
            "attached"
        );
        let metrics = Metrics::new();
        let now = Instant::now().into_std();
        let mut vitals = Vitals::new(now);
        if let Some(proof) = proof {
            proof.take_over(state.image());
            let (service, slices) = self_test::objects(proof.endpoints());
            state.keep(service, slices);
            vitals.self_test = SelfTest::Pending;
        }
        vitals.refused_sizes = kernel.too_small().iter().map(ToString::to_string).collect();
        let (vitals, signs_of_life) = watch::channel(vitals);
        let (published, reading) = watch::channel(Published::new(&state));
        let insight = LoopView {
            vitals: signs_of_life.clone(),
            published: reading,
            contact: source.contact().cloned(),
            names: options.names.clone(),
        };
        let observations = kernel.observations();
        let serving = listeners.serve(observations.clone(), &options.state_dir, &metrics, insight);
        let (health_checks, wanted) = watch::channel(HealthChecks::default());
        let (reporting, port_issues) = watch::channel(Vec::new());
        let health_ports = tokio::spawn(health_ports::run(wanted, signs_of_life.clone(), reporting));
        let (scanning, ejections) = if options.kernel.passive_health {
            ejections::start(observations.clone(), published.subscribe())
        } else {
            (JoinSet::new(), mpsc::channel(1).1)
        };
        let (excluding, excluded) = watch::channel(ExcludedPods::default());
        let beside = Background {
            graces,
            port_issues: port_issues.clone(),
            health_ports,
            ejections,
            _working: [
                serving,
                scanning,
                exclude::start(&kernel.maps_path(), &options, excluded, signs_of_life)?,
                options
                    .names
                    .clone()
                    .map_or_else(JoinSet::new, |names| names::start(names, published.subscribe())),
            ],
        };
        let writer = Arc::new(Mutex::new(Writer::new(&options.state_dir)));
        let mut agent = Self {
            ledger: NotificationLog::new(state.settings().node_name.clone(), now),
            state,
            addresses,
            sweep: Sweep::new(options.kernel.clone(), observations.clone()),
            kernel,
            options,
            metrics,
            vitals,
            published,
            health_checks,
            excluding,
            port_issues,
            reported: LoggedIssues::default(),
            saving: SnapshotSchedule::new(now),
            writer,
            writing: None,
            save_problem: None,
            packets,
            auditing: None,
            n_syncs: 0,
            latency: Latency::default(),
            pins: Pins::InPlace,
        };
        agent.ledger.happened(&NodeEvent::Attached);
        Ok((agent, beside))
    }

    /// Decides what is served while the source does not answer, and logs it.
    async fn serve_without_source(&mut self, source: &dyn Source, found: Serves) -> Phase {
        if found == Serves::Found {
            warn!(
                n_frontends = self.state.image().services.len(),
                "no complete lists yet: {}; the entries found in the kernel stay unchanged",
                problem(source)
            );
            return Phase::Overdue;
        }
        if self.load_snapshot(source).await { Phase::Snapshot } else { Phase::Overdue }
    }

    /// Loads the objects of the snapshot. `false` if there is no usable one.
    async fn load_snapshot(&mut self, source: &dyn Source) -> bool {
        let (state_dir, problem) = (self.options.state_dir.clone(), problem(source));
        let mut reading = Some(spawn_blocking(move || Found::read(&state_dir)));
        let Found { snapshot, n_lost, .. } = match ended(&mut reading).await {
            Ok(found) => found,
            Err(error) => {
                warn!("no complete lists yet: {problem}; nothing is served until they are complete: {error}");
                return false;
            }
        };
        warn!(
            n_services = snapshot.services.len(),
            "no complete lists yet: {problem}; the snapshot is served until they are complete"
        );
        if n_lost > 0 {
            let journal = self.options.state_dir.join(snapshot::JOURNAL);
            warn!(
                "{}: the last {n_lost} bytes are truncated or corrupt: the snapshot's last changes are not \
                 served",
                journal.display()
            );
        }
        self.state.change(|store| {
            let mut changes = store.replace_services(snapshot.services);
            changes.merge(store.replace_slices(snapshot.slices));
            changes.merge(store.replace_nodes(snapshot.nodes));
            changes.merge(store.replace_service_cidrs(snapshot.service_cidrs));
            changes
        });
        true
    }

    fn refresh_node_addresses(&mut self, lock: &Lock) {
        if self.addresses.is_due() {
            self.read_addresses();
        }
        self.check_pins(lock);
    }

    /// Reads the node's own addresses, on which node ports answer.
    fn read_addresses(&mut self) {
        self.state.set_interfaces(self.addresses.read());
    }

    /// Checks the pins. A change is logged, and an agent without its pins is not ready.
    fn check_pins(&mut self, lock: &Lock) {
        let now = self.kernel.pins(lock);
        self.vitals.send_if_modified(|vitals| {
            let has_lost_pins = now != Pins::InPlace;
            std::mem::replace(&mut vitals.has_lost_pins, has_lost_pins) != has_lost_pins
        });
        let pin_path = self.options.kernel.pin_path.display();
        match &now {
            _ if now == self.pins => {}
            Pins::InPlace => info!(pins = %pin_path, "the pins are back"),
            Pins::Lost(names) => warn!(
                pins = %pin_path,
                names = names.join(" "),
                "pins were removed or replaced, or programs detached: the next audit restores them \
                 (--audit-interval)"
            ),
            Pins::Gone => error!(
                pins = %pin_path,
                "the pins are gone: removed by `socklb cleanup`, or the BPF file system is no longer mounted; programs still \
                 attached are detached when this agent exits, so restart it"
            ),
        }
        self.pins = now;
    }

    fn restore_pins(&mut self, lock: &Lock) {
        let (restored, result) = self.kernel.restore_pins(lock);
        for name in &restored {
            self.metrics.restored(name);
        }
        if !restored.is_empty() {
            warn!(
                names = restored.join(" "),
                "an audit restored pins and programs that were removed, replaced or detached"
            );
        }
        if let Err(error) = result {
            error!(%error, "an audit could not restore pins or programs: the next one retries");
        }
        self.check_pins(lock);
    }

    /// Writes a heartbeat. `is_waiting`: whether a change waits for a sync.
    fn heartbeat(&self, is_waiting: bool) {
        self.vitals.send_modify(|vitals| {
            vitals.heartbeat = Instant::now().into_std();
            if is_waiting && vitals.waiting_since.is_none() {
                vitals.waiting_since = Some(vitals.heartbeat);
            }
        });
    }

    /// Publishes an outage and what is served meanwhile.
    fn publish_outage(&self, source: &dyn Source, before_complete: Serves) {
        let outage = source.contact().and_then(Contact::outage);
        let is_complete = source.is_complete();
        let away = (!is_complete || outage.is_some()).then_some(Away {
            serves: if is_complete { Serves::LastKnown } else { before_complete },
            outage,
        });
        self.vitals.send_if_modified(|vitals| {
            let differs = vitals.away != away;
            vitals.away = away;
            differs
        });
    }

    fn apply_source_changes(&mut self, source: &mut dyn Source) {
        self.state.change(|store| source.apply(store));
        self.latency.arrived(source.take_arrivals());
        self.metrics.waiting(self.latency.n_waiting());
        if self.state.needs_sync() {
            self.metrics.queued(SystemTime::now());
        }
        self.excluding.send_if_modified(|wanted| {
            wanted.follow(source.exclusions().and_then(Exclusions::excluded_pods))
        });
        let node = self.state.store().node(&self.state.settings().node_name);
        let is_node_eligible = node.is_none_or(|node| !node.being_deleted);
        self.vitals.send_modify(|vitals| vitals.is_node_eligible = is_node_eligible);
        // Otherwise the sync reports.
        if !(source.is_complete() && self.state.needs_sync()) {
            self.report(source);
        }
    }

    /// Brings the maps to the desired state. `false` if that failed and is to be retried.
    fn sync(&mut self, source: &dyn Source) -> bool {
        let started = Instant::now();
        // Silently: readers of the last view wait only if they ask now.
        self.published.send_if_modified(|published| {
            published.is_syncing = true;
            false
        });
        self.state.advance(started.into_std());
        let plan = self.state.sync();
        // May wait for a grace period.
        let result = self.kernel.apply(&plan);
        // Packets have their own tables, and may have room where sockets have none.
        self.packets.changed(&mut self.state);
        // A snapshot that was only read need not be written.
        if source.is_complete() {
            self.saving.changed();
        }
        let lb_kernel::Done { n_ops, no_room } = match result {
            Ok(done) => done,
            Err(error) => {
                error!(%error, "a sync failed: reading the kernel's maps and retrying");
                self.metrics.sync_failed();
                self.readopt();
                self.publish(self.issues(source));
                return false;
            }
        };
        let (n_frontends, took) = (self.state.image().services.len(), started.elapsed());
        self.n_syncs += 1;
        if self.n_syncs > 1 {
            // Not at info: a large rollout changes endpoints hundreds of times a second.
            debug!(n_ops, n_frontends, ?took, "synced");
        } else {
            info!(n_ops, n_frontends, ?took, "synced for the first time");
            self.ledger.happened(&NodeEvent::Synced { n_frontends });
            lb_kernel::syscall::return_free_memory();
        }
        self.state.miss(no_room);
        self.metrics.synced(took, n_ops, SystemTime::now());
        self.note_latency();
        let n_refused = self.state.n_refused();
        self.vitals.send_modify(|vitals| {
            (vitals.waiting_since, vitals.updated) = (None, Some(SystemTime::now()));
            vitals.n_refused = n_refused;
        });
        self.publish_health_checks();
        self.report(source);
        // Only now: a program whose socket is destroyed reconnects by the new tables.
        self.sweep.changed();
        if !self.state.missing().is_empty() {
            self.compare();
        }
        true
    }

    /// Records the latency of the changes that this sync carried out.
    fn note_latency(&mut self) {
        let metrics = &self.metrics;
        let note = |since_arrival, since_trigger| metrics.programmed(since_arrival, since_trigger);
        let (now, clock) = (Instant::now().into_std(), SystemTime::now());
        let (n_changes, longest) = self.latency.applied(now, clock, note);
        metrics.waiting(0);
        if n_changes > 0 {
            debug!(
                n_changes,
                ?longest,
                received_p99 = ?self.latency.received.quantile(99),
                triggered_p99 = ?self.latency.triggered.quantile(99),
                "changes are in the kernel"
            );
        }
    }

    fn publish_health_checks(&self) {
        let addresses = match self.state.settings().node_port_addresses {
            NodePortAddresses::All => None,
            _ => Some(self.state.topology().own_addresses().iter().copied().collect()),
        };
        let checks = self.state.health_checks();
        self.health_checks.send_if_modified(|wanted| {
            let differs = wanted.checks != *checks || wanted.addresses != addresses;
            if differs {
                *wanted = HealthChecks { checks: checks.clone(), addresses };
            }
            differs
        });
    }

    /// Logs ejections and restorations, and queues their notifications.
    fn on_ejections(&mut self, source: &dyn Source, changes: Vec<HealthChange>) {
        let now = Instant::now().into_std();
        for one in changes.iter().take(MAX_LINES) {
            match one.state {
                EndpointState::Ejected { .. } => warn!("{}", one.line(now)),
                EndpointState::Restored => info!("{}", one.line(now)),
            }
        }
        if let Some(n_more @ 1..) = changes.len().checked_sub(MAX_LINES) {
            warn!(
                n_more,
                "more endpoints were ejected or restored than are logged at once: `socklb services` lists them"
            );
        }
        self.ledger.health_changed(changes, now);
        self.send_notifications(source);
    }

    fn on_self_test(&mut self, self_test: SelfTest) {
        if let SelfTest::Failed(problem) = &self_test {
            // Notified with the next tick of `interfaces`.
            self.ledger.happened(&NodeEvent::SelfTestFailed { problem: problem.to_string() });
        }
        self.metrics.self_tested(self_test == SelfTest::Passed);
        self.vitals.send_modify(|vitals| vitals.self_test = self_test);
    }

    /// Publishes the issues, and after a sync what it put in force: changes since then are not in the maps.
    fn publish(&self, issues: Vec<Issue>) {
        self.published.send_if_modified(|published| {
            let differs = published.is_syncing
                || *published.issues != *issues
                || published.save_problem != self.save_problem
                || published.packets.as_ref() != self.packets.status();
            if published.is_syncing {
                *published = Published { n_syncs: self.n_syncs, ..Published::new(&self.state) };
            }
            if differs {
                published.issues = issues.into();
                published.save_problem.clone_from(&self.save_problem);
                published.packets = self.packets.status().cloned();
            }
            differs
        });
    }

    fn readopt(&mut self) {
        // The next plan may reuse what the failed one freed, so wait until no program reads it.
        self.kernel.settle();
        match self.kernel.maps().image() {
            Ok(found) => self.state.adopt(self.kernel.maps().capacity(), &found),
            Err(error) => error!(%error, "the kernel's maps cannot be read after a failure: retrying"),
        }
    }

    /// Starts an audit on a blocking thread: reading full tables takes longer than a change may wait.
    fn compare(&mut self) {
        if self.auditing.is_some() || !self.state.is_image_complete() {
            return;
        }
        let (expected, pin_path) = (self.state.image().clone(), self.options.kernel.pin_path.clone());
        self.auditing = Some(spawn_blocking(move || Maps::open(&pin_path)?.compare(&expected)));
    }

    /// Finishes an audit: repairs what still differs after the syncs made meanwhile.
    fn finish_audit(&mut self, source: &dyn Source, findings: Result<Findings, String>) {
        let mut findings = match findings {
            Ok(findings) => findings,
            Err(error) => {
                warn!(%error, "an audit could not read the kernel's maps: the next one retries");
                return self.metrics.audited(AuditResult::Error, &Faults::new());
            }
        };
        if !self.state.is_image_complete() {
            // A sync has failed meanwhile: the next one rewrites what differs.
            return;
        }
        findings.suspect(self.state.missing());
        let repaired = if findings.is_empty() {
            Ok(Repaired::default())
        } else {
            self.kernel.repair(self.state.image(), &findings)
        };
        let repaired = repaired.map(|Repaired { faults, no_room }| {
            self.state.found(no_room);
            faults
        });
        let n_refused = self.state.n_refused();
        self.vitals.send_modify(|vitals| vitals.n_refused = n_refused);
        self.report(source);
        match repaired {
            Ok(repaired) if repaired.is_empty() => self.metrics.audited(AuditResult::Clean, &repaired),
            Ok(repaired) => {
                let counts: Vec<String> = repaired.iter().map(|(map, n)| format!("{map} {n}")).collect();
                warn!(
                    entries = counts.join(", "),
                    "an audit repaired entries of the kernel's maps that another program had changed"
                );
                self.metrics.audited(AuditResult::Repaired, &repaired);
            }
            Err(error) => {
                error!(%error, "an audit could not repair the kernel's maps: reading them and retrying");
                self.metrics.audited(AuditResult::Error, &Faults::new());
                self.readopt();
            }
        }
    }

    fn on_packets(&mut self, source: &dyn Source, event: packets::Event) {
        if self.packets.advance(event, &mut self.state, &self.metrics) {
            self.report(source);
        }
    }

    /// A grace period has expired, perhaps the last one requested.
    fn on_grace_period(&mut self) {
        self.state.settled(self.kernel.settled());
        self.published.send_if_modified(|published| {
            published.maps = self.state.map_use();
            false
        });
    }

    /// Logs new issues once each, and those that are gone. Notifies about new ones.
    fn report(&mut self, source: &dyn Source) {
        let issues = self.issues(source);
        self.publish(issues.clone());
        let IssueChanges { new, gone, n_more } = self.reported.follow(issues);
        self.metrics.issues(self.reported.len());
        for issue in &new {
            warn!("{issue}");
        }
        for issue in gone {
            info!("no longer: {issue}");
        }
        if n_more > 0 {
            warn!(
                n_more,
                "more issues began or ended than are logged at once: `socklb status` lists the current ones"
            );
        }
        if !new.is_empty() || self.ledger.has_pending() {
            self.send_notifications(source);
        }
    }

    fn issues(&self, source: &dyn Source) -> Vec<Issue> {
        let of_ports = self.port_issues.borrow().clone();
        let of_objects = source.issues().into_iter().chain(self.state.issues());
        of_objects.chain(of_ports).chain(self.own_issues()).collect()
    }

    fn own_issues(&self) -> impl Iterator<Item = Issue> {
        let not_saved = self.save_problem.clone().map(|cause| IssueKind::SnapshotNotWritten { cause });
        let refused = self.kernel.too_small().iter().map(|size| IssueKind::SizeRefused {
            setting: size.setting.to_owned(),
            wanted: size.wanted,
            served: size.n_served,
            used: size.used,
        });
        let node = ObjectRef::node(&self.state.settings().node_name);
        let of_packets = self.packets.status().and_then(|status| status.problem.as_ref());
        let not_changed = of_packets.map(|cause| IssueKind::PacketRules { cause: cause.to_string() });
        refused.chain(not_saved).chain(not_changed).map(move |kind| Issue::new(node.clone(), kind))
    }

    /// Sends the notifications that are due: for new issues and for long-standing ones. Does not block; the
    /// rest are retried.
    fn send_notifications(&mut self, source: &dyn Source) {
        let Some(notifier) = source.notifier() else { return };
        let capacity = notifier.capacity();
        if capacity == 0 {
            return;
        }
        for notification in self.ledger.due(self.issues(source), capacity, Instant::now().into_std()) {
            notifier.notify(notification);
        }
    }

    /// Starts to write the snapshot, if it is outdated. The loop continues: writing ten thousand services
    /// takes longer than a change may wait.
    fn save(&mut self) {
        if self.saving.begin(Instant::now().into_std()) {
            self.write();
        }
    }

    fn write(&mut self) {
        let (settings, interfaces) = (self.state.settings().clone(), self.state.interfaces().to_vec());
        let (store, writer) = (self.state.store().clone(), Arc::clone(&self.writer));
        self.writing = Some(spawn_blocking(move || {
            // Here, since it takes ten milliseconds for 44,000 services.
            let snapshot = Snapshot::of(&settings, &interfaces, &store);
            drop(store);
            // One task at a time locks it. The writer recovers from what a task that panicked left.
            writer.lock().unwrap_or_else(PoisonError::into_inner).write(snapshot)
        }));
    }

    fn on_snapshot_written(&mut self, source: &dyn Source, written: Result<Written, String>) {
        let (n_bytes, n_changed) =
            written.as_ref().map(|written| (written.n_bytes, written.n_changed)).ok().unzip();
        self.saving.ended(n_changed, Instant::now().into_std());
        self.metrics.saved(n_bytes, SystemTime::now());
        if written.as_ref().is_ok_and(|written| written.has_read) {
            lb_kernel::syscall::return_free_memory();
        }
        let problem = written.err();
        if problem != std::mem::replace(&mut self.save_problem, problem.clone()) {
            self.report(source);
        }
    }

    /// Writes the outstanding changes and waits for that.
    async fn flush_snapshot(&mut self, source: &dyn Source) {
        if self.writing.is_some() {
            let written = ended(&mut self.writing).await;
            self.on_snapshot_written(source, written);
        }
        if self.saving.begin_last() {
            self.write();
            let written = ended(&mut self.writing).await;
            self.on_snapshot_written(source, written);
        }
    }

    /// Forwards the programs' diagnostic lines to the log, if they write any.
    fn forward_program_log(&mut self) {
        if !self.options.kernel.log {
            return;
        }
        match self.kernel.take_log() {
            Ok(mut log) => {
                // Runs until the process exits. A timer, since tokio can wait for the ring buffer's
                // descriptor only with unsafe code, and these lines are for a person who watches.
                let _forwarding = tokio::spawn(async move {
                    let mut timer = time::interval(PROGRAM_LOG);
                    loop {
                        let _now = timer.tick().await;
                        log.flush();
                    }
                });
            }
            Err(error) => {
                warn!(%error, "-vv: the programs' log cannot be read: their verdicts are not shown");
            }
        }
    }
}
