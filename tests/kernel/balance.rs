//! Load: how a call chooses among endpoints, by shares and by open connections.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use lb_agent::controller::sweep::{Recount, open_connections};
use lb_core::model::Protocol::Tcp;
use lb_kernel::{Observations, Options, pins, sockets::SocketTable};
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::Cluster,
    server::Servers,
};

use crate::fixture::{FAMILIES, addresses, connected, in_each_mode, service_address, start};

const N_ENDPOINTS: usize = 3;

/// How long a connection is open, in connections.
const TICKS: usize = 100;

/// A service with an annotation, and servers at its endpoints.
struct Node {
    agent: Agent,
    domain: Domain,
    endpoints: [SocketAddr; N_ENDPOINTS],
    _servers: Servers,
}

impl Node {
    fn new(domain: Domain, options: &Options, balance: &str) -> Self {
        let endpoints = addresses::<N_ENDPOINTS>(domain, 8001);
        let cluster = Cluster::new().serving("web", service_address(domain), Tcp, &endpoints);
        let mut agent = start(options);
        agent.follow(&cluster.annotated("socklb.io/balance", balance));
        Self { agent, domain, endpoints, _servers: Servers::tcp(endpoints) }
    }

    /// A connection, and the position of its endpoint.
    fn connect(&self) -> (Socket, usize) {
        let socket = connected(self.domain, Tcp, service_address(self.domain));
        let server = socket.ask().unwrap().server;
        (socket, self.endpoints.iter().position(|endpoint| *endpoint == server).unwrap())
    }

    /// The open connections of each endpoint, as the programs count them.
    fn active(&self) -> [u32; N_ENDPOINTS] {
        let image = self.agent.image();
        self.endpoints.map(|endpoint| {
            let entry = image.reachable().find(|entry| entry.address() == endpoint).unwrap();
            self.agent.kernel.observations().active(entry.endpoint_id)
        })
    }
}

/// Corrects the counts as two sweeps do.
fn recount(options: &Options) {
    let (mut recount, observations) = (Recount::default(), Observations::open(&options.pin_path).unwrap());
    for _ in 0..2 {
        let records = SocketTable::open(&options.pin_path).unwrap().answering().unwrap();
        let counted = observations.loads().collect();
        observations.correct_loads(&recount.compared(&open_connections(&records), &counted, Instant::now()));
    }
}

/// The number of connections to each endpoint.
fn by_endpoint(connections: &[(Socket, usize)]) -> [u32; N_ENDPOINTS] {
    let mut open = [0; N_ENDPOINTS];
    for (_, place) in connections {
        open[*place] += 1;
    }
    open
}

/// Runs a test with records in slots, if this kernel has them: the programs count these sockets.
fn with_slots(test: impl Fn(&Options) + Send + Sync) {
    Sandbox::test(|sandbox| {
        for options in agent::modes(sandbox).iter().filter(|options| options.features.has_slots()) {
            test(options);
            pins::remove(&sandbox.pin_path()).unwrap();
        }
    });
}

/// A connection each tick, which ends after [`TICKS`] or, at the first endpoint, ten times as many. Returns
/// the open connections of each endpoint once they have settled.
fn settled(node: &Node) -> [usize; N_ENDPOINTS] {
    let (mut ends, mut open) = (BTreeMap::<usize, Vec<Socket>>::new(), [0; N_ENDPOINTS]);
    let mut places = BTreeMap::<usize, Vec<usize>>::new();
    for tick in 0..24 * TICKS {
        drop(ends.remove(&tick));
        for place in places.remove(&tick).unwrap_or_default() {
            open[place] -= 1;
        }
        let (socket, place) = node.connect();
        open[place] += 1;
        let end = tick + if place == 0 { 10 * TICKS } else { TICKS };
        ends.entry(end).or_default().push(socket);
        places.entry(end).or_default().push(place);
    }
    open
}

#[test]
fn least_connections_evens_out_open_connections_and_random_does_not() {
    with_slots(|options| {
        let random = settled(&Node::new(Domain::V4, options, "random"));
        assert!(random[0] > 3 * random[1].max(random[2]), "random: {random:?}");
    });
    with_slots(|options| {
        let open = settled(&Node::new(Domain::V4, options, "least-connections"));
        let others = (open[1] + open[2]).div_ceil(2);
        assert!(open[0].abs_diff(others) * 10 <= others + 10, "least-connections: {open:?}");
    });
}

/// Replaces all endpoints one after the other, while every client holds a connection and connects again when
/// its endpoint leaves. Returns the connections of the new endpoints.
fn open_after_rollout(options: &Options, balance: &str) -> [u32; N_ENDPOINTS] {
    let service = service_address(Domain::V4);
    let endpoints = addresses::<{ 2 * N_ENDPOINTS }>(Domain::V4, 8001);
    let _servers = Servers::tcp(endpoints);
    let mut agent = start(options);
    let mut serve = |endpoints: &[SocketAddr]| {
        let cluster = Cluster::new().serving("web", service, Tcp, endpoints);
        agent.follow(&cluster.annotated("socklb.io/balance", balance));
    };
    let connect = || {
        let socket = connected(Domain::V4, Tcp, service);
        let server = socket.ask().unwrap().server;
        (socket, server)
    };
    serve(&endpoints[..N_ENDPOINTS]);
    let mut clients: Vec<(Socket, SocketAddr)> = (0..120).map(|_| connect()).collect();
    for serving in endpoints.windows(N_ENDPOINTS + 1) {
        serve(serving);
        serve(&serving[1..]);
        for client in clients.iter_mut().filter(|(_, server)| *server == serving[0]) {
            *client = connect();
        }
    }
    let mut open = [0; N_ENDPOINTS];
    for (_, server) in &clients {
        open[endpoints.iter().position(|endpoint| endpoint == server).unwrap() - N_ENDPOINTS] += 1;
    }
    open
}

#[test]
fn long_lived_connections_are_even_after_a_rollout() {
    let last = AtomicU32::new(0);
    for _ in 0..5 {
        with_slots(|options| {
            last.fetch_add(open_after_rollout(options, "random")[2], Ordering::Relaxed);
        });
    }
    // About 27 of 120 each time. On a kernel without slots, nothing is measured.
    assert!(last.into_inner() < 5 * 36, "random is even, too");
    with_slots(|options| {
        let open = open_after_rollout(options, "least-connections");
        assert!(open.iter().all(|open| open.abs_diff(40) <= 4), "least-connections: {open:?}");
    });
}

#[test]
fn connections_are_counted_until_they_are_closed() {
    for domain in Domain::ALL {
        with_slots(|options| {
            let node = Node::new(domain, options, "least-connections");
            let mut sockets: Vec<_> = (0..30).map(|_| node.connect()).collect();
            let active = node.active();
            assert_eq!(active.iter().sum::<u32>(), 30, "{domain:?}: {active:?}");
            assert!(active.iter().all(|active| active.abs_diff(10) <= 2), "{domain:?}: {active:?}");
            sockets.truncate(9);
            assert_eq!(node.active(), by_endpoint(&sockets), "{domain:?}: closed");
            // A socket that connects again leaves its endpoint.
            let (socket, _) = &sockets[0];
            socket.disconnect().unwrap();
            socket.connect(service_address(domain)).unwrap();
            assert_eq!(node.active().iter().sum::<u32>(), 9, "{domain:?}: connected again");
            drop(sockets);
            assert_eq!(node.active(), [0; N_ENDPOINTS], "{domain:?}: all closed");
        });
    }
}

#[test]
fn counts_follow_the_records_after_a_loss() {
    for domain in FAMILIES {
        Sandbox::test(|sandbox| {
            in_each_mode(sandbox, |options| {
                let node = Node::new(domain, options, "least-connections");
                let sockets: Vec<_> = (0..9).map(|_| node.connect()).collect();
                let open = by_endpoint(&sockets);
                let observations = node.agent.kernel.observations();
                for (id, damage) in (0..).zip([5, -7, 100]) {
                    observations.correct_loads(&BTreeMap::from([(id, damage)]));
                }
                assert_ne!(node.active(), open);
                recount(options);
                assert_eq!(node.active(), open, "{domain:?}");
            });
        });
    }
}
