//! Arbitrary objects in sequence, from their text to the image.
//!
//! An input is lines of JSON: each line creates or replaces a Service, EndpointSlice, Node or ServiceCIDR; a
//! line that starts with `-` deletes one. Whatever they hold,
//!
//! - nothing panics, and no issue is longer than a line,
//! - every plan leads to the encoder's image,
//! - the final desired state does not depend on the history.
#![no_main]

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use lb_core::{
    desired::Settings,
    model::{Changes, Issue, ServiceKey, Slice, SliceKey, Store, ingest},
    plan::Capacity,
    state::State,
    tables::Image,
};
use libfuzzer_sys::fuzz_target;
use serde::Deserialize;
use serde_json::Value;

/// More objects find no other faults, and cost time.
const MAX_LINES: usize = 32;

fn state() -> State {
    let settings = Settings::of_node("node");
    // Small, so that full maps occur too.
    let capacity = Capacity { services: 24, endpoints: 96 };
    State::new(settings, vec![[192, 0, 2, 1].into()], capacity, &Image::default())
}

fn judge(issues: &[Issue]) {
    for issue in issues {
        assert!(!issue.to_string().contains('\n'), "{issue:?}");
    }
}

/// Namespace and name, as in a watch event.
fn name(object: &Value) -> (&str, &str) {
    let field = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
    (field("namespace"), field("name"))
}

fn set(store: &mut Store, object: &Value, is_deleted: bool) -> Changes {
    let (namespace, name) = name(object);
    match object["kind"].as_str() {
        Some("Service") => {
            let parsed = Service::deserialize(object).ok().filter(|_| !is_deleted);
            let (service, issues) =
                parsed.as_ref().map(|object| ingest::any_service(object, None)).unwrap_or_default();
            judge(&issues);
            let key = service.as_ref().map_or_else(|| ServiceKey::new(namespace, name), |s| s.key.clone());
            store.set_service(&key, service)
        }
        Some("EndpointSlice") => {
            let parsed = EndpointSlice::deserialize(object).ok().filter(|_| !is_deleted);
            let (slice, issues) = parsed.as_ref().map(ingest::slice).unwrap_or_default();
            judge(&issues);
            let key = slice.as_ref().map_or_else(|| SliceKey::new(namespace, name), Slice::key);
            store.set_slice(&key, slice)
        }
        Some("Node") => {
            let parsed = Node::deserialize(object).ok().filter(|_| !is_deleted);
            let (node, issues) = parsed.as_ref().map(ingest::node).unwrap_or_default();
            judge(&issues);
            let name = node.as_ref().map_or_else(|| name.into(), |node| node.name.clone());
            store.set_node(&name, node)
        }
        Some("ServiceCIDR") => {
            let parsed = ServiceCIDR::deserialize(object).ok().filter(|_| !is_deleted);
            let (cidr, issues) = parsed.as_ref().map(ingest::service_cidr).unwrap_or_default();
            judge(&issues);
            let name = cidr.as_ref().map_or_else(|| name.into(), |cidr| cidr.name.clone());
            store.set_service_cidr(&name, cidr)
        }
        _ => Changes::default(),
    }
}

fuzz_target!(|data: &[u8]| {
    let (mut state, mut image) = (state(), Image::default());
    for line in data.split(|octet| *octet == b'\n').take(MAX_LINES) {
        let (is_deleted, text) = line.strip_prefix(b"-").map_or((false, line), |text| (true, text));
        let Ok(object) = serde_json::from_slice::<Value>(text) else { continue };
        state.change(|store| set(store, &object, is_deleted));
        let plan = state.sync();
        plan.apply(&mut image);
        assert_eq!(image, *state.image());
        state.settled(plan.number());
    }
    let issues: Vec<Issue> = state.issues().collect();
    judge(&issues);
    let mut scratch = self::state();
    scratch.change(|store| {
        let held = state.store();
        let mut changes = store.replace_services(held.services().cloned());
        changes.merge(store.replace_slices(held.slices().cloned()));
        changes.merge(store.replace_nodes(held.nodes().cloned()));
        changes.merge(store.replace_service_cidrs(held.service_cidrs().cloned()));
        changes
    });
    let _plan = scratch.sync();
    assert_eq!(scratch.desired(), state.desired());
});
