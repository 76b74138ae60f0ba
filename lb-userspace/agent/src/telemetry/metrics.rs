//! The agent's metrics. Their names are an interface to dashboards.
//!
//! # Invariants
//!
//! - Each metric has a [`Definition`] in [`ALL`], by which it is registered and docs/METRICS.md is generated.
//! - A metric with a name of kube-proxy (`kubeproxy_`) has kube-proxy's meaning and buckets.
//! - Labels have bounded sets of values: maps, results, codes, and the ports of Services.

use std::{
    fmt::Write as _,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime},
};

use lb_common::{hooks::HOOKS, maps::MAPS};
use lb_core::{model::Protocol, plan::audit::Faults};
use prometheus_client::{
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Metric, Registry},
};

/// A gauge of a real number, such as a time.
pub(super) type Real = Gauge<f64, AtomicU64>;
/// One counter per value of a label.
type By = Family<[(&'static str, &'static str); 1], Counter>;

/// Description of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Its name, as exposed; a histogram appends `_bucket`, `_sum` and `_count`.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// Its help text, without a full stop.
    pub help: &'static str,
}

/// Type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never decreases while the agent runs.
    Counter,
    /// A current value.
    Gauge,
    /// A distribution.
    Histogram,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

macro_rules! definitions {
    ($($constant:ident: $kind:ident $name:literal [$($label:literal),*] $help:expr;)*) => {
        $(#[doc = concat!("`", $name, "`")]
        pub const $constant: Definition = Definition {
            name: $name,
            kind: Kind::$kind,
            labels: &[$($label),*],
            help: $help,
        };)*

        /// Every metric, in the order of the documentation.
        pub const ALL: &[Definition] = &[$($constant),*];
    };
}

definitions! {
    SYNC_DURATION: Histogram "kubeproxy_sync_proxy_rules_duration_seconds" []
        "Time of one sync: computing the changes to the maps, and writing them to the kernel";
    SYNC_LAST: Gauge "kubeproxy_sync_proxy_rules_last_timestamp_seconds" []
        "When the last sync succeeded, in seconds since 1970; 0 before the first";
    SYNC_LAST_QUEUED: Gauge "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds" []
        "When a change last required a sync, in seconds since 1970; 0 before the first";
    NETWORK_PROGRAMMING: Histogram "kubeproxy_network_programming_duration_seconds" []
        "Time from the change of a Pod or Service, by the slice's annotation endpoints.kubernetes.io/last-change-trigger-time, \
         until the kernel follows it. Not for changes before the agent started, nor for first lists and re-lists. Compares \
         two machines' clocks; a time in the future counts as 0";
    HEALTHZ: Counter "kubeproxy_proxy_healthz_total" ["code"]
        "Answers at /healthz of --healthz-bind-address, by status code";
    LIVEZ: Counter "kubeproxy_proxy_livez_total" ["code"]
        "Answers at /livez of --healthz-bind-address, by status code";
    PROGRAMMING: Histogram "socklb_programming_duration_seconds" []
        "Time from the arrival of an event until the kernel follows it. Not for first lists and re-lists";
    CHANGES_WAITING: Gauge "socklb_changes_waiting" []
        "Events that have arrived and wait for a sync";
    SYNC_ERRORS: Counter "socklb_sync_errors_total" []
        "Failed syncs. After each, the tables are read and the sync is retried";
    SYNC_OPERATIONS: Counter "socklb_sync_operations_total" []
        "Operations of syncs on the kernel's maps";
    CONNECTIONS: Counter "socklb_connections_total" ["namespace", "service", "port", "protocol", "result"]
        "Calls of a Service's port on this node since the port is served: result redirected for connect() calls that were \
         redirected to an endpoint, refused for calls of any kind that found none. Whether the endpoint accepts is not \
         counted";
    DATAGRAMS: Counter "socklb_datagrams_total" ["namespace", "service", "port", "protocol"]
        "Datagrams of unconnected sockets that were redirected to an endpoint of a Service's port on this node, since the port \
         is served";
    CONNECT_DURATION: Histogram "socklb_connect_duration_seconds" ["namespace", "service", "port", "protocol"]
        "Time from the first SYN of a connection to a Service's port until it is established, on this node, since the port is \
         served. Only for ports with passive health, once a connection was established. Above half a second a SYN was lost";
    ENDPOINTS_EJECTED: Gauge "socklb_endpoints_ejected" []
        "Endpoints of service ports that calls from this node avoid, because connections to them failed: socklb services names \
         them";
    MAP_ENTRIES: Gauge "socklb_map_entries" ["map"]
        "Entries in use. Freed endpoints count until a grace period has expired";
    MAP_CAPACITY: Gauge "socklb_map_capacity" ["map"]
        "Maximum number of entries: --max-services, --max-endpoints";
    AUDITS: Counter "socklb_audits_total" ["result"]
        "Audits, which compare the kernel's maps with the image: result clean, repaired or error";
    AUDIT_REPAIRS: Counter "socklb_audit_repairs_total" ["map"]
        "Entries of the kernel's maps that others deleted, changed or added, and that an audit repaired";
    PIN_REPAIRS: Counter "socklb_pin_repairs_total" ["pin"]
        "Pins of maps and hooks that others removed or replaced, and hooks whose program was detached or replaced, that an \
         audit repaired";
    PACKET_TRANSACTIONS: Counter "socklb_packet_transactions_total" ["result"]
        "Transactions that changed the nftables rules of --packets: result done or error. After an error the tables are read and \
         the change is retried";
    PACKET_DURATION: Histogram "socklb_packet_transaction_duration_seconds" []
        "Time of a transaction that changed the nftables rules, until the kernel's answer";
    SELF_TESTS: Counter "socklb_self_tests_total" ["result"]
        "Calls of the agent's own Service by a separate process, through the hooks and tables of all Services: result passed or \
         failed";
    SOCKETS_DESTROYED: Counter "socklb_sockets_destroyed_total" ["protocol"]
        "Connected sockets of this node's programs that were destroyed because their endpoint no longer serves the Service, which \
         the log names";
    ISSUES: Gauge "socklb_issues" []
        "Current issues of objects; each is in the log";
    SOURCE_COMPLETE: Gauge "socklb_source_complete" []
        "1 once the first lists of Services, EndpointSlices, Nodes and ServiceCIDRs are complete, else 0: no sync before";
    SERVES_SNAPSHOT: Gauge "socklb_serves_snapshot" []
        "1 while the snapshot is served because the source does not answer, else 0";
    SOURCE_ANSWER_AGE: Gauge "socklb_source_answer_age_seconds" ["kind"]
        "Time since the API server last answered about a kind of objects, or since the start before the first answer. A healthy \
         server sends something about once a minute; above 75 the agent lists again";
    SOURCE_FAILURES: Counter "socklb_source_failures_total" ["reason"]
        "Failed requests and watches of the API server: reason connection, silence, unauthorized (401), forbidden (403), \
         throttled (429), server_error (5xx), expired (a version that the server no longer has, or not yet) or other";
    SNAPSHOT_LAST: Gauge "socklb_snapshot_last_timestamp_seconds" []
        "When the snapshot was last written, in seconds since 1970; 0 before the first write";
    SNAPSHOT_ERRORS: Counter "socklb_snapshot_errors_total" []
        "Failed writes of the snapshot";
    SNAPSHOT_BYTES: Counter "socklb_snapshot_written_bytes_total" []
        "Bytes written to the snapshot and its journal";
}

const PASSED: &str = "passed";
const FAILED: &str = "failed";

const AUDITED: [&str; 8] = [
    "services4",
    "services6",
    "frontends",
    "endpoints4",
    "endpoints6",
    "node_addrs",
    "cluster_ips",
    "service_cidrs",
];

/// Result of an audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditResult {
    /// The maps matched the image.
    Clean,
    /// Entries differed and were repaired.
    Repaired,
    /// The maps could not be read or repaired.
    Error,
}

/// The values. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    sync_duration: Histogram,
    packet_transactions: By,
    packet_duration: Histogram,
    sync_last: Real,
    sync_last_queued: Real,
    network_programming: Histogram,
    healthz: By,
    livez: By,
    programming: Histogram,
    changes_waiting: Gauge,
    sync_errors: Counter,
    sync_operations: Counter,
    audits: By,
    audit_repairs: By,
    pin_repairs: By,
    self_tests: By,
    sockets_destroyed: By,
    issues: Gauge,
    source_complete: Gauge,
    serves_snapshot: Gauge,
    snapshot_last: Real,
    snapshot_errors: Counter,
    snapshot_bytes: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

pub(super) fn register<M: Metric + Clone>(registry: &mut Registry, definition: &Definition, metric: M) -> M {
    // The library appends `_total` to counters, and a full stop to help texts.
    let name = match definition.kind {
        Kind::Counter => definition.name.trim_end_matches("_total"),
        Kind::Gauge | Kind::Histogram => definition.name,
    };
    registry.register(name, definition.help, metric.clone());
    metric
}

/// kube-proxy's buckets of the network programming latency, in seconds.
fn network_programming_buckets() -> impl Iterator<Item = f64> {
    let whole = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    [0.25, 0.5].into_iter().chain(whole.map(f64::from))
}

fn seconds_since_1970(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

impl Metrics {
    /// All metrics, without a value yet.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let registry = &mut registry;
        let seconds_doubling = |first, n| Histogram::new(exponential_buckets(first, 2.0, n));
        let mut metrics = Self {
            sync_duration: register(registry, &SYNC_DURATION, seconds_doubling(0.001, 15)),
            sync_last: register(registry, &SYNC_LAST, Real::default()),
            sync_last_queued: register(registry, &SYNC_LAST_QUEUED, Real::default()),
            network_programming: register(
                registry,
                &NETWORK_PROGRAMMING,
                Histogram::new(network_programming_buckets()),
            ),
            healthz: register(registry, &HEALTHZ, By::default()),
            livez: register(registry, &LIVEZ, By::default()),
            // From 1/8 ms, a sync of one endpoint, to a minute.
            programming: register(registry, &PROGRAMMING, seconds_doubling(0.000_125, 20)),
            changes_waiting: register(registry, &CHANGES_WAITING, Gauge::default()),
            sync_errors: register(registry, &SYNC_ERRORS, Counter::default()),
            sync_operations: register(registry, &SYNC_OPERATIONS, Counter::default()),
            audits: register(registry, &AUDITS, By::default()),
            audit_repairs: register(registry, &AUDIT_REPAIRS, By::default()),
            pin_repairs: register(registry, &PIN_REPAIRS, By::default()),
            packet_transactions: register(registry, &PACKET_TRANSACTIONS, By::default()),
            packet_duration: register(registry, &PACKET_DURATION, seconds_doubling(0.000_125, 20)),
            self_tests: register(registry, &SELF_TESTS, By::default()),
            sockets_destroyed: register(registry, &SOCKETS_DESTROYED, By::default()),
            issues: register(registry, &ISSUES, Gauge::default()),
            source_complete: register(registry, &SOURCE_COMPLETE, Gauge::default()),
            serves_snapshot: register(registry, &SERVES_SNAPSHOT, Gauge::default()),
            snapshot_last: register(registry, &SNAPSHOT_LAST, Real::default()),
            snapshot_errors: register(registry, &SNAPSHOT_ERRORS, Counter::default()),
            snapshot_bytes: register(registry, &SNAPSHOT_BYTES, Counter::default()),
            registry: Arc::default(),
        };
        metrics.registry = Arc::new(std::mem::take(registry));
        // A counter that first appears with a value hides that value from `rate()`.
        for map in AUDITED {
            let _zero = metrics.audit_repairs.get_or_create(&[("map", map)]);
        }
        for pin in MAPS.iter().map(|map| map.name).chain(HOOKS.iter().map(|hook| hook.name)) {
            let _zero = metrics.pin_repairs.get_or_create(&[("pin", pin)]);
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let _zero = metrics.sockets_destroyed.get_or_create(&[("protocol", label(protocol))]);
        }
        for result in [PASSED, FAILED] {
            let _zero = metrics.self_tests.get_or_create(&[("result", result)]);
        }
        for end in [AuditResult::Clean, AuditResult::Repaired, AuditResult::Error] {
            let _zero = metrics.audits.get_or_create(&[("result", end.name())]);
        }
        for result in ["done", "error"] {
            let _zero = metrics.packet_transactions.get_or_create(&[("result", result)]);
        }
        for family in [&metrics.healthz, &metrics.livez] {
            for code in ["200", "503"] {
                let _zero = family.get_or_create(&[("code", code)]);
            }
        }
        metrics
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// A change requires a sync.
    pub fn queued(&self, clock: SystemTime) {
        self.sync_last_queued.set(seconds_since_1970(clock));
    }

    /// A sync succeeded.
    pub fn synced(&self, took: Duration, n_operations: usize, clock: SystemTime) {
        self.sync_duration.observe(took.as_secs_f64());
        self.sync_operations.inc_by(n_operations as u64);
        self.sync_last.set(seconds_since_1970(clock));
    }

    /// A sync failed.
    pub fn sync_failed(&self) {
        self.sync_errors.inc();
    }

    /// Sets the number of events that wait for a sync.
    pub fn waiting(&self, n_changes: usize) {
        self.changes_waiting.set(i64::try_from(n_changes).unwrap_or(i64::MAX));
    }

    /// A sync has carried out a change.
    pub fn programmed(&self, since_arrival: Duration, since_trigger: Option<Duration>) {
        self.programming.observe(since_arrival.as_secs_f64());
        if let Some(since_trigger) = since_trigger {
            self.network_programming.observe(since_trigger.as_secs_f64());
        }
    }

    /// A self-test has finished.
    pub fn self_tested(&self, has_passed: bool) {
        self.self_tests.get_or_create(&[("result", if has_passed { PASSED } else { FAILED })]).inc();
    }

    /// An audit has finished.
    pub fn audited(&self, end: AuditResult, repaired: &Faults) {
        self.audits.get_or_create(&[("result", end.name())]).inc();
        for (&map, &n_entries) in repaired {
            self.audit_repairs.get_or_create(&[("map", map)]).inc_by(n_entries);
        }
    }

    /// A transaction has changed the rules for packets.
    pub fn packets_changed(&self, took: Duration) {
        self.packet_transactions.get_or_create(&[("result", "done")]).inc();
        self.packet_duration.observe(took.as_secs_f64());
    }

    /// A transaction of the rules for packets has failed.
    pub fn packets_failed(&self) {
        self.packet_transactions.get_or_create(&[("result", "error")]).inc();
    }

    /// A pin, or the program of a hook, was restored.
    pub fn restored(&self, pin: &'static str) {
        self.pin_repairs.get_or_create(&[("pin", pin)]).inc();
    }

    /// Sockets of a protocol were destroyed.
    pub fn destroyed(&self, protocol: Protocol, n_sockets: u64) {
        self.sockets_destroyed.get_or_create(&[("protocol", label(protocol))]).inc_by(n_sockets);
    }

    /// Sets the number of issues.
    pub fn issues(&self, n_issues: usize) {
        self.issues.set(i64::try_from(n_issues).unwrap_or(i64::MAX));
    }

    /// Sets the origin of the served objects.
    pub fn source(&self, is_complete: bool, serves_snapshot: bool) {
        self.source_complete.set(is_complete.into());
        self.serves_snapshot.set(serves_snapshot.into());
    }

    /// A write of the snapshot has finished, with this many bytes, or failed.
    pub fn saved(&self, n_bytes: Option<u64>, clock: SystemTime) {
        if let Some(n_bytes) = n_bytes {
            self.snapshot_last.set(seconds_since_1970(clock));
            self.snapshot_bytes.inc_by(n_bytes);
        } else {
            self.snapshot_errors.inc();
        }
    }

    /// `/healthz` was answered.
    pub fn answered_healthz(&self, is_ok: bool) {
        self.healthz.get_or_create(&[("code", code(is_ok))]).inc();
    }

    /// `/livez` was answered.
    pub fn answered_livez(&self, is_ok: bool) {
        self.livez.get_or_create(&[("code", code(is_ok))]).inc();
    }
}

impl AuditResult {
    const fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Repaired => "repaired",
            Self::Error => "error",
        }
    }
}

/// The protocol as in other metrics.
const fn label(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}

const fn code(is_ok: bool) -> &'static str {
    if is_ok { "200" } else { "503" }
}

/// The text of docs/METRICS.md.
#[must_use]
pub fn document() -> String {
    let mut text = "# Metrics\n\n\
        Generated from `lb-userspace/agent/src/telemetry/metrics.rs` by a test; `UPDATE_EXPECT=1 cargo test -p lb-agent telemetry` \
        updates it.\n\n\
        `/metrics` of `--metrics-bind-address` (127.0.0.1:10249) returns them in the OpenMetrics text format of Prometheus. \
        Names that begin with\n`kubeproxy_` mean the same as in kube-proxy. Both address families count together, so there is \
        no label `ip_family`. Durations are in\nseconds.\n\n\
        | name | type | labels | meaning |\n| --- | --- | --- | --- |\n"
        .to_owned();
    for Definition { name, kind, labels, help } in ALL {
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        let _into_a_string =
            writeln!(text, "| `{name}` | {} | {} | {help}. |", kind.name(), labels.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_metrics_are_these() {
        expect_test::expect_file!["../../../../docs/METRICS.md"].assert_eq(&document());
    }

    #[test]
    fn buckets_of_the_network_programming_latency_are_those_of_kube_proxy() {
        let buckets: Vec<f64> = network_programming_buckets().collect();
        assert_eq!(buckets[..4], [0.25, 0.5, 1.0, 2.0]);
        assert_eq!(buckets[60..64], [59.0, 60.0, 65.0, 70.0]);
        assert_eq!(buckets[72..], [115.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0]);
        assert_eq!(buckets.len(), 80);
    }
}
