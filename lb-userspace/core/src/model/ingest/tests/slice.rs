use std::sync::Arc;

use serde_json::json;

use crate::model::fixture::{ingest_slice, slice, texts};

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
    // The owner and the managing controller do not matter.
    let hand_made = slice(&json!({"metadata": {
        "namespace": "ns", "labels": {"endpointslice.kubernetes.io/managed-by": "me"}, "ownerReferences": [],
    }}));
    assert_eq!(hand_made.service.to_string(), "ns/web");
}

/// Ours wins over Cilium's; an invalid one counts as absent.
#[test]
fn weights_are_annotations_of_slices() {
    let issue = |key: &str, value: &str| {
        format!(
            "metadata.annotations[{key}]: {value:?} is not known; it is taken for absent (expected 0-65535)"
        )
    };
    let (ours, ciliums) = ("socklb.io/weight", "service.cilium.io/weight");
    for (annotations, weight, expected) in [
        (json!({}), 100, vec![]),
        (json!({ours: "1"}), 1, vec![]),
        (json!({ours: " 255 "}), 255, vec![]),
        (json!({ciliums: "0"}), 0, vec![]),
        (json!({ciliums: "65535"}), 65535, vec![]),
        (json!({ours: "3", ciliums: "4"}), 3, vec![]),
        (json!({ours: "half", ciliums: "4"}), 4, vec![issue(ours, "half")]),
        (json!({ours: "65536"}), 100, vec![issue(ours, "65536")]),
        (json!({ours: "-1", ciliums: ""}), 100, vec![issue(ours, "-1"), issue(ciliums, "")]),
    ] {
        let (slice, issues) = ingest_slice(&json!({
            "metadata": {"annotations": annotations}, "endpoints": [{"addresses": ["10.1.0.1"]}],
        }));
        assert_eq!(slice.unwrap().endpoints[0].weight, weight, "{annotations}");
        assert_eq!(texts(&issues), expected, "{annotations}");
    }
}

/// Snapshots of older agents lack it.
#[test]
fn a_stored_endpoint_keeps_its_weight() {
    for (annotation, weight) in
        [(None, None), (Some("100"), None), (Some("7"), Some(7)), (Some("0"), Some(0))]
    {
        let slice = slice(&json!({
            "metadata": {"annotations": {"socklb.io/weight": annotation}}, "endpoints": [{"addresses": ["10.1.0.1"]}],
        }));
        let stored = serde_json::to_value(&slice).unwrap();
        assert_eq!(stored["endpoints"][0].get("weight"), weight.map(serde_json::Value::from).as_ref());
        assert_eq!(serde_json::from_value::<crate::model::Slice>(stored).unwrap(), slice);
    }
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
            "endpoints[7].addresses[0]: 0.0.0.0 is in the unspecified range, which is never translated; it \
             is left out",
            "endpoints[8].addresses[0]: 224.0.0.1 is in the multicast range, which is never translated; it \
             is left out",
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

/// R7: node, zone and hints are copied; empty names count as absent.
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
    assert_eq!(first.node(), Some("node-a"));
    assert_eq!(first.zone(), Some("a"));
    assert_eq!(*first.hint_zones(), ["a".into(), "b".into()]);
    assert_eq!(*first.hint_nodes(), ["node-a".into()]);
    assert_eq!((second.zone(), third.node()), (None, None));
    // Equal strings of a slice share one allocation.
    assert!(Arc::ptr_eq(first.placement.node.as_ref().unwrap(), second.placement.node.as_ref().unwrap()));
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
