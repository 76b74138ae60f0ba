//! What is wrong with an object, for people to read. An issue is never fatal.
//!
//! # Invariants
//!
//! - An [`Issue`] names the object, the field, the cause and what is done instead, in one line. Control
//!   characters of the object are escaped.
//! - Its serialised form has one `reason` per variant of [`IssueKind`]; scripts may match on it.

use std::{
    fmt::{self, Write as _},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{Protocol, ServiceKey};

/// Something wrong with an object.
///
/// `Display` gives one line without a trailing full stop.
///
/// ```
/// use lb_core::model::{Issue, IssueKind, ObjectRef};
///
/// let issue = Issue::new(
///     ObjectRef::service("default", "web"),
///     IssueKind::InvalidPort { field: "spec.ports[0].port".into(), value: 65_536 },
/// );
/// assert_eq!(
///     issue.to_string(),
///     "Service default/web: spec.ports[0].port: 65536 is not a port (1-65535); this port is left out"
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Issue {
    /// The object.
    pub object: ObjectRef,
    /// What is wrong and what is done instead.
    #[serde(flatten)]
    pub kind: IssueKind,
    /// Where the object was read, `file:line`, if it came from a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

impl Issue {
    /// An issue of an object that was not read from a file.
    #[must_use]
    pub const fn new(object: ObjectRef, kind: IssueKind) -> Self {
        Self { object, kind, source: None }
    }
}

impl fmt::Display for Issue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(Escaped(f), "{source}: ")?;
            // `source` already names the file.
            if self.object.kind == ObjectKind::File
                && source.rsplit_once(':').is_some_and(|(file, _line)| file == &*self.object.name)
            {
                return write!(f, "{}", self.kind);
            }
        }
        write!(f, "{}: {}", self.object, self.kind)
    }
}

/// Escapes control characters. Otherwise a line feed in a manifest's name forges a log line, and a terminal
/// obeys an escape sequence.
struct Escaped<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|character| self.write_char(character))
    }

    fn write_char(&mut self, character: char) -> fmt::Result {
        if character.is_control() {
            write!(self.0, "{}", character.escape_default())
        } else {
            self.0.write_char(character)
        }
    }
}

/// The kind of an object that an issue is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectKind {
    /// A Service.
    Service,
    /// An EndpointSlice.
    EndpointSlice,
    /// A Node.
    Node,
    /// A Pod.
    Pod,
    /// A ServiceCIDR.
    #[serde(rename = "ServiceCIDR")]
    ServiceCidr,
    /// A manifest file; its name is the path.
    File,
    /// Any other kind in a manifest.
    #[serde(untagged)]
    Other(Arc<str>),
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::ServiceCidr => "ServiceCIDR",
            Self::File => "file",
            Self::Other(kind) => kind,
        })
    }
}

/// Names an object, `Kind namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectRef {
    /// Kind of the object.
    pub kind: ObjectKind,
    /// Namespace; empty for objects without one.
    pub namespace: Arc<str>,
    /// Name; empty if the object has none.
    pub name: Arc<str>,
}

impl ObjectRef {
    /// Names a Service.
    #[must_use]
    pub fn service(namespace: &str, name: &str) -> Self {
        Self { kind: ObjectKind::Service, namespace: namespace.into(), name: name.into() }
    }

    /// Names an EndpointSlice.
    #[must_use]
    pub fn slice(namespace: &str, name: &str) -> Self {
        Self { kind: ObjectKind::EndpointSlice, namespace: namespace.into(), name: name.into() }
    }

    /// Names a Node.
    #[must_use]
    pub fn node(name: &str) -> Self {
        Self { kind: ObjectKind::Node, namespace: "".into(), name: name.into() }
    }

    /// Names a Pod.
    #[must_use]
    pub fn pod(namespace: &str, name: &str) -> Self {
        Self { kind: ObjectKind::Pod, namespace: namespace.into(), name: name.into() }
    }

    /// Names a ServiceCIDR.
    #[must_use]
    pub fn service_cidr(name: &str) -> Self {
        Self { kind: ObjectKind::ServiceCidr, namespace: "".into(), name: name.into() }
    }

    /// Names a manifest file.
    #[must_use]
    pub fn file(path: &str) -> Self {
        Self { kind: ObjectKind::File, namespace: "".into(), name: path.into() }
    }
}

impl From<&ServiceKey> for ObjectRef {
    fn from(key: &ServiceKey) -> Self {
        Self { kind: ObjectKind::Service, namespace: key.namespace.clone(), name: key.name.clone() }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = Escaped(f);
        let name = if self.name.is_empty() { "(without a name)" } else { &*self.name };
        if self.namespace.is_empty() {
            write!(f, "{} {name}", self.kind)
        } else {
            write!(f, "{} {}/{name}", self.kind, self.namespace)
        }
    }
}

/// What is wrong, and what is done instead.
///
/// `field` is the path of the field in the object, as `kubectl explain` spells it: `spec.ports[1].port`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "reason")]
#[non_exhaustive]
pub enum IssueKind {
    /// `metadata.name` is missing. The object is left out.
    NoName,
    /// An API server would refuse this name.
    InvalidName {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// What is left out: the object or the port.
        left_out: String,
    },
    /// The Service lacks a cluster IP and is not headless. It is left out.
    NoClusterIp,
    /// The Service has no usable port, so it has no frontend.
    NoPorts,
    /// A number is not a port. The port that the field defines is left out.
    InvalidPort {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: i64,
    },
    /// A slice port has no number, which means "all ports" to some consumers. The port is left out.
    NoPortNumber {
        /// Path of the field.
        field: String,
    },
    /// A slice port has no name (an API server sets the empty name). The port is left out.
    NoPortName {
        /// Path of the field.
        field: String,
    },
    /// Two ports of a Service have the same identity or the same number. The later one is left out.
    DuplicatePort {
        /// Path of the later field.
        field: String,
        /// What both hold.
        value: String,
    },
    /// A port's protocol is none of TCP, UDP and SCTP. The port is left out.
    UnknownProtocol {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
    },
    /// A port's protocol is valid, but no socket hook can serve it, and packets are not served either.
    NotServed {
        /// The port.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
    },
    /// A text is not an IP address. The address is left out.
    InvalidAddress {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
    },
    /// An address is of the other family than its field. The address is left out.
    WrongFamily {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// `IPv4` or `IPv6`.
        expected: String,
    },
    /// An address lies in a special range, which is never translated. The address is left out.
    SpecialAddress {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// The range: unspecified, loopback, link-local or multicast.
        range: String,
    },
    /// A text is not an IP network.
    InvalidNetwork {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
    },
    /// A slice endpoint has no address. The endpoint is left out.
    NoAddress {
        /// Path of the field.
        field: String,
    },
    /// A field holds a value that is not in its enumeration.
    UnknownValue {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// What is used instead.
        used: String,
    },
    /// A number is outside its range.
    OutOfRange {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: i64,
        /// The range.
        range: String,
        /// What is used instead.
        used: i64,
    },
    /// A field does not apply to this type of Service. It is ignored.
    NotApplicable {
        /// Path of the field.
        field: String,
        /// The Service type.
        service_type: String,
    },
    /// A field is about TCP connections, and no port of the Service is TCP. It is ignored.
    NoTcpPort {
        /// Path of the field.
        field: String,
    },
    /// The external policy is `Local`, but the Service has no health check port.
    NoHealthCheckPort,
    /// Cannot listen on the Service's health check port. The agent retries.
    HealthCheckPortTaken {
        /// The port.
        port: u16,
        /// The cause, in one line.
        cause: String,
    },
    /// A node port lies outside `--node-port-range`.
    NodePortOutsideRange {
        /// The node port.
        port: u16,
        /// First port of the range.
        first: u16,
        /// Last port of the range.
        last: u16,
    },
    /// `loadBalancerSourceRanges` limits these addresses. They are not served.
    SourceRanges {
        /// The load-balancer addresses concerned.
        addresses: Vec<String>,
    },
    /// `--external-ips` does not admit these addresses. They are not served.
    ExternalIps {
        /// The external IPs concerned.
        addresses: Vec<String>,
        /// Value of `--external-ips`.
        setting: String,
    },
    /// An interface of this node has the cluster IP. Calls to it are not translated.
    OnThisNode {
        /// The cluster IP.
        address: String,
    },
    /// Another service owns this frontend address.
    FrontendTaken {
        /// `address:port/protocol`; the unspecified address stands for a node port.
        address: String,
        /// The service that owns it, `namespace/name`.
        winner: String,
    },
    /// The table of frontends is full. The service stays as it was.
    ServicesFull {
        /// The table that is full.
        map: String,
        /// Its capacity, entries.
        capacity: u32,
        /// Entries that all services together need.
        needed: u64,
    },
    /// The endpoint table has no gap for a run. The service stays as it was.
    EndpointsFull {
        /// The table that is full.
        map: String,
        /// Its capacity, entries.
        capacity: u32,
        /// Entries that this service needs.
        needed: u64,
    },
    /// The ports of a service have too many endpoints in total. The ports that exceed the limit are left out.
    TooManyEndpoints {
        /// How many ports.
        n_left_out: usize,
        /// How many endpoints all ports may have in a family.
        max: usize,
    },
    /// A Node lists too many addresses. The last ones are left out.
    TooManyAddresses {
        /// How many are left out.
        n_left_out: usize,
        /// How many count.
        max: usize,
    },
    /// The Nodes have more addresses than the table holds. Each Node keeps its first ones.
    NodesFull {
        /// The table that is full.
        map: String,
        /// Its capacity, entries.
        capacity: u32,
        /// Addresses of this Node that are left out.
        n_left_out: usize,
    },
    /// The table of cluster IPs is full. The address is served, but no network is in force, so calls to
    /// undefined ports and unallocated addresses pass unchanged.
    ClusterIpsFull {
        /// The table that is full.
        map: String,
        /// Its capacity, entries.
        capacity: u32,
        /// The address without room.
        address: String,
    },
    /// A network of a ServiceCIDR is invalid or unsuitable for cluster IPs. It is left out.
    InvalidServiceCidr {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There are more service networks than the tables hold. This one is left out.
    TooManyServiceCidrs {
        /// The network.
        network: String,
        /// How many count in a family.
        max: usize,
    },
    /// The API server does not let the agent read ServiceCIDRs. The agent retries.
    NoServiceCidrs {
        /// Its answer, with the missing RBAC rule.
        cause: String,
    },
    /// Entries of another program fill a table, so this object is missing in it.
    TableFull {
        /// The table that is full.
        map: String,
        /// The address that is not served meanwhile.
        left_out: String,
    },
    /// A manifest holds an object of a kind that service proxying does not use. It is ignored.
    UnknownKind,
    /// A manifest holds an object of a known kind in an unknown API version. It is ignored.
    UnknownVersion {
        /// `apiVersion` as written.
        version: String,
        /// The known one.
        expected: String,
    },
    /// Two manifests define the same object. The one whose file name sorts first counts.
    DefinedTwice {
        /// Where the object that counts was read.
        winner: String,
    },
    /// A manifest cannot be read. Its last good objects stay in force.
    BrokenFile {
        /// The cause, in one line; names the field if an object did not decode.
        cause: String,
        /// Whether its last good objects are served.
        last_good: bool,
        /// Since when it cannot be read, in RFC 3339.
        since: String,
    },
    /// A program keeps a manifest open for writing. The last document, and objects that the file lacks, keep
    /// their former state.
    BeingWritten {
        /// Since when, in RFC 3339.
        since: String,
    },
    /// This Node's agent was given a map size below what is in use. The maps keep their size.
    SizeRefused {
        /// The setting.
        setting: String,
        /// Its value, entries.
        wanted: u32,
        /// Entries in use; `None` if they cannot be counted.
        served: Option<u32>,
        /// The size that is used instead, entries.
        used: u32,
    },
    /// This Node's agent cannot write its snapshot. It retries.
    SnapshotNotWritten {
        /// The cause, in one line; names the file.
        cause: String,
    },
    /// This Node's agent cannot change the nftables rules. It retries.
    PacketRules {
        /// The cause, in one line.
        cause: String,
    },
    /// An object from the API server cannot be decoded. It is left out.
    Unreadable {
        /// The cause, in one line.
        cause: String,
    },
}

impl IssueKind {
    /// Whether an older state of the object is served.
    #[must_use]
    pub const fn is_outdated(&self) -> bool {
        matches!(self, Self::BrokenFile { last_good: true, .. } | Self::BeingWritten { .. })
    }

    /// Path of the field, if the issue is about one.
    #[must_use]
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::TooManyServiceCidrs { .. } => Some("spec.cidrs"),
            Self::NoPorts | Self::NotServed { .. } | Self::TooManyEndpoints { .. } => Some("spec.ports"),
            Self::TooManyAddresses { .. } | Self::NodesFull { .. } => Some("status.addresses"),
            Self::InvalidName { field, .. }
            | Self::InvalidPort { field, .. }
            | Self::NoPortNumber { field }
            | Self::NoPortName { field }
            | Self::DuplicatePort { field, .. }
            | Self::UnknownProtocol { field, .. }
            | Self::InvalidAddress { field, .. }
            | Self::WrongFamily { field, .. }
            | Self::SpecialAddress { field, .. }
            | Self::InvalidNetwork { field, .. }
            | Self::InvalidServiceCidr { field, .. }
            | Self::NoAddress { field }
            | Self::NoTcpPort { field }
            | Self::UnknownValue { field, .. }
            | Self::OutOfRange { field, .. }
            | Self::NotApplicable { field, .. } => Some(field),
            _ => None,
        }
    }
}

impl IssueKind {
    /// Texts about manifests; writes nothing for other kinds.
    fn fmt_file(&self, f: &mut impl fmt::Write) -> fmt::Result {
        match self {
            Self::UnknownKind => f.write_str("unknown kind; it is ignored"),
            Self::UnknownVersion { version, expected } => {
                write!(f, "apiVersion: {version:?} is not known, {expected} is; it is ignored")
            }
            Self::DefinedTwice { winner } => write!(f, "is already defined at {winner}; this one is ignored"),
            Self::BrokenFile { cause, last_good: true, since } => {
                write!(f, "{cause}; the objects read from it before stay in force (since {since})")
            }
            Self::BrokenFile { cause, last_good: false, .. } => write!(f, "{cause}; the file is left out"),
            Self::BeingWritten { since } => write!(
                f,
                "open for writing by a program since {since}; the last document, and objects that the file \
                 lacks, keep their former state: let the program close it"
            ),
            _ => Ok(()),
        }
    }

    /// Texts about addresses that are not served; writes nothing for other kinds.
    fn fmt_not_served(&self, f: &mut impl fmt::Write) -> fmt::Result {
        match self {
            Self::SourceRanges { addresses } => write!(
                f,
                "spec.loadBalancerSourceRanges: cannot be checked at a socket; calls to {} go to the network \
                 untranslated",
                addresses.join(", ")
            ),
            Self::NotServed { port, protocol } => write!(
                f,
                "spec.ports: {port}: {protocol} cannot be served at a socket, and is served as packets with \
                 --packets=all alone; calls go to the network untranslated"
            ),
            Self::ExternalIps { addresses, setting } => write!(
                f,
                "spec.externalIPs: not admitted by --external-ips={setting}; calls to {} go to the network \
                 untranslated",
                addresses.join(", ")
            ),
            Self::OnThisNode { address } => write!(
                f,
                "spec.clusterIPs: {address} is an address of an interface of this node, as with NodeLocal \
                 DNSCache; calls to it are not translated"
            ),
            Self::InvalidServiceCidr { field, value, problem } => {
                write!(f, "{field}: {value:?} {problem}; calls to it pass unchanged")
            }
            Self::TooManyServiceCidrs { network, max } => write!(
                f,
                "spec.cidrs: more than {max} service networks of one family; {network} is left out: calls to \
                 unallocated addresses in it pass unchanged"
            ),
            Self::NoServiceCidrs { cause } => write!(
                f,
                "ServiceCIDRs cannot be read: {cause}; only --service-cidr and networks read before count; \
                 the agent retries"
            ),
            _ => Ok(()),
        }
    }

    /// Texts about full tables; writes nothing for other kinds.
    fn fmt_no_room(&self, f: &mut impl fmt::Write) -> fmt::Result {
        match self {
            Self::ServicesFull { map, capacity, needed } => write!(
                f,
                "map {map} is full ({capacity} entries, {needed} needed); the service stays as it was: raise \
                 --max-services"
            ),
            Self::EndpointsFull { map, capacity, needed } => write!(
                f,
                "map {map} has no gap for {needed} entries (capacity {capacity}); the service stays as it \
                 was: raise --max-endpoints"
            ),
            Self::TooManyEndpoints { n_left_out, max } => {
                write!(
                    f,
                    "spec.ports: more than {max} endpoints in all; {n_left_out} ports are left out: split \
                     the service"
                )
            }
            Self::TooManyAddresses { n_left_out, max } => write!(
                f,
                "status.addresses: more than {max}; node ports do not answer on the last {n_left_out}: let \
                 the kubelet or the cloud controller list fewer"
            ),
            Self::NodesFull { map, capacity, n_left_out } => write!(
                f,
                "status.addresses: map {map} is full ({capacity} entries for all Nodes); node ports do not \
                 answer on the last {n_left_out}: restrict --nodeport-addresses"
            ),
            Self::ClusterIpsFull { map, capacity, address } => write!(
                f,
                "map {map} is full ({capacity} entries, {address} is missing); the address is served, but \
                 calls to undefined ports and unallocated addresses pass unchanged: set --service-cidr=none"
            ),
            Self::TableFull { map, left_out } => write!(
                f,
                "map {map} is full of another program's entries; {left_out} is not served until an audit \
                 removes them: find the program that writes to the maps below --pin-path"
            ),
            _ => Ok(()),
        }
    }

    /// Texts about the agent itself; writes nothing for other kinds.
    fn fmt_of_agent(&self, f: &mut impl fmt::Write) -> fmt::Result {
        match self {
            Self::SizeRefused { setting, wanted, served: None, used } => write!(
                f,
                "--{setting}={wanted} is smaller than before, and entries in use cannot be counted: another \
                 version wrote the maps; {used} is used as before: restart the agent once more"
            ),
            Self::SizeRefused { setting, wanted, served: Some(served), used } => write!(
                f,
                "--{setting}={wanted} is too small for what is served ({served} entries); {used} is used as \
                 before: set it to more than {served} and restart the agent"
            ),
            Self::SnapshotNotWritten { cause } => write!(
                f,
                "the snapshot is not up to date: {cause}; an agent that starts during an outage of the API \
                 server serves older objects, or none: free space or let the agent write there; the agent \
                 retries"
            ),
            Self::PacketRules { cause } => write!(
                f,
                "the rules for packets are not up to date: {cause}; packets are served as before; the agent retries"
            ),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for IssueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = Escaped(f);
        match self {
            Self::NoName => f.write_str("metadata.name: is missing; the object is left out"),
            Self::InvalidName { field, value, left_out } => {
                write!(f, "{field}: {value:?} is not a DNS name (a-z, 0-9, -); {left_out} is left out")
            }
            Self::NoClusterIp => f.write_str(
                "spec.clusterIP: is empty, and only an API server can assign one; the service is left out",
            ),
            Self::NoPorts => f.write_str("spec.ports: no usable port; the service has no frontend"),
            Self::InvalidPort { field, value } => {
                write!(f, "{field}: {value} is not a port (1-65535); this port is left out")
            }
            Self::NoPortNumber { field } => {
                write!(
                    f,
                    "{field}: is missing or 0, and a range of all ports is not served; this port is left out"
                )
            }
            Self::NoPortName { field } => write!(f, "{field}: is missing; this port is left out"),
            Self::DuplicatePort { field, value } => {
                write!(f, "{field}: an earlier port has {value} too; this port is left out")
            }
            Self::UnknownProtocol { field, value } => {
                write!(f, "{field}: {value:?} is none of TCP, UDP and SCTP; this port is left out")
            }
            Self::InvalidAddress { field, value } => {
                write!(f, "{field}: {value:?} is not an IP address; it is left out")
            }
            Self::WrongFamily { field, value, expected } => {
                write!(f, "{field}: {value} is not an {expected} address; it is left out")
            }
            Self::SpecialAddress { field, value, range } => {
                write!(
                    f,
                    "{field}: {value} is in the {range} range, which is never translated; it is left out"
                )
            }
            Self::InvalidNetwork { field, value } => {
                write!(f, "{field}: {value:?} is not an IP network (address/length); it admits no client")
            }
            Self::NoAddress { field } => write!(f, "{field}: is empty; this endpoint is left out"),
            Self::UnknownValue { field, value, used } => {
                write!(f, "{field}: {value:?} is not known; it is taken for {used}")
            }
            Self::OutOfRange { field, value, range, used } => {
                write!(f, "{field}: {value} is outside {range}; {used} is used")
            }
            Self::NotApplicable { field, service_type } => {
                write!(f, "{field}: has no meaning for type {service_type}; it is ignored")
            }
            Self::NoTcpPort { field } => write!(f, "{field}: needs a TCP port; it is ignored"),
            Self::NoHealthCheckPort => f.write_str(
                "spec.healthCheckNodePort: is missing or 0 although externalTrafficPolicy is Local; health \
                 checks are not answered",
            ),
            Self::HealthCheckPortTaken { port, cause } => write!(
                f,
                "spec.healthCheckNodePort: cannot listen on port {port}: {cause}; load balancers get no \
                 answer until the port is free; the agent retries"
            ),
            Self::NodePortOutsideRange { port, first, last } => write!(
                f,
                "node port {port} is outside --node-port-range {first}-{last}; it answers on the known node \
                 addresses, not on loopback"
            ),
            Self::NotServed { .. }
            | Self::SourceRanges { .. }
            | Self::ExternalIps { .. }
            | Self::OnThisNode { .. }
            | Self::InvalidServiceCidr { .. }
            | Self::TooManyServiceCidrs { .. }
            | Self::NoServiceCidrs { .. } => self.fmt_not_served(&mut f),
            Self::FrontendTaken { address, winner } => {
                write!(
                    f,
                    "{address} belongs to service {winner}; this service does not answer there: give one of \
                     them another address or port"
                )
            }
            Self::ServicesFull { .. }
            | Self::EndpointsFull { .. }
            | Self::TooManyEndpoints { .. }
            | Self::TooManyAddresses { .. }
            | Self::NodesFull { .. }
            | Self::ClusterIpsFull { .. }
            | Self::TableFull { .. } => self.fmt_no_room(&mut f),
            Self::UnknownKind
            | Self::UnknownVersion { .. }
            | Self::DefinedTwice { .. }
            | Self::BrokenFile { .. }
            | Self::BeingWritten { .. } => self.fmt_file(&mut f),
            Self::SizeRefused { .. } | Self::SnapshotNotWritten { .. } | Self::PacketRules { .. } => {
                self.fmt_of_agent(&mut f)
            }
            Self::Unreadable { cause } => write!(f, "{cause}; the object is left out"),
        }
    }
}

#[cfg(test)]
mod tests;
