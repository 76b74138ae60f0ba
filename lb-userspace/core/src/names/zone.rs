//! The cluster's zone: which records a name has, by the objects.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, OnceLock},
};

use super::{Answer, Question, Record, RecordData, RecordType, Records, Soa};
use crate::model::{Family, NamesOnly, Protocol, Service, ServiceKey, SliceEndpoint, Store};

/// Time to live of the zone's records, seconds: CoreDNS's default.
const TTL: u32 = 5;
/// Time to live of the schema's version, seconds, as in the specification's example.
const VERSION_TTL: u32 = 28_800;
/// The version of the Kubernetes DNS specification (2.2).
const VERSION: &str = "1.1.0";

/// What decides about answers besides the objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The cluster's domain, lower case, without the final dot.
    pub domain: Arc<str>,
    /// Domains whose names are forwarded, in the same form.
    pub forward: Vec<Arc<str>>,
    /// The Service of the cluster's DNS: its cluster IPs are the addresses of the zone's name server.
    pub dns_service: ServiceKey,
    /// Serial number of the zone.
    pub serial: u32,
}

/// The zone at one moment. Creating one costs a few references, whatever the number of objects.
#[derive(Debug)]
pub struct Zone {
    store: Store,
    settings: Settings,
    /// The names of addresses, collected by the first question for one.
    reverse: OnceLock<BTreeMap<IpAddr, BTreeSet<Arc<str>>>>,
}

/// The name of a question below the zone, split.
enum Place<'a> {
    Apex,
    /// `dns.DOMAIN` and `ns.dns.DOMAIN`.
    NameServers,
    NameServer,
    Version,
    /// `svc.DOMAIN` and `pod.DOMAIN`.
    Kind,
    Namespace(&'a str),
    Service(ServiceKey),
    /// One label below a Service: an endpoint.
    Endpoint(&'a str, ServiceKey),
    /// `_tcp.SERVICE`, which has only names below it.
    ServiceProtocol(Protocol, ServiceKey),
    Port(&'a str, Protocol, ServiceKey),
    PodNamespace,
    Pod(&'a str),
    Nowhere,
}

impl Zone {
    /// The zone of these objects.
    #[must_use]
    pub const fn new(store: Store, settings: Settings) -> Self {
        Self { store, settings, reverse: OnceLock::new() }
    }

    /// Answers a question.
    #[must_use]
    pub fn answer(&self, question: &Question<'_>) -> Answer {
        // Names of Kubernetes are ASCII, so what stands for octets that are no text matches none of them.
        let lower = |label: &&[u8]| String::from_utf8_lossy(label).to_ascii_lowercase();
        let labels: Vec<String> = question.labels.iter().map(lower).collect();
        // A label with a dot inside is no label of ours, and must not be taken for two.
        let labels: Vec<&str> =
            labels.iter().map(|label| if label.contains('.') { "" } else { label.as_str() }).collect();
        if let Some(ip) = reversed(&labels) {
            return self.names_of(ip, question.record_type);
        }
        let Some(below) = strip_domain(&labels, &self.settings.domain) else { return Answer::Forward };
        if self.settings.forward.iter().any(|domain| strip_domain(&labels, domain).is_some()) {
            return Answer::Forward;
        }
        self.records(&place(below), question.record_type)
    }

    fn records(&self, place: &Place<'_>, wanted: RecordType) -> Answer {
        match place {
            Place::Apex => self.of_type(wanted, vec![RecordData::Soa(self.soa()), RecordData::Ns(self.ns())]),
            Place::NameServer => {
                let dns = self.store.service(&self.settings.dns_service);
                self.of_type(wanted, dns.map(cluster_ips).unwrap_or_default())
            }
            Place::Version if matches!(wanted, RecordType::Txt | RecordType::Any) => {
                let data = RecordData::Txt(VERSION.into());
                answered(vec![Record { owner: None, ttl: VERSION_TTL, data }], Vec::new())
            }
            // They exist, if only because of names below them.
            Place::Version | Place::NameServers | Place::Kind | Place::PodNamespace => self.no_data(),
            Place::Namespace(namespace) => {
                if self.store.has_namespace(namespace) {
                    self.no_data()
                } else {
                    self.nothing()
                }
            }
            Place::Service(key) => self.service(key, wanted),
            Place::Endpoint(hostname, key) => {
                self.addresses(self.endpoints(key).filter(|endpoint| is_named(endpoint, hostname)), wanted)
            }
            Place::ServiceProtocol(protocol, key) => {
                let has_port = self.ports(key).any(|(_, of, _)| of == *protocol);
                if has_port { self.no_data() } else { self.nothing() }
            }
            Place::Port(name, protocol, key) => self.port(name, *protocol, key, wanted),
            Place::Pod(name) => match pod_address(name) {
                Some(ip) => self.of_type(wanted, vec![address(ip)]),
                None => self.nothing(),
            },
            Place::Nowhere => self.nothing(),
        }
    }

    fn service(&self, key: &ServiceKey, wanted: RecordType) -> Answer {
        let Some(service) = self.store.service(key) else { return self.nothing() };
        match &service.names_only {
            None => self.of_type(wanted, cluster_ips(service)),
            Some(NamesOnly::External(target)) => {
                // The name has a CNAME and nothing else (RFC 1034, 3.6.2), so it answers every type.
                let follows = !matches!(wanted, RecordType::Cname | RecordType::Any);
                let records = vec![own(RecordData::Cname(Arc::clone(target)))];
                let chase = follows.then(|| Arc::clone(target));
                Answer::Records(Records { answers: records, additional: Vec::new(), chase })
            }
            Some(NamesOnly::Headless { .. }) => self.addresses(self.endpoints(key), wanted),
        }
    }

    /// The addresses of endpoints, each once; without any there is no such name.
    fn addresses<'a>(
        &self,
        endpoints: impl Iterator<Item = &'a SliceEndpoint>,
        wanted: RecordType,
    ) -> Answer {
        let ips: BTreeSet<IpAddr> = endpoints.map(|endpoint| endpoint.address).collect();
        if ips.is_empty() {
            return self.nothing();
        }
        self.of_type(wanted, ips.into_iter().map(address).collect())
    }

    /// `SRV` records: of a Service with cluster IPs one, of a headless one for each endpoint.
    fn port(&self, name: &str, protocol: Protocol, key: &ServiceKey, wanted: RecordType) -> Answer {
        let is_headless = self.store.service(key).is_some_and(|service| service.names_only.is_some());
        let host = self.host(key);
        let mut targets: BTreeMap<(Arc<str>, u16), BTreeSet<IpAddr>> = BTreeMap::new();
        for (port_name, of, number) in self.ports(key).filter(|(_, of, _)| *of == protocol) {
            if port_name != name || name.is_empty() {
                continue;
            }
            if is_headless {
                for slice in self.store.slices_of(key) {
                    let has_port =
                        |port: &&crate::model::SlicePort| &*port.name == name && port.protocol == of;
                    let Some(port) = slice.ports.iter().find(has_port) else { continue };
                    for endpoint in slice.endpoints.iter().filter(|endpoint| self.is_listed(key, endpoint)) {
                        let target = format!("{}.{host}", own_name(endpoint)).into();
                        targets.entry((target, port.port)).or_default().insert(endpoint.address);
                    }
                }
            } else if let Some(service) = self.store.service(key) {
                let ips =
                    [Family::V4, Family::V6].into_iter().filter_map(|family| service.cluster_ip(family));
                targets.entry((host.clone(), number)).or_default().extend(ips);
            }
        }
        if targets.is_empty() {
            return self.nothing();
        }
        if !matches!(wanted, RecordType::Srv | RecordType::Any) {
            return self.no_data();
        }
        // As CoreDNS: equal shares of 100, at least 1.
        let weight = u16::try_from(100 / targets.len()).unwrap_or(1).max(1);
        let mut additional = Vec::new();
        let mut answers = Vec::with_capacity(targets.len());
        for ((target, port), ips) in targets {
            let of = |ip| Record { owner: Some(Arc::clone(&target)), ttl: TTL, data: address(ip) };
            additional.extend(ips.into_iter().map(of));
            answers.push(own(RecordData::Srv { priority: 0, weight, port, target }));
        }
        answered(answers, additional)
    }

    /// `PTR` records. CoreDNS forwards what it does not know here, since others may own the network.
    fn names_of(&self, ip: IpAddr, wanted: RecordType) -> Answer {
        match self.reverse.get_or_init(|| self.reverse()).get(&ip) {
            None => Answer::Forward,
            Some(names) => {
                self.of_type(wanted, names.iter().map(|name| RecordData::Ptr(Arc::clone(name))).collect())
            }
        }
    }

    fn reverse(&self) -> BTreeMap<IpAddr, BTreeSet<Arc<str>>> {
        let mut names: BTreeMap<IpAddr, BTreeSet<Arc<str>>> = BTreeMap::new();
        for service in self.store.services() {
            for ip in [Family::V4, Family::V6].into_iter().filter_map(|family| service.cluster_ip(family)) {
                names.entry(ip).or_default().insert(self.host(&service.key));
            }
        }
        for slice in self.store.slices() {
            for endpoint in slice.endpoints.iter().filter(|endpoint| self.is_listed(&slice.service, endpoint))
            {
                let Some(hostname) = &endpoint.hostname else { continue };
                let name = format!("{hostname}.{}", self.host(&slice.service));
                names.entry(endpoint.address).or_default().insert(name.into());
            }
        }
        names
    }

    /// Name, protocol and number of the ports of a Service.
    fn ports(&self, key: &ServiceKey) -> impl Iterator<Item = (&str, Protocol, u16)> {
        let ports = self.store.service(key).map(|service| service.ports.as_slice()).unwrap_or_default();
        ports.iter().map(|port| (&*port.name, port.protocol, port.port))
    }

    /// The endpoints that have names.
    fn endpoints<'a>(&'a self, key: &'a ServiceKey) -> impl Iterator<Item = &'a SliceEndpoint> {
        let is_known = self.store.service(key).is_some();
        let slices = self.store.slices_of(key).filter(move |_| is_known);
        slices.flat_map(|slice| &slice.endpoints).filter(|endpoint| self.is_listed(key, endpoint))
    }

    /// Whether an endpoint of a Service is ready, in the sense of the specification (2.1).
    fn is_listed(&self, key: &ServiceKey, endpoint: &SliceEndpoint) -> bool {
        endpoint.ready
            || self.store.service(key).is_some_and(|service| {
                service.names_only == Some(NamesOnly::Headless { publishes_not_ready: true })
            })
    }

    /// The name of a Service.
    fn host(&self, key: &ServiceKey) -> Arc<str> {
        format!("{}.{}.svc.{}", key.name, key.namespace, self.settings.domain).into()
    }

    fn ns(&self) -> Arc<str> {
        format!("ns.dns.{}", self.settings.domain).into()
    }

    /// CoreDNS's values.
    fn soa(&self) -> Soa {
        Soa {
            mname: self.ns(),
            rname: format!("hostmaster.{}", self.settings.domain).into(),
            serial: self.settings.serial,
            refresh: 7200,
            retry: 1800,
            expire: 86_400,
            minimum: TTL,
        }
    }

    fn authority(&self) -> Record {
        let owner = Some(Arc::clone(&self.settings.domain));
        Record { owner, ttl: TTL, data: RecordData::Soa(self.soa()) }
    }

    fn no_data(&self) -> Answer {
        Answer::NoData { soa: self.authority() }
    }

    fn nothing(&self) -> Answer {
        Answer::NxDomain { soa: self.authority() }
    }

    /// Those of a name's records that a question wants. For `ANY` one is enough (RFC 8482).
    fn of_type(&self, wanted: RecordType, all: Vec<RecordData>) -> Answer {
        let is_wanted = |data: &RecordData| wanted == RecordType::Any || data.record_type() == wanted;
        let most = if wanted == RecordType::Any { 1 } else { usize::MAX };
        let found: Vec<Record> = all.into_iter().filter(is_wanted).take(most).map(own).collect();
        if found.is_empty() { self.no_data() } else { answered(found, Vec::new()) }
    }
}

/// A record of the name that was asked for.
const fn own(data: RecordData) -> Record {
    Record { owner: None, ttl: TTL, data }
}

const fn answered(answers: Vec<Record>, additional: Vec<Record>) -> Answer {
    Answer::Records(Records { answers, additional, chase: None })
}

const fn address(ip: IpAddr) -> RecordData {
    match ip {
        IpAddr::V4(ip) => RecordData::A(ip),
        IpAddr::V6(ip) => RecordData::Aaaa(ip),
    }
}

fn cluster_ips(service: &Service) -> Vec<RecordData> {
    let ips = [Family::V4, Family::V6].into_iter().filter_map(|family| service.cluster_ip(family));
    ips.map(address).collect()
}

/// The label of an endpoint below its Service: its hostname, else its address with dashes, as CoreDNS has it.
fn own_name(endpoint: &SliceEndpoint) -> String {
    endpoint.hostname.as_deref().map_or_else(|| dashed(endpoint.address), str::to_owned)
}

fn dashed(ip: IpAddr) -> String {
    ip.to_string().replace(['.', ':'], "-")
}

fn is_named(endpoint: &SliceEndpoint, label: &str) -> bool {
    endpoint.hostname.as_deref().map_or_else(|| dashed(endpoint.address) == label, |name| name == label)
}

/// The address of a pod's name: `10-1-0-2`, or an IPv6 address with dashes.
fn pod_address(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_no_v4| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()
}

/// The labels in front of a domain; `None` for a name outside of it.
fn strip_domain<'a, 'b>(labels: &'a [&'b str], domain: &str) -> Option<&'a [&'b str]> {
    let n_labels = domain.split('.').count();
    let (below, rest) = labels.split_at_checked(labels.len().checked_sub(n_labels)?)?;
    rest.iter().copied().eq(domain.split('.')).then_some(below)
}

/// The address of a name below `in-addr.arpa` or `ip6.arpa` (RFC 1035, 3.5; RFC 3596, 2.5).
fn reversed(labels: &[&str]) -> Option<IpAddr> {
    match labels {
        [a, b, c, d, "in-addr", "arpa"] => format!("{d}.{c}.{b}.{a}").parse().ok().map(IpAddr::V4),
        [nibbles @ .., "ip6", "arpa"] if nibbles.len() == 32 => {
            let mut value = 0_u128;
            for nibble in nibbles.iter().rev() {
                let digit = u128::from_str_radix(nibble, 16).ok().filter(|_| nibble.len() == 1)?;
                value = value << 4 | digit;
            }
            Some(IpAddr::V6(value.into()))
        }
        _ => None,
    }
}

fn protocol(label: &str) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|protocol| {
        label.strip_prefix('_').is_some_and(|name| protocol.to_string().eq_ignore_ascii_case(name))
    })
}

fn place<'a>(below: &[&'a str]) -> Place<'a> {
    let key = |service: &str, namespace: &str| ServiceKey::new(namespace, service);
    match *below {
        [] => Place::Apex,
        ["dns"] => Place::NameServers,
        ["ns", "dns"] => Place::NameServer,
        ["dns-version"] => Place::Version,
        ["svc" | "pod"] => Place::Kind,
        [namespace, "svc"] => Place::Namespace(namespace),
        [service, namespace, "svc"] => Place::Service(key(service, namespace)),
        [label, service, namespace, "svc"] => match protocol(label) {
            Some(protocol) => Place::ServiceProtocol(protocol, key(service, namespace)),
            None => Place::Endpoint(label, key(service, namespace)),
        },
        [port, label, service, namespace, "svc"] => match (port.strip_prefix('_'), protocol(label)) {
            (Some(port), Some(protocol)) => Place::Port(port, protocol, key(service, namespace)),
            _ => Place::Nowhere,
        },
        [_, "pod"] => Place::PodNamespace,
        [pod, _, "pod"] => Place::Pod(pod),
        _ => Place::Nowhere,
    }
}

impl RecordData {
    const fn record_type(&self) -> RecordType {
        match self {
            Self::A(_) => RecordType::A,
            Self::Aaaa(_) => RecordType::Aaaa,
            Self::Cname(_) => RecordType::Cname,
            Self::Ns(_) => RecordType::Ns,
            Self::Ptr(_) => RecordType::Ptr,
            Self::Soa(_) => RecordType::Soa,
            Self::Srv { .. } => RecordType::Srv,
            Self::Txt(_) => RecordType::Txt,
        }
    }
}

#[cfg(test)]
mod tests;
