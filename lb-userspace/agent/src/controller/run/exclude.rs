//! Keeping the map of excluded cgroups up to date, beside the agent's loop: to look through a node's cgroups takes longer than a
//! change may wait. What is excluded is not said before a call has shown it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lb_kernel::{
    KernelError,
    exclusion::{Exclusion, Hierarchy, Place},
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

/// How often the cgroups are looked through, since they come and go: a pod's is made some time after the pod is known, and one
/// that was removed and made again has another id.
const INTERVAL: Duration = Duration::from_secs(1);
/// The time to the next call if one has not shown that a cgroup is excluded.
const RETRY: Duration = Duration::from_secs(10);

/// The UIDs of the pods to exclude; `None` until that is known: what an earlier agent excluded stays so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted(Option<BTreeSet<Arc<str>>>);

impl Wanted {
    /// Takes over what a source says. Returns whether that is new.
    pub(super) fn follow(&mut self, pods: Option<&BTreeSet<Arc<str>>>) -> bool {
        let differs = pods.is_some() && pods != self.0.as_ref();
        if differs {
            self.0 = pods.cloned();
        }
        differs
    }
}

/// Starts to follow, if there is anything that could be excluded. Ends with the value returned.
///
/// # Errors
///
/// If the maps cannot be opened.
pub(super) fn start(
    maps_path: &Path,
    options: &Options,
    wanted: watch::Receiver<Wanted>,
    vitals: watch::Receiver<Vitals>,
) -> Result<JoinSet<()>, RunError> {
    let mut task = JoinSet::new();
    let mut map = Exclusion::open(maps_path)?;
    if !options.kernel.excludes {
        // An earlier agent may have excluded some.
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
    /// Whether a source will say which pods.
    has_pods: bool,
    /// What the map holds.
    excluded: BTreeMap<Place, Excluded>,
    /// What is in the log already, by directory.
    problems: BTreeMap<PathBuf, String>,
    failed: Option<String>,
    /// A call that is left alone proves something only while others are seen to be served.
    vitals: watch::Receiver<Vitals>,
    /// Whether a call from the agent's own cgroup was left alone: what programs, tables and the counting of levels come to.
    is_proven_by_own_cgroup: bool,
}

/// A cgroup that is excluded.
struct Excluded {
    directory: PathBuf,
    /// When a call is next to show that it is; `None` once one has.
    proof_due: Option<Instant>,
    /// Why none has, if it is in the log already.
    doubt: Option<String>,
}

async fn follow(mut follower: Follower, mut wanted: watch::Receiver<Wanted>) {
    let mut timer = interval(INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _now = timer.tick() => {}
            changed = wanted.changed() => if changed.is_err() { return },
        }
        let now = wanted.borrow_and_update().clone();
        let looked = spawn_blocking(move || {
            follower.look(&now);
            follower
        });
        match looked.await {
            Ok(same) => follower = same,
            Err(error) => return warn!(%error, "excluded cgroups are no longer followed: restart the agent"),
        }
        follower.prove().await;
    }
}

impl Follower {
    /// Brings the map up to date.
    fn look(&mut self, Wanted(uids): &Wanted) {
        if self.has_pods && uids.is_none() {
            return;
        }
        let hierarchy = match self.hierarchy.take().map_or_else(Hierarchy::find, Ok) {
            Ok(hierarchy) => &*self.hierarchy.insert(hierarchy),
            Err(error) => return self.tell_failure(&error),
        };
        let mut places = uids.as_ref().map(|uids| hierarchy.pods(uids)).unwrap_or_default();
        let found: Vec<_> = self
            .directories
            .iter()
            .map(|directory| (directory.clone(), hierarchy.place_of(directory)))
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

    fn write(&mut self, places: BTreeMap<Place, PathBuf>) {
        if let Err(error) = self.map.set(&places.keys().copied().collect()) {
            return self.tell_failure(&error);
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

    /// Has calls show of the cgroups that are new that they are excluded, one after the other for as long as the next look can wait,
    /// and says so.
    async fn prove(&mut self) {
        let started = Instant::now();
        let is_due = |excluded: &Excluded| excluded.proof_due.is_some_and(|due| due <= started);
        let due = self.excluded.iter().filter(|(_, excluded)| is_due(excluded));
        let due: Vec<Place> = due.map(|(place, _)| *place).collect();
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
                SelfTest::Off => Exempt::NotMade("--self-test-interval=0 turns such calls off".to_owned()),
                _ => match self_test::run_below_excluded(&directory).await {
                    Exempt::NotMade(why) => self.prove_by_own_cgroup(&why).await,
                    made => made,
                },
            };
            let Some(excluded) = self.excluded.get_mut(&place) else { continue };
            match outcome {
                Exempt::LeftAlone => (n_proven, excluded.proof_due) = (n_proven + 1, None),
                Exempt::Failed(why) | Exempt::NotMade(why) => excluded.tell_doubt(why),
            }
        }
        if n_proven > 0 {
            info!(n_cgroups = n_proven, "calls from these cgroups are left alone");
        }
    }

    /// Excludes the agent's own cgroup for as long as a call takes: where no other can be entered, since the hierarchy is mounted
    /// to be read only. What else the agent connects to meanwhile goes where it says. Once is enough.
    async fn prove_by_own_cgroup(&mut self, why_not_below: &str) -> Exempt {
        if self.is_proven_by_own_cgroup {
            return Exempt::LeftAlone;
        }
        let not_made =
            |why: String| Exempt::NotMade(format!("{why_not_below}; from the agent's own cgroup: {why}"));
        let own = match block_in_place(|| self.hierarchy.as_ref().map(Hierarchy::own_place)) {
            Some(Ok(own)) => own,
            Some(Err(error)) => return not_made(error.to_string()),
            None => return Exempt::NotMade(why_not_below.to_owned()),
        };
        let usual: BTreeSet<Place> = self.excluded.keys().copied().collect();
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

    /// Says once what keeps a cgroup from being excluded.
    fn tell(&mut self, directory: PathBuf, problem: String) {
        if self.problems.get(&directory) != Some(&problem) {
            warn!(cgroup = %directory.display(), %problem, "--exclude-cgroup: not excluded, until it is there");
            let _before = self.problems.insert(directory, problem);
        }
    }

    fn tell_failure(&mut self, error: &KernelError) {
        let problem = error.to_string();
        if self.failed.as_ref() != Some(&problem) {
            warn!(%problem, "cgroups cannot be excluded: their calls are served, trying again");
        }
        self.failed = Some(problem);
    }
}

impl Excluded {
    /// Says once why it is not known whether calls are left alone, and has it tried again.
    fn tell_doubt(&mut self, problem: String) {
        self.proof_due = Some(Instant::now() + RETRY);
        if self.doubt.as_ref() != Some(&problem) {
            warn!(
                cgroup = %self.directory.display(),
                %problem,
                "a cgroup is excluded, but no call has shown that its calls are left alone: let the agent write to the cgroup \
                 hierarchy, or run in a cgroup of its own; `socklb check` names other programs on the same hooks"
            );
        }
        self.doubt = Some(problem);
    }
}

/// A change to the map that is undone with this value. What an agent that is killed leaves, the next one finds and removes.
struct Moment<'a> {
    map: &'a mut Exclusion,
    usual: BTreeSet<Place>,
}

impl Drop for Moment<'_> {
    fn drop(&mut self) {
        // The next look, within a second, would find and tell what keeps it from being undone.
        let _tried_again = self.map.set(&self.usual);
    }
}
