//! Lists and watches of a server without faults.

use std::time::Duration;

use lb_agent::source::{Source as _, cluster::Selection};
use lb_core::model::ingest;
use lb_tests::{
    apiserver::{ApiServer, Kind},
    cluster::{self, PortOf},
};

use crate::follower::{ALL, Follower, NODE, TIMING, cluster, endpoints, server_of, trigger_now};

/// Other Nodes are many, large, and change constantly.
#[test]
fn only_the_own_node_is_read() {
    let server = ApiServer::start();
    let mut objects = cluster(3);
    let mut large = cluster::node("other-1", &["192.0.2.3".parse().unwrap()]);
    large.metadata.annotations = Some([("example.com/images".to_owned(), "x".repeat(20_000))].into());
    objects.set(large.clone());
    server.set(&objects);
    let mut follower =
        Follower::start_with(&server, Selection { other_nodes: false, pods: false, ..ALL }, TIMING);
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
    let server = server_of(&cluster(3));
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
    let (server, mut follower) = Follower::of_services(2);
    let mut objects = cluster(2);
    assert_eq!(follower.source.take_arrivals(), []);
    objects.set_endpoints(&PortOf::tcp("web-1"), &endpoints(1, 2));
    trigger_now(&mut objects);
    server.set(&objects);
    follower.until_like(&server);
    let arrivals = follower.source.take_arrivals();
    assert_eq!(arrivals.len(), 1, "the other slice has the same endpoints as before");
    assert!(arrivals[0].triggered.is_some());
}

/// Their endpoints have names and no frontends: without `--names` they are not requested.
#[test]
fn headless_slices_are_read_for_names_alone() {
    let server = ApiServer::start();
    let mut objects = cluster(1);
    let mut slices = cluster::slices(&PortOf::tcp("pets"), &endpoints(9, 1));
    for slice in &mut slices {
        slice.metadata.labels.get_or_insert_default().insert(ingest::HEADLESS.to_owned(), String::new());
        objects.set(slice.clone());
    }
    objects.set(cluster::with_spec(cluster::service("pets", &[], &[]), |spec| {
        spec.cluster_ip = Some("None".to_owned());
        spec.cluster_ips = Some(vec!["None".to_owned()]);
    }));
    server.set(&objects);
    for names in [false, true] {
        let mut follower = Follower::start_with(&server, Selection { names, ..ALL }, TIMING);
        follower.until("the other service is served", |follower| follower.n_frontends() == 1);
        let n_found = |follower: &Follower| follower.state.store().slices_of(&cluster::key("pets")).count();
        assert_eq!(n_found(&follower), usize::from(names), "names: {names}");
        if names {
            for slice in &slices {
                server.delete(Kind::Slice, cluster::NAMESPACE, slice.metadata.name.as_deref().unwrap());
            }
            follower.until("it is gone", |follower| n_found(follower) == 0);
        }
        assert_eq!((follower.n_frontends(), follower.source.issues()), (1, vec![]), "names: {names}");
    }
}
