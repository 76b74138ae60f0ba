use std::{collections::BTreeSet, net::IpAddr};

use serde_json::{Value, json};

use crate::model::{
    Protocol, ServiceType, TrafficPolicy,
    fixture::{ingest_service, patched, service, texts},
};

fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|ip| ip.parse().unwrap()).collect()
}

/// R1: headless Services and `ExternalName` are skipped without an issue; a missing address is reported.
#[test]
fn r1_services_without_a_cluster_ip_are_skipped() {
    for (patch, issues) in [
        (json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}), vec![]),
        (json!({"spec": {"type": "ExternalName"}}), vec![]),
        (json!({"spec": {"type": "ExternalName", "clusterIP": null, "externalName": "example.org"}}), vec![]),
        (
            json!({"spec": {"clusterIP": ""}}),
            vec!["spec.clusterIP: is empty, and only an API server can assign one; the service is left out"],
        ),
        (
            json!({"spec": null}),
            vec!["spec.clusterIP: is empty, and only an API server can assign one; the service is left out"],
        ),
        (json!({"metadata": {"name": null}}), vec!["metadata.name: is missing; the object is left out"]),
    ] {
        let (service, found) = ingest_service(&patch);
        assert_eq!(service, None, "{patch}");
        assert_eq!(texts(&found), issues, "{patch}");
    }
}

/// R1: `loadBalancerClass`; R2: the old annotation for source ranges; R5: `publishNotReadyAddresses`; R7:
/// `trafficDistribution` and the old annotation for hints. Controllers act on these, and slices show the
/// result.
#[test]
fn r1_fields_that_play_no_part() {
    let plain = service(&json!({"spec": {"type": "LoadBalancer"}}));
    for patch in [
        json!({"spec": {"loadBalancerClass": "example.org/lb"}}),
        json!({"spec": {"publishNotReadyAddresses": true}}),
        json!({"spec": {"trafficDistribution": "PreferSameNode"}}),
        json!({"metadata": {"annotations": {
            "service.beta.kubernetes.io/load-balancer-source-ranges": "10.0.0.0/8",
            "service.kubernetes.io/topology-aware-hints": "Auto",
            "service.kubernetes.io/topology-mode": "Auto",
        }}}),
    ] {
        let patched = patched(json!({"spec": {"type": "LoadBalancer"}}), &patch);
        assert_eq!(service(&patched), plain, "{patch}");
    }
}

/// R2: the index of the family in `ipFamilies` picks from `clusterIPs`; without `ipFamilies`, `clusterIP`
/// counts for its own family; a shorter list of addresses means none.
#[test]
fn r2_the_cluster_ip_of_each_family() {
    for (patch, v4, v6) in [
        (json!({}), Some("10.0.0.1"), None),
        (
            json!({"ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["10.0.0.1", "fd00::1"]}),
            Some("10.0.0.1"),
            Some("fd00::1"),
        ),
        (
            json!({"ipFamilies": ["IPv6", "IPv4"], "clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.0.0.1"]}),
            Some("10.0.0.1"),
            Some("fd00::1"),
        ),
        (json!({"ipFamilies": ["IPv4", "IPv6"]}), Some("10.0.0.1"), None),
        (
            json!({"ipFamilies": ["IPv6"], "clusterIP": "fd00::1", "clusterIPs": ["fd00::1"]}),
            None,
            Some("fd00::1"),
        ),
        (json!({"ipFamilies": null, "clusterIPs": null}), Some("10.0.0.1"), None),
        (json!({"ipFamilies": [], "clusterIP": "fd00::1"}), None, Some("fd00::1")),
        (json!({"ipFamilies": null, "clusterIPs": ["10.0.0.1", "fd00::1"]}), Some("10.0.0.1"), None),
        (json!({"clusterIP": "010.0.0.01", "clusterIPs": ["010.0.0.01"]}), Some("10.0.0.1"), None),
    ] {
        let service = service(&json!({"spec": patch}));
        assert_eq!(service.cluster_ipv4, v4.map(|ip| ip.parse().unwrap()), "{patch}");
        assert_eq!(service.cluster_ipv6, v6.map(|ip| ip.parse().unwrap()), "{patch}");
    }
}

/// R14: an invalid cluster IP affects only its own Service and family.
#[test]
fn r14_mangled_cluster_ips_are_left_out() {
    for (patch, is_served, issue) in [
        (
            json!({"clusterIPs": ["nonsense"]}),
            false,
            "spec.clusterIPs[0]: \"nonsense\" is not an IP address; it is left out",
        ),
        (
            json!({"ipFamilies": null, "clusterIP": "10.0.0.256"}),
            false,
            "spec.clusterIP: \"10.0.0.256\" is not an IP address; it is left out",
        ),
        (
            json!({"clusterIPs": ["fd00::1"]}),
            false,
            "spec.clusterIPs[0]: fd00::1 is not an IPv4 address; it is left out",
        ),
        (
            json!({"ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["10.0.0.1", "::ffff:10.0.0.2"]}),
            true,
            "spec.clusterIPs[1]: ::ffff:10.0.0.2 is not an IPv6 address; it is left out",
        ),
        (
            json!({"clusterIPs": ["0.0.0.0"]}),
            false,
            "spec.clusterIPs[0]: 0.0.0.0 is in the unspecified range, which is never translated; it is left \
             out",
        ),
        (
            json!({"clusterIPs": ["127.0.0.1"]}),
            false,
            "spec.clusterIPs[0]: 127.0.0.1 is in the loopback range, which is never translated; it is left \
             out",
        ),
    ] {
        let (service, issues) = ingest_service(&json!({"spec": patch}));
        assert_eq!(service.is_some(), is_served, "{patch}");
        assert_eq!(texts(&issues), [issue], "{patch}");
    }
}

/// R2: external IPs; invalid ones are left out.
#[test]
fn r2_external_ips() {
    let (service, issues) = ingest_service(&json!({"spec": {
        "externalIPs": ["192.0.2.1", "", "nonsense", "2001:db8::1", "192.000.002.001", "169.254.169.254"],
    }}));
    assert_eq!(service.unwrap().external_ips, ips(&["192.0.2.1", "2001:db8::1"]));
    assert_eq!(
        texts(&issues),
        [
            "spec.externalIPs[2]: \"nonsense\" is not an IP address; it is left out",
            "spec.externalIPs[5]: 169.254.169.254 is in the link-local range, which is never translated; it \
             is left out",
        ]
    );
}

/// R2: load-balancer addresses with `ipMode` VIP or none; host names and `ipMode: Proxy` are not served.
#[test]
fn r2_load_balancer_ips() {
    let (service, issues) = ingest_service(&json!({
        "spec": {"type": "LoadBalancer"},
        "status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.1"},
            {"ip": "192.0.2.2", "ipMode": "VIP"},
            {"ip": "192.0.2.3", "ipMode": "Proxy"},
            {"ip": "192.0.2.4", "ipMode": "Other"},
            {"hostname": "lb.example.org"},
            {"ip": ""},
            {"ip": "2001:db8::1"},
            {"ip": "nonsense"},
        ]}},
    }));
    assert_eq!(service.unwrap().load_balancer_ips, ips(&["192.0.2.1", "192.0.2.2", "2001:db8::1"]));
    assert_eq!(
        texts(&issues),
        [
            "status.loadBalancer.ingress[3].ipMode: \"Other\" is not known; it is taken for Proxy",
            "status.loadBalancer.ingress[7].ip: \"nonsense\" is not an IP address; it is left out",
        ]
    );
}

/// R2: node ports; 0 is the same as absent.
#[test]
fn r2_node_ports() {
    for (service_type, node_port, expected) in [
        ("NodePort", json!(30080), Some(30080)),
        ("LoadBalancer", json!(30080), Some(30080)),
        ("NodePort", json!(0), None),
        ("LoadBalancer", json!(null), None),
    ] {
        let port = json!({"port": 80, "nodePort": node_port});
        let service = service(&json!({"spec": {"type": service_type, "ports": [port]}}));
        assert_eq!(service.ports[0].node_port, expected, "{service_type} {node_port}");
    }
    let (service, issues) = ingest_service(&json!({"spec": {"ports": [{"port": 80, "nodePort": 30080}]}}));
    assert_eq!(service.unwrap().ports[0].node_port, None);
    assert_eq!(texts(&issues), ["spec.ports[0].nodePort: has no meaning for type ClusterIP; it is ignored"]);
}

/// R2: source ranges are trimmed; R14: an invalid one admits no client.
#[test]
fn r2_source_ranges() {
    let range = |text: &str| text.parse().unwrap();
    let (service, issues) =
        ingest_service(&json!({"spec": {"loadBalancerSourceRanges": [" 10.0.0.0/8 ", "2001:db8::/32"]}}));
    let service = service.unwrap();
    assert_eq!(service.source_ranges, BTreeSet::from([range("10.0.0.0/8"), range("2001:db8::/32")]));
    assert!(!service.has_unreadable_source_range);
    assert_eq!(issues, []);

    let (service, issues) = ingest_service(&json!({"spec": {"loadBalancerSourceRanges": ["10.0.0.1"]}}));
    let service = service.unwrap();
    assert!(service.source_ranges.is_empty() && service.has_unreadable_source_range);
    assert_eq!(
        texts(&issues),
        ["spec.loadBalancerSourceRanges[0]: \"10.0.0.1\" is not an IP network (address/length); it \
             admits no client"]
    );
}

/// R2: the health-check node port counts only for type LoadBalancer with the external policy Local; without
/// one the Service is still served.
#[test]
fn r2_health_check_node_port() {
    for (patch, expected) in [
        (json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}), Some(30123)),
        (json!({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}), None),
        (json!({"type": "LoadBalancer"}), None),
        (json!({"type": "NodePort", "externalTrafficPolicy": "Local"}), None),
    ] {
        let mut spec = patch.clone();
        spec["healthCheckNodePort"] = json!(30123);
        assert_eq!(service(&json!({"spec": spec})).health_check_node_port, expected, "{patch}");
    }
    for (port, issue) in [
        (
            json!(0),
            "spec.healthCheckNodePort: is missing or 0 although externalTrafficPolicy is Local; health \
             checks are not answered",
        ),
        (json!(-1), "spec.healthCheckNodePort: -1 is not a port (1-65535); this port is left out"),
    ] {
        let (service, issues) = ingest_service(&json!({"spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port,
        }}));
        assert_eq!(service.unwrap().health_check_node_port, None);
        assert_eq!(texts(&issues), [issue]);
    }
}

/// R3: TCP, UDP and SCTP are valid; SCTP is reported as not served.
#[test]
fn r3_protocols() {
    let (service, issues) = ingest_service(&json!({"spec": {"ports": [
        {"name": "a", "port": 80, "protocol": "TCP"},
        {"name": "b", "port": 80, "protocol": "UDP"},
        {"name": "c", "port": 80, "protocol": "SCTP"},
        {"name": "d", "port": 81},
        {"name": "e", "port": 82, "protocol": "tcp"},
    ]}}));
    let protocols: Vec<_> = service.unwrap().ports.iter().map(|port| (port.port, port.protocol)).collect();
    assert_eq!(
        protocols,
        [(80, Protocol::Tcp), (80, Protocol::Udp), (80, Protocol::Sctp), (81, Protocol::Tcp)]
    );
    assert_eq!(
        texts(&issues),
        ["spec.ports[4].protocol: \"tcp\" is none of TCP, UDP and SCTP; this port is left out"]
    );
}

/// R14: an invalid port affects only itself.
#[test]
fn r14_mangled_ports_are_left_out() {
    let good = json!({"name": "good", "port": 80, "nodePort": 30080});
    for (port, issue) in [
        (json!({"port": 0}), "spec.ports[1].port: 0 is not a port (1-65535); this port is left out"),
        (json!({"port": 65536}), "spec.ports[1].port: 65536 is not a port (1-65535); this port is left out"),
        (json!({"port": -80}), "spec.ports[1].port: -80 is not a port (1-65535); this port is left out"),
        (json!({}), "spec.ports[1].port: 0 is not a port (1-65535); this port is left out"),
        (
            json!({"name": "good", "port": 81}),
            "spec.ports[1].name: an earlier port has the name \"good\" for TCP too; this port is left out",
        ),
        (
            json!({"name": "a.b", "port": 81}),
            "spec.ports[1].name: \"a.b\" is not a DNS name (a-z, 0-9, -); this port is left out",
        ),
        (
            json!({"name": "other", "port": 80}),
            "spec.ports[1].port: an earlier port has TCP 80 too; this port is left out",
        ),
    ] {
        let (service, issues) =
            ingest_service(&json!({"spec": {"type": "NodePort", "ports": [good.clone(), port.clone()]}}));
        assert_eq!(service.unwrap().ports.len(), 1, "{port}");
        assert_eq!(texts(&issues), [issue], "{port}");
    }
    for (node_port, issue) in [
        (30080, "spec.ports[1].nodePort: an earlier port has 30080 too; this port is left out"),
        (65536, "spec.ports[1].nodePort: 65536 is not a port (1-65535); this port is left out"),
    ] {
        let port = json!({"name": "other", "port": 81, "nodePort": node_port});
        let (service, issues) =
            ingest_service(&json!({"spec": {"type": "NodePort", "ports": [good.clone(), port]}}));
        assert_eq!(service.unwrap().ports[1].node_port, None);
        assert_eq!(texts(&issues), [issue]);
    }
}

#[test]
fn r14_a_service_without_ports_has_no_frontend() {
    for ports in [json!(null), json!([]), json!([{"port": 0}])] {
        let (service, issues) = ingest_service(&json!({"spec": {"ports": ports}}));
        assert_eq!(service.unwrap().ports, []);
        assert_eq!(texts(&issues).last().unwrap(), "spec.ports: no usable port; the service has no frontend");
    }
}

/// R6: absent policies are Cluster; the external policy Local applies to LoadBalancer, NodePort, and
/// ClusterIP with external IPs.
#[test]
fn r6_policies() {
    use TrafficPolicy::{Cluster, Local};
    for (patch, internal, external) in [
        (json!({}), Cluster, Cluster),
        (json!({"internalTrafficPolicy": "Local"}), Local, Cluster),
        (json!({"internalTrafficPolicy": "Cluster"}), Cluster, Cluster),
        (json!({"type": "NodePort", "externalTrafficPolicy": "Local"}), Cluster, Local),
        (
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 1}),
            Cluster,
            Local,
        ),
        (json!({"externalTrafficPolicy": "Local"}), Cluster, Cluster),
        (json!({"externalTrafficPolicy": "Local", "externalIPs": ["192.0.2.1"]}), Cluster, Local),
    ] {
        let service = service(&json!({"spec": patch}));
        assert_eq!((service.internal_policy, service.external_policy), (internal, external), "{patch}");
    }
}

/// R14: unknown values become the default and are reported.
#[test]
fn r14_unknown_words() {
    let (service, issues) = ingest_service(&json!({"spec": {
        "type": "Other", "internalTrafficPolicy": "Other", "externalTrafficPolicy": "local", "sessionAffinity": "Cookie",
    }}));
    let service = service.unwrap();
    assert_eq!(service.service_type, ServiceType::ClusterIP);
    assert_eq!(service.internal_policy, TrafficPolicy::Cluster);
    assert_eq!(service.external_policy, TrafficPolicy::Cluster);
    assert_eq!(service.affinity_seconds, None);
    assert_eq!(
        texts(&issues),
        [
            "spec.type: \"Other\" is not known; it is taken for ClusterIP",
            "spec.externalTrafficPolicy: \"local\" is not known; it is taken for Cluster",
            "spec.internalTrafficPolicy: \"Other\" is not known; it is taken for Cluster",
            "spec.sessionAffinity: \"Cookie\" is not known; it is taken for None",
        ]
    );
}

/// R8: the time-out of client affinity, default 10800 s; R14: a missing configuration is the default.
#[test]
fn r8_affinity() {
    let client_ip = |seconds: Value| {
        json!({"sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}})
    };
    for (patch, expected, issue) in [
        (json!({}), None, None),
        (json!({"sessionAffinity": "None"}), None, None),
        (json!({"sessionAffinity": "ClientIP"}), Some(10_800), None),
        (json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {}}), Some(10_800), None),
        (client_ip(json!(null)), Some(10_800), None),
        (client_ip(json!(1)), Some(1), None),
        (client_ip(json!(86_400)), Some(86_400), None),
        (client_ip(json!(0)), Some(10_800), Some("0 is outside 1-86400; 10800 is used")),
        (client_ip(json!(-5)), Some(10_800), Some("-5 is outside 1-86400; 10800 is used")),
        (client_ip(json!(86_401)), Some(86_400), Some("86401 is outside 1-86400; 86400 is used")),
    ] {
        let (service, issues) = ingest_service(&json!({"spec": patch}));
        assert_eq!(service.unwrap().affinity_seconds, expected, "{patch}");
        let issue = issue.map(|issue| format!("spec.sessionAffinityConfig.clientIP.timeoutSeconds: {issue}"));
        assert_eq!(texts(&issues).first(), issue.as_ref(), "{patch}");
    }
}

#[test]
fn metadata_of_a_service() {
    let service = service(&json!({"metadata": {
        "namespace": null,
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "annotations": {"socklb.io/drain": "30s", "kubectl.kubernetes.io/last-applied-configuration": "{}"},
    }}));
    assert_eq!(service.key.to_string(), "default/web");
    assert_eq!(service.created, Some(1_767_323_045));
    assert_eq!(service.annotations, [("socklb.io/drain".to_owned(), "30s".to_owned())]);
}

/// Annotation `socklb.io/exclude`: an excluded service keeps its connections, whatever its other annotation.
#[test]
fn services_are_excluded_by_annotation() {
    use crate::model::StaleConnections::{Keep, Reset};
    for (value, is_excluded, stale, n_issues) in [
        ("true", true, Keep, 0),
        (" true ", true, Keep, 0),
        ("false", false, Reset, 0),
        ("yes", false, Reset, 1),
        ("", false, Reset, 1),
    ] {
        let annotations = json!({"socklb.io/exclude": value, "socklb.io/stale-connections": "reset"});
        let (service, issues) = ingest_service(&json!({"metadata": {"annotations": annotations}}));
        let service = service.unwrap();
        assert_eq!(
            (service.is_excluded(), service.stale_connections()),
            (is_excluded, Some(stale)),
            "{value:?}"
        );
        let texts = texts(&issues);
        assert_eq!(texts.len(), n_issues, "{texts:?}");
        assert!(texts.iter().all(|text| text.contains("socklb.io/exclude")), "{texts:?}");
    }
}

#[test]
fn r10_an_annotation_that_cannot_be_read_is_reported() {
    for (value, expected, n_issues) in [
        ("drain=30s", Some(crate::model::StaleConnections::Drain(std::time::Duration::from_secs(30))), 0),
        ("never", None, 1),
    ] {
        let annotations = json!({"socklb.io/stale-connections": value});
        let (service, issues) = ingest_service(&json!({"metadata": {"annotations": annotations}}));
        assert_eq!(service.unwrap().stale_connections(), expected);
        let texts = texts(&issues);
        assert_eq!(texts.len(), n_issues, "{texts:?}");
        let is_named = |text: &String| text.contains("socklb.io/stale-connections") && text.contains(value);
        assert!(texts.iter().all(is_named), "{texts:?}");
    }
    let annotations = json!({"socklb.io/health": "sometimes"});
    let (service, issues) = ingest_service(&json!({"metadata": {"annotations": annotations}}));
    assert_eq!(service.unwrap().health(), Some(lb_common::health::Policy::DEFAULT));
    let texts = texts(&issues);
    assert!(
        matches!(&texts[..], [text] if text.contains("socklb.io/health") && text.contains("sometimes")),
        "{texts:?}"
    );
}

#[test]
fn load_annotations_that_cannot_be_read_are_reported() {
    let (balance, slow_start) =
        ("metadata.annotations[socklb.io/balance]", "metadata.annotations[socklb.io/slow-start]");
    for (annotations, protocol, expected) in [
        (json!({"socklb.io/balance": "least-connections", "socklb.io/slow-start": "30s"}), "TCP", vec![]),
        (json!({"socklb.io/balance": "random", "socklb.io/slow-start": "30s"}), "UDP", vec![]),
        (
            json!({"socklb.io/balance": "maglev"}),
            "TCP",
            vec![format!(
                "{balance}: \"maglev\" is not known; it is taken for absent (expected random or least-connections)"
            )],
        ),
        (
            json!({"socklb.io/slow-start": "2h"}),
            "TCP",
            vec![format!("{slow_start}: \"2h\" is not known; it is taken for absent (expected 1s to 1h)")],
        ),
        (
            json!({"socklb.io/balance": "least-connections"}),
            "UDP",
            vec![format!("{balance}: needs a TCP port; it is ignored")],
        ),
    ] {
        let ports = json!([{"port": 80, "protocol": protocol}]);
        let (_, issues) =
            ingest_service(&json!({"metadata": {"annotations": annotations}, "spec": {"ports": ports}}));
        assert_eq!(texts(&issues), expected, "{annotations}");
    }
}

/// All 65,535 ports, each twice: no object stalls the agent.
#[test]
fn a_service_may_list_every_port() {
    let once = (1..=u16::MAX).map(|port| json!({"name": format!("p{port}"), "port": port, "nodePort": port}));
    let ports: Vec<Value> = once.clone().chain(once).collect();
    let (service, issues) = ingest_service(&json!({"spec": {"type": "NodePort", "ports": ports}}));
    assert_eq!(service.unwrap().ports.len(), usize::from(u16::MAX));
    assert_eq!(issues.len(), usize::from(u16::MAX));
}
