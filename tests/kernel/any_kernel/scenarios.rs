//! Every scenario on the kernel.

use lb_tests::{
    Feature, Sandbox,
    scenario::{Scenario, real::Real},
};

fn run(name: &str) {
    let scenario = Scenario::read(name).unwrap();
    // Node ports on loopback work in the node's namespace only, which programs recognise by its cookie.
    let has_loopback = scenario.destinations().unwrap().iter().any(|to| to.ip.is_loopback());
    let needs: &[Feature] = if has_loopback { &[Feature::NetnsCookie] } else { &[] };
    Sandbox::test_with(needs, |sandbox| {
        let mut executor = Real::new(sandbox, &scenario).unwrap();
        scenario.run(&mut executor).unwrap_or_else(|error| panic!("{error:#}"));
    });
}

lb_tests::scenario_tests!(run);
