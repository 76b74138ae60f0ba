//! What holds with every API server: the test server and, if `KUBEBUILDER_ASSETS` names one, a real one.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use k8s_openapi::{
    api::core::v1::{Container, Pod, PodSpec, Service},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use lb_agent::source::{Exclusions as _, Source as _};
use lb_core::model::{Protocol::Tcp, ingest};
use lb_tests::{
    Feature, Sandbox,
    apiserver::{ApiServer, Kind},
    cluster::{Cluster, NAMESPACE, PortOf},
    controlplane::{Api, servers},
    require,
    server::Servers,
};
use nix::errno::Errno;

use crate::follower::{Follower, InKernel, NODE, cluster, endpoints, service_address};

/// Creates or replaces all objects of a cluster.
fn apply(server: &dyn Api, cluster: &Cluster) {
    cluster.services.values().for_each(|service| server.apply(service.clone().into()));
    cluster.slices.values().for_each(|slice| server.apply(slice.clone().into()));
    cluster.nodes.values().for_each(|node| server.apply(node.clone().into()));
    cluster.service_cidrs.values().for_each(|cidr| server.apply(cidr.clone().into()));
}

/// Each service has one address and one port, including the API server's own.
fn is_served(follower: &Follower, server: &dyn Api) {
    assert_eq!(follower.n_frontends(), server.cluster().services.len());
}

#[test]
fn objects_are_listed_and_followed() {
    for server in servers() {
        let server = &*server;
        let mut objects = cluster(10);
        apply(server, &objects);
        let mut follower = Follower::start(server);
        follower.until_like(server);
        is_served(&follower, server);
        for n_endpoints in [1, 4, 2] {
            objects.set_endpoints(&PortOf::tcp("web-7"), &endpoints(7, n_endpoints));
            let of_web_7 = objects.slices.iter().filter(|((_, name), _)| name.starts_with("web-7"));
            of_web_7.for_each(|(_, slice)| server.apply(slice.clone().into()));
            follower.until_like(server);
        }
        server.delete(Kind::Service, NAMESPACE, "web-7");
        follower.until_like(server);
        is_served(&follower, server);
        server.delete(Kind::Node, "", "other");
        follower.until_like(server);
    }
}

/// Toggling a label removes a service from the list and adds it again, without deleting it.
#[test]
fn labels_take_services_away_and_bring_them_back() {
    for server in servers() {
        labels_of(&*server);
    }
}

fn labels_of(server: &dyn Api) {
    let objects = cluster(2);
    apply(server, &objects);
    let mut follower = Follower::start(server);
    follower.until_like(server);
    let n_others = server.cluster().services.len() - 2;
    let service = |labels: &[(&str, &str)]| -> Service {
        let mut service = objects.services.values().next().unwrap().clone();
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        service.metadata.labels = Some(labels.collect());
        service
    };
    for (labels, n_frontends) in [
        (&[(ingest::SERVICE_PROXY_NAME, "other")][..], 1),
        (&[], 2),
        (&[(ingest::HEADLESS, "")], 1),
        (&[("app", "web")], 2),
    ] {
        server.apply(service(labels).into());
        follower.until_like(server);
        assert_eq!(follower.n_frontends(), n_others + n_frontends, "{labels:?}");
    }
}

/// Calls reach the endpoints of the server's objects soon after a change.
#[test]
fn calls_follow_any_api_server() {
    if !require(Feature::Programs) {
        return;
    }
    // Each in its own sandbox: the servers must listen where the agent runs.
    Sandbox::run(|sandbox| calls_follow(sandbox, &ApiServer::start()));
    Sandbox::run(|sandbox| servers().iter().skip(1).for_each(|server| calls_follow(sandbox, &**server)));
}

fn calls_follow(sandbox: &Sandbox, server: &dyn Api) {
    // A real server refuses loopback addresses.
    let pod = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 11));
    sandbox.own([pod]);
    let pods = [8001, 8002].map(|port| SocketAddr::new(pod, port));
    let _servers = Servers::tcp(pods);
    let service = service_address(0);
    let slice = |pods: &[SocketAddr]| {
        // One slice in all states, so that none is deleted.
        let mut slices = lb_tests::cluster::slices(&PortOf::tcp("web"), &pods[..1]);
        slices[0].metadata.name = Some("web-1".to_owned());
        slices.remove(0)
    };
    let mut objects = Cluster::new();
    objects.serve("web", service, Tcp, &[]);
    objects.set(slice(&pods[..1]));
    apply(server, &objects);

    let mut agent = InKernel::start(sandbox, server);
    let mut until = |wanted: Result<SocketAddr, Errno>| agent.until(&[(service, wanted)]);
    until(Ok(pods[0]));
    server.apply(slice(&pods[1..]).into());
    eprintln!("from the change to the first call that sees it: {:?}", until(Ok(pods[1])));
    let mut none = slice(&pods[1..]);
    none.endpoints.clear();
    server.apply(none.into());
    until(Err(Errno::ECONNREFUSED));
    server.delete(Kind::Service, NAMESPACE, "web");
    until(Err(Errno::ENETUNREACH));
}

/// Pods of the agent's own node are excluded while their annotation says so.
#[test]
fn pods_to_exclude_are_followed() {
    for server in servers() {
        pods_of(&*server);
    }
}

fn pods_of(server: &dyn Api) {
    apply(server, &cluster(1));
    let pod = |name: &str, node: &str, exclude: &str| Pod {
        metadata: ObjectMeta {
            namespace: Some(NAMESPACE.to_owned()),
            name: Some(name.to_owned()),
            annotations: Some([("socklb.io/exclude".to_owned(), exclude.to_owned())].into()),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            node_name: Some(node.to_owned()),
            containers: vec![Container {
                name: "main".to_owned(),
                image: Some("none".to_owned()),
                ..Container::default()
            }],
            ..PodSpec::default()
        }),
        ..Pod::default()
    };
    for pod in [pod("one", NODE, "true"), pod("two", NODE, "false"), pod("three", "other", "true")] {
        server.apply_pod(&pod);
    }
    let mut follower = Follower::start(server);
    let n_excluded = |follower: &Follower| follower.source.excluded_pods().map(BTreeSet::len);
    assert_eq!(n_excluded(&follower), None, "nothing is known yet");
    follower.until("one pod is excluded", |follower| n_excluded(follower) == Some(1));

    server.apply_pod(&pod("two", NODE, "true"));
    follower.until("both are", |follower| n_excluded(follower) == Some(2));
    server.delete(Kind::Pod, NAMESPACE, "one");
    server.apply_pod(&pod("two", NODE, "perhaps"));
    follower.until("none is", |follower| n_excluded(follower) == Some(0));
    follower.until("and the issue names the Pod", |follower| {
        follower.source.issues().iter().any(|issue| issue.to_string().contains("Pod default/two"))
    });
    follower.until_like(server);
}
