//! From the API server to the kernel.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use lb_agent::{
    controller::run::{Options, run},
    serve,
    snapshot::{Snapshot, Writer},
    source::Source,
};
use lb_core::model::{Protocol::Tcp, Store, ingest};
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    apiserver::{ApiServer, Kind},
    client::call,
    cluster::{Cluster, NAMESPACE, PortOf},
    server::Servers,
};
use nix::errno::Errno;
use serde_json::Value;
use tokio::{runtime::Runtime, sync::watch};

use crate::follower::{PATIENCE, open, runtime, service_address};

/// Calls reach the endpoints of the server's objects soon after a change. An outage of the server changes
/// nothing.
#[test]
fn calls_follow_the_api_server() {
    Sandbox::test(|sandbox| {
        let endpoints = [8001, 8002].map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        let _servers = Servers::tcp(endpoints);
        let service = service_address(0);
        let mut server = ApiServer::start();
        let mut objects = Cluster::new();
        objects.serve("web", service, Tcp, &endpoints[..1]);
        server.set(&objects);

        let runtime = runtime();
        let mut source = open(&runtime, &server);
        let mut agent = Agent::start(sandbox);
        let mut until = |wanted: Result<SocketAddr, Errno>| {
            let started = Instant::now();
            loop {
                let _has_synced = follow_for_a_moment(&runtime, &mut source, &mut agent);
                if call(service, Tcp) == wanted {
                    return started.elapsed();
                }
                assert!(started.elapsed() < PATIENCE, "{service} never gave {wanted:?}");
            }
        };
        until(Ok(endpoints[0]));
        objects.set_endpoints(&PortOf::tcp("web"), &endpoints[1..]);
        server.set(&objects);
        eprintln!("from the change to the first call that sees it: {:?}", until(Ok(endpoints[1])));
        server.stop();
        until(Ok(endpoints[1]));
        objects.set_endpoints(&PortOf::tcp("web"), &[]);
        server.set(&objects);
        server.resume().unwrap();
        until(Err(Errno::ECONNREFUSED));
        server.delete(Kind::Service, NAMESPACE, "web");
        until(Err(Errno::ENETUNREACH));
    });
}

/// Applies changes that arrive within 5 ms, and syncs if there are any. Returns whether it synced.
pub(crate) fn follow_for_a_moment(runtime: &Runtime, source: &mut dyn Source, agent: &mut Agent) -> bool {
    let moment = Duration::from_millis(5);
    let changed = runtime.block_on(async { tokio::time::timeout(moment, source.changed()).await });
    if changed.is_ok() {
        agent.state.change(|store| source.apply(store));
    }
    let may_sync = source.is_complete() && agent.state.needs_sync();
    if may_sync {
        agent.sync();
    }
    may_sync
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "never happened: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn options(sandbox: &Sandbox, state_dir: &Path, http: serve::Options) -> Options {
    Options {
        kernel: agent::options(sandbox),
        state_dir: state_dir.to_owned(),
        min_sync_interval: Duration::ZERO,
        audit_interval: Duration::from_millis(50),
        self_test_interval: Duration::ZERO,
        exclude_cgroups: Vec::new(),
        exclude_pods: false,
        http,
    }
}

/// Loading the programs takes up to seconds: meanwhile health checks are answered, even with one worker
/// thread.
#[test]
fn loading_leaves_the_worker_thread_to_others() {
    Sandbox::test(|sandbox| {
        let (server, state_dir) = (ApiServer::start(), tempfile::tempdir().unwrap());
        let healthz = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);
        let http = serve::Options { healthz: Some(healthz), ..serve::Options::default() };
        let answer = || -> std::io::Result<String> {
            let mut connection = TcpStream::connect(healthz)?;
            connection.set_read_timeout(Some(PATIENCE))?;
            connection.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            connection.read_to_string(&mut answer)?;
            Ok(answer)
        };
        with_options(&server, options(sandbox, state_dir.path(), http), || {
            // The first response once the agent listens.
            let mut first = String::new();
            let end = Instant::now() + PATIENCE;
            while first.is_empty() {
                assert!(Instant::now() < end, "no answer");
                first = answer().unwrap_or_default();
            }
            assert!(first.contains("the programs are being loaded"), "{first}");
            until("it is ready", || answer().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")));
        });
    });
}

/// Runs the whole agent while `body` runs.
fn with_agent(
    sandbox: &Sandbox,
    server: &ApiServer,
    state_dir: &Path,
    metrics: Option<SocketAddr>,
    body: impl FnOnce(),
) {
    let http = serve::Options { metrics, ..serve::Options::default() };
    with_options(server, options(sandbox, state_dir, http), body);
}

/// The same with the given options.
fn with_options(server: &ApiServer, options: Options, body: impl FnOnce()) {
    thread::scope(|scope| {
        // Dropped before the agent is waited for, so that the agent also stops when the body panics.
        let (stop, stopped) = watch::channel(false);
        let agent = scope.spawn(move || {
            let runtime = runtime();
            let source = open(&runtime, server);
            runtime.block_on(run(Box::new(source), options, agent::settings(), stopped)).unwrap();
        });
        body();
        stop.send(true).unwrap();
        agent.join().unwrap();
    });
}

/// A host that starts during an outage of the API server serves what it served last, until the server
/// answers.
#[test]
fn without_the_server_the_snapshot_is_served() {
    Sandbox::test(|sandbox| {
        let endpoints = [8001, 8002].map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        let _servers = Servers::tcp(endpoints);
        let (service, state_dir) = (service_address(0), tempfile::tempdir().unwrap());
        let mut objects = Cluster::new();
        let mut writer = Writer::new(state_dir.path());
        // First unchanged, then with a change, which is in the journal.
        for served in [&[], &endpoints[..1]] {
            objects.serve("web", service, Tcp, served);
            let mut store = Store::new();
            let (_all, _issues) = objects.fill(&mut store);
            writer.write(Snapshot::of(&agent::settings(), &[], &store)).unwrap();
        }

        let mut server = ApiServer::start();
        server.stop();
        with_agent(sandbox, &server, state_dir.path(), None, || {
            until("the snapshot is served", || call(service, Tcp) == Ok(endpoints[0]));
        });
        objects.set_endpoints(&PortOf::tcp("web"), &endpoints[1..]);
        server.set(&objects);
        server.resume().unwrap();
        with_agent(sandbox, &server, state_dir.path(), None, || {
            until("the server's objects are served", || call(service, Tcp) == Ok(endpoints[1]));
        });
        let saved = Snapshot::read(state_dir.path()).unwrap();
        assert_eq!(saved.slices.iter().map(|slice| slice.ports[0].port).collect::<Vec<_>>(), [8002]);
        assert_eq!(saved.services.len(), 1);
    });
}

/// The lines of `/metrics`.
fn scrape(address: SocketAddr) -> Vec<String> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// A change is timed from its event and from its slice's annotation; an initial list is not.
#[test]
fn a_scrape_tells_of_changes_and_calls() {
    Sandbox::test(|sandbox| {
        let endpoints = [8001, 8002].map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        let _servers = Servers::tcp(endpoints);
        let (service, state_dir) = (service_address(0), tempfile::tempdir().unwrap());
        let mut objects = Cluster::new();
        objects.serve("web", service, Tcp, &endpoints[..1]);
        let server = ApiServer::start();
        server.set(&objects);
        // A free port in the sandbox's network namespace, where nothing else listens.
        let metrics = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let has = |line: &str| scrape(metrics).iter().any(|found| found == line);
        with_agent(sandbox, &server, state_dir.path(), Some(metrics), || {
            until("the first list is served", || call(service, Tcp) == Ok(endpoints[0]));
            assert!(has("socklb_source_complete 1"));
            assert!(has("socklb_programming_duration_seconds_count 0"));
            objects.set_endpoints(&PortOf::tcp("web"), &endpoints[1..]);
            for slice in objects.slices.values_mut() {
                let annotations = slice.metadata.annotations.get_or_insert_default();
                let now = k8s_openapi::jiff::Timestamp::now().to_string();
                annotations.insert(ingest::TRIGGER_TIME.to_owned(), now);
            }
            server.set(&objects);
            until("the change is served", || call(service, Tcp) == Ok(endpoints[1]));
            until("and counted", || has("kubeproxy_network_programming_duration_seconds_count 1"));
            let labels = r#"namespace="default",service="web",port="80",protocol="TCP""#;
            assert!(!has(&format!(r#"socklb_connections_total{{{labels},result="redirected"}} 0"#)));
            assert!(has(&format!(r#"socklb_connections_total{{{labels},result="refused"}} 0"#)));
            until("an audit has found nothing", || {
                !has(r#"socklb_audits_total{result="clean"} 0"#)
                    && has(r#"socklb_audits_total{result="repaired"} 0"#)
            });
        });
        assert!(TcpListener::bind(metrics).is_ok(), "the port is free once the agent has exited");
    });
}

/// An issue of a Service is written as an Event, once. After a restart the same Event is updated.
#[test]
fn events_tell_of_conflicts_and_of_the_agent() {
    Sandbox::test(|sandbox| {
        let (service, state_dir) = (service_address(0), tempfile::tempdir().unwrap());
        let mut objects = Cluster::new();
        objects.serve("a", service, Tcp, &[]);
        objects.serve("b", service, Tcp, &[]);
        let server = ApiServer::start();
        server.set(&objects);
        let of = |reason: &str| -> Vec<Value> {
            server.events().into_iter().filter(|event| event["reason"] == reason).collect()
        };
        with_agent(sandbox, &server, state_dir.path(), None, || {
            until("the conflict is reported", || of("AddressConflict").len() == 1);
            until("the first sync is reported", || of("Synced").len() == 1);
        });
        let conflict = of("AddressConflict").remove(0);
        assert_eq!((&conflict["type"], &conflict["series"]), (&"Warning".into(), &Value::Null), "{conflict}");
        assert_eq!(conflict["reportingInstance"], "node", "{conflict}");
        let text = conflict["note"].as_str().unwrap();
        assert!(text.starts_with(&format!("node node: {service}")) && text.contains("default/"), "{text}");
        let regarding = &conflict["regarding"];
        assert!(regarding["uid"].as_str().is_some_and(|uid| uid.len() == 36), "{regarding}");
        assert!(matches!(regarding["name"].as_str(), Some("a" | "b")), "{regarding}");
        let starting = of("Starting").remove(0);
        let node = &starting["regarding"];
        assert_eq!(
            (&node["kind"], &node["name"], &node["uid"]),
            (&"Node".into(), &"node".into(), &"node".into())
        );
        assert_eq!(starting["metadata"]["namespace"], "default");
        assert_eq!(starting["note"], "node node: socklb has attached its programs");

        with_agent(sandbox, &server, state_dir.path(), None, || {
            until("it is reported again", || of("AddressConflict")[0]["series"]["count"] == 2);
        });
        assert_eq!((of("AddressConflict").len(), of("Starting").len()), (1, 1), "{:#?}", server.events());
    });
}
