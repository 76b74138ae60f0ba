//! Clients behind the node, whose packets it routes: one outside of the cluster, and a pod whose sockets
//! hooks decide for.
//!
//! ```text
//! client ── node with the rules ── server
//! ```
//!
//! Each target has a client and a node of its own; the server is one for all.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure};
use lb_core::packets::nft::{
    Base, Chain, ChainType, Change, Comparison, CtKey, Expression, FIB_LOCAL, Family, FibAddress, Header,
    Hook, Policy as ChainPolicy, Register, Rule, TableId, Transaction, ct_state,
};
use lb_kernel::nftables::Nftables;
use lb_tests::{Sandbox, apiserver::ApiServer, cgroup::ThreadCgroup, netns::NetNs};

use super::{
    Kind, Options, Server,
    client::{Answer, By, Order, Place, Work},
    competitor::{Client, Ready, ip},
    take_turns,
};
use crate::{
    calls::SOCKLB,
    daemon::Daemon,
    objects::{LOAD_BALANCER_NETWORK, POD_NETWORK, Policy, SERVICE_NETWORK, Size},
    result::Run,
    sync,
    turns::{self, Caller},
};

/// Until the last service is answered: one of the measures.
pub(crate) const PROGRAMMING: &str = "packets from outside: process start until all is served";
/// What the pod's node is compared with.
pub(crate) const PACKETS_OFF: &str = "packets: off";
const PACKETS_ALL: &str = "packets: all";
const TRACKED: &str = "off, another program tracks";
const UNTRACKED: &str = "all, pods untracked";
/// The network of clients.
const CLIENTS: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 0);

/// The kinds of work of a client outside.
pub(crate) fn outside() -> impl Iterator<Item = (Work, By, String)> {
    let ways =
        ["node port", "load balancer"].into_iter().flat_map(|way| Policy::ALL.map(|policy| (way, policy)));
    ways.flat_map(|(way, policy)| {
        let by = if way == "node port" { By::NodePort(policy) } else { By::LoadBalancer(policy) };
        let policy = policy.name();
        WORK.map(|work| (work, by, format!("{way}, policy {policy}: {}", work.name())))
    })
}

/// The kinds of work of a pod.
pub(crate) fn pod() -> impl Iterator<Item = (Work, By, String)> {
    WORK.into_iter().map(|work| (work, By::ClusterIp, format!("pod: {}", work.name())))
}

const WORK: [Work; 2] = [Work::Connection, Work::KeepAlive];

/// Who the client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// No part of the cluster.
    Outside,
    /// In the cgroup with the hooks.
    Pod,
}

/// What is on the node.
#[derive(Clone, Debug)]
enum ServedBy {
    /// Nothing: the client knows the endpoints.
    None,
    /// The agent's binary, and its flag for packets.
    Socklb(PathBuf, &'static str),
    /// The binary of kube-proxy in mode `nftables`.
    KubeProxy(PathBuf),
}

#[derive(Clone, Debug)]
struct Target {
    name: &'static str,
    served_by: ServedBy,
    /// Rules of another program.
    others: Option<fn(&TableId) -> Vec<Change>>,
}

impl Target {
    const fn new(name: &'static str, served_by: ServedBy) -> Self {
        Self { name, served_by, others: None }
    }
}

/// Measures one number of services.
pub(super) fn measure(
    n_services: u32,
    options: &Options,
    kube_proxy: Option<&Path>,
    is_smoke: bool,
    run: &mut Run,
) -> anyhow::Result<()> {
    let socklb = |packets| ServedBy::Socklb(options.socklb.clone(), packets);
    let (all, off) = ("--packets=all", "--packets=off");
    let kube_proxy =
        kube_proxy.map(|program| Target::new("nftables", ServedBy::KubeProxy(program.to_owned())));
    let mut outside_targets = vec![Target::new("direct", ServedBy::None), Target::new(SOCKLB, socklb(all))];
    outside_targets.extend(kube_proxy.clone());
    let mut pod_targets = vec![
        Target::new("direct", ServedBy::None),
        Target::new(PACKETS_OFF, socklb(off)),
        Target { others: Some(tracking), ..Target::new(TRACKED, socklb(off)) },
        Target::new(PACKETS_ALL, socklb(all)),
        Target { others: Some(untracking), ..Target::new(UNTRACKED, socklb(all)) },
    ];
    pod_targets.extend(kube_proxy);
    for (role, targets) in [(Role::Outside, outside_targets), (Role::Pod, pod_targets)] {
        let kinds: Vec<_> = if role == Role::Outside { outside().collect() } else { pod().collect() };
        eprintln!("{n_services} services, client: {role:?}");
        let netns = NetNs::new()?;
        let server = Server::start(&netns)?;
        // One of each policy at least.
        let size = Size { n_services: n_services.max(2), n_endpoints: options.endpoints, n_nodes: 1 };
        let patience = Duration::from_secs(options.patience);
        let (netns, pid) = (&netns, server.pid());
        thread::scope(|scope| -> anyhow::Result<()> {
            let mut ready = Vec::new();
            for (target, number) in targets.iter().zip(1..) {
                let node = Ipv4Addr::new(10, 0, number, 1);
                let place = Place {
                    size,
                    to_endpoint: matches!(target.served_by, ServedBy::None),
                    server: pid,
                    node,
                };
                match Caller::start(scope, move |sandbox| {
                    set_up(target, role, place, (sandbox, netns, number), patience)
                }) {
                    Ok((caller, (made, took))) => {
                        if let Some(took) = took.filter(|_| role == Role::Outside) {
                            run.of(target.name, Some(n_services)).times(PROGRAMMING, &[took]);
                        }
                        ready.push(((target.name, made), caller));
                    }
                    Err(error) => run.unavailable(target.name, Some(n_services), format!("{error:#}")),
                }
            }
            for (work, by, title) in kinds {
                take_turns(&Kind { work, by, title }, &ready, n_services, options.rounds, is_smoke, run)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What there is of a target, and how long its rules took.
type Made = (Ready, Option<Duration>);

/// Sets up a target in a sandbox, which is the node. `number` selects its networks.
fn set_up(
    target: &Target,
    role: Role,
    place: Place,
    (sandbox, server_netns, number): (&Sandbox, &NetNs, u8),
    patience: Duration,
) -> anyhow::Result<(Made, turns::Work<Order, Answer>)> {
    let there = Ipv4Addr::new(10, 0, number, 2);
    let [gateway, own] = [1, 2].map(|end| Ipv4Addr::new(192, 168, number, end));
    let client = NetNs::new()?;
    let (eth0, here) = ("eth0", |ip: Ipv4Addr| [IpAddr::from(ip)]);
    sandbox.netns().join(eth0, &here(place.node), server_netns, &format!("node-{number}"), &here(there))?;
    sandbox.netns().join("client", &here(gateway), &client, eth0, &here(own))?;
    sandbox.netns().forward()?;
    server_netns.add_route(([192, 168, number, 0].into(), 24), place.node.into())?;
    client.add_route(([10, 0, number, 0].into(), 24), gateway.into())?;
    // Service addresses need a route too. None leads out of the server's namespace.
    for network in [POD_NETWORK, SERVICE_NETWORK] {
        ip(&["route", "add", network, "via", &there.to_string()])?;
    }
    client.run(|| {
        let mut networks = [POD_NETWORK, SERVICE_NETWORK, LOAD_BALANCER_NETWORK].into_iter();
        networks.try_for_each(|network| ip(&["route", "add", network, "via", &gateway.to_string()]))
    })?;
    let server = || sync::server(&place.size.cluster_with_load_balancers(place.node.into()));
    let running: Option<(Daemon, ApiServer)> = match &target.served_by {
        ServedBy::None => None,
        ServedBy::Socklb(program, packets) => {
            let server = server();
            Some((Daemon::socklb(program, sandbox, &server, &[packets])?, server))
        }
        ServedBy::KubeProxy(program) => {
            let server = server();
            Some((Daemon::kube_proxy(program, "nftables", &server)?, server))
        }
    };
    let serves_packets = !matches!(target.served_by, ServedBy::Socklb(_, "--packets=off"));
    let mut took = None;
    if let Some((daemon, _)) = &running {
        let waited = client.run(|| {
            // Outside of the cgroup with the hooks, where it is the rules that serve.
            let _cgroup = serves_packets.then(ThreadCgroup::enter).transpose()?;
            let ways = if serves_packets { all_ways().collect() } else { vec![By::ClusterIp] };
            ways.into_iter().try_for_each(|by| wait(place, by, daemon, patience))
        });
        waited.map_err(|error: anyhow::Error| anyhow!("{error:#}; {}", daemon.last_words()))?;
        took = Some(daemon.started.elapsed());
        if role == Role::Pod {
            client.run(|| wait(place, By::ClusterIp, daemon, patience))?;
        }
    }
    if let Some(rules) = target.others {
        let id = TableId { family: Family::V4, name: "others".into() };
        let changes = rules(&id).into_iter().map(|change| (id.clone(), change)).collect();
        Nftables::open()?.apply(&Transaction { changes, generation: None })?;
    }
    let (mut process, cgroup) = client.run(|| -> anyhow::Result<_> {
        let cgroup = (role == Role::Outside).then(ThreadCgroup::enter).transpose()?;
        Ok((Client::start(place)?, cgroup))
    })?;
    let work: turns::Work<Order, Answer> = Box::new(move |order| {
        let _live_as_long = (&running, &client, &cgroup);
        process.work(&order)
    });
    let ready = Ready { netns: NetNs::current()?, programs: Vec::new(), programming: None };
    Ok(((ready, took), work))
}

fn all_ways() -> impl Iterator<Item = By> {
    let of = |policy| [By::NodePort(policy), By::LoadBalancer(policy)];
    std::iter::once(By::ClusterIp).chain(Policy::ALL.into_iter().flat_map(of))
}

/// Waits until the last service of a kind is answered.
fn wait(place: Place, by: By, daemon: &Daemon, patience: Duration) -> anyhow::Result<()> {
    let last = SocketAddr::from(place.last(by));
    let began = Instant::now();
    while TcpStream::connect_timeout(&last, Duration::from_secs(1)).is_err() {
        let seconds = patience.as_secs();
        ensure!(daemon.started.elapsed() < patience, "{last} is not answered within {seconds} s");
        // Leaves the CPU to the process.
        thread::sleep((began.elapsed() / 50).clamp(Duration::from_millis(1), Duration::from_millis(50)));
    }
    Ok(())
}

const fn register(n: u8) -> Register {
    match Register::new(n) {
        Some(register) => register,
        None => Register::LAST,
    }
}

fn chain(id: &TableId, hook: Hook, priority: i32, rules: Vec<Vec<Expression>>) -> Vec<Change> {
    let base = Base { kind: ChainType::Filter, hook, priority, policy: ChainPolicy::Accept };
    let chain = Chain { base: Some(base), rules: Vec::new() };
    let name = id.name.clone();
    let mut changes = vec![Change::AddTable, Change::AddChain(name.clone(), chain.base)];
    let rules = rules.into_iter().map(|expressions| Rule { expressions, comment: None });
    changes.extend(rules.map(|rule| Change::AddRule(name.clone(), rule)));
    changes
}

/// `ct state established accept` at `forward`: what makes the kernel track all packets of the node.
fn tracking(id: &TableId) -> Vec<Change> {
    let (from, to) = (register(0), register(0));
    let (mask, xor) = (ct_state::ESTABLISHED.to_ne_bytes().into(), [0; 4].into());
    let rule = vec![
        Expression::Ct { key: CtKey::State, to },
        Expression::Bitwise { from, mask, xor, to },
        Expression::Compare { from, op: Comparison::NotEqual, value: [0; 4].into() },
        Expression::Counter,
    ];
    chain(id, Hook::Forward, 0, vec![rule])
}

/// Packets between the client and endpoints, which are the pods here, are not tracked.
fn untracking(id: &TableId) -> Vec<Change> {
    let within = |offset, network: Ipv4Addr, mask: Ipv4Addr| {
        let (from, to) = (register(0), register(0));
        [
            Expression::Payload { header: Header::Network, offset, len: 4, to },
            Expression::Bitwise { from, mask: mask.octets().into(), xor: [0; 4].into(), to },
            Expression::Compare { from, op: Comparison::Equal, value: network.octets().into() },
        ]
    };
    let clients = |offset| within(offset, CLIENTS, Ipv4Addr::new(255, 255, 0, 0));
    let endpoints = |offset| within(offset, Ipv4Addr::new(10, 128, 0, 0), Ipv4Addr::new(255, 128, 0, 0));
    let (source, destination) = (12, 16);
    let rule = |both: [[Expression; 3]; 2]| {
        let mut rule: Vec<Expression> = both.into_iter().flatten().collect();
        rule.push(Expression::FibType { of: FibAddress::Destination, to: register(0) });
        let value = FIB_LOCAL.to_ne_bytes().into();
        rule.push(Expression::Compare { from: register(0), op: Comparison::NotEqual, value });
        rule.push(Expression::Notrack);
        rule
    };
    let rules = vec![
        rule([clients(source), endpoints(destination)]),
        rule([endpoints(source), clients(destination)]),
    ];
    chain(id, Hook::Prerouting, -300, rules)
}
