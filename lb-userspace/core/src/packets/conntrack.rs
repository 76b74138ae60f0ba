//! Which entries of connection tracking lead to former endpoints.
//!
//! The kernel translates all packets of a flow as it translated the first. TCP notices when its endpoint is
//! gone; a client of UDP or SCTP may send to it for as long as it likes. kube-proxy deletes such entries too
//! (`pkg/proxy/conntrack/cleanup.go`), but those of UDP alone, and none of a Service without serving
//! endpoints or of one that was deleted.

use std::net::SocketAddr;

use crate::model::Protocol;

/// A flow that the kernel tracks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// UDP or SCTP.
    pub protocol: Protocol,
    /// The client.
    pub source: SocketAddr,
    /// What the client calls.
    pub destination: SocketAddr,
    /// What answers: the endpoint. The same as `destination` if it is not translated.
    pub reply_source: SocketAddr,
    /// The kernel's number of the entry, which another flow of the same addresses does not have.
    pub id: u32,
    /// Its zone.
    pub zone: u16,
}

/// Whether the next packet of a flow should be translated anew: it calls a service, and what answers may not
/// keep its flows.
///
/// `may_keep` says of what the client calls whether the other address may keep its flows; `None` if it is no
/// service.
pub fn is_stale(
    entry: &Entry,
    may_keep: impl FnOnce(Protocol, SocketAddr, SocketAddr) -> Option<bool>,
) -> bool {
    entry.protocol != Protocol::Tcp
        && may_keep(entry.protocol, entry.destination, entry.reply_source) == Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flows_to_what_is_no_endpoint_of_a_service_are_stale() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let has = |protocol, service: SocketAddr, endpoint: SocketAddr| {
            (protocol != Protocol::Sctp && service == address("10.96.0.1:53"))
                .then(|| endpoint == address("10.244.0.7:5353"))
        };
        for (protocol, destination, reply_source, expected) in [
            (Protocol::Udp, "10.96.0.1:53", "10.244.0.7:5353", false),
            (Protocol::Udp, "10.96.0.1:53", "10.244.0.7:53", true),
            (Protocol::Udp, "10.96.0.1:53", "10.244.0.8:5353", true),
            // It began before the service had endpoints.
            (Protocol::Udp, "10.96.0.1:53", "10.96.0.1:53", true),
            (Protocol::Udp, "10.96.0.2:53", "10.244.0.8:5353", false),
            (Protocol::Sctp, "10.96.0.1:53", "10.244.0.8:5353", false),
            (Protocol::Tcp, "10.96.0.1:53", "10.244.0.8:5353", false),
        ] {
            let entry = Entry {
                protocol,
                source: address("10.244.1.1:40000"),
                destination: address(destination),
                reply_source: address(reply_source),
                id: 1,
                zone: 0,
            };
            assert_eq!(is_stale(&entry, has), expected, "{entry:?}");
        }
    }
}
