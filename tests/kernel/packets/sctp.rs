//! SCTP: the first packets of an association, through raw sockets, because few kernels have others.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
};

use lb_core::model::Family;
use lb_tests::bed::{Bed, FAMILIES, PATIENCE, PORT, Place};
use nix::sys::socket::{SockaddrStorage, recvfrom};
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    Place::{Far, Outside, Pod, Second},
    Source, To, cluster, on_a_bed,
};

/// `IPPROTO_SCTP`
const SCTP: i32 = 132;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
/// The client's port and the tags of both sides.
const CLIENT_PORT: u16 = 4711;
const TAGS: [u32; 2] = [0x0102_0304, 0x0506_0708];

/// The checksum of RFC 9260, appendix A, with zeros where it will be.
fn crc32c(octets: &[u8]) -> u32 {
    let crc = octets.iter().fold(!0_u32, |crc, octet| {
        (0..8).fold(crc ^ u32::from(*octet), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    });
    !crc
}

/// A packet with one chunk, which tells the sender's tag. `tag` is the receiver's.
fn packet(kind: u8, [from, to]: [u16; 2], tag: u32, own_tag: u32) -> Vec<u8> {
    let mut all = [&from.to_be_bytes()[..], &to.to_be_bytes(), &tag.to_be_bytes(), &[0; 4]].concat();
    all.extend([kind, 0, 0, 20]);
    all.extend(own_tag.to_be_bytes());
    // Room, streams in both directions, first number.
    all.extend([0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    let checksum = crc32c(&all).to_le_bytes();
    all[8..12].copy_from_slice(&checksum);
    all
}

/// A raw socket in a place.
struct Raw(Socket, Family);

impl Raw {
    fn new(bed: &Bed, place: Place, family: Family) -> Self {
        let domain = if family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 };
        let socket = bed.at(place).run(|| Socket::new(domain, Type::RAW, Some(SCTP.into()))).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket, family)
    }

    fn send(&self, to: IpAddr, octets: &[u8]) {
        // The port of a raw socket's address counts for nothing.
        self.0.send_to(octets, &SockAddr::from(SocketAddr::new(to, 0))).unwrap();
    }

    /// The sender, the ports, and the kind of the chunk. Checks the checksum.
    fn receive(&self) -> (IpAddr, [u16; 2], u8) {
        let mut buffer = [0; 256];
        let (n, sender) = recvfrom::<SockaddrStorage>(self.0.as_raw_fd(), &mut buffer).unwrap();
        let sender = sender.unwrap();
        let ip = match self.1 {
            Family::V4 => IpAddr::from(sender.as_sockaddr_in().unwrap().ip()),
            Family::V6 => IpAddr::from(sender.as_sockaddr_in6().unwrap().ip()),
        };
        // Raw sockets of IPv4 alone get the header.
        let header = if self.1 == Family::V4 { usize::from(buffer[0] & 15) * 4 } else { 0 };
        let mut octets = buffer[header..n].to_vec();
        let port = |at: usize| u16::from_be_bytes([octets[at], octets[at + 1]]);
        let (ports, kind) = ([port(0), port(2)], octets[12]);
        let checksum = octets[8..12].to_vec();
        octets[8..12].fill(0);
        assert_eq!(checksum, crc32c(&octets).to_le_bytes());
        (ip, ports, kind)
    }
}

#[test]
fn sctp() {
    let ports = json!([{"name": "sctp", "protocol": "SCTP", "port": 80, "nodePort": 30080}]);
    on_a_bed(|bed| {
        for (policy, from, to, endpoint, source) in [
            ("Cluster", Pod, To::ClusterIp, Far, Source::Kept),
            ("Cluster", Pod, To::ClusterIp, Second, Source::Kept),
            ("Cluster", Outside, To::NodePort, Far, Source::Node),
            ("Local", Outside, To::LoadBalancer, Pod, Source::Kept),
        ] {
            bed.follow(&cluster(&json!({"ports": ports, "externalTrafficPolicy": policy}), &[endpoint]));
            for family in FAMILIES {
                let case = format!("{from:?} to {to:?}, {family:?}");
                let (client, server) = (Raw::new(bed, from, family), Raw::new(bed, endpoint, family));
                let at = to.address(family);
                client.send(at.ip(), &packet(INIT, [CLIENT_PORT, at.port()], 0, TAGS[0]));
                let (ip, [port, own_port], kind) = server.receive();
                assert_eq!((own_port, kind), (PORT, INIT), "{case}");
                match source {
                    Source::Kept => assert_eq!((ip, port), (from.address(family), CLIENT_PORT), "{case}"),
                    Source::Node => assert!(Bed::is_of_node(ip), "{case}: {ip}"),
                }
                server.send(ip, &packet(INIT_ACK, [PORT, port], TAGS[0], TAGS[1]));
                assert_eq!(client.receive(), (at.ip(), [at.port(), CLIENT_PORT], INIT_ACK), "{case}");
            }
        }
    });
}
