//! Messages: a query from octets, a response to octets. No socket and no time.

use std::sync::Arc;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT},
    },
};
use lb_core::names::{self, Answer, Question};

use crate::Authority;

/// What fits without fragments on any path (DNS flag day 2020), octets.
pub(crate) const UDP_PAYLOAD: u16 = 1232;
/// Without EDNS (RFC 1035, 4.2.1), octets.
const PLAIN_PAYLOAD: u16 = 512;
/// Aliases that are followed for one question.
const MAX_CHASE: usize = 8;
const HEADER: usize = 12;

/// A query that deserves an answer from the zone or from upstream.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "flags of the message, independent of each other")]
pub(crate) struct Request {
    pub(crate) id: u16,
    pub(crate) query: Query,
    pub(crate) is_recursion_desired: bool,
    pub(crate) is_checking_disabled: bool,
    pub(crate) has_edns: bool,
    pub(crate) is_dnssec_ok: bool,
    /// The response has at most so many octets.
    pub(crate) limit: u16,
}

/// What to do with octets that arrived.
pub(crate) enum Input {
    /// No response: too short, or a response itself.
    Drop,
    /// A response that no zone is asked for.
    Reply(Vec<u8>, ResponseCode),
    Request(Box<Request>),
}

/// What a response holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Body {
    pub(crate) code: ResponseCode,
    pub(crate) is_authoritative: bool,
    pub(crate) is_authentic: bool,
    pub(crate) answers: Vec<Record>,
    pub(crate) authorities: Vec<Record>,
    pub(crate) additionals: Vec<Record>,
}

/// What the zone says, as far as it goes.
pub(crate) enum Local {
    Done(Body),
    /// The rest comes from upstream: the records of this question follow those of the body.
    Upstream(Body, Query),
}

/// Reads octets that arrived. `is_stream`: over TCP, so that the response may have 64 KiB.
pub(crate) fn read(octets: &[u8], is_stream: bool) -> Input {
    let Some((header, _)) = octets.split_at_checked(HEADER) else { return Input::Drop };
    let id = u16::from_be_bytes([header[0], header[1]]);
    if header[2] & 0x80 != 0 {
        return Input::Drop;
    }
    let op_code = OpCode::from_u8(header[2] >> 3 & 0x0f);
    if op_code != OpCode::Query {
        return refuse(id, op_code, ResponseCode::NotImp);
    }
    // Before the sections are read: their counts cost a hostile sender nothing.
    if header[4..6] != [0, 1] || header[6..10] != [0; 4] {
        return refuse(id, op_code, ResponseCode::FormErr);
    }
    let Ok(mut message) = Message::from_vec(octets) else {
        return refuse(id, op_code, ResponseCode::FormErr);
    };
    let Some(query) = message.queries.pop() else { return refuse(id, op_code, ResponseCode::FormErr) };
    let edns = message.edns.as_ref();
    let limit = if is_stream {
        u16::MAX
    } else {
        edns.map_or(PLAIN_PAYLOAD, |edns| edns.max_payload().clamp(PLAIN_PAYLOAD, UDP_PAYLOAD))
    };
    let request = Request {
        id,
        is_recursion_desired: message.metadata.recursion_desired,
        is_checking_disabled: message.metadata.checking_disabled,
        has_edns: edns.is_some(),
        is_dnssec_ok: edns.is_some_and(|edns| edns.flags().dnssec_ok),
        limit,
        query,
    };
    let code = if edns.is_some_and(|edns| edns.version() != 0) {
        ResponseCode::BADVERS
    } else if request.query.query_class != DNSClass::IN {
        ResponseCode::Refused
    } else if matches!(request.query.query_type, RecordType::AXFR | RecordType::IXFR) {
        ResponseCode::NotImp
    } else {
        return Input::Request(Box::new(request));
    };
    Input::Reply(write(&request, Body { code, ..Body::default() }), code)
}

fn refuse(id: u16, op_code: OpCode, code: ResponseCode) -> Input {
    let mut message = Message::error_msg(id, op_code, code);
    message.metadata.recursion_available = true;
    Input::Reply(message.to_vec().unwrap_or_default(), code)
}

/// The octets of a response. Never more than the request's limit: additional records go first, then all
/// records, with the bit `TC`.
pub(crate) fn write(request: &Request, body: Body) -> Vec<u8> {
    let mut message = Message::response(request.id, OpCode::Query);
    message.metadata.message_type = MessageType::Response;
    message.metadata.recursion_desired = request.is_recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = request.is_checking_disabled;
    message.metadata.authoritative = body.is_authoritative;
    message.metadata.authentic_data = body.is_authentic;
    message.metadata.response_code = body.code;
    message.queries.push(request.query.clone());
    message.answers = body.answers;
    message.authorities = body.authorities;
    message.additionals = body.additionals;
    if request.has_edns {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD).set_version(0).set_dnssec_ok(request.is_dnssec_ok);
        message.edns = Some(edns);
    }
    let limit = usize::from(request.limit);
    // The encoder cuts at 64 KiB by itself, at a record; a response for a stream is cut nowhere else.
    let fits = |octets: &Vec<u8>| octets.len() <= limit;
    if let Some(octets) = message.to_vec().ok().filter(fits) {
        return octets;
    }
    message.additionals.clear();
    if let Some(octets) = message.to_vec().ok().filter(fits) {
        return octets;
    }
    message.truncate().to_vec().ok().filter(fits).unwrap_or_default()
}

/// Asks the zone, and follows aliases inside it.
pub(crate) fn ask(authority: &dyn Authority, query: &Query) -> Local {
    let mut body = Body { is_authoritative: true, ..Body::default() };
    let mut query = query.clone();
    for hop in 0..MAX_CHASE {
        let labels: Vec<&[u8]> = query.name.iter().collect();
        let question = Question { labels: &labels, record_type: record_type(query.query_type) };
        let answer = authority.answer(&question);
        match answer {
            Answer::Forward => {
                body.is_authoritative = hop > 0;
                return Local::Upstream(body, query);
            }
            Answer::NoData { soa } => body.authorities.extend(record(&query.name, soa)),
            Answer::NxDomain { soa } => {
                body.code = ResponseCode::NXDomain;
                body.authorities.extend(record(&query.name, soa));
            }
            Answer::Records(records) => {
                body.answers.extend(records.answers.into_iter().filter_map(|each| record(&query.name, each)));
                body.additionals
                    .extend(records.additional.into_iter().filter_map(|each| record(&query.name, each)));
                let follows = matches!(query.query_type, RecordType::A | RecordType::AAAA);
                if let Some(target) = records.chase.filter(|_| follows) {
                    let Some(target) = name(&target) else { break };
                    query.name = target;
                    continue;
                }
            }
        }
        return Local::Done(body);
    }
    Local::Done(Body { code: ResponseCode::ServFail, ..Body::default() })
}

/// What the server answers without upstream servers and cache; `None`: no response.
///
/// # Panics
///
/// Never, whatever the octets are.
#[must_use]
pub fn reply(octets: &[u8], is_stream: bool, authority: &dyn Authority) -> Option<Vec<u8>> {
    let reply = match read(octets, is_stream) {
        Input::Drop => return None,
        Input::Reply(octets, _) => octets,
        Input::Request(request) => match ask(authority, &request.query) {
            Local::Done(body) => write(&request, body),
            Local::Upstream(..) => write(&request, Body { code: ResponseCode::ServFail, ..Body::default() }),
        },
    };
    Some(reply).filter(|octets| !octets.is_empty())
}

/// A message as a stream carries it, its length before it (RFC 1035, 4.2.2); `None` if it is too long.
pub(crate) fn framed(octets: &[u8]) -> Option<Vec<u8>> {
    let mut framed = u16::try_from(octets.len()).ok()?.to_be_bytes().to_vec();
    framed.extend_from_slice(octets);
    Some(framed)
}

fn record_type(of: RecordType) -> names::RecordType {
    match of {
        RecordType::A => names::RecordType::A,
        RecordType::AAAA => names::RecordType::Aaaa,
        RecordType::CNAME => names::RecordType::Cname,
        RecordType::NS => names::RecordType::Ns,
        RecordType::PTR => names::RecordType::Ptr,
        RecordType::SOA => names::RecordType::Soa,
        RecordType::SRV => names::RecordType::Srv,
        RecordType::TXT => names::RecordType::Txt,
        RecordType::ANY => names::RecordType::Any,
        _ => names::RecordType::Other,
    }
}

/// `None` for what is no name: the zone's objects are validated elsewhere, and a bad one costs one record.
fn name(text: &Arc<str>) -> Option<Name> {
    // Labels as they are: the text has neither escapes nor a final dot.
    let labels = text.split('.').filter(|label| !label.is_empty()).map(str::as_bytes);
    let mut name = Name::from_labels(labels).ok()?;
    name.set_fqdn(true);
    Some(name)
}

fn record(question: &Name, record: names::Record) -> Option<Record> {
    let owner = match &record.owner {
        None => question.clone(),
        Some(owner) => name(owner)?,
    };
    let data = match record.data {
        names::RecordData::A(address) => RData::A(A(address)),
        names::RecordData::Aaaa(address) => RData::AAAA(AAAA(address)),
        names::RecordData::Cname(target) => RData::CNAME(CNAME(name(&target)?)),
        names::RecordData::Ns(target) => RData::NS(NS(name(&target)?)),
        names::RecordData::Ptr(target) => RData::PTR(PTR(name(&target)?)),
        names::RecordData::Soa(soa) => RData::SOA(SOA::new(
            name(&soa.mname)?,
            name(&soa.rname)?,
            soa.serial,
            soa.refresh.cast_signed(),
            soa.retry.cast_signed(),
            soa.expire.cast_signed(),
            soa.minimum,
        )),
        names::RecordData::Srv { priority, weight, port, target } => {
            RData::SRV(SRV::new(priority, weight, port, name(&target)?))
        }
        names::RecordData::Txt(text) => RData::TXT(TXT::from_bytes(vec![text.as_bytes()])),
    };
    Some(Record::from_rdata(owner, record.ttl, data))
}
