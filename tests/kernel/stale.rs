//! Sockets that stay with an endpoint which no longer serves: which of them are ended, in every network namespace.
//!
//! The programs are in a network namespace of their own, a pod's; the agent is in that of the sandbox.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::{Cluster, PortOf},
    netns::NetNs,
    require,
    server::Servers,
};
use lb_userspace::{
    kernel::{Options, pins},
    model::Protocol::{self, Tcp, Udp},
    stale::Use,
};
use nix::errno::Errno;
use tempfile::TempDir;

use crate::calls::{addresses, service_address};

/// What a domain's program calls, and who may answer. Servers listen in the pod itself.
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

    fn way(&self, protocol: Protocol) -> Use {
        Use { protocol, service: self.service, endpoint: self.first }
    }
}

/// A service in each family, with these endpoints of each [`Scene`].
fn cluster(
    protocol: Protocol,
    annotation: Option<&str>,
    endpoints: fn(&Scene) -> Vec<SocketAddr>,
) -> Cluster {
    let mut cluster = Cluster::new();
    for domain in [Domain::V4, Domain::V6] {
        let scene = Scene::new(domain);
        cluster.serve(&format!("{domain:?}"), scene.service, protocol, &endpoints(&scene));
    }
    if let Some(value) = annotation {
        for service in cluster.services.values_mut() {
            let annotations = service.metadata.annotations.get_or_insert_default();
            annotations.insert("socklb.io/stale-connections".to_owned(), value.to_owned());
        }
    }
    cluster
}

fn first_only(scene: &Scene) -> Vec<SocketAddr> {
    vec![scene.first]
}

fn second_only(scene: &Scene) -> Vec<SocketAddr> {
    vec![scene.second]
}

fn nobody(_scene: &Scene) -> Vec<SocketAddr> {
    Vec::new()
}

/// A pod in a sandbox.
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
            let scenes = [Domain::V4, Domain::V6].map(Scene::new);
            let addresses = scenes.iter().flat_map(|scene| [scene.first, scene.second]);
            Servers::start(addresses.flat_map(|address| [(address, Tcp), (address, Udp)]))
        });
        Self { netns, _servers: servers, _mounts: mounts }
    }

    fn socket(&self, domain: Domain, protocol: Protocol) -> Socket {
        self.netns.run(|| Socket::new(domain, protocol))
    }

    /// A socket that is connected to a service and has been answered by an endpoint.
    fn connected(&self, domain: Domain, protocol: Protocol, to: SocketAddr, endpoint: SocketAddr) -> Socket {
        let socket = self.socket(domain, protocol);
        connect(&socket, to, endpoint);
        socket
    }

    /// One for each domain, with the scene that it is in.
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

/// What a program sees whose socket was ended.
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

/// Runs a test with a pod and an agent that follows a cluster, once for each way to keep records.
fn with_pods(start: &Cluster, test: impl Fn(&Pod, &mut Agent, &Options) + Sync) {
    if !require(Feature::Programs) || !require(Feature::SocketDestroy) {
        return;
    }
    Sandbox::run(|sandbox| {
        for options in agent::modes(sandbox) {
            let pod = Pod::new();
            let mut agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            agent.follow(start);
            test(&pod, &mut agent, &options);
            pins::remove(&sandbox.pin_path()).unwrap();
        }
    });
}

/// The ways of the sockets of [`Pod::all_connected`], sorted.
fn all_ways(protocol: Protocol) -> Vec<Use> {
    let mut ways: Vec<Use> = Domain::ALL.iter().map(|domain| Scene::new(*domain).way(protocol)).collect();
    ways.sort();
    ways
}

fn sweep(agent: &mut Agent, options: &Options, now: Instant) -> Vec<Use> {
    let mut ended = agent.sweep(options, false, now);
    ended.sort();
    ended
}

/// A resolver keeps one connected socket. It gets an error, connects anew, and finds somebody who is alive.
#[test]
fn a_connected_udp_socket_moves_to_an_endpoint_that_lives() {
    with_pods(&cluster(Udp, None, first_only), |pod, agent, options| {
        let now = Instant::now();
        let sockets = pod.all_connected(Udp);
        assert_eq!(sweep(agent, options, now), [], "everybody is alive");
        agent.follow(&cluster(Udp, None, second_only));
        assert_eq!(sweep(agent, options, now), all_ways(Udp));
        for (scene, socket) in &sockets {
            assert_ended(socket);
            assert_eq!(socket.send(b"?"), Err(Errno::EDESTADDRREQ), "it has no peer any longer");
            connect(socket, scene.service, scene.second);
        }
        assert_eq!(sweep(agent, options, now), [], "nothing is left to do");
        assert!(sockets.iter().all(|(scene, socket)| socket.ask().unwrap().server == scene.second));
    });
}

#[test]
fn a_socket_is_ended_when_the_last_endpoint_goes() {
    with_pods(&cluster(Udp, None, first_only), |pod, agent, options| {
        let sockets = pod.all_connected(Udp);
        agent.follow(&cluster(Udp, None, nobody));
        assert_eq!(sweep(agent, options, Instant::now()), all_ways(Udp));
        for (scene, socket) in &sockets {
            assert_ended(socket);
            let refusal = socket.connect(scene.service).and_then(|()| socket.ask().map(drop));
            // Before kernel 5.18 no program can choose the error, and it depends on the family.
            let is_refused = refusal == Err(Errno::ECONNREFUSED)
                || refusal == Err(Errno::EINVAL) && !options.features.set_retval;
            assert!(is_refused, "{refusal:?}");
        }
    });
}

#[test]
fn a_socket_is_ended_when_its_service_is_deleted() {
    with_pods(&cluster(Udp, None, first_only), |pod, agent, options| {
        let sockets = pod.all_connected(Udp);
        agent.follow(&Cluster::new());
        assert_eq!(sweep(agent, options, Instant::now()), all_ways(Udp));
        assert_all_ended(&sockets);
    });
}

/// Each of these sockets has been connected to the endpoint that goes, or is in another way; none is through the service.
#[test]
fn sockets_that_went_elsewhere_are_left_alone() {
    with_pods(&cluster(Udp, None, first_only), |pod, agent, options| {
        for domain in Domain::ALL {
            let scene = Scene::new(domain);
            agent.follow(&cluster(Udp, None, first_only));
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
            agent.follow(&cluster(Udp, None, second_only));
            assert_eq!(sweep(agent, options, Instant::now()), [], "{domain:?}");
            assert_stays(&plain, scene.first);
            assert_stays(&went_to_another, scene.second);
            assert_stays(&went_to_the_same, scene.first);
            assert_eq!(disconnected.ask_at(scene.service).unwrap().server, scene.second);
            assert_eq!(unconnected.ask_at(scene.service).unwrap().server, scene.second, "it chooses anew");
        }
    });
}

/// Of a hundred sockets in both homes of records, those through one service are ended and no others.
#[test]
fn a_service_of_many_sockets_loses_its_endpoint_and_its_neighbour_does_not() {
    let with_neighbour = |endpoints: fn(&Scene) -> Vec<SocketAddr>| {
        let mut cluster = cluster(Udp, None, endpoints);
        let scene = Scene::new(Domain::V4);
        cluster.serve("neighbour", SocketAddr::new(scene.service.ip(), 53), Udp, &[scene.first]);
        cluster
    };
    with_pods(&with_neighbour(first_only), |pod, agent, options| {
        let scene = Scene::new(Domain::V4);
        let neighbour = SocketAddr::new(scene.service.ip(), 53);
        let through = |to: SocketAddr| -> Vec<Socket> {
            (0..50).map(|_| pod.connected(Domain::V4, Udp, to, scene.first)).collect()
        };
        let (ours, theirs) = (through(scene.service), through(neighbour));
        agent.follow(&with_neighbour(second_only));
        assert_eq!(sweep(agent, options, Instant::now()), vec![scene.way(Udp); ours.len()]);
        ours.iter().for_each(assert_ended);
        for socket in &theirs {
            assert_stays(socket, scene.first);
        }
    });
}

/// R10: an endpoint that terminates and serves keeps its sockets; one that neither is ready nor serves loses them to
/// those that serve, and keeps them while nobody does.
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
    with_pods(&cluster(Udp, None, first_only), |pod, agent, options| {
        let now = Instant::now();
        let sockets = pod.all_connected(Udp);
        for (what, first, second) in [
            ("it terminates and serves, another is ready", terminating, ready),
            ("it is not ready, and nobody serves", unready, unready),
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

/// The endpoint goes while no agent runs; the next one knows nothing of the sockets but what the maps say.
#[test]
fn sockets_that_are_older_than_the_agent_are_ended() {
    if !require(Feature::Programs) || !require(Feature::SocketDestroy) {
        return;
    }
    Sandbox::run(|sandbox| {
        for options in agent::modes(sandbox) {
            let pod = Pod::new();
            let start = || Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            let mut former = start();
            former.follow(&cluster(Udp, None, first_only));
            let sockets = pod.all_connected(Udp);
            drop(former);
            let mut agent = start();
            agent.follow(&cluster(Udp, None, second_only));
            let mut ended = agent.sweep(&options, true, Instant::now());
            ended.sort();
            assert_eq!(ended, all_ways(Udp));
            assert_all_ended(&sockets);
            pins::remove(&sandbox.pin_path()).unwrap();
        }
    });
}

#[test]
fn tcp_connections_stay_unless_their_service_says_otherwise() {
    with_pods(&cluster(Tcp, None, first_only), |pod, agent, options| {
        let now = Instant::now();
        let sockets = pod.all_connected(Tcp);
        for annotation in [None, Some("keep"), Some("something")] {
            agent.follow(&cluster(Tcp, annotation, second_only));
            assert_eq!(sweep(agent, options, now), [], "{annotation:?}");
            assert_all_stay(&sockets);
        }
        agent.follow(&cluster(Tcp, Some("reset"), second_only));
        assert_eq!(sweep(agent, options, now), all_ways(Tcp));
        assert_all_ended(&sockets);
    });
}

#[test]
fn a_drain_ends_connections_when_its_time_is_over() {
    for protocol in [Tcp, Udp] {
        let drain = Some("drain=1h");
        with_pods(&cluster(protocol, drain, first_only), |pod, agent, options| {
            let now = Instant::now();
            let at = |minutes: u64| now + Duration::from_secs(60 * minutes);
            let sockets = pod.all_connected(protocol);
            agent.follow(&cluster(protocol, drain, second_only));
            assert_eq!(sweep(agent, options, now), []);
            assert_eq!(agent.state.next_stale(now), Some(at(60)));
            assert_eq!(sweep(agent, options, at(59)), []);
            assert_all_stay(&sockets);
            assert_eq!(sweep(agent, options, at(60)), all_ways(protocol));
            assert_all_ended(&sockets);
        });
    }
}

/// Where the tables have no room for the new endpoints, the old ones stay in them: nobody would be helped.
#[test]
fn sockets_of_a_service_that_did_not_fit_are_left_alone() {
    with_pods(&cluster(Udp, None, first_only), |pod, agent, options| {
        let scene = Scene::new(Domain::V4);
        let socket = pod.connected(Domain::V4, Udp, scene.service, scene.first);
        let mut too_many = cluster(Udp, None, first_only);
        let n_endpoints = u16::try_from(agent::SMALL.endpoints).unwrap();
        let endpoints: Vec<SocketAddr> =
            (0..n_endpoints).map(|n| SocketAddr::new(scene.second.ip(), 10_000 + n)).collect();
        too_many.set_endpoints(&PortOf::udp("v4"), &endpoints);
        agent.follow(&too_many);
        assert_eq!(sweep(agent, options, Instant::now()), []);
        assert_stays(&socket, scene.first);
    });
}
