use expect_test::expect;

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
