//! Detects new sockets between two polls, and counts the calls that were not shown.
//!
//! Pure: time is an argument. The types are the public JSON; field names are stable.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use lb_common::layout::ServiceStats;
use lb_core::{desired::FrontendAddress, model::Protocol};
use lb_kernel::sockets::Record;
use serde::Serialize;

use crate::cli::listing::service_text;

/// One line of the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(super) enum Line {
    /// A socket was redirected to an endpoint.
    Connection(Connection),
    /// An endpoint was ejected.
    Ejection(Ejected),
    /// A connection to an ejected endpoint was established.
    Restoration(OfEndpoint),
    /// The counters of an interval.
    Summary(Summary),
}

/// A socket that uses an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Connection {
    /// Time of the poll in RFC 3339: up to one interval after the call.
    pub(super) time: String,
    /// Empty if no object has the address.
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) port_name: String,
    pub(super) protocol: Protocol,
    /// The called address.
    pub(super) service: SocketAddr,
    /// The endpoint of the call.
    pub(super) endpoint: SocketAddr,
    /// The endpoint's node, if known.
    pub(super) node: String,
    /// The socket's cookie, which `ss -e` shows in hexadecimal after `sk:`.
    pub(super) cookie: u64,
}

/// An endpoint, when something happened to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct OfEndpoint {
    /// Time of the poll in RFC 3339: up to a second after the event.
    pub(super) time: String,
    /// Empty if no object has the address.
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) port_name: String,
    pub(super) protocol: Protocol,
    pub(super) endpoint: SocketAddr,
    /// The endpoint's node, if known.
    pub(super) node: String,
}

/// An ejection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Ejected {
    #[serde(flatten)]
    pub(super) of: OfEndpoint,
    /// Connections that failed in a row; 0 if the ejection has ended.
    pub(super) failures: u32,
    /// Seconds until the ejection ends.
    pub(super) seconds: u64,
    /// Open connections to the endpoint, which stay; `null` unless the Service's balance is
    /// `least-connections`.
    pub(super) active: Option<u32>,
    /// Why, and until when, for people.
    pub(super) reason: String,
}

/// Number of calls, and how many of them were shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Summary {
    /// Redirected `connect()` calls.
    pub(super) connects: u64,
    /// Redirected datagrams of unconnected sockets.
    pub(super) datagrams: u64,
    /// Calls without an endpoint. They leave no record.
    pub(super) refused: u64,
    /// Connections shown.
    pub(super) shown: u64,
    /// Connects and datagrams without a shown connection.
    pub(super) unseen: u64,
}

/// The name of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) port_name: String,
    pub(super) protocol: Protocol,
}

/// Which ports to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    /// Namespace and name.
    pub(super) service: Option<(String, String)>,
    pub(super) protocol: Option<Protocol>,
}

impl Filter {
    /// Whether a port is selected.
    pub(super) fn takes(&self, port: &Named) -> bool {
        let is_named =
            |(namespace, name): &(String, String)| port.namespace == *namespace && port.name == *name;
        self.service.as_ref().is_none_or(is_named)
            && self.protocol.is_none_or(|protocol| protocol == port.protocol)
    }
}

/// What earlier polls have shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// `None` before the first poll, which only finds existing records.
    records: Option<BTreeSet<Record>>,
    /// `None` before the first summary.
    counts: Option<BTreeMap<u32, ServiceStats>>,
    n_shown: u64,
}

impl Seen {
    /// Returns the records that the last poll did not have. A socket with another endpoint is new again; a
    /// socket with another call to the same endpoint is not.
    pub(super) fn new_records(&mut self, records: Vec<Record>) -> Vec<Record> {
        let now: BTreeSet<Record> = records.into_iter().collect();
        let new = self.records.as_ref().map(|before| now.difference(before).copied().collect());
        self.records = Some(now);
        new.unwrap_or_default()
    }

    /// Counts shown connections.
    pub(super) fn shown(&mut self, n_shown: u64) {
        self.n_shown += n_shown;
    }

    /// Sums up the selected counters since the last call. The first call sets the baseline.
    pub(super) fn summary(&mut self, counts: BTreeMap<u32, ServiceStats>) -> Summary {
        let before = self.counts.take();
        let mut sum = Summary { shown: std::mem::take(&mut self.n_shown), ..Summary::default() };
        for (id, now) in &counts {
            let before = match &before {
                // A counter of the baseline counts from there; a new counter counts from 0.
                None => *now,
                Some(before) => before.get(id).copied().unwrap_or_default(),
            };
            // A counter that decreased has restarted: its id was reused.
            let growth = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
            sum.connects += growth(now.connects, before.connects);
            sum.datagrams += growth(now.datagrams, before.datagrams);
            sum.refused += growth(now.refusals, before.refusals);
        }
        self.counts = Some(counts);
        sum.unseen = (sum.connects + sum.datagrams).saturating_sub(sum.shown);
        sum
    }
}

impl Summary {
    /// Whether anything happened.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Connection {
    /// As a line of text; `has_colour` on a terminal.
    pub(super) fn text(&self, has_colour: bool) -> String {
        let (bold, plain) = if has_colour { ("\u{1b}[1m", "\u{1b}[0m") } else { ("", "") };
        let address =
            FrontendAddress { ip: self.service.ip(), port: self.service.port(), protocol: self.protocol };
        let node = if self.node.is_empty() { String::new() } else { format!(" on {}", self.node) };
        format!(
            "{}  {bold}{}{plain}  {} -> {}{node}  sk:{:x}",
            self.time,
            service_text(&self.namespace, &self.name, &self.port_name),
            address,
            self.endpoint,
            self.cookie
        )
    }
}

impl OfEndpoint {
    /// As a line of text, with what happened; `has_colour` on a terminal.
    fn text(&self, event: &str, has_colour: bool) -> String {
        let (bold, plain) = if has_colour { ("\u{1b}[1m", "\u{1b}[0m") } else { ("", "") };
        let node = if self.node.is_empty() { String::new() } else { format!(" on {}", self.node) };
        let service = service_text(&self.namespace, &self.name, &self.port_name);
        format!("{}  {bold}{service}{plain}  {}{node}  {bold}{event}{plain}", self.time, self.endpoint)
    }
}

impl Line {
    /// As a line of text; `has_colour` on a terminal.
    pub(super) fn text(&self, has_colour: bool) -> String {
        match self {
            Self::Connection(connection) => connection.text(has_colour),
            Self::Ejection(Ejected { of, reason, active, .. }) => {
                let active = active.map(|active| format!("; {active} open connections")).unwrap_or_default();
                of.text(&format!("{reason}{active}"), has_colour)
            }
            Self::Restoration(of) => of.text("restored: a connection was established", has_colour),
            Self::Summary(summary) => summary.text(has_colour),
        }
    }
}

/// The header that names the columns and the summaries; `has_colour` on a terminal.
pub(super) fn header(interval: Duration, summary: Duration, has_colour: bool) -> String {
    let (dim, plain) = if has_colour { ("\u{1b}[2m", "\u{1b}[0m") } else { ("", "") };
    format!(
        "{dim}# time  service  address called -> endpoint on its node  sk: cookie of the socket{plain}\n\
         {dim}# new sockets every {interval:?} (--interval), a summary every {summary:?}; `socklb top` shows all calls{plain}\n\
         {dim}# and, every second, endpoints that were ejected or restored{plain}"
    )
}

impl Summary {
    /// As a line of text; `has_colour` on a terminal.
    pub(super) fn text(&self, has_colour: bool) -> String {
        let (dim, plain) = if has_colour { ("\u{1b}[2m", "\u{1b}[0m") } else { ("", "") };
        let Self { connects, datagrams, refused, shown, unseen } = self;
        format!(
            "{dim}# {connects} connects, {datagrams} datagrams, {refused} refused; {shown} shown, {unseen} unseen{plain}"
        )
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn record(cookie: u64, endpoint: &str) -> Record {
        Record {
            cookie,
            protocol: Protocol::Tcp,
            service: "10.96.0.80:80".parse().unwrap(),
            endpoint: endpoint.parse().unwrap(),
            service_id: 3,
            endpoint_id: 7,
        }
    }

    #[test]
    fn what_was_not_there_before_is_new() {
        let (a, b, elsewhere) =
            (record(1, "10.0.0.1:80"), record(2, "10.0.0.1:80"), record(1, "10.0.0.2:80"));
        let mut seen = Seen::default();
        for (what, records, expected) in [
            ("records before the first poll", vec![a], vec![]),
            ("another socket", vec![a, b], vec![b]),
            ("nothing happened", vec![a, b], vec![]),
            ("one is closed, one has another endpoint", vec![elsewhere], vec![elsewhere]),
            ("its first endpoint again", vec![a], vec![a]),
            ("all are closed", vec![], vec![]),
        ] {
            assert_eq!(seen.new_records(records), expected, "{what}");
        }
    }

    #[test]
    fn calls_that_went_by_unseen_are_counted() {
        let stats = |connects, refusals, datagrams| ServiceStats { connects, refusals, datagrams };
        let mut seen = Seen::default();
        for (what, shown, counts, expected) in [
            ("the beginning", 0, vec![(1, stats(100, 9, 9))], [0, 0, 0, 0, 0]),
            ("nothing", 0, vec![(1, stats(100, 9, 9))], [0, 0, 0, 0, 0]),
            ("some are seen", 2, vec![(1, stats(105, 10, 12))], [5, 3, 1, 2, 6]),
            ("a new service", 0, vec![(1, stats(105, 10, 12)), (2, stats(4, 0, 0))], [4, 0, 0, 0, 4]),
            ("an id that restarted", 1, vec![(1, stats(1, 0, 0)), (2, stats(4, 0, 0))], [1, 0, 0, 1, 0]),
            // A socket that connected before the baseline, seen after it.
            ("more seen than called", 3, vec![(1, stats(1, 0, 0))], [0, 0, 0, 3, 0]),
        ] {
            seen.shown(shown);
            let Summary { connects, datagrams, refused, shown, unseen } =
                seen.summary(counts.into_iter().collect());
            assert_eq!([connects, datagrams, refused, shown, unseen], expected, "{what}");
        }
    }

    #[test]
    fn a_filter_takes_ports_by_service_and_protocol() {
        let port = Named {
            namespace: "kube-system".into(),
            name: "dns".into(),
            port_name: "dns-tcp".into(),
            protocol: Protocol::Tcp,
        };
        let dns = || Some(("kube-system".to_owned(), "dns".to_owned()));
        let other = || Some(("default".to_owned(), "dns".to_owned()));
        for (service, protocol, expected) in [
            (None, None, true),
            (dns(), None, true),
            (dns(), Some(Protocol::Tcp), true),
            (dns(), Some(Protocol::Udp), false),
            (other(), None, false),
            (None, Some(Protocol::Udp), false),
        ] {
            let filter = Filter { service, protocol };
            assert_eq!(filter.takes(&port), expected, "{filter:?}");
        }
    }

    #[test]
    fn lines_are_as_people_and_programs_read_them() {
        let connection = Connection {
            time: "2026-01-02T03:04:05.678Z".into(),
            namespace: "default".into(),
            name: "web".into(),
            port_name: "http".into(),
            protocol: Protocol::Tcp,
            service: "10.96.0.80:80".parse().unwrap(),
            endpoint: "10.244.1.10:8080".parse().unwrap(),
            node: "node-1".into(),
            cookie: 0x1a_28d9,
        };
        let summary = Summary { connects: 5, datagrams: 3, refused: 1, shown: 2, unseen: 6 };
        let unknown = Connection {
            namespace: String::new(),
            name: String::new(),
            node: String::new(),
            ..connection.clone()
        };
        let of = OfEndpoint {
            time: connection.time.clone(),
            namespace: "default".into(),
            name: "web".into(),
            port_name: "http".into(),
            protocol: Protocol::Tcp,
            endpoint: connection.endpoint,
            node: "node-1".into(),
        };
        let reason = "ejected for 10 s: 3 failures in a row, the last one: no answer".into();
        let ejection = Ejected { of: of.clone(), failures: 3, seconds: 10, active: None, reason };
        let counted = Ejected { active: Some(12), ..ejection.clone() };
        let text = [unknown.text(false), connection.text(true)];
        let lines = [
            Line::Connection(connection),
            Line::Ejection(ejection),
            Line::Ejection(counted),
            Line::Restoration(of),
            Line::Summary(summary),
        ];
        let text = [&text[..], &lines.each_ref().map(|line| line.text(false))].concat();
        let yaml = lines.each_ref().map(|line| serde_saphyr::to_string(line).unwrap());
        assert!(yaml[1].contains("event: ejection") && yaml[1].contains("name: web"), "{}", yaml[1]);
        let json = lines.map(|line| serde_json::to_string(&line).unwrap());
        expect![[r#"
            2026-01-02T03:04:05.678Z  -  10.96.0.80:80/tcp -> 10.244.1.10:8080  sk:1a28d9
            2026-01-02T03:04:05.678Z  ESC[1mdefault/web:httpESC[0m  10.96.0.80:80/tcp -> 10.244.1.10:8080 on node-1  sk:1a28d9
            2026-01-02T03:04:05.678Z  default/web:http  10.96.0.80:80/tcp -> 10.244.1.10:8080 on node-1  sk:1a28d9
            2026-01-02T03:04:05.678Z  default/web:http  10.244.1.10:8080 on node-1  ejected for 10 s: 3 failures in a row, the last one: no answer
            2026-01-02T03:04:05.678Z  default/web:http  10.244.1.10:8080 on node-1  ejected for 10 s: 3 failures in a row, the last one: no answer; 12 open connections
            2026-01-02T03:04:05.678Z  default/web:http  10.244.1.10:8080 on node-1  restored: a connection was established
            # 5 connects, 3 datagrams, 1 refused; 2 shown, 6 unseen
            {"event":"connection","time":"2026-01-02T03:04:05.678Z","namespace":"default","name":"web","port_name":"http","protocol":"TCP","service":"10.96.0.80:80","endpoint":"10.244.1.10:8080","node":"node-1","cookie":1714393}
            {"event":"ejection","time":"2026-01-02T03:04:05.678Z","namespace":"default","name":"web","port_name":"http","protocol":"TCP","endpoint":"10.244.1.10:8080","node":"node-1","failures":3,"seconds":10,"active":null,"reason":"ejected for 10 s: 3 failures in a row, the last one: no answer"}
            {"event":"ejection","time":"2026-01-02T03:04:05.678Z","namespace":"default","name":"web","port_name":"http","protocol":"TCP","endpoint":"10.244.1.10:8080","node":"node-1","failures":3,"seconds":10,"active":12,"reason":"ejected for 10 s: 3 failures in a row, the last one: no answer"}
            {"event":"restoration","time":"2026-01-02T03:04:05.678Z","namespace":"default","name":"web","port_name":"http","protocol":"TCP","endpoint":"10.244.1.10:8080","node":"node-1"}
            {"event":"summary","connects":5,"datagrams":3,"refused":1,"shown":2,"unseen":6}"#]]
        .assert_eq(&[&text[..], &json[..]].concat().join("\n").replace('\u{1b}', "ESC"));
    }
}
