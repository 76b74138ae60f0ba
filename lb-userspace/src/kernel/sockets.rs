//! Connected sockets that went through a service, on the whole host, and ending them.
//!
//! # Purpose
//!
//! [`SocketTable`] reads what the programs keep of sockets: `socket_slots` and `sockets`. [`find`] lists the connected sockets
//! of every network namespace that have a record; [`destroy`] ends some of them. A record in socket storage comes with a listed TCP
//! socket; for a UDP socket the socket itself is asked for the name of its peer ([`descriptors`]).
//!
//! # Invariants
//!
//! - A socket is taken for one of a service only if its record names the peer that it has at that moment. One that has
//!   connected elsewhere since is neither found nor ended.
//! - Other namespaces are entered on a thread that ends afterwards.

use std::{
    collections::BTreeSet,
    io,
    mem::offset_of,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
    path::Path,
    sync::Arc,
    thread,
};

use aya::maps::MapData;
use lb_common::{
    address::Octets6,
    layout::{
        SLOT_WAYS, SOCKET_RECORDS, SocketEntry, SocketRecord, SocketRecords, SocketSlots, entry_flags,
        record_flags,
    },
    limits::SOCKET_SETS,
};

use super::{
    Features, KernelError, descriptors,
    layouts::Directory,
    mapped::Mapped,
    netns::{self, Namespace},
    sock_diag::{Connected, SockDiag},
};
use crate::model::Protocol;

/// Why sockets are not found or not ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The maps cannot be read.
    #[error(transparent)]
    Maps(#[from] KernelError),
    /// The kernel was built without what is needed.
    #[error(
        "this kernel cannot end sockets of other programs: it was built without CONFIG_INET_DIAG_DESTROY"
    )]
    NoDestroy,
    /// The kernel cannot list sockets of a protocol.
    #[error(
        "this kernel cannot list {protocol} sockets: it was built without CONFIG_INET_DIAG and CONFIG_INET_{protocol}_DIAG, or a \
         module cannot be loaded"
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
    /// Whether trying again can have another result.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::NoDestroy | Self::NoList { .. })
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
        Self::of_call("ending a socket", source)
    }
}

/// What the programs keep of sockets outside of the sockets.
#[derive(Debug)]
pub struct SocketTable {
    slots: Mapped<SocketSlots>,
    entries: Mapped<SocketEntry>,
    storage: MapData,
    /// Whether the programs use slots at all.
    has_slots: bool,
}

impl SocketTable {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn open(pin_path: &Path, features: Features) -> Result<Self, KernelError> {
        let directory = Directory::open(pin_path)?;
        let data = |name| directory.map(name).map(|(map, _shape)| map);
        let mmap = |name| move |source| KernelError::Mmap { name, source };
        let (slots, entries) = (data("socket_slots")?, data("sockets")?);
        Ok(Self {
            slots: Mapped::new(slots.fd().as_fd(), SOCKET_SETS).map_err(mmap("socket_slots"))?,
            entries: Mapped::new(entries.fd().as_fd(), SOCKET_SETS * WAYS).map_err(mmap("sockets"))?,
            storage: data("socket_storage")?,
            has_slots: features.has_slots(),
        })
    }

    /// The services and endpoints that sockets with a slot use: those of connected ones, of unconnected ones that sent
    /// there, and of ones that are no longer connected.
    #[must_use]
    pub fn used(&self) -> BTreeSet<(SocketAddr, SocketAddr)> {
        self.owners().flat_map(|cookie| self.records_of(cookie)).map(|record| flow(&record)).collect()
    }

    /// The records of sockets with a slot, by slot. A socket in the middle of a call may be missing.
    ///
    /// Not a snapshot: sockets come and go while they are read. Ids are those of the moment of the call; one may have been
    /// given to another service since.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let of_owner = |cookie| {
            self.records_of(cookie).map(move |record| {
                let (service, endpoint) = flow(&record);
                let SocketRecord { service_id, endpoint_id, .. } = record;
                Record { cookie, service, endpoint, service_id, endpoint_id }
            })
        };
        self.owners().flat_map(of_owner).collect()
    }

    /// Cookies of the sockets that own a slot.
    fn owners(&self) -> impl Iterator<Item = u64> {
        let slots = (0..SOCKET_SETS).filter_map(|set| self.slots.read(set));
        slots.flat_map(|slots| slots.owners).filter(|owner| *owner != 0)
    }

    /// Whether sockets have slots on this kernel. If not, [`Self::records`] and [`Self::used`] are empty.
    #[must_use]
    pub fn has_slots(&self) -> bool {
        self.has_slots
    }

    /// Whether all records are in slots: [`Self::used`] is then all that is used.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        false
    }

    /// The records in a socket's slot; none without one, or while they are being written.
    fn records_of(&self, cookie: u64) -> impl Iterator<Item = SocketRecord> + use<> {
        let entry = self.entry_of(cookie);
        let second = entry.filter(|entry| entry.flags & entry_flags::SECOND != 0).map(|entry| entry.second);
        entry.map(|entry| entry.first).into_iter().chain(second)
    }

    fn entry_of(&self, cookie: u64) -> Option<SocketEntry> {
        let set = u32::try_from(cookie % u64::from(SOCKET_SETS)).ok()?;
        let owned = (0..WAYS).zip(self.slots.read(set)?.owners).find(|(_, owner)| *owner == cookie);
        let index = set * WAYS + owned?.0;
        let entry = self.entries.read(index).filter(|entry| entry.cookie == cookie)?;
        // The program may write it at this moment: an address of one and a port of another would name a flow that there
        // is not.
        (self.entries.read(index) == Some(entry)).then_some(entry)
    }

    /// The service that a socket called to get to the peer that it has, by what the maps and the list of sockets say.
    fn service_of(&self, socket: &Connected) -> Option<SocketAddr> {
        let in_slot = self.records_of(socket.cookie());
        let stored = socket.stored.iter().flat_map(|value| stored_records(value));
        in_slot
            .chain(stored)
            .filter(|record| record.flags & record_flags::ANSWERS != 0)
            .map(|record| flow(&record))
            .find(|(_, endpoint)| *endpoint == socket.peer())
            .map(|(service, _)| service)
    }
}

/// How a socket last reached a service: what its slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// The socket, as `ss -e` shows it after `sk:`.
    pub cookie: u64,
    /// The address that the program called.
    pub service: SocketAddr,
    /// The endpoint that the call was pointed at.
    pub endpoint: SocketAddr,
    /// The service port, as in `service_stats`.
    pub service_id: u32,
    /// The endpoint, as in `endpoint_stats`.
    pub endpoint_id: u32,
}

#[expect(clippy::cast_possible_truncation, reason = "two")]
const WAYS: u32 = SLOT_WAYS as u32;

/// Service and endpoint of a record.
fn flow(record: &SocketRecord) -> (SocketAddr, SocketAddr) {
    (peer(record.service_address, record.service_port), peer(record.endpoint_address, record.endpoint_port))
}

fn peer(address: Octets6, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(address)).to_canonical(), port)
}

/// The used records in the bytes of a `SocketRecords`.
fn stored_records(value: &[u8]) -> impl Iterator<Item = SocketRecord> {
    let records = value.get(offset_of!(SocketRecords, records)..).unwrap_or_default();
    records
        .chunks_exact(size_of::<SocketRecord>())
        .take(SOCKET_RECORDS)
        .filter_map(|bytes| {
            Some(SocketRecord {
                service_address: field(bytes, offset_of!(SocketRecord, service_address))?,
                endpoint_address: field(bytes, offset_of!(SocketRecord, endpoint_address))?,
                service_port: u16::from_ne_bytes(field(bytes, offset_of!(SocketRecord, service_port))?),
                endpoint_port: u16::from_ne_bytes(field(bytes, offset_of!(SocketRecord, endpoint_port))?),
                endpoint_id: u32::from_ne_bytes(field(bytes, offset_of!(SocketRecord, endpoint_id))?),
                service_id: u32::from_ne_bytes(field(bytes, offset_of!(SocketRecord, service_id))?),
                index: u16::from_ne_bytes(field(bytes, offset_of!(SocketRecord, index))?),
                protocol: field::<1>(bytes, offset_of!(SocketRecord, protocol))?[0],
                flags: field::<1>(bytes, offset_of!(SocketRecord, flags))?[0],
            })
        })
        .filter(|record| record.protocol != 0)
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset + N)?.try_into().ok()
}

/// A connected socket that went through a service.
#[derive(Clone, Debug)]
pub struct ServiceSocket {
    namespace: Arc<Namespace>,
    socket: Connected,
    /// Whether the service is known by the socket's name of its peer, not by a record.
    is_named: bool,
    /// The address that the program called.
    pub service: SocketAddr,
}

impl ServiceSocket {
    /// Protocol of the socket.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.socket.protocol()
    }

    /// The endpoint that it is connected to.
    #[must_use]
    pub fn endpoint(&self) -> SocketAddr {
        self.socket.peer()
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// The sockets.
    pub sockets: Vec<ServiceSocket>,
    /// Namespaces that could not be opened or entered, as far as they are known: their sockets are missing.
    pub n_refused: usize,
    /// What went wrong in a namespace that was entered: some of its sockets are missing.
    pub problem: Option<SocketError>,
}

/// What was ended.
#[derive(Debug, Default)]
pub struct Destroyed {
    /// The sockets that were ended. Not among them are those that were closed or connected elsewhere meanwhile.
    pub sockets: Vec<ServiceSocket>,
    /// What kept the others from being ended.
    pub problem: Option<SocketError>,
}

/// Whether this kernel lets sockets be found and ended. Changes nothing.
///
/// # Errors
///
/// What it lacks, or what is not permitted.
pub fn check() -> Result<(), SocketError> {
    let mut diag = SockDiag::open().map_err(|source| SocketError::of_call("listing sockets", source))?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        // To nobody: the kernel looks at the request, and lists nothing.
        let _none = diag
            .connected(protocol, Some(&[SocketAddr::from(([0, 0, 0, 0], 0))].into()), None)
            .map_err(|source| SocketError::of_list(protocol, source))?;
        if !diag.can_destroy(protocol).map_err(SocketError::of_destroy)? {
            return Err(SocketError::NoDestroy);
        }
    }
    Ok(())
}

/// Lists the connected sockets of all network namespaces of this host that went through a service, of these protocols,
/// only those connected to one of `endpoints` if that is given. See [`netns::of_this_host`] for the namespaces that are not
/// known.
///
/// A UDP socket whose record is in socket storage is found if some process that can be looked into has a descriptor of it.
///
/// Blocks: some tens of microseconds for each namespace, and a microsecond for each socket in it.
///
/// # Errors
///
/// If nothing can be listed at all, or nothing of it could be ended.
///
/// # Kernel
///
/// 5.7
pub fn find(
    pin_path: &Path,
    features: Features,
    protocols: &BTreeSet<Protocol>,
    endpoints: Option<&BTreeSet<SocketAddr>>,
) -> Result<Found, SocketError> {
    on_a_thread(|| {
        check()?;
        let table = SocketTable::open(pin_path, features)?;
        let namespaces = netns::of_this_host()
            .map_err(|source| SocketError::of_call("listing network namespaces", source))?;
        let mut found = Found { n_refused: namespaces.n_refused, ..Found::default() };
        let mut unnamed = Vec::new();
        // Only then has the storage of a socket without a slot to be asked.
        let storage = (!table.is_complete()).then(|| table.storage.fd().as_fd());
        for namespace in namespaces.found {
            let Ok(()) = namespace.enter() else {
                found.n_refused += 1;
                continue;
            };
            let namespace = Arc::new(namespace);
            let mut list = || {
                let mut diag =
                    SockDiag::open().map_err(|source| SocketError::of_call("listing sockets", source))?;
                for &protocol in protocols {
                    let sockets = diag
                        .connected(protocol, endpoints, storage.filter(|_| protocol == Protocol::Tcp))
                        .map_err(|source| SocketError::of_list(protocol, source))?;
                    for socket in sockets {
                        let namespace = Arc::clone(&namespace);
                        if let Some(service) = table.service_of(&socket) {
                            found.sockets.push(ServiceSocket { namespace, socket, is_named: false, service });
                        } else if protocol == Protocol::Udp
                            && storage.is_some()
                            && table.entry_of(socket.cookie()).is_none()
                        {
                            unnamed.push((namespace, socket));
                        }
                    }
                }
                Ok(())
            };
            let listed = list();
            found.problem = found.problem.or(listed.err());
        }
        let inodes: BTreeSet<u32> = unnamed.iter().map(|(_, socket)| socket.inode()).collect();
        if !inodes.is_empty() {
            let names = descriptors::peer_names(&inodes)
                .map_err(|source| SocketError::of_call("listing descriptors", source))?;
            found.sockets.extend(unnamed.into_iter().filter_map(|(namespace, socket)| {
                let service = *names.get(&socket.inode()).filter(|name| **name != socket.peer())?;
                Some(ServiceSocket { namespace, socket, is_named: true, service })
            }));
        }
        Ok(found)
    })
}

/// Ends sockets: their programs get `ECONNABORTED`, and peers of TCP sockets a reset.
///
/// A socket that was closed or connected to somebody else meanwhile is left alone: the kernel looks for it by both
/// addresses and by its cookie, and a record in a slot is read again before. One of several sockets with the same two addresses
/// (`SO_REUSEADDR` and `bind()`) may not be found by the kernel and stays.
///
/// # Errors
///
/// If no thread can be started. Other problems end the work, and are in [`Destroyed`].
///
/// # Kernel
///
/// 5.7, with `CONFIG_INET_DIAG_DESTROY`
pub fn destroy(
    pin_path: &Path,
    features: Features,
    mut sockets: Vec<ServiceSocket>,
) -> Result<Destroyed, SocketError> {
    on_a_thread(|| {
        let table = SocketTable::open(pin_path, features)?;
        let mut destroyed = Destroyed::default();
        // One conversation for each namespace.
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
            let is_unchanged = |socket: &&ServiceSocket| {
                socket.is_named || table.service_of(&socket.socket) == Some(socket.service)
            };
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

/// Does something on a thread of its own, which may end in another namespace.
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

    /// What an operator reads on a kernel that lacks something.
    #[test]
    fn errors_of_the_kernel_are_told_by_what_is_missing() {
        let error = io::Error::from_raw_os_error;
        for (error, is_final, text) in [
            (SocketError::of_destroy(error(nix::libc::EOPNOTSUPP)), true, "CONFIG_INET_DIAG_DESTROY"),
            (SocketError::of_destroy(error(nix::libc::EPERM)), false, "CAP_NET_ADMIN"),
            (SocketError::of_destroy(error(nix::libc::EINVAL)), false, "ending a socket"),
            (SocketError::of_list(Protocol::Udp, error(nix::libc::ENOENT)), true, "CONFIG_INET_UDP_DIAG"),
            (SocketError::of_list(Protocol::Tcp, error(nix::libc::EPERM)), false, "CAP_BPF"),
        ] {
            assert_eq!(error.is_final(), is_final, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn records_are_read_from_the_bytes_of_socket_storage() {
        let mut value = vec![0; size_of::<SocketRecords>()];
        let record = &mut value[8 + 3 * 48..][..48];
        record[..16].copy_from_slice(&"::ffff:10.96.0.53".parse::<Ipv6Addr>().unwrap().octets());
        record[16..32].copy_from_slice(&"fd00::1".parse::<Ipv6Addr>().unwrap().octets());
        record[32..34].copy_from_slice(&53u16.to_ne_bytes());
        record[34..36].copy_from_slice(&1053u16.to_ne_bytes());
        record[46] = 17;
        let found: Vec<_> = stored_records(&value).map(|record| flow(&record)).collect();
        assert_eq!(found, [("10.96.0.53:53".parse().unwrap(), "[fd00::1]:1053".parse().unwrap())]);
        assert_eq!(stored_records(&[1; 55]).count(), 0);
    }
}
