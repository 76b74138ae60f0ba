//! The agent: sources of objects, the loop that keeps the maps, the snapshot on disk, health checks and
//! metrics.
//!
//! See docs/ARCHITECTURE.md.
#![deny(unsafe_code)]

pub mod controller;
pub mod names;
pub mod self_test;
pub mod serve;
pub mod snapshot;
pub mod source;
pub mod telemetry;
