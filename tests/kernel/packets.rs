//! What reaches no hook, as real packets: which endpoint answers, and which client it sees.

use std::net::SocketAddr;

use lb_core::model::{
    Family,
    Protocol::{self, Tcp, Udp},
};
use lb_tests::{
    Feature,
    bed::{Bed, FAMILIES, Outcome, PATIENCE, PORT, Place, SILENCE, address},
    cluster::{Cluster, Object, object},
    require,
};
use serde_json::{Value, json};

use Place::{Far, Node, Outside, Pod, Second};

/// A destination, in both families.
#[derive(Clone, Copy, Debug)]
enum To {
    ClusterIp,
    /// Another port of it.
    UndefinedPort,
    /// An address of the service network without a Service.
    Unallocated,
    NodePort,
    ExternalIp,
    LoadBalancer,
}

impl To {
    fn address(self, family: Family) -> SocketAddr {
        let (v4, port) = match self {
            Self::ClusterIp => ([10, 96, 0, 1], 80),
            Self::UndefinedPort => ([10, 96, 0, 1], 81),
            Self::Unallocated => ([10, 96, 0, 99], 80),
            Self::NodePort => ([192, 168, 1, 2], 30080),
            Self::ExternalIp => ([203, 0, 113, 5], 80),
            Self::LoadBalancer => ([203, 0, 113, 1], 80),
        };
        SocketAddr::new(address(family, v4), port)
    }
}

/// The client's address at the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Kept,
    /// One of the node's.
    Node,
}

/// What becomes of calls.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// Exactly these endpoints answer.
    Reach(&'static [(Place, Source)]),
    Refused,
    Dropped,
}

/// The Service `web` at all the addresses of [`To`].
fn service(spec: &Value) -> Object {
    let ips = |v4| FAMILIES.map(|family| address(family, v4));
    let cluster_ips = ips([10, 96, 0, 1]);
    let mut service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "externalIPs": ips([203, 0, 113, 5]),
            "ports": [
                {"name": "tcp", "protocol": "TCP", "port": 80, "nodePort": 30080},
                {"name": "udp", "protocol": "UDP", "port": 80, "nodePort": 30080},
            ],
        },
        "status": {"loadBalancer": {"ingress": ips([203, 0, 113, 1]).map(|ip| json!({"ip": ip}))}},
    });
    let more = spec.as_object().unwrap().clone();
    service["spec"].as_object_mut().unwrap().extend(more);
    object(&service).unwrap()
}

/// Its endpoints, in both families.
fn slices(endpoints: &[Place]) -> [Object; 2] {
    FAMILIES.map(|family| {
        let name = if family == Family::V4 { "IPv4" } else { "IPv6" };
        let endpoints = endpoints
            .iter()
            .map(|place| json!({"addresses": [place.address(family)], "nodeName": place.node_name()}));
        object(&json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": "default",
                "name": format!("web-{}", name.to_lowercase()),
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": name,
            "ports": [
                {"name": "tcp", "protocol": "TCP", "port": PORT},
                {"name": "udp", "protocol": "UDP", "port": PORT},
            ],
            "endpoints": endpoints.collect::<Vec<_>>(),
        }))
        .unwrap()
    })
}

fn cluster(spec: &Value, endpoints: &[Place]) -> Cluster {
    Cluster::new().with(Bed::nodes()).with([service(spec)]).with(slices(endpoints))
}

/// Runs a test on a bed, if the kernel has what it needs.
fn on_a_bed(test: impl FnOnce(&mut Bed)) {
    if require(Feature::Nftables) {
        test(&mut Bed::new());
    }
}

/// Calls in both families and protocols.
fn check(bed: &Bed, rows: &[(Place, To, Expected)]) {
    let faults: Vec<String> = rows
        .iter()
        .flat_map(|row| {
            FAMILIES.iter().flat_map(move |family| [Tcp, Udp].map(|protocol| (row, *family, protocol)))
        })
        .filter_map(|((from, to, expected), family, protocol)| {
            let fault = fault(bed, *from, to.address(family), protocol, *expected, family)?;
            Some(format!("{from:?} to {to:?}, {family:?}, {protocol}: {expected:?}, but {fault}"))
        })
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// How the calls to an address differ from what is expected.
fn fault(
    bed: &Bed,
    from: Place,
    to: SocketAddr,
    protocol: Protocol,
    expected: Expected,
    family: Family,
) -> Option<String> {
    let endpoints = match expected {
        Expected::Reach(endpoints) => endpoints,
        Expected::Refused => {
            let outcome = bed.call(from, to, protocol, PATIENCE);
            return (outcome != Outcome::Refused).then(|| format!("{outcome:?}"));
        }
        Expected::Dropped => {
            let outcome = bed.call(from, to, protocol, SILENCE);
            return (outcome != Outcome::Silence).then(|| format!("{outcome:?}"));
        }
    };
    let mut missing = endpoints.to_vec();
    // With three endpoints, one is missed once in 10^8 runs.
    for _ in 0..16 * endpoints.len() {
        let outcome = bed.call(from, to, protocol, PATIENCE);
        let Outcome::Reached { server, client } = outcome else { return Some(format!("{outcome:?}")) };
        let Some((place, source)) = endpoints.iter().find(|(place, _)| place.server(family) == server) else {
            return Some(format!("{server} answers"));
        };
        let is_seen = match source {
            Source::Kept => client.ip() == from.address(family),
            Source::Node => Bed::is_of_node(client.ip()),
        };
        if !is_seen {
            return Some(format!("{place:?} sees {client}"));
        }
        missing.retain(|(missing, _)| missing != place);
    }
    (!missing.is_empty()).then(|| format!("{missing:?} never answer"))
}

const LOCAL_KEPT: Expected = Expected::Reach(&[(Pod, Source::Kept), (Second, Source::Kept)]);
const ALL_KEPT: Expected =
    Expected::Reach(&[(Pod, Source::Kept), (Second, Source::Kept), (Far, Source::Kept)]);
const ALL_MASQUERADED: Expected =
    Expected::Reach(&[(Pod, Source::Node), (Second, Source::Node), (Far, Source::Node)]);
/// From a pod that is an endpoint.
const ALL_FROM_POD: Expected =
    Expected::Reach(&[(Pod, Source::Node), (Second, Source::Kept), (Far, Source::Kept)]);

#[test]
fn policy_cluster() {
    on_a_bed(|bed| {
        bed.follow(&cluster(&json!({}), &[Pod, Second, Far]));
        check(
            bed,
            &[
                (Pod, To::ClusterIp, ALL_FROM_POD),
                (Node, To::ClusterIp, ALL_MASQUERADED),
                (Outside, To::ClusterIp, ALL_MASQUERADED),
                (Pod, To::NodePort, ALL_MASQUERADED),
                (Node, To::NodePort, ALL_MASQUERADED),
                (Outside, To::NodePort, ALL_MASQUERADED),
                (Pod, To::ExternalIp, ALL_MASQUERADED),
                (Node, To::ExternalIp, ALL_MASQUERADED),
                (Outside, To::ExternalIp, ALL_MASQUERADED),
                (Pod, To::LoadBalancer, ALL_MASQUERADED),
                (Node, To::LoadBalancer, ALL_MASQUERADED),
                (Outside, To::LoadBalancer, ALL_MASQUERADED),
                (Pod, To::UndefinedPort, Expected::Refused),
                (Node, To::UndefinedPort, Expected::Refused),
                (Outside, To::UndefinedPort, Expected::Refused),
                (Pod, To::Unallocated, Expected::Dropped),
                (Node, To::Unallocated, Expected::Dropped),
                (Outside, To::Unallocated, Expected::Dropped),
            ],
        );
    });
}

#[test]
fn policy_local() {
    on_a_bed(|bed| {
        let local = json!({"externalTrafficPolicy": "Local"});
        bed.follow(&cluster(&local, &[Pod, Second, Far]));
        for to in [To::NodePort, To::ExternalIp, To::LoadBalancer] {
            check(bed, &[(Outside, to, LOCAL_KEPT), (Pod, to, ALL_FROM_POD), (Node, to, ALL_MASQUERADED)]);
        }
        check(bed, &[(Outside, To::ClusterIp, ALL_MASQUERADED), (Pod, To::ClusterIp, ALL_FROM_POD)]);
        bed.follow(&cluster(&local, &[Far]));
        for to in [To::NodePort, To::ExternalIp, To::LoadBalancer] {
            check(
                bed,
                &[
                    (Outside, to, Expected::Dropped),
                    (Pod, to, Expected::Reach(&[(Far, Source::Kept)])),
                    (Node, to, Expected::Reach(&[(Far, Source::Node)])),
                ],
            );
        }
    });
}

#[test]
fn internal_policy_local() {
    on_a_bed(|bed| {
        let local = json!({"internalTrafficPolicy": "Local"});
        bed.follow(&cluster(&local, &[Second, Far]));
        check(
            bed,
            &[
                (Pod, To::ClusterIp, Expected::Reach(&[(Second, Source::Kept)])),
                (Second, To::ClusterIp, Expected::Reach(&[(Second, Source::Node)])),
                (Node, To::ClusterIp, Expected::Reach(&[(Second, Source::Node)])),
                (Outside, To::ClusterIp, Expected::Reach(&[(Second, Source::Node)])),
                (Outside, To::NodePort, Expected::Reach(&[(Second, Source::Node), (Far, Source::Node)])),
            ],
        );
        bed.follow(&cluster(&local, &[Far]));
        for from in [Pod, Node, Outside] {
            check(bed, &[(from, To::ClusterIp, Expected::Refused)]);
        }
    });
}

#[test]
fn a_service_without_endpoints_refuses() {
    on_a_bed(|bed| {
        for policy in ["Cluster", "Local"] {
            bed.follow(&cluster(&json!({"externalTrafficPolicy": policy}), &[]));
            for from in [Pod, Node, Outside] {
                for to in [To::ClusterIp, To::NodePort, To::ExternalIp, To::LoadBalancer] {
                    check(bed, &[(from, to, Expected::Refused)]);
                }
            }
        }
    });
}
