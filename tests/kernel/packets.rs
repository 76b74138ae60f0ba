//! What reaches no hook, as real packets: which endpoint answers, and which client it sees.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use lb_core::{
    model::{
        Family,
        Protocol::{self, Tcp, Udp},
    },
    packets::{AFFINITY_MAPS, nft::TableId, table_ids},
};
use lb_tests::{
    Feature,
    bed::{self, Bed, FAMILIES, Outcome, PATIENCE, PORT, Place, SILENCE, address},
    cluster::{Cluster, Object, object},
    require,
};
use serde_json::{Value, json};

use Place::{Far, Node, Other, Outside, Pod, Second};

mod errors;
mod ports;
mod sctp;

/// A destination, in both families.
#[derive(Clone, Copy, Debug)]
pub(crate) enum To {
    ClusterIp,
    /// Another port of it.
    UndefinedPort,
    /// An address of the service network without a Service.
    Unallocated,
    NodePort,
    /// At the node's address towards the first pod.
    NodePortAtGateway,
    ExternalIp,
    LoadBalancer,
}

impl To {
    pub(crate) fn address(self, family: Family) -> SocketAddr {
        let (v4, port) = match self {
            Self::ClusterIp => ([10, 96, 0, 1], 80),
            Self::UndefinedPort => ([10, 96, 0, 1], 81),
            Self::Unallocated => ([10, 96, 0, 99], 80),
            Self::NodePort => ([192, 168, 1, 2], 30080),
            Self::NodePortAtGateway => ([10, 1, 1, 1], 30080),
            Self::ExternalIp => ([203, 0, 113, 5], 80),
            Self::LoadBalancer => ([203, 0, 113, 1], 80),
        };
        SocketAddr::new(address(family, v4), port)
    }
}

/// The client's address at the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Kept,
    /// One of the node's.
    Node,
}

/// What becomes of calls.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    /// Exactly these endpoints answer.
    Reach(&'static [(Place, Source)]),
    Refused,
    Dropped,
}

/// The Service `web` at all the addresses of [`To`].
pub(crate) fn service(spec: &Value) -> Object {
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
pub(crate) fn slices(endpoints: &[Place]) -> [Object; 2] {
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
                {"name": "sctp", "protocol": "SCTP", "port": PORT},
            ],
            "endpoints": endpoints.collect::<Vec<_>>(),
        }))
        .unwrap()
    })
}

pub(crate) fn cluster(spec: &Value, endpoints: &[Place]) -> Cluster {
    Cluster::new().with(Bed::nodes()).with([service(spec)]).with(slices(endpoints))
}

/// Runs a test on a bed, if the kernel has what it needs.
pub(crate) fn on_a_bed(test: impl FnOnce(&mut Bed)) {
    if require(Feature::Nftables) {
        test(&mut Bed::new());
    }
}

/// Calls in both families and protocols.
pub(crate) fn check(bed: &Bed, rows: &[(Place, To, Expected)]) {
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
pub(crate) fn fault(
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
    let n = endpoints.len();
    bed.at(from).run(|| {
        // With three endpoints, one is missed once in 10^8 runs, and an unexpected one that is as likely in
        // one of 30.
        for n_calls in 0..16 * n {
            if missing.is_empty() && n_calls >= 4 * n {
                break;
            }
            let outcome = bed::call(to, protocol, PATIENCE);
            let Outcome::Reached { server, client } = outcome else { return Some(format!("{outcome:?}")) };
            let Some((place, source)) = endpoints.iter().find(|(place, _)| place.server(family) == server)
            else {
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
    })
}

pub(crate) const LOCAL_KEPT: Expected = Expected::Reach(&[(Pod, Source::Kept), (Second, Source::Kept)]);
pub(crate) const ALL_MASQUERADED: Expected =
    Expected::Reach(&[(Pod, Source::Node), (Second, Source::Node), (Far, Source::Node)]);
/// From a pod that is an endpoint.
pub(crate) const ALL_FROM_POD: Expected =
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
                (Pod, To::NodePortAtGateway, ALL_MASQUERADED),
                (Outside, To::NodePortAtGateway, ALL_MASQUERADED),
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

/// The place that answers.
pub(crate) fn server(outcome: Outcome, family: Family) -> Place {
    let Outcome::Reached { server, .. } = outcome else { panic!("{outcome:?}") };
    *[Pod, Second, Far].iter().find(|place| place.server(family) == server).unwrap()
}

#[test]
fn affinity() {
    on_a_bed(|bed| {
        let ways = [(Pod, To::ClusterIp), (Outside, To::NodePort), (Node, To::LoadBalancer)];
        let of_families = ways.iter().flat_map(|way| FAMILIES.map(|family| (*way, family)));
        let cases: Vec<_> = of_families
            .flat_map(|(way, family)| [Tcp, Udp].map(|protocol| (way, family, protocol)))
            .collect();
        let call_all = |bed: &Bed| -> Vec<Place> {
            let call = |((from, to), family, protocol): &((Place, To), Family, Protocol)| {
                server(bed.call(*from, to.address(*family), *protocol, PATIENCE), *family)
            };
            cases.iter().map(call).collect()
        };
        let n_recorded = |bed: &mut Bed| -> usize {
            let of = |(id, map): (TableId, &str)| bed.node.nftables.elements(&id, map).unwrap().len();
            table_ids().into_iter().flat_map(|id| AFFINITY_MAPS.map(|map| (id.clone(), map))).map(of).sum()
        };

        let briefly = json!({
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 2}},
        });
        bed.follow(&cluster(&briefly, &[Pod, Second, Far]));
        call_all(bed);
        assert!(n_recorded(bed) > 0);
        let forgotten = Instant::now() + PATIENCE;
        while n_recorded(bed) > 0 {
            assert!(Instant::now() < forgotten, "kept beyond the time-out");
            thread::sleep(Duration::from_millis(50));
        }

        // Three hours.
        let affinity = json!({"sessionAffinity": "ClientIP"});
        bed.follow(&cluster(&affinity, &[Pod, Second, Far]));
        let first = call_all(bed);
        assert_eq!(n_recorded(bed), cases.len());
        for _ in 0..8 {
            assert_eq!(call_all(bed), first, "{cases:?}");
        }
        bed.follow(&cluster(&affinity, &[Pod, Far]));
        let next = call_all(bed);
        for ((first, next), case) in first.iter().zip(&next).zip(&cases) {
            assert!(*next != Second && (*first == Second || next == first), "{case:?}: {first:?}, {next:?}");
        }
        assert_eq!(call_all(bed), next);
    });
}

/// More than the links carry at once.
#[test]
fn datagrams_in_fragments() {
    on_a_bed(|bed| {
        bed.follow(&cluster(&json!({}), &[Pod, Second, Far]));
        let octets: Vec<u8> = (0..4000_u32).map(|n| n.to_le_bytes()[0]).collect();
        for (from, to) in [(Pod, To::ClusterIp), (Node, To::ClusterIp), (Outside, To::NodePort)] {
            for family in FAMILIES {
                for _ in 0..12 {
                    let at = to.address(family);
                    let (_, back) = bed.at(from).run(|| bed::datagram(at, &octets, PATIENCE)).unwrap();
                    assert_eq!(back.len(), octets.len(), "{from:?} to {to:?}, {family:?}");
                    assert!(back == octets);
                }
            }
        }
    });
}

/// A counter of ICMP in a namespace: "packet too big", and for IPv4 "fragmentation needed" with all else of
/// its type.
fn n_too_big(bed: &Bed, place: Place, family: Family) -> u64 {
    let (file, name) = match family {
        Family::V4 => ("snmp", "InType3"),
        Family::V6 => ("snmp6", "Icmp6InPktTooBigs"),
    };
    let text = bed.at(place).run(|| fs::read_to_string(format!("/proc/thread-self/net/{file}"))).unwrap();
    let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let number = match family {
        Family::V6 => lines.find(|words| words[0] == name).map(|words| words[1].to_owned()),
        Family::V4 => {
            let all: Vec<_> = lines.filter(|words| words[0] == "IcmpMsg:").collect();
            let at = all.first().and_then(|names| names.iter().position(|word| *word == name));
            at.map(|at| all[1][at].to_owned())
        }
    };
    number.map_or(0, |number| number.parse().unwrap())
}

/// Sends and receives at once, and compares.
fn echo(stream: &mut TcpStream, octets: &[u8]) {
    let mut writer = stream.try_clone().unwrap();
    writer.set_write_timeout(Some(PATIENCE)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| writer.write_all(octets).unwrap());
        let mut back = vec![0; octets.len()];
        stream.read_exact(&mut back).unwrap();
        assert!(back == octets, "other octets than were sent");
    });
}

/// ICMP errors about translated packets reach the sender in its own terms: otherwise large packets vanish.
#[test]
fn path_mtu_discovery() {
    let octets: Vec<u8> = (0..1_u32 << 18).map(|n| n.to_le_bytes()[1]).collect();
    // The router's narrow link and its other end, who calls what, which endpoint answers, and who learns of
    // it. What ends have learned stays: so no two ways of a bed have the same addresses at an endpoint.
    for (device, narrow, ways) in [
        ("edge", Place::Edge, [(Outside, To::NodePort, Pod, Pod), (Outside, To::LoadBalancer, Far, Far)]),
        ("other", Other, [(Outside, To::NodePort, Far, Outside), (Pod, To::ClusterIp, Far, Pod)]),
    ] {
        on_a_bed(|bed| {
            bed.at(Place::Router).set_mtu(device, 1300).unwrap();
            bed.at(narrow).set_mtu("up", 1300).unwrap();
            for (from, to, endpoint, learns) in ways {
                bed.follow(&cluster(&json!({}), &[endpoint]));
                for family in FAMILIES {
                    let before = n_too_big(bed, learns, family);
                    bed.at(from).run(|| {
                        let (mut stream, _) = bed::connect(to.address(family), PATIENCE).unwrap();
                        echo(&mut stream, &octets);
                    });
                    let case = format!("{from:?} to {to:?}, {family:?}");
                    assert!(n_too_big(bed, learns, family) > before, "{case}: {learns:?} got no error");
                }
            }
        });
    }
}

/// Who calls what in tests of flows that stay open.
pub(crate) const WAYS: [(Place, To); 5] = [
    (Pod, To::ClusterIp),
    (Node, To::ClusterIp),
    (Outside, To::NodePort),
    (Outside, To::LoadBalancer),
    (Pod, To::LoadBalancer),
];

/// Open connections.
pub(crate) struct Open(Vec<(String, TcpStream)>);

impl Open {
    pub(crate) fn new(bed: &Bed) -> Self {
        let ways = WAYS.into_iter().flat_map(|way| FAMILIES.map(|family| (way, family)));
        let all = ways.map(|((from, to), family)| {
            let at = to.address(family);
            let (stream, _) = bed.at(from).run(|| bed::connect(at, PATIENCE)).unwrap();
            (format!("{from:?} to {to:?}, {family:?}"), stream)
        });
        Self(all.collect())
    }

    /// Fails if one of them does not answer.
    pub(crate) fn check(&mut self, after: &str) {
        for (which, stream) in &mut self.0 {
            echo(stream, format!("{which} after {after}").as_bytes());
        }
    }
}

#[test]
fn a_connection_stays_while_all_else_changes() {
    on_a_bed(|bed| {
        bed.follow(&cluster(&json!({}), &[Pod, Second, Far]));
        let mut open = Open::new(bed);
        open.check("at first");
        let local = json!({"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"});
        for (after, spec, endpoints) in [
            ("other policies", &local, &[Pod, Second, Far][..]),
            ("affinity", &json!({"sessionAffinity": "ClientIP"}), &[Pod, Second]),
            ("ranges that exclude it", &json!({"loadBalancerSourceRanges": ["192.0.2.0/24"]}), &[Far]),
            ("no endpoints", &json!({}), &[]),
        ] {
            bed.follow(&cluster(spec, endpoints));
            open.check(after);
        }
        bed.follow(&Cluster::new().with(Bed::nodes()));
        open.check("no Service");
        // Another agent starts from what the kernel has.
        bed.node.state = bed::state(Bed::settings());
        cluster(&local, &[Far]).feed(&mut bed.node.state);
        let _plan = bed.node.state.sync();
        assert!(bed.node.repair() > 0);
        open.check("another agent");
        bed.follow(&cluster(&json!({}), &[Second]));
        open.check("its change");
    });
}
