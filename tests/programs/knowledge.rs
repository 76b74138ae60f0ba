//! What commands read from a running agent through its socket.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use lb_core::{desired::FrontendAddress, model::Protocol};
use lb_kernel::Maps;
use lb_tests::{
    cluster::{Cluster, PortOf, port, service},
    command::SetOnDrop,
    installed::{Place, QUIET, eventually},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    socklb::{is_up, with_town},
    town,
};

/// An address with many ports, one after the other.
const MOVING: &str = "10.96.7.7:80/tcp";

/// A cluster whose n-th state has the moving address with the n-th port and the n-th endpoint, and a hundred
/// other services whose endpoints all change. No object under test is removed: the agent believes a removal
/// only later.
fn state(n: u8) -> Cluster {
    let mut cluster = Cluster::new();
    let address = |ip: [u8; 4], port| SocketAddr::new(IpAddr::from(ip), port);
    let name = format!("p{n}");
    let ip = IpAddr::from([10, 96, 7, 7]);
    cluster.set(service("moving", &[ip], &[port(&name, Protocol::Tcp, 80)]));
    let moving = PortOf { service: "moving", name: &name, protocol: Protocol::Tcp };
    cluster.set_endpoints(&moving, &[address([10, 244, 9, n], 8080)]);
    for other in 0..100 {
        let endpoint = address([10, 244, n % 2, other], 8080);
        cluster.serve(&format!("other-{other}"), address([10, 96, 8, other], 80), Protocol::Tcp, &[endpoint]);
    }
    cluster
}

/// Which of these states the kernel's maps hold.
fn held(place: &Place) -> Option<u8> {
    let image = Maps::open(Path::new(&place.pin_path)).ok()?.image().ok()?;
    let moving: FrontendAddress = MOVING.parse().unwrap();
    match image.entries_at(moving).first()?.address().ip() {
        IpAddr::V4(ip) => Some(ip.octets()[3]),
        IpAddr::V6(_) => None,
    }
}

/// Runs a command whose only output is JSON.
fn ask(place: &Place, command: &[&str]) -> Value {
    let output = place.run(command);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && message.is_empty(), "{command:?}: {}: {message}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The number in a name or address.
fn number(text: &Value, before: &str) -> u8 {
    let text = text.as_str().unwrap();
    text.strip_prefix(before).unwrap_or_else(|| panic!("{text:?} instead of {before}N")).parse().unwrap()
}

/// The answer of a command is of the state in the maps at its start or of a later one: never of a service
/// without object, nor of the previous port.
#[test]
fn answers_are_never_older_than_the_maps() {
    with_town(|place, _town| {
        place.write(&state(0));
        let agent = place.start(&QUIET);
        eventually("the first state is in the maps", || held(place) == Some(0));
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let changes = scope.spawn(|| {
                // Runs even when this test fails: it waits for this thread.
                for n in (1..=255).cycle() {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    place.write(&state(n));
                    thread::sleep(Duration::from_millis(200));
                }
            });
            let over = SetOnDrop(&is_over);
            let is_older = |before: u8, n: u8| n.wrapping_sub(before) > 127;
            for _ in 0..20 {
                let before = held(place).unwrap();
                let services = ask(place, &["services", "-o", "json"]);
                let rows = services.as_array().unwrap();
                assert!(rows.iter().all(|row| row["name"] != ""), "{services}");
                let row = rows.iter().find(|row| row["address"] == "10.96.7.7").unwrap();
                let (name, endpoint) =
                    (number(&row["port_name"], "p"), number(&row["endpoints"][0]["address"], "10.244.9."));
                assert!(!is_older(before, name) && !is_older(before, endpoint), "{before}: {row}");

                let before = held(place).unwrap();
                let explained = ask(place, &["explain", MOVING, "-o", "json"]);
                let name = number(&explained["frontend"]["port_name"], "p");
                let endpoint = explained["candidates"][0].as_str().unwrap().trim_end_matches(":8080").into();
                let endpoint = number(&endpoint, "10.244.9.");
                assert!(!is_older(before, name) && !is_older(before, endpoint), "{before}: {explained}");
            }
            drop(over);
            changes.join().unwrap();
        });
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

/// The lines of a long-running command, as they arrive.
pub(crate) struct Lines {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Lines {
    pub(crate) fn start(place: &Place, command: &[&str]) -> Self {
        let mut child =
            Command::new(&place.binary).args(place.args(command)).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let stdout = child.stdout.take().unwrap();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { child, lines }
    }

    pub(crate) fn next(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(30)).unwrap()
    }

    /// Whether no line arrives for a while.
    fn is_silent(&self) -> bool {
        self.lines.recv_timeout(Duration::from_millis(500)).is_err()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ended_already = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ended_already = self.child.wait();
    }
}

#[test]
fn explain_goes_on_with_every_change() {
    with_town(|place, _town| {
        place.write(&state(0));
        let agent = place.start(&QUIET);
        eventually("the first state is in the maps", || held(place) == Some(0));
        let lines = Lines::start(place, &["explain", MOVING, "--watch"]);
        let json = Lines::start(place, &["explain", MOVING, "--watch", "-o", "json"]);
        let first = lines.next();
        assert!(first.contains(&format!(" {MOVING} -> redirected: ")), "{first}");
        assert!(
            first.contains("of default/moving:p0") && first.contains("candidate 10.244.9.0:8080"),
            "{first}"
        );
        let first: Value = serde_json::from_str(&json.next()).unwrap();
        assert!(first["time"].is_string() && first["verdict"] == "redirected", "{first}");

        // Changes of other services are not reported.
        let (mut others, mut moving) = (state(1), state(0));
        others.services.retain(|(_, name), _| name.starts_with("other"));
        others.slices.retain(|(_, name), _| name.starts_with("other"));
        moving.services.retain(|(_, name), _| name.starts_with("moving"));
        moving.slices.retain(|(_, name), _| name.starts_with("moving"));
        place.write(&others.with(moving.services.into_values()).with(moving.slices.into_values()));
        assert!(lines.is_silent());

        for n in [1, 2] {
            place.write(&state(n));
            let line = lines.next();
            assert!(line.contains(&format!("of default/moving:p{n}")), "{line}");
            assert!(line.contains(&format!("candidate 10.244.9.{n}:8080")), "{line}");
            let answer: Value = serde_json::from_str(&json.next()).unwrap();
            assert_eq!(answer["frontend"]["port_name"], format!("p{n}"));
        }

        // Killed and restarted with another state: the missed change is reported.
        assert_eq!(agent.end(Signal::SIGKILL), None);
        place.write(&state(3));
        let agent = place.start(&QUIET);
        let line = lines.next();
        assert!(line.contains("of default/moving:p3"), "{line}");
        assert!(lines.is_silent());
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));

        let output = place.run(&["explain", MOVING, "--watch"]);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("--watch needs a running agent: no agent answers at"), "{message}");
    });
}

#[test]
fn the_socket_is_roots_and_outlives_no_agent() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        let socket = place.state_dir().join("agent.sock");
        let start = || {
            let agent = place.start(&QUIET);
            eventually("the service answers", || is_up(town::web()[0]));
            eventually("commands are answered", || {
                let output = place.run(&["services"]);
                output.status.success() && output.stderr.is_empty()
            });
            agent
        };
        let agent = start();
        assert_eq!(std::fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
        // The next agent replaces what a killed agent leaves.
        assert_eq!(agent.end(Signal::SIGKILL), None);
        assert!(socket.exists());
        let agent = start();
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        assert!(!socket.exists());

        // Without an agent, names come from the snapshot, and the command reports that.
        let output = place.run(&["services", "-o", "json"]);
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{message}");
        assert!(
            message.contains("no agent answers") && message.contains("names are from the snapshot"),
            "{message}"
        );
        assert!(String::from_utf8_lossy(&output.stdout).contains("web-v4"));
    });
}
