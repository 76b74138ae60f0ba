//! Rows of `socklb top`: counters under the names of objects, with rates between two samples.
//!
//! Pure: time is an argument. The types are the public JSON; field names are stable.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::ValueEnum;
use lb_core::{desired::FrontendAddress, model::Protocol, state::State};
use serde::Serialize;

use crate::cli::{
    listing::{self, HealthPart, service_text},
    sample::{Reading, frontend_of},
};

/// One report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Report {
    /// Time of the sample in RFC 3339.
    pub(super) time: String,
    /// Seconds since the last sample, the basis of rates; `null` in the first report.
    pub(super) seconds: Option<f64>,
    /// Whether sockets could be counted.
    pub(super) sockets_complete: bool,
    pub(super) services: Vec<PortRow>,
}

/// One port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct PortRow {
    /// Empty if no object has its address.
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) port_name: String,
    pub(super) protocol: Protocol,
    /// Its first address: the cluster IP, if any.
    pub(super) address: IpAddr,
    pub(super) port: u16,
    /// Redirected `connect()` calls and datagrams of unconnected sockets, since the port is served.
    pub(super) calls: u64,
    /// Per second; `null` if the last sample did not have it.
    pub(super) calls_per_second: Option<f64>,
    /// Calls without an endpoint.
    pub(super) refused: u64,
    pub(super) refused_per_second: Option<f64>,
    /// Open sockets that last called this port; `null` if they cannot be listed.
    pub(super) sockets: Option<u64>,
    /// Open connections to its endpoints, as the programs count them; `null` unless the Service's balance is
    /// `least-connections`.
    pub(super) active: Option<u64>,
    /// Number of endpoints that are ejected.
    pub(super) ejected: usize,
    pub(super) endpoints: Vec<EndpointRow>,
}

/// One endpoint of a port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct EndpointRow {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    /// Its node, if known.
    pub(super) node: String,
    pub(super) calls: u64,
    pub(super) calls_per_second: Option<f64>,
    pub(super) sockets: Option<u64>,
    /// Open connections, as for the port.
    pub(super) active: Option<u32>,
    /// Its share of the calls to the port's first address that has it, from 1 to 255, the largest one there:
    /// equal shares are 255.
    pub(super) share: u8,
    #[serde(flatten)]
    pub(super) health: HealthPart,
}

/// Sort keys. Numbers sort from the largest, equal ones by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Sort {
    /// Namespace and name.
    Name,
    /// All calls.
    Calls,
    /// Calls per second.
    #[default]
    Rate,
    /// Refused calls.
    Refused,
    /// Open sockets.
    Sockets,
}

/// The counters of one sample by port and endpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Sample {
    /// Time of the sample, monotonic.
    at: Duration,
    is_complete: bool,
    /// By service id.
    ports: BTreeMap<u32, Counted>,
}

/// One port of a Service and its counters.
#[derive(Clone, Debug, PartialEq)]
struct Counted {
    namespace: String,
    name: String,
    port_name: String,
    address: FrontendAddress,
    calls: u64,
    refused: u64,
    sockets: Option<u64>,
    /// By endpoint id.
    endpoints: BTreeMap<u32, Endpoint>,
}

#[derive(Clone, Debug, PartialEq)]
struct Endpoint {
    address: SocketAddr,
    node: String,
    calls: u64,
    sockets: Option<u64>,
    active: Option<u32>,
    share: u8,
    health: HealthPart,
}

impl Counted {
    /// Whether both have the same identity; otherwise the id was reused.
    fn is(&self, other: &Self) -> bool {
        let identity = |port: &Self| (port.address.protocol, port.address.ip.is_ipv6());
        let name = |port: &Self| (port.namespace.clone(), port.name.clone(), port.port_name.clone());
        // Names depend on the objects that are known, addresses do not.
        let has_same_name = !self.name.is_empty() && name(self) == name(other);
        identity(self) == identity(other) && (has_same_name || self.address == other.address)
    }
}

/// Priority of an address as a port's name.
fn rank(kind: &str) -> usize {
    ["ClusterIP", "LoadBalancer", "ExternalIP", "NodePort"]
        .iter()
        .position(|known| *known == kind)
        .unwrap_or(usize::MAX)
}

impl Sample {
    /// Groups a sample by ports and endpoints. `at` is the time of the sample.
    pub(super) fn new(reading: &Reading, objects: Option<&State>, at: Duration) -> Self {
        let (of_ports, of_endpoints) = sockets(reading);
        let count = |counts: &BTreeMap<u32, u64>, id: u32| {
            reading.records.is_some().then(|| counts.get(&id).copied().unwrap_or_default())
        };
        let mut rows = listing::list(&reading.image, objects, &reading.endpoints);
        rows.sort_by_key(|row| (rank(row.kind), row.address.is_unspecified()));
        let mut ports = BTreeMap::new();
        for row in rows {
            let address = FrontendAddress { ip: row.address, port: row.port, protocol: row.protocol };
            let frontend =
                reading.image.services.get(&address).and_then(|id| reading.image.frontends.get(id));
            let Some(frontend) = frontend else { continue };
            let stats = reading.services.get(&frontend.service_id).copied().unwrap_or_default();
            let port = ports.entry(frontend.service_id).or_insert_with(|| Counted {
                namespace: row.namespace.clone(),
                name: row.name.clone(),
                port_name: row.port_name.clone(),
                address,
                calls: stats.connects.saturating_add(stats.datagrams),
                refused: stats.refusals,
                sockets: count(&of_ports, frontend.service_id),
                endpoints: BTreeMap::new(),
            });
            let mut described: BTreeMap<SocketAddr, listing::EndpointRow> = row
                .endpoints
                .into_iter()
                .map(|endpoint| (SocketAddr::new(endpoint.address, endpoint.port), endpoint))
                .collect();
            // Addresses of one port may have different endpoints, because traffic policies depend on the kind
            // of address.
            let entries = reading.image.entries(address.ip.is_ipv6(), frontend.run).unwrap_or_default();
            for entry in entries {
                let Some(endpoint) = described.remove(&entry.address()) else { continue };
                port.endpoints.entry(entry.endpoint_id).or_insert_with(|| Endpoint {
                    address: entry.address(),
                    node: endpoint.node,
                    calls: endpoint.connections,
                    sockets: count(&of_endpoints, entry.endpoint_id),
                    active: endpoint.active,
                    share: endpoint.share,
                    health: endpoint.health,
                });
            }
        }
        Self { at, is_complete: reading.records.is_some(), ports }
    }

    /// Builds the report, sorted by name. `before` is an earlier sample; `time` is the text of this sample's
    /// time.
    pub(super) fn report(&self, before: Option<&Self>, time: String) -> Report {
        let seconds = before.map(|before| self.at.saturating_sub(before.at).as_secs_f64());
        let rate = |earlier: Option<u64>, now: u64| per_second(earlier, now, seconds);
        let mut services: Vec<PortRow> = self
            .ports
            .iter()
            .map(|(id, port)| {
                let earlier =
                    before.and_then(|before| before.ports.get(id)).filter(|earlier| earlier.is(port));
                let mut endpoints: Vec<EndpointRow> = port
                    .endpoints
                    .iter()
                    .map(|(id, endpoint)| {
                        let earlier = earlier
                            .and_then(|earlier| earlier.endpoints.get(id))
                            .filter(|earlier| earlier.address == endpoint.address);
                        EndpointRow {
                            address: endpoint.address.ip(),
                            port: endpoint.address.port(),
                            node: endpoint.node.clone(),
                            calls: endpoint.calls,
                            calls_per_second: rate(earlier.map(|earlier| earlier.calls), endpoint.calls),
                            sockets: endpoint.sockets,
                            active: endpoint.active,
                            share: endpoint.share,
                            health: endpoint.health.clone(),
                        }
                    })
                    .collect();
                endpoints.sort_by_key(|endpoint| (endpoint.address, endpoint.port));
                PortRow {
                    namespace: port.namespace.clone(),
                    name: port.name.clone(),
                    port_name: port.port_name.clone(),
                    protocol: port.address.protocol,
                    address: port.address.ip,
                    port: port.address.port,
                    calls: port.calls,
                    calls_per_second: rate(earlier.map(|earlier| earlier.calls), port.calls),
                    refused: port.refused,
                    refused_per_second: rate(earlier.map(|earlier| earlier.refused), port.refused),
                    sockets: port.sockets,
                    active: sum(endpoints.iter().filter_map(|row| row.active)),
                    ejected: endpoints.iter().filter(|row| row.health.ejected_seconds.is_some()).count(),
                    endpoints,
                }
            })
            .collect();
        services.sort_by_cached_key(PortRow::by_name);
        let seconds = seconds.map(|seconds| (seconds * 1000.0).round() / 1000.0);
        Report { time, seconds, sockets_complete: self.is_complete, services }
    }
}

/// Open sockets by service id and by endpoint id.
fn sockets(reading: &Reading) -> (BTreeMap<u32, u64>, BTreeMap<u32, u64>) {
    let (mut of_ports, mut of_endpoints) = (BTreeMap::new(), BTreeMap::new());
    let entries = reading.image.reachable();
    let addresses: BTreeMap<u32, SocketAddr> =
        entries.map(|entry| (entry.endpoint_id, entry.address())).collect();
    for record in reading.records.iter().flatten() {
        // Sockets of services and endpoints that are gone are not counted.
        if frontend_of(&reading.image, record).is_none() {
            continue;
        }
        *of_ports.entry(record.service_id).or_default() += 1;
        if addresses.get(&record.endpoint_id) == Some(&record.endpoint) {
            *of_endpoints.entry(record.endpoint_id).or_default() += 1;
        }
    }
    (of_ports, of_endpoints)
}

/// The sum; `None` without numbers.
fn sum(numbers: impl Iterator<Item = u32>) -> Option<u64> {
    numbers.map(u64::from).reduce(u64::saturating_add)
}

/// Growth of a counter per second, rounded to a tenth.
fn per_second(earlier: Option<u64>, now: u64, seconds: Option<f64>) -> Option<f64> {
    let (earlier, seconds) = (earlier?, seconds.filter(|seconds| *seconds > 0.0)?);
    // A counter that decreased has restarted: its id was reused.
    let growth = now.checked_sub(earlier).unwrap_or(now);
    #[expect(clippy::cast_precision_loss, reason = "beyond 2^53 calls a rate has fifteen exact digits")]
    let growth = growth as f64;
    Some((growth / seconds * 10.0).round() / 10.0)
}

impl PortRow {
    fn by_name(&self) -> (String, String, String, IpAddr, u16, Protocol) {
        let Self { namespace, name, port_name, address, port, protocol, .. } = self;
        (namespace.clone(), name.clone(), port_name.clone(), *address, *port, *protocol)
    }

    /// `namespace/name:port`
    pub(super) fn service(&self) -> String {
        service_text(&self.namespace, &self.name, &self.port_name)
    }

    /// `address:port/protocol`
    pub(super) fn address(&self) -> String {
        FrontendAddress { ip: self.address, port: self.port, protocol: self.protocol }.to_string()
    }

    /// Whether a text is part of its name or address, or of an endpoint's, ignoring case.
    fn holds(&self, text: &str) -> bool {
        let texts = |endpoint: &EndpointRow| [endpoint.address(), endpoint.node.to_lowercase()];
        [self.service().to_lowercase(), self.address()].iter().any(|own| own.contains(text))
            || self.endpoints.iter().flat_map(texts).any(|of_endpoint| of_endpoint.contains(text))
    }
}

impl EndpointRow {
    /// `address:port`
    pub(super) fn address(&self) -> String {
        SocketAddr::new(self.address, self.port).to_string()
    }
}

impl Report {
    /// Filters and sorts. An empty filter keeps everything.
    pub(super) fn arrange(&mut self, namespace: Option<&str>, filter: &str, sort: Sort) {
        let filter = filter.to_lowercase();
        self.services.retain(|row| {
            namespace.is_none_or(|namespace| row.namespace == namespace)
                && (filter.is_empty() || row.holds(&filter))
        });
        let bits = |rate: Option<f64>| rate.map(f64::to_bits);
        let rows = &mut self.services;
        match sort {
            Sort::Name => rows.sort_by_cached_key(PortRow::by_name),
            Sort::Calls => rows.sort_by_cached_key(|row| (Reverse(row.calls), row.by_name())),
            // The bits of non-negative floats sort like the numbers.
            Sort::Rate => {
                rows.sort_by_cached_key(|row| (Reverse(bits(row.calls_per_second)), row.by_name()));
            }
            Sort::Refused => rows.sort_by_cached_key(|row| (Reverse(row.refused), row.by_name())),
            Sort::Sockets => rows.sort_by_cached_key(|row| (Reverse(row.sockets), row.by_name())),
        }
    }

    /// As text, with endpoints if `has_endpoints`.
    pub(super) fn text(&self, has_endpoints: bool) -> String {
        let mut lines = vec![HEADER.map(str::to_owned)];
        for row in &self.services {
            lines.push(port_cells(row));
            if has_endpoints {
                lines.extend(row.endpoints.iter().map(endpoint_cells));
            }
        }
        let mut widths = [0; HEADER.len()];
        for line in &lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = cell.chars().count().max(*width);
            }
        }
        lines.iter().fold(String::new(), |mut text, cells| {
            let mut line = String::new();
            for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
                let _infallible = match column {
                    0 | 1 => write!(line, "{cell:width$}  "),
                    HEALTH => write!(line, "{cell}"),
                    _ => write!(line, "{cell:>width$}  "),
                };
            }
            let _infallible = writeln!(text, "{}", line.trim_end());
            text
        })
    }
}

/// The columns.
pub(super) const HEADER: [&str; 10] =
    ["SERVICE", "ADDRESS", "CALLS", "CALLS/S", "REFUSED", "SOCKETS", "ACTIVE", "SHARE", "CONNECT", "HEALTH"];

/// The last column.
const HEALTH: usize = HEADER.len() - 1;

/// A dash for an unknown value.
fn known(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn rate_text(rate: Option<f64>) -> String {
    known(rate.map(|rate| format!("{rate:.1}")))
}

/// Microseconds in few characters.
fn time_text(microseconds: u32) -> String {
    match microseconds {
        0..1000 => format!("{microseconds}us"),
        1000..1_000_000 => format!("{:.1}ms", f64::from(microseconds) / 1e3),
        _ => format!("{:.1}s", f64::from(microseconds) / 1e6),
    }
}

/// A port in the columns of [`HEADER`].
pub(super) fn port_cells(row: &PortRow) -> [String; HEADER.len()] {
    [
        row.service(),
        row.address(),
        row.calls.to_string(),
        rate_text(row.calls_per_second),
        row.refused.to_string(),
        known(row.sockets),
        known(row.active),
        String::new(),
        String::new(),
        if row.ejected == 0 { String::new() } else { format!("{} ejected", row.ejected) },
    ]
}

/// An endpoint in the columns of [`HEADER`].
pub(super) fn endpoint_cells(row: &EndpointRow) -> [String; HEADER.len()] {
    let node = if row.node.is_empty() { "-" } else { &row.node };
    let health = match (&row.health.ejected_reason, row.health.failures) {
        (Some(reason), _) => reason.clone(),
        (None, Some(failures @ 1..)) => format!("{failures} failed in a row"),
        (None, _) => String::new(),
    };
    [
        format!("  {node}"),
        row.address(),
        row.calls.to_string(),
        rate_text(row.calls_per_second),
        // A refused call has no endpoint.
        String::new(),
        known(row.sockets),
        known(row.active),
        row.share.to_string(),
        known(row.health.connect_microseconds.map(time_text)),
        health,
    ]
}

#[cfg(test)]
mod tests;
