//! Scenarios: objects, and the flows of calls. `scenarios/README.md` describes the format.
//!
//! # Invariants
//!
//! - One runner, three executors: [`simulated`] on an image in memory, [`real`] on sockets, [`packets`] on
//!   packets of callers without hooks. If they differ, one of them is wrong, or the scenario says so in
//!   `packets`.
//! - The set of reached endpoints is compared as a whole: a missing one is as wrong as an extra one.

pub mod packets;
pub mod real;
pub mod simulated;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use lb_core::{
    desired::{self, FrontendAddress},
    model::Protocol,
};
use lb_userspace::cli::config::{external_ips, node_port_addresses, node_port_range, packets, service_cidrs};
use serde::Deserialize;

use crate::cluster::{Cluster, object};

/// A scenario file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scenario {
    /// The rule, in a sentence.
    pub title: String,
    /// The node on which calls are made.
    #[serde(default)]
    pub settings: Settings,
    /// The initial objects of the cluster.
    #[serde(default)]
    objects: Vec<serde_json::Value>,
    steps: Vec<Step>,
}

/// Settings of the agent; omitted ones have the agent's defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// `--node-name`
    pub node_name: String,
    /// `--node-port-range`
    pub node_port_range: String,
    /// `--nodeport-addresses`
    pub nodeport_addresses: String,
    /// `--external-ips`
    pub external_ips: String,
    /// `--packets`
    pub packets: String,
    /// `--service-cidr`
    pub service_cidr: String,
    /// `--localhost-nodeports`
    pub localhost_nodeports: bool,
    /// `--service-proxy-name`
    pub service_proxy_name: Option<String>,
    /// Addresses of the node's interfaces.
    pub interfaces: Vec<std::net::IpAddr>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            node_name: "node".to_owned(),
            node_port_range: "30000-32767".to_owned(),
            nodeport_addresses: String::new(),
            external_ips: "any".to_owned(),
            packets: "off".to_owned(),
            service_cidr: String::new(),
            localhost_nodeports: true,
            service_proxy_name: None,
            interfaces: Vec::new(),
        }
    }
}

impl Settings {
    fn node_ports(&self) -> Result<(u16, u16)> {
        node_port_range(&self.node_port_range).map_err(anyhow::Error::msg)
    }

    fn desired(&self) -> Result<desired::Settings> {
        let (first, last) = self.node_ports()?;
        Ok(desired::Settings {
            node_name: Arc::from(&*self.node_name),
            node_ports: first..=last,
            node_port_addresses: node_port_addresses(&self.nodeport_addresses)
                .map_err(anyhow::Error::msg)?
                .addresses,
            external_ips: external_ips(&self.external_ips).map_err(anyhow::Error::msg)?,
            packets: packets(&self.packets).map_err(anyhow::Error::msg)?,
            service_cidrs: service_cidrs(&self.service_cidr).map_err(anyhow::Error::msg)?.0,
        })
    }
}

/// An optional change, and calls after it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Step {
    title: String,
    /// Objects to create or replace.
    set: Vec<serde_json::Value>,
    /// Objects to delete: `Service default/web`.
    delete: Vec<String>,
    /// Seconds to wait before the calls.
    wait: u64,
    calls: Calls,
    /// The outcomes of the same calls as packets that reach no hook, where they differ.
    packets: Calls,
}

/// Caller → destination → expected outcome.
type Calls = BTreeMap<String, BTreeMap<String, Expected>>;

/// The expected outcome of calls.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
enum Expected {
    /// The same outcome for all.
    Word(Word),
    /// Exactly these endpoints, each of them reached.
    All(BTreeSet<SocketAddr>),
    /// Always the same one of these endpoints.
    One {
        one_of: BTreeSet<SocketAddr>,
        /// Whether it is the one of the same caller's earlier calls.
        #[serde(default)]
        kept: bool,
    },
}

/// An outcome that names no endpoint.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Word {
    Refused,
    Unreachable,
    Untouched,
}

/// The outcome of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It passed: the original destination.
    Untouched,
    /// Refused: `ECONNREFUSED`.
    Refused,
    /// Unreachable: `EHOSTUNREACH`.
    Unreachable,
    /// Redirected to an endpoint.
    Endpoint(SocketAddr),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untouched => f.write_str("untouched"),
            Self::Refused => f.write_str("refused"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Endpoint(address) => address.fmt(f),
        }
    }
}

/// The caller for processes in the node's own network namespace. Every other name is a pod's.
pub const NODE: &str = "node";

/// Runs scenarios.
pub trait Executor {
    /// Brings the maps to the state of the cluster.
    ///
    /// # Errors
    ///
    /// If the maps cannot be brought to that state.
    fn follow(&mut self, cluster: &Cluster) -> Result<()>;

    /// Calls often enough to reach each of `n` endpoints, with every kind of call that a program can make.
    ///
    /// # Errors
    ///
    /// If the result of a call is not an [`Outcome`].
    fn call(&mut self, caller: &str, to: FrontendAddress, n: usize) -> Result<BTreeSet<Outcome>>;

    /// Whether a call to an unallocated address passes, because programs cannot choose its error.
    fn leaves_unreachable_calls_alone(&self) -> bool {
        false
    }

    /// Whether the calls reach no hook and are served as packets.
    fn has_packets(&self) -> bool {
        false
    }

    /// Lets time pass.
    fn wait(&mut self, seconds: u64);
}

impl Scenario {
    /// Reads a file of `tests/scenarios` by its name without `.yaml`.
    ///
    /// # Errors
    ///
    /// If it does not exist or does not match the format.
    pub fn read(name: &str) -> Result<Self> {
        let path = directory().join(format!("{name}.yaml"));
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Reads the text of a scenario.
    ///
    /// # Errors
    ///
    /// If it does not match the format.
    pub fn parse(text: &str) -> Result<Self> {
        let scenario: Self = serde_saphyr::from_str(text)?;
        ensure!(!scenario.steps.is_empty(), "no steps");
        Ok(scenario)
    }

    /// Every address that needs a server for the outcomes to differ: endpoints of all objects, and all
    /// destinations.
    ///
    /// # Errors
    /// If an object or a destination cannot be parsed.
    /// If an object or a destination cannot be read.
    pub fn addresses(&self) -> Result<BTreeSet<(SocketAddr, Protocol)>> {
        let mut addresses = BTreeSet::new();
        for value in self.objects.iter().chain(self.steps.iter().flat_map(|step| &step.set)) {
            addresses.extend(self.cluster().with([object(value)?]).endpoint_addresses());
        }
        for to in self.destinations()? {
            addresses.insert((SocketAddr::new(to.ip, to.port), to.protocol));
        }
        Ok(addresses)
    }

    /// All destinations of calls.
    ///
    /// # Errors
    ///
    /// If one cannot be parsed.
    pub fn destinations(&self) -> Result<BTreeSet<FrontendAddress>> {
        let calls = self.steps.iter().flat_map(|step| step.calls.values());
        calls.flat_map(BTreeMap::keys).map(|to| destination(to)).collect()
    }

    fn cluster(&self) -> Cluster {
        Cluster { service_proxy_name: self.settings.service_proxy_name.clone(), ..Cluster::new() }
    }

    /// Runs the scenario.
    ///
    /// # Errors
    ///
    /// Every call whose outcome differs from the expected one.
    pub fn run(&self, executor: &mut impl Executor) -> Result<()> {
        let mut cluster = self.cluster();
        for value in &self.objects {
            cluster.set(object(value)?);
        }
        let mut faults = Vec::new();
        let mut chosen: BTreeMap<&str, SocketAddr> = BTreeMap::new();
        for (number, step) in (1..).zip(&self.steps) {
            let context = || format!("{}: step {number} {:?}", self.title, step.title);
            for value in &step.set {
                cluster.set(object(value).with_context(context)?);
            }
            for name in &step.delete {
                delete(&mut cluster, name).with_context(context)?;
            }
            executor.follow(&cluster).with_context(context)?;
            executor.wait(step.wait);
            for (caller, calls) in &step.packets {
                let is_call =
                    |to: &String| step.calls.get(caller).is_some_and(|calls| calls.contains_key(to));
                let other = calls.keys().find(|to| !is_call(to));
                ensure!(
                    other.is_none(),
                    "{}: `packets` has {caller}, {other:?}, but `calls` has not",
                    context()
                );
            }
            for (caller, calls) in &step.calls {
                for (to, expected) in calls {
                    let as_packet = || step.packets.get(caller).and_then(|calls| calls.get(to));
                    let differs = executor.has_packets().then(as_packet).flatten();
                    let expected = differs.unwrap_or(expected);
                    let is_left_alone = *expected == Expected::Word(Word::Unreachable)
                        && executor.leaves_unreachable_calls_alone();
                    let expected = if is_left_alone { &Expected::Word(Word::Untouched) } else { expected };
                    let outcomes = executor
                        .call(caller, destination(to)?, expected.n_endpoints())
                        .with_context(context)?;
                    let earlier = chosen.get(&**caller).copied();
                    if !expected.is_met(&outcomes, earlier) {
                        let got: Vec<_> = outcomes.iter().map(ToString::to_string).collect();
                        let got = got.join(", ");
                        faults.push(format!("{}: {caller} calls {to}: {expected:?}, but: {got}", context()));
                    }
                    if let (Expected::One { .. }, Some(Outcome::Endpoint(endpoint))) =
                        (expected, outcomes.first())
                    {
                        chosen.insert(caller, *endpoint);
                    }
                }
            }
        }
        ensure!(faults.is_empty(), "{}", faults.join("\n"));
        Ok(())
    }
}

impl Expected {
    fn n_endpoints(&self) -> usize {
        match self {
            Self::Word(_) => 1,
            Self::All(endpoints) | Self::One { one_of: endpoints, .. } => endpoints.len().max(1),
        }
    }

    fn is_met(&self, outcomes: &BTreeSet<Outcome>, earlier: Option<SocketAddr>) -> bool {
        let is_only = |outcome: Outcome| outcomes.len() == 1 && outcomes.contains(&outcome);
        match self {
            Self::Word(Word::Refused) => is_only(Outcome::Refused),
            Self::Word(Word::Unreachable) => is_only(Outcome::Unreachable),
            Self::Word(Word::Untouched) => is_only(Outcome::Untouched),
            Self::All(endpoints) => *outcomes == endpoints.iter().copied().map(Outcome::Endpoint).collect(),
            Self::One { one_of, kept } => one_of.iter().any(|endpoint| {
                is_only(Outcome::Endpoint(*endpoint)) && (!kept || earlier == Some(*endpoint))
            }),
        }
    }
}

fn delete(cluster: &mut Cluster, name: &str) -> Result<()> {
    let (kind, name) = name.split_once(' ').context("`delete` takes `Kind namespace/name`")?;
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    let name = (namespace.to_owned(), name.to_owned());
    let was_there = match kind {
        "Service" => cluster.services.remove(&name).is_some(),
        "EndpointSlice" => cluster.slices.remove(&name).is_some(),
        "Node" => cluster.nodes.remove(&name).is_some(),
        "ServiceCIDR" => cluster.service_cidrs.remove(&name).is_some(),
        _ => bail!("{kind:?} is not a kind"),
    };
    ensure!(was_there, "{kind} {}/{} does not exist", name.0, name.1);
    Ok(())
}

fn destination(text: &str) -> Result<FrontendAddress> {
    let (address, protocol) = text.split_once('/').with_context(|| format!("{text:?} has no protocol"))?;
    let address: SocketAddr =
        address.parse().with_context(|| format!("{text:?} is not ADDRESS:PORT/PROTOCOL"))?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        other => bail!("no calls are made with {other:?}"),
    };
    Ok(FrontendAddress { ip: address.ip(), port: address.port(), protocol })
}

/// The directory of the scenarios.
#[must_use]
pub fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scenarios")
}

/// The names of all scenarios.
///
/// # Errors
///
/// If the directory cannot be read.
pub fn names() -> Result<BTreeSet<String>> {
    let directory = directory();
    let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    let mut names = BTreeSet::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            names.extend(path.file_stem().and_then(|name| name.to_str()).map(ToOwned::to_owned));
        }
    }
    Ok(names)
}

/// Defines a test for each scenario, and one that checks that every file has a test. `$run` takes the name of
/// a scenario.
#[macro_export]
macro_rules! scenario_tests {
    ($run:path) => {
        $crate::scenario_tests! { $run:
            affinity
            affinity_switch
            cluster_ip
            cluster_ip_ipv6
            contested_address
            dual_stack
            excluded_service
            external_ips
            external_ips_of_nodes
            external_ips_off
            external_policy_local
            headless
            internal_policy_local
            load_balancer_ip_mode
            load_balancer_source_ranges
            mangled_objects
            many_slices
            multi_port
            no_endpoints
            node_port
            node_port_addresses
            node_port_loopback
            node_port_other_range
            port_rename
            published_unready
            same_port_both_protocols
            service_cidr_objects
            service_proxy_name
            service_types
            terminating
            topology_nodes
            topology_zones
            undefined_ports
            unready
            weight_zero
        }
    };
    ($run:path: $($name:ident)+) => {
        $(#[test]
        fn $name() {
            $run(&stringify!($name).replace('_', "-"));
        })+

        #[test]
        fn every_scenario_has_a_test() {
            let tested = [$(stringify!($name)),+].map(|name| name.replace('_', "-"));
            assert_eq!($crate::scenario::names().unwrap(), tested.into());
        }
    };
}
