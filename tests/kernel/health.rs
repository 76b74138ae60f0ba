//! Passive health: which outcomes of connections eject an endpoint.

use std::{
    cell::RefCell,
    fs,
    net::SocketAddr,
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use lb_common::layout::{ConnectLatency, EndpointHealth};
use lb_core::{
    desired::FrontendAddress,
    model::Protocol::Tcp,
    sim::{Caller, Simulator},
    tables::StoredRun,
};
use lb_kernel::{Options, host, pins};
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::{self, Cluster},
    installed::eventually,
    server::Servers,
};
use lb_userspace::cli::explain::explain;
use nix::{
    errno::Errno,
    sys::socket::{Backlog, Shutdown, listen, shutdown},
};

use crate::{
    any_kernel::layouts::change_layout,
    fixture::{FAMILIES, addresses, in_each_mode, service_address, start},
};

/// Runs a test in these domains and each mode of the programs, with a service that has two endpoints.
fn with_service(domains: &[Domain], test: impl Fn(&Node) + Send + Sync) {
    for &domain in domains {
        Sandbox::test(|sandbox| in_each_mode(sandbox, |options| test(&Node::new(domain, options))));
    }
}

struct Node {
    agent: Agent,
    domain: Domain,
    service: SocketAddr,
    endpoints: [SocketAddr; 2],
}

impl Node {
    fn cluster(service: SocketAddr, endpoints: &[SocketAddr]) -> Cluster {
        // No ejection ends by the clock during a test.
        Cluster::new().serving("web", service, Tcp, endpoints).annotated("socklb.io/health", "base=1h")
    }

    fn new(domain: Domain, options: &Options) -> Self {
        let (service, endpoints) = (service_address(domain), addresses::<2>(domain, 8001));
        let cluster = Self::cluster(service, &endpoints);
        let mut agent = start(options);
        agent.follow(&cluster);
        Self { agent, domain, service, endpoints }
    }

    fn health(&self, endpoint: SocketAddr) -> EndpointHealth {
        let image = self.agent.image();
        let entry = image.reachable().find(|entry| entry.address() == endpoint).unwrap();
        self.agent.kernel.observations().endpoint_health(entry.endpoint_id)
    }

    fn times(&self) -> ConnectLatency {
        let image = self.agent.image();
        let frontend = image.frontends.values().find(|frontend| frontend.health != 0).unwrap();
        self.agent.kernel.observations().connect_latency(frontend.service_id)
    }

    fn explains_the_ejection_of(&self, endpoint: SocketAddr) {
        let observations = self.agent.kernel.observations();
        let mut simulator = Simulator::new(self.agent.image());
        simulator.now = host::monotonic();
        let to = FrontendAddress { ip: self.service.ip(), port: self.service.port(), protocol: Tcp };
        simulator.health = RefCell::new(
            observations.health_of(simulator.image.stored_at(to).into_iter().flat_map(StoredRun::reachable)),
        );
        let explanation = explain(&simulator, Some(&self.agent.state), to, Caller::default());
        let text = explanation.text();
        assert_eq!(explanation.ejected.len(), 1, "{text}");
        assert_eq!(explanation.ejected[0].endpoint, endpoint, "{text}");
        assert!(text.contains("of which 1 is ejected") && text.contains("the last one: no answer"), "{text}");
    }

    fn call(&self) -> Result<SocketAddr, Errno> {
        let socket = Socket::new(self.domain, Tcp);
        socket.connect(self.service)?;
        socket.ask().map(|answer| answer.server)
    }

    /// Begins calls until one waits for an endpoint that does not answer.
    fn begin(&self) -> Socket {
        loop {
            let socket = Socket::new(self.domain, Tcp);
            socket.set_nonblocking(true);
            assert_eq!(socket.connect(self.service), Err(Errno::EINPROGRESS));
            thread::sleep(Duration::from_millis(5));
            if socket.peer_name() == Err(Errno::ENOTCONN) {
                return socket;
            }
        }
    }
}

/// A listener whose accept queue is full: it drops every SYN, as if the node were gone.
struct Silent {
    listener: std::net::TcpListener,
    _queued: Vec<Socket>,
}

impl Silent {
    fn new(domain: Domain, address: SocketAddr) -> Self {
        let listener = std::net::TcpListener::bind(address).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let queued = (0..4).map(|_| {
            let socket = Socket::new(domain, Tcp);
            socket.set_nonblocking(true);
            assert_eq!(socket.connect(address), Err(Errno::EINPROGRESS));
            socket
        });
        Self { _queued: queued.collect(), listener }
    }

    /// Accepts everything from now on.
    fn recover(&self) {
        listen(&self.listener, Backlog::MAXCONN).unwrap();
        self.listener.set_nonblocking(true).unwrap();
        while self.listener.accept().is_ok() {}
    }
}

#[test]
fn a_refusing_endpoint_fails_three_calls() {
    with_service(&Domain::ALL, |node| {
        let _servers = Servers::tcp([node.endpoints[0]]);
        let outcomes: Vec<_> = (0..60).map(|_| node.call()).collect();
        let refused = outcomes.iter().filter(|outcome| **outcome == Err(Errno::ECONNREFUSED)).count();
        assert_eq!(refused, 3, "{:?} {outcomes:?}", node.domain);
        let health = node.health(node.endpoints[1]);
        assert_eq!((health.failures, health.ejections, health.errno), (3, 1, 111), "{:?}", node.domain);
        let health = node.health(node.endpoints[0]);
        assert_eq!((health.failures, health.ejected_until), (0, 0), "{:?}", node.domain);
        assert!(health.latency > 0 && health.latency < 100_000, "{health:?}");
    });
}

/// What a program does with a socket that connects.
type GiveUp = fn(Socket);

#[test]
fn a_program_that_gives_up_ejects_nothing() {
    with_service(&Domain::ALL, |node| {
        let _silent = node.endpoints.map(|endpoint| Silent::new(node.domain, endpoint));
        let ways: [(&str, GiveUp); 3] = [
            ("close", drop),
            ("shutdown", |socket| shutdown(socket.into_fd().as_raw_fd(), Shutdown::Both).unwrap()),
            ("connect(AF_UNSPEC)", |socket| socket.disconnect().unwrap()),
        ];
        for (way, give_up) in ways {
            for _ in 0..8 {
                give_up(node.begin());
            }
            for endpoint in node.endpoints {
                let health = node.health(endpoint);
                assert_eq!(health.failures, 0, "{way}, {:?}: {health:?}", node.domain);
            }
        }
    });
}

#[test]
fn a_silent_endpoint_is_ejected_until_a_connection_gets_through() {
    with_service(&FAMILIES, |node| {
        let _servers = Servers::tcp([node.endpoints[0]]);
        let silent = Silent::new(node.domain, node.endpoints[1]);
        let waiting = [node.begin(), node.begin(), node.begin()];
        eventually("ejected", || node.health(node.endpoints[1]).ejected_until != 0);
        for _ in 0..60 {
            assert_eq!(node.call(), Ok(node.endpoints[0]), "{:?}", node.domain);
        }
        assert_eq!(node.health(node.endpoints[1]).errno, 0);
        node.explains_the_ejection_of(node.endpoints[1]);
        silent.recover();
        // Their SYNs are sent again.
        eventually("back", || node.health(node.endpoints[1]).ejected_until == 0);
        drop(waiting);
    });
}

#[test]
fn an_accept_queue_that_is_full_for_two_seconds_ejects_nothing() {
    with_service(&FAMILIES, |node| {
        let silent = node.endpoints.map(|endpoint| Silent::new(node.domain, endpoint));
        let start = Instant::now();
        let waiting: Vec<Socket> = (0..8).map(|_| node.begin()).collect();
        thread::sleep(Duration::from_millis(1900).saturating_sub(start.elapsed()));
        silent.iter().for_each(Silent::recover);
        // Before Linux 6.5 the next SYN of those that wait leaves after three seconds. Others call meanwhile.
        for _ in 0..32 {
            Socket::new(node.domain, Tcp).connect(node.service).unwrap();
        }
        waiting.iter().for_each(Socket::wait_until_writable);
        for endpoint in node.endpoints {
            let health = node.health(endpoint);
            assert_eq!((health.failures, health.ejections), (0, 0), "{:?}: {health:?}", node.domain);
        }
    });
}

#[test]
fn affinity_leaves_an_ejected_endpoint_of_the_kernel() {
    Sandbox::test(|sandbox| {
        in_each_mode(sandbox, |options| {
            let mut node = Node::new(Domain::V4, options);
            let mut cluster = Node::cluster(node.service, &node.endpoints);
            let object = cluster.services.values().next().unwrap().clone();
            cluster.set(cluster::with_affinity(object, None));
            node.agent.follow(&cluster);
            let servers = node.endpoints.map(|endpoint| Servers::tcp([endpoint]));
            let first = node.call().unwrap();
            let (mut kept, mut stopped) = (Vec::new(), Vec::new());
            for (endpoint, servers) in node.endpoints.into_iter().zip(servers) {
                if endpoint == first { stopped.push(servers) } else { kept.push(servers) }
            }
            assert!((0..10).all(|_| node.call() == Ok(first)));
            drop(stopped);
            let outcomes: Vec<_> = (0..10).map(|_| node.call()).collect();
            assert!(outcomes[..3].iter().all(|outcome| *outcome == Err(Errno::ECONNREFUSED)), "{outcomes:?}");
            assert!(
                outcomes[3..].iter().all(|outcome| outcome.is_ok_and(|server| server != first)),
                "{outcomes:?}"
            );
        });
    });
}

/// What happens between two agents.
type Meanwhile = fn(&Sandbox, &mut Options);

/// An ejection outlives its agent, and is dropped with a map that is made anew: then three calls fail again.
#[test]
fn a_new_agent_finds_ejections_or_starts_without() {
    let nothing: Meanwhile = |_, _| {};
    let cases: [(&str, Meanwhile, bool); 5] = [
        ("a restart", nothing, true),
        ("another layout of health", |sandbox, _| change_layout(sandbox, "endpoint_health"), false),
        (
            "a deleted pin",
            |sandbox, _| fs::remove_file(sandbox.pin_path().join("endpoint_health")).unwrap(),
            false,
        ),
        ("another layout of the image", |sandbox, _| change_layout(sandbox, "frontends"), false),
        ("another size", |_, options| options.capacity.endpoints *= 2, false),
    ];
    Sandbox::test(|sandbox| {
        for (what, change, is_kept) in cases {
            let mut options = agent::options(sandbox);
            let mut node = Node::new(Domain::V4, &options);
            let [alive, dead] = node.endpoints;
            let _servers = Servers::tcp([alive]);
            let n_refused = |node: &Node| {
                let outcomes: Vec<_> = (0..60).map(|_| node.call()).collect();
                outcomes.iter().filter(|outcome| **outcome == Err(Errno::ECONNREFUSED)).count()
            };
            assert_eq!(n_refused(&node), 3, "{what}");
            let before = node.health(dead);
            let cluster = Node::cluster(node.service, &node.endpoints);
            let Node { agent, domain, service, endpoints } = node;
            drop(agent);
            change(sandbox, &mut options);
            let mut agent = start(&options);
            agent.follow(&cluster);
            node = Node { agent, domain, service, endpoints };
            assert_eq!(node.health(dead), if is_kept { before } else { EndpointHealth::default() }, "{what}");
            assert_eq!(n_refused(&node), if is_kept { 0 } else { 3 }, "{what}");
            // An endpoint that returns is a new one.
            node.agent.follow(&Node::cluster(service, &[alive]));
            node.agent.follow(&cluster);
            assert_eq!(node.health(dead), EndpointHealth::default(), "{what}");
            drop(node);
            pins::remove(&sandbox.pin_path()).unwrap();
        }
    });
}

/// Also the one that began with a SYN without an answer.
#[test]
fn the_time_of_each_connection_is_counted() {
    with_service(&Domain::ALL, |node| {
        let silent = node.endpoints.map(|endpoint| Silent::new(node.domain, endpoint));
        let waiting = node.begin();
        thread::sleep(Duration::from_millis(600));
        silent.iter().for_each(Silent::recover);
        waiting.wait_until_writable();
        drop(silent);
        let _servers = Servers::tcp(node.endpoints);
        let start = Instant::now();
        for _ in 0..20 {
            assert!(node.call().is_ok(), "{:?}", node.domain);
        }
        let took = start.elapsed();
        let times = node.times();
        assert_eq!(times.buckets.iter().sum::<u32>(), 21, "{:?}: {times:?}", node.domain);
        assert_eq!(times.buckets.last(), Some(&1), "{:?}: {times:?}", node.domain);
        // The SYN was sent again after a second.
        let sum = Duration::from_micros(times.sum);
        assert!(sum > Duration::from_millis(900) && sum < Duration::from_secs(8) + took, "{times:?}");
    });
}
