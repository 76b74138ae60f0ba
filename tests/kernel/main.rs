//! What the programs do to real sockets on the running kernel.
//!
//! Each test has a sandbox of its own. The executable works as the only program of a virtual machine.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in what a test calls too")]

mod affinity;
mod audit;
mod calls;
mod capacity;
mod exclusion;
mod lifecycle;
mod load;
mod matrix;
mod records;
mod refusals;
mod scenarios;
mod slots;
mod stale;
mod stats;
mod verifier;
