//! What the node's name server answers, as plain functions over the objects.
//!
//! # Purpose
//!
//! A question goes in, an [`Answer`] comes out: records, a proof of absence, or [`Answer::Forward`] for a name
//! that is not the cluster's. The rules are those of the Kubernetes DNS specification 1.1.0
//! (kubernetes/dns, `docs/specification.md`), and of CoreDNS where it is silent. No message format appears
//! here: the crate `lb-names` has the server.
//!
//! # Invariants
//!
//! - An answer depends on the objects and the settings alone.
//! - A question costs a few look-ups and the records of its answer. The first one for the name of an address
//!   after a change costs a pass over all objects besides.

mod presentation;
pub mod reach;
pub mod upstream;
pub mod zone;

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

/// The type of a question, as far as a zone has records of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordType {
    /// An IPv4 address.
    A,
    /// An IPv6 address.
    Aaaa,
    /// Another name.
    Cname,
    /// A name server.
    Ns,
    /// The name of an address.
    Ptr,
    /// The start of authority.
    Soa,
    /// Port and name of a service.
    Srv,
    /// Text.
    Txt,
    /// All types (`*`, RFC 8482).
    Any,
    /// A type of which no name has a record.
    Other,
}

/// A question, of class `IN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question<'a> {
    /// The labels of the name from the left, without the root; in any case, and any octets.
    pub labels: &'a [&'a [u8]],
    /// The type asked for.
    pub record_type: RecordType,
}

/// What a zone says about a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The name is outside the zone, or the settings leave it to the upstream servers.
    Forward,
    /// The name exists and has these records.
    Records(Records),
    /// The name exists and has no record of this type (RFC 2308: `NOERROR` without answers).
    NoData {
        /// The authority's record.
        soa: Record,
    },
    /// The name does not exist, nor does any below it.
    NxDomain {
        /// The authority's record.
        soa: Record,
    },
}

/// Records for one question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// The answer section.
    pub answers: Vec<Record>,
    /// The additional section: addresses of names in the answers.
    pub additional: Vec<Record>,
    /// The target of the last `CNAME` in the answers, if its records are to follow from the upstream servers.
    pub chase: Option<Arc<str>>,
}

/// A resource record of class `IN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name, lower case, without the final dot; `None` for the name of the question, as it was asked.
    pub owner: Option<Arc<str>>,
    /// Time to live, seconds.
    pub ttl: u32,
    /// Its data.
    pub data: RecordData,
}

/// The data of a [`Record`]. Names are in lower case, without the final dot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordData {
    /// An IPv4 address.
    A(Ipv4Addr),
    /// An IPv6 address.
    Aaaa(Ipv6Addr),
    /// Another name for the owner.
    Cname(Arc<str>),
    /// A name server of the zone.
    Ns(Arc<str>),
    /// The name of an address.
    Ptr(Arc<str>),
    /// The start of authority.
    Soa(Soa),
    /// Port and name of a service (RFC 2782).
    Srv {
        /// Lower ones first.
        priority: u16,
        /// Relative to others of the same priority.
        weight: u16,
        /// Port, host order.
        port: u16,
        /// Whose addresses to ask for.
        target: Arc<str>,
    },
    /// One character string.
    Txt(Arc<str>),
}

/// The data of a start of authority (RFC 1035, 3.3.13). Times are in seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Soa {
    /// The primary name server.
    pub mname: Arc<str>,
    /// The mailbox of who is responsible, as a name.
    pub rname: Arc<str>,
    /// Grows with changes of the zone.
    pub serial: u32,
    /// For secondary servers.
    pub refresh: u32,
    /// For secondary servers.
    pub retry: u32,
    /// For secondary servers.
    pub expire: u32,
    /// How long a resolver may cache that something is absent (RFC 2308).
    pub minimum: u32,
}
