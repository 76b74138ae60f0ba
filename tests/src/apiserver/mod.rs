//! An API server for tests: Services, EndpointSlices, Nodes and ServiceCIDRs, and the faults that a real one shows.
//!
//! # Purpose
//!
//! Speaks enough of the Kubernetes API that kube-rs and kubectl work against it: list with pages, watch with
//! bookmarks and streaming lists, selectors, create, update, patch, apply and delete. [`Faults`] makes it misbehave.
//!
//! Events can be created and patched, and are read with [`ApiServer::events`].
//!
//! Not promised: authentication but by one token, admission, other kinds, the checks of field values, strategic merges of lists (a
//! list is replaced), and the timing of a real server.
//!
//! # Invariants
//!
//! - One counter numbers all changes of all kinds, as etcd does.
//! - [`ApiServer::stop`] closes every connection; a start afterwards listens on the same address.

mod body;
mod count;
mod defaults;
mod discovery;
mod events;
mod http;
mod selector;
mod store;

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Pod;
use nix::sys::socket::{
    self, AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage,
    sockopt,
};
use serde_json::Value;
use tokio::sync::{oneshot, watch};

use self::store::{Change, Store};
pub use self::store::{Kind, Refusal};
use crate::cluster::{self, Cluster};

/// What goes wrong at the moment. The default is nothing.
#[derive(Clone, Debug)]
pub struct Faults {
    /// So many of the next lists and watches are refused with 429 and this many seconds in `Retry-After`.
    pub too_many_requests: (u32, u32),
    /// So many of the next requests fail with 500.
    pub internal_errors: u32,
    /// So many of the next events reach no watch, and nobody is told.
    pub lost_events: u32,
    /// How long an answer to a list or the first event of a watch waits.
    pub delay: Duration,
    /// Whether `sendInitialEvents` is known. Older servers refuse it.
    pub has_streaming_lists: bool,
    /// Streaming lists begin with the state so many changes ago, and those changes come before the end of the list.
    pub changes_in_lists: u64,
    /// A kind that the server does not have, as an older one: 404.
    pub unknown: Option<Kind>,
    /// A kind for which a rule is missing: 403.
    pub forbidden: Option<Kind>,
    /// The bearer token without which requests are refused with 401.
    pub token: Option<String>,
    /// How often a watch that asked for bookmarks gets one.
    pub bookmark_interval: Duration,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            too_many_requests: (0, 0),
            internal_errors: 0,
            lost_events: 0,
            delay: Duration::ZERO,
            has_streaming_lists: true,
            changes_in_lists: 0,
            unknown: None,
            forbidden: None,
            token: None,
            bookmark_interval: Duration::from_millis(200),
        }
    }
}

/// What a test may want to know of the requests so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Lists, each page counted, streaming lists too, [`Self::confirmations`] not.
    pub lists: u64,
    /// Lists of an object of no possible name, which ask whether a version is reached.
    pub confirmations: u64,
    /// Watches without initial events.
    pub watches: u64,
    /// Changes that were sent before the end of a streaming list.
    pub changes_in_lists: u64,
    /// Octets that were written to connections, with heads of answers.
    pub octets: u64,
    /// Answers with 410, in a status or in an event.
    pub expired: u64,
    /// Answers that the resource version is too large.
    pub too_large: u64,
    /// Requests for a kind that the server does not have.
    pub unknown: u64,
}

/// A change that was written to a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What changed.
    pub kind: Kind,
    /// Namespace and name.
    pub name: cluster::Name,
    /// When the event was handed to the connection.
    pub at: Instant,
}

/// What ends watches that are open. Each number is raised to make it so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Signals {
    /// Watches end in the middle of a chunk.
    cut: u64,
    /// Watches end with an event of code 410.
    expire: u64,
    /// Connections up to this one say nothing any longer.
    frozen: u64,
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    faults: Mutex<Faults>,
    requests: Mutex<Requests>,
    /// Events, which no watch sees.
    events: Mutex<events::Events>,
    /// Who wants to know of events.
    written: Mutex<Option<mpsc::Sender<Written>>>,
    /// The resource version, for those who wait for a change.
    version: watch::Sender<u64>,
    signals: watch::Sender<Signals>,
    /// Number of the last connection.
    n_connections: Mutex<u64>,
    /// Octets written to connections.
    n_octets: Arc<AtomicU64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that panicked while it held the lock has failed already.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn change<R>(&self, change: impl FnOnce(&mut Store) -> R) -> R {
        let mut store = lock(&self.store);
        let result = change(&mut store);
        self.version.send_replace(store.version());
        result
    }

    /// Tells of a change that is about to be written.
    fn note_written(&self, change: &Change) {
        if let Some(written) = &*lock(&self.written) {
            let (kind, name) = (change.kind, change.name.clone());
            let _nobody_listens_now = written.send(Written { kind, name, at: Instant::now() });
        }
    }

    /// The changes after a version that a watch of this kind sees, or `None` if they are forgotten.
    fn changes_after(&self, kind: Kind, version: u64) -> Option<Vec<Change>> {
        let changes = lock(&self.store).changes_after(kind, version)?;
        if changes.is_empty() {
            return Some(changes);
        }
        let mut faults = lock(&self.faults);
        let n_lost = changes.len().min(faults.lost_events as usize);
        faults.lost_events -= u32::try_from(n_lost).unwrap_or(u32::MAX);
        Some(changes.into_iter().skip(n_lost).collect())
    }
}

/// A running API server. It ends when dropped.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    /// One socket for the server's life: it listens, and while the server is stopped it is bound alone, so that the
    /// kernel gives the port to no other.
    socket: OwnedFd,
    running: Option<(oneshot::Sender<()>, thread::JoinHandle<()>)>,
}

/// Binds a socket to an address and says to which, if any port will do.
///
/// The socket keeps the port when it no longer listens. One does not whose port the kernel chose, so that is another.
fn bind(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(family, SockType::Stream, flags, None)?;
    let is_chosen = address.port() == 0;
    // Connections in TIME_WAIT do not matter. Where the kernel chooses, it would take the port of another such socket.
    socket::setsockopt(&fd, sockopt::ReuseAddr, &!is_chosen)?;
    socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    if !is_chosen {
        return Ok((fd, address));
    }
    socket::setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    let bound: SockaddrStorage = socket::getsockname(fd.as_raw_fd())?;
    let port =
        bound.as_sockaddr_in().map(SockaddrIn::port).or(bound.as_sockaddr_in6().map(SockaddrIn6::port));
    bind(SocketAddr::new(address.ip(), port.ok_or(io::ErrorKind::Unsupported)?))
}

impl ApiServer {
    /// Starts without objects on a free port of 127.0.0.1.
    ///
    /// # Panics
    ///
    /// If there is no port to be had.
    #[must_use]
    pub fn start() -> Self {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into()).expect("a port")
    }

    /// Starts without objects.
    ///
    /// # Errors
    ///
    /// If the address cannot be listened on.
    pub fn start_at(address: SocketAddr) -> io::Result<Self> {
        let (socket, address) = bind(address)?;
        let store = Store::new();
        let shared = Shared {
            version: watch::Sender::new(store.version()),
            store: Mutex::new(store),
            faults: Mutex::default(),
            requests: Mutex::default(),
            events: Mutex::default(),
            written: Mutex::default(),
            signals: watch::Sender::new(Signals::default()),
            n_connections: Mutex::default(),
            n_octets: Arc::default(),
        };
        let mut server = Self { shared: Arc::new(shared), address, socket, running: None };
        server.resume()?;
        Ok(server)
    }

    /// Listens again after [`Self::stop`], on the same address.
    ///
    /// # Errors
    ///
    /// The system calls'.
    pub fn resume(&mut self) -> io::Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        // Connections of before may be in TIME_WAIT.
        socket::setsockopt(&self.socket, sockopt::ReuseAddr, &true)?;
        socket::listen(&self.socket, Backlog::MAXCONN)?;
        let listener = TcpListener::from(self.socket.try_clone()?);
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name("apiserver".to_owned()).spawn(move || {
            // The runtime ends with the thread, and with it every connection.
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                tokio::select! {
                    () = http::serve(listener, shared) => {}
                    _ = stopped => {}
                }
            });
        })?;
        self.running = Some((stop, thread));
        Ok(())
    }

    /// Closes all connections and stops listening. The objects stay.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            let _has_panicked = thread.join();
            // To close it would not do: a process that is being started has its parent's descriptors.
            let _listens_no_more = socket::shutdown(self.socket.as_raw_fd(), Shutdown::Both);
            let _is_set = socket::setsockopt(&self.socket, sockopt::ReuseAddr, &false);
        }
    }

    /// Stops, and starts with the same objects under other resource versions, as after a restore from a backup:
    /// they go on from `version`, and nothing is known of earlier changes.
    ///
    /// # Panics
    ///
    /// If the kernel does not let it listen.
    pub fn restart_at_version(&mut self, version: u64) {
        self.stop();
        self.shared.change(|store| store.renumber(version));
        self.resume().expect("a socket that listens");
    }

    /// Has the objects and the version of before, as after a restore of etcd from a backup, for which the server is stopped.
    /// Changes that follow get the numbers of those that are lost.
    ///
    /// # Panics
    ///
    /// If that state is forgotten.
    pub fn restore(&self, version: u64) {
        self.shared.change(|store| store.restore(version)).unwrap_or_else(|refusal| panic!("{refusal:?}"));
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://ADDRESS`
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A kubeconfig that leads here.
    #[must_use]
    pub fn kubeconfig(&self) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: '{}'}}}}]\n\
             users: [{{name: test, user: {{}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: test}}}}]\n",
            self.url()
        )
    }

    /// Creates an object or replaces the one of its name, as `kubectl apply` does.
    ///
    /// # Panics
    ///
    /// If the object is refused.
    pub fn apply(&self, object: impl Into<cluster::Object>) {
        let (kind, object) = value(object.into());
        self.shared
            .change(|store| store.upsert(kind, object))
            .unwrap_or_else(|refusal| panic!("{refusal:?}"));
    }

    /// Creates a Pod or replaces the one of its name.
    ///
    /// # Panics
    ///
    /// If it is refused.
    pub fn apply_pod(&self, pod: &Pod) {
        let object = serde_json::to_value(pod).expect("objects of the API are JSON");
        let applied = self.shared.change(|store| store.upsert(Kind::Pod, object));
        drop(applied.unwrap_or_else(|refusal| panic!("{refusal:?}")));
    }

    /// Creates or replaces all objects of a cluster and deletes all others.
    ///
    /// # Panics
    ///
    /// If an object is refused.
    pub fn set(&self, cluster: &Cluster) {
        let now = self.cluster();
        let gone = |kind, now: Vec<cluster::Name>, wanted: BTreeSet<cluster::Name>| {
            for (namespace, name) in now.into_iter().filter(|name| !wanted.contains(name)) {
                self.delete(kind, &namespace, &name);
            }
        };
        gone(Kind::Service, now.services.into_keys().collect(), cluster.services.keys().cloned().collect());
        gone(Kind::Node, now.nodes.into_keys().collect(), cluster.nodes.keys().cloned().collect());
        let cidrs = cluster.service_cidrs.keys().cloned().collect();
        gone(Kind::ServiceCidr, now.service_cidrs.into_keys().collect(), cidrs);
        cluster.service_cidrs.values().for_each(|cidr| self.apply(cidr.clone()));
        cluster.services.values().for_each(|service| self.apply(service.clone()));
        cluster.slices.values().for_each(|slice| self.apply(slice.clone()));
        // Afterwards, as the slices' controller does: a service that moves to another slice is never without one.
        gone(Kind::Slice, now.slices.into_keys().collect(), cluster.slices.keys().cloned().collect());
        cluster.nodes.values().for_each(|node| self.apply(node.clone()));
    }

    /// Deletes an object. A Node or ServiceCIDR has an empty namespace.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        let deleted = self.shared.change(|store| store.delete(kind, namespace, name));
        drop(deleted.unwrap_or_else(|refusal| panic!("{refusal:?}")));
    }

    /// All objects.
    ///
    /// # Panics
    ///
    /// If an object is not as the API defines it, which the server would have refused.
    #[must_use]
    pub fn cluster(&self) -> Cluster {
        let objects = lock(&self.shared.store).all();
        Cluster::new().with(objects.iter().map(|object| cluster::object(object).expect("a checked object")))
    }

    /// The resource version of the last change.
    #[must_use]
    pub fn version(&self) -> u64 {
        lock(&self.shared.store).version()
    }

    /// Changes what goes wrong.
    pub fn set_faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut lock(&self.shared.faults));
    }

    /// Ends every open watch in the middle of a chunk.
    pub fn cut_watches(&self) {
        self.shared.signals.send_modify(|signals| signals.cut += 1);
    }

    /// Forgets all changes, as a compaction does, and ends every open watch with an event of code 410.
    pub fn expire(&self) {
        self.compact();
        self.shared.signals.send_modify(|signals| signals.expire += 1);
    }

    /// Forgets all changes: who resumes a watch gets 410. Open watches go on.
    pub fn compact(&self) {
        lock(&self.shared.store).compact();
    }

    /// Leaves every open connection half-open: nothing is sent on it and nothing read, and it is not closed. New
    /// connections work.
    pub fn freeze(&self) {
        let last = *lock(&self.shared.n_connections);
        self.shared.signals.send_modify(|signals| signals.frozen = last);
    }

    /// Tells from now on of each change that is written to a watch, not of initial events. Ends what an earlier call
    /// returned.
    #[must_use]
    pub fn written(&self) -> mpsc::Receiver<Written> {
        let (sender, receiver) = mpsc::channel();
        *lock(&self.shared.written) = Some(sender);
        receiver
    }

    /// The Events (`events.k8s.io/v1`) that were written, by name.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        lock(&self.shared.events).all()
    }

    /// The requests so far.
    #[must_use]
    pub fn requests(&self) -> Requests {
        let octets = self.shared.n_octets.load(Ordering::Relaxed);
        Requests { octets, ..*lock(&self.shared.requests) }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn value(object: cluster::Object) -> (Kind, Value) {
    let (kind, value) = match object {
        cluster::Object::Service(service) => (Kind::Service, serde_json::to_value(service)),
        cluster::Object::Slice(slice) => (Kind::Slice, serde_json::to_value(slice)),
        cluster::Object::Node(node) => (Kind::Node, serde_json::to_value(node)),
        cluster::Object::ServiceCidr(cidr) => (Kind::ServiceCidr, serde_json::to_value(cidr)),
    };
    (kind, value.expect("objects of the API are JSON"))
}
