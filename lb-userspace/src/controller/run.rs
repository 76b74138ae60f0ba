//! The agent's loop: the one place that connects source, state, kernel and clock.

use std::{
    collections::BTreeSet,
    fmt,
    net::IpAddr,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    task::{JoinHandle, spawn_blocking},
    time::{self, Instant, MissedTickBehavior},
};
use tracing::{debug, error, info, warn};

use super::{
    Latency, State,
    save::Saving,
    start::{Basis, PATIENCE, Start, basis},
};
use crate::{
    kernel::{self, Kernel, KernelError},
    snapshot::{Contents, Snapshot, SnapshotError},
    source::Source,
};

/// How long to wait after a failed sync.
const RETRY: Duration = Duration::from_secs(1);
/// How often the node's own addresses are read: they decide where node ports answer.
const INTERFACES: Duration = Duration::from_secs(5);
/// How often the programs' diagnostic lines are passed on.
const PROGRAM_LOG: Duration = Duration::from_millis(100);
/// How long a change may wait before it is in the snapshot.
const SNAPSHOT: Duration = Duration::from_secs(2);

/// What the loop needs to know besides the state.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to load and where to attach.
    pub kernel: kernel::Options,
    /// Directory of the snapshot.
    pub state_dir: PathBuf,
    /// The least time between two syncs; the first change after a pause is done at once.
    pub min_sync_interval: Duration,
}

/// Runs until `stop` turns true or the source ends.
///
/// Stopping changes nothing in the kernel: links and maps stay pinned.
///
/// # Errors
///
/// Only while starting, and by losing the source. Later errors are logged and retried.
pub async fn run(
    mut source: impl Source,
    options: Options,
    settings: crate::desired::Settings,
    mut stop: watch::Receiver<bool>,
) -> Result<(), KernelError> {
    let (grace_passed, mut graces) = mpsc::channel(1);
    let kernel = Kernel::open(&options.kernel, move || {
        // A message that is waiting says the same.
        let _full = grace_passed.try_send(());
    })?;
    let interfaces = interface_addresses();
    let state = State::new(settings, interfaces, options.kernel.capacity, &kernel.maps().image()?);
    info!(
        cgroup = %options.kernel.cgroup.display(),
        pins = %options.kernel.pin_path.display(),
        source = source.describe(),
        adopted = state.image().services.len(),
        "attached"
    );
    let has_adopted = !state.image().services.is_empty();
    let mut agent = Agent {
        state,
        kernel,
        options,
        reported: BTreeSet::new(),
        saving: Saving::default(),
        writing: None,
        save_problem: None,
        has_synced: false,
        latency: Latency::default(),
    };
    agent.forward_program_log();
    let mut interfaces = time::interval(INTERFACES);
    let mut snapshots = time::interval(SNAPSHOT);
    for interval in [&mut interfaces, &mut snapshots] {
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    let started = Instant::now();
    let (mut not_before, mut has_ended) = (started, false);
    // Whether the snapshot was tried, and whether the objects are its.
    let (mut has_waited, mut serves_snapshot, mut has_answered) = (false, false, false);
    loop {
        let is_complete = source.is_complete();
        serves_snapshot &= !is_complete;
        let may_sync = (is_complete || serves_snapshot) && agent.state.wants_sync();
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            () = time::sleep_until(not_before), if may_sync => {
                let pause = if agent.sync(&source) { agent.options.min_sync_interval } else { RETRY };
                not_before = Instant::now() + pause;
            }
            () = time::sleep_until(started + PATIENCE), if !is_complete && !has_waited => {
                has_waited = true;
                let start = Start { is_complete, has_answered, waited: started.elapsed(), has_adopted };
                serves_snapshot = basis(start) == Basis::Snapshot && agent.restore();
                if has_adopted && !has_answered {
                    warn!("the source does not answer: what was found goes on as it is");
                }
            }
            more = source.changed(), if !has_ended => {
                if !more {
                    warn!("the source has ended: what is served stays as it is");
                    has_ended = true;
                    continue;
                }
                // Single events on top of the snapshot would be a state that never was.
                (serves_snapshot, has_answered) = (false, true);
                agent.state.change(|store| source.apply(store));
                agent.latency.arrived(source.take_arrivals());
                agent.report(&source);
            }
            Some(()) = graces.recv() => {
                if agent.kernel.is_settled() {
                    agent.state.settled();
                }
            }
            _ = interfaces.tick() => agent.state.set_interfaces(interface_addresses()),
            written = ended(&mut agent.writing), if agent.writing.is_some() => agent.saved(written),
            _ = snapshots.tick() => agent.save(),
        }
    }
    agent.save_to_the_end().await;
    info!("stopped; what is served stays as it is");
    Ok(())
}

/// Work on a thread of its own.
type Task<T, E> = JoinHandle<Result<T, E>>;

/// Waits until a task is over, or for ever without one. Returns what went wrong.
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
    kernel: Kernel,
    options: Options,
    /// Issues that are in the log already.
    reported: BTreeSet<String>,
    saving: Saving,
    /// The snapshot that is being written.
    writing: Option<Task<(), SnapshotError>>,
    /// Why the last snapshot was not written, if it is in the log already.
    save_problem: Option<String>,
    has_synced: bool,
    latency: Latency,
}

impl Agent {
    /// Takes over the objects of the snapshot. `false` if there is none that can be used.
    fn restore(&mut self) -> bool {
        let snapshot = match Snapshot::read(&self.options.state_dir) {
            Ok(snapshot) => snapshot,
            Err(SnapshotError::Missing { .. }) => {
                warn!("the source does not answer, and there is no snapshot to serve");
                return false;
            }
            Err(error) => {
                warn!(%error, "the source does not answer, and the snapshot cannot be served");
                return false;
            }
        };
        warn!(
            n_services = snapshot.services.len(),
            "the source does not answer: serving the snapshot until it does"
        );
        self.state.change(|store| {
            let mut changes = store.replace_services(snapshot.services);
            changes.merge(store.replace_slices(snapshot.slices));
            changes.merge(store.replace_nodes(snapshot.nodes));
            changes
        });
        true
    }

    /// Brings the kernel up to date. `false` if that failed and is to be tried again.
    fn sync(&mut self, source: &impl Source) -> bool {
        let started = Instant::now();
        let plan = self.state.sync();
        // A plan may wait for a grace period.
        let result = tokio::task::block_in_place(|| self.kernel.apply(&plan));
        // A snapshot need not be written because it was read.
        if source.is_complete() {
            self.saving.changed();
        }
        match result {
            Ok(0) if self.has_synced => {}
            Ok(n_ops) => {
                let n_frontends = self.state.image().services.len();
                info!(n_ops, n_frontends, took = ?started.elapsed(), "synced");
            }
            Err(error) => {
                error!(%error, "a sync failed: reading the tables and trying again");
                self.start_over();
                return false;
            }
        }
        self.has_synced = true;
        let (n_changes, longest) = self.latency.applied(Instant::now().into_std(), SystemTime::now());
        if n_changes > 0 {
            debug!(
                n_changes,
                ?longest,
                received_p99 = ?self.latency.received.quantile(99),
                triggered_p99 = ?self.latency.triggered.quantile(99),
                "changes are in the kernel"
            );
        }
        self.report(source);
        true
    }

    fn start_over(&mut self) {
        match self.kernel.maps().image() {
            Ok(found) => self.state.adopt(self.options.kernel.capacity, &found),
            Err(error) => error!(%error, "the tables cannot be read"),
        }
    }

    /// Logs issues that are new, once each, and those that are gone.
    fn report(&mut self, source: &impl Source) {
        let issues = source.issues().into_iter().chain(self.state.issues());
        let now: BTreeSet<String> = issues.map(|issue| issue.to_string()).collect();
        for issue in now.difference(&self.reported) {
            warn!("{issue}");
        }
        for issue in self.reported.difference(&now) {
            info!("no longer: {issue}");
        }
        self.reported = now;
    }

    /// Begins to write the snapshot, if it is out of date. The loop goes on meanwhile: to write the objects of ten
    /// thousand services takes longer than a change may wait.
    fn save(&mut self) {
        if self.saving.begin() {
            let contents = Contents::of(self.state.settings(), self.state.interfaces(), self.state.store());
            let state_dir = self.options.state_dir.clone();
            self.writing = Some(spawn_blocking(move || contents.write(&state_dir)));
        }
    }

    /// A snapshot was written, or was not for a reason.
    fn saved(&mut self, written: Result<(), String>) {
        self.saving.ended(written.is_ok());
        let problem = written.err();
        if let Some(error) = problem.as_ref().filter(|_| problem != self.save_problem) {
            warn!(%error, "the snapshot is not up to date; trying again");
        }
        self.save_problem = problem;
    }

    /// Writes what is not written yet and waits for it.
    async fn save_to_the_end(&mut self) {
        if self.writing.is_some() {
            let written = ended(&mut self.writing).await;
            self.saved(written);
        }
        self.save();
        if self.writing.is_some() {
            let written = ended(&mut self.writing).await;
            self.saved(written);
        }
    }

    /// Passes the programs' own diagnostic lines on to the log, if they write any.
    fn forward_program_log(&mut self) {
        if !self.options.kernel.log {
            return;
        }
        match self.kernel.take_log() {
            Ok(mut log) => {
                // Ends with the process. A timer, since waiting for the ring buffer's descriptor is unsafe in tokio
                // and these lines are for a person who watches.
                let _forwarding = tokio::spawn(async move {
                    let mut timer = time::interval(PROGRAM_LOG);
                    loop {
                        let _now = timer.tick().await;
                        log.flush();
                    }
                });
            }
            Err(error) => warn!(%error, "the programs' own log is not available"),
        }
    }
}

/// The addresses of this network namespace's interfaces.
///
/// None if they cannot be read: node ports then answer on the addresses of the Node object.
#[must_use]
pub fn interface_addresses() -> Vec<IpAddr> {
    let addresses = match nix::ifaddrs::getifaddrs() {
        Ok(addresses) => addresses,
        Err(error) => {
            debug!(%error, "cannot read the interfaces' addresses");
            return Vec::new();
        }
    };
    let mut found: Vec<IpAddr> = addresses
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}
