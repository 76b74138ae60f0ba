//! curl through a service.

use std::collections::BTreeSet;

use lb_tests::command::{run, text};

use crate::town::{self, with_served_town};

/// Fetches pages and returns the peer of the connection, as curl sees it.
fn curl(urls: &[&str]) -> String {
    let mut args =
        vec!["--silent", "--show-error", "--max-time", "30", "--write-out", "%{remote_ip} %{remote_port}\n"];
    args.extend(urls);
    text("curl", &args)
}

#[test]
fn pages_come_from_every_pod() {
    with_served_town("curl", 2, |town, agent| {
        for (family, service) in town::web().into_iter().enumerate() {
            let url = format!("http://{service}/");
            let fetched: BTreeSet<String> = (0..40).map(|_| curl(&[&url])).collect();
            // The pod sees the node's address of the route to it: nothing translates the source.
            let expected = town.pods.iter().map(|pod| {
                let (server, client) = (pod.ips[family], pod.gateways[family]);
                format!("{server} for {client}\n{} {}", service.ip(), service.port())
            });
            assert_eq!(fetched, expected.collect());
        }
        agent.follow(&town.cluster(1..2));
        for _ in 0..10 {
            let page = curl(&[&format!("http://{}/", town::web()[0])]);
            assert!(page.starts_with(&town.pods[1].ips[0].to_string()), "{page}");
        }
    });
}

/// Several requests over one connection reach one pod.
#[test]
fn a_connection_stays_with_its_pod() {
    with_served_town("curl", 2, |_town, _agent| {
        let url = format!("http://{}/", town::web()[0]);
        let pages = curl(&[&*url; 10]);
        let servers: BTreeSet<&str> = pages.lines().filter(|line| line.contains(" for ")).collect();
        assert_eq!(servers.len(), 1, "{pages}");
    });
}

/// A pod that calls its own service may reach itself.
#[test]
fn a_pod_reaches_itself_through_its_service() {
    with_served_town("curl", 1, |town, _agent| {
        let pod = &town.pods[0];
        for (family, service) in town::web().into_iter().enumerate() {
            let page = pod.netns.run(|| curl(&[&format!("http://{service}/")]));
            let ip = pod.ips[family];
            assert_eq!(page, format!("{ip} for {ip}\n{} {}", service.ip(), service.port()));
        }
    });
}

#[test]
fn a_service_without_pods_is_refused_at_once() {
    with_served_town("curl", 0, |_town, _agent| {
        let output = run("curl", &["--silent", "--show-error", &format!("http://{}/", town::empty())]);
        // "Failed to connect", not "timeout".
        assert_eq!(output.status.code(), Some(7), "{output:?}");
    });
}
