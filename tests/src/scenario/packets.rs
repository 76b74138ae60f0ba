//! Scenarios on packets: callers without hooks behind a node that has the rules.
//!
//! ```text
//! caller ──┐
//! caller ──┴── node ── world
//! ```
//!
//! Every endpoint and every destination is an address of the world, with a server, unless the node's
//! interfaces have it. A call that no rule is about so reaches a server at its original address. The callers
//! are pods of the node. What is dropped counts as unreachable.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use lb_core::{
    desired::{FrontendAddress, PacketMode, Settings},
    model::{Family, Protocol, address},
    plan::Capacity,
    state::State,
    tables::Image,
};
use lb_netns::Servers;

use super::{Executor, NODE, Outcome, Scenario};
use crate::{
    bed::{self, FAMILIES, Node},
    cluster::{self, Cluster},
    netns::NetNs,
};

/// The networks of the links: `172.31.0.0/16` and `fd00:172:31::/48`. The third number is the caller's.
const LINKS: [u8; 2] = [172, 31];

/// The number of the world's link.
const WORLD: u8 = 255;

/// How often a call without an answer is repeated.
const N_SILENT: usize = 2;

/// The node's rules and the namespaces.
pub struct Packets {
    node: Node,
    node_name: String,
    addresses: BTreeSet<(SocketAddr, Protocol)>,
    places: BTreeMap<String, (NetNs, Servers)>,
    _world: (NetNs, Servers),
}

fn link(family: Family, number: u8, host: u8) -> IpAddr {
    bed::address(family, [LINKS[0], LINKS[1], number, host])
}

/// Joins a namespace to the node's.
fn join(node: &NetNs, number: u8, other: &NetNs) -> Result<()> {
    let of = |host| FAMILIES.map(|family| link(family, number, host));
    Ok(node.join(&format!("to{number}"), &of(1), other, "up", &of(2))?)
}

/// Adds a route to each address, by a neighbour of the link.
fn route(from: &NetNs, to: &BTreeSet<IpAddr>, number: u8, host: u8) -> Result<()> {
    for &ip in to {
        let prefix = if ip.is_ipv4() { 32 } else { 128 };
        from.add_route((ip, prefix), link(address::family(ip), number, host))?;
    }
    Ok(())
}

/// A server of the world that no scenario knows.
fn greeter(family: Family) -> SocketAddr {
    SocketAddr::new(link(family, WORLD, 2), bed::PORT)
}

/// Waits until links carry packets, which takes the kernel up to a second after it made them.
fn greet(from: &NetNs) -> Result<()> {
    for family in FAMILIES {
        from.run(|| bed::connect(greeter(family), bed::PATIENCE)).context("a link carries nothing")?;
    }
    Ok(())
}

impl Packets {
    /// The rules with the settings of a scenario, and the mode `all`.
    ///
    /// # Errors
    ///
    /// If the scenario cannot be read, or the kernel refuses a namespace.
    pub fn new(scenario: &Scenario) -> Result<Self> {
        let settings = Settings { packets: PacketMode::All, ..scenario.settings.desired()? };
        let interfaces = scenario.settings.interfaces.clone();
        let addresses = scenario.addresses()?;
        let (node, world) = (NetNs::new()?, NetNs::new()?);
        join(&node, WORLD, &world)?;
        node.forward()?;
        node.run(bed::answer_all_errors);
        let mut far: BTreeSet<IpAddr> = addresses.iter().map(|(at, _)| at.ip()).collect();
        far.retain(|ip| !ip.is_loopback() && !interfaces.contains(ip));
        for &ip in &interfaces {
            node.add_address(ip)?;
        }
        for &ip in &far {
            world.add_address(ip).with_context(|| format!("cannot own {ip}"))?;
        }
        route(&node, &far, WORLD, 2)?;
        for family in FAMILIES {
            let prefix = if family == Family::V4 { 16 } else { 48 };
            let all = bed::address(family, [LINKS[0], LINKS[1], 0, 0]);
            world.add_route((all, prefix), link(family, WORLD, 1))?;
        }
        route(&world, &interfaces.iter().copied().collect(), WORLD, 1)?;
        let (there, here): (Vec<_>, Vec<_>) = addresses.iter().partition(|(at, _)| far.contains(&at.ip()));
        let greeter = FAMILIES.map(|family| (greeter(family), Protocol::Tcp));
        let of_world = world.run(|| bed::serve(there.into_iter().chain(greeter)));
        greet(&node)?;
        let of_node = node.run(|| bed::serve(here));
        let rules = node.run(|| {
            Node::new(State::new(settings, interfaces.clone(), Capacity::default(), &Image::default()))
        });
        Ok(Self {
            node: rules,
            node_name: scenario.settings.node_name.clone(),
            addresses,
            places: BTreeMap::from([(NODE.to_owned(), (node, of_node))]),
            _world: (world, of_world),
        })
    }

    /// Makes a caller's namespace.
    fn add(&mut self, caller: &str) -> Result<()> {
        let number = u8::try_from(self.places.len())?;
        let netns = NetNs::new()?;
        join(&self.places[NODE].0, number, &netns)?;
        let ips: BTreeSet<IpAddr> = self.addresses.iter().map(|(at, _)| at.ip()).collect();
        let (own, others): (BTreeSet<_>, BTreeSet<_>) = ips.into_iter().partition(IpAddr::is_loopback);
        route(&netns, &others, number, 1)?;
        route(&netns, &FAMILIES.map(|family| greeter(family).ip()).into(), number, 1)?;
        greet(&netns)?;
        let there = self.addresses.iter().filter(|(at, _)| own.contains(&at.ip())).copied();
        let servers = netns.run(|| bed::serve(there));
        self.places.insert(caller.to_owned(), (netns, servers));
        Ok(())
    }
}

impl Executor for Packets {
    fn follow(&mut self, cluster: &Cluster) -> Result<()> {
        let mut cluster = cluster.clone();
        let name = (String::new(), self.node_name.clone());
        let node = cluster.nodes.entry(name).or_insert_with(|| cluster::node(&self.node_name, &[]));
        let pods = FAMILIES.map(|family| {
            let prefix = if family == Family::V4 { 16 } else { 48 };
            format!("{}/{prefix}", bed::address(family, [LINKS[0], LINKS[1], 0, 0]))
        });
        node.spec.get_or_insert_default().pod_cidrs = Some(pods.into());
        self.node.follow(&cluster);
        Ok(())
    }

    fn call(&mut self, caller: &str, to: FrontendAddress, n: usize) -> Result<BTreeSet<Outcome>> {
        if !self.places.contains_key(caller) {
            self.add(caller)?;
        }
        let at = SocketAddr::new(to.ip, to.port);
        let mut outcomes = BTreeSet::new();
        self.places[caller].0.run(|| {
            // With n endpoints, one is missed in less than one of 10^9 runs.
            let mut n_silent = 0;
            for _ in 0..24 * n {
                outcomes.insert(match bed::call(at, to.protocol, bed::SILENCE) {
                    bed::Outcome::Reached { server, .. } if server == at => Outcome::Untouched,
                    bed::Outcome::Reached { server, .. } => Outcome::Endpoint(server),
                    bed::Outcome::Refused => Outcome::Refused,
                    bed::Outcome::Silence => {
                        n_silent += 1;
                        Outcome::Unreachable
                    }
                    bed::Outcome::Failed(error) => bail!("{at}: {error}"),
                });
                if n_silent == N_SILENT {
                    break;
                }
            }
            Ok(outcomes)
        })
    }

    fn has_packets(&self) -> bool {
        true
    }

    fn wait(&mut self, seconds: u64) {
        thread::sleep(Duration::from_secs(seconds));
    }
}
