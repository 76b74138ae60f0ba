//! What becomes of each pinned map when an agent starts. Pure.

use std::{collections::BTreeSet, fmt};

use lb_common::maps::{MapSpec, Role};
use lb_core::{plan::Capacity, tables};

/// What is pinned under the name of a map, seen from an agent that starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// A map as this agent makes it.
    Same,
    /// Nothing, and no agent before has made such a map.
    New,
    /// Nothing, though an agent before has made such a map: its pin was removed.
    Lost,
    /// A map of this layout with another number of entries.
    OtherSize,
    /// A map of another layout, or of none that is known.
    Foreign,
}

/// What becomes of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Image {
    /// It stays where it is.
    Stays,
    /// It is moved to tables of other sizes, with its ids.
    Moves,
    /// It cannot be read: the first plan writes it anew, with other ids.
    Anew,
}

/// What an agent does with the maps that it finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Takeover {
    /// What becomes of the image.
    pub(super) image: Image,
    /// The maps that go on as they are.
    pub(super) kept: Vec<&'static str>,
    /// The maps that are made, because there were none or in the place of others.
    pub(super) made: Vec<&'static str>,
    /// The maps that are found with the layout that this agent gives them, in whatever size.
    pub(super) known: Vec<&'static str>,
}

impl Takeover {
    /// Decides by what is found.
    pub(super) fn of(found: &[(&'static MapSpec, Standing)]) -> Self {
        let is_any = |role, wanted: &[Standing]| {
            found.iter().any(|(spec, standing)| spec.role == role && wanted.contains(standing))
        };
        let image = if is_any(Role::Image, &[Standing::Foreign, Standing::Lost]) {
            Image::Anew
        } else if is_any(Role::Image, &[Standing::OtherSize]) {
            Image::Moves
        } else {
            Image::Stays
        };
        let is_kept = |spec: &MapSpec, standing| {
            standing == Standing::Same
                && match spec.role {
                    Role::Image | Role::Meta => image == Image::Stays,
                    Role::Counters | Role::Ids => image != Image::Anew,
                    Role::Independent => true,
                }
        };
        let names = |wanted: &dyn Fn(&MapSpec, Standing) -> bool| {
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
            known: names(&|_, standing| matches!(standing, Standing::Same | Standing::OtherSize)),
        }
    }

    /// Whether counters are copied: their ids go on, in a map of another size.
    pub(super) fn refills(&self, counters: &str) -> bool {
        self.image != Image::Anew && self.made.contains(&counters) && self.known.contains(&counters)
    }

    /// Whether what is found serves until the first plan: before, the new maps do not hold everything that is served.
    pub(super) fn waits(&self) -> bool {
        self.image != Image::Stays
    }
}

/// A size that was asked for and is not used: what is served would not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall {
    /// The setting.
    pub setting: &'static str,
    /// Its value: entries for each family.
    pub wanted: u32,
    /// Entries that are served, of the family that has more; `None` if that cannot be read, since the image has another layout.
    pub n_served: Option<u32>,
    /// The size that is used: that of the maps that were found.
    pub used: u32,
}

impl fmt::Display for TooSmall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { setting, wanted, n_served, .. } = self;
        match n_served {
            Some(n) => write!(f, "{setting}={wanted}: {n} are served"),
            None => write!(f, "{setting}={wanted}: the number of those that are served cannot be read"),
        }
    }
}

/// The sizes for maps that are to hold what others serve. Each is the one that is wanted or, if that is too small, the one found.
pub(super) fn sizes(wanted: Capacity, found: Capacity, served: &tables::Image) -> (Capacity, Vec<TooSmall>) {
    let n_services = |ipv6| served.services.keys().filter(|address| address.ip.is_ipv6() == ipv6).count();
    // Frontends may share a run.
    let n_endpoints = |ipv6| {
        let frontends = served.services.iter().filter(|(address, _)| address.ip.is_ipv6() == ipv6);
        let runs = frontends.filter_map(|(_, id)| served.frontends.get(id)).map(|frontend| frontend.run);
        let runs: BTreeSet<(u32, u32)> = runs.map(|run| (run.offset, run.len)).collect();
        runs.into_iter().map(|(_, len)| len as usize).sum::<usize>()
    };
    let mut too_small = Vec::new();
    let mut choose = |setting, wanted, found, n_served: usize| {
        let n_served = u32::try_from(n_served).unwrap_or(u32::MAX);
        // What is there already may be more than fits only if it is damaged, which the first plan repairs.
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

/// The sizes for maps that are to take the place of others whose image cannot be read: those that are wanted, but no smaller than
/// those found, since what is served might not fit. The next start can read the image and makes them smaller.
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
        use Standing::{Foreign, Lost, New, OtherSize, Same};
        let image: Vec<&str> =
            MAPS.iter().filter(|map| map.role == Role::Image).map(|map| map.name).collect();
        let with_image = |more: &[&'static str]| [&image[..], more].concat();
        let all: Vec<&str> = MAPS.iter().map(|map| map.name).collect();
        let ids: Vec<&str> = MAPS
            .iter()
            .filter(|map| matches!(map.role, Role::Image | Role::Ids | Role::Counters | Role::Meta))
            .map(|map| map.name)
            .collect();
        // Which maps are found how, the others as they should be; what becomes of the image, and what is made.
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
            let takeover = Takeover::of(&found);
            let sorted = |mut names: Vec<&'static str>| {
                names.sort_unstable();
                names
            };
            assert_eq!((takeover.image, sorted(takeover.made.clone())), (fate, sorted(made)), "{changed:?}");
            assert_eq!(takeover.kept.len() + takeover.made.len(), MAPS.len(), "{changed:?}");
            assert_eq!(takeover.waits(), fate != Image::Stays);
            let is_resized = changed.contains(&("service_stats", OtherSize));
            assert_eq!(takeover.refills("service_stats"), is_resized, "{changed:?}");
        }
    }
}
