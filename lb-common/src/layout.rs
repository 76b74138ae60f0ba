//! The exact bytes of map keys and values.
//!
//! # Invariants
//!
//! - Every type is `repr(C)` without implicit padding: the size equals the sum of its fields. [`map_type!`]
//!   checks it at compile time, so every byte of a value is initialised.
//! - Numbers, not Rust enums: the function that decodes a byte from the kernel has a result for every value.
//! - Addresses are octet arrays, ports are in host order, so that `bpftool map dump` prints `"port": 80`.
//! - Field names are part of the public interface: scripts read them from `bpftool map dump pinned`.

use crate::{
    address::{Address, Octets4, Octets6},
    limits::MAX_SERVICE_CIDRS,
};

/// Declares a map key or value: `repr(C)`, `Copy`, and a compile-time check that it has no padding.
macro_rules! map_type {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident : $ty:ty,)+ }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)+ }

        const _: () = assert!(
            size_of::<$name>() == 0 $(+ size_of::<$ty>())+,
            concat!(stringify!($name), " has implicit padding: add a reserved field")
        );
        // Map values are 8-aligned in the kernel; a stricter alignment is impossible.
        const _: () = assert!(align_of::<$name>() <= 8);

        // SAFETY: `repr(C)`, every field is itself `MapValue`-compatible (integers and octet arrays by
        // construction of this module), and the assertion above rules out padding.
        unsafe impl MapValue for $name {}
    };
}

/// A type whose values are plain bytes: no padding, no invalid bit pattern, no pointer.
///
/// # Safety
///
/// Every bit pattern of `size_of::<Self>()` octets must be a valid value, and no octet may be padding.
pub unsafe trait MapValue: Copy + 'static {}

// SAFETY: an array of plain bytes without gaps is plain bytes.
unsafe impl<T: MapValue, const N: usize> MapValue for [T; N] {}
// SAFETY: an integer has no padding and no invalid bit pattern.
unsafe impl MapValue for u32 {}
// SAFETY: as above.
unsafe impl MapValue for u64 {}

/// An IP protocol number in a key.
///
/// Not an enum: a map may hold a value of another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// `IPPROTO_TCP`.
    pub const TCP: Self = Self(6);
    /// `IPPROTO_UDP`. `IPPROTO_UDPLITE` sockets count as UDP.
    pub const UDP: Self = Self(17);
    /// `IPPROTO_SCTP`: known from Services, never served (semantics R3).
    pub const SCTP: Self = Self(132);
}

map_type! {
    /// Key of `services4`: an IPv4 frontend. 8 octets.
    ///
    /// A node-port frontend for all accepted node addresses has the address `0.0.0.0`.
    #[repr(align(4))]
    pub struct FrontendKey4 {
        /// Service address.
        pub address: Octets4,
        /// Service port, host order.
        pub port: u16,
        /// IP protocol number ([`Protocol`]).
        pub protocol: u8,
        /// Zero.
        pub reserved: u8,
    }
}

map_type! {
    /// Key of `services6`: an IPv6 frontend. 20 octets.
    ///
    /// A node-port frontend for all accepted node addresses has the address `::`.
    ///
    /// Aligned so that the programs write the address as words; bytewise it takes a function call.
    #[repr(align(4))]
    pub struct FrontendKey6 {
        /// Service address.
        pub address: Octets6,
        /// Service port, host order.
        pub port: u16,
        /// IP protocol number ([`Protocol`]).
        pub protocol: u8,
        /// Zero.
        pub reserved: u8,
    }
}

map_type! {
    /// Value of `services4` and `services6`: the index of the frontend. 4 octets.
    ///
    /// Never changed while the key exists: the kernel recycles a replaced or deleted hash element at once,
    /// even while a reader uses it. What changes is in `frontends`, whose entries stay in place
    /// (docs/decisions/0001).
    pub struct FrontendRef {
        /// Index into `frontends`.
        pub frontend_id: u32,
    }
}

map_type! {
    /// The endpoints of a frontend: `len` consecutive entries of the endpoint table from `offset`. 8 octets.
    ///
    /// Read and written as one aligned 64-bit word: one store switches from an old set to a new one.
    pub struct Run {
        /// Index of the first entry in `endpoints4` or `endpoints6`.
        pub offset: u32,
        /// Number of entries; 0 means that the service has no usable endpoint.
        pub len: u32,
    }
}

impl Run {
    /// A run without endpoints.
    pub const EMPTY: Self = Self { offset: 0, len: 0 };

    /// The run as one 64-bit word in native byte order, for an atomic store.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u64 {
        let (offset, len) = (self.offset as u64, self.len as u64);
        if cfg!(target_endian = "little") { len << 32 | offset } else { offset << 32 | len }
    }

    /// The inverse of [`Self::to_word`].
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "each half is taken on its own")]
        let (low, high) = (word as u32, (word >> 32) as u32);
        if cfg!(target_endian = "little") {
            Self { offset: low, len: high }
        } else {
            Self { offset: high, len: low }
        }
    }
}

map_type! {
    /// Value of `frontends`: a frontend. 24 octets, index = `frontend_id`.
    ///
    /// Memory-mapped and changed in place, word by word: `run` is one 64-bit word, each other field an
    /// independent 32-bit word.
    pub struct Frontend {
        /// The endpoints that a call may reach.
        pub run: Run,
        /// The service port this frontend belongs to: index into `service_stats`, scope of affinity.
        pub service_id: u32,
        /// Idle time-out of `sessionAffinity: ClientIP` in seconds; 0 = no affinity.
        pub affinity_seconds: u32,
        /// Bits of [`frontend_flags`].
        pub flags: u32,
        /// When endpoints are ejected ([`crate::health::Policy::to_word`]); 0 = never.
        pub health: u32,
    }
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flags {
    /// The frontend is a node port: its key has the wildcard address and it answers only on node addresses.
    pub const NODE_PORT: u32 = 1;
    /// `externalTrafficPolicy: Local`: the wildcard entry does not match addresses of other nodes; nodes with
    /// endpoints have exact entries (semantics R6).
    pub const EXTERNAL_LOCAL: u32 = 1 << 1;
    /// The policy is Local and only other nodes have endpoints: the policy causes the refusal, not the
    /// service (semantics R9, row 2). For counters and `explain`.
    pub const NO_LOCAL_ENDPOINT: u32 = 1 << 2;
    /// An address of a service network that no Service has. Not in any table: [`crate::resolve`] sets it.
    pub const UNALLOCATED: u32 = 1 << 3;
    /// `socklb.io/balance: least-connections`: of four endpoints drawn, the one with the fewest open
    /// connections.
    pub const LEAST_CONNECTIONS: u32 = 1 << 4;
}

/// Bits of [`Endpoint4::extra`] and [`Endpoint6::extra`].
///
/// A run of `n` endpoints with weights, or with a set to fall back to, is **extended**. Calls choose one of
/// the first `n` entries; a frontend's run holds no more. What follows belongs to it:
///
/// | entries | hold |
/// | --- | --- |
/// | `0..n` | the endpoints, sorted by id, each with [`endpoint_extra::EXTENDED`] and its probability of its alias |
/// | `n..2n` | their aliases (Walker's method), a copy of another endpoint; in `extra` the share of endpoint `i` |
/// | `2n` | the number `m` of endpoints to fall back to, in place of the endpoint id |
/// | `2n+1..2n+1+m` | these endpoints, sorted by id |
pub mod endpoint_extra {
    /// The run is extended. Set in all of its first `n` entries or in none.
    pub const EXTENDED: u16 = 1 << 15;
    /// How often a call that draws this entry goes to the entry `n` further, in 1/32768.
    pub const ALIAS: u16 = EXTENDED - 1;
}

map_type! {
    /// Value of `endpoints4`. 12 octets, at a stride of 16 in the memory-mapped array.
    ///
    /// Immutable while any frontend's run, or a program that read such a run, can refer to it.
    pub struct Endpoint4 {
        /// Endpoint address.
        pub address: Octets4,
        /// Endpoint port, host order.
        pub port: u16,
        /// Bits of [`endpoint_extra`]; 0 in a run of endpoints with equal shares.
        pub extra: u16,
        /// Id of this address and port within its service port: index into `endpoint_stats`.
        pub endpoint_id: u32,
    }
}

map_type! {
    /// Value of `endpoints6`. 24 octets.
    ///
    /// Immutable while any frontend's run, or a program that read such a run, can refer to it.
    pub struct Endpoint6 {
        /// Endpoint address.
        pub address: Octets6,
        /// Endpoint port, host order.
        pub port: u16,
        /// Bits of [`endpoint_extra`]; 0 in a run of endpoints with equal shares.
        pub extra: u16,
        /// Id of this address and port within its service port: index into `endpoint_stats`.
        pub endpoint_id: u32,
    }
}

map_type! {
    /// Key of `affinity`: a client and a service port. 16 octets.
    pub struct AffinityKey {
        /// Cookie of the client's network namespace: the client identity at a socket (semantics R8).
        pub client: u64,
        /// The service port; all its frontends share one entry.
        pub service_id: u32,
        /// Zero.
        pub reserved: u32,
    }
}

map_type! {
    /// Value of `affinity`. 16 octets.
    pub struct Affinity {
        /// Time of the last call, in seconds since boot without suspend (`CLOCK_MONOTONIC`).
        pub last_used: u64,
        /// The endpoint that this client uses. Counts only while the frontend's run holds it.
        pub endpoint_id: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// Slots that a socket may use.
pub const SLOT_WAYS: usize = 2;

/// Records in the storage of one socket. A power of two, so that a mask bounds an index for the verifier.
pub const SOCKET_RECORDS: usize = 16;

map_type! {
    /// A flow of a socket: one service address and its endpoint. 48 octets.
    ///
    /// It answers "which endpoint does this socket use for this service?" and, with
    /// [`record_flags::ANSWERS`], "which service does this peer belong to?".
    ///
    /// IPv4 addresses are kept as `::ffff:a.b.c.d`. A record with protocol 0 is unused.
    #[repr(align(8))]
    pub struct SocketRecord {
        /// The address that the program called.
        pub service_address: Octets6,
        /// The address that the kernel's socket talks to.
        pub endpoint_address: Octets6,
        /// The port that the program called, host order.
        pub service_port: u16,
        /// The port that the kernel's socket talks to, host order.
        pub endpoint_port: u16,
        /// The endpoint, for the next datagram to the same service address.
        pub endpoint_id: u32,
        /// The service port, so that stale sockets can be found by service.
        pub service_id: u32,
        /// Position of the endpoint in the run when it was chosen, at most 65,535.
        pub index: u16,
        /// IP protocol number ([`Protocol`]); 0 if the record is unused.
        pub protocol: u8,
        /// Bits of [`record_flags`].
        pub flags: u8,
    }
}

/// Bits of [`SocketRecord::flags`].
pub mod record_flags {
    /// The endpoint is shown to the program as the service. Of several records with one endpoint, only the
    /// last called one has the flag; none has it once the endpoint's own address was called.
    pub const ANSWERS: u8 = 1;
    /// The endpoint counts this socket ([`EndpointLoad::active`]). Of a socket's first record only.
    ///
    /// [`EndpointLoad::active`]: super::EndpointLoad::active
    pub const COUNTED: u8 = 1 << 1;
}

map_type! {
    /// Value of `socket_slots`: the owners of a set of slots. 16 octets: four sets share a cache line, and
    /// cookies ascend, so a socket finds the line warm.
    pub struct SocketSlots {
        /// Cookies of owners; 0 is free. Slot `way` of set `i` is entry `i * SLOT_WAYS + way` of `sockets`.
        pub owners: [u64; SLOT_WAYS],
    }
}

map_type! {
    /// Value of `sockets`: the records in a slot. 128 octets: two cache lines, one for each record.
    ///
    /// Two, because a `connect()` can fail: the socket then keeps its former peer and that peer's record.
    pub struct SocketEntry {
        /// Cookie of the writing socket. The records are valid while `socket_slots` names the same owner.
        pub cookie: u64,
        /// Bits of [`entry_flags`].
        pub flags: u32,
        /// Of a TCP socket, `health` of the frontend that it called: see [`Attempt`].
        pub health: u32,
        /// The first record. A TCP socket has no other.
        pub first: SocketRecord,
        /// The second record, if [`entry_flags::SECOND`] is set.
        pub second: SocketRecord,
        /// Of a TCP socket with a health policy, its `connect()`.
        pub attempt: Attempt,
    }
}

map_type! {
    /// A `connect()` whose outcome counts for the endpoint's health. 16 octets.
    pub struct Attempt {
        /// When the SYN was first sent, in nanoseconds of `CLOCK_MONOTONIC`. Bit 0 is set if another program
        /// had requested the callbacks of this socket, so that they must stay.
        pub sent_at: u64,
        /// Cookie of the caller's network namespace.
        pub netns: u64,
    }
}

/// Bits of [`SocketEntry::flags`].
pub mod entry_flags {
    /// The second record is used.
    pub const SECOND: u32 = 1;
    /// The socket has socket storage with more records.
    pub const STORAGE: u32 = 1 << 1;
}

map_type! {
    /// Value of `socket_storage`: records of a socket that have no slot or do not fit into it. 800 octets.
    pub struct SocketRecords {
        /// Cookie of the socket; 0 for a multipath TCP socket, whose subflows have their own storage.
        pub cookie: u64,
        /// The records.
        pub records: [SocketRecord; SOCKET_RECORDS],
        /// Position of the next record when all are used; it replaces the oldest.
        pub next: u32,
        /// As in [`SocketEntry`].
        pub health: u32,
        /// As in [`SocketEntry`]; its record is the first.
        pub attempt: Attempt,
    }
}

map_type! {
    /// Key of `node_addrs` and `cluster_ips`: an address, IPv4 as `::ffff:a.b.c.d`. 16 octets.
    pub struct AddressKey {
        /// The address.
        pub address: Octets6,
    }
}

map_type! {
    /// Value of `node_addrs`.
    pub struct NodeAddr {
        /// 1 for an address of this node that accepts node ports, 0 for an address of another node.
        pub own: u32,
    }
}

map_type! {
    /// Value of `cluster_ips`.
    pub struct ClusterIp {
        /// 1 if a call to a port that the Service lacks is refused, 0 if it passes.
        pub served: u32,
    }
}

map_type! {
    /// An IPv4 network. 8 octets.
    pub struct Network4 {
        /// The address, with zero host bits.
        pub address: Octets4,
        /// The netmask.
        pub mask: Octets4,
    }
}

map_type! {
    /// An IPv6 network. 32 octets.
    pub struct Network6 {
        /// The address, with zero host bits.
        pub address: Octets6,
        /// The netmask.
        pub mask: Octets6,
    }
}

map_type! {
    /// Value of `service_cidrs`, index 0: the service networks. 328 octets.
    ///
    /// A network changes only while both counts are 0, after a grace period.
    #[repr(align(8))]
    pub struct ServiceCidrs {
        /// Number of active entries of `v4`.
        pub n_v4: u32,
        /// Number of active entries of `v6`.
        pub n_v6: u32,
        /// IPv4.
        pub v4: [Network4; MAX_SERVICE_CIDRS],
        /// IPv6.
        pub v6: [Network6; MAX_SERVICE_CIDRS],
    }
}

map_type! {
    /// Value of `service_stats`, index = CPU x ids + service id: calls to a service port. 24 octets.
    pub struct ServiceStats {
        /// `connect()` calls that were redirected to an endpoint.
        pub connects: u64,
        /// Calls of any kind that were refused for lack of an endpoint.
        pub refusals: u64,
        /// Datagrams of unconnected sockets that were redirected to an endpoint.
        pub datagrams: u64,
    }
}

map_type! {
    /// Value of `endpoint_stats`, index = CPU x ids + endpoint id: calls to an endpoint. 16 octets.
    pub struct EndpointStats {
        /// `connect()` calls that were redirected to this endpoint.
        pub connects: u64,
        /// Datagrams of unconnected sockets that were redirected to this endpoint.
        pub datagrams: u64,
    }
}

map_type! {
    /// Value of `endpoint_health`, index = endpoint id: the outcomes of connections to it. 64 octets: one
    /// cache line.
    ///
    /// Written by the programs; the agent only resets it with the id. Programs on several CPUs may lose a
    /// failure to each other. Times are nanoseconds of `CLOCK_MONOTONIC`; rules are in [`crate::health`].
    pub struct EndpointHealth {
        /// End of the ejection; 0 = not ejected. Until a connection is established, calls avoid the endpoint
        /// even after this time, except for one on trial.
        pub ejected_until: u64,
        /// When the last call on trial was sent.
        pub tried_at: u64,
        /// When a connection was last established.
        pub reached_at: u64,
        /// The network namespace that established it.
        pub reached_netns: u64,
        /// When the first of the failures in a row was sent.
        pub failing_since: u64,
        /// The network namespace of the failures in a row; [`crate::health::SEVERAL`] if there are several.
        pub failing_netns: u64,
        /// Failures in a row.
        pub failures: u32,
        /// Ejections in a row: the next one takes one `base` longer.
        pub ejections: u32,
        /// The error of the last failure (`errno`); 0 for a retransmitted SYN.
        pub errno: u32,
        /// Time from SYN to established in microseconds, a moving average with weight 1/8; 0 = unknown.
        pub latency: u32,
    }
}

/// Buckets of [`ConnectLatency`].
pub const LATENCY_BUCKETS: usize = 14;

map_type! {
    /// Value of `connect_latency`, index = service id: how long connections to a service port took from their
    /// SYN to established. 64 octets: one cache line.
    ///
    /// Programs on all CPUs add to it.
    pub struct ConnectLatency {
        /// Sum of all times in microseconds.
        pub sum: u64,
        /// Connections by time. Bucket n counts those below [`ConnectLatency::bound`] and not below that of
        /// bucket n - 1; the last one has no bound.
        pub buckets: [u32; LATENCY_BUCKETS],
    }
}

impl ConnectLatency {
    /// The bound of the first bucket as a power of two: 128 microseconds.
    const FIRST: u32 = 7;

    /// The bucket of a time in microseconds.
    #[inline(always)]
    #[must_use]
    pub const fn bucket(microseconds: u32) -> usize {
        let n = (u32::BITS - (microseconds >> Self::FIRST).leading_zeros()) as usize;
        if n < LATENCY_BUCKETS { n } else { LATENCY_BUCKETS - 1 }
    }

    /// The bound of a bucket in microseconds, from 128 to 524,288; `None` for the last one, which in an
    /// ordinary network counts connections whose SYN was sent again.
    #[must_use]
    pub const fn bound(bucket: usize) -> Option<u32> {
        if bucket + 1 < LATENCY_BUCKETS { Some(1 << (Self::FIRST as usize + bucket)) } else { None }
    }
}

map_type! {
    /// Value of `endpoint_load`, index = endpoint id: how busy it is. 4 octets.
    ///
    /// Programs count connections of Services with `least-connections`; the agent corrects what they miss,
    /// such as sockets that were closed while no program was attached.
    pub struct EndpointLoad {
        /// Sockets of this node that called the endpoint and are open. May be below 0 for a moment.
        pub active: i32,
    }
}

map_type! {
    /// Value of `meta`, index 0: sizes of the image, and the settings of the programs. 32 octets.
    ///
    /// `layout_version` stays the first field in all versions.
    pub struct Meta {
        /// Layout of this value. Up to 2 it was the layout of all maps.
        pub layout_version: u32,
        /// Entries of `services4` and of `services6`.
        pub max_services: u32,
        /// Entries of `endpoints4` and of `endpoints6`.
        pub max_endpoints: u32,
        /// 1 if node ports answer on loopback addresses of the node.
        pub localhost_nodeports: u32,
        /// Cookie of the node's network namespace; 0 means the initial one.
        pub node_netns: u64,
        /// First port of the node-port range.
        pub node_port_first: u16,
        /// Last port of the node-port range.
        pub node_port_last: u16,
        /// 1 with passive health.
        pub passive_health: u32,
    }
}

map_type! {
    /// Value of `layouts`, whose key is the kernel's map id: the layout of that map. 16 octets.
    ///
    /// By id, not by name: the map behind a name is replaced, a map keeps its layout.
    pub struct MapIdentity {
        /// [`crate::maps::MapSpec::fingerprint`]
        pub fingerprint: u64,
        /// [`crate::maps::MapSpec::layout`], for readers of dumps.
        pub layout: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// The differences between the two families in the layouts above.
///
/// Implemented for the octet arrays [`Octets4`] and [`Octets6`].
pub trait FamilyLayout: Address {
    /// The key type of this family's service table.
    type Key: MapValue + Ord + core::fmt::Debug;
    /// The value type of this family's endpoint table.
    type Endpoint: MapValue + core::fmt::Debug;

    /// Builds a key.
    fn key(address: Self, port: u16, protocol: Protocol) -> Self::Key;
    /// Splits a key.
    fn key_parts(key: &Self::Key) -> (Self, u16, Protocol);
    /// Builds an entry of the endpoint table. `extra`: see [`endpoint_extra`].
    fn entry(address: Self, port: u16, endpoint_id: u32, extra: u16) -> Self::Endpoint;
    /// Splits an entry of the endpoint table: address, port, endpoint id.
    fn entry_parts(entry: &Self::Endpoint) -> (Self, u16, u32);
    /// The bits of [`endpoint_extra`].
    fn entry_extra(entry: &Self::Endpoint) -> u16;
}

macro_rules! family_layout {
    ($octets:ty, $key:ident, $endpoint:ident) => {
        impl FamilyLayout for $octets {
            type Key = $key;
            type Endpoint = $endpoint;

            #[inline(always)]
            fn key(address: Self, port: u16, protocol: Protocol) -> $key {
                $key { address, port, protocol: protocol.0, reserved: 0 }
            }

            #[inline(always)]
            fn key_parts(key: &$key) -> (Self, u16, Protocol) {
                (key.address, key.port, Protocol(key.protocol))
            }

            #[inline(always)]
            fn entry(address: Self, port: u16, endpoint_id: u32, extra: u16) -> $endpoint {
                $endpoint { address, port, extra, endpoint_id }
            }

            #[inline(always)]
            fn entry_parts(entry: &$endpoint) -> (Self, u16, u32) {
                (entry.address, entry.port, entry.endpoint_id)
            }

            #[inline(always)]
            fn entry_extra(entry: &$endpoint) -> u16 {
                entry.extra
            }
        }
    };
}

family_layout!(Octets4, FrontendKey4, Endpoint4);
family_layout!(Octets6, FrontendKey6, Endpoint6);

/// Addresses of records are compared as 64-bit words. The first record of an entry shares a cache line with
/// its cookie.
const _: () = assert!(
    core::mem::offset_of!(SocketRecord, service_address) % 8 == 0
        && core::mem::offset_of!(SocketRecord, endpoint_address) % 8 == 0
        && core::mem::offset_of!(SocketEntry, second) == 64
        && size_of::<SocketEntry>() == 128
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_documented_ones() {
        assert_eq!(size_of::<FrontendKey4>(), 8);
        assert_eq!(size_of::<FrontendKey6>(), 20);
        assert_eq!(size_of::<FrontendRef>(), 4);
        assert_eq!(size_of::<Run>(), 8);
        assert_eq!(size_of::<Frontend>(), 24);
        assert_eq!(core::mem::offset_of!(Frontend, run), 0);
        assert_eq!(size_of::<Endpoint4>(), 12);
        assert_eq!(size_of::<Endpoint6>(), 24);
        assert_eq!(size_of::<Meta>(), 32);
        assert_eq!(size_of::<SocketRecord>(), 48);
        assert_eq!(size_of::<SocketEntry>(), 128);
        assert_eq!(size_of::<SocketRecords>(), 800);
        assert_eq!(size_of::<EndpointHealth>(), 64);
        assert_eq!(size_of::<ConnectLatency>(), 64);
        assert_eq!(size_of::<MapIdentity>(), 16);
        assert_eq!(size_of::<ServiceCidrs>(), 328);
    }

    #[test]
    fn a_run_survives_its_word() {
        for run in [Run::EMPTY, Run { offset: 1, len: 2 }, Run { offset: u32::MAX, len: u32::MAX - 1 }] {
            assert_eq!(Run::from_word(run.to_word()), run);
        }
    }

    #[test]
    fn each_time_has_one_bucket() {
        for (microseconds, expected) in [
            (0, 0),
            (127, 0),
            (128, 1),
            (255, 1),
            (1 << 18, 12),
            ((1 << 19) - 1, 12),
            (1 << 19, 13),
            (u32::MAX, 13),
        ] {
            let bucket = ConnectLatency::bucket(microseconds);
            assert_eq!(bucket, expected, "{microseconds}");
            assert!(ConnectLatency::bound(bucket).is_none_or(|bound| microseconds < bound), "{microseconds}");
        }
        assert_eq!((ConnectLatency::bound(0), ConnectLatency::bound(12)), (Some(128), Some(524_288)));
        assert_eq!(ConnectLatency::bound(13), None);
    }

    #[test]
    fn the_protocol_is_part_of_the_key() {
        let tcp = Octets4::key([10, 96, 0, 10], 53, Protocol::TCP);
        let udp = Octets4::key([10, 96, 0, 10], 53, Protocol::UDP);
        assert_ne!(tcp, udp);
        assert_eq!(Octets4::key_parts(&udp), ([10, 96, 0, 10], 53, Protocol::UDP));
    }
}
