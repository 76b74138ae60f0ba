//! Lists and destroys sockets of one network namespace: `NETLINK_SOCK_DIAG` (`sock_diag(7)`).

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
};

use lb_core::model::Protocol;
use netlink_packet_core::{
    DefaultNla, Emitable as _, NLA_TYPE_MASK, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, Nla as _,
};
use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};

/// `INET_DIAG_REQ_BYTECODE` of `linux/inet_diag.h`.
const REQ_BYTECODE: u16 = 1;
/// `INET_DIAG_CGROUP_ID`
const CGROUP_ID: u16 = 21;
/// `IPPROTO_UDPLITE`
const UDP_LITE: u8 = 136;

/// Largest number of addresses in a filter. A jump reaches 64 KiB, twice as far.
const MAX_FILTERED: usize = 1024;

/// A connected socket: its key in the kernel, and its cookie. Valid while it stays connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    protocol: Protocol,
    family: u8,
    id: SocketId,
    cgroup: Option<u64>,
}

impl Connected {
    /// The socket's cookie, unique while the host runs.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        cookie_of(&self.id)
    }

    /// Id of the cgroup v2 that the socket was created in; `None` if the kernel does not report it (before
    /// 5.9).
    #[must_use]
    pub fn cgroup(&self) -> Option<u64> {
        self.cgroup
    }

    /// Protocol of the socket.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The peer's address; an IPv4-mapped one as IPv4.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        SocketAddr::new(self.id.destination_address.to_canonical(), self.id.destination_port)
    }
}

/// A request with attributes, which the library's messages lack.
struct Request {
    request: InetRequest,
    attributes: Vec<DefaultNla>,
}

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        netlink_packet_sock_diag::SOCK_DIAG_BY_FAMILY
    }

    fn buffer_len(&self) -> usize {
        self.request.buffer_len() + self.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (request, attributes) = buffer.split_at_mut(self.request.buffer_len());
        self.request.emit(request);
        self.attributes.as_slice().emit(attributes);
    }
}

/// A netlink socket for the sockets of one network namespace: that of the thread which opened it.
pub struct SockDiag {
    socket: Socket,
}

impl SockDiag {
    /// Opens the netlink socket.
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        let _own: NetlinkAddr = socket.bind_auto()?;
        socket.connect(&NetlinkAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    /// Lists the connected sockets of a protocol; with `peers`, only those connected to one of them. A peer
    /// with the unspecified address matches every address of its family with that port.
    ///
    /// With more than 1,024 peers all sockets are listed. Not a snapshot: sockets that connect or close
    /// meanwhile may be missing.
    ///
    /// # Errors
    ///
    /// `ENOENT` on a kernel without `CONFIG_INET_UDP_DIAG` or `CONFIG_INET_TCP_DIAG`.
    ///
    /// # Kernel
    ///
    /// 4.9
    pub fn connected(
        &mut self,
        protocol: Protocol,
        peers: Option<&BTreeSet<SocketAddr>>,
    ) -> io::Result<Vec<Connected>> {
        let filter = peers.filter(|peers| peers.len() <= MAX_FILTERED);
        let attributes = filter.map(|peers| DefaultNla::new(REQ_BYTECODE, filter_of(peers)));
        let mut found = Vec::new();
        self.list(number(protocol)?, &states(protocol), attributes.as_slice(), |response| {
            let header = &response.header;
            let cgroup = response.nlas.iter().find_map(cgroup_of);
            found.push(Connected { protocol, family: header.family, id: header.socket_id.clone(), cgroup });
        })?;
        Ok(found)
    }

    /// The cookies of all TCP, UDP and UDP-Lite sockets, connected or not.
    ///
    /// Sockets without a port are missing: unused and unbound ones, and TCP sockets whose connection is
    /// closed or failed. Not a snapshot.
    ///
    /// # Errors
    ///
    /// As [`Self::connected`].
    ///
    /// # Kernel
    ///
    /// 4.9
    pub fn cookies(&mut self) -> io::Result<BTreeSet<u64>> {
        let mut found = BTreeSet::new();
        for number in [IPPROTO_TCP, IPPROTO_UDP, UDP_LITE] {
            let listed = self.list(number, &StateFlags::all(), &[], |response| {
                let _new = found.insert(cookie_of(&response.header.socket_id));
            });
            match listed {
                // This kernel lacks UDP-Lite.
                Err(error) if number == UDP_LITE && error.kind() == io::ErrorKind::NotFound => {}
                listed => listed?,
            }
        }
        Ok(found)
    }

    /// Lists sockets of both families.
    fn list(
        &mut self,
        protocol: u8,
        states: &StateFlags,
        attributes: &[DefaultNla],
        mut each: impl FnMut(&InetResponse),
    ) -> io::Result<()> {
        for family in [AF_INET, AF_INET6] {
            let request = Request {
                request: InetRequest {
                    family,
                    protocol,
                    extensions: ExtensionFlags::empty(),
                    states: states.clone(),
                    socket_id: if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() },
                },
                attributes: attributes.to_vec(),
            };
            self.send(request, NLM_F_REQUEST | NLM_F_DUMP)?;
            self.answers(|message| {
                if let SockDiagMessage::InetResponse(response) = message {
                    each(&response);
                }
            })?;
        }
        Ok(())
    }

    /// Destroys a connected socket: its program gets `ECONNABORTED` from a blocked call or, for UDP, from the
    /// next `recv()`. `false` if the socket is closed or has another peer by now.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` on a kernel without `CONFIG_INET_DIAG_DESTROY`, `EPERM` without `CAP_NET_ADMIN`.
    ///
    /// # Kernel
    ///
    /// 4.9
    pub fn destroy(&mut self, socket: &Connected) -> io::Result<bool> {
        let request = InetRequest {
            family: socket.family,
            protocol: number(socket.protocol)?,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: socket.id.clone(),
        };
        let destroy = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
        self.send(destroy, NLM_F_REQUEST | NLM_F_ACK)?;
        match self.answers(|_none_expected| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the kernel can destroy sockets of a protocol. Destroys none: the request names a socket that
    /// cannot exist.
    ///
    /// # Errors
    ///
    /// As [`Self::destroy`], except for `EOPNOTSUPP`. A kernel that cannot list sockets returns `true`;
    /// listing reports it.
    pub fn can_destroy(&mut self, protocol: Protocol) -> io::Result<bool> {
        let id = SocketId::new_v4();
        let nobody = Connected { protocol, family: AF_INET, id, cgroup: None };
        match self.destroy(&nobody) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => Ok(false),
            other => other.map(|_found| true),
        }
    }

    fn send<M: NetlinkSerializable>(&self, message: M, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// Receives up to the end of a list or an acknowledgement.
    fn answers(&self, mut each: impl FnMut(SockDiagMessage)) -> io::Result<()> {
        loop {
            let (bytes, _kernel) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let len = usize::try_from(NetlinkBuffer::new_checked(rest).map_err(malformed)?.length());
                let len = len.map_err(malformed)?;
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(malformed)?;
                match message.payload {
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return error.code.map_or(Ok(()), |_refused| Err(error.to_io()));
                    }
                    NetlinkPayload::InnerMessage(message) => each(message),
                    _ => {}
                }
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

fn malformed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn number(protocol: Protocol) -> io::Result<u8> {
    match protocol {
        Protocol::Tcp => Ok(IPPROTO_TCP),
        Protocol::Udp => Ok(IPPROTO_UDP),
        Protocol::Sctp => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The states in which a socket has a peer and its program may still use it.
fn states(protocol: Protocol) -> StateFlags {
    match protocol {
        // A connected UDP socket counts as established, any other as closed.
        Protocol::Udp => StateFlags::ESTABLISHED,
        _ => {
            StateFlags::ESTABLISHED
                | StateFlags::SYN_SENT
                | StateFlags::FIN_WAIT1
                | StateFlags::FIN_WAIT2
                | StateFlags::CLOSE_WAIT
        }
    }
}

fn cookie_of(id: &SocketId) -> u64 {
    // The kernel sends the low word first, each word in host order.
    let (words, _none) = id.cookie.as_chunks::<4>();
    words.iter().rev().fold(0, |cookie, word| cookie << 32 | u64::from(u32::from_ne_bytes(*word)))
}

/// The id in a socket's cgroup attribute.
fn cgroup_of(attribute: &Nla) -> Option<u64> {
    let Nla::Other(attribute) = attribute else { return None };
    let mut bytes = [0; 8];
    if attribute.kind() & NLA_TYPE_MASK != CGROUP_ID || attribute.value_len() != bytes.len() {
        return None;
    }
    attribute.emit_value(&mut bytes);
    Some(u64::from_ne_bytes(bytes))
}

/// A filter program (`inet_diag_bc_op` of `linux/inet_diag.h`) that accepts sockets connected to one of
/// `peers`. An IPv4 address also matches its mapped form, and the unspecified address any of its family.
///
/// Each address is a comparison. If it holds, it continues with a jump past the end, which accepts; else with
/// the next comparison.
fn filter_of(peers: &BTreeSet<SocketAddr>) -> Vec<u8> {
    /// `INET_DIAG_BC_JMP`
    const JUMP: u8 = 1;
    /// `INET_DIAG_BC_D_COND`
    const PEER_IS: u8 = 8;
    /// An operation: code, offset if it holds, and offset if it does not.
    const OPERATION: u16 = 4;
    let mut program = Vec::new();
    for (n, peer) in peers.iter().rev().enumerate() {
        let (family, prefix, octets) = match peer.ip() {
            IpAddr::V4(ip) => (AF_INET, 32, ip.octets().to_vec()),
            IpAddr::V6(ip) => (AF_INET6, 128, ip.octets().to_vec()),
        };
        let prefix = if peer.ip().is_unspecified() { 0 } else { prefix };
        // Operation, family, prefix length, two unused octets, port in host order, address.
        let len: u8 = if peer.is_ipv4() { 4 + 8 + 4 } else { 4 + 8 + 16 };
        let mut step = vec![PEER_IS, len];
        step.extend((u16::from(len) + OPERATION).to_ne_bytes());
        step.extend([family, prefix, 0, 0]);
        step.extend(i32::from(peer.port()).to_ne_bytes());
        step.extend(octets);
        if n > 0 {
            // Written from the end: the jump must pass what is written so far, and `MAX_FILTERED` bounds
            // that.
            let end = u16::try_from(program.len()).unwrap_or(u16::MAX - OPERATION) + OPERATION;
            step.extend([JUMP, 4]);
            step.extend(end.to_ne_bytes());
        }
        step.append(&mut program);
        program = step;
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel does (`inet_diag_bc_run`).
    fn passes(program: &[u8], peer: SocketAddr) -> bool {
        let (mut at, end) = (0, program.len());
        while at < end {
            let op = &program[at..];
            let no = usize::from(u16::from_ne_bytes([op[2], op[3]]));
            let holds = op[0] == 8 && {
                let port = i32::from_ne_bytes(op[8..12].try_into().unwrap());
                let octets = match peer.ip() {
                    IpAddr::V4(ip) => ip.octets().to_vec(),
                    IpAddr::V6(ip) => ip.octets().to_vec(),
                };
                let n_compared = usize::from(op[5]) / 8;
                let is_of_family = op[4] == if peer.is_ipv4() { AF_INET } else { AF_INET6 };
                port == i32::from(peer.port())
                    && is_of_family
                    && op[12..12 + n_compared] == octets[..n_compared]
            };
            at += if holds { usize::from(op[1]) } else { no };
        }
        at == end
    }

    #[test]
    fn a_filter_lets_the_named_peers_pass() {
        let peers = ["10.1.0.1:53", "10.1.0.2:53", "[fd00::1]:53", "10.1.0.3:5353"]
            .map(|peer| peer.parse::<SocketAddr>().unwrap());
        let others = ["10.1.0.1:54", "10.1.0.4:53", "[fd00::2]:53", "[fd00::1]:5353"]
            .map(|peer| peer.parse().unwrap());
        for n in 1..=peers.len() {
            let program = filter_of(&peers[..n].iter().copied().collect());
            for (i, peer) in peers.iter().enumerate() {
                assert_eq!(passes(&program, *peer), i < n, "{peer} of the first {n}");
            }
            assert!(others.iter().all(|peer| !passes(&program, *peer)), "{n}");
        }
    }

    #[test]
    fn the_unspecified_address_stands_for_all_of_its_family() {
        let peer = |text: &str| text.parse::<SocketAddr>().unwrap();
        let program = filter_of(&["0.0.0.0:30053", "[::]:30054", "10.1.0.1:53"].map(peer).into());
        for (text, expected) in [
            ("192.0.2.1:30053", true),
            ("192.0.2.1:30054", false),
            ("[fd00::1]:30054", true),
            ("[fd00::1]:30053", false),
            ("10.1.0.1:53", true),
            ("10.1.0.2:53", false),
        ] {
            assert_eq!(passes(&program, peer(text)), expected, "{text}");
        }
    }

    #[test]
    fn the_longest_filter_is_within_reach_of_a_jump() {
        let ip = IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1]);
        let peer = |n: usize| SocketAddr::new(ip, u16::try_from(1 + n).unwrap());
        let peers: BTreeSet<SocketAddr> = (0..MAX_FILTERED).map(peer).collect();
        let program = filter_of(&peers);
        assert!(u16::try_from(program.len() + 4).is_ok());
        assert!(passes(&program, peer(0)) && passes(&program, peer(MAX_FILTERED - 1)));
        assert!(!passes(&program, peer(MAX_FILTERED)));
    }
}
