//! The rtnetlink requests of tests, without `ip`: a kernel test runs as the only program of a virtual
//! machine.
//!
//! All functions act on the network namespace of the calling thread.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

/// The index of the loopback device: the first of every network namespace.
pub const LOOPBACK: u32 = 1;

/// `VETH_INFO_PEER` of `linux/veth.h`.
const VETH_INFO_PEER: u16 = 1;

/// A request under construction. Every part is padded to four bytes, as rtnetlink requires.
struct Request(Vec<u8>);

impl Request {
    /// Length, which `send` sets, then type, flags, sequence number and sender.
    fn new(kind: u16, flags: i32) -> Self {
        let mut request = Self(vec![0; 4]);
        request.0.extend(kind.to_ne_bytes());
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK).expect("flags have 16 bits");
        request.0.extend(flags.to_ne_bytes());
        request.0.extend([0; 8]);
        request
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn attribute(self, kind: u16, value: &[u8]) -> Self {
        let len = u16::try_from(4 + value.len()).expect("attributes of tests are short");
        self.bytes(&[len.to_ne_bytes(), kind.to_ne_bytes()].concat()).bytes(value)
    }

    /// An attribute whose value `fill` adds.
    fn nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self = fill(self.bytes(&[[0; 2], kind.to_ne_bytes()].concat()));
        let len = u16::try_from(self.0.len() - start).expect("attributes of tests are short");
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    fn link(self, index: u32, flags: i32) -> Self {
        let flags = flags.cast_unsigned();
        // Unspecified family and device type, then index, flags, and the mask of flags to change.
        self.bytes(&[[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), flags.to_ne_bytes()].concat())
    }

    fn send(mut self) -> io::Result<()> {
        let len = u32::try_from(self.0.len()).expect("requests of tests are short");
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        let netlink: OwnedFd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        send(netlink.as_raw_fd(), &self.0, MsgFlags::empty())?;
        let mut answer = [0; 4096];
        let n = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        // The header of the answer has 16 bytes; an error number or 0 follows.
        let error: [u8; 4] = answer[..n]
            .get(16..20)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| io::Error::other("the answer of rtnetlink is too short"))?;
        match -i32::from_ne_bytes(error) {
            0 => Ok(()),
            errno => Err(Errno::from_raw(errno).into()),
        }
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn family(ip: IpAddr) -> u8 {
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).expect("families are small numbers")
}

/// Sets a device up.
///
/// # Errors
///
/// The kernel's error.
pub fn set_up(device: u32) -> io::Result<()> {
    Request::new(libc::RTM_NEWLINK, 0).link(device, libc::IFF_UP).send()
}

/// Adds an address to a device. An address that already exists is fine.
///
/// # Errors
///
/// The kernel's error.
pub fn add_address(device: u32, ip: IpAddr, prefix_len: u8) -> io::Result<()> {
    // Without duplicate address detection an IPv6 address is usable at once.
    let flags = u8::try_from(libc::IFA_F_NODAD).expect("a flag of the first octet");
    let header = [family(ip), prefix_len, flags, 0];
    let added = Request::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
        .bytes(&[header, device.to_ne_bytes()].concat())
        .attribute(libc::IFA_LOCAL, &octets(ip))
        .attribute(libc::IFA_ADDRESS, &octets(ip))
        .send();
    match added {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Removes an address from a device.
///
/// # Errors
///
/// The kernel's error.
pub fn remove_address(device: u32, ip: IpAddr, prefix_len: u8) -> io::Result<()> {
    Request::new(libc::RTM_DELADDR, 0)
        .bytes(&[[family(ip), prefix_len, 0, 0], device.to_ne_bytes()].concat())
        .attribute(libc::IFA_LOCAL, &octets(ip))
        .send()
}

/// Creates a veth pair: one device in this namespace, the other in the namespace of `peer`.
///
/// # Errors
///
/// The kernel's error: `EOPNOTSUPP` without the module `veth`.
pub fn add_veth(name: &str, peer: BorrowedFd<'_>, peer_name: &str) -> io::Result<()> {
    let text = |text: &str| [text.as_bytes(), b"\0"].concat();
    Request::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
        .link(0, 0)
        .attribute(libc::IFLA_IFNAME, &text(name))
        .nested(libc::IFLA_LINKINFO, |info| {
            info.attribute(libc::IFLA_INFO_KIND, b"veth").nested(libc::IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |end| {
                    end.link(0, 0)
                        .attribute(libc::IFLA_IFNAME, &text(peer_name))
                        .attribute(libc::IFLA_NET_NS_FD, &peer.as_raw_fd().to_ne_bytes())
                })
            })
        })
        .send()
}

/// Index of a device by its name.
///
/// # Errors
///
/// `ENODEV` if no device has that name.
pub fn device(name: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}
