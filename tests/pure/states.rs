//! What plans lead to, whichever way.

use std::collections::BTreeSet;

use lb_userspace::{
    controller::State,
    model::ingest,
    plan::{Capacity, diff},
    tables::Image,
};
use proptest::prelude::*;

use crate::clusters::{calls, cluster, history, outcomes, settings, simulator, state};

/// What calls come to, which is all that matters of an image: ids and places may differ.
fn meaning(image: &Image) -> Vec<crate::clusters::Outcomes> {
    let simulator = simulator(image.clone());
    calls().into_iter().map(|call| outcomes(&simulator, call)).collect()
}

/// Follows a history from empty tables, with or without a grace period after each plan.
fn follow(history: &[crate::clusters::RandomCluster], settles: bool) -> (State, Image) {
    let mut state = state(Capacity::default(), &Image::default());
    let mut image = Image::default();
    for cluster in history {
        cluster.feed(&mut state);
        state.sync().apply(&mut image);
        if settles {
            state.settled();
        }
    }
    (state, image)
}

/// Leaves in an image what can be read back from the kernel: what some call can find.
fn read_back(image: &mut Image) {
    image.frontends.retain(|id, _| image.services.values().any(|used| used == id));
    let runs: BTreeSet<_> = image
        .services
        .iter()
        .map(|(address, id)| (address.ip.is_ipv6(), image.frontends[id].run))
        .filter(|(_, run)| run.len > 0)
        .map(|(ipv6, run)| (ipv6, run.offset))
        .collect();
    for ipv6 in [false, true] {
        image.runs_mut(ipv6).retain(|offset, _| runs.contains(&(ipv6, *offset)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// The plans lead to the image that the state says they lead to, and to nothing left over: the same calls as if
    /// the last cluster had been there from the start.
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

    /// A state that starts over the tables has nothing to do, and goes on with the same plans' meaning.
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

    /// A state that starts over the tables in the middle of a plan leads where the plan would have led.
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
        let adopted = restarted.image().clone();
        let second = restarted.sync();
        let at_cut = image.clone();
        second.apply(&mut image);
        if image != *restarted.image() || meaning(&image) != meaning(state.image()) {
            println!("CUT {:#?}\nADOPTED {:#?}\nSECOND {:#?}\nENC {:#?}", at_cut, adopted, second, restarted.image());
        }
        prop_assert_eq!(&image, restarted.image());
        prop_assert_eq!(meaning(&image), meaning(state.image()));
    }

    /// Objects may come one by one in any order.
    #[test]
    fn the_order_of_events_does_not_count(
        cluster in cluster(),
        order in Just((0..64usize).collect::<Vec<_>>()).prop_shuffle(),
        syncs in prop::collection::vec(any::<bool>(), 64),
    ) {
        let (expected, _) = follow(std::slice::from_ref(&cluster), true);
        let objects = cluster.objects();
        let mut events: Vec<Box<dyn Fn(&mut State)>> = vec![{
            let interfaces = cluster.interfaces();
            Box::new(move |state| state.set_interfaces(interfaces.clone()))
        }];
        for object in objects.services.into_values() {
            let service = ingest::service(&object).0.unwrap();
            events.push(Box::new(move |state| {
                state.change(|store| store.set_service(&service.key, Some(service.clone())));
            }));
        }
        for object in objects.slices.into_values() {
            let slice = ingest::slice(&object).0.unwrap();
            events.push(Box::new(move |state| state.change(|store| store.set_slice(&slice.key(), Some(slice.clone())))));
        }
        for object in objects.nodes.into_values() {
            let node = ingest::node(&object).0.unwrap();
            events.push(Box::new(move |state| state.change(|store| store.set_node(&node.name, Some(node.clone())))));
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
