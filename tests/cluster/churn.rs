//! A short run of changes, faults and calls. `cargo xtask bench churn` and `cargo xtask chaos` run it for any
//! time.

use lb_tests::{
    Feature,
    churn::{self, Options},
    require,
};

/// The maps end as computed from scratch, and no call to a service that always had a ready endpoint failed.
#[test]
fn churn_with_faults_and_calls_ends_right() {
    if !require(Feature::Programs) || !require(Feature::Variable("SOCKLB_BIN")) {
        return;
    }
    let socklb = churn::agent_of_environment();
    let outcome = churn::run(&socklb, &Options::short(1)).unwrap_or_else(|error| panic!("{error:#}"));
    eprintln!("{outcome}");
    assert!(outcome.n_steady_calls > 0 && outcome.n_other_calls > 0 && outcome.n_changes > 0);
}

/// The same while agents are killed, even in the middle of a plan, stopped, and replaced by ones with other
/// maps.
#[test]
#[cfg(feature = "fault-points")]
fn chaos_with_calls_ends_right() {
    if !require(Feature::Programs) || !require(Feature::Variable("SOCKLB_BIN")) {
        return;
    }
    let socklb = churn::agent_of_environment();
    let options = Options::chaos(1, 24, std::time::Duration::from_secs(15));
    let outcome = churn::run(&socklb, &options).unwrap_or_else(|error| panic!("{error:#}"));
    eprintln!("{outcome}");
    assert!(outcome.n_steady_calls > 0 && outcome.events.n_kills > 0, "{outcome}");
}
