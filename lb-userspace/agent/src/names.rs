//! The node's name server as a part of the agent.

use std::{net::SocketAddr, sync::Arc};

use lb_core::model::ServiceKey;

/// Settings of the name server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `--cluster-domain`, in lower case, without a final dot.
    pub domain: Arc<str>,
    /// `--names-service`
    pub service: ServiceKey,
    /// `--names-upstream`; empty for the endpoints of `service`.
    pub upstreams: Vec<SocketAddr>,
    /// `--names-forward`
    pub forward: Vec<Arc<str>>,
    /// `--names-port`
    pub port: u16,
    /// `--names-bind-address`
    pub bind: Vec<SocketAddr>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            domain: "cluster.local".into(),
            service: ServiceKey::new("kube-system", "kube-dns"),
            upstreams: Vec::new(),
            forward: Vec::new(),
            port: 8053,
            bind: Vec::new(),
        }
    }
}
