//! Ordinary programs, unmodified, through the hooks.
//!
//! Backends run in their own network namespaces, joined to the node's by veth pairs, as pods do.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic, and so do its helpers")]

mod addresses;
mod adversity;
mod asyncio;
mod backend;
mod bench;
mod curl;
mod demo;
mod deployed;
mod dns;
mod exclusion;
mod faults;
mod handover;
mod health;
mod http;
mod knowledge;
mod load;
mod manifests;
mod names;
mod nested;
mod node;
mod packet_commands;
mod packets;
mod self_test;
mod socklb;
mod stale;
mod town;
mod turns;
mod watch;
