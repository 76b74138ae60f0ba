//! Answers of upstream servers. Time is an argument.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{RData, Record, RecordType},
};
use lru::LruCache;

use crate::message::Body;

/// A negative answer is kept no longer (RFC 2308, 5).
const MAX_NEGATIVE: Duration = Duration::from_secs(3_600);
const MAX_TTL: Duration = Duration::from_secs(86_400);
/// How long after its end an answer may still be given (RFC 8767, 4).
const MAX_STALE: Duration = Duration::from_secs(86_400);
/// The TTL of a stale answer, seconds (RFC 8767, 4).
const STALE_TTL: u32 = 30;
/// How long upstream servers are left alone after they failed (RFC 8767, 5), if a stale answer is there.
const RETRY: Duration = Duration::from_secs(30);
/// What an entry takes beside its records and its name, octets.
const OVERHEAD: usize = 256;

/// What an answer depends on. The class is `IN`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The labels in lower case, each with its length before it.
    name: Box<[u8]>,
    record_type: u16,
    is_dnssec_ok: bool,
    is_checking_disabled: bool,
}

impl Key {
    pub(crate) fn new(query: &Query, is_dnssec_ok: bool, is_checking_disabled: bool) -> Self {
        let mut name = Vec::with_capacity(query.name.len());
        for label in &query.name {
            name.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
            name.extend(label.iter().map(u8::to_ascii_lowercase));
        }
        let record_type = query.query_type.into();
        Self { name: name.into(), record_type, is_dnssec_ok, is_checking_disabled }
    }

    pub(crate) fn is_dnssec_ok(&self) -> bool {
        self.is_dnssec_ok
    }

    pub(crate) fn is_checking_disabled(&self) -> bool {
        self.is_checking_disabled
    }
}

/// An answer from upstream.
#[derive(Debug)]
pub(crate) struct Entry {
    body: Body,
    /// Until when it is fresh, from `at` on.
    ttl: Duration,
    at: Instant,
    n_octets: usize,
}

impl Entry {
    /// `n_octets`: those of the message.
    pub(crate) fn new(message: Message, n_octets: usize, now: Instant) -> Self {
        let is_negative = message.metadata.response_code == ResponseCode::NXDomain
            || message.answers.is_empty()
            // An alias without a target's record is negative too, if the authority says so.
            || message.answers.iter().all(|record| record.record_type() == RecordType::CNAME)
                && message.authorities.iter().any(|record| record.record_type() == RecordType::SOA);
        let sections = message.answers.iter().chain(&message.authorities);
        let least = sections.map(|record| record.ttl).min();
        let ttl = if is_negative {
            let soa = message.authorities.iter().find_map(|record| match &record.data {
                RData::SOA(soa) => Some(soa.minimum),
                _ => None,
            });
            // Without the authority's record a negative answer is not kept (RFC 2308, 5).
            soa.zip(least).map(|(soa, least)| seconds(soa.min(least)).min(MAX_NEGATIVE))
        } else {
            least.map(|least| seconds(least).min(MAX_TTL))
        };
        let may_be_kept =
            matches!(message.metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain);
        let body = Body {
            code: message.metadata.response_code,
            is_authoritative: false,
            is_authentic: message.metadata.authentic_data,
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
        };
        let ttl = ttl.filter(|_| may_be_kept).unwrap_or_default();
        Self { body, ttl, at: now, n_octets }
    }

    /// The answer with the question's case and the TTLs that are left.
    pub(crate) fn body(&self, query: &Query, now: Instant) -> Body {
        let age = now.saturating_duration_since(self.at);
        let is_stale = self.is_stale(now);
        let elapsed = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        let mut body = self.body.clone();
        let sections = [&mut body.answers, &mut body.authorities, &mut body.additionals];
        for record in sections.into_iter().flatten() {
            record.ttl = if is_stale { STALE_TTL } else { record.ttl.saturating_sub(elapsed) };
            same_case(record, query);
        }
        body
    }

    /// The server could not or did not want to answer; another one may.
    pub(crate) fn has_failed(&self) -> bool {
        !matches!(self.body.code, ResponseCode::NoError | ResponseCode::NXDomain)
    }

    pub(crate) fn is_stale(&self, now: Instant) -> bool {
        self.ttl > Duration::ZERO && now.saturating_duration_since(self.at) >= self.ttl
    }
}

fn same_case(record: &mut Record, query: &Query) {
    if record.name == query.name {
        record.name = query.name.clone();
    }
}

fn seconds(ttl: u32) -> Duration {
    // RFC 2181, 8: a TTL with the highest bit is zero.
    Duration::from_secs(u64::from(if ttl > i32::MAX.cast_unsigned() { 0 } else { ttl }))
}

/// What the cache has for a question.
#[derive(Debug)]
pub(crate) enum Found {
    /// `is_due`: it ends soon and was asked for before, so it is to be fetched anew.
    Fresh {
        entry: Arc<Entry>,
        is_due: bool,
    },
    /// Only for when upstream servers fail or are slow. `has_failed`: they did a moment ago.
    Stale {
        entry: Arc<Entry>,
        has_failed: bool,
    },
    Nothing,
}

struct Slot {
    entry: Arc<Entry>,
    n_octets: usize,
    n_hits: u32,
    failed_at: Option<Instant>,
}

/// A bounded number of answers; those least recently asked for go first.
pub(crate) struct Cache {
    slots: LruCache<Key, Slot>,
    n_octets: usize,
    max_entries: usize,
    max_octets: usize,
}

impl Cache {
    pub(crate) fn new(max_entries: usize, max_octets: usize) -> Self {
        Self { slots: LruCache::unbounded(), n_octets: 0, max_entries, max_octets }
    }

    pub(crate) fn find(&mut self, key: &Key, now: Instant) -> Found {
        let Some(slot) = self.slots.get_mut(key) else { return Found::Nothing };
        let age = now.saturating_duration_since(slot.entry.at);
        let ttl = slot.entry.ttl;
        if age < ttl {
            slot.n_hits = slot.n_hits.saturating_add(1);
            // The last tenth; short ones would be fetched all the time.
            let is_due = slot.n_hits > 2 && ttl >= Duration::from_secs(10) && age >= ttl / 10 * 9;
            return Found::Fresh { entry: slot.entry.clone(), is_due };
        }
        if age < ttl + MAX_STALE {
            let has_failed =
                slot.failed_at.is_some_and(|failed_at| now.saturating_duration_since(failed_at) < RETRY);
            return Found::Stale { entry: slot.entry.clone(), has_failed };
        }
        self.remove(key);
        Found::Nothing
    }

    pub(crate) fn insert(&mut self, key: Key, entry: Arc<Entry>) {
        if entry.ttl == Duration::ZERO {
            return;
        }
        self.remove(&key);
        let n_octets = entry.n_octets + key.name.len() + OVERHEAD;
        if n_octets > self.max_octets {
            return;
        }
        self.n_octets += n_octets;
        self.slots.put(key, Slot { entry, n_octets, n_hits: 0, failed_at: None });
        while self.slots.len() > self.max_entries || self.n_octets > self.max_octets {
            let Some((_, slot)) = self.slots.pop_lru() else { break };
            self.n_octets -= slot.n_octets;
        }
    }

    /// Upstream servers failed to answer this question.
    pub(crate) fn failed(&mut self, key: &Key, now: Instant) {
        if let Some(slot) = self.slots.peek_mut(key) {
            slot.failed_at = Some(now);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    fn remove(&mut self, key: &Key) {
        if let Some(slot) = self.slots.pop(key) {
            self.n_octets -= slot.n_octets;
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::OpCode,
        rr::{
            Name,
            rdata::{A, SOA},
        },
    };

    use super::*;

    fn query(name: &str) -> Query {
        Query::query(Name::from_ascii(name).unwrap(), RecordType::A)
    }

    fn key(name: &str) -> Key {
        Key::new(&query(name), false, false)
    }

    /// An address with this TTL.
    fn positive(name: &str, ttl: u32, now: Instant) -> Arc<Entry> {
        let mut message = Message::response(0, OpCode::Query);
        let data = RData::A(A([192, 0, 2, 1].into()));
        message.answers.push(Record::from_rdata(query(name).name, ttl, data));
        Arc::new(Entry::new(message, 50, now))
    }

    /// An absence; the record's TTL and the minimum in it.
    fn negative(soa: Option<(u32, u32)>, code: ResponseCode, now: Instant) -> Arc<Entry> {
        let mut message = Message::response(0, OpCode::Query);
        message.metadata.response_code = code;
        if let Some((ttl, minimum)) = soa {
            let root = Name::root();
            let data = RData::SOA(SOA::new(root.clone(), root.clone(), 1, 1, 1, 1, minimum));
            message.authorities.push(Record::from_rdata(root, ttl, data));
        }
        Arc::new(Entry::new(message, 50, now))
    }

    fn seen(cache: &mut Cache, now: Instant) -> String {
        match cache.find(&key("www.test."), now) {
            Found::Fresh { entry, is_due } => {
                let ttl = entry.body(&query("www.test."), now).answers.first().map(|record| record.ttl);
                format!("fresh {ttl:?} {is_due}")
            }
            Found::Stale { entry, has_failed } => {
                let ttl = entry.body(&query("www.test."), now).answers.first().map(|record| record.ttl);
                format!("stale {ttl:?} {has_failed}")
            }
            Found::Nothing => "nothing".into(),
        }
    }

    #[test]
    fn an_entry_grows_old() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut cache = Cache::new(10, 10_000);
        cache.insert(key("WWW.test."), positive("www.test.", 60, start));
        for (seconds, expected) in [
            (0, "fresh Some(60) false"),
            (10, "fresh Some(50) false"),
            (53, "fresh Some(7) false"),
            // Asked for before, and in its last tenth.
            (54, "fresh Some(6) true"),
            (59, "fresh Some(1) true"),
            (60, "stale Some(30) false"),
            (3600, "stale Some(30) false"),
        ] {
            assert_eq!(seen(&mut cache, at(seconds)), expected, "{seconds}");
        }
        cache.failed(&key("www.test."), at(3600));
        assert_eq!(seen(&mut cache, at(3629)), "stale Some(30) true");
        assert_eq!(seen(&mut cache, at(3630)), "stale Some(30) false");
        assert_eq!(seen(&mut cache, at(24 * 3600 + 60)), "nothing");
        assert_eq!((cache.len(), cache.n_octets), (0, 0));
    }

    #[test]
    fn how_long_answers_are_kept() {
        let now = Instant::now();
        let (absent, empty) = (ResponseCode::NXDomain, ResponseCode::NoError);
        let cases = [
            (positive("www.test.", 0, now), 0),
            (positive("www.test.", 60, now), 60),
            (positive("www.test.", 1 << 30, now), 24 * 3600),
            (positive("www.test.", 1 << 31, now), 0),
            (negative(None, absent, now), 0),
            (negative(Some((60, 30)), absent, now), 30),
            (negative(Some((20, 30)), empty, now), 20),
            (negative(Some((1 << 20, 1 << 20)), empty, now), 3600),
            (negative(Some((60, 60)), ResponseCode::ServFail, now), 0),
        ];
        for (entry, seconds) in cases {
            assert_eq!(entry.ttl, Duration::from_secs(seconds), "{entry:?}");
        }
    }

    #[test]
    fn entries_and_octets_are_bounded_and_the_least_used_go() {
        let now = Instant::now();
        for (max_entries, max_octets) in [(3, 1 << 20), (100, 3 * (OVERHEAD + 60))] {
            let mut cache = Cache::new(max_entries, max_octets);
            for name in ["a.test.", "b.test.", "c.test."] {
                cache.insert(key(name), positive(name, 60, now));
            }
            assert!(matches!(cache.find(&key("a.test."), now), Found::Fresh { .. }));
            cache.insert(key("d.test."), positive("d.test.", 60, now));
            assert!(matches!(cache.find(&key("a.test."), now), Found::Fresh { .. }));
            assert!(matches!(cache.find(&key("b.test."), now), Found::Nothing));
            assert_eq!(cache.len(), 3);
        }
    }

    #[test]
    fn answers_for_other_flags_and_types_are_others() {
        let www = query("www.test.");
        let mut other = www.clone();
        other.query_type = RecordType::AAAA;
        let keys = [
            Key::new(&www, false, false),
            Key::new(&www, true, false),
            Key::new(&www, false, true),
            Key::new(&other, false, false),
            key("w.ww.test."),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert_eq!(keys.iter().position(|other| other == key), Some(index));
        }
    }
}
