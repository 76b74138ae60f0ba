//! Servers that answer with their address.

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
};

use lb_core::model::Protocol;
use lb_netns::{Answers, Socket as Bound};
use nix::sys::socket::{Backlog, listen};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::client::{Domain, Socket};

/// Any number of servers on one thread, in the network namespace and cgroup of the thread that started them.
///
/// A TCP server sends its address and a newline to each client, then echoes. A UDP server answers each
/// datagram with its address, a newline and the datagram. The address is the one that the client actually
/// reached, so that a TCP server on the unspecified address can serve many. The servers stop on drop.
#[derive(Debug)]
pub struct Servers {
    _running: lb_netns::Servers,
}

#[derive(Clone)]
struct OwnAddress;

impl Answers for OwnAddress {
    async fn serve(self, mut stream: TcpStream) -> io::Result<()> {
        let address = stream.local_addr()?;
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        stream.write_all(format!("{address}\n").as_bytes()).await?;
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer).await? {
                0 => return Ok(()),
                n => stream.write_all(&buffer[..n]).await?,
            }
        }
    }

    fn answer(&self, own: SocketAddr, _client: SocketAddr, datagram: &[u8]) -> Vec<u8> {
        [own.to_string().as_bytes(), b"\n", datagram].concat()
    }
}

impl Servers {
    /// Starts servers.
    ///
    /// # Panics
    ///
    /// If an address cannot be bound, or for a protocol that is neither TCP nor UDP.
    #[must_use]
    pub fn start(addresses: impl IntoIterator<Item = (SocketAddr, Protocol)>) -> Self {
        Self::serving(addresses.into_iter().map(|(address, protocol)| {
            bind(address, protocol).unwrap_or_else(|error| panic!("{address}/{protocol}: {error}"))
        }))
    }

    fn serving(bound: impl Iterator<Item = Bound>) -> Self {
        Self { _running: lb_netns::Servers::start("servers", bound, &OwnAddress).expect("servers") }
    }

    /// Starts TCP servers.
    ///
    /// # Panics
    ///
    /// If an address cannot be bound.
    #[must_use]
    pub fn tcp(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self::start(addresses.into_iter().map(|address| (address, Protocol::Tcp)))
    }

    /// Starts TCP servers that also accept multipath TCP.
    ///
    /// # Panics
    ///
    /// If an address cannot be bound, or the kernel lacks multipath TCP.
    #[must_use]
    pub fn multipath(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self::serving(addresses.into_iter().map(|address| {
            let number = nix::libc::IPPROTO_MPTCP;
            let bound = Socket::with_protocol_number(Domain::of(address.ip()), Protocol::Tcp, number)
                .and_then(|socket| {
                    socket.bind(address)?;
                    listening(socket.into_fd().into())
                });
            bound.unwrap_or_else(|error| panic!("{address}: {error}"))
        }))
    }

    /// Starts UDP servers.
    ///
    /// # Panics
    ///
    /// If an address cannot be bound.
    #[must_use]
    pub fn udp(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self::start(addresses.into_iter().map(|address| (address, Protocol::Udp)))
    }
}

fn listening(listener: TcpListener) -> io::Result<Bound> {
    // The standard library's backlog is too short for a test that opens thousands of connections.
    listen(&listener, Backlog::MAXCONN)?;
    Ok(Bound::Stream(listener))
}

/// A socket at an address, with the longest backlog.
pub(crate) fn bind(address: SocketAddr, protocol: Protocol) -> io::Result<Bound> {
    match protocol {
        Protocol::Tcp => listening(TcpListener::bind(address)?),
        Protocol::Udp => Ok(Bound::Datagrams(UdpSocket::bind(address)?)),
        Protocol::Sctp => Err(io::ErrorKind::Unsupported.into()),
    }
}
