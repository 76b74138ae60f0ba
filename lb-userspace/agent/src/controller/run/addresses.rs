//! When the addresses of the node's interfaces are read.

use std::{net::IpAddr, time::Duration};

use lb_kernel::addresses::{self, AddressWatch};
use tokio::time::Instant;
use tracing::{info, warn};

/// How often they are read although nothing was heard: the kernel tells of every change, so this only makes up for a fault.
const REREAD: Duration = Duration::from_secs(60);

pub(super) struct Addresses {
    /// `None` if changes cannot be heard.
    watch: Option<AddressWatch>,
    read: Instant,
}

impl Addresses {
    /// Begins to listen. To be called before they are read for the first time.
    pub(super) fn start() -> Self {
        let watch = AddressWatch::open();
        if let Err(error) = &watch {
            warn!(%error, "changes of the node's addresses cannot be heard: reading them every few seconds");
        }
        Self { watch: watch.ok(), read: Instant::now() }
    }

    /// Waits until it is time to read them, because something was heard. Cancel safe.
    pub(super) async fn changed(&mut self) {
        let Some(watch) = &self.watch else { return std::future::pending().await };
        if let Err(error) = watch.changed().await {
            info!(%error, "changes of the node's addresses are no longer heard: reading them every few seconds");
            self.watch = None;
        }
    }

    /// Whether it is time to read them although nothing was heard.
    pub(super) fn is_due(&self) -> bool {
        self.watch.is_none() || self.read.elapsed() >= REREAD
    }

    pub(super) fn read(&mut self) -> Vec<IpAddr> {
        self.read = Instant::now();
        addresses::read()
    }
}
