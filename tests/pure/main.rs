//! Tests without a kernel.

mod scenarios;
