//! The agent's state as commands read it.
//!
//! Pure. Commands join it with the kernel's maps, which they read themselves.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use lb_core::{
    desired::{FrontendAddress, Settings},
    model::{Cidr, Family, Issue, Node, ObjectKind, Service, Slice, address},
    state::View,
    tables::{Entry, Image},
};
use serde::{Deserialize, Serialize};

use super::PacketStatus;

/// Which objects to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Only the issues.
    Issues,
    /// Everything.
    All,
    /// The Services that this address may belong to, with their slices.
    At(FrontendAddress),
}

/// Objects and settings after a sync, shared with the agent's store: they match the maps.
///
/// For the same build only: a command treats a body that it cannot read as no answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Whether there was a sync. Before, the maps may have entries without an object here.
    pub has_synced: bool,
    /// Settings that affect frontends.
    pub settings: Settings,
    /// Addresses of the node's interfaces.
    pub interfaces: Vec<IpAddr>,
    /// The requested services.
    pub services: Vec<Arc<Service>>,
    /// Their slices.
    pub slices: Vec<Arc<Slice>>,
    /// All nodes; empty if only issues are requested.
    pub nodes: Vec<Arc<Node>>,
    /// For one address: the frontends that calls may match, each with its endpoints in the maps.
    pub tables: Vec<(FrontendAddress, Vec<SocketAddr>)>,
    /// For one address: `None` if it is not a cluster IP in the tables, else whether undefined ports of it
    /// are refused.
    pub cluster_ip: Option<bool>,
    /// For one address: the networks in the tables within which an address without a Service is unreachable.
    pub networks: Vec<Cidr>,
    /// The issues, sorted. For one address: those that concern it.
    pub issues: Vec<Issue>,
    /// Why the last snapshot was not written.
    pub save_problem: Option<String>,
    /// The rules for packets; `None` with `--packets=off`. They follow the maps: an answer that has changed
    /// in nothing else says that the kernel has new ones.
    pub packets: Option<PacketStatus>,
}

impl Known {
    /// The requested objects of a view. Fields that it cannot fill, such as the source's issues, are empty.
    ///
    /// Costs one reference per object for [`Which::All`], and reads each Service for [`Which::At`].
    #[must_use]
    pub fn of(view: &View, which: Which) -> Self {
        let (store, image) = (&view.store, &view.image);
        let mut known = Self {
            has_synced: false,
            settings: view.settings.clone(),
            interfaces: view.interfaces.clone(),
            services: Vec::new(),
            slices: Vec::new(),
            nodes: Vec::new(),
            tables: Vec::new(),
            cluster_ip: None,
            networks: Vec::new(),
            issues: Vec::new(),
            save_problem: None,
            packets: None,
        };
        match which {
            Which::Issues => {}
            Which::All => {
                known.services = store.shared_services().cloned().collect();
                known.slices = store.shared_slices().cloned().collect();
                known.nodes = store.shared_nodes().cloned().collect();
            }
            Which::At(to) => {
                let addresses = addresses(image, to);
                for service in store.shared_services().filter(|service| is_named(service, &addresses)) {
                    known.services.push(Arc::clone(service));
                    known.slices.extend(store.shared_slices_of(&service.key).cloned());
                }
                known.nodes = store.shared_nodes().cloned().collect();
                known.cluster_ip = image.cluster_ips.get(&to.ip.to_canonical()).copied();
                known.networks.clone_from(&image.service_cidrs);
                known.tables = addresses.into_iter().filter_map(|address| held(image, address)).collect();
            }
        }
        known
    }

    /// Removes issues that do not concern an address: those of other objects whose text does not name it.
    ///
    /// An unreadable slice names no service. It counts as one of the service whose name is its prefix, as in
    /// the names that Kubernetes generates.
    pub fn keep_issues_at(&mut self, address: FrontendAddress) {
        let (services, slices) = (&self.services, &self.slices);
        let ip = address.ip.to_string();
        self.issues.retain(|issue| {
            let object = &issue.object;
            let is_service_of = |service: &Arc<Service>| {
                let key = &service.key;
                object.namespace == key.namespace
                    && match object.kind {
                        ObjectKind::Service => object.name == key.name,
                        ObjectKind::EndpointSlice => {
                            let rest = object.name.strip_prefix(&*key.name);
                            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
                        }
                        _ => false,
                    }
            };
            let is_slice = |slice: &Arc<Slice>| {
                object.kind == ObjectKind::EndpointSlice
                    && (&object.namespace, &object.name) == (&slice.service.namespace, &slice.name)
            };
            services.iter().any(is_service_of)
                || slices.iter().any(is_slice)
                || names(&issue.kind.to_string(), &ip)
        });
    }
}

/// The keys that a call may match: its own address, and the wildcard of node ports if the address is a
/// node's.
fn addresses(image: &Image, to: FrontendAddress) -> Vec<FrontendAddress> {
    let to = FrontendAddress { ip: to.ip.to_canonical(), ..to };
    let on_nodes = FrontendAddress { ip: address::unspecified(address::family(to.ip)), ..to };
    let is_on_node = to.ip.is_loopback() || image.node_addrs.contains_key(&to.ip);
    if is_on_node { vec![to, on_nodes] } else { vec![to] }
}

/// Whether a service's object names one of these addresses. Its ports do not matter: one may have been left
/// out.
fn is_named(service: &Service, addresses: &[FrontendAddress]) -> bool {
    addresses.iter().any(|address| {
        let ip = address.ip;
        let cluster_ip = service.cluster_ip(if ip.is_ipv6() { Family::V6 } else { Family::V4 });
        cluster_ip == Some(ip)
            || service.external_ips.contains(&ip)
            || service.load_balancer_ips.contains(&ip)
            || (ip.is_unspecified() && service.ports.iter().any(|port| port.node_port == Some(address.port)))
    })
}

/// The frontend in the tables at an address, and its endpoints there.
fn held(image: &Image, address: FrontendAddress) -> Option<(FrontendAddress, Vec<SocketAddr>)> {
    let frontend = image.frontends.get(image.services.get(&address)?)?;
    let entries = image.entries(address.ip.is_ipv6(), frontend.run)?;
    Some((address, entries.iter().map(Entry::address).collect()))
}

/// Whether a text contains an address as a whole word: `10.0.0.1` is not in `10.0.0.12`.
fn names(text: &str, ip: &str) -> bool {
    let is_part = |character: char| character.is_ascii_hexdigit() || character == '.';
    text.match_indices(ip).any(|(start, _)| {
        let (before, after) = (&text[..start], &text[start + ip.len()..]);
        // A port follows brackets or a colon, and is not part of the address.
        !before.ends_with(|c| is_part(c) || c == ':')
            && !after.starts_with(is_part)
            && !after.starts_with("::")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_word_of_its_own() {
        for (text, ip, expected) in [
            ("10.0.0.1:80/tcp belongs to service a/b", "10.0.0.1", true),
            ("spec.clusterIP: 10.0.0.1", "10.0.0.1", true),
            ("10.0.0.12:80/tcp belongs to service a/b", "10.0.0.1", false),
            ("110.0.0.1:80/tcp", "10.0.0.1", false),
            ("[fd00::1]:80/tcp", "fd00::1", true),
            ("[fd00::12]:80/tcp", "fd00::1", false),
            ("[afd00::1]:80/tcp", "fd00::1", false),
            ("", "10.0.0.1", false),
        ] {
            assert_eq!(names(text, ip), expected, "{ip} in {text}");
        }
    }
}
