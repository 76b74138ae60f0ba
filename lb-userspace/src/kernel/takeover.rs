//! What becomes of each pinned map when an agent starts. Pure.

use lb_common::maps::{MapSpec, Role};

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

#[cfg(test)]
mod tests {
    use lb_common::maps::MAPS;

    use super::*;

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
