//! `socklb-demo`: shows socklb on this machine without touching the host.
//!
//! # Purpose
//!
//! [`run`] sets up a node with three pods, starts the real agent on the objects of `manifests/demo`, and lets
//! ordinary programs call the service addresses. It counts which pod answered, cuts a pod off, and checks
//! each statement that it makes.
//!
//! # Invariants
//!
//! - Everything happens in the demo's own namespaces and cgroup, on its own thread: the caller's thread stays
//!   in its namespaces.
//! - Success, failure, panic, SIGINT, SIGTERM and SIGHUP leave nothing behind.
//!
//! # Depends on
//!
//! `lb_kernel` for reading the pinned maps, `lb_core` for addresses. The agent is another process: the
//! `socklb` in the folder of this program.
#![deny(unsafe_code)]

mod agent;
mod backend;
mod client;
mod manifests;
mod report;
mod scenery;

use std::{
    future::poll_fn,
    io::{self, Write},
    net::SocketAddr,
    panic,
    path::{Path, PathBuf},
    process::ExitCode,
    task::Poll,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Parser, Subcommand};
use lb_kernel::{cgroup, chain, syscall};
use nix::unistd::{AccessFlags, access};
use tokio::{
    net::TcpStream,
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use self::{
    agent::Agent,
    backend::Backend,
    client::{Call, Client, ClientArgs, Clients, How},
    manifests::{ECHO, HTTP_PORT, IDLE, PODS, Target, WEB, WEB_BLIND, WEB_NODE},
    report::{ConnectTime, Failover, Moments, Refused, Report, Round, Setup, Tally, Unserved},
    scenery::Scenery,
};

/// Calls of sockets per address: with them the chance that one of three pods gets none is below 10⁻¹⁰.
const N_CALLS: u32 = 60;
/// Calls of curl per address; fewer, because curl starts slowly: the chance is below 10⁻⁶.
const N_CURL_CALLS: u32 = 40;
/// Timed connections of each kind.
const N_TIMED: u32 = 200;
/// Calls to the service without endpoints.
const N_REFUSED: u32 = 5;
/// Datagrams on one connected socket.
const N_DATAGRAMS: u32 = 10;
/// Clients of each Service while a pod dies.
const N_STEADY_CLIENTS: usize = 10;
/// Pause between the calls of one of them.
const STEADY_PAUSE: Duration = Duration::from_millis(10);
/// Maximum number of its calls: a minute's.
const MAX_STEADY_CALLS: u32 = 6_000;
/// Calls of each before the pod dies, and again after the tables have changed.
const N_STEADY: usize = 20;
/// Time from the pod's death until its endpoints say so. In a cluster that takes up to 50 s: the node
/// controller waits for a node that does not report.
const UNNOTICED: Duration = Duration::from_secs(6);
/// How long the veth pairs may take to come up.
const WIRING: Duration = Duration::from_secs(5);
/// How long a client with steady calls may stay silent.
const SILENCE: Duration = Duration::from_secs(5);
/// Pause between two rounds after the report.
const ROUND: Duration = Duration::from_secs(1);

/// See socklb at work: backends, services and clients in namespaces of their own.
#[derive(Debug, Parser)]
#[command(name = "socklb-demo", version, max_term_width = 100, args_conflicts_with_subcommands = true)]
struct Options {
    #[command(subcommand)]
    client: Option<Command>,
    /// The agent's program [default: the socklb beside this program]
    #[arg(long, value_name = "FILE")]
    socklb: Option<PathBuf>,
    /// Exit after one round. Exit status 0 only if every statement of the demo holds.
    #[arg(long)]
    exit: bool,
    /// Output format: progress as text, or one JSON document with all counts at the end.
    #[arg(
        short = 'o',
        long = "output",
        value_name = "FORMAT",
        default_value = "text",
        action = clap::ArgAction::Set,
        value_parser = clap::builder::TypedValueParser::map(
            clap::builder::PossibleValuesParser::new(["text", "json"]),
            |format| format == "json",
        ),
    )]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The client's command.
    #[command(hide = true)]
    Client(ClientArgs),
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    let result =
        options.client.take().map_or_else(|| run(options), |Command::Client(args)| client::run(args));
    result.unwrap_or_else(|error| {
        eprintln!("socklb-demo: {}", chain(error.as_ref()));
        ExitCode::FAILURE
    })
}

/// Fails if the demo cannot run. A statement that does not hold sets the exit status instead.
fn run(options: Options) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "the demo needs root, because it makes network namespaces and loads BPF programs: `sudo socklb-demo`"
        );
    }
    let program = options.socklb.clone().map_or_else(agent::program_beside, Ok)?;
    ensure!(
        program.is_file(),
        "no program {}: build it with `cargo xtask build`, or name it with --socklb",
        program.display()
    );
    let cgroup_root = cgroup::find_any()?;
    // Namespaces and the death signal of a child belong to a thread: this one lives as long as the demo.
    let stage = thread::Builder::new()
        .name("demo".to_owned())
        .spawn(move || {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("cannot start the demo's runtime")?;
            // From here on a signal stops the demo in order.
            let signals = runtime.block_on(async { Signals::listen() })?;
            let scenery = Scenery::enter(&cgroup_root)?;
            runtime.block_on(play(&options, &program, &scenery, signals))
        })
        .context("cannot start a thread")?;
    stage.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// Runs the demo until it is over or a signal stops it.
async fn play(
    options: &Options,
    program: &Path,
    scenery: &Scenery,
    mut signals: Signals,
) -> Result<ExitCode> {
    let narrator = Narrator { is_text: !options.json };
    let mut stage = tokio::select! {
        stage = Stage::set(scenery, program, narrator) => stage?,
        name = signals.next() => bail!("{name} during the setup"),
    };
    let report = tokio::select! {
        report = stage.tell() => report?,
        name = signals.next() => bail!("{name} during the demo"),
    };
    if options.json {
        let document = serde_json::to_string_pretty(&report).context("cannot write JSON")?;
        print(&format!("{document}\n"))?;
    }
    if !options.exit {
        narrator.say(&format!("\n{}", report::inspection_help(&report.setup)))?;
        tokio::select! {
            ended = stage.keep_calling() => ended?,
            _ = signals.next() => {}
        }
    }
    stage.agent.stop().await?;
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything that runs.
struct Stage<'a> {
    scenery: &'a Scenery,
    narrator: Narrator,
    _backends: Vec<Backend>,
    clients: Clients,
    agent: Agent,
    setup: Setup,
    before: Vec<Unserved>,
    has_curl: bool,
}

impl<'a> Stage<'a> {
    /// Sets up everything, until the kernel holds the agent's frontends.
    async fn set(scenery: &'a Scenery, program: &Path, narrator: Narrator) -> Result<Self> {
        manifests::write(&scenery.manifests).context("cannot write the manifests")?;
        let mut backends = Vec::new();
        for (pod, netns) in &scenery.pods {
            backends.push(Backend::start(*pod, netns)?);
        }
        for address in backends.iter().flat_map(|backend| backend.pod.addresses()) {
            await_wire(SocketAddr::new(address, HTTP_PORT)).await?;
        }
        narrator.say(&report::scene(scenery.cgroup.path()))?;

        let clients = Clients::new(scenery.cgroup.path());
        let mut before = Vec::new();
        for target in WEB {
            for call in clients.call(How::Tcp, target.address, 1).await? {
                let unserved = Unserved::of(target.address, &call);
                narrator.say(&unserved.text())?;
                before.push(unserved);
            }
        }

        let mut agent = Agent::start(program, scenery)?;
        let ready = agent
            .wait_until(&scenery.pins, "the frontends of the manifests", |image| {
                manifests::frontends().all(|(address, n_endpoints)| {
                    let frontend = image.services.get(&address).and_then(|id| image.frontends.get(id));
                    frontend.is_some_and(|frontend| frontend.run.len as usize == n_endpoints)
                })
            })
            .await?;
        let setup = Setup {
            cgroup: scenery.cgroup.path().to_owned(),
            manifests: scenery.manifests.clone(),
            pin_path: scenery.pins.clone(),
            state_dir: scenery.state.clone(),
            agent_pid: agent.pid,
            agent: agent.command_line.clone(),
            ready_ms: ready.as_secs_f64() * 1000.0,
            frontends: manifests::frontends().count(),
        };
        narrator.say(&setup.text())?;
        Ok(Self {
            scenery,
            narrator,
            _backends: backends,
            clients,
            agent,
            setup,
            before,
            has_curl: has_curl(),
        })
    }

    /// Makes the calls, cuts a pod off, makes more calls. Returns the checked report.
    async fn tell(&mut self) -> Result<Report> {
        let narrator = self.narrator;
        narrator.say("\nCALLS\n")?;
        let mut calls = Vec::new();
        if self.has_curl {
            for call in self.clients.call(How::Curl, WEB[0].address, 1).await? {
                narrator.say(&report::curl(&client::curl_line(WEB[0].address), &call))?;
            }
        } else {
            narrator.say("  (curl is not on PATH: plain sockets only)\n")?;
        }
        narrator.say(&Tally::head())?;
        if self.has_curl {
            for target in WEB {
                calls.push(self.tally(target, How::Curl, N_CURL_CALLS).await?);
            }
        }
        for (target, how) in every_address() {
            calls.push(self.tally(target, how, N_CALLS).await?);
        }
        narrator.say(report::PEER_SEEN)?;
        let mut connect_times = Vec::new();
        for target in WEB {
            let family = usize::from(target.address.is_ipv6());
            // Alternating, so that both see the same load of the machine, and all pods.
            let in_turn: Vec<_> = PODS
                .iter()
                .flat_map(|pod| [target.address, SocketAddr::new(pod.addresses()[family], HTTP_PORT)])
                .collect();
            let made = self.clients.call_in_turn(How::Tcp, &in_turn, 2 * N_TIMED).await?;
            if let Some(times) = ConnectTime::of(target.address, &made) {
                narrator.say(&times.text())?;
                connect_times.push(times);
            }
        }
        let mut refused = Vec::new();
        for target in IDLE {
            let made = self.clients.call(How::Tcp, target.address, N_REFUSED).await?;
            let seen = Refused::of(target.address, &made);
            narrator.say(&seen.text())?;
            refused.push(seen);
        }

        let [failover, failover_blind] = self.kill_a_pod().await?;
        narrator.say(&format!("\nAFTERWARDS\n{}", Tally::head()))?;
        let mut calls_after = Vec::new();
        for (target, how) in every_address() {
            calls_after.push(self.tally(target, how, N_CALLS).await?);
        }
        narrator.say("  Ten datagrams on one connected UDP socket stay with one pod:\n")?;
        let mut connected_udp = Vec::new();
        for target in ECHO {
            connected_udp.push(self.tally(target, How::ConnectedUdp, N_DATAGRAMS).await?);
        }
        self.agent.check_alive()?;

        let setup = self.setup.clone();
        let before = std::mem::take(&mut self.before);
        let mut report = Report {
            setup,
            before,
            calls,
            connect_times,
            refused,
            failover,
            failover_blind,
            calls_after,
            connected_udp,
            checks: Vec::new(),
            ok: false,
        };
        report.compute_checks();
        narrator.say(&format!("\n{}\n{}", report.verdict(), report::NEXT))?;
        Ok(report)
    }

    /// Makes calls and prints who answered.
    async fn tally(&self, target: Target, how: How, n: u32) -> Result<Tally> {
        let calls = self.clients.call(how, target.address, n).await?;
        let tally = Tally::of(target, how, &calls);
        self.narrator.say(&tally.row())?;
        Ok(tally)
    }

    /// Cuts the last pod off during steady calls, and updates its endpoints some seconds later. Returns the
    /// results of [`WEB`] and of [`WEB_BLIND`].
    async fn kill_a_pod(&mut self) -> Result<[Failover; 2]> {
        let targets = [WEB[0], WEB_BLIND];
        let (pod, netns) = self.scenery.pods.last().context("no pod is left")?;
        self.narrator.say(&report::before_failover(*pod, N_STEADY_CLIENTS, STEADY_PAUSE))?;
        let mut clients = Vec::new();
        for target in targets {
            let start = || self.clients.start(How::Tcp, &[target.address], MAX_STEADY_CALLS, STEADY_PAUSE);
            clients.push((0..N_STEADY_CLIENTS).map(|_| start()).collect::<Result<Vec<_>>>()?);
        }
        let mut calls = [Vec::new(), Vec::new()];
        for (clients, calls) in clients.iter_mut().zip(&mut calls) {
            for client in clients {
                listen(client, calls, N_STEADY).await?;
            }
        }
        let killed = client::now()?;
        netns.cut_off(&pod.gateways()).context("cannot cut a pod off")?;
        sleep(UNNOTICED).await;
        let rewritten = client::now()?;
        manifests::take_out(&self.scenery.manifests, *pod).context("cannot rewrite the manifest")?;
        self.agent
            .wait_until(&self.scenery.pins, &format!("the change that takes {} out", pod.name), |image| {
                !image.reachable().any(|entry| pod.addresses().contains(&entry.address().ip()))
            })
            .await?;
        let switched = client::now()?;
        for (clients, calls) in clients.into_iter().zip(&mut calls) {
            for mut client in clients {
                // First the calls that the client made meanwhile.
                let n_before = calls.len();
                while calls[n_before..].last().is_none_or(|call: &Call| call.began < switched) {
                    listen(&mut client, calls, 1).await?;
                }
                listen(&mut client, calls, N_STEADY).await?;
                calls.extend(client.stop().await?);
            }
        }
        let moments = Moments { killed, rewritten, switched };
        let [web, blind] = &calls;
        let failovers = [(targets[0], web), (targets[1], blind)]
            .map(|(target, calls)| Failover::of(pod.name, target, moments, calls));
        self.narrator.say(&report::failovers(failovers.each_ref()))?;
        Ok(failovers)
    }

    /// Calls every address once a second, until the agent exits.
    async fn keep_calling(&mut self) -> Result<()> {
        let mut ticks = interval(ROUND);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for n in 1.. {
            ticks.tick().await;
            self.agent.check_alive()?;
            let mut round = Vec::new();
            for (target, how) in every_address().filter(|(target, _)| !target.address.ip().is_loopback()) {
                let calls = self.clients.call(how, target.address, 1).await?;
                round.extend(calls.into_iter().map(|call| (target, call)));
            }
            self.narrator.say(&format!("{}\n", Round(n, &round)))?;
        }
        Ok(())
    }
}

/// Receives `n` more calls.
async fn listen(client: &mut Client, calls: &mut Vec<Call>, n: usize) -> Result<()> {
    for _ in 0..n {
        let call = timeout(SILENCE, client.next()).await.context("a client does not report")??;
        calls.push(call.context("a client has exited")?);
    }
    Ok(())
}

/// Every service address with endpoints, with the call that plain sockets use.
fn every_address() -> impl Iterator<Item = (Target, How)> {
    // Loopback node ports are served in the node's network namespace only. Before Linux 5.14 an agent cannot
    // identify its namespace unless it is the initial one.
    let knows_namespace = syscall::netns_cookie().is_some();
    let tcp = WEB.into_iter().chain(WEB_NODE).map(|target| (target, How::Tcp));
    tcp.chain(ECHO.into_iter().map(|target| (target, How::Udp)))
        .filter(move |(target, _)| knows_namespace || !target.address.ip().is_loopback())
}

/// Waits until a pod answers: a link needs time to come up.
async fn await_wire(address: SocketAddr) -> Result<()> {
    let answered = timeout(WIRING, async {
        while TcpStream::connect(address).await.is_err() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    answered.await.map_err(|_elapsed| anyhow!("{address} cannot be reached over its veth pair"))
}

/// Whether curl is on `PATH`.
fn has_curl() -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| access(&folder.join("curl"), AccessFlags::X_OK).is_ok())
    })
}

/// Prints the text, or nothing if a document is requested.
#[derive(Clone, Copy, Debug)]
struct Narrator {
    is_text: bool,
}

impl Narrator {
    /// Prints text at once.
    fn say(self, text: &str) -> Result<()> {
        if self.is_text { print(text) } else { Ok(()) }
    }
}

/// Prints, and returns an error for a closed output instead of panicking.
fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot write to standard output")
}

/// The signals that stop the demo, with their names.
struct Signals([(Signal, &'static str); 3]);

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self([
            (listen(SignalKind::interrupt())?, "SIGINT"),
            (listen(SignalKind::terminate())?, "SIGTERM"),
            (listen(SignalKind::hangup())?, "SIGHUP"),
        ]))
    }

    /// Waits for a signal and returns its name.
    async fn next(&mut self) -> &'static str {
        poll_fn(|context| {
            let mut signals = self.0.iter_mut();
            let arrived =
                signals.find_map(|(signal, name)| signal.poll_recv(context).is_ready().then_some(*name));
            arrived.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
