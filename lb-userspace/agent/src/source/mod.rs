//! Sources of objects.

pub mod cluster;
mod contact;
pub mod files;
mod scheme;

use std::{
    collections::BTreeSet,
    pin::Pin,
    sync::Arc,
    time::{Instant, SystemTime},
};

use lb_core::model::{Changes, Issue, Store, notification::DueNotification};

pub use self::{
    contact::{Contact, Outage},
    scheme::{Location, Opening, SCHEMES, Scheme, Setup},
};

/// The times of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When the event arrived at the agent.
    pub received: Instant,
    /// When the cluster saw the cause, by the cluster's clock; `None` if unknown, or before this agent
    /// started.
    pub triggered: Option<SystemTime>,
}

/// Resolves to `false` when no more changes will come.
pub type Changed<'a> = Pin<Box<dyn Future<Output = bool> + Send + 'a>>;

/// A source of objects, and of issues about them. What else it may offer is in [`Notifier`] and
/// [`Exclusions`].
pub trait Source: Send {
    /// Waits for changes.
    ///
    /// Cancel safe: dropping the future loses no change.
    fn changed(&mut self) -> Changed<'_>;

    /// Whether the first list of every kind is complete and applied. Before that nothing is written to the
    /// kernel.
    /// A source that returns `true` too early removes what an earlier agent left.
    fn is_complete(&self) -> bool;

    /// Applies the changes to a store.
    fn apply(&mut self, store: &mut Store) -> Changes;

    /// Issues of single objects or files, in a stable order.
    fn issues(&self) -> Vec<Issue>;

    /// Describes the source in a few words.
    fn describe(&self) -> String;

    /// Last answers and outages; `None` for a source that has no outages.
    fn contact(&self) -> Option<&Contact> {
        None
    }

    /// Takes the times of the changes applied since the last call, except those of whole lists.
    fn take_arrivals(&mut self) -> Vec<Arrival> {
        Vec::new()
    }

    /// Where notifications go; `None` for a source that takes none, such as files.
    fn notifier(&self) -> Option<&dyn Notifier> {
        None
    }

    /// What is excluded; `None` for a source that excludes nothing.
    fn exclusions(&self) -> Option<&dyn Exclusions> {
        None
    }
}

/// A sink of notifications, such as Events of an API server.
pub trait Notifier {
    /// Free space of the queue.
    fn capacity(&self) -> usize;

    /// Queues a notification without blocking. It is lost if the queue is full.
    fn notify(&self, notification: DueNotification);
}

/// Pods whose calls pass unchanged.
pub trait Exclusions {
    /// The UIDs of this node's excluded pods; `None` if they are not known yet.
    fn excluded_pods(&self) -> Option<&BTreeSet<Arc<str>>>;
}
