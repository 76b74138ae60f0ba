//! Scans the health of endpoints in the background, since the programs eject and restore without a message.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use lb_core::{
    desired::PortKey,
    ejection::{Change, Ejection, EjectionTracker, Endpoint},
    model::notification::{EndpointState, HealthChange},
    state::View,
};
use lb_kernel::{Observations, host};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::{MissedTickBehavior, interval},
};
use tracing::warn;

use crate::serve::Published;

/// Time between two scans. A scan of the default 262,144 ids takes about a millisecond.
const INTERVAL: Duration = Duration::from_secs(1);

/// Starts the scans. Dropping the returned set stops them.
pub(super) fn start(
    observations: Observations,
    published: watch::Receiver<Published>,
) -> (JoinSet<()>, mpsc::Receiver<Vec<HealthChange>>) {
    let (sender, receiver) = mpsc::channel(1);
    let scanner = Scanner { observations, tracker: EjectionTracker::default(), view: None };
    let mut task = JoinSet::new();
    let _aborted_on_drop = task.spawn(scan(scanner, published, sender));
    (task, receiver)
}

async fn scan(
    mut scanner: Scanner,
    published: watch::Receiver<Published>,
    sender: mpsc::Sender<Vec<HealthChange>>,
) {
    let mut timer = interval(INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let _now = timer.tick().await;
        let view = Arc::clone(&published.borrow().view);
        let task = spawn_blocking(move || {
            let changes = scanner.scan(view);
            (scanner, changes)
        });
        let changes = match task.await {
            Ok((same, changes)) => {
                scanner = same;
                changes
            }
            Err(error) => return warn!(%error, "ejections are no longer reported: restart the agent"),
        };
        if !changes.is_empty() && sender.send(changes).await.is_err() {
            return;
        }
    }
}

struct Scanner {
    observations: Observations,
    tracker: EjectionTracker,
    /// What the last scan compared with.
    view: Option<Arc<View>>,
}

impl Scanner {
    /// An id that `view` names keeps its endpoint for at least a grace period, which takes longer than this.
    fn scan(&mut self, view: Arc<View>) -> Vec<HealthChange> {
        let is_new_image = self.view.as_ref().is_none_or(|former| !Arc::ptr_eq(former, &view));
        let health = |id| self.observations.endpoint_health(id);
        let changes = self.tracker.scan(view.n_endpoint_ids, health, &view.image, is_new_image);
        let with_names = if changes.is_empty() { Vec::new() } else { named(changes, &view) };
        self.view = Some(view);
        with_names
    }
}

fn named(changes: Vec<(Endpoint, Change)>, view: &View) -> Vec<HealthChange> {
    let (now, at) = (host::monotonic(), Instant::now());
    let ports: BTreeMap<u32, &PortKey> = view.ports.iter().map(|(port, id)| (*id, &**port)).collect();
    let name = |(Endpoint { service_id, address, .. }, change)| {
        let PortKey { service, port_name, .. } = ports.get(&service_id)?;
        let state = match change {
            Change::Restored => EndpointState::Restored,
            Change::Ejected(Ejection { until, failures, errno }) => {
                let until = at + Duration::from_nanos(until.saturating_sub(now));
                EndpointState::Ejected { until, failures, errno }
            }
        };
        Some(HealthChange {
            service: service.clone(),
            port_name: Arc::clone(port_name),
            endpoint: address,
            state,
        })
    };
    changes.into_iter().filter_map(name).collect()
}
