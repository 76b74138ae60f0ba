//! On loopback sockets, with upstream servers of all kinds.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr, TcpStream},
    sync::Mutex,
};

use hickory_proto::{
    op::{Edns, Message, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, RecordType as Type, rdata::A},
};
use lb_core::names::{Record, RecordData, RecordType, Records, Soa};
use proptest::prelude::*;

use super::*;

/// Of `zone.test`: `many` has 100 addresses, `out` is an alias of `www.outside.test`, `in` of `many`.
struct Zone;

fn soa() -> Record {
    let soa = Soa {
        mname: "ns.zone.test".into(),
        rname: "hostmaster.zone.test".into(),
        serial: 1,
        refresh: 1,
        retry: 1,
        expire: 1,
        minimum: 5,
    };
    Record { owner: Some("zone.test".into()), ttl: 5, data: RecordData::Soa(soa) }
}

impl Authority for Zone {
    fn answer(&self, question: &Question<'_>) -> Answer {
        let labels: Vec<String> =
            question.labels.iter().map(|label| String::from_utf8_lossy(label).to_lowercase()).collect();
        let own = |data| Record { owner: None, ttl: 5, data };
        let name = labels.join(".");
        let alias = |target: &str| {
            let answers = vec![own(RecordData::Cname(target.into()))];
            Answer::Records(Records { answers, additional: Vec::new(), chase: Some(target.into()) })
        };
        match (name.as_str(), question.record_type) {
            ("many.zone.test", RecordType::A) => {
                let address = |last| own(RecordData::A([192, 0, 2, last].into()));
                Answer::Records(Records { answers: (0..100).map(address).collect(), ..Records::default() })
            }
            ("one.zone.test", RecordType::A) => {
                let answers = vec![own(RecordData::A([192, 0, 2, 1].into()))];
                Answer::Records(Records { answers, ..Records::default() })
            }
            ("out.zone.test", _) => alias("www.outside.test"),
            ("in.zone.test", _) => alias("one.zone.test"),
            ("loop.zone.test", _) => alias("loop.zone.test"),
            ("one.zone.test" | "many.zone.test", _) => Answer::NoData { soa: soa() },
            (name, _) if name.ends_with("zone.test") => Answer::NxDomain { soa: soa() },
            _ => Answer::Forward,
        }
    }
}

struct All;

impl Clients for All {
    fn admits(&self, _: IpAddr, _: u32) -> bool {
        true
    }
}

/// Those whose datagrams come in by the loopback interface, but not its second address.
struct Loopback;

impl Clients for Loopback {
    fn admits(&self, source: IpAddr, interface_index: u32) -> bool {
        interface_index == 1
            && [Ipv4Addr::LOCALHOST.into(), IpAddr::from(Ipv6Addr::LOCALHOST)].contains(&source)
    }
}

struct Bed {
    server: Server,
    address: SocketAddr,
    address6: SocketAddr,
    _authority: watch::Sender<Arc<dyn Authority>>,
    _upstreams: watch::Sender<Vec<SocketAddr>>,
    runtime: tokio::runtime::Runtime,
}

impl Bed {
    fn new(upstreams: Vec<SocketAddr>) -> Self {
        Self::with(upstreams, Options::default(), Arc::new(All), Box::new(|| {}))
    }

    fn with(
        upstreams: Vec<SocketAddr>,
        options: Options,
        clients: Arc<dyn Clients>,
        on_alive: Box<dyn FnMut() + Send>,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let guard = runtime.enter();
        let listeners =
            ["127.0.0.1:0", "[::1]:0"].map(|at| on_a_free_port(|| Listener::bind(at.parse().unwrap())));
        let [address, address6] = [0, 1].map(|index: usize| listeners[index].address().unwrap());
        let (authority, zone) = watch::channel(Arc::new(Zone) as Arc<dyn Authority>);
        let (sender, upstreams) = watch::channel(upstreams);
        let server = Server::start(listeners.into(), zone, clients, upstreams, options, on_alive).unwrap();
        drop(guard);
        Self { server, address, address6, _authority: authority, _upstreams: sender, runtime }
    }

    fn client(&self) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    }

    fn udp(&self, query: &[u8]) -> Vec<u8> {
        let socket = self.client();
        socket.send(query).unwrap();
        let mut buffer = vec![0; 65_536];
        let n_octets = socket.recv(&mut buffer).unwrap();
        buffer.truncate(n_octets);
        buffer
    }

    fn ask(&self, name: &str) -> Message {
        Message::from_vec(&self.udp(&query(name, Type::A, None))).unwrap()
    }
}

fn query(name: &str, record_type: Type, payload: Option<u16>) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), record_type));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.edns = Some(edns);
    }
    message.to_vec().unwrap()
}

fn framed(octets: &[u8]) -> Vec<u8> {
    let mut framed = u16::try_from(octets.len()).unwrap().to_be_bytes().to_vec();
    framed.extend_from_slice(octets);
    framed
}

fn read_framed(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut octets = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut octets).unwrap();
    octets
}

#[test]
fn a_zone_is_served_over_both_protocols_in_the_case_asked() {
    let bed = Bed::new(Vec::new());
    let answer = bed.ask("oNe.ZONE.test.");
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    assert_eq!(answer.answers[0].name.to_ascii(), "oNe.ZONE.test.");
    let mut stream = TcpStream::connect(bed.address).unwrap();
    let both = [query("many.zone.test.", Type::A, None), query("none.zone.test.", Type::A, None)];
    stream.write_all(&both.iter().flat_map(|query| framed(query)).collect::<Vec<_>>()).unwrap();
    let answers = [read_framed(&mut stream), read_framed(&mut stream)];
    let mut codes: Vec<_> = answers
        .iter()
        .map(|octets| Message::from_vec(octets).unwrap())
        .map(|message| (message.metadata.response_code, message.answers.len(), message.authorities.len()))
        .collect();
    codes.sort_by_key(|(_, n_answers, _)| *n_answers);
    assert_eq!(codes, [(ResponseCode::NXDomain, 0, 1), (ResponseCode::NoError, 100, 0)]);
}
/// What a fake upstream server does with a query.
#[derive(Clone, Copy)]
enum Way {
    /// Answers with 198.51.100.1.
    Good,
    /// The same with a TTL of 1 s.
    Brief,
    /// Never answers over UDP, and takes no connection.
    BlackHole,
    /// Answers over UDP with `TC` and over TCP in full.
    Truncating,
    /// Sends wrong identifiers, names, and cases first, each with another address.
    Lying,
    /// Answers for names with `good` in them only.
    Partly,
    /// Says `SERVFAIL`.
    Failing,
    /// Says that the name does not exist.
    Absent,
}

struct Upstream {
    address: SocketAddr,
    /// Names asked for, in the case asked.
    asked: Arc<Mutex<Vec<Message>>>,
    way: Arc<Mutex<Way>>,
}

fn answer(query: &Message, last: u8) -> Message {
    let mut message = Message::response(query.metadata.id, OpCode::Query);
    message.queries.clone_from(&query.queries);
    message.metadata.recursion_available = true;
    let data = RData::A(A([198, 51, 100, last].into()));
    message.answers.push(hickory_proto::rr::Record::from_rdata(query.queries[0].name.clone(), 60, data));
    message
}

/// The kernel gives a port that is free for UDP; a connection of another test may have it for TCP.
fn on_a_free_port<T>(mut bind: impl FnMut() -> std::io::Result<T>) -> T {
    (0..100).find_map(|_| bind().ok()).expect("a port that is free for both")
}

impl Upstream {
    /// Its threads end with the test's process: they are bound to sockets that only it knows.
    fn new(way: Way) -> Self {
        let (socket, listener) = on_a_free_port(|| {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            let listener = std::net::TcpListener::bind(socket.local_addr()?)?;
            Ok((socket, listener))
        });
        let address = socket.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let way = Arc::new(Mutex::new(way));
        let upstream = Self { address, asked: asked.clone(), way: way.clone() };
        if matches!(*way.lock().unwrap(), Way::Truncating) {
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let query = Message::from_vec(&read_framed(&mut stream)).unwrap();
                    stream.write_all(&framed(&answer(&query, 2).to_vec().unwrap())).unwrap();
                }
            });
        }
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let (n_octets, client) = socket.recv_from(&mut buffer).unwrap();
                let query = Message::from_vec(&buffer[..n_octets]).unwrap();
                asked.lock().unwrap().push(query.clone());
                let send = |message: &Message| {
                    let _gone = socket.send_to(&message.to_vec().unwrap(), client);
                };
                let good = answer(&query, 1);
                let way = *way.lock().unwrap();
                match way {
                    Way::Good => send(&good),
                    Way::Brief => {
                        let mut brief = good.clone();
                        brief.answers[0].ttl = 1;
                        send(&brief);
                    }
                    Way::Partly => {
                        if query.queries[0].name.to_ascii().to_lowercase().contains("good") {
                            send(&good);
                        }
                    }
                    Way::BlackHole => {}
                    Way::Truncating => send(&good.truncate()),
                    Way::Failing | Way::Absent => {
                        let mut bad = good.clone();
                        bad.answers.clear();
                        bad.metadata.response_code = match way {
                            Way::Failing => ResponseCode::ServFail,
                            _ => ResponseCode::NXDomain,
                        };
                        send(&bad);
                    }
                    Way::Lying => {
                        let mut lie = answer(&query, 66);
                        lie.metadata.id ^= 1;
                        send(&lie);
                        let mut lie = answer(&query, 66);
                        lie.queries[0].name = Name::from_ascii("www.other.test.").unwrap();
                        send(&lie);
                        let mut lie = answer(&query, 66);
                        let lower = lie.queries[0].name.to_lowercase();
                        // A forger without the letters' case; equal by chance for one name in many.
                        if !lower.eq_case(&query.queries[0].name) {
                            lie.queries[0].name = lower;
                            send(&lie);
                        }
                        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
                        let _gone = other.send_to(&answer(&query, 66).to_vec().unwrap(), client);
                        send(&good);
                    }
                }
            }
        });
        upstream
    }

    fn n_asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn addresses(message: &Message) -> Vec<String> {
    let is_address = |record: &&hickory_proto::rr::Record| record.record_type() == Type::A;
    message.answers.iter().filter(is_address).map(|record| record.data.to_string()).collect()
}

#[test]
fn a_response_over_udp_is_never_longer_than_asked() {
    let bed = Bed::new(Vec::new());
    for (payload, limit, n_answers) in [
        (None, 512, 0),
        (Some(0), 512, 0),
        (Some(512), 512, 0),
        (Some(1232), 1232, 0),
        (Some(65_535), 1232, 0),
    ] {
        let octets = bed.udp(&query("many.zone.test.", Type::A, payload));
        let message = Message::from_vec(&octets).unwrap();
        assert!(octets.len() <= limit, "{payload:?}: {}", octets.len());
        assert!(message.metadata.truncation);
        assert_eq!((message.answers.len(), message.edns.is_some()), (n_answers, payload.is_some()));
    }
}

#[test]
fn aliases_end_in_the_zone_and_upstream_and_loops_end() {
    let upstream = Upstream::new(Way::Good);
    let bed = Bed::new(vec![upstream.address]);
    assert_eq!(addresses(&bed.ask("in.zone.test.")), ["192.0.2.1"]);
    let out = bed.ask("out.zone.test.");
    let names: Vec<String> = out.answers.iter().map(|record| record.name.to_ascii().to_lowercase()).collect();
    assert_eq!(names, ["out.zone.test.", "www.outside.test."]);
    assert_eq!(addresses(&out), ["198.51.100.1"]);
    assert_eq!(bed.ask("loop.zone.test.").metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn an_answer_from_upstream_is_asked_for_once_and_keeps_the_askers_case() {
    let upstream = Upstream::new(Way::Good);
    let bed = Bed::new(vec![upstream.address]);
    for name in ["wWw.Outside.test.", "www.outside.TEST."] {
        let answer = bed.ask(name);
        assert_eq!(answer.queries[0].name.to_ascii(), name);
        assert_eq!(answer.answers[0].name.to_ascii(), name);
        assert_eq!(addresses(&answer), ["198.51.100.1"]);
    }
    assert_eq!(upstream.n_asked(), 1);
    let statistics = bed.server.statistics();
    assert_eq!((statistics.cache_hits, statistics.cache_misses, statistics.cache_entries), (1, 1, 1));
    assert_eq!(statistics.upstream, [(upstream.address, Some(0), 1)]);
}

#[test]
fn identical_questions_in_flight_are_one() {
    let upstream = Upstream::new(Way::BlackHole);
    let bed = Bed::new(vec![upstream.address]);
    let clients: Vec<UdpSocket> = (0..50).map(|_| bed.client()).collect();
    for client in &clients {
        client.send(&query("www.outside.test.", Type::A, None)).unwrap();
    }
    let mut buffer = [0; 512];
    for client in &clients {
        let n_octets = client.recv(&mut buffer).unwrap();
        let answer = Message::from_vec(&buffer[..n_octets]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
    assert!(upstream.n_asked() <= 2, "{}", upstream.n_asked());
}

#[test]
fn lies_change_nothing() {
    let upstream = Upstream::new(Way::Lying);
    let bed = Bed::new(vec![upstream.address]);
    for number in 0..20 {
        let name = format!("name{number}.outside.test.");
        assert_eq!(addresses(&bed.ask(&name)), ["198.51.100.1"], "{name}");
    }
    let asked = upstream.asked.lock().unwrap();
    let ids: HashSet<u16> = asked.iter().map(|message| message.metadata.id).collect();
    assert!(ids.len() > 15, "{ids:?}");
    assert!(asked.iter().any(|message| {
        message.queries[0].name.to_ascii() != message.queries[0].name.to_lowercase().to_ascii()
    }));
}

#[test]
fn other_servers_and_tcp_step_in() {
    let (silent, failing) = (Upstream::new(Way::BlackHole), Upstream::new(Way::Failing));
    let (truncating, good) = (Upstream::new(Way::Truncating), Upstream::new(Way::Good));
    let bed = Bed::new(vec![silent.address, failing.address, good.address]);
    assert_eq!(addresses(&bed.ask("www.outside.test.")), ["198.51.100.1"]);
    assert!(silent.n_asked() > 0 && failing.n_asked() > 0);
    let bed = Bed::new(vec![truncating.address]);
    assert_eq!(addresses(&bed.ask("www.outside.test.")), ["198.51.100.2"]);
    let bed = Bed::new(vec![failing.address]);
    assert_eq!(bed.ask("www.outside.test.").metadata.response_code, ResponseCode::ServFail);
    let bed = Bed::new(Vec::new());
    assert_eq!(bed.ask("www.outside.test.").metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn a_silent_server_delays_one_question() {
    let (silent, good) = (Upstream::new(Way::BlackHole), Upstream::new(Way::Good));
    let bed = Bed::new(vec![silent.address, good.address]);
    for number in 0..20 {
        assert_eq!(addresses(&bed.ask(&format!("n{number}.outside.test."))), ["198.51.100.1"]);
    }
    assert_eq!(silent.n_asked(), 1);
    let upstream = bed.server.statistics().upstream;
    assert!(upstream.contains(&(silent.address, None, 1)), "{upstream:?}");
}

#[test]
fn a_stale_answer_is_better_than_none() {
    for failure in [Way::BlackHole, Way::Failing] {
        let upstream = Upstream::new(Way::Brief);
        let bed = Bed::new(vec![upstream.address]);
        let asked = "www.outside.test.";
        assert_eq!(addresses(&bed.ask(asked)), ["198.51.100.1"]);
        *upstream.way.lock().unwrap() = failure;
        // Fresh until its TTL ends, then stale.
        let stale = (0..100).map(|_| bed.ask(asked)).find(|answer| {
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(addresses(answer), ["198.51.100.1"]);
            answer.answers[0].ttl == 30
        });
        assert!(stale.is_some());
        assert!(bed.server.statistics().cache_stale > 0);
    }
}

#[test]
fn one_client_leaves_requests_upstream_to_others() {
    let upstream = Upstream::new(Way::Partly);
    let options = Options { max_in_flight: 100, ..Options::default() };
    let bed = Bed::with(vec![upstream.address], options, Arc::new(All), Box::new(|| {}));
    let greedy = bed.client();
    for number in 0..100 {
        greedy.send(&query(&format!("n{number}.outside.test."), Type::A, None)).unwrap();
    }
    // Those that are too many are refused at once.
    let mut buffer = [0; 512];
    for _ in 0..75 {
        let n_octets = greedy.recv(&mut buffer).unwrap();
        let answer = Message::from_vec(&buffer[..n_octets]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
    let other = UdpSocket::bind("127.0.0.2:0").unwrap();
    other.connect(bed.address).unwrap();
    other.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    other.send(&query("good.outside.test.", Type::A, None)).unwrap();
    let n_octets = other.recv(&mut buffer).unwrap();
    assert_eq!(addresses(&Message::from_vec(&buffer[..n_octets]).unwrap()), ["198.51.100.1"]);
    assert!(bed.server.statistics().overload >= 75);
}

#[test]
fn one_client_has_not_all_connections() {
    let bed = Bed::new(Vec::new());
    let mut streams: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(bed.address).unwrap()).collect();
    let asked = framed(&query("one.zone.test.", Type::A, None));
    let mut n_answered = 0;
    for stream in &mut streams {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _reset = stream.write_all(&asked);
        n_answered += usize::from(stream.read_exact(&mut [0; 2]).is_ok());
    }
    assert_eq!(n_answered, 32);
}

#[test]
fn an_absence_without_the_authoritys_record_is_not_kept() {
    let upstream = Upstream::new(Way::Absent);
    let bed = Bed::new(vec![upstream.address]);
    assert_eq!(bed.ask("www.outside.test.").metadata.response_code, ResponseCode::NXDomain);
    *upstream.way.lock().unwrap() = Way::Good;
    assert_eq!(addresses(&bed.ask("www.outside.test.")), ["198.51.100.1"]);
}

#[test]
fn only_admitted_clients_are_answered() {
    let bed = Bed::with(Vec::new(), Options::default(), Arc::new(Loopback), Box::new(|| {}));
    let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
    stranger.connect(bed.address).unwrap();
    stranger.send(&query("one.zone.test.", Type::A, None)).unwrap();
    // Answered after the other, so the other would have been answered before.
    assert_eq!(addresses(&bed.ask("one.zone.test.")), ["192.0.2.1"]);
    stranger.set_nonblocking(true).unwrap();
    assert_eq!(stranger.recv(&mut [0; 512]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(bed.server.statistics().foreign, 1);
    let client6 = UdpSocket::bind("[::1]:0").unwrap();
    client6.connect(bed.address6).unwrap();
    client6.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client6.send(&query("one.zone.test.", Type::A, None)).unwrap();
    client6.recv(&mut [0; 512]).unwrap();
    assert!(bed.server.statistics().requests.contains(&(Protocol::Udp, true, "A", 1)));
    // Its interface is not known, so `Loopback` does not admit it.
    let mut stream = TcpStream::connect(bed.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(stream.read(&mut [0; 2]).unwrap(), 0);
}

#[test]
fn events_and_signs_of_life() {
    let (alive, lives) = std::sync::mpsc::sync_channel(1);
    let on_alive = Box::new(move || {
        let _full = alive.try_send(());
    });
    let bed = Bed::with(Vec::new(), Options::default(), Arc::new(All), on_alive);
    for _ in 0..3 {
        lives.recv_timeout(Duration::from_secs(10)).unwrap();
    }
    let mut events = bed.server.subscribe();
    bed.ask("one.zone.test.");
    let event = bed.runtime.block_on(events.recv()).unwrap();
    assert_eq!((event.name.as_str(), event.record_type.as_str(), event.code), ("one.zone.test.", "A", 0));
    assert_eq!(event.from, From::Zone);
    let Bed { server, address, .. } = bed;
    drop(server);
    UdpSocket::bind(address).unwrap();
}

#[test]
fn what_is_no_query_gets_what_the_rfcs_say() {
    let good = query("one.zone.test.", Type::A, None);
    let code = |octets: &[u8]| {
        reply(octets, false, &Zone).map(|octets| Message::from_vec(&octets).unwrap().metadata.response_code)
    };
    assert_eq!(code(&good), Some(ResponseCode::NoError));
    let with = |at: usize, value: u8| {
        let mut octets = good.clone();
        octets[at] = value;
        code(&octets)
    };
    assert_eq!(with(2, 0x80), None);
    assert_eq!(with(2, 2 << 3), Some(ResponseCode::NotImp));
    assert_eq!(with(5, 2), Some(ResponseCode::FormErr));
    assert_eq!(with(5, 0), Some(ResponseCode::FormErr));
    // A label longer than the message, and a pointer to itself.
    assert_eq!(with(12, 0x3f), Some(ResponseCode::FormErr));
    let mut pointer = good[..12].to_vec();
    pointer.extend([0xc0, 12, 0, 1, 0, 1]);
    assert_eq!(code(&pointer), Some(ResponseCode::FormErr));
    assert_eq!(code(&good[..11]), None);
    assert_eq!(code(&good[..20]), Some(ResponseCode::FormErr));
    let mut chaos = Message::query();
    let mut version = Query::query(Name::from_ascii("version.bind.").unwrap(), Type::TXT);
    version.query_class = DNSClass::CH;
    chaos.queries.push(version);
    assert_eq!(code(&chaos.to_vec().unwrap()), Some(ResponseCode::Refused));
    let mut later = Message::from_vec(&query("one.zone.test.", Type::A, Some(1232))).unwrap();
    later.edns.as_mut().unwrap().set_version(1);
    // `BADSIG` has the same number.
    assert_eq!(code(&later.to_vec().unwrap()).map(u16::from), Some(ResponseCode::BADVERS.into()));
}

#[test]
fn a_connection_takes_the_longest_message_and_ends_at_nonsense() {
    let bed = Bed::new(Vec::new());
    let mut stream = TcpStream::connect(bed.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut long = query("one.zone.test.", Type::A, None);
    long.resize(65_535, 0);
    stream.write_all(&framed(&long)).unwrap();
    let _whatever = Message::from_vec(&read_framed(&mut stream)).unwrap();
    stream.write_all(&framed(&query("one.zone.test.", Type::A, None))).unwrap();
    assert_eq!(addresses(&Message::from_vec(&read_framed(&mut stream)).unwrap()), ["192.0.2.1"]);
    stream.write_all(&framed(&[0; 3])).unwrap();
    assert_eq!(stream.read(&mut [0; 2]).unwrap(), 0);
}

#[test]
fn a_flood_of_names_leaves_bounds_and_the_zone_alone() {
    let upstream = Upstream::new(Way::Good);
    let options = Options { max_cache_entries: 1000, max_in_flight: 100, ..Options::default() };
    let bed = Bed::with(vec![upstream.address], options, Arc::new(All), Box::new(|| {}));
    let flood = bed.client();
    flood.set_nonblocking(true).unwrap();
    let mut buffer = [0; 512];
    for number in 0..100_000 {
        let name = format!("n{number}.outside.test.");
        let _full = flood.send(&query(&name, Type::A, None));
        while flood.recv(&mut buffer).is_ok() {}
        if number % 10_000 == 0 {
            let client = bed.client();
            client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            // The socket's queue may be full of the flood at first.
            let is_answered = (0..10).any(|_| {
                client.send(&query("one.zone.test.", Type::A, None)).unwrap();
                client.recv(&mut buffer).is_ok()
            });
            assert!(is_answered, "{number}");
        }
    }
    let statistics = bed.server.statistics();
    assert!((1..=1000).contains(&statistics.cache_entries), "{statistics:?}");
}

proptest! {
    #[test]
    fn any_octets_are_answered_within_the_limit(octets in proptest::collection::vec(any::<u8>(), 0..600)) {
        if let Some(reply) = reply(&octets, false, &Zone) {
            prop_assert!(reply.len() <= 1232);
            prop_assert_eq!(&reply[..2], &octets[..2]);
            prop_assert!(Message::from_vec(&reply).is_ok());
        }
    }

    #[test]
    fn a_query_with_any_change_is_answered_within_the_limit(
        changes in proptest::collection::vec((0usize..60, any::<u8>()), 0..6),
        payload in proptest::option::of(any::<u16>()),
    ) {
        let mut octets = query("many.zone.test.", Type::A, payload);
        for (at, value) in changes {
            if let Some(octet) = octets.get_mut(at) {
                *octet = value;
            }
        }
        if let Some(reply) = reply(&octets, false, &Zone) {
            prop_assert!(reply.len() <= 1232);
            prop_assert!(Message::from_vec(&reply).is_ok());
        }
    }
}
