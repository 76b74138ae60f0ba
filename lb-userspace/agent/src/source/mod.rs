//! Sources of objects.

mod contact;
pub mod files;

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Instant, SystemTime},
};

use lb_core::model::{Changes, Issue, Store, notification::DueNotification};

pub use self::contact::{Contact, Outage};

/// The times of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When the event arrived at the agent.
    pub received: Instant,
    /// When the cluster saw the cause, by the cluster's clock; `None` if unknown, or before this agent
    /// started.
    pub triggered: Option<SystemTime>,
}

/// A source of objects, issues and exclusions, and a sink of notifications.
pub trait Source: Send {
    /// Waits for changes. `false` when no more will come.
    ///
    /// Cancel safe: dropping the future loses no change.
    fn changed(&mut self) -> impl Future<Output = bool> + Send;

    /// Whether the first list of every kind is complete. Before that nothing is written to the kernel.
    fn is_complete(&self) -> bool;

    /// Applies the changes to a store.
    fn apply(&mut self, store: &mut Store) -> Changes;

    /// Issues of single objects or files, in a stable order.
    fn issues(&self) -> Vec<Issue>;

    /// Describes the source in a few words.
    fn describe(&self) -> String;

    /// The UIDs of this node's excluded pods; `None` if unknown, or not known yet.
    fn excluded_pods(&self) -> Option<&BTreeSet<Arc<str>>> {
        None
    }

    /// Last answers and outages; `None` for a source that has no outages.
    fn contact(&self) -> Option<&Contact> {
        None
    }

    /// Free space of the notification queue. 0 for a source that cannot notify, such as files.
    fn notification_capacity(&self) -> usize {
        0
    }

    /// Queues a notification without blocking. It is lost if the queue is full.
    fn notify(&self, _notification: DueNotification) {}

    /// Takes the times of the changes applied since the last call, except those of whole lists.
    fn take_arrivals(&mut self) -> Vec<Arrival> {
        Vec::new()
    }
}
