//! The client process of `path`: does the ordered work and reports the time of each piece.

use std::{
    fs,
    io::{self, BufRead as _, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{time::clock_getcpuclockid, unistd::Pid};
use serde::{Deserialize, Serialize};

use crate::{
    machine,
    objects::{
        N_NODE_PORTS, PORT, Policy, Size, TARGET_PORT, UDP_STRIDE, cluster_ip, load_balancer_ip, node_port,
    },
    turns::stay_on,
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

    const fn is_udp(self) -> bool {
        matches!(self, Self::FreshDatagram | Self::ConnectedDatagram | Self::SentDatagram)
    }

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

/// By which address of a service a client calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum By {
    ClusterIp,
    /// The port of the node, of a service with this policy.
    NodePort(Policy),
    LoadBalancer(Policy),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) work: Work,
    pub(crate) by: By,
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
    pub(crate) size: Size,
    /// To endpoints directly, without a service.
    pub(crate) to_endpoint: bool,
    pub(crate) server: Pid,
    /// The address on which node ports answer.
    pub(crate) node: Ipv4Addr,
}

impl Place {
    /// A random service with a port of the protocol, or one of its endpoints.
    fn pick(self, random: &mut fastrand::Rng, by: By, is_udp: bool) -> SocketAddrV4 {
        let n_services = self.size.n_services;
        let service = match by {
            By::ClusterIp if is_udp => random.u32(..n_services.div_ceil(UDP_STRIDE)) * UDP_STRIDE,
            By::ClusterIp => random.u32(..n_services),
            By::NodePort(policy) => policy.nth(random.u32(..policy.n_of(n_services.min(N_NODE_PORTS)))),
            By::LoadBalancer(policy) => policy.nth(random.u32(..policy.n_of(n_services))),
        };
        // Always drawn, so that all competitors use the same services.
        let endpoint = random.u32(..self.size.n_endpoints);
        if self.to_endpoint {
            SocketAddrV4::new(self.size.pod(service, endpoint), TARGET_PORT)
        } else {
            self.address(service, by)
        }
    }

    /// The address of the last service that has such a one.
    pub(crate) fn last(self, by: By) -> SocketAddrV4 {
        let n_services = self.size.n_services;
        let last = |policy: Policy, n_services| policy.nth(policy.n_of(n_services).saturating_sub(1));
        let service = match by {
            By::ClusterIp => n_services - 1,
            By::NodePort(policy) => last(policy, n_services.min(N_NODE_PORTS)),
            By::LoadBalancer(policy) => last(policy, n_services),
        };
        self.address(service, by)
    }

    /// An address of a service.
    fn address(self, service: u32, by: By) -> SocketAddrV4 {
        match by {
            By::ClusterIp => SocketAddrV4::new(cluster_ip(service), PORT),
            // Only the first ones have a node port.
            By::NodePort(_) => SocketAddrV4::new(self.node, node_port(service).unwrap_or_default()),
            By::LoadBalancer(_) => SocketAddrV4::new(load_balancer_ip(service), PORT),
        }
    }
}

/// Executes the orders on standard input until it closes.
pub(crate) fn run(place: Place) -> anyhow::Result<()> {
    stay_on(super::CPU)?;
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
    let Order { work, by, n, seed } = *order;
    let mut answer = Answer::default();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut pick = || SocketAddr::from(place.pick(&mut random, by, work.is_udp()));
    let clocks = [clock_getcpuclockid(Pid::this())?, clock_getcpuclockid(place.server)?];
    let softirq = softirq_thread(super::CPU);
    let used = || -> anyhow::Result<Duration> {
        let mut sum = softirq.as_deref().map_or(Duration::ZERO, machine::thread_time);
        for clock in clocks {
            sum += Duration::from(clock.now()?);
        }
        Ok(sum)
    };
    // Set up in advance, so that no piece includes it.
    let first = pick();
    let mut kept = if matches!(work, Work::KeepAlive | Work::Stream) { Some(open(first)?) } else { None };
    let socket = datagram_socket()?;
    if work == Work::ConnectedDatagram {
        socket.connect(first)?;
    }
    let n_pieces = if work == Work::Stream { 1 } else { n };
    let targets: Vec<SocketAddr> = (0..n_pieces).map(|_| pick()).collect();
    (answer.whole, answer.connect) = (Vec::with_capacity(targets.len()), Vec::with_capacity(targets.len()));
    let (cpu_before, began) = (used()?, Instant::now());
    for to in targets {
        let piece = Instant::now();
        match (work, &mut kept) {
            (Work::Stream, Some(stream)) => upload(stream, n)?,
            (Work::KeepAlive, Some(stream)) => ask(stream, REQUEST, false)?,
            (Work::ConnectedDatagram, _) => exchange(&socket, None)?,
            (Work::SentDatagram, _) => exchange(&socket, Some(first))?,
            (Work::FreshDatagram, _) => {
                let socket = datagram_socket()?;
                let opened = Instant::now();
                socket.connect(to)?;
                answer.connect.push(nanoseconds(opened.elapsed()));
                exchange(&socket, None)?;
            }
            _ => {
                let mut stream = open(to)?;
                answer.connect.push(nanoseconds(piece.elapsed()));
                ask(&mut stream, LAST_REQUEST, true)?;
            }
        }
        answer.whole.push(nanoseconds(piece.elapsed()));
    }
    answer.wall = nanoseconds(began.elapsed());
    answer.cpu = nanoseconds(used()?.saturating_sub(cpu_before));
    Ok(answer)
}

/// The CPU's softirq thread in proc(5); `None` if it is not found.
///
/// Without `CONFIG_IRQ_TIME_ACCOUNTING` the kernel charges the packet work of softirqs to the thread in whose
/// system call it runs. The rest runs in this thread.
fn softirq_thread(cpu: usize) -> Option<PathBuf> {
    let wanted = format!("ksoftirqd/{cpu}\n");
    // Kernel threads start first: it is one of the first few hundred process ids.
    (2..500)
        .map(|pid| PathBuf::from(format!("/proc/{pid}")))
        .find(|path| fs::read_to_string(path.join("comm")).is_ok_and(|name| name == wanted))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_competitors_go_through_the_same_services() {
        let size = Size { n_services: 33, n_endpoints: 3, n_nodes: 1 };
        let through =
            Place { size, to_endpoint: false, server: Pid::this(), node: Ipv4Addr::new(10, 0, 1, 1) };
        let direct = Place { to_endpoint: true, ..through };
        let objects = size.cluster_with_udp();
        let udp = objects.services.values().filter(|service| {
            let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
            ports.iter().any(|port| port.protocol.as_deref() == Some("UDP"))
        });
        assert_eq!(udp.count(), 3);
        let mut random = [fastrand::Rng::with_seed(5), fastrand::Rng::with_seed(5)];
        for is_udp in [false, true] {
            for _ in 0..100 {
                let service = through.pick(&mut random[0], By::ClusterIp, is_udp);
                let endpoint = direct.pick(&mut random[1], By::ClusterIp, is_udp);
                let number = u32::from(*service.ip()) - u32::from(cluster_ip(0));
                assert!((0..3).any(|index| size.pod(number, index) == *endpoint.ip()));
                assert!(!is_udp || number.is_multiple_of(UDP_STRIDE));
            }
        }
    }
}
