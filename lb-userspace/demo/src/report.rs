//! The demo's report as text and as JSON. Pure: values in, text out.
//!
//! # Invariants
//!
//! - Every statement of the demo is a [`Check`] of the recorded calls.
//! - No line exceeds 100 columns, except command lines to copy.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use lb_core::model::Protocol;
use nix::errno::Errno;
use serde::Serialize;

use super::{
    client::{Call, How, Outcome},
    manifests::{NODE, PODS, Pod, Target},
};

/// A refused call counts as "at once" if it fails within this time.
const AT_ONCE_MS: f64 = 500.0;

/// Seconds after a pod's death from which on passive health prevents every failure. A call that waits fails
/// after two seconds, so that the clients learn of it in 2 of the 2.2 s that eject, and again after 3 s.
const SETTLED: usize = 4;

/// All results.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// What was set up.
    pub setup: Setup,
    /// A call before the agent starts.
    pub before: Vec<Unserved>,
    /// Calls while all pods live.
    pub calls: Vec<Tally>,
    /// Duration of `connect()`.
    pub connect_times: Vec<ConnectTime>,
    /// Calls to a service without endpoints.
    pub refused: Vec<Refused>,
    /// A pod's death, with passive health.
    pub failover: Failover,
    /// The same death, without.
    pub failover_blind: Failover,
    /// Calls after it.
    pub calls_after: Vec<Tally>,
    /// Datagrams on connected sockets, after it.
    pub connected_udp: Vec<Tally>,
    /// Each statement and its result.
    pub checks: Vec<Check>,
    /// Whether all hold.
    pub ok: bool,
}

/// A statement about the results.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// The statement.
    pub claim: String,
    /// Whether it is true.
    pub holds: bool,
}

fn check(holds: bool, claim: impl Into<String>) -> Check {
    Check { claim: claim.into(), holds }
}

impl Report {
    /// Computes the checks.
    pub(super) fn compute_checks(&mut self) {
        let all: Vec<&str> = PODS.iter().map(|pod| pod.name).collect();
        let rest: Vec<&str> = all.iter().copied().filter(|name| *name != self.failover.pod).collect();
        let mut checks = Vec::new();
        checks.extend(self.before.iter().map(Unserved::check));
        checks.extend(self.calls.iter().flat_map(|tally| tally.checks(&all)));
        checks.extend(self.refused.iter().map(Refused::check));
        checks.extend(self.failover.checks(&rest));
        checks.extend(self.failover_blind.checks(&rest));
        let [failed, failed_blind] = [&self.failover, &self.failover_blind].map(Failover::n_failed_late);
        let late = |failover: &Failover| {
            format!("{}: later than {SETTLED} s after {} died,", failover.address, failover.pod)
        };
        checks.push(check(failed == 0, format!("{} no call failed", late(&self.failover))));
        let blind = format!("{} calls failed without passive health", late(&self.failover_blind));
        checks.push(check(failed_blind > 0, blind));
        checks.extend(self.calls_after.iter().flat_map(|tally| tally.checks(&rest)));
        checks.extend(self.connected_udp.iter().flat_map(|tally| tally.connection_checks(&rest)));
        self.ok = checks.iter().all(|check| check.holds);
        self.checks = checks;
    }

    /// The closing lines: how many statements hold, and which fail.
    pub(super) fn verdict(&self) -> String {
        let n = self.checks.len();
        if self.ok {
            return format!("All {n} checks hold.\n");
        }
        let failed: Vec<_> = self.checks.iter().filter(|check| !check.holds).collect();
        let mut text = format!("{} of {n} checks FAILED:\n", failed.len());
        for check in failed {
            let _infallible = writeln!(text, "  not true: {}", check.claim);
        }
        text
    }
}

/// What was set up.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Setup {
    /// The demo's cgroup.
    pub cgroup: PathBuf,
    /// The manifests that the agent serves.
    pub manifests: PathBuf,
    /// Where maps and links are pinned, inside the demo's mount namespace.
    pub pin_path: PathBuf,
    /// The agent's snapshot directory, likewise.
    pub state_dir: PathBuf,
    /// The agent's process id.
    pub agent_pid: i32,
    /// The agent's command line.
    pub agent: Vec<String>,
    /// Time from its start until the kernel held every frontend.
    pub ready_ms: f64,
    /// Number of frontends.
    pub frontends: usize,
}

/// The first lines: node, pods and cgroup.
pub(super) fn scene(cgroup: &std::path::Path) -> String {
    let mut text = "\
socklb-demo: a node, three pods and clients, in namespaces of their own on this machine, with no
route to any other network.

SET UP
"
    .to_owned();
    let both = |addresses: [IpAddr; 2]| format!("{:<13} {}", addresses[0], addresses[1]);
    let _infallible = writeln!(text, "  node      {}", both(NODE));
    for pod in PODS {
        let _infallible = writeln!(
            text,
            "  {}     {:<36} HTTP on TCP 8080, echo on UDP 5353",
            pod.name,
            both(Pod::addresses(pod))
        );
    }
    let _infallible = writeln!(text, "  cgroup    {}", cgroup.display());
    text
}

impl Setup {
    /// The agent's line.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        let mut line = "  $".to_owned();
        for word in &self.agent {
            if line.len() + word.len() > 95 {
                let _infallible = writeln!(text, "{line} \\");
                "     ".clone_into(&mut line);
            }
            let _infallible = write!(line, " {word}");
        }
        let _infallible = writeln!(
            text,
            "{line}\n  {} frontends in the kernel's maps {:.0} ms after its start (pid {})",
            self.frontends, self.ready_ms, self.agent_pid
        );
        text
    }
}

/// A call to a service address before anything serves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Unserved {
    /// The address.
    pub address: SocketAddr,
    /// The error; absent if the call succeeded.
    pub error: Option<String>,
    is_unreachable: bool,
}

impl Unserved {
    /// Makes the result of a call.
    pub(super) fn of(address: SocketAddr, call: &Call) -> Self {
        let (error, errno) = match &call.outcome {
            Outcome::Answered { .. } => (None, None),
            Outcome::Failed { error, errno } => (Some(error.clone()), *errno),
        };
        Self { address, error, is_unreachable: errno == Some(Errno::ENETUNREACH as i32) }
    }

    fn check(&self) -> Check {
        check(self.is_unreachable, format!("before socklb, {} is unreachable", self.address))
    }

    /// One line.
    pub(super) fn text(&self) -> String {
        let error = self.error.as_deref().unwrap_or("an answer, which is wrong");
        format!("  without socklb, connect() to {} gives: {error}\n", self.address)
    }
}

/// Calls of one client to one address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Tally {
    pub service: &'static str,
    pub protocol: Protocol,
    /// The called address.
    pub address: SocketAddr,
    /// The client: `curl`, or the system call that names the address.
    pub client: &'static str,
    /// Number of calls.
    pub calls: usize,
    /// Answers by pod.
    pub answers: BTreeMap<String, usize>,
    /// Failed calls, by cause.
    pub failures: BTreeMap<String, usize>,
    /// The peers that the client saw; empty if it did not ask.
    pub peers: BTreeSet<SocketAddr>,
}

impl Tally {
    /// Counts.
    pub(super) fn of<'a>(target: Target, how: How, calls: impl IntoIterator<Item = &'a Call>) -> Self {
        let Target { service, protocol, address } = target;
        let client = match how {
            How::Curl => "curl",
            How::Tcp | How::ConnectedUdp => "connect()",
            How::Udp => "sendto()",
        };
        let mut tally = Self {
            service,
            protocol,
            address,
            client,
            calls: 0,
            answers: BTreeMap::new(),
            failures: BTreeMap::new(),
            peers: BTreeSet::new(),
        };
        for call in calls {
            tally.calls += 1;
            match &call.outcome {
                Outcome::Answered { by, peer } => {
                    *tally.answers.entry(by.clone()).or_default() += 1;
                    tally.peers.extend(peer);
                }
                Outcome::Failed { error, .. } => *tally.failures.entry(error.clone()).or_default() += 1,
            }
        }
        tally
    }

    fn n_failed(&self) -> usize {
        self.failures.values().sum()
    }

    /// `web TCP 10.96.0.80:80 by curl`
    fn name(&self) -> String {
        format!("{} {} {} by {}", self.service, self.protocol, self.address, self.client)
    }

    fn answered_by(&self, pods: &[&str]) -> bool {
        self.answers.keys().map(String::as_str).eq(pods.iter().copied())
    }

    /// Checks that all calls were answered, by all of these pods and only by them, and that the peer is the
    /// service.
    fn checks(&self, pods: &[&str]) -> Vec<Check> {
        let answered = format!("only {} answered", list(pods));
        self.three_checks("every call was answered", self.answered_by(pods), &answered)
    }

    /// Checks that one of these pods answered all datagrams of a socket, and that the peer is the service.
    fn connection_checks(&self, pods: &[&str]) -> Vec<Check> {
        let is_one = self.answers.len() == 1 && pods.iter().any(|pod| self.answers.contains_key(*pod));
        let answered = format!("one of {} answered them all", list(pods));
        self.three_checks("every datagram was answered", is_one, &answered)
    }

    /// The peer is checked only if the client asked for it.
    fn three_checks(&self, all: &str, is_answered: bool, answered: &str) -> Vec<Check> {
        let has_asked = self.client != "curl";
        let claims = [
            (self.failures.is_empty(), all),
            (is_answered, answered),
            (self.peers.iter().eq([&self.address]), "the peer is the service address"),
        ];
        let claims = claims.into_iter().take(if has_asked { 3 } else { 2 });
        claims.map(|(holds, claim)| check(holds, format!("{}: {claim}", self.name()))).collect()
    }

    /// The header of the table with [`Self::row`].
    pub(super) fn head() -> String {
        format!("  {:<9} {:<27} {:<10}{}  PEER SEEN\n", "SERVICE", "ADDRESS", "CLIENT", count_head())
    }

    /// One row.
    pub(super) fn row(&self) -> String {
        let peer = if self.client == "curl" {
            "-"
        } else if self.peers.iter().eq([&self.address]) {
            "service"
        } else {
            "other"
        };
        let address = format!("{} {}", self.protocol, self.address);
        let mut row =
            format!("  {:<9} {address:<27} {:<10}{}  {peer}\n", self.service, self.client, self.counts());
        row.push_str(&self.failed());
        row
    }

    /// The failures, a line for each cause.
    fn failed(&self) -> String {
        let lines = self.failures.iter().map(|(cause, n)| format!("{n:>60} failed: {cause}\n"));
        lines.collect::<Vec<_>>().concat()
    }

    /// The columns of [`count_head`].
    fn counts(&self) -> String {
        let mut counts = format!(" {:>5}", self.calls);
        for pod in PODS {
            let _infallible =
                write!(counts, "  {:>5}", self.answers.get(pod.name).copied().unwrap_or_default());
        }
        let _infallible = write!(counts, "  {:>6}", self.n_failed());
        counts
    }
}

/// Head of the columns with counts.
fn count_head() -> String {
    let mut head = format!(" {:>5}", "CALLS");
    for pod in PODS {
        let _infallible = write!(head, "  {:>5}", pod.name);
    }
    head.push_str("  FAILED");
    head
}

/// `pod-1, pod-2 and pod-3`
fn list(names: &[&str]) -> String {
    match names {
        [] => "no pod".to_owned(),
        [one] => (*one).to_owned(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

/// A curl call and what it printed.
pub(super) fn curl(line: &str, call: &Call) -> String {
    let printed = match &call.outcome {
        Outcome::Answered { by, .. } => by,
        Outcome::Failed { error, .. } => error,
    };
    format!("  $ {line}\n  {printed}\n")
}

/// Explains the column.
pub(super) const PEER_SEEN: &str =
    "  PEER SEEN is what getpeername() and recvfrom() show the client: the service address it called.\n";

/// Duration of `connect()`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct ConnectTime {
    /// The service address.
    pub service: SocketAddr,
    /// The minimum for the service address, in microseconds.
    pub service_us: f64,
    /// The minimum for the pods' own addresses, in microseconds.
    pub direct_us: f64,
    /// Connections to each.
    pub connections: usize,
}

impl ConnectTime {
    /// Compares alternating calls to the service and to pods; `None` without any.
    pub(super) fn of(service: SocketAddr, calls_in_turn: &[Call]) -> Option<Self> {
        Some(Self {
            service,
            service_us: quickest_us(calls_in_turn.iter().step_by(2))?,
            direct_us: quickest_us(calls_in_turn.iter().skip(1).step_by(2))?,
            connections: calls_in_turn.len() / 2,
        })
    }

    /// One line.
    pub(super) fn text(&self) -> String {
        format!(
            "  connect() took {:.0} us to {}, {:.0} us to a pod's own address (quickest of {})\n",
            self.service_us, self.service, self.direct_us, self.connections
        )
    }
}

/// The minimum duration of `connect()`.
///
/// Not the median: if the woken server takes the client's CPU, or an idle CPU must be woken for it,
/// `connect()` returns some 80 us later. On a busy machine that affects about half of the calls, so the
/// median is unstable.
fn quickest_us<'a>(calls: impl Iterator<Item = &'a Call>) -> Option<f64> {
    let answered = calls.filter(|call| matches!(call.outcome, Outcome::Answered { .. }));
    answered.filter_map(|call| call.connect_ns).min().map(thousandths)
}

/// A thousandth of a number, with three decimals: microseconds as milliseconds, nanoseconds as microseconds.
#[expect(clippy::cast_precision_loss, reason = "2^53 us are 285 years")]
pub(super) fn thousandths(number: u64) -> f64 {
    number as f64 / 1000.0
}

/// Calls to a service without endpoints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Refused {
    /// The address.
    pub address: SocketAddr,
    /// Number of calls.
    pub calls: usize,
    /// Errors, by cause.
    pub errors: BTreeMap<String, usize>,
    /// Number of `ECONNREFUSED` errors.
    pub econnrefused: usize,
    /// The longest call, in milliseconds.
    pub longest_ms: f64,
}

impl Refused {
    /// Counts.
    pub(super) fn of(address: SocketAddr, calls: &[Call]) -> Self {
        let mut errors = BTreeMap::new();
        let mut econnrefused = 0;
        for call in calls {
            if let Outcome::Failed { error, errno } = &call.outcome {
                *errors.entry(error.clone()).or_default() += 1;
                econnrefused += usize::from(*errno == Some(Errno::ECONNREFUSED as i32));
            }
        }
        let longest = calls.iter().map(|call| call.took).max().unwrap_or_default();
        Self { address, calls: calls.len(), errors, econnrefused, longest_ms: thousandths(longest) }
    }

    fn check(&self) -> Check {
        let holds = self.econnrefused == self.calls && self.longest_ms < AT_ONCE_MS;
        check(holds, format!("{}, which has no endpoints, is refused at once", self.address))
    }

    /// One line.
    pub(super) fn text(&self) -> String {
        let errors: Vec<_> = self.errors.keys().map(String::as_str).collect();
        let errors = if errors.is_empty() { "an answer, which is wrong" } else { &errors.join(", ") };
        format!(
            "  idle has no endpoints: connect() to {} gives: {errors}, after {:.2} ms\n",
            self.address, self.longest_ms
        )
    }
}

/// Times of events, in microseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moments {
    /// Before the pod was cut off.
    pub killed: u64,
    /// Before the manifest was written.
    pub rewritten: u64,
    /// When the kernel held the new tables.
    pub switched: u64,
}

/// Results of steady calls while a pod dies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Failover {
    /// The pod.
    pub pod: &'static str,
    /// The called address.
    pub address: SocketAddr,
    /// Time from the rewrite of the manifest until the kernel's tables held the change.
    pub switch_ms: f64,
    /// Time from the rewrite until the last call to the dead pod began; absent if none began after it.
    pub last_call_ms: Option<f64>,
    /// Time from the death until the rewrite.
    pub dead_ms: f64,
    /// Calls that ended before the pod died.
    pub before: Tally,
    /// Calls between its death and the switch.
    pub between: Tally,
    /// Calls that began after the switch.
    pub after: Tally,
    /// The calls in between, by the second after the death in which they began.
    pub seconds: Vec<Second>,
}

/// Calls that began within one second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Second {
    /// Number of answered calls.
    pub answered: usize,
    /// Number of failed calls.
    pub failed: usize,
}

impl Failover {
    /// Groups calls by their start.
    pub(super) fn of(pod: &'static str, target: Target, moments: Moments, calls: &[Call]) -> Self {
        let Moments { killed, rewritten, switched } = moments;
        // A call in progress when the pod dies may fail with it.
        let is_before = |call: &&Call| call.began.saturating_add(call.took) < killed;
        let is_after = |call: &&Call| call.began >= switched;
        let tally = |which: &dyn Fn(&&Call) -> bool| Tally::of(target, How::Tcp, calls.iter().filter(which));
        let has_chosen_it = |call: &&Call| match &call.outcome {
            Outcome::Answered { by, .. } => by == pod,
            // Only calls to the dead pod fail.
            Outcome::Failed { .. } => true,
        };
        let last = calls.iter().filter(has_chosen_it).map(|call| call.began).max();
        let is_between = |call: &&Call| !is_before(call) && !is_after(call);
        let second =
            |moment: u64| usize::try_from(moment.saturating_sub(killed) / 1_000_000).unwrap_or_default();
        let mut seconds = vec![Second::default(); second(rewritten).max(1)];
        for call in calls.iter().filter(is_between) {
            let second = second(call.began).min(seconds.len() - 1);
            match call.outcome {
                Outcome::Answered { .. } => seconds[second].answered += 1,
                Outcome::Failed { .. } => seconds[second].failed += 1,
            }
        }
        Self {
            pod,
            address: target.address,
            switch_ms: thousandths(switched.saturating_sub(rewritten)),
            last_call_ms: last.and_then(|last| last.checked_sub(rewritten)).map(thousandths),
            dead_ms: thousandths(rewritten.saturating_sub(killed)),
            before: tally(&is_before),
            between: tally(&is_between),
            after: tally(&is_after),
            seconds,
        }
    }

    /// Calls that failed although they began [`SETTLED`] seconds after the death or later.
    fn n_failed_late(&self) -> usize {
        self.seconds.iter().skip(SETTLED).map(|second| second.failed).sum()
    }

    fn checks(&self, rest: &[&str]) -> Vec<Check> {
        let Self { pod, address, .. } = self;
        vec![
            check(self.before.n_failed() == 0, format!("{address}: no call failed before {pod} died")),
            check(
                self.before.answers.contains_key(*pod),
                format!("{address}: {pod} answered before it died"),
            ),
            check(
                self.after.n_failed() == 0,
                format!("{address}: no call failed after the kernel's maps had changed"),
            ),
            check(
                self.after.answered_by(rest),
                format!("{address}: after the kernel's maps had changed, only {} answered", list(rest)),
            ),
        ]
    }
}

/// What the table of [`failovers`] is about.
pub(super) fn before_failover(pod: Pod, n_clients: usize, pause: Duration) -> String {
    format!(
        "\n{} DIES WITHOUT A WORD: its packets vanish, and its endpoints say ready\n  \
         {n_clients} clients call each of two Services with the same pods every {} ms. A call fails after 2 s.\n",
        pod.name.to_uppercase(),
        pause.as_millis()
    )
}

/// A pod's death with passive health, and beside it without.
pub(super) fn failovers(both: [&Failover; 2]) -> String {
    let [Failover { pod, dead_ms, switch_ms, .. }, _] = both;
    let mut text =
        format!("  {:<22}{:<32}{}\n", "", "passive health (default)", "socklb.io/health: off, as kube-proxy");
    let columns = "ANSWERED  FAILED";
    let _infallible = writeln!(text, "  {:<22}{columns:<32}{columns}", "");
    let mut row = |when: &str, counts: [Second; 2]| {
        let [left, right] = counts.map(|Second { answered, failed }| format!("{answered:>8}  {failed:>6}"));
        let _infallible = writeln!(text, "  {when:<22}{left:<32}{right}");
    };
    let of = |tally: &Tally| Second { answered: tally.calls - tally.n_failed(), failed: tally.n_failed() };
    row("before", both.map(|failover| of(&failover.before)));
    for n in 0..both[0].seconds.len() {
        let counts = both.map(|failover| failover.seconds.get(n).copied().unwrap_or_default());
        row(&format!("second {}", n + 1), counts);
    }
    row("the maps have changed", both.map(|failover| of(&failover.after)));
    let _infallible = writeln!(
        text,
        "  {:.1} s after the death the manifest says ready: false; in a cluster that takes up to 50 s.\n  \
         {switch_ms:.1} ms later the kernel's maps hold the change.",
        dead_ms / 1000.0,
    );
    for failover in both {
        let _infallible = match failover.last_call_ms {
            Some(ms) => writeln!(
                text,
                "  {}: the last call that chose {pod} began {ms:.1} ms after the rewrite.",
                failover.before.service
            ),
            None => writeln!(text, "  {}: no call chose {pod} after the rewrite.", failover.before.service),
        };
    }
    text
}

/// Who answered one call of each address, in one line.
#[derive(Debug)]
pub(super) struct Round<'a>(pub usize, pub &'a [(Target, Call)]);

impl fmt::Display for Round<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {:>5}", self.0)?;
        let mut last = "";
        for (target, call) in self.1 {
            if target.service != last {
                write!(f, "  {}", target.service)?;
                last = target.service;
            }
            let family = if target.address.is_ipv4() { 4 } else { 6 };
            match &call.outcome {
                Outcome::Answered { by, .. } => write!(f, " v{family}:{by}")?,
                Outcome::Failed { error, .. } => write!(f, " v{family}:{}", error.to_lowercase())?,
            }
        }
        Ok(())
    }
}

/// Commands for the running demo.
pub(super) fn inspection_help(setup: &Setup) -> String {
    let (pid, cgroup) = (setup.agent_pid, setup.cgroup.display());
    format!(
        "\
INSPECT IT, while clients call each address every second; Ctrl-C stops the demo
  A shell inside, whose calls are served like the clients':
    nsenter --target {pid} --mount --net \\
      sh -c 'echo 0 >{cgroup}/cgroup.procs; exec sh'
  In it, for example:
    curl http://10.96.0.80/
    bpftool map dump pinned {pins}/services4
    /proc/{pid}/exe services --pin-path {pins} --state-dir {state}
    sed -i s/10.244.2.10/10.244.1.10/ {manifests}/endpointslices.yaml
      (then only pod-1 answers IPv4 calls)
",
        pins = setup.pin_path.display(),
        state = setup.state_dir.display(),
        manifests = setup.manifests.display(),
    )
}

/// Next steps.
pub(super) const NEXT: &str = "\
NEXT
  Your own services, from a file or folder of manifests:  socklb run --source file:PATH
  The services of a cluster, from its API server:         socklb run --source kube --kubeconfig FILE
";

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::manifests::{ECHO, IDLE, WEB, WEB_BLIND, WEB_NODE};

    fn answered(began: u64, by: &str, peer: Option<SocketAddr>) -> Call {
        let outcome = Outcome::Answered { by: by.to_owned(), peer };
        Call { began, connect_ns: Some(40_000 + began), took: 90, outcome }
    }

    fn failed(began: u64, errno: Errno) -> Call {
        let outcome = Outcome::Failed { error: errno.desc().to_owned(), errno: Some(errno as i32) };
        Call { began, connect_ns: Some(1000), took: 30, outcome }
    }

    fn three(target: Target) -> Vec<Call> {
        (0..6u8).map(|n| answered(n.into(), PODS[usize::from(n) % 3].name, Some(target.address))).collect()
    }

    const SECOND: u64 = 1_000_000;

    /// A report as a good run gives it.
    fn report() -> Report {
        let [web, _] = WEB;
        let two = |target: Target| -> Vec<_> {
            (0..6u8)
                .map(|n| answered(n.into(), PODS[usize::from(n) % 2].name, Some(target.address)))
                .collect()
        };
        let moments = Moments { killed: 1000, rewritten: 6 * SECOND + 1000, switched: 6 * SECOND + 14_300 };
        let lost = |began| Call { took: 2 * SECOND, ..failed(began, Errno::ETIMEDOUT) };
        let steady = |address, later: &[Call]| {
            let first = [
                answered(10, "pod-3", Some(address)),
                answered(20, "pod-1", Some(address)),
                // In progress when the pod dies.
                lost(990),
                answered(1500, "pod-2", Some(address)),
                lost(2000),
                lost(2 * SECOND + 1000),
            ];
            let after = ["pod-2", "pod-1"].map(|pod| answered(7 * SECOND, pod, Some(address)));
            [&first[..], later, &after].concat()
        };
        let later = [5, 6].map(|n| answered(n * SECOND - 1000, "pod-1", Some(web.address)));
        let failover = Failover::of("pod-3", web, moments, &steady(web.address, &later));
        let calls = steady(WEB_BLIND.address, &[lost(4 * SECOND + 1000), lost(6 * SECOND + 13_100)]);
        let failover_blind = Failover::of("pod-3", WEB_BLIND, moments, &calls);
        let mut report = Report {
            setup: Setup {
                cgroup: "/sys/fs/cgroup/socklb-demo-1234".into(),
                manifests: "/mnt/manifests".into(),
                pin_path: "/sys/fs/bpf/socklb".into(),
                state_dir: "/mnt/state".into(),
                agent_pid: 1240,
                agent: ["socklb", "run", "--source=file:/mnt/manifests", "--node-name=demo-node"]
                    .into_iter()
                    .chain(["--cgroup=/sys/fs/cgroup/socklb-demo-1234", "--pin-path=/sys/fs/bpf/socklb"])
                    .map(str::to_owned)
                    .collect(),
                ready_ms: 212.4,
                frontends: 10,
            },
            before: vec![Unserved::of(web.address, &failed(1, Errno::ENETUNREACH))],
            calls: vec![
                Tally::of(web, How::Curl, &three(web)),
                Tally::of(WEB_NODE[1], How::Tcp, &three(WEB_NODE[1])),
                Tally::of(ECHO[1], How::Udp, &three(ECHO[1])),
            ],
            connect_times: ConnectTime::of(web.address, &three(web)).into_iter().collect(),
            refused: vec![Refused::of(IDLE[1].address, &[failed(1, Errno::ECONNREFUSED)])],
            failover,
            failover_blind,
            calls_after: vec![Tally::of(web, How::Tcp, &two(web))],
            connected_udp: vec![Tally::of(
                ECHO[0],
                How::ConnectedUdp,
                &[answered(1, "pod-2", Some(ECHO[0].address)), answered(2, "pod-2", Some(ECHO[0].address))],
            )],
            checks: Vec::new(),
            ok: false,
        };
        report.compute_checks();
        report
    }

    /// All text of a report.
    fn text(report: &Report) -> String {
        let mut text = scene(&report.setup.cgroup);
        report.before.iter().for_each(|before| text.push_str(&before.text()));
        text.push_str(&report.setup.text());
        text.push_str(&Tally::head());
        report.calls.iter().for_each(|tally| text.push_str(&tally.row()));
        report.connect_times.iter().for_each(|time| text.push_str(&time.text()));
        report.refused.iter().for_each(|refused| text.push_str(&refused.text()));
        text.push_str(&before_failover(PODS[2], 10, Duration::from_millis(10)));
        text.push_str(&failovers([&report.failover, &report.failover_blind]));
        report.calls_after.iter().for_each(|tally| text.push_str(&tally.row()));
        report.connected_udp.iter().for_each(|tally| text.push_str(&tally.row()));
        text.push_str(&report.verdict());
        text
    }

    #[test]
    fn a_good_run_reads_well() {
        let text = text(&report());
        assert!(text.lines().all(|line| line.chars().count() <= 100));
        expect![[r"
            socklb-demo: a node, three pods and clients, in namespaces of their own on this machine, with no
            route to any other network.

            SET UP
              node      10.10.0.1     fd00:10:10::1
              pod-1     10.244.1.10   fd00:10:244:1::10      HTTP on TCP 8080, echo on UDP 5353
              pod-2     10.244.2.10   fd00:10:244:2::10      HTTP on TCP 8080, echo on UDP 5353
              pod-3     10.244.3.10   fd00:10:244:3::10      HTTP on TCP 8080, echo on UDP 5353
              cgroup    /sys/fs/cgroup/socklb-demo-1234
              without socklb, connect() to 10.96.0.80:80 gives: Network is unreachable
              $ socklb run --source=file:/mnt/manifests --node-name=demo-node \
                  --cgroup=/sys/fs/cgroup/socklb-demo-1234 --pin-path=/sys/fs/bpf/socklb
              10 frontends in the kernel's maps 212 ms after its start (pid 1240)
              SERVICE   ADDRESS                     CLIENT     CALLS  pod-1  pod-2  pod-3  FAILED  PEER SEEN
              web       TCP 10.96.0.80:80           curl           6      2      2      2       0  -
              web-node  TCP [fd00:10:10::1]:30080   connect()      6      2      2      2       0  service
              echo      UDP [fd00:10:96::53]:53     sendto()       6      2      2      2       0  service
              connect() took 40 us to 10.96.0.80:80, 40 us to a pod's own address (quickest of 3)
              idle has no endpoints: connect() to [fd00:10:96::90]:80 gives: Connection refused, after 0.03 ms

            POD-3 DIES WITHOUT A WORD: its packets vanish, and its endpoints say ready
              10 clients call each of two Services with the same pods every 10 ms. A call fails after 2 s.
                                    passive health (default)        socklb.io/health: off, as kube-proxy
                                    ANSWERED  FAILED                ANSWERED  FAILED
              before                       2       0                       2       0
              second 1                     1       2                       1       2
              second 2                     0       0                       0       0
              second 3                     0       1                       0       1
              second 4                     0       0                       0       0
              second 5                     1       0                       0       1
              second 6                     1       0                       0       1
              the maps have changed        2       0                       2       0
              6.0 s after the death the manifest says ready: false; in a cluster that takes up to 50 s.
              13.3 ms later the kernel's maps hold the change.
              web: no call chose pod-3 after the rewrite.
              web-blind: the last call that chose pod-3 began 12.1 ms after the rewrite.
              web       TCP 10.96.0.80:80           connect()      6      3      3      0       0  service
              echo      UDP 10.96.0.53:53           connect()      2      0      2      0       0  service
            All 26 checks hold.
        "]]
        .assert_eq(&text);
    }

    #[test]
    fn whoever_looks_around_finds_commands_to_copy() {
        expect![[r"
            INSPECT IT, while clients call each address every second; Ctrl-C stops the demo
              A shell inside, whose calls are served like the clients':
                nsenter --target 1240 --mount --net \
                  sh -c 'echo 0 >/sys/fs/cgroup/socklb-demo-1234/cgroup.procs; exec sh'
              In it, for example:
                curl http://10.96.0.80/
                bpftool map dump pinned /sys/fs/bpf/socklb/services4
                /proc/1240/exe services --pin-path /sys/fs/bpf/socklb --state-dir /mnt/state
                sed -i s/10.244.2.10/10.244.1.10/ /mnt/manifests/endpointslices.yaml
                  (then only pod-1 answers IPv4 calls)
        "]]
        .assert_eq(&inspection_help(&report().setup));
    }

    #[test]
    fn a_round_is_a_line() {
        let calls = [
            (WEB[0], answered(1, "pod-1", None)),
            (WEB[1], failed(2, Errno::ECONNREFUSED)),
            (ECHO[0], answered(3, "pod-2", None)),
            (ECHO[1], answered(4, "pod-1", None)),
        ];
        expect!["      7  web v4:pod-1 v6:connection refused  echo v4:pod-2 v6:pod-1"]
            .assert_eq(&Round(7, &calls).to_string());
    }

    #[test]
    fn json_holds_every_count() {
        let json = serde_json::to_string_pretty(&report().failover).unwrap();
        expect![[r#"
            {
              "pod": "pod-3",
              "address": "10.96.0.80:80",
              "switch_ms": 13.3,
              "last_call_ms": null,
              "dead_ms": 6000.0,
              "before": {
                "service": "web",
                "protocol": "TCP",
                "address": "10.96.0.80:80",
                "client": "connect()",
                "calls": 2,
                "answers": {
                  "pod-1": 1,
                  "pod-3": 1
                },
                "failures": {},
                "peers": [
                  "10.96.0.80:80"
                ]
              },
              "between": {
                "service": "web",
                "protocol": "TCP",
                "address": "10.96.0.80:80",
                "client": "connect()",
                "calls": 6,
                "answers": {
                  "pod-1": 2,
                  "pod-2": 1
                },
                "failures": {
                  "Connection timed out": 3
                },
                "peers": [
                  "10.96.0.80:80"
                ]
              },
              "after": {
                "service": "web",
                "protocol": "TCP",
                "address": "10.96.0.80:80",
                "client": "connect()",
                "calls": 2,
                "answers": {
                  "pod-1": 1,
                  "pod-2": 1
                },
                "failures": {},
                "peers": [
                  "10.96.0.80:80"
                ]
              },
              "seconds": [
                {
                  "answered": 1,
                  "failed": 2
                },
                {
                  "answered": 0,
                  "failed": 0
                },
                {
                  "answered": 0,
                  "failed": 1
                },
                {
                  "answered": 0,
                  "failed": 0
                },
                {
                  "answered": 1,
                  "failed": 0
                },
                {
                  "answered": 1,
                  "failed": 0
                }
              ]
            }"#]]
        .assert_eq(&json);
    }

    /// Breaks a good report and returns the claims that fail.
    fn broken(spoil: impl FnOnce(&mut Report)) -> Vec<String> {
        let mut report = report();
        assert!(report.ok, "{}", report.verdict());
        spoil(&mut report);
        report.compute_checks();
        assert!(!report.ok);
        report.checks.into_iter().filter(|check| !check.holds).map(|check| check.claim).collect()
    }

    #[test]
    fn every_claim_can_fail() {
        let [web, _] = WEB;
        let peer = Some(web.address);
        let mut claims = Vec::new();
        claims.extend(broken(|report| {
            report.before = vec![Unserved::of(web.address, &answered(1, "pod-1", peer))];
        }));
        claims.extend(broken(|report| {
            report.calls = vec![Tally::of(web, How::Tcp, &[failed(1, Errno::ETIMEDOUT)])];
        }));
        claims.extend(broken(|report| {
            let others = Some(ECHO[0].address);
            report.calls =
                vec![Tally::of(web, How::Tcp, PODS.map(|pod| answered(1, pod.name, others)).iter())];
        }));
        claims.extend(broken(|report| report.refused = vec![Refused::of(IDLE[0].address, &three(web))]));
        let moments = Moments { killed: 10, rewritten: 20, switched: 30 };
        claims.extend(broken(|report| {
            let calls =
                [failed(1, Errno::ECONNRESET), failed(40, Errno::ECONNREFUSED), answered(41, "pod-3", peer)];
            report.failover = Failover::of("pod-3", web, moments, &calls);
        }));
        claims.extend(broken(|report| std::mem::swap(&mut report.failover, &mut report.failover_blind)));
        claims.extend(broken(|report| report.calls_after = vec![Tally::of(web, How::Curl, &three(web))]));
        claims.extend(broken(|report| {
            let calls =
                [answered(1, "pod-1", None), answered(2, "pod-2", None), failed(3, Errno::ECONNREFUSED)];
            report.connected_udp = vec![Tally::of(ECHO[0], How::ConnectedUdp, &calls)];
        }));
        expect![[r"
            before socklb, 10.96.0.80:80 is unreachable
            web TCP 10.96.0.80:80 by connect(): every call was answered
            web TCP 10.96.0.80:80 by connect(): only pod-1, pod-2 and pod-3 answered
            web TCP 10.96.0.80:80 by connect(): the peer is the service address
            web TCP 10.96.0.80:80 by connect(): the peer is the service address
            10.96.0.90:80, which has no endpoints, is refused at once
            10.96.0.80:80: pod-3 answered before it died
            10.96.0.80:80: no call failed after the kernel's maps had changed
            10.96.0.80:80: after the kernel's maps had changed, only pod-1 and pod-2 answered
            10.96.0.82:80: later than 4 s after pod-3 died, no call failed
            10.96.0.80:80: later than 4 s after pod-3 died, calls failed without passive health
            web TCP 10.96.0.80:80 by curl: only pod-1 and pod-2 answered
            echo UDP 10.96.0.53:53 by connect(): every datagram was answered
            echo UDP 10.96.0.53:53 by connect(): one of pod-1 and pod-2 answered them all
            echo UDP 10.96.0.53:53 by connect(): the peer is the service address"]]
        .assert_eq(&claims.join("\n"));
    }

    #[test]
    fn a_slow_refusal_is_not_at_once() {
        let call = Call { took: 1_000_000, ..failed(1, Errno::ECONNREFUSED) };
        assert!(!Refused::of(IDLE[0].address, &[call]).check().holds);
    }
}
