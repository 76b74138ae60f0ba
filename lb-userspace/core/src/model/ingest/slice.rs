use std::sync::Arc;

use k8s_openapi::{api::discovery::v1 as api, jiff::Timestamp};

use super::{IssueCollector, SERVICE_NAME, StringPool, TRIGGER_TIME, is_label, namespace};
use crate::model::{
    EndpointHints, Family, Issue, IssueKind, ObjectRef, Placement, ServiceKey, Slice, SliceEndpoint,
    SlicePort, address,
    annotation::{self, CILIUM_WEIGHT, DEFAULT_WEIGHT, WEIGHT},
};

/// Ingests an EndpointSlice (`pkg/proxy/endpointslicecache.go`).
///
/// `None` without an issue for a slice that names no Service or whose address type is FQDN. Ignores the
/// labels of [`super::is_selected`].
#[must_use]
pub fn slice(object: &api::EndpointSlice) -> (Option<Slice>, Vec<Issue>) {
    let metadata = &object.metadata;
    let namespace = namespace(metadata.namespace.as_deref());
    let name = metadata.name.as_deref().unwrap_or_default();
    let mut report = IssueCollector::new(ObjectRef::slice(namespace, name));
    if !report.is_named() {
        return (None, report.issues);
    }
    let service = metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
    let Some(service) = service.filter(|service| !service.is_empty()) else {
        return (None, report.issues);
    };
    let family = match &*object.address_type {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => return (None, report.issues),
        other => {
            report.add(IssueKind::UnknownValue {
                field: "addressType".to_owned(),
                value: other.to_owned(),
                used: "FQDN, which is not served".to_owned(),
            });
            return (None, report.issues);
        }
    };
    let mut texts = StringPool::default();
    let annotation = |key: &str| metadata.annotations.as_ref().and_then(|annotations| annotations.get(key));
    let weight = weight(&mut report, annotation);
    let slice = Slice {
        name: name.into(),
        service: ServiceKey::new(namespace, service),
        ipv6: family == Family::V6,
        ports: ports(&mut report, &mut texts, object.ports.as_deref().unwrap_or_default()),
        endpoints: endpoints(&mut report, &mut texts, family, weight, &object.endpoints),
        trigger_time: annotation(TRIGGER_TIME)
            .and_then(|time| time.parse::<Timestamp>().ok())
            .and_then(|time| i64::try_from(time.as_nanosecond()).ok()),
    };
    (Some(slice), report.issues)
}

/// The weight of all endpoints. An invalid annotation counts as absent.
fn weight<'a>(report: &mut IssueCollector, annotation: impl Fn(&str) -> Option<&'a String>) -> u16 {
    let mut read = |key: &str| {
        let value = annotation(key)?;
        let weight = annotation::weight(value);
        if weight.is_none() {
            report.add(IssueKind::UnknownValue {
                field: format!("metadata.annotations[{key}]"),
                value: value.clone(),
                used: "absent (expected 0-65535)".to_owned(),
            });
        }
        weight
    };
    read(WEIGHT).or_else(|| read(CILIUM_WEIGHT)).unwrap_or(DEFAULT_WEIGHT)
}

fn ports(report: &mut IssueCollector, texts: &mut StringPool, ports: &[api::EndpointPort]) -> Vec<SlicePort> {
    let mut good = Vec::with_capacity(ports.len());
    for (index, port) in ports.iter().enumerate() {
        let Some(name) = &port.name else {
            report.add(IssueKind::NoPortName { field: format!("ports[{index}].name") });
            continue;
        };
        let number = match port.port {
            None | Some(0) => {
                report.add(IssueKind::NoPortNumber { field: format!("ports[{index}].port") });
                None
            }
            Some(number) => report.port(|| format!("ports[{index}].port"), number),
        };
        let protocol = report.protocol(|| format!("ports[{index}].protocol"), port.protocol.as_deref());
        if let (Some(number), Some(protocol)) = (number, protocol) {
            good.push(SlicePort { name: texts.share(name), protocol, port: number });
        }
    }
    good
}

fn endpoints(
    report: &mut IssueCollector,
    texts: &mut StringPool,
    family: Family,
    weight: u16,
    endpoints: &[api::Endpoint],
) -> Vec<SliceEndpoint> {
    let mut good = Vec::with_capacity(endpoints.len());
    for (index, endpoint) in endpoints.iter().enumerate() {
        // All addresses of an endpoint reach the same backend; kube-proxy uses only the first.
        let Some(text) = endpoint.addresses.first() else {
            report.add(IssueKind::NoAddress { field: format!("endpoints[{index}].addresses") });
            continue;
        };
        let field = || format!("endpoints[{index}].addresses[0]");
        let Some(address) = address::parse_ip(text) else {
            report.add(IssueKind::InvalidAddress { field: field(), value: text.clone() });
            continue;
        };
        if address::family(address) != family {
            let expected = address::family_name(family).to_owned();
            report.add(IssueKind::WrongFamily { field: field(), value: text.clone(), expected });
            continue;
        }
        // The API server also refuses loopback and link-local endpoints, but a host that is served from
        // manifests may use them.
        if address.is_unspecified() || address.is_multicast() {
            let range = address::special_range(address).unwrap_or_default().to_owned();
            report.add(IssueKind::SpecialAddress { field: field(), value: text.clone(), range });
            continue;
        }
        let conditions = endpoint.conditions.as_ref();
        let hints = endpoint.hints.as_ref();
        let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
        let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
        good.push(SliceEndpoint {
            address,
            ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
            serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
            terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
            placement: Arc::new(Placement {
                node: texts.share_set(endpoint.node_name.as_deref()),
                zone: texts.share_set(endpoint.zone.as_deref()),
            }),
            hints: (!zones.is_empty() || !nodes.is_empty()).then(|| {
                Box::new(EndpointHints {
                    zones: zones.iter().map(|zone| texts.share(&zone.name)).collect(),
                    nodes: nodes.iter().map(|node| texts.share(&node.name)).collect(),
                })
            }),
            hostname: endpoint.hostname.as_deref().filter(|name| is_label(name)).map(Into::into),
            weight,
        });
    }
    // Otherwise each slice keeps the spare capacity of the growing list.
    good.shrink_to_fit();
    good
}
