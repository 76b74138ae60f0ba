//! Tests of what does not depend on the kernel's version: limits, layouts, answers, refused attachments.
//!
//! `cargo xtask test` runs them on the running kernel, the kernel matrix only on its oldest one.

mod capacity;
mod exclusive;
mod explain;
mod layouts;
