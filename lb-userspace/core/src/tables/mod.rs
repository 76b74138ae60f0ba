//! Images of the maps, and the allocation of their ids and runs.
//!
//! # Purpose
//!
//! An [`Image`] is the content of the maps: the target of plans, what was read from the kernel, or what the
//! simulator runs on. [`pool::Pool`] allocates ids, [`space::Space`] the offsets of runs.
//!
//! # Invariants
//!
//! - A run is sorted by endpoint id, and its entries do not change while a frontend refers to it.
//! - No program reads what is freed here: the encoder holds it back for a grace period (docs/decisions/0001).
//!
//! # Depends on
//!
//! `desired`, `model`, `lb_common`.

pub mod image;
pub mod pool;
pub mod run;
pub mod space;

pub use self::{
    image::{AddressTable, Addresses, Image, wire_protocol},
    run::{Entry, StoredRun},
};
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
