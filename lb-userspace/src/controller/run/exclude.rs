//! Keeping the map of excluded cgroups up to date, beside the agent's loop: to look through a node's cgroups takes longer than a
//! change may wait.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::{JoinSet, spawn_blocking},
    time::{MissedTickBehavior, interval},
};
use tracing::{info, warn};

use super::{Options, RunError};
use crate::kernel::{
    KernelError, cgroup,
    exclusion::{Exclusion, Place, place_of, pods},
};

/// How often the cgroups are looked through, since they come and go: a pod's is made some time after the pod is known, and one
/// that was removed and made again has another id.
const INTERVAL: Duration = Duration::from_secs(1);

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
) -> Result<JoinSet<()>, RunError> {
    let mut task = JoinSet::new();
    let mut map = Exclusion::open(maps_path)?;
    if !options.kernel.excludes {
        // An earlier agent may have excluded some.
        let _changed = map.set(&BTreeSet::new())?;
        return Ok(task);
    }
    let root = cgroup::find_root().or_else(|_part_of_it| cgroup::find_any())?;
    let follower = Follower {
        map,
        root,
        directories: options.exclude_cgroups.clone(),
        has_pods: options.exclude_pods,
        problems: BTreeMap::new(),
        failed: None,
    };
    let _aborted_on_drop = task.spawn(follow(follower, wanted));
    Ok(task)
}

struct Follower {
    map: Exclusion,
    /// Root of the hierarchy.
    root: PathBuf,
    directories: Vec<PathBuf>,
    /// Whether a source will say which pods.
    has_pods: bool,
    /// What is in the log already, by directory.
    problems: BTreeMap<PathBuf, String>,
    failed: Option<String>,
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
    }
}

impl Follower {
    /// Brings the map up to date.
    fn look(&mut self, Wanted(uids): &Wanted) {
        if self.has_pods && uids.is_none() {
            return;
        }
        let mut places = BTreeSet::new();
        for directory in self.directories.clone() {
            match place_of(&self.root, &directory) {
                Ok(place) => {
                    let _new = places.insert(place);
                    if self.problems.remove(&directory).is_some() {
                        info!(cgroup = %directory.display(), "is there now, and excluded");
                    }
                }
                Err(error) => self.tell(directory, error.to_string()),
            }
        }
        if let Some(uids) = uids {
            places.extend(pods(&self.root, uids).into_values().flatten());
        }
        self.write(&places);
    }

    fn write(&mut self, places: &BTreeSet<Place>) {
        match self.map.set(places) {
            Ok(true) => {
                info!(n_cgroups = places.len(), "calls from these cgroups are left alone");
                self.failed = None;
            }
            Ok(false) => self.failed = None,
            Err(error) => self.tell_failure(&error),
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
            warn!(%problem, "cgroups cannot be excluded");
        }
        self.failed = Some(problem);
    }
}
