//! `socklb check`: can this host run the agent?

use std::{collections::BTreeMap, fmt::Write as _, path::PathBuf, process::ExitCode};

use clap::Args;
use lb_kernel::{
    Features, KernelError, cgroup, chain,
    host::{self, Host, PacketHost},
    nftables::NftablesError,
};
use serde::Serialize;

use super::{
    PinArgs,
    inspect::{Output, print},
};

/// Flags of `socklb check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The cgroup v2 directory that would be served [default: the root of the hierarchy]
    #[arg(long, env = "SOCKLB_CGROUP", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As expected.
    Ok,
    /// Works, with a difference.
    Note,
    /// Does not work.
    Missing,
}

/// One row of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    what: &'static str,
    status: Status,
    /// What was found, or what is wrong and the remedy.
    found: String,
}

/// `socklb check`. Changes nothing on the host; the kernel may load modules of nftables.
///
/// Exit status 1 if anything is missing that the agent needs to start.
///
/// # Errors
///
/// If standard output cannot be written.
pub fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let host = host::probe(args.cgroup.clone(), &args.pins.pin_path);
    let findings = findings(&host, cgroup::is_beside_v1());
    print(args.output, &findings, || table(&findings))?;
    let is_able = findings.iter().all(|finding| finding.status != Status::Missing);
    Ok(if is_able { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// For findings that need the permission to load programs.
const NOT_KNOWN: &str = "not known: it needs the capabilities above to find out";

/// Capabilities by number (`linux/capability.h`).
const CAPABILITIES: [(&str, u32); 3] = [("CAP_BPF", 39), ("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38)];
const CAP_SYS_ADMIN: u32 = 21;

fn findings(host: &Host, is_beside_v1: bool) -> Vec<Finding> {
    let finding = |what, status, found: String| Finding { what, status, found };
    let judged = |what, result: Result<String, &KernelError>| match result {
        Ok(found) => finding(what, Status::Ok, found),
        Err(error) => finding(what, Status::Missing, error.to_string()),
    };
    let features = host.features;
    // Without the permission to load, no probe of the kernel's features succeeds.
    let is_blind = matches!(host.programs, Err(KernelError::NotPermitted { .. }));
    let switch = |is_on: bool, what, with: &str, without: &str| {
        let (status, text) = match (is_blind, is_on) {
            (true, _) => (Status::Note, NOT_KNOWN),
            (false, true) => (Status::Ok, with),
            (false, false) => (Status::Note, without),
        };
        finding(what, status, text.to_owned())
    };
    vec![
        kernel(&host.kernel),
        btf(host.has_btf),
        judged(
            "cgroup v2",
            host.cgroup.as_ref().map(|(path, extent)| {
                let beside = if is_beside_v1 { ", beside cgroup v1" } else { "" };
                format!("{}{beside}: {extent}", path.display())
            }),
        ),
        judged("BPF file system", host.pin_path.as_ref().map(|path| path.display().to_string())),
        capabilities(host.capabilities),
        judged(
            "programs",
            host.programs.as_ref().map(|()| "the kernel accepts the programs of all hooks".to_owned()),
        ),
        switch(
            features.set_retval,
            "refusal",
            "bpf_set_retval: connect() and sendto() fail with ECONNREFUSED",
            "no bpf_set_retval (Linux 5.18): calls to a service without endpoints get a closed \
             port of loopback; an unconnected sendto() fails with EINVAL",
        ),
        switch(
            features.has_slots(),
            "socket records",
            "in slots; sockets without a slot use socket storage",
            "all in socket storage, which costs each new socket about half a microsecond: slots need \
             compare-and-swap (Linux 5.12), and programs that may read kernel memory (BTF, no lockdown)",
        ),
        kernel_clients(&host.kernel, (!is_blind).then_some(features)),
        match &host.sockets {
            Ok(()) => {
                finding("stale sockets", Status::Ok, "stale sockets can be found and destroyed".to_owned())
            }
            // Calls are served anyway.
            Err(error) => finding(
                "stale sockets",
                Status::Note,
                format!(
                    "{error}: a connected socket keeps an endpoint that is gone until its program reconnects"
                ),
            ),
        },
        attaching(host),
        neighbours(host),
    ]
    .into_iter()
    .chain(packets(&host.packets))
    .collect()
}

/// What concerns `--packets`.
fn packets(host: &PacketHost) -> Vec<Finding> {
    let finding = |what, notes: Vec<String>, otherwise: &str| {
        let (status, found) = if notes.is_empty() {
            (Status::Ok, otherwise.to_owned())
        } else {
            (Status::Note, notes.join("; "))
        };
        Finding { what, status, found }
    };
    let [v4, v6] = &host.unable;
    if matches!(v4, Some(NftablesError::NotPermitted)) {
        return ["packets", "kube-proxy"].map(|what| finding(what, vec![NOT_KNOWN.to_owned()], "")).into();
    }
    let unable = match (v4, v6) {
        (None, None) => Vec::new(),
        (Some(error), _) => vec![format!("--packets is not possible: {error}")],
        (None, Some(error)) => vec![format!("--packets serves no IPv6: {error}")],
    };
    let mut found = vec![finding("packets", unable, "nftables has what --packets needs")];
    if host.has_tables && !host.not_forwarding.is_empty() {
        let off = host.not_forwarding.iter().map(|path| {
            format!("{path} is 0, so packets from outside do not reach pods: set it to 1, unless this node has no pods")
        });
        found.push(finding("forwarding", off.collect(), ""));
    }
    if host.has_tables && !host.forward_drops.is_empty() {
        let note = format!(
            "{}: what is for Services passes only if a rule of theirs accepts it: `ct status dnat accept`, or \
             iptables -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT",
            host.forward_drops.join(", ")
        );
        found.push(finding("FORWARD drops", vec![note], ""));
    }
    if host.has_tables && !host.unfiltered_bridges.is_empty() {
        let note = format!(
            "{}: rules do not see what is bridged, so a pod without hooks gets no answer from a Service's endpoint \
             behind the same bridge: load br_netfilter and set net.bridge.bridge-nf-call-iptables=1 and \
             bridge-nf-call-ip6tables=1",
            host.unfiltered_bridges.join(", ")
        );
        found.push(finding("bridges", vec![note], ""));
    }
    let mut traces = host.kube_proxy.clone();
    if !traces.is_empty() {
        traces = vec![format!(
            "{}: unless kube-proxy is to run beside socklb, stop it and run `kube-proxy --cleanup` on this node",
            traces.join(", ")
        )];
    }
    if !host.legacy_tables.is_empty() {
        traces.push(format!(
            "iptables-legacy has tables ({}): `iptables-legacy-save` shows whether kube-proxy's rules \
             (KUBE-SERVICES) are among them, and whether FORWARD drops",
            host.legacy_tables.join(", ")
        ));
    }
    found.push(finding("kube-proxy", traces, "no rules of kube-proxy"));
    found
}

fn attaching(host: &Host) -> Finding {
    let (status, found) = match &host.exclusives {
        Ok(none) if none.is_empty() => (Status::Ok, "no program excludes others from a hook".to_owned()),
        Ok(exclusives) => {
            let mut by_program = BTreeMap::<String, Vec<&str>>::new();
            for (hook, exclusive) in exclusives {
                by_program.entry(exclusive.to_string()).or_default().push(hook);
            }
            let list: Vec<String> =
                by_program.iter().map(|(program, hooks)| format!("{}: {program}", hooks.join(" "))).collect();
            (Status::Missing, format!("the agent cannot attach {}", list.join("; ")))
        }
        Err(error) => (Status::Note, format!("cannot be listed: {}", chain(error))),
    };
    Finding { what: "attaching", status, found }
}

/// Other programs on the same hooks.
fn neighbours(host: &Host) -> Finding {
    let refused: Vec<&str> = host.exclusives.iter().flatten().map(|(hook, _)| *hook).collect();
    let (status, found) = match &host.neighbours {
        Ok(others) => {
            let beside = |hooks: &[&'static str]| {
                let hooks = hooks.iter().copied().filter(|hook| !refused.contains(hook));
                hooks.collect::<Vec<_>>().join(" ")
            };
            let list: Vec<String> = others
                .iter()
                .map(|(name, hooks)| (name, beside(hooks)))
                .filter(|(_, hooks)| !hooks.is_empty())
                .map(|(name, hooks)| format!("{name} ({hooks})"))
                .collect();
            let advice = "they run on the same hooks and may change a call before or after socklb: turn \
                          off the other's socket load balancing";
            if list.is_empty() {
                (Status::Ok, "no other program on the same hooks".to_owned())
            } else {
                (Status::Note, format!("{}: {advice}", list.join(", ")))
            }
        }
        Err(error) => (Status::Note, format!("cannot be listed: {}", chain(error))),
    };
    Finding { what: "other balancers", status, found }
}

/// A note, not a fault: loading the programs is tested itself, and distributions backport.
fn kernel(release: &str) -> Finding {
    let what = "kernel";
    if KernelError::is_too_old(release) {
        let found = format!("{release}: older than Linux 5.10, which the programs need: use a newer kernel");
        return Finding { what, status: Status::Note, found };
    }
    Finding { what, status: Status::Ok, found: release.to_owned() }
}

/// For NFS and SMB mounts, whose `connect()` is the kernel's own. Decided by the release: a program cannot
/// detect the fixes, which docs/OPERATIONS.md lists.
fn kernel_clients(release: &str, features: Option<Features>) -> Finding {
    let mut notes = Vec::new();
    if KernelError::is_older(release, (6, 6)) {
        notes.push(
            "older than Linux 6.6: unless the distribution has the fixes, a mount by service address \
             keeps the address of its first endpoint, and hangs when that endpoint is gone",
        );
    }
    notes.extend(match features {
        None => Some(NOT_KNOWN),
        Some(Features { set_retval: true, .. }) => None,
        Some(Features { sock_fields: Some(_), .. }) => Some(
            "no bpf_set_retval: without endpoints a mount fails with EPERM, and retries the service address",
        ),
        Some(_) => Some(
            "no bpf_set_retval, and no way to detect the kernel's sockets: without endpoints a mount \
             is redirected to port 0 of loopback, and an older kernel keeps that address",
        ),
    });
    let what = "NFS and SMB";
    if notes.is_empty() {
        let found =
            "a mount keeps the service address, and gets another endpoint when it reconnects".to_owned();
        return Finding { what, status: Status::Ok, found };
    }
    Finding { what, status: Status::Note, found: notes.join("; ") }
}

fn btf(has_btf: bool) -> Finding {
    let (status, found) = if has_btf {
        (Status::Ok, "the kernel describes its types in /sys/kernel/btf/vmlinux")
    } else {
        let found = "no /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF): socket records are in socket \
                     storage, and getpeername() of multipath TCP shows the endpoint";
        (Status::Note, found)
    };
    Finding { what: "BTF", status, found: found.to_owned() }
}

fn capabilities(effective: u64) -> Finding {
    let has = |bit: u32| effective & (1 << bit) != 0;
    let (held, lacking): (Vec<_>, Vec<_>) =
        CAPABILITIES.iter().partition(|(_, bit)| has(*bit) || has(CAP_SYS_ADMIN) && *bit != 12);
    let names =
        |list: Vec<&(&'static str, u32)>| list.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" ");
    let what = "capabilities";
    if lacking.is_empty() {
        return Finding { what, status: Status::Ok, found: names(held) };
    }
    let found = format!("lacks {}: run as root, or grant them", names(lacking));
    Finding { what, status: Status::Missing, found }
}

fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.what.len()).max().unwrap_or_default();
    findings.iter().fold(String::new(), |mut text, Finding { what, status, found }| {
        let status = match status {
            Status::Ok => "ok",
            Status::Note => "note",
            Status::Missing => "MISSING",
        };
        let _infallible = writeln!(text, "{status:<7}  {what:<width$}  {found}");
        text
    })
}

#[cfg(test)]
mod tests;
