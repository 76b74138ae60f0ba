use std::collections::BTreeSet;

use k8s_openapi::api::core::v1 as api;
use lb_common::limits::MAX_ADDRS_PER_NODE;

use super::{IssueCollector, TO_BE_DELETED, ZONE};
use crate::model::{Issue, IssueKind, Node, ObjectRef, address};

/// Ingests a Node.
///
/// Addresses of type `InternalIP` come before those of type `ExternalIP`, each in the order of the object
/// (`pkg/util/node/node.go`). Host names are not resolved. Only the first [`MAX_ADDRS_PER_NODE`] count.
#[must_use]
pub fn node(object: &api::Node) -> (Option<Node>, Vec<Issue>) {
    let metadata = &object.metadata;
    let name = metadata.name.as_deref().unwrap_or_default();
    let mut report = IssueCollector::new(ObjectRef::node(name));
    if !report.is_named() {
        return (None, report.issues);
    }
    // An object may list tens of thousands of addresses: a set finds duplicates, not a linear search.
    let (mut addresses, mut listed_before) = (Vec::new(), BTreeSet::new());
    for wanted in ["InternalIP", "ExternalIP"] {
        let listed =
            object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
        for (index, address) in listed.iter().enumerate().filter(|(_, address)| address.type_ == wanted) {
            let ip = match address::parse_ip(&address.address) {
                Some(ip) if ip.is_unspecified() || ip.is_multicast() => None,
                ip => ip,
            };
            match ip {
                Some(ip) if listed_before.insert(ip) => addresses.push(ip),
                Some(_) => {}
                None => report.add(IssueKind::InvalidAddress {
                    field: format!("status.addresses[{index}].address"),
                    value: address.address.clone(),
                }),
            }
        }
    }
    let n_left_out = addresses.len().saturating_sub(MAX_ADDRS_PER_NODE);
    if n_left_out > 0 {
        addresses.truncate(MAX_ADDRS_PER_NODE);
        report.add(IssueKind::TooManyAddresses { n_left_out, max: MAX_ADDRS_PER_NODE });
    }
    let listed = object.spec.as_ref().map_or(&[][..], |spec| spec.pod_cidrs.as_deref().unwrap_or_default());
    let mut pod_cidrs = Vec::new();
    for (index, text) in listed.iter().enumerate() {
        match address::parse_cidr(text) {
            Some(cidr) if pod_cidrs.len() < MAX_ADDRS_PER_NODE => pod_cidrs.push(cidr),
            Some(_) => {}
            None => report.add(IssueKind::InvalidAddress {
                field: format!("spec.podCIDRs[{index}]"),
                value: text.clone(),
            }),
        }
    }
    let zone = metadata.labels.as_ref().and_then(|labels| labels.get(ZONE)).filter(|zone| !zone.is_empty());
    let taints = object.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let node = Node {
        name: name.into(),
        zone: zone.map(|zone| zone.as_str().into()),
        addresses,
        pod_cidrs,
        being_deleted: metadata.deletion_timestamp.is_some()
            || taints.iter().any(|taint| taint.key == TO_BE_DELETED),
    };
    (Some(node), report.issues)
}
