//! Validation, defaults and allocation.

use std::{collections::BTreeSet, net::Ipv4Addr};

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::store::{Kind, Name, Objects, Refusal, name_of};
use crate::cluster;

const NODE_PORTS: std::ops::RangeInclusive<u64> = 30000..=32767;

/// Validates an object and sets the defaults. `others` are all of its kind, including the object with the
/// same name, if there is one. Returns namespace and name; the namespace of a Node is empty.
pub(super) fn complete(kind: Kind, object: &mut Value, others: &Objects) -> Result<Name, Refusal> {
    let Some(fields) = object.as_object_mut() else {
        return Err(Refusal::new(400, "BadRequest", "the body is not an object"));
    };
    for (field, wanted) in [("kind", kind.name()), ("apiVersion", kind.api_version())] {
        let found = fields.entry(field).or_insert_with(|| wanted.into());
        if found != wanted {
            return Err(Refusal::new(400, "BadRequest", format!("{field} {found} is not {wanted}")));
        }
    }
    if !fields.get("metadata").is_some_and(Value::is_object) {
        return Err(Refusal::new(422, "Invalid", "metadata: Required value"));
    }
    if let Some(metadata) = fields.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        if kind.is_namespaced() {
            metadata.entry("namespace").or_insert_with(|| "default".into());
        } else {
            metadata.remove("namespace");
        }
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    if !is_subdomain(name) {
        let message =
            format!("metadata.name: Invalid value: {name:?}: must be a lowercase RFC 1123 subdomain");
        return Err(Refusal::new(422, "Invalid", message));
    }
    let name = name_of(object);
    let is_readable = match kind {
        Kind::Pod => serde_json::from_value::<Pod>(object.clone()).map(drop).map_err(Into::into),
        _ => cluster::object(object).map(drop),
    };
    is_readable.map_err(|error: anyhow::Error| Refusal::new(400, "BadRequest", format!("{error:#}")))?;
    match kind {
        Kind::Service => service(object, &name, others),
        Kind::Slice => {
            for port in object["ports"].as_array_mut().into_iter().flatten() {
                default(port, "name", "".into());
                default(port, "protocol", "TCP".into());
            }
        }
        Kind::Node | Kind::Pod | Kind::ServiceCidr => {}
    }
    Ok(name)
}

/// Whether a name is a DNS subdomain (RFC 1123). A real server is stricter for some kinds.
fn is_subdomain(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_label = |label: &str| {
        let inner = label.trim_matches('-');
        inner == label && !label.is_empty() && label.bytes().all(|byte| is_plain(byte) || byte == b'-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

fn default(object: &mut Value, field: &str, value: Value) {
    if object.get(field).is_none_or(Value::is_null) {
        object[field] = value;
    }
}

fn service(object: &mut Value, name: &Name, others: &Objects) {
    let old_status = others.get(name).map(|old| old["status"].clone());
    default(object, "spec", json!({}));
    default(object, "status", old_status.unwrap_or_else(|| json!({"loadBalancer": {}})));
    let spec = &mut object["spec"];
    default(spec, "type", "ClusterIP".into());
    default(spec, "sessionAffinity", "None".into());
    default(spec, "internalTrafficPolicy", "Cluster".into());
    if spec["sessionAffinity"] == "ClientIP"
        && spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].is_null()
    {
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 10800}});
    }
    for port in spec["ports"].as_array_mut().into_iter().flatten() {
        default(port, "protocol", "TCP".into());
        let number = port["port"].clone();
        default(port, "targetPort", number);
    }
    if spec["type"] == "ExternalName" {
        return;
    }
    if spec["type"] != "ClusterIP" {
        default(spec, "externalTrafficPolicy", "Cluster".into());
    }
    // Iterated only when something is allocated: with many services, one iteration for each is too slow.
    let others = || others.iter().filter(|(other, _)| *other != name).map(|(_, other)| &other["spec"]);
    cluster_ips(spec, others);
    node_ports(spec, others);
}

/// Allocates an IPv4 address if there is none, and sets the fields that depend on the addresses.
fn cluster_ips<'a, I: Iterator<Item = &'a Value>>(spec: &mut Value, others: impl Fn() -> I) {
    if spec["clusterIP"].as_str().is_none_or(str::is_empty) {
        let taken: BTreeSet<&str> = others()
            .flat_map(|spec| spec["clusterIPs"].as_array().into_iter().flatten())
            .filter_map(Value::as_str)
            .collect();
        let mut ips = (1..u16::MAX).map(|number| {
            let [high, low] = number.to_be_bytes();
            Ipv4Addr::new(10, 96, high, low).to_string()
        });
        let free = ips.find(|ip| !taken.contains(&**ip)).unwrap_or_default();
        spec["clusterIPs"] = json!([free]);
        spec["clusterIP"] = free.into();
    }
    let first = spec["clusterIP"].clone();
    default(spec, "clusterIPs", json!([first]));
    if spec["clusterIP"] != "None" {
        let ips = spec["clusterIPs"].as_array().cloned().unwrap_or_default();
        let family =
            |ip: &Value| if ip.as_str().is_some_and(|ip| ip.contains(':')) { "IPv6" } else { "IPv4" };
        default(spec, "ipFamilies", ips.iter().map(family).collect());
        let policy = if ips.len() > 1 { "RequireDualStack" } else { "SingleStack" };
        default(spec, "ipFamilyPolicy", policy.into());
    }
}

/// Allocates the node ports that are missing.
fn node_ports<'a, I: Iterator<Item = &'a Value>>(spec: &mut Value, others: impl Fn() -> I) {
    let needs = match spec["type"].as_str() {
        Some("NodePort") => true,
        Some("LoadBalancer") => spec["allocateLoadBalancerNodePorts"] != false,
        _ => false,
    };
    let numbers = |spec: &Value| -> Vec<u64> {
        let ports = spec["ports"].as_array().into_iter().flatten();
        ports.filter_map(|port| port["nodePort"].as_u64()).collect()
    };
    if !needs {
        return;
    }
    let mut taken: BTreeSet<u64> = others().flat_map(numbers).chain(numbers(spec)).collect();
    for port in spec["ports"].as_array_mut().into_iter().flatten() {
        if port["nodePort"].as_u64().unwrap_or_default() == 0 {
            port["nodePort"] = NODE_PORTS.clone().find(|number| taken.insert(*number)).into();
        }
    }
}
