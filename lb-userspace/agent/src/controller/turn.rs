//! Waiting for another agent to end.
//!
//! The lock comes before everything that two agents cannot share: ports, maps, links. So a second agent waits instead of
//! failing, and a new one may be started before the old one is stopped.

use std::{io, path::Path, time::Duration};

use lb_kernel::lock::{self, Lock};
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tracing::info;

use super::run::RunError;
use crate::serve::{self, ListenError, Listeners};

/// How often the lock is tried. Nothing is served by whom it keeps waiting: the kernel goes on meanwhile.
const TRY: Duration = Duration::from_millis(50);
/// How often it is tried to answer health checks meanwhile: the agent that is waited for may answer there.
const LISTEN: Duration = Duration::from_secs(1);
/// How long the ports of an agent that has just ended may be in use: one that is killed gives up its lock first.
const PORTS: Duration = Duration::from_secs(5);

/// Waits until no other agent has the pins, and opens what to listen on. `None` if `stop` turned true meanwhile.
///
/// While it waits, health checks find an agent that is alive and not ready, if their port is free.
///
/// # Errors
///
/// If there can be no pins, or an address cannot be listened on.
pub(super) async fn wait_for_turn(
    pin_path: &Path,
    http: &serve::Options,
    stop: &mut watch::Receiver<bool>,
) -> Result<Option<(Lock, Listeners)>, RunError> {
    if let Some(lock) = Lock::try_take(pin_path)? {
        return Ok(Some((lock, Listeners::open(http).await?)));
    }
    let holder = lock::describe_holder(pin_path);
    info!(holder, pins = %pin_path.display(), "another agent is at work: waiting for it to end");
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
    info!(waited = ?started.elapsed(), "the other agent has ended: taking over");
    if let Some(mut waiting) = waiting {
        // Its port is free when this returns.
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
