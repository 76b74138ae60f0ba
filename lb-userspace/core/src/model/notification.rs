//! Notifications about issues and about the agent's node. An API server gets each as a Kubernetes Event.
//!
//! Decides which issue becomes a notification, and when it is due again. Sending is not done here.
//!
//! # Invariants
//!
//! - A notification is sent once and, while it holds, again after each [`REPEAT`], with its count.
//! - At most [`BURST`] are sent at once, then one per [`REFILL`]. The rest wait, as long as they hold.
//! - Of the health of a Service's endpoints, at most one ejection and one restoration are sent per
//!   [`HEALTH_PAUSE`], for all endpoints together, and after everything else: each node of a cluster sends
//!   them about the same Service, and they must not delay an issue.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Issue, IssueKind, ObjectKind, ObjectRef, ServiceKey};
use crate::ejection;

/// Time until a notification is repeated. API servers keep Events for an hour.
pub const REPEAT: Duration = Duration::from_secs(30 * 60);
/// How long a notification is remembered after it last held. If it returns within this time, its count
/// continues.
pub const MEMORY: Duration = Duration::from_secs(60 * 60);
/// Most notifications that are sent at once.
pub const BURST: u32 = 25;
/// Most node events that wait to be sent. The oldest are dropped first.
const MAX_PENDING: usize = 32;
/// Time until one more may be sent.
pub const REFILL: Duration = Duration::from_secs(10);
/// Minimum time between two notifications of one kind about the health of a Service's endpoints.
pub const HEALTH_PAUSE: Duration = Duration::from_secs(5 * 60);
/// How long an endpoint's health waits to be sent. Then it is dropped.
const HEALTH_MEMORY: Duration = Duration::from_secs(15 * 60);

/// A notification about an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Notification {
    /// A Service, or this agent's Node.
    pub object: ObjectRef,
    /// Whether the Event has type `Warning`.
    pub is_warning: bool,
    /// `reason` of the Event: one word that scripts may match on.
    pub reason: &'static str,
    /// `action` of the Event: what the agent was doing, in one word.
    pub action: &'static str,
    /// Text for people, without the node's name.
    pub note: String,
}

/// A notification that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DueNotification {
    /// Its content.
    pub notification: Notification,
    /// How often it was sent, this time included.
    pub n_times: u32,
    /// The node of the agent that sends it.
    pub node: Arc<str>,
}

impl DueNotification {
    /// `note` of the Event. It names the node: agents of all nodes write Events on the same Service, and
    /// kubectl does not show the reporter.
    #[must_use]
    pub fn text(&self) -> String {
        format!("node {}: {}", self.node, self.notification.note)
    }
}

/// An endpoint that was ejected or restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthChange {
    /// The Service.
    pub service: ServiceKey,
    /// The Service port's name.
    pub port_name: Arc<str>,
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// What it is now.
    pub state: EndpointState,
}

/// Whether calls avoid an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// They do.
    Ejected {
        /// When the ejection ends.
        until: Instant,
        /// Failures in a row; 0 if the ejection has ended.
        failures: u32,
        /// The error of the last one; 0 for a SYN without an answer.
        errno: u32,
    },
    /// They did, until a connection was established.
    Restored,
}

impl EndpointState {
    const fn is_ejected(&self) -> bool {
        matches!(self, Self::Ejected { .. })
    }
}

impl HealthChange {
    /// As a log line.
    #[must_use]
    pub fn line(&self, now: Instant) -> String {
        let Self { service, port_name, endpoint, state } = self;
        format!("{}: {}", ObjectRef::from(service), health_text(port_name, *endpoint, state, now))
    }
}

fn health_text(port_name: &str, endpoint: SocketAddr, state: &EndpointState, now: Instant) -> String {
    let port = if port_name.is_empty() { String::new() } else { format!(" of port {port_name}") };
    match *state {
        EndpointState::Ejected { until, failures, errno } => {
            let seconds = until.saturating_duration_since(now).as_millis().div_ceil(1000);
            let ejected = ejection::text(u64::try_from(seconds).unwrap_or(u64::MAX), failures, errno);
            let verb = if failures == 0 { "was" } else { "is" };
            format!("endpoint {endpoint}{port} {verb} {ejected}")
        }
        EndpointState::Restored => {
            format!("endpoint {endpoint}{port} is restored: a connection was established")
        }
    }
}

/// An event in the life of a node's agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeEvent {
    /// The programs are attached.
    Attached,
    /// The maps hold the frontends of the first lists.
    Synced {
        /// Frontends in the maps.
        n_frontends: usize,
    },
    /// The agent's self-test failed.
    SelfTestFailed {
        /// What failed, in one line.
        problem: String,
    },
}

impl Notification {
    /// The notification about a Service's issue.
    ///
    /// `None` for issues of other objects, and for what is not served by design, which kube-proxy may serve.
    #[must_use]
    pub fn of_issue(issue: &Issue) -> Option<Self> {
        let object = &issue.object;
        if object.kind != ObjectKind::Service || object.name.is_empty() || object.namespace.is_empty() {
            return None;
        }
        let (reason, action) = match &issue.kind {
            IssueKind::ServicesFull { .. }
            | IssueKind::EndpointsFull { .. }
            | IssueKind::TooManyEndpoints { .. }
            | IssueKind::ClusterIpsFull { .. }
            | IssueKind::TableFull { .. } => ("TableFull", "Sync"),
            IssueKind::FrontendTaken { .. } => ("AddressConflict", "Sync"),
            // kube-proxy's reason.
            IssueKind::HealthCheckPortTaken { .. } => ("FailedToStartServiceHealthcheck", "Listen"),
            IssueKind::NotServed { .. }
            | IssueKind::SourceRanges { .. }
            | IssueKind::ExternalIps { .. }
            | IssueKind::OnThisNode { .. }
            | IssueKind::NodePortOutsideRange { .. }
            | IssueKind::NotApplicable { .. } => return None,
            _ => ("InvalidService", "Read"),
        };
        let (object, note) = (object.clone(), issue.kind.to_string());
        Some(Self { object, is_warning: true, reason, action, note })
    }

    /// The notification about a Node's agent.
    #[must_use]
    pub fn of_node(name: &str, event: &NodeEvent) -> Self {
        let of = |is_warning, reason, action, note| Self {
            object: ObjectRef::node(name),
            is_warning,
            reason,
            action,
            note,
        };
        match event {
            NodeEvent::Attached => {
                of(false, "Starting", "StartSocklb", "socklb has attached its programs".to_owned())
            }
            NodeEvent::Synced { n_frontends } => of(
                false,
                "Synced",
                "StartSocklb",
                format!("socklb has synced: the maps hold {n_frontends} frontends"),
            ),
            NodeEvent::SelfTestFailed { problem } => {
                of(true, "SelfTestFailed", "SelfTest", format!("socklb's self-test failed: {problem}"))
            }
        }
    }
}

/// What is to be sent about the health of a Service's endpoints.
#[derive(Clone, Debug, Default)]
struct ServiceHealth {
    /// The last state of each endpoint and its time, until it is sent; by port and endpoint.
    pending: BTreeMap<(Arc<str>, SocketAddr), (EndpointState, Instant)>,
    /// When a restoration and when an ejection was last sent.
    sent: [Option<Instant>; 2],
}

impl ServiceHealth {
    fn may_send(&self, is_ejected: bool, now: Instant) -> bool {
        let sent = self.sent[usize::from(is_ejected)];
        sent.is_none_or(|sent| now.saturating_duration_since(sent) >= HEALTH_PAUSE)
    }

    /// Drops what is old. Returns whether anything is left to remember.
    fn expire(&mut self, now: Instant) -> bool {
        self.pending.retain(|_, (_, since)| now.saturating_duration_since(*since) < HEALTH_MEMORY);
        !(self.pending.is_empty() && self.may_send(false, now) && self.may_send(true, now))
    }

    /// The time of the oldest state that may be sent.
    fn due_since(&self, now: Instant) -> Option<Instant> {
        let is_due = |(state, _): &&(EndpointState, Instant)| self.may_send(state.is_ejected(), now);
        self.pending.values().filter(is_due).map(|(_, since)| *since).min()
    }

    /// The notification about the endpoints that are ejected or that are restored: about the first one, with
    /// the number of others. Removes them.
    fn take(&mut self, service: &ServiceKey, is_ejected: bool, now: Instant) -> Option<Notification> {
        if !self.may_send(is_ejected, now) {
            return None;
        }
        let mut endpoints = self.pending.iter().filter(|(_, (state, _))| state.is_ejected() == is_ejected);
        let ((port_name, endpoint), (state, _)) = endpoints.next()?;
        let text = health_text(port_name, *endpoint, state, now);
        let note = match endpoints.count() {
            0 => text,
            1 => format!("{text}; so is 1 more endpoint"),
            n_more => format!("{text}; so are {n_more} more endpoints"),
        };
        self.pending.retain(|_, (state, _)| state.is_ejected() != is_ejected);
        self.sent[usize::from(is_ejected)] = Some(now);
        let (reason, action) =
            if is_ejected { ("EndpointEjected", "Eject") } else { ("EndpointRestored", "Restore") };
        Some(Notification { object: ObjectRef::from(service), is_warning: is_ejected, reason, action, note })
    }
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    n_times: u32,
    last: Instant,
    /// When the notification last held.
    held: Instant,
}

/// Which notifications were sent, how often and when.
#[derive(Clone, Debug)]
pub struct NotificationLog {
    node: Arc<str>,
    sent: BTreeMap<Notification, Sent>,
    /// Node events that wait to be sent, without duplicates.
    pending: Vec<Notification>,
    /// The Services whose endpoints were ejected or restored, until that is sent and the pause is over.
    health: BTreeMap<ServiceKey, ServiceHealth>,
    /// Notifications that may be sent at once, as of `counted`.
    n_free: u32,
    counted: Instant,
}

impl NotificationLog {
    /// A ledger without any notification sent. `node` is the name of the agent's Node.
    #[must_use]
    pub fn new(node: Arc<str>, now: Instant) -> Self {
        let (sent, health) = (BTreeMap::new(), BTreeMap::new());
        Self { node, sent, pending: Vec::new(), health, n_free: BURST, counted: now }
    }

    /// Queues a node event. A later [`Self::due`] returns it; more than 32 waiting ones are dropped, oldest
    /// first.
    pub fn happened(&mut self, event: &NodeEvent) {
        let notification = Notification::of_node(&self.node, event);
        // A source of files never takes any, so the queue needs a bound.
        if !self.pending.contains(&notification) {
            if self.pending.len() == MAX_PENDING {
                self.pending.remove(0);
            }
            self.pending.push(notification);
        }
    }

    /// Queues ejections and restorations. A later [`Self::due`] returns what still holds then; what waits for
    /// longer than 15 minutes is dropped.
    pub fn health_changed(&mut self, changes: impl IntoIterator<Item = HealthChange>, now: Instant) {
        // Here, since a source that takes no notifications never asks for those that are due.
        self.health.retain(|_, health| health.expire(now));
        for HealthChange { service, port_name, endpoint, state } in changes {
            self.health.entry(service).or_default().pending.insert((port_name, endpoint), (state, now));
        }
    }

    /// Whether node events wait to be sent.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The notifications that are due, at most `room`. `issues` are all that hold now.
    pub fn due(
        &mut self,
        issues: impl IntoIterator<Item = Issue>,
        room: usize,
        now: Instant,
    ) -> Vec<DueNotification> {
        self.refill(now);
        let holding: BTreeSet<Notification> =
            issues.into_iter().filter_map(|issue| Notification::of_issue(&issue)).collect();
        self.sent.retain(|notification, told| {
            if holding.contains(notification) {
                told.held = now;
            }
            now.saturating_duration_since(told.held) < MEMORY
        });
        let mut due = Vec::new();
        let pending = std::mem::take(&mut self.pending);
        for notification in pending
            .into_iter()
            .map(|notification| (notification, true))
            .chain(holding.into_iter().map(|n| (n, false)))
        {
            let (notification, is_news) = notification;
            let told = self.sent.get(&notification);
            let is_due =
                is_news || told.is_none_or(|told| now.saturating_duration_since(told.last) >= REPEAT);
            if !is_due {
                continue;
            }
            if due.len() >= room || self.n_free == 0 {
                if is_news {
                    self.pending.push(notification);
                }
                continue;
            }
            due.push(self.send(notification, now));
        }
        self.health_due(&mut due, room, now);
        due
    }

    /// Adds what is due about the health of endpoints, the oldest first.
    fn health_due(&mut self, due: &mut Vec<DueNotification>, room: usize, now: Instant) {
        let waiting =
            self.health.iter().filter_map(|(service, health)| Some((health.due_since(now)?, service)));
        let waiting: BTreeSet<(Instant, ServiceKey)> =
            waiting.map(|(since, service)| (since, service.clone())).collect();
        for (_, service) in waiting {
            for is_ejected in [true, false] {
                if due.len() >= room || self.n_free == 0 {
                    return;
                }
                let health = self.health.get_mut(&service);
                let notification = health.and_then(|health| health.take(&service, is_ejected, now));
                due.extend(notification.map(|notification| self.send(notification, now)));
            }
        }
    }

    /// Counts a notification as sent.
    fn send(&mut self, notification: Notification, now: Instant) -> DueNotification {
        self.n_free = self.n_free.saturating_sub(1);
        let n_times = self.sent.get(&notification).map_or(1, |told| told.n_times.saturating_add(1));
        self.sent.insert(notification.clone(), Sent { n_times, last: now, held: now });
        DueNotification { notification, n_times, node: Arc::clone(&self.node) }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted);
        let n_more = passed.as_secs() / REFILL.as_secs();
        self.n_free = u32::try_from(n_more).unwrap_or(u32::MAX).saturating_add(self.n_free).min(BURST);
        // The remaining time counts towards the next one.
        self.counted += Duration::from_secs(n_more * REFILL.as_secs());
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use serde_json::json;

    use super::*;

    fn taken(name: &str) -> Issue {
        let kind = IssueKind::FrontendTaken { address: "10.0.0.1:80/tcp".into(), winner: "a/b".into() };
        Issue::new(ObjectRef::service("shop", name), kind)
    }

    fn ledger(now: Instant) -> NotificationLog {
        NotificationLog::new("node".into(), now)
    }

    #[test]
    fn issues_of_services_become_notices_and_others_do_not() {
        let service = || ObjectRef::service("shop", "web");
        let full = || IssueKind::ServicesFull { map: "services4".into(), capacity: 1, needed: 2 };
        for (object, kind, expected) in [
            (service(), full(), Some("TableFull")),
            (
                service(),
                IssueKind::FrontendTaken { address: "x".into(), winner: "y".into() },
                Some("AddressConflict"),
            ),
            (service(), IssueKind::NoPorts, Some("InvalidService")),
            (service(), IssueKind::Unreadable { cause: "x".into() }, Some("InvalidService")),
            (
                service(),
                IssueKind::HealthCheckPortTaken { port: 1, cause: "x".into() },
                Some("FailedToStartServiceHealthcheck"),
            ),
            (service(), IssueKind::SourceRanges { addresses: Vec::new() }, None),
            (service(), IssueKind::NodePortOutsideRange { port: 1, first: 2, last: 3 }, None),
            (ObjectRef::service("shop", ""), IssueKind::NoName, None),
            (ObjectRef::slice("shop", "web-1"), full(), None),
            (ObjectRef::file("a.yaml"), full(), None),
        ] {
            let issue = Issue::new(object, kind);
            let notification = Notification::of_issue(&issue);
            assert_eq!(notification.as_ref().map(|notification| notification.reason), expected, "{issue}");
            assert!(notification.is_none_or(
                |notification| notification.is_warning && !notification.note.contains("shop/web")
            ));
        }
    }

    #[test]
    fn a_notice_is_told_once_until_it_is_time_again() {
        let start = Instant::now();
        let mut ledger = ledger(start);
        // Seconds, whether it holds, and its count if it is sent now.
        for (at, holds, expected) in [
            (0, false, None),
            (1, true, Some(1)),
            (2, true, None),
            (1800, true, None),
            (1801, true, Some(2)),
            // It is gone and returns: its count continues, and it is not repeated early.
            (1900, false, None),
            (2000, true, None),
            (3601, true, Some(3)),
            // Forgotten.
            (3700, false, None),
            (7201, false, None),
            (7202, true, Some(1)),
        ] {
            let issues = holds.then(|| taken("web"));
            let due = ledger.due(issues, 10, start + Duration::from_secs(at));
            assert_eq!(due.first().map(|telling| telling.n_times), expected, "at {at} s");
        }
    }

    #[test]
    fn many_notices_are_told_slowly_and_none_is_lost() {
        let start = Instant::now();
        let mut ledger = ledger(start);
        let issues = || (0..40).map(|n| taken(&format!("web-{n}")));
        let mut told = BTreeSet::new();
        for (at, expected) in [(0, 25), (1, 0), (9, 0), (10, 1), (35, 2), (40, 1), (1000, 11), (1001, 0)] {
            let due = ledger.due(issues(), 100, start + Duration::from_secs(at));
            assert_eq!(due.len(), expected, "at {at} s");
            told.extend(due.into_iter().map(|telling| telling.notification));
        }
        assert_eq!(told.len(), 40);
    }

    #[test]
    fn what_has_no_room_waits() {
        let start = Instant::now();
        let mut ledger = ledger(start);
        ledger.happened(&NodeEvent::Attached);
        assert_eq!(ledger.due([taken("web")], 0, start), []);
        let one = ledger.due([taken("web")], 1, start);
        assert_eq!(one[0].notification.reason, "Starting");
        let rest = ledger.due([taken("web")], 10, start);
        assert_eq!((rest.len(), rest[0].notification.reason, &*rest[0].node), (1, "AddressConflict", "node"));
        assert_eq!(ledger.due([taken("web")], 10, start), []);
    }

    #[test]
    fn news_that_never_find_room_are_forgotten_in_the_end() {
        let start = Instant::now();
        let mut ledger = ledger(start);
        for n in 0..1000 {
            ledger.happened(&NodeEvent::SelfTestFailed { problem: format!("{n}") });
        }
        let told = ledger.due([], 2000, start);
        assert_eq!(told.len(), BURST as usize);
        assert_eq!(
            (told[0].notification.note.as_str(), ledger.has_pending()),
            ("socklb's self-test failed: 968", true)
        );
    }

    fn health(service: &str, last: u8, state: EndpointState) -> HealthChange {
        let service = ServiceKey::new("shop", service);
        HealthChange { service, port_name: "http".into(), endpoint: ([10, 0, 0, last], 80).into(), state }
    }

    fn ejected(until: Instant) -> EndpointState {
        EndpointState::Ejected { until, failures: 3, errno: 111 }
    }

    #[test]
    fn ejections_and_restorations_are_sent_for_all_endpoints_of_a_service_together() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut ledger = ledger(start);
        let is_ejected = "is ejected for 10 s: 3 failures in a row, the last one: connection refused";
        let is_restored = "is restored: a connection was established";
        // Seconds, the endpoints that are ejected and restored then, and the texts that are due.
        for (seconds, ejections, restorations, expected) in [
            (0, vec![1], vec![], vec![format!("endpoint 10.0.0.1:80 of port http {is_ejected}")]),
            (1, vec![2, 3, 4], vec![], vec![]),
            // One of them before its ejection was sent.
            (
                20,
                vec![],
                vec![1, 4],
                vec![format!("endpoint 10.0.0.1:80 of port http {is_restored}; so is 1 more endpoint")],
            ),
            (21, vec![], vec![3], vec![]),
            (299, vec![2], vec![], vec![]),
            (300, vec![2], vec![], vec![format!("endpoint 10.0.0.2:80 of port http {is_ejected}")]),
            (320, vec![], vec![], vec![format!("endpoint 10.0.0.3:80 of port http {is_restored}")]),
            (900, vec![], vec![], vec![]),
            (
                1000,
                (1..=200).collect(),
                vec![],
                vec![format!("endpoint 10.0.0.1:80 of port http {is_ejected}; so are 199 more endpoints")],
            ),
        ] {
            let ejections = ejections.into_iter().map(|last| health("web", last, ejected(at(seconds + 10))));
            let restorations =
                restorations.into_iter().map(|last| health("web", last, EndpointState::Restored));
            ledger.health_changed(ejections.chain(restorations), at(seconds));
            let due = ledger.due([], 10, at(seconds));
            let texts: Vec<_> = due.iter().map(|due| due.notification.note.clone()).collect();
            assert_eq!(texts, expected, "at {seconds} s");
        }
    }

    #[test]
    fn ejections_of_many_services_are_sent_after_everything_else_and_as_they_are_then() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut ledger = ledger(start);
        let all = (0..10_000).map(|n| health(&format!("web-{n:04}"), 1, ejected(at(10))));
        ledger.health_changed(all, start);
        ledger.happened(&NodeEvent::Attached);
        let due = ledger.due([taken("web")], 100, start);
        let reasons: Vec<_> = due.iter().map(|due| due.notification.reason).collect();
        let expected = [&["Starting", "AddressConflict"][..], &["EndpointEjected"; 23]].concat();
        assert_eq!(reasons, expected);
        let due = ledger.due([taken("web")], 100, at(20));
        let texts: Vec<_> = due.iter().map(|due| due.notification.note.as_str()).collect();
        let text = "endpoint 10.0.0.1:80 of port http is ejected until a call on trial is established: 3 failures in a row, the \
                    last one: connection refused";
        assert_eq!((texts, &*due[0].notification.object.name), (vec![text; 2], "web-0023"));
        // What is too old takes no memory.
        ledger.health_changed([], at(15 * 60));
        assert_eq!((ledger.due([taken("web")], 100, at(15 * 60)), ledger.health.len()), (vec![], 0));
    }

    #[test]
    fn ejections_that_find_no_room_wait() {
        let start = Instant::now();
        let mut ledger = ledger(start);
        let two = [health("web", 1, ejected(start)), health("web", 2, EndpointState::Restored)];
        ledger.health_changed(two, start);
        for (room, expected) in [
            (0, None),
            (1, Some(("EndpointEjected", true))),
            (1, Some(("EndpointRestored", false))),
            (1, None),
        ] {
            let due = ledger.due([], room, start);
            let found = due.first().map(|due| (due.notification.reason, due.notification.is_warning));
            assert_eq!((due.len(), found), (usize::from(expected.is_some()), expected));
        }
    }

    #[test]
    fn a_log_line_names_service_endpoint_and_reason() {
        let now = Instant::now();
        let ended = EndpointState::Ejected { until: now, failures: 0, errno: 113 };
        for (state, expected) in [
            // A part of a second counts as one.
            (
                ejected(now + Duration::from_millis(9100)),
                "is ejected for 10 s: 3 failures in a row, the last one: connection refused",
            ),
            (ended, "was ejected for a moment: ICMP: host unreachable"),
            (EndpointState::Restored, "is restored: a connection was established"),
        ] {
            let expected = format!("Service shop/web: endpoint 10.0.0.1:80 of port http {expected}");
            assert_eq!(health("web", 1, state).line(now), expected);
        }
    }

    #[test]
    fn the_text_of_each_event() {
        let of_service = [
            json!({"reason": "ServicesFull", "map": "services4", "capacity": 20, "needed": 123}),
            json!({"reason": "EndpointsFull", "map": "endpoints6", "capacity": 20, "needed": 123}),
            json!({"reason": "TooManyEndpoints", "n_left_out": 2, "max": 1000}),
            json!({"reason": "ClusterIpsFull", "map": "cluster_ips", "capacity": 20, "address": "10.96.0.80"}),
            json!({"reason": "TableFull", "map": "services4", "left_out": "10.96.0.80:80/tcp"}),
            json!({"reason": "FrontendTaken", "address": "192.0.2.1:80/tcp", "winner": "shop/old"}),
            json!({"reason": "HealthCheckPortTaken", "port": 30100, "cause": "Address already in use"}),
            json!({"reason": "NoClusterIp"}),
            json!({"reason": "NoPorts"}),
            json!({"reason": "InvalidPort", "field": "spec.ports[1].port", "value": 70000}),
            json!({"reason": "DuplicatePort", "field": "spec.ports[1].port", "value": "80/TCP"}),
            json!({"reason": "InvalidAddress", "field": "spec.externalIPs[0]", "value": "x"}),
            json!({"reason": "WrongFamily", "field": "spec.clusterIPs[1]", "value": "10.0.0.1", "expected": "IPv6"}),
            json!({"reason": "SpecialAddress", "field": "spec.externalIPs[0]", "value": "127.0.0.1", "range": "loopback"}),
            json!({"reason": "InvalidNetwork", "field": "spec.loadBalancerSourceRanges[0]", "value": "10.0.0.1"}),
            json!({"reason": "UnknownValue", "field": "spec.sessionAffinity", "value": "IP", "used": "None"}),
            json!({"reason": "OutOfRange", "field": "spec.sessionAffinityConfig.clientIP.timeoutSeconds", "value": 0,
                   "range": "1-86400", "used": 10800}),
            json!({"reason": "NoHealthCheckPort"}),
            json!({"reason": "Unreadable", "cause": "invalid type: string \"x\", expected i32"}),
        ];
        let of_service = of_service.into_iter().map(|kind| {
            let kind: IssueKind = serde_json::from_value(kind).unwrap();
            Notification::of_issue(&Issue::new(ObjectRef::service("shop", "web"), kind)).unwrap()
        });
        let of_node = [
            NodeEvent::Attached,
            NodeEvent::Synced { n_frontends: 3 },
            NodeEvent::SelfTestFailed { problem: "TCP over IPv4: connect: Connection refused".into() },
        ];
        let of_node = of_node.map(|change| Notification::of_node("node-a", &change));
        let now = Instant::now();
        let unnamed = |state| HealthChange { port_name: "".into(), ..health("web", 1, state) };
        let mut of_endpoints = ledger(now);
        let of_endpoints =
            [unnamed(ejected(now)), unnamed(EndpointState::Restored)].into_iter().flat_map(|change| {
                of_endpoints.health_changed([change], now);
                of_endpoints.due([], 9, now).into_iter().map(|due| due.notification).collect::<Vec<_>>()
            });
        let line = |notification: Notification| {
            let Notification { is_warning, reason, action, ref object, .. } = notification;
            let (kind, object) = (if is_warning { "Warning" } else { "Normal" }, object.to_string());
            let telling = DueNotification { notification, n_times: 1, node: "node-a".into() };
            let elsewhere = DueNotification { node: "node-b".into(), ..telling.clone() };
            assert_ne!(telling.text(), elsewhere.text(), "the text names the agent's node");
            format!("{object}: {kind} {reason} ({action})\n  {}\n", telling.text())
        };
        expect![[r#"
            Service shop/web: Warning TableFull (Sync)
              node node-a: map services4 is full (20 entries, 123 needed); the service stays as it was: raise --max-services
            Service shop/web: Warning TableFull (Sync)
              node node-a: map endpoints6 has no gap for 123 entries (capacity 20); the service stays as it was: raise --max-endpoints
            Service shop/web: Warning TableFull (Sync)
              node node-a: spec.ports: more than 1000 endpoints in all; 2 ports are left out: split the service
            Service shop/web: Warning TableFull (Sync)
              node node-a: map cluster_ips is full (20 entries, 10.96.0.80 is missing); the address is served, but calls to undefined ports and unallocated addresses pass unchanged: set --service-cidr=none
            Service shop/web: Warning TableFull (Sync)
              node node-a: map services4 is full of another program's entries; 10.96.0.80:80/tcp is not served until an audit removes them: find the program that writes to the maps below --pin-path
            Service shop/web: Warning AddressConflict (Sync)
              node node-a: 192.0.2.1:80/tcp belongs to service shop/old; this service does not answer there: give one of them another address or port
            Service shop/web: Warning FailedToStartServiceHealthcheck (Listen)
              node node-a: spec.healthCheckNodePort: cannot listen on port 30100: Address already in use; load balancers get no answer until the port is free; the agent retries
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.clusterIP: is empty, and only an API server can assign one; the service is left out
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.ports: no usable port; the service has no frontend
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.ports[1].port: 70000 is not a port (1-65535); this port is left out
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.ports[1].port: an earlier port has 80/TCP too; this port is left out
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.externalIPs[0]: "x" is not an IP address; it is left out
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.clusterIPs[1]: 10.0.0.1 is not an IPv6 address; it is left out
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.externalIPs[0]: 127.0.0.1 is in the loopback range, which is never translated; it is left out
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.loadBalancerSourceRanges[0]: "10.0.0.1" is not an IP network (address/length); it admits no client
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.sessionAffinity: "IP" is not known; it is taken for None
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.sessionAffinityConfig.clientIP.timeoutSeconds: 0 is outside 1-86400; 10800 is used
            Service shop/web: Warning InvalidService (Read)
              node node-a: spec.healthCheckNodePort: is missing or 0 although externalTrafficPolicy is Local; health checks are not answered
            Service shop/web: Warning InvalidService (Read)
              node node-a: invalid type: string "x", expected i32; the object is left out
            Service shop/web: Warning EndpointEjected (Eject)
              node node-a: endpoint 10.0.0.1:80 is ejected until a call on trial is established: 3 failures in a row, the last one: connection refused
            Service shop/web: Normal EndpointRestored (Restore)
              node node-a: endpoint 10.0.0.1:80 is restored: a connection was established
            Node node-a: Normal Starting (StartSocklb)
              node node-a: socklb has attached its programs
            Node node-a: Normal Synced (StartSocklb)
              node node-a: socklb has synced: the maps hold 3 frontends
            Node node-a: Warning SelfTestFailed (SelfTest)
              node node-a: socklb's self-test failed: TCP over IPv4: connect: Connection refused
        "#]].assert_eq(&of_service.chain(of_endpoints).chain(of_node).map(line).collect::<String>());
    }
}
