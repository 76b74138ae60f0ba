//! Tests without a kernel: the scenarios on the simulator, and properties of plans over random clusters.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in what a test calls too")]

mod clusters;
mod prefixes;
mod races;
mod reuse;
mod room;
mod scenarios;
mod states;
