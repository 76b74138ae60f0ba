//! socklb: the agent and its command line.
//!
//! The way of a change, each step using only what stands before it: `source`/`cluster` (I/O) → [`model`] →
//! [`desired`] → [`tables`] → [`plan`] → `kernel` (I/O). `controller` drives it. See docs/ARCHITECTURE.md.
#![deny(unsafe_code)]

pub mod cli;
pub mod cluster;
pub mod controller;
pub mod desired;
pub mod kernel;
pub mod model;
pub mod plan;
pub mod self_test;
pub mod serve;
pub mod sim;
pub mod snapshot;
pub mod source;
pub mod stale;
pub mod tables;
pub mod telemetry;
