//! The agent in this process: state and kernel, without source and clock.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Instant,
};

use anyhow::Context as _;
use lb_agent::controller::sweep;
use lb_core::{
    desired::{FrontendAddress, Settings},
    plan::{Capacity, Plan},
    stale::{Flow, Search},
    state::State,
    tables::{Entry, Image},
};
use lb_kernel::{Features, Kernel, KernelError, Options, pins, sockets};

use crate::{cluster::Cluster, sandbox::Sandbox};

/// Map sizes that suffice for most tests; the default ones take much longer to allocate.
pub const SMALL: Capacity = Capacity { services: 256, endpoints: 2048 };

/// The settings of a node called `node`.
#[must_use]
pub fn settings() -> Settings {
    Settings::of_node("node")
}

/// Options for a sandbox, whose network namespace counts as the node's.
#[must_use]
pub fn options(sandbox: &Sandbox) -> Options {
    Options {
        pin_path: sandbox.pin_path(),
        cgroup: sandbox.cgroup().path().to_owned(),
        capacity: SMALL,
        node_ports: lb_common::limits::NODE_PORTS,
        localhost_nodeports: true,
        node_netns: sandbox.netns().cookie(),
        features: Features::probe(),
        excludes: false,
        passive_health: true,
        log: false,
    }
}

/// State and kernel.
pub struct Agent {
    /// The state.
    pub state: State,
    /// The kernel.
    pub kernel: Kernel,
}

impl Agent {
    /// Starts with default settings and small maps.
    ///
    /// # Panics
    ///
    /// If the programs cannot be loaded and attached.
    #[must_use]
    pub fn start(sandbox: &Sandbox) -> Self {
        Self::start_with(&options(sandbox), settings(), Vec::new()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Starts with the given settings, over whatever is pinned.
    ///
    /// # Errors
    ///
    /// As [`Kernel::open`].
    pub fn start_with(
        options: &Options,
        settings: Settings,
        interfaces: Vec<IpAddr>,
    ) -> Result<Self, KernelError> {
        let kernel = Kernel::open(options, || {})?;
        let found = kernel.maps().image()?;
        let state = State::new(settings, interfaces, kernel.maps().capacity(), &found);
        Ok(Self { state, kernel })
    }

    /// Computes and applies a plan, as the agent's loop does.
    ///
    /// # Panics
    ///
    /// If the plan fails.
    pub fn sync(&mut self) -> Plan {
        self.state.settled(self.kernel.settled());
        let plan = self.state.sync();
        let done = self.kernel.apply(&plan).unwrap_or_else(|error| panic!("{error}"));
        self.state.miss(done.no_room);
        plan
    }

    /// Brings the maps to the state of a cluster.
    ///
    /// # Panics
    ///
    /// If the plan fails.
    pub fn follow(&mut self, cluster: &Cluster) -> Plan {
        cluster.feed(&mut self.state);
        self.sync()
    }

    /// Searches once for stale sockets and destroys those that are due at `now`, as the agent's loop does.
    /// Returns the flows of the destroyed sockets, one per socket.
    ///
    /// # Panics
    ///
    /// If a socket cannot be read or destroyed.
    pub fn sweep(&mut self, options: &Options, now: Instant) -> Vec<Flow> {
        let Some(search) = self.search(options, now) else { return Vec::new() };
        let Search { protocols, endpoints, addresses } = search.clone();
        let wanted = sockets::SocketFilter { protocols, endpoints, addresses };
        let (pin_path, cgroup) = (&options.pin_path, &options.cgroup);
        let found = sockets::find(pin_path, cgroup, &wanted).unwrap_or_else(|error| panic!("{error}"));
        assert!(found.problem.is_none(), "{:?}", found.problem);
        let standings = self.state.decide_stale(&search, &sweep::ways(&found.sockets), now);
        let (due, has_more) = sweep::due_now(found.sockets, &standings, now, sweep::BATCH);
        if !has_more {
            self.state.finish_stale_search(&search, now);
        }
        let destroyed = sockets::destroy(pin_path, due).unwrap_or_else(|error| panic!("{error}"));
        assert!(destroyed.problem.is_none(), "{:?}", destroyed.problem);
        destroyed.sockets.iter().map(sweep::way).collect()
    }

    /// What a sweep at `now` would search. It counts as a sweep.
    ///
    /// # Panics
    ///
    /// If the records of sockets cannot be read.
    pub fn search(&mut self, options: &Options, now: Instant) -> Option<Search> {
        self.state.begin_stale_search();
        let table = sockets::SocketTable::open(&options.pin_path).expect("pinned maps");
        let records = table.answering().unwrap_or_else(|error| panic!("{error}"));
        self.state.search_stale(&sweep::used(&records), now)
    }

    /// Waits until everything freed is reusable.
    pub fn settle(&mut self) {
        while self.state.holds_back() {
            self.kernel.settle();
            self.state.settled(self.kernel.settled());
        }
    }

    /// The content of the kernel's maps.
    ///
    /// # Panics
    ///
    /// If they cannot be read.
    #[must_use]
    pub fn image(&self) -> Image {
        self.kernel.maps().image().unwrap_or_else(|error| panic!("{error}"))
    }

    /// The pins of an agent on this kernel, whether they exist or not.
    #[must_use]
    pub fn pins(sandbox: &Sandbox) -> Vec<PathBuf> {
        pins::names(Features::probe(), true).map(|name| sandbox.pin_path().join(name)).collect()
    }
}

/// The options of a sandbox in every mode that this kernel's programs have: records in slots, or in socket
/// storage alone.
#[must_use]
pub fn modes(sandbox: &Sandbox) -> Vec<Options> {
    let options = options(sandbox);
    let storage = Features { compare_and_swap: false, ..options.features };
    if options.features == storage {
        return vec![options];
    }
    vec![options.clone(), Options { features: storage, ..options }]
}

/// What a program can observe of an image: the endpoints and settings of each address, and which addresses
/// share a service port. Ids and positions are internal to the encoder.
pub type Content = BTreeMap<FrontendAddress, (Vec<SocketAddr>, u32, u32, FrontendAddress)>;

/// What a program can observe of an image.
///
/// # Errors
///
/// If a key refers to a missing entry.
pub fn content(image: &Image) -> anyhow::Result<Content> {
    let mut first_of_port: BTreeMap<u32, FrontendAddress> = BTreeMap::new();
    let mut content = Content::new();
    for (address, id) in &image.services {
        let frontend = image.frontends.get(id).with_context(|| format!("{address}: no entry {id}"))?;
        let entries = image.entries(address.ip.is_ipv6(), frontend.run);
        let entries = entries.with_context(|| format!("{address}: no run {:?}", frontend.run))?;
        let mut endpoints: Vec<SocketAddr> = entries.iter().map(Entry::address).collect();
        endpoints.sort_unstable();
        let first = *first_of_port.entry(frontend.service_id).or_insert(*address);
        content.insert(*address, (endpoints, frontend.flags, frontend.affinity_seconds, first));
    }
    Ok(content)
}
