//! Maps that are too small for the desired state.

use std::collections::BTreeMap;

use lb_core::{
    desired::FrontendAddress,
    model::IssueKind,
    plan::Capacity,
    tables::{Entry, Image},
};
use proptest::prelude::*;

use crate::clusters::{Allowed, calls, history, outcomes, simulator, state};

fn sets(image: &Image) -> BTreeMap<FrontendAddress, Vec<std::net::SocketAddr>> {
    let set = |address: &FrontendAddress, id: &u32| {
        let run = image.frontends[id].run;
        let mut set: Vec<_> =
            image.entries(address.ip.is_ipv6(), run).unwrap().iter().map(Entry::address).collect();
        set.sort_unstable();
        set
    };
    image.services.iter().map(|(address, id)| (*address, set(address, id))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Each frontend is either as desired, or reported and unchanged. Prefixes are safe too. Once freed
    /// entries are reusable, a frontend that fits is written.
    #[test]
    fn what_does_not_fit_stays_as_it_was(
        history in history(3),
        services in 1u32..12,
        endpoints in 1u32..24,
        settles in prop::collection::vec(any::<bool>(), 4),
    ) {
        let capacity = Capacity { services, endpoints };
        let calls = calls();
        let mut state = state(capacity, &Image::default());
        let mut image = Image::default();
        for (cluster, settles) in history.iter().zip(settles) {
            let old = sets(&image);
            cluster.feed(&mut state);
            for _round in 0..2 {
                let plan = state.sync();
                let allowed = Allowed::between(&image, state.image(), &calls);
                for op in plan.ops() {
                    op.apply(&mut image);
                    let n_of = |ipv6| image.services.keys().filter(|address| address.ip.is_ipv6() == ipv6).count();
                    prop_assert!(n_of(false) <= services as usize && n_of(true) <= services as usize, "{:?}", plan);
                    let middle = simulator(image.clone());
                    for (i, call) in calls.iter().enumerate() {
                        let now = outcomes(&middle, *call);
                        prop_assert!(allowed.admits(i, &now), "{:?}: {}, but {:?}", call, allowed.describe(i), now);
                    }
                }
                prop_assert_eq!(&image, state.image());
                let placed = sets(&image);
                let mut n_missing = 0;
                for desired in state.desired().iter() {
                    let now = placed.get(&desired.address);
                    if now.is_none_or(|set| **set != *desired.endpoints) {
                        n_missing += 1;
                        prop_assert_eq!(now, old.get(&desired.address), "{}", desired.address);
                    }
                }
                for address in placed.keys() {
                    prop_assert!(state.desired().owner(address).is_some(), "{address} has no owner");
                }
                if state.holds_back() {
                    if !settles {
                        break;
                    }
                    state.settled(plan.number());
                } else {
                    let n_reported = state.issues().filter(|issue| matches!(
                        issue.kind,
                        IssueKind::ServicesFull { .. } | IssueKind::EndpointsFull { .. }
                    )).count();
                    // A frontend with the right endpoints may still belong to its former owner.
                    prop_assert!(n_reported >= n_missing, "{n_reported} of {n_missing}");
                }
            }
        }
    }

    /// Once everything is settled, a frontend is omitted only if its family's map is full or has no gap for
    /// it.
    #[test]
    fn nothing_is_left_out_without_need(history in history(2), services in 1u32..12) {
        let capacity = Capacity { services, endpoints: 10_000 };
        let mut state = state(capacity, &Image::default());
        for cluster in &history {
            cluster.feed(&mut state);
            // As in the agent's loop: one plan frees, the next one fills.
            let mut n_syncs = 0;
            while state.needs_sync() {
                let plan = state.sync();
                state.settled(plan.number());
                n_syncs += 1;
                prop_assert!(n_syncs < 50, "the plans never finish");
            }
            let placed = sets(state.image());
            for ipv6 in [false, true] {
                let of_family = |address: &&FrontendAddress| address.ip.is_ipv6() == ipv6;
                let n_placed = placed.keys().filter(of_family).count();
                let n_desired = state.desired().iter().filter(|f| of_family(&&f.address)).count();
                prop_assert_eq!(n_placed, n_desired.min(services as usize));
            }
        }
    }
}
