//! The sync loop: from objects to the kernel's tables.
//!
//! # Purpose
//!
//! [`State`] is the agent without I/O: objects in, plans out. [`run`] connects it to a source, the kernel and
//! the clock.
//!
//! # Invariants
//!
//! - Level-triggered: a plan is computed from the desired state and the tables, never from an event. After
//!   any error the tables are read again.
//! - No plan before every source has finished its first list, except for [`start`].
//!
//! # Depends on
//!
//! Everything.

pub mod issues;
pub mod latency;
mod lock_wait;
pub mod run;
pub mod save;
pub mod start;
pub mod sweep;

pub use self::latency::Latency;
