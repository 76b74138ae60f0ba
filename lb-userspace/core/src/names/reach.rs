//! Whom the node's name server answers.

use std::{collections::BTreeSet, net::IpAddr};

use crate::model::Cidr;

/// Whom the server answers: this host and its pods. For others it would amplify what they send under a false
/// address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clients {
    /// Addresses of this host's interfaces.
    pub own: BTreeSet<IpAddr>,
    /// Indexes of the interfaces that lead out of the host: those with the node's addresses or a default
    /// route. The loopback interface is none.
    pub uplinks: BTreeSet<u32>,
    /// Networks of other nodes' pods, which come in through a tunnel.
    pub foreign: Vec<Cidr>,
}

impl Clients {
    /// Whether a query from `source`, which came in through the interface with this index, is answered. Index
    /// 0 stands for an unknown interface: then only this host's own addresses are answered.
    #[must_use]
    pub fn admits(&self, source: IpAddr, interface: u32) -> bool {
        let source = source.to_canonical();
        if source.is_loopback() || self.own.contains(&source) {
            return !self.uplinks.contains(&interface);
        }
        interface != 0
            && !self.uplinks.contains(&interface)
            && !self.foreign.iter().any(|network| network.contains(source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn own_pods_and_the_host_are_answered() {
        let clients = Clients {
            own: ips(&["192.0.2.2", "10.1.0.1"]).into_iter().collect(),
            uplinks: BTreeSet::from([2]),
            foreign: vec!["10.2.0.0/16".parse().unwrap()],
        };
        for (source, interface, expected) in [
            ("127.0.0.1", 1, true),
            ("192.0.2.2", 1, true),
            ("192.0.2.2", 0, true),
            ("::ffff:192.0.2.2", 1, true),
            ("10.1.0.7", 5, true),
            // Its own address or a pod's, from outside: forged.
            ("192.0.2.2", 2, false),
            ("10.1.0.7", 2, false),
            ("198.51.100.1", 2, false),
            ("10.2.0.7", 6, false),
            ("10.1.0.7", 0, false),
        ] {
            assert_eq!(clients.admits(source.parse().unwrap(), interface), expected, "{source} {interface}");
        }
    }
}
