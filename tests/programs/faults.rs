//! The agent is killed between two changes to the kernel, and the next one repairs everything.
//!
//! Each change takes two starts of the agent, so a run tests one in [`STEP`]; `LB_FAULT_STEP=1` tests all.
//! `tests/kernel/lifecycle.rs` tests every prefix of a plan in process.
#![cfg(feature = "fault-points")]

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use lb_core::{
    model::Protocol::{Tcp, Udp},
    plan::Capacity,
    state::State,
    tables::Image,
};
use lb_kernel::{Maps, addresses};
use lb_tests::{
    Feature, Sandbox, agent,
    client::call,
    cluster::{self, Cluster, PortOf},
    command::SetOnDrop,
    installed::{Place, QUIET, eventually},
    number,
    server::Servers,
};
use nix::sys::signal::Signal;

use crate::packets;

/// Sizes of the maps: of the first state and, if the maps change too, of the second.
const SIZES: [[&str; 2]; 2] =
    [["--max-services=64", "--max-endpoints=256"], ["--max-services=32", "--max-endpoints=512"]];

/// An agent is killed before one in this number of changes; a prime, so that different kinds are hit.
const STEP: usize = 11;

fn endpoint(service: u8, number: u8, ipv6: bool) -> SocketAddr {
    let ip = if ipv6 {
        IpAddr::from([0xfd00, 0x244, 0, 0, 0, 0, service.into(), number.into()])
    } else {
        IpAddr::from([127, 1, service, number])
    };
    SocketAddr::new(ip, 8080)
}

fn address(service: u8, ipv6: bool) -> SocketAddr {
    let ip = if ipv6 {
        IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, service.into()])
    } else {
        IpAddr::from([10, 96, 0, service])
    };
    SocketAddr::new(ip, 80)
}

/// Two states. A plan between them changes every map: services of both families keep their address with other
/// endpoints, are created, are deleted, and change their type; one node is added and one removed.
fn state(second: bool) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.set(cluster::node("node", &[IpAddr::from([192, 0, 2, 1])]));
    cluster.set(cluster::node("other", &[IpAddr::from([192, 0, 2, if second { 3 } else { 2 }])]));
    let numbers: &[u8] = if second { &[2, 3, 4] } else { &[1, 2] };
    for ipv6 in [false, true] {
        let family = if ipv6 { "v6" } else { "v4" };
        let mut serve = |service: u8, node_port: bool| {
            let name = format!("s{service}-{family}");
            let endpoints: Vec<SocketAddr> = numbers.iter().map(|n| endpoint(service, *n, ipv6)).collect();
            let address = address(service, ipv6);
            let object = cluster::service(&name, &[address.ip()], &[cluster::port("", Tcp, address.port())]);
            cluster.set(if node_port {
                cluster::with_node_port(object, 30_000 + u16::from(service))
            } else {
                cluster::with_affinity(object, None)
            });
            cluster.set_endpoints(&PortOf::tcp(&name), &endpoints);
        };
        serve(1, false);
        serve(2, second);
        serve(if second { 3 } else { 4 }, true);
    }
    cluster
}

/// Whether the maps hold a state, and an agent that starts now would have nothing to do.
fn is_right(pin_path: &Path, cluster: &Cluster, sizes: usize, other: Other) -> bool {
    if other == Other::Packets && !packets::are_right(cluster) {
        return false;
    }
    let capacity =
        [(64, 256), (32, 512)].map(|(services, endpoints)| Capacity { services, endpoints })[sizes];
    let Ok(found) = Maps::open(pin_path).and_then(|maps| maps.image()) else { return false };
    let plan_from = |image: &Image| {
        let mut state = State::new(agent::settings(), addresses::read(), capacity, image);
        let _issues = cluster.feed(&mut state);
        let plan = state.sync();
        (plan, state)
    };
    let (_plan, scratch) = plan_from(&Image::default());
    let keys = |image: &Image| image.services.keys().copied().collect::<Vec<_>>();
    plan_from(&found).0.is_empty()
        && keys(&found) == keys(scratch.image())
        && found.node_addrs == scratch.image().node_addrs
}

/// What else differs in the second state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Other {
    Nothing,
    /// Sizes of the maps.
    Sizes,
    /// Layouts of maps outside the image.
    Layouts,
    /// The rules for packets.
    Packets,
}

/// Kills agents on the way to the other state and back, before the first change to the kernel, before a later
/// one, and so on, until one completes its plan. Each time the next agent repairs what it finds.
fn every_point(sandbox: &Sandbox, place: &Place, other: Other) -> usize {
    let one_in = number("LB_FAULT_STEP", STEP).max(1);
    let pin_path = Path::new(&place.pin_path);
    let servers = [false, true].map(|ipv6| {
        let all = (1..=4u8).flat_map(|service| (1..=4).map(move |number| endpoint(service, number, ipv6)));
        let all: Vec<SocketAddr> = all.collect();
        if ipv6 {
            sandbox.own(all.iter().map(SocketAddr::ip));
        }
        Servers::start(all.into_iter().flat_map(|address| [(address, Tcp), (address, Udp)]))
    });
    let flags = |fault: Option<usize>, second: bool| {
        let mut command = Command::new(&place.binary);
        if let Some(at) = fault {
            command.env("SOCKLB_FAULT_AT", at.to_string());
        }
        if second && other == Other::Layouts {
            command.env("SOCKLB_LAYOUT", "affinity:90,sockets:90,excluded:91");
        }
        let sizes = &SIZES[usize::from(second && other == Other::Sizes)];
        let places = ["--node-name", "node", "--cgroup", &place.cgroup, "--pin-path", &place.pin_path];
        let mode = if other == Other::Packets { "--packets=all" } else { "--packets=off" };
        place.spawn(command, &[&places, &[mode][..], &sizes[..], &QUIET].concat())
    };
    place.write(&state(false));
    let first = flags(None, false);
    eventually("the first state is complete", || is_right(pin_path, &state(false), 0, other));
    assert_eq!(first.end(Signal::SIGTERM), Some(0));

    let (stop, n_calls) = (AtomicBool::new(false), AtomicU64::new(0));
    let n_points = thread::scope(|scope| {
        for caller in 0..2 {
            let (stop, n_calls) = (&stop, &n_calls);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for service in [1, 2] {
                        let to = address(service, caller == 1);
                        let server = call(to, Tcp).unwrap_or_else(|error| panic!("{to}: {error}"));
                        let is_its = (1..=4).any(|n| endpoint(service, n, caller == 1) == server);
                        assert!(is_its, "{to} reached {server}");
                        let _before = n_calls.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            });
        }
        // Even after a panic, which waits for the callers.
        let _stops = SetOnDrop(&stop);
        let mut second = false;
        for at in (1..).step_by(one_in) {
            let mut has_survived = true;
            // In both directions. The first run of each has the larger plan.
            for _way in 0..if at == 1 { 2 } else { 1 } {
                second = !second;
                let wanted = state(second);
                place.write(&wanted);
                let agent = flags(Some(at), second);
                let sizes = usize::from(second && other == Other::Sizes);
                // It is killed before it is done, or is done.
                eventually("the agent has died or is done", || {
                    agent.has_ended()
                        || (agent.has_said("synced") && is_right(pin_path, &wanted, sizes, other))
                });
                has_survived &= !agent.has_ended();
                drop(agent);
                let repairing = flags(None, second);
                eventually("the next one has repaired it", || {
                    repairing.has_said("synced") && is_right(pin_path, &wanted, sizes, other)
                });
                assert_eq!(repairing.end(Signal::SIGTERM), Some(0));
            }
            if has_survived {
                return at;
            }
        }
        unreachable!("a plan is finite")
    });
    drop(servers);
    assert!(n_calls.into_inner() > 0);
    n_points
}

#[test]
fn an_agent_killed_between_two_changes_is_made_up_for() {
    Place::test(&[], |sandbox, place| {
        let n_points = every_point(sandbox, place, Other::Nothing);
        // The hooks' links, and a plan for all maps.
        assert!(n_points > 30, "{n_points}");
    });
}

/// The same with new maps of other sizes, which are filled, switched to and moved.
#[test]
fn an_agent_killed_while_it_replaces_the_maps_is_made_up_for() {
    Place::test(&[], |sandbox, place| {
        let n_points = every_point(sandbox, place, Other::Sizes);
        assert!(n_points > 50, "{n_points}");
    });
}

/// The same with some maps recreated while the others continue.
#[test]
fn an_agent_killed_while_it_makes_some_maps_anew_is_made_up_for() {
    Place::test(&[], |sandbox, place| {
        let n_points = every_point(sandbox, place, Other::Layouts);
        assert!(n_points > 50, "{n_points}");
    });
}

/// The same with the rules for packets, which a transaction changes.
#[test]
fn an_agent_killed_before_a_transaction_is_made_up_for() {
    Place::test(&[Feature::Nftables], |sandbox, place| {
        let n_points = every_point(sandbox, place, Other::Packets);
        assert!(n_points > 30, "{n_points}");
    });
}
