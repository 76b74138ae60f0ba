//! Long-running random changes, with faults of the API server and concurrent calls.
//!
//! # Purpose
//!
//! [`run`] starts the real agent with a test API server and changes objects at random. Meanwhile it injects
//! faults: into the server and, if requested, into the agent, which is killed and replaced. Every call is
//! checked at once. At the end the kernel's maps are compared with the state computed from scratch from the
//! server's objects.
//!
//! # Invariants
//!
//! - The seed determines the objects and their changes. It does not determine when changes happen or what
//!   calls observe.
//! - Every endpoint always answers, over TCP and UDP. So a call to a service that always has a ready endpoint
//!   fails only if the maps are wrong.
//! - An endpoint address belongs to one service forever: a call that reaches another address reached another
//!   service.
//! - Measured times and sizes fail nothing here. [`Observed::flaws`] checks them.

mod life;
mod meter;
mod truth;

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::{
        PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use k8s_openapi::api::{
    core::v1::{Service, ServicePort},
    discovery::v1::{EndpointConditions, EndpointSlice},
};
use lb_core::{
    desired::FrontendAddress,
    model::Protocol::{self, Tcp, Udp},
    plan::Capacity,
    state::State,
    tables::Image,
};
use lb_kernel::{Features, Maps, addresses, pins, sockets::SocketTable, syscall};
use nix::errno::Errno;

pub use self::{
    life::Events,
    meter::{Minute, Observed},
    truth::{Delays, Truth},
};

use self::life::{Life, Present, Start};
use crate::{
    Sandbox,
    agent::{self, Agent, content},
    apiserver::{ApiServer, Kind},
    client::{Answer, Domain, Socket, call},
    cluster::{self, NAMESPACE, PortOf},
    server::Servers,
};

/// Services that always exist and always have a ready endpoint. Every fourth is IPv6.
const N_STEADY: usize = 8;
/// Services that are created and deleted.
const N_OTHERS: usize = 48;
/// Both. Services beyond are [`is_plain`].
const N_MIXED: usize = N_STEADY + N_OTHERS;
/// The most endpoints of one of those.
const N_ENDPOINTS: usize = 6;
/// One plain service in this number is created and deleted. The others always have a ready endpoint.
const PLAIN_OTHERS: usize = 16;
/// The most services: the address range has no more.
pub const MAX_SERVICES: usize = 60_000;
/// The most endpoints of a plain service: the address range has no more.
pub const MAX_ENDPOINTS: usize = 120;
/// The ports of a service that is not plain, TCP and UDP, each with its own endpoints.
const PORTS: [(&str, Protocol); 2] = [("t", Tcp), ("u", Udp)];
const TARGET_PORT: u16 = 8080;
const SERVICE_PORT: u16 = 80;
/// Threads that call.
const N_CALLERS: u64 = 2;
/// How long the agent may lag after the last change. Its longest pause between two attempts is 30 seconds.
const PATIENCE: Duration = Duration::from_secs(90);

/// What happens, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Determines objects and changes.
    pub seed: u64,
    /// Duration of the run.
    pub time: Duration,
    /// Interval of changes.
    pub change: Duration,
    /// Interval at which all watches are cut.
    pub cut: Duration,
    /// Interval of compactions, each of which closes all watches with 410.
    pub expire: Duration,
    /// Interval of API server restarts.
    pub restart: Duration,
    /// Interval of each caller's calls.
    pub call: Duration,
    /// How many agents are killed, stopped and replaced. The run is over after the last.
    pub n_events: u64,
    /// Number of services, at least `N_MIXED`. Further ones have one TCP port and [`Self::n_endpoints`]
    /// endpoints.
    pub n_services: usize,
    /// See [`Self::n_services`].
    pub n_endpoints: usize,
    /// Mean lifetime of agents that are killed and replaced in addition to [`Self::n_events`].
    pub kill: Option<Duration>,
    /// Interval of lines of figures. If set, the commands' output is checked too.
    pub report: Option<Duration>,
}

impl Options {
    /// Watches cut every 2 seconds, a 410 every 30 seconds, a restart every 45 seconds.
    #[must_use]
    pub const fn long(seed: u64, time: Duration) -> Self {
        Self {
            seed,
            time,
            change: Duration::from_millis(10),
            cut: Duration::from_secs(2),
            expire: Duration::from_secs(30),
            restart: Duration::from_secs(45),
            call: Duration::from_millis(1),
            n_events: 0,
            n_services: N_MIXED,
            n_endpoints: N_ENDPOINTS,
            kill: None,
            report: None,
        }
    }

    /// Many services. Faults are as rare as a start at that size requires, and calls leave the CPU to the
    /// agent.
    #[must_use]
    pub const fn large(self, n_services: usize, n_endpoints: usize) -> Self {
        Self {
            cut: Duration::from_secs(30),
            expire: Duration::from_secs(300),
            restart: Duration::from_secs(600),
            call: Duration::from_millis(10),
            n_services: if n_services > N_MIXED { n_services } else { N_MIXED },
            n_endpoints,
            ..self
        }
    }

    /// The same with agents that are killed, stopped and replaced, until the time is over or this number is
    /// reached.
    #[must_use]
    pub const fn chaos(seed: u64, n_events: u64, time: Duration) -> Self {
        Self { n_events, ..Self::long(seed, time) }
    }

    /// Every fault a few times within 20 seconds.
    #[must_use]
    pub const fn short(seed: u64) -> Self {
        Self {
            cut: Duration::from_secs(2),
            expire: Duration::from_secs(5),
            restart: Duration::from_secs(6),
            ..Self::long(seed, Duration::from_secs(14))
        }
    }
}

/// Result of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Changes of objects.
    pub n_changes: u64,
    /// Calls to services that always have a ready endpoint. Each reached one.
    pub n_steady_calls: u64,
    /// Calls to other services.
    pub n_other_calls: u64,
    /// Those of [`Self::n_other_calls`] that were refused or reached no host.
    pub n_other_failures: u64,
    /// UDP answers that seem to come from the endpoint and not from the service: sockets lose their records
    /// when the layout changes.
    pub n_unmasked: u64,
    /// Cuts, compactions and restarts.
    pub n_faults: u64,
    /// How agents exited.
    pub events: Events,
    /// How long the agent took to catch up at the end.
    pub caught_up: Duration,
    /// Measurements, with [`Options::report`].
    pub observed: Option<Observed>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} changes, {} faults, {}; {} calls to services with a ready endpoint, none failed; {} other calls, {} of \
             them without an endpoint; {} answers without a record; the maps were right {:?} after the last change",
            self.n_changes,
            self.n_faults,
            self.events,
            self.n_steady_calls,
            self.n_other_calls,
            self.n_other_failures,
            self.n_unmasked,
            self.caught_up
        )?;
        self.observed.as_ref().map_or(Ok(()), |observed| write!(f, "\n\n{observed}"))
    }
}

/// Reproducible pseudo-random numbers (`splitmix64`).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit.max(1) as u64)).unwrap_or_default()
    }
}

fn is_ipv6(service: usize) -> bool {
    service < N_MIXED && service % 4 == 3
}

/// Whether a service has one TCP port and no IPv6 address. UDP would need a socket for each endpoint.
fn is_plain(service: usize) -> bool {
    service >= N_MIXED
}

/// Whether a service always exists and always has a ready endpoint.
fn is_steady(service: usize) -> bool {
    service < N_STEADY || (is_plain(service) && !service.is_multiple_of(PLAIN_OTHERS))
}

fn name(service: usize) -> String {
    format!("churn-{service:02}")
}

impl fmt::Display for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { n_kills, n_faults, n_ends, n_upgrades, n_layouts, n_sizes } = self;
        write!(
            f,
            "agents: {n_kills} killed, {n_faults} killed between two changes to the kernel, {n_ends} stopped, {n_upgrades} \
             replaced while another waited, {n_layouts} with maps of another layout, {n_sizes} with other sizes"
        )
    }
}

fn octet(number: usize) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

fn service_address(service: usize) -> SocketAddr {
    let ip = if is_ipv6(service) {
        Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1 + u16::from(octet(service))).into()
    } else {
        let first = u32::from(Ipv4Addr::new(10, 96, 0, 1));
        IpAddr::from(Ipv4Addr::from(first + u32::try_from(service).unwrap_or(u32::MAX)))
    };
    SocketAddr::new(ip, SERVICE_PORT)
}

fn endpoint(service: usize, number: usize) -> SocketAddr {
    let (high, low, number) = (octet(service / 256), octet(service % 256), 1 + octet(number));
    let ip = if is_ipv6(service) {
        Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, low.into(), number.into()).into()
    } else {
        IpAddr::from(Ipv4Addr::new(127, 1 + high, low, number))
    };
    SocketAddr::new(ip, TARGET_PORT)
}

fn owner(endpoint: SocketAddr) -> usize {
    match endpoint.ip() {
        IpAddr::V4(ip) => {
            let [_, high, low, _] = ip.octets();
            usize::from(high.wrapping_sub(1)) * 256 + usize::from(low)
        }
        IpAddr::V6(ip) => usize::from(ip.segments()[6]),
    }
}

/// The API server: several threads change objects, one stops and starts it.
struct Server(RwLock<ApiServer>);

impl Server {
    fn read(&self) -> RwLockReadGuard<'_, ApiServer> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, ApiServer> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Changes objects in a new sandbox until the time is over, and returns the result.
///
/// # Errors
///
/// If a call has a wrong result, or the maps do not become right.
///
/// # Panics
///
/// If there is no sandbox: see [`crate::require`].
pub fn run(socklb: &[PathBuf], options: &Options) -> anyhow::Result<Outcome> {
    ensure!(options.n_services <= MAX_SERVICES, "{MAX_SERVICES} services at most");
    ensure!((1..=MAX_ENDPOINTS).contains(&options.n_endpoints), "1 to {MAX_ENDPOINTS} endpoints");
    Sandbox::run(|sandbox| {
        let endpoints_of = |service| (0..N_ENDPOINTS).map(move |number| endpoint(service, number));
        let ipv6: Vec<SocketAddr> =
            (0..N_MIXED).filter(|service| is_ipv6(*service)).flat_map(endpoints_of).collect();
        sandbox.own(ipv6.iter().map(SocketAddr::ip));
        // Every address in 127.0.0.0/8 is local, so one server serves all IPv4 endpoints.
        let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, TARGET_PORT));
        // Not for UDP: such a server would not know the address it was called at.
        let datagrams = (0..N_MIXED).flat_map(endpoints_of);
        let servers = [Servers::tcp(ipv6.iter().copied().chain([ipv4])), Servers::udp(datagrams)];
        let server = Server(RwLock::new(ApiServer::start()));
        let mut objects = Objects::new(options);
        objects.create(&server.read());
        let start = Start::with_room_for(options.n_services);
        let mut life = Life::begin(socklb, sandbox, &server.read(), options.seed, start)?;
        let present = life.present();
        let mut outcome = Outcome::default();
        for service in 0..N_STEADY {
            until(&life, "the first services answer", || call(service_address(service), Tcp).is_ok())?;
        }
        let (stop, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
        // Measurement stops with the changes.
        let unobserved = AtomicBool::new(false);
        let counts = Counts::default();
        thread::scope(|scope| -> anyhow::Result<()> {
            let callers: Vec<_> = (0..N_CALLERS)
                .map(|number| {
                    let (stop, counts) = (&stop, &counts);
                    scope.spawn(move || {
                        let result = calls(options, number, stop, counts);
                        // After a failure the other threads stop too.
                        if result.is_err() {
                            stop.store(true, Ordering::Relaxed);
                        }
                        result
                    })
                })
                .collect();
            let (life, is_over, stop, server, unobserved) =
                (&mut life, &is_over, &stop, &server, &unobserved);
            let observing = options.report.map(|interval| {
                let (present, counts) = (&present, &counts);
                let metering = scope.spawn(move || meter::observe(present, counts, interval, unobserved));
                let asking = scope.spawn(move || {
                    let result = truth::ask(present, server, sandbox, &socklb[0], unobserved);
                    if result.is_err() {
                        stop.store(true, Ordering::Relaxed);
                    }
                    result
                });
                (metering, asking)
            });
            let living = scope.spawn(move || {
                let lived = match options.kill {
                    Some(mean) => life.kill_now_and_then(mean, stop),
                    None => life.go_on(options.n_events, stop),
                };
                if options.n_events > 0 {
                    is_over.store(true, Ordering::Relaxed);
                }
                (life, lived)
            });
            let ends = [stop, is_over];
            let changed = changes(server, &mut objects, options, ends, &present, &counts);
            unobserved.store(true, Ordering::Relaxed);
            let asked = observing.map(|(metering, asking)| {
                let minutes = metering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                let truth = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                truth.map(|truth| Observed { minutes, truth })
            });
            // Once the time is over, no more agents are killed; callers continue.
            let is_failing = stop.swap(true, Ordering::Relaxed);
            let (life, lived) = living.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            stop.store(is_failing, Ordering::Relaxed);
            let last_change = Instant::now();
            let caught_up = lived.and(changed).and_then(|()| until_right(sandbox, &server.read(), life));
            outcome.caught_up = last_change.elapsed();
            stop.store(true, Ordering::Relaxed);
            for caller in callers {
                match caller.join() {
                    Ok(result) => result.with_context(|| life.last_words())?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            outcome.observed = asked.transpose()?;
            caught_up
        })
        .with_context(|| format!("seed {}", options.seed))?;
        drop(servers);
        outcome.n_changes = counts.n_changes.into_inner();
        outcome.n_faults = counts.n_faults.into_inner();
        outcome.n_steady_calls = counts.n_steady.into_inner();
        outcome.n_other_calls = counts.n_others.into_inner();
        outcome.n_other_failures = counts.n_failures.into_inner();
        outcome.n_unmasked = counts.n_unmasked.into_inner();
        outcome.events = life.end()?;
        nothing_is_left_over(sandbox).with_context(|| format!("seed {}", options.seed))?;
        Ok(outcome)
    })
}

/// Checks that exactly what one agent leaves exists: pins, attached programs, socket records.
fn nothing_is_left_over(sandbox: &Sandbox) -> anyhow::Result<()> {
    let pin_path = sandbox.pin_path();
    let mut found: Vec<PathBuf> =
        fs::read_dir(&pin_path)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    let mut wanted = Agent::pins(sandbox);
    found.sort();
    wanted.sort();
    ensure!(found == wanted, "pinned are {found:?}");
    let features = Features::probe();
    let cgroup = fs::File::open(sandbox.cgroup().path())?;
    for hook in pins::hooks(features, true) {
        let link = syscall::cgroup_link(syscall::open_pin(&pin_path.join(hook.name))?.as_fd())?;
        let programs = syscall::programs_of(cgroup.as_fd(), link.attach_type)?;
        ensure!(programs == [link.program_id], "{} has the programs {programs:?}", hook.name);
    }
    let table = SocketTable::open(&pin_path)?;
    let end = Instant::now() + PATIENCE;
    loop {
        let records = table.records()?;
        if records.is_empty() {
            return Ok(());
        }
        // The kernel frees socket storage some time after the close.
        ensure!(Instant::now() < end, "sockets that are closed have records: {records:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn until(life: &Life<'_>, what: &str, condition: impl Fn() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > end {
            bail!("never happened: {what}; {}", life.last_words());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The ports of a service: a plain one has only the first.
fn ports(service: usize) -> &'static [(&'static str, Protocol)] {
    if is_plain(service) { &PORTS[..1] } else { &PORTS }
}

fn service_object(service: usize) -> Service {
    let ports: Vec<ServicePort> =
        ports(service).iter().map(|(name, protocol)| cluster::port(name, *protocol, SERVICE_PORT)).collect();
    cluster::service(&name(service), &[service_address(service).ip()], &ports)
}

/// The slices of a service, with the same endpoints for each of its ports.
fn slices(service: usize, endpoints: &[SocketAddr]) -> Vec<EndpointSlice> {
    let of_port = |(port, protocol): &(&str, Protocol)| {
        cluster::slices(&PortOf { service: &name(service), name: port, protocol: *protocol }, endpoints)
    };
    ports(service).iter().flat_map(of_port).collect()
}

/// The server's objects, and how they change.
struct Objects {
    random: Random,
    n_endpoints: usize,
    /// The endpoints of each service, and whether each is ready; `None` for a service that does not exist.
    services: Vec<Option<BTreeMap<usize, bool>>>,
}

impl Objects {
    fn new(options: &Options) -> Self {
        let services = vec![None; options.n_services.max(N_MIXED)];
        Self { random: Random(options.seed), n_endpoints: options.n_endpoints, services }
    }

    fn create(&mut self, server: &ApiServer) {
        server.apply(cluster::node("node", &["192.0.2.1".parse().expect("an address")]));
        for service in 0..self.services.len() {
            self.add(server, service);
        }
    }

    /// Random endpoints. Those of a steady service always include a ready one.
    fn endpoints(&mut self, service: usize) -> BTreeMap<usize, bool> {
        if is_plain(service) {
            return (0..self.n_endpoints).map(|number| (number, true)).collect();
        }
        let mut endpoints: BTreeMap<usize, bool> = (0..N_ENDPOINTS)
            .filter_map(|number| match self.random.below(4) {
                0 => None,
                1 => Some((number, false)),
                _ => Some((number, true)),
            })
            .collect();
        if is_steady(service) && !endpoints.values().any(|ready| *ready) {
            endpoints.insert(self.random.below(N_ENDPOINTS), true);
        }
        endpoints
    }

    /// The next endpoints: one of them changes, as in a rollout or when a probe fails.
    fn next_endpoints(&mut self, mut endpoints: BTreeMap<usize, bool>) -> BTreeMap<usize, bool> {
        let number = self.random.below(2 * self.n_endpoints);
        let n_ready = endpoints.values().filter(|ready| **ready).count();
        match endpoints.get(&number) {
            // The pod that replaces another is ready.
            None => {
                let replaced = endpoints.keys().nth(self.random.below(endpoints.len())).copied();
                endpoints.insert(number, true);
                let _former = replaced.and_then(|replaced| endpoints.remove(&replaced));
            }
            Some(true) if n_ready == 1 => drop(endpoints.insert((number + 1) % (2 * self.n_endpoints), true)),
            Some(ready) => drop(endpoints.insert(number, !ready)),
        }
        endpoints
    }

    fn add(&mut self, server: &ApiServer, service: usize) {
        server.apply(service_object(service));
        let endpoints = self.endpoints(service);
        self.set(server, service, endpoints);
    }

    fn set(&mut self, server: &ApiServer, service: usize, endpoints: BTreeMap<usize, bool>) {
        let addresses: Vec<SocketAddr> = endpoints.keys().map(|number| endpoint(service, *number)).collect();
        // One slice even without endpoints: its name must not depend on them.
        let of_one = [endpoint(service, 0)];
        let listed = if addresses.is_empty() { &of_one[..] } else { &addresses };
        for mut slice in slices(service, listed) {
            slice.endpoints.truncate(addresses.len());
            for (endpoint, (number, ready)) in slice.endpoints.iter_mut().zip(&endpoints) {
                endpoint.conditions =
                    Some(EndpointConditions { ready: Some(*ready), ..EndpointConditions::default() });
                if is_plain(service) {
                    // As in a cluster, where node names are most of what an endpoint occupies.
                    endpoint.node_name = Some(format!("node-{}", (service + number) % 1000));
                    endpoint.zone = Some(format!("zone-{}", number % 3));
                }
            }
            server.apply(slice);
        }
        self.services[service] = Some(endpoints);
    }

    /// Makes one change. With many services, those that are not plain change more often.
    fn change(&mut self, server: &ApiServer) {
        let among = if self.random.below(8) == 0 { N_MIXED } else { self.services.len() };
        let service = self.random.below(among);
        let is_there = self.services[service].is_some();
        match self.random.below(16) {
            0 if !is_steady(service) && is_there => {
                server.delete(Kind::Service, NAMESPACE, &name(service));
                // The slices are deleted too, or stay, as for a service that is recreated.
                if self.random.below(2) == 0 {
                    let of_one = [endpoint(service, 0)];
                    for slice in slices(service, &of_one) {
                        let slice = slice.metadata.name.unwrap_or_default();
                        server.delete(Kind::Slice, NAMESPACE, &slice);
                    }
                }
                self.services[service] = None;
            }
            1 => {
                let node = format!("node-{}", self.random.below(4));
                let ip = Ipv4Addr::new(192, 0, 2, 10 + octet(self.random.below(8)));
                server.apply(cluster::node(&node, &[ip.into()]));
            }
            2 if is_there => {
                let affinity = self.random.below(2) == 0;
                // There are fewer node ports than plain services.
                let is_node_port = !affinity && !is_plain(service);
                server.apply(cluster::with_spec(service_object(service), |spec| {
                    spec.type_ = Some(if is_node_port { "NodePort" } else { "ClusterIP" }.to_owned());
                    spec.session_affinity = Some(if affinity { "ClientIP" } else { "None" }.to_owned());
                }));
            }
            _ => match self.services[service].clone() {
                None => self.add(server, service),
                Some(_) if !is_steady(service) && self.random.below(8) == 0 => {
                    self.set(server, service, BTreeMap::new());
                }
                Some(present) if is_plain(service) && !present.is_empty() => {
                    let endpoints = self.next_endpoints(present);
                    self.set(server, service, endpoints);
                }
                Some(_) => {
                    let endpoints = self.endpoints(service);
                    self.set(server, service, endpoints);
                }
            },
        }
    }
}

/// The most that changes may lag behind their schedule.
const BEHIND: Duration = Duration::from_millis(200);

/// Changes objects and injects faults until the time is over.
fn changes(
    server: &Server,
    objects: &mut Objects,
    options: &Options,
    ends: [&AtomicBool; 2],
    present: &Present,
    counts: &Counts,
) -> anyhow::Result<()> {
    let is_over = || ends.iter().any(|end| end.load(Ordering::Relaxed));
    let started = Instant::now();
    let (mut cut, mut expire, mut restart) = (options.cut, options.expire, options.restart);
    let mut n_restarts = 0;
    let mut comes_back: Option<Duration> = None;
    let mut due = Duration::ZERO;
    while started.elapsed() < options.time && !is_over() {
        let now = started.elapsed();
        objects.change(&server.read());
        let _before = counts.n_changes.fetch_add(1, Ordering::Relaxed);
        let is_due = |next: &mut Duration, interval: Duration| {
            let is_due = now >= *next;
            if is_due {
                *next = now + interval;
                present.disturb();
                let _before = counts.n_faults.fetch_add(1, Ordering::Relaxed);
            }
            is_due
        };
        if is_due(&mut cut, options.cut) {
            server.read().cut_watches();
        }
        if is_due(&mut expire, options.expire) {
            server.read().expire();
        }
        if comes_back.is_none() && is_due(&mut restart, options.restart) {
            server.write().stop();
            n_restarts += 1;
            comes_back = Some(now + Duration::from_millis(200 * (1 + n_restarts % 4)));
        }
        // Changes continue while the server is down: another server of the cluster accepts them.
        if comes_back.is_some_and(|at| now >= at) {
            comes_back = None;
            let mut server = server.write();
            if n_restarts % 3 == 0 {
                // Restored from a backup, with an earlier or a future version.
                let version = if n_restarts % 2 == 0 { 50 } else { server.version() + 100_000 };
                server.restart_at_version(version);
            } else {
                server.resume().context("the API server cannot be resumed")?;
            }
            present.disturb();
        }
        // Delays of a busy machine are made up for, but not in a burst.
        due = (due + options.change).max(started.elapsed().saturating_sub(BEHIND));
        thread::sleep(due.saturating_sub(started.elapsed()));
    }
    server.write().resume().context("the API server cannot be resumed")
}

#[expect(clippy::struct_field_names, reason = "counts are called `n_foos` in this tree")]
#[derive(Debug, Default)]
struct Counts {
    n_changes: AtomicU64,
    n_faults: AtomicU64,
    n_steady: AtomicU64,
    n_others: AtomicU64,
    n_failures: AtomicU64,
    n_unmasked: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
enum Way {
    /// A connection.
    Tcp,
    /// A datagram through a new socket.
    Udp,
    /// A datagram through one long-lived socket, as a resolver's.
    LongLived,
}

fn calls(options: &Options, caller: u64, stop: &AtomicBool, counts: &Counts) -> anyhow::Result<()> {
    let mut random = Random((options.seed ^ caller).wrapping_mul(31).wrapping_add(7));
    let long_lived = [Domain::V4, Domain::V6].map(|domain| Socket::new(domain, Udp));
    while !stop.load(Ordering::Relaxed) {
        let service = match random.below(4) {
            0 => random.below(N_STEADY),
            1 => N_STEADY + random.below(N_OTHERS),
            _ => random.below(options.n_services.max(N_MIXED)),
        };
        let (address, name) = (service_address(service), name(service));
        let ways = [Way::Tcp, Way::Tcp, Way::Udp, Way::LongLived];
        let way = ways[if is_plain(service) { 0 } else { random.below(ways.len()) }];
        let result = match way {
            Way::Tcp => connect(address),
            Way::Udp => Socket::new(Domain::of(address.ip()), Udp).ask_at(address),
            Way::LongLived => long_lived[usize::from(address.is_ipv6())].ask_at(address),
        };
        let is_steady = is_steady(service);
        let _before =
            if is_steady { &counts.n_steady } else { &counts.n_others }.fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(Answer { server, .. }) if owner(server) != service => {
                bail!("a call to {name} ({address}, {way:?}) reached {server}, of another service")
            }
            Ok(Answer { seen: Some(seen), .. }) if seen == address => {}
            Ok(Answer { server, seen: Some(seen) }) if seen == server && options.n_events > 0 => {
                let _before = counts.n_unmasked.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Answer { server, seen }) => {
                bail!("a call to {name} ({address}, {way:?}) reached {server}, which appears as {seen:?}")
            }
            // No endpoint, or no service: the address is not local here.
            Err(Errno::ECONNREFUSED | Errno::ENETUNREACH) if !is_steady => {
                let _before = counts.n_failures.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => bail!("a call to {name} ({address}, {way:?}) failed: {error}"),
        }
        thread::sleep(options.call);
    }
    Ok(())
}

/// Connects, and asks for the server's address and the address it appears to have.
fn connect(to: SocketAddr) -> Result<Answer, Errno> {
    let socket = Socket::new(Domain::of(to.ip()), Tcp);
    socket.connect(to)?;
    let seen = Some(socket.peer_name()?);
    Ok(Answer { seen, ..socket.ask()? })
}

/// The most frontends in a message.
const SHOWN: usize = 10;

/// Waits until the kernel's maps hold the state computed from scratch from the server's objects.
fn until_right(sandbox: &Sandbox, server: &ApiServer, life: &Life<'_>) -> anyhow::Result<()> {
    let cluster = server.cluster();
    let scratch = |found: &Image, capacity: Capacity| {
        let mut state = State::new(agent::settings(), addresses::read(), capacity, found);
        let _issues = cluster.feed(&mut state);
        let plan = state.sync();
        (state, plan)
    };
    let (wanted, _everything) = scratch(&Image::default(), life.capacity());
    let (wanted, wanted_nodes) = (content(wanted.image())?, wanted.image().node_addrs.clone());
    let end = Instant::now() + PATIENCE;
    loop {
        // While a run is switched, the read may mix two states. While maps are replaced, they may be
        // unreadable.
        let found = Maps::open(&sandbox.pin_path()).and_then(|maps| Ok((maps.image()?, maps.capacity())));
        let now = found.as_ref().map_err(|error| anyhow!("{error}")).and_then(|(found, _)| content(found));
        let is_right = now.as_ref().is_ok_and(|now| *now == wanted)
            && found.as_ref().is_ok_and(|(found, capacity)| {
                found.node_addrs == wanted_nodes && is_size(*capacity, life.capacity())
            });
        if let Ok((found, capacity)) = &found
            && is_right
        {
            let (_state, plan) = scratch(found, *capacity);
            ensure!(plan.is_empty(), "an agent that starts now would still apply {plan:?}");
            return Ok(());
        }
        if Instant::now() > end {
            let now = now?;
            let wrong = wanted.iter().filter(|(address, content)| now.get(address) != Some(content));
            let wrong: Vec<_> = wrong.take(SHOWN).collect();
            let is_extra = |address: &&FrontendAddress| !wanted.contains_key(address);
            let extra: Vec<_> = now.keys().filter(is_extra).take(SHOWN).collect();
            bail!("missing or wrong: {wrong:?}; too many: {extra:?}; {}", life.last_words());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether maps have the requested sizes or larger ones: maps found with another layout do not shrink.
const fn is_size(found: Capacity, wanted: Capacity) -> bool {
    found.services >= wanted.services && found.endpoints >= wanted.endpoints
}

/// The agent that the environment names, set by `cargo xtask test`.
#[must_use]
pub fn agent_of_environment() -> Vec<PathBuf> {
    std::env::var_os("SOCKLB_BIN").map(PathBuf::from).into_iter().collect()
}
