//! The Kubernetes DNS specification 1.1.0, sentence by sentence (kubernetes/dns, `docs/specification.md`),
//! and CoreDNS where it is silent.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::ingest;

fn add(store: &mut Store, object: Value) {
    let is_service = object["spec"].is_object();
    if is_service {
        let (service, issues) = ingest::any_service(&serde_json::from_value(object).unwrap(), None);
        assert_eq!(issues, []);
        let service = service.unwrap();
        let _changes = store.set_service(&service.key.clone(), Some(service));
    } else {
        let (slice, issues) = ingest::slice(&serde_json::from_value(object).unwrap());
        assert_eq!(issues, []);
        let slice = slice.unwrap();
        let _changes = store.set_slice(&slice.key(), Some(slice));
    }
}

fn service(name: &str, spec: &Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": name}, "spec": spec})
}

fn slice(name: &str, of: &str, family: &str, endpoints: &Value) -> Value {
    json!({
        "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": of}},
        "addressType": family,
        "ports": [{"name": "https", "protocol": "TCP", "port": 8443}, {"name": "", "protocol": "UDP", "port": 1}],
        "endpoints": endpoints,
    })
}

fn store() -> Store {
    let mut store = Store::new();
    let https = json!([{"name": "https", "port": 443}, {"name": "dns", "port": 53, "protocol": "UDP"}]);
    let both = json!({
        "clusterIP": "10.3.0.1", "clusterIPs": ["10.3.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
        "ports": https,
    });
    let unnamed = json!([{"port": 80}]);
    for object in [
        service("kubernetes", &both),
        service("unnamed", &json!({"clusterIP": "10.3.0.2", "ports": unnamed})),
        service("headless", &json!({"clusterIP": "None", "ports": https})),
        service("empty", &json!({"clusterIP": "None", "ports": https})),
        service("early", &json!({"clusterIP": "None", "publishNotReadyAddresses": true, "ports": https})),
        service("foo", &json!({"type": "ExternalName", "externalName": "www.Example.com."})),
        slice(
            "headless-1",
            "headless",
            "IPv4",
            &json!([
                {"addresses": ["10.4.0.100"], "hostname": "my-pet"},
                {"addresses": ["10.4.0.101"], "hostname": "my-pet-2"},
                {"addresses": ["10.4.0.102"]},
                {"addresses": ["10.4.0.103"], "hostname": "late", "conditions": {"ready": false}},
            ]),
        ),
        // An endpoint may be in two slices, and a hostname may have several addresses.
        slice(
            "headless-2",
            "headless",
            "IPv4",
            &json!([{"addresses": ["10.4.0.102"]}, {"addresses": ["10.4.0.110"], "hostname": "my-pet"}]),
        ),
        slice("headless-3", "headless", "IPv6", &json!([{"addresses": ["fd00:4::1"], "hostname": "my-pet"}])),
        slice(
            "early-1",
            "early",
            "IPv4",
            &json!([{"addresses": ["10.4.0.5"], "conditions": {"ready": false}}]),
        ),
        slice("kubernetes-1", "kubernetes", "IPv4", &json!([{"addresses": ["10.4.0.9"]}])),
        slice("orphan-1", "orphan", "IPv4", &json!([{"addresses": ["10.4.0.8"], "hostname": "alone"}])),
    ] {
        add(&mut store, object);
    }
    add(
        &mut store,
        json!({"metadata": {"namespace": "kube-system", "name": "kube-dns"},
            "spec": {"clusterIP": "10.3.0.10", "ports": [{"name": "dns", "protocol": "UDP", "port": 53}]}}),
    );
    store
}

fn zone() -> Zone {
    zone_of(store())
}

fn zone_of(store: Store) -> Zone {
    let settings = Settings {
        domain: "cluster.local".into(),
        forward: vec!["legacy.svc.cluster.local".into()],
        dns_service: ServiceKey::new("kube-system", "kube-dns"),
        serial: 7,
    };
    Zone::new(store, settings)
}

fn ask(zone: &Zone, name: &str, kind: &str) -> Answer {
    let labels: Vec<&[u8]> = name.split('.').filter(|label| !label.is_empty()).map(str::as_bytes).collect();
    zone.answer(&Question { labels: &labels, record_type: kind.parse().unwrap() })
}

/// The answer in short: lines without the name of the question, or what else it is.
fn shown(name: &str, kind: &str) -> Vec<String> {
    match ask(&zone(), name, kind) {
        Answer::Forward => vec!["forward".to_owned()],
        Answer::NoData { .. } => vec!["no data".to_owned()],
        Answer::NxDomain { .. } => vec!["no name".to_owned()],
        Answer::Records(Records { answers, .. }) => {
            answers.iter().map(|record| format!("{} {}", record.ttl, record.data)).collect()
        }
    }
}

fn check(cases: &[(&str, &str, &[&str])]) {
    for (name, kind, expected) in cases {
        assert_eq!(shown(name, kind), *expected, "{name} {kind}");
    }
}

/// 2.1: "All comparisons between query data and data in Kubernetes are case-insensitive."
#[test]
fn n1_case_does_not_count() {
    check(&[
        ("KUBERNETES.Default.SVC.Cluster.Local", "A", &["5 A 10.3.0.1"]),
        (
            "_HTTPS._Tcp.kubernetes.default.svc.cluster.local",
            "SRV",
            &["5 SRV 0 100 443 kubernetes.default.svc.cluster.local."],
        ),
        ("1.0.3.10.IN-ADDR.arpa", "PTR", &["5 PTR kubernetes.default.svc.cluster.local."]),
    ]);
}

/// 2.2: a `TXT` record with the version of the schema.
#[test]
fn n2_the_version_of_the_schema() {
    check(&[
        ("dns-version.cluster.local", "TXT", &["28800 TXT \"1.1.0\""]),
        ("dns-version.cluster.local", "A", &["no data"]),
    ]);
}

/// 2.3.1: a Service's name has its cluster IPs.
#[test]
fn n3_cluster_ips() {
    check(&[
        ("kubernetes.default.svc.cluster.local", "A", &["5 A 10.3.0.1"]),
        ("kubernetes.default.svc.cluster.local", "AAAA", &["5 AAAA fd00::1"]),
        ("unnamed.default.svc.cluster.local", "AAAA", &["no data"]),
        ("kubernetes.default.svc.cluster.local", "TXT", &["no data"]),
        ("kubernetes.other.svc.cluster.local", "A", &["no name"]),
        // RFC 8482: one of its records is enough.
        ("kubernetes.default.svc.cluster.local", "ANY", &["5 A 10.3.0.1"]),
    ]);
}

/// 2.3.2: an `SRV` record for each named port; unnamed ports have none.
#[test]
fn n4_ports_of_a_service() {
    check(&[
        (
            "_https._tcp.kubernetes.default.svc.cluster.local",
            "SRV",
            &["5 SRV 0 100 443 kubernetes.default.svc.cluster.local."],
        ),
        ("_https._tcp.kubernetes.default.svc.cluster.local", "A", &["no data"]),
        (
            "_dns._udp.kubernetes.default.svc.cluster.local",
            "SRV",
            &["5 SRV 0 100 53 kubernetes.default.svc.cluster.local."],
        ),
        ("_https._udp.kubernetes.default.svc.cluster.local", "SRV", &["no name"]),
        ("_._tcp.unnamed.default.svc.cluster.local", "SRV", &["no name"]),
        ("https.tcp.kubernetes.default.svc.cluster.local", "SRV", &["no name"]),
        // An empty name between the two.
        ("_tcp.kubernetes.default.svc.cluster.local", "SRV", &["no data"]),
        ("_sctp.kubernetes.default.svc.cluster.local", "SRV", &["no name"]),
    ]);
}

/// 2.3.2 and 2.4.2: the additional section may have the addresses.
#[test]
fn n5_ports_come_with_addresses() {
    for (name, expected) in [
        ("_https._tcp.kubernetes.default.svc.cluster.local", 2),
        ("_https._tcp.headless.default.svc.cluster.local", 5),
    ] {
        let Answer::Records(records) = ask(&zone(), name, "SRV") else { panic!("{name}") };
        assert_eq!(records.additional.len(), expected, "{name}: {records:?}");
        assert!(records.additional.iter().all(|record| record.owner.is_some()), "{name}");
    }
}

/// 2.3.3: a cluster IP has its Service's name.
#[test]
fn n6_names_of_cluster_ips() {
    let v6 = format!("1.{}0.0.d.f.ip6.arpa", "0.".repeat(27));
    check(&[
        ("1.0.3.10.in-addr.arpa", "PTR", &["5 PTR kubernetes.default.svc.cluster.local."]),
        ("1.0.3.10.in-addr.arpa", "A", &["no data"]),
        (&v6, "PTR", &["5 PTR kubernetes.default.svc.cluster.local."]),
        // Of others: they may own the network.
        ("1.2.0.192.in-addr.arpa", "PTR", &["forward"]),
        ("0.3.10.in-addr.arpa", "PTR", &["forward"]),
        ("x.0.3.10.in-addr.arpa", "PTR", &["forward"]),
    ]);
}

/// 2.4.1: a headless Service's name has the addresses of its ready endpoints; without any it does not exist.
#[test]
fn n7_endpoints_of_a_headless_service() {
    check(&[
        (
            "headless.default.svc.cluster.local",
            "A",
            &["5 A 10.4.0.100", "5 A 10.4.0.101", "5 A 10.4.0.102", "5 A 10.4.0.110"],
        ),
        ("headless.default.svc.cluster.local", "AAAA", &["5 AAAA fd00:4::1"]),
        ("empty.default.svc.cluster.local", "A", &["no name"]),
        // Its Service publishes endpoints that are not ready.
        ("early.default.svc.cluster.local", "A", &["5 A 10.4.0.5"]),
        // No Service has them.
        ("orphan.default.svc.cluster.local", "A", &["no name"]),
    ]);
}

/// 2.4.1: an endpoint's own name has all of its addresses.
#[test]
fn n8_hostnames() {
    check(&[
        ("my-pet.headless.default.svc.cluster.local", "A", &["5 A 10.4.0.100", "5 A 10.4.0.110"]),
        ("my-pet.headless.default.svc.cluster.local", "AAAA", &["5 AAAA fd00:4::1"]),
        ("my-pet-2.headless.default.svc.cluster.local", "AAAA", &["no data"]),
        // Without a hostname, as CoreDNS: the address.
        ("10-4-0-102.headless.default.svc.cluster.local", "A", &["5 A 10.4.0.102"]),
        ("10-4-0-100.headless.default.svc.cluster.local", "A", &["no name"]),
        ("late.headless.default.svc.cluster.local", "A", &["no name"]),
        ("10-4-0-9.kubernetes.default.svc.cluster.local", "A", &["5 A 10.4.0.9"]),
    ]);
}

/// 2.4.2: an `SRV` record for each port and ready endpoint.
#[test]
fn n9_ports_of_a_headless_service() {
    check(&[
        (
            "_https._tcp.headless.default.svc.cluster.local",
            "SRV",
            &[
                "5 SRV 0 33 8443 10-4-0-102.headless.default.svc.cluster.local.",
                "5 SRV 0 33 8443 my-pet-2.headless.default.svc.cluster.local.",
                "5 SRV 0 33 8443 my-pet.headless.default.svc.cluster.local.",
            ],
        ),
        ("_https._tcp.empty.default.svc.cluster.local", "SRV", &["no name"]),
    ]);
}

/// 2.4.3: the address of a ready endpoint with a hostname has its name.
#[test]
fn n10_names_of_endpoints() {
    check(&[
        ("100.0.4.10.in-addr.arpa", "PTR", &["5 PTR my-pet.headless.default.svc.cluster.local."]),
        ("102.0.4.10.in-addr.arpa", "PTR", &["forward"]),
        ("103.0.4.10.in-addr.arpa", "PTR", &["forward"]),
    ]);
}

/// 2.5: a Service of type `ExternalName` is an alias.
#[test]
fn n11_external_names() {
    for (kind, chase) in [("A", true), ("AAAA", true), ("TXT", true), ("CNAME", false)] {
        let Answer::Records(records) = ask(&zone(), "foo.default.svc.cluster.local", kind) else {
            panic!("{kind}")
        };
        assert_eq!(records.answers.len(), 1, "{kind}");
        assert_eq!(records.answers[0].data.to_string(), "CNAME www.example.com.", "{kind}");
        assert_eq!(records.chase.as_deref(), chase.then_some("www.example.com"), "{kind}");
    }
}

/// 2.6: pods by address.
#[test]
fn n12_pods() {
    check(&[
        ("10-4-0-9.default.pod.cluster.local", "A", &["5 A 10.4.0.9"]),
        ("10-4-0-9.default.pod.cluster.local", "AAAA", &["no data"]),
        ("fd00--9.default.pod.cluster.local", "AAAA", &["5 AAAA fd00::9"]),
        ("10-4-0-256.default.pod.cluster.local", "A", &["no name"]),
        ("web.default.pod.cluster.local", "A", &["no name"]),
        ("default.pod.cluster.local", "A", &["no data"]),
    ]);
}

/// What has names below it exists (RFC 8020), the zone has an authority, and all else below it has no name.
#[test]
fn n13_the_zone() {
    check(&[
        (
            "cluster.local",
            "SOA",
            &["5 SOA ns.dns.cluster.local. hostmaster.cluster.local. 7 7200 1800 86400 5"],
        ),
        ("cluster.local", "NS", &["5 NS ns.dns.cluster.local."]),
        ("cluster.local", "A", &["no data"]),
        ("dns.cluster.local", "A", &["no data"]),
        ("ns.dns.cluster.local", "A", &["5 A 10.3.0.10"]),
        ("svc.cluster.local", "A", &["no data"]),
        ("default.svc.cluster.local", "A", &["no data"]),
        ("nothing.svc.cluster.local", "A", &["no name"]),
        ("nothing.cluster.local", "A", &["no name"]),
        ("a.b.c.d.e.f.svc.cluster.local", "A", &["no name"]),
    ]);
}

/// What search lists make of a name is answered without asking anyone.
#[test]
fn n14_search_lists() {
    check(&[
        ("example.com.default.svc.cluster.local", "A", &["no name"]),
        ("example.com.svc.cluster.local", "A", &["no name"]),
        ("example.com.cluster.local", "A", &["no name"]),
        ("kubernetes.default.svc.cluster.local.default.svc.cluster.local", "A", &["no name"]),
        ("example.com", "A", &["forward"]),
        ("local", "A", &["forward"]),
        ("", "NS", &["forward"]),
        ("notcluster.local", "A", &["forward"]),
    ]);
}

/// `--names-forward`
#[test]
fn n15_forwarded_domains() {
    check(&[
        ("web.legacy.svc.cluster.local", "A", &["forward"]),
        ("legacy.svc.cluster.local", "A", &["forward"]),
        ("legacy.other.svc.cluster.local", "A", &["no name"]),
    ]);
}

/// Labels may hold any octets: a dot inside of one is no border, and other text is no panic.
#[test]
fn n16_labels_are_octets() {
    let zone = zone();
    for (labels, is_found) in [
        (&[&b"kubernetes"[..], b"default", b"svc", b"cluster", b"local"][..], true),
        (&[b"kubernetes.default", b"svc", b"cluster", b"local"], false),
        (&[b"kubernetes\0", b"default", b"svc", b"cluster", b"local"], false),
        (&[b"\xff\xfe", b"default", b"svc", b"cluster", b"local"], false),
        (&["ſvc".as_bytes(), b"default", b"svc", b"cluster", b"local"], false),
    ] {
        let answer = zone.answer(&Question { labels, record_type: RecordType::A });
        assert_eq!(matches!(answer, Answer::Records(_)), is_found, "{labels:?}: {answer:?}");
        assert_eq!(matches!(answer, Answer::NxDomain { .. }), !is_found, "{labels:?}: {answer:?}");
    }
}

fn any_label() -> impl Strategy<Value = Vec<u8>> {
    const KNOWN: [&str; 11] =
        ["svc", "pod", "default", "headless", "my-pet", "_tcp", "_https", "in-addr", "arpa", "10", "dns"];
    prop_oneof![
        proptest::sample::select(&KNOWN[..]).prop_map(|label| label.as_bytes().to_vec()),
        proptest::collection::vec(any::<u8>(), 1..8),
    ]
}

proptest! {
    /// No question panics, and a name below the zone is never forwarded.
    #[test]
    fn any_question_has_an_answer(mut labels in proptest::collection::vec(any_label(), 0..8), below in any::<bool>()) {
        if below {
            labels.extend([b"cluster".to_vec(), b"local".to_vec()]);
        }
        let labels: Vec<&[u8]> = labels.iter().map(Vec::as_slice).collect();
        let zone = zone();
        for record_type in [RecordType::A, RecordType::Srv, RecordType::Ptr, RecordType::Any, RecordType::Other] {
            let answer = zone.answer(&Question { labels: &labels, record_type });
            prop_assert!(!below || answer != Answer::Forward);
        }
    }
}
