//! What goes wrong with an API server. At the end everything is as if nothing had.

use std::{
    fs,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use lb_tests::{
    apiserver::{ApiServer, Kind},
    cluster::{self, NAMESPACE, PortOf},
};
use lb_userspace::{desired::FrontendAddress, model::Protocol::Tcp, source::Source as _};

use crate::follower::{Follower, N_KINDS, cluster, endpoints, service_address};

fn with_services(n_services: usize) -> (ApiServer, Follower) {
    let server = ApiServer::start();
    server.set(&cluster(n_services));
    let mut follower = Follower::start(&server);
    follower.until_like(&server);
    (server, follower)
}

#[test]
fn a_server_that_comes_later_is_waited_for() {
    let mut server = ApiServer::start();
    server.set(&cluster(3));
    server.stop();
    let mut follower = Follower::start(&server);
    for _ in 0..20 {
        follower.step();
    }
    assert!(!follower.source.is_complete());
    server.resume().unwrap();
    follower.until_like(&server);
}

/// A pod's token is replaced long before it ends, and so is a kubeconfig; nobody restarts the agent for it.
#[test]
fn credentials_that_are_replaced_are_used() {
    let server = ApiServer::start();
    server.set(&cluster(3));
    let directory = tempfile::tempdir().unwrap();
    let [token, kubeconfig] = ["token", "kubeconfig"].map(|name| directory.path().join(name));
    let accept = |token: &str| {
        server.set_faults(|faults| faults.token = Some(token.to_owned()));
        server.cut_watches();
    };
    let in_file =
        server.kubeconfig().replace("user: {}", &format!("user: {{tokenFile: {}}}", token.display()));
    fs::write(&kubeconfig, in_file).unwrap();

    fs::write(&token, "first").unwrap();
    accept("first");
    let mut follower = Follower::with_kubeconfig(&kubeconfig);
    follower.until_like(&server);

    // The server no longer takes it before the file has the next one.
    accept("second");
    server.delete(Kind::Service, NAMESPACE, "web-0");
    for _ in 0..20 {
        follower.step();
    }
    assert_eq!(follower.n_frontends(), 3, "what is served stays");
    fs::write(&token, "second").unwrap();
    follower.until_like(&server);

    let in_line = server.kubeconfig().replace("user: {}", "user: {token: third}");
    fs::write(&kubeconfig, in_line).unwrap();
    accept("third");
    server.delete(Kind::Service, NAMESPACE, "web-1");
    follower.until_like(&server);
    assert_eq!(follower.n_frontends(), 1);
}

#[test]
fn a_cut_watch_is_resumed_without_a_list() {
    let (server, mut follower) = with_services(5);
    let lists = server.requests().lists;
    for number in 0..5 {
        server.cut_watches();
        server.delete(Kind::Service, NAMESPACE, &format!("web-{number}"));
        follower.until_like(&server);
    }
    assert_eq!(follower.n_frontends(), 0);
    assert_eq!(server.requests().lists, lists);
}

#[test]
fn removals_while_the_server_is_away_are_seen() {
    let (mut server, mut follower) = with_services(5);
    for forgets in [false, true] {
        server.stop();
        let name = if forgets { "web-1" } else { "web-0" };
        server.delete(Kind::Service, NAMESPACE, name);
        if forgets {
            server.compact();
        }
        for _ in 0..20 {
            follower.step();
        }
        assert!(follower.source.is_complete(), "what is known stays");
        server.resume().unwrap();
        follower.until_like(&server);
    }
    assert_eq!(follower.n_frontends(), 3);
}

#[test]
fn an_expired_watch_leads_to_a_list_that_removes() {
    let (server, mut follower) = with_services(5);
    server.set_faults(|faults| faults.lost_events = 2);
    server.delete(Kind::Service, NAMESPACE, "web-0");
    server.delete(Kind::Service, NAMESPACE, "web-1");
    // The watches must have got past the lost events.
    thread::sleep(Duration::from_millis(300));
    server.set_faults(|faults| faults.lost_events = 0);
    server.expire();
    follower.until_like(&server);
    assert_eq!(follower.n_frontends(), 3);
    follower.until("the watches of all three kinds have ended", |_| server.requests().expired >= 3);
}

/// The tables are never emptier than they should be while a list is under way, however long it takes.
#[test]
fn a_list_takes_nothing_away_that_is_there() {
    let (server, mut follower) = with_services(20);
    server.set_faults(|faults| faults.delay = Duration::from_millis(200));
    for _ in 0..3 {
        server.expire();
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            follower.step();
            assert_eq!(follower.n_frontends(), 20);
        }
    }
    follower.until_like(&server);
}

#[test]
fn too_many_requests_are_asked_again_later() {
    let server = ApiServer::start();
    server.set(&cluster(3));
    server.set_faults(|faults| faults.too_many_requests = (3, 1));
    let started = Instant::now();
    let mut follower = Follower::start(&server);
    follower.until_like(&server);
    assert!(started.elapsed() >= Duration::from_secs(1), "the server asked for a second");
}

#[test]
fn internal_errors_are_asked_again() {
    let (server, mut follower) = with_services(3);
    server.set_faults(|faults| faults.internal_errors = 9);
    server.expire();
    server.delete(Kind::Service, NAMESPACE, "web-2");
    follower.until_like(&server);
}

/// After a restore from a backup versions are smaller: the server is silent about changes until it has caught up.
#[test]
fn a_server_that_goes_back_is_listed_anew() {
    for version in [10, 1_000_000] {
        for has_streaming_lists in [true, false] {
            let server = ApiServer::start();
            server.set_faults(|faults| faults.has_streaming_lists = has_streaming_lists);
            server.set(&cluster(5));
            let mut follower = Follower::start(&server);
            let mut server = server;
            follower.until_like(&server);
            server.restart_at_version(version);
            server.delete(Kind::Service, NAMESPACE, "web-3");
            follower.until_like(&server);
            server.delete(Kind::Service, NAMESPACE, "web-4");
            follower.until_like(&server);
        }
    }
}

#[test]
fn a_half_open_connection_is_given_up() {
    let (server, mut follower) = with_services(3);
    server.freeze();
    server.delete(Kind::Service, NAMESPACE, "web-0");
    follower.until_like(&server);
    assert_eq!(server.requests().lists, N_KINDS, "the watches go on where they were");
}

/// Changes of all kinds, with faults of all kinds in between. A service that is always there is always served.
#[test]
fn churn_with_faults_ends_as_without() {
    let mut server = ApiServer::start();
    let mut objects = cluster(60);
    server.set(&objects);
    let mut follower = Follower::start(&server);
    follower.until_like(&server);
    let kept = FrontendAddress { ip: service_address(0).ip(), port: 80, protocol: Tcp };
    let mut random = 1_u64;
    let mut next = |limit: u64| {
        // Numbers that differ and are the same in each run.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((random >> 33) % limit).unwrap()
    };
    for round in 0..60_u64 {
        for _ in 0..5 {
            let number = 1 + next(59);
            let name = format!("web-{number}");
            match next(4) {
                0 => {
                    let key = (NAMESPACE.to_owned(), name.clone());
                    if objects.services.remove(&key).is_none() {
                        objects.serve(&name, service_address(number), Tcp, &endpoints(number, 2));
                    }
                }
                1 => {
                    objects.set(cluster::node(&format!("node-{}", next(3)), &["192.0.2.9".parse().unwrap()]));
                }
                _ => objects.set_endpoints(&PortOf::tcp(&name), &endpoints(number, next(5))),
            }
        }
        server.set(&objects);
        match next(9) {
            0 | 1 => server.cut_watches(),
            2 => server.expire(),
            3 => server.set_faults(|faults| faults.internal_errors = 2),
            4 => server.set_faults(|faults| faults.too_many_requests = (2, 0)),
            5 => {
                server.stop();
                server.resume().unwrap();
            }
            6 => server.compact(),
            7 => server.restart_at_version(100 + 10_000 * (round % 3)),
            _ => {}
        }
        for _ in 0..5 {
            follower.step();
            assert!(follower.image.services.contains_key(&kept), "round {round}");
        }
    }
    server.set_faults(|faults| (faults.internal_errors, faults.too_many_requests) = (0, (0, 0)));
    follower.until_like(&server);
}

/// A process that is being started has all descriptors of its parent until it is another program.
#[test]
fn a_server_comes_back_while_processes_are_started() {
    let mut server = ApiServer::start();
    let is_over = AtomicBool::new(false);
    let resumed = thread::scope(|scope| {
        let _starting = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                assert!(Command::new("true").status().unwrap().success());
            }
        });
        let resumed = (0..300).try_for_each(|_| {
            server.stop();
            server.resume()
        });
        is_over.store(true, Ordering::Relaxed);
        resumed
    });
    resumed.unwrap();
}
