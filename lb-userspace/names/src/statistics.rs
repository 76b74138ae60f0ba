//! Counters and events.

use std::{
    array,
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use hickory_proto::{
    op::{Query, ResponseCode},
    rr::RecordType,
};
use tokio::sync::broadcast;

/// The types that have a counter of their own; the last is for all others.
pub const TYPES: [&str; 10] = ["A", "AAAA", "CNAME", "NS", "PTR", "SOA", "SRV", "TXT", "ANY", "other"];
/// Upper bounds of the latency buckets, seconds; those of `CoreDNS`.
pub const BUCKETS: [f64; 16] = [
    0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048,
    4.096, 8.192,
];
/// Response codes below have a counter of their own; the last is for all others.
const N_CODES: usize = 17;
/// Upstream servers that are counted apart: their addresses change with the cluster's.
const MAX_UPSTREAMS: usize = 256;
/// Events that wait for a receiver; then it misses the oldest.
const MAX_EVENTS: usize = 1024;

/// Where an answer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum From {
    /// The cluster's objects.
    Zone,
    /// An earlier answer of an upstream server.
    Cache,
    /// An earlier answer that has ended, since upstream servers failed or were slow.
    Stale,
    /// An upstream server, or none if they all failed.
    Upstream,
}

/// One answered query.
#[derive(Clone, Debug)]
pub struct Event {
    /// When it was answered.
    pub time: SystemTime,
    /// Who asked.
    pub client: SocketAddr,
    /// The name in the question, as asked, in presentation format with the final dot.
    pub name: String,
    /// The type in the question: `A`, or `TYPE65280` for an unknown one.
    pub record_type: String,
    /// Of the response, as in the header and EDNS.
    pub code: u16,
    /// Where the answer comes from.
    pub from: From,
    /// From receipt to answer.
    pub duration: Duration,
}

/// A request's transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Datagrams.
    Udp,
    /// Streams.
    Tcp,
}

/// Counters since the start, as values.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// By protocol, whether the client's address is IPv6, and a type of [`TYPES`].
    pub requests: Vec<(Protocol, bool, &'static str, u64)>,
    /// By code; 16 stands for all from 16 on.
    pub responses: Vec<(u16, u64)>,
    /// Answers from fresh entries of the cache.
    pub cache_hits: u64,
    /// Questions for upstream servers that the cache has no fresh entry of.
    pub cache_misses: u64,
    /// Answers from entries that have ended.
    pub cache_stale: u64,
    /// Answers in the cache.
    pub cache_entries: u64,
    /// Requests to an upstream server, by the code of the response; `None`: no valid response.
    pub upstream: Vec<(SocketAddr, Option<u16>, u64)>,
    /// Latencies of responses: those in each bucket of [`BUCKETS`] (not cumulative), then those above.
    pub latency: [u64; 17],
    /// The sum of all latencies.
    pub latency_sum: Duration,
    /// Queries of sources that [`crate::Clients`] does not admit.
    pub foreign: u64,
    /// Messages that cannot be read as one query.
    pub malformed: u64,
    /// Queries that were refused with `SERVFAIL`, or connections closed, since too many were open.
    pub overload: u64,
}

pub(crate) struct Counters {
    requests: [[[AtomicU64; TYPES.len()]; 2]; 2],
    responses: [AtomicU64; N_CODES],
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) stale: AtomicU64,
    upstream: Mutex<BTreeMap<(SocketAddr, Option<u16>), u64>>,
    latency: [AtomicU64; BUCKETS.len() + 1],
    latency_nanos: AtomicU64,
    pub(crate) foreign: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) overload: AtomicU64,
    events: broadcast::Sender<Event>,
}

fn zeros<const N: usize>() -> [AtomicU64; N] {
    array::from_fn(|_| AtomicU64::new(0))
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            requests: array::from_fn(|_| array::from_fn(|_| zeros())),
            responses: zeros(),
            hits: AtomicU64::default(),
            misses: AtomicU64::default(),
            stale: AtomicU64::default(),
            upstream: Mutex::default(),
            latency: zeros(),
            latency_nanos: AtomicU64::default(),
            foreign: AtomicU64::default(),
            malformed: AtomicU64::default(),
            overload: AtomicU64::default(),
            events: broadcast::channel(MAX_EVENTS).0,
        }
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    pub(crate) fn request(&self, protocol: Protocol, client: IpAddr, query: &Query) {
        let index = match query.query_type {
            RecordType::A => 0,
            RecordType::AAAA => 1,
            RecordType::CNAME => 2,
            RecordType::NS => 3,
            RecordType::PTR => 4,
            RecordType::SOA => 5,
            RecordType::SRV => 6,
            RecordType::TXT => 7,
            RecordType::ANY => 8,
            _ => 9,
        };
        let family = usize::from(!client.to_canonical().is_ipv4());
        self.requests[protocol as usize][family][index].fetch_add(1, Relaxed);
    }

    pub(crate) fn refused(&self, code: ResponseCode) {
        if code == ResponseCode::FormErr {
            self.malformed.fetch_add(1, Relaxed);
        }
        self.code(code);
    }

    fn code(&self, code: ResponseCode) {
        self.responses[usize::from(u16::from(code)).min(N_CODES - 1)].fetch_add(1, Relaxed);
    }

    pub(crate) fn answered(
        &self,
        client: SocketAddr,
        query: &Query,
        code: ResponseCode,
        from: From,
        since: Instant,
    ) {
        self.code(code);
        let duration = since.elapsed();
        let seconds = duration.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        self.latency[bucket].fetch_add(1, Relaxed);
        self.latency_nanos.fetch_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        if self.events.receiver_count() > 0 {
            let event = Event {
                time: SystemTime::now(),
                client,
                name: query.name.to_ascii(),
                record_type: query.query_type.to_string(),
                code: code.into(),
                from,
                duration,
            };
            // Fails if the last receiver has gone meanwhile.
            let _gone = self.events.send(event);
        }
    }

    pub(crate) fn upstream(&self, server: SocketAddr, code: Option<ResponseCode>) {
        let mut upstream = self.upstream.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (server, code.map(u16::from));
        if upstream.len() < MAX_UPSTREAMS || upstream.contains_key(&key) {
            *upstream.entry(key).or_default() += 1;
        }
    }

    pub(crate) fn snapshot(&self, cache_entries: usize) -> Statistics {
        let mut requests = Vec::new();
        for (protocol, families) in [Protocol::Udp, Protocol::Tcp].into_iter().zip(&self.requests) {
            for (is_ipv6, types) in [false, true].into_iter().zip(families) {
                for (name, count) in TYPES.into_iter().zip(types) {
                    requests.push((protocol, is_ipv6, name, count.load(Relaxed)));
                }
            }
        }
        let upstream = self.upstream.lock().unwrap_or_else(PoisonError::into_inner);
        Statistics {
            requests,
            responses: (0u16..).zip(&self.responses).map(|(code, n)| (code, n.load(Relaxed))).collect(),
            cache_hits: self.hits.load(Relaxed),
            cache_misses: self.misses.load(Relaxed),
            cache_stale: self.stale.load(Relaxed),
            cache_entries: u64::try_from(cache_entries).unwrap_or(u64::MAX),
            upstream: upstream.iter().map(|((server, code), n)| (*server, *code, *n)).collect(),
            latency: array::from_fn(|index| self.latency[index].load(Relaxed)),
            latency_sum: Duration::from_nanos(self.latency_nanos.load(Relaxed)),
            foreign: self.foreign.load(Relaxed),
            malformed: self.malformed.load(Relaxed),
            overload: self.overload.load(Relaxed),
        }
    }
}
