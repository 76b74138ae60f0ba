//! The servers of a pod: HTTP and a UDP echo, which answer with the pod's name. Only as much HTTP as the demo
//! needs.

use std::{
    io, net,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result};
use lb_netns::{Answers, NetNs, Servers, Socket};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::manifests::{ECHO_PORT, HTTP_PORT, Pod};

/// How long a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(5);
/// Maximum size of a request, in octets.
const MAX_REQUEST: usize = 8192;

/// A running pod. Dropping this value stops its servers.
#[derive(Debug)]
pub(super) struct Backend {
    /// The pod.
    pub pod: Pod,
    _servers: Servers,
}

impl Backend {
    /// Starts the servers inside the pod's namespace. They listen when this returns.
    pub(super) fn start(pod: Pod, netns: &NetNs) -> Result<Self> {
        let servers = netns.run(|| serve(pod.name, pod.addresses(), HTTP_PORT, ECHO_PORT));
        let servers = servers.with_context(|| format!("cannot start the servers of {}", pod.name))?;
        Ok(Self { pod, _servers: servers })
    }
}

/// Starts both servers on each address.
fn serve(
    name: &'static str,
    addresses: impl IntoIterator<Item = IpAddr>,
    http_port: u16,
    echo_port: u16,
) -> io::Result<Servers> {
    let mut sockets = Vec::new();
    for address in addresses {
        sockets.push(Socket::Stream(net::TcpListener::bind((address, http_port))?));
        sockets.push(Socket::Datagrams(net::UdpSocket::bind((address, echo_port))?));
    }
    Servers::start(name, sockets, &Name(name))
}

/// Answers with a pod's name.
#[derive(Clone)]
struct Name(&'static str);

impl Answers for Name {
    /// Answers one request with the name. A silent client is disconnected.
    async fn serve(self, stream: TcpStream) -> io::Result<()> {
        timeout(PATIENCE, respond(self.0, stream)).await?
    }

    /// The datagram, prefixed with the name.
    fn answer(&self, _own: SocketAddr, _client: SocketAddr, datagram: &[u8]) -> Vec<u8> {
        [self.0.as_bytes(), b" ", datagram].concat()
    }
}

async fn respond(name: &str, mut stream: TcpStream) -> io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > MAX_REQUEST || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let response = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{name}\n",
        name.len() + 1
    );
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    };

    use super::*;

    #[test]
    fn both_servers_answer_with_the_name() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let echo = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (http_address, echo_address) = (listener.local_addr().unwrap(), echo.local_addr().unwrap());
        let sockets = [Socket::Stream(listener), Socket::Datagrams(echo)];
        let servers = Servers::start("pod-9", sockets, &Name("pod-9")).unwrap();

        let mut stream = TcpStream::connect(http_address).unwrap();
        // In two parts, like a slow client.
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r").unwrap();
        stream.write_all(b"\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(response.ends_with("\r\n\r\npod-9\n"), "{response}");

        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.send_to(b"hello", echo_address).unwrap();
        let mut answer = [0; 64];
        let (length, from) = socket.recv_from(&mut answer).unwrap();
        assert_eq!((&answer[..length], from), (&b"pod-9 hello"[..], echo_address));

        drop(servers);
        assert!(TcpStream::connect(http_address).is_err());
    }
}
