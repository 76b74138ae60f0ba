//! Servers on a thread of their own.

use std::{
    io, net,
    net::SocketAddr,
    thread::{self, JoinHandle},
};

use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    runtime,
    sync::oneshot,
    task::JoinSet,
};

/// What servers answer.
pub trait Answers: Clone + Send + 'static {
    /// Serves a connection. The end of the future closes it, and errors are ignored.
    fn serve(self, stream: TcpStream) -> impl Future<Output = io::Result<()>> + Send;

    /// The answer to a client's datagram at the server's own address.
    fn answer(&self, own: SocketAddr, client: SocketAddr, datagram: &[u8]) -> Vec<u8>;
}

/// A bound socket.
#[derive(Debug)]
pub enum Socket {
    /// It listens for connections.
    Stream(net::TcpListener),
    /// It receives datagrams.
    Datagrams(net::UdpSocket),
}

/// Any number of servers on one thread, in the namespaces and cgroup of the thread that started them. They
/// stop on drop.
#[derive(Debug)]
pub struct Servers {
    /// Dropping it stops the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Servers {
    /// Serves bound sockets.
    ///
    /// # Errors
    ///
    /// If a socket cannot be made nonblocking, or the process has too many threads or descriptors.
    pub fn start(
        name: &str,
        sockets: impl IntoIterator<Item = Socket>,
        answers: &impl Answers,
    ) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let mut servers = JoinSet::new();
        let inside = runtime.enter();
        for socket in sockets {
            match socket {
                Socket::Stream(listener) => {
                    listener.set_nonblocking(true)?;
                    servers.spawn_on(
                        accept(TcpListener::from_std(listener)?, answers.clone()),
                        runtime.handle(),
                    );
                }
                Socket::Datagrams(socket) => {
                    socket.set_nonblocking(true)?;
                    let own = socket.local_addr()?;
                    let socket = UdpSocket::from_std(socket)?;
                    servers.spawn_on(echo(socket, own, answers.clone()), runtime.handle());
                }
            }
        }
        drop(inside);
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _ends_with_the_sender = runtime.block_on(stopped);
            // The runtime closes the listeners and every open connection.
            drop((servers, runtime));
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
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

async fn accept(listener: TcpListener, answers: impl Answers) {
    let mut connections = JoinSet::new();
    loop {
        // A client that has closed already, or a lack of descriptors, is no reason to stop.
        if let Ok((stream, _client)) = listener.accept().await {
            connections.spawn(answers.clone().serve(stream));
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn echo(socket: UdpSocket, own: SocketAddr, answers: impl Answers) {
    let mut datagram = vec![0; 4096];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut datagram).await else { continue };
        let answer = answers.answer(own, client, &datagram[..length]);
        // Send errors are ignored, as UDP servers do.
        let _lost = socket.send_to(&answer, client).await;
    }
}
