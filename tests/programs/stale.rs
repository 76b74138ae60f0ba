//! Long-lived sockets of programs in other network namespaces, when their pod is deleted.

use lb_core::model::Protocol;
use lb_tests::{
    Feature,
    client::{Domain, Socket},
    installed::eventually,
    netns::Resident,
    require,
};
use nix::errno::Errno;

use crate::{
    http::{LISTEN, Scrape, address},
    socklb::{serve, with_town},
    town,
};

#[test]
fn a_udp_socket_that_is_older_than_its_service_is_served() {
    if !require(Feature::SocketDestroy) {
        return;
    }
    with_town(|place, town| {
        let mut without = town.cluster(0..1);
        without.services.retain(|_, service| service.metadata.name.as_deref() != Some("dns-udp-v4"));
        let agent = serve(place, &without, &LISTEN);
        let (service, pod) = (town::dns()[0], &town.pods[0]);
        let _process = Resident::of(&pod.netns).unwrap();
        // Adds a route.
        pod.netns.add_address(service.ip()).unwrap();
        let early = pod.netns.run(|| Socket::new(Domain::V4, Protocol::Udp));
        early.connect(service).unwrap();
        place.write(&town.cluster(0..1));
        // Blocks until the socket is destroyed.
        assert_eq!(early.receive(), Err(Errno::ECONNABORTED));
        early.connect(service).unwrap();
        let metrics = address(&agent, "--metrics-bind-address");
        let n_ended = || Scrape::of(&metrics).get(r#"socklb_sockets_destroyed_total{protocol="UDP"}"#);
        eventually("it is counted", || n_ended() == 1);
        let log = agent.log();
        let told = |line: &&String| {
            line.contains("before the address belonged to a service") && line.contains("default/dns-udp-v4")
        };
        assert_eq!(log.iter().filter(told).count(), 1, "{log:#?}");
        assert_eq!(early.peer_name(), Ok(service));
    });
}

#[test]
fn the_agent_ends_udp_sockets_whose_pod_is_gone() {
    if !require(Feature::SocketDestroy) {
        return;
    }
    with_town(|place, town| {
        let agent = serve(place, &town.cluster(0..1), &LISTEN);
        let (service, pod) = (town::dns()[0], &town.pods[0]);
        let _process = Resident::of(&pod.netns).unwrap();
        let in_pod = pod.netns.run(|| Socket::new(Domain::V4, Protocol::Udp));
        let on_node = Socket::new(Domain::Mapped, Protocol::Udp);
        let tcp = Socket::new(Domain::V4, Protocol::Tcp);
        for socket in [&in_pod, &on_node, &tcp] {
            socket.connect(service).unwrap();
            assert_eq!(socket.peer_name(), Ok(service));
        }

        place.write(&town.cluster(1..2));
        // Blocks until the socket is destroyed.
        assert_eq!(in_pod.receive(), Err(Errno::ECONNABORTED));
        assert_eq!(on_node.receive(), Err(Errno::ECONNABORTED));
        assert_eq!(on_node.connect(service), Ok(()));
        assert_eq!(tcp.peer_name(), Ok(service), "TCP sockets stay");

        let metrics = address(&agent, "--metrics-bind-address");
        eventually("both are counted", || {
            Scrape::of(&metrics).get(r#"socklb_sockets_destroyed_total{protocol="UDP"}"#) == 2
        });
        assert_eq!(Scrape::of(&metrics).get(r#"socklb_sockets_destroyed_total{protocol="TCP"}"#), 0);
        let log = agent.log();
        let told: Vec<&String> = log.iter().filter(|line| line.contains("destroyed sockets")).collect();
        assert!(!told.is_empty() && told.len() <= 2, "{told:#?}");
        assert!(
            told.iter().all(|line| line.contains("default/dns-udp-v4") && line.contains("UDP")),
            "{told:#?}"
        );
        assert!(!log.iter().any(|line| line.contains("stale sockets stay connected")), "{log:#?}");

        // A change that requests more.
        place.write(&town.cluster(1..2).annotated("socklb.io/stale-connections", "reset"));
        assert_eq!(tcp.receive(), Err(Errno::ECONNABORTED));
        assert_eq!(on_node.peer_name(), Ok(service), "it has moved to a pod that serves: {:#?}", agent.log());
    });
}
