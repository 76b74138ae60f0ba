//! Health of the agent, as kube-proxy defines it (`pkg/proxy/healthcheck/proxy_health.go`).

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use jiff::Timestamp;
use serde::Serialize;

use super::away::{Away, Shown};

/// How long a change may wait before the agent counts as stuck: twice kube-proxy's default `syncPeriod`.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Text for a self-test that has not run.
pub const NOT_RUN: &str = "not run yet: it waits for the first sync";

/// Result of the last self-test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SelfTest {
    /// Self-tests are off.
    #[default]
    Off,
    /// Not run yet.
    Pending,
    /// Calls reached their endpoint.
    Passed,
    /// Calls failed, with the problem.
    Failed(Arc<str>),
}

/// The heartbeat of the agent's loop, and its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vitals {
    /// Arrival of the oldest change that waits for a sync. Later changes do not move it.
    pub waiting_since: Option<Instant>,
    /// Time of the last sync.
    pub updated: Option<SystemTime>,
    /// The heartbeat: the loop's last iteration. There is one every few seconds even without a change.
    pub heartbeat: Instant,
    /// Whether external traffic should come to this node: it is not being deleted. `true` by default.
    pub is_node_eligible: bool,
    /// Number of frontends that do not fit in the tables.
    pub n_refused: usize,
    /// The last self-test.
    pub self_test: SelfTest,
    /// Whether the agent's pins are missing or replaced: a restarted agent would not find them.
    pub has_lost_pins: bool,
    /// Requested map sizes that are too small for what is served, so that the previous sizes stay.
    pub refused_sizes: Arc<[String]>,
    /// A source whose lists are incomplete, or that does not answer. That does not affect readiness.
    pub away: Option<Away>,
}

/// The evaluated [`Vitals`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// No change has waited for too long, and the loop runs.
    pub is_alive: bool,
    /// Whether external traffic should come to this node.
    pub is_node_eligible: bool,
    /// Number of frontends that do not fit in the tables.
    pub n_refused: usize,
    /// The last self-test.
    pub self_test: SelfTest,
    /// Whether the pins are missing or replaced.
    pub has_lost_pins: bool,
    /// Requested map sizes that are too small.
    pub refused_sizes: Arc<[String]>,
    /// An outage of the source, and what is served.
    pub away: Option<Shown>,
    /// The time of the answer if alive, else that of the last sync.
    pub updated: Option<SystemTime>,
    /// The time of the answer.
    pub now: SystemTime,
}

/// Body of an answer at `/healthz` and `/livez`.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(rename = "lastUpdated")]
    updated: String,
    #[serde(rename = "currentTime")]
    now: String,
    #[serde(rename = "nodeEligible", skip_serializing_if = "Option::is_none")]
    is_node_eligible: Option<bool>,
    /// Not in kube-proxy, which does not wait.
    #[serde(rename = "waitsForOtherAgent", skip_serializing_if = "is_false")]
    is_waiting: bool,
    /// Not in kube-proxy, whose tables have no limit.
    #[serde(rename = "frontendsWithoutRoom", skip_serializing_if = "Option::is_none")]
    n_refused: Option<usize>,
    /// Not in kube-proxy, which has no pins.
    #[serde(rename = "pinsLost", skip_serializing_if = "is_false")]
    has_lost_pins: bool,
    /// Not in kube-proxy, whose tables have no size.
    #[serde(rename = "sizesRefused", skip_serializing_if = "<[String]>::is_empty")]
    refused_sizes: &'a [String],
    /// Not in kube-proxy, which does not test its rules.
    #[serde(rename = "selfTest", skip_serializing_if = "Option::is_none")]
    self_test: Option<&'a str>,
    /// Not in kube-proxy, which shows no outage.
    #[serde(rename = "source", skip_serializing_if = "Option::is_none")]
    away: Option<&'a Shown>,
    /// Not in kube-proxy: why the answer is 503, for people.
    #[serde(rename = "notReady", skip_serializing_if = "<[String]>::is_empty")]
    not_ready: &'a [String],
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// The body of all answers of an agent that waits for another one to exit.
#[must_use]
pub fn waiting(now: SystemTime) -> String {
    let not_ready = ["it waits for another agent with the same pins to exit".to_owned()];
    write(&Body { is_waiting: true, not_ready: &not_ready, ..Body::empty(now) })
}

/// The body of all answers of an agent whose programs are not attached yet.
#[must_use]
pub fn starting(now: SystemTime) -> String {
    let not_ready = ["the programs are being loaded".to_owned()];
    write(&Body { not_ready: &not_ready, ..Body::empty(now) })
}

impl Body<'_> {
    /// A body with only the time.
    fn empty(now: SystemTime) -> Self {
        Self {
            updated: String::new(),
            now: show(now),
            is_node_eligible: None,
            is_waiting: false,
            n_refused: None,
            has_lost_pins: false,
            refused_sizes: &[],
            self_test: None,
            away: None,
            not_ready: &[],
        }
    }
}

/// Empty for a time out of a time stamp's range.
fn show(time: SystemTime) -> String {
    Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}

fn write(body: &Body<'_>) -> String {
    // Strings and bools always serialise.
    serde_json::to_string(body).unwrap_or_default()
}

impl Vitals {
    /// The vitals of an agent that has just started.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            waiting_since: None,
            updated: None,
            heartbeat: now,
            is_node_eligible: true,
            n_refused: 0,
            self_test: SelfTest::Off,
            has_lost_pins: false,
            refused_sizes: Arc::default(),
            away: None,
        }
    }

    /// Evaluates the vitals. An agent without a change to sync is alive.
    #[must_use]
    pub fn evaluate(&self, now: Instant, clock: SystemTime) -> Health {
        let is_late = |since: Instant| now.saturating_duration_since(since) >= PATIENCE;
        let is_alive = !self.waiting_since.is_some_and(is_late) && !is_late(self.heartbeat);
        Health {
            is_alive,
            is_node_eligible: self.is_node_eligible,
            n_refused: self.n_refused,
            self_test: self.self_test.clone(),
            has_lost_pins: self.has_lost_pins,
            refused_sizes: Arc::clone(&self.refused_sizes),
            away: self.away.as_ref().map(|away| away.show(now, clock)),
            updated: if is_alive { Some(clock) } else { self.updated },
            now: clock,
        }
    }
}

impl Health {
    /// Whether this node is ready, so that load balancers may send it traffic: `/healthz`. Not ready are: a
    /// node whose tables are too full for a Service (others are served), one with missing pins, and one whose
    /// self-test failed.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.not_ready().is_empty()
    }

    /// The reasons why it is not, each in a few words.
    #[must_use]
    pub fn not_ready(&self) -> Vec<String> {
        let is_stuck = (!self.is_alive).then(|| {
            format!(
                "the agent is stuck: a change has waited for {} s, or the loop does not run",
                PATIENCE.as_secs()
            )
        });
        let is_leaving = (!self.is_node_eligible).then(|| "the Node is being deleted".to_owned());
        let is_full = (self.n_refused > 0).then(|| {
            format!(
                "{} frontends have no room in the maps: raise --max-services or --max-endpoints",
                self.n_refused
            )
        });
        let has_lost_pins = self.has_lost_pins.then(|| {
            "pins were removed or replaced: the next audit restores them, or after `socklb cleanup` a \
             restart of the agent"
                .to_owned()
        });
        let is_unproven = match &self.self_test {
            SelfTest::Off | SelfTest::Passed => None,
            SelfTest::Pending => Some(format!("self-test {NOT_RUN}")),
            SelfTest::Failed(problem) => Some(format!("self-test failed: {problem}")),
        };
        [is_stuck, is_leaving, is_full, has_lost_pins, is_unproven].into_iter().flatten().collect()
    }

    /// The body at `/healthz`.
    #[must_use]
    pub fn healthz(&self) -> String {
        let n_refused = Some(self.n_refused).filter(|n| *n > 0);
        let self_test = match &self.self_test {
            SelfTest::Off | SelfTest::Passed => None,
            SelfTest::Pending => Some(NOT_RUN),
            SelfTest::Failed(problem) => Some(&**problem),
        };
        write(&Body {
            is_node_eligible: Some(self.is_node_eligible),
            n_refused,
            has_lost_pins: self.has_lost_pins,
            refused_sizes: &self.refused_sizes,
            self_test,
            away: self.away.as_ref(),
            not_ready: &self.not_ready(),
            ..self.body()
        })
    }

    /// The body at `/livez`, which says nothing about the node.
    #[must_use]
    pub fn livez(&self) -> String {
        write(&self.body())
    }

    fn body(&self) -> Body<'_> {
        Body { updated: self.updated.map(show).unwrap_or_default(), ..Body::empty(self.now) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_alive_unless_something_waits_for_too_long() {
        let start = Instant::now();
        let updated = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let clock = updated + Duration::from_secs(100);
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        // Arrival of the oldest change, the last heartbeat, whether the node may have traffic; at second 100.
        for (what, waiting_since, heartbeat, is_node_eligible, is_alive, is_healthy) in [
            ("starting, or with nothing to do", None, 100, true, true, true),
            ("a change waits", Some(41), 100, true, true, true),
            ("a change waits for too long", Some(40), 100, true, false, false),
            ("the loop does not run", None, 40, true, false, false),
            ("the node is being deleted", None, 100, false, true, false),
            ("the node is being deleted and nothing works", Some(0), 0, false, false, false),
        ] {
            let vitals = Vitals {
                waiting_since: waiting_since.map(at),
                updated: Some(updated),
                heartbeat: at(heartbeat),
                is_node_eligible,
                ..Vitals::new(start)
            };
            let health = vitals.evaluate(at(100), clock);
            assert_eq!((health.is_alive, health.is_healthy()), (is_alive, is_healthy), "{what}");
            assert_eq!(health.updated, Some(if is_alive { clock } else { updated }), "{what}");
            let full = Vitals { n_refused: 1, ..vitals.clone() }.evaluate(at(100), clock);
            assert_eq!((full.is_alive, full.is_healthy()), (is_alive, false), "{what}, and no room");
            for (self_test, is_proven) in [
                (SelfTest::Pending, false),
                (SelfTest::Passed, true),
                (SelfTest::Failed("TCP over IPv4: connect: refused".into()), false),
            ] {
                let tested =
                    Vitals { self_test: self_test.clone(), ..vitals.clone() }.evaluate(at(100), clock);
                let expected = (is_alive, is_healthy && is_proven);
                assert_eq!((tested.is_alive, tested.is_healthy()), expected, "{what}, and {self_test:?}");
            }
            let lost = Vitals { has_lost_pins: true, ..vitals.clone() }.evaluate(at(100), clock);
            assert_eq!((lost.is_alive, lost.is_healthy()), (is_alive, false), "{what}, and no pins");
        }
    }

    #[test]
    fn bodies_are_those_of_kube_proxy() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let health = Health {
            is_alive: true,
            is_node_eligible: false,
            n_refused: 0,
            self_test: SelfTest::Passed,
            has_lost_pins: false,
            refused_sizes: Arc::default(),
            away: None,
            updated: Some(now),
            now,
        };
        assert_eq!(
            health.healthz(),
            r#"{"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:13:20Z","nodeEligible":false,"notReady":["the Node is being deleted"]}"#
        );
        assert_eq!(
            health.livez(),
            r#"{"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:13:20Z"}"#
        );
        let failed =
            Health { self_test: SelfTest::Failed("TCP: refused".into()), ..health.clone() }.healthz();
        let end = r#""selfTest":"TCP: refused","notReady":["the Node is being deleted","self-test failed: TCP: refused"]}"#;
        assert!(failed.ends_with(end), "{failed}");
        assert_eq!(
            waiting(now),
            r#"{"lastUpdated":"","currentTime":"2023-11-14T22:13:20Z","waitsForOtherAgent":true,"notReady":["it waits for another agent with the same pins to exit"]}"#
        );
        assert_eq!(
            starting(now),
            r#"{"lastUpdated":"","currentTime":"2023-11-14T22:13:20Z","notReady":["the programs are being loaded"]}"#
        );
        let refused_sizes = ["max-services=20: 123 are served".to_owned()].into();
        let refused = Health { is_node_eligible: true, refused_sizes, ..health.clone() };
        assert!(refused.is_healthy(), "the previous sizes serve");
        let body = refused.healthz();
        assert!(body.ends_with(r#""sizesRefused":["max-services=20: 123 are served"]}"#), "{body}");
        let full = Health { n_refused: 3, is_node_eligible: true, ..health }.healthz();
        let end = r#""nodeEligible":true,"frontendsWithoutRoom":3,"notReady":["3 frontends have no room in the maps: raise --max-services or --max-endpoints"]}"#;
        assert!(full.ends_with(end), "{full}");
    }

    #[test]
    fn what_is_not_ready_has_a_reason() {
        let start = Instant::now();
        let ready = Vitals::new(start);
        for (vitals, after, reasons) in [
            (ready.clone(), 0, &[][..]),
            (Vitals { self_test: SelfTest::Passed, ..ready.clone() }, 0, &[]),
            (
                Vitals { self_test: SelfTest::Pending, ..ready.clone() },
                0,
                &["self-test not run yet: it waits for the first sync"],
            ),
            (ready.clone(), 60, &["the agent is stuck"]),
            (Vitals { has_lost_pins: true, ..ready.clone() }, 0, &["pins were removed"]),
            (
                Vitals { n_refused: 2, is_node_eligible: false, ..ready },
                0,
                &["the Node is being", "2 frontends have"],
            ),
        ] {
            let health = vitals.evaluate(start + Duration::from_secs(after), SystemTime::UNIX_EPOCH);
            let found = health.not_ready();
            assert_eq!((found.len(), health.is_healthy()), (reasons.len(), reasons.is_empty()), "{found:?}");
            assert!(found.iter().zip(reasons).all(|(found, start)| found.starts_with(start)), "{found:?}");
        }
    }
}
