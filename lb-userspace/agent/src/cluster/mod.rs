//! The API server as a source: `--source kube`.
//!
//! # Purpose
//!
//! [`KubeSource`] watches Services, EndpointSlices and Nodes. [`Access`] finds the server and the credentials.
//!
//! kube's own watcher is not used, its client (connections, TLS, credentials that rotate) is: docs/decisions/0012-own-watch-client.md
//! compares the watches with it and with client-go's.
//!
//! # Invariants
//!
//! - An object is reduced to what the model keeps as soon as its text is read.
//! - A list takes effect when it is complete: what it does not name is removed then, and nothing before.
//! - Events of one kind are applied in the order in which the server sent them.
//! - No answer of the server ends a watch for good. What goes wrong is logged once in an outage, and asked again after a
//!   pause that grows.
//! - No answer fills the memory: lists, events, refusals and files with credentials have a largest size, and what is larger is
//!   told with the limit. Only what a program that a kubeconfig names (exec) writes is read whole, by kube.
//! - After an outage or silence everything is listed: a version of before may mean nothing to a server that was restored from a
//!   backup.
//!
//! # Depends on
//!
//! `model`, `source`; kube, which is named nowhere else.

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
    live::{KubeSource, Wanted},
};
