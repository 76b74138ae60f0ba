//! Questions to upstream servers.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpStream, UdpSocket},
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use crate::{
    Authority,
    cache::{Cache, Entry, Found, Key},
    message::{Body, Local, Request, UDP_PAYLOAD, ask, framed},
    statistics::{Counters, From},
    tcp,
};

/// After so long, a client gets a stale answer if there is one (RFC 8767, 5).
const STALE_AFTER: Duration = Duration::from_millis(1800);
/// A server has so long before the next one is asked too.
const NEXT: Duration = Duration::from_millis(200);
/// The same when all have been asked once.
const AGAIN: Duration = Duration::from_secs(1);
/// How often each server is asked for one question.
const N_ROUNDS: usize = 2;
/// At most so many requests for one question.
const MAX_ATTEMPTS: usize = 6;
/// UDP has so long before TCP is tried.
const UDP_SILENCE: Duration = Duration::from_millis(1200);
/// The same for TCP.
const TCP_SILENCE: Duration = Duration::from_secs(2);
/// A question is given up after so long. Resolvers of the C library wait 5 s.
const GIVE_UP: Duration = Duration::from_millis(4500);
/// A server that failed or was slower than the next one is asked after the others for so long.
const AVOID: Duration = Duration::from_secs(10);
/// Servers of which a failure is remembered.
const MAX_AVOIDED: usize = 256;

type Outcome = Result<Arc<Entry>, ()>;

/// The next step for a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Ask the server with this index.
    Ask(usize),
    /// Wait for a response at most so long.
    Wait(Duration),
    /// All have failed.
    GiveUp,
}

/// After `n_asked` requests to the servers in turn, of which `n_open` are without an outcome, and the last
/// began `since` ago.
fn next(n_servers: usize, n_asked: usize, n_open: usize, since: Duration) -> Next {
    let is_last = n_servers == 0 || n_asked >= (n_servers * N_ROUNDS).min(MAX_ATTEMPTS);
    let delay = if n_asked < n_servers { NEXT } else { AGAIN };
    match (is_last, n_open) {
        (true, 0) => Next::GiveUp,
        (true, _) => Next::Wait(GIVE_UP),
        (false, 0) => Next::Ask(n_asked % n_servers),
        (false, _) if since >= delay => Next::Ask(n_asked % n_servers),
        (false, _) => Next::Wait(delay.saturating_sub(since)),
    }
}

/// The servers in their order, those that failed of late last.
fn order(servers: &[SocketAddr], failures: &HashMap<SocketAddr, Instant>, now: Instant) -> Vec<SocketAddr> {
    let has_failed = |server: &SocketAddr| {
        failures.get(server).is_some_and(|at| now.saturating_duration_since(*at) < AVOID)
    };
    let mut ordered = servers.to_vec();
    ordered.sort_by_key(has_failed);
    ordered
}

pub(crate) struct Forwarder {
    cache: Mutex<Cache>,
    flights: Mutex<HashMap<Key, watch::Receiver<Option<Outcome>>>>,
    failures: Mutex<HashMap<SocketAddr, Instant>>,
    upstreams: watch::Receiver<Vec<SocketAddr>>,
    in_flight: Arc<Semaphore>,
    pub(crate) counters: Arc<Counters>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the cache alone says.
pub(crate) enum Cached {
    Answer(Body, From),
    /// Besides the answer, the question is to be asked anew.
    Due(Body, From),
    /// No answer for now, but perhaps a stale one for when upstream servers fail or are slow.
    Miss(Option<Arc<Entry>>),
}

impl Forwarder {
    pub(crate) fn new(
        upstreams: watch::Receiver<Vec<SocketAddr>>,
        options: &crate::Options,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            cache: Mutex::new(Cache::new(options.max_cache_entries, options.max_cache_octets)),
            flights: Mutex::default(),
            failures: Mutex::default(),
            upstreams,
            in_flight: Arc::new(Semaphore::new(options.max_in_flight)),
            counters,
        }
    }

    pub(crate) fn cache_entries(&self) -> usize {
        lock(&self.cache).len()
    }

    /// The answer to `request` without waiting, after the zone said `local`.
    pub(crate) fn cached(&self, request: &Request, body: &Body, query: &Query, now: Instant) -> Cached {
        let key = Key::new(query, request.is_dnssec_ok, request.is_checking_disabled);
        let found = lock(&self.cache).find(&key, now);
        match found {
            Found::Fresh { entry, is_due } => {
                self.counters.hits.fetch_add(1, Relaxed);
                let body = joined(body.clone(), entry.body(query, now));
                if is_due { Cached::Due(body, From::Cache) } else { Cached::Answer(body, From::Cache) }
            }
            Found::Stale { entry, has_failed: true } => {
                self.counters.stale.fetch_add(1, Relaxed);
                Cached::Answer(joined(body.clone(), entry.body(query, now)), From::Stale)
            }
            Found::Stale { entry, .. } => Cached::Miss(Some(entry)),
            Found::Nothing => Cached::Miss(None),
        }
    }

    /// The answer to `request`, from upstream servers if need be.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        request: &Request,
        authority: &dyn Authority,
    ) -> (Body, From) {
        let (mut body, query) = match ask(authority, &request.query) {
            Local::Done(body) => return (body, From::Zone),
            Local::Upstream(body, query) => (body, query),
        };
        let stale = match self.cached(request, &body, &query, Instant::now()) {
            Cached::Answer(body, from) => return (body, from),
            Cached::Due(body, from) => {
                self.refresh(request, &query);
                return (body, from);
            }
            Cached::Miss(stale) => stale,
        };
        self.counters.misses.fetch_add(1, Relaxed);
        let key = Key::new(&query, request.is_dnssec_ok, request.is_checking_disabled);
        let flight = self.fly(&key, &query);
        let outcome = match (&stale, flight) {
            (_, None) => Err(()),
            (Some(_), Some(flight)) => timeout(STALE_AFTER, landed(flight)).await.unwrap_or(Err(())),
            (None, Some(flight)) => landed(flight).await,
        };
        let is_good = |entry: &Arc<Entry>| !entry.has_failed();
        let (entry, from) = match (outcome, stale) {
            (Ok(entry), None) => (entry, From::Upstream),
            (Ok(entry), Some(_)) if is_good(&entry) => (entry, From::Upstream),
            (_, Some(entry)) => {
                self.counters.stale.fetch_add(1, Relaxed);
                (entry, From::Stale)
            }
            (Err(()), None) => {
                body = Body { code: ResponseCode::ServFail, ..Body::default() };
                return (body, From::Upstream);
            }
        };
        (joined(body, entry.body(&query, Instant::now())), from)
    }

    /// Asks upstream servers anew; the answer goes to the cache.
    pub(crate) fn refresh(self: &Arc<Self>, request: &Request, query: &Query) {
        let key = Key::new(query, request.is_dnssec_ok, request.is_checking_disabled);
        let _flight = self.fly(&key, query);
    }

    /// The request in flight for this question, or a new one; `None` if there are too many.
    fn fly(self: &Arc<Self>, key: &Key, query: &Query) -> Option<watch::Receiver<Option<Outcome>>> {
        let mut flights = lock(&self.flights);
        if let Some(flight) = flights.get(key) {
            return Some(flight.clone());
        }
        let Ok(permit) = self.in_flight.clone().try_acquire_owned() else {
            self.counters.overload.fetch_add(1, Relaxed);
            return None;
        };
        let (sender, receiver) = watch::channel(None);
        flights.insert(key.clone(), receiver.clone());
        let (forwarder, key, query) = (self.clone(), key.clone(), query.clone());
        tokio::spawn(async move {
            let outcome = timeout(GIVE_UP, forwarder.exchange(&key, &query)).await.unwrap_or(Err(()));
            {
                let mut cache = lock(&forwarder.cache);
                match &outcome {
                    Ok(entry) if !entry.has_failed() => cache.insert(key.clone(), entry.clone()),
                    _ => cache.failed(&key, Instant::now()),
                }
            }
            lock(&forwarder.flights).remove(&key);
            sender.send_replace(Some(outcome));
            drop(permit);
        });
        Some(receiver)
    }

    /// Asks the servers in turn. A failure that a server reported is the outcome if none knows better.
    async fn exchange(&self, key: &Key, query: &Query) -> Outcome {
        let servers = order(&self.upstreams.borrow().clone(), &lock(&self.failures), Instant::now());
        let mut open = FuturesUnordered::new();
        let mut silent = Vec::new();
        let (mut n_asked, mut asked_at, mut reported) = (0, Instant::now(), None);
        loop {
            let wait = match next(servers.len(), n_asked, open.len(), asked_at.elapsed()) {
                Next::GiveUp => return reported.ok_or(()),
                Next::Ask(index) => {
                    if let Some(&server) = servers.get(index) {
                        open.push(async move { (server, attempt(server, key, query).await) });
                        silent.push(server);
                    }
                    n_asked += 1;
                    asked_at = Instant::now();
                    continue;
                }
                Next::Wait(wait) => wait,
            };
            let (server, outcome) = tokio::select! {
                Some(outcome) = open.next() => outcome,
                () = sleep(wait) => continue,
            };
            if let Some(at) = silent.iter().position(|asked| *asked == server) {
                silent.swap_remove(at);
            }
            match outcome {
                Ok((message, n_octets)) => {
                    self.counters.upstream(server, Some(message.metadata.response_code));
                    lock(&self.failures).remove(&server);
                    let entry = Arc::new(Entry::new(message, n_octets, Instant::now()));
                    if entry.has_failed() {
                        reported = Some(entry);
                        continue;
                    }
                    for slower in silent.into_iter().filter(|slower| *slower != server) {
                        self.has_failed(slower);
                    }
                    return Ok(entry);
                }
                Err(error) => {
                    tracing::debug!(%server, %error, "upstream server failed");
                    self.has_failed(server);
                }
            }
        }
    }

    fn has_failed(&self, server: SocketAddr) {
        self.counters.upstream(server, None);
        let mut failures = lock(&self.failures);
        if failures.len() >= MAX_AVOIDED {
            failures.clear();
        }
        failures.insert(server, Instant::now());
    }
}

/// One request, over TCP if UDP is silent or not enough.
async fn attempt(server: SocketAddr, key: &Key, query: &Query) -> io::Result<(Message, usize)> {
    match timeout(UDP_SILENCE, over_udp(server, key, query)).await {
        Ok(Ok((message, _))) if message.metadata.truncation => {}
        Ok(outcome) => return outcome,
        Err(_silent) => {}
    }
    timeout(TCP_SILENCE, over_tcp(server, key, query)).await?
}

async fn landed(mut flight: watch::Receiver<Option<Outcome>>) -> Outcome {
    match flight.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone().unwrap_or(Err(())),
        Err(_gone) => Err(()),
    }
}

/// The zone's records before those from upstream.
fn joined(mut zone: Body, upstream: Body) -> Body {
    if zone.answers.is_empty() {
        return upstream;
    }
    zone.code = upstream.code;
    zone.answers.extend(upstream.answers);
    zone.authorities.extend(upstream.authorities);
    zone.additionals.extend(upstream.additionals);
    zone
}

fn request(key: &Key, query: &Query) -> io::Result<(Message, Vec<u8>)> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = key.is_checking_disabled();
    let mut query = query.clone();
    // More that a forger has to guess (draft-vixie-dnsext-dns0x20).
    query.name.randomize_label_case();
    message.queries.push(query);
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD).set_version(0).set_dnssec_ok(key.is_dnssec_ok());
    message.edns = Some(edns);
    let octets = message.to_vec().map_err(io::Error::other)?;
    Ok((message, octets))
}

/// Whether `response` answers `request`. `in_case`: with the letters' case.
fn answers(request: &Message, response: &Message, in_case: bool) -> bool {
    let ([asked], [answered]) = (&request.queries[..], &response.queries[..]) else { return false };
    response.metadata.id == request.metadata.id
        && response.metadata.message_type == MessageType::Response
        && response.metadata.op_code == OpCode::Query
        && asked.query_type == answered.query_type
        && asked.query_class == answered.query_class
        && if in_case { asked.name.eq_case(&answered.name) } else { asked.name == answered.name }
}

/// Waits until a valid response arrives: what a forger sends changes nothing.
async fn over_udp(server: SocketAddr, key: &Key, query: &Query) -> io::Result<(Message, usize)> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // The kernel draws the port; a connected socket takes only the server's datagrams.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let (message, octets) = request(key, query)?;
    socket.send(&octets).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let n_octets = socket.recv(&mut buffer).await?;
        let response = buffer.get(..n_octets).and_then(|octets| Message::from_vec(octets).ok());
        if let Some(response) = response.filter(|response| answers(&message, response, true)) {
            return Ok((response, n_octets));
        }
    }
}

async fn over_tcp(server: SocketAddr, key: &Key, query: &Query) -> io::Result<(Message, usize)> {
    let mut stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let (message, octets) = request(key, query)?;
    let framed = framed(&octets).ok_or(io::ErrorKind::InvalidData)?;
    stream.write_all(&framed).await?;
    let buffer = tcp::message(&mut stream).await?;
    let response = Message::from_vec(&buffer).map_err(io::Error::other)?;
    // Not in case: a forger cannot write into the stream, and some servers do not keep it.
    if !answers(&message, &response, false) {
        return Err(io::Error::other("the response is for another question"));
    }
    Ok((response, buffer.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_asked_in_turn() {
        let ms = Duration::from_millis;
        let cases = [
            // servers, asked, open, since the last
            (0, 0, 0, ms(0), Next::GiveUp),
            (2, 0, 0, ms(0), Next::Ask(0)),
            (2, 1, 1, ms(50), Next::Wait(ms(150))),
            (2, 1, 1, ms(200), Next::Ask(1)),
            // A failure leads to the next at once.
            (2, 1, 0, ms(1), Next::Ask(1)),
            (2, 2, 2, ms(200), Next::Wait(ms(800))),
            (2, 2, 1, ms(1000), Next::Ask(0)),
            (2, 4, 1, ms(9000), Next::Wait(GIVE_UP)),
            (2, 4, 0, ms(0), Next::GiveUp),
            (1, 1, 1, ms(300), Next::Wait(ms(700))),
            (100, MAX_ATTEMPTS, 0, ms(0), Next::GiveUp),
        ];
        for (n_servers, n_asked, n_open, since, expected) in cases {
            assert_eq!(next(n_servers, n_asked, n_open, since), expected, "{n_servers} {n_asked} {n_open}");
        }
    }

    #[test]
    fn servers_that_failed_of_late_are_last() {
        let [a, b, c] = [1, 2, 3].map(|last| SocketAddr::from(([192, 0, 2, last], 53)));
        let start = Instant::now();
        let failures = HashMap::from([(a, start)]);
        assert_eq!(order(&[a, b, c], &failures, start), [b, c, a]);
        assert_eq!(order(&[a, b, c], &failures, start + AVOID), [a, b, c]);
    }
}
