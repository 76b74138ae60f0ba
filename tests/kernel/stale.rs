//! Stale sockets: which of them are destroyed, in every network namespace.
//!
//! The programs run in a pod's network namespace, the agent in the sandbox's.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use lb_core::{
    model::Protocol::{self, Tcp, Udp},
    stale::{Flow, Search},
};
use lb_kernel::{Options, exclusion::Exclusion};
use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::{self, Cluster, PortOf},
    netns::NetNs,
    server::Servers,
};
use nix::{errno::Errno, libc};
use tempfile::TempDir;

use crate::{
    exclusion::{in_child, place},
    fixture::{FAMILIES, addresses, in_each_mode, service_address, service_port, services, start},
    slots,
};

/// What a domain's program calls, and which servers may answer. They listen in the pod itself.
#[derive(Clone, Copy)]
struct Scene {
    service: SocketAddr,
    first: SocketAddr,
    second: SocketAddr,
}

impl Scene {
    fn new(domain: Domain) -> Self {
        let [first, second] = addresses(domain, 8001);
        Self { service: service_address(domain), first, second }
    }

    fn way(&self, protocol: Protocol) -> Flow {
        Flow { protocol, service: Some(self.service), endpoint: self.first }
    }
}

fn cluster(protocol: Protocol, annotation: Option<&str>, endpoints: Endpoints) -> Cluster {
    let cluster = services(&[protocol], |domain| {
        let scene = Scene::new(domain);
        vec![(scene.service, endpoints(&scene))]
    });
    match annotation {
        Some(value) => cluster.annotated(ANNOTATION, value),
        None => cluster,
    }
}

const ANNOTATION: &str = "socklb.io/stale-connections";

/// The endpoints of a scene's service.
type Endpoints = fn(&Scene) -> Vec<SocketAddr>;

const FIRST: Endpoints = |scene| vec![scene.first];
const SECOND: Endpoints = |scene| vec![scene.second];
const NONE: Endpoints = |_scene| Vec::new();

struct Pod {
    netns: NetNs,
    _servers: Servers,
    _mounts: TempDir,
}

impl Pod {
    fn new() -> Self {
        let (netns, mounts) = (NetNs::new().unwrap(), tempfile::tempdir().unwrap());
        netns.mount_at(&mounts.path().join("pod")).unwrap();
        let servers = netns.run(|| {
            let scenes = FAMILIES.map(Scene::new);
            let addresses = scenes.iter().flat_map(|scene| [scene.first, scene.second]);
            Servers::start(addresses.flat_map(|address| [(address, Tcp), (address, Udp)]))
        });
        Self { netns, _servers: servers, _mounts: mounts }
    }

    fn socket(&self, domain: Domain, protocol: Protocol) -> Socket {
        self.netns.run(|| Socket::new(domain, protocol))
    }

    /// A socket that is connected to a service and has received an answer of an endpoint.
    fn connected(&self, domain: Domain, protocol: Protocol, to: SocketAddr, endpoint: SocketAddr) -> Socket {
        let socket = self.socket(domain, protocol);
        connect(&socket, to, endpoint);
        socket
    }

    /// One for each domain, with its scene.
    fn all_connected(&self, protocol: Protocol) -> Vec<(Scene, Socket)> {
        let scenes = Domain::ALL.map(|domain| (domain, Scene::new(domain)));
        let connected = scenes
            .map(|(domain, scene)| (scene, self.connected(domain, protocol, scene.service, scene.first)));
        connected.into()
    }
}

fn connect(socket: &Socket, to: SocketAddr, endpoint: SocketAddr) {
    socket.connect(to).unwrap();
    assert_eq!(socket.ask().unwrap().server, endpoint);
}

/// Asserts what a program sees of a destroyed socket.
fn assert_ended(socket: &Socket) {
    assert_eq!(socket.receive(), Err(Errno::ECONNABORTED));
    assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
}

fn assert_stays(socket: &Socket, endpoint: SocketAddr) {
    socket.send(b"?").unwrap();
    let (answer, _) = socket.receive().unwrap();
    let text = String::from_utf8(answer).unwrap();
    assert!(text.starts_with(&endpoint.to_string()) || text == "?", "{text}");
}

fn assert_all_ended(sockets: &[(Scene, Socket)]) {
    for (_, socket) in sockets {
        assert_ended(socket);
    }
}

fn assert_all_stay(sockets: &[(Scene, Socket)]) {
    for (scene, socket) in sockets {
        assert_stays(socket, scene.first);
    }
}

/// Runs a test with a pod and an agent that follows a cluster, once for each home of records.
fn with_pods(first: &Cluster, test: impl Fn(&Pod, &mut Agent, &Options) + Sync) {
    Sandbox::test_with(&[Feature::SocketDestroy], |sandbox| {
        in_each_mode(sandbox, |options| {
            let (pod, mut agent) = (Pod::new(), start(options));
            agent.follow(first);
            test(&pod, &mut agent, options);
        });
    });
}

/// The flows of the sockets of [`Pod::all_connected`], sorted.
fn all_ways(protocol: Protocol) -> Vec<Flow> {
    let mut ways: Vec<Flow> = Domain::ALL.iter().map(|domain| Scene::new(*domain).way(protocol)).collect();
    ways.sort();
    ways
}

fn sweep(agent: &mut Agent, options: &Options, now: Instant) -> Vec<Flow> {
    let mut ended = agent.sweep(options, now);
    ended.sort();
    ended
}

/// A resolver keeps one connected socket. It gets an error, reconnects, and reaches a live endpoint.
#[test]
fn a_connected_udp_socket_moves_to_an_endpoint_that_lives() {
    with_pods(&cluster(Udp, None, FIRST), |pod, agent, options| {
        let now = Instant::now();
        let sockets = pod.all_connected(Udp);
        assert_eq!(sweep(agent, options, now), [], "nothing is stale");
        agent.follow(&cluster(Udp, None, SECOND));
        assert_eq!(sweep(agent, options, now), all_ways(Udp));
        for (scene, socket) in &sockets {
            assert_ended(socket);
            assert_eq!(socket.send(b"?"), Err(Errno::EDESTADDRREQ), "it has no peer");
            connect(socket, scene.service, scene.second);
        }
        assert_eq!(sweep(agent, options, now), [], "nothing is stale");
        assert!(sockets.iter().all(|(scene, socket)| socket.ask().unwrap().server == scene.second));
    });
}

#[test]
fn a_socket_is_ended_when_the_last_endpoint_goes() {
    with_pods(&cluster(Udp, None, FIRST), |pod, agent, options| {
        let sockets = pod.all_connected(Udp);
        agent.follow(&cluster(Udp, None, NONE));
        assert_eq!(sweep(agent, options, Instant::now()), all_ways(Udp));
        for (scene, socket) in &sockets {
            assert_ended(socket);
            let refusal = socket.connect(scene.service).and_then(|()| socket.ask().map(drop));
            // Before kernel 5.18 programs cannot choose the error, and it depends on the family.
            let is_refused = refusal == Err(Errno::ECONNREFUSED)
                || refusal == Err(Errno::EINVAL) && !options.features.set_retval;
            assert!(is_refused, "{refusal:?}");
        }
    });
}

#[test]
fn a_socket_is_ended_when_its_service_is_deleted() {
    with_pods(&cluster(Udp, None, FIRST), |pod, agent, options| {
        let sockets = pod.all_connected(Udp);
        agent.follow(&Cluster::new());
        assert_eq!(sweep(agent, options, Instant::now()), all_ways(Udp));
        assert_all_ended(&sockets);
    });
}

/// Each of these sockets was connected to the removed endpoint or has another flow; none is connected through
/// the service.
#[test]
fn sockets_that_went_elsewhere_are_left_alone() {
    with_pods(&cluster(Udp, None, FIRST), |pod, agent, options| {
        for domain in Domain::ALL {
            let scene = Scene::new(domain);
            agent.follow(&cluster(Udp, None, FIRST));
            let through = || pod.connected(domain, Udp, scene.service, scene.first);
            let plain = pod.connected(domain, Udp, scene.first, scene.first);
            let went_to_another = through();
            connect(&went_to_another, scene.second, scene.second);
            let went_to_the_same = through();
            connect(&went_to_the_same, scene.first, scene.first);
            let disconnected = through();
            disconnected.disconnect().unwrap();
            let unconnected = pod.socket(domain, Udp);
            assert_eq!(unconnected.ask_at(scene.service).unwrap().server, scene.first);
            agent.follow(&cluster(Udp, None, SECOND));
            assert_eq!(sweep(agent, options, Instant::now()), [], "{domain:?}");
            assert_stays(&plain, scene.first);
            assert_stays(&went_to_another, scene.second);
            assert_stays(&went_to_the_same, scene.first);
            assert_eq!(disconnected.ask_at(scene.service).unwrap().server, scene.second);
            assert_eq!(unconnected.ask_at(scene.service).unwrap().server, scene.second, "it chooses again");
        }
    });
}

/// Of a hundred sockets, with records in both homes, exactly those of one service are destroyed.
#[test]
fn a_service_of_many_sockets_loses_its_endpoint_and_its_neighbour_does_not() {
    let (scene, neighbour) = (Scene::new(Domain::V4), service_port(Domain::V4, 53));
    let with_neighbour = |endpoints: Endpoints| {
        cluster(Udp, None, endpoints).serving("neighbour", neighbour, Udp, &[scene.first])
    };
    with_pods(&with_neighbour(FIRST), |pod, agent, options| {
        let through = |to: SocketAddr| -> Vec<Socket> {
            (0..50).map(|_| pod.connected(Domain::V4, Udp, to, scene.first)).collect()
        };
        let (ours, theirs) = (through(scene.service), through(neighbour));
        agent.follow(&with_neighbour(SECOND));
        assert_eq!(sweep(agent, options, Instant::now()), vec![scene.way(Udp); ours.len()]);
        ours.iter().for_each(assert_ended);
        for socket in &theirs {
            assert_stays(socket, scene.first);
        }
    });
}

/// R10: an endpoint that terminates and still serves keeps its sockets. One that is neither ready nor serving
/// loses them to endpoints that serve, and keeps them if there are none.
#[test]
fn r10_a_socket_stays_while_its_endpoint_serves() {
    let with_conditions = |first: [bool; 3], second: [bool; 3]| {
        let mut cluster = cluster(Udp, None, |scene| vec![scene.first, scene.second]);
        for slice in cluster.slices.values_mut() {
            let is_first = slice.ports.iter().flatten().any(|port| port.port == Some(8001));
            for endpoint in &mut slice.endpoints {
                let [ready, serving, terminating] = if is_first { first } else { second }.map(Some);
                let conditions = endpoint.conditions.get_or_insert_default();
                (conditions.ready, conditions.serving, conditions.terminating) =
                    (ready, serving, terminating);
            }
        }
        cluster
    };
    let (ready, unready) = ([true, true, false], [false, false, false]);
    let terminating = [false, true, true];
    with_pods(&cluster(Udp, None, FIRST), |pod, agent, options| {
        let now = Instant::now();
        let sockets = pod.all_connected(Udp);
        for (what, first, second) in [
            ("it terminates and serves, another is ready", terminating, ready),
            ("it is not ready, and no endpoint serves", unready, unready),
        ] {
            agent.follow(&with_conditions(first, second));
            assert_eq!(sweep(agent, options, now), [], "{what}");
            assert_all_stay(&sockets);
        }
        agent.follow(&with_conditions(unready, ready));
        assert_eq!(sweep(agent, options, now), all_ways(Udp));
        assert_all_ended(&sockets);
    });
}

/// The endpoint is removed while no agent runs. The next agent knows the sockets only from the maps.
#[test]
fn sockets_that_are_older_than_the_agent_are_ended() {
    with_pods(&cluster(Udp, None, FIRST), |pod, former, options| {
        let sockets = pod.all_connected(Udp);
        *former = start(options);
        former.follow(&cluster(Udp, None, SECOND));
        assert_eq!(sweep(former, options, Instant::now()), all_ways(Udp));
        assert_all_ended(&sockets);
    });
}

#[test]
fn tcp_connections_stay_unless_their_service_says_otherwise() {
    with_pods(&cluster(Tcp, None, FIRST), |pod, agent, options| {
        let now = Instant::now();
        let sockets = pod.all_connected(Tcp);
        for annotation in [None, Some("keep"), Some("something")] {
            agent.follow(&cluster(Tcp, annotation, SECOND));
            assert_eq!(sweep(agent, options, now), [], "{annotation:?}");
            assert_all_stay(&sockets);
        }
        agent.follow(&cluster(Tcp, Some("reset"), SECOND));
        assert_eq!(sweep(agent, options, now), all_ways(Tcp));
        assert_all_ended(&sockets);
    });
}

#[test]
fn a_drain_ends_connections_when_its_time_is_over() {
    for protocol in [Tcp, Udp] {
        let drain = Some("drain=1h");
        with_pods(&cluster(protocol, drain, FIRST), |pod, agent, options| {
            let now = Instant::now();
            let at = |minutes: u64| now + Duration::from_secs(60 * minutes);
            let sockets = pod.all_connected(protocol);
            agent.follow(&cluster(protocol, drain, SECOND));
            assert_eq!(sweep(agent, options, now), []);
            assert_eq!(agent.state.next_stale_due(now), Some(at(60)));
            assert_eq!(sweep(agent, options, at(59)), []);
            assert_all_stay(&sockets);
            assert_eq!(sweep(agent, options, at(60)), all_ways(protocol));
            assert_all_ended(&sockets);
        });
    }
}

/// If the new endpoints do not fit, the old ones stay in the maps: their removal would help no call.
#[test]
fn sockets_of_a_service_that_did_not_fit_are_left_alone() {
    with_pods(&cluster(Udp, None, FIRST), |pod, agent, options| {
        let scene = Scene::new(Domain::V4);
        let socket = pod.connected(Domain::V4, Udp, scene.service, scene.first);
        let mut too_many = cluster(Udp, None, FIRST);
        let n_endpoints = u16::try_from(agent::SMALL.endpoints).unwrap();
        let endpoints: Vec<SocketAddr> =
            (0..n_endpoints).map(|n| SocketAddr::new(scene.second.ip(), 10_000 + n)).collect();
        too_many.set_endpoints(&PortOf::udp("v4-udp-0"), &endpoints);
        agent.follow(&too_many);
        assert_eq!(sweep(agent, options, Instant::now()), []);
        assert_stays(&socket, scene.first);
    });
}

/// A socket with more services than a slot holds has some in socket storage. Searches stay as narrow.
#[test]
fn an_overflow_makes_no_search_wider() {
    let others = [1001, 1002, 1003, 1004].map(|port| service_port(Domain::V4, port));
    let with_others = |endpoints: Endpoints| {
        others.iter().fold(cluster(Udp, None, endpoints), |cluster, other| {
            cluster.serving(&format!("other-{}", other.port()), *other, Udp, &[Scene::new(Domain::V4).second])
        })
    };
    with_pods(&with_others(FIRST), |pod, agent, options| {
        let now = Instant::now();
        let many = pod.socket(Domain::V4, Udp);
        for other in others {
            let answer = many.ask_at(other).unwrap();
            assert_eq!((answer.server, answer.seen), (Scene::new(Domain::V4).second, Some(other)));
        }
        let sockets = pod.all_connected(Udp);
        assert_eq!(agent.search(options, now), None, "nothing is stale");
        agent.follow(&with_others(SECOND));
        let endpoints = FAMILIES.map(|domain| Scene::new(domain).first);
        let search =
            Search { protocols: [Udp].into(), endpoints: endpoints.into(), addresses: Some(BTreeSet::new()) };
        assert_eq!(agent.search(options, now), Some(search));
        assert_eq!(sweep(agent, options, now), all_ways(Udp));
        assert_all_ended(&sockets);
        assert_eq!(sweep(agent, options, now), [], "unconnected sockets are not stale");
        assert_eq!(agent.search(options, now), None, "and no longer searched for");
        assert_eq!(many.ask_at(others[0]).unwrap().server, Scene::new(Domain::V4).second);
    });
}

/// Other sockets own all slots, so these have their records in socket storage. The agent finds them without
/// reading any process.
#[test]
fn sockets_that_found_no_slot_are_ended_like_others() {
    with_pods(&cluster(Udp, None, FIRST), |pod, agent, options| {
        slots::fill(options);
        let sockets = pod.all_connected(Udp);
        agent.follow(&cluster(Udp, None, SECOND));
        assert_eq!(sweep(agent, options, Instant::now()), all_ways(Udp));
        assert_all_ended(&sockets);
    });
}

/// The kernel has a TCP socket for each subflow; its record names the flow.
#[test]
fn a_multipath_connection_is_ended_by_its_subflow() {
    let multipath = |domain| Socket::with_protocol_number(domain, Tcp, libc::IPPROTO_MPTCP);
    if multipath(Domain::V4).is_err() {
        return;
    }
    with_pods(&cluster(Tcp, Some("reset"), FIRST), |pod, agent, options| {
        let sockets = Domain::ALL.map(|domain| {
            let (scene, socket) = (Scene::new(domain), pod.netns.run(|| multipath(domain).unwrap()));
            connect(&socket, scene.service, scene.first);
            (scene, socket)
        });
        let now = Instant::now();
        assert_eq!(sweep(agent, options, now), []);
        agent.follow(&cluster(Tcp, Some("reset"), SECOND));
        assert_eq!(sweep(agent, options, now), all_ways(Tcp));
        for (_, socket) in &sockets {
            assert_eq!(socket.receive(), Err(Errno::ECONNABORTED));
            assert_eq!(socket.send(b"?"), Err(Errno::EPIPE));
            assert_eq!(socket.peer_name(), Err(Errno::ENOTCONN));
        }
        // With a server that speaks multipath TCP too.
        let server = addresses::<1>(Domain::V4, 9001)[0];
        let _servers = pod.netns.run(|| Servers::multipath([server]));
        let service = service_port(Domain::V4, 81);
        let with_other = |endpoint| cluster(Tcp, None, SECOND).serving("other", service, Tcp, &[endpoint]);
        agent.follow(&with_other(server).annotated(ANNOTATION, "reset"));
        let socket = pod.netns.run(|| multipath(Domain::V4).unwrap());
        connect(&socket, service, server);
        agent.follow(&with_other(Scene::new(Domain::V4).second).annotated(ANNOTATION, "reset"));
        let way = Flow { protocol: Tcp, service: Some(service), endpoint: server };
        let is_short = pod.netns.run(|| fs::write("/proc/sys/net/mptcp/close_timeout", "1")).is_ok();
        assert_eq!(sweep(agent, options, now), [way]);
        // Otherwise the close takes a minute.
        if is_short {
            assert_eq!(socket.receive(), Err(Errno::ENOTCONN));
        }
    });
}

/// Addresses that programs called before the Service existed: one in each family, and a node port. They have
/// a silent server.
fn early_addresses(domain: Domain) -> [SocketAddr; 2] {
    let node = node_addresses()[usize::from(domain == Domain::V6)];
    [service_address(domain), SocketAddr::new(node, 30053)]
}

fn node_addresses() -> [IpAddr; 2] {
    ["192.0.2.1", "fd00:2::1"].map(|ip| ip.parse().unwrap())
}

fn with_node_ports(annotation: Option<&str>) -> Cluster {
    let mut cluster = cluster(Udp, annotation, FIRST);
    cluster.set(cluster::node("node", &node_addresses()));
    for service in cluster.services.values_mut() {
        *service = cluster::with_node_port(service.clone(), 30053);
    }
    cluster
}

/// Runs a test in each mode with early sockets, in a pod where the early addresses have silent servers, and
/// an agent without services.
fn with_early_sockets(test: impl Fn(&Pod, &[EarlySocket], &mut Agent, &Options, Instant) + Sync) {
    with_pods(&Cluster::new(), |pod, agent, options| {
        let _mute = mute_servers(pod);
        test(pod, &early_sockets(pod), agent, options, Instant::now());
    });
}

fn mute_servers(pod: &Pod) -> Vec<Socket> {
    let mute = FAMILIES.into_iter().flat_map(|domain| {
        early_addresses(domain).map(|address| {
            pod.netns.add_address(address.ip()).unwrap();
            let socket = pod.socket(domain, Udp);
            socket.bind(address).unwrap();
            socket
        })
    });
    mute.collect()
}

/// A socket, its scene, and the address to which it connected before that was a service's.
type EarlySocket = (Scene, SocketAddr, Socket);

/// Connects to all early addresses, and sends requests without an answer.
fn early_sockets(pod: &Pod) -> Vec<EarlySocket> {
    let sockets = Domain::ALL.into_iter().flat_map(|domain| {
        early_addresses(domain).map(|address| {
            let socket = pod.socket(domain, Udp);
            socket.connect(address).unwrap();
            socket.set_nonblocking(true);
            for _ in 0..12 {
                socket.send(b"?").unwrap();
                assert_eq!(socket.receive(), Err(Errno::EAGAIN), "the server is silent");
            }
            socket.set_nonblocking(false);
            (Scene::new(domain), address, socket)
        })
    });
    sockets.collect()
}

fn early_ways() -> Vec<Flow> {
    let addresses = Domain::ALL.into_iter().flat_map(early_addresses);
    let mut ways: Vec<Flow> =
        addresses.map(|endpoint| Flow { protocol: Udp, service: None, endpoint }).collect();
    ways.sort();
    ways
}

fn assert_moved(sockets: &[EarlySocket]) {
    for (scene, address, socket) in sockets {
        assert_ended(socket);
        connect(socket, *address, scene.first);
    }
}

/// Longer than the agent takes to find the excluded callers.
const SETTLED: Duration = Duration::from_secs(6);

#[test]
fn a_udp_socket_that_is_older_than_its_service_is_served() {
    for annotation in [None, Some("keep")] {
        with_early_sockets(|_pod, sockets, agent, options, now| {
            assert_eq!(sweep(agent, options, now), []);
            assert_eq!(sweep(agent, options, now + SETTLED), [], "there is no service");
            agent.follow(&with_node_ports(annotation));
            let ended = sweep(agent, options, now + SETTLED);
            if annotation.is_some() {
                assert_eq!(ended, []);
                assert!(sockets.iter().all(|(_, address, socket)| socket.peer_name() == Ok(*address)));
                return;
            }
            assert_eq!(ended, early_ways());
            assert_moved(sockets);
            for _ in 0..3 {
                assert_eq!(sweep(agent, options, now + 2 * SETTLED), [], "nothing is left");
            }
            assert!(sockets.iter().all(|(scene, _, socket)| socket.ask().unwrap().server == scene.first));
        });
    }
}

/// The agent stops before it has destroyed them: the next one adopts the frontends.
#[test]
fn a_udp_socket_that_is_older_than_its_service_is_not_missed_by_a_restart() {
    with_early_sockets(|_pod, sockets, agent, options, now| {
        agent.follow(&with_node_ports(None));
        for ended in [early_ways(), Vec::new()] {
            let mut next = start(options);
            next.follow(&with_node_ports(None));
            assert_eq!(sweep(&mut next, options, now), []);
            assert_eq!(sweep(&mut next, options, now + SETTLED), ended);
            if !ended.is_empty() {
                assert_moved(sockets);
            }
        }
    });
}

#[test]
fn udp_sockets_whose_calls_are_not_served_are_left_alone() {
    with_early_sockets(|pod, served, agent, options, now| {
        assert_eq!(sweep(agent, options, now), []);
        assert_eq!(sweep(agent, options, now + SETTLED), []);
        in_child(&options.cgroup, |directory| {
            let excluded = early_sockets(pod);
            let mut exclusion = Exclusion::open(&options.pin_path).unwrap();
            exclusion.set(&[place(directory)].into()).unwrap();
            agent.follow(&with_node_ports(None));
            // The options of an agent whose programs are attached to this cgroup only.
            let part = Options { cgroup: directory.to_owned(), ..options.clone() };
            assert_eq!(sweep(agent, &part, now + SETTLED), []);
            assert_eq!(sweep(agent, options, now + SETTLED), early_ways());
            assert!(excluded.iter().all(|(_, address, socket)| socket.peer_name() == Ok(*address)));
        });
        assert_moved(served);
    });
}
