//! The agent's state as commands read it.
//!
//! Pure. Commands join it with the kernel's maps, which they read themselves.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use lb_core::{
    desired::{Frontend, FrontendAddress, Settings},
    model::{Cidr, Issue, Node, ObjectKind, Service, ServiceKey, Slice},
};
use serde::{Deserialize, Serialize};

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

/// Objects and settings at one time between two syncs, shared with the agent's store.
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
    /// The services whose objects changed since the last sync, each with its frontends in the maps.
    pub former: Vec<(ServiceKey, Vec<Frontend>)>,
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
}

impl Known {
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
