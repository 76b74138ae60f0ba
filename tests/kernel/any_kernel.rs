//! Tests of what does not depend on the kernel's version: the rules, limits, layouts, repairs, and answers.
//!
//! `cargo xtask test` runs them on the running kernel, the kernel matrix only on its oldest one.

mod audit;
mod capacity;
mod exclusive;
mod explain;
pub(crate) mod layouts;
pub(crate) mod load;
mod packet_bridges;
mod packet_neighbours;
mod packet_rules;
mod packet_scenarios;
mod scenarios;
mod stats;
