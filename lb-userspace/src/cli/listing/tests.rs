use expect_test::expect;
use lb_core::{desired::PacketMode, model::ingest};
use serde_json::json;

use super::*;

fn row(name: &str, address: &str, endpoints: &[&str]) -> FrontendRow {
    let address: SocketAddr = address.parse().unwrap();
    FrontendRow {
        namespace: if name.is_empty() { String::new() } else { "default".to_owned() },
        name: name.to_owned(),
        port_name: if name.is_empty() { String::new() } else { "http".to_owned() },
        protocol: Protocol::Tcp,
        kind: if name.is_empty() { "" } else { "ClusterIP" },
        address: address.ip(),
        port: address.port(),
        policy: TrafficPolicy::Cluster,
        affinity_seconds: 0,
        endpoints: endpoints.iter().map(|endpoint| undescribed(endpoint.parse().unwrap())).collect(),
        packets: None,
    }
}

#[test]
fn as_many_endpoints_are_shown_as_have_room() {
    let rows = [
        row("idle", "10.96.0.90:80", &[]),
        row("web", "10.96.0.80:80", &["10.244.1.10:8080", "10.244.2.10:8080", "10.244.3.10:8080"]),
        row("web", "[fd00:10:96::80]:80", &["[fd00:10:244:1::10]:8080", "[fd00:10:244:2::10]:8080"]),
        row("", "0.0.0.0:30080", &["10.244.1.10:8080"]),
        row("", "[::]:30080", &["[fd00:10:244:1::10]:8080"]),
    ];
    expect![[r"
        SERVICE            KIND       ADDRESS                  POLICY   ENDPOINTS
        default/idle:http  ClusterIP  10.96.0.90:80/tcp        Cluster  none: refused
        default/web:http   ClusterIP  10.96.0.80:80/tcp        Cluster  10.244.1.10:8080 +2 more
        default/web:http   ClusterIP  [fd00:10:96::80]:80/tcp  Cluster  [fd00:10:244:1::10]:8080 +1 more
        -                  -          0.0.0.0:30080/tcp        Cluster  10.244.1.10:8080
        -                  -          [::]:30080/tcp           Cluster  [fd00:10:244:1::10]:8080
    "]]
    .assert_eq(&table(&rows));
}

#[test]
fn a_table_without_room_counts_endpoints() {
    let long = "a-service-with-a-name-as-long-as-kubernetes-allows-for-services";
    let rows =
        [row(long, "[fd00:10:96:aaaa:bbbb:cccc::80]:80", &["[fd00:10:244:1::10]:8080", "10.0.0.1:80"])];
    let text = table(&rows);
    assert!(text.lines().last().unwrap().ends_with("Cluster  2 endpoints"), "{text}");
}

#[test]
fn an_ejection_counts_only_where_connections_are_observed() {
    let now = 100_000_000_000;
    let health = EndpointHealth {
        ejected_until: now + 1,
        failing_since: now,
        failures: 1,
        ejections: 2,
        latency: 7,
        ..EndpointHealth::default()
    };
    assert_eq!(HealthPart::new(false, &health, now), HealthPart::default());
    let expected = HealthPart {
        failures: Some(1),
        ejected_seconds: Some(1),
        ejected_reason: Some("ejected for 1 s: 1 failure: no answer; failing for 0 s".to_owned()),
        ejections: 2,
        connect_microseconds: Some(7),
    };
    assert_eq!(HealthPart::new(true, &health, now), expected);
}

/// A Service with the policy Local, one of whose two endpoints is on this node.
fn state_with_packets(packets: PacketMode) -> State {
    let service = json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.80", "clusterIPs": ["10.96.0.80"],
            "ipFamilies": ["IPv4"], "externalTrafficPolicy": "Local", "allocateLoadBalancerNodePorts": false,
            "loadBalancerSourceRanges": ["198.51.100.0/24"],
            "externalIPs": ["203.0.113.5"],
            "ports": [{"name": "http", "port": 80}, {"name": "sip", "port": 5060, "protocol": "SCTP"}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
    });
    let endpoint = |ip, node| json!({"addresses": [ip], "nodeName": node});
    let slice = json!({
        "metadata": {
            "namespace": "default", "name": "web-a", "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}, {"name": "sip", "port": 5060, "protocol": "SCTP"}],
        "endpoints": [endpoint("10.244.0.1", "node"), endpoint("10.244.1.1", "other")],
    });
    let settings = Settings { packets, ..Settings::of_node("node") };
    let (service, _issues) = ingest::service(&serde_json::from_value(service).unwrap());
    let (slice, _issues) = ingest::slice(&serde_json::from_value(slice).unwrap());
    state(settings, Vec::new(), Vec::new(), vec![Arc::new(service.unwrap())], vec![Arc::new(slice.unwrap())])
}

#[test]
fn what_only_packets_reach_is_listed_and_said() {
    let rows = |state: &State| {
        let mut rows = list(state.image(), Some(state), &BTreeMap::new());
        rows.extend(packets_alone(state));
        sort(&mut rows);
        rows
    };
    let on = rows(&state_with_packets(PacketMode::All));
    expect![[r"
        SERVICE           KIND          ADDRESS                POLICY   ENDPOINTS
        default/web:http  ClusterIP     10.96.0.80:80/tcp      Cluster  10.244.0.1:8080 10.244.1.1:8080
        default/web:http  LoadBalancer  203.0.113.1:80/tcp     Local    2 endpoints (packets only; from outside: 1; source ranges)
        default/web:http  ExternalIP    203.0.113.5:80/tcp     Local    2 endpoints (from outside: 1)
        default/web:sip   ClusterIP     10.96.0.80:5060/sctp   Cluster  2 endpoints (packets only)
        default/web:sip   LoadBalancer  203.0.113.1:5060/sctp  Local    2 endpoints (packets only; from outside: 1; source ranges)
        default/web:sip   ExternalIP    203.0.113.5:5060/sctp  Local    2 endpoints (packets only; from outside: 1)
    "]].assert_eq(&table(&on));
    let limited = on.iter().find(|row| row.address == IpAddr::from([203, 0, 113, 1])).unwrap();
    assert_eq!(
        serde_json::to_value(&limited.packets).unwrap(),
        json!({"only": true, "endpoints_from_outside": 1, "source_ranges": ["198.51.100.0/24"]})
    );
    assert!(rows(&state_with_packets(PacketMode::Off)).iter().all(|row| row.packets.is_none()));
}
