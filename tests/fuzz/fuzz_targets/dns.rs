//! Arbitrary octets as a query over UDP and TCP.
//!
//! Nothing panics; a response has the query's identifier, is one, and is no longer than UDP allows.
#![no_main]

use std::sync::Arc;

use lb_core::names::{Answer, Question, Record, RecordData, Records};
use lb_names::{Authority, reply};
use libfuzzer_sys::fuzz_target;

/// Knows every name, by as many addresses as its first label is long, and an alias without end.
struct Zone;

impl Authority for Zone {
    fn answer(&self, question: &Question<'_>) -> Answer {
        let own = |data| Record { owner: None, ttl: 5, data };
        let Some(label) = question.labels.first() else { return Answer::Forward };
        if label.starts_with(b"c") {
            let target: Arc<str> = "c.test".into();
            let answers = vec![own(RecordData::Cname(target.clone()))];
            return Answer::Records(Records { answers, additional: Vec::new(), chase: Some(target) });
        }
        let answers = label.iter().map(|octet| own(RecordData::A([192, 0, 2, *octet].into()))).collect();
        Answer::Records(Records { answers, ..Records::default() })
    }
}

fuzz_target!(|data: &[u8]| {
    for (is_stream, limit) in [(false, 1232), (true, 65_535)] {
        if let Some(reply) = reply(data, is_stream, &Zone) {
            assert_eq!(reply[..2], data[..2]);
            assert!(reply[2] & 0x80 != 0 && reply.len() <= limit);
        }
    }
});
