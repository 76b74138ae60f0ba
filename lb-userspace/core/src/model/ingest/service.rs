use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use k8s_openapi::{api::core::v1 as api, apimachinery::pkg::apis::meta::v1::ObjectMeta};

use super::{ANNOTATION_PREFIX, IssueCollector, invalid_name, is_domain, is_label, namespace};
use crate::model::{
    Cidr, Family, Issue, IssueKind, NamesOnly, ObjectRef, Protocol, Service, ServiceKey, ServicePort,
    ServiceType, TrafficPolicy, address,
    annotation::{self, BALANCE, Balance, EXCLUDE, HEALTH, SLOW_START, STALE_CONNECTIONS, StaleConnections},
};

/// Default idle time-out of client affinity, seconds (`pkg/apis/core/v1/defaults.go`).
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// The longest idle time-out that the API accepts, seconds.
const MAX_AFFINITY_SECONDS: u32 = 86_400;

/// Ingests a Service (`pkg/proxy/serviceport.go`).
///
/// `None` without an issue for a headless Service and for type `ExternalName`. Ignores the labels of
/// [`super::is_selected`]; [`any_service`] reads them.
#[must_use]
pub fn service(object: &api::Service) -> (Option<Service>, Vec<Issue>) {
    let metadata = &object.metadata;
    let (key, mut report) = key_and_report(metadata);
    if !report.is_named() || is_names_only(object) {
        return (None, report.issues);
    }
    let empty = api::ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&empty);
    if spec.cluster_ip.as_deref().unwrap_or_default().is_empty() {
        report.add(IssueKind::NoClusterIp);
        return (None, report.issues);
    }
    let (cluster_ipv4, cluster_ipv6) = cluster_ips(&mut report, spec);
    if cluster_ipv4.is_none() && cluster_ipv6.is_none() {
        return (None, report.issues);
    }
    let service_type = report.word(
        "spec.type",
        spec.type_.as_deref(),
        &[
            ("ClusterIP", ServiceType::ClusterIP),
            ("NodePort", ServiceType::NodePort),
            ("LoadBalancer", ServiceType::LoadBalancer),
        ],
        ServiceType::ClusterIP,
    );
    let (source_ranges, has_unreadable_source_range) = source_ranges(&mut report, spec);
    let external_ips = external_ips(&mut report, spec);
    let external_policy = external_policy(&mut report, spec, service_type);
    let service = Service {
        created: metadata.creation_timestamp.as_ref().map(|time| time.0.as_second()),
        service_type,
        cluster_ipv4,
        cluster_ipv6,
        external_ips,
        load_balancer_ips: load_balancer_ips(&mut report, object.status.as_ref()),
        source_ranges,
        has_unreadable_source_range,
        internal_policy: report.word(
            "spec.internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
            &[("Cluster", TrafficPolicy::Cluster), ("Local", TrafficPolicy::Local)],
            TrafficPolicy::Cluster,
        ),
        external_policy,
        affinity_seconds: affinity_seconds(&mut report, spec),
        health_check_node_port: health_check_node_port(&mut report, spec, service_type, external_policy),
        ports: ports(&mut report, spec.ports.as_deref().unwrap_or_default(), service_type),
        annotations: metadata
            .annotations
            .iter()
            .flatten()
            .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        unselected: None,
        names_only: None,
        key,
    };
    if service.ports.is_empty() {
        report.add(IssueKind::NoPorts);
    }
    report_annotations(&mut report, &service);
    (Some(service), report.issues)
}

/// As [`service`], if the labels select the Service. Otherwise it holds only what [`Service::unselected`]
/// promises, and has no issues. A Service without cluster IPs holds what [`Service::names_only`] promises,
/// whatever its labels.
#[must_use]
pub fn any_service(object: &api::Service, service_proxy_name: Option<&str>) -> (Option<Service>, Vec<Issue>) {
    let unselected = super::unselected(object.metadata.labels.as_ref(), service_proxy_name);
    if is_names_only(object) {
        let (service, issues) = names_only(object);
        return (service, if unselected.is_none() { issues } else { Vec::new() });
    }
    if unselected.is_none() {
        return service(object);
    }
    let (service, _issues) = service(object);
    let service = service.map(|Service { key, cluster_ipv4, cluster_ipv6, .. }| Service {
        cluster_ipv4,
        cluster_ipv6,
        unselected,
        ..Service::with_ports(key, Vec::new())
    });
    (service, Vec::new())
}

fn key_and_report(metadata: &ObjectMeta) -> (ServiceKey, IssueCollector) {
    let name = metadata.name.as_deref().unwrap_or_default();
    let key = ServiceKey::new(namespace(metadata.namespace.as_deref()), name);
    let report = IssueCollector::new(ObjectRef::from(&key));
    (key, report)
}

fn is_external(spec: &api::ServiceSpec) -> bool {
    spec.type_.as_deref() == Some("ExternalName")
}

/// Whether a Service is headless or of type `ExternalName`.
fn is_names_only(object: &api::Service) -> bool {
    let spec = object.spec.as_ref();
    spec.is_some_and(|spec| is_external(spec) || spec.cluster_ip.as_deref() == Some("None"))
}

/// Ingests a Service without cluster IPs.
fn names_only(object: &api::Service) -> (Option<Service>, Vec<Issue>) {
    let (key, mut report) = key_and_report(&object.metadata);
    if !report.is_named() {
        return (None, report.issues);
    }
    let empty = api::ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&empty);
    let kind = if is_external(spec) {
        let text = spec.external_name.as_deref().unwrap_or_default();
        let name = text.trim_end_matches('.').to_ascii_lowercase();
        // Labels of names in DNS may have underscores, which those of objects may not (RFC 2181, 11).
        if !is_domain(&name.replace('_', "x")) {
            report.add(invalid_name("spec.externalName", text, "its name"));
            return (None, report.issues);
        }
        NamesOnly::External(name.into())
    } else {
        NamesOnly::Headless { publishes_not_ready: spec.publish_not_ready_addresses.unwrap_or(false) }
    };
    let service_ports = ports(&mut report, spec.ports.as_deref().unwrap_or_default(), ServiceType::ClusterIP);
    let service = Service { names_only: Some(kind), ..Service::with_ports(key, service_ports) };
    (Some(service), report.issues)
}

/// Reports invalid annotations; they are ignored.
fn report_annotations(report: &mut IssueCollector, service: &Service) {
    let unread = |key, is_read: fn(&str) -> bool| service.annotation(key).filter(|value| !is_read(value));
    let stale = unread(STALE_CONNECTIONS, |value| StaleConnections::parse(value).is_some());
    let exclude = unread(EXCLUDE, |value| annotation::excludes(value).is_some());
    let health = unread(HEALTH, |value| annotation::health(value).is_some());
    let balance = unread(BALANCE, |value| Balance::parse(value).is_some());
    let slow_start = unread(SLOW_START, |value| annotation::slow_start(value).is_some());
    for (key, value, expected) in [
        (BALANCE, balance, "random or least-connections"),
        (HEALTH, health, "off, or failures=1-255,base=DURATION,max=DURATION with 1s to 1h"),
        (SLOW_START, slow_start, "1s to 1h"),
        (STALE_CONNECTIONS, stale, "keep, reset or drain=DURATION, such as drain=30s"),
        (EXCLUDE, exclude, "true or false"),
    ] {
        if let Some(value) = value {
            report.add(IssueKind::UnknownValue {
                field: format!("metadata.annotations[{key}]"),
                value: value.to_owned(),
                used: format!("absent (expected {expected})"),
            });
        }
    }
    let has_tcp = service.ports.iter().any(|port| port.protocol == Protocol::Tcp);
    if service.balance() == Balance::LeastConnections && !has_tcp {
        report.add(IssueKind::NoTcpPort { field: format!("metadata.annotations[{BALANCE}]") });
    }
}

/// The cluster IP of each family, by the rule of `GetClusterIPByFamily` (`pkg/proxy/util/utils.go`): the
/// index of the family in `ipFamilies` picks from `clusterIPs`; without `ipFamilies`, `clusterIP` counts for
/// its own family.
fn cluster_ips(report: &mut IssueCollector, spec: &api::ServiceSpec) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let (mut v4, mut v6) = (None, None);
    if families.is_empty() {
        let text = spec.cluster_ip.as_deref().unwrap_or_default();
        match service_address(report, || "spec.clusterIP".to_owned(), text) {
            Some(IpAddr::V4(ip)) => v4 = Some(ip),
            Some(IpAddr::V6(ip)) => v6 = Some(ip),
            None => {}
        }
        return (v4, v6);
    }
    for family in [Family::V4, Family::V6] {
        let name = address::family_name(family);
        let Some(index) = families.iter().position(|listed| listed == name) else {
            continue;
        };
        let Some(text) = listed.get(index) else {
            continue;
        };
        let field = || format!("spec.clusterIPs[{index}]");
        match (family, service_address(report, field, text)) {
            (Family::V4, Some(IpAddr::V4(ip))) => v4 = Some(ip),
            (Family::V6, Some(IpAddr::V6(ip))) => v6 = Some(ip),
            (_, Some(_)) => report.add(IssueKind::WrongFamily {
                field: field(),
                value: text.clone(),
                expected: name.to_owned(),
            }),
            (_, None) => {}
        }
    }
    (v4, v6)
}

/// Reads an address that a frontend may have.
fn service_address(
    report: &mut IssueCollector,
    field: impl FnOnce() -> String,
    text: &str,
) -> Option<IpAddr> {
    let Some(ip) = address::parse_ip(text) else {
        report.add(IssueKind::InvalidAddress { field: field(), value: text.to_owned() });
        return None;
    };
    if let Some(range) = address::special_range(ip) {
        let range = range.to_owned();
        report.add(IssueKind::SpecialAddress { field: field(), value: text.to_owned(), range });
        return None;
    }
    Some(ip)
}

fn external_ips(report: &mut IssueCollector, spec: &api::ServiceSpec) -> BTreeSet<IpAddr> {
    let listed = spec.external_ips.as_deref().unwrap_or_default().iter().enumerate();
    listed
        .filter(|(_, text)| !text.is_empty())
        .filter_map(|(index, text)| service_address(report, || format!("spec.externalIPs[{index}]"), text))
        .collect()
}

/// The load-balancer addresses that the node may serve itself. With `ipMode: Proxy`, or a host name instead
/// of an address, calls must go to the load balancer (KEP-1860).
fn load_balancer_ips(report: &mut IssueCollector, status: Option<&api::ServiceStatus>) -> BTreeSet<IpAddr> {
    let balancer = status.and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
    let mut ips = BTreeSet::new();
    for (index, ingress) in ingress.iter().enumerate() {
        let Some(text) = ingress.ip.as_deref().filter(|text| !text.is_empty()) else {
            continue;
        };
        match ingress.ip_mode.as_deref() {
            None | Some("VIP") => {}
            Some("Proxy") => continue,
            Some(value) => {
                report.add(IssueKind::UnknownValue {
                    field: format!("status.loadBalancer.ingress[{index}].ipMode"),
                    value: value.to_owned(),
                    used: "Proxy".to_owned(),
                });
                continue;
            }
        }
        ips.extend(service_address(report, || format!("status.loadBalancer.ingress[{index}].ip"), text));
    }
    ips
}

fn source_ranges(report: &mut IssueCollector, spec: &api::ServiceSpec) -> (BTreeSet<Cidr>, bool) {
    let listed = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    let (mut ranges, mut has_unreadable) = (BTreeSet::new(), false);
    for (index, text) in listed.iter().enumerate() {
        if let Some(range) = address::parse_cidr(text.trim()) {
            ranges.insert(range);
        } else {
            has_unreadable = true;
            let field = format!("spec.loadBalancerSourceRanges[{index}]");
            report.add(IssueKind::InvalidNetwork { field, value: text.clone() });
        }
    }
    (ranges, has_unreadable)
}

/// `Local` applies only to Services with external addresses (`ExternalPolicyLocal` in
/// `pkg/api/v1/service/util.go`).
fn external_policy(
    report: &mut IssueCollector,
    spec: &api::ServiceSpec,
    service_type: ServiceType,
) -> TrafficPolicy {
    let policy = report.word(
        "spec.externalTrafficPolicy",
        spec.external_traffic_policy.as_deref(),
        &[("Cluster", TrafficPolicy::Cluster), ("Local", TrafficPolicy::Local)],
        TrafficPolicy::Cluster,
    );
    let has_external_ips = spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
    if service_type == ServiceType::ClusterIP && !has_external_ips { TrafficPolicy::Cluster } else { policy }
}

fn affinity_seconds(report: &mut IssueCollector, spec: &api::ServiceSpec) -> Option<u32> {
    let words = [("None", false), ("ClientIP", true)];
    if !report.word("spec.sessionAffinity", spec.session_affinity.as_deref(), &words, false) {
        return None;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(value) = config.and_then(|config| config.timeout_seconds) else {
        return Some(DEFAULT_AFFINITY_SECONDS);
    };
    let used = match u32::try_from(value) {
        Ok(seconds @ 1..=MAX_AFFINITY_SECONDS) => return Some(seconds),
        Ok(0) | Err(_) => DEFAULT_AFFINITY_SECONDS,
        Ok(_) => MAX_AFFINITY_SECONDS,
    };
    report.add(IssueKind::OutOfRange {
        field: "spec.sessionAffinityConfig.clientIP.timeoutSeconds".to_owned(),
        value: value.into(),
        range: format!("1-{MAX_AFFINITY_SECONDS}"),
        used: used.into(),
    });
    Some(used)
}

fn health_check_node_port(
    report: &mut IssueCollector,
    spec: &api::ServiceSpec,
    service_type: ServiceType,
    external_policy: TrafficPolicy,
) -> Option<u16> {
    if service_type != ServiceType::LoadBalancer || external_policy != TrafficPolicy::Local {
        return None;
    }
    match spec.health_check_node_port {
        None | Some(0) => {
            report.add(IssueKind::NoHealthCheckPort);
            None
        }
        Some(port) => report.port(|| "spec.healthCheckNodePort".to_owned(), port),
    }
}

fn ports(
    report: &mut IssueCollector,
    ports: &[api::ServicePort],
    service_type: ServiceType,
) -> Vec<ServicePort> {
    let mut good: Vec<ServicePort> = Vec::with_capacity(ports.len());
    // An object may list tens of thousands of ports: sets find duplicates, not a linear search.
    let (mut names, mut numbers, mut node_ports) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let number = report.port(|| format!("spec.ports[{index}].port"), port.port);
        let protocol = report.protocol(|| format!("spec.ports[{index}].protocol"), port.protocol.as_deref());
        let (Some(number), Some(protocol)) = (number, protocol) else {
            continue;
        };
        let name = port.name.as_deref().unwrap_or_default();
        if !name.is_empty() && !is_label(name) {
            report.add(invalid_name(&format!("spec.ports[{index}].name"), name, "this port"));
            continue;
        }
        if names.contains(&(protocol, name)) {
            let field = format!("spec.ports[{index}].name");
            report
                .add(IssueKind::DuplicatePort { field, value: format!("the name {name:?} for {protocol}") });
            continue;
        }
        if !numbers.insert((protocol, number)) {
            let field = format!("spec.ports[{index}].port");
            report.add(IssueKind::DuplicatePort { field, value: format!("{protocol} {number}") });
            continue;
        }
        names.insert((protocol, name));
        let node_port = node_port(report, index, port.node_port, service_type, |number| {
            !node_ports.insert((protocol, number))
        });
        good.push(ServicePort { name: name.into(), protocol, port: number, node_port });
    }
    good
}

fn node_port(
    report: &mut IssueCollector,
    index: usize,
    value: Option<i32>,
    service_type: ServiceType,
    is_taken: impl FnOnce(u16) -> bool,
) -> Option<u16> {
    let value = value.filter(|value| *value != 0)?;
    let field = || format!("spec.ports[{index}].nodePort");
    if service_type == ServiceType::ClusterIP {
        report.add(IssueKind::NotApplicable { field: field(), service_type: service_type.to_string() });
        return None;
    }
    let number = report.port(field, value)?;
    if is_taken(number) {
        report.add(IssueKind::DuplicatePort { field: field(), value: number.to_string() });
        return None;
    }
    Some(number)
}
