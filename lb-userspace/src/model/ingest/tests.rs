use std::net::IpAddr;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::{
    Node, Service, ServiceType, Slice, TrafficPolicy,
    fixture::{ingest_node, ingest_service, ingest_slice, node, service, slice, texts},
};

fn labels(json: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(json.clone()).unwrap()
}

fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|ip| ip.parse().unwrap()).collect()
}

/// R1: the label selection of the watch; only the presence of a key counts, and a named class is selected by
/// value.
#[test]
fn r1_labels_select_services_and_slices() {
    for (json, unnamed, ours) in [
        (json!({}), true, false),
        (json!({"app": "web"}), true, false),
        (json!({"service.kubernetes.io/service-proxy-name": "ours"}), false, true),
        (json!({"service.kubernetes.io/service-proxy-name": "theirs"}), false, false),
        (json!({"service.kubernetes.io/service-proxy-name": ""}), false, false),
        (json!({"service.kubernetes.io/headless": ""}), false, false),
        (json!({"service.kubernetes.io/headless": "false"}), false, false),
        (
            json!({"service.kubernetes.io/headless": "", "service.kubernetes.io/service-proxy-name": "ours"}),
            false,
            false,
        ),
    ] {
        let labels = labels(&json);
        assert_eq!(is_selected(Some(&labels), None), unnamed, "{json}");
        assert_eq!(is_selected(Some(&labels), Some("ours")), ours, "{json}");
    }
    assert!(is_selected(None, None));
    assert!(!is_selected(None, Some("ours")));
}

#[test]
fn r1_the_selector_for_the_api_server_says_the_same() {
    assert_eq!(
        label_selector(None),
        "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"
    );
    assert_eq!(
        label_selector(Some("ours")),
        "service.kubernetes.io/service-proxy-name=ours,!service.kubernetes.io/headless"
    );
}

/// R1: headless Services and `ExternalName` are skipped without a word; a missing address is told.
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

/// R1: `loadBalancerClass` is not looked at.
#[test]
fn r1_the_load_balancer_class_plays_no_part() {
    let patch = json!({"spec": {"type": "LoadBalancer"}});
    let with_class = json!({"spec": {"type": "LoadBalancer", "loadBalancerClass": "example.org/lb"}});
    assert_eq!(service(&patch), service(&with_class));
}

/// R2: the index of the family in `ipFamilies` picks from `clusterIPs`; without `ipFamilies`, `clusterIP` counts
/// for its own family; a shorter list of addresses means none.
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

/// R14: a cluster IP that cannot be one affects its own Service only, and only its own family.
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
            "spec.clusterIPs[0]: 0.0.0.0 is in the unspecified range, which is never translated; it is left out",
        ),
        (
            json!({"clusterIPs": ["127.0.0.1"]}),
            false,
            "spec.clusterIPs[0]: 127.0.0.1 is in the loopback range, which is never translated; it is left out",
        ),
    ] {
        let (service, issues) = ingest_service(&json!({"spec": patch}));
        assert_eq!(service.is_some(), is_served, "{patch}");
        assert_eq!(texts(&issues), [issue], "{patch}");
    }
}

/// R2: external IPs; those that are none are left out.
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
            "spec.externalIPs[5]: 169.254.169.254 is in the link-local range, which is never translated; it is left out",
        ]
    );
}

/// R2: load-balancer addresses with `ipMode` VIP or none; host names and `ipMode: Proxy` are left to the network.
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

/// R2: node ports; 0 and absent are none.
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

/// R2: source ranges are trimmed; R14: one that cannot be read admits nobody.
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
        [
            "spec.loadBalancerSourceRanges[0]: \"10.0.0.1\" is not an IP network (address/length); it admits nobody"
        ]
    );
}

/// R2: the health-check node port counts for type LoadBalancer with the external policy Local only; without one
/// the Service is still served.
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
            "spec.healthCheckNodePort: is missing or 0 although externalTrafficPolicy is Local; health checks are \
             not answered",
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

/// R3: TCP, UDP and SCTP are legal; SCTP is reported as not served.
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
        [
            "spec.ports[2]: SCTP cannot be served at a socket; calls go to the network untranslated",
            "spec.ports[4].protocol: \"tcp\" is none of TCP, UDP and SCTP; this port is left out",
        ]
    );
}

/// R14: a mangled port affects only itself.
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

/// R6: nil policies are Cluster; the external policy Local counts for LoadBalancer, NodePort, and ClusterIP with
/// external IPs.
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

/// R14: unknown words are taken for the default, and told.
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

/// R4: the owning service is named by a label in the slice's namespace; a slice without it, or with another
/// address type, is ignored.
#[test]
fn r4_slices_of_no_service_are_ignored() {
    for (patch, issues) in [
        (json!({"metadata": {"labels": null}}), vec![]),
        (json!({"metadata": {"labels": {"kubernetes.io/service-name": ""}}}), vec![]),
        (json!({"addressType": "FQDN"}), vec![]),
        (
            json!({"addressType": "IPX"}),
            vec!["addressType: \"IPX\" is not known; it is taken for FQDN, which is not served"],
        ),
        (json!({"metadata": {"name": ""}}), vec!["metadata.name: is missing; the object is left out"]),
    ] {
        let (slice, found) = ingest_slice(&patch);
        assert_eq!(slice, None, "{patch}");
        assert_eq!(texts(&found), issues, "{patch}");
    }
    // Neither the owner nor the managing controller is consulted.
    let hand_made = slice(&json!({"metadata": {
        "namespace": "ns", "labels": {"endpointslice.kubernetes.io/managed-by": "me"}, "ownerReferences": [],
    }}));
    assert_eq!(hand_made.service.to_string(), "ns/web");
}

/// R4: a port without name or number is skipped; the protocol defaults to TCP.
#[test]
fn r4_slice_ports() {
    let (slice, issues) = ingest_slice(&json!({"ports": [
        {"name": "", "port": 8080},
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"port": 81},
        {"name": "all"},
        {"name": "zero", "port": 0},
        {"name": "big", "port": 70000},
        {"name": "word", "port": 82, "protocol": "http"},
        {"name": "assoc", "port": 83, "protocol": "SCTP"},
    ]}));
    let ports: Vec<_> =
        slice.unwrap().ports.into_iter().map(|port| (port.name.to_string(), port.port)).collect();
    assert_eq!(ports, [(String::new(), 8080), ("dns".to_owned(), 53), ("assoc".to_owned(), 83)]);
    assert_eq!(
        texts(&issues),
        [
            "ports[2].name: is missing; this port is left out",
            "ports[3].port: is missing or 0, and a range of all ports is not served; this port is left out",
            "ports[4].port: is missing or 0, and a range of all ports is not served; this port is left out",
            "ports[5].port: 70000 is not a port (1-65535); this port is left out",
            "ports[6].protocol: \"http\" is none of TCP, UDP and SCTP; this port is left out",
        ]
    );
}

/// R4: only the first address counts, canonical and of the slice's family; R14: the others are left out.
#[test]
fn r4_endpoint_addresses() {
    let (slice, issues) = ingest_slice(&json!({"endpoints": [
        {"addresses": ["10.1.0.1", "10.1.0.99"]},
        {"addresses": ["010.001.000.002"]},
        {"addresses": []},
        {"addresses": ["nonsense"]},
        {"addresses": ["fd00::1"]},
        {"addresses": ["::ffff:10.1.0.3"]},
        {"addresses": ["127.0.0.1"]},
        {"addresses": ["0.0.0.0"]},
        {"addresses": ["224.0.0.1"]},
    ]}));
    let addresses: Vec<_> =
        slice.unwrap().endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    assert_eq!(addresses, ["10.1.0.1", "10.1.0.2", "10.1.0.3", "127.0.0.1"]);
    assert_eq!(
        texts(&issues),
        [
            "endpoints[2].addresses: is empty; this endpoint is left out",
            "endpoints[3].addresses[0]: \"nonsense\" is not an IP address; it is left out",
            "endpoints[4].addresses[0]: fd00::1 is not an IPv4 address; it is left out",
            "endpoints[7].addresses[0]: 0.0.0.0 is in the unspecified range, which is never translated; it is left out",
            "endpoints[8].addresses[0]: 224.0.0.1 is in the multicast range, which is never translated; it is left out",
        ]
    );
    let (slice, issues) =
        ingest_slice(&json!({"addressType": "IPv6", "endpoints": [{"addresses": ["::ffff:10.1.0.3"]}]}));
    assert_eq!(slice.unwrap().endpoints, []);
    assert_eq!(
        texts(&issues),
        ["endpoints[0].addresses[0]: ::ffff:10.1.0.3 is not an IPv6 address; it is left out"]
    );
}

/// R5: `ready` and `serving` default to true, `terminating` to false.
#[test]
fn r5_conditions() {
    for (conditions, ready, serving, terminating) in [
        (json!(null), true, true, false),
        (json!({}), true, true, false),
        (json!({"ready": false}), false, true, false),
        (json!({"serving": false}), true, false, false),
        (json!({"terminating": true}), true, true, true),
        (json!({"ready": false, "serving": true, "terminating": true}), false, true, true),
    ] {
        let slice = slice(&json!({"endpoints": [{"addresses": ["10.1.0.1"], "conditions": conditions}]}));
        let endpoint = &slice.endpoints[0];
        assert_eq!(
            (endpoint.ready, endpoint.serving, endpoint.terminating),
            (ready, serving, terminating),
            "{conditions}"
        );
    }
}

/// R7: node, zone and hints are taken over; empty names are none.
#[test]
fn r7_topology_of_endpoints() {
    let slice = slice(&json!({"endpoints": [
        {
            "addresses": ["10.1.0.1"], "nodeName": "node-a", "zone": "a",
            "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "node-a"}]},
        },
        {"addresses": ["10.1.0.2"], "nodeName": "node-a", "zone": "", "hints": {}},
        {"addresses": ["10.1.0.3"], "nodeName": ""},
    ]}));
    let [first, second, third] = &slice.endpoints[..] else { panic!("{slice:?}") };
    assert_eq!(first.node.as_deref(), Some("node-a"));
    assert_eq!(first.zone.as_deref(), Some("a"));
    assert_eq!(first.hint_zones, ["a".into(), "b".into()]);
    assert_eq!(first.hint_nodes, ["node-a".into()]);
    assert_eq!((&second.zone, &third.node), (&None, &None));
    // Equal texts of a slice share their memory.
    assert!(Arc::ptr_eq(first.node.as_ref().unwrap(), second.node.as_ref().unwrap()));
}

#[test]
fn trigger_times_are_read_and_others_ignored() {
    for (text, expected) in [
        ("2026-01-02T03:04:05Z", Some(1_767_323_045_000_000_000)),
        ("2026-01-02T03:04:05.5+01:00", Some(1_767_319_445_500_000_000)),
        ("yesterday", None),
    ] {
        let annotations = json!({"endpoints.kubernetes.io/last-change-trigger-time": text});
        let slice = slice(&json!({"metadata": {"annotations": annotations}}));
        assert_eq!(slice.trigger_time, expected, "{text}");
    }
}

/// R2: internal addresses come before external ones; R6: all of them are node addresses.
#[test]
fn r2_node_addresses() {
    let (node, issues) = ingest_node(&json!({"status": {"addresses": [
        {"type": "ExternalIP", "address": "192.0.2.1"},
        {"type": "Hostname", "address": "node-a"},
        {"type": "InternalIP", "address": "10.0.0.1"},
        {"type": "InternalIP", "address": "fd00::1"},
        {"type": "InternalIP", "address": "10.0.0.01"},
        {"type": "InternalIP", "address": "nonsense"},
        {"type": "ExternalIP", "address": "0.0.0.0"},
    ]}}));
    let addresses: Vec<_> = node.unwrap().addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.0.0.1", "fd00::1", "192.0.2.1"]);
    assert_eq!(
        texts(&issues),
        [
            "status.addresses[5].address: \"nonsense\" is not an IP address; it is left out",
            "status.addresses[6].address: \"0.0.0.0\" is not an IP address; it is left out",
        ]
    );
}

#[test]
fn zone_and_deletion_of_a_node() {
    assert_eq!(node("node-a", "a", &[]).zone.as_deref(), Some("a"));
    assert_eq!(node("node-a", "", &[]).zone, None);
    for (patch, expected) in [
        (json!({}), false),
        (json!({"metadata": {"deletionTimestamp": "2026-01-02T03:04:05Z"}}), true),
        (
            json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}}),
            true,
        ),
        (json!({"spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}}), false),
    ] {
        assert_eq!(ingest_node(&patch).0.unwrap().being_deleted, expected, "{patch}");
    }
    assert_eq!(ingest_node(&json!({"metadata": {"name": null}})).0, None);
}

/// Every field that ingest reads, in any shape that decodes.
fn any_service() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        Just("10.0.0.1".to_owned()),
        Just("fd00::1".to_owned()),
        Just("None".to_owned()),
        Just("10.0.0.0/8".to_owned()),
        "[a-zA-Z0-9./:]{0,12}",
    ];
    let texts = prop::collection::vec(text.clone(), 0..4);
    let family = prop_oneof![Just("IPv4".to_owned()), Just("IPv6".to_owned()), text.clone()];
    let word = prop_oneof![
        Just("Local"),
        Just("Cluster"),
        Just("ClientIP"),
        Just("LoadBalancer"),
        Just("NodePort"),
        Just("x"),
    ];
    let port = (any::<i32>(), any::<Option<i32>>(), "[a-z]{0,2}", prop_oneof![Just("TCP"), Just("UDP"), Just("?")])
        .prop_map(|(port, node_port, name, protocol)| {
            json!({"port": port % 70_000, "nodePort": node_port, "name": name, "protocol": protocol})
        });
    (
        (texts.clone(), texts.clone(), texts.clone(), prop::collection::vec(family, 0..3)),
        (word.clone(), word.clone(), word.clone(), word),
        prop::collection::vec(port, 0..5),
        (any::<Option<i32>>(), any::<Option<i32>>(), "[a-z]{0,3}"),
    )
        .prop_map(|((ips, external, ranges, families), (kind, internal, policy, affinity), ports, rest)| {
            let (seconds, health, name) = rest;
            json!({
                "metadata": {"name": name},
                "spec": {
                    "clusterIP": ips.first(), "clusterIPs": ips, "ipFamilies": families, "type": kind,
                    "externalIPs": external, "loadBalancerSourceRanges": ranges, "ports": ports,
                    "internalTrafficPolicy": internal, "externalTrafficPolicy": policy, "sessionAffinity": affinity,
                    "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
                    "healthCheckNodePort": health,
                },
                "status": {"loadBalancer": {"ingress": external.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>()}},
            })
        })
}

fn any_slice() -> impl Strategy<Value = Value> {
    let address = prop_oneof!["[0-9.:a-f]{0,16}", Just("10.1.0.1".to_owned()), Just("fd00::1".to_owned())];
    let endpoint = (prop::collection::vec(address, 0..3), any::<[Option<bool>; 3]>(), "[a-z]{0,1}").prop_map(
        |(addresses, [ready, serving, terminating], name)| {
            json!({
                "addresses": addresses,
                "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
                "nodeName": name, "zone": name,
                "hints": {"forZones": [{"name": name}], "forNodes": [{"name": name}]},
            })
        },
    );
    let port = (prop::option::of("[a-z]{0,2}"), any::<Option<i32>>(), prop::option::of("TCP|UDP|SCTP|[a-z]"))
        .prop_map(|(name, port, protocol)| json!({"name": name, "port": port, "protocol": protocol}));
    (
        prop_oneof![Just("IPv4"), Just("IPv6"), Just("FQDN"), Just("")],
        prop::collection::vec(endpoint, 0..5),
        prop::collection::vec(port, 0..3),
    )
        .prop_map(|(address_type, endpoints, ports)| {
            json!({"addressType": address_type, "endpoints": endpoints, "ports": ports})
        })
}

fn is_well_formed_service(service: &Service) -> bool {
    let has_address = service.cluster_ipv4.is_some() || service.cluster_ipv6.is_some();
    let mut names: Vec<_> = service.ports.iter().map(|port| (&port.name, port.protocol)).collect();
    let mut numbers: Vec<_> = service.ports.iter().map(|port| (port.port, port.protocol)).collect();
    names.sort();
    names.dedup();
    numbers.sort();
    numbers.dedup();
    has_address
        && !service.key.name.is_empty()
        && names.len() == service.ports.len()
        && numbers.len() == service.ports.len()
        && service.ports.iter().all(|port| port.port != 0 && port.node_port != Some(0))
        && service.affinity_seconds.is_none_or(|seconds| (1..=86_400).contains(&seconds))
        && service.health_check_node_port != Some(0)
        && service.external_ips.iter().all(|ip| crate::model::address::special_range(*ip).is_none())
}

fn is_well_formed_slice(slice: &Slice) -> bool {
    slice.ports.iter().all(|port| port.port != 0)
        && slice.endpoints.iter().all(|endpoint| endpoint.address.is_ipv6() == slice.ipv6)
}

proptest! {
    /// R14: no object makes ingest panic, and what it lets through is well formed.
    #[test]
    fn r14_any_service_gives_a_well_formed_one_or_none(json in any_service()) {
        let object = serde_json::from_value(json).unwrap();
        let (service, issues) = super::service(&object);
        prop_assert!(service.as_ref().is_none_or(is_well_formed_service), "{service:?}");
        for issue in issues {
            prop_assert!(!issue.to_string().contains('\n'));
        }
    }

    #[test]
    fn r14_any_slice_gives_a_well_formed_one_or_none(json in any_slice()) {
        let (slice, _) = ingest_slice(&json);
        prop_assert!(slice.as_ref().is_none_or(is_well_formed_slice), "{slice:?}");
    }

    #[test]
    fn r14_any_node_is_ingested(kinds in prop::collection::vec("InternalIP|ExternalIP|[a-z]{0,3}", 0..6), text in "[0-9a-f.:]{0,12}") {
        let addresses: Vec<_> = kinds.iter().map(|kind| json!({"type": kind, "address": text})).collect();
        let (node, _): (Option<Node>, _) = ingest_node(&json!({"status": {"addresses": addresses}}));
        prop_assert!(node.unwrap().addresses.len() <= 1);
    }
}
