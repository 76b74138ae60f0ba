//! Watches a manifest file or folder.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf, absolute},
    sync::Arc,
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::{Notify, mpsc},
    task,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Moment, Snapshot,
    read::{Reader, is_manifest},
};

/// How long the folder must be quiet after a change before it is read. An editor's truncate, write and rename,
/// or the many files of a copy, become one snapshot.
const QUIET: Duration = Duration::from_millis(10);
/// How long a folder that is never quiet is left unread.
const MAX_UNQUIET: Duration = Duration::from_millis(200);
/// How often everything is read without an event: for file systems that send none (NFS, some overlays), targets
/// of symbolic links, and lost watches.
const REREAD: Duration = Duration::from_secs(10);

/// Why [`watch()`] cannot start. The caller tells the user and ends: a path is a setting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing at the path, or it cannot be looked at.
    #[error("--source file:{}: {source}: give a manifest file or a folder of them", path.display())]
    Path {
        /// The path given.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The path is neither a file nor a folder.
    #[error("--source file:{}: is neither a file nor a folder: give a manifest file or a folder of them", path.display())]
    Kind {
        /// The path given.
        path: PathBuf,
    },
}

/// What was found at a path, and when it began to be read.
pub type Reading = (Snapshot, Moment);

/// A path that is watched. Ends with this value.
#[derive(Debug)]
pub struct Watch {
    /// One for each change, and one for each that was asked for.
    pub readings: mpsc::Receiver<Reading>,
    asking: mpsc::Sender<BTreeSet<String>>,
}

impl Watch {
    /// Asks for a reading although nothing has changed. `files` are opened, whatever their time stamps say.
    pub fn ask(&self, files: BTreeSet<String>) {
        // One that is asked for already comes later than now too, but may be of other files: those are asked for again.
        let _full = self.asking.try_send(files);
    }
}

/// Watches a manifest file, or a folder of files that end in `.yaml`, `.yml` or `.json`.
///
/// The first reading comes at once, then one after each change, and after a program has closed a file; one without a change
/// gives none. Hidden
/// files and folders inside the folder are left out; symbolic links are followed, so that a mounted `ConfigMap`
/// works. Each reading is a complete one: a change whose event is lost is seen ten seconds later at the latest.
///
/// The task ends when the receiver is dropped. A path that vanishes later is no error: it is watched again when it
/// comes back.
///
/// # Errors
///
/// If there is nothing at the path at this moment, or neither a file nor a folder.
///
/// # Panics
///
/// Outside a tokio runtime.
pub fn watch(path: impl AsRef<Path>) -> Result<Watch, Error> {
    let given = path.as_ref();
    let failed = |source| Error::Path { path: given.to_owned(), source };
    // Absolute, so that the paths of events can be compared with it.
    let path = absolute(given).map_err(failed)?;
    let metadata = fs::metadata(&path).map_err(failed)?;
    if !metadata.is_dir() && !metadata.is_file() {
        return Err(Error::Kind { path: given.to_owned() });
    }
    let (sender, readings) = mpsc::channel(1);
    let (asking, asked) = mpsc::channel(1);
    task::spawn(run(Reader::new(path), sender, asked));
    Ok(Watch { readings, asking })
}

async fn run(
    mut reader: Reader,
    sender: mpsc::Sender<Reading>,
    mut asking: mpsc::Receiver<BTreeSet<String>>,
) {
    let mut watches = Watches::new(reader.path());
    let changed = Arc::clone(&watches.changed);
    let mut next_full = Instant::now();
    let mut asked = None;
    loop {
        // A reading that trusts no time stamp finds what the watch and the stamps miss.
        let trusts_stamps = Instant::now() < next_full;
        if !trusts_stamps {
            next_full = Instant::now() + REREAD;
        }
        let done = task::spawn_blocking(move || {
            // First the watch, then the reading: what changes in between is read again instead of missed.
            watches.renew();
            let now = Moment::now();
            let snapshot = reader.read(trusts_stamps, asked.as_ref());
            (watches, reader, snapshot.map(|snapshot| (snapshot, now)))
        });
        // Without a result the runtime is shutting down.
        let Ok(done) = done.await else { return };
        let reading;
        (watches, reader, reading) = done;
        if let Some(reading) = reading
            && sender.send(reading).await.is_err()
        {
            return;
        }
        asked = tokio::select! {
            () = sender.closed() => return,
            Some(files) = asking.recv() => Some(files),
            // Either way it is time to read.
            _ = timeout_at(next_full, quiet_after_change(&changed)) => None,
        };
    }
}

/// Waits for a change, then for the quiet after it.
async fn quiet_after_change(changed: &Notify) {
    changed.notified().await;
    let deadline = Instant::now() + MAX_UNQUIET;
    let unquiet = async { while timeout(QUIET, changed.notified()).await.is_ok() {} };
    // Quiet or not, it is time to read.
    let _ = timeout_at(deadline, unquiet).await;
}

/// The kernel's watches on the path.
struct Watches {
    path: PathBuf,
    changed: Arc<Notify>,
    /// Kept for its `Drop`, which ends the watches.
    watcher: Option<RecommendedWatcher>,
    /// Device and inode that are watched: a path can come to mean another folder.
    identity: Option<(u64, u64)>,
    has_warned: bool,
}

impl Watches {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            changed: Arc::default(),
            watcher: None,
            identity: None,
            has_warned: false,
        }
    }

    /// Watches what is at the path now. Without a watch (the user's inotify limit, a missing folder) the periodic
    /// reading goes on alone.
    fn renew(&mut self) {
        let identity = fs::metadata(&self.path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        if self.watcher.is_some() && identity == self.identity {
            return;
        }
        self.identity = identity;
        self.watcher = match self.start() {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                if !self.has_warned {
                    let (path, seconds) = (self.path.display(), REREAD.as_secs());
                    tracing::warn!(%path, %error, "cannot watch manifests; reading them every {seconds} s");
                    self.has_warned = true;
                }
                None
            }
        };
    }

    fn start(&self) -> notify::Result<RecommendedWatcher> {
        let (path, changed) = (self.path.clone(), Arc::clone(&self.changed));
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error may stand for lost events.
            if event.is_ok_and(|event| !concerns(&path, &event)) {
                return;
            }
            changed.notify_one();
        })?;
        // The parent sees the path itself replaced, removed or created; it may be unreadable for us.
        if let Some(parent) = self.path.parent()
            && let Err(error) = watcher.watch(parent, RecursiveMode::NonRecursive)
        {
            tracing::debug!(path = %parent.display(), %error, "cannot watch the parent folder");
        }
        if self.identity.is_some() {
            watcher.watch(&self.path, RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    }
}

/// Whether an event can mean that another reading gives another result.
fn concerns(path: &Path, event: &Event) -> bool {
    // Opening and reading a file are events too: our own readings would follow one another without end.
    let is_read = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => false,
        EventKind::Access(_) => true,
        _ => false,
    };
    // An event without a path says that the kernel's queue overflowed.
    !is_read && (event.paths.is_empty() || event.paths.iter().any(|changed| is_inside(path, changed)))
}

/// Whether a changed path is the watched one, a manifest in it, or the link through which a mounted `ConfigMap`
/// exchanges all its files at once (`..data`).
fn is_inside(path: &Path, changed: &Path) -> bool {
    if changed == path {
        return true;
    }
    changed.parent() == Some(path)
        && changed
            .file_name()
            .is_some_and(|name| is_manifest(name) || name.as_encoded_bytes().starts_with(b".."))
}

#[cfg(test)]
mod tests;
