//! Manifests as kubectl would send them.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, Service, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::kustomize;

pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}

pub(crate) struct Rendered(pub(crate) Vec<Value>);

impl Rendered {
    /// Renders a directory below `manifests`.
    pub(crate) fn of(name: &str) -> Self {
        Self(kustomize::render(&folder().join(name)))
    }

    /// Renders with kubectl, which must not warn.
    pub(crate) fn by_kubectl(folder: &Path) -> Self {
        let output = Command::new("kubectl").arg("kustomize").arg(folder).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && error.is_empty(),
            "kubectl kustomize {}: {error}",
            folder.display()
        );
        Self(serde_saphyr::from_multiple(&String::from_utf8(output.stdout).unwrap()).unwrap())
    }

    /// The only object of a kind.
    pub(crate) fn one<T: DeserializeOwned>(&self, kind: &str) -> T {
        let mut found = self.0.iter().filter(|object| object["kind"] == kind);
        let object = found.next().unwrap_or_else(|| panic!("no {kind}"));
        assert!(found.next().is_none(), "more than one {kind}");
        serde_json::from_value(object.clone()).unwrap()
    }

    /// The agent's settings file.
    pub(crate) fn settings(&self) -> Value {
        let map: ConfigMap = self.one("ConfigMap");
        serde_saphyr::from_str(&map.data.unwrap()["socklb.yaml"]).unwrap()
    }
}

/// The complaints of an API server of k8s-openapi's version with `fieldValidation: Strict`, as far as the
/// published schemas define them: unknown fields, wrong types, missing required fields.
pub(crate) fn complaints(object: &Value) -> Vec<String> {
    let kind = (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
    let read = match kind {
        ("apps/v1", "DaemonSet") => reread::<DaemonSet>(object),
        ("v1", "ConfigMap") => reread::<ConfigMap>(object),
        ("v1", "Service") => reread::<Service>(object),
        ("v1", "ServiceAccount") => reread::<ServiceAccount>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => reread::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => reread::<ClusterRoleBinding>(object),
        // A kind of the Prometheus operator, unknown to Kubernetes.
        ("monitoring.coreos.com/v1", "ServiceMonitor") => return Vec::new(),
        _ => return vec![format!("{kind:?}: no type to check it with")],
    };
    match read {
        Ok(read) => differences(object, &read, &format!("{} {}", kind.1, object["metadata"]["name"])),
        Err(error) => vec![format!("{kind:?}: {error}")],
    }
}

/// An object after its type has parsed and serialised it.
fn reread<T: DeserializeOwned + Serialize>(object: &Value) -> serde_json::Result<Value> {
    serde_json::to_value(T::deserialize(object)?)
}

/// Where the parsed object differs from the given one. A type parses a missing required field as an empty one
/// and serialises it; it does not serialise an empty optional one.
fn differences(given: &Value, read: &Value, path: &str) -> Vec<String> {
    match (given, read) {
        (Value::Object(given), Value::Object(read)) => {
            let missing = read
                .keys()
                .filter(|key| !given.contains_key(*key))
                .map(|key| format!("{path}.{key}: required, and missing"));
            let known = given
                .iter()
                // An empty map or list is the same as none.
                .filter(|(_, value)| !(value.is_null() || *value == &serde_json::json!({})))
                .flat_map(|(key, value)| {
                    let path = format!("{path}.{key}");
                    match read.get(key) {
                        Some(read) => differences(value, read, &path),
                        None => vec![format!("{path}: no such field")],
                    }
                });
            missing.chain(known).collect()
        }
        (Value::Array(given), Value::Array(read)) if given.len() == read.len() => {
            let items = given.iter().zip(read).enumerate();
            items.flat_map(|(n, (given, read))| differences(given, read, &format!("{path}[{n}]"))).collect()
        }
        _ if given == read => Vec::new(),
        _ => vec![format!("{path}: {given} is read as {read}")],
    }
}

#[test]
fn unknown_missing_and_mistaken_fields_are_complaints() {
    let mut object = serde_json::json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}]},
    });
    assert_eq!(complaints(&object), [""; 0]);
    object["spec"]["ports"][0]["prot"] = 1.into();
    assert_eq!(complaints(&object), ["Service \"a\".spec.ports[0].prot: no such field"]);
    object["spec"]["ports"][0] = serde_json::json!({"name": "b"});
    assert_eq!(complaints(&object), ["Service \"a\".spec.ports[0].port: required, and missing"]);
    object["spec"]["ports"][0]["port"] = "x".into();
    assert_eq!(complaints(&object).len(), 1);
}
