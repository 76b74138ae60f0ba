//! The services as numbers and addresses, the same for every competitor.

use std::net::{Ipv4Addr, SocketAddrV4};

/// The port of every service, TCP and UDP.
pub(crate) const PORT: u16 = 80;
pub(crate) const TARGET_PORT: u16 = 8080;
/// One service in this number has a UDP port beside its TCP port, as name servers have.
pub(crate) const UDP_STRIDE: u32 = 16;
/// The network of service addresses. [`POD_NETWORK`] is that of endpoints.
pub(crate) const SERVICE_NETWORK: &str = "10.96.0.0/12";
pub(crate) const POD_NETWORK: &str = "10.128.0.0/9";
/// More would exceed [`SERVICE_NETWORK`].
pub(crate) const MAX_SERVICES: u32 = 1 << 19;
/// More would exceed [`POD_NETWORK`].
pub(crate) const MAX_ENDPOINTS: u32 = 1 << 22;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Town {
    pub(crate) n_services: u32,
    pub(crate) n_endpoints: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub(crate) service: u32,
    pub(crate) protocol: Protocol,
}

fn address(first: [u8; 4], number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be_bytes(first) + number)
}

impl Town {
    /// All service ports, in the order of services.
    pub(crate) fn ports(self) -> impl Iterator<Item = ServicePort> {
        (0..self.n_services).flat_map(|service| {
            let udp = service % UDP_STRIDE == 0;
            let protocols = [Some(Protocol::Tcp), udp.then_some(Protocol::Udp)];
            protocols.into_iter().flatten().map(move |protocol| ServicePort { service, protocol })
        })
    }

    pub(crate) fn service(service: u32) -> Ipv4Addr {
        address([10, 96, 0, 1], service)
    }

    /// The address of an endpoint of a service. The one after the last is spare, for changes.
    pub(crate) fn endpoint(self, service: u32, endpoint: u32) -> Ipv4Addr {
        if endpoint < self.n_endpoints {
            address([10, 128, 0, 1], service * self.n_endpoints + endpoint)
        } else {
            address([10, 255, 0, 1], service)
        }
    }

    /// A random destination: a service of a protocol, or one of its endpoints.
    pub(crate) fn pick(self, state: &mut u64, protocol: Protocol, to_endpoint: bool) -> SocketAddrV4 {
        let service = match protocol {
            Protocol::Tcp => crate::random::below(state, self.n_services),
            Protocol::Udp => crate::random::below(state, self.n_services.div_ceil(UDP_STRIDE)) * UDP_STRIDE,
        };
        // Always drawn, so that all competitors use the same services.
        let endpoint = crate::random::below(state, self.n_endpoints);
        if to_endpoint {
            SocketAddrV4::new(self.endpoint(service, endpoint), TARGET_PORT)
        } else {
            SocketAddrV4::new(Self::service(service), PORT)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOWN: Town = Town { n_services: 33, n_endpoints: 3 };

    #[test]
    fn every_sixteenth_service_has_udp() {
        let udp: Vec<u32> =
            TOWN.ports().filter(|port| port.protocol == Protocol::Udp).map(|port| port.service).collect();
        assert_eq!(udp, [0, 16, 32]);
        assert_eq!(TOWN.ports().count(), 36);
    }

    #[test]
    fn all_competitors_go_through_the_same_services() {
        let (mut a, mut b) = (5, 5);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for _ in 0..100 {
                let service = TOWN.pick(&mut a, protocol, false);
                let endpoint = TOWN.pick(&mut b, protocol, true);
                let number = u32::from(*service.ip()) - u32::from(Town::service(0));
                assert!((0..3).any(|index| TOWN.endpoint(number, index) == *endpoint.ip()));
                assert!(protocol == Protocol::Tcp || number % UDP_STRIDE == 0);
            }
        }
    }

    #[test]
    fn endpoints_differ() {
        let all: std::collections::BTreeSet<_> =
            (0..33).flat_map(|service| (0..4).map(move |index| TOWN.endpoint(service, index))).collect();
        assert_eq!(all.len(), 33 * 4);
    }
}
