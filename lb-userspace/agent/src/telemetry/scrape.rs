//! One answer of `/metrics`: the values that the agent keeps, and those read per scrape.

use std::{collections::BTreeMap, fmt, time::Instant};

use lb_common::layout::{ConnectLatency, LATENCY_BUCKETS};
use lb_core::{
    ejection,
    model::{Protocol, ServiceKey},
    state::View,
};
use prometheus_client::{
    encoding::{
        EncodeMetric, MetricEncoder, NoLabelSet,
        text::{encode_eof, encode_registry},
    },
    metrics::{MetricType, counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::metrics::{
    CONNECT_DURATION, CONNECTIONS, DATAGRAMS, ENDPOINTS_EJECTED, MAP_CAPACITY, MAP_ENTRIES, Metrics, Real,
    SOURCE_ANSWER_AGE, SOURCE_FAILURES, register,
};
use crate::{serve::Published, source::Contact};

/// The calls of one service port, of both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// `connect()` calls that were redirected to an endpoint.
    pub redirected: u64,
    /// Refused calls.
    pub refused: u64,
    /// Datagrams of unconnected sockets that were redirected to an endpoint.
    pub datagrams: u64,
    /// How long connections took from their SYN to established.
    pub times: Times,
}

/// A distribution of times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Sum in microseconds.
    sum: u64,
    /// Number of times in each bucket of [`ConnectLatency`].
    buckets: [u64; LATENCY_BUCKETS],
}

impl From<ConnectLatency> for Times {
    fn from(ConnectLatency { sum, buckets }: ConnectLatency) -> Self {
        Self { sum, buckets: buckets.map(u64::from) }
    }
}

impl Times {
    fn add(&mut self, more: &Self) {
        self.sum = self.sum.saturating_add(more.sum);
        for (sum, more) in self.buckets.iter_mut().zip(more.buckets) {
            *sum += more;
        }
    }

    fn n(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// A histogram of each port. The library's own count one time after the other.
#[derive(Clone, Debug)]
struct Histograms(Vec<(PortLabels, Times)>);

impl EncodeMetric for Histograms {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        const SECOND: f64 = 1e6;
        for (labels, times) in &self.0 {
            let bound = |n| ConnectLatency::bound(n).map_or(f64::INFINITY, |bound| f64::from(bound) / SECOND);
            let buckets: Vec<(f64, u64)> =
                times.buckets.iter().enumerate().map(|(n, count)| (bound(n), *count)).collect();
            #[expect(clippy::cast_precision_loss, reason = "285 years are 2^53 microseconds")]
            let sum = times.sum as f64 / SECOND;
            encoder.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, times.n(), &buckets, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// Values of the labels namespace, service, port and protocol.
type PortLabels = [(&'static str, String); 4];

/// Renders everything in the text format of Prometheus.
///
/// `calls` returns the counters of a service id, `is_ejected` the state of an endpoint id. Ports that differ
/// only in their family are summed up.
///
/// # Errors
///
/// None: a `String` accepts all writes.
pub fn render(
    metrics: &Metrics,
    published: &Published,
    contact: Option<&Contact>,
    now: Instant,
    calls: impl Fn(u32) -> Calls,
    is_ejected: impl Fn(u32) -> bool,
) -> Result<String, fmt::Error> {
    let mut text = String::new();
    encode_registry(&mut text, metrics.registry())?;
    encode_registry(&mut text, &of_the_moment(published, contact, now, calls, is_ejected))?;
    encode_eof(&mut text)?;
    Ok(text)
}

fn of_the_moment(
    published: &Published,
    contact: Option<&Contact>,
    now: Instant,
    calls: impl Fn(u32) -> Calls,
    is_ejected: impl Fn(u32) -> bool,
) -> Registry {
    let mut registry = Registry::default();
    let connections =
        register(&mut registry, &CONNECTIONS, Family::<[(&str, String); 5], Counter>::default());
    let datagrams = register(&mut registry, &DATAGRAMS, Family::<PortLabels, Counter>::default());
    let mut histograms = Vec::new();
    for (labels, calls) in sums(&published.view, calls) {
        let [namespace, service, port, protocol] = labels.clone();
        for (result, n_calls) in [("redirected", calls.redirected), ("refused", calls.refused)] {
            let labels = [
                namespace.clone(),
                service.clone(),
                port.clone(),
                protocol.clone(),
                ("result", result.to_owned()),
            ];
            connections.get_or_create(&labels).inc_by(n_calls);
        }
        datagrams.get_or_create(&labels).inc_by(calls.datagrams);
        // A node calls few of a cluster's ports, and a histogram is sixteen lines.
        if calls.times.n() > 0 {
            histograms.push((labels, calls.times));
        }
    }
    let _registered = register(&mut registry, &CONNECT_DURATION, Histograms(histograms));
    let n_ejected = ejection::n_ejected(&published.view.image, is_ejected);
    let n_ejected = i64::try_from(n_ejected).unwrap_or(i64::MAX);
    let _former = register(&mut registry, &ENDPOINTS_EJECTED, <Gauge>::default()).set(n_ejected);
    let ages = register(&mut registry, &SOURCE_ANSWER_AGE, Family::<[(&str, &str); 1], Real>::default());
    for (kind, age) in contact.map(|contact| contact.ages(now)).unwrap_or_default() {
        ages.get_or_create(&[("kind", kind)]).set(age.as_secs_f64());
    }
    let failures = register(&mut registry, &SOURCE_FAILURES, Family::<[(&str, &str); 1], Counter>::default());
    for (reason, n_failures) in contact.map(Contact::failures).unwrap_or_default() {
        failures.get_or_create(&[("reason", reason)]).inc_by(n_failures);
    }
    let entries = register(&mut registry, &MAP_ENTRIES, Family::<[(&str, &str); 1], Gauge>::default());
    let capacity = register(&mut registry, &MAP_CAPACITY, Family::<[(&str, &str); 1], Gauge>::default());
    for map in &published.maps {
        entries.get_or_create(&[("map", map.map)]).set(map.n_entries.into());
        capacity.get_or_create(&[("map", map.map)]).set(map.capacity.into());
    }
    registry
}

/// The calls of each port, by its labels.
fn sums(view: &View, calls: impl Fn(u32) -> Calls) -> BTreeMap<PortLabels, Calls> {
    // A service may have tens of thousands of ports.
    let numbers: BTreeMap<(&ServiceKey, &str, Protocol), u16> = view
        .store
        .services()
        .flat_map(|service| {
            service.ports.iter().map(|port| ((&service.key, &*port.name, port.protocol), port.port))
        })
        .collect();
    let mut sums = BTreeMap::<PortLabels, Calls>::new();
    for (key, id) in &view.ports {
        // Before the first sync, and for lack of a grace period, a removed port may have frontends.
        let Some(number) = numbers.get(&(&key.service, &*key.port_name, key.protocol)) else { continue };
        let labels = [
            ("namespace", key.service.namespace.to_string()),
            ("service", key.service.name.to_string()),
            ("port", number.to_string()),
            ("protocol", key.protocol.to_string()),
        ];
        let (sum, more) = (sums.entry(labels).or_default(), calls(*id));
        sum.redirected = sum.redirected.saturating_add(more.redirected);
        sum.refused = sum.refused.saturating_add(more.refused);
        sum.datagrams = sum.datagrams.saturating_add(more.datagrams);
        sum.times.add(&more.times);
    }
    sums
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc, time::Duration};

    use lb_common::layout::{Frontend, Run};
    use lb_core::{
        desired::{FrontendAddress, PortKey, Settings},
        model::{Service, ServicePort},
        plan::{Capacity, audit::Faults},
        state::State,
        tables::{Entry, Image, MapUse},
    };

    use super::*;
    use crate::telemetry::metrics::{ALL, AuditResult, Kind};

    fn published() -> Published {
        let key = ServiceKey::new("default", "dns");
        let port =
            |name: &str, protocol, port| ServicePort { name: name.into(), protocol, port, node_port: None };
        let ports = vec![port("", Protocol::Tcp, 53), port("udp", Protocol::Udp, 53)];
        let service = Service::with_ports(key.clone(), ports);
        let of = |port_name: &str, protocol, ipv6| {
            Arc::new(PortKey { service: key.clone(), port_name: port_name.into(), protocol, ipv6 })
        };
        let mut state =
            State::new(Settings::of_node("n"), Vec::new(), Capacity::default(), &Image::default());
        state.change(|store| store.set_service(&key, Some(service)));
        let ports = [
            (of("", Protocol::Tcp, false), 0_u32),
            (of("", Protocol::Tcp, true), 1),
            (of("udp", Protocol::Udp, false), 2),
            (of("gone", Protocol::Udp, false), 3),
        ];
        let mut view = View { ports: ports.into_iter().collect(), ..state.view() };
        let entries = (0..5).map(|endpoint_id| Entry::new(endpoint_id, ([10, 0, 0, 1], 53).into()));
        view.image.runs4.insert(0, entries.clone().collect());
        view.image.runs4.insert(8, entries.take(2).collect());
        for (id, offset, len) in [(0, 0, 5), (1, 8, 2)] {
            let ip = std::net::Ipv4Addr::from(id).into();
            view.image.services.insert(FrontendAddress { ip, port: 53, protocol: Protocol::Tcp }, id);
            let run = Run { offset, len };
            view.image.frontends.insert(id, Frontend { run, health: 1, ..Frontend::default() });
        }
        let maps = state.map_use().map(|map| MapUse { n_entries: 3, capacity: 256, ..map });
        Published { view: Arc::new(view), maps, ..Published::new(&state) }
    }

    fn scrape() -> String {
        let metrics = Metrics::new();
        metrics.audited(AuditResult::Repaired, &Faults::from([("services4", 2)]));
        let start = Instant::now();
        let contact = Contact::new(["nodes"], ["connection"], start);
        assert_eq!(contact.answered("nodes", start), None);
        contact.broke("connection");
        contact.broke("connection");
        let now = start + Duration::from_millis(1500);
        let mut buckets = [0; LATENCY_BUCKETS];
        (buckets[0], buckets[12], buckets[13]) = (5, 2, 1);
        let times =
            |id| if id < 2 { ConnectLatency { sum: 2_500_000, buckets }.into() } else { Times::default() };
        let calls = |id: u32| Calls {
            redirected: 10 + u64::from(id),
            refused: 1,
            datagrams: u64::from(id),
            times: times(id),
        };
        render(&metrics, &published(), Some(&contact), now, calls, |id| id % 2 == 0).unwrap()
    }

    #[test]
    fn counters_of_both_families_are_summed_up_under_the_port_of_the_service() {
        let text = scrape();
        for line in [
            r#"socklb_connections_total{namespace="default",service="dns",port="53",protocol="TCP",result="redirected"} 21"#,
            r#"socklb_connections_total{namespace="default",service="dns",port="53",protocol="TCP",result="refused"} 2"#,
            r#"socklb_connections_total{namespace="default",service="dns",port="53",protocol="UDP",result="redirected"} 12"#,
            r#"socklb_datagrams_total{namespace="default",service="dns",port="53",protocol="UDP"} 2"#,
            r#"socklb_connect_duration_seconds_sum{namespace="default",service="dns",port="53",protocol="TCP"} 5.0"#,
            r#"socklb_connect_duration_seconds_count{namespace="default",service="dns",port="53",protocol="TCP"} 16"#,
            r#"socklb_connect_duration_seconds_bucket{le="0.000128",namespace="default",service="dns",port="53",protocol="TCP"} 10"#,
            r#"socklb_connect_duration_seconds_bucket{le="0.262144",namespace="default",service="dns",port="53",protocol="TCP"} 10"#,
            r#"socklb_connect_duration_seconds_bucket{le="0.524288",namespace="default",service="dns",port="53",protocol="TCP"} 14"#,
            r#"socklb_connect_duration_seconds_bucket{le="+Inf",namespace="default",service="dns",port="53",protocol="TCP"} 16"#,
            r#"socklb_map_entries{map="services4"} 3"#,
            r#"socklb_source_answer_age_seconds{kind="nodes"} 1.5"#,
            r#"socklb_source_failures_total{reason="connection"} 2"#,
            "socklb_endpoints_ejected 3",
            r#"socklb_map_capacity{map="services4"} 256"#,
            r#"socklb_audit_repairs_total{map="services4"} 2"#,
            r#"socklb_audit_repairs_total{map="endpoints6"} 0"#,
            r#"socklb_audits_total{result="repaired"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
        }
        assert!(!text.contains(r#"socklb_connect_duration_seconds_count{namespace="default",service="dns",port="53",protocol="UDP"}"#));
        assert!(text.ends_with("# EOF\n"));
    }

    /// All exposed metrics are documented, and all documented ones exposed.
    #[test]
    fn what_is_exposed_is_what_is_documented() {
        let text = scrape();
        let exposed: BTreeSet<(String, String)> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .map(|line| line.split_once(' ').unwrap())
            .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
            .collect();
        let documented = ALL.iter().map(|definition| match definition.kind {
            Kind::Counter => (definition.name.trim_end_matches("_total").to_owned(), "counter".to_owned()),
            Kind::Gauge => (definition.name.to_owned(), "gauge".to_owned()),
            Kind::Histogram => (definition.name.to_owned(), "histogram".to_owned()),
        });
        assert_eq!(exposed, documented.collect());
        for definition in ALL {
            for line in text.lines().filter(|line| line.starts_with(&format!("{}{{", definition.name))) {
                for label in definition.labels {
                    assert!(line.contains(&format!("{label}=\"")), "{line}");
                }
            }
        }
    }
}
