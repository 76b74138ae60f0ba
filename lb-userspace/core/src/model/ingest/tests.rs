//! Each rule of reading objects.

mod properties;
mod service;
mod slice;

use serde_json::{Value, json};

use super::*;
use crate::model::{
    NamesOnly,
    fixture::{ingest_node, ingest_service, ingest_slice, node, patched, texts},
};

fn labels(json: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(json.clone()).unwrap()
}

/// R1: the label selection of the watch: without a proxy name only the key counts, with one the value.
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
        label_selector(None, false),
        "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"
    );
    assert_eq!(
        label_selector(Some("ours"), false),
        "service.kubernetes.io/service-proxy-name=ours,!service.kubernetes.io/headless"
    );
}

/// R1: calls to the cluster IPs of an unselected Service pass unchanged. Only these are kept, and no issue is
/// reported. One without cluster IPs keeps its names.
#[test]
fn r1_of_services_of_other_proxies_the_cluster_ips_are_kept() {
    let label = "service.kubernetes.io/service-proxy-name";
    let ingest = |labels: &Value, patch: &Value, name: Option<&str>| {
        let base = json!({
            "metadata": {"name": "web", "labels": labels, "annotations": {"socklb.io/stale-connections": "never"}},
            "spec": {
                "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
                "ports": [{"port": 80}, {"port": 0}], "externalIPs": ["192.0.2.1"],
            },
        });
        let object = serde_json::from_value(patched(base, patch)).unwrap();
        any_service(&object, name)
    };
    for (labels, name, text) in [
        (json!({label: "mesh"}), None, "is labelled service.kubernetes.io/service-proxy-name=mesh"),
        (json!({label: "mesh"}), Some("ours"), "is labelled service.kubernetes.io/service-proxy-name=mesh"),
        (json!({}), Some("ours"), "is not labelled service.kubernetes.io/service-proxy-name=ours"),
        (json!({HEADLESS: "", label: "ours"}), Some("ours"), "is labelled service.kubernetes.io/headless="),
    ] {
        let (service, issues) = ingest(&labels, &json!({}), name);
        let service = service.unwrap();
        assert_eq!(service.unselected.as_ref().map(ToString::to_string).as_deref(), Some(text));
        assert!(!service.is_served() && service.ports.is_empty() && service.external_ips.is_empty());
        assert!(service.cluster_ipv4.is_some() && service.cluster_ipv6.is_some());
        assert_eq!((issues, service.annotations), (vec![], vec![]));
        let headless = json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}});
        let (service, issues) = ingest(&labels, &headless, name);
        let service = service.unwrap();
        assert!(service.names_only.is_some() && !service.is_served(), "{service:?}");
        assert_eq!((issues, service.ports.len()), (vec![], 1));
    }
    let (service, issues) = ingest(&json!({label: "ours"}), &json!({}), Some("ours"));
    assert!(service.unwrap().is_served());
    assert_eq!(issues.len(), 2);
}

/// Services without cluster IPs have names alone; an alias needs a name that DNS can have.
#[test]
fn services_without_cluster_ips_have_names_alone() {
    let ingest = |spec: Value| {
        let object = json!({"metadata": {"name": "web"}, "spec": spec});
        any_service(&serde_json::from_value(object).unwrap(), None)
    };
    let ports = json!([{"name": "sql", "port": 5432}]);
    for (publishes, expected) in [(json!(null), false), (json!(true), true)] {
        let spec = json!({"clusterIP": "None", "ports": ports, "publishNotReadyAddresses": publishes});
        let (service, issues) = ingest(spec);
        let service = service.unwrap();
        assert_eq!(service.names_only, Some(NamesOnly::Headless { publishes_not_ready: expected }));
        assert_eq!((service.ports.len(), issues), (1, vec![]));
    }
    for (name, expected) in [
        ("Db.Example.com.", Some("db.example.com")),
        ("_sip.example.com", Some("_sip.example.com")),
        ("", None),
        (".", None),
        ("a b", None),
        ("a..b", None),
        (&"a".repeat(64), None),
    ] {
        let (service, issues) = ingest(json!({"type": "ExternalName", "externalName": name}));
        let target = service.and_then(|service| service.names_only);
        assert_eq!(target, expected.map(|name| NamesOnly::External(name.into())), "{name:?}");
        assert_eq!(issues.len(), usize::from(expected.is_none()), "{name:?}: {issues:?}");
    }
}

/// R2: a network counts as long as its object exists, as with kube-proxy.
#[test]
fn r2_networks_of_service_cidrs() {
    let ingest = |object: &Value| service_cidr(&serde_json::from_value(object.clone()).unwrap());
    for more in [
        json!({}),
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
        json!({"status": {"conditions": [{
            "type": "Ready", "status": "False", "reason": "Terminating", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }]}}),
    ] {
        let base =
            json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["010.96.0.0/12", "fd00::/112"]}});
        let (cidr, issues) = ingest(&patched(base, &more));
        let cidr = cidr.unwrap();
        let texts: Vec<String> = cidr.cidrs.iter().map(ToString::to_string).collect();
        assert_eq!(
            (&*cidr.name, &*texts),
            ("kubernetes", &["10.96.0.0/12", "fd00::/112"].map(str::to_owned)[..])
        );
        assert_eq!(issues, []);
    }
    let wrong = ["10.96.0.0", "0.0.0.0/0", "127.0.0.0/8", "169.0.0.0/8", "::/48", "ff00::/64", "10.0.0.0/16"];
    let (cidr, issues) = ingest(&json!({"metadata": {"name": "many"}, "spec": {"cidrs": wrong}}));
    assert_eq!(cidr.unwrap().cidrs, ["10.0.0.0/16".parse().unwrap()]);
    assert_eq!(
        texts(&issues),
        [
            "spec.cidrs[0]: \"10.96.0.0\" is not a network: expected ADDRESS/LENGTH, such as 10.96.0.0/12; \
             calls to it pass unchanged",
            "spec.cidrs[1]: \"0.0.0.0/0\" is too large for service addresses: expected /8 or longer; calls \
             to it pass unchanged",
            "spec.cidrs[2]: \"127.0.0.0/8\" overlaps the loopback range; calls to it pass unchanged",
            "spec.cidrs[3]: \"169.0.0.0/8\" overlaps the link-local range; calls to it pass unchanged",
            "spec.cidrs[4]: \"::/48\" overlaps the unspecified range; calls to it pass unchanged",
            "spec.cidrs[5]: \"ff00::/64\" overlaps the multicast range; calls to it pass unchanged",
        ]
    );
    assert_eq!(ingest(&json!({"metadata": {"name": "empty"}})).0.unwrap().cidrs, []);
    let (none, issues) = ingest(&json!({"metadata": {"name": "A b"}, "spec": {"cidrs": ["10.96.0.0/12"]}}));
    assert!(none.is_none() && issues.len() == 1);
}

/// The rules of an API server, which objects from files have not passed.
#[test]
fn r14_names_are_those_that_an_api_server_takes() {
    let ingest = |namespace: &str, name: &str| {
        let patch = json!({"metadata": {"namespace": namespace, "name": name}});
        let (service, mut issues) = ingest_service(&patch);
        let (slice, of_slice) = ingest_slice(&patch);
        assert_eq!(service.is_some(), slice.is_some(), "{patch}");
        assert_eq!(texts(&issues), texts(&of_slice), "{patch}");
        let (node, of_node) = ingest_node(&json!({"metadata": {"name": name}}));
        assert_eq!(node.is_some(), of_node.is_empty(), "{patch}");
        assert!(service.is_some() == issues.is_empty() && issues.len() <= 1, "{issues:?}");
        issues.pop().map(|issue| issue.kind.to_string())
    };
    for name in ["a", "0", "web-1", "a--b", "web.example.org", &"a".repeat(253)] {
        assert_eq!(ingest("default", name), None, "{name}");
    }
    for name in ["Web", "my_web", "-a", "a-", ".a", "a..b", "a/b", "a\nb", "a b", "\u{e4}", &"a".repeat(254)]
    {
        let expected =
            format!("metadata.name: {name:?} is not a DNS name (a-z, 0-9, -); the object is left out");
        assert_eq!(ingest("default", name), Some(expected));
    }
    assert_eq!(ingest(&"a".repeat(63), "web"), None);
    for namespace in ["a.b", "A", "\u{1b}[2J", &"a".repeat(64)] {
        let found = ingest(namespace, "web").unwrap();
        assert!(
            found.starts_with(&format!("metadata.namespace: {namespace:?} is not a DNS name")),
            "{found}"
        );
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

/// A kubelet writes its Node and may be compromised.
#[test]
fn r14_a_node_has_so_many_addresses_and_no_more() {
    for (n, n_left_out) in [(64, 0), (65, 1), (40_000, 39_936)] {
        let address =
            |n: u32| json!({"type": "InternalIP", "address": std::net::Ipv4Addr::from(0x0a00_0000 + n)});
        let addresses: Vec<_> = (0..n).map(address).collect();
        let (node, issues) =
            ingest_node(&json!({"metadata": {"name": "node"}, "status": {"addresses": addresses}}));
        let addresses = node.unwrap().addresses;
        assert_eq!((addresses.len(), addresses[0].to_string()), (64, "10.0.0.0".to_owned()));
        let expected = format!(
            "status.addresses: more than 64; node ports do not answer on the last {n_left_out}: let the \
             kubelet or the cloud controller list fewer"
        );
        assert_eq!(texts(&issues), if n_left_out > 0 { vec![expected] } else { Vec::new() });
    }
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
