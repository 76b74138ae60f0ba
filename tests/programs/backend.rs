//! The servers behind the services.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// How often a server checks whether it has to stop.
const TICK: Duration = Duration::from_millis(20);

/// Threads that stop on drop.
struct Threads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn new() -> Self {
        Self { stop: Arc::default(), threads: Vec::new() }
    }

    /// Serves each connection on its own thread.
    fn accept(&mut self, address: SocketAddr, serve: fn(TcpStream, &AtomicBool) -> io::Result<()>) {
        let listener = TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::clone(&self.stop);
        self.threads.push(thread::spawn(move || {
            let mut connections = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                if let Ok((stream, _)) = listener.accept() {
                    let stop = Arc::clone(&stop);
                    connections.push(thread::spawn(move || {
                        let _client_went_away = stream
                            .set_nonblocking(false)
                            .and_then(|()| stream.set_read_timeout(Some(TICK)))
                            .and_then(|()| serve(stream, &stop));
                    }));
                } else {
                    thread::sleep(TICK);
                }
            }
            for connection in connections {
                connection.join().unwrap();
            }
        }));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let result = thread.join();
            assert!(result.is_ok() || thread::panicking(), "a server panicked");
        }
    }
}

/// Reads until the connection closes, the server has to stop, or `is_whole` returns that a message is
/// complete.
fn read(
    stream: &mut TcpStream,
    stop: &AtomicBool,
    is_whole: impl Fn(&[u8]) -> bool,
) -> io::Result<Option<Vec<u8>>> {
    let mut message = Vec::new();
    let mut buffer = [0; 4096];
    while !is_whole(&message) {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(n) => message.extend(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(None);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Some(message))
}

/// A web server. Each page names the server and the client: `10.244.1.2 for 10.244.1.1`.
pub(crate) struct Http {
    _threads: Threads,
}

impl Http {
    pub(crate) fn start(addresses: [SocketAddr; 2]) -> Self {
        let mut threads = Threads::new();
        for address in addresses {
            threads.accept(address, Self::serve);
        }
        Self { _threads: threads }
    }

    fn serve(mut stream: TcpStream, stop: &AtomicBool) -> io::Result<()> {
        let (server, client) = (stream.local_addr()?.ip(), stream.peer_addr()?.ip());
        let page = format!("{server} for {client}\n");
        let is_request = |bytes: &[u8]| bytes.ends_with(b"\r\n\r\n");
        while read(&mut stream, stop, is_request)?.is_some() {
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{page}", page.len())?;
        }
        Ok(())
    }
}

/// A name server that answers every query with its own address.
pub(crate) struct Dns {
    _threads: Threads,
}

impl Dns {
    pub(crate) fn start(addresses: [SocketAddr; 2]) -> Self {
        let mut threads = Threads::new();
        for address in addresses {
            threads.accept(address, Self::serve_stream);
            let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
            socket.set_read_timeout(Some(TICK)).unwrap();
            let stop = Arc::clone(&threads.stop);
            threads.threads.push(thread::spawn(move || {
                let mut query = [0; 1024];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((n, client)) = socket.recv_from(&mut query) else { continue };
                    if let Some(answer) = answer(&query[..n], address.ip()) {
                        let _client_went_away = socket.send_to(&answer, client);
                    }
                }
            }));
        }
        Self { _threads: threads }
    }

    fn serve_stream(mut stream: TcpStream, stop: &AtomicBool) -> io::Result<()> {
        let ip = stream.local_addr()?.ip();
        let len = |bytes: &[u8]| Some(usize::from(u16::from_be_bytes([*bytes.first()?, *bytes.get(1)?])) + 2);
        let is_query = |bytes: &[u8]| len(bytes).is_some_and(|len| bytes.len() >= len);
        while let Some(query) = read(&mut stream, stop, is_query)? {
            if let Some(answer) = answer(&query[2..], ip) {
                let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
                stream.write_all(&[&len.to_be_bytes(), &*answer].concat())?;
            }
        }
        Ok(())
    }
}

/// Answers a query with one question (RFC 1035): the server's address if the question has its family, else no
/// record.
fn answer(query: &[u8], ip: IpAddr) -> Option<Vec<u8>> {
    let labels = query.get(12..)?;
    let end = 12 + labels.iter().position(|octet| *octet == 0)? + 5;
    let question = query.get(12..end)?;
    let (kind, data): (u8, Vec<u8>) = match ip {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (28, ip.octets().to_vec()),
    };
    let is_asked_for = question[question.len() - 4..] == [0, kind, 0, 1];
    // The query's id, then: an answer with authority, recursion available, one question.
    let mut answer =
        [&query[..2], &[0x85, 0x80, 0, 1, 0, u8::from(is_asked_for), 0, 0, 0, 0], question].concat();
    if is_asked_for {
        // The name of the question, type, class, TTL 0.
        answer.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 0, 0, u8::try_from(data.len()).ok()?]);
        answer.extend(data);
    }
    Some(answer)
}
