//! Background sweeps for stale sockets.
//!
//! [`Sweeps`] decides when, [`lb_core::stale`] which sockets are stale; this connects them to the kernel.

use std::{collections::BTreeMap, path::Path};

use lb_core::{
    model::ServiceKey,
    stale::{Fate, Flow, Flows, Search},
    state::State,
};
use lb_kernel::{
    self, Observations,
    sockets::{self, Destroyed, Found, SocketError, SocketFilter, SocketTable},
};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{self, Instant},
};
use tracing::{info, warn};

use crate::{
    controller::sweep::{self, End, Reclaim, Recount, Sweeps},
    telemetry::Metrics,
};

pub(super) struct Sweep {
    options: lb_kernel::Options,
    observations: Observations,
    timing: Sweeps,
    reclaim: Reclaim,
    recount: Recount,
    phase: Phase,
    /// The last problem logged.
    problem: Option<String>,
    has_logged_refused: bool,
}

enum Phase {
    Resting,
    Reading {
        task: JoinHandle<Result<Records, SocketError>>,
    },
    Finding {
        search: Search,
        task: JoinHandle<Result<Found, SocketError>>,
    },
    /// The service of each flow, and whether there are more sockets to destroy.
    Destroying {
        services: BTreeMap<Flow, Option<ServiceKey>>,
        has_more: bool,
        task: JoinHandle<Result<Destroyed, SocketError>>,
    },
}

pub(super) enum Step {
    Due,
    Records(Result<Records, Problem>),
    Found(Result<Found, Problem>),
    Destroyed(Result<Destroyed, Problem>),
}

pub(super) struct Records {
    used: Flows,
    reclaim: Reclaim,
    recount: Recount,
    n_reclaimed: usize,
}

/// Reads the records of all sockets, corrects counts of connections, and reclaims lost slots.
fn read_records(
    pin_path: &Path,
    observations: &Observations,
    mut reclaim: Reclaim,
    mut recount: Recount,
) -> Result<Records, SocketError> {
    let mut table = SocketTable::open(pin_path)?;
    let (records, now) = (table.answering()?, Instant::now().into_std());
    let used = sweep::used(&records);
    if recount.is_due(now) {
        let (open, counted) = (sweep::open_connections(&records), observations.loads().collect());
        observations.correct_loads(&recount.compared(&open, &counted, now));
    }
    let mut n_reclaimed = 0;
    if reclaim.wants_listing(table.n_owned(), now)
        && let Some(owners) = sockets::owners(pin_path)?
    {
        n_reclaimed = table.free(&reclaim.looked(owners, now));
    }
    Ok(Records { used, reclaim, recount, n_reclaimed })
}

/// An error's text, and whether it will recur each time.
pub(super) struct Problem {
    text: String,
    is_final: bool,
}

impl From<SocketError> for Problem {
    fn from(error: SocketError) -> Self {
        Self { text: error.to_string(), is_final: error.is_final() }
    }
}

async fn joined<T>(task: &mut JoinHandle<Result<T, SocketError>>) -> Result<T, Problem> {
    match task.await {
        Ok(result) => result.map_err(Problem::from),
        Err(stopped) => Err(Problem { text: stopped.to_string(), is_final: false }),
    }
}

impl Sweep {
    pub(super) fn new(options: lb_kernel::Options, observations: Observations) -> Self {
        Self {
            options,
            observations,
            timing: Sweeps::default(),
            reclaim: Reclaim::default(),
            recount: Recount::default(),
            phase: Phase::Resting,
            problem: None,
            has_logged_refused: false,
        }
    }

    /// A sync has changed the tables.
    pub(super) fn changed(&mut self) {
        self.timing.changed(Instant::now().into_std());
    }

    /// Waits for the next step, which [`Self::advance`] takes. Cancel safe.
    pub(super) async fn step(&mut self) -> Step {
        match (&mut self.phase, self.timing.due()) {
            (Phase::Reading { task }, _) => Step::Records(joined(task).await),
            (Phase::Finding { task, .. }, _) => Step::Found(joined(task).await),
            (Phase::Destroying { task, .. }, _) => Step::Destroyed(joined(task).await),
            (Phase::Resting, Some(due)) => {
                time::sleep_until(due.into()).await;
                Step::Due
            }
            (Phase::Resting, None) => std::future::pending().await,
        }
    }

    pub(super) fn advance(&mut self, step: Step, state: &mut State, metrics: &Metrics) {
        let end = match (std::mem::replace(&mut self.phase, Phase::Resting), step) {
            (Phase::Reading { .. }, Step::Records(looked)) => looked.map(|looked| self.search(looked, state)),
            (Phase::Finding { search, .. }, Step::Found(found)) => {
                found.and_then(|found| self.destroy_stale(&search, found, state))
            }
            (Phase::Destroying { services, has_more, .. }, Step::Destroyed(destroyed)) => {
                destroyed.and_then(|destroyed| self.tell(destroyed, &services, has_more, state, metrics))
            }
            // Steps match their phases. If one does not, the next sweep starts from scratch.
            _ => {
                self.start(state);
                Ok(None)
            }
        };
        let end = match end {
            Ok(Some(end)) => end,
            Ok(None) => return,
            Err(Problem { text, is_final }) => {
                self.tell_problem(text);
                if is_final { End::Impossible } else { End::Failed }
            }
        };
        self.timing.ended(Instant::now().into_std(), end);
    }

    fn start(&mut self, state: &mut State) {
        self.timing.begin(Instant::now().into_std());
        state.begin_stale_search();
        // If the task fails, both start from scratch.
        let (reclaim, recount) = (std::mem::take(&mut self.reclaim), std::mem::take(&mut self.recount));
        let (pin_path, observations) = (self.options.pin_path.clone(), self.observations.clone());
        let read = move || read_records(&pin_path, &observations, reclaim, recount);
        self.phase = Phase::Reading { task: spawn_blocking(read) };
    }

    /// Starts to search for sockets. Returns how the sweep ends if there is nothing to search for.
    fn search(&mut self, looked: Records, state: &mut State) -> Option<End> {
        let Records { used, reclaim, recount, n_reclaimed } = looked;
        (self.reclaim, self.recount) = (reclaim, recount);
        if n_reclaimed > 0 {
            info!(
                n_slots = n_reclaimed,
                "reclaimed slots of sockets that were closed while sock_release was detached"
            );
        }
        let now = Instant::now().into_std();
        let Some(search) = state.search_stale(&used, now) else {
            return Some(End::Done(state.next_stale_due(now)));
        };
        let lb_kernel::Options { pin_path, cgroup, .. } = self.options.clone();
        let Search { protocols, endpoints, addresses } = search.clone();
        let wanted = SocketFilter { protocols, endpoints, addresses };
        let task = spawn_blocking(move || sockets::find(&pin_path, &cgroup, &wanted));
        self.phase = Phase::Finding { search, task };
        None
    }

    /// Starts to destroy the stale ones among the sockets found. Returns how the sweep ends if there are
    /// none.
    fn destroy_stale(
        &mut self,
        search: &Search,
        found: Found,
        state: &mut State,
    ) -> Result<Option<End>, Problem> {
        if found.n_refused > 0 && !std::mem::replace(&mut self.has_logged_refused, true) {
            warn!(
                n_refused = found.n_refused,
                "network namespaces of other processes cannot be entered: their stale sockets stay connected; it takes \
                 CAP_SYS_ADMIN and CAP_SYS_PTRACE"
            );
        }
        let now = Instant::now().into_std();
        let standings = state.decide_stale(search, &sweep::ways(&found.sockets), now);
        let (due, has_more) = sweep::due_now(found.sockets, &standings, now, sweep::BATCH);
        if !has_more {
            state.finish_stale_search(search, now);
        }
        if let Some(problem) = found.problem.map(Problem::from) {
            if due.is_empty() {
                return Err(problem);
            }
            self.tell_problem(problem.text);
        }
        if due.is_empty() {
            return Ok(Some(End::Done(state.next_stale_due(now))));
        }
        let services = standings
            .into_iter()
            .filter_map(|(used, standing)| match standing {
                Fate::Ends { service, .. } => Some((used, service)),
                Fate::Serves | Fate::Kept => None,
            })
            .collect();
        let pin_path = self.options.pin_path.clone();
        let task = spawn_blocking(move || sockets::destroy(&pin_path, due));
        self.phase = Phase::Destroying { services, has_more, task };
        Ok(None)
    }

    /// Logs and counts the destroyed sockets, by service.
    fn tell(
        &mut self,
        destroyed: Destroyed,
        services: &BTreeMap<Flow, Option<ServiceKey>>,
        has_more: bool,
        state: &mut State,
        metrics: &Metrics,
    ) -> Result<Option<End>, Problem> {
        let mut counts = BTreeMap::<_, u64>::new();
        for used in destroyed.sockets.iter().map(sweep::way) {
            let service = services.get(&used).cloned().flatten();
            let (called, is_new) = (used.service.unwrap_or(used.endpoint), used.service.is_none());
            *counts.entry((service.ok_or(called), used.protocol, is_new)).or_default() += 1;
        }
        for ((service, protocol, is_new), n_sockets) in counts {
            let service = match service {
                Ok(key) => key.to_string(),
                Err(address) => address.to_string(),
            };
            if is_new {
                info!(service, %protocol, n_sockets, "destroyed sockets that were connected before the address belonged to a service");
            } else {
                info!(service, %protocol, n_sockets, "destroyed sockets whose endpoint no longer serves the service");
            }
            metrics.destroyed(protocol, n_sockets);
        }
        if let Some(problem) = destroyed.problem {
            return Err(problem.into());
        }
        self.problem = None;
        let next = state.next_stale_due(Instant::now().into_std());
        Ok(Some(if has_more { End::More } else { End::Done(next) }))
    }

    /// Logs once why stale sockets stay.
    fn tell_problem(&mut self, problem: String) {
        if self.problem.as_ref() != Some(&problem) {
            warn!(
                %problem,
                "stale sockets stay connected until their programs reconnect"
            );
        }
        self.problem = Some(problem);
    }
}
