//! Multipath TCP: the program has one socket, and the kernel connects another one, a subflow.

use std::{
    fs,
    net::SocketAddr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use lb_core::model::Protocol::Tcp;
use lb_kernel::{Features, Options};
use lb_tests::{
    Feature, Sandbox,
    client::{Domain, Socket},
    cluster::Cluster,
    server::Servers,
};
use nix::{errno::Errno, libc};

use crate::{
    fixture::{addresses, in_each_mode, servers_of, start},
    records::{Scene, scenes},
    slots::n_taken,
};

fn multipath(domain: Domain) -> Option<Socket> {
    Socket::with_protocol_number(domain, Tcp, libc::IPPROTO_MPTCP).ok()
}

/// Runs a test with an agent in each mode, if the kernel has multipath TCP.
fn with_multipath(test: impl Fn(&Sandbox, &Options) + Send + Sync) {
    Sandbox::test_with(&[Feature::Multipath], |sandbox| {
        let cluster = scenes(Tcp);
        let _servers = servers_of(&cluster);
        in_each_mode(sandbox, |options| {
            start(options).follow(&cluster);
            test(sandbox, options);
        });
    });
}

/// The peer name that this kernel can show: before 5.19 a program cannot get from the subflow to the
/// program's socket.
fn expected_peer(service: SocketAddr, endpoint: SocketAddr) -> SocketAddr {
    if Features::probe().mptcp { service } else { endpoint }
}

fn assert_served(socket: &Socket, scene: &Scene, what: &str) {
    assert_eq!(socket.ask().unwrap().server, scene.endpoint, "{what}");
    assert_eq!(socket.peer_name(), Ok(expected_peer(scene.service, scene.endpoint)), "{what}");
}

#[test]
fn a_multipath_connection_is_served_and_sees_the_service() {
    with_multipath(|_sandbox, _options| {
        for domain in Domain::ALL {
            let scene = Scene::new(domain);
            let socket = multipath(domain).unwrap();
            socket.connect(scene.service).unwrap();
            assert_served(&socket, &scene, &format!("{domain:?}"));

            let bound = multipath(domain).unwrap();
            bound.bind(SocketAddr::new(domain.loopback(), 0)).unwrap();
            bound.connect(scene.service).unwrap();
            assert_served(&bound, &scene, &format!("{domain:?}, bound"));

            let without_waiting = multipath(domain).unwrap();
            without_waiting.set_nonblocking(true);
            let begun = without_waiting.connect(scene.service);
            assert!(matches!(begun, Ok(()) | Err(Errno::EINPROGRESS)), "{begun:?}");
            without_waiting.wait_until_writable();
            without_waiting.set_nonblocking(false);
            assert_served(&without_waiting, &scene, &format!("{domain:?}, not blocking"));

            let plain = multipath(domain).unwrap();
            plain.connect(scene.plain).unwrap();
            assert_eq!(plain.ask().unwrap().server, scene.plain);
            assert_eq!(plain.peer_name(), Ok(scene.plain));
        }
    });
}

/// A socket that reconnects to the endpoint itself shows no service.
#[test]
fn a_reconnected_multipath_socket_sees_its_new_peer() {
    with_multipath(|_sandbox, _options| {
        for domain in Domain::ALL {
            let scene = Scene::new(domain);
            let socket = multipath(domain).unwrap();
            for to in [scene.service, scene.endpoint, scene.service, scene.plain] {
                socket.connect(to).unwrap();
                let peer = if to == scene.service { expected_peer(to, scene.endpoint) } else { to };
                assert_eq!(socket.peer_name(), Ok(peer), "{domain:?}");
                let _answer = socket.ask().unwrap();
                socket.disconnect().unwrap();
            }
        }
    });
}

/// The kernel closes subflows without running a program, so they must not own slots, which only a program
/// frees.
#[test]
fn subflows_take_no_slots() {
    with_multipath(|sandbox, _options| {
        for domain in Domain::ALL {
            let scene = Scene::new(domain);
            let sockets: Vec<Socket> = (0..20)
                .map(|_| {
                    let socket = multipath(domain).unwrap();
                    socket.connect(scene.service).unwrap();
                    socket
                })
                .collect();
            assert_eq!(n_taken(sandbox), 0, "{domain:?}");
            drop(sockets);
            assert_eq!(n_taken(sandbox), 0, "{domain:?}");
        }
    });
}

/// With a server that speaks multipath TCP too. The kernel connects further subflows by itself, to the peer's
/// address, which may also be a service's.
#[test]
fn a_subflow_that_is_added_goes_where_the_kernel_wants() {
    // The guests of the kernel matrix lack `ip`.
    if Command::new("ip").args(["mptcp", "endpoint", "show"]).output().is_err() || !Features::probe().mptcp {
        return;
    }
    with_multipath(|_sandbox, options| {
        for arguments in [
            "endpoint flush",
            "limits set subflow 4 add_addr_accepted 4",
            "endpoint add 127.0.0.9 dev lo subflow",
        ] {
            let done = Command::new("ip").arg("mptcp").args(arguments.split(' ')).status().unwrap();
            assert!(done.success(), "ip mptcp {arguments}");
        }
        let scene = Scene::new(Domain::V4);
        let [endpoint, other] = addresses(Domain::V4, 9001);
        let _servers = Servers::multipath([endpoint, other]);
        // The endpoint's own address is also another service's.
        let one = Cluster::new().serving("one", scene.service, Tcp, &[endpoint]);
        start(options).follow(&one.serving("two", endpoint, Tcp, &[other]));
        let socket = multipath(Domain::V4).unwrap();
        socket.connect(scene.service).unwrap();
        assert_eq!(socket.ask().unwrap().server, endpoint);
        let deadline = Instant::now() + Duration::from_secs(20);
        // 127.0.0.9 to 127.0.0.1:9001, established, in the format of `/proc/net/tcp` on a little-endian
        // machine.
        let is_added = |line: &str| line.contains(" 0900007F:") && line.contains(" 0100007F:2329 01 ");
        while !fs::read_to_string("/proc/thread-self/net/tcp").unwrap().lines().any(is_added) {
            assert!(Instant::now() < deadline, "no further subflow to {endpoint}");
            socket.send(b"more").unwrap();
            let _echo = socket.receive().unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(socket.peer_name(), Ok(expected_peer(scene.service, endpoint)));
    });
}
