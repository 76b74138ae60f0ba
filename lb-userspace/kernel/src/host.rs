//! What this host supports, for `socklb check`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use aya::{maps::MapInfo, programs::loaded_programs};
use lb_common::{Family, hooks::HOOKS, maps::MAPS};
use lb_core::packets::{
    self,
    nft::{Name, TableId},
};

use super::{
    Features, KernelError, addresses,
    cgroup::{self, Extent},
    exclusive::{self, Exclusive},
    nftables::{self, Nftables, NftablesError},
    pins,
    sockets::{self, SocketError},
    syscall, try_programs,
};

/// The findings. Probing changes nothing.
#[derive(Debug)]
pub struct Host {
    /// Name and release of the kernel.
    pub kernel: String,
    /// Whether the kernel provides BTF of its own types.
    pub has_btf: bool,
    /// The cgroup to serve, and its extent.
    pub cgroup: Result<(PathBuf, Extent), KernelError>,
    /// The pin directory, if it is on a BPF file system or can be created on one.
    pub pin_path: Result<PathBuf, KernelError>,
    /// Effective capabilities, as bits (capabilities(7)).
    pub capabilities: u64,
    /// The kernel's features.
    pub features: Features,
    /// Whether the verifier accepts the programs.
    pub programs: Result<(), KernelError>,
    /// Whether sockets can be found and destroyed.
    pub sockets: Result<(), SocketError>,
    /// Foreign programs attached to our hooks of the cgroup, each with its hooks.
    pub neighbours: io::Result<BTreeMap<String, Vec<&'static str>>>,
    /// Foreign programs that prevent attaching ours, each with its hook.
    pub exclusives: io::Result<Vec<(&'static str, Exclusive)>>,
    /// What concerns packets.
    pub packets: PacketHost,
}

/// What concerns packets that reach no hook, in the network namespace of the calling thread.
#[derive(Debug)]
pub struct PacketHost {
    /// Why the kernel cannot have the rules of `--packets`, for IPv4 and IPv6.
    pub unable: [Option<NftablesError>; 2],
    /// Whether it has some.
    pub has_tables: bool,
    /// The settings (sysctl) by which packets are not forwarded.
    pub not_forwarding: Vec<&'static str>,
    /// The base chains of other programs that drop forwarded packets unless a rule of theirs accepts them.
    pub forward_drops: Vec<String>,
    /// Bridges whose bridged packets no rules see.
    pub unfiltered_bridges: Vec<String>,
    /// What kube-proxy has left, or uses: tables, chains and interfaces.
    pub kube_proxy: Vec<String>,
    /// The tables of the older iptables, in which it may have chains too.
    pub legacy_tables: Vec<String>,
}

impl PacketHost {
    /// Looks at the rules. It may load modules of nftables, and changes nothing else.
    fn probe() -> Self {
        let (mut has_tables, mut forward_drops, mut kube_proxy) = (false, Vec::new(), Vec::new());
        // What prevents reading is in `unable`.
        if let Ok(mut nftables) = Nftables::open() {
            has_tables = packets::table_ids().iter().any(|id| nftables.has(id).unwrap_or(false));
            forward_drops = nftables.chains_that_drop_forwarded().unwrap_or_default();
            for family in [Family::V4, Family::V6] {
                let named = |name: &str| TableId { family, name: Name::from(name) };
                let (own, nat) = (named("kube-proxy"), named("nat"));
                if nftables.has(&own).unwrap_or(false) {
                    kube_proxy.push(format!("nftables table {own}"));
                }
                if nftables.has_chain(&nat, "KUBE-SERVICES").unwrap_or(false) {
                    kube_proxy.push(format!("iptables chain KUBE-SERVICES in table {nat}"));
                }
            }
        }
        if Path::new("/sys/class/net").join(addresses::IPVS).exists() {
            kube_proxy.push(format!("interface {}", addresses::IPVS));
        }
        let is_off = |path: &&'static str| fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
        let legacy = ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"];
        let legacy = legacy.iter().filter_map(|path| fs::read_to_string(path).ok());
        let legacy: BTreeSet<String> =
            legacy.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
        Self {
            unable: [Family::V4, Family::V6].map(|family| nftables::probe(family).err()),
            has_tables,
            not_forwarding: FORWARDING.iter().copied().filter(is_off).collect(),
            forward_drops,
            unfiltered_bridges: unfiltered_bridges(),
            kube_proxy,
            legacy_tables: legacy.into_iter().collect(),
        }
    }
}

/// The settings by which a host forwards packets.
const FORWARDING: [&str; 2] = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];

/// The settings by which rules see the packets that bridges forward. The module `br_netfilter` has them.
const BRIDGED: [&str; 2] =
    ["/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/bridge/bridge-nf-call-ip6tables"];

/// The bridges with ports, if rules do not see their packets in both families.
fn unfiltered_bridges() -> Vec<String> {
    let is_on = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.trim() == "1");
    if BRIDGED.iter().all(|path| is_on(Path::new(path))) {
        return Vec::new();
    }
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let bridges = entries(Path::new("/sys/class/net")).filter(|interface| {
        // A bridge may have the settings of its own.
        let own = ["bridge/nf_call_iptables", "bridge/nf_call_ip6tables"];
        let has_ports = entries(&interface.path().join("brif")).next().is_some();
        has_ports && !own.iter().all(|setting| is_on(&interface.path().join(setting)))
    });
    let mut names: Vec<_> = bridges.map(|bridge| bridge.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

/// Probes the host. `cgroup` is the one to serve; the default is the root of the hierarchy.
#[must_use]
pub fn probe(cgroup: Option<PathBuf>, pin_path: &Path) -> Host {
    let features = Features::probe();
    let cgroup = cgroup.map_or_else(cgroup::find_root, Ok).and_then(|path| {
        let _is_one = cgroup::open(&path)?;
        let extent = cgroup::extent(&path);
        Ok((path, extent))
    });
    let neighbours = match &cgroup {
        Ok((cgroup, _)) => neighbours(cgroup, pin_path),
        Err(_reported_already) => Ok(BTreeMap::new()),
    };
    let exclusives = match &cgroup {
        Ok((cgroup, _)) => exclusives(cgroup, pin_path, features),
        Err(_reported_already) => Ok(Vec::new()),
    };
    Host {
        kernel: kernel(),
        has_btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        cgroup,
        pin_path: pins::check(pin_path).map(|()| pin_path.to_owned()),
        capabilities: capabilities(),
        features,
        programs: try_programs(features),
        sockets: sockets::check(),
        neighbours,
        exclusives,
        packets: PacketHost::probe(),
    }
}

/// Name and release of the running kernel.
pub(super) fn kernel() -> String {
    nix::sys::utsname::uname().map_or_else(
        |errno| format!("unknown ({errno})"),
        |uname| format!("{} {}", uname.sysname().to_string_lossy(), uname.release().to_string_lossy()),
    )
}

/// Nanoseconds of `CLOCK_MONOTONIC`, the clock of the programs.
#[must_use]
pub fn monotonic() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Effective capabilities of this process; none if they cannot be read, so that they are reported as missing.
pub(super) fn capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}

/// Foreign programs that prevent attaching a hook, for the hooks without a link of ours.
fn exclusives(
    path: &Path,
    pin_path: &Path,
    features: Features,
) -> io::Result<Vec<(&'static str, Exclusive)>> {
    let id = fs::metadata(path)?.ino();
    let mut found = Vec::new();
    for hook in pins::hooks(features, true) {
        let link =
            syscall::open_pin(&pin_path.join(hook.name)).and_then(|link| syscall::cgroup_link(link.as_fd()));
        if link.is_ok_and(|link| link.cgroup_id == id) {
            continue;
        }
        match exclusive::find(hook, path) {
            Ok(by) => found.extend(by.map(|by| (hook.name, by))),
            // This kernel lacks the hook. `try_programs` reports it.
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Programs attached to our hooks of a cgroup that use none of the maps pinned here, by name, each with its
/// hooks.
///
/// # Errors
///
/// A failing system call, usually for lack of a capability.
pub fn neighbours(cgroup: &Path, pin_path: &Path) -> io::Result<BTreeMap<String, Vec<&'static str>>> {
    let directory = fs::File::open(cgroup)?;
    let own_maps: BTreeSet<u32> = MAPS
        .iter()
        .filter_map(|map| MapInfo::from_pin(pin_path.join(map.name)).ok())
        .map(|info| info.id())
        .collect();
    let mut known = BTreeMap::new();
    for program in loaded_programs() {
        let program = program.map_err(io::Error::other)?;
        // Kernels before 4.15 do not report map ids: every program then counts as foreign.
        let maps = program.map_ids().ok().flatten().unwrap_or_default();
        let is_own = maps.iter().any(|id| own_maps.contains(id));
        let name = program.name_as_str().filter(|name| !name.is_empty()).map(str::to_owned);
        let _ids_differ = known.insert(program.id(), (name, is_own));
    }
    let mut found: BTreeMap<String, Vec<&'static str>> = BTreeMap::new();
    for hook in HOOKS {
        let ids = match syscall::programs_of(directory.as_fd(), hook.attach_type) {
            Ok(ids) => ids,
            // This kernel lacks the hook. `try_programs` reports it.
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => continue,
            Err(error) => return Err(error),
        };
        for id in ids {
            let (name, is_own) = known.get(&id).cloned().unwrap_or_default();
            if !is_own {
                found.entry(name.unwrap_or_else(|| format!("program {id}"))).or_default().push(hook.name);
            }
        }
    }
    Ok(found)
}
