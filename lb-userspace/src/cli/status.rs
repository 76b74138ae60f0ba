//! `socklb status`: is it at work, and what does the kernel hold?
//!
//! What is pinned and the snapshot are read here; an agent that runs is asked over HTTP. Each part is told without the
//! others as far as it can be.

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
use lb_kernel::{
    KernelError, Maps, cgroup,
    exclusion::{Exclusion, uid_of},
    host, links,
};
use serde::Deserialize;

use self::report::{AgentPart, ExcludedRow, HookRow, MapRow, SnapshotPart, Status, issues, outdated};
use super::{
    PinArgs,
    config::{self, Listen, SettingsFile, UsageError},
    inspect::{Output, print},
    listing::state_of,
};

/// Flags of `socklb status`. Where they are missing, the settings file of the agent says where it listens.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Settings file of the agent, which says where it listens.
    #[arg(long, env = "SOCKLB_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the agent answers /metrics; empty to not ask it [default: 127.0.0.1:10249]
    #[arg(long, env = "SOCKLB_METRICS_BIND_ADDRESS", value_name = "ADDRESS", value_parser = config::bind_address)]
    metrics_bind_address: Option<Listen>,
    /// Where the agent answers /livez; empty to not ask it [default: 0.0.0.0:10256]
    #[arg(long, env = "SOCKLB_HEALTHZ_BIND_ADDRESS", value_name = "ADDRESS", value_parser = config::bind_address)]
    healthz_bind_address: Option<Listen>,
    /// The cgroup v2 directory in which to look for the one that programs are attached to [default: the root]
    #[arg(long, env = "SOCKLB_CGROUP", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// How to print it.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// Exit status while something is served from an older state.
const OUTDATED: u8 = 3;

/// The keys of the settings file that matter here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct FileConfig {
    metrics_bind_address: Option<String>,
    healthz_bind_address: Option<String>,
}

/// `socklb status`. Changes nothing.
///
/// Exit status 1 if the programs are not attached to all hooks, since calls then go where they say; 3 if they are and a running
/// agent serves an older state than its source has. An agent that does not run is no failure: what is pinned goes on without
/// one.
///
/// # Errors
///
/// [`UsageError`] for settings that cannot be used; else if standard output takes no more.
pub fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let (metrics, healthz) = addresses(args)?;
    let now = SystemTime::now();
    let asked = ask::ask(&args.pins.state_dir, metrics, healthz)?;
    let snapshot = Snapshot::read(&args.pins.state_dir);
    let (maps, problem) = match maps(args) {
        Ok(maps) => (maps, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let hooks = hooks(args);
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
        self_test: asked.self_test().map(|told| match agent.state {
            // Its last one was made before.
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
    Ok(match (status.is_attached(), status.outdated.is_empty()) {
        (false, _) => ExitCode::FAILURE,
        (true, false) => ExitCode::from(OUTDATED),
        (true, true) => ExitCode::SUCCESS,
    })
}

/// Where to ask: by flag, variable, settings file, default.
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

fn maps(args: &StatusArgs) -> Result<Vec<MapRow>, KernelError> {
    let maps = Maps::open(&args.pins.pin_path)?;
    Ok(MapRow::all(&maps.image()?, maps.capacity()))
}

fn hooks(args: &StatusArgs) -> Vec<HookRow> {
    links::look(&args.pins.pin_path, args.cgroup.as_deref())
        .into_iter()
        .map(|(hook, link)| HookRow::new(hook, link))
        .collect()
}

/// What the programs leave alone. Nothing if the maps cannot be read, which is told already.
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

/// Those of others where ours are. None if that cannot be told: `socklb check` says why.
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
