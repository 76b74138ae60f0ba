//! The desired state: the rules of a service proxy, as plain functions.
//!
//! # Purpose
//!
//! [`service::frontends`] computes the frontends of one service from its objects and the [`topology`].
//! [`Desired`] keeps those of all services, decides who owns an address that several claim, and returns the
//! addresses that a change affects.
//!
//! # Invariants
//!
//! - The result depends only on the objects, not on the order of events, the splitting of slices or restarts.
//! - A frontend address has at most one owner, chosen by a fixed order (semantics R14).
//!
//! # Depends on
//!
//! `model`.

pub mod claims;
pub mod cluster_ips;
pub mod endpoints;
#[cfg(test)]
pub(crate) mod fixture;
pub mod health;
pub mod service;
pub mod slow_start;
pub mod topology;

use std::{fmt, net::IpAddr, net::SocketAddr, ops::RangeInclusive, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

pub use self::{claims::Desired, cluster_ips::ClusterIps, topology::Topology};
use crate::model::{Balance, Cidr, Protocol, ServiceKey, TrafficPolicy};

/// The address that a program calls. A node port has the unspecified address of its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FrontendAddress {
    /// Service address.
    pub ip: IpAddr,
    /// Service port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        };
        write!(f, "{}/{protocol}", SocketAddr::new(self.ip, self.port))
    }
}

impl FromStr for FrontendAddress {
    type Err = String;

    /// Parses `ADDRESS:PORT`, optionally followed by `/tcp` (the default), `/udp` or `/sctp`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (address, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((address, "tcp")) => (address, Protocol::Tcp),
            Some((address, "udp")) => (address, Protocol::Udp),
            Some((address, "sctp")) => (address, Protocol::Sctp),
            Some((_, other)) => return Err(format!("{other:?}: expected tcp, udp or sctp")),
        };
        let address: SocketAddr = address
            .parse()
            .map_err(|_hint| "expected ADDRESS:PORT, such as 10.96.0.1:443 or [fd00::1]:53/udp".to_owned())?;
        Ok(Self { ip: address.ip(), port: address.port(), protocol })
    }
}

/// Identity of a service port in one family (semantics R2): the scope of ids, counters and affinity.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortKey {
    /// The service.
    pub service: ServiceKey,
    /// `ports[].name`
    pub port_name: Arc<str>,
    /// `ports[].protocol`
    pub protocol: Protocol,
    /// Whether it is the IPv6 family.
    pub ipv6: bool,
}

/// The field that an address comes from. The lesser kind wins an address that two claim (semantics R14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FrontendKind {
    /// `spec.clusterIPs`
    ClusterIP,
    /// `status.loadBalancer.ingress`
    LoadBalancer,
    /// `spec.externalIPs`
    ExternalIP,
    /// `spec.ports[].nodePort`
    NodePort,
}

/// One frontend of one service port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frontend {
    /// The address that it answers on.
    pub address: FrontendAddress,
    /// The field it comes from.
    pub kind: FrontendKind,
    /// The traffic policy that applies to this kind of frontend.
    pub policy: TrafficPolicy,
    /// Bits of [`lb_common::layout::frontend_flags`].
    pub flags: u32,
    /// Idle time-out of the affinity in seconds; 0 = none.
    pub affinity_seconds: u32,
    /// When endpoints are ejected because connections fail ([`lb_common::health::Policy::to_word`]); 0 =
    /// never, as for every protocol but TCP.
    pub health: u32,
    /// Creation time of the service, seconds since 1970: the older service wins an address that two claim.
    pub created: Option<i64>,
    /// The service port.
    pub port: Arc<PortKey>,
    /// The endpoints that a call may reach: sorted, without duplicates, of the address's family. Frontends of
    /// one port with equal endpoints share the allocation.
    pub endpoints: Arc<[SocketAddr]>,
    /// How a call chooses among them; [`Balance::Random`] for every protocol but TCP.
    #[serde(default)]
    pub balance: Balance,
    /// How often chance draws each of `endpoints`, in the same order: 1 to 255, and the largest is 255.
    /// `None` if all are equal.
    #[serde(default)]
    pub shares: Option<Arc<[u8]>>,
    /// The endpoints that calls fall back to while all of `endpoints` are ejected: those that
    /// topology hints leave out. Sorted, without duplicates, shared as `endpoints` are.
    /// Empty if hints left none out, with the policy Local, and if `health` is 0.
    #[serde(default)]
    pub spill: Arc<[SocketAddr]>,
    /// What packets get that reach no hook; `None` if they are not served.
    #[serde(default)]
    pub packets: Option<Arc<PacketSide>>,
}

impl Frontend {
    /// Whether the hooks serve it: no SCTP, and no source ranges, which hooks cannot check.
    #[must_use]
    pub fn is_for_sockets(&self) -> bool {
        self.packets.as_ref().is_none_or(|packets| packets.sources.is_none())
            && self.address.protocol != Protocol::Sctp
    }
}

/// What packets get at a frontend, where it differs from what sockets get.
///
/// A packet's sender may be outside of the cluster: the external policy Local limits it to this node's
/// endpoints, and source ranges apply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketSide {
    /// The endpoints for senders outside, if they differ from [`Frontend::endpoints`], which those on this
    /// node reach: this node's, with the external policy Local.
    pub outside: Option<Arc<[SocketAddr]>>,
    /// Those of the frontend's endpoints that are on this node, and so may call themselves.
    pub local: Arc<[SocketAddr]>,
    /// The networks whose addresses may call, if `loadBalancerSourceRanges` limit them. Sorted.
    pub sources: Option<Arc<[Cidr]>>,
}

/// `--nodeport-addresses`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodePortAddresses {
    /// Every address of the node.
    #[default]
    All,
    /// The node's primary address of each family, from its Node object.
    Primary,
    /// Addresses inside these networks; a family without a network falls back to all.
    Within(Vec<Cidr>),
    /// Only what a list with words names (KEP-6032).
    Listed {
        /// Whether it names the primary addresses.
        primary: bool,
        /// The networks that it names.
        networks: Vec<Cidr>,
    },
}

/// `--external-ips`: which addresses in `spec.externalIPs` answer.
///
/// The author of a Service may name any address there, such as an external server's, and receive this node's
/// calls to it (CVE-2020-8554). Use this setting if no admission plugin refuses that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExternalIps {
    /// All, as with kube-proxy.
    #[default]
    Any,
    /// Those of nodes on which node ports answer.
    Nodes,
    /// None.
    None,
}

impl fmt::Display for ExternalIps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::Nodes => "nodes",
            Self::None => "none",
        })
    }
}

/// The settings that affect frontends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Name of this node.
    pub node_name: Arc<str>,
    /// `--node-port-range`
    pub node_ports: RangeInclusive<u16>,
    /// `--nodeport-addresses`
    pub node_port_addresses: NodePortAddresses,
    /// `--external-ips`
    pub external_ips: ExternalIps,
    /// `--service-cidr`: service networks in addition to those of ServiceCIDRs; `None` to use neither.
    pub service_cidrs: Option<Vec<Cidr>>,
    /// `--packets`
    pub packets: PacketMode,
}

impl Settings {
    /// The default settings of a node.
    #[must_use]
    pub fn of_node(name: impl Into<Arc<str>>) -> Self {
        let (first, last) = lb_common::limits::NODE_PORTS;
        Self {
            node_name: name.into(),
            node_ports: first..=last,
            node_port_addresses: NodePortAddresses::All,
            external_ips: ExternalIps::Any,
            service_cidrs: Some(Vec::new()),
            packets: PacketMode::Off,
        }
    }
}

/// `--packets`: which packets that reach no hook are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PacketMode {
    /// None: another proxy serves them.
    #[default]
    Off,
    /// Those that enter the node for node ports, external IPs and load-balancer addresses.
    External,
    /// Those for cluster IPs too, and those that the node itself sends.
    All,
}

impl fmt::Display for PacketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::External => "external",
            Self::All => "all",
        })
    }
}
