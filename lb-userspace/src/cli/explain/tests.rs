use std::collections::BTreeMap;

use expect_test::expect;
use lb_common::{
    health::Policy,
    layout::{EndpointHealth, frontend_flags},
};
use lb_core::{
    sim::Config,
    tables::{Image, run::StoredRun},
};

use super::*;

const SECOND: u64 = 1_000_000_000;

/// A cluster IP and a node port, with two endpoints and, if these are ejected, a third.
fn simulator() -> Simulator {
    let mut image = Image::default();
    let entry = |n: u8| Entry::new(n.into(), ([10, 244, 0, n], 8080).into());
    let run = StoredRun::extended(&[(entry(1), 255), (entry(2), 255)], &[entry(3)]);
    let frontend = Frontend { run: run.at(0), health: Policy::DEFAULT.to_word(), ..Frontend::default() };
    image.runs4.insert(0, run);
    for (id, address, flags) in [(0, "10.96.0.80:80", 0), (1, "0.0.0.0:30080", frontend_flags::NODE_PORT)] {
        image.services.insert(address.parse().unwrap(), id);
        image.frontends.insert(id, Frontend { flags, ..frontend });
    }
    image.node_addrs.insert([192, 0, 2, 1].into(), true);
    let mut simulator = Simulator::new(image);
    simulator.config = Config { node_ports: (30000, 32767), ..simulator.config };
    simulator.now = 100 * SECOND;
    simulator
}

fn ejected(until: u64) -> EndpointHealth {
    let (ejected_until, failing_since) = (until * SECOND, 90 * SECOND);
    EndpointHealth { ejected_until, failing_since, failures: 3, ejections: 1, ..EndpointHealth::default() }
}

#[test]
fn why_an_endpoint_is_not_chosen() {
    let on_trial = EndpointHealth { tried_at: 99 * SECOND, ..ejected(98) };
    let refused = EndpointHealth { errno: 111, ..ejected(104) };
    let mut text = String::new();
    for (to, health) in [
        ("10.96.0.80:80", vec![]),
        ("10.96.0.80:80", vec![(1, refused)]),
        ("10.96.0.80:80", vec![(2, on_trial)]),
        ("10.96.0.80:80", vec![(1, refused), (2, ejected(98))]),
        ("10.96.0.80:80", vec![(1, refused), (2, on_trial)]),
        ("10.96.0.80:80", vec![(1, refused), (2, on_trial), (3, refused)]),
        ("192.0.2.1:30080", vec![(1, refused)]),
    ] {
        let (mut simulator, to) = (simulator(), to.parse().unwrap());
        let known = reachable(&simulator, to, Caller::default());
        assert!(known.iter().map(|entry| entry.endpoint_id).eq(1..4), "{to}: {known:?}");
        simulator.health = BTreeMap::from_iter(health).into();
        text += &explain(&simulator, None, to, Caller::default()).text();
    }
    expect![[r"
        10.96.0.80:80/tcp -> redirected: one of 2, each with the same probability
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080
          candidate  10.244.0.2:8080
          spill      10.244.0.3:8080
        10.96.0.80:80/tcp -> redirected: one of 2, of which 1 is ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080
          spill      10.244.0.3:8080
        10.96.0.80:80/tcp -> redirected: one of 2, of which 1 is ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080
          candidate  10.244.0.2:8080  ejected while a call is on trial: 3 failures in a row, the last one: no answer; failing for 10 s
          spill      10.244.0.3:8080
        10.96.0.80:80/tcp -> redirected: one of 2, of which 2 are ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080  ejected until the next call, which is on trial: 3 failures in a row, the last one: no answer; failing for 10 s
          spill      10.244.0.3:8080
        10.96.0.80:80/tcp -> redirected: one of 1, which topology hints leave out: all 2 candidates are ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080  ejected while a call is on trial: 3 failures in a row, the last one: no answer; failing for 10 s
          spill      10.244.0.3:8080
        10.96.0.80:80/tcp -> redirected: one of 2: all are ejected, so none is avoided
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080  ejected while a call is on trial: 3 failures in a row, the last one: no answer; failing for 10 s
          spill      10.244.0.3:8080
        192.0.2.1:30080/tcp -> redirected: one of 2, of which 1 is ejected
          frontend    of an unknown service, policy Cluster
          candidate  10.244.0.1:8080  ejected for 4 s: 3 failures in a row, the last one: connection refused; failing for 10 s
          candidate  10.244.0.2:8080
          spill      10.244.0.3:8080
    "]].assert_eq(&text);
}
