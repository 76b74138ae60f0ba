//! On loopback sockets, with upstream servers of all kinds.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
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
        interface_index == 1 && source == IpAddr::V4(Ipv4Addr::LOCALHOST)
    }
}

struct Bed {
    server: Server,
    address: SocketAddr,
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
        let _guard = runtime.enter();
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().unwrap();
        let (authority, zone) = watch::channel(Arc::new(Zone) as Arc<dyn Authority>);
        let (sender, upstreams) = watch::channel(upstreams);
        let server = Server::start(vec![listener], zone, clients, upstreams, options, on_alive).unwrap();
        Self {
            server,
            address,
            _authority: authority,
            _upstreams: sender,
            runtime: {
                drop(_guard);
                runtime
            },
        }
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
