//! Lists and deletes entries of connection tracking: `linux/netfilter/nfnetlink_conntrack.h`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use lb_core::{
    model::Protocol,
    packets::{conntrack::Entry, nft::Family},
};
use netlink_packet_core::NLM_F_DUMP;
use nix::libc;

use crate::{
    fault,
    nfnetlink::{Attributes, Head, NfSocket, Writer, family_number},
};

/// `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_NEW`, `_GET` and `_DELETE`.
const NEW: u16 = 1 << 8;
const GET: u16 = NEW + 1;
const DELETE: u16 = NEW + 2;

/// `CTA_*`
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
/// `CTA_TUPLE_*`
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
/// `CTA_IP_V4_SRC` and `CTA_IP_V6_SRC`, each followed by the destination.
const IP_V4: u16 = 1;
const IP_V6: u16 = 3;
/// `CTA_PROTO_*`
const PROTO_NUM: u16 = 1;
const PROTO_SOURCE: u16 = 2;
const PROTO_DESTINATION: u16 = 3;
/// `CTA_FILTER_ORIG_FLAGS` and `CTA_FILTER_REPLY_FLAGS`
const FILTER_ORIG: u16 = 1;
const FILTER_REPLY: u16 = 2;
/// `CTA_FILTER_F_CTA_PROTO_NUM` of the kernel's source
const FILTER_PROTO_NUM: u32 = 1 << 3;

/// Connection tracking of one network namespace: that of the thread which opened it.
#[derive(Debug)]
pub struct Conntrack {
    socket: NfSocket,
}

impl Conntrack {
    /// Opens the netlink socket.
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: NfSocket::open()? })
    }

    /// Lists the entries of a protocol. Not a snapshot: entries that come and go meanwhile may be missing.
    ///
    /// # Errors
    ///
    /// `EPERM` without `CAP_NET_ADMIN`; `Unsupported` without the module `nf_conntrack_netlink`, and for TCP,
    /// of which there may be millions.
    ///
    /// # Kernel
    ///
    /// 5.8
    pub fn entries(&mut self, family: Family, protocol: Protocol) -> io::Result<Vec<Entry>> {
        let number = number(protocol)?;
        let head = Head { kind: GET, flags: NLM_F_DUMP, family: family_number(family), resource: 0 };
        let mut entries = Vec::new();
        let listed = self.socket.request(
            head,
            |writer| {
                // Only this protocol: the kernel does not send the rest.
                writer.nested(TUPLE_ORIG, |writer| {
                    writer.nested(TUPLE_PROTO, |writer| writer.octets(PROTO_NUM, &[number]));
                });
                writer.nested(FILTER, |writer| {
                    writer.octets(FILTER_ORIG, &FILTER_PROTO_NUM.to_ne_bytes());
                    writer.octets(FILTER_REPLY, &0u32.to_ne_bytes());
                });
            },
            |kind, attributes| {
                if kind == NEW {
                    entries.extend(entry(attributes, protocol));
                }
            },
        );
        listed.map(|_may_lack_new_ones| entries).map_err(missing)
    }

    /// Deletes an entry, so that the next packet of its flow is translated anew. `false` if it is gone, or
    /// another has taken its place.
    ///
    /// # Errors
    ///
    /// As [`Self::entries`].
    pub fn delete(&mut self, entry: &Entry) -> io::Result<bool> {
        fault::point();
        let number = number(entry.protocol)?;
        let family = if entry.source.is_ipv4() { Family::V4 } else { Family::V6 };
        let head = Head { kind: DELETE, flags: 0, family: family_number(family), resource: 0 };
        let body = |writer: &mut Writer| {
            writer.nested(TUPLE_ORIG, |writer| {
                writer.nested(TUPLE_IP, |writer| {
                    for (n, address) in (0..).zip([entry.source.ip(), entry.destination.ip()]) {
                        match address {
                            IpAddr::V4(ip) => writer.octets(IP_V4 + n, &ip.octets()),
                            IpAddr::V6(ip) => writer.octets(IP_V6 + n, &ip.octets()),
                        }
                    }
                });
                writer.nested(TUPLE_PROTO, |writer| {
                    writer.octets(PROTO_NUM, &[number]);
                    writer.octets(PROTO_SOURCE, &entry.source.port().to_be_bytes());
                    writer.octets(PROTO_DESTINATION, &entry.destination.port().to_be_bytes());
                });
            });
            writer.octets(ID, &entry.id.to_be_bytes());
            if entry.zone != 0 {
                writer.octets(ZONE, &entry.zone.to_be_bytes());
            }
        };
        match self.socket.request(head, body, |_, _none_expected| {}) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(missing(error)),
        }
    }
}

/// Names the module of an error that says that it is missing.
fn missing(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EINVAL) => io::Error::new(
            io::ErrorKind::Unsupported,
            "connection tracking cannot be listed: load the module nf_conntrack_netlink",
        ),
        _ => error,
    }
}

fn entry(attributes: Attributes<'_>, protocol: Protocol) -> Option<Entry> {
    let (original, reply) = (attributes.nested(TUPLE_ORIG)?, attributes.nested(TUPLE_REPLY)?);
    if original.nested(TUPLE_PROTO)?.octet(PROTO_NUM) != number(protocol).ok() {
        return None;
    }
    let zone = attributes.get(ZONE).and_then(|zone| zone.try_into().ok()).map_or(0, u16::from_be_bytes);
    Some(Entry {
        protocol,
        source: address(original, 0)?,
        destination: address(original, 1)?,
        reply_source: address(reply, 0)?,
        id: attributes.be32(ID)?,
        zone,
    })
}

/// The source (0) or destination (1) of a direction.
fn address(tuple: Attributes<'_>, n: u16) -> Option<SocketAddr> {
    let (ip, proto) = (tuple.nested(TUPLE_IP)?, tuple.nested(TUPLE_PROTO)?);
    let port = proto.get(PROTO_SOURCE + n)?.try_into().ok().map(u16::from_be_bytes)?;
    let v4 = ip.get(IP_V4 + n).and_then(|octets| octets.try_into().ok()).map(|octets: [u8; 4]| octets.into());
    let v6 =
        || ip.get(IP_V6 + n).and_then(|octets| octets.try_into().ok()).map(|octets: [u8; 16]| octets.into());
    Some(SocketAddr::new(v4.or_else(v6)?, port))
}

fn number(protocol: Protocol) -> io::Result<u8> {
    if protocol == Protocol::Tcp { Err(io::ErrorKind::Unsupported.into()) } else { Ok(protocol.number()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No octets make it panic; each of these almost is an entry.
    #[test]
    fn what_is_malformed_is_no_entry() {
        let mut writer = Writer::default();
        for (tuple, last) in [(TUPLE_ORIG, 1), (TUPLE_REPLY, 7)] {
            writer.nested(tuple, |writer| {
                writer.nested(TUPLE_IP, |writer| {
                    writer.octets(IP_V4, &[10, 0, 0, last]);
                    writer.octets(IP_V4 + 1, &[10, 96, 0, 1]);
                });
                writer.nested(TUPLE_PROTO, |writer| {
                    writer.octets(PROTO_NUM, &[17]);
                    writer.octets(PROTO_SOURCE, &[0, 53]);
                    writer.octets(PROTO_DESTINATION, &[0, 54]);
                });
            });
        }
        writer.be32(ID, 7);
        let octets = writer.finish().unwrap();
        let whole = entry(Attributes(&octets), Protocol::Udp).unwrap();
        let said = (whole.source.to_string(), whole.destination.to_string(), whole.reply_source.to_string());
        assert_eq!(said, ("10.0.0.1:53".into(), "10.96.0.1:54".into(), "10.0.0.7:53".into()));
        assert_eq!(entry(Attributes(&octets), Protocol::Sctp), None);
        for len in 0..octets.len() {
            assert_eq!(entry(Attributes(&octets[..len]), Protocol::Udp), None, "{len}");
        }
        for at in 0..octets.len() {
            let mut damaged = octets.clone();
            damaged[at] ^= 0xff;
            let _no_panic = entry(Attributes(&damaged), Protocol::Udp);
        }
    }
}
