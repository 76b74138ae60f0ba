//! What the agent knows at a moment, as commands hear it.
//!
//! Pure. The commands join it with what the kernel's maps hold, which they read themselves.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use lb_core::{
    desired::{Frontend, FrontendAddress, Settings},
    model::{Cidr, Issue, Node, ObjectKind, Service, ServiceKey, Slice},
};
use serde::{Deserialize, Serialize};

/// Which objects are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// None: only the issues.
    Issues,
    /// Everything.
    All,
    /// The Services that this address may belong to, with their slices.
    At(FrontendAddress),
}

/// Objects and settings as of one moment between two syncs, shared with the agent's store.
///
/// Objects of the same build only: a body that this build cannot read is another version's, and is treated as none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Whether the kernel has followed the source once. Before that the maps may hold what no object here names.
    pub has_synced: bool,
    /// What decides about frontends.
    pub settings: Settings,
    /// Addresses of the node's interfaces.
    pub interfaces: Vec<IpAddr>,
    /// Those that were asked for.
    pub services: Vec<Arc<Service>>,
    /// Their slices.
    pub slices: Vec<Arc<Slice>>,
    /// All nodes, unless only issues were asked for.
    pub nodes: Vec<Arc<Node>>,
    /// The services whose objects changed since the last sync, each with the frontends that it has in the maps.
    pub former: Vec<(ServiceKey, Vec<Frontend>)>,
    /// For one address: the frontends that its calls may find, each with its endpoints in the maps.
    pub tables: Vec<(FrontendAddress, Vec<SocketAddr>)>,
    /// For one address: whether the tables have it as a cluster IP, and whether undefined ports of it are refused there.
    pub cluster_ip: Option<bool>,
    /// For one address: the networks of the tables within which an address that no Service has is unreachable.
    pub networks: Vec<Cidr>,
    /// What is wrong, sorted. For one address: what concerns it.
    pub issues: Vec<Issue>,
    /// Why the last snapshot was not written.
    pub save_problem: Option<String>,
}

impl Known {
    /// Leaves out the issues that do not concern an address: those of other objects whose text does not name it.
    ///
    /// A slice that could not be read names no service. It counts as one of the service whose name its own begins with, as
    /// the names that Kubernetes gives do.
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

/// Whether a text holds an address as a word of its own: `10.0.0.1` is not in `10.0.0.12`.
fn names(text: &str, ip: &str) -> bool {
    let is_part = |character: char| character.is_ascii_hexdigit() || character == '.';
    text.match_indices(ip).any(|(start, _)| {
        let (before, after) = (&text[..start], &text[start + ip.len()..]);
        // Within brackets or behind a colon stands a port, which is no part of the address.
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
