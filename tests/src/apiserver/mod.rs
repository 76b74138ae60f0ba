//! An API server for tests: Services, EndpointSlices, Nodes and ServiceCIDRs, and the faults of a real one.
//!
//! # Purpose
//!
//! Implements enough of the Kubernetes API for kube-rs and kubectl: list with pages, watch with bookmarks and
//! streaming lists, selectors, create, update, patch, apply and delete. [`Faults`] makes it misbehave.
//!
//! Events can be created and patched. [`ApiServer::events`] reads them.
//!
//! Not implemented: authentication other than one token, admission, other kinds, validation of most field
//! values, strategic merges of lists (a list is replaced). The timing of a real server is not reproduced.
//!
//! # Invariants
//!
//! - One counter numbers the changes of all kinds, as in etcd.
//! - [`ApiServer::stop`] closes every connection; [`ApiServer::resume`] listens on the same address.

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

pub use self::store::Kind;
use self::store::{Change, Store};
use crate::cluster::{self, Cluster};

/// The current faults. None by default.
#[derive(Clone, Debug)]
pub struct Faults {
    /// The next `.0` lists and watches are refused with 429 and `Retry-After: .1` (seconds).
    pub too_many_requests: (u32, u32),
    /// This number of requests fails with 500.
    pub internal_errors: u32,
    /// This number of events is silently dropped from every watch.
    pub lost_events: u32,
    /// Delay of each list response and of the first event of each watch.
    pub delay: Duration,
    /// Whether `sendInitialEvents` is supported. Older servers refuse it.
    pub has_streaming_lists: bool,
    /// Streaming lists begin with the state this number of changes ago; the changes follow before the end of
    /// the list.
    pub changes_in_lists: u64,
    /// A kind that the server lacks, as an older one does: 404.
    pub unknown: Option<Kind>,
    /// A kind without RBAC rule: 403.
    pub forbidden: Option<Kind>,
    /// The bearer token; requests without it are refused with 401.
    pub token: Option<String>,
    /// The interval of bookmarks, for watches that ask for them.
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

/// Counters of the requests so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Lists: each page and each streaming list counts, [`Self::confirmations`] do not.
    pub lists: u64,
    /// Lists of an object with an impossible name, which ask whether a version is reached.
    pub confirmations: u64,
    /// Watches without initial events.
    pub watches: u64,
    /// Changes sent before the end of a streaming list.
    pub changes_in_lists: u64,
    /// Bytes written to connections, including response headers.
    pub octets: u64,
    /// Responses and events with 410.
    pub expired: u64,
    /// Responses that the resource version is too large.
    pub too_large: u64,
    /// Requests for a kind that the server lacks.
    pub unknown: u64,
}

/// A change written to a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What changed.
    pub kind: Kind,
    /// Namespace and name.
    pub name: cluster::Name,
    /// When the event was passed to the connection.
    pub at: Instant,
}

/// Closes open watches. A test increases the number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Signals {
    /// Closes watches in the middle of a chunk.
    cut: u64,
    /// Closes watches with an event of code 410.
    expire: u64,
    /// Connections up to this number are silent.
    frozen: u64,
}

#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    faults: Mutex<Faults>,
    requests: Mutex<Requests>,
    /// Events. No watch returns them.
    events: Mutex<events::Events>,
    /// The subscriber to written events.
    written: Mutex<Option<mpsc::Sender<Written>>>,
    /// The resource version, for those that wait for a change.
    version: watch::Sender<u64>,
    signals: watch::Sender<Signals>,
    /// The number of the last connection.
    n_connections: Mutex<u64>,
    n_octets: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means that the test has failed already.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn change<R>(&self, change: impl FnOnce(&mut Store) -> R) -> R {
        let mut store = lock(&self.store);
        let result = change(&mut store);
        self.version.send_replace(store.version());
        result
    }

    /// Sends a change, just before it is written, to the subscriber.
    fn note_written(&self, change: &Change) {
        if let Some(written) = &*lock(&self.written) {
            let (kind, name) = (change.kind, change.name.clone());
            let _nobody_listens_now = written.send(Written { kind, name, at: Instant::now() });
        }
    }

    /// The changes after a version that a watch of this kind receives; `None` if they are forgotten.
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

/// A running API server. It stops on drop.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    /// One socket for the lifetime of the server: listening, or only bound while the server is stopped. So
    /// the kernel gives the port to no other process.
    socket: OwnedFd,
    running: Option<(oneshot::Sender<()>, thread::JoinHandle<()>)>,
}

/// Binds a socket and returns its address; port 0 lets the kernel choose.
///
/// The socket keeps its port when it stops listening, but the kernel releases a port of its own choice.
/// So such a port is bound again with a second socket.
fn bind(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(family, SockType::Stream, flags, None)?;
    let is_chosen = address.port() == 0;
    // Ignores connections in TIME_WAIT. With port 0 the kernel would otherwise choose the port of another
    // such socket.
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
    /// If there is no free port.
    #[must_use]
    pub fn start() -> Self {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into()).expect("a port")
    }

    /// Starts without objects.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
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
            n_octets: AtomicU64::default(),
        };
        let mut server = Self { shared: Arc::new(shared), address, socket, running: None };
        server.resume()?;
        Ok(server)
    }

    /// Listens again after [`Self::stop`], on the same address.
    ///
    /// # Errors
    ///
    /// The system calls' errors.
    pub fn resume(&mut self) -> io::Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        // Earlier connections may be in TIME_WAIT.
        socket::setsockopt(&self.socket, sockopt::ReuseAddr, &true)?;
        socket::listen(&self.socket, Backlog::MAXCONN)?;
        let listener = TcpListener::from(self.socket.try_clone()?);
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name("apiserver".to_owned()).spawn(move || {
            // The runtime stops with the thread and drops every connection.
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

    /// Closes all connections and stops listening. The objects are kept.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            let _has_panicked = thread.join();
            // shutdown(2), not close(2): a process that is just being spawned inherits the descriptor.
            let _listens_no_more = socket::shutdown(self.socket.as_raw_fd(), Shutdown::Both);
            let _is_set = socket::setsockopt(&self.socket, sockopt::ReuseAddr, &false);
        }
    }

    /// Restarts with the same objects under other resource versions, as after a restore from a backup.
    /// Versions continue from `version`; earlier changes are forgotten.
    ///
    /// # Panics
    ///
    /// If the socket cannot listen.
    pub fn restart_at_version(&mut self, version: u64) {
        self.stop();
        self.shared.change(|store| store.renumber(version));
        self.resume().expect("a socket that listens");
    }

    /// Restores the objects and the resource version of an earlier state, as a restore of etcd from a backup
    /// does. The server must be stopped. Later changes reuse the numbers of the lost ones.
    ///
    /// # Panics
    ///
    /// If that state is forgotten.
    pub fn restore(&self, version: u64) {
        self.shared.change(|store| store.restore(version)).unwrap_or_else(|refusal| panic!("{refusal:?}"));
    }

    /// The address on which it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://ADDRESS`
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A kubeconfig for this server.
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

    /// Creates or replaces an object, as `kubectl apply` does.
    ///
    /// # Panics
    ///
    /// If the object is refused.
    pub fn apply(&self, object: impl Into<cluster::Object>) {
        let (kind, object) = value(object.into());
        self.upsert(kind, object);
    }

    /// Creates or replaces a Pod.
    ///
    /// # Panics
    ///
    /// If the Pod is refused.
    pub fn apply_pod(&self, pod: &Pod) {
        self.upsert(Kind::Pod, serde_json::to_value(pod).expect("objects of the API are JSON"));
    }

    fn upsert(&self, kind: Kind, object: Value) {
        let stored = self.shared.change(|store| store.upsert(kind, object));
        drop(stored.unwrap_or_else(|refusal| panic!("{refusal:?}")));
    }

    /// Creates or replaces all objects of a cluster and deletes all others.
    ///
    /// # Panics
    ///
    /// If an object is refused.
    pub fn set(&self, cluster: &Cluster) {
        let objects = cluster.objects().map(value);
        let objects: Vec<_> = objects.map(|(kind, object)| (kind, store::name_of(&object), object)).collect();
        let wanted: BTreeSet<_> = objects.iter().map(|(kind, name, _)| (*kind, name.clone())).collect();
        let names = lock(&self.shared.store).names();
        let is_gone = |name: &(Kind, cluster::Name)| name.0 != Kind::Pod && !wanted.contains(name);
        // Deletes slices last, as the EndpointSlice controller does: a service that moves to another slice
        // always has one.
        let (slices, others): (Vec<_>, Vec<_>) =
            names.into_iter().filter(is_gone).partition(|(kind, _)| *kind == Kind::Slice);
        for (kind, (namespace, name)) in others {
            self.delete(kind, &namespace, &name);
        }
        for (kind, _, object) in objects {
            self.upsert(kind, object);
        }
        for (kind, (namespace, name)) in slices {
            self.delete(kind, &namespace, &name);
        }
    }

    /// Deletes an object. A Node or ServiceCIDR has an empty namespace.
    ///
    /// # Panics
    ///
    /// If the object does not exist.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        let deleted = self.shared.change(|store| store.delete(kind, namespace, name));
        drop(deleted.unwrap_or_else(|refusal| panic!("{refusal:?}")));
    }

    /// All objects.
    ///
    /// # Panics
    ///
    /// If an object does not match its schema. The server would have refused it.
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

    /// Changes the faults.
    pub fn set_faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut lock(&self.shared.faults));
    }

    /// Closes every open watch in the middle of a chunk.
    pub fn cut_watches(&self) {
        self.shared.signals.send_modify(|signals| signals.cut += 1);
    }

    /// Forgets all changes, as a compaction does, and closes every open watch with an event of code 410.
    pub fn expire(&self) {
        self.compact();
        self.shared.signals.send_modify(|signals| signals.expire += 1);
    }

    /// Forgets all changes: resuming a watch returns 410. Open watches continue.
    pub fn compact(&self) {
        lock(&self.shared.store).compact();
    }

    /// Makes every open connection half-open: it stays open, but nothing is read or sent. New connections
    /// work.
    pub fn freeze(&self) {
        let last = *lock(&self.shared.n_connections);
        self.shared.signals.send_modify(|signals| signals.frozen = last);
    }

    /// Subscribes to the changes written to watches, without initial events. Replaces an earlier
    /// subscription.
    #[must_use]
    pub fn written(&self) -> mpsc::Receiver<Written> {
        let (sender, receiver) = mpsc::channel();
        *lock(&self.shared.written) = Some(sender);
        receiver
    }

    /// The Events (`events.k8s.io/v1`) written so far, by name.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        lock(&self.shared.events).all()
    }

    /// The counters of the requests so far.
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

/// The kind and the JSON of an object.
pub(crate) fn value(object: cluster::Object) -> (Kind, Value) {
    let (kind, value) = match object {
        cluster::Object::Service(service) => (Kind::Service, serde_json::to_value(service)),
        cluster::Object::Slice(slice) => (Kind::Slice, serde_json::to_value(slice)),
        cluster::Object::Node(node) => (Kind::Node, serde_json::to_value(node)),
        cluster::Object::ServiceCidr(cidr) => (Kind::ServiceCidr, serde_json::to_value(cidr)),
    };
    (kind, value.expect("objects of the API are JSON"))
}
