//! The command line of socklb. See docs/ARCHITECTURE.md.
#![deny(unsafe_code)]

pub mod cli;
