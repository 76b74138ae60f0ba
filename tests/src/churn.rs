//! Changes of everything for a long time, with faults of the API server and calls under way.
//!
//! # Purpose
//!
//! [`run`] starts the real agent beside a test API server, changes objects at random, and makes faults meanwhile. Every
//! call is checked when it is made, and at the end the kernel's maps are compared with what the server's objects
//! ask for, computed from scratch.
//!
//! # Invariants
//!
//! - Objects and their changes follow from the seed; when they happen, and what calls meet, does not.
//! - Every endpoint accepts connections all the time. So a call to a service that always has a ready endpoint fails
//!   only if the maps are wrong.
//! - An endpoint address belongs to one service for good: a call that ends elsewhere met another service.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::discovery::v1::EndpointConditions;
use lb_userspace::{
    controller::{State, run::interface_addresses},
    desired::FrontendAddress,
    kernel::store::Maps,
    model::Protocol::Tcp,
    tables::Image,
};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    Sandbox, agent,
    apiserver::{ApiServer, Kind},
    client::call,
    cluster::{self, NAMESPACE, PortOf},
    server::Servers,
};

/// Services that are there all the time and always have a ready endpoint. Every fourth is an IPv6 one.
const N_STEADY: usize = 8;
/// Services that come and go.
const N_OTHERS: usize = 56;
/// Endpoints that a service may have.
const N_ENDPOINTS: usize = 6;
/// Where every endpoint listens.
const TARGET_PORT: u16 = 8080;
/// Threads that call.
const N_CALLERS: u64 = 2;
/// For how long the agent may be behind once nothing changes any longer. Its longest pause between two attempts is half
/// a minute.
const PATIENCE: Duration = Duration::from_secs(90);

/// What happens how often.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Decides about objects and changes.
    pub seed: u64,
    /// For how long.
    pub time: Duration,
    /// Between two changes.
    pub change: Duration,
    /// Between two cuts of all watches.
    pub cut: Duration,
    /// Between two compactions that end all watches with 410.
    pub expire: Duration,
    /// Between two restarts of the API server.
    pub restart: Duration,
    /// Between two calls of each caller.
    pub call: Duration,
}

impl Options {
    /// Watches cut every two seconds, a 410 every half minute, a restart every 45 seconds.
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
        }
    }

    /// Every fault a few times within 20 seconds.
    #[must_use]
    pub const fn short(seed: u64) -> Self {
        Self {
            cut: Duration::from_secs(2),
            expire: Duration::from_secs(5),
            restart: Duration::from_secs(6),
            ..Self::long(seed, Duration::from_secs(20))
        }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Changes of objects.
    pub n_changes: u64,
    /// Calls to services that always have a ready endpoint. All of them reached one.
    pub n_steady_calls: u64,
    /// Calls to other services, and those of them that were refused or found nobody.
    pub n_other_calls: u64,
    /// See [`Self::n_other_calls`].
    pub n_other_failures: u64,
    /// Cuts, compactions and restarts.
    pub n_faults: u64,
    /// How long the agent took to catch up at the end.
    pub caught_up: Duration,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} changes, {} faults; {} calls to services with a ready endpoint, none failed; {} other calls, {} of \
             them without an endpoint; the maps were right {:?} after the last change",
            self.n_changes,
            self.n_faults,
            self.n_steady_calls,
            self.n_other_calls,
            self.n_other_failures,
            self.caught_up
        )
    }
}

/// Numbers that differ and are the same in each run (`splitmix64`).
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
    service % 4 == 3
}

fn name(service: usize) -> String {
    format!("churn-{service:02}")
}

fn octet(number: usize) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

/// The address that programs call.
fn service_address(service: usize) -> SocketAddr {
    let ip = if is_ipv6(service) {
        Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1 + u16::from(octet(service))).into()
    } else {
        IpAddr::from(Ipv4Addr::new(10, 96, 0, 1 + octet(service)))
    };
    SocketAddr::new(ip, 80)
}

/// An endpoint of a service.
fn endpoint(service: usize, number: usize) -> SocketAddr {
    let (high, low) = (octet(service), 1 + octet(number));
    let ip = if is_ipv6(service) {
        Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, high.into(), low.into()).into()
    } else {
        IpAddr::from(Ipv4Addr::new(127, 1, high, low))
    };
    SocketAddr::new(ip, TARGET_PORT)
}

/// The service that an endpoint belongs to.
fn owner(endpoint: SocketAddr) -> usize {
    match endpoint.ip() {
        IpAddr::V4(ip) => usize::from(ip.octets()[2]),
        IpAddr::V6(ip) => usize::from(ip.segments()[6]),
    }
}

/// The agent's process. Killed on drop.
struct Process {
    child: Child,
    directory: TempDir,
}

impl Process {
    fn start(socklb: &Path, sandbox: &Sandbox, server: &ApiServer) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let kubeconfig = directory.path().join("kubeconfig");
        fs::write(&kubeconfig, server.kubeconfig())?;
        let child = Command::new(socklb)
            .args(["run", "--source", "kube", "--node-name", "node", "--kubeconfig"])
            .arg(&kubeconfig)
            // Without a service of its own: the maps are compared with the server's objects.
            .args(["--self-test-interval", "0"])
            .args(["--max-services", "1024", "--max-endpoints", "4096", "--cgroup"])
            .arg(sandbox.cgroup().path())
            .arg("--pin-path")
            .arg(sandbox.pin_path())
            .arg("--state-dir")
            .arg(directory.path().join("state"))
            .stdin(Stdio::null())
            .stderr(File::create(directory.path().join("log"))?)
            .spawn()
            .with_context(|| format!("{}: cannot be started", socklb.display()))?;
        Ok(Self { child, directory })
    }

    /// The end of the log.
    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("the agent's log ends with:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"))
    }

    fn end(mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the agent ended with {status}; {}", self.last_words());
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}

/// Changes objects in a sandbox of its own until the time is over, and returns what happened.
///
/// # Errors
///
/// If a call met what it must not, or the maps do not become right.
///
/// # Panics
///
/// If there is no sandbox to be had: see [`crate::require`].
pub fn run(socklb: &Path, options: &Options) -> anyhow::Result<Outcome> {
    Sandbox::run(|sandbox| {
        let endpoints_of = |service| (0..N_ENDPOINTS).map(move |number| endpoint(service, number));
        let ipv6: Vec<SocketAddr> =
            (0..N_STEADY + N_OTHERS).filter(|service| is_ipv6(*service)).flat_map(endpoints_of).collect();
        sandbox.own(ipv6.iter().map(SocketAddr::ip));
        // Every address in 127.0.0.0/8 is the host's, so that one server stands for all IPv4 endpoints.
        let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, TARGET_PORT));
        let _servers = Servers::tcp(ipv6.into_iter().chain([ipv4]));
        let mut server = ApiServer::start();
        let mut objects = Objects::new(options.seed);
        objects.create(&server);
        let process = Process::start(socklb, sandbox, &server)?;
        let mut outcome = Outcome::default();
        for service in 0..N_STEADY {
            until(&process, "the first services answer", || call(service_address(service), Tcp).is_ok())?;
        }
        let stop = AtomicBool::new(false);
        let (n_steady, n_others, n_failures) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| -> anyhow::Result<()> {
            let callers: Vec<_> = (0..N_CALLERS)
                .map(|number| {
                    let (stop, counts) = (&stop, [&n_steady, &n_others, &n_failures]);
                    scope.spawn(move || {
                        let result = calls(options.seed ^ number, options.call, stop, counts);
                        // The others need not go on.
                        if result.is_err() {
                            stop.store(true, Ordering::Relaxed);
                        }
                        result
                    })
                })
                .collect();
            let changed = changes(&mut server, &mut objects, options, &stop, &mut outcome);
            let last_change = Instant::now();
            let caught_up = changed.and_then(|()| until_right(sandbox, &server, &process));
            outcome.caught_up = last_change.elapsed();
            stop.store(true, Ordering::Relaxed);
            for caller in callers {
                match caller.join() {
                    Ok(result) => result.with_context(|| process.last_words())?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            caught_up
        })
        .with_context(|| format!("seed {}", options.seed))?;
        outcome.n_steady_calls = n_steady.into_inner();
        outcome.n_other_calls = n_others.into_inner();
        outcome.n_other_failures = n_failures.into_inner();
        process.end()?;
        Ok(outcome)
    })
}

fn until(process: &Process, what: &str, condition: impl Fn() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > end {
            bail!("never happened: {what}; {}", process.last_words());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// What the server holds, and how it changes.
struct Objects {
    random: Random,
    /// The endpoints of each service, with whether they are ready; `None` for a service that is not there.
    services: Vec<Option<BTreeMap<usize, bool>>>,
}

impl Objects {
    fn new(seed: u64) -> Self {
        Self { random: Random(seed), services: vec![None; N_STEADY + N_OTHERS] }
    }

    fn create(&mut self, server: &ApiServer) {
        server.apply(cluster::node("node", &["192.0.2.1".parse().expect("an address")]));
        for service in 0..self.services.len() {
            self.add(server, service);
        }
    }

    /// Some endpoints. Those of a steady service hold a ready one, as its Service does at every moment.
    fn endpoints(&mut self, service: usize) -> BTreeMap<usize, bool> {
        let mut endpoints: BTreeMap<usize, bool> = (0..N_ENDPOINTS)
            .filter_map(|number| match self.random.below(4) {
                0 => None,
                1 => Some((number, false)),
                _ => Some((number, true)),
            })
            .collect();
        if service < N_STEADY && !endpoints.values().any(|ready| *ready) {
            endpoints.insert(self.random.below(N_ENDPOINTS), true);
        }
        endpoints
    }

    fn add(&mut self, server: &ApiServer, service: usize) {
        let address = service_address(service);
        server.apply(cluster::service(
            &name(service),
            &[address.ip()],
            &[cluster::port("", Tcp, address.port())],
        ));
        let endpoints = self.endpoints(service);
        self.set(server, service, endpoints);
    }

    fn set(&mut self, server: &ApiServer, service: usize, endpoints: BTreeMap<usize, bool>) {
        let name = name(service);
        let addresses: Vec<SocketAddr> = endpoints.keys().map(|number| endpoint(service, *number)).collect();
        // One slice, also without endpoints: its name must not depend on them.
        let of_one = [endpoint(service, 0)];
        let listed = if addresses.is_empty() { &of_one[..] } else { &addresses };
        for mut slice in cluster::slices(&PortOf::tcp(&name), listed) {
            slice.endpoints.truncate(addresses.len());
            for (endpoint, ready) in slice.endpoints.iter_mut().zip(endpoints.values()) {
                endpoint.conditions =
                    Some(EndpointConditions { ready: Some(*ready), ..EndpointConditions::default() });
            }
            server.apply(slice);
        }
        self.services[service] = Some(endpoints);
    }

    /// Changes something.
    fn change(&mut self, server: &ApiServer) {
        let service = self.random.below(self.services.len());
        let is_there = self.services[service].is_some();
        match self.random.below(16) {
            0 if service >= N_STEADY && is_there => {
                server.delete(Kind::Service, NAMESPACE, &name(service));
                // The slices follow, or stay, as for a service that is made anew.
                if self.random.below(2) == 0 {
                    let of_one = [endpoint(service, 0)];
                    for slice in cluster::slices(&PortOf::tcp(&name(service)), &of_one) {
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
                let address = service_address(service);
                let ports = [cluster::port("", Tcp, address.port())];
                let affinity = self.random.below(2) == 0;
                let service = cluster::service(&name(service), &[address.ip()], &ports);
                server.apply(cluster::with_spec(service, |spec| {
                    spec.type_ = Some(if affinity { "ClusterIP" } else { "NodePort" }.to_owned());
                    spec.session_affinity = Some(if affinity { "ClientIP" } else { "None" }.to_owned());
                }));
            }
            _ if !is_there => self.add(server, service),
            _ => {
                let endpoints = if service >= N_STEADY && self.random.below(8) == 0 {
                    BTreeMap::new()
                } else {
                    self.endpoints(service)
                };
                self.set(server, service, endpoints);
            }
        }
    }
}

/// Changes objects and makes faults until the time is over.
fn changes(
    server: &mut ApiServer,
    objects: &mut Objects,
    options: &Options,
    stop: &AtomicBool,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let (mut cut, mut expire, mut restart) = (options.cut, options.expire, options.restart);
    let mut n_restarts = 0;
    let mut comes_back: Option<Duration> = None;
    while started.elapsed() < options.time && !stop.load(Ordering::Relaxed) {
        let now = started.elapsed();
        objects.change(server);
        outcome.n_changes += 1;
        let mut is_due = |next: &mut Duration, interval: Duration| {
            let is_due = now >= *next;
            if is_due {
                *next = now + interval;
                outcome.n_faults += 1;
            }
            is_due
        };
        if is_due(&mut cut, options.cut) {
            server.cut_watches();
        }
        if is_due(&mut expire, options.expire) {
            server.expire();
        }
        if comes_back.is_none() && is_due(&mut restart, options.restart) {
            server.stop();
            n_restarts += 1;
            comes_back = Some(now + Duration::from_millis(200 * (1 + n_restarts % 4)));
        }
        // Changes go on while the server is away: another server of the cluster takes them.
        if comes_back.is_some_and(|at| now >= at) {
            comes_back = None;
            if n_restarts % 3 == 0 {
                // Back from a backup, with a version that was there before or that is to come.
                server.restart_at_version(if n_restarts % 2 == 0 { 50 } else { server.version() + 100_000 });
            } else {
                server.resume().context("the API server cannot come back")?;
            }
        }
        thread::sleep(options.change);
    }
    server.resume().context("the API server cannot come back")
}

/// Calls services until told to stop.
fn calls(seed: u64, pause: Duration, stop: &AtomicBool, counts: [&AtomicU64; 3]) -> anyhow::Result<()> {
    let [n_steady, n_others, n_failures] = counts;
    let mut random = Random(seed.wrapping_mul(31).wrapping_add(7));
    while !stop.load(Ordering::Relaxed) {
        let service =
            if random.below(2) == 0 { random.below(N_STEADY) } else { N_STEADY + random.below(N_OTHERS) };
        let address = service_address(service);
        let result = call(address, Tcp);
        let is_steady = service < N_STEADY;
        let _before = if is_steady { n_steady } else { n_others }.fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(server) if owner(server) == service => {}
            Ok(server) => {
                bail!("a call to {} ({address}) reached {server}, of another service", name(service))
            }
            // Without an endpoint, or without the service: nobody has its address here.
            Err(Errno::ECONNREFUSED | Errno::ENETUNREACH) if !is_steady => {
                let _before = n_failures.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => bail!("a call to {} ({address}) failed: {error}", name(service)),
        }
        thread::sleep(pause);
    }
    Ok(())
}

/// What a program can tell of an image: for each address the endpoints and the settings, and which addresses share a
/// service port. Ids and places are the encoder's own.
type Content = BTreeMap<FrontendAddress, (Vec<SocketAddr>, u32, u32, FrontendAddress)>;

fn content(image: &Image) -> anyhow::Result<Content> {
    let mut first_of_port: BTreeMap<u32, FrontendAddress> = BTreeMap::new();
    let mut content = Content::new();
    for (address, id) in &image.services {
        let frontend = image.frontends.get(id).with_context(|| format!("{address}: no entry {id}"))?;
        let entries = image.entries(address.ip.is_ipv6(), frontend.run);
        let entries = entries.with_context(|| format!("{address}: no run {:?}", frontend.run))?;
        let mut endpoints: Vec<SocketAddr> = entries.iter().map(|entry| entry.address).collect();
        endpoints.sort_unstable();
        let first = *first_of_port.entry(frontend.service_id).or_insert(*address);
        content.insert(*address, (endpoints, frontend.flags, frontend.affinity_seconds, first));
    }
    Ok(content)
}

/// Waits until the kernel's maps hold what the server's objects ask for, computed from scratch.
fn until_right(sandbox: &Sandbox, server: &ApiServer, process: &Process) -> anyhow::Result<()> {
    let cluster = server.cluster();
    let scratch = |found: &Image| {
        let capacity = lb_userspace::plan::Capacity { services: 1024, endpoints: 4096 };
        let mut state = State::new(agent::settings(), interface_addresses(), capacity, found);
        let _issues = cluster.feed(&mut state);
        let plan = state.sync();
        (state, plan)
    };
    let (wanted, _everything) = scratch(&Image::default());
    let (wanted, wanted_nodes) = (content(wanted.image())?, wanted.image().node_addrs.clone());
    let end = Instant::now() + PATIENCE;
    loop {
        let found = Maps::open(&sandbox.pin_path())?.image()?;
        // While a run is switched, what is read may be of two states.
        let now = content(&found);
        let is_right = now.as_ref().is_ok_and(|now| *now == wanted) && found.node_addrs == wanted_nodes;
        if is_right {
            let (_state, plan) = scratch(&found);
            ensure!(plan.is_empty(), "an agent that starts now would still do {plan:?}");
            return Ok(());
        }
        if Instant::now() > end {
            let now = now?;
            let wrong: Vec<_> =
                wanted.iter().filter(|(address, content)| now.get(address) != Some(content)).collect();
            let extra: Vec<_> = now.keys().filter(|address| !wanted.contains_key(address)).collect();
            bail!("missing or wrong: {wrong:?}; too many: {extra:?}; {}", process.last_words());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The agent that the environment names, which `cargo xtask test` sets.
#[must_use]
pub fn agent_of_environment() -> Option<PathBuf> {
    std::env::var_os("SOCKLB_BIN").map(PathBuf::from)
}
