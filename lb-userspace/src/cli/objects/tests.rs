//! What a command learns from an agent.

use std::sync::Arc;

use lb_core::{
    desired::Settings,
    model::{Issue, IssueKind, ObjectRef, Service, ServiceKey, Slice, SliceKey},
    plan::Capacity,
    state::View,
    tables::Image,
};
use serde_json::json;

use super::*;
use crate::cli::listing::{is_described, list};

fn state() -> State {
    let settings = Settings::of_node("node");
    State::new(settings, vec!["192.0.2.1".parse().unwrap()], Capacity::default(), &Image::default())
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("shop", name)
}

/// A service with a cluster IP and a node port.
fn service(name: &str, ip: &str, node_port: u16) -> Service {
    serde_json::from_value(json!({
        "key": key(name),
        "created": null,
        "service_type": "NodePort",
        "cluster_ipv4": ip,
        "cluster_ipv6": null,
        "external_ips": [],
        "load_balancer_ips": [],
        "source_ranges": [],
        "has_unreadable_source_range": false,
        "internal_policy": "Cluster",
        "external_policy": "Cluster",
        "affinity_seconds": null,
        "health_check_node_port": null,
        "ports": [{"name": "", "protocol": "TCP", "port": 80, "node_port": node_port}],
        "annotations": [],
    }))
    .unwrap()
}

fn slice(name: &str, endpoint: &str) -> Slice {
    serde_json::from_value(json!({
        "name": format!("{name}-1"),
        "service": key(name),
        "ipv6": false,
        "ports": [{"name": "", "protocol": "TCP", "port": 8080}],
        "endpoints": [{
            "address": endpoint, "ready": true, "serving": true, "terminating": false,
            "node": "node", "zone": null, "hints": null,
        }],
        "trigger_time": null,
    }))
    .unwrap()
}

fn set(state: &mut State, name: &str, ip: &str, node_port: u16, endpoint: &str) {
    state.change(|store| {
        let mut changes = store.set_service(&key(name), Some(service(name, ip, node_port)));
        let slice = slice(name, endpoint);
        changes.merge(store.set_slice(&slice.key(), Some(slice)));
        changes
    });
}

fn two() -> State {
    let mut state = state();
    set(&mut state, "a", "10.96.0.1", 30001, "10.244.0.1");
    set(&mut state, "b", "10.96.0.2", 30002, "10.244.0.2");
    let _plan = state.sync();
    state
}

/// As a command receives it.
fn heard(state: &State, which: Which) -> Known {
    serde_json::from_slice(&serde_json::to_vec(&Known::of(&state.view(), which)).unwrap()).unwrap()
}

#[test]
fn an_address_gets_the_services_that_name_it() {
    let state = two();
    for (address, services, n_tables) in [
        ("10.96.0.1:80/tcp", &["a"][..], 1),
        // A port that the Service does not define is in the answer too.
        ("10.96.0.1:81/tcp", &["a"], 0),
        ("192.0.2.1:30002/tcp", &["b"], 1),
        ("127.0.0.1:30001/tcp", &["a"], 1),
        ("[::ffff:10.96.0.2]:80/tcp", &["b"], 1),
        // Only this node's addresses have the node port.
        ("192.0.2.9:30002/tcp", &[], 0),
        ("10.96.0.3:80/tcp", &[], 0),
    ] {
        let known = heard(&state, Which::At(address.parse().unwrap()));
        let names: Vec<&str> = known.services.iter().map(|service| &*service.key.name).collect();
        assert_eq!((&*names, known.tables.len()), (services, n_tables), "{address}");
        assert_eq!(known.slices.len(), services.len(), "{address}");
    }
}

#[test]
fn objects_are_shared_and_not_copied() {
    let state = two();
    let known = Known::of(&state.view(), Which::All);
    for (ours, theirs) in known.services.iter().zip(state.store().shared_services()) {
        assert!(Arc::ptr_eq(ours, theirs));
    }
    for (ours, theirs) in known.slices.iter().zip(state.store().shared_slices()) {
        assert!(Arc::ptr_eq(ours, theirs));
    }
    assert_eq!((known.services.len(), known.slices.len()), (2, 2));
}

/// Between a change and the next sync the maps have entries that the latest objects do not describe.
#[test]
fn frontends_keep_their_names_until_the_tables_follow() {
    let mut state = two();
    let before = state.view();
    state.change(|store| store.set_service(&key("a"), None));
    set(&mut state, "b", "10.96.0.1", 30002, "10.244.0.2");
    let names = |view: &View| -> Vec<String> {
        let objects = state_of_known(Known::of(view, Which::All));
        let rows = list(&view.image, Some(&objects), &std::collections::BTreeMap::new());
        assert!(rows.iter().all(|row| is_described(row, &objects)), "{rows:?}");
        rows.iter().map(|row| format!("{} {}", row.name, row.address)).collect()
    };
    assert_eq!(names(&before), ["a 0.0.0.0", "a 10.96.0.1", "b 0.0.0.0", "b 10.96.0.2"]);
    let _plan = state.sync();
    assert_eq!(names(&state.view()), ["b 0.0.0.0", "b 10.96.0.1"]);
}

#[test]
fn an_address_gets_the_issues_that_concern_it() {
    let mut state = two();
    state.change(|store| store.set_slice(&SliceKey { namespace: "shop".into(), name: "a-1".into() }, None));
    let no_ports = |object| Issue::new(object, IssueKind::NoPorts);
    let taken = IssueKind::FrontendTaken { address: "10.96.0.1:80/tcp".into(), winner: "shop/a".into() };
    let issues = [
        (no_ports(ObjectRef::service("shop", "a")), true),
        // An object that could not be parsed, named as in Kubernetes.
        (no_ports(ObjectRef::slice("shop", "a-x2x4z")), true),
        (no_ports(ObjectRef::slice("shop", "ab-x2x4z")), false),
        (no_ports(ObjectRef::service("other", "a")), false),
        (no_ports(ObjectRef::service("shop", "b")), false),
        (Issue::new(ObjectRef::service("other", "c"), taken), true),
        (no_ports(ObjectRef::node("a")), false),
    ];
    let to: FrontendAddress = "10.96.0.1:80".parse().unwrap();
    let all = issues.iter().map(|(issue, _)| issue.clone()).collect();
    let mut known = Known { issues: all, ..Known::of(&state.view(), Which::At(to)) };
    known.keep_issues_at(to);
    let expected: Vec<Issue> = issues.into_iter().filter(|(_, is_kept)| *is_kept).map(|(i, _)| i).collect();
    assert_eq!(known.issues, expected);
}
