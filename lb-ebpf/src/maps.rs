//! Every map of the object. The name of a map is also its pin below `--pin-path`.
//!
//! Each has a row in `lb_common::maps`, which the loader compares with this declaration. The loader overrides
//! the default sizes. docs/MAPS.md describes each.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LruHashMap, SkStorage},
    macros::btf_map,
};
use lb_common::{
    layout::{
        AddressKey, Affinity, AffinityKey, ClusterIp, ConnectLatency, Endpoint4, Endpoint6, EndpointHealth,
        EndpointLoad, EndpointStats, Frontend, FrontendKey4, FrontendKey6, FrontendRef, MapIdentity, Meta,
        NodeAddr, SLOT_WAYS, ServiceCidrs, ServiceStats, SocketEntry, SocketRecords, SocketSlots,
    },
    limits,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const SERVICES: usize = limits::MAX_FRONTENDS as usize;
const FRONTENDS: usize = 2 * SERVICES;
const SLOTS: usize = limits::SOCKET_SETS as usize * SLOT_WAYS;
const ENDPOINTS: usize = limits::MAX_ENDPOINTS as usize;

/// Service address, port, protocol → index into `frontends`.
#[btf_map(name = "services4")]
pub(crate) static SERVICES4: HashMap<FrontendKey4, FrontendRef, SERVICES> = HashMap::new();

/// The same for IPv6.
#[btf_map(name = "services6")]
pub(crate) static SERVICES6: HashMap<FrontendKey6, FrontendRef, SERVICES> = HashMap::new();

/// The frontends. User space switches a run with one 64-bit store.
#[btf_map(name = "frontends")]
pub(crate) static FRONTENDS_MAP: Array<Frontend, FRONTENDS, MMAPABLE> = Array::new();

/// Runs of IPv4 endpoints.
#[btf_map(name = "endpoints4")]
pub(crate) static ENDPOINTS4: Array<Endpoint4, ENDPOINTS, MMAPABLE> = Array::new();

/// Runs of IPv6 endpoints.
#[btf_map(name = "endpoints6")]
pub(crate) static ENDPOINTS6: Array<Endpoint6, ENDPOINTS, MMAPABLE> = Array::new();

/// Addresses of nodes, for node ports.
#[btf_map(name = "node_addrs")]
pub(crate) static NODE_ADDRS: HashMap<AddressKey, NodeAddr, { limits::MAX_NODE_ADDRS as usize }> =
    HashMap::new();

/// Cluster IPs, for calls to ports that their Services lack.
#[btf_map(name = "cluster_ips")]
pub(crate) static CLUSTER_IPS: HashMap<
    AddressKey,
    ClusterIp,
    { limits::MAX_CLUSTER_IPS as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// The networks of cluster IPs.
#[btf_map(name = "service_cidrs")]
pub(crate) static SERVICE_CIDRS: Array<ServiceCidrs, 1, MMAPABLE> = Array::new();

/// Choices of `sessionAffinity: ClientIP`.
#[btf_map(name = "affinity")]
pub(crate) static AFFINITY: LruHashMap<AffinityKey, Affinity, { limits::MAX_AFFINITY as usize }> =
    LruHashMap::new();

/// The owners of slots. A socket finds its slot by its cookie.
#[btf_map(name = "socket_slots")]
pub(crate) static SOCKET_SLOTS: Array<SocketSlots, { limits::SOCKET_SETS as usize }, MMAPABLE> = Array::new();

/// The records in the slots: the flows of each socket.
#[btf_map(name = "sockets")]
pub(crate) static SOCKETS: Array<SocketEntry, SLOTS, MMAPABLE> = Array::new();

/// Records of sockets without a slot, and those that do not fit into one; freed with the socket.
#[btf_map(name = "socket_storage")]
pub(crate) static SOCKET_STORAGE: SkStorage<SocketRecords> = SkStorage::new();

/// The outcomes of connections, by endpoint id.
#[btf_map(name = "endpoint_health")]
pub(crate) static ENDPOINT_HEALTH: Array<EndpointHealth, ENDPOINTS, MMAPABLE> = Array::new();

/// Open connections, by endpoint id.
#[btf_map(name = "endpoint_load")]
pub(crate) static ENDPOINT_LOAD: Array<EndpointLoad, ENDPOINTS, MMAPABLE> = Array::new();

/// Ids of excluded cgroups; cgroups below them are excluded, too.
#[btf_map(name = "excluded")]
pub(crate) static EXCLUDED: HashMap<u64, u32, { limits::MAX_EXCLUDED as usize }> = HashMap::new();

/// Levels below the machine's root at which these may be: bit n for level n.
#[btf_map(name = "excluded_levels")]
pub(crate) static EXCLUDED_LEVELS: Array<u32, 1> = Array::new();

/// Calls by CPU and service port.
#[btf_map(name = "service_stats")]
pub(crate) static SERVICE_STATS: Array<ServiceStats, FRONTENDS, MMAPABLE> = Array::new();

/// Calls by CPU and endpoint.
#[btf_map(name = "endpoint_stats")]
pub(crate) static ENDPOINT_STATS: Array<EndpointStats, ENDPOINTS, MMAPABLE> = Array::new();

/// How long connections take, by service port.
#[btf_map(name = "connect_latency")]
pub(crate) static CONNECT_LATENCY: Array<ConnectLatency, SERVICES, MMAPABLE> = Array::new();

/// Sizes of the image and settings of the programs. Only user space reads and writes it.
#[btf_map(name = "meta")]
pub(crate) static META: Array<Meta, 1> = Array::new();

/// The layout of each map, by map id. Only user space reads and writes it.
#[btf_map(name = "layouts")]
pub(crate) static LAYOUTS: HashMap<u32, MapIdentity, { limits::MAX_IDENTITIES as usize }> = HashMap::new();
