//! Calls, as a program sees them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use lb_core::model::Protocol;
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{self, MsgFlags, SockaddrLike as _, SockaddrStorage},
};
use socket2::Type;

/// Timeout of a call. Only a failing test waits that long.
const PATIENCE: Duration = Duration::from_secs(20);

/// The kind of socket of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// `AF_INET`
    V4,
    /// `AF_INET6` to an IPv6 address
    V6,
    /// `AF_INET6` to an IPv4-mapped address (`::ffff:a.b.c.d`), as Go and Java programs call by default
    Mapped,
}

impl Domain {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// The domain of the address's own family.
    #[must_use]
    pub const fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The loopback address of a server that a socket of this domain can reach.
    #[must_use]
    pub const fn loopback(self) -> IpAddr {
        match self {
            Self::V4 | Self::Mapped => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Self::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        }
    }

    fn family(self) -> socket2::Domain {
        if self == Self::V4 { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 }
    }

    /// The address in the form of this domain.
    #[must_use]
    pub fn sockaddr(self, address: SocketAddr) -> SockaddrStorage {
        match (self, address.ip()) {
            (Self::Mapped, IpAddr::V4(ip)) => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()).into()
            }
            _ => address.into(),
        }
    }

    /// The address that the kernel returned.
    ///
    /// # Panics
    ///
    /// If a socket of this domain must not see such an address: for [`Domain::Mapped`], one that is not
    /// mapped.
    fn address(self, address: SocketAddr) -> SocketAddr {
        match (self, address.ip()) {
            (Self::Mapped, IpAddr::V6(ip)) => {
                let ip = ip.to_ipv4_mapped().unwrap_or_else(|| panic!("{ip} is not an IPv4-mapped address"));
                SocketAddr::new(ip.into(), address.port())
            }
            (Self::V4, IpAddr::V4(_)) | (Self::V6, IpAddr::V6(_)) => address,
            _ => panic!("a socket of {self:?} sees the address {address}"),
        }
    }
}

/// A socket of any kind, with the arguments of socket(2).
///
/// # Errors
///
/// The system call's: `EAFNOSUPPORT`, `EPROTONOSUPPORT` or `ESOCKTNOSUPPORT` if the kernel lacks the kind.
pub fn open(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    Ok(socket2::Socket::new(family.into(), kind.into(), Some(protocol.into()))?.into())
}

/// The number of a system call's error.
fn errno<T>(result: io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))
}

/// A socket, closed on drop. Addresses of [`Domain::Mapped`] are given and returned as IPv4 addresses.
#[derive(Debug)]
pub struct Socket {
    inner: socket2::Socket,
    domain: Domain,
    protocol: Protocol,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl Socket {
    /// A TCP or UDP socket in the calling thread's network namespace and cgroup.
    ///
    /// # Panics
    ///
    /// If the socket cannot be created.
    #[must_use]
    pub fn new(domain: Domain, protocol: Protocol) -> Self {
        let socket = socket2::Socket::new(domain.family(), kind(protocol), None).expect("a socket");
        Self::with_timeouts(socket, domain, protocol)
    }

    /// A socket of another protocol, such as `IPPROTO_MPTCP`, used like one of `protocol`.
    ///
    /// # Errors
    ///
    /// `EPROTONOSUPPORT` if the kernel lacks it.
    pub fn with_protocol_number(domain: Domain, protocol: Protocol, number: i32) -> io::Result<Self> {
        let socket = socket2::Socket::new(domain.family(), kind(protocol), Some(number.into()))?;
        Ok(Self::with_timeouts(socket, domain, protocol))
    }

    /// The same socket through another descriptor (`dup()`).
    ///
    /// # Panics
    ///
    /// If the process has too many descriptors.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self { inner: self.inner.try_clone().expect("a descriptor"), ..*self }
    }

    /// Its descriptor.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.inner.into()
    }

    /// A socket that another process or thread opened.
    ///
    /// # Panics
    ///
    /// If it does not accept timeouts.
    #[must_use]
    pub fn from_fd(fd: OwnedFd, domain: Domain, protocol: Protocol) -> Self {
        Self::with_timeouts(fd.into(), domain, protocol)
    }

    fn with_timeouts(socket: socket2::Socket, domain: Domain, protocol: Protocol) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).expect("a receive time-out");
        socket.set_write_timeout(Some(PATIENCE)).expect("a send time-out");
        if protocol == Protocol::Tcp {
            // Thousands of connections to one address must not use up the local ports with TIME_WAIT.
            socket.set_linger(Some(Duration::ZERO)).expect("a linger time");
        }
        Self { inner: socket, domain, protocol }
    }

    /// `connect()`
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn connect(&self, to: SocketAddr) -> Result<(), Errno> {
        self.connect_as(self.domain, to)
    }

    /// `connect()` with the address in the form of another domain: an `AF_INET6` socket accepts `sockaddr_in`
    /// too.
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn connect_as(&self, domain: Domain, to: SocketAddr) -> Result<(), Errno> {
        socket::connect(self.inner.as_raw_fd(), &domain.sockaddr(to))
    }

    /// `sendto()` with the address in the form of another domain.
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn send_to_as(&self, domain: Domain, bytes: &[u8], to: SocketAddr) -> Result<(), Errno> {
        socket::sendto(self.inner.as_raw_fd(), bytes, &domain.sockaddr(to), MsgFlags::empty()).map(drop)
    }

    /// Converts an `AF_INET6` socket that is connected to an IPv4 address to `AF_INET` (`IPV6_ADDRFORM`).
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn into_v4(self) -> Result<Self, Errno> {
        let family = libc::AF_INET;
        let len = libc::socklen_t::try_from(size_of_val(&family)).expect("four");
        // SAFETY: the kernel reads `len` bytes of `family`, which outlives the call.
        Errno::result(unsafe {
            libc::setsockopt(
                self.inner.as_raw_fd(),
                libc::IPPROTO_IPV6,
                libc::IPV6_ADDRFORM,
                (&raw const family).cast(),
                len,
            )
        })?;
        Ok(Self { domain: Domain::V4, ..self })
    }

    /// The socket's cookie (`SO_COOKIE`). The kernel assigns one if it has none.
    ///
    /// # Panics
    ///
    /// If the kernel does not return it.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.inner.cookie().expect("SO_COOKIE")
    }

    /// Whether calls return at once, with `EINPROGRESS` or `EAGAIN` instead of waiting.
    ///
    /// # Panics
    ///
    /// If the descriptor's flags cannot be read or set.
    pub fn set_nonblocking(&self, is_nonblocking: bool) {
        self.inner.set_nonblocking(is_nonblocking).expect("new flags");
    }

    /// Waits until a nonblocking `connect()` completes.
    ///
    /// # Panics
    ///
    /// If it does not complete in time.
    pub fn wait_until_writable(&self) {
        self.wait(PollFlags::POLLOUT);
    }

    /// Waits until data arrives.
    ///
    /// # Panics
    ///
    /// If none arrives in time.
    pub fn wait_until_readable(&self) {
        self.wait(PollFlags::POLLIN);
    }

    fn wait(&self, until: PollFlags) {
        let mut waiting = [PollFd::new(self.inner.as_fd(), until)];
        let timeout = PollTimeout::try_from(PATIENCE).expect("milliseconds");
        assert_eq!(poll(&mut waiting, timeout), Ok(1), "{until:?} in time");
    }

    /// `bind()`
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn bind(&self, address: SocketAddr) -> Result<(), Errno> {
        socket::bind(self.inner.as_raw_fd(), &self.domain.sockaddr(address))
    }

    /// `getsockname()`
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn local_address(&self) -> Result<SocketAddr, Errno> {
        let name = errno(self.inner.local_addr())?.as_socket().ok_or(Errno::EAFNOSUPPORT)?;
        Ok(SocketAddr::new(name.ip().to_canonical(), name.port()))
    }

    /// `connect()` with `AF_UNSPEC`: removes the peer of a datagram socket.
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn disconnect(&self) -> Result<(), Errno> {
        let nowhere = libc::sockaddr {
            sa_family: libc::sa_family_t::try_from(libc::AF_UNSPEC).expect("zero"),
            sa_data: [0; 14],
        };
        let len = libc::socklen_t::try_from(size_of_val(&nowhere)).expect("sixteen");
        // SAFETY: the kernel reads `len` bytes of `nowhere`, which outlives the call.
        Errno::result(unsafe { libc::connect(self.inner.as_raw_fd(), &raw const nowhere, len) }).map(drop)
    }

    /// `connect()` with an address that is too short for its family.
    ///
    /// # Errors
    ///
    /// The system call's: `EINVAL`.
    pub fn connect_short(&self, to: SocketAddr) -> Result<(), Errno> {
        let address = self.domain.sockaddr(to);
        // Family, port, and half of an IPv4 address.
        let len = 6;
        // SAFETY: the kernel reads six bytes of `address`, which is longer and outlives the call.
        Errno::result(unsafe { libc::connect(self.inner.as_raw_fd(), address.as_ptr().cast(), len) })
            .map(drop)
    }

    /// `getpeername()`
    ///
    /// # Errors
    ///
    /// The system call's; `ENOTCONN` without a peer.
    pub fn peer_name(&self) -> Result<SocketAddr, Errno> {
        let peer = errno(self.inner.peer_addr())?.as_socket().ok_or(Errno::EAFNOSUPPORT)?;
        Ok(self.domain.address(peer))
    }

    /// `send()`
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        errno(self.inner.send_with_flags(bytes, libc::MSG_NOSIGNAL)).map(drop)
    }

    /// `sendto()`
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn send_to(&self, bytes: &[u8], to: SocketAddr) -> Result<(), Errno> {
        self.send_to_as(self.domain, bytes, to)
    }

    /// `recvfrom()`: a datagram and its apparent sender, or the data of a stream and its peer.
    ///
    /// # Errors
    ///
    /// The system call's; `EAGAIN` without an answer in time.
    pub fn receive(&self) -> Result<(Vec<u8>, Option<SocketAddr>), Errno> {
        let mut buffer = vec![0; 4096];
        let (n, sender) = socket::recvfrom::<SockaddrStorage>(self.inner.as_raw_fd(), &mut buffer)?;
        buffer.truncate(n);
        let sender = sender.filter(|_| self.protocol == Protocol::Udp).and_then(|sender| {
            let v4 = sender.as_sockaddr_in().map(|name| SocketAddr::V4((*name).into()));
            v4.or_else(|| sender.as_sockaddr_in6().map(|name| SocketAddr::V6((*name).into())))
        });
        Ok((buffer, sender.map(|sender| self.domain.address(sender))))
    }

    /// Asks the peer of a connected socket for its address ([`crate::server::Servers`]).
    ///
    /// # Errors
    ///
    /// The failing system call's.
    pub fn ask(&self) -> Result<Answer, Errno> {
        if self.protocol == Protocol::Udp {
            self.send(b"?")?;
        }
        let (bytes, sender) = self.receive()?;
        Ok(Answer { server: server_in(&bytes), seen: sender })
    }

    /// Asks the server at an address for its own address, without connecting.
    ///
    /// # Errors
    ///
    /// The failing system call's.
    pub fn ask_at(&self, to: SocketAddr) -> Result<Answer, Errno> {
        self.send_to(b"?", to)?;
        let (bytes, sender) = self.receive()?;
        Ok(Answer { server: server_in(&bytes), seen: sender })
    }
}

const fn kind(protocol: Protocol) -> Type {
    if matches!(protocol, Protocol::Tcp) { Type::STREAM } else { Type::DGRAM }
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The server's own address.
    pub server: SocketAddr,
    /// The apparent sender of the datagram.
    pub seen: Option<SocketAddr>,
}

/// The address in the first line of a server's answer.
fn server_in(answer: &[u8]) -> SocketAddr {
    let text = String::from_utf8_lossy(answer);
    let line = text.lines().next().unwrap_or_default();
    line.parse().unwrap_or_else(|_| panic!("an answer that names no server: {text:?}"))
}

/// Connects to an address through a socket of its own family and asks for the server's address.
///
/// # Errors
///
/// The failing system call's: `ECONNREFUSED` for a service without endpoints, `ENETUNREACH` for an address
/// without a route.
pub fn call(to: SocketAddr, protocol: Protocol) -> Result<SocketAddr, Errno> {
    let socket = Socket::new(Domain::of(to.ip()), protocol);
    socket.connect(to)?;
    Ok(socket.ask()?.server)
}
