//! Manifest files: `--source file:PATH`.
//!
//! # Purpose
//!
//! Serves a host from a manifest file or a folder of them, without a cluster. [`watch()`] reads the texts
//! when they change, [`parse()`] turns a text into objects, [`FileSet`] holds the objects of all files.
//!
//! A manifest is YAML or JSON with any number of documents. It holds Services (`v1`), EndpointSlices
//! (`discovery.k8s.io/v1`), Nodes (`v1`), ServiceCIDRs (`networking.k8s.io/v1`) and lists of these. Defaults
//! of the API server that this program needs are filled in: the namespace `default`, IP families, names and
//! protocols of slice ports.
//!
//! # Invariants
//!
//! - An unreadable file keeps the objects of its last good text. Other files are not affected.
//! - The objects of a removed file are removed. A file that is being written, or missing for a moment, keeps
//!   its objects: `settle` has the rules.
//! - Once all files have settled, the result depends only on the texts. Of two definitions of an object, the
//!   one in the file whose name sorts first counts.
//! - Every issue names file and line.
//!
//! # Depends on
//!
//! `model`; `tokio` in [`watch()`] only.

mod defaults;
mod lease;
mod live;
mod parse;
mod read;
mod set;
mod settle;
mod tree;
mod watch;

pub use self::{
    live::{FileSource, SCHEME},
    parse::{Body, Object, ParseIssue, parse},
    set::{Content, FileSet, Gone, Seen, Snapshot},
    settle::{Inode, Moment, SETTLE, VANISH},
    watch::{Error, Reading, Watch, watch},
};

/// Maximum size of a manifest, in bytes.
pub const MAX_FILE_LEN: u64 = 64 << 20;

/// Maximum number of objects in one manifest.
///
/// Kubernetes' tested limit of 150,000 pods gives at most that many slices.
pub const MAX_OBJECTS: usize = 200_000;
