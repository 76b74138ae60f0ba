//! What the tests of socklb stand on.
//!
//! # Purpose
//!
//! - [`sandbox`]: a network without a way out, a BPF file system and a cgroup for each test.
//! - [`server`], [`client`]: who answered, and what a program sees of it.
//! - [`cluster`]: Kubernetes objects; [`agent`]: from objects to the kernel, in process.
//! - [`apiserver`]: an API server that holds such objects, and its faults.
//! - [`controlplane`]: a real one, where the environment names it.
//! - [`process`]: what a process takes of the machine.
//! - [`churn`]: changes and faults for a long time, with calls under way.
//! - [`scenario`]: objects and expected flows, run by the simulator and by the kernel.
//! - [`feature`]: what happens on a machine that lacks something.
//!
//! # Invariants
//!
//! - Nothing is sent to an address outside of namespaces that a test made; those have no default route.
//! - Programs attach to cgroups that a test made, never to one that was there.
//! - Everything works from a static executable that is the only program of a machine.
#![expect(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "whatever fails here fails a test, and a panic is how a test fails"
)]

pub mod agent;
pub mod apiserver;
pub mod cgroup;
pub mod churn;
pub mod client;
pub mod cluster;
pub mod controlplane;
pub mod feature;
pub mod netlink;
pub mod netns;
pub mod process;
pub mod sandbox;
pub mod scenario;
pub mod server;

pub use feature::{Feature, number, require};
pub use sandbox::Sandbox;
