//! Every scenario on packets.

use lb_tests::{
    Feature, require,
    scenario::{Scenario, packets::Packets},
};

fn run(name: &str) {
    if require(Feature::Nftables) {
        let scenario = Scenario::read(name).unwrap();
        let mut executor = Packets::new(&scenario).unwrap();
        scenario.run(&mut executor).unwrap_or_else(|error| panic!("{error:#}"));
    }
}

lb_tests::scenario_tests!(run);
