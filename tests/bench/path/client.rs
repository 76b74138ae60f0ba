//! The client process of `path`: does the ordered work and reports the time of each piece.

use std::{
    io::{self, BufRead as _, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use nix::{time::clock_getcpuclockid, unistd::Pid};
use serde::{Deserialize, Serialize};

use super::{
    cpu,
    town::{Protocol, Town},
};

/// Timeout of an answer: nothing here takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(5);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: service\r\n\r\n";
const LAST_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n";
/// Bytes per write of the stream.
const CHUNK: usize = 1 << 17;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Work {
    /// A new TCP connection, one request, and the close, which the server starts.
    Connection,
    /// A request on an open connection.
    KeepAlive,
    /// A new UDP socket, connected, with one request.
    FreshDatagram,
    /// Requests on one connected UDP socket.
    ConnectedDatagram,
    /// Requests on one unconnected UDP socket, each with the address.
    SentDatagram,
    /// An upload of this many MiB.
    Stream,
}

impl Work {
    pub(crate) const ALL: [Self; 6] = [
        Self::Connection,
        Self::KeepAlive,
        Self::FreshDatagram,
        Self::ConnectedDatagram,
        Self::SentDatagram,
        Self::Stream,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Connection => "new connection",
            Self::KeepAlive => "keep-alive request",
            Self::FreshDatagram => "UDP request, fresh socket",
            Self::ConnectedDatagram => "UDP request, one connected socket",
            Self::SentDatagram => "UDP request, one unconnected socket",
            Self::Stream => "stream",
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) work: Work,
    /// The number of pieces; MiB of a stream.
    pub(crate) n: u32,
    pub(crate) seed: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Why nothing was measured.
    pub(crate) error: Option<String>,
    /// The total time of each piece, ns.
    pub(crate) whole: Vec<u64>,
    /// Only the `connect()` of each piece, ns, if there is one.
    pub(crate) connect: Vec<u64>,
    /// The wall-clock time of all pieces, ns.
    pub(crate) wall: u64,
    /// CPU time of client, server and the softirq thread of their CPU meanwhile, ns.
    pub(crate) cpu: u64,
}

/// The destination of a client's work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) town: Town,
    /// To endpoints directly, without a service.
    pub(crate) to_endpoint: bool,
    pub(crate) server: Pid,
}

/// Executes the orders on standard input until it closes.
pub(crate) fn run(place: Place) -> anyhow::Result<()> {
    super::stay_on_one_cpu()?;
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?)?;
        let answer = carry_out(place, &order)
            .unwrap_or_else(|error| Answer { error: Some(format!("{error:#}")), ..Answer::default() });
        writeln!(output, "{}", serde_json::to_string(&answer)?)?;
        output.flush()?;
    }
    Ok(())
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn carry_out(place: Place, order: &Order) -> anyhow::Result<Answer> {
    let n = order.n as usize;
    let mut answer =
        Answer { whole: Vec::with_capacity(n), connect: Vec::with_capacity(n), ..Answer::default() };
    let mut state = order.seed;
    let mut pick = |protocol| SocketAddr::from(place.town.pick(&mut state, protocol, place.to_endpoint));
    let clocks = [clock_getcpuclockid(Pid::this())?, clock_getcpuclockid(place.server)?];
    let softirq = cpu::softirq_thread(super::CPU);
    let used = || -> anyhow::Result<u64> {
        let mut sum = softirq.as_deref().map_or(0, cpu::thread_time);
        for clock in clocks {
            sum += nanoseconds(Duration::from(clock.now()?));
        }
        Ok(sum)
    };
    // Set up in advance, so that no piece includes it.
    let mut kept = None;
    let mut socket = None;
    match order.work {
        Work::Connection | Work::FreshDatagram => {}
        Work::KeepAlive | Work::Stream => kept = Some(open(pick(Protocol::Tcp))?),
        Work::ConnectedDatagram | Work::SentDatagram => {
            let to = pick(Protocol::Udp);
            let opened = datagram_socket()?;
            if order.work == Work::ConnectedDatagram {
                opened.connect(to)?;
            }
            socket = Some((opened, to));
        }
    }
    let (cpu_before, began) = (used()?, Instant::now());
    match (order.work, &mut kept, &socket) {
        (Work::Stream, Some(stream), _) => {
            upload(stream, order.n)?;
            answer.whole.push(nanoseconds(began.elapsed()));
        }
        (Work::KeepAlive, Some(stream), _) => {
            for _ in 0..order.n {
                let piece = Instant::now();
                ask(stream, REQUEST, false)?;
                answer.whole.push(nanoseconds(piece.elapsed()));
            }
        }
        (work, _, Some((socket, to))) => {
            for _ in 0..order.n {
                let piece = Instant::now();
                exchange(socket, (work == Work::SentDatagram).then_some(*to))?;
                answer.whole.push(nanoseconds(piece.elapsed()));
            }
        }
        (Work::FreshDatagram, ..) => {
            for _ in 0..order.n {
                let to = pick(Protocol::Udp);
                let piece = Instant::now();
                let socket = datagram_socket()?;
                let opened = Instant::now();
                socket.connect(to)?;
                answer.connect.push(nanoseconds(opened.elapsed()));
                exchange(&socket, None)?;
                drop(socket);
                answer.whole.push(nanoseconds(piece.elapsed()));
            }
        }
        _ => {
            for _ in 0..order.n {
                let to = pick(Protocol::Tcp);
                let piece = Instant::now();
                let mut stream = open(to)?;
                answer.connect.push(nanoseconds(piece.elapsed()));
                ask(&mut stream, LAST_REQUEST, true)?;
                drop(stream);
                answer.whole.push(nanoseconds(piece.elapsed()));
            }
        }
    }
    answer.wall = nanoseconds(began.elapsed());
    answer.cpu = used()?.saturating_sub(cpu_before);
    Ok(answer)
}

/// Opens a connection. Without a timeout for `connect()`, which would need more system calls: the kernel
/// gives up within a minute.
fn open(to: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect(to).map_err(|error| io::Error::new(error.kind(), format!("connect to {to}: {error}")))
}

/// Sends a request and reads the answer, or everything until the server closes.
fn ask(stream: &mut TcpStream, request: &[u8], to_the_end: bool) -> io::Result<()> {
    const LENGTH: usize = super::server::ANSWER.len();
    stream.write_all(request)?;
    let mut buffer = [0; 512];
    let mut n = 0;
    while to_the_end || n < LENGTH {
        match stream.read(&mut buffer[n..])? {
            0 if n == LENGTH => return Ok(()),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => n += more,
        }
    }
    Ok(())
}

fn upload(stream: &mut TcpStream, mib: u32) -> io::Result<()> {
    let length = u64::from(mib) << 20;
    stream.write_all(format!("POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n").as_bytes())?;
    let chunk = vec![0; CHUNK];
    for _ in 0..length / CHUNK as u64 {
        stream.write_all(&chunk)?;
    }
    ask(stream, &[], false)?;
    stream.shutdown(Shutdown::Both)
}

fn datagram_socket() -> io::Result<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
}

fn exchange(socket: &UdpSocket, to: Option<SocketAddr>) -> io::Result<()> {
    let mut buffer = [0; 64];
    if let Some(to) = to {
        socket.send_to(&[0; 32], to)?;
        wait(socket)?;
        let (_n, from) = socket.recv_from(&mut buffer)?;
        if from != to {
            return Err(io::Error::other(format!("asked {to}, {from} answers")));
        }
    } else {
        socket.send(&[0; 32])?;
        wait(socket)?;
        let _n = socket.recv(&mut buffer)?;
    }
    Ok(())
}

/// Waits for a datagram. If it was lost, the work fails instead of blocking.
fn wait(socket: &UdpSocket) -> io::Result<()> {
    use std::os::fd::AsFd as _;
    let mut one = [nix::poll::PollFd::new(socket.as_fd(), nix::poll::PollFlags::POLLIN)];
    let time = nix::poll::PollTimeout::try_from(PATIENCE).unwrap_or(nix::poll::PollTimeout::MAX);
    match nix::poll::poll(&mut one, time)? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}
