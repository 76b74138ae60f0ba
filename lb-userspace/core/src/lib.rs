//! From Kubernetes objects to what the BPF maps hold: plain functions over plain values.
//!
//! [`model`] checks objects, [`desired`] applies the rules of a service proxy, [`tables`] is the image of the maps, and
//! [`plan`] leads from one image to the next. [`state`] joins them: objects in, plans out. See docs/ARCHITECTURE.md.
//!
//! No I/O, no clock, no async and no order of hash maps: the manifest and `clippy.toml` of this crate see to it.
#![forbid(unsafe_code)]
#![cfg_attr(test, expect(clippy::disallowed_methods, reason = "a test needs an instant to count from"))]

pub mod desired;
pub mod model;
pub mod plan;
pub mod sim;
pub mod stale;
pub mod state;
pub mod tables;
