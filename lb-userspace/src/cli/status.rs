//! `socklb status`: does the agent run, and what does the kernel hold?
//!
//! Reads the pins and the snapshot, and asks a running agent over HTTP. Each part is reported independently
//! of the others.

mod ask;
mod report;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::Args;
use lb_agent::snapshot::{self, Snapshot, SnapshotError};
use lb_core::packets;
use lb_kernel::{
    KernelError, Maps, cgroup,
    exclusion::{Exclusion, uid_of},
    host, links,
    nftables::{Nftables, NftablesError},
};
use serde::Deserialize;

use self::report::{
    AgentPart, ExcludedRow, HookRow, MapRow, PacketsPart, SnapshotPart, Status, issues, outdated,
};
use super::{
    PinArgs,
    config::{self, Listen, SettingsFile, UsageError},
    inspect::{Output, print},
    listing::state_of,
};

/// Flags of `socklb status`. Addresses without a flag come from the agent's settings file.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Settings file of the agent, for the addresses on which it listens.
    #[arg(long, env = "SOCKLB_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of the agent's /metrics; empty to skip it [default: 127.0.0.1:10249]
    #[arg(long, env = "SOCKLB_METRICS_BIND_ADDRESS", value_name = "ADDRESS", value_parser = config::bind_address)]
    metrics_bind_address: Option<Listen>,
    /// Address of the agent's /livez; empty to skip it [default: 0.0.0.0:10256]
    #[arg(long, env = "SOCKLB_HEALTHZ_BIND_ADDRESS", value_name = "ADDRESS", value_parser = config::bind_address)]
    healthz_bind_address: Option<Listen>,
    /// The cgroup v2 directory to search for the cgroup that programs are attached to [default: the root]
    #[arg(long, env = "SOCKLB_CGROUP", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// Exit status while an older state is served.
const OUTDATED: u8 = 3;

/// The keys of the settings file that are read here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct FileConfig {
    metrics_bind_address: Option<String>,
    healthz_bind_address: Option<String>,
}

/// `socklb status`. Changes nothing.
///
/// Exit status 1 if a hook lacks its program, since its calls then pass unchanged, or if the kernel lacks a
/// running agent's nftables table; 3 if all are there and a running agent serves a state older than its
/// source. A stopped agent is no failure: the pins keep serving.
///
/// # Errors
///
/// [`UsageError`] for unusable settings; else if standard output cannot be written.
pub fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let (metrics, healthz) = addresses(args)?;
    let now = SystemTime::now();
    let asked = ask::ask(&args.pins.state_dir, metrics, healthz)?;
    let snapshot = Snapshot::read(&args.pins.state_dir);
    let (maps, passive_health, problem) = match maps(args) {
        Ok((maps, passive_health)) => (maps, passive_health, None),
        Err(error) => (Vec::new(), true, Some(error.to_string())),
    };
    let hooks = hooks(args, passive_health);
    let (known, unknown) = match asked.known.clone() {
        Some(Ok(known)) => (Some(known), None),
        Some(Err(error)) => (None, Some(error)),
        None => (None, None),
    };
    let source = asked.source(now);
    let listed = known.as_ref().map_or(&[][..], |known| &known.issues);
    let outdated = outdated(source.as_ref(), asked.healthz().as_ref(), listed);
    let save_problem = known.as_ref().and_then(|known| known.save_problem.clone());
    let agent = AgentPart::new(&asked, &hooks);
    let status = Status {
        packets: PacketsPart::new(tables(), known.as_ref(), now),
        self_test: asked.self_test().map(|told| match agent.state {
            // The last self-test ran before the programs were detached.
            "detached" => "out of date: the programs are no longer attached".to_owned(),
            _ => told,
        }),
        agent,
        source,
        outdated,
        refused_sizes: asked.refused_sizes(),
        snapshot: snapshot_part(args, snapshot.as_ref(), now, save_problem),
        pin_path: args.pins.pin_path.clone(),
        pin_problem: problem,
        maps,
        covers: hooks.iter().find_map(|hook| hook.cgroup.as_deref()).map(cgroup::extent),
        excluded_cgroups: excluded_cgroups(args),
        other_programs: other_programs(args, &hooks),
        hooks,
        n_issues: known.as_ref().map(|known| known.issues.len()),
        issues_problem: unknown.filter(|_| asked.is_socklb() == Some(true)),
        issues: match known {
            Some(known) => known.issues,
            None => snapshot.map(|snapshot| issues(&state_of(snapshot))).unwrap_or_default(),
        },
    };
    print(args.output, &status, || status.text())?;
    let is_whole = status.is_attached() && status.has_tables();
    Ok(match (is_whole, status.outdated.is_empty()) {
        (false, _) => ExitCode::FAILURE,
        (true, false) => ExitCode::from(OUTDATED),
        (true, true) => ExitCode::SUCCESS,
    })
}

/// The addresses to ask, from flag, variable, settings file or default.
fn addresses(args: &StatusArgs) -> Result<(Option<SocketAddr>, Option<SocketAddr>), UsageError> {
    let (file, values): (SettingsFile, FileConfig) =
        args.config.as_deref().map(SettingsFile::read).transpose()?.unwrap_or_default();
    let choose = |flag: Option<Listen>, key: &str, text: Option<String>, default| {
        let from_file = || file.value(key, text, config::bind_address);
        let Listen(address) =
            flag.map_or_else(from_file, |flag| Ok(Some(flag)))?.unwrap_or(Listen(Some(default)));
        Ok::<_, UsageError>(address.map(ask::reachable))
    };
    Ok((
        choose(
            args.metrics_bind_address,
            "metrics-bind-address",
            values.metrics_bind_address,
            config::METRICS,
        )?,
        choose(
            args.healthz_bind_address,
            "healthz-bind-address",
            values.healthz_bind_address,
            config::HEALTHZ,
        )?,
    ))
}

/// The maps, and whether the programs were loaded with passive health.
fn maps(args: &StatusArgs) -> Result<(Vec<MapRow>, bool), KernelError> {
    let maps = Maps::open(&args.pins.pin_path)?;
    Ok((MapRow::all(&maps.image()?, maps.capacity()), maps.meta().passive_health != 0))
}

/// The tables for packets that the kernel has.
fn tables() -> Result<Vec<String>, String> {
    let find = || {
        let mut nftables = Nftables::open()?;
        let mut found = Vec::new();
        for id in packets::table_ids() {
            if nftables.has(&id)? {
                found.push(id.to_string());
            }
        }
        Ok(found)
    };
    match find() {
        Err(NftablesError::Missing) => Ok(Vec::new()),
        found => found.map_err(|error| error.to_string()),
    }
}

fn hooks(args: &StatusArgs, passive_health: bool) -> Vec<HookRow> {
    links::read_all(&args.pins.pin_path, args.cgroup.as_deref(), passive_health)
        .into_iter()
        .map(|(hook, link)| HookRow::new(hook, link))
        .collect()
}

/// The excluded cgroups. Empty if the maps cannot be read, which is reported elsewhere.
fn excluded_cgroups(args: &StatusArgs) -> Vec<ExcludedRow> {
    let ids = Exclusion::open(&args.pins.pin_path).and_then(|map| map.ids()).unwrap_or_default();
    let root = cgroup::find_widest().ok().filter(|_| !ids.is_empty());
    let mut directories = root.map(|root| cgroup::directories_of(&ids, &root)).unwrap_or_default();
    let rows = ids.into_iter().map(|id| {
        let cgroup = directories.remove(&id);
        ExcludedRow { pod_uid: cgroup.as_deref().and_then(uid_of), cgroup, id }
    });
    rows.collect()
}

/// Foreign programs on the hooks. Empty if they cannot be listed: `socklb check` says why.
fn other_programs(args: &StatusArgs, hooks: &[HookRow]) -> BTreeMap<String, Vec<&'static str>> {
    let cgroup = hooks.iter().find_map(|hook| hook.cgroup.as_deref());
    let found = cgroup.map(|cgroup| host::neighbours(cgroup, &args.pins.pin_path));
    found.and_then(Result::ok).unwrap_or_default()
}

fn snapshot_part(
    args: &StatusArgs,
    snapshot: Result<&Snapshot, &SnapshotError>,
    now: SystemTime,
    write_problem: Option<String>,
) -> SnapshotPart {
    let path = args.pins.state_dir.join(snapshot::FILE_NAME);
    let age = snapshot::modified(&args.pins.state_dir)
        .map(|written| now.duration_since(written).unwrap_or(Duration::ZERO));
    SnapshotPart::new(path, age, snapshot, write_problem)
}
