//! From the API server to the kernel.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    thread,
    time::Duration,
};

use lb_agent::{
    controller::run::{Options, run},
    serve,
    snapshot::{Snapshot, Writer},
};
use lb_core::model::{Protocol::Tcp, Store};
use lb_tests::{
    Sandbox,
    agent::{self},
    apiserver::{ApiServer, Kind},
    client::call,
    cluster::{Cluster, NAMESPACE, PortOf},
    installed::eventually,
    server::Servers,
};
use nix::errno::Errno;
use serde_json::Value;
use tokio::sync::watch;

use crate::{
    follower::{InKernel, open, runtime, service_address, trigger_now},
    outage::get,
};

/// Calls reach the endpoints of the server's objects soon after a change. An outage of the server changes
/// nothing.
#[test]
fn calls_follow_the_api_server() {
    Sandbox::test(|sandbox| {
        let (endpoints, _servers) = two_servers();
        let service = service_address(0);
        let mut server = ApiServer::start();
        let mut objects = Cluster::new().serving("web", service, Tcp, &endpoints[..1]);
        server.set(&objects);

        let mut agent = InKernel::start(sandbox, &server);
        let mut until = |wanted: Result<SocketAddr, Errno>| agent.until(&[(service, wanted)]);
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

fn two_servers() -> ([SocketAddr; 2], Servers) {
    let endpoints = [8001, 8002].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    (endpoints, Servers::tcp(endpoints))
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
        names: None,
        http,
    }
}

/// Loading the programs takes up to seconds: meanwhile health checks are answered, even with one worker
/// thread.
#[test]
fn loading_leaves_the_worker_thread_to_others() {
    Sandbox::test(|sandbox| {
        let (server, state_dir) = (ApiServer::start(), tempfile::tempdir().unwrap());
        let healthz = SocketAddr::from(([127, 0, 0, 1], 10256));
        let http = serve::Options { healthz: Some(healthz), ..serve::Options::default() };
        with_options(&server, options(sandbox, state_dir.path(), http), || {
            let answers = || get(healthz, "/healthz");
            eventually("it listens", || answers().is_some());
            let (is_ready, body) = answers().unwrap();
            assert!(!is_ready && body.contains("the programs are being loaded"), "{body}");
            eventually("it is ready", || answers().is_some_and(|(is_ready, _)| is_ready));
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
        let (endpoints, _servers) = two_servers();
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
            eventually("the snapshot is served", || call(service, Tcp) == Ok(endpoints[0]));
        });
        objects.set_endpoints(&PortOf::tcp("web"), &endpoints[1..]);
        server.set(&objects);
        server.resume().unwrap();
        with_agent(sandbox, &server, state_dir.path(), None, || {
            eventually("the server's objects are served", || call(service, Tcp) == Ok(endpoints[1]));
        });
        let saved = Snapshot::read(state_dir.path()).unwrap();
        assert_eq!(saved.slices.iter().map(|slice| slice.ports[0].port).collect::<Vec<_>>(), [8002]);
        assert_eq!(saved.services.len(), 1);
    });
}

/// A change is timed from its event and from its slice's annotation; an initial list is not.
#[test]
fn a_scrape_tells_of_changes_and_calls() {
    Sandbox::test(|sandbox| {
        let (endpoints, _servers) = two_servers();
        let (service, state_dir) = (service_address(0), tempfile::tempdir().unwrap());
        let mut objects = Cluster::new().serving("web", service, Tcp, &endpoints[..1]);
        let server = ApiServer::start();
        server.set(&objects);
        // A free port in the sandbox's network namespace, where nothing else listens.
        let metrics = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let has = |line: &str| get(metrics, "/metrics").unwrap().1.lines().any(|found| found == line);
        with_agent(sandbox, &server, state_dir.path(), Some(metrics), || {
            eventually("the first list is served", || call(service, Tcp) == Ok(endpoints[0]));
            assert!(has("socklb_source_complete 1"));
            assert!(has("socklb_programming_duration_seconds_count 0"));
            objects.set_endpoints(&PortOf::tcp("web"), &endpoints[1..]);
            trigger_now(&mut objects);
            server.set(&objects);
            eventually("the change is served", || call(service, Tcp) == Ok(endpoints[1]));
            eventually("and counted", || has("kubeproxy_network_programming_duration_seconds_count 1"));
            let labels = r#"namespace="default",service="web",port="80",protocol="TCP""#;
            assert!(!has(&format!(r#"socklb_connections_total{{{labels},result="redirected"}} 0"#)));
            assert!(has(&format!(r#"socklb_connections_total{{{labels},result="refused"}} 0"#)));
            eventually("an audit has found nothing", || {
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
        let objects = Cluster::new().serving("a", service, Tcp, &[]).serving("b", service, Tcp, &[]);
        let server = ApiServer::start();
        server.set(&objects);
        let of = |reason: &str| -> Vec<Value> {
            server.events().into_iter().filter(|event| event["reason"] == reason).collect()
        };
        with_agent(sandbox, &server, state_dir.path(), None, || {
            eventually("the conflict is reported", || of("AddressConflict").len() == 1);
            eventually("the first sync is reported", || of("Synced").len() == 1);
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
            eventually("it is reported again", || of("AddressConflict")[0]["series"]["count"] == 2);
        });
        assert_eq!((of("AddressConflict").len(), of("Starting").len()), (1, 1), "{:#?}", server.events());
    });
}

/// The programs eject and restore an endpoint; the agent writes that as Events on its Service.
#[test]
fn events_tell_of_ejections() {
    Sandbox::test(|sandbox| {
        let (service, state_dir) = (service_address(0), tempfile::tempdir().unwrap());
        // Nothing listens there yet.
        let endpoint: SocketAddr = "127.0.0.3:8003".parse().unwrap();
        let objects = Cluster::new().serving("web", service, Tcp, &[endpoint]);
        let server = ApiServer::start();
        server.set(&objects.annotated("socklb.io/health", "base=1h"));
        let of = |reason: &str| -> Vec<Value> {
            server.events().into_iter().filter(|event| event["reason"] == reason).collect()
        };
        with_agent(sandbox, &server, state_dir.path(), None, || {
            eventually("the ejection is reported", || {
                call(service, Tcp) == Err(Errno::ECONNREFUSED) && of("EndpointEjected").len() == 1
            });
            let _server = Servers::tcp([endpoint]);
            assert_eq!(call(service, Tcp), Ok(endpoint));
            eventually("the restoration is reported", || of("EndpointRestored").len() == 1);
        });
        let (ejected, restored) = (of("EndpointEjected").remove(0), of("EndpointRestored").remove(0));
        let text = ejected["note"].as_str().unwrap();
        assert!(text.starts_with(&format!("node node: endpoint {endpoint}")), "{text}");
        assert!(text.contains(" is ejected for 3"), "{text}");
        assert!(text.ends_with(": 3 failures in a row, the last one: connection refused"), "{text}");
        let text = restored["note"].as_str().unwrap();
        assert!(text.ends_with(" is restored: a connection was established"), "{text}");
        for (event, kind) in [(ejected, "Warning"), (restored, "Normal")] {
            let regarding = &event["regarding"];
            let found = (&event["type"], &regarding["kind"], &regarding["name"]);
            assert_eq!(found, (&kind.into(), &"Service".into(), &"web".into()), "{event}");
        }
    });
}
