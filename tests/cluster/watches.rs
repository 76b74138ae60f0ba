//! Lists and watches of a server without faults.

use std::time::Duration;

use lb_agent::source::Source as _;
use lb_core::model::ingest;
use lb_tests::{
    apiserver::{ApiServer, Kind},
    cluster::{self, PortOf},
};

use crate::follower::{Follower, N_KINDS, NODE, cluster, endpoints};

#[test]
fn everything_is_listed_and_followed() {
    let server = ApiServer::start();
    let mut objects = cluster(40);
    server.set(&objects);
    let mut follower = Follower::start(&server);
    follower.until_like(&server);
    assert_eq!(follower.n_frontends(), 40);
    for n_endpoints in [1, 4, 0, 2] {
        objects.set_endpoints(&PortOf::tcp("web-7"), &endpoints(7, n_endpoints));
        server.set(&objects);
        follower.until_like(&server);
    }
    server.delete(Kind::Service, cluster::NAMESPACE, "web-7");
    follower.until_like(&server);
    assert_eq!(follower.n_frontends(), 39);
    server.delete(Kind::Node, "", "other");
    follower.until_like(&server);
    assert_eq!(server.requests().lists, N_KINDS, "one list of each kind");
}

/// Other Nodes are many, large, and change constantly.
#[test]
fn only_the_own_node_is_read() {
    let server = ApiServer::start();
    let mut objects = cluster(3);
    let mut large = cluster::node("other-1", &["192.0.2.3".parse().unwrap()]);
    large.metadata.annotations = Some([("example.com/images".to_owned(), "x".repeat(20_000))].into());
    objects.set(large.clone());
    server.set(&objects);
    let mut follower = Follower::of_own_node(&server);
    follower.until("everything is served", |follower| follower.n_frontends() == 3);
    let nodes = |follower: &Follower| -> Vec<String> {
        follower.state.store().nodes().map(|node| node.name.to_string()).collect()
    };
    assert_eq!(nodes(&follower), [NODE]);
    large.metadata.labels = Some([("changed".to_owned(), "yes".to_owned())].into());
    server.apply(large);
    server.delete(Kind::Node, "", NODE);
    follower.until("the own node is followed", |follower| nodes(follower).is_empty());
    let octets = server.requests().octets;
    assert!(octets < 20_000, "{octets} bytes were read");
}

/// An older server refuses streaming lists; its list of many objects is complete too.
#[test]
fn a_server_without_streaming_lists_is_listed() {
    let mut server = ApiServer::start();
    server.set_faults(|faults| faults.has_streaming_lists = false);
    server.set(&cluster(600));
    let mut follower = Follower::start(&server);
    follower.until_like(&server);
    assert_eq!(follower.n_frontends(), 600);
    // Uncompressed it would be about 700 KB.
    let octets = server.requests().octets;
    assert!(octets < 200_000, "{octets} bytes: the lists were not compressed");
    // A list of the latest state is paged.
    server.restart_at_version(5000);
    server.set(&cluster(550));
    server.expire();
    follower.until_like(&server);
    assert_eq!(follower.n_frontends(), 550);
}

#[test]
fn nothing_is_served_before_all_lists_are_complete() {
    let server = ApiServer::start();
    server.set(&cluster(3));
    server.set_faults(|faults| faults.delay = Duration::from_millis(300));
    let mut follower = Follower::start(&server);
    for _ in 0..10 {
        follower.step();
        assert!(follower.source.is_complete() || follower.n_frontends() == 0);
    }
    follower.until_like(&server);
}

/// A change from an event is timed; objects of a list are not.
#[test]
fn events_are_timed() {
    let server = ApiServer::start();
    let mut objects = cluster(2);
    server.set(&objects);
    let mut follower = Follower::start(&server);
    follower.until_like(&server);
    assert_eq!(follower.source.take_arrivals(), []);
    objects.set_endpoints(&PortOf::tcp("web-1"), &endpoints(1, 2));
    let mut slices = objects.slices.clone();
    for slice in slices.values_mut() {
        let annotations = slice.metadata.annotations.get_or_insert_default();
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        annotations.insert(ingest::TRIGGER_TIME.to_owned(), now);
    }
    objects.slices = slices;
    server.set(&objects);
    follower.until_like(&server);
    let arrivals = follower.source.take_arrivals();
    assert_eq!(arrivals.len(), 1, "the other slice has the same endpoints as before");
    assert!(arrivals[0].triggered.is_some());
}
