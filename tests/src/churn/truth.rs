//! How long after a change the agent and the commands report it.
//!
//! The agent's socket is polled until it reports the change. A command takes longer than the delay to be
//! measured, so it is started [`WITHIN`] after a change and must then be right.

use std::{
    collections::BTreeMap,
    fmt,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use lb_agent::serve::{
    agent_socket::{FILE_NAME, OBJECTS},
    known::Known,
};
use lb_core::{desired::FrontendAddress, model::Protocol::Tcp};
use serde_json::Value;

use super::{PATIENCE, Server, life::Present};
use crate::{
    Sandbox,
    apiserver::Kind,
    cluster::{self, NAMESPACE, PortOf},
    process,
};

/// The limit within which a change must be reported.
const WITHIN: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_secs(2);
/// Interval of queries to the agent about one change.
const LOOK: Duration = Duration::from_millis(1);
/// One change in this number is for commands, which cost more than the agent's answer.
const COMMANDS: u64 = 4;
/// How long the agent and its server must have been undisturbed for a delay to count as calm.
const QUIET: Duration = Duration::from_secs(5);
/// The service whose endpoint changes.
const MOVING: (&str, Ipv4Addr) = ("probe", Ipv4Addr::new(10, 97, 0, 1));
/// The service that is created and deleted.
const NEW: (&str, Ipv4Addr) = ("probe-new", Ipv4Addr::new(10, 97, 0, 2));
/// The service whose slice is sometimes wrong.
const WRONG: &str = "probe-wrong";

/// Durations of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delays(Vec<Duration>);

impl Delays {
    /// The smallest value that this percentage of the durations does not exceed.
    fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let place = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        sorted.get(place).copied().unwrap_or_default()
    }

    fn beyond(&self, limit: Duration) -> usize {
        self.0.iter().filter(|delay| **delay > limit).count()
    }
}

impl fmt::Display for Delays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [half, most, all] = [50, 99, 100].map(|percent| self.percentile(percent).as_secs_f64() * 1000.0);
        write!(f, "p50 {half:.1} ms, p99 {most:.1} ms, max {all:.1} ms")
    }
}

/// Results of one kind of query.
#[derive(Clone, Debug, Default)]
struct Answers {
    /// Delay between a change and the right answer of an undisturbed agent.
    calm: Delays,
    /// How many of those were late by no more than the time in which the agent or its server waited for a
    /// CPU.
    n_starved: usize,
    /// The same soon after a kill of the agent or a fault of its server.
    disturbed: Delays,
    took: Delays,
}

/// Results of all queries.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    /// The agent at its socket.
    agent: Answers,
    /// Commands. A delay is that of the query with the right answer: [`WITHIN`] is the first.
    commands: [Answers; 3],
}

/// A command and what it must report.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Explain,
    Services,
    Status,
}

impl Ask {
    const ALL: [Self; 3] = [Self::Explain, Self::Services, Self::Status];

    const fn name(self) -> &'static str {
        match self {
            Self::Explain => "explain",
            Self::Services => "services",
            Self::Status => "status",
        }
    }

    /// Changes what the command reports.
    fn change(self, server: &Server, number: u64) {
        let server = server.read();
        let is_odd = number % 2 == 1;
        match self {
            Self::Explain => move_endpoint(&server, number),
            Self::Services if is_odd => server.apply(service(NEW)),
            Self::Services => server.delete(Kind::Service, NAMESPACE, NEW.0),
            Self::Status => {
                for mut slice in slices(WRONG, endpoint(number)) {
                    if is_odd {
                        slice.endpoints[0].addresses = vec!["nowhere".to_owned()];
                    }
                    server.apply(slice);
                }
            }
        }
    }

    /// Whether an answer reports the change.
    fn is_right(self, answer: &Value, number: u64) -> bool {
        let is_odd = number % 2 == 1;
        let rows = |value: &Value| value.as_array().cloned().unwrap_or_default();
        match self {
            Self::Explain => answer["candidates"] == serde_json::json!([endpoint(number).to_string()]),
            Self::Services => {
                let has = answer.as_array().is_some_and(|rows| {
                    rows.iter().any(|row| row["name"] == NEW.0 && row["address"] == NEW.1.to_string())
                });
                has == is_odd && answer.is_array()
            }
            Self::Status => {
                let names = |issue: &Value| {
                    let name = issue["object"]["name"].as_str().unwrap_or_default();
                    name.starts_with(WRONG)
                };
                answer["issues"].is_array() && rows(&answer["issues"]).iter().any(names) == is_odd
            }
        }
    }
}

fn endpoint(number: u64) -> SocketAddr {
    let [.., high, low] = number.to_be_bytes();
    (Ipv4Addr::new(10, 99, high, low), 8080).into()
}

fn service((name, ip): (&str, Ipv4Addr)) -> k8s_openapi::api::core::v1::Service {
    cluster::service(name, &[ip.into()], &[cluster::port("", Tcp, 80)])
}

fn slices(name: &str, endpoint: SocketAddr) -> Vec<k8s_openapi::api::discovery::v1::EndpointSlice> {
    cluster::slices(&PortOf::tcp(name), &[endpoint])
}

fn move_endpoint(server: &crate::apiserver::ApiServer, number: u64) {
    for slice in slices(MOVING.0, endpoint(number)) {
        server.apply(slice);
    }
}

/// Makes changes until told to stop, and polls after each until the answer is right.
pub(super) fn ask(
    present: &Present,
    server: &Server,
    sandbox: &Sandbox,
    socklb: &Path,
    stop: &AtomicBool,
) -> anyhow::Result<Truth> {
    let mut truth = Truth::default();
    server.read().apply(service(MOVING));
    for number in 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        thread::sleep(PAUSE);
        let change = Change::now(present);
        move_endpoint(&server.read(), number);
        while told(&present.state_dir).ok().as_deref() != Some(&[endpoint(number)]) {
            ensure!(change.at.elapsed() < PATIENCE, "the agent never reports {}", endpoint(number));
            thread::sleep(LOOK);
        }
        truth.agent.count(&change, Instant::now(), change.starved(), WITHIN);
        if number % COMMANDS != 0 {
            continue;
        }
        for (ask, answers) in Ask::ALL.into_iter().zip(&mut truth.commands) {
            // Another one than last time, with odd and even numbers in turn.
            let number = number / COMMANDS;
            let change = Change::now(present);
            ask.change(server, number);
            thread::sleep(WITHIN.saturating_sub(change.at.elapsed()));
            loop {
                let (asked, starved) = (Instant::now(), change.starved());
                let answer = run(ask, present, sandbox, socklb);
                if answer.as_ref().is_ok_and(|answer| ask.is_right(answer, number)) {
                    answers.took.0.push(asked.elapsed());
                    answers.count(&change, asked, starved, ASKED);
                    break;
                }
                let name = ask.name();
                ensure!(change.at.elapsed() < PATIENCE, "{name} never reports change {number}: {answer:?}");
            }
        }
    }
    Ok(truth)
}

/// The time of a change, and what is needed to know whether the agent could have reported it in time.
struct Change<'a> {
    present: &'a Present,
    was_calm: bool,
    /// CPU wait times of threads: the agent's, and those of this process, which includes the server.
    waits: [BTreeMap<u32, Duration>; 2],
    at: Instant,
}

impl<'a> Change<'a> {
    fn now(present: &'a Present) -> Self {
        let was_calm = present.disturbed().elapsed() > QUIET && has_synced(&present.state_dir);
        let waits = [present.pid(), std::process::id()].map(process::waits);
        Self { present, was_calm, waits, at: Instant::now() }
    }

    /// Whether nothing was disturbed for long enough.
    fn is_calm(&self) -> bool {
        self.was_calm && self.present.disturbed() < self.at
    }

    /// How long one thread of each process has waited for a CPU since.
    fn starved(&self) -> Duration {
        let now = [self.present.pid(), std::process::id()].map(process::waits);
        let longest = |(before, now): (&BTreeMap<u32, Duration>, &BTreeMap<u32, Duration>)| {
            let waited = now
                .iter()
                .map(|(thread, wait)| wait.saturating_sub(before.get(thread).copied().unwrap_or_default()));
            waited.max().unwrap_or_default()
        };
        self.waits.iter().zip(&now).map(longest).sum()
    }
}

impl Answers {
    /// Counts a query of `asked` with the right answer. After `limit` it was late; `starved` may be the
    /// cause.
    fn count(&mut self, change: &Change<'_>, asked: Instant, starved: Duration, limit: Duration) {
        let delay = asked - change.at;
        if !change.is_calm() {
            self.disturbed.0.push(delay);
            return;
        }
        self.calm.0.push(delay);
        if delay > limit {
            eprintln!(
                "late: {delay:?} after a change; threads of the agent and its server waited {starved:?} for a CPU"
            );
            self.n_starved += usize::from(delay <= limit + starved);
        }
    }

    /// Late without that cause.
    fn n_late(&self, limit: Duration) -> usize {
        self.calm.beyond(limit).saturating_sub(self.n_starved)
    }
}

/// Runs a command and parses its output. A nonzero exit status may be its result.
fn run(ask: Ask, present: &Present, sandbox: &Sandbox, socklb: &Path) -> anyhow::Result<Value> {
    let mut command = Command::new(socklb);
    command.arg(ask.name());
    match ask {
        Ask::Explain => drop(command.arg(frontend().to_string())),
        Ask::Services => {}
        Ask::Status => drop(command.arg("--cgroup").arg(sandbox.cgroup().path())),
    }
    command.args(["--output", "json", "--pin-path"]).arg(sandbox.pin_path());
    command.arg("--state-dir").arg(&present.state_dir).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("{}: cannot be started", socklb.display()))?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).trim_end().to_owned())
}

fn frontend() -> FrontendAddress {
    FrontendAddress { ip: MOVING.1.into(), port: 80, protocol: Tcp }
}

fn has_synced(state_dir: &Path) -> bool {
    known(state_dir, "for=issues").is_ok_and(|known| known.has_synced)
}

/// The endpoints in the kernel of the service that moves, as the agent reports them.
fn told(state_dir: &Path) -> anyhow::Result<Vec<SocketAddr>> {
    let known = known(state_dir, &format!("at={}", frontend()))?;
    ensure!(known.has_synced, "not synced");
    Ok(known
        .tables
        .into_iter()
        .find(|(address, _)| *address == frontend())
        .map(|(_, found)| found)
        .unwrap_or_default())
}

fn known(state_dir: &Path, query: &str) -> anyhow::Result<Known> {
    let mut stream = UnixStream::connect(state_dir.join(FILE_NAME))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {OBJECTS}?{query} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_head, body) = answer.split_once("\r\n\r\n").context("a truncated answer")?;
    Ok(serde_json::from_str(body)?)
}

impl fmt::Display for Truth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = WITHIN.as_millis();
        let Answers { calm, disturbed, n_starved, .. } = &self.agent;
        let (n, beyond) = (calm.0.len(), calm.beyond(WITHIN));
        writeln!(
            f,
            "the agent's answer reports a change after {calm}; {beyond} of {n} beyond {limit} ms, {n_starved} of them \
             because it waited for a CPU"
        )?;
        let n = disturbed.0.len();
        writeln!(f, "  within {} s of a kill or fault: {disturbed} ({n} changes)", QUIET.as_secs())?;
        for (ask, answers) in Ask::ALL.into_iter().zip(&self.commands) {
            let Answers { calm, disturbed, took, n_starved } = answers;
            let (name, n, late) = (ask.name(), calm.0.len(), calm.beyond(ASKED));
            let latest = calm.percentile(100).as_millis();
            writeln!(
                f,
                "`{name}` {limit} ms after a change: {late} of {n} were not right at once, {n_starved} of them because \
                 the agent waited for a CPU (the query of the last right answer was {latest} ms after the change); it takes \
                 {took}"
            )?;
            let (n, late, latest) =
                (disturbed.0.len(), disturbed.beyond(ASKED), disturbed.percentile(100).as_millis());
            writeln!(
                f,
                "  within {} s of a kill or fault: {late} of {n} (at most {latest} ms)",
                QUIET.as_secs()
            )?;
        }
        Ok(())
    }
}

/// A command asked later than this was asked again.
const ASKED: Duration = Duration::from_millis(60);

impl Truth {
    /// What was not reported in time.
    pub(super) fn flaws(&self) -> Vec<String> {
        let mut flaws = Vec::new();
        let limit = WITHIN.as_millis();
        let beyond = self.agent.n_late(WITHIN);
        if beyond > 0 {
            flaws.push(format!("{beyond} answers of the agent did not report a change after {limit} ms"));
        }
        for (ask, answers) in Ask::ALL.into_iter().zip(&self.commands) {
            let late = answers.n_late(ASKED);
            if late > 0 {
                flaws.push(format!(
                    "{late} answers of `{}` were not right {limit} ms after a change",
                    ask.name()
                ));
            }
        }
        flaws
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let delays = Delays((1..=200).map(Duration::from_millis).collect());
        for (percent, expected) in [(0, 1), (50, 100), (99, 198), (100, 200)] {
            assert_eq!(delays.percentile(percent), Duration::from_millis(expected));
        }
        assert_eq!(delays.beyond(Duration::from_millis(199)), 1);
        assert_eq!(Delays::default().percentile(99), Duration::ZERO);
    }
}
