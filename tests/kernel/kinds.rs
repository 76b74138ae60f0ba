//! Every kind of socket, and the outcome of its calls to service addresses.

use std::{
    io::Write as _,
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use Expected::{LeftAlone, Served};
use lb_core::model::Protocol::{Tcp, Udp};
use lb_kernel::Features;
use lb_tests::{
    Sandbox,
    client::{Domain, open},
    netns,
};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{
            self, Backlog, MsgFlags, SockaddrStorage, setsockopt,
            sockopt::{Ipv6V6Only, ReceiveTimeout, ReuseAddr, SendTimeout},
        },
        time::{TimeVal, TimeValLike as _},
    },
};

use crate::{
    fixture::{in_each_mode, service_address, service_port, services, start},
    records::Scene,
};

/// The documented outcome of a call to a service address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// It reaches an endpoint, or is refused if there is none.
    Served,
    /// It has the same outcome as without an agent.
    LeftAlone,
}

/// A kind of socket, by the arguments of socket(2). Internet families have one protocol number each.
struct Kind {
    name: &'static str,
    families: &'static [i32],
    socket_type: i32,
    protocols: [i32; 2],
    /// Outcomes of `connect()`, of `sendto()` without flags, and of `sendto()` with `MSG_FASTOPEN`.
    expected: [Expected; 3],
}

const INTERNET: &[i32] = &[libc::AF_INET, libc::AF_INET6];
/// `IPPROTO_DCCP` and its type of socket.
const DCCP: (i32, i32) = (libc::IPPROTO_DCCP, libc::SOCK_DCCP);

const fn internet(name: &'static str, socket_type: i32, protocol: i32, expected: [Expected; 3]) -> Kind {
    Kind { name, families: INTERNET, socket_type, protocols: [protocol, protocol], expected }
}

const fn other(name: &'static str, families: &'static [i32], socket_type: i32, protocol: i32) -> Kind {
    Kind { name, families, socket_type, protocols: [protocol, protocol], expected: [LeftAlone; 3] }
}

const KINDS: &[Kind] = &[
    internet("TCP", libc::SOCK_STREAM, libc::IPPROTO_TCP, [Served, LeftAlone, Served]),
    internet("multipath TCP", libc::SOCK_STREAM, libc::IPPROTO_MPTCP, [Served, LeftAlone, Served]),
    internet("UDP", libc::SOCK_DGRAM, libc::IPPROTO_UDP, [Served, Served, Served]),
    // The kernel runs hooks for its datagrams only.
    internet("UDP-Lite", libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE, [LeftAlone, Served, Served]),
    internet("SCTP, one to one", libc::SOCK_STREAM, libc::IPPROTO_SCTP, [LeftAlone; 3]),
    internet("SCTP, one to many", libc::SOCK_SEQPACKET, libc::IPPROTO_SCTP, [LeftAlone; 3]),
    internet("DCCP", DCCP.1, DCCP.0, [LeftAlone; 3]),
    internet("raw, with headers", libc::SOCK_RAW, libc::IPPROTO_RAW, [LeftAlone; 3]),
    internet("raw UDP", libc::SOCK_RAW, libc::IPPROTO_UDP, [LeftAlone; 3]),
    internet("raw TCP", libc::SOCK_RAW, libc::IPPROTO_TCP, [LeftAlone; 3]),
    Kind {
        name: "ping",
        families: INTERNET,
        socket_type: libc::SOCK_DGRAM,
        protocols: [libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6],
        expected: [LeftAlone; 3],
    },
    other("packet", &[libc::AF_PACKET], libc::SOCK_RAW, 0),
    other("packet, without headers", &[libc::AF_PACKET], libc::SOCK_DGRAM, 0),
    other("unix stream", &[libc::AF_UNIX], libc::SOCK_STREAM, 0),
    other("unix datagram", &[libc::AF_UNIX], libc::SOCK_DGRAM, 0),
    other("unix sequence", &[libc::AF_UNIX], libc::SOCK_SEQPACKET, 0),
    other("netlink", &[libc::AF_NETLINK], libc::SOCK_RAW, libc::NETLINK_ROUTE),
    other("vsock stream", &[libc::AF_VSOCK], libc::SOCK_STREAM, 0),
    other("vsock datagram", &[libc::AF_VSOCK], libc::SOCK_DGRAM, 0),
    other("XDP", &[libc::AF_XDP], libc::SOCK_RAW, 0),
];

/// The family of the addresses in a form.
fn family_of(form: Domain) -> Domain {
    Domain::of(form.loopback())
}

#[derive(Clone, Copy, Debug)]
enum Call {
    Connect,
    Send,
    FastOpen,
}

impl Call {
    const ALL: [Self; 3] = [Self::Connect, Self::Send, Self::FastOpen];
}

/// One cell of the table: a kind in a family, called with a form of address.
#[derive(Clone, Copy)]
struct Cell {
    kind: &'static Kind,
    family: i32,
    /// The form of a service address in the call.
    form: Domain,
    call: Call,
}

impl Cell {
    /// All cells. An Internet socket gets the addresses of its own family, and an `AF_INET6` socket
    /// `sockaddr_in` too. Other sockets accept none of them, and get all.
    fn all() -> impl Iterator<Item = Self> {
        KINDS.iter().flat_map(|kind| {
            kind.families.iter().flat_map(move |&family| {
                Domain::ALL.into_iter().flat_map(move |form| {
                    Call::ALL.into_iter().map(move |call| Self { kind, family, form, call })
                })
            })
        })
    }

    fn open(&self) -> Option<OwnedFd> {
        let protocol = self.kind.protocols[usize::from(self.family == libc::AF_INET6)];
        let socket = open(self.family, self.kind.socket_type, protocol).ok()?;
        // No call may block forever; those to endpoints finish much earlier.
        for_all_sockets(&socket);
        Some(socket)
    }

    fn is_stream(&self) -> bool {
        self.kind.socket_type == libc::SOCK_STREAM
    }

    /// The table's outcome. The kernel refuses an address that the socket does not accept, before or after it
    /// runs the hook.
    fn expected(&self) -> Expected {
        let is_address = match self.form {
            Domain::V4 => self.family == libc::AF_INET || !self.is_stream(),
            Domain::V6 | Domain::Mapped => self.family == libc::AF_INET6,
        };
        if is_address { self.kind.expected[self.call as usize] } else { LeftAlone }
    }

    fn payload(&self) -> [u8; 48] {
        let mut payload = [0; 48];
        payload[0] = match (self.kind.protocols[0], self.family) {
            // An IP header with only version and length; the kernel sets the other fields.
            (libc::IPPROTO_RAW, libc::AF_INET) => 0x45,
            (libc::IPPROTO_RAW, _) => 0x60,
            // Echo requests.
            (libc::IPPROTO_ICMP, libc::AF_INET) => 8,
            _ => 128,
        };
        payload
    }

    fn call(&self, socket: &OwnedFd, to: SocketAddr) -> Result<(), Errno> {
        let to = self.form.sockaddr(to);
        match self.call {
            Call::Connect => socket::connect(socket.as_raw_fd(), &to),
            Call::Send | Call::FastOpen => {
                let mut flags = MsgFlags::MSG_NOSIGNAL;
                if matches!(self.call, Call::FastOpen) {
                    flags |= MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
                }
                socket::sendto(socket.as_raw_fd(), &self.payload(), &to, flags).map(drop)
            }
        }
    }

    /// The outcome of a call through a new socket: its result, and the peer's name afterwards. `None` if the
    /// kernel lacks the kind.
    fn outcome(&self, to: SocketAddr) -> Option<(Result<(), Errno>, Result<SockaddrStorage, Errno>)> {
        let socket = self.open()?;
        let result = self.call(&socket, to);
        Some((result, socket::getpeername(socket.as_raw_fd())))
    }

    /// A server of the same kind at an endpoint.
    fn server(&self, endpoint: SocketAddr) -> OwnedFd {
        let family = if endpoint.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
        let server = Self { family, ..*self }.open().unwrap();
        // Connections of the previous test may remain, and multipath TCP still closes its listener.
        setsockopt(&server, ReuseAddr, &true).unwrap();
        if endpoint.is_ipv6() {
            setsockopt(&server, Ipv6V6Only, &true).unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Err(error) = socket::bind(server.as_raw_fd(), &SockaddrStorage::from(endpoint)) {
            assert!(error == Errno::EADDRINUSE && Instant::now() < deadline, "{self}: {error}");
            thread::sleep(Duration::from_millis(10));
        }
        if self.is_stream() {
            socket::listen(&server, Backlog::new(8).unwrap()).unwrap();
        }
        server
    }

    /// Calls a service, and asserts that an endpoint receives the call and answers, and that the program sees
    /// the service.
    fn assert_served(&self, service: SocketAddr, endpoint: SocketAddr) {
        let what = self.to_string();
        let server = self.server(endpoint);
        let client = self.open().unwrap();
        assert_eq!(self.call(&client, service), Ok(()), "{what}");
        let mut buffer = [0; 256];
        if !self.is_stream() && matches!(self.call, Call::Connect) {
            assert_eq!(socket::send(client.as_raw_fd(), b"?", MsgFlags::empty()), Ok(1), "{what}");
        }
        wait_for(&server, &what);
        // Closed last: a connection that is reset has no peer.
        let mut accepted = None;
        if self.is_stream() {
            let stream = socket::accept(server.as_raw_fd()).unwrap();
            // SAFETY: a new file descriptor without other owners.
            #[expect(unsafe_code, reason = "accept(2) in nix returns a number")]
            let stream = unsafe { OwnedFd::from_raw_fd(stream) };
            let _n = socket::send(stream.as_raw_fd(), b"!", MsgFlags::MSG_NOSIGNAL).unwrap();
            accepted = Some(stream);
            wait_for(&client, &what);
            assert_eq!(socket::recv(client.as_raw_fd(), &mut buffer, MsgFlags::empty()), Ok(1), "{what}");
        } else {
            let (_, sender) = socket::recvfrom::<SockaddrStorage>(server.as_raw_fd(), &mut buffer).unwrap();
            let _n = socket::sendto(server.as_raw_fd(), b"!", &sender.unwrap(), MsgFlags::empty()).unwrap();
            wait_for(&client, &what);
            let (_, sender) = socket::recvfrom::<SockaddrStorage>(client.as_raw_fd(), &mut buffer).unwrap();
            assert_eq!(sender, Some(self.name(service)), "{what}");
        }
        let is_connected = self.is_stream() || matches!(self.call, Call::Connect);
        let shown = if self.kind.protocols[0] == libc::IPPROTO_MPTCP && !Features::probe().mptcp {
            endpoint
        } else {
            service
        };
        let expected = if is_connected { Ok(self.name(shown)) } else { Err(Errno::ENOTCONN) };
        assert_eq!(socket::getpeername(client.as_raw_fd()), expected, "{what}");
        drop(accepted);
    }

    /// The address in the form in which the kernel returns it.
    fn name(&self, address: SocketAddr) -> SockaddrStorage {
        let form = if self.family == libc::AF_INET6 { Domain::Mapped } else { Domain::V4 };
        form.sockaddr(address)
    }

    /// Calls a service without endpoints, and asserts that the call is refused.
    fn assert_refused(&self, service: SocketAddr, features: Features) {
        let (result, _) = self.outcome(service).unwrap();
        let expected = match self.call {
            // On kernels before 5.18 the call goes to a port where nothing listens.
            Call::Connect if !features.set_retval && !self.is_stream() => Ok(()),
            Call::Send | Call::FastOpen if !features.set_retval && !self.is_stream() => Err(Errno::EINVAL),
            _ => Err(Errno::ECONNREFUSED),
        };
        assert_eq!(result, expected, "{self}, without endpoints");
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (family {}), {:?} to {:?}", self.kind.name, self.family, self.call, self.form)
    }
}

fn for_all_sockets(socket: &OwnedFd) {
    let patience = TimeVal::seconds(20);
    setsockopt(socket, ReceiveTimeout, &patience).unwrap();
    setsockopt(socket, SendTimeout, &patience).unwrap();
}

fn wait_for(socket: &OwnedFd, what: &str) {
    let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut waiting, PollTimeout::from(20_000_u16)), Ok(1), "{what}: nothing arrives");
}

/// Reports why a kernel lacks a kind of socket, on standard error, past libtest's capture.
fn report_missing() {
    for kind in KINDS {
        for (family, protocol) in kind.families.iter().zip(kind.protocols) {
            if let Err(error) = open(*family, kind.socket_type, protocol) {
                let _nothing_reads =
                    writeln!(std::io::stderr(), "NOT THERE: {} (family {family}): {error}", kind.name);
            }
        }
    }
}

#[test]
fn every_kind_of_socket_does_what_the_documents_say() {
    Sandbox::test(|sandbox| {
        netns::allow_ping().unwrap();
        report_missing();
        let cluster = services(&[Tcp, Udp], |domain| {
            let with = (service_address(domain), vec![Scene::new(domain).endpoint]);
            vec![with, (without_endpoints(domain), vec![])]
        });
        let targets = |cell: &Cell| {
            let domain = family_of(cell.form);
            [service_address(domain), without_endpoints(domain), Scene::new(domain).plain]
        };
        // A service address has no route without the agent: calls that pass fail.
        let before: Vec<_> = Cell::all()
            .filter(|cell| cell.open().is_some())
            .map(|cell| (cell, targets(&cell).map(|to| cell.outcome(to).unwrap())))
            .collect();
        in_each_mode(sandbox, |options| {
            start(options).follow(&cluster);
            for (cell, outcomes) in &before {
                let [service, refused, plain] = targets(cell);
                // Fast open with multipath TCP: kernel 6.2.
                let is_there = outcomes[2].0 != Err(Errno::EOPNOTSUPP);
                match cell.expected() {
                    Served if is_there => {
                        assert!(outcomes[0].0.is_err(), "{cell}, without an agent");
                        cell.assert_served(service, Scene::new(family_of(cell.form)).endpoint);
                        cell.assert_refused(refused, options.features);
                        assert_eq!(cell.outcome(plain).unwrap(), outcomes[2], "{cell}, to a plain address");
                    }
                    Served | LeftAlone => {
                        for (to, outcome) in targets(cell).into_iter().zip(outcomes) {
                            assert_eq!(cell.outcome(to).unwrap(), *outcome, "{cell}, to {to}");
                        }
                        assert!(outcomes[0].0.is_err(), "{cell}, without an agent");
                    }
                }
            }
        });
    });
}

fn without_endpoints(domain: Domain) -> SocketAddr {
    service_port(domain, 9)
}
