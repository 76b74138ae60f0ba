//! Decides which pinned maps a starting agent adopts. Pure.

use std::{collections::BTreeSet, fmt};

use lb_common::{
    layout::Run,
    maps::{MapSpec, Role},
};
use lb_core::{plan::Capacity, tables};

/// The state of the pin of one map, for a starting agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PinState {
    /// A map as this agent creates it.
    Same,
    /// Nothing, and no earlier agent created such a map.
    New,
    /// Nothing, though an earlier agent created such a map: its pin was removed.
    Lost,
    /// A map of this layout with another number of entries.
    OtherSize,
    /// A map of another layout, or of an unknown one.
    Foreign,
}

/// How the image is adopted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Image {
    /// It stays where it is.
    Stays,
    /// It is moved to tables of other sizes, with its ids.
    Moves,
    /// It cannot be read: the first plan writes it again, with other ids.
    Anew,
}

/// What an agent does with the maps it finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Adoption {
    /// How the image is adopted.
    pub(super) image: Image,
    /// The maps that are kept.
    pub(super) kept: Vec<&'static str>,
    /// The maps that are created, for lack of one or as a replacement.
    pub(super) made: Vec<&'static str>,
    /// The maps found with this agent's layout, in any size.
    pub(super) known: Vec<&'static str>,
}

impl Adoption {
    /// Decides from the maps found.
    pub(super) fn of(found: &[(&'static MapSpec, PinState)]) -> Self {
        let is_any = |role, wanted: &[PinState]| {
            found.iter().any(|(spec, standing)| spec.role == role && wanted.contains(standing))
        };
        let image = if is_any(Role::Image, &[PinState::Foreign, PinState::Lost]) {
            Image::Anew
        } else if is_any(Role::Image, &[PinState::OtherSize]) {
            Image::Moves
        } else {
            Image::Stays
        };
        let is_kept = |spec: &MapSpec, standing| {
            standing == PinState::Same
                && match spec.role {
                    Role::Image | Role::Meta => image == Image::Stays,
                    Role::Counters | Role::Ids => image != Image::Anew,
                    Role::Independent => true,
                }
        };
        let names = |wanted: &dyn Fn(&MapSpec, PinState) -> bool| {
            found
                .iter()
                .filter(|(spec, standing)| wanted(spec, *standing))
                .map(|(spec, _)| spec.name)
                .collect()
        };
        Self {
            image,
            kept: names(&is_kept),
            made: names(&|spec, standing| !is_kept(spec, standing)),
            known: names(&|_, standing| matches!(standing, PinState::Same | PinState::OtherSize)),
        }
    }

    /// Whether counters are copied to a map of another size, under the same ids.
    pub(super) fn refills(&self, counters: &str) -> bool {
        self.image != Image::Anew && self.made.contains(&counters) && self.known.contains(&counters)
    }

    /// Whether the earlier maps serve until the first plan, since the new ones are still incomplete.
    pub(super) fn waits(&self) -> bool {
        self.image != Image::Stays
    }
}

/// A configured size that is not used, because the entries served do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall {
    /// The setting.
    pub setting: &'static str,
    /// Its value: entries of each family.
    pub wanted: u32,
    /// Entries served, of the family that has more; `None` if they cannot be read, since the image has
    /// another layout.
    pub n_served: Option<u32>,
    /// The size that is used: that of the maps found.
    pub used: u32,
}

impl fmt::Display for TooSmall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { setting, wanted, n_served, .. } = self;
        match n_served {
            Some(n) => write!(f, "{setting}={wanted}: {n} are served"),
            None => write!(f, "{setting}={wanted}: the number of entries served cannot be read"),
        }
    }
}

/// Sizes for maps that must hold the entries served: each the wanted one or, if that is too small, the one
/// found.
pub(super) fn sizes(wanted: Capacity, found: Capacity, served: &tables::Image) -> (Capacity, Vec<TooSmall>) {
    let n_services = |ipv6| served.services.keys().filter(|address| address.ip.is_ipv6() == ipv6).count();
    // Frontends may share a run.
    let n_endpoints = |ipv6| {
        let frontends = served.services.iter().filter(|(address, _)| address.ip.is_ipv6() == ipv6);
        let runs = frontends.filter_map(|(_, id)| served.frontends.get(id)).map(|frontend| frontend.run);
        let runs: BTreeSet<(u32, u32)> = runs.map(|run| (run.offset, run.len)).collect();
        let n_entries = |(offset, len): (u32, u32)| {
            let stored = served.stored(ipv6, Run { offset, len });
            stored.map_or(len as usize, |run| run.entries().len())
        };
        runs.into_iter().map(n_entries).sum::<usize>()
    };
    let mut too_small = Vec::new();
    let mut choose = |setting, wanted, found, n_served: usize| {
        let n_served = u32::try_from(n_served).unwrap_or(u32::MAX);
        // More entries than the maps found can hold means a damaged image, which the first plan repairs.
        if n_served <= wanted || found <= wanted {
            return wanted;
        }
        too_small.push(TooSmall { setting, wanted, n_served: Some(n_served), used: found });
        found
    };
    let most = |n: &dyn Fn(bool) -> usize| n(false).max(n(true));
    let capacity = Capacity {
        services: choose("max-services", wanted.services, found.services, most(&n_services)),
        endpoints: choose("max-endpoints", wanted.endpoints, found.endpoints, most(&n_endpoints)),
    };
    (capacity, too_small)
}

/// Sizes for maps that replace others whose image cannot be read: the wanted ones, but no smaller than those
/// found, since the entries served might not fit. The next start can read the image and shrinks them.
pub(super) fn sizes_unread(wanted: Capacity, found: Capacity) -> (Capacity, Vec<TooSmall>) {
    let mut too_small = Vec::new();
    let mut choose = |setting, wanted: u32, found: u32| {
        if wanted < found {
            too_small.push(TooSmall { setting, wanted, n_served: None, used: found });
        }
        wanted.max(found)
    };
    let capacity = Capacity {
        services: choose("max-services", wanted.services, found.services),
        endpoints: choose("max-endpoints", wanted.endpoints, found.endpoints),
    };
    (capacity, too_small)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use lb_common::{
        layout::{Frontend, Run},
        maps::MAPS,
    };
    use lb_core::{desired::FrontendAddress, model::Protocol};

    use super::*;

    #[test]
    fn sizes_that_do_not_hold_what_is_served_are_refused() {
        let mut served = tables::Image::default();
        // Four services of IPv4, two of which share a run, and two of IPv6: ten endpoints and six.
        for (n, ipv6, offset, len) in [
            (1, false, 0, 4),
            (2, false, 4, 6),
            (3, false, 4, 6),
            (4, false, 0, 0),
            (5, true, 0, 3),
            (6, true, 3, 3),
        ] {
            let ip = if ipv6 { Ipv6Addr::from(u128::from(n)).into() } else { Ipv4Addr::from(n).into() };
            served.services.insert(FrontendAddress { ip, port: 80, protocol: Protocol::Tcp }, n);
            served.frontends.insert(n, Frontend { run: Run { offset, len }, ..Frontend::default() });
        }
        let found = Capacity { services: 100, endpoints: 200 };
        for (wanted, expected, refused) in [
            ((100, 200), (100, 200), vec![]),
            ((4, 10), (4, 10), vec![]),
            ((1000, 2000), (1000, 2000), vec![]),
            ((3, 2000), (100, 2000), vec![("max-services", 3, 4, 100)]),
            ((4, 9), (4, 200), vec![("max-endpoints", 9, 10, 200)]),
            ((1, 1), (100, 200), vec![("max-services", 1, 4, 100), ("max-endpoints", 1, 10, 200)]),
        ] {
            let wanted = Capacity { services: wanted.0, endpoints: wanted.1 };
            let (capacity, too_small) = sizes(wanted, found, &served);
            assert_eq!((capacity.services, capacity.endpoints), expected, "{wanted:?}");
            let refused: Vec<TooSmall> = refused
                .into_iter()
                .map(|(setting, wanted, n, used)| TooSmall { setting, wanted, n_served: Some(n), used })
                .collect();
            assert_eq!(too_small, refused, "{wanted:?}");
        }
        assert_eq!(sizes(Capacity { services: 1, endpoints: 1 }, found, &tables::Image::default()).1, []);
    }

    #[test]
    fn maps_that_cannot_be_read_do_not_become_smaller() {
        let found = Capacity { services: 100, endpoints: 200 };
        for (wanted, expected, refused) in [
            ((100, 200), (100, 200), vec![]),
            ((1000, 2000), (1000, 2000), vec![]),
            ((20, 2000), (100, 2000), vec![("max-services", 20, 100)]),
            ((1, 1), (100, 200), vec![("max-services", 1, 100), ("max-endpoints", 1, 200)]),
        ] {
            let wanted = Capacity { services: wanted.0, endpoints: wanted.1 };
            let (capacity, too_small) = sizes_unread(wanted, found);
            assert_eq!((capacity.services, capacity.endpoints), expected, "{wanted:?}");
            let told: Vec<_> = too_small.iter().map(|size| (size.setting, size.wanted, size.used)).collect();
            assert_eq!(told, refused, "{wanted:?}");
            assert!(too_small.iter().all(|size| size.to_string().ends_with("cannot be read")));
        }
        let nothing = Capacity { services: 0, endpoints: 0 };
        assert_eq!(sizes_unread(found, nothing), (found, Vec::new()));
    }

    #[test]
    fn only_what_changed_is_made_anew() {
        use PinState::{Foreign, Lost, New, OtherSize, Same};
        let image: Vec<&str> =
            MAPS.iter().filter(|map| map.role == Role::Image).map(|map| map.name).collect();
        let with_image = |more: &[&'static str]| [&image[..], more].concat();
        let all: Vec<&str> = MAPS.iter().map(|map| map.name).collect();
        let ids: Vec<&str> = MAPS
            .iter()
            .filter(|map| matches!(map.role, Role::Image | Role::Ids | Role::Counters | Role::Meta))
            .map(|map| map.name)
            .collect();
        // The standing of some maps (the others are `Same`), how the image is adopted, and the maps created.
        for (changed, fate, made) in [
            (vec![], Image::Stays, vec![]),
            (vec![("sockets", Foreign)], Image::Stays, vec!["sockets"]),
            (vec![("affinity", Foreign), ("excluded", New)], Image::Stays, vec!["affinity", "excluded"]),
            (vec![("affinity", Lost)], Image::Stays, vec!["affinity"]),
            (vec![("service_stats", Foreign)], Image::Stays, vec!["service_stats"]),
            (vec![("meta", Foreign)], Image::Stays, vec!["meta"]),
            (vec![("endpoints6", New)], Image::Stays, vec!["endpoints6"]),
            (vec![("endpoints4", OtherSize)], Image::Moves, with_image(&["meta"])),
            (
                vec![("services4", OtherSize), ("service_stats", OtherSize), ("sockets", Foreign)],
                Image::Moves,
                with_image(&["sockets", "service_stats", "meta"]),
            ),
            (vec![("frontends", Foreign)], Image::Anew, ids.clone()),
            (vec![("services4", Lost)], Image::Anew, ids.clone()),
            (vec![("services4", OtherSize), ("services6", Foreign)], Image::Anew, ids),
            (all.iter().map(|name| (*name, New)).collect(), Image::Stays, all.clone()),
            (all.iter().map(|name| (*name, Foreign)).collect(), Image::Anew, all.clone()),
        ] {
            let standing = |name: &str| {
                changed.iter().find(|(changed, _)| *changed == name).map_or(Same, |(_, how)| *how)
            };
            let found: Vec<_> = MAPS.iter().map(|spec| (spec, standing(spec.name))).collect();
            let adoption = Adoption::of(&found);
            let sorted = |mut names: Vec<&'static str>| {
                names.sort_unstable();
                names
            };
            assert_eq!((adoption.image, sorted(adoption.made.clone())), (fate, sorted(made)), "{changed:?}");
            assert_eq!(adoption.kept.len() + adoption.made.len(), MAPS.len(), "{changed:?}");
            assert_eq!(adoption.waits(), fate != Image::Stays);
            let is_resized = changed.contains(&("service_stats", OtherSize));
            assert_eq!(adoption.refills("service_stats"), is_resized, "{changed:?}");
        }
    }
}
