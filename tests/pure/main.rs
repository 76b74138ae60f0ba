//! Tests without a kernel: the scenarios on the simulator, and properties of plans over random clusters.

mod clusters;
mod prefixes;
mod races;
mod room;
mod scenarios;
mod states;
