//! Capacities and numbers shared by the BPF programs and user space.

/// Default of `--max-services`: frontends per address family.
///
/// Twice Kubernetes' tested limit of 10,000 services with three ports each.
pub const MAX_FRONTENDS: u32 = 65_536;

/// Default of `--max-endpoints`: entries of the endpoint table per address family, over all runs.
pub const MAX_ENDPOINTS: u32 = 262_144;

/// Entries of the map `node_addrs`: 5,000 nodes with two addresses in each family, with room.
pub const MAX_NODE_ADDRS: u32 = 32_768;

/// Addresses that are used of one Node: several times what clouds list. A Node is written by its own kubelet,
/// which must not use up the room of others.
pub const MAX_ADDRS_PER_NODE: usize = 64;

/// Entries of the map `cluster_ips`: twice Kubernetes' tested limit of 10,000 services in both families, with
/// room. Allocated on use.
pub const MAX_CLUSTER_IPS: u32 = 65_536;

/// Service networks in each family. A cluster has one, and a few more during a migration.
pub const MAX_SERVICE_CIDRS: usize = 8;

/// Entries of the LRU map `affinity`: pairs of client network namespace and service port with affinity.
pub const MAX_AFFINITY: u32 = 65_536;

/// Entries of the map `socket_slots`, a power of two. Two slots each: 64 KiB of owners and 1 MiB of records.
///
/// Not a limit: sockets without a slot use socket storage, which costs half a microsecond more.
pub const SOCKET_SETS: u32 = 4096;

/// Entries of the map `excluded`: excluded cgroups.
pub const MAX_EXCLUDED: u32 = 4096;

/// Entries of the map `layouts`: the maps of a few versions. The agent removes those that are not pinned.
pub const MAX_IDENTITIES: u32 = 256;

/// Levels of cgroups below the machine's root that can be excluded, from 1 on: one bit of a word each. A
/// pod's level is 2 to 5, in a kind node two more.
pub const CGROUP_LEVELS: u32 = 16;

/// Default first and last node port (kube-apiserver's `--service-node-port-range`).
pub const NODE_PORTS: (u16, u16) = (30_000, 32_767);

/// Endpoints that a single run may hold.
///
/// Bounded by the endpoint table; the constant keeps arithmetic on offsets from overflowing.
pub const MAX_RUN: u32 = 1 << 24;
