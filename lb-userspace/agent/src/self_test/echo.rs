//! The endpoints of the self-test: echo servers.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::debug;

/// Maximum number of bytes sent back at once; the self-test sends less. An answer is never larger than its
/// request, so the agent is no amplifier.
const MOST: usize = 64;
/// Timeout of a connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause after a failed `accept()`: most failures last, such as a lack of descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// Maximum number of connections that wait for `accept()`: there is one caller.
const BACKLOG: i32 = 16;
/// How often to choose another port if the UDP port of the same number is in use.
const TRIES: usize = 16;

/// An echo server for TCP and UDP on loopback addresses, until it is dropped.
#[derive(Debug)]
pub struct Echo {
    addresses: Vec<SocketAddr>,
    _servers: JoinSet<()>,
}

impl Echo {
    /// Listens on a port chosen by the kernel, on the loopback address of each family of this host.
    ///
    /// # Errors
    ///
    /// If it cannot listen on IPv4.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn start() -> io::Result<Self> {
        let mut servers = JoinSet::new();
        let mut addresses = vec![serve(Ipv4Addr::LOCALHOST.into(), &mut servers).await?];
        match serve(Ipv6Addr::LOCALHOST.into(), &mut servers).await {
            Ok(address) => addresses.push(address),
            Err(error) => debug!(%error, "no IPv6 on the loopback interface: the self-test uses IPv4 only"),
        }
        Ok(Self { addresses, _servers: servers })
    }

    /// Listens on other addresses instead: those of an echo server that has stopped.
    ///
    /// # Errors
    ///
    /// If it cannot listen on one of them; nothing has changed then.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn move_to(&mut self, addresses: &[SocketAddr]) -> io::Result<()> {
        let mut servers = JoinSet::new();
        for address in addresses {
            // Connections of the earlier server may be in TIME_WAIT, which tokio's listeners ignore as well.
            let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&(*address).into())?;
            socket.listen(BACKLOG)?;
            let datagrams = std::net::UdpSocket::bind(address)?;
            datagrams.set_nonblocking(true)?;
            spawn(TcpListener::from_std(socket.into())?, UdpSocket::from_std(datagrams)?, &mut servers);
        }
        *self = Self { addresses: addresses.to_vec(), _servers: servers };
        Ok(())
    }

    /// The addresses it listens on, one per family.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }
}

async fn serve(ip: IpAddr, servers: &mut JoinSet<()>) -> io::Result<SocketAddr> {
    let (listener, datagrams, address) = bind(ip).await?;
    spawn(listener, datagrams, servers);
    Ok(address)
}

fn spawn(listener: TcpListener, datagrams: UdpSocket, servers: &mut JoinSet<()>) {
    servers.spawn(async move {
        loop {
            match listener.accept().await {
                // One at a time: there is one caller.
                Ok((stream, _)) => drop(timeout(PATIENCE, answer(stream)).await),
                Err(_) => sleep(PAUSE).await,
            }
        }
    });
    servers.spawn(async move {
        let mut buffer = [0; MOST];
        loop {
            let sent = match datagrams.recv_from(&mut buffer).await {
                Ok((length, from)) => datagrams.send_to(buffer.get(..length).unwrap_or_default(), from).await,
                Err(error) => Err(error),
            };
            if sent.is_err() {
                sleep(PAUSE).await;
            }
        }
    });
}

/// A TCP and a UDP socket at the same port.
async fn bind(ip: IpAddr) -> io::Result<(TcpListener, UdpSocket, SocketAddr)> {
    let mut problem = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..TRIES {
        let listener = TcpListener::bind((ip, 0)).await?;
        let address = listener.local_addr()?;
        match UdpSocket::bind(address).await {
            Ok(datagrams) => return Ok((listener, datagrams, address)),
            Err(error) => problem = error,
        }
    }
    Err(problem)
}

async fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = [0; MOST];
    let length = stream.read(&mut buffer).await?;
    stream.write_all(buffer.get(..length).unwrap_or_default()).await
}
