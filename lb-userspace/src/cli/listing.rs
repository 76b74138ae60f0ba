//! Frontends as people and scripts read them: the kernel's tables joined with the objects behind them.
//!
//! Pure. The types here are the public JSON; they are neither map types nor model types.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use lb_agent::{serve::known::Known, snapshot::Snapshot};
use lb_common::layout::EndpointStats;
use lb_core::{
    desired::{
        self, FrontendAddress, FrontendKind, Settings,
        endpoints::{PortEndpoints, Scope},
    },
    model::{Family, Protocol, Store, TrafficPolicy, store::Changes},
    plan::Capacity,
    state::State,
    tables::Image,
};
use serde::Serialize;

/// One frontend. Field names are a promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrontendRow {
    /// Namespace of the Service; empty if no object is known for this address.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the Service port.
    pub port_name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: Protocol,
    /// `ClusterIP`, `NodePort`, `ExternalIP` or `LoadBalancer`; empty if no object is known.
    pub kind: &'static str,
    /// The address that programs call; the unspecified address of a family stands for every node address of it.
    pub address: IpAddr,
    /// The port that programs call.
    pub port: u16,
    /// The traffic policy that applies.
    pub policy: TrafficPolicy,
    /// Idle time-out of the affinity; 0 without.
    pub affinity_seconds: u32,
    /// The endpoints that a call may reach.
    pub endpoints: Vec<EndpointRow>,
}

impl FrontendRow {
    /// The key in the tables.
    #[must_use]
    pub const fn frontend(&self) -> FrontendAddress {
        FrontendAddress { ip: self.address, port: self.port, protocol: self.protocol }
    }
}

/// One endpoint of a frontend. Field names are a promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointRow {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// The node it runs on, if known.
    pub node: String,
    /// Its zone, if known.
    pub zone: String,
    /// Condition `ready`.
    pub ready: bool,
    /// Condition `serving`.
    pub serving: bool,
    /// Condition `terminating`.
    pub terminating: bool,
    /// `connect()` calls and datagrams sent there on this node.
    pub connections: u64,
    /// How many of them came to nothing. Always `null`: a hook runs before the kernel connects, and nothing tells it
    /// what became of that.
    pub failures: Option<u64>,
}

/// Builds the state that a snapshot's objects ask for, without any kernel.
#[must_use]
pub fn state_of(snapshot: Snapshot) -> State {
    let (settings, interfaces) = (snapshot.settings(), snapshot.interfaces.clone());
    state(settings, interfaces, |store| {
        let mut changes = store.replace_nodes(snapshot.nodes);
        changes.merge(store.replace_services(snapshot.services));
        changes.merge(store.replace_slices(snapshot.slices));
        changes
    })
}

/// Builds the state that an agent's objects ask for. Its frontends are those that the kernel follows, its objects the
/// latest.
#[must_use]
pub fn state_of_known(known: Known) -> State {
    let mut state = state(known.settings, known.interfaces, |store| {
        let mut changes = store.replace_nodes(known.nodes);
        changes.merge(store.replace_services(known.services));
        changes.merge(store.replace_slices(known.slices));
        changes
    });
    for (key, frontends) in known.former {
        state.restore_frontends(&key, frontends);
    }
    state
}

fn state(settings: Settings, interfaces: Vec<IpAddr>, fill: impl FnOnce(&mut Store) -> Changes) -> State {
    let mut state = State::new(settings, interfaces, Capacity::default(), &Image::default());
    state.change(fill);
    let _what_empty_tables_would_need = state.sync();
    state
}

/// Whether the objects tell of everything in a row: the service, and each of its endpoints. If not, they are of another
/// moment than the tables.
#[must_use]
pub fn is_described(row: &FrontendRow, state: &State) -> bool {
    state.desired().owner(&row.frontend()).is_some_and(|owner| {
        let described = describe_endpoints(state, owner);
        row.endpoints
            .iter()
            .all(|endpoint| described.contains_key(&SocketAddr::new(endpoint.address, endpoint.port)))
    })
}

/// The row of one frontend; `None` if the tables do not hold it.
#[must_use]
pub fn find(
    image: &Image,
    address: FrontendAddress,
    objects: Option<&State>,
    stats: &BTreeMap<u32, EndpointStats>,
) -> Option<FrontendRow> {
    let id = image.services.get(&address)?;
    Some(row(image, address, *id, objects, stats))
}

/// Lists every frontend that the tables hold, in the order of namespace, name, port, address.
///
/// `objects` name and describe them; a frontend that they do not know is listed by its address alone.
#[must_use]
pub fn list(
    image: &Image,
    objects: Option<&State>,
    stats: &BTreeMap<u32, EndpointStats>,
) -> Vec<FrontendRow> {
    let mut rows: Vec<FrontendRow> =
        image.services.iter().map(|(address, id)| row(image, *address, *id, objects, stats)).collect();
    sort(&mut rows);
    rows
}

/// Brings rows into the order of [`list`].
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
    stats: &BTreeMap<u32, EndpointStats>,
) -> FrontendRow {
    let frontend = image.frontends.get(&id).copied().unwrap_or_default();
    let owner = objects.and_then(|state| state.desired().owner(&address));
    let described =
        objects.zip(owner).map(|(state, owner)| describe_endpoints(state, owner)).unwrap_or_default();
    let entries = image.entries(address.ip.is_ipv6(), frontend.run).unwrap_or_default();
    let mut endpoints: Vec<EndpointRow> = entries
        .iter()
        .map(|entry| {
            let calls = stats.get(&entry.endpoint_id).copied().unwrap_or_default();
            let known = described.get(&entry.address).cloned();
            EndpointRow {
                connections: calls.connects + calls.datagrams,
                ..known.unwrap_or_else(|| undescribed(entry.address))
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
    }
}

/// The name of a kind of frontend in output.
#[must_use]
pub const fn kind_name(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIP => "ClusterIP",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIP => "ExternalIP",
        FrontendKind::NodePort => "NodePort",
    }
}

/// What the objects say of an endpoint that they do not list: nothing but that the tables hold it.
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
        failures: None,
    }
}

fn describe_endpoints(state: &State, owner: &desired::Frontend) -> BTreeMap<SocketAddr, EndpointRow> {
    let Some(service) = state.store().service(&owner.port.service) else { return BTreeMap::new() };
    let Some(port) = service.port(&owner.port.port_name, owner.port.protocol) else {
        return BTreeMap::new();
    };
    let family = if owner.port.ipv6 { Family::V6 } else { Family::V4 };
    PortEndpoints::new(port, family, state.store().slices_of(&service.key))
        .classify(Scope::Cluster, state.topology())
        .map(|(address, endpoint, _left_out)| {
            let text = |name: &Option<std::sync::Arc<str>>| name.as_deref().unwrap_or_default().to_owned();
            let row = EndpointRow {
                node: text(&endpoint.node),
                zone: text(&endpoint.zone),
                ready: endpoint.ready,
                serving: endpoint.serving,
                terminating: endpoint.terminating,
                ..undescribed(address)
            };
            (address, row)
        })
        .collect()
}

/// Columns that a terminal has at least. Names may be longer than that; endpoints are counted where they have no room.
const COLUMNS: usize = 100;

/// The rows as a table for people.
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

/// Endpoints that a table shows before it counts the rest.
const SHOWN_ENDPOINTS: usize = 2;

/// The endpoints of a frontend, as many of them as have room; their number if none has.
fn endpoints_cell(row: &FrontendRow, room: usize) -> String {
    let n_all = row.endpoints.len();
    if n_all == 0 {
        return "none: refused".to_owned();
    }
    let listed = |n_shown: usize| {
        let mut parts: Vec<String> = row.endpoints[..n_shown]
            .iter()
            .map(|endpoint| SocketAddr::new(endpoint.address, endpoint.port).to_string())
            .collect();
        if n_all > n_shown {
            parts.push(format!("+{} more", n_all - n_shown));
        }
        parts.join(" ")
    };
    let fitting = (1..=SHOWN_ENDPOINTS.min(n_all)).rev().map(listed).find(|cell| cell.len() <= room);
    fitting.unwrap_or_else(|| format!("{n_all} endpoints"))
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

/// A service port in tables: `namespace/name:port`, or a dash if no object is known.
pub(super) fn service_text(namespace: &str, name: &str, port_name: &str) -> String {
    match (name, port_name) {
        ("", _) => "-".to_owned(),
        (_, "") => format!("{namespace}/{name}"),
        _ => format!("{namespace}/{name}:{port_name}"),
    }
}

#[cfg(test)]
mod tests;
