use serde_json::json;

use super::*;
use crate::{
    desired::fixture::{endpoint, slice},
    model::fixture,
};

/// R12: distinct addresses of ready endpoints on this node, over all ports; terminating ones do not count.
#[test]
fn r12_ready_local_endpoints() {
    let service = fixture::service(&json!({"spec": {"ports": [
        {"name": "", "port": 80}, {"name": "metrics", "port": 81},
    ]}}));
    let metrics = |endpoints: &[&str]| {
        let endpoints: Vec<_> = endpoints.iter().map(|line| endpoint(line)).collect();
        let ports = json!([{"name": "metrics", "port": 9090}, {"name": "other", "port": 1}]);
        fixture::slice(&json!({"metadata": {"name": "web-2"}, "ports": ports, "endpoints": endpoints}))
    };
    for (one, two, expected) in [
        (&["10.1.0.1 node-a rs"][..], &[][..], 1),
        (&["10.1.0.1 node-a rs", "10.1.0.2 node-a rs"], &["10.1.0.1 node-a rs"], 2),
        (&["10.1.0.1 node-a rs"], &["10.1.0.3 node-a rs"], 2),
        (&["10.1.0.1 node-b rs", "10.1.0.2 - rs"], &[], 0),
        (&["10.1.0.1 node-a st"], &[], 0),
        (&["10.1.0.1 node-a s", "10.1.0.2 node-a r"], &[], 1),
    ] {
        let slices = [slice(one), metrics(two)];
        assert_eq!(
            ready_local_endpoints(&service, &slices, "node-a", Family::V4),
            expected,
            "{one:?} {two:?}"
        );
    }
}

#[test]
fn r12_slices_of_other_ports_and_families_do_not_count() {
    let service = fixture::service(&json!({}));
    let other_port = fixture::slice(&json!({
        "ports": [{"name": "other", "port": 1}], "endpoints": [endpoint("10.1.0.1 node-a rs")],
    }));
    let other_family =
        fixture::slice(&json!({"addressType": "IPv6", "endpoints": [endpoint("fd00::1 node-a rs")]}));
    let check = |service: &Service| {
        let service = Service { health_check_node_port: Some(31000), ..service.clone() };
        check(&service, &[&other_port, &other_family], "node-a").unwrap().n_ready_local
    };
    assert_eq!(check(&service), BTreeMap::from([(Family::V4, 0)]));
    let both = fixture::service(
        &json!({"spec": {"clusterIPs": ["10.96.0.1", "fd00:96::1"], "ipFamilies": ["IPv4", "IPv6"]}}),
    );
    assert_eq!(check(&both), BTreeMap::from([(Family::V4, 0), (Family::V6, 1)]));
}
