//! Discovery: as much as kubectl needs.

use serde_json::{Map, Value, json};

use super::store::Kind;

const VERBS: [&str; 7] = ["create", "delete", "get", "list", "patch", "update", "watch"];

fn resources(api_version: &str) -> Value {
    let kinds = Kind::ALL.into_iter().filter(|kind| kind.api_version() == api_version);
    let resources: Vec<Value> = kinds
        .map(|kind| {
            let short = if kind == Kind::Service { json!(["svc"]) } else { json!([]) };
            json!({
                "name": kind.plural(), "singularName": kind.name().to_lowercase(), "namespaced": kind.is_namespaced(),
                "kind": kind.name(), "verbs": VERBS, "shortNames": short,
            })
        })
        .collect();
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": resources})
}

/// The paths of one group in the form of `OpenAPI`. kubectl reads there whether the server validates fields.
fn openapi(api_version: &str) -> Value {
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    let mut paths = Map::new();
    for kind in Kind::ALL.into_iter().filter(|kind| kind.api_version() == api_version) {
        let prefix =
            if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{api_version}") };
        let scope = if kind.is_namespaced() { "/namespaces/{namespace}" } else { "" };
        let operation = json!({
            "responses": {},
            "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind.name()},
        });
        let path = json!({"patch": operation, "post": operation});
        paths.insert(format!("{prefix}{scope}/{}/{{name}}", kind.plural()), path);
    }
    json!({
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.34.0"}, "paths": paths,
        "components": {"schemas": {}},
    })
}

/// The response to a path that names no object.
pub(super) fn document(path: &str) -> Option<Value> {
    let group = |name: &str| {
        let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
        json!({"name": name, "versions": [version], "preferredVersion": version})
    };
    Some(match path {
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        "/apis" => json!({
            "kind": "APIGroupList", "apiVersion": "v1",
            "groups": [group("discovery.k8s.io"), group("networking.k8s.io")],
        }),
        "/api/v1" => resources("v1"),
        "/apis/discovery.k8s.io/v1" => resources("discovery.k8s.io/v1"),
        "/apis/networking.k8s.io/v1" => resources("networking.k8s.io/v1"),
        "/version" => json!({
            "major": "1", "minor": "34", "gitVersion": "v1.34.0", "gitCommit": "", "gitTreeState": "clean",
            "buildDate": "2025-08-27T00:00:00Z", "goVersion": "", "compiler": "", "platform": "linux/amd64",
        }),
        "/openapi/v3" => json!({"paths": {
            "api/v1": {"serverRelativeURL": "/openapi/v3/api/v1"},
            "apis/discovery.k8s.io/v1": {"serverRelativeURL": "/openapi/v3/apis/discovery.k8s.io/v1"},
            "apis/networking.k8s.io/v1": {"serverRelativeURL": "/openapi/v3/apis/networking.k8s.io/v1"},
        }}),
        "/openapi/v3/api/v1" => openapi("v1"),
        "/openapi/v3/apis/discovery.k8s.io/v1" => openapi("discovery.k8s.io/v1"),
        "/openapi/v3/apis/networking.k8s.io/v1" => openapi("networking.k8s.io/v1"),
        _ => return None,
    })
}
