//! The measured calls.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::Instant,
};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, connect, sendto, socket};

use super::vip;

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A new UDP socket connects to the endpoint itself and is closed.
    FreshMiss,
    /// A new UDP socket connects to the service address and is closed.
    FreshHit,
    /// A UDP socket reconnects to the endpoint itself.
    AgainMiss,
    /// A UDP socket reconnects to the service address.
    AgainHit,
    /// An unconnected UDP socket sends to the endpoint itself.
    SendMiss,
    /// An unconnected UDP socket sends to the service address.
    SendHit,
    /// A TCP connection to the endpoint itself.
    TcpMiss,
    /// A TCP connection to the service address.
    TcpHit,
}

impl Work {
    /// All kinds, in the order of the columns.
    pub(crate) const ALL: [Self; 8] = [
        Self::FreshMiss,
        Self::FreshHit,
        Self::AgainMiss,
        Self::AgainHit,
        Self::SendMiss,
        Self::SendHit,
        Self::TcpMiss,
        Self::TcpHit,
    ];

    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::FreshMiss => "fresh miss",
            Self::FreshHit => "fresh hit",
            Self::AgainMiss => "again miss",
            Self::AgainHit => "again hit",
            Self::SendMiss => "send miss",
            Self::SendHit => "send hit",
            Self::TcpMiss => "tcp miss",
            Self::TcpHit => "tcp hit",
        }
    }

    pub(crate) const fn is_tcp(self) -> bool {
        matches!(self, Self::TcpMiss | Self::TcpHit)
    }

    const fn is_hit(self) -> bool {
        matches!(self, Self::FreshHit | Self::AgainHit | Self::SendHit | Self::TcpHit)
    }
}

/// The servers of the calls.
pub(crate) struct Servers {
    pub(crate) udp: SocketAddr,
    _sink: UdpSocket,
}

impl Servers {
    pub(crate) fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:8080")?;
        let sink = UdpSocket::bind("127.0.0.1:8080")?;
        let servers = Self { udp: sink.local_addr()?, _sink: sink };
        let _ends_with_the_process = thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let _closed = stream.read(&mut [0; 1]);
            }
        });
        Ok(servers)
    }
}

/// One caller.
pub(crate) struct Worker {
    endpoint: SockaddrIn,
    service: SockaddrIn,
    connected: OwnedFd,
    unconnected: OwnedFd,
}

fn sockaddr(address: SocketAddr) -> io::Result<SockaddrIn> {
    match address {
        SocketAddr::V4(address) => Ok(address.into()),
        SocketAddr::V6(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn udp() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None)
}

impl Worker {
    pub(crate) fn new(servers: &Servers) -> io::Result<Self> {
        Ok(Self {
            endpoint: sockaddr(servers.udp)?,
            service: sockaddr(vip())?,
            connected: udp()?,
            unconnected: udp()?,
        })
    }

    /// Makes the calls and returns the time of each in ns. Without a program, a service address has no route:
    /// calls then go to the endpoint instead.
    pub(crate) fn run(&mut self, work: Work, n_calls: usize) -> io::Result<Vec<u64>> {
        let to = if work.is_hit() { &self.service } else { &self.endpoint };
        let to = if connect(self.connected.as_raw_fd(), to).is_ok() { to } else { &self.endpoint };
        let mut times = Vec::with_capacity(n_calls);
        for _ in 0..n_calls {
            let started = Instant::now();
            match work {
                Work::FreshMiss | Work::FreshHit => {
                    let fresh = udp()?;
                    connect(fresh.as_raw_fd(), to)?;
                    drop(fresh);
                }
                Work::AgainMiss | Work::AgainHit => connect(self.connected.as_raw_fd(), to)?,
                Work::SendMiss | Work::SendHit => {
                    // The sink never reads: its full buffer drops the datagram, after the hook has run.
                    let _sent = sendto(self.unconnected.as_raw_fd(), b"x", to, MsgFlags::MSG_DONTWAIT);
                }
                Work::TcpMiss | Work::TcpHit => {
                    let stream = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)?;
                    connect(stream.as_raw_fd(), to)?;
                    times.push(nanoseconds(started));
                    // A reset instead of TIME_WAIT, which would use up the ports.
                    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger)?;
                    continue;
                }
            }
            times.push(nanoseconds(started));
        }
        Ok(times)
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
