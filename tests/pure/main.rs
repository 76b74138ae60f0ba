//! Tests without a kernel: the scenarios on the simulator, and properties of plans over random clusters.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic, and so do its helpers")]

mod clusters;
mod packets;
mod prefixes;
mod races;
mod reuse;
mod room;
mod scenarios;
mod states;
