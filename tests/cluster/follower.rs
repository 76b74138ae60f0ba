//! The agent without a kernel: source, state, and an image in place of the maps.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use lb_agent::source::{
    Source,
    cluster::{Access, KubeSource, Selection, Timing},
};
use lb_core::{
    model::{Protocol::Tcp, Store, ingest},
    plan::Capacity,
    state::State,
    tables::Image,
};
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    apiserver::ApiServer,
    client::call,
    cluster::{self, Cluster},
    controlplane::Api,
};
use nix::errno::Errno;
use tokio::runtime::Runtime;

/// Timeout of a condition in a test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Watched kinds: Services, EndpointSlices, Nodes, ServiceCIDRs, and the Pods of the own node.
pub(crate) const N_KINDS: u64 = 5;

pub(crate) const NODE: &str = "node";

/// Short times for tests: a half-open connection is detected in a second.
pub(crate) const TIMING: Timing = Timing {
    answer: Duration::from_secs(1),
    idle: Duration::from_secs(1),
    watch: Duration::from_secs(290),
    first_pause: Duration::from_millis(20),
    rare: Duration::from_millis(200),
};

/// All kinds.
pub(crate) const ALL: Selection<'_> = Selection {
    service_proxy_name: None,
    node_name: NODE,
    other_nodes: true,
    pods: true,
    service_cidrs: true,
    names: false,
};

/// Opens a source with a kubeconfig, as the agent does.
pub(crate) fn open(runtime: &Runtime, server: &dyn Api) -> KubeSource {
    open_with(runtime, server, ALL, TIMING)
}

fn open_with(runtime: &Runtime, server: &dyn Api, wanted: Selection<'_>, timing: Timing) -> KubeSource {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kubeconfig");
    fs::write(&path, server.kubeconfig()).unwrap();
    let access = Access { kubeconfig: Some(path), apiserver: None };
    runtime.block_on(KubeSource::open(&access, wanted, timing)).unwrap()
}

/// A source, and an agent on the kernel that follows it.
pub(crate) struct InKernel {
    runtime: Runtime,
    source: KubeSource,
    agent: Agent,
}

impl InKernel {
    pub(crate) fn start(sandbox: &Sandbox, server: &dyn Api) -> Self {
        let runtime = runtime();
        let source = open(&runtime, server);
        Self { runtime, source, agent: Agent::start(sandbox) }
    }

    /// Follows the server until TCP calls of services have these outcomes. Returns how long it took.
    pub(crate) fn until(&mut self, wanted: &[(SocketAddr, Result<SocketAddr, Errno>)]) -> Duration {
        let started = Instant::now();
        while !wanted.iter().all(|(service, outcome)| call(*service, Tcp) == *outcome) {
            assert!(started.elapsed() < PATIENCE, "never happened: {wanted:?}");
            self.agent.settle();
            let source = &mut self.source;
            let moment = Duration::from_millis(5);
            let changed =
                self.runtime.block_on(async { tokio::time::timeout(moment, source.changed()).await });
            if changed.is_ok() {
                self.agent.state.change(|store| source.apply(store));
            }
            if self.source.is_complete() && self.agent.state.needs_sync() {
                self.agent.sync();
            }
        }
        started.elapsed()
    }
}

/// Source, state and image.
pub(crate) struct Follower {
    runtime: Runtime,
    pub(crate) source: KubeSource,
    pub(crate) state: State,
    pub(crate) image: Image,
}

impl Follower {
    pub(crate) fn start(server: &dyn Api) -> Self {
        Self::start_with(server, ALL, TIMING)
    }

    /// A server with [`cluster`], and an agent that has followed it.
    pub(crate) fn of_services(n_services: usize) -> (ApiServer, Self) {
        let server = server_of(&cluster(n_services));
        let mut follower = Self::start(&server);
        follower.until_like(&server);
        (server, follower)
    }

    /// With a selection and times that differ from [`ALL`] and [`TIMING`].
    pub(crate) fn start_with(server: &dyn Api, wanted: Selection<'_>, timing: Timing) -> Self {
        let runtime = runtime();
        let source = open_with(&runtime, server, wanted, timing);
        Self::of(runtime, source)
    }

    /// With a kubeconfig file that the test keeps.
    pub(crate) fn with_kubeconfig(path: &Path) -> Self {
        let runtime = runtime();
        let access = Access { kubeconfig: Some(path.to_owned()), apiserver: None };
        let source = runtime.block_on(KubeSource::open(&access, ALL, TIMING)).unwrap();
        Self::of(runtime, source)
    }

    fn of(runtime: Runtime, source: KubeSource) -> Self {
        let image = Image::default();
        let state = State::new(agent::settings(), Vec::new(), Capacity::default(), &image);
        Self { runtime, source, state, image }
    }

    /// Waits briefly for changes and applies them. Syncs if the agent would.
    pub(crate) fn step(&mut self) {
        let moment = Duration::from_millis(5);
        let source = &mut self.source;
        let changed = self.runtime.block_on(async { tokio::time::timeout(moment, source.changed()).await });
        if changed.is_ok() {
            self.state.change(|store| source.apply(store));
        }
        if self.source.is_complete() && self.state.needs_sync() {
            let plan = self.state.sync();
            plan.apply(&mut self.image);
            self.state.settled(plan.number());
        }
    }

    pub(crate) fn steps(&mut self, n: usize) {
        (0..n).for_each(|_| self.step());
    }

    pub(crate) fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < end, "never happened: {what}");
            self.step();
        }
    }

    /// Waits until the state equals the one computed from scratch from the server's objects.
    pub(crate) fn until_like(&mut self, server: &dyn Api) {
        let cluster = server.cluster();
        let mut expected = Store::new();
        let (_all, _issues) = cluster.fill(&mut expected);
        self.until("the store holds the server's objects", |follower| {
            follower.source.is_complete()
                && *follower.state.store() == expected
                && !follower.state.needs_sync()
        });
        assert_eq!(self.image, *self.state.image());
        let mut scratch = State::new(agent::settings(), Vec::new(), Capacity::default(), &self.image);
        cluster.feed(&mut scratch);
        let plan = scratch.sync();
        assert!(plan.is_empty(), "computed from scratch, {plan:?} would be missing");
    }

    pub(crate) fn n_frontends(&self) -> usize {
        self.image.services.len()
    }
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A server with these objects.
pub(crate) fn server_of(objects: &Cluster) -> ApiServer {
    let server = ApiServer::start();
    server.set(objects);
    server
}

/// The address of the service with this number.
pub(crate) fn service_address(number: usize) -> SocketAddr {
    format!("10.96.{}.{}:80", 1 + number / 250, 1 + number % 250).parse().unwrap()
}

/// This number of services with three endpoints each, and two nodes.
pub(crate) fn cluster(n_services: usize) -> Cluster {
    let mut cluster = Cluster::new();
    for number in 0..n_services {
        cluster.serve(&format!("web-{number}"), service_address(number), Tcp, &endpoints(number, 3));
    }
    cluster.with([
        cluster::node("node", &["192.0.2.1".parse().unwrap()]),
        cluster::node("other", &["192.0.2.2".parse().unwrap()]),
    ])
}

/// Endpoints of the service with this number.
pub(crate) fn endpoints(number: usize, n_endpoints: usize) -> Vec<SocketAddr> {
    let address =
        |endpoint| format!("10.{}.{}.{}:8080", 1 + endpoint, number / 250, 1 + number % 250).parse().unwrap();
    (0..n_endpoints).map(address).collect()
}

/// Annotates all slices as changed now.
pub(crate) fn trigger_now(objects: &mut Cluster) {
    for slice in objects.slices.values_mut() {
        let annotations = slice.metadata.annotations.get_or_insert_default();
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        annotations.insert(ingest::TRIGGER_TIME.to_owned(), now);
    }
}
