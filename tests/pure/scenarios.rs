//! Every scenario on the simulator.

use lb_tests::scenario::{Scenario, simulated::Simulated};

fn run(name: &str) {
    let scenario = Scenario::read(name).unwrap();
    let mut executor = Simulated::new(&scenario).unwrap();
    scenario.run(&mut executor).unwrap_or_else(|error| panic!("{error:#}"));
}

lb_tests::scenario_tests!(run);

/// The runner itself: each of these expectations is wrong, and each is reported.
#[test]
fn a_wrong_expectation_is_reported() {
    let objects = "
        title: wrong
        objects:
          - {apiVersion: v1, kind: Service, metadata: {namespace: default, name: web},
             spec: {clusterIP: 10.96.0.1, ports: [{port: 80, protocol: TCP}]}}
          - {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
             metadata: {namespace: default, name: web-1, labels: {kubernetes.io/service-name: web}},
             ports: [{name: '', port: 8080, protocol: TCP}],
             endpoints: [{addresses: [10.1.0.1]}, {addresses: [10.1.0.2]}]}
          - {apiVersion: v1, kind: Service, metadata: {namespace: default, name: empty},
             spec: {clusterIP: 10.96.0.2, ports: [{port: 80, protocol: TCP}]}}";
    for wrong in [
        "10.96.0.1:80/tcp: [10.1.0.1:8080]",
        "10.96.0.1:80/tcp: [10.1.0.1:8080, 10.1.0.2:8080, 10.1.0.3:8080]",
        "10.96.0.1:80/tcp: {one_of: [10.1.0.1:8080, 10.1.0.2:8080]}",
        "10.96.0.1:80/tcp: refused",
        "10.96.0.1:80/tcp: untouched",
        "10.96.0.2:80/tcp: [10.1.0.1:8080]",
        "10.96.0.2:80/tcp: []",
        "10.96.0.2:80/tcp: untouched",
        "10.96.0.3:80/tcp: refused",
        "10.96.0.3:80/tcp: [10.1.0.1:8080]",
    ] {
        let text = format!("{objects}\n        steps: [{{title: one, calls: {{node: {{{wrong}}}}}}}]");
        let scenario = Scenario::parse(&text).unwrap();
        let mut executor = Simulated::new(&scenario).unwrap();
        let error = scenario.run(&mut executor).expect_err(wrong).to_string();
        assert!(error.contains("step 1 \"one\": node calls 10.96.0."), "{error}");
    }
}
