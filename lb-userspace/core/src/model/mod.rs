//! The checked model of the cluster: Services, EndpointSlices, Nodes and ServiceCIDRs.
//!
//! # Purpose
//!
//! [`ingest`] turns Kubernetes objects into the types here, applies defaults and reports each invalid part as
//! an [`Issue`]. [`Store`] holds them. Nothing downstream uses a Kubernetes type.
//!
//! # Invariants
//!
//! - Values of these types are well formed: ports are not 0, addresses are of the stated family, names are
//!   set.
//! - A partly invalid object yields its valid parts and issues, never an error (semantics R14).
//! - Equal objects give equal values.
//!
//! "semantics R1" and so on name the rules in docs/SEMANTICS.md.
//!
//! # Depends on
//!
//! `lb_common` and, in [`ingest`] only, `k8s_openapi`.

pub mod address;
pub mod annotation;
#[cfg(test)]
pub(crate) mod fixture;
pub mod ingest;
pub mod issue;
pub mod notification;
pub mod store;

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

pub use self::{
    annotation::{Balance, StaleConnections},
    issue::{Issue, IssueKind, ObjectKind, ObjectRef},
    store::{Changes, Store},
};
pub use lb_common::Family;

/// Namespace and name of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceKey {
    /// `metadata.namespace`
    pub namespace: Arc<str>,
    /// `metadata.name`
    pub name: Arc<str>,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl ServiceKey {
    /// Builds a key.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// Namespace and name of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SliceKey {
    /// `metadata.namespace`
    pub namespace: Arc<str>,
    /// `metadata.name`
    pub name: Arc<str>,
}

impl SliceKey {
    /// Builds a key.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// Protocol of a Service port, as the API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Served.
    Tcp,
    /// Served.
    Udp,
    /// Served as packets only: socket hooks cannot (semantics R3).
    Sctp,
}

impl Protocol {
    /// Its number in an IP header.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// `spec.type` of a Service that has addresses; for `ExternalName` see [`NamesOnly`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ServiceType {
    /// The default.
    #[default]
    ClusterIP,
    /// With node ports.
    NodePort,
    /// With node ports (unless disabled) and addresses in the status.
    LoadBalancer,
}

impl fmt::Display for ServiceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
        })
    }
}

/// `internalTrafficPolicy` or `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// All endpoints of the cluster.
    #[default]
    Cluster,
    /// Endpoints on the node that receives the call.
    Local,
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// `name`, empty for a single unnamed port.
    pub name: Arc<str>,
    /// `protocol`
    pub protocol: Protocol,
    /// `port`, not 0
    pub port: u16,
    /// `nodePort`, not 0
    pub node_port: Option<u16>,
}

/// An IP network, `address/prefix_len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cidr {
    /// Network address, host bits zero.
    pub address: IpAddr,
    /// Length of the prefix, bits.
    pub prefix_len: u8,
}

/// A Service that may have frontends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace and name.
    pub key: ServiceKey,
    /// `metadata.creationTimestamp`, seconds since 1970; `None` sorts last. Older services win conflicts.
    pub created: Option<i64>,
    /// `spec.type`
    pub service_type: ServiceType,
    /// The IPv4 cluster IP, by the rule of semantics R2.
    pub cluster_ipv4: Option<Ipv4Addr>,
    /// The IPv6 one.
    pub cluster_ipv6: Option<Ipv6Addr>,
    /// `spec.externalIPs`, valid ones.
    pub external_ips: BTreeSet<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` with `ipMode` VIP or none.
    pub load_balancer_ips: BTreeSet<IpAddr>,
    /// `spec.loadBalancerSourceRanges`, valid ones.
    pub source_ranges: BTreeSet<Cidr>,
    /// Whether a range is invalid. It may have been meant for either family, so a family without a valid
    /// range then admits no client instead of all.
    pub has_unreadable_source_range: bool,
    /// `spec.internalTrafficPolicy`
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`, where it applies (semantics R6).
    pub external_policy: TrafficPolicy,
    /// Idle time-out of `sessionAffinity: ClientIP` in seconds; `None` without affinity.
    pub affinity_seconds: Option<u32>,
    /// `spec.healthCheckNodePort`, only for type LoadBalancer with the external policy Local.
    pub health_check_node_port: Option<u16>,
    /// `spec.ports`, well-formed ones in the order of the object.
    pub ports: Vec<ServicePort>,
    /// Annotations whose key starts with `socklb.io/`.
    pub annotations: Vec<(String, String)>,
    /// The label that excludes the Service from this agent. Then only its key and cluster IPs are known, and
    /// calls to them pass unchanged. Snapshots of older agents lack this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unselected: Option<Unselected>,
    /// Set for a Service without cluster IPs, of which only this, the key and `ports` are known. It has names
    /// and no frontends. Snapshots of older agents lack this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names_only: Option<NamesOnly>,
}

/// What a Service without cluster IPs is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamesOnly {
    /// `clusterIP: None`: its name has the addresses of its endpoints.
    Headless {
        /// `publishNotReadyAddresses`: of all endpoints, not of the ready ones alone.
        publishes_not_ready: bool,
    },
    /// Type `ExternalName`: its name is an alias of this one, in lower case, without the final dot.
    External(Arc<str>),
}

/// What keeps a Service from being served by this agent (semantics R1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unselected {
    /// It has this label, `KEY=VALUE`.
    Labelled(Arc<str>),
    /// It lacks this label, which `--service-proxy-name` requires.
    NotLabelled(Arc<str>),
}

impl fmt::Display for Unselected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Labelled(label) => write!(f, "is labelled {label}"),
            Self::NotLabelled(label) => write!(f, "is not labelled {label}"),
        }
    }
}

/// A ServiceCIDR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceCidr {
    /// `metadata.name`
    pub name: Arc<str>,
    /// `spec.cidrs`: networks that cluster IPs come from, well-formed ones.
    pub cidrs: Vec<Cidr>,
}

/// One port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlicePort {
    /// `name`, empty for an unnamed port.
    pub name: Arc<str>,
    /// `protocol`
    pub protocol: Protocol,
    /// `port`, not 0
    pub port: u16,
}

/// One endpoint of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceEndpoint {
    /// `addresses[0]`, of the slice's family.
    pub address: IpAddr,
    /// `conditions.ready`; absent = true.
    pub ready: bool,
    /// `conditions.serving`; absent = true (kube-proxy's reading, semantics R5).
    pub serving: bool,
    /// `conditions.terminating`; absent = false.
    pub terminating: bool,
    /// `nodeName` and `zone`; endpoints of one node share it.
    #[serde(flatten)]
    pub placement: Arc<Placement>,
    /// `hints`; `None` if there is none of either kind, as in most clusters.
    pub hints: Option<Box<EndpointHints>>,
    /// `hostname`, the label of its own name below that of a Service. Snapshots of older agents lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    /// How often chance draws it, compared with the others of a set; 0 = never. The API has weights of slices
    /// only. Snapshots leave the default out.
    #[serde(default = "default_weight", skip_serializing_if = "is_default_weight")]
    pub weight: u16,
}

const fn default_weight() -> u16 {
    annotation::DEFAULT_WEIGHT
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
const fn is_default_weight(weight: &u16) -> bool {
    *weight == annotation::DEFAULT_WEIGHT
}

/// Where an endpoint runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Placement {
    /// `nodeName`
    pub node: Option<Arc<str>>,
    /// `zone`
    pub zone: Option<Arc<str>>,
}

/// Zones and nodes that an endpoint is meant for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointHints {
    /// `forZones[].name`
    pub zones: Box<[Arc<str>]>,
    /// `forNodes[].name`
    pub nodes: Box<[Arc<str>]>,
}

impl SliceEndpoint {
    /// Whether it takes new calls before any that terminates: it is ready, and its weight is not 0.
    #[must_use]
    pub const fn takes_calls(&self) -> bool {
        self.ready && self.weight > 0
    }

    /// `nodeName`
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.placement.node.as_deref()
    }

    /// `zone`
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.placement.zone.as_deref()
    }

    /// The zones of the hints.
    #[must_use]
    pub fn hint_zones(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |hints| &hints.zones)
    }

    /// The nodes of the hints.
    #[must_use]
    pub fn hint_nodes(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |hints| &hints.nodes)
    }
}

/// An EndpointSlice of address type IPv4 or IPv6 that belongs to a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// `metadata.name`; the namespace is the service's.
    pub name: Arc<str>,
    /// Label `kubernetes.io/service-name` in the slice's namespace.
    pub service: ServiceKey,
    /// `addressType`: `true` for IPv6. (`Family` does not implement serde.)
    pub ipv6: bool,
    /// Well-formed ports.
    pub ports: Vec<SlicePort>,
    /// Well-formed endpoints in the order of the object.
    pub endpoints: Vec<SliceEndpoint>,
    /// Annotation `endpoints.kubernetes.io/last-change-trigger-time`, nanoseconds since 1970.
    pub trigger_time: Option<i64>,
}

impl Slice {
    /// Namespace and name of the slice itself.
    #[must_use]
    pub fn key(&self) -> SliceKey {
        SliceKey { namespace: self.service.namespace.clone(), name: self.name.clone() }
    }

    /// The family of its endpoints.
    #[must_use]
    pub const fn family(&self) -> Family {
        if self.ipv6 { Family::V6 } else { Family::V4 }
    }
}

impl Service {
    /// A Service of type `ClusterIP` with these ports, without addresses, and with the API server's defaults.
    #[must_use]
    pub const fn with_ports(key: ServiceKey, ports: Vec<ServicePort>) -> Self {
        Self {
            key,
            created: None,
            service_type: ServiceType::ClusterIP,
            cluster_ipv4: None,
            cluster_ipv6: None,
            external_ips: BTreeSet::new(),
            load_balancer_ips: BTreeSet::new(),
            source_ranges: BTreeSet::new(),
            has_unreadable_source_range: false,
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity_seconds: None,
            health_check_node_port: None,
            ports,
            annotations: Vec::new(),
            unselected: None,
            names_only: None,
        }
    }

    /// Whether this agent serves its addresses: it may have some, and neither a label nor its annotation
    /// excludes it.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.unselected.is_none() && self.names_only.is_none() && !self.is_excluded()
    }

    /// The cluster IP of a family.
    #[must_use]
    pub fn cluster_ip(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.cluster_ipv4.map(IpAddr::V4),
            Family::V6 => self.cluster_ipv6.map(IpAddr::V6),
        }
    }

    /// The port of a name and protocol; at most one exists. Linear in the number of ports.
    #[must_use]
    pub fn port(&self, name: &str, protocol: Protocol) -> Option<&ServicePort> {
        self.ports.iter().find(|port| &*port.name == name && port.protocol == protocol)
    }
}

/// A Pod whose calls pass unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.namespace`
    pub namespace: Arc<str>,
    /// `metadata.name`
    pub name: Arc<str>,
    /// `metadata.uid`, which its cgroup is named after.
    pub uid: Arc<str>,
}

/// A Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `metadata.name`
    pub name: Arc<str>,
    /// Label `topology.kubernetes.io/zone`
    pub zone: Option<Arc<str>>,
    /// `status.addresses` of type `InternalIP`, then those of type `ExternalIP`.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`: networks of its pods' addresses; well-formed ones. Snapshots of older agents lack it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<Cidr>,
    /// It has a deletion timestamp or the taint `ToBeDeletedByClusterAutoscaler`: `/healthz` then fails, so
    /// that load balancers avoid the node (`pkg/proxy/healthcheck/proxier_health.go`).
    pub being_deleted: bool,
}
