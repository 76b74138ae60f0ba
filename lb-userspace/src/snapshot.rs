//! The last good objects, on disk.
//!
//! # Purpose
//!
//! The pinned maps hold addresses and ids; the snapshot holds the objects behind them. Commands read it to name
//! services and to explain decisions without a running agent, and an agent whose source does not answer serves it.
//!
//! # Invariants
//!
//! - Written to a new file and renamed: a reader sees the former or the new one.
//! - A first line with format version, length and checksum: what was cut short or altered is refused, with a message.
//!
//! # Depends on
//!
//! `model`, `desired`.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    desired::{ExternalIps, NodePortAddresses, Settings},
    model::{Node, Service, Slice, Store},
};

/// Name of the snapshot within `--state-dir`.
pub const FILE_NAME: &str = "snapshot";

/// Raise it with any change to what the file holds.
const FORMAT: u32 = 2;

/// The largest file that is read: an order of magnitude above a cluster of 5,000 services and 250,000 endpoints.
const MAX_BYTES: u64 = 1 << 30;

/// Why a snapshot cannot be used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// There is none.
    #[error("{}: no snapshot: has an agent run with this --state-dir?", path.display())]
    Missing {
        /// Where it was looked for.
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
    /// It is not what an agent wrote.
    #[error("{}: {problem}; it is ignored and replaced by the next one", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// The objects and settings that an agent served, as read.
#[derive(Clone, Debug, PartialEq, Deserialize)]
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
    /// Addresses of the node's interfaces.
    pub interfaces: Vec<IpAddr>,
    /// Services that have or may have frontends.
    pub services: Vec<Service>,
    /// Their slices.
    pub slices: Vec<Slice>,
    /// All nodes.
    pub nodes: Vec<Node>,
}

/// The same, to be written: shared with the store, since a cluster's objects are large. So it can be taken where time
/// matters and written where it does not.
#[derive(Clone, Debug, Serialize)]
pub struct Contents {
    node_name: Arc<str>,
    node_ports: (u16, u16),
    node_port_addresses: NodePortAddresses,
    external_ips: ExternalIps,
    interfaces: Vec<IpAddr>,
    services: Vec<Arc<Service>>,
    slices: Vec<Arc<Slice>>,
    nodes: Vec<Arc<Node>>,
}

impl Contents {
    /// What there is now. Costs a reference count for each object.
    ///
    /// `interfaces` are the addresses of the node's interfaces.
    #[must_use]
    pub fn of(settings: &Settings, interfaces: &[IpAddr], store: &Store) -> Self {
        Self {
            node_name: Arc::clone(&settings.node_name),
            node_ports: (*settings.node_ports.start(), *settings.node_ports.end()),
            node_port_addresses: settings.node_port_addresses.clone(),
            external_ips: settings.external_ips,
            interfaces: interfaces.to_vec(),
            services: store.shared_services().cloned().collect(),
            slices: store.shared_slices().cloned().collect(),
            nodes: store.shared_nodes().cloned().collect(),
        }
    }

    /// Replaces the snapshot of a state directory, making the directory if needed.
    ///
    /// Not for two writers at a time: both would write the same new file.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::Io`]; then the former snapshot is still there.
    pub fn write(&self, state_dir: &Path) -> Result<(), SnapshotError> {
        let (path, new) = (state_dir.join(FILE_NAME), state_dir.join(format!("{FILE_NAME}.new")));
        let error = |source| SnapshotError::Io { path: path.clone(), source };
        let mut digest = BufWriter::new(Digest::default());
        let header = self.serialize_into(&mut digest).map(|()| digest.get_ref().header()).map_err(error)?;
        fs::create_dir_all(state_dir).map_err(error)?;
        let mut file = BufWriter::new(File::create(&new).map_err(error)?);
        file.write_all(header.as_bytes())
            .and_then(|()| self.serialize_into(&mut file))
            .and_then(|()| file.get_ref().sync_data())
            .and_then(|()| fs::rename(&new, &path))
            .map_err(error)
    }

    /// Twice for one snapshot: the first line tells of what follows. In memory it would be as large as all that the agent
    /// keeps of the same objects.
    fn serialize_into(&self, writer: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *writer, self)?;
        writer.flush()
    }
}

/// The length and checksum of what is written.
#[derive(Default)]
struct Digest {
    n_bytes: usize,
    checksum: crc32fast::Hasher,
}

impl Digest {
    fn header(&self) -> String {
        let checksum = self.checksum.clone().finalize();
        format!("socklb-snapshot format={FORMAT} bytes={} crc32={checksum:08x}\n", self.n_bytes)
    }
}

impl Write for Digest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.n_bytes += bytes.len();
        self.checksum.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes what there is now, as [`Contents::write`] does.
///
/// # Errors
///
/// As [`Contents::write`].
pub fn write(
    state_dir: &Path,
    settings: &Settings,
    interfaces: &[IpAddr],
    store: &Store,
) -> Result<(), SnapshotError> {
    Contents::of(settings, interfaces, store).write(state_dir)
}

impl Snapshot {
    /// The settings that decide about frontends.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            node_name: Arc::clone(&self.node_name),
            node_ports: self.node_ports.0..=self.node_ports.1,
            node_port_addresses: self.node_port_addresses.clone(),
            external_ips: self.external_ips,
            // The tables say what comes of them.
            service_cidrs: Vec::new(),
        }
    }

    /// Reads the snapshot of a state directory.
    ///
    /// # Errors
    ///
    /// See [`SnapshotError`].
    pub fn read(state_dir: &Path) -> Result<Self, SnapshotError> {
        let path = state_dir.join(FILE_NAME);
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SnapshotError::Missing { path: path.clone() },
            _ => SnapshotError::Io { path: path.clone(), source },
        })?;
        let mut reader = BufReader::new(file).take(MAX_BYTES);
        let (mut header, mut body) = (String::new(), Vec::new());
        reader
            .read_line(&mut header)
            .and_then(|_| reader.read_to_end(&mut body))
            .map_err(|source| SnapshotError::Io { path: path.clone(), source })?;
        decode(&header, &body).map_err(|problem| SnapshotError::Corrupt { path, problem })
    }
}

fn header(body: &[u8]) -> String {
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(body);
    Digest { n_bytes: body.len(), checksum }.header()
}

fn decode(found: &str, body: &[u8]) -> Result<Snapshot, String> {
    let Some(format) = found
        .strip_prefix("socklb-snapshot format=")
        .and_then(|rest| rest.split(' ').next())
        .and_then(|format| format.parse::<u32>().ok())
    else {
        return Err("not a snapshot".to_owned());
    };
    if format != FORMAT {
        return Err(format!("format {format}, this socklb reads {FORMAT}"));
    }
    if found != header(body) {
        return Err(format!("{} bytes do not match the first line", body.len()));
    }
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            node_name: "node-a".into(),
            node_ports: 30000..=32767,
            node_port_addresses: NodePortAddresses::Primary,
            external_ips: ExternalIps::Nodes,
            service_cidrs: Vec::new(),
        }
    }

    fn write_sample(state_dir: &Path) {
        let mut store = Store::new();
        let node = Node { name: "node-a".into(), zone: Some("zone-1".into()), ..Node::default() };
        let _changes = store.set_node("node-a", Some(node));
        write(state_dir, &settings(), &["192.168.0.1".parse().unwrap()], &store).unwrap();
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("made/on/demand");
        write_sample(&state_dir);
        let read = Snapshot::read(&state_dir).unwrap();
        assert_eq!(read.settings(), settings());
        assert_eq!(read.interfaces, ["192.168.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(read.nodes[0].zone.as_deref(), Some("zone-1"));
    }

    #[test]
    fn damage_is_refused_with_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(Snapshot::read(directory.path()), Err(SnapshotError::Missing { .. })));
        write_sample(directory.path());
        let path = directory.path().join(FILE_NAME);
        let good = fs::read_to_string(&path).unwrap();
        for (damage, reason) in [
            (good.replace("zone-1", "zone-2"), "do not match"),
            (good[..good.len() - 1].to_owned(), "do not match"),
            (good.replace(&format!("format={FORMAT}"), "format=0"), "format 0"),
            (String::new(), "not a snapshot"),
        ] {
            fs::write(&path, damage).unwrap();
            let error = Snapshot::read(directory.path()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
