//! Commands that look at pinned state or remove it. None needs a running agent.

use std::{
    collections::BTreeMap, net::SocketAddr, os::fd::AsFd, path::PathBuf, process::ExitCode, str::FromStr,
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use lb_common::layout::EndpointStats;
use nix::sched::{CloneFlags, setns};
use tracing::debug;

use super::{
    PinArgs,
    config::UsageError,
    explain::explain as explain_call,
    listing::{self, list, table},
};
use crate::{
    controller::State,
    desired::FrontendAddress,
    kernel::{
        cgroup,
        lock::{self, Lock},
        pins,
        store::Maps,
        syscall,
    },
    model::Protocol,
    self_test,
    sim::{Caller, Config, Simulator},
    snapshot::{self, Snapshot},
    tables::Image,
};

/// How an answer is printed.
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
    /// How to print it.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// Flags of `socklb explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// ADDRESS:PORT, with /tcp (the default) or /udp behind it; IPv6 as [ADDRESS]:PORT.
    call: Call,
    /// Ask for a program in this network namespace, such as /run/netns/NAME [default: the own one]
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    netns: Option<PathBuf>,
    /// Ask for a program in the network namespace of this process.
    #[arg(long)]
    pid: Option<u32>,
    /// How to print it.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// A destination as typed.
#[derive(Clone, Copy, Debug)]
struct Call(FrontendAddress);

impl FromStr for Call {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, protocol) = match text.rsplit_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((address, "udp")) => (address, Protocol::Udp),
            Some((_, other)) => return Err(format!("{other:?}: expected tcp or udp")),
        };
        let address: SocketAddr = address
            .parse()
            .map_err(|_hint| "expected ADDRESS:PORT, such as 10.96.0.1:443 or [fd00::1]:53/udp".to_owned())?;
        Ok(Self(FrontendAddress { ip: address.ip(), port: address.port(), protocol }))
    }
}

/// What commands look at: the kernel's tables, and the objects behind them as far as they are known.
struct Pinned {
    maps: Maps,
    image: Image,
    objects: Option<State>,
    config: Config,
}

impl Pinned {
    fn open(pins: &PinArgs) -> anyhow::Result<Self> {
        let maps = Maps::open(&pins.pin_path)?;
        let image = maps.image()?;
        let snapshot = match Snapshot::read(&pins.state_dir) {
            Ok(snapshot) => Some(snapshot),
            Err(error) => {
                // Without it the tables are shown all the same, only without names.
                eprintln!("socklb: names are missing: {error}");
                None
            }
        };
        let meta = maps.meta();
        let config = Config {
            node_ports: (meta.node_port_first, meta.node_port_last),
            localhost_nodeports: meta.localhost_nodeports != 0,
        };
        Ok(Self { maps, image, objects: snapshot.map(listing::state_of), config })
    }
}

/// Prints in the way that was asked for.
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

/// `socklb services`
///
/// # Errors
///
/// If nothing is pinned or it cannot be read.
pub fn services(args: &ServicesArgs) -> anyhow::Result<ExitCode> {
    let pinned = Pinned::open(&args.pins)?;
    let mut stats: BTreeMap<u32, EndpointStats> = BTreeMap::new();
    let runs = pinned.image.runs4.values().chain(pinned.image.runs6.values());
    for entry in runs.flat_map(|entries| entries.iter()) {
        stats.insert(entry.endpoint_id, pinned.maps.endpoint_stats(entry.endpoint_id)?);
    }
    let mut rows = list(&pinned.image, pinned.objects.as_ref(), &stats);
    if let Some(namespace) = &args.namespace {
        rows.retain(|row| row.namespace == *namespace);
    }
    print(args.output, &rows, || table(&rows))?;
    Ok(ExitCode::SUCCESS)
}

/// `socklb explain`
///
/// # Errors
///
/// If nothing is pinned, it cannot be read, or the network namespace does not exist.
pub fn explain(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let pinned = Pinned::open(&args.pins)?;
    let node = pinned.maps.meta().node_netns;
    let netns = args.netns.clone().or_else(|| args.pid.map(|pid| format!("/proc/{pid}/ns/net").into()));
    if let Some(path) = netns {
        let file = std::fs::File::open(&path)
            .with_context(|| format!("{}: no such network namespace", path.display()))?;
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|errno| UsageError(format!("{}: {errno}: name a network namespace", path.display())))?;
    }
    let own = syscall::netns_cookie();
    debug!(?own, node, "network namespaces");
    // Before kernel 5.14 the cookie cannot be read: then the caller is taken to be on the node.
    let caller = Caller {
        netns: own.unwrap_or_default(),
        on_node: own.is_none_or(|own| node == 0 || own == node),
        earlier: None,
    };
    let mut simulator = Simulator::new(pinned.image);
    simulator.config = pinned.config;
    let explanation = explain_call(&simulator, pinned.objects.as_ref(), args.call.0, caller);
    print(args.output, &explanation, || explanation.text())?;
    Ok(ExitCode::SUCCESS)
}

/// `socklb cleanup`
///
/// # Errors
///
/// If nothing is there, or something cannot be removed.
pub fn cleanup(args: &PinArgs) -> anyhow::Result<ExitCode> {
    // Without the lock an agent is at work. It is not waited for: what it serves is taken away from under it, and it
    // attaches nothing anew. With the lock none begins before everything is gone.
    let lock = if args.pin_path.is_dir() { Lock::try_take(&args.pin_path)? } else { None };
    let agent = (lock.is_none() && args.pin_path.is_dir()).then(|| lock::describe_holder(&args.pin_path));
    let mut removed = pins::remove(&args.pin_path)?;
    drop(lock);
    removed.extend(snapshot::remove(&args.state_dir)?);
    // An agent serves the root, unless it is told otherwise.
    removed.extend(cgroup::find_widest().ok().and_then(|root| self_test::remove_leftover(&root)));
    // After the work: a reader that goes away does not stop it half-way.
    let lines = removed.iter().map(|path| format!("removed {}\n", path.display()));
    super::show(&lines.collect::<String>())?;
    if let Some(agent) = agent {
        eprintln!("socklb: the agent ({agent}) still runs and serves nothing any longer: end it");
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_typed_as_people_write_them() {
        let parse = |text: &str| text.parse::<Call>().map(|Call(call)| call.to_string());
        assert_eq!(parse("10.96.0.1:443"), Ok("10.96.0.1:443/tcp".into()));
        assert_eq!(parse("10.96.0.1:443/tcp"), Ok("10.96.0.1:443/tcp".into()));
        assert_eq!(parse("[fd00::1]:53/udp"), Ok("[fd00::1]:53/udp".into()));
        for wrong in ["", "10.96.0.1", "10.96.0.1:443/icmp", "fd00::1:53", "10.96.0.1:65536"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
