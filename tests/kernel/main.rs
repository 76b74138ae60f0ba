//! Tests on the running kernel.
use lb_tests::{Feature, Sandbox, agent::Agent, client, cluster::{self, Cluster, PortOf}, require, server::Servers};
use lb_userspace::model::Protocol;

#[test]
fn first_hit() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let servers = ["127.0.0.1:8001".parse().unwrap()];
        let _servers = Servers::tcp(servers);
        let mut agent = Agent::start(sandbox);
        let vip = "10.96.0.1:80".parse().unwrap();
        eprintln!("before: {:?}", client::call(vip, Protocol::Tcp));
        let mut cluster = Cluster::new()
            .with([cluster::service("web", &[vip.ip()], &[cluster::port("", Protocol::Tcp, 80)])]);
        agent.follow(&cluster);
        eprintln!("empty: {:?}", client::call(vip, Protocol::Tcp));
        cluster.set_endpoints(&PortOf::tcp("web"), &servers);
        eprintln!("{:?}", agent.follow(&cluster));
        eprintln!("hit: {:?}", client::call(vip, Protocol::Tcp));
        eprintln!("{:?}", agent.kernel.verified_instructions());
        panic!("show");
    });
}
