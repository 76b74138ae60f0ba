//! Defaults of the API server, as far as service proxying needs them.

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};

/// Default namespace of an object, as `kubectl apply` sets it.
pub(super) const NAMESPACE: &str = "default";

/// Fills in cluster IPs and IP families from each other (`pkg/registry/core/service/storage/alloc.go`).
///
/// Assigns no address: a Service without any is reported by ingest.
pub(super) fn fill_service(service: &mut Service) {
    let _ = service.metadata.namespace.get_or_insert_with(|| NAMESPACE.to_owned());
    let Some(spec) = &mut service.spec else {
        return;
    };
    let ips = spec.cluster_ips.get_or_insert_default();
    match &spec.cluster_ip {
        Some(ip) if !ip.is_empty() => {
            if ips.is_empty() {
                ips.push(ip.clone());
            }
        }
        _ => spec.cluster_ip = ips.first().cloned(),
    }
    let families = spec.ip_families.get_or_insert_default();
    if families.is_empty() && spec.cluster_ip.as_deref() != Some("None") {
        // By the text, so that a mistyped address keeps its place and is reported there.
        families.extend(ips.iter().map(|ip| if ip.contains(':') { "IPv6" } else { "IPv4" }.to_owned()));
    }
}

/// Fills in names and protocols of ports (`pkg/apis/discovery/v1/defaults.go`).
pub(super) fn fill_slice(slice: &mut EndpointSlice) {
    let _ = slice.metadata.namespace.get_or_insert_with(|| NAMESPACE.to_owned());
    for port in slice.ports.iter_mut().flatten() {
        let _ = port.name.get_or_insert_default();
        let _ = port.protocol.get_or_insert_with(|| "TCP".to_owned());
    }
}

#[cfg(test)]
mod tests;
