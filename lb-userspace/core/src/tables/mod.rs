//! What the kernel's maps hold, as values, and how their ids and places are given out.
//!
//! # Purpose
//!
//! [`Image`] is what the tables hold: the target that plans lead to, what was read from the kernel, and what the
//! simulator runs on. [`pool::Pool`] gives out ids, [`space::Space`] room for runs.
//!
//! # Invariants
//!
//! - A run is sorted by endpoint id, and its entries never change while any frontend refers to them.
//! - What is freed here, nothing reads: the encoder has held it back for a grace period (docs/decisions/0001).
//!
//! # Depends on
//!
//! `desired`, `model`, `lb_common`.

pub mod image;
pub mod pool;
pub mod space;

pub use self::image::{AddressTable, Entry, Image, wire_protocol};
pub use crate::model::Cidr;

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapUse {
    /// Its name.
    pub map: &'static str,
    /// Entries in use.
    pub n_entries: u32,
    /// Entries that it has room for.
    pub capacity: u32,
}
