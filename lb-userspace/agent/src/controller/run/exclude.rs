//! Keeps the map of excluded cgroups up to date, in the background: reading a node's cgroups takes longer
//! than a change may wait. A cgroup is logged as excluded only once a call has shown it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lb_kernel::{
    KernelError,
    exclusion::{CgroupPosition, Exclusion, Hierarchy},
};
use tokio::{
    sync::watch,
    task::{JoinSet, block_in_place, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{info, warn};

use super::{Options, RunError};
use crate::{
    self_test::{self, Exempt},
    telemetry::health::{SelfTest, Vitals},
};

/// How often the cgroups are read. A pod's cgroup is created some time after the pod is known, and a
/// recreated cgroup has another id.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time between a call that did not show the exclusion and the next.
const RETRY: Duration = Duration::from_secs(10);

/// The UIDs of the pods to exclude. `None` until known: then an earlier agent's exclusions stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ExcludedPods(Option<BTreeSet<Arc<str>>>);

impl ExcludedPods {
    /// Takes the source's pods. Returns whether they changed.
    pub(super) fn follow(&mut self, pods: Option<&BTreeSet<Arc<str>>>) -> bool {
        let differs = pods.is_some() && pods != self.0.as_ref();
        if differs {
            self.0 = pods.cloned();
        }
        differs
    }
}

/// Starts the task, if anything may be excluded. Dropping the returned set stops it.
///
/// # Errors
///
/// If the maps cannot be opened.
pub(super) fn start(
    maps_path: &Path,
    options: &Options,
    wanted: watch::Receiver<ExcludedPods>,
    vitals: watch::Receiver<Vitals>,
) -> Result<JoinSet<()>, RunError> {
    let mut task = JoinSet::new();
    let mut map = Exclusion::open(maps_path)?;
    if !options.kernel.excludes {
        // Removes an earlier agent's exclusions.
        let _changed = map.set(&BTreeSet::new())?;
        return Ok(task);
    }
    let follower = Follower {
        map,
        hierarchy: None,
        directories: options.exclude_cgroups.clone(),
        has_pods: options.exclude_pods,
        excluded: BTreeMap::new(),
        problems: BTreeMap::new(),
        failed: None,
        vitals,
        is_proven_by_own_cgroup: false,
    };
    let _aborted_on_drop = task.spawn(follow(follower, wanted));
    Ok(task)
}

struct Follower {
    map: Exclusion,
    /// `None` until it is found.
    hierarchy: Option<Hierarchy>,
    directories: Vec<PathBuf>,
    /// Whether a source names pods to exclude.
    has_pods: bool,
    excluded: BTreeMap<CgroupPosition, Excluded>,
    /// Problems already logged, by directory.
    problems: BTreeMap<PathBuf, String>,
    failed: Option<String>,
    /// A call that passes unchanged proves something only while the self-test passes.
    vitals: watch::Receiver<Vitals>,
    /// Whether a call from the agent's own cgroup passed unchanged. That proves programs, tables and the
    /// computed levels.
    is_proven_by_own_cgroup: bool,
}

struct Excluded {
    directory: PathBuf,
    /// When to make the next proving call; `None` once one has succeeded.
    proof_due: Option<Instant>,
    /// Why none has succeeded, if logged.
    doubt: Option<String>,
}

async fn follow(mut follower: Follower, mut wanted: watch::Receiver<ExcludedPods>) {
    let mut timer = interval(INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _now = timer.tick() => {}
            changed = wanted.changed() => if changed.is_err() { return },
        }
        let now = wanted.borrow_and_update().clone();
        let looked = spawn_blocking(move || {
            follower.update(&now);
            follower
        });
        match looked.await {
            Ok(same) => follower = same,
            Err(error) => return warn!(%error, "excluded cgroups are no longer updated: restart the agent"),
        }
        follower.prove().await;
    }
}

impl Follower {
    fn update(&mut self, ExcludedPods(uids): &ExcludedPods) {
        if self.has_pods && uids.is_none() {
            return;
        }
        let hierarchy = match self.hierarchy.take().map_or_else(Hierarchy::find, Ok) {
            Ok(hierarchy) => &*self.hierarchy.insert(hierarchy),
            Err(error) => return self.log_failure(&error),
        };
        let mut places = uids.as_ref().map(|uids| hierarchy.pods(uids)).unwrap_or_default();
        let found: Vec<_> = self
            .directories
            .iter()
            .map(|directory| (directory.clone(), hierarchy.position_of(directory)))
            .collect();
        for (directory, place) in found {
            match place {
                Ok(place) => {
                    if self.problems.remove(&directory).is_some() {
                        info!(cgroup = %directory.display(), "--exclude-cgroup: found and excluded");
                    }
                    let _same_cgroup = places.insert(place, directory);
                }
                Err(error) => self.tell(directory, error.to_string()),
            }
        }
        self.write(places);
    }

    fn write(&mut self, places: BTreeMap<CgroupPosition, PathBuf>) {
        if let Err(error) = self.map.set(&places.keys().copied().collect()) {
            return self.log_failure(&error);
        }
        self.failed = None;
        let mut before = std::mem::take(&mut self.excluded);
        let now = Some(Instant::now());
        let excluded = places.into_iter().map(|(place, directory)| {
            let new = || Excluded { directory, proof_due: now, doubt: None };
            (place, before.remove(&place).unwrap_or_else(new))
        });
        self.excluded = excluded.collect();
    }

    /// Proves new exclusions by calls, one after the other for at most [`INTERVAL`], and logs them.
    async fn prove(&mut self) {
        let started = Instant::now();
        let is_due = |excluded: &Excluded| excluded.proof_due.is_some_and(|due| due <= started);
        let due = self.excluded.iter().filter(|(_, excluded)| is_due(excluded));
        let due: Vec<CgroupPosition> = due.map(|(place, _)| *place).collect();
        let self_test = self.vitals.borrow().self_test.clone();
        if matches!(self_test, SelfTest::Pending | SelfTest::Failed(_)) {
            return;
        }
        let mut n_proven = 0usize;
        for place in due {
            if started.elapsed() >= INTERVAL {
                break;
            }
            let Some(directory) = self.excluded.get(&place).map(|excluded| excluded.directory.clone()) else {
                continue;
            };
            let outcome = match &self_test {
                SelfTest::Off => Exempt::NotMade("--self-test-interval=0 turns these calls off".to_owned()),
                _ => match self_test::run_below_excluded(&directory).await {
                    Exempt::NotMade(why) => self.prove_by_own_cgroup(&why).await,
                    made => made,
                },
            };
            let Some(excluded) = self.excluded.get_mut(&place) else { continue };
            match outcome {
                Exempt::LeftAlone => (n_proven, excluded.proof_due) = (n_proven + 1, None),
                Exempt::Failed(why) | Exempt::NotMade(why) => excluded.log_unproven(why),
            }
        }
        if n_proven > 0 {
            info!(n_cgroups = n_proven, "calls from these cgroups are excluded");
        }
    }

    /// Excludes the agent's own cgroup for the duration of one call. For hosts where it can enter no other
    /// cgroup, since the hierarchy is mounted read-only. The agent's other connections bypass services
    /// meanwhile. Done once.
    async fn prove_by_own_cgroup(&mut self, why_not_below: &str) -> Exempt {
        if self.is_proven_by_own_cgroup {
            return Exempt::LeftAlone;
        }
        let not_made =
            |why: String| Exempt::NotMade(format!("{why_not_below}; from the agent's own cgroup: {why}"));
        let own = match block_in_place(|| self.hierarchy.as_ref().map(Hierarchy::own_position)) {
            Some(Ok(own)) => own,
            Some(Err(error)) => return not_made(error.to_string()),
            None => return Exempt::NotMade(why_not_below.to_owned()),
        };
        let usual: BTreeSet<CgroupPosition> = self.excluded.keys().copied().collect();
        let map = &mut self.map;
        let exclude = || {
            let moment = Moment { map, usual };
            let with_own = moment.usual.iter().copied().chain([own]).collect();
            moment.map.set(&with_own).map_err(|error| error.to_string())?;
            Ok(moment)
        };
        match self_test::run_excluded(exclude).await {
            Exempt::NotMade(why) => not_made(why),
            outcome => {
                self.is_proven_by_own_cgroup = outcome == Exempt::LeftAlone;
                outcome
            }
        }
    }

    /// Logs once why a cgroup is not excluded.
    fn tell(&mut self, directory: PathBuf, problem: String) {
        if self.problems.get(&directory) != Some(&problem) {
            warn!(cgroup = %directory.display(), %problem, "--exclude-cgroup: not excluded until it exists");
            let _before = self.problems.insert(directory, problem);
        }
    }

    fn log_failure(&mut self, error: &KernelError) {
        let problem = error.to_string();
        if self.failed.as_ref() != Some(&problem) {
            warn!(%problem, "cgroups cannot be excluded: their calls are served; retrying");
        }
        self.failed = Some(problem);
    }
}

impl Excluded {
    /// Logs once why the exclusion is unproven, and schedules the next call.
    fn log_unproven(&mut self, problem: String) {
        self.proof_due = Some(Instant::now() + RETRY);
        if self.doubt.as_ref() != Some(&problem) {
            warn!(
                cgroup = %self.directory.display(),
                %problem,
                "a cgroup is excluded, but no call has shown that its calls bypass services: let the agent write to the cgroup \
                 hierarchy, or run in a cgroup of its own; `socklb check` names other programs on the same hooks"
            );
        }
        self.doubt = Some(problem);
    }
}

/// A change to the map, undone on drop. If the agent is killed, the next one removes it.
struct Moment<'a> {
    map: &'a mut Exclusion,
    usual: BTreeSet<CgroupPosition>,
}

impl Drop for Moment<'_> {
    fn drop(&mut self) {
        // On an error, the next update within a second writes the map again and logs why that fails.
        let _tried_again = self.map.set(&self.usual);
    }
}
