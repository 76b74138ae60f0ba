//! Watches a manifest file or folder.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs, io, mem,
    os::{fd::AsFd as _, unix::fs::MetadataExt},
    path::{Path, PathBuf, absolute},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
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

/// How long the folder must be quiet after a change before it is read. So an editor's truncate, write and
/// rename, or the many files of a copy, give one snapshot.
const QUIET: Duration = Duration::from_millis(10);
/// Maximum time between a change and the reading if the folder is never quiet.
const MAX_UNQUIET: Duration = Duration::from_millis(200);
/// How often everything is reread without an event. Covers file systems without events (NFS, some overlays),
/// targets of symbolic links, and lost watches.
const REREAD: Duration = Duration::from_secs(10);

/// Events of the path that can change a reading's result. Opens and reads are excluded: the agent's own
/// readings would trigger each other endlessly.
const OF_PATH: AddWatchFlags = OF_PARENT
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF);
/// Events of the parent folder that can change what the path leads to. Writes to other files are excluded:
/// there may be many.
const OF_PARENT: AddWatchFlags =
    AddWatchFlags::IN_CREATE.union(AddWatchFlags::IN_DELETE).union(AddWatchFlags::IN_MOVE);
/// Minimum time between two reads of events, however fast other files are written.
const PAUSE: Duration = Duration::from_millis(1);
/// Poll timeout of the events' thread, in milliseconds: how soon it notices that the watch was dropped.
const LOOK: u16 = 10_000;

/// Why [`watch()`] cannot start. The path is a setting, so the caller reports the error and exits.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path does not exist or is inaccessible.
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

/// A snapshot of a path, and when its reading began.
pub type Reading = (Snapshot, Moment);

/// A watched path. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    /// One reading per change, and one per request.
    pub readings: mpsc::Receiver<Reading>,
    asking: mpsc::Sender<BTreeSet<String>>,
}

impl Watch {
    /// Requests a reading without a change. `files` are opened, whatever their time stamps.
    pub fn ask(&self, files: BTreeSet<String>) {
        // A pending request has the same effect. If it was for other files, the caller requests these again.
        let _full = self.asking.try_send(files);
    }
}

/// Watches a manifest file, or a folder of files that end in `.yaml`, `.yml` or `.json`.
///
/// The first reading comes at once. Others follow each change, and each close by a program that wrote; a
/// reading that finds no change is dropped. Hidden files and subfolders are ignored; symbolic links are
/// followed, so that a mounted `ConfigMap` works. Each reading is complete, so a change whose event is lost
/// is found within ten seconds.
///
/// The task ends when the receiver is dropped. A path that vanishes later is no error: it is watched again
/// when it returns.
///
/// # Errors
///
/// If the path does not exist now, or is neither a file nor a folder.
///
/// # Panics
///
/// Outside a tokio runtime.
pub fn watch(path: impl AsRef<Path>) -> Result<Watch, Error> {
    let given = path.as_ref();
    let failed = |source| Error::Path { path: given.to_owned(), source };
    // Absolute, so that it has a parent folder to watch.
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
        // A full reading, which trusts no time stamp, finds what the watch and the stamps miss.
        let trusts_stamps = Instant::now() < next_full;
        if !trusts_stamps {
            next_full = Instant::now() + REREAD;
        }
        let done = task::spawn_blocking(move || {
            // First the watch, then the reading, so that a change in between is read again.
            watches.renew();
            let now = Moment::now();
            let snapshot = reader.read(trusts_stamps, asked.as_ref());
            (watches, reader, snapshot.map(|snapshot| (snapshot, now)))
        });
        // No result: the runtime is shutting down.
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
            // A change or the timeout: read.
            _ = timeout_at(next_full, quiet_after_change(&changed)) => None,
        };
    }
}

/// Waits for a change, then for the quiet after it.
async fn quiet_after_change(changed: &Notify) {
    changed.notified().await;
    let deadline = Instant::now() + MAX_UNQUIET;
    let unquiet = async { while timeout(QUIET, changed.notified()).await.is_ok() {} };
    // Quiet or not: read.
    let _ = timeout_at(deadline, unquiet).await;
}

struct Watches {
    path: PathBuf,
    changed: Arc<Notify>,
    /// Read by a thread until `changed` is dropped.
    inotify: Option<Arc<Inotify>>,
    watched: Arc<Mutex<Watched>>,
    /// Watched device and inode: the path may come to mean another folder.
    identity: Option<(u64, u64)>,
    has_warned: bool,
}

impl Watches {
    fn new(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_owned();
        Self {
            path: path.to_owned(),
            changed: Arc::default(),
            inotify: None,
            watched: Arc::new(Mutex::new(Watched { own: None, of_parent: None, name })),
            identity: None,
            has_warned: false,
        }
    }

    /// Watches what is at the path now. Without a watch (the user's inotify limit, a missing folder) only the
    /// periodic readings remain.
    fn renew(&mut self) {
        let identity = fs::metadata(&self.path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        // An inode number may be reused; its watch is not.
        let is_watched = lock(&self.watched).own.is_some() == identity.is_some();
        if self.inotify.is_some() && identity == self.identity && is_watched {
            return;
        }
        self.identity = identity;
        if let Err(error) = self.start()
            && !self.has_warned
        {
            let (path, seconds) = (self.path.display(), REREAD.as_secs());
            tracing::warn!(%path, %error, "cannot watch manifests; reading them every {seconds} s");
            self.has_warned = true;
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let inotify = match &self.inotify {
            Some(inotify) => Arc::clone(inotify),
            None => self.listen()?,
        };
        // The parent reports that the path itself was replaced, removed or created. The parent may be
        // unreadable.
        let of_parent = self.path.parent().and_then(|parent| {
            let watched = inotify.add_watch(parent, OF_PARENT | AddWatchFlags::IN_ONLYDIR);
            watched
                .inspect_err(|error| {
                    tracing::debug!(path = %parent.display(), %error, "cannot watch the parent folder");
                })
                .ok()
        });
        // Last: if both are the same folder, this mask counts.
        let own = self.identity.map(|_| inotify.add_watch(&self.path, OF_PATH).map_err(refused)).transpose();
        let mut watched = lock(&self.watched);
        let new = [own.as_ref().ok().copied().flatten(), of_parent];
        let former = [mem::replace(&mut watched.own, new[0]), mem::replace(&mut watched.of_parent, new[1])];
        for former in former.into_iter().flatten().filter(|former| !new.contains(&Some(*former))) {
            let _gone_already = inotify.rm_watch(former);
        }
        own.map(drop)
    }

    /// Starts the thread that reads events.
    fn listen(&mut self) -> io::Result<Arc<Inotify>> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(refused)?;
        let inotify = Arc::new(inotify);
        let (events, watched) = (Arc::clone(&inotify), Arc::clone(&self.watched));
        let changed = Arc::downgrade(&self.changed);
        let _ends_by_itself = thread::Builder::new()
            .name("manifests".to_owned())
            .spawn(move || listen(&events, &watched, &changed))?;
        self.inotify = Some(Arc::clone(&inotify));
        Ok(inotify)
    }
}

fn lock(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    // A panic leaves no change half done.
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Explains inotify limits, which the kernel reports as "no space left on device".
fn refused(error: Errno) -> io::Error {
    match error {
        Errno::ENOSPC => {
            io::Error::other("no inotify watch is left for this user: raise fs.inotify.max_user_watches")
        }
        Errno::EMFILE => {
            io::Error::other("no inotify instance is left for this user: raise fs.inotify.max_user_instances")
        }
        error => error.into(),
    }
}

/// Reports changes until the receiver is dropped. On a thread of its own, so that an endless stream of events
/// delays nothing else.
fn listen(inotify: &Inotify, watched: &Mutex<Watched>, changed: &Weak<Notify>) {
    loop {
        let _ready_or_late =
            poll(&mut [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)], PollTimeout::from(LOOK));
        let Some(changed) = changed.upgrade() else { return };
        match inotify.read_events() {
            Ok(events) => {
                let mut watched = lock(watched);
                let mut concerns = false;
                for event in &events {
                    concerns |= watched.concerns(event);
                }
                if concerns {
                    changed.notify_one();
                }
            }
            Err(Errno::EAGAIN) => {}
            // Events may be lost.
            Err(_) => changed.notify_one(),
        }
        thread::sleep(PAUSE);
    }
}

struct Watched {
    /// The path; `None` if it does not exist.
    own: Option<WatchDescriptor>,
    of_parent: Option<WatchDescriptor>,
    /// The path's last component.
    name: OsString,
}

impl Watched {
    /// Whether an event can change a reading's result.
    fn concerns(&mut self, InotifyEvent { wd, mask, name, .. }: &InotifyEvent) -> bool {
        let is_own = Some(*wd) == self.own && name.as_deref().is_none_or(is_read);
        let is_path = Some(*wd) == self.of_parent && name.as_ref() == Some(&self.name);
        if mask.contains(AddWatchFlags::IN_IGNORED) && is_own {
            self.own = None;
        }
        mask.contains(AddWatchFlags::IN_Q_OVERFLOW) || is_own || is_path
    }
}

/// Whether a name in the folder is a manifest's, or that of the link (`..data`) through which a mounted
/// `ConfigMap` replaces all its files at once.
fn is_read(name: &OsStr) -> bool {
    is_manifest(name) || name.as_encoded_bytes().starts_with(b"..")
}

#[cfg(test)]
mod tests;
