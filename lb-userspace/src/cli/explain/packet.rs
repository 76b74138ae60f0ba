//! What a packet to the same address gets, in the kernel's nftables rules.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lb_core::packets::{
    Reason,
    nft::Table,
    sim::{self, Outcome, Packet},
};
use serde::Serialize;

/// Addresses for documentation (RFC 5737, RFC 3849): of no node and no pod.
pub const OUTSIDE: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// The answer for a packet. Field names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PacketPart {
    /// The sender.
    pub from: IpAddr,
    /// Whether this node is the sender; else the packet arrives.
    pub from_this_node: bool,
    /// `untouched`, `refused`, `dropped`, `translated`, or `unknown`.
    pub verdict: &'static str,
    /// Every endpoint that the packet may reach.
    pub endpoints: Vec<PacketEndpoint>,
    /// How long a client keeps its endpoint between two connections, seconds; 0 without affinity.
    pub affinity_seconds: u32,
    /// The rule that decides, in a sentence.
    pub reason: String,
}

/// An endpoint of a [`PacketPart`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PacketEndpoint {
    /// Its address.
    pub endpoint: SocketAddr,
    /// Whose address it sees as the sender's: `client` or `node`.
    pub sees: &'static str,
}

impl PacketPart {
    /// Sends a packet, the first of its connection, through a table of the kernel.
    #[must_use]
    pub fn new(table: &Table, packet: Packet) -> Self {
        let outcomes = sim::outcomes(table, packet);
        let endpoints: Vec<PacketEndpoint> = outcomes
            .all
            .iter()
            .filter_map(|outcome| match *outcome {
                Outcome::Translated { endpoint, is_masqueraded } => {
                    Some(PacketEndpoint { endpoint, sees: if is_masqueraded { "node" } else { "client" } })
                }
                _ => None,
            })
            .collect();
        let seconds = outcomes.recorded.map_or(0, |time| time.get().div_ceil(1000));
        let ip = packet.destination.ip();
        let reason = match (Reason::of(&outcomes), endpoints.len(), seconds) {
            (Reason::NoFrontend, ..) => "no rule of socklb is about it".to_owned(),
            (Reason::Kept, _, seconds) => format!("the client keeps it until it is idle for {seconds} s"),
            (Reason::Drawn, 1, _) => "the only endpoint".to_owned(),
            (Reason::Drawn, n, 0) => format!("one of {n}, each with the same probability"),
            (Reason::Drawn, n, seconds) => {
                format!("one of {n}; a client keeps its endpoint until it is idle for {seconds} s")
            }
            (Reason::NoEndpoint, ..) => "the service has no usable endpoint".to_owned(),
            (Reason::NoLocalEndpoint, ..) => {
                "no endpoint is on this node, and the policy Local lets packets from outside reach no other"
                    .to_owned()
            }
            (Reason::SourceRanges, ..) => {
                format!("loadBalancerSourceRanges do not have {}", packet.source)
            }
            (Reason::UndefinedPort, ..) => {
                format!("{ip} is the cluster IP of a service that does not define this port")
            }
            (Reason::NoService, ..) => {
                format!("no service has {ip}, an address of the networks of cluster IPs")
            }
        };
        let verdict = match outcomes.all.first() {
            Some(Outcome::Translated { .. }) => "translated",
            Some(Outcome::Rejected) => "refused",
            Some(Outcome::Dropped) => "dropped",
            Some(Outcome::Passes) | None => "untouched",
        };
        Self { verdict, endpoints, affinity_seconds: seconds, reason, ..Self::unknown(packet, String::new()) }
    }

    /// The answer if the table cannot be read.
    #[must_use]
    pub const fn unknown(packet: Packet, reason: String) -> Self {
        Self {
            from: packet.source,
            from_this_node: packet.is_own,
            verdict: "unknown",
            endpoints: Vec::new(),
            affinity_seconds: 0,
            reason,
        }
    }

    /// The verdict and its reason.
    pub(super) fn summary(&self) -> String {
        let who = match self.from {
            _ if self.from_this_node => " (this node)",
            from if from == OUTSIDE.0 || from == OUTSIDE.1 => " (outside)",
            _ => "",
        };
        format!("packet from {}{who} -> {}: {}", self.from, self.verdict, self.reason)
    }

    /// The endpoints, each with whose address it sees.
    pub(super) fn parts(&self) -> impl Iterator<Item = (SocketAddr, &'static str)> {
        self.endpoints.iter().map(|PacketEndpoint { endpoint, sees }| {
            let whose = match *sees {
                "node" => "sees the node's address",
                _ => "sees the client's address",
            };
            (*endpoint, whose)
        })
    }

    /// The lines of the answer.
    pub(super) fn text(&self) -> String {
        let mut text = self.summary() + "\n";
        for (endpoint, whose) in self.parts() {
            let _infallible = writeln!(text, "  endpoint   {endpoint}  {whose}");
        }
        text
    }
}
