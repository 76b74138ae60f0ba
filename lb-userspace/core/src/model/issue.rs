//! What is wrong with an object, for the user to read; never fatal.
//!
//! # Invariants
//!
//! - An [`Issue`] names the object, the field, the cause and what is done instead, in one line without control characters,
//!   whatever the object holds.
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
    /// An issue of an object without a known place.
    #[must_use]
    pub const fn new(object: ObjectRef, kind: IssueKind) -> Self {
        Self { object, kind, source: None }
    }
}

impl fmt::Display for Issue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(Escaped(f), "{source}: ")?;
            // The place names the file already.
            if self.object.kind == ObjectKind::File
                && source.rsplit_once(':').is_some_and(|(file, _line)| file == &*self.object.name)
            {
                return write!(f, "{}", self.kind);
            }
        }
        write!(f, "{}: {}", self.object, self.kind)
    }
}

/// Writes control characters as escapes. A manifest holds what its author likes: a line end in a name would forge a line of
/// the log, an escape sequence would be obeyed by the terminal that shows it.
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
    /// Any other kind that a manifest may name.
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
    /// A name is not one that an API server takes.
    InvalidName {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// What is left out: the object or the port.
        left_out: String,
    },
    /// The Service has no cluster IP and is not headless. It is left out.
    NoClusterIp,
    /// The Service has no usable port, so it has no frontend.
    NoPorts,
    /// A number is not a port. The port, or what the field stands for, is left out.
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
    /// A slice port has no name (the API server sets it to the empty text). The port is left out.
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
    /// A port's protocol is legal and cannot be served at a socket.
    NotServed {
        /// Path of the port.
        field: String,
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
    /// An address is not of the family that its place asks for. The address is left out.
    WrongFamily {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// `IPv4` or `IPv6`.
        expected: String,
    },
    /// An address lies in a range that has its own meaning and is never translated. The address is left out.
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
    /// A field holds something that its enumeration does not know.
    UnknownValue {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// What it is taken for.
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
    /// The Service should answer health checks of its load balancer and has no port for it.
    NoHealthCheckPort,
    /// The Service's port for health checks cannot be listened on. It is tried again.
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
    /// `loadBalancerSourceRanges` limits these addresses. They are left to the network.
    SourceRanges {
        /// The load-balancer addresses concerned.
        addresses: Vec<String>,
    },
    /// A setting keeps these addresses from answering. They are left to the network.
    ExternalIps {
        /// The external IPs concerned.
        addresses: Vec<String>,
        /// Value of `--external-ips`.
        setting: String,
    },
    /// The cluster IP is an address of an interface of the node. Calls to it stay with the node.
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
    /// The tables have no room for all frontends. The service keeps what it had.
    ServicesFull {
        /// The table that is full.
        map: String,
        /// Its capacity, entries.
        capacity: u32,
        /// Entries that all services together need.
        needed: u64,
    },
    /// The tables have no room for all endpoints. The service keeps what it had.
    EndpointsFull {
        /// The table that is full.
        map: String,
        /// Its capacity, entries.
        capacity: u32,
        /// Entries that this service needs.
        needed: u64,
    },
    /// The ports of a service have more endpoints together than any table. Ports with which it would be too many are left
    /// out.
    TooManyEndpoints {
        /// How many ports.
        n_left_out: usize,
        /// How many endpoints all ports may have in a family.
        max: usize,
    },
    /// A Node lists more addresses than count of one Node. Later ones are left out.
    TooManyAddresses {
        /// How many are left out.
        n_left_out: usize,
        /// How many count.
        max: usize,
    },
    /// The Nodes of the cluster have more addresses than a table holds. Every Node keeps its first ones.
    NodesFull {
        /// The table that is full.
        map: String,
        /// Its capacity, entries.
        capacity: u32,
        /// Addresses of this Node that are left out.
        n_left_out: usize,
    },
    /// The Services of the cluster have more cluster IPs than a table holds. Each is served all the same.
    ClusterIpsFull {
        /// The table that is full.
        map: String,
        /// Its capacity, entries.
        capacity: u32,
        /// The address without room.
        address: String,
    },
    /// A network of a ServiceCIDR cannot be one that cluster IPs come from. It is left out.
    InvalidServiceCidr {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Cluster IPs come from more networks than the tables hold. This one is left out.
    TooManyServiceCidrs {
        /// The network.
        network: String,
        /// How many count in a family.
        max: usize,
    },
    /// The API server does not let the agent read ServiceCIDRs. It is tried again.
    NoServiceCidrs {
        /// Its answer, with the rule that is missing.
        cause: String,
    },
    /// A table has no room for this object although the agent has not filled it.
    TableFull {
        /// The table that is full.
        map: String,
        /// What is not served for now.
        left_out: String,
    },
    /// A manifest holds an object of a kind that plays no part in service proxying. It is ignored.
    UnknownKind,
    /// A manifest holds an object of a known kind in an API version that is not known. It is ignored.
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
        /// Whether objects from before are served.
        last_good: bool,
        /// Since when it cannot be read, as RFC 3339 has it.
        since: String,
    },
    /// A program has a manifest open for writing for long. What it lacks, and its last document, are served as they were before.
    BeingWritten {
        /// Since when, as RFC 3339 has it.
        since: String,
    },
    /// The agent of this Node was given a size with which maps could not hold what is served. They stay as they were.
    SizeRefused {
        /// The setting.
        setting: String,
        /// Its value, entries.
        wanted: u32,
        /// Entries that are served; `None` if that cannot be read.
        served: Option<u32>,
        /// The size that is used instead, entries.
        used: u32,
    },
    /// The agent of this Node cannot write its snapshot. It is tried again.
    SnapshotNotWritten {
        /// The cause, in one line; names the file.
        cause: String,
    },
    /// The API server sent an object of another form than the API's. It is left out.
    Unreadable {
        /// The cause, in one line.
        cause: String,
    },
}

impl IssueKind {
    /// Whether something is served from an older state than the one that its issue is about.
    #[must_use]
    pub const fn is_outdated(&self) -> bool {
        matches!(self, Self::BrokenFile { last_good: true, .. } | Self::BeingWritten { .. })
    }

    /// Path of the field that the issue is about, if it is about one.
    #[must_use]
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::TooManyServiceCidrs { .. } => Some("spec.cidrs"),
            Self::NoPorts | Self::TooManyEndpoints { .. } => Some("spec.ports"),
            Self::TooManyAddresses { .. } | Self::NodesFull { .. } => Some("status.addresses"),
            Self::InvalidName { field, .. }
            | Self::InvalidPort { field, .. }
            | Self::NoPortNumber { field }
            | Self::NoPortName { field }
            | Self::DuplicatePort { field, .. }
            | Self::UnknownProtocol { field, .. }
            | Self::NotServed { field, .. }
            | Self::InvalidAddress { field, .. }
            | Self::WrongFamily { field, .. }
            | Self::SpecialAddress { field, .. }
            | Self::InvalidNetwork { field, .. }
            | Self::InvalidServiceCidr { field, .. }
            | Self::NoAddress { field }
            | Self::UnknownValue { field, .. }
            | Self::OutOfRange { field, .. }
            | Self::NotApplicable { field, .. } => Some(field),
            _ => None,
        }
    }
}

impl IssueKind {
    /// What is said of those that are about manifests; nothing of others.
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
                "a program has it open for writing since {since}; what it lacks, and its last document, stay in force as they \
                 were before: let the program close it"
            ),
            _ => Ok(()),
        }
    }

    /// What is said of those that are about addresses left to others; nothing of others.
    fn fmt_left_alone(&self, f: &mut impl fmt::Write) -> fmt::Result {
        match self {
            Self::SourceRanges { addresses } => write!(
                f,
                "spec.loadBalancerSourceRanges: the caller's address is not known at a socket; calls to {} go to \
                 the network untranslated",
                addresses.join(", ")
            ),
            Self::ExternalIps { addresses, setting } => write!(
                f,
                "spec.externalIPs: --external-ips={setting} leaves {} to the network",
                addresses.join(", ")
            ),
            Self::OnThisNode { address } => write!(
                f,
                "spec.clusterIPs: {address} is an address of an interface of this node, as NodeLocal DNSCache makes it; calls to it \
                 stay with the node"
            ),
            Self::InvalidServiceCidr { field, value, problem } => {
                write!(f, "{field}: {value:?} {problem}; calls to it go where they say")
            }
            Self::TooManyServiceCidrs { network, max } => write!(
                f,
                "spec.cidrs: {network} is one of more than {max} networks of its family that cluster IPs come from; calls to \
                 unallocated addresses in it go where they say"
            ),
            Self::NoServiceCidrs { cause } => write!(
                f,
                "the networks that cluster IPs come from are not known beyond --service-cidr and those read before: {cause}; \
                 it is tried again"
            ),
            _ => Ok(()),
        }
    }

    /// What is said of those that are about room in a table; nothing of others.
    fn fmt_no_room(&self, f: &mut impl fmt::Write) -> fmt::Result {
        match self {
            Self::ServicesFull { map, capacity, needed } => write!(
                f,
                "map {map} is full ({capacity} entries, {needed} needed); raise --max-services; the service stays as \
                 it was"
            ),
            Self::EndpointsFull { map, capacity, needed } => write!(
                f,
                "map {map} has no room ({capacity} entries, {needed} needed); raise --max-endpoints; the service \
                 stays as it was"
            ),
            Self::TooManyEndpoints { n_left_out, max } => {
                write!(
                    f,
                    "spec.ports: more than {max} endpoints in all; {n_left_out} ports are left out: split the service"
                )
            }
            Self::TooManyAddresses { n_left_out, max } => write!(
                f,
                "status.addresses: more than {max}; node ports do not answer on the last {n_left_out}: have the kubelet or \
                 the cloud's controller list fewer"
            ),
            Self::NodesFull { map, capacity, n_left_out } => write!(
                f,
                "status.addresses: map {map} is full ({capacity} entries for all Nodes); node ports do not answer on the last \
                 {n_left_out}: --nodeport-addresses takes fewer"
            ),
            Self::ClusterIpsFull { map, capacity, address } => write!(
                f,
                "map {map} is full ({capacity} entries) and {address} has no room; it is served, but no call to an undefined \
                 port or an unallocated address fails at once: set --service-cidr=none"
            ),
            Self::TableFull { map, left_out } => write!(
                f,
                "map {map} is full of entries that are not the agent's; {left_out} is left to the network until an audit has \
                 removed them: find the program that writes to the maps below --pin-path"
            ),
            _ => Ok(()),
        }
    }

    /// What is said of those that are about the agent itself; nothing of others.
    fn fmt_of_agent(&self, f: &mut impl fmt::Write) -> fmt::Result {
        match self {
            Self::SizeRefused { setting, wanted, served: None, used } => write!(
                f,
                "--{setting}={wanted} is smaller than before, and what is served cannot be counted, since another version wrote the \
                 maps; {used} is used as before: restart the agent once more"
            ),
            Self::SizeRefused { setting, wanted, served: Some(served), used } => write!(
                f,
                "--{setting}={wanted} is too small for what is served, which takes {served}; {used} is used as before: set it to \
                 {served} or more, with room, and restart the agent"
            ),
            Self::SnapshotNotWritten { cause } => write!(
                f,
                "the snapshot is not up to date: {cause}; an agent that starts while the API server is away would serve older \
                 objects, or none: make room or let the agent write there, it tries again"
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
            Self::NoClusterIp => {
                f.write_str("spec.clusterIP: is empty, and only an API server can assign one; the service is left out")
            }
            Self::NoPorts => f.write_str("spec.ports: no usable port; the service has no frontend"),
            Self::InvalidPort { field, value } => {
                write!(f, "{field}: {value} is not a port (1-65535); this port is left out")
            }
            Self::NoPortNumber { field } => {
                write!(f, "{field}: is missing or 0, and a range of all ports is not served; this port is left out")
            }
            Self::NoPortName { field } => write!(f, "{field}: is missing; this port is left out"),
            Self::DuplicatePort { field, value } => {
                write!(f, "{field}: an earlier port has {value} too; this port is left out")
            }
            Self::UnknownProtocol { field, value } => {
                write!(f, "{field}: {value:?} is none of TCP, UDP and SCTP; this port is left out")
            }
            Self::NotServed { field, protocol } => {
                write!(f, "{field}: {protocol} cannot be served at a socket; calls go to the network untranslated")
            }
            Self::InvalidAddress { field, value } => {
                write!(f, "{field}: {value:?} is not an IP address; it is left out")
            }
            Self::WrongFamily { field, value, expected } => {
                write!(f, "{field}: {value} is not an {expected} address; it is left out")
            }
            Self::SpecialAddress { field, value, range } => {
                write!(f, "{field}: {value} is in the {range} range, which is never translated; it is left out")
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
            Self::NoHealthCheckPort => f.write_str(
                "spec.healthCheckNodePort: is missing or 0 although externalTrafficPolicy is Local; health checks \
                 are not answered",
            ),
            Self::HealthCheckPortTaken { port, cause } => write!(
                f,
                "spec.healthCheckNodePort: cannot listen on port {port}: {cause}; load balancers get no answer until the port is \
                 free: the agent tries again"
            ),
            Self::NodePortOutsideRange { port, first, last } => write!(
                f,
                "node port {port} is outside --node-port-range {first}-{last}; it answers on the known node \
                 addresses, not on loopback"
            ),
            Self::SourceRanges { .. }
            | Self::ExternalIps { .. }
            | Self::OnThisNode { .. }
            | Self::InvalidServiceCidr { .. }
            | Self::TooManyServiceCidrs { .. }
            | Self::NoServiceCidrs { .. } => self.fmt_left_alone(&mut f),
            Self::FrontendTaken { address, winner } => {
                write!(f, "{address} belongs to service {winner}; this service does not answer there: give one of them another address or port")
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
            Self::SizeRefused { .. } | Self::SnapshotNotWritten { .. } => self.fmt_of_agent(&mut f),
            Self::Unreadable { cause } => write!(f, "{cause}; the object is left out"),
        }
    }
}

#[cfg(test)]
mod tests;
