//! What the programs do to real sockets on the running kernel.
//!
//! Each test has a sandbox of its own. The executable works as the only program of a virtual machine.

mod calls;
mod capacity;
mod lifecycle;
mod load;
mod records;
mod refusals;
mod scenarios;
mod stats;
mod verifier;
