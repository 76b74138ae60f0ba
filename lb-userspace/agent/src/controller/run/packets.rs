//! Keeps the rules for packets in the kernel.
//!
//! Transactions run one after the other on a blocking thread, in the order of the syncs. After a failure,
//! after the start, and when an audit finds that another program has committed changes, the whole tables are
//! read and compared instead.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io, mem,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use lb_core::{
    desired::{FrontendAddress, PacketMode},
    model::Protocol,
    packets::{
        self, Stale, conntrack,
        nft::{Change, Element, Family, Key, Table, TableId, Transaction},
    },
    state::State,
};
use lb_kernel::{
    conntrack::Conntrack,
    conntrack_settings,
    nftables::{self, Nftables, NftablesError},
    pins,
};
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::{self, MissedTickBehavior},
};
use tracing::{debug, info, warn};

use crate::{
    serve::{LastTransaction, PacketStatus},
    telemetry::Metrics,
};

/// Time before a failed change is retried.
const RETRY: Duration = Duration::from_secs(1);

/// Time between two calls of `State::settle_packets`: more than any packet is on its way through the rules.
const SETTLE: Duration = Duration::from_millis(100);

/// Time between two questions for the generation of nftables, which the kernel answers within microseconds.
/// Its notifications would come sooner, but would make transactions of all programs slower (decision 0017).
const LOOK: Duration = Duration::from_millis(100);

/// How often tables are compared anew because another program commits changes meanwhile.
const MAX_TRIES: usize = 8;

/// What the blocking thread does.
#[derive(Debug)]
pub(super) enum Work {
    Apply(Transaction),
    /// Makes the kernel's tables like these, unless they and the pins here were removed: by `socklb cleanup`.
    Adopt(BTreeMap<TableId, Table>, PathBuf),
    /// Compares the generation alone: whether another program has committed changes.
    Check,
    /// Reads what the kernel has recorded about endpoints.
    Read(Stale),
    /// Deletes records, unless they are gone already.
    Forget(Vec<Client>, Vec<conntrack::Entry>),
}

/// The table and map of an element that records a client, and its key.
type Client = (TableId, &'static str, Key);

/// The numbers of the tables in the kernel: a table that is deleted and added has another one.
type Handles = Vec<Option<u64>>;

/// How work has ended.
#[derive(Debug)]
pub(super) enum Done {
    /// The kernel has made these changes.
    Applied {
        n_changes: usize,
        took: Duration,
        /// `None` if another program has committed changes too.
        generation: Option<u32>,
        /// Frontends of UDP and SCTP that the tables had when they were compared, and have no more.
        removed: BTreeSet<FrontendAddress>,
        /// Of the tables, if they were compared as a whole.
        handles: Option<Handles>,
    },
    Checked {
        generation: u32,
    },
    /// `socklb cleanup` has removed the tables.
    CleanedUp,
    Read {
        clients: Vec<(TableId, &'static str, BTreeMap<Key, Element>)>,
        flows: Vec<conntrack::Entry>,
    },
    Forgotten {
        n_clients: usize,
        n_flows: usize,
    },
}

pub(super) struct PacketRules {
    mode: PacketMode,
    pin_path: PathBuf,
    /// `None` while a task has it, and where the kernel has no nftables.
    nftables: Option<Nftables>,
    running: Option<JoinHandle<Worked>>,
    queue: VecDeque<Work>,
    /// What is read once the queue is empty: reading takes longer than changes may follow each other.
    stale: Stale,
    /// The generation after the last change, if the tables are known to be as they ought to be.
    generation: Option<u32>,
    /// Looks for changes of other programs; `None` if no audit does.
    watch: Option<Watch>,
    /// Whether the tables must be compared as a whole.
    must_adopt: bool,
    /// When that is tried again.
    retry_at: Option<Instant>,
    /// When frontends are deleted from sets that they have left.
    settle_at: Option<Instant>,
    status: PacketStatus,
}

/// What a kernel that can have the rules offers. Made before anything is attached.
pub(super) struct Probed {
    nftables: Nftables,
    /// Why the kernel cannot have rules for IPv6.
    lacks_ipv6: Option<NftablesError>,
}

impl Probed {
    /// Opens nftables in the network namespace of the calling thread. `None` with [`PacketMode::Off`].
    /// Changes nothing.
    ///
    /// # Errors
    ///
    /// If the kernel cannot have rules for IPv4.
    pub(super) fn new(mode: PacketMode) -> Result<Option<Self>, NftablesError> {
        if mode == PacketMode::Off {
            return Ok(None);
        }
        let nftables = Nftables::open()?;
        nftables::probe(Family::V4)?;
        Ok(Some(Self { nftables, lacks_ipv6: nftables::probe(Family::V6).err() }))
    }
}

impl PacketRules {
    /// Leaves out of `state` the family for which the kernel cannot have rules. Without `probed`, removes
    /// tables that an agent with another setting has left.
    pub(super) fn start(state: &mut State, probed: Option<Probed>, pin_path: &Path) -> Self {
        let mut rules = Self {
            mode: state.settings().packets,
            pin_path: pin_path.to_owned(),
            nftables: None,
            running: None,
            queue: VecDeque::new(),
            stale: Stale::default(),
            generation: None,
            watch: None,
            must_adopt: true,
            retry_at: None,
            settle_at: None,
            status: PacketStatus::default(),
        };
        let Some(Probed { nftables, lacks_ipv6 }) = probed else {
            remove_former_tables();
            return rules;
        };
        rules.nftables = Some(nftables);
        if let Some(error) = lacks_ipv6 {
            warn!(%error, "IPv6 packets are not served");
            state.leave_out_packets(Family::V6);
        }
        rules.status.tables = state.packets().ids().map(|id| id.to_string()).collect();
        for (setting, changed) in conntrack_settings::apply() {
            let name = format!("net.netfilter.nf_conntrack_{}", setting.name);
            match changed {
                Ok((before, now)) => info!(name, before, now, "changed a setting, as kube-proxy does"),
                Err(error) => warn!(
                    name,
                    bound = ?setting.bound,
                    %error,
                    "a setting cannot be changed: set it on the host (sysctl)"
                ),
            }
        }
        rules
    }

    /// Looks from now on whether other programs delete tables, so that an audit need not find it. Changes
    /// inside the tables are left to audits.
    pub(super) fn watch(&mut self) {
        if self.mode == PacketMode::Off {
            return;
        }
        match Watch::start() {
            Ok(watch) => self.watch = Some(watch),
            Err(error) => warn!(%error, "tables that other programs delete are found by audits alone"),
        }
    }

    /// Puts the changes of a sync into the queue.
    pub(super) fn changed(&mut self, state: &mut State) {
        if self.mode == PacketMode::Off {
            return;
        }
        (self.status.n_frontends, self.status.n_elements) = state.packets().sizes();
        if self.must_adopt {
            self.adopt(state);
        } else {
            let transaction = state.take_packet_changes();
            if !transaction.changes.is_empty() {
                self.queue.push_back(Work::Apply(transaction));
            }
        }
        if state.packets().has_leaving() && self.settle_at.is_none() {
            self.settle_at = Some(Instant::now() + SETTLE);
        }
        self.stale.merge(state.take_stale_packet_records());
        self.proceed();
    }

    /// Starts to look for changes of other programs.
    pub(super) fn audit(&mut self, state: &mut State) {
        if self.mode == PacketMode::Off || self.must_adopt || !self.queue.is_empty() || self.running.is_some()
        {
            return;
        }
        match self.generation {
            Some(_) => self.queue.push_back(Work::Check),
            None => self.adopt(state),
        }
        self.proceed();
    }

    /// Waits for the end of the running work, or until something is due; never resolves without either.
    pub(super) async fn next(&mut self) -> Event {
        if let Some(running) = &mut self.running {
            let result = running.await;
            self.running = None;
            return Event::Ended(result.map_err(|stopped| stopped.to_string()));
        }
        let (retry_at, settle_at) = (self.retry_at, self.settle_at);
        let timer = async {
            let (due, event) = match (retry_at, settle_at) {
                (Some(due), _) => (due, Event::RetryDue),
                (None, Some(due)) => (due, Event::SettleDue),
                (None, None) => std::future::pending().await,
            };
            time::sleep_until(due.into()).await;
            event
        };
        tokio::select! {
            event = timer => event,
            () = Watch::changed(&mut self.watch), if !self.must_adopt => Event::GenerationChanged,
        }
    }

    /// Carries on after an event. Returns whether the status has changed.
    pub(super) fn advance(&mut self, event: Event, state: &mut State, metrics: &Metrics) -> bool {
        let (work, result) = match event {
            Event::RetryDue => {
                self.retry_at = None;
                self.adopt(state);
                self.proceed();
                return false;
            }
            Event::SettleDue => {
                self.settle_at = None;
                state.settle_packets();
                self.changed(state);
                return false;
            }
            Event::GenerationChanged => {
                self.look(state);
                return false;
            }
            Event::Ended(Ok((nftables, work, result))) => {
                self.nftables = nftables;
                (Some(work), result.map_err(|error| error.to_string()))
            }
            Event::Ended(Err(stopped)) => (None, Err(stopped)),
        };
        let before = self.status.clone();
        match result {
            Ok(Done::Applied { n_changes, took, generation, removed, handles }) => {
                self.stale.removed.extend(removed);
                let is_whole = matches!(work, Some(Work::Adopt(..)));
                if is_whole && self.status.last.is_some() && n_changes > 0 {
                    warn!(n_changes, "repaired nftables rules that another program had changed");
                }
                if n_changes > 0 {
                    metrics.packets_changed(took);
                }
                debug!(n_changes, ?took, is_whole, "changed the nftables rules");
                self.generation = generation;
                if let (Some(watch), Some(handles)) = (&mut self.watch, handles) {
                    watch.handles = handles;
                }
                self.status.problem = None;
                if n_changes > 0 || self.status.last.is_none() {
                    self.status.last = Some(LastTransaction { n_changes, took, at: SystemTime::now() });
                }
            }
            Ok(Done::CleanedUp) => {
                (self.must_adopt, self.generation) = (true, None);
                self.status.problem = None;
            }
            Ok(Done::Checked { generation }) if Some(generation) == self.generation => {}
            Ok(Done::Checked { .. }) => self.adopt(state),
            Ok(Done::Read { clients, mut flows }) => {
                let former = clients.iter().flat_map(|(id, map, elements)| {
                    let keys = state.packets().stale_clients(id.family, elements);
                    keys.into_iter().map(|key| (id.clone(), *map, key))
                });
                let former: Vec<_> = former.collect();
                let removed = match work {
                    Some(Work::Read(Stale { removed, .. })) => removed,
                    _ => BTreeSet::new(),
                };
                flows.retain(|flow| state.is_stale_flow(flow, &removed));
                if !former.is_empty() || !flows.is_empty() {
                    self.queue.push_front(Work::Forget(former, flows));
                }
            }
            Ok(Done::Forgotten { n_clients, n_flows }) => {
                if n_clients > 0 {
                    // The generation is unknown: an audit compares the tables.
                    self.generation = None;
                }
                debug!(n_clients, n_flows, "forgot clients and flows of endpoints that are gone");
            }
            Err(problem) => {
                if let Some(Work::Read(stale)) = work {
                    self.stale.merge(stale);
                }
                metrics.packets_failed();
                warn!(problem, "the nftables rules could not be changed: reading them and retrying");
                self.status.problem = Some(problem.into());
                (self.must_adopt, self.generation) = (true, None);
                self.retry_at = Some(Instant::now() + RETRY);
            }
        }
        self.proceed();
        self.status != before
    }

    pub(super) fn status(&self) -> Option<&PacketStatus> {
        (self.mode != PacketMode::Off).then_some(&self.status)
    }

    /// Compares the tables with what is desired now, of which all earlier changes are part.
    fn adopt(&mut self, state: &mut State) {
        self.must_adopt = false;
        self.queue.clear();
        self.queue.push_back(Work::Adopt(state.adopt_packet_tables(), self.pin_path.clone()));
        // Changes before this may have left records.
        self.stale.merge(Stale::all());
    }

    /// Compares the tables at once if another program has deleted one, or put another in its place.
    fn look(&mut self, state: &mut State) {
        let (Some(watch), Some(nftables)) = (&mut self.watch, &mut self.nftables) else { return };
        if self.generation == Some(*watch.generation.borrow())
            || handles(nftables).is_ok_and(|found| found == watch.handles)
        {
            return;
        }
        watch.paused_until = Some(Instant::now() + RETRY);
        self.adopt(state);
        self.proceed();
    }

    fn proceed(&mut self) {
        if self.running.is_some() || self.retry_at.is_some() {
            return;
        }
        let read = || (self.stale != Stale::default()).then(|| Work::Read(mem::take(&mut self.stale)));
        let Some(work) = self.queue.pop_front().or_else(read) else { return };
        let (nftables, generation) = (self.nftables.take(), self.generation);
        self.running = Some(spawn_blocking(move || {
            // A task that panicked has taken it along.
            match nftables.map_or_else(Nftables::open, Ok) {
                Ok(mut nftables) => {
                    let result = run(&mut nftables, &work, generation);
                    (Some(nftables), work, result)
                }
                Err(error) => (None, work, Err(error)),
            }
        }));
    }
}

/// What [`PacketRules::advance`] reacts to.
pub(super) enum Event {
    /// Work has ended, with its result or why it has none.
    Ended(Result<Worked, String>),
    RetryDue,
    SettleDue,
    GenerationChanged,
}

/// The generation of nftables while it changes.
struct Watch {
    generation: watch::Receiver<u32>,
    /// Of the tables when they were compared last.
    handles: Handles,
    /// Two programs that delete each other's tables do so once a second.
    paused_until: Option<Instant>,
}

impl Watch {
    /// Starts a task that asks for the generation, in the network namespace of the calling thread.
    fn start() -> Result<Self, NftablesError> {
        let mut nftables = Nftables::open()?;
        let (sender, generation) = watch::channel(nftables.generation()?);
        let _ends_with_the_receiver = tokio::spawn(async move {
            let mut looks = time::interval(LOOK);
            looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            while !sender.is_closed() {
                looks.tick().await;
                match nftables.generation() {
                    Ok(now) => {
                        let _is_new = sender.send_if_modified(|before| mem::replace(before, now) != now);
                    }
                    Err(error) => {
                        warn!(%error, "tables that other programs delete are found by audits alone");
                        return;
                    }
                }
            }
        });
        Ok(Self { generation, handles: Handles::new(), paused_until: None })
    }

    /// Waits for a change; forever without a watch. Cancel safe.
    async fn changed(watch: &mut Option<Self>) {
        if let Some(Self { generation, paused_until, .. }) = watch {
            if let Some(until) = *paused_until {
                time::sleep_until(until.into()).await;
            }
            if generation.changed().await.is_ok() {
                return;
            }
        }
        *watch = None;
        std::future::pending::<()>().await;
    }
}

fn handles(nftables: &mut Nftables) -> Result<Handles, NftablesError> {
    packets::table_ids().iter().map(|id| nftables.handle(id)).collect()
}

type Worked = (Option<Nftables>, Work, Result<Done, NftablesError>);

fn run(nftables: &mut Nftables, work: &Work, known: Option<u32>) -> Result<Done, NftablesError> {
    let started = Instant::now();
    match work {
        Work::Check => Ok(Done::Checked { generation: nftables.generation()? }),
        Work::Read(stale) => read(nftables, stale),
        Work::Forget(clients, flows) => forget(nftables, clients, flows),
        Work::Apply(transaction) => {
            nftables.apply(transaction)?;
            let (n_changes, took) = (transaction.changes.len(), started.elapsed());
            // A transaction increases it by 1. If another program's came between, an audit compares the
            // tables.
            let generation = nftables.generation()?;
            let is_alone = known.is_some_and(|known| known.wrapping_add(1) == generation);
            let generation = is_alone.then_some(generation);
            Ok(Done::Applied { n_changes, took, generation, removed: BTreeSet::new(), handles: None })
        }
        Work::Adopt(tables, pin_path) => {
            let mut n_tries = 0;
            loop {
                if pins::are_gone(pin_path) && !has_any(nftables, tables)? {
                    return Ok(Done::CleanedUp);
                }
                match adopt(nftables, tables) {
                    Err(NftablesError::Changed) if n_tries < MAX_TRIES => n_tries += 1,
                    Ok(Adopted { n_changes, generation, removed }) => {
                        let (took, generation) = (started.elapsed(), Some(generation));
                        let handles = Some(handles(nftables)?);
                        return Ok(Done::Applied { n_changes, took, generation, removed, handles });
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

fn remove_former_tables() {
    // Without nftables there are no rules to remove.
    let Ok(mut nftables) = Nftables::open() else { return };
    match nftables.remove(&packets::table_ids()) {
        Ok(tables) if !tables.is_empty() => info!("removed the nftables rules of an agent with --packets"),
        Ok(_) | Err(NftablesError::Missing) => {}
        Err(error) => warn!(%error, "nftables rules of an earlier agent may be left"),
    }
}

fn read(nftables: &mut Nftables, stale: &Stale) -> Result<Done, NftablesError> {
    let (mut clients, mut flows) = (Vec::new(), Vec::new());
    for id in packets::table_ids().into_iter().filter(|_| stale.clients) {
        for map in packets::AFFINITY_MAPS {
            clients.push((id.clone(), map, nftables.elements(&id, map)?));
        }
    }
    if stale.flows {
        match flows_of_datagrams() {
            Ok(found) => flows = found,
            // Without it only these flows stay with their endpoint.
            Err(error) => warn!(%error, "flows of UDP to former endpoints may stay"),
        }
    }
    Ok(Done::Read { clients, flows })
}

fn flows_of_datagrams() -> io::Result<Vec<conntrack::Entry>> {
    let mut conntrack = Conntrack::open()?;
    let mut flows = Vec::new();
    for family in [Family::V4, Family::V6] {
        for protocol in [Protocol::Udp, Protocol::Sctp] {
            flows.append(&mut conntrack.entries(family, protocol)?);
        }
    }
    Ok(flows)
}

fn forget(
    nftables: &mut Nftables,
    clients: &[Client],
    flows: &[conntrack::Entry],
) -> Result<Done, NftablesError> {
    let (mut n_clients, mut n_flows) = (0, 0);
    for (id, map, key) in clients {
        let change = Change::DeleteElements((*map).into(), vec![key.clone()]);
        match nftables.apply(&Transaction { changes: vec![(id.clone(), change)], generation: None }) {
            Ok(()) => n_clients += 1,
            Err(error) if error.is_missing() => {}
            Err(error) => return Err(error),
        }
    }
    let mut conntrack = Conntrack::open().ok();
    for flow in flows {
        n_flows += usize::from(conntrack.as_mut().is_some_and(|open| open.delete(flow).unwrap_or(false)));
    }
    Ok(Done::Forgotten { n_clients, n_flows })
}

fn has_any(nftables: &mut Nftables, tables: &BTreeMap<TableId, Table>) -> Result<bool, NftablesError> {
    for id in tables.keys() {
        if nftables.has(id)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How tables were made like those that are desired.
struct Adopted {
    n_changes: usize,
    generation: u32,
    removed: BTreeSet<FrontendAddress>,
}

/// Makes the kernel's tables like these, if no other program commits changes meanwhile.
fn adopt(nftables: &mut Nftables, tables: &BTreeMap<TableId, Table>) -> Result<Adopted, NftablesError> {
    let (mut changes, mut generations, mut removed) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (id, wanted) in tables {
        let (found, generation) = nftables.read(id)?;
        generations.push(generation);
        let missing = packets::diff(found.as_ref(), wanted);
        if let Some(found) = found.filter(|_| !missing.is_empty()) {
            let mut former = packets::frontends_of(id.family, &found);
            let present = packets::frontends_of(id.family, wanted);
            former.retain(|at| at.protocol != Protocol::Tcp && !present.contains(at));
            removed.append(&mut former);
        }
        changes.extend(missing.into_iter().map(|change| (id.clone(), change)));
    }
    let Some(&first) = generations.first() else {
        return Ok(Adopted { n_changes: 0, generation: nftables.generation()?, removed });
    };
    if generations.iter().any(|generation| *generation != first) {
        return Err(NftablesError::Changed);
    }
    let n_changes = changes.len();
    if n_changes == 0 {
        return Ok(Adopted { n_changes, generation: first, removed });
    }
    nftables.apply(&Transaction { changes, generation: Some(first) })?;
    Ok(Adopted { n_changes, generation: first.wrapping_add(1), removed })
}
