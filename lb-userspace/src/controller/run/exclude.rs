//! Keeping the map of excluded cgroups up to date, beside the agent's loop: to look through a node's cgroups takes longer than a
//! change may wait. What is excluded is not said before a call has shown it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::{JoinSet, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{info, warn};

use super::{Options, RunError};
use crate::{
    kernel::{
        KernelError,
        exclusion::{Exclusion, Hierarchy, Place},
    },
    self_test::{self, Exempt},
    telemetry::health::{SelfTest, Vitals},
};

/// How often the cgroups are looked through, since they come and go: a pod's is made some time after the pod is known, and one
/// that was removed and made again has another id.
const INTERVAL: Duration = Duration::from_secs(1);
/// The time to the next calls if those made have not shown that a cgroup is excluded.
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
        proof_due: Instant::now(),
        doubt: None,
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
    proof_due: Instant,
    /// What keeps calls from proving it, if it is in the log already.
    doubt: Option<String>,
}

struct Excluded {
    directory: PathBuf,
    /// Whether a call has shown that it is.
    is_proven: bool,
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
            Err(error) => return warn!(%error, "excluded cgroups are no longer followed"),
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
                        info!(cgroup = %directory.display(), "is there now, and excluded");
                    }
                    let _same_cgroup = places.insert(place, directory);
                }
                Err(error) => self.tell(directory, error.to_string()),
            }
        }
        self.write(places);
    }

    fn write(&mut self, places: BTreeMap<Place, PathBuf>) {
        let changed = self.map.set(&places.keys().copied().collect());
        match changed {
            Ok(_) => {
                let before = std::mem::take(&mut self.excluded);
                let was_proven = |place| before.get(&place).is_some_and(|before| before.is_proven);
                let excluded = places
                    .into_iter()
                    .map(|(place, directory)| (place, Excluded { directory, is_proven: was_proven(place) }));
                self.excluded = excluded.collect();
                if self.excluded.keys().any(|place| !before.contains_key(place)) {
                    self.proof_due = Instant::now();
                }
                self.failed = None;
            }
            Err(error) => self.tell_failure(&error),
        }
    }

    /// Lets a call prove of each cgroup that is new that it is excluded, and says so.
    async fn prove(&mut self) {
        let new = self.excluded.iter().filter(|(_, excluded)| !excluded.is_proven);
        let new: Vec<(Place, PathBuf)> =
            new.map(|(place, excluded)| (*place, excluded.directory.clone())).collect();
        if new.is_empty() || Instant::now() < self.proof_due {
            return;
        }
        let self_test = self.vitals.borrow().self_test.clone();
        match self_test {
            SelfTest::Passed => {}
            SelfTest::Pending | SelfTest::Failed(_) => return,
            SelfTest::Off => {
                return self.tell_doubt("--self-test-interval=0 turns such calls off".to_owned());
            }
        }
        let (mut n_proven, mut by_own, mut doubt) = (0usize, None, None);
        for (place, directory) in new {
            let mut outcome = self_test::run_below_excluded(&directory).await;
            if let Exempt::NotMade(why) = outcome {
                // The same programs, tables and counting of levels: once for all of them.
                let own = match by_own.take() {
                    Some(known) => known,
                    None => self.prove_by_own_cgroup(why).await,
                };
                outcome = by_own.insert(own).clone();
            }
            match (outcome, self.excluded.get_mut(&place)) {
                (Exempt::LeftAlone, Some(excluded)) => (n_proven, excluded.is_proven) = (n_proven + 1, true),
                (Exempt::Failed(why) | Exempt::NotMade(why), _) => {
                    doubt = Some(format!("{}: {why}", directory.display()));
                }
                (Exempt::LeftAlone, None) => {}
            }
        }
        if n_proven > 0 {
            info!(n_cgroups = n_proven, "calls from these cgroups are left alone");
        }
        match doubt {
            Some(doubt) => self.tell_doubt(doubt),
            None => self.doubt = None,
        }
    }

    /// Excludes the agent's own cgroup for as long as a call takes: where no other can be entered, since the hierarchy is mounted
    /// to be read only. What else the agent connects to meanwhile goes where it says.
    async fn prove_by_own_cgroup(&mut self, why_not_below: String) -> Exempt {
        let Some(Ok(own)) = self.hierarchy.as_ref().map(Hierarchy::own_place) else {
            return Exempt::NotMade(why_not_below);
        };
        let usual: BTreeSet<Place> = self.excluded.keys().copied().collect();
        let map = &mut self.map;
        self_test::run_excluded(|| {
            let moment = Moment { map, usual };
            let with_own = moment.usual.iter().copied().chain([own]).collect();
            moment.map.set(&with_own).map_err(|error| error.to_string())?;
            Ok(moment)
        })
        .await
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
            warn!(%problem, "cgroups cannot be excluded");
        }
        self.failed = Some(problem);
    }

    /// Says once why it is not known whether calls are left alone, and has it tried again.
    fn tell_doubt(&mut self, problem: String) {
        self.proof_due = Instant::now() + RETRY;
        if self.doubt.as_ref() != Some(&problem) {
            warn!(
                %problem,
                "cgroups are excluded, but no call has shown that they are left alone: let the agent write to the cgroup hierarchy, \
                 or run in a cgroup of its own; `socklb check` names other programs on the same hooks"
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
