//! Commands that read or remove pinned state. Only `explain --watch` needs a running agent.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use jiff::Timestamp;
use lb_agent::{
    self_test,
    serve::{agent_socket, known::Which},
    snapshot,
};
use lb_core::{
    desired::FrontendAddress,
    model::address,
    packets::{
        self,
        nft::TableId,
        sim::{self, Packet},
    },
    sim::{Caller, Config, Simulator},
    tables::Image,
};
use lb_kernel::{
    KernelError, Maps, Observations, addresses, cgroup, host,
    lock::{self, Lock},
    nftables::{Nftables, NftablesError},
    pins, syscall,
};
use nix::sched::{CloneFlags, setns};
use serde::Serialize;
use tracing::debug;

use super::{
    PinArgs,
    agent::{Agent, AskError},
    config::UsageError,
    explain::{Explanation, OUTSIDE, PacketPart, explain as explain_call, reachable},
    listing::{self, FrontendRow, list, table},
    objects::{At, Objects},
    sample::counts,
};

/// Output formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// One JSON document.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Flags of `socklb services`.
#[derive(Debug, Args)]
pub struct ServicesArgs {
    /// Only Services of this namespace.
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// Flags of `socklb explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// ADDRESS:PORT, optionally with /tcp (the default), /udp or /sctp; IPv6 as [ADDRESS]:PORT.
    call: FrontendAddress,
    /// The sender of the packet, if packets are served: a pod, an address of this node, or an address outside
    /// [default: 192.0.2.1 or 2001:db8::1, which are outside]
    #[arg(long, value_name = "ADDRESS")]
    from: Option<IpAddr>,
    /// Explain a call from this network namespace, such as /run/netns/NAME [default: the current one]
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    netns: Option<PathBuf>,
    /// Explain a call from the network namespace of this process.
    #[arg(long)]
    pid: Option<u32>,
    /// Keep running, and print the answer again when it changes: one line each, with the time. Needs a
    /// running agent.
    #[arg(short, long)]
    watch: bool,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// Prints in the requested format.
pub(super) fn print(
    output: Output,
    value: &impl serde::Serialize,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    match output {
        Output::Table => super::show(&text())?,
        Output::Json => super::show(&format!("{}\n", serde_json::to_string_pretty(value)?))?,
        Output::Yaml => super::show(&serde_saphyr::to_string(value)?)?,
    }
    Ok(())
}

/// Pause before a stopped agent is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// Maximum number of times that rows which changed meanwhile are read again.
const ROUNDS: usize = 5;
/// Maximum number of `services` rows that are read again. Fewer than these change during one read.
const MAX_ROWS: usize = 256;

/// `socklb services`
///
/// # Errors
///
/// If nothing is pinned or it cannot be read.
pub fn services(args: &ServicesArgs) -> anyhow::Result<ExitCode> {
    let maps = Maps::open(&args.pins.pin_path)?;
    let observations = Observations::open(&args.pins.pin_path)?;
    let mut objects = Objects::new(&args.pins.state_dir);
    let _known = objects.now();
    // Read after the objects, so that the tables are never older than the answer.
    let image = maps.image()?;
    let entries = image.reachable();
    let mut rows = list(&image, objects.state(), &counts(&observations, entries));
    if let Some(state) = objects.state().filter(|_| objects.notice().is_none()) {
        let changed = rows.iter().filter(|row| !listing::is_described(row, state));
        let changed = changed.map(FrontendRow::frontend).take(MAX_ROWS).collect();
        look_again(&mut rows, changed, (&maps, &observations), &Agent::new(&args.pins.state_dir))?;
    }
    rows.extend(objects.state().map(listing::packets_alone).unwrap_or_default());
    listing::sort(&mut rows);
    if let Some(notice) = objects.notice() {
        eprintln!("socklb: {notice}");
    }
    if let Some(namespace) = &args.namespace {
        rows.retain(|row| row.namespace == *namespace);
    }
    print(args.output, &rows, || table(&rows))?;
    Ok(ExitCode::SUCCESS)
}

/// Reads these rows again with the objects of their services, which is a fast request. Removes rows whose
/// frontends are gone.
fn look_again(
    rows: &mut Vec<FrontendRow>,
    mut changed: BTreeSet<FrontendAddress>,
    (maps, observations): (&Maps, &Observations),
    agent: &Agent,
) -> anyhow::Result<()> {
    for _ in 0..ROUNDS {
        let heard: Result<Vec<_>, _> =
            changed.iter().map(|address| Ok((*address, agent.ask(Which::At(*address), None)?))).collect();
        // If the agent exits meanwhile, the rows stay unchanged.
        let Ok(heard) =
            heard.map_err(|error: AskError| debug!(%error, "rows that changed are not read again"))
        else {
            break;
        };
        if heard.is_empty() {
            break;
        }
        let image = maps.image()?;
        rows.retain(|row| !changed.contains(&row.frontend()));
        changed.clear();
        for (address, answer) in heard {
            let state = answer.map(|tagged| listing::state_of_known(tagged.known));
            let counters = counts(observations, image.entries_at(address).iter());
            let Some(row) = listing::find(&image, address, state.as_ref(), &counters) else { continue };
            if state.is_none_or(|state| !listing::is_described(&row, &state)) {
                changed.insert(address);
            }
            rows.push(row);
        }
    }
    listing::sort(rows);
    Ok(())
}

/// The input of `socklb explain`.
struct Asked<'a> {
    args: &'a ExplainArgs,
    agent: Agent,
    packet: Packet,
    /// In the network namespace of this command, not of `--netns`.
    nftables: RefCell<Result<Nftables, NftablesError>>,
}

/// The packet of `--from`, as seen from the current network namespace.
fn packet(args: &ExplainArgs) -> Result<Packet, UsageError> {
    let FrontendAddress { ip, port, protocol } = args.call;
    let ip = ip.to_canonical();
    let outside = if ip.is_ipv6() { OUTSIDE.1.into() } else { OUTSIDE.0.into() };
    let source = args.from.map_or(outside, |from| from.to_canonical());
    if source.is_ipv6() != ip.is_ipv6() {
        return Err(UsageError(format!("--from {source}: name an address of the family of {ip}")));
    }
    let is_own = addresses::read().contains(&source);
    Ok(Packet { source, destination: SocketAddr::new(ip, port), protocol: protocol.number(), is_own })
}

/// The output of `socklb explain`.
struct Answered {
    explanation: Explanation,
    /// Why names may be outdated or missing.
    notice: Option<String>,
    /// Tag of the agent's answer; `None` without one.
    tag: Option<String>,
}

impl Asked<'_> {
    /// The current answer.
    fn now(&self) -> anyhow::Result<Answered> {
        let (state_dir, call) = (&self.args.pins.state_dir, self.args.call);
        let mut at = At::now(&self.agent, state_dir, call);
        let (maps, mut image) = read(&self.args.pins)?;
        for _ in 0..ROUNDS {
            if at.tag.is_none() {
                break;
            }
            let now = At::now(&self.agent, state_dir, call);
            let is_same = now.tag == at.tag;
            at = now;
            if is_same {
                break;
            }
            // The tables may have changed since the agent's answer.
            image = maps.image()?;
        }
        let meta = maps.meta();
        let own = syscall::netns_cookie();
        debug!(?own, node = meta.node_netns, "network namespaces");
        // Before kernel 5.14 the cookie cannot be read: then the caller is assumed to be on the node.
        let caller = Caller {
            netns: own.unwrap_or_default(),
            on_node: own.is_none_or(|own| meta.node_netns == 0 || own == meta.node_netns),
            earlier: None,
        };
        let mut simulator = Simulator::new(image);
        simulator.config = Config {
            node_ports: (meta.node_port_first, meta.node_port_last),
            localhost_nodeports: meta.localhost_nodeports != 0,
        };
        simulator.now = host::monotonic();
        let observations = Observations::open(&self.args.pins.pin_path)?;
        simulator.health = RefCell::new(observations.health_of(reachable(&simulator, call, caller)));
        let At { state, issues, notice, tag } = at;
        let packet = self.packet();
        let explanation =
            Explanation { packet, issues, ..explain_call(&simulator, state.as_ref(), call, caller) };
        Ok(Answered { explanation, notice, tag })
    }

    /// What the kernel's rules do to the packet; `None` if socklb has none.
    fn packet(&self) -> Option<PacketPart> {
        let family = address::family(self.packet.destination.ip());
        let table = packets::table_ids().into_iter().find(|table| table.family == family)?;
        match &mut *self.nftables.borrow_mut() {
            Err(NftablesError::Missing) => None,
            Err(error) => Some(PacketPart::unknown(self.packet, error.to_string())),
            // A whole table of a large cluster takes a second to read, and `--watch` reads it with each
            // change.
            Ok(nftables) => match nftables.read_wanted(&table, |table| sim::lookups(table, self.packet)) {
                Ok((found, _generation)) => found.map(|found| PacketPart::new(&found, self.packet)),
                Err(NftablesError::Missing) => None,
                Err(error) => Some(PacketPart::unknown(self.packet, error.to_string())),
            },
        }
    }

    /// Prints the answer, and again when it changes. The agent reports changes; the kernel is not polled.
    fn watch(&self) -> anyhow::Result<()> {
        let Answered { mut explanation, notice, mut tag } = self.now()?;
        if let Some(notice) = notice {
            anyhow::bail!("--watch needs a running agent: {notice}");
        }
        if !self.show(&explanation)? {
            return Ok(());
        }
        // The reason for a missing answer that standard error already has.
        let mut problem: Option<String> = None;
        loop {
            let now = match self.agent.wait(self.args.call, tag.as_deref()) {
                Ok(None) => continue,
                Ok(Some(_)) => self.now().map_err(|error| format!("{error:#}")),
                Err(error) => Err(error.to_string()),
            };
            // A starting agent answers before its first sync, and may be replacing its maps.
            match now.and_then(|now| now.notice.clone().map_or(Ok(now), Err)) {
                Ok(now) => {
                    if problem.take().is_some() {
                        eprintln!("socklb: the agent answers again");
                    }
                    tag = now.tag;
                    if now.explanation != explanation {
                        explanation = now.explanation;
                        if !self.show(&explanation)? {
                            return Ok(());
                        }
                    }
                }
                Err(error) => {
                    if problem.is_none() {
                        eprintln!("socklb: {error}; the kernel keeps serving; waiting for the agent");
                    }
                    problem = Some(error);
                    tag = None;
                    thread::sleep(RETRY);
                }
            }
        }
    }

    /// Prints one answer of a watch. `false` once the reader has closed standard output.
    fn show(&self, explanation: &Explanation) -> anyhow::Result<bool> {
        let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
        let time = now.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string();
        super::show_more(&match self.args.output {
            Output::Table => format!("{time} {}\n", explanation.line()),
            Output::Json => format!("{}\n", serde_json::to_string(&Timed { time, explanation })?),
            Output::Yaml => format!("---\n{}", serde_saphyr::to_string(&Timed { time, explanation })?),
        })
    }
}

/// One answer of a watch, with its time in RFC 3339.
#[derive(Serialize)]
struct Timed<'a> {
    time: String,
    #[serde(flatten)]
    explanation: &'a Explanation,
}

fn read(pins: &PinArgs) -> anyhow::Result<(Maps, Image)> {
    let maps = Maps::open(&pins.pin_path)?;
    let image = maps.image()?;
    Ok((maps, image))
}

/// `socklb explain`
///
/// # Errors
///
/// If nothing is pinned or readable, or the network namespace does not exist; with `--watch` also without an
/// agent.
pub fn explain(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let (packet, nftables) = (packet(args)?, RefCell::new(Nftables::open()));
    let netns = args.netns.as_ref().map(|path| ("--netns".to_owned(), path.clone()));
    let of_pid = args.pid.map(|pid| (format!("--pid {pid}:"), format!("/proc/{pid}/ns/net").into()));
    if let Some((flag, path)) = netns.or(of_pid) {
        let file = std::fs::File::open(&path).with_context(|| format!("{flag} {}", path.display()))?;
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|errno| UsageError(format!("{}: {errno}: name a network namespace", path.display())))?;
    }
    let asked = Asked { args, agent: Agent::new(&args.pins.state_dir), packet, nftables };
    if args.watch {
        asked.watch()?;
        return Ok(ExitCode::SUCCESS);
    }
    let Answered { explanation, notice, .. } = asked.now()?;
    if let Some(notice) = notice {
        eprintln!("socklb: {notice}");
    }
    print(args.output, &explanation, || explanation.text())?;
    Ok(ExitCode::SUCCESS)
}

/// `socklb cleanup`
///
/// # Errors
///
/// If nothing is pinned, or something cannot be removed.
pub fn cleanup(args: &PinArgs) -> anyhow::Result<ExitCode> {
    // If the lock is held, an agent runs. Cleanup does not wait for it: it removes what the agent serves, and
    // the agent attaches nothing again. If the lock is free, holding it keeps an agent from starting before
    // all is removed.
    let lock = if args.pin_path.is_dir() { Lock::try_take(&args.pin_path)? } else { None };
    let agent = (lock.is_none() && args.pin_path.is_dir()).then(|| lock::describe_holder(&args.pin_path));
    let removed = pins::remove(&args.pin_path);
    // After the pins: an agent then does not restore them.
    let tables = remove_tables();
    drop(lock);
    let mut removed = match (removed, &tables) {
        // Rules without pins: of an agent whose BPF file system was unmounted.
        (Err(KernelError::NothingPinned { .. }), Ok(tables)) if !tables.is_empty() => Vec::new(),
        (removed, _) => removed?,
    };
    removed.extend(snapshot::remove(&args.state_dir)?);
    removed.extend(agent_socket::remove_leftover(&args.state_dir));
    // The agent's default cgroup is the root.
    removed.extend(cgroup::find_widest().ok().and_then(|root| self_test::remove_leftover(&root)));
    // Printed last: a closed standard output must not interrupt the work.
    let paths = removed.iter().map(|path| path.display().to_string());
    let of_packets = tables.iter().flatten().map(|id| format!("nftables table {id}"));
    let lines = of_packets.chain(paths).map(|what| format!("removed {what}\n"));
    super::show(&lines.collect::<String>())?;
    if let Some(agent) = agent {
        let name = |variable: &str| std::env::var(variable).ok().filter(|name| !name.is_empty());
        eprintln!(
            "socklb: {}",
            still_runs(&agent, name("POD_NAME").as_deref(), name("NODE_NAME").as_deref())
        );
    }
    let _removed = tables.context("the rules for packets may be left")?;
    Ok(ExitCode::SUCCESS)
}

/// Removes the rules for packets from this network namespace. Returns the tables that there were.
fn remove_tables() -> Result<Vec<TableId>, NftablesError> {
    match Nftables::open().and_then(|mut nftables| nftables.remove(&packets::table_ids())) {
        Err(NftablesError::Missing) => Ok(Vec::new()),
        removed => removed,
    }
}

/// The remedy for an agent that runs during `cleanup`. In a pod its process id is always 1: pod and node
/// identify it.
fn still_runs(holder: &str, pod: Option<&str>, node: Option<&str>) -> String {
    let pod = pod.map(|pod| format!(", pod {pod}")).unwrap_or_default();
    let place = node.map(|node| format!("{pod} on node {node}")).unwrap_or(pod);
    let remedy = if place.is_empty() {
        "stop it, or restart it to serve again"
    } else {
        "remove the DaemonSet, or delete the pod to restart it"
    };
    format!("the agent ({holder}{place}) still runs and serves no calls: {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_in_a_pod_is_named_by_pod_and_node() {
        for (pod, node, expected) in [
            (
                None,
                None,
                "the agent (process 7) still runs and serves no calls: stop it, or restart it to serve again",
            ),
            (
                None,
                Some("node-a"),
                "the agent (process 7 on node node-a) still runs and serves no calls: remove the DaemonSet, or delete the \
                 pod to restart it",
            ),
            (
                Some("socklb-x2x4z"),
                Some("node-a"),
                "the agent (process 7, pod socklb-x2x4z on node node-a) still runs and serves no calls: remove the \
                 DaemonSet, or delete the pod to restart it",
            ),
        ] {
            assert_eq!(still_runs("process 7", pod, node), expected);
        }
    }
}
