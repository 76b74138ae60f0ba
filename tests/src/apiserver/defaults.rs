//! Validation, defaults and allocation.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::store::{Kind, Name, Objects, Refusal};
use crate::cluster;

const NODE_PORTS: std::ops::RangeInclusive<u64> = 30000..=32767;

/// Validates an object and sets the defaults. `others` are all of its kind, including the object with the same
/// name, if there is one. Returns namespace and name; the namespace of a Node is empty.
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
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    let name = (namespace.to_owned(), name.to_owned());
    let is_readable = match kind {
        Kind::Pod => serde_json::from_value::<Pod>(object.clone()).map(drop).map_err(Into::into),
        _ => cluster::object(object).map(drop),
    };
    is_readable.map_err(|error: anyhow::Error| Refusal::new(400, "BadRequest", format!("{error:#}")))?;
    match kind {
        Kind::Service => service(object, &name, others)?,
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

fn service(object: &mut Value, name: &Name, others: &Objects) -> Result<(), Refusal> {
    let old = others.get(name).map(|old| &**old);
    default(object, "spec", json!({}));
    default(object, "status", old.map_or_else(|| json!({"loadBalancer": {}}), |old| old["status"].clone()));
    // Iterated only when something is allocated: with many services, one iteration for each is too slow.
    let others = || others.iter().filter(|(other, _)| *other != name).map(|(_, other)| other);
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
        return Ok(());
    }
    if spec["type"] != "ClusterIP" {
        default(spec, "externalTrafficPolicy", "Cluster".into());
    }
    cluster_ips(spec, old.map(|old| &old["spec"]), &others);
    node_ports(spec, old.map(|old| &old["spec"]), &others)
}

fn cluster_ips<'a, I>(spec: &mut Value, old: Option<&Value>, others: &impl Fn() -> I)
where
    I: Iterator<Item = &'a Arc<Value>>,
{
    let is_empty = |value: &Value| value.as_str().is_none_or(str::is_empty);
    if is_empty(&spec["clusterIP"]) {
        let given = spec["clusterIPs"][0].clone();
        if !is_empty(&given) {
            spec["clusterIP"] = given;
        } else if let Some(old) = old.filter(|old| !is_empty(&old["clusterIP"])) {
            // An update may omit what was allocated.
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                default(spec, field, old[field].clone());
            }
            spec["clusterIP"] = old["clusterIP"].clone();
        }
    }
    if is_empty(&spec["clusterIP"]) {
        let taken: BTreeSet<String> = others()
            .flat_map(|other| other["spec"]["clusterIPs"].as_array().into_iter().flatten())
            .filter_map(|ip| ip.as_str().map(str::to_owned))
            .collect();
        let is_dual = spec["ipFamilyPolicy"].as_str().is_some_and(|policy| policy.ends_with("DualStack"));
        default(spec, "ipFamilies", if is_dual { json!(["IPv4", "IPv6"]) } else { json!(["IPv4"]) });
        let families = spec["ipFamilies"].as_array().cloned().unwrap_or_default();
        let ips: Vec<Value> = families
            .iter()
            .map(|family| {
                let is_ipv6 = family == "IPv6";
                let free =
                    (1..u16::MAX).map(|number| cluster_ip(is_ipv6, number)).find(|ip| !taken.contains(ip));
                free.unwrap_or_default().into()
            })
            .collect();
        spec["clusterIP"] = ips.first().cloned().unwrap_or_default();
        spec["clusterIPs"] = ips.into();
    }
    let first = spec["clusterIP"].clone();
    default(spec, "clusterIPs", json!([first]));
    if spec["clusterIP"] != "None" {
        let ips = spec["clusterIPs"].as_array().cloned().unwrap_or_default();
        let family =
            |ip: &Value| if ip.as_str().is_some_and(|ip| ip.contains(':')) { "IPv6" } else { "IPv4" };
        default(spec, "ipFamilies", ips.iter().map(family).collect());
        default(
            spec,
            "ipFamilyPolicy",
            if ips.len() > 1 { "RequireDualStack" } else { "SingleStack" }.into(),
        );
    }
}

fn cluster_ip(is_ipv6: bool, number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    if is_ipv6 {
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number).to_string()
    } else {
        Ipv4Addr::new(10, 96, high, low).to_string()
    }
}

fn node_ports<'a, I>(spec: &mut Value, old: Option<&Value>, others: &impl Fn() -> I) -> Result<(), Refusal>
where
    I: Iterator<Item = &'a Arc<Value>>,
{
    let needs = match spec["type"].as_str() {
        Some("NodePort") => true,
        Some("LoadBalancer") => spec["allocateLoadBalancerNodePorts"] != false,
        _ => false,
    };
    let key = |port: &Value| (port["protocol"].clone(), port["nodePort"].as_u64().unwrap_or_default());
    let ports_of = |spec: &Value| spec["ports"].as_array().cloned().unwrap_or_default();
    if !needs && ports_of(spec).iter().all(|port| key(port).1 == 0) {
        return Ok(());
    }
    let mut taken: Vec<(Value, u64)> =
        others().flat_map(|other| ports_of(&other["spec"])).map(|port| key(&port)).collect();
    let old = old.map(ports_of).unwrap_or_default();
    let Some(ports) = spec["ports"].as_array_mut() else { return Ok(()) };
    for port in ports.iter().filter(|port| port["nodePort"].as_u64().unwrap_or_default() != 0) {
        if taken.contains(&key(port)) {
            let message = format!(
                "spec.ports.nodePort: Invalid value: {}: provided port is already allocated",
                port["nodePort"]
            );
            return Err(Refusal::new(422, "Invalid", message));
        }
    }
    taken.extend(ports.iter().map(key));
    for port in ports.iter_mut().filter(|port| needs && port["nodePort"].as_u64().unwrap_or_default() == 0) {
        let same = |other: &&Value| other["protocol"] == port["protocol"] && other["port"] == port["port"];
        let kept =
            old.iter().find(same).and_then(|old| old["nodePort"].as_u64()).filter(|number| *number != 0);
        let free = || NODE_PORTS.clone().find(|number| !taken.contains(&(port["protocol"].clone(), *number)));
        if let Some(number) = kept.or_else(free) {
            port["nodePort"] = number.into();
            taken.push(key(port));
        }
    }
    Ok(())
}
