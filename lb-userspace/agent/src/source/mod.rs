//! Where objects come from.

mod contact;
pub mod files;

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Instant, SystemTime},
};

use lb_core::model::{Changes, Issue, Store, notice::Telling};

pub use self::contact::{Contact, Outage};

/// When a change came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When the event arrived here.
    pub received: Instant,
    /// When the cluster saw what led to it, by the cluster's clock; `None` if that is not told, or if it was before
    /// this agent started.
    pub triggered: Option<SystemTime>,
}

/// Where objects come from.
pub trait Source: Send {
    /// Waits for news. `false` when no more will come.
    ///
    /// Cancel safe: dropping the future loses no news.
    fn changed(&mut self) -> impl Future<Output = bool> + Send;

    /// Whether the first list of every kind is complete. Until then nothing is written to the kernel.
    fn is_complete(&self) -> bool;

    /// Brings a store up to date.
    fn apply(&mut self, store: &mut Store) -> Changes;

    /// What is wrong with single objects or files, in a stable order.
    fn issues(&self) -> Vec<Issue>;

    /// Describes the source in a few words.
    fn describe(&self) -> String;

    /// The UIDs of this node's pods whose calls are to be left alone; `None` if that is not known, or not yet.
    fn excluded_pods(&self) -> Option<&BTreeSet<Arc<str>>> {
        None
    }

    /// Whether it is in touch; `None` for a source that cannot be away.
    fn contact(&self) -> Option<&Contact> {
        None
    }

    /// How many notices can be told at the moment. None where there is nobody to tell: files have no readers that are known.
    fn room_for_notices(&self) -> usize {
        0
    }

    /// Tells the people behind the objects of something, without waiting. What has no room is lost.
    fn tell(&self, _telling: Telling) {}

    /// Takes the times of the changes that were applied since the last call, except those of whole lists.
    fn take_arrivals(&mut self) -> Vec<Arrival> {
        Vec::new()
    }
}
