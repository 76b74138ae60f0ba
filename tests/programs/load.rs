//! Weights, slow start and calls that spill, from manifests to calls.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    net::{SocketAddr, TcpStream},
};

use lb_tests::{
    cluster::{Cluster, object},
    installed::{QUIET, eventually},
};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    socklb::{serve, with_town},
    town::{self, Town},
};

const N_CALLS: usize = 400;

/// How many of [`N_CALLS`] calls of the web service a pod answers.
fn calls_of(town: &Town, pod: usize) -> usize {
    let ip = town.pods[pod].ips[0].to_string();
    (0..N_CALLS).filter(|_| server() == ip).count()
}

/// The pod that answers a call.
fn server() -> String {
    let mut stream = TcpStream::connect(town::web()[0]).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let lines = BufReader::new(stream).lines().map(Result::unwrap);
    let page = lines.skip_while(|line| !line.is_empty()).nth(1).unwrap();
    page.split(' ').next().unwrap().to_owned()
}

/// Two pods, the second one in slices of its own with a weight.
fn weighted(town: &Town, weight: &str) -> Cluster {
    let second = town.cluster(1..2).slices.into_values().map(|mut slice| {
        slice.metadata.name.as_mut().unwrap().push_str("-2");
        slice.metadata.annotations = Some([("socklb.io/weight".to_owned(), weight.to_owned())].into());
        slice
    });
    town.cluster(0..1).with(second)
}

/// Bounds are five standard deviations from three quarters, half and nothing.
#[test]
fn calls_follow_the_weights_of_slices() {
    with_town(|place, town| {
        let agent = serve(place, &weighted(town, "300"), &QUIET);
        let n = calls_of(town, 1);
        assert!((257..=343).contains(&n), "{n} of {N_CALLS}");

        place.write(&weighted(town, "0"));
        eventually("weight 0 gets no call", || calls_of(town, 1) == 0);

        place.write(&weighted(town, "100"));
        eventually("equal weights", || (150..=250).contains(&calls_of(town, 1)));
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

/// It grows for an hour, so that it has not grown when calls are counted.
#[test]
fn a_new_endpoint_begins_with_a_tenth_unless_the_agent_is_new_too() {
    with_town(|place, town| {
        let cluster = |pods| town.cluster(pods).annotated("socklb.io/slow-start", "1h");
        let agent = serve(place, &cluster(0..1), &QUIET);
        place.write(&cluster(0..2));
        let both = BTreeSet::from([0, 1].map(|pod| town.pods[pod].ips[0].to_string()));
        eventually("the new pod is called", || (0..100).map(|_| server()).collect::<BTreeSet<_>>() == both);
        // One of eleven, at most five standard deviations more.
        let n = calls_of(town, 1);
        assert!(n <= 65, "{n} of {N_CALLS}");

        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        let n = calls_of(town, 1);
        assert!(n <= 65, "without an agent: {n} of {N_CALLS}");
        let agent = place.start(&QUIET);
        eventually("the next agent knows no new endpoints", || calls_of(town, 1) >= 150);
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

/// The hints leave an endpoint in that refuses, and one out that answers. The ejection lasts longer than the
/// test.
#[test]
fn calls_spill_over_hints_and_not_over_the_policy_local() {
    const CLOSED: u16 = 9;
    let services = [("hinted", "10.96.0.90", "Cluster"), ("local", "10.96.0.91", "Local")];
    with_town(|place, town| {
        let mut cluster = town.cluster(0..2);
        for (name, ip, policy) in services {
            let annotations = json!({"socklb.io/health": "base=1h,max=1h"});
            let service = json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"namespace": "default", "name": name, "annotations": annotations},
                "spec": {"clusterIP": ip, "internalTrafficPolicy": policy, "ports": [{"port": 80}]},
            });
            cluster.set(object(&service).unwrap());
            for (pod, port, node) in [(0, CLOSED, "node"), (1, town::HTTP, "other")] {
                let slice = json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                    "metadata": {
                        "namespace": "default", "name": format!("{name}-{pod}"),
                        "labels": {"kubernetes.io/service-name": name},
                    },
                    "ports": [{"name": "", "port": port, "protocol": "TCP"}],
                    "endpoints": [{
                        "addresses": [town.pods[pod].ips[0]], "nodeName": node,
                        "hints": {"forNodes": [{"name": node}]},
                    }],
                });
                cluster.set(object(&slice).unwrap());
            }
        }
        let agent = serve(place, &cluster, &QUIET);
        let n_refused = |ip: &str| {
            let service = SocketAddr::new(ip.parse().unwrap(), 80);
            let calls = (0..30).filter_map(|_| TcpStream::connect(service).err());
            calls.inspect(|error| assert_eq!(error.kind(), ErrorKind::ConnectionRefused)).count()
        };
        let [hinted, local] = services.map(|(_, ip, _)| n_refused(ip));
        assert_eq!((hinted, local), (3, 30));
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}
