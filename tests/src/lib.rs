//! Infrastructure of socklb's tests.
//!
//! # Purpose
//!
//! - [`sandbox`]: an isolated network, a BPF file system and a cgroup for each test.
//! - [`server`], [`client`]: which server answered, and what the program sees.
//! - [`bed`]: nodes, pods, a router and a client outside, for packets.
//! - [`cluster`]: Kubernetes objects; [`agent`]: from objects to the kernel, in process.
//! - [`apiserver`]: an API server for such objects, with faults.
//! - [`controlplane`]: a real one, if the environment names it.
//! - [`kube_proxy`]: the peer, if the environment names it.
//! - [`installed`]: the program `socklb` as people run it; [`command`]: other programs.
//! - [`process`]: resource usage of a process.
//! - [`churn`]: long-running changes and faults, with concurrent calls.
//! - [`outside`]: connections from outside while endpoints and agents change.
//! - [`scenario`]: objects and expected flows, run by the simulator and by the kernel.
//! - [`feature`]: what happens on a machine that lacks something.
//!
//! # Invariants
//!
//! - Nothing is sent outside of the namespaces that a test created; those have no default route.
//! - Programs attach only to cgroups that a test created.
//! - Everything works in a static executable that is the only program of a machine.
#![expect(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "every failure here fails a test, by a panic"
)]

pub mod agent;
pub mod apiserver;
pub mod bed;
pub mod cgroup;
pub mod churn;
pub mod client;
pub mod cluster;
pub mod command;
pub mod controlplane;
pub mod feature;
pub mod installed;
pub mod kube_proxy;
pub mod netns;
pub mod outside;
pub mod process;
pub mod sandbox;
pub mod scenario;
pub mod server;

pub use feature::{Feature, number, require};
pub use sandbox::Sandbox;
