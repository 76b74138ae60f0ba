//! The API server as a source: `--source kube`.
//!
//! # Purpose
//!
//! [`KubeSource`] watches Services, EndpointSlices and Nodes. [`Access`] finds the server and the
//! credentials.
//!
//! Uses kube's client (connections, TLS, rotating credentials), but not its watcher:
//! docs/decisions/0012-own-watch-client.md compares the watches with it and with client-go's.
//!
//! # Invariants
//!
//! - An object is reduced to the model's fields as soon as its text is read.
//! - A list takes effect only when complete: then objects that it lacks are removed.
//! - Events of one kind are applied in the server's order.
//! - Every failed watch is retried, with growing pauses. A failure is logged once per outage.
//! - Memory is bounded: lists, events, refusals and credential files have a maximum size, and an error names
//!   the limit. The exception is the output of a kubeconfig's exec program, which kube reads whole.
//! - After an outage or silence everything is listed again: a server restored from a backup may not know an
//!   earlier version.
//!
//! # Depends on
//!
//! `lb_core::model`, `source`; kube, which is named nowhere else.

mod access;
mod backoff;
mod events;
mod fold;
mod follow;
mod kinds;
mod live;

pub use self::{
    access::{Access, Error, apiserver},
    follow::Timing,
    live::{KubeSource, SCHEME, Selection},
};
