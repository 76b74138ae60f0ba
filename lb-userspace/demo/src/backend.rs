//! The servers of a pod: HTTP and a UDP echo, which answer with the pod's name. Only as much HTTP as the demo
//! needs.

use std::{io, net::IpAddr, os::fd::AsFd, sync::mpsc, thread, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    runtime,
    sync::oneshot,
    task::JoinSet,
    time::timeout,
};

use super::{
    manifests::{ECHO_PORT, HTTP_PORT, Pod},
    scenery::{self, Netns},
};

/// How long a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(5);
/// Maximum size of a request, in octets.
const MAX_REQUEST: usize = 8192;

/// A running pod. Dropping this value stops its servers and frees its network namespace.
#[derive(Debug)]
pub(super) struct Backend {
    /// The pod.
    pub pod: Pod,
    netns: Netns,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    /// Dropping it stops the servers.
    _stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Backend {
    /// Starts the servers on a thread inside the pod's namespace. They listen when this returns.
    pub(super) fn start(pod: Pod, netns: Netns) -> Result<Self> {
        let mut backend = Self { pod, netns, running: None };
        let inside = backend.netns.as_fd().try_clone_to_owned().context("cannot keep a network namespace")?;
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name(pod.name.to_owned())
            .spawn(move || {
                let started = scenery::enter(inside.as_fd())
                    .and_then(|()| runtime::Builder::new_current_thread().enable_all().build())
                    .and_then(|runtime| {
                        let servers =
                            runtime.block_on(listen(pod.name, pod.addresses(), HTTP_PORT, ECHO_PORT))?;
                        Ok((runtime, servers))
                    });
                match started {
                    Ok((runtime, servers)) => {
                        let _starter_gone = ready.send(Ok(()));
                        let _ends_with_the_sender = runtime.block_on(stopped);
                        // The runtime closes the listeners and every open connection.
                        drop((servers, runtime));
                    }
                    Err(error) => {
                        let _starter_gone = ready.send(Err(error));
                    }
                }
            })
            .context("cannot start a thread")?;
        backend.running = Some(Running { _stop: stop, thread });
        let started = is_ready.recv().unwrap_or_else(|_gone| Err(io::Error::other("its thread exited")));
        started.with_context(|| format!("cannot start the servers of {}", pod.name))?;
        Ok(backend)
    }

    /// Stops the servers as a crash does: the kernel then refuses calls to their ports. Returns when they
    /// have stopped.
    pub(super) fn kill(&mut self) {
        if let Some(Running { _stop: stop, thread }) = self.running.take() {
            drop(stop);
            let _panicked = thread.join();
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts both servers on each address. They run until the result is dropped.
async fn listen(
    name: &'static str,
    addresses: [IpAddr; 2],
    http_port: u16,
    echo_port: u16,
) -> io::Result<JoinSet<io::Result<()>>> {
    let mut servers = JoinSet::new();
    for address in addresses {
        servers.spawn(serve_http(name, TcpListener::bind((address, http_port)).await?));
        servers.spawn(serve_echo(name, UdpSocket::bind((address, echo_port)).await?));
    }
    Ok(servers)
}

/// Answers every request with the name, one request per connection.
async fn serve_http(name: &'static str, listener: TcpListener) -> io::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _client) = listener.accept().await?;
        // A silent client must not delay others.
        connections.spawn(timeout(PATIENCE, answer(name, stream)));
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(name: &str, mut stream: TcpStream) -> io::Result<()> {
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

/// Sends every datagram back, prefixed with the name.
async fn serve_echo(name: &str, socket: UdpSocket) -> io::Result<()> {
    let mut datagram = [0; 1024];
    loop {
        let (length, client) = socket.recv_from(&mut datagram).await?;
        let answer = [name.as_bytes(), b" ", &datagram[..length]].concat();
        // Send errors are ignored, as UDP servers do.
        let _lost = socket.send_to(&answer, client).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_servers_answer_with_the_name() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let echo = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (http_address, echo_address) = (listener.local_addr().unwrap(), echo.local_addr().unwrap());
        let mut servers = JoinSet::new();
        servers.spawn(serve_http("pod-9", listener));
        servers.spawn(async move { serve_echo("pod-9", echo).await });

        let mut stream = TcpStream::connect(http_address).await.unwrap();
        // In two parts, like a slow client.
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r").await.unwrap();
        stream.write_all(b"\n\r\n").await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(response.ends_with("\r\n\r\npod-9\n"), "{response}");

        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(b"hello", echo_address).await.unwrap();
        let mut answer = [0; 64];
        let (length, from) = socket.recv_from(&mut answer).await.unwrap();
        assert_eq!((&answer[..length], from), (&b"pod-9 hello"[..], echo_address));
    }
}
