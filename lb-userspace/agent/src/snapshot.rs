//! The last good objects, on disk.
//!
//! # Purpose
//!
//! The pinned maps hold addresses and ids; the snapshot holds the objects behind them. Commands read it to
//! name services and explain verdicts without a running agent. An agent whose source does not answer serves
//! it.
//!
//! Two files: [`FILE_NAME`] has all objects and is rarely rewritten; [`JOURNAL`] has the changes since, one
//! record per write. [`Snapshot::read`] applies the journal to the snapshot.
//!
//! # Invariants
//!
//! - A snapshot or a new journal is written to a new file, which is then renamed: a reader sees the old or
//!   the new one.
//! - Format version, length and checksum precede the snapshot and each record. A truncated or corrupt
//!   snapshot is refused with a message; a journal is read up to its first bad record.
//! - A journal names its snapshot. A journal of another snapshot is ignored.
//!
//! # Depends on
//!
//! `model`, `desired`.

mod changes;
mod codec;
mod writer;

use std::{
    fs::{self, File},
    io::{self, Read},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use lb_core::{
    desired::{ExternalIps, NodePortAddresses, PacketMode, Settings},
    model::{Node, Service, ServiceCidr, Slice, Store},
};
use serde::{Deserialize, Serialize};

pub use self::writer::{Writer, Written};

use self::{
    changes::Changes,
    codec::{Journal, SnapshotHeader},
};

/// Name of the snapshot within `--state-dir`.
pub const FILE_NAME: &str = "snapshot";

/// Name of the journal within `--state-dir`.
pub const JOURNAL: &str = "journal";

/// Maximum size of a file, packed and unpacked, in bytes: ten times that of a cluster of 5,000 services and
/// 250,000 endpoints.
const MAX_BYTES: u64 = 1 << 30;

/// Maximum number of tries of a reader while an agent replaces the files.
const MAX_TRIES: u32 = 5;

/// Why a snapshot cannot be used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// There is no snapshot.
    #[error("{}: no snapshot: has an agent run with this --state-dir?", path.display())]
    Missing {
        /// The path tried.
        path: PathBuf,
    },
    /// It cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is truncated or corrupt.
    #[error("{}: {problem}; it is ignored and replaced by the next one", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
}

/// The objects and settings that an agent serves.
///
/// Objects are shared with their store, since those of a cluster are large. So a snapshot is cheap to take in
/// the loop and can be written elsewhere. Services, Nodes and ServiceCIDRs are sorted by name, slices by
/// service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// `--node-name`
    pub node_name: Arc<str>,
    /// `--node-port-range`
    pub node_ports: (u16, u16),
    /// `--nodeport-addresses`
    pub node_port_addresses: NodePortAddresses,
    /// `--external-ips`; older agents wrote none.
    #[serde(default)]
    pub external_ips: ExternalIps,
    /// `--packets`; older agents wrote none.
    #[serde(default)]
    pub packets: PacketMode,
    /// Addresses of the node's interfaces.
    pub interfaces: Vec<IpAddr>,
    /// Services that have or may have frontends, and those of other proxies.
    pub services: Vec<Arc<Service>>,
    /// Their slices.
    pub slices: Vec<Arc<Slice>>,
    /// All nodes.
    pub nodes: Vec<Arc<Node>>,
    /// All ServiceCIDRs; older agents wrote none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub service_cidrs: Vec<Arc<ServiceCidr>>,
}

impl Snapshot {
    /// The current objects and settings. Costs a reference count per object.
    ///
    /// `interfaces` are the addresses of the node's interfaces.
    #[must_use]
    pub fn of(settings: &Settings, interfaces: &[IpAddr], store: &Store) -> Self {
        Self {
            node_name: Arc::clone(&settings.node_name),
            node_ports: (*settings.node_ports.start(), *settings.node_ports.end()),
            node_port_addresses: settings.node_port_addresses.clone(),
            external_ips: settings.external_ips,
            packets: settings.packets,
            interfaces: interfaces.to_vec(),
            ..Self::default()
        }
        .with_objects_of(store)
    }

    fn with_objects_of(self, store: &Store) -> Self {
        Self {
            services: store.shared_services().cloned().collect(),
            slices: store.shared_slices().cloned().collect(),
            nodes: store.shared_nodes().cloned().collect(),
            service_cidrs: store.service_cidrs().cloned().collect(),
            ..self
        }
    }

    /// The settings that affect frontends.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            node_name: Arc::clone(&self.node_name),
            node_ports: self.node_ports.0..=self.node_ports.1,
            node_port_addresses: self.node_port_addresses.clone(),
            external_ips: self.external_ips,
            packets: self.packets,
            // The networks are in the tables.
            service_cidrs: Some(Vec::new()),
        }
    }

    /// Reads the snapshot of a state directory, with the changes in the journal.
    ///
    /// May run while an agent writes: then it returns one of the states written during the read.
    ///
    /// # Errors
    ///
    /// See [`SnapshotError`]. A journal that cannot be read to its end is no error: see [`Found::n_lost`].
    pub fn read(state_dir: &Path) -> Result<Self, SnapshotError> {
        Found::read(state_dir).map(|found| found.snapshot)
    }
}

/// The state on disk.
#[derive(Debug)]
pub struct Found {
    /// The objects and settings.
    pub snapshot: Snapshot,
    /// Number of bytes ignored at the journal's end because they are truncated or corrupt. While an agent
    /// writes, they may be an incomplete record.
    pub n_lost: u64,
    /// Identifies the snapshot in the journal; `None` in the format without a journal.
    generation: Option<u64>,
    snapshot_len: u64,
    /// Size of the journal in bytes up to the last good record; 0 without a journal.
    journal_len: u64,
}

impl Found {
    /// As [`Snapshot::read`].
    ///
    /// # Errors
    ///
    /// As [`Snapshot::read`].
    pub fn read(state_dir: &Path) -> Result<Self, SnapshotError> {
        let path = state_dir.join(FILE_NAME);
        let io_error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => SnapshotError::Missing { path: path.clone() },
            _ => SnapshotError::Io { path: path.clone(), source },
        };
        let corrupt = |problem| SnapshotError::Corrupt { path: path.clone(), problem };
        let mut n_tries = 0;
        loop {
            let bytes = read_file(&path).map_err(io_error)?;
            let (header, body) = SnapshotHeader::parse(&bytes).map_err(corrupt)?;
            let journal_path = state_dir.join(JOURNAL);
            let journal = match read_file(&journal_path) {
                Ok(journal) => journal,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(source) => return Err(SnapshotError::Io { path: journal_path, source }),
            };
            let journal = header.generation.and_then(|generation| Journal::parse(&journal, generation));
            if journal.is_none() {
                // Of another snapshot, perhaps of one that has replaced the one just read.
                n_tries += 1;
                if n_tries < MAX_TRIES && read_header(&path).map_err(io_error)? != codec::first_line(&bytes) {
                    continue;
                }
            }
            let snapshot = header.decode(body).map_err(corrupt)?;
            let (snapshot, n_good) = fold(snapshot, journal.as_ref().map_or(&[][..], Journal::records));
            let (journal_len, n_lost) = journal.map_or((0, 0), |journal| journal.split(n_good));
            let snapshot_len = bytes.len() as u64;
            return Ok(Self { snapshot, n_lost, generation: header.generation, snapshot_len, journal_len });
        }
    }
}

/// Applies changes up to the first unreadable one. Returns how many were applied.
fn fold(base: Snapshot, records: &[&[u8]]) -> (Snapshot, usize) {
    if records.is_empty() {
        return (base, 0);
    }
    let mut store = Store::new();
    let Snapshot { services, slices, nodes, service_cidrs, .. } = &base;
    let _all = store.replace_services(services.iter().cloned());
    let _all = store.replace_slices(slices.iter().cloned());
    let _all = store.replace_nodes(nodes.iter().cloned());
    let _all = store.replace_service_cidrs(service_cidrs.iter().cloned());
    let (mut rest, mut n_good) = (base, 0);
    for record in records {
        let Ok(changes) = codec::unpack::<Changes>(record) else { break };
        rest = changes.apply(&mut store);
        n_good += 1;
    }
    (rest.with_objects_of(&store), n_good)
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The first line of a snapshot.
fn read_header(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(codec::MAX_HEADER_LEN as u64).read_to_end(&mut bytes)?;
    Ok(codec::first_line(&bytes).to_vec())
}

/// When the snapshot or its journal was last written; `None` without them, or if unknown.
#[must_use]
pub fn modified(state_dir: &Path) -> Option<SystemTime> {
    let of = |name| fs::metadata(state_dir.join(name)).and_then(|data| data.modified()).ok();
    of(FILE_NAME).max(of(JOURNAL))
}

/// Removes the files of a snapshot. Returns those removed.
///
/// # Errors
///
/// [`SnapshotError::Io`] for the first that cannot be removed.
pub fn remove(state_dir: &Path) -> Result<Vec<PathBuf>, SnapshotError> {
    let mut removed = Vec::new();
    // The snapshot first: without it, the journal is ignored.
    for name in [FILE_NAME, JOURNAL].into_iter().chain(writer::NEW) {
        let path = state_dir.join(name);
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(SnapshotError::Io { path, source }),
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests;
