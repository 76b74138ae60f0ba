//! What an operator sees of an outage of the API server. The agent is the installed program.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use lb_tests::{
    apiserver::ApiServer,
    installed::{Place, Running},
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::follower::{PATIENCE, cluster};

/// A running agent, and where it answers.
struct Agent {
    running: Running,
    healthz: SocketAddr,
    metrics: SocketAddr,
}

impl Agent {
    fn start(place: &Place, kubeconfig: &str) -> Self {
        // Free ports in the sandbox's network namespace, where nothing else listens.
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (healthz, metrics) = (free(), free());
        let [at_healthz, at_metrics] = [("healthz", healthz), ("metrics", metrics)]
            .map(|(name, address)| format!("--{name}-bind-address={address}"));
        let source = ["--source=kube", "--kubeconfig", kubeconfig, "--self-test-interval=1s"];
        let running = place.start(&[&source[..], &[&at_healthz, &at_metrics]].concat());
        Self { running, healthz, metrics }
    }

    fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition(self) {
            let (health, log) = (get(self.healthz, "/healthz"), self.running.log());
            assert!(Instant::now() < end, "never happened: {what}; {health:?}\n{log:#?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether `/healthz` reports that the node is ready, and its report on the source.
    fn health(&self) -> Option<(bool, Value)> {
        let (is_ok, body) = get(self.healthz, "/healthz")?;
        let mut body: Value = serde_json::from_str(&body).ok()?;
        Some((is_ok, body["source"].take()))
    }

    /// Whether it is ready during the outage, and reports the outage.
    fn shows_outage(&self, problem: &str, serves: &str) -> bool {
        self.health().is_some_and(|(is_ok, source)| {
            is_ok && source["problem"] == problem && source["serves"] == serves && source["since"].is_string()
        })
    }

    fn is_well(&self) -> bool {
        self.health() == Some((true, Value::Null))
    }

    /// A value of `/metrics`.
    fn metric(&self, name: &str) -> Option<f64> {
        let (_ok, text) = get(self.metrics, "/metrics")?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }
}

/// A response: whether its status is 200, and its body. `None` without a response.
pub(crate) fn get(address: SocketAddr, path: &str) -> Option<(bool, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").as_bytes())
        .ok()?;
    let mut text = String::new();
    let _octets = stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.starts_with("HTTP/1.1 200"), body.to_owned()))
}

/// Each outage is logged when it begins and when it ends, even the second within a minute, and is reported
/// while it lasts. The node stays ready: what is served is right as far as is known. An agent started during
/// an outage does the same.
#[test]
fn an_outage_shows_and_the_node_stays_ready() {
    Place::test(&[], |_sandbox, place| {
        let directory = tempfile::tempdir().unwrap();
        let mut server = ApiServer::start();
        server.set(&cluster(3));
        let kubeconfig = directory.path().join("kubeconfig");
        fs::write(&kubeconfig, server.kubeconfig()).unwrap();
        let start = || Agent::start(place, kubeconfig.to_str().unwrap());
        let problem = format!("API server {}: connection refused", server.url());
        let began = "serving the last known objects until it answers";
        let ended = format!("API server {} answers again, after ", server.url());

        let agent = start();
        agent.until("the node is ready", Agent::is_well);
        assert_eq!(agent.metric(r#"socklb_source_failures_total{reason="connection"}"#), Some(0.0));
        for n_outages in 1..=2 {
            server.stop();
            agent.until("the outage is reported", |agent| agent.shows_outage(&problem, "last-known"));
            let of_nodes = r#"socklb_source_answer_age_seconds{kind="nodes"}"#;
            agent
                .until("the answer's age grows", |agent| agent.metric(of_nodes).is_some_and(|age| age > 0.5));
            assert_eq!(
                (agent.running.n_said(began), agent.running.n_said(&ended)),
                (n_outages, n_outages - 1)
            );
            server.resume().unwrap();
            agent.until("the end is reported", Agent::is_well);
            agent.until("the end is logged", |agent| agent.running.n_said(&ended) == n_outages);
            assert_eq!(agent.running.n_said(began), n_outages);
        }
        let n_failures = agent.metric(r#"socklb_source_failures_total{reason="connection"}"#);
        assert!(n_failures.is_some_and(|n| n >= 2.0), "{n_failures:?}");

        server.stop();
        assert_eq!(agent.running.end(Signal::SIGTERM), Some(0));
        let agent = start();
        agent.until("it serves the found entries", |agent| agent.shows_outage(&problem, "found"));
        assert_eq!(agent.metric("socklb_source_complete"), Some(0.0));
        let found =
            format!("no complete lists yet: {problem}; the entries found in the kernel stay unchanged");
        agent.until("that is logged", |agent| agent.running.n_said(&found) == 1);
        server.resume().unwrap();
        agent.until("it follows the server", |agent| {
            agent.is_well() && agent.metric("socklb_source_complete") == Some(1.0)
        });
        assert_eq!(agent.running.end(Signal::SIGTERM), Some(0));
    });
}
