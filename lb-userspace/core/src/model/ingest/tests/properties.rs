//! Properties of every object.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::model::{
    Node, Service, Slice, address,
    fixture::{ingest_node, ingest_service, ingest_slice},
};

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
        && service.external_ips.iter().all(|ip| address::special_range(*ip).is_none())
}

fn is_well_formed_slice(slice: &Slice) -> bool {
    slice.ports.iter().all(|port| port.port != 0)
        && slice.endpoints.iter().all(|endpoint| endpoint.address.is_ipv6() == slice.ipv6)
}

proptest! {
    /// R14: no object makes ingest panic, and its results are well formed.
    #[test]
    fn r14_any_service_gives_a_well_formed_one_or_none(json in any_service()) {
        let (service, issues) = ingest_service(&json);
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
