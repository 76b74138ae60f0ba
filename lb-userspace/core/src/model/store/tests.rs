use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::model::fixture;

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

fn service(name: &str, port: u16) -> Service {
    fixture::service(&json!({"metadata": {"name": name}, "spec": {"ports": [{"port": port}]}}))
}

fn slice(name: &str, service: &str, last: u8) -> Slice {
    fixture::slice(&json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "endpoints": [{"addresses": [format!("10.1.0.{last}")]}],
    }))
}

fn changed(names: &[&str]) -> Changes {
    Changes { services: names.iter().map(|name| key(name)).collect(), topology: false }
}

fn slice_names(store: &Store, service: &str) -> Vec<String> {
    store.slices_of(&key(service)).map(|slice| slice.name.to_string()).collect()
}

#[test]
fn r15_equal_objects_cause_no_change() {
    let mut store = Store::new();
    let slice_key = SliceKey::new("default", "web-1");
    let node = fixture::node("node-a", "a", &["192.168.0.1"]);
    assert_eq!(store.set_service(&key("web"), Some(service("web", 80))), changed(&["web"]));
    assert_eq!(store.set_slice(&slice_key, Some(slice("web-1", "web", 1))), changed(&["web"]));
    assert!(store.set_node("node-a", Some(node.clone())).topology);

    assert!(store.set_service(&key("web"), Some(service("web", 80))).is_empty());
    assert!(store.set_slice(&slice_key, Some(slice("web-1", "web", 1))).is_empty());
    assert!(store.set_node("node-a", Some(node.clone())).is_empty());
    assert!(store.replace_services([service("web", 80)]).is_empty());
    assert!(store.replace_slices([slice("web-1", "web", 1)]).is_empty());
    assert!(store.replace_nodes([node]).is_empty());

    let cidr = |text: &str| ServiceCidr { name: "kubernetes".into(), cidrs: vec![text.parse().unwrap()] };
    assert!(store.set_service_cidr("kubernetes", Some(cidr("10.96.0.0/12"))).topology);
    assert!(store.set_service_cidr("kubernetes", Some(cidr("10.96.0.0/12"))).is_empty());
    assert!(store.replace_service_cidrs([cidr("10.96.0.0/12")]).is_empty());
    assert!(store.replace_service_cidrs([cidr("10.96.0.0/16")]).topology);
    assert!(store.set_service_cidr("kubernetes", None).topology);

    assert_eq!(store.set_service(&key("web"), Some(service("web", 81))), changed(&["web"]));
    assert_eq!(store.set_slice(&slice_key, Some(slice("web-1", "web", 2))), changed(&["web"]));
    assert!(store.set_node("node-a", Some(fixture::node("node-a", "b", &["192.168.0.1"]))).topology);
}

/// R15: slices may arrive before their service and outlive it; an object that is no longer served is removed.
#[test]
fn r15_objects_come_and_go_in_any_order() {
    let mut store = Store::new();
    let slice_key = SliceKey::new("default", "web-1");
    assert_eq!(store.set_slice(&slice_key, Some(slice("web-1", "web", 1))), changed(&["web"]));
    assert_eq!(store.service(&key("web")), None);
    assert_eq!(store.set_service(&key("web"), Some(service("web", 80))), changed(&["web"]));
    assert_eq!(slice_names(&store, "web"), ["web-1"]);

    assert_eq!(store.set_service(&key("web"), None), changed(&["web"]));
    assert!(store.set_service(&key("web"), None).is_empty());
    assert_eq!(slice_names(&store, "web"), ["web-1"]);
    assert_eq!(store.set_slice(&slice_key, None), changed(&["web"]));
    assert!(store.set_slice(&slice_key, None).is_empty());
    assert_eq!(store, Store::new());
}

/// R4: a slice whose label moves it to another service affects both; equal names in two namespaces are two
/// slices.
#[test]
fn r4_a_slice_may_change_its_service() {
    let mut store = Store::new();
    let slice_key = SliceKey::new("default", "web-1");
    let _ = store.set_slice(&slice_key, Some(slice("web-1", "web", 1)));
    let moved = store.set_slice(&slice_key, Some(slice("web-1", "api", 1)));
    assert_eq!(moved, changed(&["api", "web"]));
    assert!(slice_names(&store, "web").is_empty());
    assert_eq!(slice_names(&store, "api"), ["web-1"]);

    let mut elsewhere = slice("web-1", "api", 1);
    elsewhere.service.namespace = "other".into();
    let _ = store.set_slice(&elsewhere.key(), Some(elsewhere.clone()));
    assert_eq!(store.slices().count(), 2);
    assert_eq!(store.set_slice(&slice_key, None), changed(&["api"]));
    assert_eq!(store.slices().collect::<Vec<_>>(), [&elsewhere]);
}

/// R4: an endpoint of two slices stays when one of them is deleted.
#[test]
fn r4_slices_are_held_apart() {
    let mut store = Store::new();
    for name in ["web-1", "web-2"] {
        let _ = store.set_slice(&SliceKey::new("default", name), Some(slice(name, "web", 1)));
    }
    let _ = store.set_slice(&SliceKey::new("default", "web-1"), None);
    assert_eq!(slice_names(&store, "web"), ["web-2"]);
}

#[test]
fn a_new_trigger_time_is_kept_and_changes_nothing() {
    let mut store = Store::new();
    let slice_key = SliceKey::new("default", "web-1");
    let mut slice = slice("web-1", "web", 1);
    let _ = store.set_slice(&slice_key, Some(slice.clone()));
    slice.trigger_time = Some(7);
    assert!(store.set_slice(&slice_key, Some(slice.clone())).is_empty());
    assert_eq!(store.slices_of(&key("web")).next(), Some(&slice));
}

/// A write to a map copies what a view shares, which takes longer than the rest of a change.
#[test]
fn views_share_what_a_slice_does_not_change() {
    let (mut store, key) = (Store::new(), SliceKey::new("default", "web-1"));
    let _added = store.set_slice(&key, Some(slice("web-1", "web", 1)));
    for (what, slice, slices_are_shared, services_are_shared) in [
        ("an equal object", slice("web-1", "web", 1), true, true),
        ("other endpoints", slice("web-1", "web", 2), false, true),
        ("another service", slice("web-1", "other", 2), false, false),
    ] {
        let view = store.clone();
        let _changed = store.set_slice(&key, Some(slice));
        let shared =
            (view.slices.ptr_eq(&store.slices), view.services_of_slices.ptr_eq(&store.services_of_slices));
        assert_eq!(shared, (slices_are_shared, services_are_shared), "{what}");
    }
}

/// R15: a re-list removes what it does not name.
#[test]
fn r15_a_relist_deletes_what_it_does_not_name() {
    let mut store = Store::new();
    let _ = store.replace_services([service("a", 80), service("b", 80), service("c", 80)]);
    let _ = store.replace_slices([slice("a-1", "a", 1), slice("b-1", "b", 1), slice("c-1", "c", 1)]);
    let _ = store.replace_nodes([fixture::node("node-a", "", &[]), fixture::node("node-b", "", &[])]);

    let changes = store.replace_services([service("a", 80), service("b", 81), service("d", 80)]);
    assert_eq!(changes, changed(&["b", "c", "d"]));
    let changes = store.replace_slices([slice("a-1", "a", 1), slice("b-1", "c", 1), slice("c-1", "c", 2)]);
    assert_eq!(changes, changed(&["b", "c"]));
    assert!(store.replace_nodes([fixture::node("node-b", "", &[])]).topology);
    assert_eq!(
        store.services().map(|service| service.key.name.to_string()).collect::<Vec<_>>(),
        ["a", "b", "d"]
    );
    assert_eq!(store.nodes().map(|node| node.name.to_string()).collect::<Vec<_>>(), ["node-b"]);
    assert!(store.node("node-a").is_none() && store.node("node-b").is_some());
}

/// An event of a watch.
#[derive(Clone, Debug)]
enum Event {
    Service(String, Option<Service>),
    Slice(String, Option<Slice>),
}

fn any_event() -> impl Strategy<Value = Event> {
    let service_event = ("[ab]", prop::option::of(1u16..3)).prop_map(|(name, port)| {
        let service = port.map(|port| service(&name, port));
        Event::Service(name, service)
    });
    let slice_event = ("[xyz]", prop::option::of(("[ab]", 1u8..3))).prop_map(|(name, content)| {
        let slice = content.map(|(service, last)| slice(&name, &service, last));
        Event::Slice(name, slice)
    });
    prop_oneof![service_event, slice_event]
}

proptest! {
    /// R15: the store depends only on the latest version of each object, from a watch or a list, and
    /// `Changes` names every service with a difference.
    #[test]
    fn r15_a_watch_and_a_relist_agree(events in prop::collection::vec(any_event(), 0..24)) {
        let (mut watched, mut services, mut slices) = (Store::new(), BTreeMap::new(), BTreeMap::new());
        for event in events {
            let before = watched.clone();
            let changes = match event {
                Event::Service(name, service) => {
                    services.insert(name.clone(), service.clone());
                    watched.set_service(&key(&name), service)
                }
                Event::Slice(name, slice) => {
                    slices.insert(name.clone(), slice.clone());
                    watched.set_slice(&SliceKey::new("default", &name), slice)
                }
            };
            for name in ["a", "b"] {
                let same = before.service(&key(name)) == watched.service(&key(name))
                    && before.slices_of(&key(name)).eq(watched.slices_of(&key(name)));
                prop_assert_eq!(!same, changes.services.contains(&key(name)));
            }
            let mut relisted = before;
            let mut relist = relisted.replace_services(services.values().flatten().cloned());
            relist.merge(relisted.replace_slices(slices.values().flatten().cloned()));
            prop_assert_eq!(&relisted, &watched);
            prop_assert_eq!(relist, changes);
        }
    }
}
