//! The node's name server: DNS messages in, answers out.
//!
//! # Purpose
//!
//! [`lb_core::names`] decides what is answered; this crate has the sockets, the messages, the cache and the
//! upstream servers. It knows neither Kubernetes nor BPF.
//!
//! # Invariants
//!
//! - A UDP response is never longer than its query allows, nor than 1,232 octets.
//! - Whatever arrives, memory is bounded: queries in flight, connections, entries and octets of the cache.
//! - A question that the zone or the cache answers takes no turn of the asynchronous runtime, over UDP.

mod cache;
mod forward;
mod message;
mod statistics;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, Release},
        },
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use forward::Forwarder;
use hickory_proto::op::ResponseCode;
use lb_core::names::{Answer, Question, zone::Zone};
pub use message::reply;
use message::{Body, Local};
use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use statistics::Counters;
pub use statistics::{BUCKETS, Event, From, Protocol, Statistics, TYPES};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, broadcast, mpsc, watch},
    task::JoinSet,
    time::interval,
};

/// How often each task shows that it makes progress.
const BEAT: Duration = Duration::from_millis(200);
/// A task that showed nothing for so long is stuck.
const STUCK: Duration = Duration::from_secs(2);
const TCP_BACKLOG: i32 = 128;
/// Room for a burst while the thread has no turn, octets.
const UDP_BUFFER: usize = 1 << 20;

/// Who knows the zone.
pub trait Authority: Send + Sync {
    /// What the zone says. Called on the server's thread: it must not wait.
    fn answer(&self, question: &Question<'_>) -> Answer;
}

impl Authority for Zone {
    fn answer(&self, question: &Question<'_>) -> Answer {
        self.answer(question)
    }
}

/// Who may ask.
pub trait Clients: Send + Sync {
    /// Whether queries of this address are answered. `interface_index`: where the datagram came in; 0 for
    /// connections. An IPv4-mapped address arrives here as an IPv4 address.
    fn admits(&self, source: IpAddr, interface_index: u32) -> bool;
}

/// Bounds.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Entries of the cache.
    pub max_cache_entries: usize,
    /// Memory of the cache, octets, by the length of its messages.
    pub max_cache_octets: usize,
    /// Different questions at the upstream servers at a time; more are refused with `SERVFAIL`.
    pub max_in_flight: usize,
    /// Connections at a time; more are closed.
    pub max_connections: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_cache_entries: 10_000,
            max_cache_octets: 16 << 20,
            max_in_flight: 1_000,
            max_connections: 256,
        }
    }
}

/// How much of something each client has: one leaves some to the others.
struct PerClient {
    n: HashMap<IpAddr, usize>,
    max: usize,
}

impl PerClient {
    fn new(max: usize) -> Self {
        Self { n: HashMap::new(), max }
    }

    /// Adds one; `false` if the client has as many as it may.
    fn add(&mut self, client: IpAddr) -> bool {
        let n = self.n.entry(client).or_default();
        let has_room = *n < self.max;
        *n += usize::from(has_room);
        has_room
    }

    fn remove(&mut self, client: IpAddr) {
        if let Entry::Occupied(mut n) = self.n.entry(client) {
            *n.get_mut() -= 1;
            if *n.get() == 0 {
                n.remove();
            }
        }
    }
}

struct Beats {
    start: Instant,
    /// Milliseconds from the start, one of each task.
    at: Vec<AtomicU64>,
}

impl Beats {
    fn new(n_tasks: usize) -> Self {
        Self { start: Instant::now(), at: (0..n_tasks).map(|_| AtomicU64::default()).collect() }
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn beat(&self, index: usize) {
        if let Some(at) = self.at.get(index) {
            at.store(self.millis(), Relaxed);
        }
    }

    fn are_recent(&self) -> bool {
        let stuck = u64::try_from(STUCK.as_millis()).unwrap_or(u64::MAX);
        let now = self.millis();
        self.at.iter().all(|at| now.saturating_sub(at.load(Relaxed)) < stuck)
    }
}

struct Shared {
    authority: watch::Receiver<Arc<dyn Authority>>,
    clients: Arc<dyn Clients>,
    forwarder: Arc<Forwarder>,
    beats: Beats,
}

impl Shared {
    fn counters(&self) -> &Counters {
        &self.forwarder.counters
    }
}

/// The listening sockets of one address.
#[derive(Debug)]
pub struct Listener {
    udp: UdpSocket,
    tcp: std::net::TcpListener,
}

impl Listener {
    /// Binds UDP and TCP, in the network namespace of the calling thread. With port 0, TCP gets the port that
    /// UDP has been given.
    ///
    /// # Errors
    ///
    /// The address is unspecified (a response would have another source address), in use or not the node's.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        if address.ip().is_unspecified() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the address is unspecified"));
        }
        let domain = Domain::for_address(address);
        let udp = Socket::new(domain, Type::DGRAM, Some(SocketProtocol::UDP))?;
        if address.is_ipv6() {
            udp.set_only_v6(true)?;
        }
        udp.set_recv_buffer_size(UDP_BUFFER)?;
        udp.bind(&address.into())?;
        let udp = UdpSocket::from(udp);
        udp::prepare(&udp)?;
        let address = udp.local_addr()?;
        let tcp = Socket::new(domain, Type::STREAM, Some(SocketProtocol::TCP))?;
        if address.is_ipv6() {
            tcp.set_only_v6(true)?;
        }
        tcp.set_reuse_address(true)?;
        tcp.set_nonblocking(true)?;
        tcp.bind(&address.into())?;
        tcp.listen(TCP_BACKLOG)?;
        Ok(Self { udp, tcp: tcp.into() })
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// Those of the kernel.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// The UDP socket, for maps of sockets.
    #[must_use]
    pub fn udp(&self) -> &UdpSocket {
        &self.udp
    }

    /// The listening TCP socket, for maps of sockets.
    #[must_use]
    pub fn tcp(&self) -> &std::net::TcpListener {
        &self.tcp
    }
}

/// A running name server. It stops when dropped, which takes as long as its current batch.
pub struct Server {
    shared: Arc<Shared>,
    is_stopped: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    _tasks: JoinSet<()>,
}

impl Server {
    /// Serves on `listeners` until the server is dropped. `authority` is read once per batch; `upstreams`
    /// once per question, and its order is that of preference.
    ///
    /// The server's thread calls `on_alive` at least every 500 ms, but not while it or a task is stuck.
    ///
    /// # Errors
    ///
    /// The kernel gives no thread or descriptor.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O and time.
    pub fn start(
        listeners: Vec<Listener>,
        authority: watch::Receiver<Arc<dyn Authority>>,
        clients: Arc<dyn Clients>,
        upstreams: watch::Receiver<Vec<SocketAddr>>,
        options: Options,
        mut on_alive: Box<dyn FnMut() + Send>,
    ) -> io::Result<Self> {
        let counters = Arc::new(Counters::new());
        let forwarder = Arc::new(Forwarder::new(upstreams, &options, counters));
        // One beat of each listener's task, and one of the forwarding task.
        let beats = Beats::new(listeners.len() + 1);
        let shared = Arc::new(Shared { authority, clients, forwarder, beats });
        let mut tasks = JoinSet::new();
        let connections = Arc::new(Semaphore::new(options.max_connections));
        let mut sockets = Vec::new();
        for (beat, listener) in listeners.into_iter().enumerate() {
            sockets.push(Arc::new(listener.udp));
            let tcp = TcpListener::from_std(listener.tcp)?;
            tasks.spawn(tcp::accept(tcp, shared.clone(), connections.clone(), beat + 1));
        }
        let (jobs, due) = mpsc::channel(options.max_in_flight.max(1));
        tasks.spawn(forward(due, shared.clone(), options.max_in_flight));
        let is_stopped = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let thread = std::thread::Builder::new().name("names".into()).spawn({
            let (shared, is_stopped, wake) = (shared.clone(), is_stopped.clone(), wake.clone());
            move || udp::run(&sockets, &shared, &jobs, (&is_stopped, &wake), &mut *on_alive)
        })?;
        Ok(Self { shared, is_stopped, wake, thread: Some(thread), _tasks: tasks })
    }

    /// What has happened since the start.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.shared.counters().snapshot(self.shared.forwarder.cache_entries())
    }

    /// Every answer from now on. A receiver that is slow misses the oldest; without one, events cost nothing.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.shared.counters().subscribe()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_stopped.store(true, Release);
        // The thread looks at the flag every 200 ms anyway.
        let _full = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Answers what the UDP thread cannot.
async fn forward(mut due: mpsc::Receiver<udp::Job>, shared: Arc<Shared>, max_in_flight: usize) {
    // Identical questions share a request upstream, so more clients than questions can wait.
    let max_waiting = max_in_flight.saturating_mul(4);
    let mut clients = PerClient::new((max_in_flight / 4).max(1));
    let mut waiting = JoinSet::new();
    let mut alive = interval(BEAT);
    loop {
        tokio::select! {
            _ = alive.tick() => shared.beats.beat(0),
            Some(ended) = waiting.join_next(), if !waiting.is_empty() => {
                if let Ok(client) = ended {
                    clients.remove(client);
                }
            }
            job = due.recv(), if waiting.len() < max_waiting => {
                let Some(job) = job else { return };
                let client = job.client.ip();
                if clients.add(client) {
                    let shared = shared.clone();
                    waiting.spawn(async move {
                        resolve(&job, &shared).await;
                        client
                    });
                } else if !job.is_refresh {
                    shared.counters().overload.fetch_add(1, Relaxed);
                    let body = Body { code: ResponseCode::ServFail, ..Body::default() };
                    respond(&job, body, From::Upstream, &shared);
                }
            }
        }
    }
}

async fn resolve(job: &udp::Job, shared: &Shared) {
    let authority = shared.authority.borrow().clone();
    if job.is_refresh {
        if let Local::Upstream(_, query) = message::ask(&*authority, &job.request.query) {
            shared.forwarder.refresh(&job.request, &query);
        }
        return;
    }
    let (body, from) = shared.forwarder.answer(&job.request, &*authority).await;
    respond(job, body, from, shared);
}

fn respond(job: &udp::Job, body: Body, from: From, shared: &Shared) {
    let code = body.code;
    let reply = message::write(&job.request, body);
    // A full buffer loses it, as the way there can.
    let _lost = job.socket.send_to(&reply, job.client);
    shared.counters().answered(job.client, &job.request.query, code, from, job.since);
}
