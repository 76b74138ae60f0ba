//! Every prefix of a plan is safe.

use lb_core::{plan::Capacity, tables::Image};
use proptest::prelude::*;

use crate::clusters::{Allowed, calls, history, outcomes, simulator, state};

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Between any two operations, the outcomes of a call are those before or after the plan: an endpoint of
    /// the old or the new set of the same frontend; refused or passed only if one of the two states says so.
    #[test]
    fn a_call_in_the_middle_of_a_plan_sees_the_old_or_the_new_state(history in history(3)) {
        let calls = calls();
        let mut state = state(Capacity::default(), &Image::default());
        let mut image = Image::default();
        for cluster in &history {
            cluster.feed(&mut state);
            let plan = state.sync();
            let allowed = Allowed::between(&image, state.image(), &calls);
            for (n, op) in plan.ops().iter().enumerate() {
                op.apply(&mut image);
                let middle = simulator(image.clone());
                for (i, call) in calls.iter().enumerate() {
                    let now = outcomes(&middle, *call);
                    prop_assert!(
                        allowed.admits(i, &now),
                        "{}, on the node: {}: {}, but {now:?} after operation {n}, {op:?}, of {plan:#?}",
                        call.0, call.1, allowed.describe(i),
                    );
                }
            }
            prop_assert_eq!(&image, state.image());
            state.settled(plan.number());
        }
    }
}
