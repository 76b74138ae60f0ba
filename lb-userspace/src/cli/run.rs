//! `socklb run`.
#![expect(
    clippy::doc_markdown,
    rustdoc::bare_urls,
    reason = "clap prints these as they are: help texts, not Markdown"
)]

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Args, ValueEnum as _};
use lb_agent::{
    controller::run as agent,
    names, serve,
    source::{
        Location, Setup,
        cluster::{self, Access},
    },
    telemetry::{self, LogFormat},
};
use lb_core::{
    desired::{ExternalIps, PacketMode, Settings},
    model::ServiceKey,
    plan::Capacity,
};
use lb_kernel::{Features, cgroup, syscall};
use serde::Deserialize;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing::info;

use super::config::{
    self, BindAddresses, DnsServers, Domain, Domains, Listen, NodePortList, ServiceCidrs, SettingsFile,
    UsageError,
};

/// How long the agent's exit waits for threads that are blocked.
const LEAVE: Duration = Duration::from_secs(5);

/// Flags of `socklb run`. Each may also come from the environment (`SOCKLB_MAX_SERVICES`) or from `--config`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Source of Services, EndpointSlices and Nodes: kube, the API server (default if a kubeconfig or a pod's
    /// credentials are found), or "file:" and the path of a manifest file or of a folder of manifests, which
    /// is watched.
    #[arg(long, env = "SOCKLB_SOURCE", value_name = "SOURCE")]
    source: Option<String>,
    /// Kubeconfig for --source kube [default: $KUBECONFIG, else ~/.kube/config, else the pod's credentials]
    #[arg(long, env = "SOCKLB_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// URL of the API server, in place of the one in the credentials. Needed in a pod if nothing else serves
    /// the API server's Service.
    #[arg(long, env = "SOCKLB_APISERVER", value_name = "URL")]
    apiserver: Option<String>,
    /// Settings file (YAML). Its keys are the names of these flags.
    #[arg(long, env = "SOCKLB_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Name of this node's Node object [default: $NODE_NAME, else the host name in lower case]
    #[arg(long, env = "SOCKLB_NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// Serve the processes of this cgroup v2 directory [default: the root of the hierarchy]
    #[arg(long, env = "SOCKLB_CGROUP", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Directory of the pinned maps and links, on a BPF file system [default: /sys/fs/bpf/socklb]
    #[arg(long, env = "SOCKLB_PIN_PATH", value_name = "DIR")]
    pin_path: Option<PathBuf>,
    /// Directory of the snapshot of objects, and of the agent's socket for commands [default:
    /// /var/lib/socklb]
    #[arg(long, env = "SOCKLB_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Addresses that accept node ports, separated by commas: networks, and the words all, primary (of the
    /// Node object) and localhost [default: all, and localhost unless --localhost-nodeports is false]
    #[arg(long, env = "SOCKLB_NODEPORT_ADDRESSES", value_name = "LIST", value_parser = config::node_port_addresses)]
    nodeport_addresses: Option<NodePortList>,
    /// Which addresses of spec.externalIPs are served: any, those of nodes, or none. With any, every author
    /// of a Service can claim any address on this node [default: any]
    #[arg(long, env = "SOCKLB_EXTERNAL_IPS", value_name = "WHICH", value_parser = config::external_ips)]
    external_ips: Option<ExternalIps>,
    /// Serve packets that reach no hook, with nftables: off, external (what enters the node for node ports,
    /// external IPs and load-balancer addresses), or all (cluster IPs and what the node sends, too). No other
    /// proxy may serve the same Services [default: off]
    #[arg(long, env = "SOCKLB_PACKETS", value_name = "WHICH", value_parser = config::packets)]
    packets: Option<PacketMode>,
    /// Networks of cluster IPs, separated by commas, in addition to those of ServiceCIDR objects. A call to
    /// an undefined port of a cluster IP is refused; a call to an address without a Service is unreachable.
    /// The word none: no networks, and ServiceCIDRs are not read [default: those of the objects]
    #[arg(long, env = "SOCKLB_SERVICE_CIDR", value_name = "LIST", value_parser = config::service_cidrs)]
    service_cidr: Option<ServiceCidrs>,
    /// Range of node ports, as configured in the API server [default: 30000-32767]
    #[arg(long, env = "SOCKLB_NODE_PORT_RANGE", value_name = "RANGE", value_parser = config::node_port_range)]
    node_port_range: Option<(u16, u16)>,
    /// Serve node ports on the node's loopback addresses [default: true]
    #[arg(long, env = "SOCKLB_LOCALHOST_NODEPORTS", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    localhost_nodeports: Option<bool>,
    /// Watch the other Nodes too, and serve calls to their node ports here. Each Node changes every few
    /// minutes: on large clusters that is most of the API server's traffic. If false, such calls go over the
    /// network and that node serves them [default: false]
    #[arg(long, env = "SOCKLB_NODE_PORTS_OF_OTHER_NODES", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    node_ports_of_other_nodes: Option<bool>,
    /// Serve the Services labelled service.kubernetes.io/service-proxy-name=NAME, instead of those without
    /// the label.
    #[arg(long, env = "SOCKLB_SERVICE_PROXY_NAME", value_name = "NAME")]
    service_proxy_name: Option<String>,
    /// Minimum time between two syncs; the first change after a pause is synced at once [default: 0]
    #[arg(long, env = "SOCKLB_MIN_SYNC_INTERVAL", value_name = "DURATION", value_parser = config::duration)]
    min_sync_interval: Option<Duration>,
    /// Time between two audits, which compare the kernel's maps and pins with the desired state and repair
    /// what another program has changed; 0 for none [default: 60s]
    #[arg(long, env = "SOCKLB_AUDIT_INTERVAL", value_name = "DURATION", value_parser = config::duration)]
    audit_interval: Option<Duration>,
    /// Time between two self-tests, in which a process of the agent calls a Service of the agent. The node is
    /// ready only if it succeeds; 0 for none [default: 30s]
    #[arg(long, env = "SOCKLB_SELF_TEST_INTERVAL", value_name = "DURATION", value_parser = config::duration)]
    self_test_interval: Option<Duration>,
    /// Address of /metrics, /proxyMode, /healthz and /configz; empty for none [default: 127.0.0.1:10249]
    #[arg(long, env = "SOCKLB_METRICS_BIND_ADDRESS", value_name = "ADDRESS", value_parser = config::bind_address)]
    metrics_bind_address: Option<Listen>,
    /// Address of /healthz and /livez; empty for none [default: 0.0.0.0:10256]
    #[arg(long, env = "SOCKLB_HEALTHZ_BIND_ADDRESS", value_name = "ADDRESS", value_parser = config::bind_address)]
    healthz_bind_address: Option<Listen>,
    /// Exclude the processes in this cgroup v2 directory and below: their calls pass unchanged. Several
    /// directories are separated by commas. A missing one is excluded once it exists
    #[arg(long, env = "SOCKLB_EXCLUDE_CGROUP", value_name = "DIR", value_delimiter = ',')]
    exclude_cgroup: Vec<PathBuf>,
    /// Exclude Pods annotated socklb.io/exclude: "true": their calls pass unchanged. The agent then watches
    /// the Pods of its node [default: false]
    #[arg(long, env = "SOCKLB_EXCLUDE_PODS", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    exclude_pods: Option<bool>,
    /// Answer names of the cluster domain on this node, and forward others: on or off [default: off]
    #[arg(long, env = "SOCKLB_NAMES", value_name = "SWITCH", value_parser = config::switch)]
    names: Option<bool>,
    /// The cluster's domain [default: cluster.local]
    #[arg(long, env = "SOCKLB_CLUSTER_DOMAIN", value_name = "DOMAIN", value_parser = config::domain)]
    cluster_domain: Option<Domain>,
    /// Service of the cluster's DNS, as NAMESPACE/NAME. Names that the node does not answer go to its
    /// endpoints [default: kube-system/kube-dns]
    #[arg(long, env = "SOCKLB_NAMES_SERVICE", value_name = "SERVICE", value_parser = config::service_key)]
    names_service: Option<ServiceKey>,
    /// Servers for names that the node does not answer, separated by commas, as ADDRESS or ADDRESS:PORT
    /// [default: the endpoints of --names-service]
    #[arg(long, env = "SOCKLB_NAMES_UPSTREAM", value_name = "LIST", value_parser = config::dns_servers)]
    names_upstream: Option<DnsServers>,
    /// Domains below the cluster domain whose names are forwarded, separated by commas: where the cluster's
    /// DNS has rules of its own [default: none]
    #[arg(long, env = "SOCKLB_NAMES_FORWARD", value_name = "LIST", value_parser = config::domains)]
    names_forward: Option<Domains>,
    /// Addresses of this host where names are answered, separated by commas, as ADDRESS:PORT, such as
    /// 127.0.0.153:53 [default: none]
    #[arg(long, env = "SOCKLB_NAMES_BIND_ADDRESS", value_name = "LIST", value_parser = config::bind_addresses)]
    names_bind_address: Option<BindAddresses>,
    /// Eject endpoints to which connections fail, for a while: on or off [default: on]
    #[arg(long, env = "SOCKLB_PASSIVE_HEALTH", value_name = "SWITCH", value_parser = config::switch)]
    passive_health: Option<bool>,
    /// Maximum number of frontends per address family [default: 65536]
    #[arg(long, env = "SOCKLB_MAX_SERVICES", value_name = "N", value_parser = config::entries)]
    max_services: Option<u32>,
    /// Maximum number of endpoints per address family, over all frontends [default: 262144]
    #[arg(long, env = "SOCKLB_MAX_ENDPOINTS", value_name = "N", value_parser = config::entries)]
    max_endpoints: Option<u32>,
    /// Format of log lines [default: text]
    #[arg(long, env = "SOCKLB_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// Log more; twice for everything, including a line for each verdict of the programs.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// The keys of the settings file: the names of the flags.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct FileConfig {
    source: Option<String>,
    kubeconfig: Option<PathBuf>,
    apiserver: Option<String>,
    node_name: Option<String>,
    cgroup: Option<PathBuf>,
    pin_path: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    nodeport_addresses: Option<String>,
    external_ips: Option<String>,
    packets: Option<String>,
    service_cidr: Option<String>,
    node_port_range: Option<String>,
    localhost_nodeports: Option<String>,
    node_ports_of_other_nodes: Option<String>,
    service_proxy_name: Option<String>,
    min_sync_interval: Option<String>,
    audit_interval: Option<String>,
    self_test_interval: Option<String>,
    metrics_bind_address: Option<String>,
    healthz_bind_address: Option<String>,
    exclude_cgroup: Vec<PathBuf>,
    exclude_pods: Option<String>,
    names: Option<String>,
    cluster_domain: Option<String>,
    names_service: Option<String>,
    names_upstream: Option<String>,
    names_forward: Option<String>,
    names_bind_address: Option<String>,
    passive_health: Option<String>,
    max_services: Option<String>,
    max_endpoints: Option<String>,
    log_format: Option<String>,
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
///
/// [`UsageError`] for unusable settings; else why the agent could not start, or why it failed.
pub fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let (settings_file, file): (SettingsFile, FileConfig) =
        args.config.as_deref().map(SettingsFile::read).transpose()?.unwrap_or_default();
    let names = names_options(args, &settings_file, &file)?;
    let log_format = settings_file.value("log-format", file.log_format, |text| {
        LogFormat::from_str(text, true).map_err(|_unknown| "expected text or json".to_owned())
    })?;
    telemetry::start_log(args.log_format.or(log_format).unwrap_or_default(), args.verbose);

    let apiserver = settings_file.value("apiserver", file.apiserver, cluster::apiserver)?;
    let access = Access {
        kubeconfig: args.kubeconfig.clone().or(file.kubeconfig),
        apiserver: args.apiserver.clone().or(apiserver),
    };
    let of_file = settings_file.value("source", file.source, Location::parse)?;
    let location = location(args.source.as_deref(), of_file, &access)?;
    let node_ports = args
        .node_port_range
        .or(settings_file.value("node-port-range", file.node_port_range, config::node_port_range)?)
        .unwrap_or(lb_common::limits::NODE_PORTS);
    let (node_port_list, localhost_nodeports) =
        node_port_list(args, &settings_file, file.nodeport_addresses, file.localhost_nodeports)?;
    let external_ips = settings_file.value("external-ips", file.external_ips, config::external_ips)?;
    let packets = settings_file.value("packets", file.packets, config::packets)?;
    let service_cidrs = settings_file.value("service-cidr", file.service_cidr, config::service_cidrs)?;
    let settings = Settings {
        node_name: node_name(args.node_name.clone().or(file.node_name))?,
        node_ports: node_ports.0..=node_ports.1,
        node_port_addresses: node_port_list.addresses.clone(),
        external_ips: args.external_ips.or(external_ips).unwrap_or_default(),
        packets: args.packets.or(packets).unwrap_or_default(),
        service_cidrs: args.service_cidr.clone().or(service_cidrs).unwrap_or_default().0,
    };
    let listen = |flag: Option<Listen>, key: &str, text: Option<String>, default: SocketAddr| {
        let of_file = settings_file.value(key, text, config::bind_address)?;
        Ok::<_, UsageError>(flag.or(of_file).unwrap_or(Listen(Some(default))).0)
    };
    let (metrics, healthz) = (file.metrics_bind_address, file.healthz_bind_address);
    let metrics = listen(args.metrics_bind_address, "metrics-bind-address", metrics, config::METRICS)?;
    let healthz = listen(args.healthz_bind_address, "healthz-bind-address", healthz, config::HEALTHZ)?;
    let passive_health = settings_file.value("passive-health", file.passive_health, config::switch)?;
    let boolean = |flag: Option<bool>, key: &str, text: Option<String>| {
        let set = settings_file.value(key, text, config::boolean)?;
        Ok::<_, UsageError>(flag.or(set))
    };
    let exclude_pods = boolean(args.exclude_pods, "exclude-pods", file.exclude_pods)?.unwrap_or(false);
    let exclude_cgroups =
        if args.exclude_cgroup.is_empty() { file.exclude_cgroup } else { args.exclude_cgroup.clone() };
    let mut options = agent::Options {
        kernel: lb_kernel::Options {
            pin_path: args.pin_path.clone().or(file.pin_path).unwrap_or_else(|| config::PIN_PATH.into()),
            cgroup: args.cgroup.clone().or(file.cgroup).map_or_else(cgroup::find_root, Ok)?,
            capacity: capacity(args, &settings_file, file.max_services, file.max_endpoints)?,
            node_ports,
            localhost_nodeports: localhost_nodeports.unwrap_or(true),
            node_netns: syscall::netns_cookie(),
            features: Features::probe(),
            excludes: exclude_pods || !exclude_cgroups.is_empty(),
            passive_health: args.passive_health.or(passive_health).unwrap_or(true),
            log: args.verbose >= 2,
        },
        state_dir: args.state_dir.clone().or(file.state_dir).unwrap_or_else(|| config::STATE_DIR.into()),
        min_sync_interval: args
            .min_sync_interval
            .or(settings_file.value("min-sync-interval", file.min_sync_interval, config::duration)?)
            .unwrap_or_default(),
        audit_interval: args
            .audit_interval
            .or(settings_file.value("audit-interval", file.audit_interval, config::duration)?)
            .unwrap_or(config::AUDIT_INTERVAL),
        self_test_interval: args
            .self_test_interval
            .or(settings_file.value("self-test-interval", file.self_test_interval, config::duration)?)
            .unwrap_or(config::SELF_TEST_INTERVAL),
        exclude_cgroups,
        exclude_pods,
        names,
        http: serve::Options { metrics, healthz, config: serde_json::Value::Null },
    };
    let service_proxy_name = args.service_proxy_name.clone().or(file.service_proxy_name);
    let other_nodes =
        boolean(args.node_ports_of_other_nodes, "node-ports-of-other-nodes", file.node_ports_of_other_nodes)?
            .unwrap_or(false);
    options.http.config =
        in_force(&location, &options, &settings, &node_port_list, service_proxy_name.as_deref());
    options.http.config["socklb"]["node-ports-of-other-nodes"] = other_nodes.into();
    syscall::keep_heap_small();
    let setup = Setup {
        service_proxy_name,
        node_name: Arc::clone(&settings.node_name),
        other_nodes,
        pods: exclude_pods,
        service_cidrs: settings.service_cidrs.is_some(),
        names: options.names.is_some(),
        access,
        state_dir: options.state_dir.clone(),
    };
    block_on(follow(location, setup, options, settings))?;
    Ok(ExitCode::SUCCESS)
}

/// The settings of the name server; `None` if it is off.
fn names_options(
    args: &RunArgs,
    settings_file: &SettingsFile,
    file: &FileConfig,
) -> Result<Option<names::Options>, UsageError> {
    let is_on = settings_file.value("names", file.names.clone(), config::switch)?;
    let domain = settings_file.value("cluster-domain", file.cluster_domain.clone(), config::domain)?;
    let service = settings_file.value("names-service", file.names_service.clone(), config::service_key)?;
    let upstream = settings_file.value("names-upstream", file.names_upstream.clone(), config::dns_servers)?;
    let forward = settings_file.value("names-forward", file.names_forward.clone(), config::domains)?;
    let bind =
        settings_file.value("names-bind-address", file.names_bind_address.clone(), config::bind_addresses)?;
    if !args.names.or(is_on).unwrap_or(false) {
        return Ok(None);
    }
    let bind = args.names_bind_address.clone().or(bind).unwrap_or_default().0;
    if bind.is_empty() {
        let problem = "--names=on: --names-bind-address is missing: name an address of this host, such as \
                       127.0.0.153:53";
        return Err(UsageError(problem.to_owned()));
    }
    let defaults = names::Options::default();
    Ok(Some(names::Options {
        domain: args.cluster_domain.clone().or(domain).map_or(defaults.domain, |Domain(name)| name),
        service: args.names_service.clone().or(service).unwrap_or(defaults.service),
        upstreams: args.names_upstream.clone().or(upstream).unwrap_or_default().0,
        forward: args.names_forward.clone().or(forward).unwrap_or_default().0,
        bind,
    }))
}

/// The sizes of the maps.
fn capacity(
    args: &RunArgs,
    file: &SettingsFile,
    services: Option<String>,
    endpoints: Option<String>,
) -> Result<Capacity, UsageError> {
    let defaults = Capacity::default();
    let services = args.max_services.or(file.value("max-services", services, config::entries)?);
    let endpoints = args.max_endpoints.or(file.value("max-endpoints", endpoints, config::entries)?);
    Ok(Capacity {
        services: services.unwrap_or(defaults.services),
        endpoints: endpoints.unwrap_or(defaults.endpoints),
    })
}

/// The addresses for node ports, and the setting for loopback, if there is one.
fn node_port_list(
    args: &RunArgs,
    file: &SettingsFile,
    addresses: Option<String>,
    localhost: Option<String>,
) -> Result<(NodePortList, Option<bool>), UsageError> {
    const KEYS: [&str; 2] = ["nodeport-addresses", "localhost-nodeports"];
    let addresses = file.value(KEYS[0], addresses, config::node_port_addresses)?;
    let localhost = file.value(KEYS[1], localhost, config::boolean)?;
    let list = args.nodeport_addresses.clone().or(addresses).unwrap_or_default();
    let localhost = args.localhost_nodeports.or(localhost);
    if list.localhost && localhost == Some(false) {
        let are_flags = [args.nodeport_addresses.is_some(), args.localhost_nodeports.is_some()];
        let place = |n: usize| if are_flags[n] { format!("--{}", KEYS[n]) } else { file.place(KEYS[n]) };
        let problem = format!("{} names localhost, but {} is false: drop one of them", place(0), place(1));
        return Err(UsageError(problem));
    }
    Ok((list, localhost))
}

fn block_on(agent: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(agent);
    // A thread may be blocked in a credentials program, or in a file system whose server does not answer.
    runtime.shutdown_timeout(LEAVE);
    ended
}

/// Runs the agent on its source.
async fn follow(
    location: Location,
    setup: Setup,
    options: agent::Options,
    settings: Settings,
) -> anyhow::Result<()> {
    let stop = stop_signals()?;
    let source = location.open(setup).await?;
    Ok(agent::run(source, options, settings, stop).await?)
}

/// The settings in force, as `/configz` shows them: under the flags' names.
fn in_force(
    location: &Location,
    options: &agent::Options,
    settings: &Settings,
    node_port_list: &NodePortList,
    service_proxy_name: Option<&str>,
) -> serde_json::Value {
    let agent::Options { kernel, http, .. } = options;
    let names = options.names.clone().unwrap_or_default();
    let address =
        |address: Option<SocketAddr>| address.map(|address| address.to_string()).unwrap_or_default();
    serde_json::json!({ "socklb": {
        "source": location.to_string(),
        "node-name": *settings.node_name,
        "cgroup": kernel.cgroup,
        "pin-path": kernel.pin_path,
        "state-dir": options.state_dir,
        "nodeport-addresses": node_port_list.to_string(),
        "external-ips": settings.external_ips,
        "packets": settings.packets,
        "service-cidr": ServiceCidrs(settings.service_cidrs.clone()).to_string(),
        "node-port-range": format!("{}-{}", kernel.node_ports.0, kernel.node_ports.1),
        "localhost-nodeports": kernel.localhost_nodeports,
        "service-proxy-name": service_proxy_name.unwrap_or_default(),
        "min-sync-interval": format!("{}ms", options.min_sync_interval.as_millis()),
        "audit-interval": format!("{}ms", options.audit_interval.as_millis()),
        "self-test-interval": format!("{}ms", options.self_test_interval.as_millis()),
        "metrics-bind-address": address(http.metrics),
        "healthz-bind-address": address(http.healthz),
        "exclude-cgroup": options.exclude_cgroups,
        "exclude-pods": options.exclude_pods,
        "names": if options.names.is_some() { "on" } else { "off" },
        "cluster-domain": *names.domain,
        "names-service": names.service.to_string(),
        "names-upstream": names.upstreams,
        "names-forward": names.forward,
        "names-bind-address": names.bind,
        "passive-health": if kernel.passive_health { "on" } else { "off" },
        "max-services": kernel.capacity.services,
        "max-endpoints": kernel.capacity.endpoints,
    } })
}

/// The source: from the flag, else the settings file, else the API server if credentials are found.
fn location(flag: Option<&str>, of_file: Option<Location>, access: &Access) -> Result<Location, UsageError> {
    let wrong = |text, hint| UsageError(format!("--source {text:?}: {hint}"));
    let of_flag = flag.map(|text| Location::parse(text).map_err(|hint| wrong(text, hint))).transpose()?;
    match of_flag.or(of_file) {
        Some(location) => Ok(location),
        None if access.is_found() => Ok(Location::api_server()),
        None => Err(UsageError(
            "--source is missing, and neither a kubeconfig nor a pod's credentials are found: name a manifest file or folder \
             with --source file:PATH, or a kubeconfig with --kubeconfig"
                .to_owned(),
        )),
    }
}

/// The name of this node's Node: the setting, else `$NODE_NAME`, else the host name, trimmed and in lower
/// case.
fn node_name(setting: Option<String>) -> Result<Arc<str>, UsageError> {
    let name = setting
        .or_else(|| std::env::var("NODE_NAME").ok())
        .or_else(|| nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()))
        .map(|name| name.trim().to_lowercase())
        .filter(|name| !name.is_empty());
    name.map(Into::into)
        .ok_or_else(|| UsageError("--node-name is missing and the host has no name".to_owned()))
}

/// Becomes true on SIGTERM or SIGINT. Must be called within a tokio runtime.
pub(super) fn stop_signals() -> std::io::Result<watch::Receiver<bool>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    // Lives as long as the process.
    let _waiting = tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        info!(signal = name, "stopping");
        let _receiver_gone = stop.send(true);
    });
    Ok(stopped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources() {
        let access = || Access { kubeconfig: Some("config".into()), apiserver: None };
        let of = |flag: Option<&str>, of_file: Option<&str>| {
            let of_file = of_file.map(|text| Location::parse(text).unwrap());
            location(flag, of_file, &access()).map(|location| location.to_string())
        };
        for (flag, of_file, expected) in
            [(None, None, "kube"), (None, Some("file:a"), "file:a"), (Some("kube"), Some("file:a"), "kube")]
        {
            assert_eq!(of(flag, of_file).unwrap(), expected, "{flag:?}, {of_file:?}");
        }
        let UsageError(problem) = of(Some("a/b"), Some("file:a")).unwrap_err();
        assert_eq!(problem, "--source \"a/b\": expected kube or file:PATH");
    }

    /// The agent can read every installed settings file.
    #[test]
    fn the_settings_files_of_the_manifests_are_read() {
        let manifests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
        for name in ["base", "overlays/kube-proxy-free", "overlays/beside-kube-proxy", "systemd"] {
            let (_, file): (_, FileConfig) =
                SettingsFile::read(&manifests.join(name).join("socklb.yaml")).unwrap();
            let source = if name == "systemd" { "file:/etc/socklb/manifests" } else { "kube" };
            assert_eq!(file.source.as_deref(), Some(source), "{name}");
            for address in [file.metrics_bind_address, file.healthz_bind_address] {
                assert!(matches!(config::bind_address(&address.unwrap()), Ok(Listen(Some(_)))), "{name}");
            }
        }
    }
}
