//! Waits for another agent to exit.
//!
//! The lock is taken before anything that two agents cannot share: ports, maps, links. So a second agent
//! waits instead of failing, and a new one may start before the old one stops.

use std::{io, path::Path, time::Duration};

use lb_kernel::lock::{self, Lock};
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tracing::info;

use super::run::RunError;
use crate::serve::{self, ListenError, Listeners};

/// How often the lock is tried. Waiting interrupts no service: the kernel keeps serving.
const TRY: Duration = Duration::from_millis(50);
/// How often to try to answer health checks while waiting. The other agent may have that port.
const LISTEN: Duration = Duration::from_secs(1);
/// How long to retry ports that the other agent holds. One that is killed releases its lock first.
const PORTS: Duration = Duration::from_secs(5);

/// Waits until no other agent holds the pins, then opens the listeners. `None` if `stop` turns true first.
///
/// While it waits, health checks see an agent that is live and not ready, if their port is free.
///
/// # Errors
///
/// If the pins' directory cannot be used, or an address cannot be listened on.
pub(super) async fn wait_for_lock(
    pin_path: &Path,
    http: &serve::Options,
    stop: &mut watch::Receiver<bool>,
) -> Result<Option<(Lock, Listeners)>, RunError> {
    if let Some(lock) = Lock::try_take(pin_path)? {
        return Ok(Some((lock, Listeners::open(http).await?)));
    }
    let holder = lock::describe_holder(pin_path);
    info!(holder, pins = %pin_path.display(), "another agent is running: waiting for it to exit");
    let started = Instant::now();
    let (mut waiting, mut listen_at) = (None, started);
    let lock = loop {
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => {
                info!("stopped while waiting; nothing was changed");
                return Ok(None);
            }
            () = time::sleep(TRY) => {}
        }
        if let Some(lock) = Lock::try_take(pin_path)? {
            break lock;
        }
        if waiting.is_none() && Instant::now() >= listen_at {
            listen_at = Instant::now() + LISTEN;
            waiting = serve::answer_while_waiting(http).await;
        }
    };
    info!(waited = ?started.elapsed(), "the other agent has exited: taking over");
    if let Some(mut waiting) = waiting {
        // Frees its port.
        waiting.shutdown().await;
    }
    let patience = Instant::now() + PORTS;
    loop {
        match Listeners::open(http).await {
            Err(ListenError { source, .. })
                if source.kind() == io::ErrorKind::AddrInUse && Instant::now() < patience =>
            {
                time::sleep(TRY).await;
            }
            opened => return Ok(Some((lock, opened?))),
        }
    }
}
