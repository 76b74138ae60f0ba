//! `cargo xtask bench health`: one of three endpoints dies, with passive health and, at the same time,
//! without.
//!
//! Each target has a node with three pods of its own. Its clients begin calls at a fixed rate, whether or not
//! former ones were answered, so that the share of calls to an endpoint is that of its choices.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr, SocketAddrV4},
    ops::Range,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use lb_core::model::Protocol;
use lb_kernel::Options as KernelOptions;
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    cluster::Cluster,
    command::SetOnDrop,
    netns::NetNs,
    server::Servers,
};
use nix::{
    errno::Errno,
    libc::linger,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, connect, getpeername, getsockname, getsockopt,
        setsockopt, socket, sockopt,
    },
};

use crate::{
    Common,
    calls::{HEALTH_OFF, SOCKLB},
    objects::{PORT, TARGET_PORT, cluster_ip},
    quantile::real,
    result::{Better, ResultFile, Suite, Unit},
};

/// Each client begins a call in this time.
const PERIOD: Duration = Duration::from_millis(100);
/// An established connection is closed, and the outcome of a call is read, after this time.
const SETTLED: Duration = Duration::from_millis(20);
/// A client gives up after this time.
const PATIENCE: Duration = Duration::from_secs(5);
/// Threads of all clients of a target.
const N_THREADS: u32 = 4;
/// Goals are about a share below this one.
const LITTLE: f64 = 0.01;
/// Seconds after the first SYN without an answer.
const WINDOWS: [Range<f64>; 7] = [0.0..1.0, 1.0..2.0, 2.0..3.0, 3.0..3.5, 3.5..4.0, 4.0..6.0, 6.0..8.0];

const LITTLE_AFTER: &str = "black hole: last 0.1 s with 1 % of the calls or more ends after";
const AFFECTED: &str = "black hole: calls without an answer";
const RECOVERY: &str = "black hole: time from its end until it has 90 % of its share";
const REFUSED: &str = "refusing endpoint: failed calls";
const REFUSED_LATER: &str = "refusing endpoint: share of failed calls, after 0.5 s";

/// All measures, in the order of the table.
pub(crate) fn measures() -> impl Iterator<Item = String> {
    let rest = [LITTLE_AFTER, AFFECTED, RECOVERY, REFUSED, REFUSED_LATER];
    WINDOWS.iter().map(share_name).chain(rest.map(str::to_owned))
}

fn share_name(window: &Range<f64>) -> String {
    format!("black hole: share of calls to it, {:.1} to {:.1} s", window.start, window.end)
}

/// Options of `health`.
#[derive(Args)]
pub(crate) struct Options {
    /// Number of clients, each of which begins ten calls in a second
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(4..=1000))]
    clients: u32,
    /// Number of runs
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: u32,
}

/// How long each phase takes.
#[derive(Clone, Copy)]
struct Phases {
    warm_up: Duration,
    dead: Duration,
    recovering: Duration,
    refusing: Duration,
}

pub(crate) fn run(options: &Options, common: &Common) -> anyhow::Result<ResultFile> {
    let milliseconds = Duration::from_millis;
    let (phases, n_runs) = if common.smoke {
        let [warm_up, dead, recovering, refusing] = [200, 1200, 1500, 700].map(milliseconds);
        (Phases { warm_up, dead, recovering, refusing }, 1)
    } else {
        // A base period of 10 s begins when the endpoint is ejected.
        let [warm_up, dead, recovering, refusing] = [1000, 8200, 12_000, 5000].map(milliseconds);
        (Phases { warm_up, dead, recovering, refusing }, options.runs)
    };
    let mut run = common.start(Suite::Health);
    run.setting("clients", options.clients);
    run.setting("calls of each client in a second", 10);
    run.setting("a client gives up after", format!("{} s", PATIENCE.as_secs()));
    run.setting("runs", n_runs);
    let mut all = [Vec::new(), Vec::new()];
    for n in 1..=n_runs {
        eprintln!("run {n} of {n_runs}");
        let observed = thread::scope(|scope| {
            let targets = [true, false].map(|passive_health| {
                scope.spawn(move || {
                    Sandbox::run(|sandbox| observe(sandbox, passive_health, options.clients, phases))
                })
            });
            targets.map(|target| target.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause)))
        });
        for (measures, observed) in all.iter_mut().zip(observed) {
            measures.push(observed?.measures());
        }
    }
    for (name, observed) in [SOCKLB, HEALTH_OFF].into_iter().zip(&all) {
        for measure in measures() {
            let values = observed.iter().flatten().filter(|(name, ..)| *name == measure);
            let (units, blocks): (Vec<Unit>, Vec<Vec<f64>>) =
                values.map(|(_, unit, value)| (*unit, vec![*value])).unzip();
            if let Some(unit) = units.first() {
                run.of(name, None).series(&measure, *unit, Better::Lower, &blocks);
            }
        }
    }
    Ok(run.finish())
}

/// A call.
#[derive(Clone, Copy, Debug)]
struct Call {
    began: Instant,
    /// The address of the node on the link to the chosen endpoint.
    link: IpAddr,
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Established,
    Failed,
    /// No answer yet.
    Waits,
}

/// The calls of one target, and when its endpoint changed.
struct Observed {
    /// The node's address on the link to the endpoint that dies.
    link: IpAddr,
    calls: Vec<Call>,
    reconnected: Instant,
    /// The calls to the service with an endpoint that refuses, and since when it does.
    refusing: (Vec<Call>, Instant),
}

impl Observed {
    /// The share of the calls in a window that chose the endpoint; `None` without calls.
    fn share(&self, from: Instant, window: Range<f64>) -> Option<f64> {
        let calls: Vec<&Call> = within(&self.calls, from, window).collect();
        let n_chosen = calls.iter().filter(|call| call.link == self.link).count();
        (!calls.is_empty()).then(|| ratio(n_chosen, calls.len()))
    }

    /// What these calls show: measure, unit and value.
    fn measures(&self) -> Vec<(String, Unit, f64)> {
        let mut measures = Vec::new();
        let mut add = |name: &str, unit, value: Option<f64>| {
            measures.extend(value.map(|value| (name.to_owned(), unit, value)));
        };
        let is_affected = |call: &&Call| call.outcome == Outcome::Waits && call.began < self.reconnected;
        let affected: Vec<&Call> = self.calls.iter().filter(is_affected).collect();
        if let Some(first) = affected.iter().map(|call| call.began).min() {
            let dead = self.reconnected.saturating_duration_since(first).as_secs_f64();
            for window in WINDOWS.into_iter().filter(|window| window.end <= dead) {
                add(&share_name(&window), Unit::Ratio, self.share(first, window));
            }
            let has_many =
                |start: &f64| self.share(first, *start..start + 0.1).is_some_and(|share| share >= LITTLE);
            let many = tenths(dead - 0.1).filter(has_many).last();
            add(LITTLE_AFTER, Unit::Nanoseconds, many.map(|start| (start + 0.1) * 1e9));
            add(AFFECTED, Unit::Count, Some(real(affected.len() as u64)));
        }
        let end = self.calls.iter().map(|call| call.began).max().unwrap_or(self.reconnected);
        let left = end.saturating_duration_since(self.reconnected).as_secs_f64();
        // A window of a second, for few calls vary much.
        let has_its_share =
            |start: &f64| self.share(self.reconnected, *start..start + 1.0).is_some_and(|share| share >= 0.3);
        add(RECOVERY, Unit::Nanoseconds, tenths(left - 1.0).find(has_its_share).map(|start| start * 1e9));

        let (calls, since) = &self.refusing;
        let failed = |window| {
            let calls: Vec<&Call> = within(calls, *since, window).collect();
            (calls.iter().filter(|call| call.outcome == Outcome::Failed).count(), calls.len())
        };
        add(REFUSED, Unit::Count, Some(real(failed(0.0..f64::MAX).0 as u64)));
        let (n_failed, n_calls) = failed(0.5..f64::MAX);
        add(REFUSED_LATER, Unit::Ratio, (n_calls > 0).then(|| ratio(n_failed, n_calls)));
        measures
    }
}

/// 0, 0.1, 0.2 and so on.
fn tenths(last: f64) -> impl Iterator<Item = f64> {
    (0..).map(|n: u32| f64::from(n) / 10.0).take_while(move |tenth| *tenth <= last)
}

/// The calls that began in a window of seconds after a moment.
fn within(calls: &[Call], from: Instant, window: Range<f64>) -> impl Iterator<Item = &Call> {
    calls.iter().filter(move |call| {
        call.began.checked_duration_since(from).is_some_and(|time| window.contains(&time.as_secs_f64()))
    })
}

fn ratio(part: usize, whole: usize) -> f64 {
    real(part as u64) / real(whole as u64)
}

/// Observes a target: an endpoint that does not answer and returns, then one that refuses.
fn observe(
    sandbox: &Sandbox,
    passive_health: bool,
    n_clients: u32,
    phases: Phases,
) -> anyhow::Result<Observed> {
    let options = KernelOptions { passive_health, ..agent::options(sandbox) };
    let mut agent = Agent::start_with(&options, agent::settings(), Vec::new())?;
    let services = [0, 1].map(|n| SocketAddrV4::new(cluster_ip(n), PORT));
    let (mut pods, mut servers, mut endpoints) =
        (Vec::new(), [Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for n in 1..=3 {
        let [here, there] = [1, 2].map(|end| IpAddr::from([10, 244, n, end]));
        let pod = NetNs::new()?;
        sandbox.netns().join(&format!("pod-{n}"), &[here], &pod, "eth0", &[there])?;
        for ((servers, endpoints), port) in servers.iter_mut().zip(&mut endpoints).zip(TARGET_PORT..) {
            let endpoint = SocketAddr::new(there, port);
            servers.push(pod.run(|| Servers::tcp([endpoint])));
            endpoints.push(endpoint);
        }
        pods.push((pod, here));
    }
    let mut cluster = Cluster::new();
    for ((service, endpoints), name) in services.iter().zip(&endpoints).zip(["silent", "refusing"]) {
        cluster.serve(name, SocketAddr::V4(*service), Protocol::Tcp, endpoints);
    }
    agent.follow(&cluster);
    let [silent, refusing] = services.map(SockaddrIn::from);
    let (victim, link) = pods.last().context("three pods")?;
    let (calls, reconnected) = under_load(silent, n_clients, || {
        thread::sleep(phases.warm_up);
        victim.cut_off(&[*link])?;
        thread::sleep(phases.dead);
        victim.reconnect(&[*link])?;
        let reconnected = Instant::now();
        thread::sleep(phases.recovering);
        Ok(reconnected)
    })?;
    let refusing = under_load(refusing, n_clients, || {
        thread::sleep(phases.warm_up);
        let since = Instant::now();
        drop(servers[1].pop());
        thread::sleep(phases.refusing);
        Ok(since)
    })?;
    Ok(Observed { link: *link, calls, reconnected, refusing })
}

/// Calls from all clients while a closure runs. Returns its result too.
fn under_load<R>(
    service: SockaddrIn,
    n_clients: u32,
    body: impl FnOnce() -> anyhow::Result<R>,
) -> anyhow::Result<(Vec<Call>, R)> {
    let is_over = AtomicBool::new(false);
    let pause = PERIOD * N_THREADS / n_clients;
    thread::scope(|scope| {
        let clients =
            [(); N_THREADS as usize].map(|()| scope.spawn(|| call_until(&is_over, &service, pause)));
        let result = {
            let _ends = SetOnDrop(&is_over);
            body()?
        };
        let mut calls = Vec::new();
        for client in clients {
            calls.extend(client.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))?);
        }
        Ok((calls, result))
    })
}

/// Begins a call after each pause.
fn call_until(is_over: &AtomicBool, service: &SockaddrIn, pause: Duration) -> anyhow::Result<Vec<Call>> {
    let (mut calls, mut next) = (Vec::new(), Instant::now());
    let (mut open, mut waiting) = (VecDeque::new(), VecDeque::new());
    while !is_over.load(Relaxed) {
        let began = Instant::now();
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let stream = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        // Closed by a reset: TIME_WAIT would use up the ports.
        setsockopt(&stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?;
        let result = connect(stream.as_raw_fd(), service);
        let link = getsockname::<SockaddrIn>(stream.as_raw_fd())?;
        let outcome = match result {
            Ok(()) => Outcome::Established,
            Err(Errno::EINPROGRESS) => Outcome::Waits,
            Err(_) => Outcome::Failed,
        };
        open.push_back((calls.len(), stream));
        calls.push(Call { began, link: link.ip().into(), outcome });
        while open.front().is_some_and(|(n, _): &(usize, OwnedFd)| calls[*n].began.elapsed() > SETTLED) {
            let Some((n, stream)) = open.pop_front() else { break };
            if calls[n].outcome == Outcome::Waits {
                calls[n].outcome = settled(&stream)?;
            }
            if calls[n].outcome == Outcome::Waits {
                waiting.push_back((n, stream));
            }
        }
        while waiting.front().is_some_and(|(n, _): &(usize, OwnedFd)| calls[*n].began.elapsed() > PATIENCE) {
            drop(waiting.pop_front());
        }
        next += pause;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let n_settled = calls.len() - open.len();
    calls.truncate(n_settled);
    Ok(calls)
}

fn settled(stream: &OwnedFd) -> anyhow::Result<Outcome> {
    Ok(match getpeername::<SockaddrIn>(stream.as_raw_fd()) {
        Ok(_) => Outcome::Established,
        Err(_) => match Errno::from_raw(getsockopt(stream, sockopt::SocketError)?) {
            Errno::UnknownErrno => Outcome::Waits,
            // The server stopped after it was established.
            Errno::ECONNRESET => Outcome::Established,
            _ => Outcome::Failed,
        },
    })
}
