//! Addresses that are added to and removed from the node's interfaces while an agent runs.

use std::{
    net::{SocketAddr, TcpListener, UdpSocket},
    time::Instant,
};

use lb_core::model::{
    Protocol::{Tcp, Udp},
    ingest,
};
use lb_kernel::Features;
use lb_tests::{
    client::{Domain, Socket},
    cluster::{Cluster, port, service, service_cidr, with_node_port},
    command::text,
    installed::{QUIET, eventually},
};
use nix::{errno::Errno, sys::signal::Signal};

use crate::{
    socklb::{is_up, serve, with_town},
    town::{self, Town},
};

const NODE_PORT: u16 = 30_080;

/// The town's services, with a node port for the web service.
fn web_on_a_node_port(town: &Town) -> Cluster {
    let mut cluster = town.cluster(0..2);
    let web =
        cluster.services.values().find(|web| web.metadata.name.as_deref() == Some("web-v4")).unwrap().clone();
    cluster.set(with_node_port(web, NODE_PORT));
    cluster
}

fn connect(to: SocketAddr) -> Result<(), Errno> {
    Socket::new(Domain::V4, Tcp).connect(to)
}

fn ip(arguments: &str) {
    text("ip", &arguments.split(' ').collect::<Vec<_>>());
}

/// Interfaces are read once a minute. Faster changes come from the kernel's notifications.
#[test]
fn node_ports_answer_on_a_new_address_at_once() {
    with_town(|place, town| {
        let _agent = serve(place, &web_on_a_node_port(town), &QUIET);
        let started = Instant::now();
        let mut longest = std::time::Duration::ZERO;
        for n in 1..=10 {
            let virtual_ip: SocketAddr = format!("192.0.2.{n}:{NODE_PORT}").parse().unwrap();
            ip(&format!("address add {}/32 dev lo", virtual_ip.ip()));
            let added = Instant::now();
            eventually("node ports answer on it", || is_up(virtual_ip));
            longest = longest.max(added.elapsed());
            ip(&format!("address del {}/32 dev lo", virtual_ip.ip()));
            eventually("node ports do not answer on it", || connect(virtual_ip) == Err(Errno::ENETUNREACH));
        }
        println!("an address is served for node ports after {longest:?} at most");
        assert!(
            started.elapsed().as_secs() < 60,
            "they may have been read by the clock: {:?}",
            started.elapsed()
        );
    });
}

/// As with a DNS cache on the node: a program of the node listens at a service address on an interface.
#[test]
fn a_service_address_on_an_interface_is_the_nodes_for_as_long_as_it_is_there() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        let agent = place.start(&QUIET);
        let [web, dns] = [town::web()[0], town::dns()[0]];
        eventually("the service answers", || is_up(web));
        let explain = || place.text(&["explain", &format!("{dns}/udp")]);
        let ask = || {
            let socket = Socket::new(Domain::V4, Udp);
            socket.connect(dns).map(|()| socket)
        };

        ip(&format!("address add {}/32 dev lo", dns.ip()));
        let cache = UdpSocket::bind(dns).unwrap();
        cache.set_nonblocking(true).unwrap();
        let is_asked = || {
            ask().unwrap().send(b"a").unwrap();
            let mut bytes = [0; 1];
            cache.recv(&mut bytes).is_ok()
        };
        eventually("the node's program is called", is_asked);
        let listener = TcpListener::bind(dns).unwrap();
        connect(dns).unwrap();
        listener.accept().unwrap();
        assert!(is_up(web), "others are served");
        let issue = "10.96.0.53 is an address of an interface of this node";
        eventually("it is logged", || agent.has_said(issue));
        eventually("explain reports it", || {
            let answer = explain();
            answer.contains("untouched") && answer.contains(issue)
        });

        ip(&format!("address del {}/32 dev lo", dns.ip()));
        drop((listener, cache));
        eventually("it is served again", || {
            ask().is_ok_and(|socket| socket.peer_name() == Ok(dns)) && is_up(dns)
        });
        let (_, log) = agent.end_with_log(Signal::SIGTERM);
        assert!(log.iter().any(|line| line.contains("no longer") && line.contains(issue)), "{log:#?}");
    });
}

/// Also when no agent is left to report it. A ServiceCIDR in a manifest sets which addresses are unreachable.
#[test]
fn what_another_proxy_serves_is_left_alone_and_explained() {
    with_town(|place, town| {
        let [theirs, none] = ["10.96.3.3:80", "10.96.3.4:80"].map(|to| to.parse::<SocketAddr>().unwrap());
        let mut cluster = town.cluster(0..2);
        let mut service = service("theirs", &[theirs.ip()], &[port("", Tcp, 80)]);
        service.metadata.labels = Some([(ingest::SERVICE_PROXY_NAME.to_owned(), "other".to_owned())].into());
        cluster.set(service);
        cluster.set(service_cidr("kubernetes", &["10.96.0.0/16"]));
        let agent = serve(place, &cluster, &QUIET);
        let explain = |to: SocketAddr| place.text(&["explain", &to.to_string()]);
        eventually("an address without a Service is unreachable", || {
            explain(none).contains("-> unreachable: no service has")
        });
        let unreachable = if Features::probe().set_retval { Errno::EHOSTUNREACH } else { Errno::ENETUNREACH };
        assert_eq!(connect(none), Err(unreachable));
        // There is no route.
        assert_eq!(connect(theirs), Err(Errno::ENETUNREACH));
        let reason = "untouched: service default/theirs has 10.96.3.3 and is labelled \
                      service.kubernetes.io/service-proxy-name=other, so this agent does not serve it: the call passes \
                      unchanged";
        for to in ["10.96.3.3:80", "10.96.3.3:81"] {
            let answer = explain(to.parse().unwrap());
            assert!(answer.contains(reason), "{answer}");
        }
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        let answer = explain(theirs);
        assert!(answer.contains(reason), "{answer}");
    });
}

/// kube-proxy in mode IPVS has all service addresses on its own interface.
#[test]
fn what_kube_proxy_keeps_on_its_own_interface_is_served() {
    with_town(|place, town| {
        let web = town::web()[0];
        ip("link add kube-ipvs0 type veth peer name kube-ipvs1");
        ip(&format!("address add {}/32 dev kube-ipvs0", web.ip()));
        place.write(&web_on_a_node_port(town));
        let _agent = place.start(&QUIET);
        eventually("the service answers", || is_up(web));
        let at_node_port = SocketAddr::new(web.ip(), NODE_PORT);
        assert!(!is_up(at_node_port), "it is not an address of the node");
    });
}
