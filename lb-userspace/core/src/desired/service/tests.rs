use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    desired::fixture::{endpoint, ip, line, lines, nodes, settings, slice, topology, topology_of, weighted},
    model::fixture::{self, service},
};

/// Checks all frontends of the Service `default/web` with a patch, as text, and that it has no issue.
fn check(rule: &str, patch: &Value, slices: &[Slice], expected: &[&str]) {
    let (frontends, issues) = frontends(&service(patch), slices.iter(), &topology(), &settings());
    assert_eq!(lines(&frontends), expected, "{rule}: {patch}");
    assert_eq!(issues, [], "{rule}: {patch}");
}

/// A ready endpoint on `node-a` (1), one on `node-b` (2), and one without a node.
fn two_ready() -> [Slice; 1] {
    [slice(&["10.1.0.1 node-a rs", "10.1.0.2 node-b rs"])]
}

fn dual_stack() -> [Slice; 2] {
    let v6 = json!({"metadata": {"name": "web-6"}, "addressType": "IPv6", "endpoints": [endpoint("fd00::a node-a rs")]});
    [slice(&["10.1.0.1 node-a rs"]), fixture::slice(&v6)]
}

/// R2: a cluster IP that an interface of this node has is not served; the other addresses are.
#[test]
fn r2_a_cluster_ip_on_an_interface() {
    let service = service(&json!({"spec": {
        "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
        "externalIPs": ["192.0.2.1"],
    }}));
    let found = |interfaces: &[&str]| {
        let interfaces: Vec<_> = interfaces.iter().map(|text| ip(text)).collect();
        let topology = Topology::new(&nodes(), &settings(), &interfaces);
        let (frontends, issues) = frontends(&service, dual_stack().iter(), &topology, &settings());
        (lines(&frontends), issues.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let (all, none) = found(&["10.0.0.2"]);
    assert_eq!((all.len(), none.len()), (3, 0), "{all:?}");
    let (left, issues) = found(&["10.0.0.1"]);
    assert_eq!(left, all[1..], "{all:?}");
    assert_eq!(
        issues,
        ["Service default/web: spec.clusterIPs: 10.0.0.1 is an address of an interface of this node, as \
             with NodeLocal DNSCache; calls to it are not translated"]
    );
    let (left, issues) = found(&["10.0.0.1", "fd00::1"]);
    assert_eq!((left.len(), issues.len()), (1, 2), "{left:?}");
}

/// R2: every kind of frontend; R3: the protocol is part of the address.
#[test]
fn r2_frontends_of_a_port() {
    let patch = json!({
        "spec": {
            "type": "LoadBalancer",
            "externalIPs": ["192.0.2.1"],
            "ports": [
                {"name": "", "port": 80, "nodePort": 30080},
                {"name": "", "port": 80, "nodePort": 30080, "protocol": "UDP"},
            ],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}},
    });
    let udp = json!({"metadata": {"name": "udp"}, "ports": [{"name": "", "port": 5353, "protocol": "UDP"}],
        "endpoints": [endpoint("10.1.0.9 - rs")]});
    let slices = [slice(&["10.1.0.1 node-a rs", "10.1.0.2 node-b rs"]), fixture::slice(&udp)];
    check(
        "all kinds",
        &patch,
        &slices,
        &[
            "0.0.0.0:30080/tcp NodePort 10.1.0.1:8080 10.1.0.2:8080",
            "0.0.0.0:30080/udp NodePort 10.1.0.9:5353",
            "10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080 10.1.0.2:8080",
            "10.0.0.1:80/udp ClusterIP 10.1.0.9:5353",
            "192.0.2.1:80/tcp ExternalIP 10.1.0.1:8080 10.1.0.2:8080",
            "192.0.2.1:80/udp ExternalIP 10.1.0.9:5353",
            "198.51.100.1:80/tcp LoadBalancer 10.1.0.1:8080 10.1.0.2:8080",
            "198.51.100.1:80/udp LoadBalancer 10.1.0.9:5353",
        ],
    );
}

/// R1: a family without a cluster IP has no frontend of any kind.
#[test]
fn r1_families_without_a_cluster_ip_are_skipped() {
    let addresses = json!({"externalIPs": ["192.0.2.1", "2001:db8::1"], "type": "NodePort",
        "ports": [{"port": 80, "nodePort": 30080}]});
    check(
        "IPv4 only",
        &json!({"spec": addresses}),
        &dual_stack(),
        &[
            "0.0.0.0:30080/tcp NodePort 10.1.0.1:8080",
            "10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080",
            "192.0.2.1:80/tcp ExternalIP 10.1.0.1:8080",
        ],
    );
    let mut dual = addresses.clone();
    dual["clusterIPs"] = json!(["10.0.0.1", "fd02::1"]);
    dual["ipFamilies"] = json!(["IPv4", "IPv6"]);
    check(
        "both families",
        &json!({"spec": dual}),
        &dual_stack(),
        &[
            "0.0.0.0:30080/tcp NodePort 10.1.0.1:8080",
            "10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080",
            "192.0.2.1:80/tcp ExternalIP 10.1.0.1:8080",
            "[::]:30080/tcp NodePort [fd00::a]:8080",
            "[2001:db8::1]:80/tcp ExternalIP [fd00::a]:8080",
            "[fd02::1]:80/tcp ClusterIP [fd00::a]:8080",
        ],
    );
}

/// R3: an SCTP port has no frontend; the other ports have.
#[test]
fn r3_sctp_is_not_served() {
    let (service, issues) = fixture::ingest_service(&json!({"spec": {"ports": [
        {"name": "", "port": 80}, {"name": "a", "port": 81, "protocol": "SCTP"},
    ]}}));
    assert_eq!(issues, []);
    let (frontends, issues) = frontends(&service.unwrap(), two_ready().iter(), &topology(), &settings());
    assert_eq!(lines(&frontends), ["10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080 10.1.0.2:8080"]);
    let text = "spec.ports: 81: SCTP cannot be served at a socket, and is served as packets with --packets=all \
                alone; calls go to the network untranslated";
    assert_eq!(issues.iter().map(|issue| issue.kind.to_string()).collect::<Vec<_>>(), [text]);
}

/// R6: the internal policy limits only the cluster IP.
#[test]
fn r6_internal_policy() {
    let patch = |policy: &str| {
        json!({"spec": {
            "type": "NodePort", "internalTrafficPolicy": policy, "externalIPs": ["192.0.2.1"],
            "ports": [{"port": 80, "nodePort": 30080}],
        }})
    };
    let rest = [
        "0.0.0.0:30080/tcp NodePort 10.1.0.1:8080 10.1.0.2:8080",
        "192.0.2.1:80/tcp ExternalIP 10.1.0.1:8080 10.1.0.2:8080",
    ];
    for (policy, cluster_ip) in [
        ("Cluster", "10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080 10.1.0.2:8080"),
        ("Local", "10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080"),
    ] {
        check("internal policy", &patch(policy), &two_ready(), &[rest[0], cluster_ip, rest[1]]);
    }
}

/// R6: with the external policy Local a caller on this node reaches the cluster set directly, but at another
/// node's node port only that node's endpoints.
#[test]
fn r6_external_policy() {
    let patch = |policy: &str| {
        json!({
            "spec": {
                "type": "LoadBalancer", "externalTrafficPolicy": policy, "healthCheckNodePort": 30123,
                "externalIPs": ["192.0.2.1"], "ports": [{"port": 80, "nodePort": 30080}],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}},
        })
    };
    let everywhere = [
        "10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080 10.1.0.2:8080",
        "192.0.2.1:80/tcp ExternalIP 10.1.0.1:8080 10.1.0.2:8080",
        "198.51.100.1:80/tcp LoadBalancer 10.1.0.1:8080 10.1.0.2:8080",
    ];
    check(
        "Cluster",
        &patch("Cluster"),
        &two_ready(),
        &[
            "0.0.0.0:30080/tcp NodePort 10.1.0.1:8080 10.1.0.2:8080",
            everywhere[0],
            everywhere[1],
            everywhere[2],
        ],
    );
    check(
        "Local: node-b answers with its endpoint; node-c has none that is usable, and needs no entry",
        &patch("Local"),
        &[slice(&["10.1.0.1 node-a rs", "10.1.0.2 node-b rs", "10.1.0.3 node-c s"])],
        &[
            "0.0.0.0:30080/tcp NodePort 10.1.0.1:8080 10.1.0.2:8080 (external-local)",
            everywhere[0],
            everywhere[1],
            "192.168.0.2:30080/tcp NodePort 10.1.0.2:8080",
            everywhere[2],
        ],
    );
}

/// R5, R6: another node's node port reaches its ready endpoints, or else those that serve while terminating.
#[test]
fn r6_other_nodes_choose_as_this_one_does() {
    let patch = json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80, "nodePort": 30080}]}});
    let slices = [slice(&[
        "10.1.0.1 node-b st",
        "10.1.0.2 node-b t",
        "10.1.0.3 node-c rs zone=b",
        "10.1.0.4 node-c st",
        "10.1.0.5 node-unknown rs zone=b",
        "10.1.0.6 node-a rs zone=a",
    ])];
    check(
        "Local",
        &patch,
        &slices,
        &[
            "0.0.0.0:30080/tcp NodePort 10.1.0.6:8080 (external-local)",
            "10.0.0.1:80/tcp ClusterIP 10.1.0.6:8080",
            "192.168.0.2:30080/tcp NodePort 10.1.0.1:8080",
            "192.168.0.3:30080/tcp NodePort 10.1.0.3:8080",
        ],
    );
}

/// R6: on the other node, its own address has the cluster set.
#[test]
fn r6_the_view_from_each_node() {
    let patch = json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80, "nodePort": 30080}]}});
    for (node, expected) in [
        ("node-a", vec!["192.168.0.2:30080/tcp NodePort 10.1.0.2:8080"]),
        ("node-b", vec!["192.168.0.1:30080/tcp NodePort 10.1.0.1:8080"]),
        (
            "node-c",
            vec![
                "192.168.0.1:30080/tcp NodePort 10.1.0.1:8080",
                "192.168.0.2:30080/tcp NodePort 10.1.0.2:8080",
            ],
        ),
    ] {
        let (frontends, _) = frontends(&service(&patch), two_ready().iter(), &topology_of(node), &settings());
        let exact: Vec<_> = frontends
            .iter()
            .filter(|frontend| frontend.address.ip.to_string().starts_with("192"))
            .map(line)
            .collect();
        assert_eq!(exact, expected, "{node}");
    }
}

/// R9: a service without endpoints keeps its frontends, empty; a flag marks refusals that are due to the
/// policy.
#[test]
fn r9_frontends_without_endpoints() {
    let local = json!({"spec": {"internalTrafficPolicy": "Local"}});
    check("nothing anywhere", &json!({}), &[], &["10.0.0.1:80/tcp ClusterIP"]);
    check("nothing anywhere, Local", &local, &[], &["10.0.0.1:80/tcp ClusterIP"]);
    check(
        "some, none here",
        &local,
        &[slice(&["10.1.0.2 node-b rs"])],
        &["10.0.0.1:80/tcp ClusterIP (no-local-endpoint)"],
    );
    check("unusable everywhere", &local, &[slice(&["10.1.0.2 node-b -"])], &["10.0.0.1:80/tcp ClusterIP"]);
}

/// R8: all frontends of a service have its affinity; R6: and the policy of their kind.
#[test]
fn r8_affinity_is_the_same_on_all_frontends() {
    let (frontends, _) = frontends(
        &service(&json!({"spec": {
            "sessionAffinity": "ClientIP", "externalIPs": ["192.0.2.1"], "internalTrafficPolicy": "Local",
        }})),
        two_ready().iter(),
        &topology(),
        &settings(),
    );
    let found: Vec<_> = frontends
        .iter()
        .map(|frontend| (frontend.kind, frontend.policy, frontend.affinity_seconds))
        .collect();
    assert_eq!(
        found,
        [
            (FrontendKind::ClusterIP, TrafficPolicy::Local, 10_800),
            (FrontendKind::ExternalIP, TrafficPolicy::Cluster, 10_800),
        ]
    );
    assert!(Arc::ptr_eq(&frontends[0].port, &frontends[1].port));
}

#[test]
fn only_tcp_ports_have_a_health_policy() {
    let words = |annotations: serde_json::Value| {
        let ports = json!([{"name": "a", "port": 80}, {"name": "b", "port": 80, "protocol": "UDP"}]);
        let service = service(&json!({"metadata": {"annotations": annotations}, "spec": {"ports": ports}}));
        let (frontends, _) = frontends(&service, two_ready().iter(), &topology(), &settings());
        frontends.iter().map(|frontend| (frontend.address.protocol, frontend.health)).collect::<Vec<_>>()
    };
    let default = Policy::DEFAULT.to_word();
    assert_eq!(words(json!({})), [(Protocol::Tcp, default), (Protocol::Udp, 0)]);
    assert_eq!(words(json!({"socklb.io/health": "off"})), [(Protocol::Tcp, 0), (Protocol::Udp, 0)]);
    let policy = Policy { failures: 5, ..Policy::DEFAULT }.to_word();
    assert_eq!(words(json!({"socklb.io/health": "failures=5"}))[0].1, policy);
}

#[test]
fn only_tcp_ports_count_connections() {
    let ports = json!([{"name": "a", "port": 80}, {"name": "b", "port": 80, "protocol": "UDP"}]);
    let patch = json!({
        "metadata": {"annotations": {"socklb.io/balance": "least-connections"}}, "spec": {"ports": ports},
    });
    let (frontends, _) = frontends(&service(&patch), [].iter(), &topology(), &settings());
    let balances: Vec<_> =
        frontends.iter().map(|frontend| (frontend.port.protocol, frontend.balance)).collect();
    assert_eq!(balances, [(Protocol::Tcp, Balance::LeastConnections), (Protocol::Udp, Balance::Random)]);
}

/// Each set has shares of its own.
#[test]
fn shares_are_those_of_the_frontends_own_endpoints() {
    let patch = json!({"spec": {
        "type": "NodePort", "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80, "nodePort": 30080}],
    }});
    let slices = [
        weighted("10", &["10.1.0.1 node-a rs", "10.1.0.2 node-b rs"]),
        weighted("20", &["10.1.0.3 node-a rs"]),
        weighted("40", &["10.1.0.4 node-c rs"]),
    ];
    let (frontends, _) = frontends(&service(&patch), slices.iter(), &topology(), &settings());
    let shown: Vec<_> = frontends
        .iter()
        .map(|frontend| format!("{} {:?}", line(frontend), frontend.shares.as_deref().unwrap_or_default()))
        .collect();
    let cluster = "10.1.0.1:8080 10.1.0.2:8080 10.1.0.3:8080 10.1.0.4:8080";
    assert_eq!(
        shown,
        [
            &*format!("0.0.0.0:30080/tcp NodePort {cluster} (external-local) [64, 64, 128, 255]"),
            "10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080 10.1.0.3:8080 [128, 255]",
            "192.168.0.2:30080/tcp NodePort 10.1.0.2:8080 []",
            "192.168.0.3:30080/tcp NodePort 10.1.0.4:8080 []",
        ]
    );
}

/// Never against a policy Local, and only where endpoints are ejected.
#[test]
fn calls_spill_only_where_policy_and_health_let_them() {
    let slices = [fixture::slice(&json!({
        "ports": [{"name": "a", "port": 8080}, {"name": "b", "port": 8080, "protocol": "UDP"}],
        "endpoints": [endpoint("10.1.0.1 node-a rs zone=a"), endpoint("10.1.0.2 node-b rs zone=b")],
    }))];
    let spills = |patch: &Value| -> Vec<String> {
        let (frontends, _) = frontends(&service(patch), slices.iter(), &topology(), &settings());
        let spills = frontends.iter().filter(|frontend| !frontend.spill.is_empty());
        let spills: Vec<_> = spills.collect();
        assert!(spills.iter().all(|frontend| Arc::ptr_eq(&frontend.spill, &spills[0].spill)));
        spills.iter().map(|frontend| format!("{} {:?}", frontend.address, frontend.kind)).collect()
    };
    let (cluster_ip, node_port) = ("10.0.0.1:80/tcp ClusterIP", "0.0.0.0:30080/tcp NodePort");
    let ports = json!([
        {"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 80, "nodePort": 30080, "protocol": "UDP"},
    ]);
    for (rule, patch, expected) in [
        ("policy Cluster", json!({}), &[node_port, cluster_ip][..]),
        ("internal policy Local", json!({"spec": {"internalTrafficPolicy": "Local"}}), &[node_port]),
        ("external policy Local", json!({"spec": {"externalTrafficPolicy": "Local"}}), &[cluster_ip]),
        ("health off", json!({"metadata": {"annotations": {"socklb.io/health": "off"}}}), &[]),
    ] {
        let base = json!({"spec": {"type": "NodePort", "ports": ports}});
        assert_eq!(spills(&fixture::patched(base, &patch)), expected, "{rule}");
    }
}

/// R2: load-balancer addresses that admit only some callers are not served; other kinds and the other family
/// are.
#[test]
fn r2_source_ranges() {
    let patch = |ranges: Value| {
        json!({
            "spec": {
                "type": "LoadBalancer", "loadBalancerSourceRanges": ranges, "externalIPs": ["192.0.2.1"],
                "clusterIPs": ["10.0.0.1", "fd02::1"], "ipFamilies": ["IPv4", "IPv6"],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}, {"ip": "2001:db8::1"}]}},
        })
    };
    let (v4, v6) = ("198.51.100.1", "2001:db8::1");
    for (ranges, limited) in [
        (json!([]), vec![]),
        (json!(["10.0.0.0/8"]), vec![v4]),
        (json!(["10.0.0.0/8", "fd00::/8"]), vec![v4, v6]),
        (json!(["10.0.0.0/8", "0.0.0.0/0"]), vec![]),
        (json!(["::/0"]), vec![]),
        (json!(["10.0.0.0/8", "::/0"]), vec![v4]),
        (json!(["nonsense"]), vec![v4, v6]),
        (json!(["nonsense", "0.0.0.0/0"]), vec![v6]),
    ] {
        let (service, _) = fixture::ingest_service(&patch(ranges.clone()));
        let (frontends, issues) = frontends(&service.unwrap(), two_ready().iter(), &topology(), &settings());
        let served: Vec<_> = frontends
            .iter()
            .filter(|frontend| frontend.kind == FrontendKind::LoadBalancer)
            .map(|frontend| frontend.address.ip.to_string())
            .collect();
        let expected: Vec<_> = [v4, v6].into_iter().filter(|ip| !limited.contains(ip)).collect();
        assert_eq!(served, expected, "{ranges}");
        assert_eq!(frontends.len() - served.len(), 3, "{ranges}");
        let told: Vec<_> = issues.into_iter().map(|issue| issue.kind).collect();
        let addresses: Vec<_> = limited.iter().map(|ip| (*ip).to_owned()).collect();
        let expected: Vec<_> =
            Some(IssueKind::SourceRanges { addresses }).filter(|_| !limited.is_empty()).into_iter().collect();
        assert_eq!(told, expected, "{ranges}");
    }
}

#[test]
fn r2_source_ranges_of_a_family_that_is_not_served_are_no_issue() {
    check(
        "IPv4 only",
        &json!({
            "spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["fd00::/8"]},
            "status": {"loadBalancer": {"ingress": [{"ip": "2001:db8::1"}]}},
        }),
        &two_ready(),
        &["10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080 10.1.0.2:8080"],
    );
}

/// R2: a node port outside the range of the hook answers on the exact addresses of all nodes.
#[test]
fn r2_a_node_port_outside_the_range() {
    let patch = |policy: &str| {
        json!({"spec": {"type": "NodePort", "externalTrafficPolicy": policy,
            "ports": [{"port": 80, "nodePort": 8080}]}})
    };
    for (policy, other_nodes, flag) in [
        (
            "Cluster",
            [
                "192.168.0.2:8080/tcp NodePort 10.1.0.1:8080 10.1.0.2:8080",
                "192.168.0.3:8080/tcp NodePort 10.1.0.1:8080 10.1.0.2:8080",
            ],
            "",
        ),
        (
            "Local",
            [
                "192.168.0.2:8080/tcp NodePort 10.1.0.2:8080",
                "192.168.0.3:8080/tcp NodePort (no-local-endpoint)",
            ],
            " (external-local)",
        ),
    ] {
        let (frontends, issues) =
            frontends(&service(&patch(policy)), two_ready().iter(), &topology(), &settings());
        let own = format!("192.168.0.1:8080/tcp NodePort 10.1.0.1:8080 10.1.0.2:8080{flag}");
        assert_eq!(
            lines(&frontends),
            ["10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080 10.1.0.2:8080", &own, other_nodes[0], other_nodes[1]]
        );
        assert_eq!(
            fixture::texts(&issues),
            ["node port 8080 is outside --node-port-range 30000-32767; it answers on the known node \
                 addresses, not on loopback"]
        );
    }
}

/// R12: the health-check node port has no frontend: the agent listens there.
#[test]
fn r12_the_health_check_port_is_no_frontend() {
    check(
        "health check",
        &json!({"spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30123}}),
        &two_ready(),
        &["10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080 10.1.0.2:8080"],
    );
}

/// R13: the mirroring controller turns `notReadyAddresses` into `ready: false`, which is unusable; the API
/// server's own slice names no node and is never local.
#[test]
fn r13_mirrored_slices() {
    let mirrored = |endpoint: Value| {
        let managed_by = "endpointslicemirroring-controller.k8s.io";
        fixture::slice(&json!({
            "metadata": {"labels": {"endpointslice.kubernetes.io/managed-by": managed_by}},
            "endpoints": [endpoint],
        }))
    };
    let not_ready = mirrored(json!({"addresses": ["10.1.0.1"], "conditions": {"ready": false}}));
    check("not ready", &json!({}), &[not_ready], &["10.0.0.1:80/tcp ClusterIP"]);
    let without_node = mirrored(json!({"addresses": ["10.1.0.1"], "conditions": {"ready": true}}));
    check(
        "without a node",
        &json!({"spec": {"internalTrafficPolicy": "Local"}}),
        &[without_node],
        &["10.0.0.1:80/tcp ClusterIP (no-local-endpoint)"],
    );
}

/// R14: a setting decides which external IPs answer; the others are reported.
#[test]
fn r14_external_ips_by_setting() {
    let (service, _) = fixture::ingest_service(
        &json!({"spec": {"externalIPs": ["192.0.2.1", "192.168.0.1", "192.168.0.2", "2001:db8::1"]}}),
    );
    let (this_node, other_node, elsewhere) = ("192.168.0.1", "192.168.0.2", "192.0.2.1");
    for (setting, answering, left_out) in [
        (ExternalIps::Any, &[elsewhere, this_node, other_node][..], &[][..]),
        (ExternalIps::Nodes, &[this_node, other_node], &[elsewhere]),
        (ExternalIps::None, &[], &[elsewhere, this_node, other_node]),
    ] {
        let settings = Settings { external_ips: setting, ..settings() };
        let (frontends, issues) = frontends(&service.clone().unwrap(), [].iter(), &topology(), &settings);
        let external = frontends.iter().filter(|frontend| frontend.kind == FrontendKind::ExternalIP);
        let found: Vec<_> = external.map(|frontend| frontend.address.ip.to_string()).collect();
        assert_eq!(found, answering, "{setting}");
        let expected: Vec<_> = Some(IssueKind::ExternalIps {
            addresses: left_out.iter().map(ToString::to_string).collect(),
            setting: setting.to_string(),
        })
        .filter(|_| !left_out.is_empty())
        .into_iter()
        .collect();
        let kinds: Vec<_> = issues.into_iter().map(|issue| issue.kind).collect();
        assert_eq!(kinds, expected, "{setting}");
    }
}

/// R14: one address that is external and load-balancer address of one Service is one frontend, without an
/// issue.
#[test]
fn r14_a_service_does_not_conflict_with_itself() {
    check(
        "same address",
        &json!({
            "spec": {"type": "LoadBalancer", "externalIPs": ["198.51.100.1", "10.0.0.1"]},
            "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}},
        }),
        &[slice(&["10.1.0.1 node-a rs"])],
        &["10.0.0.1:80/tcp ClusterIP 10.1.0.1:8080", "198.51.100.1:80/tcp LoadBalancer 10.1.0.1:8080"],
    );
}

#[test]
fn equal_sets_share_one_allocation() {
    let patch = json!({"spec": {
        "type": "NodePort", "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80, "nodePort": 30080}],
    }});
    let slices = [slice(&["10.1.0.1 node-a rs"])];
    let (frontends, _) = frontends(&service(&patch), slices.iter(), &topology(), &settings());
    assert_eq!(frontends.len(), 2);
    assert!(Arc::ptr_eq(&frontends[0].endpoints, &frontends[1].endpoints));
}

proptest! {
    /// The order of nodes and the splitting of slices change no frontend.
    #[test]
    fn frontends_do_not_depend_on_order(
        lines in prop::collection::vec("10\\.1\\.0\\.[1-5] (node-[abc]|-) (rs|st|s)", 0..8),
        cut in 0usize..8,
        external in "Local|Cluster",
        internal in "Local|Cluster",
    ) {
        let service = service(&json!({"spec": {
            "type": "NodePort", "internalTrafficPolicy": internal, "externalTrafficPolicy": external,
            "ports": [{"port": 80, "nodePort": 30080}],
        }}));
        let texts: Vec<_> = lines.iter().map(String::as_str).collect();
        let whole = [slice(&texts)];
        let (one, two) = texts.split_at(cut.min(texts.len()));
        let split = [slice(two), slice(one)];
        let mut reversed = nodes();
        reversed.reverse();
        let topology = Topology::new(&reversed, &settings(), &[]);
        prop_assert_eq!(
            frontends(&service, whole.iter(), &self::topology(), &settings()),
            frontends(&service, split.iter(), &topology, &settings())
        );
    }
}

/// Two objects of 1 MB, which the API accepts, do not stall the agent.
#[test]
fn as_many_ports_as_an_object_holds() {
    let ports = |numbered: fn(u16) -> Value| (1..=20_000).map(numbered).collect::<Vec<_>>();
    let service =
        fixture::service(&json!({"spec": {"ports": ports(|n| json!({"name": format!("p{n}"), "port": n}))}}));
    let slice = fixture::slice(&json!({
        "ports": ports(|n| json!({"name": format!("p{n}"), "port": n, "protocol": "TCP"})),
        "endpoints": [{"addresses": ["10.1.0.1"]}, {"addresses": ["10.1.0.2"]}],
    }));
    let slices = || std::iter::once(&slice);
    let (frontends, issues) = super::frontends(&service, slices(), &topology(), &settings());
    assert_eq!(issues, []);
    assert_eq!(frontends.len(), 20_000);
    for frontend in &frontends {
        let expected =
            ["10.1.0.1", "10.1.0.2"].map(|ip| SocketAddr::new(ip.parse().unwrap(), frontend.address.port));
        assert_eq!(*frontend.endpoints, expected);
    }

    let (frontends, issues) =
        frontends_within(5_000, &service, slices(), &topology(), &settings(), &mut Ramp::default());
    assert_eq!(frontends.len(), 2_500);
    let texts: Vec<_> = issues.iter().map(ToString::to_string).collect();
    let expected = "Service default/web: spec.ports: more than 5000 endpoints in all; 17500 ports are left out: split the service";
    assert_eq!(texts, [expected]);
}
