//! Which endpoints were ejected and restored between two scans of their health, and in which words.
//!
//! The programs eject an endpoint and restore it without a message: they write `endpoint_health`. A scan
//! compares it with what the last scan saw.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use lb_common::{
    health::Admission,
    layout::{EndpointHealth, Frontend},
};

use crate::tables::{Entry, Image};

/// An endpoint of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// Id of the service port.
    pub service_id: u32,
    /// Id of the endpoint.
    pub id: u32,
    /// Address and port of the endpoint.
    pub address: SocketAddr,
}

/// What happened to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was ejected, also if that has ended since.
    Ejected(Ejection),
    /// A connection was established, which ended the ejection.
    Restored,
}

/// Why an endpoint was ejected, and until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// Its end, in nanoseconds of `CLOCK_MONOTONIC`; 0 if it ended before the scan.
    pub until: u64,
    /// Failures in a row; 0 if it ended before the scan.
    pub failures: u32,
    /// The error of the last one (`errno`); 0 for a SYN without an answer.
    pub errno: u32,
}

/// What a scan keeps of an id.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// `None` while the image has no endpoint of this id that connections may eject.
    endpoint: Option<Endpoint>,
    ejected_until: u64,
    ejections: u32,
}

/// What the last scan saw.
#[derive(Clone, Debug, Default)]
pub struct EjectionTracker {
    /// The ids with ejections.
    known: BTreeMap<u32, Known>,
    has_scanned: bool,
}

impl EjectionTracker {
    /// Scans the ids below `n_ids`, and returns what happened since the last scan. The first scan returns
    /// what is ejected.
    ///
    /// `image` is what the maps held when the scan began, and `is_new_image` whether it differs from the last
    /// scan's. An endpoint that is ejected and leaves the image causes no change.
    pub fn scan(
        &mut self,
        n_ids: u32,
        health: impl Fn(u32) -> EndpointHealth,
        image: &Image,
        is_new_image: bool,
    ) -> Vec<(Endpoint, Change)> {
        let has_ejections = |health: &EndpointHealth| health.ejected_until != 0 || health.ejections != 0;
        let found = (0..n_ids).map(|id| (id, health(id))).filter(|(_, health)| has_ejections(health));
        let mut differing: BTreeMap<u32, EndpointHealth> = found.collect();
        for id in self.known.keys() {
            differing.entry(*id).or_insert_with(|| health(*id));
        }
        differing.retain(|id, health| {
            self.known.get(id).is_none_or(|known| {
                (known.ejected_until, known.ejections) != (health.ejected_until, health.ejections)
                    || known.endpoint.is_none() && is_new_image
            })
        });
        let mut endpoints = BTreeMap::new();
        if !differing.is_empty() {
            let changed = observed(image).filter(|(_, entry)| differing.contains_key(&entry.endpoint_id));
            endpoints.extend(changed.map(|(Frontend { service_id, .. }, entry)| {
                let (id, address) = (entry.endpoint_id, entry.address());
                (id, Endpoint { service_id: *service_id, id, address })
            }));
        }
        let mut changes = Vec::new();
        for (id, health) in differing {
            let endpoint = endpoints.get(&id).copied();
            let former = if has_ejections(&health) {
                let EndpointHealth { ejected_until, ejections, .. } = health;
                self.known.insert(id, Known { endpoint, ejected_until, ejections })
            } else {
                self.known.remove(&id)
            };
            let Some(endpoint) = endpoint else { continue };
            let of_endpoint = self.of_endpoint(endpoint, &health, former);
            changes.extend(of_endpoint.into_iter().map(|change| (endpoint, change)));
        }
        self.has_scanned = true;
        changes
    }

    /// What happened to one endpoint. `former` is what the last scan saw under its id.
    fn of_endpoint(&self, endpoint: Endpoint, health: &EndpointHealth, former: Option<Known>) -> Vec<Change> {
        let EndpointHealth { ejected_until, failures, errno, .. } = *health;
        let ejected = Change::Ejected(Ejection { until: ejected_until, failures, errno });
        let (was_until, n_before) = match former {
            Some(Known { endpoint: Some(same), ejected_until, ejections }) if same == endpoint => {
                (ejected_until, ejections)
            }
            // The id was another endpoint's, or had no ejection.
            Some(Known { endpoint: Some(_), .. }) => (0, 0),
            None if self.has_scanned => (0, 0),
            // When the ejections began is unknown.
            _ => (0, health.ejections),
        };
        match (was_until, ejected_until) {
            (_, 0) if health.reached_at == 0 => Vec::new(),
            (0, 0) if health.ejections > n_before => vec![ejected, Change::Restored],
            (0, 0) => Vec::new(),
            (_, 0) => vec![Change::Restored],
            (before, now) if before == now => Vec::new(),
            _ => vec![ejected],
        }
    }
}

/// The endpoints that connections may eject, with repetitions.
fn observed(image: &Image) -> impl Iterator<Item = (&Frontend, &Entry)> {
    let frontends =
        image.services.iter().filter_map(|(address, id)| Some((address, image.frontends.get(id)?)));
    let mut runs = BTreeSet::new();
    let runs =
        frontends.filter(|(_, frontend)| frontend.health != 0).filter_map(move |(address, frontend)| {
            let ipv6 = address.ip.is_ipv6();
            // The addresses of a port share runs.
            let is_first = runs.insert((ipv6, frontend.run.offset));
            is_first.then(|| image.stored(ipv6, frontend.run)).flatten().map(|run| (frontend, run))
        });
    runs.flat_map(|(frontend, run)| run.reachable().map(move |entry| (frontend, entry)))
}

/// The number of endpoints that calls avoid. `is_ejected` is about an id.
pub fn n_ejected(image: &Image, is_ejected: impl Fn(u32) -> bool) -> usize {
    let ids = observed(image).map(|(_, entry)| entry.endpoint_id);
    ids.filter(|id| is_ejected(*id)).collect::<BTreeSet<u32>>().len()
}

/// An ejection in words: how long it lasts, as in [`EndpointHealth::ejected_seconds`], and the fields of
/// [`Ejection`].
#[must_use]
pub fn text(seconds: u64, failures: u32, errno: u32) -> String {
    match (failures, seconds) {
        (0, _) => format!("ejected for a moment: {}", cause(errno)),
        (_, 0) => format!("ejected until a call on trial is established: {}", reason(failures, errno)),
        _ => format!("ejected for {seconds} s: {}", reason(failures, errno)),
    }
}

/// The failures in a row, and the error of the last one.
fn reason(failures: u32, errno: u32) -> String {
    let cause = cause(errno);
    match failures {
        1 => format!("1 failure: {cause}"),
        _ => format!("{failures} failures in a row, the last one: {cause}"),
    }
}

/// The error of a connection that failed. 0 is a SYN without an answer. Errors of Linux' `icmp_err_convert`
/// and `icmpv6_err_convert`.
#[must_use]
pub fn cause(errno: u32) -> Cow<'static, str> {
    let known = match errno {
        0 => "no answer",
        13 => "ICMP: administratively prohibited",
        64 => "ICMP: host isolated",
        71 => "ICMP: parameter problem",
        90 => "ICMP: fragmentation needed",
        92 => "ICMP: protocol unreachable",
        95 => "ICMP: source route failed",
        101 => "ICMP: network unreachable",
        104 => "connection reset",
        111 => "connection refused",
        112 => "ICMP: host unknown",
        113 => "ICMP: host unreachable",
        _ => return Cow::Owned(format!("error {errno}")),
    };
    Cow::Borrowed(known)
}

/// Why calls avoid an endpoint at a time, in nanoseconds of `CLOCK_MONOTONIC`; `None` if it is not ejected.
#[must_use]
pub fn why_avoided(health: &EndpointHealth, now: u64) -> Option<String> {
    const SECOND: u64 = 1_000_000_000;
    let EndpointHealth { failures, errno, failing_since, .. } = *health;
    let ejected = match (health.admission(now), health.ejected_seconds(now)?) {
        (Admission::Ejected, 0) => format!("ejected while a call is on trial: {}", reason(failures, errno)),
        (_, 0) => format!("ejected until the next call, which is on trial: {}", reason(failures, errno)),
        (_, seconds) => text(seconds, failures, errno),
    };
    Some(format!("{ejected}; failing for {} s", now.saturating_sub(failing_since) / SECOND))
}

#[cfg(test)]
mod tests;
