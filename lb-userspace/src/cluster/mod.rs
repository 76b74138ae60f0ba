//! The API server as a source: `--source kube`.
//!
//! # Purpose
//!
//! [`KubeSource`] watches Services, EndpointSlices and Nodes. [`Access`] finds the server and the credentials.
//!
//! kube's own watcher (kube-runtime 5.0) is not used. It has no way back from streaming lists to lists on a server
//! that does not know them; a watch that is refused with 410, or with a version that the server has not reached
//! since it was restored from a backup, is tried again for ever with the same version; it does not read
//! `Retry-After`; a request that is never answered hangs, since nothing limits the wait for its first octet; and it
//! keeps whole objects of a page in memory. Its client (connections, TLS, credentials that rotate) is.
//!
//! # Invariants
//!
//! - An object is reduced to what the model keeps as soon as its text is read.
//! - A list takes effect when it is complete: what it does not name is removed then, and nothing before.
//! - Events of one kind are applied in the order in which the server sent them.
//! - No answer of the server ends a watch for good. What it says wrongly is logged once, and asked again after a
//!   pause that grows.
//!
//! # Depends on
//!
//! `model`, `source`; kube, which is named nowhere else.

mod access;
mod backoff;
mod events;
mod follow;
mod kinds;
mod live;

pub use self::{
    access::{Access, Error},
    follow::Timing,
    live::KubeSource,
};
