//! Faults of an API server. At the end the state is as if there had been none.

use std::{
    collections::BTreeMap,
    fs,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use lb_agent::source::{Source as _, cluster::Timing};
use lb_core::{
    desired::FrontendAddress,
    model::{Protocol::Tcp, ingest},
};
use lb_tests::{
    apiserver::{ApiServer, Kind},
    cluster::{self, NAMESPACE, PortOf},
};

use crate::follower::{ALL, Follower, N_KINDS, TIMING, cluster, endpoints, server_of, service_address};

/// The name of a slice of a service.
fn first_slice_of(objects: &cluster::Cluster, service: &str) -> String {
    let mut slices = objects.slices.values().map(|slice| &slice.metadata);
    let label = |labels: &BTreeMap<String, String>| labels.get(ingest::SERVICE_NAME).cloned();
    let slice = slices.find(|slice| slice.labels.as_ref().and_then(label).as_deref() == Some(service));
    slice.and_then(|slice| slice.name.clone()).unwrap()
}

#[test]
fn a_server_that_comes_later_is_waited_for() {
    let mut server = server_of(&cluster(3));
    server.stop();
    let mut follower = Follower::start(&server);
    follower.steps(20);
    assert!(!follower.source.is_complete());
    server.resume().unwrap();
    follower.until_like(&server);
}

/// A pod's token is replaced long before it expires, and so may a kubeconfig be. The agent does not need a
/// restart.
#[test]
fn credentials_that_are_replaced_are_used() {
    let server = server_of(&cluster(3));
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

    // The server rejects the old token before the file has the next one.
    accept("second");
    server.delete(Kind::Service, NAMESPACE, "web-0");
    follower.steps(20);
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
    let (server, mut follower) = Follower::of_services(5);
    let lists = server.requests().lists;
    for number in 0..5 {
        server.cut_watches();
        server.delete(Kind::Service, NAMESPACE, &format!("web-{number}"));
        follower.until_like(&server);
    }
    assert_eq!(follower.n_frontends(), 0);
    assert_eq!(server.requests().lists, lists);
    assert!(server.requests().confirmations >= 5, "the server confirms that it has the following versions");
}

#[test]
fn removals_while_the_server_is_away_are_seen() {
    let (mut server, mut follower) = Follower::of_services(5);
    for forgets in [false, true] {
        server.stop();
        let name = if forgets { "web-1" } else { "web-0" };
        server.delete(Kind::Service, NAMESPACE, name);
        if forgets {
            server.compact();
        }
        follower.steps(20);
        assert!(follower.source.is_complete(), "what is known stays");
        server.resume().unwrap();
        follower.until_like(&server);
    }
    assert_eq!(follower.n_frontends(), 3);
}

#[test]
fn an_expired_watch_leads_to_a_list_that_removes() {
    let (server, mut follower) = Follower::of_services(5);
    server.set_faults(|faults| faults.lost_events = 2);
    server.delete(Kind::Service, NAMESPACE, "web-0");
    server.delete(Kind::Service, NAMESPACE, "web-1");
    // The watches must be past the lost events.
    thread::sleep(Duration::from_millis(300));
    server.set_faults(|faults| faults.lost_events = 0);
    server.expire();
    follower.until_like(&server);
    assert_eq!(follower.n_frontends(), 3);
    follower.until("the watches of all three kinds have closed", |_| server.requests().expired >= 3);
}

/// Changes while a server sends the objects of its cache come before the end of a streaming list.
#[test]
fn changes_before_the_end_of_a_list_count() {
    let mut objects = cluster(20);
    let server = server_of(&objects);
    let before = server.version();
    server.delete(Kind::Service, NAMESPACE, "web-3");
    server.delete(Kind::Service, NAMESPACE, "web-5");
    objects.set_endpoints(&PortOf::tcp("web-7"), &endpoints(7, 1));
    objects.serve("web-20", service_address(20), Tcp, &endpoints(20, 2));
    let (key, others) = ((NAMESPACE.to_owned(), "web-3".to_owned()), cluster::NAMESPACE);
    objects.services.remove(&key);
    // web-5 exists again, and the other node is deleted.
    server.set(&objects);
    server.delete(Kind::Node, "", "other");
    server.delete(Kind::Slice, others, &first_slice_of(&objects, "web-9"));
    server.set_faults(|faults| faults.changes_in_lists = server.version() - before);

    let mut follower = Follower::start(&server);
    follower.until_like(&server);
    assert_eq!(follower.n_frontends(), 20);
    let sent = server.requests().changes_in_lists;
    assert!(sent >= 7, "{sent} changes were sent in lists");

    // The same in a list that is not the first.
    server.freeze();
    server.delete(Kind::Service, NAMESPACE, "web-7");
    follower.until_like(&server);
    assert!(server.requests().changes_in_lists > sent);
}

/// A watch that the server closes regularly resumes at its version.
#[test]
fn a_watch_that_ends_in_time_costs_no_list() {
    let server = server_of(&cluster(3));
    let mut follower = Follower::start_with(&server, ALL, Timing { watch: Duration::from_secs(1), ..TIMING });
    follower.until("each watch was asked for several times", |_| server.requests().watches >= 3 * N_KINDS);
    follower.until_like(&server);
    let requests = server.requests();
    assert_eq!((requests.lists, requests.confirmations), (N_KINDS, 0));
}

/// Each outage is reported while it lasts, with server and cause, and ends when the server answers again.
#[test]
fn an_outage_is_known() {
    let (mut server, mut follower) = Follower::of_services(3);
    let contact = follower.source.contact().unwrap().clone();
    for _ in 0..2 {
        server.stop();
        let problem = format!("API server {}: connection refused", server.url());
        follower.until("the outage begins", |_| {
            contact.outage().is_some_and(|outage| *outage.problem == problem)
        });
        let since = Instant::now();
        while since.elapsed() < Duration::from_millis(500) {
            follower.step();
        }
        assert!(contact.ages(Instant::now()).iter().all(|(_, age)| *age >= Duration::from_millis(500)));
        server.resume().unwrap();
        follower.until("the outage ends", |_| contact.outage().is_none());
    }
    // A rejected token is an outage although the server answers.
    server.set_faults(|faults| faults.token = Some("other".to_owned()));
    server.cut_watches();
    follower.until("it refuses", |_| contact.outage().is_some());
    let problem = contact.outage().unwrap().problem.to_string();
    let names_all = [&server.url(), "401", "token"].into_iter().all(|part| problem.contains(part));
    assert!(names_all, "{problem}");
    server.set_faults(|faults| faults.token = None);
    follower.until("all is well", |_| contact.outage().is_none());
    let failures = contact.failures();
    let n = |reason| failures.iter().find(|(name, _)| *name == reason).map(|(_, n)| *n).unwrap();
    assert!(n("connection") >= N_KINDS && n("unauthorized") >= 1, "{failures:?}");
}

/// A server that keeps forgetting its history is not asked for lists all the time.
#[test]
fn a_server_that_keeps_forgetting_is_given_pauses() {
    let server = server_of(&cluster(3));
    let mut follower =
        Follower::start_with(&server, ALL, Timing { first_pause: Duration::from_millis(400), ..TIMING });
    follower.until_like(&server);
    let before = server.requests().lists;
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        server.expire();
        follower.step();
    }
    let n_lists = server.requests().lists - before;
    assert!(n_lists <= 7 * N_KINDS, "{n_lists} lists in two seconds");
    follower.until_like(&server);
}

/// While a list is in progress, however long it takes, the maps never lack an entry.
#[test]
fn a_list_takes_nothing_away_that_is_there() {
    let (server, mut follower) = Follower::of_services(20);
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
    let server = server_of(&cluster(3));
    server.set_faults(|faults| faults.too_many_requests = (3, 1));
    let started = Instant::now();
    let mut follower = Follower::start(&server);
    follower.until_like(&server);
    assert!(started.elapsed() >= Duration::from_secs(1), "the server asked for a second");
}

#[test]
fn internal_errors_are_asked_again() {
    let (server, mut follower) = Follower::of_services(3);
    server.set_faults(|faults| faults.internal_errors = 9);
    server.expire();
    server.delete(Kind::Service, NAMESPACE, "web-2");
    follower.until_like(&server);
}

/// After a restore from a backup the server is silent about versions that it has not reached, and objects may
/// be unchanged.
#[test]
fn a_server_that_goes_back_is_believed() {
    for has_streaming_lists in [true, false] {
        for (is_away_for_long, n_changes) in [(false, 0), (true, 0), (true, 60)] {
            let mut server = ApiServer::start();
            server.set_faults(|faults| faults.has_streaming_lists = has_streaming_lists);
            let mut objects = cluster(5);
            server.set(&objects);
            let backup = server.version();
            let mut follower = Follower::start(&server);
            server.delete(Kind::Service, NAMESPACE, "web-3");
            objects.set_endpoints(&PortOf::tcp("web-1"), &endpoints(100, 2));
            server.set(&objects.clone().with([cluster::node("node", &["192.0.2.77".parse().unwrap()])]));
            server.delete(Kind::Service, NAMESPACE, "web-4");
            follower.until_like(&server);
            let known = server.version();

            server.stop();
            if is_away_for_long {
                follower.until("the watches detect the outage", |follower| {
                    follower.source.contact().unwrap().outage().is_some()
                });
            }
            server.restore(backup);
            for n_endpoints in 0..n_changes {
                // Until lost version numbers are reused for other changes.
                objects.set_endpoints(&PortOf::tcp("web-2"), &endpoints(2, 1 + n_endpoints % 2));
                objects.slices.values().for_each(|slice| server.apply(slice.clone()));
            }
            assert_eq!(server.version() > known, n_changes > 0);
            server.resume().unwrap();
            follower.until_like(&server);
            server.delete(Kind::Service, NAMESPACE, "web-4");
            follower.until_like(&server);
        }
    }
}

#[test]
fn a_server_with_other_versions_is_listed_anew() {
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
    let (server, mut follower) = Follower::of_services(3);
    server.freeze();
    server.delete(Kind::Service, NAMESPACE, "web-0");
    follower.until_like(&server);
    follower.until("each kind is listed", |_| server.requests().lists >= 2 * N_KINDS);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(server.requests().lists, 2 * N_KINDS, "once for one silence");
}

/// Changes of all kinds, interspersed with faults of all kinds. A service that always exists is always
/// served.
#[test]
fn churn_with_faults_ends_as_without() {
    let (mut server, mut follower) = Follower::of_services(60);
    let mut objects = cluster(60);
    let kept = FrontendAddress { ip: service_address(0).ip(), port: 80, protocol: Tcp };
    let mut random = 1_u64;
    let mut next = |limit: u64| {
        // Reproducible pseudo-random numbers.
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
        match next(10) {
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
            8 => server.set_faults(|faults| faults.changes_in_lists = round % 20),
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

/// A process that is being spawned has all its parent's descriptors until it calls execve(2).
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
