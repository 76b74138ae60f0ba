//! The programs' counters.

use std::net::SocketAddr;

use lb_common::layout::ServiceStats;
use lb_core::{
    desired::FrontendAddress,
    model::Protocol::{self, Tcp, Udp},
};
use lb_tests::{
    Sandbox,
    agent::Agent,
    client::{Domain, Socket},
    cluster::Cluster,
    server::Servers,
};

use crate::fixture::{addresses, connected, service_address, with_web};

fn stats(agent: &Agent, service: SocketAddr, protocol: Protocol) -> ServiceStats {
    let image = agent.image();
    let address = FrontendAddress { ip: service.ip(), port: service.port(), protocol };
    let id = image.frontends[&image.services[&address]].service_id;
    agent.kernel.observations().service_stats(id)
}

#[test]
fn calls_are_counted_by_service_and_endpoint() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let [server] = addresses(Domain::V4, 8001);
        let _servers = Servers::start([(server, Tcp), (server, Udp)]);
        let empty = SocketAddr::new(service.ip(), 81);
        let mut agent = Agent::start(sandbox);
        let with_tcp = Cluster::new().serving("tcp", service, Tcp, &[server]);
        agent.follow(&with_tcp.serving("udp", service, Udp, &[server]).serving("empty", empty, Tcp, &[]));

        let udp = Socket::new(Domain::V4, Udp);
        for _ in 0..7 {
            Socket::new(Domain::V4, Tcp).connect(service).unwrap();
            Socket::new(Domain::Mapped, Tcp).connect(service).unwrap();
            udp.ask_at(service).unwrap();
            assert!(Socket::new(Domain::V4, Tcp).connect(empty).is_err());
            // Calls that pass and the datagrams of a connected socket do not count.
            Socket::new(Domain::V4, Tcp).connect(server).unwrap();
        }
        for domain in [Domain::V4, Domain::Mapped] {
            let connected = connected(domain, Udp, service);
            connected.ask().unwrap();
            connected.ask().unwrap();
        }
        assert_eq!(stats(&agent, service, Tcp), ServiceStats { connects: 14, refusals: 0, datagrams: 0 });
        assert_eq!(stats(&agent, service, Udp), ServiceStats { connects: 2, refusals: 0, datagrams: 7 });
        assert_eq!(stats(&agent, empty, Tcp), ServiceStats { connects: 0, refusals: 7, datagrams: 0 });

        let image = agent.image();
        let of_endpoints: Vec<(u64, u64)> = image
            .reachable()
            .map(|entry| agent.kernel.observations().endpoint_stats(entry.endpoint_id))
            .map(|stats| (stats.connects, stats.datagrams))
            .collect();
        assert_eq!(of_endpoints.len(), 2);
        assert!(of_endpoints.contains(&(14, 0)) && of_endpoints.contains(&(2, 7)), "{of_endpoints:?}");
    });
}

/// A reused id starts from zero; counters survive everything else.
#[test]
fn counters_survive_restarts_and_belong_to_one_service() {
    with_web(2, |sandbox, web| {
        let with = |name, n| Cluster::new().serving(name, web.service, Tcp, &web.endpoints[..n]);
        let mut agent = Agent::start(sandbox);
        agent.follow(&with("web", 1));
        assert!(web.answers());
        drop(agent);

        let mut agent = Agent::start(sandbox);
        agent.follow(&with("web", 1));
        agent.follow(&with("web", 2));
        assert!(web.answers());
        assert_eq!(stats(&agent, web.service, Tcp).connects, 2);

        agent.follow(&Cluster::new());
        agent.settle();
        agent.follow(&with("other", 2));
        assert_eq!(stats(&agent, web.service, Tcp).connects, 0);
    });
}
