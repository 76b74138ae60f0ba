//! Objects for tests, built from short patches.

use k8s_openapi::api::{core::v1 as api, discovery::v1 as discovery};
use serde_json::{Value, json};

use super::{Issue, Node, Service, Slice, ingest};

/// Applies a JSON merge patch (RFC 7396): `null` removes a field.
pub(crate) fn patched(mut base: Value, patch: &Value) -> Value {
    match (&mut base, patch) {
        (Value::Object(fields), Value::Object(patches)) => {
            for (key, patch) in patches {
                if patch.is_null() {
                    fields.remove(key);
                } else {
                    let field = fields.remove(key).unwrap_or(Value::Null);
                    fields.insert(key.clone(), patched(field, patch));
                }
            }
            base
        }
        (_, Value::Object(_)) => patched(json!({}), patch),
        (_, patch) => patch.clone(),
    }
}

/// Ingests the Service `default/web`, which has one unnamed port TCP 80 at 10.0.0.1, with a patch.
pub(crate) fn ingest_service(patch: &Value) -> (Option<Service>, Vec<Issue>) {
    let base = json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "10.0.0.1",
            "clusterIPs": ["10.0.0.1"],
            "ipFamilies": ["IPv4"],
            "ports": [{"port": 80}],
        },
    });
    ingest::service(&serde_json::from_value::<api::Service>(patched(base, patch)).unwrap())
}

/// As [`ingest_service`], for a Service without issues.
pub(crate) fn service(patch: &Value) -> Service {
    let (service, issues) = ingest_service(patch);
    assert_eq!(issues, []);
    service.unwrap()
}

/// Ingests the slice `default/web-1` of the Service `default/web`, which has the unnamed port TCP 8080 and no
/// endpoints, with a patch.
pub(crate) fn ingest_slice(patch: &Value) -> (Option<Slice>, Vec<Issue>) {
    let base = json!({
        "metadata": {
            "namespace": "default",
            "name": "web-1",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [],
    });
    ingest::slice(&serde_json::from_value::<discovery::EndpointSlice>(patched(base, patch)).unwrap())
}

/// As [`ingest_slice`], for a slice without issues.
pub(crate) fn slice(patch: &Value) -> Slice {
    let (slice, issues) = ingest_slice(patch);
    assert_eq!(issues, []);
    slice.unwrap()
}

/// Ingests the Node `node-a`, with a patch.
pub(crate) fn ingest_node(patch: &Value) -> (Option<Node>, Vec<Issue>) {
    let base = json!({"metadata": {"name": "node-a"}});
    ingest::node(&serde_json::from_value::<api::Node>(patched(base, patch)).unwrap())
}

/// A Node with a name, a zone unless empty, and internal addresses.
pub(crate) fn node(name: &str, zone: &str, addresses: &[&str]) -> Node {
    let addresses: Vec<_> = addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    let (node, issues) = ingest_node(&json!({
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": addresses},
    }));
    assert_eq!(issues, []);
    node.unwrap()
}

/// The issues' texts, without the object.
pub(crate) fn texts(issues: &[Issue]) -> Vec<String> {
    issues.iter().map(|issue| issue.kind.to_string()).collect()
}
