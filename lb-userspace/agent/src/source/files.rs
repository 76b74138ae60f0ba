//! Manifests in files: `--source file:PATH`.
//!
//! # Purpose
//!
//! Serves a host from a manifest file or a folder of them, without a cluster. [`watch()`] reads the texts whenever
//! they change, [`parse()`] turns one text into objects, [`FileSet`] holds the objects of all files.
//!
//! A manifest is YAML or JSON, with any number of documents, and holds Services (`v1`), EndpointSlices
//! (`discovery.k8s.io/v1`), Nodes (`v1`) and lists of these. What an API server would fill in and this program
//! needs is filled in: the namespace `default`, IP families, names and protocols of slice ports.
//!
//! # Invariants
//!
//! - A file that cannot be read keeps the objects that it last gave; the other files go on.
//! - A file that is removed takes its objects along. Neither a file that is being written nor one that is away for a moment takes
//!   any: `settle` has the rules.
//! - In the end the result depends on the texts only. Of two definitions of one object the one in the file whose name
//!   sorts first counts.
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
    live::FileSource,
    parse::{Body, Object, ParseIssue, parse},
    set::{Content, FileSet, Gone, Seen, Snapshot},
    settle::{Inode, Moment, SETTLE, VANISH},
    watch::{Error, Reading, Watch, watch},
};

/// The largest manifest that is read, octets.
pub const MAX_FILE_LEN: u64 = 64 << 20;

/// The most objects that one manifest may hold.
///
/// Kubernetes' tested limit of 150,000 pods gives at most that many slices.
pub const MAX_OBJECTS: usize = 200_000;
