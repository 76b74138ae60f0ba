//! Servers that answer with their address.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    thread::{self, JoinHandle},
};

use lb_core::model::Protocol;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{Backlog, listen},
};

use crate::client::{Domain, Socket};

/// Any number of servers on one thread, in the network namespace and cgroup of the thread that started them.
///
/// A TCP server sends its address and a newline to each client, then echoes. A UDP server answers each
/// datagram with its address, a newline and the datagram. The address is the one that the client actually
/// reached, so that a server on the unspecified address can serve many. The servers stop on drop.
#[derive(Debug)]
pub struct Servers {
    /// Closing it stops the thread.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

enum Source {
    Stop(UnixStream),
    Listener(TcpListener),
    Stream(TcpStream),
    Datagrams(UdpSocket, SocketAddr),
}

impl Source {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stop(source) => source.as_fd(),
            Self::Listener(source) => source.as_fd(),
            Self::Stream(source) => source.as_fd(),
            Self::Datagrams(source, _) => source.as_fd(),
        }
    }
}

/// What to do with a source after it was ready.
enum Next {
    Keep,
    Add(Source),
    Close,
    Stop,
}

impl Servers {
    /// Starts servers.
    ///
    /// # Panics
    ///
    /// If an address cannot be bound, or for a protocol that is neither TCP nor UDP.
    #[must_use]
    pub fn start(addresses: impl IntoIterator<Item = (SocketAddr, Protocol)>) -> Self {
        let bound = addresses.into_iter().map(|(address, protocol)| {
            bind(address, protocol).unwrap_or_else(|error| panic!("{address}/{protocol}: {error}"))
        });
        Self::serving(bound)
    }

    fn serving(bound: impl Iterator<Item = Source>) -> Self {
        let (stop, stopped) = UnixStream::pair().expect("a socket pair");
        let sources = std::iter::once(Source::Stop(stopped)).chain(bound).collect();
        let thread =
            thread::Builder::new().name("servers".into()).spawn(move || serve(sources)).expect("a thread");
        Self { stop: Some(stop), thread: Some(thread) }
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
        let listeners = addresses.into_iter().map(|address| {
            let socket = Socket::with_protocol_number(
                Domain::of(address.ip()),
                Protocol::Tcp,
                nix::libc::IPPROTO_MPTCP,
            );
            let socket = socket.unwrap_or_else(|error| panic!("{address}: {error}"));
            socket.bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
            let listener = TcpListener::from(socket.into_fd());
            listening(listener).unwrap_or_else(|error| panic!("{address}: {error}"))
        });
        Self::serving(listeners)
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

impl Drop for Servers {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the servers' thread panicked");
        }
    }
}

fn listening(listener: TcpListener) -> io::Result<Source> {
    // The standard library's backlog is too short for a test that opens thousands of connections.
    listen(&listener, Backlog::MAXCONN)?;
    listener.set_nonblocking(true)?;
    Ok(Source::Listener(listener))
}

fn bind(address: SocketAddr, protocol: Protocol) -> io::Result<Source> {
    match protocol {
        Protocol::Tcp => listening(TcpListener::bind(address)?),
        Protocol::Udp => {
            let socket = UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(Source::Datagrams(socket, address))
        }
        Protocol::Sctp => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn serve(mut sources: Vec<Source>) {
    loop {
        let mut polled: Vec<PollFd<'_>> =
            sources.iter().map(|source| PollFd::new(source.fd(), PollFlags::POLLIN)).collect();
        if poll(&mut polled, PollTimeout::NONE).is_err() {
            continue;
        }
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let mut open = Vec::with_capacity(sources.len());
        let mut added = Vec::new();
        for (mut source, is_ready) in sources.into_iter().zip(ready) {
            // A listener may have many pending connections; the others are accepted after the next poll.
            loop {
                match if is_ready { step(&mut source) } else { Next::Keep } {
                    Next::Add(new) => {
                        added.push(new);
                        continue;
                    }
                    Next::Keep => open.push(source),
                    Next::Close => {}
                    Next::Stop => return,
                }
                break;
            }
        }
        open.append(&mut added);
        sources = open;
    }
}

fn step(source: &mut Source) -> Next {
    match source {
        Source::Stop(_) => Next::Stop,
        Source::Listener(listener) => match listener.accept() {
            Ok((stream, _)) => welcome(stream).map_or(Next::Keep, |stream| Next::Add(Source::Stream(stream))),
            Err(_nobody_waits) => Next::Keep,
        },
        Source::Stream(stream) => {
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer) {
                Ok(n @ 1..) if stream.write_all(&buffer[..n]).is_ok() => Next::Keep,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Next::Keep,
                _ => Next::Close,
            }
        }
        Source::Datagrams(socket, address) => {
            let mut buffer = [0; 4096];
            if let Ok((n, sender)) = socket.recv_from(&mut buffer) {
                let answer = [address.to_string().as_bytes(), b"\n", &buffer[..n]].concat();
                let _sender_is_gone = socket.send_to(&answer, sender);
            }
            Next::Keep
        }
    }
}

/// Sends a new client the address that it reached. A client that has closed already is ignored.
fn welcome(mut stream: TcpStream) -> io::Result<TcpStream> {
    let address = stream.local_addr()?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    stream.set_nonblocking(true)?;
    stream.write_all(format!("{address}\n").as_bytes())?;
    Ok(stream)
}
