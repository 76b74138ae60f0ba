//! Slow start: the weight of a new endpoint grows.
//!
//! # Purpose
//!
//! [`SlowStart`] remembers since when the endpoints of each Service with the annotation take calls, and when
//! their weights change next. A [`Ramp`] is its part for one Service while [`super::service`] computes the
//! frontends.
//!
//! # Invariants
//!
//! - Endpoints that a Service has when it is first computed are not new. So a restarted agent, which has no
//!   memory of former ones, slows nothing down.
//! - Weights are recomputed at most once a second.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::model::{Service, ServiceKey};

/// The least time between two computations of a Service's weights.
const MIN_STEP: Duration = Duration::from_secs(1);

/// A weight grows in at most so many steps.
const STEPS: u64 = 16;

/// The weight of a new endpoint begins at one part of so many.
const PARTS: u64 = 10;

/// The endpoints that take calls. Those that are new have the time of their appearance.
type Since = BTreeMap<SocketAddr, Option<Instant>>;

/// The slow starts of all Services.
#[derive(Clone, Debug, Default)]
pub struct SlowStart {
    now: Option<Instant>,
    services: BTreeMap<ServiceKey, Since>,
    /// When the weights of a Service change next.
    due: BTreeMap<ServiceKey, Instant>,
}

/// The slow start of one Service's endpoints. Without time or annotation all weights stay as they are.
#[derive(Clone, Debug, Default)]
pub struct Ramp {
    now: Option<Instant>,
    /// How long a weight grows.
    window: Option<Duration>,
    /// The endpoints of the last computation, if there was one.
    former: Option<Since>,
    since: Since,
}

impl SlowStart {
    /// Sets the time. Returns the Services whose weights have changed since they were computed.
    pub fn advance(&mut self, now: Instant) -> Vec<ServiceKey> {
        self.now = Some(now);
        let mut changed = Vec::new();
        self.due.retain(|key, due| {
            let is_due = *due <= now;
            changed.extend(is_due.then(|| key.clone()));
            !is_due
        });
        changed
    }

    /// When [`Self::advance`] returns a Service next.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.due.values().min().copied()
    }

    /// Computes something of a Service by its ramp, and remembers the endpoints that it notes.
    pub fn compute<T>(&mut self, service: &Service, compute: impl FnOnce(&mut Ramp) -> T) -> T {
        let former = self.services.remove(&service.key);
        self.due.remove(&service.key);
        let mut ramp = Ramp { now: self.now, window: service.slow_start(), former, since: Since::new() };
        let computed = compute(&mut ramp);
        if ramp.window.is_some() {
            self.due.extend(ramp.next_due().map(|due| (service.key.clone(), due)));
            self.services.insert(service.key.clone(), ramp.since);
        }
        computed
    }

    /// Forgets a Service.
    pub fn forget(&mut self, key: &ServiceKey) {
        self.services.remove(key);
        self.due.remove(key);
    }
}

impl Ramp {
    /// Notes endpoints that take calls.
    pub fn note(&mut self, endpoints: impl Iterator<Item = SocketAddr>) {
        let Some(window) = self.window else { return };
        let is_growing = |since: &Instant| self.age(*since) < window;
        let noted: Since = endpoints
            .map(|endpoint| {
                let former = self.former.as_ref();
                let since = former.and_then(|former| former.get(&endpoint).copied().unwrap_or(self.now));
                (endpoint, since.filter(is_growing))
            })
            .collect();
        self.since.extend(noted);
    }

    /// Whether an endpoint is new.
    #[must_use]
    pub fn is_growing(&self) -> bool {
        self.since.values().any(Option::is_some)
    }

    /// The present weight of an endpoint. Only the ratio between results of one ramp has a meaning.
    #[must_use]
    pub fn weigh(&self, endpoint: &SocketAddr, weight: u16) -> u64 {
        let weight = u64::from(weight);
        let Some(window) = self.window.map(milliseconds) else { return weight };
        let since = self.since.get(endpoint).copied().flatten();
        let grown = since.map_or(window, |since| {
            let age = milliseconds(self.age(since));
            (age - age % step(window)).min(window)
        });
        weight * (window + (PARTS - 1) * grown)
    }

    fn age(&self, since: Instant) -> Duration {
        self.now.map(|now| now.saturating_duration_since(since)).unwrap_or_default()
    }

    /// When a weight changes next.
    fn next_due(&self) -> Option<Instant> {
        let (now, window) = (self.now?, milliseconds(self.window?));
        let step = step(window);
        let due = |since: Instant| {
            let n_steps = milliseconds(self.age(since)) / step + 1;
            since + Duration::from_millis((n_steps * step).min(window))
        };
        let next = self.since.values().flatten().map(|since| due(*since)).min()?;
        Some(next.max(now + MIN_STEP))
    }
}

/// Time between two changes of a weight that grows for `window`, both in milliseconds.
fn step(window: u64) -> u64 {
    window.div_ceil(STEPS).max(milliseconds(MIN_STEP))
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
