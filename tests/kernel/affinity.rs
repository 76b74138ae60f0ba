//! `sessionAffinity: ClientIP`: the parts in the kernel, clients and time.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Barrier,
    thread,
    time::Duration,
};

use lb_core::model::Protocol::Udp;
use lb_tests::{
    Sandbox,
    agent::Agent,
    client::Domain,
    cluster::{self, Cluster, PortOf},
    netns::NetNs,
};

use crate::fixture::{connected, service_address};

/// Endpoints that are local addresses of every namespace of a test.
fn endpoints() -> [IpAddr; 16] {
    std::array::from_fn(|n| IpAddr::from([10, 1, 0, u8::try_from(n + 1).unwrap()]))
}

fn add_with_affinity(cluster: Cluster, name: &str, service: SocketAddr, seconds: i32) -> Cluster {
    let object = cluster::service(name, &[service.ip()], &[cluster::port("", Udp, service.port())]);
    let mut cluster = cluster.with([cluster::with_affinity(object, Some(seconds))]);
    cluster.set_endpoints(&PortOf::udp(name), &endpoints().map(|ip| SocketAddr::new(ip, 53)));
    cluster
}

fn with_affinity(seconds: i32) -> Cluster {
    add_with_affinity(Cluster::new(), "dns", service_address(Domain::V4), seconds)
}

/// Connects a datagram socket and returns which of [`endpoints`] it got.
fn chosen_at(service: SocketAddr) -> IpAddr {
    let socket = connected(Domain::V4, Udp, service);
    socket.local_address().unwrap().ip()
}

fn chosen() -> IpAddr {
    chosen_at(service_address(Domain::V4))
}

#[test]
fn clients_are_network_namespaces() {
    Sandbox::test(|sandbox| {
        let mut agent = Agent::start(sandbox);
        agent.follow(&with_affinity(86_400));
        let pods: Vec<NetNs> = (0..12).map(|_| NetNs::new().unwrap()).collect();
        let mut choices = Vec::new();
        for pod in &pods {
            for ip in endpoints() {
                pod.add_address(ip).unwrap();
            }
            choices.push(pod.run(chosen));
        }
        for _ in 0..20 {
            for (pod, choice) in pods.iter().zip(&choices) {
                assert_eq!(pod.run(chosen), *choice);
            }
        }
        // Twelve clients agree by chance once in 16^11 runs.
        assert!(choices.iter().collect::<BTreeSet<_>>().len() > 1, "{choices:?}");
    });
}

/// A client's first calls, on several CPUs at once: each may find no entry, but after them the entry has one
/// endpoint.
#[test]
fn first_calls_at_once_agree_from_the_next_call_on() {
    const N_SERVICES: usize = 60;
    const N_THREADS: usize = 8;
    Sandbox::test(|sandbox| {
        sandbox.own(endpoints());
        let cluster = (0..N_SERVICES).fold(Cluster::new(), |cluster, n| {
            add_with_affinity(cluster, &format!("dns-{n}"), address(n), 86_400)
        });
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster);
        let barrier = Barrier::new(N_THREADS);
        let one = |n| {
            barrier.wait();
            chosen_at(address(n));
            barrier.wait();
            chosen_at(address(n))
        };
        let choices: Vec<Vec<IpAddr>> = thread::scope(|scope| {
            let threads = [(); N_THREADS].map(|()| scope.spawn(|| (0..N_SERVICES).map(one).collect()));
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for other in &choices[1..] {
            assert_eq!(*other, choices[0]);
        }
        assert!(choices[0].iter().collect::<BTreeSet<_>>().len() > 1, "{choices:?}");
    });
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::from([10, 96, 1, u8::try_from(n).unwrap()]), service_address(Domain::V4).port())
}

#[test]
fn a_client_that_is_idle_too_long_chooses_anew() {
    Sandbox::test(|sandbox| {
        sandbox.own(endpoints());
        let mut agent = Agent::start(sandbox);
        agent.follow(&with_affinity(1));
        let first = chosen();
        // Two seconds are more than one on any clock. The same endpoint is chosen again once in sixteen
        // times.
        let moved = (0..10).any(|_| {
            thread::sleep(Duration::from_secs(2));
            chosen() != first
        });
        assert!(moved);
    });
}

#[test]
fn a_client_that_calls_in_time_keeps_its_endpoint() {
    Sandbox::test(|sandbox| {
        sandbox.own(endpoints());
        let mut agent = Agent::start(sandbox);
        agent.follow(&with_affinity(600));
        let first = chosen();
        for _ in 0..200 {
            assert_eq!(chosen(), first);
        }
        // A change of the endpoint set that keeps the endpoint keeps the choice.
        let mut cluster = with_affinity(600);
        let other: IpAddr = endpoints().into_iter().find(|ip| *ip != first).unwrap();
        cluster.set_endpoints(&PortOf::udp("dns"), &[first, other].map(|ip| SocketAddr::new(ip, 53)));
        agent.follow(&cluster);
        for _ in 0..50 {
            assert_eq!(chosen(), first);
        }
        cluster.set_endpoints(&PortOf::udp("dns"), &[SocketAddr::new(other, 53)]);
        agent.follow(&cluster);
        assert_eq!(chosen(), other);
    });
}
