//! What an operator sees of an outage of the API server. The agent is the installed program.

use std::{
    env,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use lb_tests::{Feature, Sandbox, apiserver::ApiServer};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::follower::{PATIENCE, cluster};

/// An agent that is killed on drop.
struct Agent {
    child: Child,
    healthz: SocketAddr,
    metrics: SocketAddr,
    log: PathBuf,
}

impl Agent {
    fn start(sandbox: &Sandbox, directory: &Path, name: &str) -> Self {
        // Free ports in the sandbox's network namespace, where nothing else listens.
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (healthz, metrics, log) = (free(), free(), directory.join(name));
        let child = Command::new(env::var_os("SOCKLB_BIN").unwrap())
            .args(["run", "--source=kube", "--node-name=node", "--self-test-interval=1s", "--kubeconfig"])
            .arg(directory.join("kubeconfig"))
            .arg(format!("--healthz-bind-address={healthz}"))
            .arg(format!("--metrics-bind-address={metrics}"))
            .args(["--max-services=4096", "--max-endpoints=16384", "--cgroup"])
            .arg(sandbox.cgroup().path())
            .arg("--pin-path")
            .arg(sandbox.pin_path())
            .arg("--state-dir")
            .arg(directory.join("state"))
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child, healthz, metrics, log }
    }

    fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition(self) {
            let (health, log) = (get(self.healthz, "/healthz"), fs::read_to_string(&self.log).unwrap());
            assert!(Instant::now() < end, "never happened: {what}; {health:?}\n{log}");
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

    /// How many lines of the log contain this.
    fn n_lines(&self, what: &str) -> usize {
        fs::read_to_string(&self.log).unwrap().lines().filter(|line| line.contains(what)).count()
    }

    fn end(mut self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}

/// A response: whether its status is 200, and its body. `None` without a response.
fn get(address: SocketAddr, path: &str) -> Option<(bool, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
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
    Sandbox::test_with(&[Feature::Variable("SOCKLB_BIN")], |sandbox| {
        let directory = tempfile::tempdir().unwrap();
        let mut server = ApiServer::start();
        server.set(&cluster(3));
        fs::write(directory.path().join("kubeconfig"), server.kubeconfig()).unwrap();
        let problem = format!("API server {}: connection refused", server.url());
        let began = "serving the last known objects until it answers";
        let ended = format!("API server {} answers again, after ", server.url());

        let agent = Agent::start(sandbox, directory.path(), "first");
        agent.until("the node is ready", Agent::is_well);
        assert_eq!(agent.metric(r#"socklb_source_failures_total{reason="connection"}"#), Some(0.0));
        for n_outages in 1..=2 {
            server.stop();
            agent.until("the outage is reported", |agent| agent.shows_outage(&problem, "last-known"));
            let of_nodes = r#"socklb_source_answer_age_seconds{kind="nodes"}"#;
            agent
                .until("the answer's age grows", |agent| agent.metric(of_nodes).is_some_and(|age| age > 0.5));
            assert_eq!((agent.n_lines(began), agent.n_lines(&ended)), (n_outages, n_outages - 1));
            server.resume().unwrap();
            agent.until("the end is reported", Agent::is_well);
            agent.until("the end is logged", |agent| agent.n_lines(&ended) == n_outages);
            assert_eq!(agent.n_lines(began), n_outages);
        }
        let n_failures = agent.metric(r#"socklb_source_failures_total{reason="connection"}"#);
        assert!(n_failures.is_some_and(|n| n >= 2.0), "{n_failures:?}");

        server.stop();
        agent.end();
        let agent = Agent::start(sandbox, directory.path(), "second");
        agent.until("it serves the found entries", |agent| agent.shows_outage(&problem, "found"));
        assert_eq!(agent.metric("socklb_source_complete"), Some(0.0));
        let found =
            format!("no complete lists yet: {problem}; the entries found in the kernel stay unchanged");
        agent.until("that is logged", |agent| agent.n_lines(&found) == 1);
        server.resume().unwrap();
        agent.until("it follows the server", |agent| {
            agent.is_well() && agent.metric("socklb_source_complete") == Some(1.0)
        });
        agent.end();
    });
}
