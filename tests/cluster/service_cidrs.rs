//! The networks of cluster IPs: ServiceCIDRs of servers that have them, lack them, or refuse them; and
//! cluster IPs of other proxies.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Service;
use lb_agent::source::{Source as _, cluster::Selection};
use lb_core::model::{Protocol::Tcp, ingest};
use lb_kernel::Features;
use lb_tests::{
    Sandbox,
    apiserver::{ApiServer, Kind},
    cluster::{self, NAMESPACE, service_cidr},
    controlplane::servers,
};
use nix::errno::Errno;

use crate::follower::{ALL, Follower, InKernel, TIMING, cluster, server_of, service_address};

fn networks(follower: &Follower) -> Vec<String> {
    follower.image.service_cidrs.iter().map(ToString::to_string).collect()
}

/// A server with services and a ServiceCIDR.
fn with_network(n_services: usize) -> ApiServer {
    server_of(&cluster(n_services).with([service_cidr("kubernetes", &["10.96.0.0/12"])]))
}

/// Steps until these networks are in force.
fn until_networks(follower: &mut Follower, wanted: &[&str]) {
    follower.until(&format!("{wanted:?} are in force"), |follower| networks(follower) == wanted);
}

/// A Service with its own address and this proxy label.
fn labelled(name: &str, ip: IpAddr, proxy: Option<&str>) -> Service {
    let mut service = cluster::service(name, &[ip], &[cluster::port("", Tcp, 80)]);
    let label = |proxy: &str| (ingest::SERVICE_PROXY_NAME.to_owned(), proxy.to_owned());
    service.metadata.labels = proxy.map(|proxy| [label(proxy)].into());
    service
}

#[test]
fn service_cidrs_are_in_force_while_they_are_there() {
    for server in servers() {
        let server = &*server;
        let mut follower = Follower::start(server);
        follower.until_like(server);
        let before = networks(&follower);
        let with = |more: &[&str]| -> Vec<String> {
            before.iter().cloned().chain(more.iter().map(|&network| network.to_owned())).collect()
        };
        server.apply(service_cidr("more", &["10.200.0.0/24"]).into());
        follower.until("it is in force", |follower| networks(follower) == with(&["10.200.0.0/24"]));
        server.apply(service_cidr("most", &["10.201.0.0/24"]).into());
        follower
            .until("both are", |follower| networks(follower) == with(&["10.200.0.0/24", "10.201.0.0/24"]));
        server.delete(Kind::ServiceCidr, "", "more");
        follower.until("one is deleted", |follower| networks(follower) == with(&["10.201.0.0/24"]));
        server.delete(Kind::ServiceCidr, "", "most");
        follower.until("both are", |follower| networks(follower) == before);
        follower.until_like(server);
    }
}

/// No verdict before everything is listed: otherwise the address of a Service that is not known yet would be
/// unreachable.
#[test]
fn no_network_is_in_force_before_all_services_are_known() {
    let server = with_network(3);
    server.set_faults(|faults| faults.delay = Duration::from_millis(300));
    let mut follower = Follower::start(&server);
    let mut n_looks = 0;
    while networks(&follower).is_empty() {
        follower.step();
        assert!(networks(&follower).is_empty() || follower.image.cluster_ips.len() == 3);
        n_looks += 1;
        assert!(n_looks < 5000, "no network");
    }
    follower.until_like(&server);
}

/// Kubernetes before 1.33, and after an upgrade.
#[test]
fn a_server_without_service_cidrs_is_served_as_ever() {
    let mut server = with_network(3);
    let knows = |server: &ApiServer, knows: bool| {
        server.set_faults(|faults| faults.unknown = (!knows).then_some(Kind::ServiceCidr));
    };
    knows(&server, false);
    let mut follower = Follower::start(&server);
    let is_served = |follower: &Follower| follower.source.is_complete() && follower.n_frontends() == 3;
    follower.until("the services are served", is_served);
    assert_eq!((networks(&follower).len(), follower.source.issues().len()), (0, 0));
    let contact = |follower: &Follower| follower.source.contact().unwrap().clone();
    assert_eq!(contact(&follower).outage(), None);
    let kinds: Vec<_> = contact(&follower).ages(Instant::now()).into_iter().map(|(kind, _)| kind).collect();
    assert!(!kinds.contains(&"servicecidrs"), "the missing kind has no answer age: {kinds:?}");

    // The server's version changes, without an outage and during one.
    knows(&server, true);
    until_networks(&mut follower, &["10.96.0.0/12"]);
    knows(&server, false);
    server.cut_watches();
    until_networks(&mut follower, &[]);
    server.stop();
    follower.until("the outage is reported", |follower| contact(follower).outage().is_some());
    server.resume().unwrap();
    follower.until("its end is reported", |follower| contact(follower).outage().is_none());
    assert_eq!(networks(&follower).len(), 0);
    knows(&server, true);
    until_networks(&mut follower, &["10.96.0.0/12"]);
    follower.until_like(&server);
}

/// A server that lacks them is queried rarely.
#[test]
fn what_a_server_does_not_have_is_asked_for_rarely() {
    let server = server_of(&cluster(1));
    server.set_faults(|faults| faults.unknown = Some(Kind::ServiceCidr));
    let mut follower = Follower::start(&server);
    follower.until("the service is served", |follower| follower.n_frontends() == 1);
    let before = server.requests().unknown;
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(1) {
        follower.step();
    }
    // At most once per 200 ms.
    let n_asked = server.requests().unknown - before;
    assert!((2..=6).contains(&n_asked), "{n_asked}");
}

/// As with the RBAC rules of an older version.
#[test]
fn a_missing_rule_is_an_issue_and_everything_is_served() {
    let server = with_network(3);
    let forbid = |kind: Option<Kind>| {
        server.set_faults(|faults| faults.forbidden = kind);
        server.cut_watches();
    };
    forbid(Some(Kind::ServiceCidr));
    let mut follower = Follower::start(&server);
    follower.until("the issue is known", |follower| {
        follower.source.is_complete() && follower.source.issues().len() == 1
    });
    let issue = follower.source.issues().remove(0).to_string();
    assert!(
        issue.starts_with("Node node: ServiceCIDRs cannot be read")
            && issue.contains("403 Forbidden: servicecidrs is forbidden")
            && issue.contains("manifests/base/clusterrole.yaml"),
        "{issue}"
    );
    follower.until("the services are served", |follower| follower.n_frontends() == 3);
    assert_eq!(follower.source.contact().unwrap().outage(), None);
    assert_eq!(networks(&follower).len(), 0);
    server.delete(Kind::Service, NAMESPACE, "web-0");
    follower.until("changes are followed", |follower| follower.n_frontends() == 2);

    forbid(None);
    until_networks(&mut follower, &["10.96.0.0/12"]);
    assert_eq!(follower.source.issues(), []);
    // When the rule is removed, the known ones stay.
    forbid(Some(Kind::ServiceCidr));
    follower.until("the issue is back", |follower| follower.source.issues().len() == 1);
    assert_eq!(networks(&follower), ["10.96.0.0/12"]);
    forbid(None);
    follower.until("it is over", |follower| follower.source.issues().is_empty());
    follower.until_like(&server);
}

/// Any other error of ServiceCIDRs alone does not stop services from being served.
#[test]
fn an_object_that_cannot_be_read_is_an_issue() {
    let server = server_of(&cluster(1).with([service_cidr("wrong", &["10.96.0.0/12", "0.0.0.0/0"])]));
    let mut follower = Follower::start(&server);
    until_networks(&mut follower, &["10.96.0.0/12"]);
    let issue = follower.source.issues().remove(0).to_string();
    assert!(issue.starts_with("ServiceCIDR wrong: spec.cidrs[1]: \"0.0.0.0/0\" is too large"), "{issue}");
    server.delete(Kind::ServiceCidr, "", "wrong");
    until_networks(&mut follower, &[]);
    assert_eq!(follower.source.issues(), []);
}

/// With `--service-cidr=none` no ServiceCIDRs are read.
#[test]
fn without_networks_nothing_more_is_read() {
    let server = ApiServer::start();
    let ip = service_address(9).ip();
    server.set(&cluster(1).with([service_cidr("kubernetes", &["10.96.0.0/12"])]));
    server.apply(labelled("theirs", ip, Some("other")));
    server.set_faults(|faults| faults.forbidden = Some(Kind::ServiceCidr));
    let mut follower = Follower::start_with(&server, Selection { service_cidrs: false, ..ALL }, TIMING);
    follower.until("the service is served", |follower| follower.n_frontends() == 1);
    assert_eq!((follower.source.issues(), networks(&follower).len()), (vec![], 0));
    assert_eq!(follower.state.store().services().len(), 1, "those of other proxies are not requested");
}

/// A change of the label is one event, so that the address always has a Service.
#[test]
fn addresses_of_other_proxies_are_known_and_their_slices_are_not_read() {
    let server = ApiServer::start();
    let ip = service_address(9).ip();
    let mut objects = cluster(1).with([service_cidr("kubernetes", &["10.96.0.0/12"])]);
    objects.set(labelled("theirs", ip, Some("other")));
    let endpoint = "10.1.0.9:8080".parse().unwrap();
    for mut slice in cluster::slices(&cluster::PortOf::tcp("theirs"), &[endpoint]) {
        let labels = slice.metadata.labels.get_or_insert_default();
        labels.insert(ingest::SERVICE_PROXY_NAME.to_owned(), "other".to_owned());
        objects.set(slice);
    }
    server.set(&objects);
    let mut follower = Follower::start(&server);
    until_networks(&mut follower, &["10.96.0.0/12"]);
    assert_eq!(follower.image.cluster_ips.get(&ip), Some(&false));
    assert!(follower.state.store().slices().all(|slice| &*slice.service.name != "theirs"));
    for (proxy, flag) in [(None, true), (Some("other"), false), (Some("third"), false), (None, true)] {
        server.apply(labelled("theirs", ip, proxy));
        follower.until(&format!("{proxy:?} is followed"), |follower| {
            let found = follower.image.cluster_ips.get(&ip).copied();
            assert!(found.is_some(), "an address without a Service");
            found == Some(flag) && !follower.state.needs_sync()
        });
    }
    server.delete(Kind::Service, NAMESPACE, "theirs");
    follower.until("it is deleted", |follower| !follower.image.cluster_ips.contains_key(&ip));
    follower.until_like(&server);
}

/// In the kernel: the unreachable addresses follow the objects, and another proxy's addresses pass.
#[test]
fn calls_follow_service_cidrs() {
    Sandbox::test(|sandbox| {
        let server = ApiServer::start();
        let [ours, theirs, none] = [0, 1, 2].map(service_address);
        server.apply(labelled("ours", ours.ip(), None));
        server.apply(labelled("theirs", theirs.ip(), Some("other")));
        let mut agent = InKernel::start(sandbox, &server);
        let mut until = |[of_ours, of_theirs, of_none]: [Errno; 3]| {
            agent.until(&[(ours, Err(of_ours)), (theirs, Err(of_theirs)), (none, Err(of_none))])
        };
        // There is no route: a call that passes fails with another error.
        let (refused, untouched) = (Errno::ECONNREFUSED, Errno::ENETUNREACH);
        let unreachable = if Features::probe().set_retval { Errno::EHOSTUNREACH } else { untouched };
        until([refused, untouched, untouched]);
        server.apply(service_cidr("kubernetes", &["10.96.0.0/12"]));
        until([refused, untouched, unreachable]);
        server.apply(labelled("theirs", theirs.ip(), None));
        until([refused, refused, unreachable]);
        server.apply(labelled("theirs", theirs.ip(), Some("other")));
        until([refused, untouched, unreachable]);
        server.delete(Kind::ServiceCidr, "", "kubernetes");
        until([refused, untouched, untouched]);
    });
}
