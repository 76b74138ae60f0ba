//! Kubernetes objects, built in code or parsed from YAML.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, bail};
use k8s_openapi::{
    api::{
        core::v1::{
            ClientIPConfig, Node, NodeAddress, NodeStatus, Service, ServicePort, ServiceSpec,
            SessionAffinityConfig,
        },
        discovery::v1::{Endpoint, EndpointPort, EndpointSlice},
        networking::v1::{ServiceCIDR, ServiceCIDRSpec},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use lb_core::{
    model::{Changes, Issue, Protocol, ServiceKey, Store, ingest},
    state::State,
};
use serde::Deserialize as _;

/// The namespace of objects built here.
pub const NAMESPACE: &str = "default";

/// Namespace and name. A Node has an empty namespace.
pub type Name = (String, String);

/// An object that socklb watches.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a test has few of them")]
pub enum Object {
    /// A Service.
    Service(Service),
    /// An EndpointSlice.
    Slice(EndpointSlice),
    /// A Node.
    Node(Node),
    /// A ServiceCIDR.
    ServiceCidr(ServiceCIDR),
}

macro_rules! from_kinds {
    ($($variant:ident($kind:ty)),+) => {
        $(impl From<$kind> for Object {
            fn from(object: $kind) -> Self {
                Self::$variant(object)
            }
        })+
    };
}

from_kinds!(Service(Service), Slice(EndpointSlice), Node(Node), ServiceCidr(ServiceCIDR));

/// Parses an object.
///
/// # Errors
///
/// If socklb does not watch its kind, or it does not match its schema.
pub fn object(value: &serde_json::Value) -> Result<Object> {
    let kind = value["kind"].as_str().context("an object without `kind`")?;
    let object = match kind {
        "Service" => Service::deserialize(value).map(Object::Service),
        "EndpointSlice" => EndpointSlice::deserialize(value).map(Object::Slice),
        "Node" => Node::deserialize(value).map(Object::Node),
        "ServiceCIDR" => ServiceCIDR::deserialize(value).map(Object::ServiceCidr),
        other => bail!("objects of kind {other} are not supported"),
    };
    object.with_context(|| format!("{kind} {}", value["metadata"]["name"]))
}

/// The objects of an API server.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Services.
    pub services: BTreeMap<Name, Service>,
    /// Slices.
    pub slices: BTreeMap<Name, EndpointSlice>,
    /// Nodes.
    pub nodes: BTreeMap<Name, Node>,
    /// ServiceCIDRs.
    pub service_cidrs: BTreeMap<Name, ServiceCIDR>,
    /// `--service-proxy-name`
    pub service_proxy_name: Option<String>,
}

/// The models of objects. Adds the issues.
fn read<T, M>(
    objects: &BTreeMap<Name, T>,
    ingest: impl Fn(&T) -> (Option<M>, Vec<Issue>),
    issues: &mut Vec<Issue>,
) -> Vec<M> {
    let models = objects.values().filter_map(|object| {
        let (model, found) = ingest(object);
        issues.extend(found);
        model
    });
    models.collect()
}

fn name_of(metadata: &ObjectMeta) -> Name {
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

impl Cluster {
    /// A cluster without objects.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces an object.
    pub fn set(&mut self, object: impl Into<Object>) {
        match object.into() {
            Object::Service(service) => drop(self.services.insert(name_of(&service.metadata), service)),
            Object::Slice(slice) => drop(self.slices.insert(name_of(&slice.metadata), slice)),
            Object::Node(node) => drop(self.nodes.insert(name_of(&node.metadata), node)),
            Object::ServiceCidr(cidr) => drop(self.service_cidrs.insert(name_of(&cidr.metadata), cidr)),
        }
    }

    /// Adds or replaces objects.
    #[must_use]
    pub fn with<T: Into<Object>>(mut self, objects: impl IntoIterator<Item = T>) -> Self {
        objects.into_iter().for_each(|object| self.set(object));
        self
    }

    /// Adds a service with one unnamed port at one address and these endpoints. The name is converted to
    /// lower case, so a `Debug` form will do.
    pub fn serve(&mut self, name: &str, address: SocketAddr, protocol: Protocol, endpoints: &[SocketAddr]) {
        let name = name.to_lowercase();
        self.set(service(&name, &[address.ip()], &[port("", protocol, address.port())]));
        self.set_endpoints(&PortOf { service: &name, name: "", protocol }, endpoints);
    }

    /// The cluster with such a service: see [`Self::serve`].
    #[must_use]
    pub fn serving(
        mut self,
        name: &str,
        address: SocketAddr,
        protocol: Protocol,
        endpoints: &[SocketAddr],
    ) -> Self {
        self.serve(name, address, protocol, endpoints);
        self
    }

    /// Sets an annotation of all Services.
    #[must_use]
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        for service in self.services.values_mut() {
            let annotations = service.metadata.annotations.get_or_insert_default();
            annotations.insert(key.to_owned(), value.to_owned());
        }
        self
    }

    /// Sets the endpoints of one port of a service.
    pub fn set_endpoints(&mut self, port: &PortOf<'_>, endpoints: &[SocketAddr]) {
        let prefix = port.slice_prefix();
        self.slices.retain(|(_, name), _| !name.starts_with(&prefix));
        for slice in slices(port, endpoints) {
            self.set(slice);
        }
    }

    /// All objects: a ServiceCIDR comes before the Services, and a Service before its slices.
    pub fn objects(&self) -> impl Iterator<Item = Object> {
        let cidrs = self.service_cidrs.values().cloned().map(Object::from);
        let services = self.services.values().cloned().map(Object::from);
        let slices = self.slices.values().cloned().map(Object::from);
        cidrs.chain(services).chain(slices).chain(self.nodes.values().cloned().map(Object::from))
    }

    /// Applies the objects to a store as a re-list does: it deletes what is not listed. Returns the issues.
    pub fn fill(&self, store: &mut Store) -> (Changes, Vec<Issue>) {
        let mut issues = Vec::new();
        let proxy_name = self.service_proxy_name.as_deref();
        let is_served = |metadata: &ObjectMeta| ingest::is_selected(metadata.labels.as_ref(), proxy_name);
        let service = |object: &_| ingest::any_service(object, proxy_name);
        let slice = |object: &EndpointSlice| {
            if is_served(&object.metadata) { ingest::slice(object) } else { (None, Vec::new()) }
        };
        let mut changes = store.replace_services(read(&self.services, service, &mut issues));
        changes.merge(store.replace_slices(read(&self.slices, slice, &mut issues)));
        changes.merge(store.replace_nodes(read(&self.nodes, ingest::node, &mut issues)));
        let cidrs = read(&self.service_cidrs, ingest::service_cidr, &mut issues);
        changes.merge(store.replace_service_cidrs(cidrs));
        (changes, issues)
    }

    /// As [`Self::fill`], for an agent's state.
    pub fn feed(&self, state: &mut State) -> Vec<Issue> {
        let mut issues = Vec::new();
        state.change(|store| {
            let (changes, found) = self.fill(store);
            issues = found;
            changes
        });
        issues
    }

    /// Every endpoint address of any slice, with its protocol.
    #[must_use]
    pub fn endpoint_addresses(&self) -> BTreeSet<(SocketAddr, Protocol)> {
        let mut store = Store::new();
        let (_all, _issues) = self.fill(&mut store);
        let mut found = BTreeSet::new();
        for slice in store.slices() {
            for port in &slice.ports {
                found.extend(
                    slice.endpoints.iter().map(|e| (SocketAddr::new(e.address, port.port), port.protocol)),
                );
            }
        }
        found
    }
}

/// Identifies a port of a service, which its slices refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortOf<'a> {
    /// Name of the service.
    pub service: &'a str,
    /// Name of the port.
    pub name: &'a str,
    /// Its protocol.
    pub protocol: Protocol,
}

impl<'a> PortOf<'a> {
    /// The unnamed TCP port of a service.
    #[must_use]
    pub const fn tcp(service: &'a str) -> Self {
        Self { service, name: "", protocol: Protocol::Tcp }
    }

    /// The unnamed UDP port of a service.
    #[must_use]
    pub const fn udp(service: &'a str) -> Self {
        Self { service, name: "", protocol: Protocol::Udp }
    }

    fn slice_prefix(&self) -> String {
        // Slice names are lower case.
        format!("{}-{}-{}-", self.service, self.name, self.protocol).to_ascii_lowercase()
    }
}

fn metadata(namespace: &str, name: &str) -> ObjectMeta {
    let namespace = (!namespace.is_empty()).then(|| namespace.to_owned());
    ObjectMeta { name: Some(name.to_owned()), namespace, ..ObjectMeta::default() }
}

/// A Service of type `ClusterIP` with a cluster IP of one or of each family.
#[must_use]
pub fn service(name: &str, cluster_ips: &[IpAddr], ports: &[ServicePort]) -> Service {
    let texts: Vec<String> = cluster_ips.iter().map(ToString::to_string).collect();
    let families = cluster_ips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned());
    Service {
        metadata: metadata(NAMESPACE, name),
        spec: Some(ServiceSpec {
            cluster_ip: texts.first().cloned(),
            cluster_ips: Some(texts),
            ip_families: Some(families.collect()),
            ports: Some(ports.to_vec()),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// Changes the `spec` of a Service.
#[must_use]
pub fn with_spec(mut service: Service, change: impl FnOnce(&mut ServiceSpec)) -> Service {
    change(service.spec.get_or_insert_default());
    service
}

/// A Service of type `NodePort` with this node port for each port.
#[must_use]
pub fn with_node_port(service: Service, number: u16) -> Service {
    with_spec(service, |spec| {
        spec.type_ = Some("NodePort".to_owned());
        spec.ports.iter_mut().flatten().for_each(|port| port.node_port = Some(number.into()));
    })
}

/// A Service with session affinity for this time, or for the default one.
#[must_use]
pub fn with_affinity(service: Service, seconds: Option<i32>) -> Service {
    with_spec(service, |spec| {
        spec.session_affinity = Some("ClientIP".to_owned());
        spec.session_affinity_config = seconds.map(|seconds| SessionAffinityConfig {
            client_ip: Some(ClientIPConfig { timeout_seconds: Some(seconds) }),
        });
    })
}

/// A port of a Service; the name may be empty.
#[must_use]
pub fn port(name: &str, protocol: Protocol, number: u16) -> ServicePort {
    ServicePort {
        name: (!name.is_empty()).then(|| name.to_owned()),
        protocol: Some(protocol.to_string()),
        port: number.into(),
        ..ServicePort::default()
    }
}

/// Slices with these endpoints, all ready: one slice for each family and port number.
#[must_use]
pub fn slices(port: &PortOf<'_>, endpoints: &[SocketAddr]) -> Vec<EndpointSlice> {
    let mut groups: BTreeMap<(bool, u16), Vec<Endpoint>> = BTreeMap::new();
    for endpoint in endpoints {
        groups
            .entry((endpoint.is_ipv6(), endpoint.port()))
            .or_default()
            .push(Endpoint { addresses: vec![endpoint.ip().to_string()], ..Endpoint::default() });
    }
    groups
        .into_iter()
        .map(|((ipv6, number), endpoints)| {
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            let mut metadata = metadata(
                NAMESPACE,
                &format!("{}{}-{number}", port.slice_prefix(), family.to_ascii_lowercase()),
            );
            metadata.labels = Some([(ingest::SERVICE_NAME.to_owned(), port.service.to_owned())].into());
            EndpointSlice {
                metadata,
                address_type: family.to_owned(),
                ports: Some(vec![EndpointPort {
                    name: Some(port.name.to_owned()),
                    protocol: Some(port.protocol.to_string()),
                    port: Some(number.into()),
                    ..EndpointPort::default()
                }]),
                endpoints,
            }
        })
        .collect()
}

/// A Node with addresses of type `InternalIP`.
#[must_use]
pub fn node(name: &str, addresses: &[IpAddr]) -> Node {
    let addresses = addresses
        .iter()
        .map(|ip| NodeAddress { type_: "InternalIP".to_owned(), address: ip.to_string() })
        .collect();
    Node {
        metadata: metadata("", name),
        status: Some(NodeStatus { addresses: Some(addresses), ..NodeStatus::default() }),
        ..Node::default()
    }
}

/// A ServiceCIDR with these networks.
#[must_use]
pub fn service_cidr(name: &str, networks: &[&str]) -> ServiceCIDR {
    let cidrs = networks.iter().map(|&network| network.to_owned()).collect();
    ServiceCIDR {
        metadata: metadata("", name),
        spec: Some(ServiceCIDRSpec { cidrs: Some(cidrs) }),
        status: None,
    }
}

/// The key of a Service built here.
#[must_use]
pub fn key(service: &str) -> ServiceKey {
    ServiceKey::new(NAMESPACE, service)
}
