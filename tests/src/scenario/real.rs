//! Scenarios on the running kernel.
//!
//! Every endpoint gets an address on the loopback device of each caller's network namespace and a server
//! there. So does every destination: a call that passes reaches a server at the original address, and a call
//! is refused although a server listens.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_core::{desired::FrontendAddress, model::Protocol};
use lb_kernel::{Features, Options};
use nix::errno::Errno;

use super::{Executor, NODE, Outcome, Scenario};
use crate::{
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::Cluster,
    netns::NetNs,
    sandbox::Sandbox,
    server::Servers,
};

/// An agent on the kernel, and the network namespaces of the callers.
pub struct Real {
    agent: Agent,
    addresses: BTreeSet<(SocketAddr, Protocol)>,
    places: BTreeMap<String, Place>,
    features: Features,
}

/// A network namespace in which all addresses of the scenario answer.
struct Place {
    netns: NetNs,
    _servers: Servers,
}

impl Place {
    fn new(netns: NetNs, addresses: &BTreeSet<(SocketAddr, Protocol)>) -> Result<Self> {
        let ips: BTreeSet<IpAddr> = addresses.iter().map(|(address, _)| address.ip()).collect();
        for ip in ips.into_iter().filter(|ip| !ip.is_loopback()) {
            netns.add_address(ip).with_context(|| format!("cannot own {ip}"))?;
        }
        let servers = netns.run(|| Servers::start(addresses.iter().copied()));
        Ok(Self { netns, _servers: servers })
    }
}

impl Real {
    /// An agent with the settings of a scenario.
    ///
    /// # Errors
    ///
    /// If the scenario cannot be read, or the programs cannot be loaded.
    pub fn new(sandbox: &Sandbox, scenario: &Scenario) -> Result<Self> {
        let settings = &scenario.settings;
        let options = Options {
            node_ports: settings.node_ports()?,
            localhost_nodeports: settings.localhost_nodeports,
            ..agent::options(sandbox)
        };
        let agent = Agent::start_with(&options, settings.desired()?, settings.interfaces.clone())?;
        let addresses = scenario.addresses()?;
        let node = Place::new(NetNs::current()?, &addresses)?;
        let places = BTreeMap::from([(NODE.to_owned(), node)]);
        Ok(Self { agent, addresses, places, features: options.features })
    }
}

impl Executor for Real {
    fn follow(&mut self, cluster: &Cluster) -> Result<()> {
        self.agent.follow(cluster);
        self.agent.settle();
        while self.agent.state.needs_sync() {
            self.agent.sync();
            self.agent.settle();
        }
        ensure!(self.agent.image() == *self.agent.state.image(), "the kernel does not hold the image");
        Ok(())
    }

    fn call(&mut self, caller: &str, to: FrontendAddress, n: usize) -> Result<BTreeSet<Outcome>> {
        if !self.places.contains_key(caller) {
            self.places.insert(caller.to_owned(), Place::new(NetNs::new()?, &self.addresses)?);
        }
        let features = self.features;
        // With n endpoints, one is missed in less than one of 10^9 runs.
        self.places[caller].netns.run(|| {
            let ways = ways(to);
            (0..24 * n).map(|i| outcome(ways[i % ways.len()], to, features)).collect()
        })
    }

    fn leaves_unreachable_calls_alone(&self) -> bool {
        !self.features.set_retval
    }

    fn wait(&mut self, seconds: u64) {
        thread::sleep(Duration::from_secs(seconds));
    }
}

/// How a program calls: the kind of socket, and whether it connects.
type Way = (Domain, bool);

fn ways(to: FrontendAddress) -> Vec<Way> {
    let domains = if to.ip.is_ipv4() { vec![Domain::V4, Domain::Mapped] } else { vec![Domain::V6] };
    let connects = if to.protocol == Protocol::Udp { vec![true, false] } else { vec![true] };
    domains.iter().flat_map(|domain| connects.iter().map(|connects| (*domain, *connects))).collect()
}

fn outcome((domain, connects): Way, to: FrontendAddress, features: Features) -> Result<Outcome> {
    let address = SocketAddr::new(to.ip, to.port);
    let socket = Socket::new(domain, to.protocol);
    let answer =
        if connects { socket.connect(address).and_then(|()| socket.ask()) } else { socket.ask_at(address) };
    match answer {
        Ok(answer) if answer.server == address => Ok(Outcome::Untouched),
        Ok(answer) => {
            if let Some(seen) = answer.seen {
                ensure!(seen == address, "an answer to a call of {address} is shown as from {seen}");
            }
            Ok(Outcome::Endpoint(answer.server))
        }
        Err(Errno::ECONNREFUSED) => Ok(Outcome::Refused),
        Err(Errno::EHOSTUNREACH) => Ok(Outcome::Unreachable),
        // The error of a datagram on kernels where programs cannot choose it.
        Err(Errno::EINVAL) if !features.set_retval && to.protocol == Protocol::Udp => Ok(Outcome::Refused),
        Err(error) => Err(error).with_context(|| format!("{domain:?}, connects: {connects}")),
    }
}
