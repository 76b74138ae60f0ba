//! Connections from outside through a node whose endpoints, Services and agents change.
//!
//! # Purpose
//!
//! [`run`] starts the real agent with `--packets=all` on the node of a [`Bed`]. A client outside opens
//! connections at a rate: through node ports and load-balancer addresses, in both families, with both
//! external policies. Each asks and is answered. Meanwhile endpoints are replaced as in a rolling update,
//! other Services come and go, and agents are killed and restarted.
//!
//! # Invariants
//!
//! - Each called Service always has a ready endpoint, also on this node.
//! - As in Kubernetes, an endpoint terminates before it leaves, and not before the rules name it: an agent
//!   that lags would name it afterwards. It serves until the rules do not name it and the connections that
//!   began before that have ended.
//! - A new endpoint has another address.
//! - Measured times fail nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use lb_core::{
    model::{Family, Protocol},
    packets::{nft::Value, table_ids},
};
use lb_kernel::nftables::Nftables;
use lb_netns::{Answers, Servers};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream as AsyncStream},
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    Sandbox,
    bed::{Bed, FAMILIES, PATIENCE, PORT, Place, address},
    cgroup::make_threaded,
    cluster::{Cluster, Object, object},
    installed::{self, QUIET, Running, eventually},
    server,
};

/// Client addresses of each family: one has fewer ports than connections that the kernel still tracks.
const N_CLIENTS: u8 = 16;
/// The most connections at once. A client that waits for them offers less than its rate.
const MAX_OPEN: usize = 1000;
/// Addresses of an endpoint's successive servers.
const N_GENERATIONS: u8 = 4;
/// The port of the servers.
const TARGET_PORT: u16 = 9090;
/// A SYN is sent again after a second.
const SLOW: Duration = Duration::from_secs(1);
/// What an agent says after its first sync.
const SYNCED: &str = "synced for the first time";
/// The most failures that are described.
const MAX_DESCRIBED: usize = 20;
/// One Service in addition to those that are called has this many connections that stay open, in each family.
const STAY: [u8; 4] = [203, 0, 113, 3];

/// What happens, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// New connections per second.
    pub rate: u32,
    /// Duration.
    pub time: Duration,
    /// Determines the changes, not when they happen.
    pub seed: u64,
    /// Interval of changes.
    pub change: Duration,
    /// How long an agent follows the changes until it is killed or stopped.
    pub agent: Duration,
}

impl Options {
    /// A few replaced endpoints and agents within seconds.
    #[must_use]
    pub const fn short(seed: u64) -> Self {
        Self {
            rate: 300,
            time: Duration::from_secs(8),
            seed,
            change: Duration::from_millis(25),
            agent: Duration::from_millis(1500),
        }
    }
}

/// The result of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// [`Options::rate`]
    pub offered: u32,
    /// Connections per second.
    pub reached: f64,
    /// Connections.
    pub n_calls: usize,
    /// Connections that failed, or were answered wrongly.
    pub n_failures: usize,
    /// The first of those, and what else was wrong.
    pub failures: Vec<String>,
    /// How long `connect()` took: median, 99 of 100, and the longest.
    pub latencies: [Duration; 3],
    /// Connections whose first packet was lost.
    pub n_slow: usize,
    /// Changes of objects.
    pub n_changes: usize,
    /// Endpoints that ended after their removal.
    pub n_replaced: usize,
    /// Agents that were killed, and that were stopped.
    pub n_agents: [usize; 2],
    /// Exchanges on connections that stay open.
    pub n_exchanges: usize,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, most, longest] = self.latencies;
        let [killed, stopped] = self.n_agents;
        writeln!(
            f,
            "{} connections, {:.0} a second of {} offered; {} failed; connect() {median:?} (p50), {most:?} (p99), {longest:?} \
             (longest), {} with a lost first packet",
            self.n_calls, self.reached, self.offered, self.n_failures, self.n_slow
        )?;
        write!(
            f,
            "{} changes, {} endpoints replaced, {killed} agents killed and {stopped} stopped; {} exchanges on connections that \
             stay open",
            self.n_changes, self.n_replaced, self.n_exchanges
        )?;
        self.failures.iter().try_for_each(|failure| write!(f, "\n{failure}"))
    }
}

/// An address that the client calls.
#[derive(Clone, Copy, Debug)]
struct Target {
    at: SocketAddr,
    /// Whether the external policy is Local.
    is_local: bool,
}

/// The called Services: external policy, address of the load balancer, node port.
const SERVICES: [(&str, u8, u16); 2] = [("Cluster", 1, 30_080), ("Local", 2, 30_081)];

fn targets() -> Vec<Target> {
    let of = |(policy, last, node_port)| {
        let at = |family| {
            let node = SocketAddr::new(Place::Node.address(family), node_port);
            [node, SocketAddr::new(address(family, [203, 0, 113, last]), 80)]
        };
        let at_all = FAMILIES.into_iter().flat_map(at).collect::<Vec<_>>();
        at_all.into_iter().map(move |at| Target { at, is_local: policy == "Local" })
    };
    SERVICES.into_iter().flat_map(of).collect()
}

/// The places of endpoints, with the networks of their servers.
const PLACES: [(Place, [u8; 3]); 3] =
    [(Place::Pod, [10, 1, 3]), (Place::Second, [10, 1, 4]), (Place::Far, [10, 2, 3])];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// In the slices, and not yet in the rules.
    New,
    /// In both.
    Ready,
    /// Serving and terminating.
    Terminating,
    /// In no slice.
    Removed,
    /// In no rule since then.
    Unused(Instant),
    /// Without a server.
    Ended,
}

/// A replica, of which one pod after the other is an endpoint.
struct Replica {
    place: Place,
    network: [u8; 3],
    /// Of the address.
    number: u8,
    generation: u8,
    stage: Stage,
    servers: Option<Servers>,
}

impl Replica {
    fn addresses(network: [u8; 3], number: u8, generation: u8) -> [IpAddr; 2] {
        let [a, b, c] = network;
        FAMILIES.map(|family| address(family, [a, b, c, 1 + number * N_GENERATIONS + generation]))
    }

    fn own(&self) -> [IpAddr; 2] {
        Self::addresses(self.network, self.number, self.generation)
    }

    fn is_local(&self) -> bool {
        self.place != Place::Far
    }

    fn serve(&mut self, bed: &Bed) {
        let own = self.own();
        let bound = move || own.map(|ip| server::bind(SocketAddr::new(ip, TARGET_PORT), Protocol::Tcp));
        let servers = bed.at(self.place).run(|| {
            let sockets = bound().map(|socket| socket.expect("an address of the place"));
            Servers::start("outside", sockets, &Echo).expect("servers")
        });
        (self.servers, self.stage) = (Some(servers), Stage::New);
    }
}

/// Says its own address and the client's with each token that it gets.
#[derive(Clone)]
struct Echo;

impl Answers for Echo {
    async fn serve(self, mut stream: AsyncStream) -> std::io::Result<()> {
        let (own, client) = (stream.local_addr()?, stream.peer_addr()?);
        let mut token = [0; 8];
        loop {
            stream.read_exact(&mut token).await?;
            let token = u64::from_be_bytes(token);
            stream.write_all(format!("{own} {client} {token}\n").as_bytes()).await?;
        }
    }

    fn answer(&self, _own: SocketAddr, _client: SocketAddr, _datagram: &[u8]) -> Vec<u8> {
        Vec::new()
    }
}

/// What the client's thread and the others share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// When the oldest of the open connections began, in microseconds since the start.
    oldest: AtomicU64,
    calls: Mutex<Calls>,
}

#[derive(Default)]
struct Calls {
    connects: Vec<Duration>,
    n_failures: usize,
    failures: Vec<String>,
    open: BTreeMap<u64, u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Opens connections at a rate until it is stopped. Returns the number of connections and how long that took.
fn call_all(options: &Options, started: Instant, shared: &Arc<Shared>) -> (u64, Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let targets = targets();
        let (mut calls, mut n_calls) = (JoinSet::new(), 0);
        let mut pace = interval(Duration::from_millis(1));
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let begun = Instant::now();
        while !shared.stop.load(Ordering::Relaxed) {
            pace.tick().await;
            let due = micros(begun.elapsed()) * u64::from(options.rate) / 1_000_000;
            while n_calls < due && calls.len() < MAX_OPEN {
                let target = targets[usize::try_from(n_calls).unwrap_or_default() % targets.len()];
                let family = if target.at.is_ipv4() { Family::V4 } else { Family::V6 };
                let last = 1 + u8::try_from(n_calls / 7 % u64::from(N_CLIENTS)).unwrap_or_default();
                let from = address(family, [198, 51, 101, last]);
                let (shared, number) = (Arc::clone(shared), n_calls);
                lock(&shared.calls).open.insert(number, micros(started.elapsed()));
                calls.spawn(async move {
                    let begun = Instant::now();
                    let ended = timeout(PATIENCE, call(target, from, number)).await;
                    let result = ended.unwrap_or_else(|_late| Err("no answer".to_owned()));
                    let mut calls = lock(&shared.calls);
                    calls.open.remove(&number);
                    match result {
                        Ok(connected) => calls.connects.push(connected),
                        Err(problem) => {
                            calls.n_failures += 1;
                            if calls.failures.len() < MAX_DESCRIBED {
                                let (after, at) = (begun.elapsed(), begun.duration_since(started));
                                let line =
                                    format!("{at:?}: {from} to {}: {problem} after {after:?}", target.at);
                                calls.failures.push(line);
                            }
                        }
                    }
                });
                n_calls += 1;
            }
            while calls.try_join_next().is_some() {}
            let oldest = lock(&shared.calls).open.values().next().copied();
            shared.oldest.store(oldest.unwrap_or_else(|| micros(started.elapsed())), Ordering::Relaxed);
        }
        let took = begun.elapsed();
        while calls.join_next().await.is_some() {}
        (n_calls, took)
    })
}

/// Connects, asks, and checks the answer. Returns how long `connect()` took.
async fn call(target: Target, from: IpAddr, token: u64) -> Result<Duration, String> {
    let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let of = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
    let socket = socket.map_err(of("socket"))?;
    // Closed with a reset, so that no port waits.
    socket.set_zero_linger().map_err(of("SO_LINGER"))?;
    socket.bind(SocketAddr::new(from, 0)).map_err(of("bind"))?;
    let started = Instant::now();
    let mut stream = socket.connect(target.at).await.map_err(of("connect"))?;
    let connected = started.elapsed();
    stream.write_all(&token.to_be_bytes()).await.map_err(of("write"))?;
    let (mut answer, mut length) = ([0; 128], 0);
    while !answer[..length].ends_with(b"\n") {
        match stream.read(&mut answer[length..]).await.map_err(of("read"))? {
            0 => return Err("the connection is closed".to_owned()),
            n => length += n,
        }
    }
    let answer = String::from_utf8_lossy(&answer[..length - 1]).into_owned();
    let own = stream.local_addr().map_err(of("getsockname"))?;
    check(target, own, token, &answer).map(|()| connected).ok_or(answer)
}

/// `None` if the answer is not the one to this question, or the server sees another client than the policy
/// says.
fn check(target: Target, own: SocketAddr, token: u64, answer: &str) -> Option<()> {
    let mut words = answer.split(' ');
    let server: SocketAddr = words.next()?.parse().ok()?;
    let client: SocketAddr = words.next()?.parse().ok()?;
    // The kernel chooses another port if a connection that it still tracks has the client's to the same
    // endpoint.
    let is_seen = if target.is_local { client.ip() == own.ip() } else { Bed::is_of_node(client.ip()) };
    let is_right = server.port() == TARGET_PORT && words.next()? == token.to_string();
    (is_seen && is_right).then_some(())
}

/// The endpoints that the rules of the calling thread's namespace name; `None` while they cannot be read.
fn endpoints_of_rules(nftables: &mut Nftables) -> Option<BTreeSet<IpAddr>> {
    let mut found = BTreeSet::new();
    for (id, set) in
        table_ids().iter().flat_map(|id| ["endpoints", "nodeport-endpoints"].map(|set| (id, set)))
    {
        for element in nftables.elements(id, set).ok()?.values() {
            let Value::Data(octets) = &element.value else { return None };
            let octets = octets.as_slice();
            let v4 = || <[u8; 4]>::try_from(octets.get(..4)?).ok().map(IpAddr::from);
            let v6 = || <[u8; 16]>::try_from(octets.get(..16)?).ok().map(IpAddr::from);
            found.insert(if octets.len() < 16 { v4()? } else { v6()? });
        }
    }
    Some(found)
}

fn service(name: &str, policy: &str, last: u8, node_port: u16) -> Object {
    let ips = |v4| FAMILIES.map(|family| address(family, v4));
    let cluster_ips = ips([10, 96, 0, last]);
    let health_check = (policy == "Local").then_some(node_port + 1000);
    object(&json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": name},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "externalTrafficPolicy": policy,
            "healthCheckNodePort": health_check,
            "ports": [{"name": "", "protocol": "TCP", "port": 80, "nodePort": node_port}],
        },
        "status": {"loadBalancer": {"ingress": ips([203, 0, 113, last]).map(|ip| json!({"ip": ip}))}},
    }))
    .expect("a Service")
}

/// The slices of a Service: endpoints with both addresses, their node, and whether they terminate.
fn slices(service: &str, port: u16, endpoints: &[([IpAddr; 2], Place, bool)]) -> [Object; 2] {
    [0, 1].map(|family| {
        let endpoints = endpoints.iter().map(|(ips, place, is_terminating)| {
            json!({
                "addresses": [ips[family]],
                "nodeName": place.node_name(),
                "conditions": {
                    "ready": !is_terminating, "serving": true, "terminating": is_terminating,
                },
            })
        });
        let kind = ["IPv4", "IPv6"][family];
        object(&json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": "default",
                "name": format!("{service}-{}", kind.to_lowercase()),
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": kind,
            "ports": [{"name": "", "protocol": "TCP", "port": port}],
            "endpoints": endpoints.collect::<Vec<_>>(),
        }))
        .expect("an EndpointSlice")
    })
}

/// The objects, and what is behind them.
struct World<'a> {
    bed: &'a Bed,
    place: &'a installed::Place,
    random: fastrand::Rng,
    replicas: Vec<Replica>,
    /// Services that come and go.
    others: BTreeSet<u8>,
    /// The endpoints of the Service with connections that stay, and its policy.
    stay: (Vec<Place>, &'static str),
    n_changes: usize,
    n_replaced: usize,
}

impl<'a> World<'a> {
    fn new(bed: &'a Bed, place: &'a installed::Place, seed: u64) -> Self {
        let mut replicas = Vec::new();
        for (place, network) in PLACES {
            for number in 0..2 {
                let servers = None;
                let stage = Stage::Ended;
                let mut replica = Replica { place, network, number, generation: 0, stage, servers };
                replica.serve(bed);
                replicas.push(replica);
            }
        }
        let random = fastrand::Rng::with_seed(seed);
        let stay = (vec![Place::Pod, Place::Far], "Cluster");
        Self { bed, place, random, replicas, others: BTreeSet::new(), stay, n_changes: 0, n_replaced: 0 }
    }

    fn cluster(&self) -> Cluster {
        let endpoints: Vec<_> = self
            .replicas
            .iter()
            .filter(|replica| matches!(replica.stage, Stage::New | Stage::Ready | Stage::Terminating))
            .map(|replica| (replica.own(), replica.place, replica.stage == Stage::Terminating))
            .collect();
        let mut cluster = Cluster::new().with(Bed::nodes());
        let mut add = |name: &str, policy: &str, last, node_port| {
            cluster.set(service(name, policy, last, node_port));
            for slice in slices(name, TARGET_PORT, &endpoints) {
                cluster.set(slice);
            }
        };
        for (policy, last, node_port) in SERVICES {
            add(&policy.to_lowercase(), policy, last, node_port);
        }
        for &number in &self.others {
            add(&format!("other-{number}"), "Cluster", 100 + number, 31_000 + u16::from(number));
        }
        let (places, policy) = &self.stay;
        let of_stay: Vec<_> = places
            .iter()
            .map(|place| (FAMILIES.map(|family| place.address(family)), *place, false))
            .collect();
        cluster.set(service("stay", policy, STAY[3], 30_082));
        for slice in slices("stay", PORT, &of_stay) {
            cluster.set(slice);
        }
        cluster
    }

    fn write(&mut self) {
        self.place.write(&self.cluster());
        self.n_changes += 1;
    }

    /// Whether a ready endpoint may go: each policy keeps one.
    fn may_go(&self, number: usize) -> bool {
        let n_ready = |is_local: bool| {
            let of = |replica: &&Replica| replica.stage == Stage::Ready && replica.is_local() == is_local;
            self.replicas.iter().filter(of).count()
        };
        !self.replicas[number].is_local() || n_ready(true) > 1
    }

    /// Follows the rules, and ends the servers of endpoints that neither a rule nor a connection needs.
    fn follow_rules(&mut self, nftables: &mut Nftables, oldest: Instant) {
        let is_awaited = |replica: &Replica| matches!(replica.stage, Stage::New | Stage::Removed);
        if self.replicas.iter().any(is_awaited)
            && let Some(named) = endpoints_of_rules(nftables)
        {
            for replica in &mut self.replicas {
                let own = replica.own();
                match replica.stage {
                    Stage::New if own.iter().all(|ip| named.contains(ip)) => replica.stage = Stage::Ready,
                    Stage::Removed if !own.iter().any(|ip| named.contains(ip)) => {
                        replica.stage = Stage::Unused(Instant::now());
                    }
                    _ => {}
                }
            }
        }
        for replica in &mut self.replicas {
            if matches!(replica.stage, Stage::Unused(since) if since < oldest) {
                replica.servers = None;
                replica.stage = Stage::Ended;
                replica.generation = (replica.generation + 1) % N_GENERATIONS;
                self.n_replaced += 1;
            }
        }
    }

    /// Makes one change.
    fn change(&mut self) {
        match self.random.u8(0..10) {
            0 => {
                let number = self.random.u8(0..8);
                if !self.others.remove(&number) {
                    self.others.insert(number);
                }
            }
            1 => {
                let of_some = [vec![Place::Pod], vec![Place::Far], vec![], vec![Place::Pod, Place::Far]];
                let places = self.random.choice(of_some).expect("a choice");
                self.stay = (places, if self.random.bool() { "Cluster" } else { "Local" });
            }
            _ => {
                let number = self.random.usize(0..self.replicas.len());
                match self.replicas[number].stage {
                    Stage::Ready if self.may_go(number) => self.replicas[number].stage = Stage::Terminating,
                    Stage::Terminating => self.replicas[number].stage = Stage::Removed,
                    Stage::Ended => self.replicas[number].serve(self.bed),
                    Stage::New | Stage::Ready | Stage::Removed | Stage::Unused(_) => return,
                }
            }
        }
        self.write();
    }
}

/// Connections that stay open, to a Service whose endpoints and policy change.
struct Staying(Vec<(SocketAddr, TcpStream)>);

impl Staying {
    fn open(bed: &Bed) -> Self {
        let at = FAMILIES.into_iter().flat_map(|family| {
            let node = SocketAddr::new(Place::Node.address(family), 30_082);
            [node, SocketAddr::new(address(family, STAY), 80)]
        });
        let open = |at: SocketAddr| {
            let (stream, _) = crate::bed::connect(at, PATIENCE).expect("a Service with endpoints");
            (at, stream)
        };
        Self(bed.at(Place::Outside).run(|| at.map(open).collect()))
    }

    /// Asks each of them.
    fn exchange(&mut self, n_exchanges: usize) -> std::io::Result<()> {
        for (_, stream) in &mut self.0 {
            let question = n_exchanges.to_be_bytes();
            stream.write_all(&question)?;
            let mut answer = [0; size_of::<usize>()];
            stream.read_exact(&mut answer)?;
            if answer != question {
                return Err(std::io::ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }
}

/// Gives the client and the endpoints their addresses.
fn add_addresses(bed: &Bed) {
    let add = |place: Place, ip: IpAddr| {
        bed.at(place).add_address(ip).unwrap_or_else(|error| panic!("{place:?}: {error}"));
    };
    let route = |at: Place, [a, b, c]: [u8; 3], gateway: Place| {
        for family in FAMILIES {
            let prefix = if family == Family::V4 { 24 } else { 64 };
            let network = (address(family, [a, b, c, 0]), prefix);
            bed.at(at)
                .add_route(network, gateway.address(family))
                .unwrap_or_else(|error| panic!("{at:?}: {error}"));
        }
    };
    for (family, last) in FAMILIES.iter().flat_map(|family| (1..=N_CLIENTS).map(move |last| (*family, last)))
    {
        add(Place::Outside, address(family, [198, 51, 101, last]));
    }
    route(Place::Edge, [198, 51, 101], Place::Outside);
    for (place, network) in PLACES {
        for number in 0..2 {
            for generation in 0..N_GENERATIONS {
                let own = Replica::addresses(network, number, generation);
                for ip in own {
                    add(place, ip);
                }
            }
        }
        route(if place == Place::Far { Place::Other } else { Place::Node }, network, place);
    }
}

/// Calls while everything changes.
///
/// # Panics
///
/// If there is no sandbox or no bed, or the agent does not start: see [`crate::require`].
#[must_use]
pub fn run(binary: &Path, options: &Options) -> Outcome {
    Sandbox::run(|sandbox| {
        let bed = Bed::new();
        add_addresses(&bed);
        let mut place = installed::Place::new(sandbox, binary.to_str().expect("a path in UTF-8").to_owned());
        // Nothing here is served by hooks: the client is another host.
        let served = sandbox.cgroup().path().join("served");
        make_threaded(&served).expect("a cgroup");
        served.to_str().expect("a path in UTF-8").clone_into(&mut place.cgroup);
        run_on(&bed, &place, options)
    })
}

fn run_on(bed: &Bed, place: &installed::Place, options: &Options) -> Outcome {
    let start = || -> Running {
        let flags = ["--packets=all", "--service-cidr=10.96.0.0/16,fd00:10:96::/48"];
        bed.at(Place::Node).run(|| place.start(&[&flags[..], &QUIET].concat()))
    };
    let mut world = World::new(bed, place, options.seed);
    world.write();
    let mut agent = start();
    let mut nftables = bed.at(Place::Node).run(|| Nftables::open().expect("nftables"));
    let n_wanted = 2 * (world.replicas.len() + 2);
    for _ in 0..3000 {
        if endpoints_of_rules(&mut nftables).is_some_and(|named| named.len() == n_wanted) {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    eventually("the agent has synced", || agent.has_said(SYNCED));
    let mut staying = Staying::open(bed);
    let shared = Arc::new(Shared::default());
    let mut outcome = Outcome { offered: options.rate, ..Outcome::default() };
    let started = Instant::now();
    thread::scope(|scope| {
        let calling = scope.spawn(|| bed.at(Place::Outside).run(|| call_all(options, started, &shared)));
        let (mut synced, mut exchanged) = (None::<Instant>, Instant::now());
        let (mut logs, mut problems) = (Vec::new(), Vec::new());
        while !calling.is_finished() {
            let is_late = world.n_replaced == 0 && started.elapsed() < 3 * PATIENCE;
            if started.elapsed() >= options.time && !is_late {
                break;
            }
            thread::sleep(options.change);
            let oldest = started + Duration::from_micros(shared.oldest.load(Ordering::Relaxed));
            world.follow_rules(&mut nftables, oldest);
            world.change();
            if exchanged.elapsed() > Duration::from_millis(500) {
                exchanged = Instant::now();
                if let Err(error) = staying.exchange(outcome.n_exchanges) {
                    problems.push(format!("{:?}: a connection that stays: {error}", started.elapsed()));
                    break;
                }
                outcome.n_exchanges += staying.0.len();
            }
            if synced.is_none() && agent.has_said(SYNCED) {
                synced = Some(Instant::now());
            }
            if synced.is_some_and(|since| since.elapsed() > options.agent) {
                let number = (outcome.n_agents[0] + outcome.n_agents[1]) % 2;
                let signal = [Signal::SIGKILL, Signal::SIGTERM][number];
                outcome.n_agents[number] += 1;
                logs.extend(agent.end_with_log(signal).1);
                (agent, synced) = (start(), None);
            }
        }
        shared.stop.store(true, Ordering::Relaxed);
        let (n_calls, took) = calling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.n_calls = usize::try_from(n_calls).unwrap_or(usize::MAX);
        #[expect(clippy::cast_precision_loss, reason = "fewer than 2^53")]
        let reached = n_calls as f64 / took.as_secs_f64();
        outcome.reached = reached;
        logs.extend(agent.end_with_log(Signal::SIGTERM).1);
        problems.extend(logs.into_iter().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")));
        outcome.failures = problems;
    });
    let mut calls = std::mem::take(&mut *lock(&shared.calls));
    outcome.n_failures = calls.n_failures;
    outcome.failures.splice(0..0, calls.failures);
    calls.connects.sort_unstable();
    let at = |share: usize| calls.connects.get(calls.connects.len() * share / 1000).copied();
    outcome.latencies = [at(500), at(990), calls.connects.last().copied()].map(Option::unwrap_or_default);
    outcome.n_slow = calls.connects.iter().filter(|connect| **connect > SLOW).count();
    (outcome.n_changes, outcome.n_replaced) = (world.n_changes, world.n_replaced);
    outcome
}
