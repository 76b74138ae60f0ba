//! The answer of `socklb status`. Pure. The types are the public JSON; field names are stable.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use lb_agent::{
    serve::known::Known,
    snapshot::{Snapshot, SnapshotError},
};
use lb_common::limits;
use lb_core::{model::Issue, plan::Capacity, state::State, tables::Image};
use lb_kernel::{
    cgroup::Extent,
    links::{Link, LinkProblem},
};
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::ask::{Answer, Asked};

/// All parts of the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Status {
    pub(super) agent: AgentPart,
    /// `passed`, or what failed; `null` if no agent answers or self-tests are off.
    pub(super) self_test: Option<String>,
    /// `null` if no agent answers at its metrics address.
    pub(super) source: Option<SourcePart>,
    pub(super) snapshot: SnapshotPart,
    /// The directory searched for maps and links.
    pub(super) pin_path: PathBuf,
    /// Why the maps cannot be read.
    pub(super) pin_problem: Option<String>,
    pub(super) maps: Vec<MapRow>,
    pub(super) hooks: Vec<HookRow>,
    /// Which processes the hooks cover: `host`, `node` (which is itself a container) or `cgroup`; `null` if
    /// their cgroup is not found.
    pub(super) covers: Option<Extent>,
    /// The nftables rules for packets; `null` with `--packets=off`.
    pub(super) packets: Option<PacketsPart>,
    /// The excluded cgroups.
    pub(super) excluded_cgroups: Vec<ExcludedRow>,
    /// Foreign programs on the same hooks of the same cgroup, each with its hooks. They run too.
    pub(super) other_programs: BTreeMap<String, Vec<&'static str>>,
    /// Number of issues of a running agent; `null` if no agent answers.
    #[serde(rename = "issues_of_agent")]
    pub(super) n_issues: Option<usize>,
    /// Issues of a running agent; without one, of the snapshot's objects.
    pub(super) issues: Vec<Issue>,
    /// Map sizes that a running agent refused, and why.
    pub(super) refused_sizes: Vec<String>,
    /// What is served from an older state than the objects, and why.
    pub(super) outdated: Vec<String>,
    /// Why a running agent does not list its issues.
    pub(super) issues_problem: Option<String>,
}

/// Whether an agent runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct AgentPart {
    /// `running`, `stuck` (it answers, but changes wait or its loop hangs), `detached` (it answers, but its
    /// programs are not attached, as after `socklb cleanup`), `stopped`, or `unknown`.
    pub(super) state: &'static str,
    /// Whether the node should get traffic from outside: `/healthz`. `null` without an answer.
    pub(super) healthy: Option<bool>,
    /// The reason for `state`, in a sentence.
    pub(super) reason: String,
    /// The reasons that the agent gives.
    pub(super) not_ready: Vec<String>,
}

/// An age in seconds; in JSON rounded to a tenth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Age(pub(super) f64);

impl Serialize for Age {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64((self.0 * 10.0).round() / 10.0)
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0;
        match seconds {
            s if s < 120.0 => write!(f, "{s:.0} s"),
            s if s < 2.0 * 3600.0 => write!(f, "{:.0} min", s / 60.0),
            s if s < 2.0 * 86_400.0 => write!(f, "{:.0} h", s / 3600.0),
            s => write!(f, "{:.0} days", s / 86_400.0),
        }
    }
}

/// The source, by a running agent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct SourcePart {
    /// `kube`, or `file:` and the path.
    pub(super) source: String,
    #[serde(rename = "complete")]
    pub(super) is_complete: bool,
    pub(super) serves_snapshot: bool,
    /// Of the last change that queued a sync; `null` before the first.
    pub(super) last_event_age_seconds: Option<Age>,
    /// Of the last successful sync; `null` before the first.
    pub(super) last_sync_age_seconds: Option<Age>,
    pub(super) changes_waiting: u64,
    pub(super) sync_errors: u64,
}

/// The snapshot on disk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct SnapshotPart {
    pub(super) path: PathBuf,
    /// `null` if no snapshot can be read.
    pub(super) age_seconds: Option<Age>,
    pub(super) services: usize,
    pub(super) endpoint_slices: usize,
    pub(super) nodes: usize,
    pub(super) problem: Option<String>,
    /// Why a running agent's last write failed.
    pub(super) write_problem: Option<String>,
}

/// The nftables rules for packets.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct PacketsPart {
    /// The tables that the kernel has, such as `ip socklb`.
    pub(super) tables: Vec<String>,
    /// A running agent's tables that it lacks.
    pub(super) missing_tables: Vec<String>,
    /// What a running agent knows of them; `null` if no agent answers.
    pub(super) frontends: Option<usize>,
    pub(super) elements: Option<usize>,
    /// `null` also before the first.
    pub(super) last_transaction: Option<TransactionPart>,
    /// Why the rules are not up to date.
    pub(super) problem: Option<String>,
}

/// The last transaction that changed the rules.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct TransactionPart {
    /// Number of changes; many elements of one set are one change.
    pub(super) changes: usize,
    pub(super) duration_seconds: f64,
    pub(super) age_seconds: Age,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct MapRow {
    pub(super) map: &'static str,
    /// Entries that calls can find. Entries in their grace period are not counted.
    pub(super) entries: usize,
    pub(super) capacity: u32,
}

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct HookRow {
    pub(super) hook: &'static str,
    /// `attached`, `missing`, `detached` (its cgroup is gone), or `unknown`.
    pub(super) state: &'static str,
    /// The cgroup's directory, if found.
    pub(super) cgroup: Option<PathBuf>,
    pub(super) program_id: Option<u32>,
    /// The reason for `state`, if it needs one.
    pub(super) problem: Option<String>,
}

/// An excluded cgroup, with all below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct ExcludedRow {
    /// Its directory; `null` if not found, most often because it was just removed.
    pub(super) cgroup: Option<PathBuf>,
    pub(super) id: u64,
    /// The pod's UID, from the name that the kubelet gave the cgroup.
    pub(super) pod_uid: Option<String>,
}

impl AgentPart {
    /// Decides by the answers and the hooks.
    pub(super) fn new(asked: &Asked, hooks: &[HookRow]) -> Self {
        let is_ok = |answer: &Answer| matches!(answer, Ok((200, _)));
        let healthy = asked.health.as_ref().and_then(|(_, _, healthz)| {
            // Another program's answer says nothing about this agent.
            (asked.is_socklb() != Some(false))
                .then(|| healthz.as_ref().ok().map(|(status, _)| *status == 200))
                .flatten()
        });
        let (state, reason) = match (&asked.name, &asked.health) {
            (None, None) => {
                let unheard = asked.known.as_ref().and_then(|known| known.as_ref().err());
                let unheard = unheard.map(|error| format!("{error}, and ")).unwrap_or_default();
                ("unknown", format!("{unheard}no other address to ask: see --metrics-bind-address"))
            }
            (Some((address, Ok((_, name)))), _) if asked.is_socklb() == Some(false) => {
                let name = name.lines().next().unwrap_or_default();
                ("stopped", format!("another program answers at {address}: /proxyMode says {name:?}"))
            }
            (Some((_, Err(error))), _) => ("stopped", error.clone()),
            (_, Some((address, livez, _))) if is_ok(livez) => {
                ("running", format!("{address}: /livez says 200"))
            }
            (None, Some((_, Err(error), _))) => ("stopped", error.clone()),
            (_, Some((_, Err(error), _))) => ("stuck", error.clone()),
            (_, Some((address, Ok((status, _)), _))) => ("stuck", format!("{address}: /livez says {status}")),
            (Some((address, _)), None) => ("running", format!("it answers at {address}")),
        };
        let has_programs = hooks.iter().any(|hook| matches!(hook.state, "attached" | "unknown"));
        // While the programs are being loaded, the key is missing.
        let has_started = asked.healthz().is_none_or(|body| !body["nodeEligible"].is_null());
        let (state, reason) = match state {
            "running" if !has_programs && has_started => (
                "detached",
                format!("{reason}, but it serves no calls: its programs are not attached; restart it"),
            ),
            state => (state, reason),
        };
        let not_ready = if healthy == Some(false) { asked.not_ready() } else { Vec::new() };
        Self { state, healthy, reason, not_ready }
    }
}

impl SnapshotPart {
    pub(super) fn new(
        path: PathBuf,
        age: Option<Duration>,
        snapshot: Result<&Snapshot, &SnapshotError>,
        write_problem: Option<String>,
    ) -> Self {
        let (services, endpoint_slices, nodes) = snapshot
            .map(|found| {
                let ours = found.services.iter().filter(|service| service.unselected.is_none());
                (ours.count(), found.slices.len(), found.nodes.len())
            })
            .unwrap_or_default();
        let problem = snapshot.err().map(ToString::to_string);
        let age = age.filter(|_| problem.is_none()).map(|age| Age(age.as_secs_f64()));
        Self { path, age_seconds: age, services, endpoint_slices, nodes, problem, write_problem }
    }
}

impl PacketsPart {
    /// Joins the kernel's tables with what a running agent says. `None` if both have none.
    pub(super) fn new(
        tables: Result<Vec<String>, String>,
        known: Option<&Known>,
        now: SystemTime,
    ) -> Option<Self> {
        let agent = known.and_then(|known| known.packets.as_ref());
        let (tables, unread) = match tables {
            Ok(tables) => (tables, None),
            Err(problem) => (Vec::new(), Some(problem)),
        };
        if agent.is_none() && tables.is_empty() {
            return None;
        }
        let last = agent.and_then(|agent| agent.last);
        // Before the first transaction there is none to miss.
        let kept = agent.filter(|_| last.is_some() && unread.is_none());
        let kept = kept.map(|agent| &agent.tables[..]).unwrap_or_default();
        let missing_tables = kept.iter().filter(|table| !tables.contains(table)).cloned().collect();
        let stale = || {
            known.filter(|_| agent.is_none()).map(|_| {
                "the agent runs with --packets=off, and could not remove these rules: restart it, or run `socklb \
                 cleanup`"
                    .to_owned()
            })
        };
        let of_agent = agent.and_then(|agent| agent.problem.as_ref()).map(ToString::to_string);
        Some(Self {
            tables,
            missing_tables,
            frontends: agent.map(|agent| agent.n_frontends),
            elements: agent.map(|agent| agent.n_elements),
            last_transaction: last.map(|last| TransactionPart {
                changes: last.n_changes,
                duration_seconds: last.took.as_secs_f64(),
                age_seconds: Age(now.duration_since(last.at).unwrap_or_default().as_secs_f64()),
            }),
            problem: of_agent.or(unread).or_else(stale),
        })
    }

    fn text(&self) -> String {
        let mut parts = Vec::new();
        if !self.tables.is_empty() {
            let sizes = self.frontends.zip(self.elements);
            let sizes = sizes.map(|(n, elements)| format!(": {n} frontends, {elements} elements"));
            parts.push(format!("nftables tables {}{}", self.tables.join(", "), sizes.unwrap_or_default()));
        }
        if !self.missing_tables.is_empty() {
            let missing = self.missing_tables.join(", ");
            parts.push(format!(
                "the kernel lacks {missing}: packets are not served; the next audit restores it (--audit-interval), unless \
                 `socklb cleanup` removed it"
            ));
        }
        if let Some(TransactionPart { changes, duration_seconds, age_seconds }) = self.last_transaction {
            let milliseconds = duration_seconds * 1000.0;
            parts.push(format!(
                "last transaction {age_seconds} ago: {changes} changes in {milliseconds:.1} ms"
            ));
        } else if self.frontends.is_some() {
            parts.push("no transaction yet".to_owned());
        }
        parts.extend(self.problem.clone());
        format!("packets   {}\n", parts.join("\n          "))
    }
}

impl MapRow {
    /// The maps that can be full.
    pub(super) fn all(image: &Image, capacity: Capacity) -> Vec<Self> {
        let services = |ipv6| image.services.keys().filter(|address| address.ip.is_ipv6() == ipv6).count();
        let endpoints = |ipv6| image.runs(ipv6).values().map(|run| run.entries().len()).sum();
        [
            ("services4", services(false), capacity.services),
            ("services6", services(true), capacity.services),
            ("frontends", image.frontends.len(), capacity.services.saturating_mul(2)),
            ("endpoints4", endpoints(false), capacity.endpoints),
            ("endpoints6", endpoints(true), capacity.endpoints),
            ("node_addrs", image.node_addrs.len(), limits::MAX_NODE_ADDRS),
        ]
        .map(|(map, entries, capacity)| Self { map, entries, capacity })
        .into()
    }
}

impl HookRow {
    /// Whether this hook's calls are served, or the hook is not needed.
    fn is_served(&self) -> bool {
        matches!(self.state, "attached" | "not needed")
    }

    pub(super) fn new(hook: &'static str, link: Result<Link, LinkProblem>) -> Self {
        match link {
            Ok(Link { program_id, cgroup, is_effective }) => {
                let problem = match (&cgroup, is_effective) {
                    (None, _) => {
                        Some("its cgroup is not below the directory that was searched: see --cgroup")
                    }
                    (Some(_), Some(false)) => {
                        Some("the kernel does not list it among the programs of its cgroup")
                    }
                    (Some(_), _) => None,
                };
                let state = if is_effective == Some(false) { "detached" } else { "attached" };
                Self {
                    hook,
                    state,
                    cgroup,
                    program_id: Some(program_id),
                    problem: problem.map(str::to_owned),
                }
            }
            Err(problem) => {
                let state = match problem {
                    LinkProblem::Missing | LinkProblem::NotNeeded => "missing",
                    LinkProblem::Detached => "detached",
                    LinkProblem::Io(_) => "unknown",
                };
                let is_fine = matches!(problem, LinkProblem::NotNeeded);
                let state = if is_fine { "not needed" } else { state };
                Self { hook, state, cgroup: None, program_id: None, problem: Some(problem.to_string()) }
            }
        }
    }
}

/// The issues of a state's objects, sorted and deduplicated.
pub(super) fn issues(state: &State) -> Vec<Issue> {
    state.issues().collect::<BTreeSet<_>>().into_iter().collect()
}

/// What is served from an older state, by the agent's `/healthz`, metrics and issues.
pub(super) fn outdated(
    source: Option<&SourcePart>,
    healthz: Option<&Value>,
    issues: &[Issue],
) -> Vec<String> {
    let away = healthz.map(|body| &body["source"]).filter(|away| away.is_object());
    let of_source = match away {
        Some(away) => {
            let served = match away["serves"].as_str() {
                Some("last-known") => "the last known objects",
                Some("found") => "the state of an earlier agent in the kernel",
                Some("snapshot") => "the snapshot",
                Some("nothing") => "nothing",
                _ => "an older state",
            };
            let part = |key: &str, before: &str| away[key].as_str().map(|text| format!("{before}{text}"));
            let since = part("since", ", since ").unwrap_or_default();
            let problem =
                part("problem", ": ").unwrap_or_else(|| ": its first lists are not complete".to_owned());
            Some(format!("the source does not answer{since}{problem}; serving {served}"))
        }
        None if source.is_some_and(|source| source.serves_snapshot) => {
            Some("the source does not answer; the snapshot is served".to_owned())
        }
        None => None,
    };
    let of_files = issues.iter().filter(|issue| issue.kind.is_outdated());
    of_source.into_iter().chain(of_files.map(ToString::to_string)).collect()
}

/// Maximum number of issues in the table; the rest is counted.
const SHOWN_ISSUES: usize = 20;

impl Status {
    /// Whether calls are served: every hook that this kernel needs has its program.
    pub(super) fn is_attached(&self) -> bool {
        self.hooks.iter().all(HookRow::is_served)
    }

    /// Whether the kernel has the tables of a running agent.
    pub(super) fn has_tables(&self) -> bool {
        self.packets.as_ref().is_none_or(|packets| packets.missing_tables.is_empty())
    }

    /// The hooks whose calls pass unchanged because their program is missing, and the hooks of unknown state.
    fn hook_lines(&self) -> impl Iterator<Item = String> {
        let names = |is_unknown: bool| {
            let wanted = self.hooks.iter().filter(|hook| !hook.is_served());
            let wanted = wanted.filter(|hook| (hook.state == "unknown") == is_unknown);
            wanted.map(|hook| hook.hook).collect::<Vec<_>>().join(" ")
        };
        let line = |names: String, before, after| {
            (!names.is_empty()).then(|| format!("hooks     {before}: {names}{after}; see HOOK"))
        };
        let missing =
            if self.hooks.iter().all(|hook| matches!(hook.state, "missing" | "detached" | "not needed")) {
                Some("hooks     no program is attached: no calls are served; see HOOK".to_owned())
            } else {
                line(names(false), "not attached", ": calls of these kinds are not served")
            };
        missing.into_iter().chain(line(names(true), "not known", ""))
    }

    /// The report as text.
    pub(super) fn text(&self) -> String {
        let mut lines = [
            format!("agent     {}: {}", self.agent.state, self.agent.reason),
            format!("source    {}", self.source_line()),
            format!("snapshot  {}", self.snapshot_line()),
            format!("pins      {}", self.pin_path.display()),
        ];
        let not_ready = &self.agent.not_ready;
        if self.agent.healthy == Some(false) && not_ready.is_empty() {
            lines[0].push_str(", /healthz says that this node should get no traffic");
        }
        lines[0].extend(not_ready.iter().map(|reason| format!("\n          not ready: {reason}")));
        if let Some(problem) = &self.pin_problem {
            lines[3] = format!("pins      {problem}");
        }
        let refused = self.refused_sizes.iter().map(|size| format!("refused   {size}"));
        let outdated = self.outdated.iter().map(|what| format!("outdated  {what}"));
        let mut text = lines
            .into_iter()
            .chain(self.hook_lines())
            .chain(refused)
            .chain(outdated)
            .collect::<Vec<_>>()
            .join("\n")
            + "\n";
        if let Some(covers) = &self.covers {
            let _infallible = writeln!(text, "covers    {covers}");
        }
        text.extend(self.packets.as_ref().map(PacketsPart::text));
        if let Some(self_test) = &self.self_test {
            let _infallible = writeln!(text, "self-test {self_test}");
        }
        if !self.maps.is_empty() {
            let _infallible =
                writeln!(text, "\n{:<12}  {:>8}  {:>8}  {:>5}", "MAP", "ENTRIES", "CAPACITY", "FULL");
            for MapRow { map, entries, capacity } in &self.maps {
                let full =
                    entries.saturating_mul(100) / usize::try_from(*capacity).unwrap_or(usize::MAX).max(1);
                let _infallible = writeln!(text, "{map:<12}  {entries:>8}  {capacity:>8}  {full:>3} %");
            }
        }
        text.push_str(&self.hook_table());
        text.push_str(&self.excluded_list());
        if !self.other_programs.is_empty() {
            text.push_str(
                "\nOTHER PROGRAMS ON THE SAME HOOKS (they may change a call before or after socklb)\n",
            );
            for (name, hooks) in &self.other_programs {
                let _infallible = writeln!(text, "  {name}: {}", hooks.join(" "));
            }
        }
        text.push_str(&self.issue_list());
        text
    }

    fn source_line(&self) -> String {
        let Some(source) = &self.source else {
            return "not known: no agent answers".to_owned();
        };
        let state = match (source.is_complete, source.serves_snapshot) {
            (true, _) => "first lists complete",
            (false, true) => "does not answer; the snapshot is served",
            (false, false) => "first lists not complete; nothing is changed until then",
        };
        let ago = |age: Option<Age>| age.map_or_else(|| "never".to_owned(), |age| format!("{age} ago"));
        let mut line = format!("{}: {state}", source.source);
        let _infallible = write!(line, "\n          last event {}", ago(source.last_event_age_seconds));
        let _infallible = write!(line, ", last sync {}", ago(source.last_sync_age_seconds));
        let _infallible = write!(line, ", {} changes waiting", source.changes_waiting);
        if source.sync_errors > 0 {
            let _infallible = write!(line, ", {} syncs failed", source.sync_errors);
        }
        line
    }

    fn snapshot_line(&self) -> String {
        let part = &self.snapshot;
        let SnapshotPart { path, age_seconds, services, endpoint_slices, nodes, .. } = part;
        let mut line = part.problem.clone().unwrap_or_else(|| {
            let age = age_seconds.map_or_else(String::new, |age| format!(", {age} old"));
            format!("{}: {services} services, {endpoint_slices} slices, {nodes} nodes{age}", path.display())
        });
        if let Some(problem) = &part.write_problem {
            let _infallible = write!(line, "\n          the last write failed: {problem}");
        }
        line
    }

    fn hook_table(&self) -> String {
        let mut text = format!("\n{:<12}  {:<10}  {}\n", "HOOK", "STATE", "CGROUP");
        for HookRow { hook, state, cgroup, problem, .. } in &self.hooks {
            let place = cgroup.as_ref().map(|path| path.display().to_string());
            let parts: Vec<String> = place.into_iter().chain(problem.clone()).collect();
            let line = format!("{hook:<12}  {state:<10}  {}", parts.join(": "));
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    fn excluded_list(&self) -> String {
        let mut text = String::new();
        if !self.excluded_cgroups.is_empty() {
            text.push_str("\nEXCLUDED CGROUPS (their calls pass unchanged)\n");
        }
        for ExcludedRow { cgroup, id, pod_uid } in &self.excluded_cgroups {
            let place = cgroup
                .as_ref()
                .map_or_else(|| format!("not found: id {id}"), |path| path.display().to_string());
            let pod = pod_uid.as_ref().map_or_else(String::new, |uid| format!(" (pod {uid})"));
            let _infallible = writeln!(text, "  {place}{pod}");
        }
        text
    }

    fn issue_list(&self) -> String {
        let mut text = String::new();
        let title = match (self.n_issues, &self.issues_problem) {
            (Some(0), _) => return "\nno issues\n".to_owned(),
            (Some(n), _) => format!("ISSUES ({n})"),
            (None, _) if self.snapshot.problem.is_some() => "issues are not known".to_owned(),
            (None, problem) => {
                let problem =
                    problem.as_ref().map(|problem| format!("; those of the agent are not known: {problem}"));
                let problem = problem.unwrap_or_default();
                match self.issues.len() {
                    0 => format!("no issues of the snapshot's objects{problem}"),
                    n => format!("ISSUES ({n} of the snapshot's objects{problem})"),
                }
            }
        };
        let _infallible = writeln!(text, "\n{title}");
        for issue in self.issues.iter().take(SHOWN_ISSUES) {
            let _infallible = writeln!(text, "  {issue}");
        }
        let n_more = self.issues.len().saturating_sub(SHOWN_ISSUES);
        if n_more > 0 {
            let _infallible = writeln!(text, "  and {n_more} more: -o json lists all");
        }
        text
    }
}

#[cfg(test)]
mod tests;
