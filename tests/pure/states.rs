//! The state that plans lead to, whatever the history.

use std::collections::BTreeSet;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use lb_core::{
    desired::FrontendAddress,
    model::ingest,
    plan::{Capacity, diff},
    state::State,
    tables::Image,
};
use proptest::prelude::*;

use crate::clusters::{calls, cluster, history, outcomes, settings, simulator, state};

type Event = Box<dyn Fn(&mut State)>;

/// The outcomes of all calls, which are the meaning of an image: ids and positions may differ.
fn meaning(image: &Image) -> Vec<crate::clusters::Outcomes> {
    let simulator = simulator(image.clone());
    calls().into_iter().map(|call| outcomes(&simulator, call)).collect()
}

/// Follows a history from empty maps, with or without a grace period after each plan except the last, which
/// has one.
fn follow(history: &[crate::clusters::RandomCluster], settles: bool) -> (State, Image) {
    let mut state = state(Capacity::default(), &Image::default());
    let mut image = Image::default();
    for (n, cluster) in (1..).zip(history) {
        cluster.feed(&mut state);
        let mut plan = state.sync();
        plan.apply(&mut image);
        // What waits for a grace period is completed at the end.
        while settles || n == history.len() {
            state.settled(plan.number());
            if !state.needs_sync() {
                break;
            }
            plan = state.sync();
            plan.apply(&mut image);
        }
    }
    (state, image)
}

/// A change to an image that no encoder makes.
#[derive(Clone, Copy, Debug)]
struct Damage {
    kind: u8,
    which: prop::sample::Index,
    value: u32,
}

fn damage() -> impl Strategy<Value = Damage> {
    (0u8..9, any::<prop::sample::Index>(), prop_oneof![4 => 0u32..8, 1 => any::<u32>()])
        .prop_map(|(kind, which, value)| Damage { kind, which, value })
}

impl Damage {
    fn apply(self, image: &mut Image) {
        let ids: Vec<u32> = image.frontends.keys().copied().collect();
        let addresses: Vec<_> = image.services.keys().copied().collect();
        if ids.is_empty() || addresses.is_empty() {
            return;
        }
        let address = addresses[self.which.index(addresses.len())];
        let id = ids[self.which.index(ids.len())];
        let frontend = image.frontends.get_mut(&id).unwrap();
        match self.kind {
            0 => frontend.service_id = self.value,
            1 => frontend.run.offset = self.value,
            2 => frontend.run.len = self.value % 8,
            3 => frontend.flags = self.value,
            4 => drop(image.frontends.remove(&id)),
            5 => drop(image.services.insert(address, self.value)),
            6 => drop(image.services.remove(&address)),
            7 => {
                let stray = FrontendAddress { port: 7, ..address };
                image.services.insert(stray, id);
            }
            _ => {
                if let Some((offset, run)) = image.runs4.get_min().cloned() {
                    image.runs4.insert(offset, run.endpoints().iter().rev().copied().collect());
                }
            }
        }
    }
}

/// Removes from an image what cannot be read back from the kernel: what no call can find.
fn read_back(image: &mut Image) {
    let used: BTreeSet<u32> = image.services.values().copied().collect();
    image.frontends =
        std::mem::take(&mut image.frontends).into_iter().filter(|(id, _)| used.contains(id)).collect();
    let runs: BTreeSet<_> = image
        .services
        .iter()
        .filter_map(|(address, id)| Some((address.ip.is_ipv6(), image.frontends.get(id)?.run)))
        .filter(|(_, run)| run.len > 0)
        .map(|(ipv6, run)| (ipv6, run.offset))
        .collect();
    for ipv6 in [false, true] {
        let all = std::mem::take(image.runs_mut(ipv6)).into_iter();
        image.runs_mut(ipv6).extend(all.filter(|(offset, _)| runs.contains(&(ipv6, *offset))));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// The plans lead to the state's own image, without remnants: the outcomes are the same as if the last
    /// cluster had been there from the start.
    #[test]
    fn only_the_last_cluster_counts(history in history(4), settles: bool) {
        let (state, image) = follow(&history, settles);
        prop_assert_eq!(&image, state.image());
        let (_, fresh) = follow(&history[history.len() - 1..], true);
        prop_assert_eq!(meaning(&image), meaning(&fresh));
        let n_of = |image: &Image| {
            (image.services.len(), image.frontends.len(), image.runs4.len(), image.runs6.len(), image.node_addrs.len())
        };
        prop_assert_eq!(n_of(&image), n_of(&fresh));
    }

    /// A state that adopts the maps has nothing to do, and its later plans have the same meaning.
    #[test]
    fn a_restart_changes_nothing(before in history(2), after in cluster()) {
        let (mut old, image) = follow(&before, true);
        let last = &before[before.len() - 1];
        let mut restarted = State::new(settings(), last.interfaces(), Capacity::default(), &image);
        last.feed(&mut restarted);
        let plan = restarted.sync();
        prop_assert!(plan.is_empty(), "{:?}", plan);
        prop_assert_eq!(restarted.image(), old.image());

        let mut restarted_image = image.clone();
        after.feed(&mut restarted);
        restarted.sync().apply(&mut restarted_image);
        prop_assert_eq!(&restarted_image, restarted.image());
        after.feed(&mut old);
        let _plan = old.sync();
        prop_assert_eq!(meaning(&restarted_image), meaning(old.image()));
    }

    /// A state that starts in the middle of a plan leads to the same result as the plan.
    #[test]
    fn a_restart_in_the_middle_of_a_plan_ends_it(history in history(2), cut: prop::sample::Index) {
        let last = &history[history.len() - 1];
        let (mut state, mut image) = follow(&history[..history.len() - 1], true);
        last.feed(&mut state);
        let plan = state.sync();
        for op in &plan.ops()[..cut.index(plan.ops().len() + 1)] {
            op.apply(&mut image);
        }
        read_back(&mut image);
        let mut restarted = crate::clusters::state(Capacity::default(), &image);
        last.feed(&mut restarted);
        restarted.sync().apply(&mut image);
        prop_assert_eq!(&image, restarted.image());
        prop_assert_eq!(meaning(&image), meaning(state.image()));
    }

    /// However another program has changed the maps: after one plan every call has the right outcomes, and a
    /// restart has nothing to do.
    #[test]
    fn damaged_tables_are_repaired(history in history(1), damages in prop::collection::vec(damage(), 1..6)) {
        let (state, mut image) = follow(&history, true);
        for damage in &damages {
            damage.apply(&mut image);
        }
        read_back(&mut image);
        let last = &history[history.len() - 1];
        let mut restarted = crate::clusters::state(Capacity::default(), &image);
        last.feed(&mut restarted);
        let plan = restarted.sync();
        plan.apply(&mut image);
        // Runs that overlapped belong to no frontend.
        read_back(&mut image);
        prop_assert_eq!(&image, restarted.image());
        prop_assert_eq!(meaning(&image), meaning(state.image()));
        prop_assert_eq!(image.services.len(), state.image().services.len());
        restarted.settled(plan.number());

        let mut again = crate::clusters::state(Capacity::default(), &image);
        last.feed(&mut again);
        let plan = again.sync();
        prop_assert!(plan.is_empty(), "{:?}", plan);
    }

    /// Objects may arrive one by one in any order.
    #[test]
    fn the_order_of_events_does_not_count(
        cluster in cluster(),
        order in Just((0..64usize).collect::<Vec<_>>()).prop_shuffle(),
        syncs in prop::collection::vec(any::<bool>(), 64),
    ) {
        let (expected, _) = follow(std::slice::from_ref(&cluster), true);
        let objects = cluster.objects();
        let mut events: Vec<Event> = vec![{
            let interfaces = cluster.interfaces();
            Box::new(move |state| state.set_interfaces(interfaces.clone()))
        }];
        for object in objects.services.into_values() {
            let service = ingest::any_service(&object, None).0.unwrap();
            events.push(Box::new(move |state| {
                state.change(|store| store.set_service(&service.key, Some(service.clone())));
            }));
        }
        let is_selected = |slice: &EndpointSlice| ingest::is_selected(slice.metadata.labels.as_ref(), None);
        for object in objects.slices.into_values().filter(is_selected) {
            let slice = ingest::slice(&object).0.unwrap();
            events.push(Box::new(move |state| state.change(|store| store.set_slice(&slice.key(), Some(slice.clone())))));
        }
        for object in objects.nodes.into_values() {
            let node = ingest::node(&object).0.unwrap();
            events.push(Box::new(move |state| state.change(|store| store.set_node(&node.name, Some(node.clone())))));
        }
        for object in objects.service_cidrs.into_values() {
            let cidr = ingest::service_cidr(&object).0.unwrap();
            events.push(Box::new(move |state| {
                state.change(|store| store.set_service_cidr(&cidr.name, Some(cidr.clone())));
            }));
        }
        let mut state = state(Capacity::default(), &Image::default());
        let mut image = Image::default();
        for (n, sync) in order.into_iter().zip(syncs) {
            if let Some(event) = events.get(n) {
                event(&mut state);
            }
            if sync {
                state.sync().apply(&mut image);
            }
        }
        state.sync().apply(&mut image);
        prop_assert_eq!(&image, state.image());
        prop_assert_eq!(state.desired(), expected.desired());
        prop_assert_eq!(meaning(&image), meaning(expected.image()));
    }

    /// The repair after an audit leads from any image to any other.
    #[test]
    fn a_difference_applied_is_the_other_image(one in history(2), other in history(2)) {
        let (_, mut from) = follow(&one, true);
        let (_, to) = follow(&other, true);
        prop_assert!(diff(&to, &to).is_empty());
        diff(&from, &to).apply(&mut from);
        prop_assert_eq!(from, to);
    }
}
