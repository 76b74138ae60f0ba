//! Finds and destroys connected sockets that use a service, on the whole host.
//!
//! # Purpose
//!
//! [`SocketTable`] reads the records of sockets: `socket_slots` and `sockets` from mapped memory,
//! `socket_storage` by a BPF iterator ([`storage`]). [`find`] lists connected sockets of all network
//! namespaces, [`destroy`] destroys some of them, and [`owners`] finds slots whose sockets are closed.
//!
//! # Invariants
//!
//! - A socket counts as one of a service only if its record names its current peer. A socket that has another
//!   peer by now is neither found nor destroyed.
//! - Other namespaces are entered only on a thread that exits afterwards.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
    path::Path,
    sync::Arc,
    thread,
};

use lb_common::{
    address::Octets6,
    layout::{self, SLOT_WAYS, SocketEntry, SocketRecord, SocketSlots, entry_flags, record_flags},
    limits::SOCKET_SETS,
};
use lb_core::model::{Protocol, address};

use super::{
    KernelError,
    exclusion::Exclusion,
    fault,
    layouts::Directory,
    mapped::Mapped,
    netns::{self, Namespace},
    served,
    sock_diag::{Connected, SockDiag},
    storage::{self, StorageList},
};

/// Why sockets cannot be found or destroyed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The maps cannot be read.
    #[error(transparent)]
    Maps(#[from] KernelError),
    /// The kernel was built without a required option.
    #[error(
        "this kernel cannot destroy sockets of other programs: it was built without CONFIG_INET_DIAG_DESTROY"
    )]
    NoDestroy,
    /// The kernel cannot list sockets of a protocol.
    #[error(
        "this kernel cannot list {protocol} sockets: it was built without CONFIG_INET_DIAG and \
         CONFIG_INET_{protocol}_DIAG, or a module cannot be loaded"
    )]
    NoList {
        /// The protocol.
        protocol: Protocol,
    },
    /// Not enough privilege.
    #[error("{what}: not permitted: run with CAP_NET_ADMIN, CAP_SYS_ADMIN and CAP_BPF")]
    NotPermitted {
        /// What was tried.
        what: &'static str,
    },
    /// Another failing system call.
    #[error("{what}: {source}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl SocketError {
    /// Whether a retry is pointless.
    #[must_use]
    pub fn is_final(&self) -> bool {
        let is_unsupported = |source: &io::Error| {
            matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::Unsupported)
        };
        match self {
            Self::NoDestroy | Self::NoList { .. } => true,
            Self::Maps(KernelError::List { source }) => is_unsupported(source),
            _ => false,
        }
    }

    fn of_call(what: &'static str, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::PermissionDenied {
            return Self::NotPermitted { what };
        }
        Self::Call { what, source }
    }

    fn of_list(protocol: Protocol, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::NotFound {
            return Self::NoList { protocol };
        }
        Self::of_call("listing sockets", source)
    }

    fn of_destroy(source: io::Error) -> Self {
        if source.raw_os_error() == Some(nix::libc::EOPNOTSUPP) {
            return Self::NoDestroy;
        }
        Self::of_call("destroying a socket", source)
    }
}

/// The records of sockets.
#[derive(Debug)]
pub struct SocketTable {
    slots: Mapped<SocketSlots>,
    entries: Mapped<SocketEntry>,
    storage: StorageList,
}

/// Records by socket cookie, read at one time.
type Records = BTreeMap<u64, Vec<SocketRecord>>;

impl SocketTable {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// A failing system call; [`KernelError::List`] without the capabilities or the kernel to list socket
    /// storage.
    ///
    /// # Kernel
    ///
    /// 5.9, with `CONFIG_DEBUG_INFO_BTF`
    pub fn open(pin_path: &Path) -> Result<Self, KernelError> {
        let directory = Directory::open(pin_path)?;
        let data = |name| directory.map(name).map(|(map, _shape)| map);
        let mmap = |name| move |source| KernelError::Mmap { name, source };
        let (slots, entries, storage) = (data("socket_slots")?, data("sockets")?, data("socket_storage")?);
        Ok(Self {
            slots: Mapped::new(slots.fd().as_fd(), SOCKET_SETS).map_err(mmap("socket_slots"))?,
            entries: Mapped::new(entries.fd().as_fd(), SOCKET_SETS * WAYS).map_err(mmap("sockets"))?,
            storage: StorageList::open(storage.fd().as_fd())
                .map_err(|source| KernelError::List { source })?,
        })
    }

    /// The records of all sockets on the host: connected ones, unconnected ones that sent to a service, and
    /// ones that are no longer connected. A socket in the middle of a call may be missing.
    ///
    /// Not a snapshot: sockets open and close meanwhile. Ids are those at the time of the call and may belong
    /// to another service by now.
    ///
    /// # Errors
    ///
    /// [`KernelError::List`]
    pub fn records(&self) -> Result<Vec<Record>, KernelError> {
        Ok(self.all(|_record| true)?.collect())
    }

    /// The [`Self::records`] that map an endpoint back to its service. A connected socket that uses a service
    /// has one.
    ///
    /// # Errors
    ///
    /// [`KernelError::List`]
    pub fn answering(&self) -> Result<Vec<Record>, KernelError> {
        Ok(self.all(answers)?.collect())
    }

    fn all(
        &self,
        matches: impl Fn(&SocketRecord) -> bool,
    ) -> Result<impl Iterator<Item = Record>, KernelError> {
        let in_slots =
            self.owners().flat_map(|cookie| self.in_slot(cookie).map(move |record| (cookie, record)));
        let records = in_slots.chain(self.storage.read().map_err(|source| KernelError::List { source })?);
        Ok(records.filter(move |(_, record)| matches(record)).filter_map(|(cookie, record)| {
            let (service, endpoint) = flow(&record);
            let SocketRecord { service_id, endpoint_id, .. } = record;
            Some(Record { cookie, protocol: protocol(&record)?, service, endpoint, service_id, endpoint_id })
        }))
    }

    /// The records in socket storage.
    fn stored(&self) -> Result<Records, KernelError> {
        let mut stored = Records::new();
        for (cookie, record) in self.storage.read().map_err(|source| KernelError::List { source })? {
            stored.entry(cookie).or_default().push(record);
        }
        Ok(stored)
    }

    /// Cookies of the sockets that own a slot.
    fn owners(&self) -> impl Iterator<Item = u64> {
        let slots = (0..SOCKET_SETS).filter_map(|set| self.slots.read(set));
        slots.flat_map(|slots| slots.owners).filter(|owner| *owner != 0)
    }

    /// Number of slots with an owner.
    #[must_use]
    pub fn n_owned(&self) -> usize {
        self.owners().count()
    }

    /// Frees the slots of sockets with these cookies, and returns their number.
    ///
    /// A socket that is still open loses its record: see [`owners`].
    #[must_use]
    pub fn free(&mut self, cookies: &BTreeSet<u64>) -> usize {
        let mut n_freed = 0;
        for &cookie in cookies {
            let Some((set, way)) = self.place(cookie) else { continue };
            fault::point();
            n_freed += usize::from(self.slots.replace_u64(set, way, cookie, 0));
        }
        n_freed
    }

    /// The set and the way of a socket's slot.
    fn place(&self, cookie: u64) -> Option<(u32, usize)> {
        let set = u32::try_from(cookie % u64::from(SOCKET_SETS)).ok()?;
        Some((set, self.slots.read(set)?.owners.iter().position(|owner| *owner == cookie)?))
    }

    /// The records in a socket's slot; empty without a slot, or while they are being written.
    fn in_slot(&self, cookie: u64) -> impl Iterator<Item = SocketRecord> + use<> {
        let entry = self.entry_of(cookie);
        let second = entry.filter(|entry| entry.flags & entry_flags::SECOND != 0).map(|entry| entry.second);
        entry.map(|entry| entry.first).into_iter().chain(second)
    }

    fn entry_of(&self, cookie: u64) -> Option<SocketEntry> {
        let (set, way) = self.place(cookie)?;
        let index = set * WAYS + u32::try_from(way).ok()?;
        let entry = self.entries.read(index).filter(|entry| entry.cookie == cookie)?;
        // The program may be writing it: the address of one record and the port of another would name a flow
        // that does not exist.
        (self.entries.read(index) == Some(entry)).then_some(entry)
    }

    /// The service through which a socket reached its current peer, from its slot and the `stored` records.
    fn service_of(&self, socket: &Connected, stored: &Records) -> Option<SocketAddr> {
        self.in_slot(socket.cookie())
            .chain(stored.get(&socket.cookie()).into_iter().flatten().copied())
            .filter(answers)
            .map(|record| flow(&record))
            .find(|(_, endpoint)| *endpoint == socket.peer())
            .map(|(service, _)| service)
    }
}

/// The last flow of a socket to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// The socket, as `ss -e` shows it after `sk:`.
    pub cookie: u64,
    /// Protocol of the service.
    pub protocol: Protocol,
    /// The address that the program called.
    pub service: SocketAddr,
    /// The endpoint that the call was redirected to.
    pub endpoint: SocketAddr,
    /// The service port, as in `service_stats`.
    pub service_id: u32,
    /// The endpoint, as in `endpoint_stats`.
    pub endpoint_id: u32,
}

#[expect(clippy::cast_possible_truncation, reason = "two")]
const WAYS: u32 = SLOT_WAYS as u32;

fn answers(record: &SocketRecord) -> bool {
    record.flags & record_flags::ANSWERS != 0
}

/// `None` for values that no program writes.
fn protocol(record: &SocketRecord) -> Option<Protocol> {
    match layout::Protocol(record.protocol) {
        layout::Protocol::TCP => Some(Protocol::Tcp),
        layout::Protocol::UDP => Some(Protocol::Udp),
        _ => None,
    }
}

/// Service and endpoint of a record.
fn flow(record: &SocketRecord) -> (SocketAddr, SocketAddr) {
    (peer(record.service_address, record.service_port), peer(record.endpoint_address, record.endpoint_port))
}

fn peer(address: Octets6, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(address)).to_canonical(), port)
}

/// A connected socket that was found.
#[derive(Clone, Debug)]
pub struct FoundSocket {
    namespace: Arc<Namespace>,
    socket: Connected,
    /// The address that the program called to reach [`Self::peer`]; `None` if it called the peer itself.
    pub service: Option<SocketAddr>,
}

impl FoundSocket {
    /// Protocol of the socket.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.socket.protocol()
    }

    /// The peer's address.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        self.socket.peer()
    }
}

/// Which sockets to find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketFilter {
    /// Sockets of these protocols that went through a service to one of `endpoints`.
    pub protocols: BTreeSet<Protocol>,
    /// The endpoints.
    pub endpoints: BTreeSet<SocketAddr>,
    /// UDP sockets of served callers that are connected to one of these without a service; `None` for all
    /// such. The unspecified address matches every address of its family with that port.
    pub addresses: Option<BTreeSet<SocketAddr>>,
}

impl SocketFilter {
    /// The peers of sockets to list; `None` for all.
    fn peers(&self, protocol: Protocol) -> Option<BTreeSet<SocketAddr>> {
        let endpoints = self.endpoints.iter().filter(|_| self.protocols.contains(&protocol));
        if protocol == Protocol::Udp {
            return self.addresses.as_ref().map(|addresses| endpoints.chain(addresses).copied().collect());
        }
        Some(endpoints.copied().collect())
    }

    /// Whether a socket without a service is wanted.
    fn matches(&self, socket: &Connected) -> bool {
        let peer = socket.peer();
        let any = SocketAddr::new(address::unspecified(address::family(peer.ip())), peer.port());
        let is_among =
            |addresses: &BTreeSet<SocketAddr>| [peer, any].iter().any(|peer| addresses.contains(peer));
        socket.protocol() == Protocol::Udp && self.addresses.as_ref().is_none_or(is_among)
    }
}

/// The result of [`find`].
#[derive(Debug, Default)]
pub struct Found {
    /// The sockets.
    pub sockets: Vec<FoundSocket>,
    /// Known namespaces that could not be opened or entered: their sockets are missing.
    pub n_refused: usize,
    /// An error in a namespace that was entered: some of its sockets are missing.
    pub problem: Option<SocketError>,
}

/// The result of [`destroy`].
#[derive(Debug, Default)]
pub struct Destroyed {
    /// The destroyed sockets, without those that were closed or got another peer meanwhile.
    pub sockets: Vec<FoundSocket>,
    /// The error that kept others from being destroyed.
    pub problem: Option<SocketError>,
}

/// Whether this kernel can find and destroy sockets. Changes nothing.
///
/// # Errors
///
/// What the kernel lacks or does not permit.
pub fn check() -> Result<(), SocketError> {
    let mut diag = open_diag()?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        // No socket has this peer: the kernel checks the request and lists nothing.
        let _none = diag
            .connected(protocol, Some(&[SocketAddr::from(([192, 0, 2, 0], 0))].into()))
            .map_err(|source| SocketError::of_list(protocol, source))?;
        if !diag.can_destroy(protocol).map_err(SocketError::of_destroy)? {
            return Err(SocketError::NoDestroy);
        }
    }
    let _program = storage::load().map_err(|source| KernelError::List { source })?;
    Ok(())
}

fn open_diag() -> Result<SockDiag, SocketError> {
    SockDiag::open().map_err(|source| SocketError::of_call("listing sockets", source))
}

/// Runs `work` in each network namespace of this host that can be entered; see [`netns::of_this_host`] for
/// those that are not found. Returns the number of those that cannot be entered.
fn in_each_namespace(mut work: impl FnMut(Namespace)) -> Result<usize, SocketError> {
    let namespaces =
        netns::of_this_host().map_err(|source| SocketError::of_call("listing network namespaces", source))?;
    let mut n_refused = namespaces.n_refused;
    for namespace in namespaces.found {
        match namespace.enter() {
            Ok(()) => work(namespace),
            Err(_refused) => n_refused += 1,
        }
    }
    Ok(n_refused)
}

/// Lists the wanted sockets in all network namespaces of this host.
///
/// A socket without a service is served if its cgroup is at or below `cgroup` and not excluded. Kernels that
/// do not report cgroups yield none.
///
/// Blocks: tens of microseconds for each namespace, plus one microsecond for each of its sockets.
///
/// # Errors
///
/// If nothing can be listed, or nothing could be destroyed.
///
/// # Kernel
///
/// 5.9
pub fn find(pin_path: &Path, cgroup: &Path, wanted: &SocketFilter) -> Result<Found, SocketError> {
    on_a_thread(|| {
        check()?;
        let table = SocketTable::open(pin_path)?;
        let stored = table.stored()?;
        let mut found = Found::default();
        let (sockets, problem) = (&mut found.sockets, &mut found.problem);
        found.n_refused = in_each_namespace(|namespace| {
            let namespace = Arc::new(namespace);
            let mut list = || {
                let mut diag = open_diag()?;
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    let peers = wanted.peers(protocol);
                    if peers.as_ref().is_some_and(BTreeSet::is_empty) {
                        continue;
                    }
                    let listed = diag
                        .connected(protocol, peers.as_ref())
                        .map_err(|source| SocketError::of_list(protocol, source))?;
                    sockets.extend(listed.into_iter().filter_map(|socket| {
                        let service = table.service_of(&socket, &stored);
                        let matches = service.is_some() || wanted.matches(&socket);
                        matches.then(|| FoundSocket { namespace: Arc::clone(&namespace), socket, service })
                    }));
                }
                Ok(())
            };
            if let Err(error) = list() {
                problem.get_or_insert(error);
            }
        })?;
        if found.sockets.iter().any(|socket| socket.service.is_none()) {
            let served = served::cgroups(cgroup, &Exclusion::open(pin_path)?.ids()?);
            let is_served = |socket: &Connected| socket.cgroup().is_some_and(|id| served.contains(&id));
            found.sockets.retain(|socket| socket.service.is_some() || is_served(&socket.socket));
        }
        Ok(found)
    })
}

/// The owners of slots, by whether a socket of this host has their cookie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// Such a socket exists.
    pub listed: BTreeSet<u64>,
    /// No such socket is known: it was closed, its connection ended, or its network namespace was not found.
    pub unlisted: BTreeSet<u64>,
}

/// Finds the sockets that own slots, in all network namespaces of this host. `None` if a namespace cannot be
/// entered, since the socket may be there.
///
/// # Errors
///
/// If sockets cannot be listed.
///
/// # Kernel
///
/// 4.9
pub fn owners(pin_path: &Path) -> Result<Option<Owners>, SocketError> {
    on_a_thread(|| {
        let table = SocketTable::open(pin_path)?;
        let before: BTreeSet<u64> = table.owners().collect();
        let (mut cookies, mut problem) = (BTreeSet::new(), None);
        let n_refused = in_each_namespace(|_namespace| match open_diag().map(|mut diag| diag.cookies()) {
            Ok(Ok(found)) => cookies.extend(found),
            Ok(Err(source)) => problem = Some(SocketError::of_call("listing sockets", source)),
            Err(error) => problem = Some(error),
        })?;
        if let Some(problem) = problem {
            return Err(problem);
        }
        // Skips sockets that were closed meanwhile.
        let owners = table.owners().filter(|cookie| before.contains(cookie));
        let (listed, unlisted) = owners.partition(|cookie| cookies.contains(cookie));
        Ok((n_refused == 0).then_some(Owners { listed, unlisted }))
    })
}

/// Destroys sockets: their programs get `ECONNABORTED`, and peers of TCP sockets a reset.
///
/// A socket that was closed or got another peer meanwhile is not touched: the kernel finds it by both
/// addresses and its cookie, and its records are read again first. The kernel may not find one of several
/// sockets with the same two addresses (`SO_REUSEADDR` and `bind()`); it stays.
///
/// # Errors
///
/// If no thread can be started or the records cannot be read. Other errors stop the work and are in
/// [`Destroyed`].
///
/// # Kernel
///
/// 5.9, with `CONFIG_INET_DIAG_DESTROY`
pub fn destroy(pin_path: &Path, mut sockets: Vec<FoundSocket>) -> Result<Destroyed, SocketError> {
    on_a_thread(|| {
        let table = SocketTable::open(pin_path)?;
        let stored = table.stored()?;
        let mut destroyed = Destroyed::default();
        // One netlink socket for each namespace.
        sockets.sort_by_key(|socket| Arc::as_ptr(&socket.namespace));
        for of_namespace in sockets.chunk_by(|a, b| Arc::ptr_eq(&a.namespace, &b.namespace)) {
            let Some(first) = of_namespace.first() else { continue };
            let opened = first.namespace.enter().and_then(|()| SockDiag::open());
            let mut diag = match opened {
                Ok(diag) => diag,
                Err(source) => {
                    destroyed.problem = Some(SocketError::of_call("entering a network namespace", source));
                    continue;
                }
            };
            let is_unchanged =
                |socket: &&FoundSocket| table.service_of(&socket.socket, &stored) == socket.service;
            for socket in of_namespace.iter().filter(is_unchanged) {
                match diag.destroy(&socket.socket) {
                    Ok(true) => destroyed.sockets.push(socket.clone()),
                    Ok(false) => {}
                    Err(source) => {
                        destroyed.problem = Some(SocketError::of_destroy(source));
                        return Ok(destroyed);
                    }
                }
            }
        }
        Ok(destroyed)
    })
}

/// Runs `work` on its own thread, which may enter another namespace.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T, SocketError> + Send) -> Result<T, SocketError> {
    let failed = |source| SocketError::Call { what: "starting a thread", source };
    thread::scope(|scope| {
        let thread =
            thread::Builder::new().name("sockets".into()).spawn_scoped(scope, work).map_err(failed)?;
        thread.join().map_err(|_panicked| failed(io::Error::other("it panicked")))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The messages on a kernel that lacks something.
    #[test]
    fn errors_of_the_kernel_are_told_by_what_is_missing() {
        let error = io::Error::from_raw_os_error;
        for (error, is_final, text) in [
            (SocketError::of_destroy(error(nix::libc::EOPNOTSUPP)), true, "CONFIG_INET_DIAG_DESTROY"),
            (SocketError::of_destroy(error(nix::libc::EPERM)), false, "CAP_NET_ADMIN"),
            (SocketError::of_destroy(error(nix::libc::EINVAL)), false, "destroying a socket"),
            (SocketError::of_list(Protocol::Udp, error(nix::libc::ENOENT)), true, "CONFIG_INET_UDP_DIAG"),
            (SocketError::of_list(Protocol::Tcp, error(nix::libc::EPERM)), false, "CAP_BPF"),
        ] {
            assert_eq!(error.is_final(), is_final, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn sockets_are_listed_by_the_peers_that_are_wanted() {
        let set =
            |peers: &[&str]| peers.iter().map(|peer| peer.parse().unwrap()).collect::<BTreeSet<SocketAddr>>();
        let (endpoints, addresses) = (&["10.1.0.1:53"][..], &["10.0.0.1:53"][..]);
        for (protocols, of_addresses, tcp, udp) in [
            (&[Protocol::Udp][..], Some(&[][..]), Some(&[][..]), Some(endpoints)),
            (&[Protocol::Tcp, Protocol::Udp], Some(&[]), Some(endpoints), Some(endpoints)),
            (&[], Some(addresses), Some(&[]), Some(addresses)),
            (&[Protocol::Tcp], Some(addresses), Some(endpoints), Some(addresses)),
            (&[Protocol::Tcp], None, Some(endpoints), None),
        ] {
            let wanted = SocketFilter {
                protocols: protocols.iter().copied().collect(),
                endpoints: set(endpoints),
                addresses: of_addresses.map(set),
            };
            assert_eq!(wanted.peers(Protocol::Tcp), tcp.map(set), "{wanted:?}");
            assert_eq!(wanted.peers(Protocol::Udp), udp.map(set), "{wanted:?}");
        }
    }
}
