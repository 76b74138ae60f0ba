//! The table of all maps: what the programs declare, what is pinned, and how an upgrade treats it.
//!
//! # Invariants
//!
//! - Every map of the BPF object has a row here. The loader rejects an object with other types, sizes or
//!   flags.
//! - A map whose meaning changes gets another [`MapSpec::layout`], and so another fingerprint.
//! - The content of a map is valid beside a new, empty map of any other row. Rows that must change together
//!   raise their layouts together.

use crate::{
    layout::{
        AddressKey, Affinity, AffinityKey, ClusterIp, ConnectLatency, Endpoint4, Endpoint6, EndpointHealth,
        EndpointLoad, EndpointStats, Frontend, FrontendKey4, FrontendKey6, FrontendRef, MapIdentity, Meta,
        NodeAddr, SLOT_WAYS, ServiceCidrs, ServiceStats, SocketEntry, SocketRecords, SocketSlots,
    },
    limits,
};

/// The used values of `enum bpf_map_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// `BPF_MAP_TYPE_HASH`
    Hash = 1,
    /// `BPF_MAP_TYPE_ARRAY`
    Array = 2,
    /// `BPF_MAP_TYPE_LRU_HASH`
    LruHash = 9,
    /// `BPF_MAP_TYPE_SK_STORAGE`
    SkStorage = 24,
}

/// How the settings determine the number of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// The same for all settings.
    Fixed(u32),
    /// `--max-services`, for each family; or service ids below that number.
    Services,
    /// One for each frontend of both families.
    Frontends,
    /// `--max-endpoints`, for each family.
    Endpoints,
    /// Counters of services: [`Self::Frontends`] for each CPU, up to [`MAX_COUNTER_BYTES`].
    ServiceCounters,
    /// Counters of endpoints: [`Self::Endpoints`] for each CPU, up to [`MAX_COUNTER_BYTES`].
    EndpointCounters,
}

/// A map's relation to the others. It decides what happens to the map when another one is recreated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Part of the image, which assigns ids. All maps of the image are recreated together.
    Image,
    /// Counters, indexed by ids of the image. They are kept while the ids are.
    Counters,
    /// Entries that refer to ids of the image. They are kept while the ids are.
    Ids,
    /// Independent of the others.
    Independent,
    /// Records how the programs were loaded. Recreated with the image.
    Meta,
}

/// The declaration of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// Its name in the object and below `--pin-path`.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Octets of a key.
    pub key_size: u32,
    /// Octets of a value.
    pub value_size: u32,
    /// Creation flags (`BPF_F_*`).
    pub flags: u32,
    /// Number of entries.
    pub size: Size,
    /// What happens to it when others change.
    pub role: Role,
    /// Number of its layout. Raised when a key, a value or its meaning changes. Type, sizes and flags are in
    /// the fingerprint anyway.
    pub layout: u32,
}

const MMAPABLE: u32 = 1 << 10;
const NO_PREALLOC: u32 = 1;

#[expect(clippy::cast_possible_truncation, reason = "keys and values are small")]
const fn octets_of<T>() -> u32 {
    size_of::<T>() as u32
}

/// Slots of sockets.
#[expect(clippy::cast_possible_truncation, reason = "two")]
const SLOTS: u32 = limits::SOCKET_SETS * SLOT_WAYS as u32;

macro_rules! maps {
    ($($(#[$doc:meta])* $name:ident: $kind:ident[$key:ty => $value:ty], $flags:expr, $size:expr, $role:ident,
        layout $layout:literal;)+) => {
        /// All maps.
        pub const MAPS: &[MapSpec] = &[$(MapSpec {
            name: stringify!($name),
            kind: Kind::$kind,
            key_size: octets_of::<$key>(),
            value_size: octets_of::<$value>(),
            flags: $flags,
            size: $size,
            role: Role::$role,
            layout: $layout,
        }),+];
    };
}

maps! {
    services4: Hash[FrontendKey4 => FrontendRef], 0, Size::Services, Image, layout 1;
    services6: Hash[FrontendKey6 => FrontendRef], 0, Size::Services, Image, layout 1;
    frontends: Array[u32 => Frontend], MMAPABLE, Size::Frontends, Image, layout 1;
    endpoints4: Array[u32 => Endpoint4], MMAPABLE, Size::Endpoints, Image, layout 2;
    endpoints6: Array[u32 => Endpoint6], MMAPABLE, Size::Endpoints, Image, layout 2;
    node_addrs: Hash[AddressKey => NodeAddr], 0, Size::Fixed(limits::MAX_NODE_ADDRS), Image, layout 1;
    cluster_ips: Hash[AddressKey => ClusterIp], NO_PREALLOC, Size::Fixed(limits::MAX_CLUSTER_IPS), Image,
        layout 1;
    service_cidrs: Array[u32 => ServiceCidrs], MMAPABLE, Size::Fixed(1), Image, layout 1;
    affinity: LruHash[AffinityKey => Affinity], 0, Size::Fixed(limits::MAX_AFFINITY), Ids, layout 1;
    socket_slots: Array[u32 => SocketSlots], MMAPABLE, Size::Fixed(limits::SOCKET_SETS), Ids, layout 1;
    sockets: Array[u32 => SocketEntry], MMAPABLE, Size::Fixed(SLOTS), Ids, layout 1;
    socket_storage: SkStorage[i32 => SocketRecords], NO_PREALLOC, Size::Fixed(0), Ids, layout 1;
    endpoint_health: Array[u32 => EndpointHealth], MMAPABLE, Size::Endpoints, Ids, layout 1;
    endpoint_load: Array[u32 => EndpointLoad], MMAPABLE, Size::Endpoints, Ids, layout 1;
    excluded: Hash[u64 => u32], 0, Size::Fixed(limits::MAX_EXCLUDED), Independent, layout 1;
    excluded_levels: Array[u32 => u32], 0, Size::Fixed(1), Independent, layout 1;
    service_stats: Array[u32 => ServiceStats], MMAPABLE, Size::ServiceCounters, Counters, layout 1;
    endpoint_stats: Array[u32 => EndpointStats], MMAPABLE, Size::EndpointCounters, Counters, layout 1;
    connect_latency: Array[u32 => ConnectLatency], MMAPABLE, Size::Services, Counters, layout 1;
    // Agents with one version for all maps read this map's layout as that version: 1 and 2 were theirs.
    meta: Array[u32 => Meta], 0, Size::Fixed(1), Meta, layout 3;
    layouts: Hash[u32 => MapIdentity], 0, Size::Fixed(limits::MAX_IDENTITIES), Independent, layout 1;
}

/// Names of maps that only earlier versions pinned. A starting agent removes their pins: their content would
/// be outdated after a downgrade.
pub const REMOVED: &[&str] = &[];

/// The map with the layouts of all maps. Its own layout never changes.
pub const LAYOUTS: &str = "layouts";

/// Finds a map by its name.
#[must_use]
pub fn find(name: &str) -> Option<&'static MapSpec> {
    MAPS.iter().find(|map| map.name == name)
}

/// Largest size of a map of counters in octets, over all CPUs.
pub const MAX_COUNTER_BYTES: u64 = 64 << 20;

/// The inputs of map sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// `--max-services`
    pub services: u32,
    /// `--max-endpoints`
    pub endpoints: u32,
    /// Possible CPUs, including gaps in their numbers; at least 1.
    pub n_cpus: u32,
}

impl MapSpec {
    /// Number of entries.
    ///
    /// Counters have a value for each CPU. Ids are assigned from 0; one beyond the map is served but not
    /// counted.
    #[must_use]
    pub const fn max_entries(&self, sizing: &Sizing) -> u32 {
        let frontends = sizing.services.saturating_mul(2);
        match self.size {
            Size::Fixed(entries) => entries,
            Size::Services => sizing.services,
            Size::Frontends => frontends,
            Size::Endpoints => sizing.endpoints,
            Size::ServiceCounters => self.counters(frontends, sizing.n_cpus),
            Size::EndpointCounters => self.counters(sizing.endpoints, sizing.n_cpus),
        }
    }

    /// Entries of a map of counters: a multiple of the number of CPUs.
    const fn counters(&self, wanted: u32, n_cpus: u32) -> u32 {
        let n_cpus = if n_cpus == 0 { 1 } else { n_cpus as u64 };
        let (wanted, most) = (wanted as u64, MAX_COUNTER_BYTES / self.value_size as u64 / n_cpus);
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_COUNTER_BYTES")]
        let n_entries = (n_cpus * if most < wanted { most } else { wanted }) as u32;
        n_entries
    }

    /// Identifies the layout: FNV-1a over name, type, key and value sizes, flags and layout number, without
    /// the number of entries.
    #[must_use]
    pub const fn fingerprint(&self) -> u64 {
        let mut hash = fnv(0xcbf2_9ce4_8422_2325, self.name.as_bytes());
        let numbers = [self.kind as u32, self.key_size, self.value_size, self.flags, self.layout];
        let mut n = 0;
        while n < numbers.len() {
            hash = fnv(hash, &numbers[n].to_le_bytes());
            n += 1;
        }
        hash
    }
}

const fn fnv(mut hash: u64, octets: &[u8]) -> u64 {
    let mut n = 0;
    while n < octets.len() {
        hash = (hash ^ octets[n] as u64).wrapping_mul(0x0100_0000_01b3);
        n += 1;
    }
    hash
}

#[cfg(test)]
mod tests {
    use std::{borrow::ToOwned, collections::BTreeSet, string::String};

    use super::*;
    use crate::hooks::HOOKS;

    #[test]
    fn names_and_fingerprints_are_unique() {
        let names: BTreeSet<&str> = MAPS.iter().map(|map| map.name).chain(REMOVED.iter().copied()).collect();
        assert_eq!(names.len(), MAPS.len() + REMOVED.len());
        // The kernel stores 15 octets of a name.
        assert!(names.iter().all(|name| name.len() <= 15));
        let fingerprints: BTreeSet<u64> = MAPS.iter().map(MapSpec::fingerprint).collect();
        assert_eq!(fingerprints.len(), MAPS.len());
        assert!(!fingerprints.contains(&0), "0 is no fingerprint");
        assert_eq!(find("meta").map(|map| map.role), Some(Role::Meta));
        assert_eq!(find(LAYOUTS).map(|map| map.layout), Some(1), "it never changes");
        assert_eq!(find("nothing"), None);
    }

    #[test]
    fn the_documentation_shows_what_there_is() {
        let text = include_str!("../../docs/MAPS.md");
        let names_in = |heading: &str| {
            let section = text.split(heading).nth(1).unwrap_or_else(|| panic!("no {heading:?}"));
            let rows = section
                .split("\n#")
                .next()
                .unwrap_or_default()
                .lines()
                .filter(|line| line.starts_with("| `"));
            let names = rows.flat_map(|row| row.split('|').nth(1).unwrap_or_default().split(','));
            names.map(|name| name.trim().trim_matches('`').to_owned()).collect::<BTreeSet<_>>()
        };
        let maps: BTreeSet<String> = MAPS.iter().map(|map| map.name.to_owned()).collect();
        assert_eq!(names_in("\n## Maps\n"), maps);
        assert_eq!(names_in("\n### Size\n"), maps);
        let hooks: BTreeSet<String> = HOOKS.iter().map(|hook| hook.name.to_owned()).collect();
        assert_eq!(names_in("\n## Links\n"), hooks);
    }

    #[test]
    fn everything_but_the_size_is_part_of_the_fingerprint() {
        let map = MAPS[0];
        let same = MapSpec { size: Size::Fixed(1), role: Role::Independent, ..map };
        assert_eq!(same.fingerprint(), map.fingerprint());
        for other in [
            MapSpec { name: "services5", ..map },
            MapSpec { kind: Kind::LruHash, ..map },
            MapSpec { key_size: map.key_size + 4, ..map },
            MapSpec { value_size: map.value_size + 4, ..map },
            MapSpec { flags: map.flags | NO_PREALLOC, ..map },
            MapSpec { layout: map.layout + 1, ..map },
        ] {
            assert_ne!(other.fingerprint(), map.fingerprint(), "{other:?}");
        }
    }

    #[test]
    fn counters_take_a_bounded_room() {
        for (name, services, endpoints, n_cpus, expected) in [
            ("endpoint_stats", 1, 262_144, 1, 262_144),
            ("endpoint_stats", 1, 262_144, 16, 16 * 262_144),
            ("endpoint_stats", 1, 262_144, 32, 32 * 131_072),
            ("service_stats", 65_536, 1, 21, 21 * 131_072),
            ("service_stats", 65_536, 1, 22, 22 * 127_100),
            ("endpoint_stats", 1, 1 << 24, 1024, 1024 * 4096),
            ("endpoint_stats", 1, 5, 0, 5),
            ("services6", 7, 9, 2, 7),
            ("frontends", 7, 9, 2, 14),
            ("endpoints4", 7, 9, 2, 9),
            ("meta", 7, 9, 2, 1),
        ] {
            let sizing = Sizing { services, endpoints, n_cpus };
            assert_eq!(find(name).unwrap().max_entries(&sizing), expected, "{name} for {sizing:?}");
        }
    }
}
