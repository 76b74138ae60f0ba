//! Where questions go that the node does not answer.

use std::{collections::BTreeSet, net::SocketAddr};

use crate::model::{Protocol, ServiceKey, Store};

/// The port of the DNS Service that clients ask, and its usual target port.
const DOMAIN: u16 = 53;

/// The endpoints of the cluster's DNS Service for its UDP port 53: those that serve, ready ones first; each
/// part sorted. Those in `own` are left out: the node's own server, which must not ask itself.
///
/// Empty without the Service or without endpoints that serve. The Service may be headless: then port 53 of
/// its endpoints counts.
#[must_use]
pub fn endpoints(store: &Store, service: &ServiceKey, own: &[SocketAddr]) -> Vec<SocketAddr> {
    let is_domain = |protocol, port| protocol == Protocol::Udp && port == DOMAIN;
    let ports = store.service(service).map(|service| service.ports.as_slice()).unwrap_or_default();
    let name = ports.iter().find(|port| is_domain(port.protocol, port.port)).map(|port| &port.name);
    let (mut ready, mut others) = (BTreeSet::new(), BTreeSet::new());
    for slice in store.slices_of(service) {
        let port = slice.ports.iter().find(|port| match name {
            Some(name) => port.protocol == Protocol::Udp && port.name == *name,
            None => is_domain(port.protocol, port.port),
        });
        let Some(port) = port else { continue };
        for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.serving) {
            let address = SocketAddr::new(endpoint.address, port.port);
            if own.contains(&address) {
                continue;
            }
            if endpoint.ready {
                ready.insert(address)
            } else {
                others.insert(address)
            };
        }
    }
    let others: Vec<SocketAddr> = others.difference(&ready).copied().collect();
    ready.into_iter().chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ingest;

    fn store(service_port: Option<&str>) -> Store {
        let mut store = Store::new();
        let key = ServiceKey::new("kube-system", "kube-dns");
        if let Some(name) = service_port {
            let object = serde_json::json!({
                "metadata": {"namespace": "kube-system", "name": "kube-dns"},
                "spec": {"clusterIP": "10.96.0.10", "ports": [
                    {"name": name, "protocol": "UDP", "port": 53},
                    {"name": "metrics", "protocol": "TCP", "port": 9153},
                ]},
            });
            let (service, issues) = ingest::service(&serde_json::from_value(object).unwrap());
            assert!(issues.is_empty());
            let _changes = store.set_service(&key, service);
        }
        for (name, port, endpoints) in [
            ("a", 5353, vec![("10.1.0.3", true, true), ("10.1.0.2", true, true)]),
            (
                "b",
                5353,
                vec![("10.1.0.1", false, true), ("10.1.0.4", false, false), ("10.1.0.2", false, true)],
            ),
        ] {
            let endpoints: Vec<_> = endpoints
                .into_iter()
                .map(|(address, ready, serving)| {
                    serde_json::json!({
                        "addresses": [address], "conditions": {"ready": ready, "serving": serving},
                    })
                })
                .collect();
            let object = serde_json::json!({
                "metadata": {"namespace": "kube-system", "name": name,
                    "labels": {"kubernetes.io/service-name": "kube-dns"}},
                "addressType": "IPv4",
                "ports": [{"name": "dns", "protocol": "UDP", "port": port}],
                "endpoints": endpoints,
            });
            let (slice, issues) = ingest::slice(&serde_json::from_value(object).unwrap());
            assert!(issues.is_empty());
            let slice = slice.unwrap();
            let _changes = store.set_slice(&slice.key(), Some(slice));
        }
        store
    }

    #[test]
    fn ready_endpoints_of_port_53_come_first_and_own_ones_are_left_out() {
        let key = ServiceKey::new("kube-system", "kube-dns");
        for (service_port, own, expected) in [
            (Some("dns"), vec![], vec!["10.1.0.2:5353", "10.1.0.3:5353", "10.1.0.1:5353"]),
            (Some("dns"), vec!["10.1.0.3:5353", "10.1.0.2:53"], vec!["10.1.0.2:5353", "10.1.0.1:5353"]),
            (Some("other"), vec![], vec![]),
            // Without the Service, the port of the slices counts, which is not 53.
            (None, vec![], vec![]),
        ] {
            let own: Vec<SocketAddr> = own.iter().map(|own: &&str| own.parse().unwrap()).collect();
            let found = endpoints(&store(service_port), &key, &own);
            let shown: Vec<String> = found.iter().map(ToString::to_string).collect();
            assert_eq!(shown, expected, "{service_port:?} {own:?}");
        }
    }
}
