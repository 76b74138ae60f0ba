//! A cgroup for each test, although all tests are threads of one process.
//!
//! In a *threaded* cgroup v2 subtree each thread can be in its own cgroup, and a socket belongs to the cgroup
//! of the thread that created it. While any test needs it, the process is in `socklb-test-<pid>` below the
//! root of the hierarchy. Each test gets a threaded child of it, which its thread enters. Programs attached
//! to the child run for that test's sockets only.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use lb_kernel::cgroup::{children, find_any, find_own};
use nix::{errno::Errno, sys::signal, unistd::Pid};

const PREFIX: &str = "socklb-test-";

/// The cgroup of the calling thread and of the threads and processes that it starts later.
///
/// Drop moves its threads out and removes it. Processes started inside must have exited by then.
#[derive(Debug)]
pub struct ThreadCgroup {
    path: PathBuf,
}

impl ThreadCgroup {
    /// Creates a cgroup and moves the calling thread into it.
    ///
    /// # Errors
    ///
    /// The error of the cgroup file system: `EACCES` or `EROFS` without permission.
    pub fn enter() -> io::Result<Self> {
        static N_MADE: AtomicU32 = AtomicU32::new(0);
        let parent = ProcessCgroup::join()?;
        let cgroup = Self { path: parent.join(format!("thread-{}", N_MADE.fetch_add(1, Ordering::Relaxed))) };
        make_threaded(&cgroup.path)?;
        cgroup.admit_this_thread()?;
        Ok(cgroup)
    }

    /// Where programs attach.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the calling thread into this cgroup.
    ///
    /// # Errors
    ///
    /// The error of the cgroup file system.
    pub fn admit_this_thread(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.threads"), nix::unistd::gettid().to_string())
    }
}

impl Drop for ThreadCgroup {
    fn drop(&mut self) {
        if let Some(parent) = self.path.parent() {
            for tid in fs::read_to_string(self.path.join("cgroup.threads")).unwrap_or_default().lines() {
                let _ended_meanwhile = fs::write(parent.join("cgroup.threads"), tid);
            }
        }
        remove(&self.path);
        ProcessCgroup::leave();
    }
}

/// The cgroup of the test process, while any test uses it.
#[derive(Debug)]
struct ProcessCgroup {
    path: PathBuf,
    origin: PathBuf,
    n_users: usize,
}

static PROCESS: Mutex<Option<ProcessCgroup>> = Mutex::new(None);

impl ProcessCgroup {
    fn lock() -> MutexGuard<'static, Option<Self>> {
        PROCESS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the process into the cgroup if needed, and returns the cgroup.
    fn join() -> io::Result<PathBuf> {
        let mut process = Self::lock();
        if let Some(cgroup) = &mut *process {
            cgroup.n_users += 1;
            return Ok(cgroup.path.clone());
        }
        let root = find_any().map_err(io::Error::other)?;
        sweep(&root);
        let origin = find_own().ok_or_else(|| io::Error::other("this process is in no cgroup v2"))?;
        let path = root.join(format!("{PREFIX}{}", process::id()));
        match fs::create_dir(&path) {
            // Still exists: a process that a test started is in it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        let moved = fs::write(path.join("cgroup.procs"), process::id().to_string());
        if let Err(error) = moved {
            remove(&path);
            return Err(error);
        }
        *process = Some(Self { path: path.clone(), origin, n_users: 1 });
        Ok(path)
    }

    /// Moves the process back, if no other test uses its cgroup.
    fn leave() {
        let mut process = Self::lock();
        let Some(cgroup) = &mut *process else { return };
        cgroup.n_users -= 1;
        if cgroup.n_users == 0 {
            let _origin_is_gone = fs::write(cgroup.origin.join("cgroup.procs"), process::id().to_string());
            remove(&cgroup.path);
            *process = None;
        }
    }
}

/// Creates a cgroup whose threads may be in other cgroups of its subtree.
///
/// # Errors
///
/// The error of the cgroup file system.
pub fn make_threaded(path: &Path) -> io::Result<()> {
    fs::create_dir(path)?;
    fs::write(path.join("cgroup.type"), "threaded")
}

/// Removes a cgroup. The kernel still counts a thread for a moment after it exits.
fn remove(path: &Path) {
    for _ in 0..200 {
        match remove_tree(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

/// Removes a cgroup and those below it: a killed agent leaves the cgroup of its self-test.
///
/// # Errors
///
/// `EBUSY` while a process is in one of them.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    for child in children(path) {
        // A child that cannot be removed makes the removal of its parent fail; one that is already gone does
        // not.
        let _stays_or_is_gone = remove_tree(&child);
    }
    fs::remove_dir(path)
}

/// Removes the cgroups of killed test processes.
fn sweep(root: &Path) {
    for path in children(root) {
        let pid = path.file_name().and_then(|name| name.to_str()?.strip_prefix(PREFIX)?.parse().ok());
        if pid.is_some_and(|pid| signal::kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH)) {
            let _in_use = remove_tree(&path);
        }
    }
}
