//! Where objects come from.

pub mod files;

use crate::model::{Changes, Issue, Store};

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
}
