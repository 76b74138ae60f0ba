//! The answer of a service's health-check node port (KEP-1669, `pkg/proxy/healthcheck/service_health.go`).

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Family, Service, Slice};

/// The answer of a health-check node port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port.
    pub port: u16,
    /// For each family of the service, see [`ready_local_endpoints`].
    pub n_ready_local: BTreeMap<Family, usize>,
}

/// The health check of a service; `None` without a health-check node port.
#[must_use]
pub fn check<'a>(
    service: &Service,
    slices: &(impl IntoIterator<Item = &'a Slice> + Clone),
    node_name: &str,
) -> Option<HealthCheck> {
    let port = service.health_check_node_port?;
    let families =
        [Family::V4, Family::V6].into_iter().filter(|family| service.cluster_ip(*family).is_some());
    let count = |family| (family, ready_local_endpoints(service, slices.clone(), node_name, family));
    Some(HealthCheck { port, n_ready_local: families.map(count).collect() })
}

/// The number that load balancers read at an address of a family: distinct addresses of ready endpoints of
/// that family on this node, over all ports.
///
/// An endpoint that serves while terminating does not count, although calls may reach it: load balancers must
/// stop before it is gone.
#[must_use]
pub fn ready_local_endpoints<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a Slice>,
    node_name: &str,
    family: Family,
) -> usize {
    // A set, because an object may list tens of thousands of ports.
    let ports: BTreeSet<_> = service.ports.iter().map(|port| (&*port.name, port.protocol)).collect();
    let mut addresses = BTreeSet::new();
    for slice in slices {
        let has_port = slice.ports.iter().any(|port| ports.contains(&(&*port.name, port.protocol)));
        if !has_port || slice.family() != family {
            continue;
        }
        let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
        addresses.extend(
            ready.filter(|endpoint| endpoint.node() == Some(node_name)).map(|endpoint| endpoint.address),
        );
    }
    addresses.len()
}

#[cfg(test)]
mod tests;
