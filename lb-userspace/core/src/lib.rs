//! From Kubernetes objects to what the BPF maps hold: plain functions over plain values.
//!
//! [`model`] checks objects, [`desired`] applies the rules of a service proxy, [`tables`] is the image of the
//! maps, and [`plan`] orders the ops between two images. [`state`] joins them: objects in, plans out. See
//! docs/ARCHITECTURE.md.
//!
//! No I/O, no clock, no async, no order of hash maps: this crate's manifest and `clippy.toml` enforce it.
#![forbid(unsafe_code)]
#![cfg_attr(test, expect(clippy::disallowed_methods, reason = "a test needs an instant to count from"))]

pub mod desired;
pub mod ejection;
pub mod model;
pub mod names;
pub mod packets;
pub mod plan;
pub mod sim;
pub mod stale;
pub mod state;
pub mod tables;
