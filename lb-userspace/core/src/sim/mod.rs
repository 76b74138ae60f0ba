//! Simulator: computes the programs' verdicts on an image, in user space.
//!
//! # Purpose
//!
//! `socklb explain` and tests compute the verdict on a call with the function that the kernel runs,
//! [`lb_common::resolve`], on an [`Image`] instead of maps.
//!
//! # What this cannot prove
//!
//! The code around `resolve`: context access, records, the kernel's use of the verdict. Tests run each
//! scenario on the kernel too.
//!
//! # Depends on
//!
//! `tables`, `desired`, `model`.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lb_common::{
    Tables, Verdict,
    address::{Octets4, Octets6},
    health::Admission,
    layout::{self, Affinity, EndpointHealth, FamilyLayout, Frontend},
    resolve::{Call, Choice, NodeAddress, find_frontend, resolve},
};

use crate::{
    desired::FrontendAddress,
    model::Protocol,
    tables::{Image, wire_protocol},
};

/// The caller of a simulated call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Cookie of its network namespace, the client identity for affinity.
    pub netns: u64,
    /// Whether it is in the node's network namespace.
    pub on_node: bool,
    /// The endpoint of its socket's last call to this address.
    pub earlier: Option<Choice>,
}

impl Default for Caller {
    fn default() -> Self {
        Self { netns: 1, on_node: true, earlier: None }
    }
}

/// Settings of the programs, which the image does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// First and last port of the node-port range.
    pub node_ports: (u16, u16),
    /// Whether node ports answer on loopback addresses of the node.
    pub localhost_nodeports: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { node_ports: lb_common::limits::NODE_PORTS, localhost_nodeports: true }
    }
}

/// A node as the programs see it, with an image instead of maps.
#[derive(Debug, Default)]
pub struct Simulator {
    /// The tables.
    pub image: Image,
    /// The settings.
    pub config: Config,
    /// The time, in nanoseconds of `CLOCK_MONOTONIC`, that ejections are compared with.
    pub now: u64,
    /// The outcomes of connections, by endpoint id.
    pub health: RefCell<BTreeMap<u32, EndpointHealth>>,
    /// Open connections, by endpoint id.
    pub active: BTreeMap<u32, i32>,
    affinity: RefCell<BTreeMap<(u64, u32), Affinity>>,
}

/// The result of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not a service address: the call passes unchanged.
    Untouched,
    /// `ECONNREFUSED`.
    Refused,
    /// `EHOSTUNREACH`, or unchanged on kernels before 5.18.
    Unreachable,
    /// The call is redirected to an endpoint.
    Endpoint(SocketAddr, Choice),
}

impl Simulator {
    /// A simulator on an image, without affinity entries.
    #[must_use]
    pub fn new(image: Image) -> Self {
        Self { image, ..Self::default() }
    }

    /// Computes the outcome of a call.
    ///
    /// `random` is the first of the program's random numbers, from which the others follow; `now` is its
    /// clock in seconds. A call to an IPv4-mapped address is an IPv4 call, as in the hooks.
    pub fn call(&self, to: FrontendAddress, caller: Caller, random: u32, now: u64) -> Outcome {
        let Some(protocol) = wire_protocol(to.protocol) else { return Outcome::Untouched };
        let (port, client) = (to.port, Client { simulator: self, caller, random: Cell::new(random), now });
        match to.ip.to_canonical() {
            IpAddr::V4(ip) => outcome(resolve(self, &client, &Call { address: ip.octets(), port, protocol })),
            IpAddr::V6(ip) => outcome(resolve(self, &client, &Call { address: ip.octets(), port, protocol })),
        }
    }

    /// The frontend that answers for an address, by the programs' lookup.
    #[must_use]
    pub fn find_frontend(&self, to: FrontendAddress, caller: Caller) -> Option<(u32, Frontend)> {
        let protocol = wire_protocol(to.protocol)?;
        let (port, client) = (to.port, Client { simulator: self, caller, random: Cell::new(0), now: 0 });
        match to.ip.to_canonical() {
            IpAddr::V4(ip) => find_frontend(self, &client, &Call { address: ip.octets(), port, protocol }),
            IpAddr::V6(ip) => find_frontend(self, &client, &Call { address: ip.octets(), port, protocol }),
        }
    }
}

fn outcome<A: Octets>(verdict: Verdict<A>) -> Outcome {
    match verdict {
        Verdict::Pass => Outcome::Untouched,
        Verdict::Refuse { .. } => Outcome::Refused,
        Verdict::Unreachable => Outcome::Unreachable,
        Verdict::Redirect(target) => {
            Outcome::Endpoint(SocketAddr::new(target.address.ip(), target.port), target.choice)
        }
    }
}

/// Conversion between the programs' octets and the standard library's addresses.
trait Octets: FamilyLayout {
    fn ip(self) -> IpAddr;
    fn from_ip(ip: IpAddr) -> Option<Self>;
}

impl Octets for Octets4 {
    fn ip(self) -> IpAddr {
        Ipv4Addr::from(self).into()
    }
    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(ip) => Some(ip.octets()),
            IpAddr::V6(_) => None,
        }
    }
}

impl Octets for Octets6 {
    fn ip(self) -> IpAddr {
        Ipv6Addr::from(self).into()
    }
    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(ip.octets()),
        }
    }
}

impl<A: Octets> Tables<A> for Simulator {
    fn frontend_id(&self, key: &A::Key) -> Option<u32> {
        let (address, port, protocol) = A::key_parts(key);
        let protocol = match protocol {
            layout::Protocol::TCP => Protocol::Tcp,
            layout::Protocol::UDP => Protocol::Udp,
            _ => return None,
        };
        self.image.services.get(&FrontendAddress { ip: address.ip(), port, protocol }).copied()
    }
    fn frontend(&self, frontend_id: u32) -> Option<Frontend> {
        self.image.frontends.get(&frontend_id).copied()
    }
    fn endpoint(&self, index: u32) -> Option<A::Endpoint> {
        let entry = self.image.entry(A::FAMILY == lb_common::Family::V6, index)?;
        let address = entry.address();
        Some(A::entry(A::from_ip(address.ip())?, address.port(), entry.endpoint_id, entry.extra))
    }
    fn is_suspect(&self, endpoint_id: u32) -> bool {
        self.health.borrow().get(&endpoint_id).is_some_and(|health| health.ejected_until != 0)
    }
    fn admits(&self, endpoint_id: u32) -> u32 {
        let health = self.health.borrow().get(&endpoint_id).copied().unwrap_or_default();
        u32::from(health.admission(self.now) != Admission::Ejected)
    }
    fn active(&self, endpoint_id: u32) -> i32 {
        self.active.get(&endpoint_id).copied().unwrap_or_default()
    }
    fn begin_trial(&self, endpoint_id: u32) {
        if let Some(health) = self.health.borrow_mut().get_mut(&endpoint_id)
            && health.admission(self.now) == Admission::Trial
        {
            health.tried_at = self.now;
        }
    }
    fn node_ports(&self) -> (u16, u16) {
        self.config.node_ports
    }
    fn node_address(&self, mapped: &Octets6) -> Option<NodeAddress> {
        let ip = Ipv6Addr::from(*mapped).to_canonical();
        self.image.node_addrs.get(&ip).map(|&own| if own { NodeAddress::Own } else { NodeAddress::Other })
    }
    fn is_in_service_network(&self, address: &A) -> bool {
        let ip = address.ip();
        self.image.service_cidrs.iter().any(|network| network.contains(ip))
    }
    fn cluster_ip(&self, mapped: &Octets6) -> Option<bool> {
        self.image.cluster_ips.get(&Ipv6Addr::from(*mapped).to_canonical()).copied()
    }
}

/// The caller of one call.
struct Client<'a> {
    simulator: &'a Simulator,
    caller: Caller,
    random: Cell<u32>,
    now: u64,
}

impl lb_common::Caller for Client<'_> {
    fn loopback_is_node(&self) -> bool {
        self.simulator.config.localhost_nodeports && self.caller.on_node
    }
    fn earlier_choice(&self) -> Option<Choice> {
        self.caller.earlier
    }
    fn random(&self) -> u32 {
        // A linear congruential generator, whose high bits count.
        self.random.replace(self.random.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223))
    }
    fn client(&self) -> u32 {
        (self.caller.netns.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
    }
    fn now(&self) -> u64 {
        self.now
    }
    fn affinity(&self, service_id: u32) -> Option<Affinity> {
        self.simulator.affinity.borrow().get(&(self.caller.netns, service_id)).copied()
    }
    fn renew_affinity(&self, service_id: u32, now: u64) {
        if let Some(affinity) = self.simulator.affinity.borrow_mut().get_mut(&(self.caller.netns, service_id))
        {
            affinity.last_used = now;
        }
    }
    fn remember_affinity(&self, service_id: u32, _replaces: Option<Affinity>, new: Affinity) -> u32 {
        self.simulator.affinity.borrow_mut().insert((self.caller.netns, service_id), new);
        new.endpoint_id
    }
}

#[cfg(test)]
mod tests;
