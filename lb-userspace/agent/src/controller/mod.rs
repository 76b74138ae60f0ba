//! Drives the way from objects to tables.
//!
//! # Purpose
//!
//! [`State`] is the whole agent without I/O: objects in, plans out. [`run`] connects it to a source, the kernel and
//! the clock.
//!
//! # Invariants
//!
//! - Level-triggered: a plan is computed from what is desired and what the tables hold, never from what an event
//!   says. After any error the tables are read again.
//! - No plan before every source has finished its first list; the one exception is [`start`].
//!
//! # Depends on
//!
//! Everything.

pub mod issues;
pub mod known;
pub mod latency;
pub mod run;
pub mod save;
pub mod start;
pub mod sweep;
mod turn;

pub use self::latency::Latency;
