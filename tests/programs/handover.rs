//! From kube-proxy to an agent with `--packets=all`, and back, under load.
//!
//! kube-proxy is its rules, as one has written them for [`cluster`] (`handover/*.rules`). If the environment
//! names the program (`KUBE_PROXY`, or a directory in `KUBE_BIN`), it runs too, and `UPDATE_EXPECT=1` records
//! its rules anew.

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use lb_core::model::{
    Family,
    Protocol::{self, Tcp, Udp},
};
use lb_tests::{
    Feature,
    apiserver::ApiServer,
    bed::{self, Bed, FAMILIES, Outcome, PATIENCE, PORT, Place, address},
    cgroup::make_threaded,
    cluster::{Cluster, Object, object},
    command::{SetOnDrop, run, text},
    installed::{self, QUIET, Running, eventually},
    kube_proxy::{self, Setup},
    process::Logged,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use socket2::SockRef;
use tempfile::TempDir;

/// The Services: one for each external policy, and one whose endpoints differ between the two proxies.
const CLUSTER: u8 = 1;
const LOCAL: u8 = 2;
const DIFFERING: u8 = 3;

/// All endpoints, of which two are on the node.
const ENDPOINTS: [Place; 3] = [Place::Pod, Place::Second, Place::Far];

fn service(n: u8) -> Object {
    let ips = |v4| FAMILIES.map(|family| address(family, v4));
    let cluster_ips = ips([10, 96, 0, n]);
    let port = |name: &str| {
        json!({
            "name": name, "protocol": name.to_uppercase(), "port": 80, "targetPort": PORT,
            "nodePort": node_port(n),
        })
    };
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": format!("web-{n}")},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "externalTrafficPolicy": if n == LOCAL { "Local" } else { "Cluster" },
            "ports": [port("tcp"), port("udp")],
        },
        "status": {"loadBalancer": {
            "ingress": ips([203, 0, 113, n]).map(|ip| json!({"ip": ip, "ipMode": "VIP"})),
        }},
    });
    object(&service).unwrap()
}

fn node_port(n: u8) -> u16 {
    30080 + u16::from(n)
}

fn slice(n: u8, family: Family, endpoints: &[Place]) -> Object {
    let kind = if family == Family::V4 { "IPv4" } else { "IPv6" };
    let endpoint = |place: &Place| {
        json!({
            "addresses": [place.address(family)],
            "nodeName": place.node_name(),
            "conditions": {"ready": true},
        })
    };
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default",
            "name": format!("web-{n}-{}", kind.to_lowercase()),
            "labels": {"kubernetes.io/service-name": format!("web-{n}")},
        },
        "addressType": kind,
        "ports": [
            {"name": "tcp", "protocol": "TCP", "port": PORT},
            {"name": "udp", "protocol": "UDP", "port": PORT},
        ],
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    });
    object(&slice).unwrap()
}

/// The objects, with these endpoints of the last Service.
fn cluster(differing: &[Place]) -> Cluster {
    let mut cluster = Cluster::new().with(Bed::nodes());
    for n in [CLUSTER, LOCAL, DIFFERING] {
        let endpoints = if n == DIFFERING { differing } else { &ENDPOINTS };
        cluster.set(service(n));
        cluster = cluster.with(FAMILIES.map(|family| slice(n, family, endpoints)));
    }
    cluster
}

/// Where callers find a Service.
#[derive(Clone, Copy, Debug)]
enum To {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

impl To {
    fn address(self, family: Family, n: u8) -> SocketAddr {
        let (v4, port) = match self {
            Self::ClusterIp => ([10, 96, 0, n], 80),
            Self::NodePort => return SocketAddr::new(Place::Node.address(family), node_port(n)),
            Self::LoadBalancer => ([203, 0, 113, n], 80),
        };
        SocketAddr::new(address(family, v4), port)
    }
}

/// Who calls what, for as long as the proxies change. None of them has hooks.
const CALLS: [(Place, To, u8); 7] = [
    (Place::Outside, To::NodePort, CLUSTER),
    (Place::Outside, To::LoadBalancer, CLUSTER),
    (Place::Outside, To::NodePort, LOCAL),
    (Place::Outside, To::LoadBalancer, LOCAL),
    (Place::Pod, To::ClusterIp, CLUSTER),
    (Place::Pod, To::LoadBalancer, LOCAL),
    (Place::Node, To::ClusterIp, CLUSTER),
];

/// A connection or socket that stays.
enum Kept {
    Stream(TcpStream),
    Datagrams(UdpSocket, SocketAddr),
}

impl Kept {
    /// Returns also which server answers.
    fn open(to: SocketAddr, protocol: Protocol) -> io::Result<(Self, SocketAddr)> {
        if protocol == Tcp {
            let (stream, outcome) = bed::connect(to, PATIENCE)?;
            return Ok((Self::Stream(stream), server(outcome)?));
        }
        let socket = UdpSocket::bind(SocketAddr::new(bed::unspecified(to.ip()), 0))?;
        socket.connect(to)?;
        let server = ask(&socket)?;
        Ok((Self::Datagrams(socket, server), server))
    }

    /// Asks once more. The endpoint stays: a stream breaks otherwise.
    fn call(&mut self) -> io::Result<()> {
        match self {
            Self::Stream(stream) => {
                stream.write_all(b"?")?;
                let mut answer = [0];
                stream.read_exact(&mut answer)
            }
            Self::Datagrams(socket, server) => match ask(socket)? {
                same if same == *server => Ok(()),
                other => Err(io::Error::other(format!("{other} answers instead of {server}"))),
            },
        }
    }
}

fn ask(socket: &UdpSocket) -> io::Result<SocketAddr> {
    server(bed::ask(socket, b"?", PATIENCE)?.0)
}

fn server(outcome: Outcome) -> io::Result<SocketAddr> {
    match outcome {
        Outcome::Reached { server, .. } => Ok(server),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

/// A call of its own connection or socket. The connection ends with a reset: thousands that are remembered
/// for minutes would use up the ports.
fn call_once(to: SocketAddr, protocol: Protocol) -> io::Result<SocketAddr> {
    let (open, server) = Kept::open(to, protocol)?;
    if let Kept::Stream(stream) = open {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(server)
}

/// Calls without a pause, and what failed.
#[derive(Default)]
struct Load {
    ends: AtomicBool,
    /// Rounds of each thread.
    rounds: Vec<AtomicU64>,
    n_calls: AtomicU64,
    failures: Mutex<Vec<String>>,
    /// What is going on.
    phase: Mutex<String>,
}

impl Load {
    fn fail(&self, what: &str, error: &io::Error) {
        let phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.failures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(format!("{phase}: {what}: {error}"));
    }

    /// Waits until everything has been called again, all of it during this phase.
    fn phase(&self, name: &str) {
        name.clone_into(&mut self.phase.lock().unwrap_or_else(PoisonError::into_inner));
        let before: Vec<u64> = self.rounds.iter().map(|round| round.load(Relaxed)).collect();
        eventually(name, || {
            // The first of these rounds began before.
            self.rounds.iter().zip(&before).all(|(round, before)| round.load(Relaxed) > before + 1)
        });
    }

    /// The calls of one place, until the end: short ones, or over connections that stay.
    fn call(&self, from: Place, are_kept: bool, rounds: &AtomicU64) {
        let calls: Vec<(String, SocketAddr, Protocol)> = CALLS
            .iter()
            .filter(|(place, ..)| *place == from)
            .flat_map(|(_, to, n)| FAMILIES.map(|family| (*to, *n, family)))
            .flat_map(|(to, n, family)| [Tcp, Udp].map(|protocol| (to, n, family, protocol)))
            .map(|(to, n, family, protocol)| {
                let kept = if are_kept { "kept" } else { "new" };
                let what = format!("{kept}, {from:?} to {to:?} of web-{n}, {family:?}, {protocol}");
                (what, to.address(family, n), protocol)
            })
            .collect();
        let mut kept: Vec<Option<Kept>> = calls.iter().map(|_| None).collect();
        while !self.ends.load(Relaxed) {
            for ((what, to, protocol), kept) in calls.iter().zip(&mut kept) {
                let result = match kept {
                    _ if !are_kept => call_once(*to, *protocol).map(drop),
                    Some(open) => open.call(),
                    None => Kept::open(*to, *protocol).map(|(open, _)| *kept = Some(open)),
                };
                if let Err(error) = result {
                    self.fail(what, &error);
                    *kept = None;
                }
                self.n_calls.fetch_add(1, Relaxed);
            }
            rounds.fetch_add(1, Relaxed);
            if are_kept {
                thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Runs a program in the node's namespace.
fn on_node(bed: &Bed, program: &str, args: &[&str]) -> String {
    bed.at(Place::Node).run(|| text(program, args))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nftables,
    Iptables,
}

impl Mode {
    const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    /// What `socklb check` finds of it.
    const fn traces(self) -> [&'static str; 2] {
        match self {
            Self::Nftables => ["nftables table ip kube-proxy", "nftables table ip6 kube-proxy"],
            Self::Iptables => [
                "iptables chain KUBE-SERVICES in table ip nat",
                "iptables chain KUBE-SERVICES in table ip6 nat",
            ],
        }
    }

    /// The rules in the node's namespace, in the form that [`Self::load`] reads. They are the only ones.
    fn list(self, bed: &Bed) -> [String; 2] {
        match self {
            Self::Nftables => {
                ["ip", "ip6"].map(|family| on_node(bed, "nft", &["list", "table", family, "kube-proxy"]))
            }
            Self::Iptables => ["iptables-save", "ip6tables-save"].map(|program| {
                let lines = on_node(bed, program, &[]);
                // Comments have the time. The counter of a rule is an object of its own, which is not saved.
                let lines = lines.lines().filter(|line| !line.starts_with('#'));
                let counter = " -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts";
                lines.map(|line| line.replace(counter, "")).collect::<Vec<_>>().join("\n")
            }),
        }
    }

    /// Whether the rules have every Service.
    fn is_listed(self, bed: &Bed) -> bool {
        let programs = match self {
            Self::Nftables => {
                ["ip", "ip6"].map(|family| ("nft", vec!["list", "table", family, "kube-proxy"]))
            }
            Self::Iptables => ["iptables-save", "ip6tables-save"].map(|program| (program, vec![])),
        };
        let listed = programs.map(|(program, args)| bed.at(Place::Node).run(|| run(program, &args)).stdout);
        FAMILIES.iter().zip(listed).all(|(family, listed)| {
            let listed = String::from_utf8_lossy(&listed);
            [CLUSTER, LOCAL, DIFFERING]
                .iter()
                .all(|n| listed.contains(&To::LoadBalancer.address(*family, *n).ip().to_string()))
        })
    }

    fn load(self, bed: &Bed, rules: &[PathBuf; 2]) {
        let [v4, v6] = rules.each_ref().map(|file| file.to_str().unwrap());
        match self {
            Self::Nftables => {
                [("nft", v4), ("nft", v6)].map(|(program, file)| on_node(bed, program, &["-f", file]))
            }
            Self::Iptables => [("iptables-restore", v4), ("ip6tables-restore", v6)]
                .map(|(program, file)| on_node(bed, program, &[file])),
        };
    }

    fn recorded(self) -> [PathBuf; 2] {
        ["ip", "ip6"].map(|family| {
            let name = format!("programs/handover/{}-{family}.rules", self.name());
            Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
        })
    }
}

/// The other proxy.
enum Peer {
    /// Its rules, and nothing that changes them.
    Rules,
    /// The program.
    Program { program: PathBuf, server: ApiServer, directory: TempDir, running: Option<Logged> },
}

impl Peer {
    fn new(program: Option<PathBuf>, bed: &Bed) -> Self {
        let Some(program) = program else { return Self::Rules };
        let server = bed.at(Place::Node).run(ApiServer::start);
        server.set(&cluster(&ENDPOINTS));
        Self::Program { program, server, directory: tempfile::tempdir().unwrap(), running: None }
    }

    /// Writes the rules, and waits until they are there.
    fn start(&mut self, mode: Mode, bed: &Bed) {
        match self {
            Self::Rules => mode.load(bed, &mode.recorded()),
            Self::Program { program, server, directory, running } => {
                let networks = "10.1.0.0/16,fd00:10:1::/48";
                let setup =
                    Setup { mode: mode.name(), node: Place::Node.node_name(), pod_networks: networks };
                let mut command = setup.command(program, server, directory.path()).unwrap();
                let log = directory.path().join("log");
                let started = bed.at(Place::Node).run(|| Logged::start(&mut command, log)).unwrap();
                let started = running.insert(started);
                started.until("kube-proxy", PATIENCE, || mode.is_listed(bed)).unwrap();
            }
        }
    }

    /// Stops it; its rules stay.
    fn stop(&mut self) {
        if let Self::Program { running, .. } = self {
            let mut process = running.take().unwrap();
            kill(Pid::from_raw(process.child.id().cast_signed()), Signal::SIGTERM).unwrap();
            process.child.wait().unwrap();
        }
    }

    /// Removes its rules.
    fn clean_up(&self, mode: Mode, bed: &Bed) {
        if let Self::Program { program, .. } = self {
            on_node(bed, program.to_str().unwrap(), &["--cleanup"]);
            return;
        }
        match mode {
            Mode::Nftables => {
                for family in ["ip", "ip6"] {
                    on_node(bed, "nft", &["delete", "table", family, "kube-proxy"]);
                }
            }
            // As kube-proxy does it: its chains end, the others stay.
            Mode::Iptables => {
                for program in ["iptables", "ip6tables"] {
                    for table in ["nat", "filter", "mangle"] {
                        on_node(bed, program, &["-t", table, "-F"]);
                        on_node(bed, program, &["-t", table, "-X"]);
                    }
                }
            }
        }
    }
}

/// What `socklb check` says about kube-proxy on the node.
fn traces(place: &installed::Place, bed: &Bed) -> String {
    let output = bed.at(Place::Node).run(|| place.run(&["check", "--cgroup", &place.cgroup, "-o", "json"]));
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = findings.as_array().unwrap().iter().find(|finding| finding["what"] == "kube-proxy").unwrap();
    found["found"].as_str().unwrap().to_owned()
}

/// Starts an agent on the node that serves no caller of the test by hooks.
fn start(place: &installed::Place, bed: &Bed, served: &str, flags: &[&str]) -> Running {
    let places = ["--node-name", "node", "--cgroup", served, "--pin-path", &place.pin_path];
    let flags = [&places, &QUIET[..], flags].concat();
    bed.at(Place::Node).run(|| place.spawn(Command::new(&place.binary), &flags))
}

/// New connections to the Service with different endpoints reach the agent's.
fn assert_agent_decides(bed: &Bed) {
    for family in FAMILIES {
        for (from, to) in
            [(Place::Outside, To::NodePort), (Place::Outside, To::LoadBalancer), (Place::Node, To::ClusterIp)]
        {
            for protocol in [Tcp, Udp] {
                // Of kube-proxy's endpoints, another one answers with a probability of two thirds.
                for _ in 0..20 {
                    let server =
                        bed.at(from).run(|| call_once(to.address(family, DIFFERING), protocol)).unwrap();
                    let what = format!("{from:?} to {to:?}, {family:?}, {protocol}");
                    assert_eq!(server, Place::Second.server(family), "{what}");
                }
            }
        }
    }
}

fn hand_over(mode: Mode, program: Option<PathBuf>) {
    let needs = [Feature::Nftables, Feature::Command("nft"), Feature::Command("iptables-restore")];
    installed::Place::test(&needs, |_, place| {
        let bed = Bed::new();
        let mut peer = Peer::new(program, &bed);
        let served = format!("{}/served", place.cgroup);
        make_threaded(Path::new(&served)).unwrap();
        let rounds = || AtomicU64::new(0);
        let load = Load { rounds: (0..6).map(|_| rounds()).collect(), ..Load::default() };
        peer.start(mode, &bed);
        if matches!(peer, Peer::Program { .. }) && env::var_os("UPDATE_EXPECT").is_some() {
            for (file, rules) in mode.recorded().iter().zip(mode.list(&bed)) {
                fs::write(file, rules + "\n").unwrap();
            }
        }
        thread::scope(|scope| {
            let _ends = SetOnDrop(&load.ends);
            let callers = [Place::Outside, Place::Pod, Place::Node].map(|from| [(from, false), (from, true)]);
            for ((from, are_kept), rounds) in callers.into_iter().flatten().zip(&load.rounds) {
                let (bed, load) = (&bed, &load);
                scope.spawn(move || bed.at(from).run(|| load.call(from, are_kept, rounds)));
            }
            load.phase("kube-proxy alone");

            place.write(&cluster(&[Place::Second]));
            let agent = start(
                place,
                &bed,
                &served,
                &["--packets=all", "--service-cidr=10.96.0.0/16,fd00:10:96::/48"],
            );
            eventually("the agent's rules are there", || {
                let args = ["status", "--cgroup", &served, "-o", "json"];
                let output = bed.at(Place::Node).run(|| place.run(&args));
                let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
                status["packets"]["last_transaction"]["changes"].as_u64() > Some(0)
            });
            assert_agent_decides(&bed);
            load.phase("both");

            peer.stop();
            load.phase("kube-proxy has ended");
            assert_agent_decides(&bed);
            let found = traces(place, &bed);
            for trace in mode.traces() {
                assert!(found.contains(trace) && found.contains("`kube-proxy --cleanup`"), "{found}");
            }

            peer.clean_up(mode, &bed);
            load.phase("socklb alone");
            let found = traces(place, &bed);
            assert!(!mode.traces().iter().any(|trace| found.contains(trace)), "{found}");

            peer.start(mode, &bed);
            load.phase("kube-proxy is back");
            assert_agent_decides(&bed);

            assert_eq!(agent.end(Signal::SIGTERM), Some(0));
            let agent = start(place, &bed, &served, &["--packets=off"]);
            eventually("the agent's rules are gone", || agent.has_said("removed the nftables rules"));
            load.phase("kube-proxy alone again");
            assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        });
        peer.stop();
        eventually("the cgroup is empty", || fs::remove_dir(&served).is_ok());
        let failures = load.failures.into_inner().unwrap();
        let n_calls = load.n_calls.into_inner();
        assert!(
            failures.is_empty(),
            "{} of {n_calls}:\n{}",
            failures.len(),
            failures[..failures.len().min(20)].join("\n")
        );
        eprintln!("{mode:?}, {n_calls} calls");
    });
}

/// With recorded rules, and with the program if there is one.
fn hand_over_all(mode: Mode) {
    // First, since it may record the rules.
    if let Some(program) = kube_proxy::find().unwrap() {
        hand_over(mode, Some(program));
    }
    hand_over(mode, None);
}

#[test]
fn nothing_fails_from_kube_proxys_nftables_mode_and_back() {
    hand_over_all(Mode::Nftables);
}

#[test]
fn nothing_fails_from_kube_proxys_iptables_mode_and_back() {
    hand_over_all(Mode::Iptables);
}
