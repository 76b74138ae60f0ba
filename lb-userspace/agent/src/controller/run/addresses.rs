//! When to read the addresses of the node's interfaces.

use std::{net::IpAddr, time::Duration};

use lb_kernel::addresses::{self, AddressWatch};
use tokio::time::Instant;
use tracing::{info, warn};

/// Time between two reads without a notification. The kernel reports every change; this covers a fault.
const REREAD: Duration = Duration::from_secs(60);

pub(super) struct Addresses {
    /// `None` if the kernel cannot report changes.
    watch: Option<AddressWatch>,
    read: Instant,
}

impl Addresses {
    /// Subscribes to changes. Call it before the first read.
    pub(super) fn start() -> Self {
        let watch = AddressWatch::open();
        if let Err(error) = &watch {
            warn!(%error, "the node's addresses cannot be watched: reading them every few seconds");
        }
        Self { watch: watch.ok(), read: Instant::now() }
    }

    /// Waits for a change. Cancel safe.
    pub(super) async fn changed(&mut self) {
        let Some(watch) = &self.watch else { return std::future::pending().await };
        if let Err(error) = watch.changed().await {
            info!(%error, "the watch of the node's addresses failed: reading them every few seconds");
            self.watch = None;
        }
    }

    /// Whether a read is due without a notification.
    pub(super) fn is_due(&self) -> bool {
        self.watch.is_none() || self.read.elapsed() >= REREAD
    }

    pub(super) fn read(&mut self) -> Vec<IpAddr> {
        self.read = Instant::now();
        addresses::read()
    }
}
