//! Frontends for people and scripts: the kernel's tables joined with the objects.
//!
//! Pure. The types here are the public JSON; they are neither map types nor model types.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    iter,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use lb_agent::{serve::known::Known, snapshot::Snapshot};
use lb_common::layout::{EndpointHealth, EndpointStats};
use lb_core::{
    desired::{
        self, FrontendAddress, FrontendKind, PacketSide, Settings,
        endpoints::{PortEndpoints, Scope},
    },
    ejection,
    model::{Balance, Node, Protocol, Service, Slice, TrafficPolicy},
    plan::Capacity,
    state::State,
    tables::{Image, StoredRun},
};
use serde::Serialize;

/// One frontend. Field names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrontendRow {
    /// Namespace of the Service; empty if no object has this address.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the Service port.
    pub port_name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: Protocol,
    /// `ClusterIP`, `NodePort`, `ExternalIP` or `LoadBalancer`; empty if no object has this address.
    pub kind: &'static str,
    /// The called address; the unspecified address stands for all node addresses of its family.
    pub address: IpAddr,
    /// The called port.
    pub port: u16,
    /// The traffic policy.
    pub policy: TrafficPolicy,
    /// Idle timeout of the affinity in seconds; 0 without affinity.
    pub affinity_seconds: u32,
    /// The endpoints that a call may reach; with `packets.only`, a packet.
    pub endpoints: Vec<EndpointRow>,
    /// What differs for packets that reach no hook; `null` if they are not served here.
    pub packets: Option<PacketPart>,
}

/// What differs for packets. Field names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PacketPart {
    /// Whether sockets are not served: their calls go out as packets.
    pub only: bool,
    /// Number of endpoints that packets from outside the cluster may reach.
    pub endpoints_from_outside: usize,
    /// The networks whose packets are let through; `null` for all.
    pub source_ranges: Option<Vec<String>>,
}

impl PacketPart {
    fn new(owner: &desired::Frontend, side: &PacketSide) -> Self {
        Self {
            only: !owner.is_for_sockets(),
            endpoints_from_outside: side.outside.as_ref().unwrap_or(&owner.endpoints).len(),
            source_ranges: side
                .sources
                .as_ref()
                .map(|ranges| ranges.iter().map(ToString::to_string).collect()),
        }
    }
}

impl FrontendRow {
    /// The key in the table.
    #[must_use]
    pub const fn frontend(&self) -> FrontendAddress {
        FrontendAddress { ip: self.address, port: self.port, protocol: self.protocol }
    }
}

/// One endpoint of a frontend. Field names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointRow {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its node, if known.
    pub node: String,
    /// Its zone, if known.
    pub zone: String,
    /// Condition `ready`.
    pub ready: bool,
    /// Condition `serving`.
    pub serving: bool,
    /// Condition `terminating`.
    pub terminating: bool,
    /// `connect()` calls and datagrams that this node redirected to it.
    pub connections: u64,
    /// Its share of the calls, from 1 to 255, the largest one of the frontend: equal shares are 255.
    pub share: u8,
    /// Open connections of this node; `null` unless the Service's balance is `least-connections`.
    pub active: Option<u32>,
    /// What became of connections to it.
    #[serde(flatten)]
    pub health: HealthPart,
}

/// The outcomes of connections to an endpoint, as fields of its row. Field names are stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HealthPart {
    /// Connections that failed in a row, up to now; `null` where connections are not observed (UDP, or the
    /// annotation `socklb.io/health: off`).
    pub failures: Option<u32>,
    /// Seconds until the ejection ends; `null` if it is not ejected. 0 while a call is on trial.
    pub ejected_seconds: Option<u64>,
    /// Why it is ejected, and until when, for people; `null` if it is not ejected.
    pub ejected_reason: Option<String>,
    /// Ejections in a row.
    pub ejections: u32,
    /// Time from SYN to established in microseconds, a moving average; `null` if unknown.
    pub connect_microseconds: Option<u32>,
}

impl HealthPart {
    /// The health of an endpoint at a time, in nanoseconds of `CLOCK_MONOTONIC`. `is_observed` is whether its
    /// frontend has a policy: without one, calls do not avoid what was ejected before.
    #[must_use]
    pub fn new(is_observed: bool, health: &EndpointHealth, now: u64) -> Self {
        if !is_observed {
            return Self::default();
        }
        Self {
            failures: Some(health.failures),
            ejected_seconds: health.ejected_seconds(now),
            ejected_reason: ejection::why_avoided(health, now),
            ejections: health.ejections,
            connect_microseconds: (health.latency != 0).then_some(health.latency),
        }
    }
}

/// What the maps count for an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndpointCounts {
    /// Calls.
    pub calls: EndpointStats,
    /// Open connections.
    pub active: u32,
    /// The outcomes of connections.
    pub health: EndpointHealth,
    /// Nanoseconds of `CLOCK_MONOTONIC` when both were read.
    pub now: u64,
}

/// Builds the state of a snapshot's objects, without a kernel.
#[must_use]
pub fn state_of(snapshot: Snapshot) -> State {
    let settings = snapshot.settings();
    let Snapshot { interfaces, nodes, services, slices, .. } = snapshot;
    state(settings, interfaces, nodes, services, slices)
}

/// Builds the state of an agent's objects.
#[must_use]
pub fn state_of_known(known: Known) -> State {
    let Known { settings, interfaces, nodes, services, slices, .. } = known;
    state(settings, interfaces, nodes, services, slices)
}

fn state(
    settings: Settings,
    interfaces: Vec<IpAddr>,
    nodes: Vec<Arc<Node>>,
    services: Vec<Arc<Service>>,
    slices: Vec<Arc<Slice>>,
) -> State {
    let mut state = State::new(settings, interfaces, Capacity::default(), &Image::default());
    state.change(|store| {
        let mut changes = store.replace_nodes(nodes);
        changes.merge(store.replace_services(services));
        changes.merge(store.replace_slices(slices));
        changes
    });
    let _what_empty_tables_would_need = state.sync();
    state
}

/// Whether the objects describe the whole row: its Service and each of its endpoints. If not, objects and
/// tables are of different times.
#[must_use]
pub fn is_described(row: &FrontendRow, state: &State) -> bool {
    state.desired().owner(&row.frontend()).is_some_and(|owner| {
        let described = describe_endpoints(state, owner);
        row.endpoints
            .iter()
            .all(|endpoint| described.contains_key(&SocketAddr::new(endpoint.address, endpoint.port)))
    })
}

/// The row of one frontend; `None` if the tables lack it.
#[must_use]
pub fn find(
    image: &Image,
    address: FrontendAddress,
    objects: Option<&State>,
    counts: &BTreeMap<u32, EndpointCounts>,
) -> Option<FrontendRow> {
    let id = image.services.get(&address)?;
    Some(row(image, address, *id, objects, counts))
}

/// Lists every frontend of the tables, sorted by namespace, name, port, address.
///
/// A frontend without an object has its address only.
#[must_use]
pub fn list(
    image: &Image,
    objects: Option<&State>,
    counts: &BTreeMap<u32, EndpointCounts>,
) -> Vec<FrontendRow> {
    let mut rows: Vec<FrontendRow> =
        image.services.iter().map(|(address, id)| row(image, *address, *id, objects, counts)).collect();
    sort(&mut rows);
    rows
}

/// The rows of the frontends that only packets reach: the hooks' tables lack them.
#[must_use]
pub fn packets_alone(state: &State) -> Vec<FrontendRow> {
    let row = |(owner, side): (&desired::Frontend, &PacketSide)| {
        let described = describe_endpoints(state, owner);
        let endpoint = |at: &SocketAddr| described.get(at).cloned().unwrap_or_else(|| undescribed(*at));
        FrontendRow {
            namespace: owner.port.service.namespace.to_string(),
            name: owner.port.service.name.to_string(),
            port_name: owner.port.port_name.to_string(),
            protocol: owner.address.protocol,
            kind: kind_name(owner.kind),
            address: owner.address.ip,
            port: owner.address.port,
            policy: owner.policy,
            affinity_seconds: owner.affinity_seconds,
            endpoints: owner.endpoints.iter().map(endpoint).collect(),
            packets: Some(PacketPart::new(owner, side)),
        }
    };
    state.desired().packets_alone().map(row).collect()
}

/// Sorts rows in the order of [`list`].
pub fn sort(rows: &mut [FrontendRow]) {
    rows.sort_by(|a, b| {
        let key = |row: &FrontendRow| (row.namespace.clone(), row.name.clone(), row.port_name.clone());
        key(a)
            .cmp(&key(b))
            .then_with(|| (a.address, a.port, a.protocol).cmp(&(b.address, b.port, b.protocol)))
    });
}

fn row(
    image: &Image,
    address: FrontendAddress,
    id: u32,
    objects: Option<&State>,
    counts: &BTreeMap<u32, EndpointCounts>,
) -> FrontendRow {
    let frontend = image.frontends.get(&id).copied().unwrap_or_default();
    let owner = objects.and_then(|state| state.desired().owner(&address));
    let described =
        objects.zip(owner).map(|(state, owner)| describe_endpoints(state, owner)).unwrap_or_default();
    let run = image.stored(address.ip.is_ipv6(), frontend.run);
    let shares = run.and_then(StoredRun::shares).into_iter().flatten().chain(iter::repeat(u8::MAX));
    let is_counted = Balance::of_flags(frontend.flags) == Balance::LeastConnections;
    let mut endpoints: Vec<EndpointRow> = run
        .map(StoredRun::endpoints)
        .unwrap_or_default()
        .iter()
        .zip(shares)
        .map(|(entry, share)| {
            let EndpointCounts { calls, active, health, now } =
                counts.get(&entry.endpoint_id).copied().unwrap_or_default();
            let known = described.get(&entry.address()).cloned();
            EndpointRow {
                connections: calls.connects + calls.datagrams,
                share,
                active: is_counted.then_some(active),
                health: HealthPart::new(frontend.health != 0, &health, now),
                ..known.unwrap_or_else(|| undescribed(entry.address()))
            }
        })
        .collect();
    endpoints.sort_by_key(|endpoint| (endpoint.address, endpoint.port));
    let text = |part: fn(&desired::Frontend) -> String| owner.map(part).unwrap_or_default();
    FrontendRow {
        namespace: text(|owner| owner.port.service.namespace.to_string()),
        name: text(|owner| owner.port.service.name.to_string()),
        port_name: text(|owner| owner.port.port_name.to_string()),
        protocol: address.protocol,
        kind: owner.map_or("", |owner| kind_name(owner.kind)),
        address: address.ip,
        port: address.port,
        policy: owner.map_or(TrafficPolicy::Cluster, |owner| owner.policy),
        affinity_seconds: frontend.affinity_seconds,
        endpoints,
        packets: objects
            .and_then(|state| state.desired().packet_owner(&address))
            .map(|(owner, side)| PacketPart::new(owner, side)),
    }
}

/// The kind of a frontend in output.
#[must_use]
pub const fn kind_name(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIP => "ClusterIP",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIP => "ExternalIP",
        FrontendKind::NodePort => "NodePort",
    }
}

/// An endpoint that the objects lack: its address only.
fn undescribed(address: SocketAddr) -> EndpointRow {
    EndpointRow {
        address: address.ip(),
        port: address.port(),
        node: String::new(),
        zone: String::new(),
        ready: true,
        serving: true,
        terminating: false,
        connections: 0,
        share: u8::MAX,
        active: None,
        health: HealthPart::default(),
    }
}

fn describe_endpoints(state: &State, owner: &desired::Frontend) -> BTreeMap<SocketAddr, EndpointRow> {
    PortEndpoints::of_port(state.store(), &owner.port)
        .classify(Scope::Cluster, state.topology())
        .map(|(address, endpoint, _left_out)| {
            let text = |name: Option<&str>| name.unwrap_or_default().to_owned();
            let row = EndpointRow {
                node: text(endpoint.node()),
                zone: text(endpoint.zone()),
                ready: endpoint.ready,
                serving: endpoint.serving,
                terminating: endpoint.terminating,
                ..undescribed(address)
            };
            (address, row)
        })
        .collect()
}

/// Minimum width of a terminal, in columns. Long names may exceed it; endpoints are shown as a number when
/// they do not fit.
const COLUMNS: usize = 100;

/// The rows as a table.
#[must_use]
pub fn table(rows: &[FrontendRow]) -> String {
    let header = ["SERVICE", "KIND", "ADDRESS", "POLICY"].map(str::to_owned);
    let cells: Vec<[String; 4]> = std::iter::once(header).chain(rows.iter().map(cells)).collect();
    let mut widths = [0; 4];
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let room = COLUMNS.saturating_sub(widths.iter().map(|width| width + 2).sum());
    let endpoints = rows.iter().map(|row| endpoints_cell(row, room));
    let last = std::iter::once("ENDPOINTS".to_owned()).chain(endpoints);
    cells.iter().zip(last).fold(String::new(), |mut text, (row, last)| {
        for (cell, width) in row.iter().zip(widths) {
            let _infallible = write!(text, "{cell:width$}  ");
        }
        let _infallible = writeln!(text, "{last}");
        text
    })
}

/// Maximum number of endpoints in a table cell; the rest is counted.
const SHOWN_ENDPOINTS: usize = 2;

/// As many endpoints of a frontend as fit; their number if none fits.
fn endpoints_cell(row: &FrontendRow, room: usize) -> String {
    let n_all = row.endpoints.len();
    let mut notes = Vec::new();
    if let Some(packets) = &row.packets {
        notes.extend(packets.only.then(|| "packets only".to_owned()));
        let n_outside = packets.endpoints_from_outside;
        notes.extend((n_outside != n_all).then(|| format!("from outside: {n_outside}")));
        notes.extend(packets.source_ranges.as_ref().map(|_| "source ranges".to_owned()));
    }
    let note = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join("; ")) };
    let room = room.saturating_sub(note.len());
    if n_all == 0 {
        return format!("none: refused{note}");
    }
    let listed = |n_shown: usize| {
        let mut parts: Vec<String> = row.endpoints[..n_shown]
            .iter()
            .map(|endpoint| {
                let is_ejected = if endpoint.health.ejected_seconds.is_some() { " (ejected)" } else { "" };
                format!("{}{is_ejected}", SocketAddr::new(endpoint.address, endpoint.port))
            })
            .collect();
        if n_all > n_shown {
            parts.push(format!("+{} more", n_all - n_shown));
        }
        parts.join(" ")
    };
    let fitting = (1..=SHOWN_ENDPOINTS.min(n_all)).rev().map(listed).find(|cell| cell.len() <= room);
    fitting.unwrap_or_else(|| format!("{n_all} endpoints")) + &note
}

fn cells(row: &FrontendRow) -> [String; 4] {
    let kind = if row.kind.is_empty() { "-" } else { row.kind };
    let policy = match row.policy {
        TrafficPolicy::Cluster => "Cluster",
        TrafficPolicy::Local => "Local",
    };
    let service = service_text(&row.namespace, &row.name, &row.port_name);
    [service, kind.to_owned(), row.frontend().to_string(), policy.to_owned()]
}

/// A service port as `namespace/name:port`, or a dash if no object is known.
pub(super) fn service_text(namespace: &str, name: &str, port_name: &str) -> String {
    match (name, port_name) {
        ("", _) => "-".to_owned(),
        (_, "") => format!("{namespace}/{name}"),
        _ => format!("{namespace}/{name}:{port_name}"),
    }
}

#[cfg(test)]
mod tests;
