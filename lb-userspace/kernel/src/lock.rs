//! One agent at a time for a pin directory.
//!
//! # Invariants
//!
//! - The lock is the kernel's (`flock`), on the directory itself. The kernel releases it when the process
//!   exits. Mount namespaces that share the BPF file system share the lock.
//! - The holder has locked the directory that the path leads to, not a removed one.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use super::{KernelError, pins};

/// The right to change what is pinned in a directory, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    pin_path: PathBuf,
    /// Device and inode number.
    inode: (u64, u64),
    _directory: Flock<File>,
}

impl Lock {
    /// Locks a pin directory, which is created if missing. `None` if another process holds the lock.
    ///
    /// # Errors
    ///
    /// [`KernelError::PinPath`] if the directory cannot be created.
    ///
    /// # Kernel
    ///
    /// 5.10 (`flock` works on the directories of every file system)
    pub fn try_take(pin_path: &Path) -> Result<Option<Self>, KernelError> {
        let error = |source| KernelError::PinPath { path: pin_path.to_owned(), source };
        loop {
            pins::prepare(pin_path)?;
            let directory = match File::open(pin_path) {
                Ok(directory) => directory,
                // Removed in the meantime.
                Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(error(source)),
            };
            let inode = directory.metadata().map(|data| (data.dev(), data.ino())).map_err(error)?;
            let directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(directory) => directory,
                Err((_directory, Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_directory, errno)) => return Err(error(errno.into())),
            };
            // The previous holder may have removed the directory; others then lock the new one.
            if fs::metadata(pin_path).is_ok_and(|now| (now.dev(), now.ino()) == inode) {
                return Ok(Some(Self { pin_path: pin_path.to_owned(), inode, _directory: directory }));
            }
        }
    }
}

impl Lock {
    /// Whether the path still leads to the directory. It does not after `socklb cleanup` or an unmount. The
    /// lock keeps the file system and its pins alive.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        fs::metadata(&self.pin_path).is_ok_and(|now| (now.dev(), now.ino()) == self.inode)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // After `socklb cleanup` the path may lead to another agent's directory.
        if self.is_in_place() {
            // Removes only an empty directory: the agent exited before it pinned anything.
            let _holds_pins = fs::remove_dir(&self.pin_path);
        }
    }
}

/// Serialises the removal of all pins and the restoring of some. Released on drop or when the process exits.
#[derive(Debug)]
pub(super) struct Change {
    _above: Flock<File>,
}

impl Change {
    /// Waits for the lock. `None` if the parent of the pin directory cannot be locked.
    pub(super) fn begin(pin_path: &Path) -> Option<Self> {
        Self::take(pin_path, FlockArg::LockExclusive)
    }

    /// `None` if another process holds the lock.
    pub(super) fn try_begin(pin_path: &Path) -> Option<Self> {
        Self::take(pin_path, FlockArg::LockExclusiveNonblock)
    }

    /// Locks the parent directory: an agent may hold the lock of the pin directory as long as it runs.
    fn take(pin_path: &Path, how: FlockArg) -> Option<Self> {
        let above = File::open(pin_path.parent()?).ok()?;
        Flock::lock(above, how).ok().map(|above| Self { _above: above })
    }
}

/// Names the holder of the lock by its PID, if it has one in this PID namespace.
#[must_use]
pub fn describe_holder(pin_path: &Path) -> String {
    let pid = fs::metadata(pin_path).ok().and_then(|directory| {
        holder_in(&fs::read_to_string("/proc/locks").ok()?, directory.dev(), directory.ino())
    });
    pid.map_or_else(|| "a process of another container".to_owned(), |pid| format!("process {pid}"))
}

/// Finds a holder in the text of `/proc/locks`, which has device numbers in hex:
/// `1: FLOCK  ADVISORY  WRITE 1234 00:2a:5678 0 EOF`. Lines of waiters have `->` in the second field.
fn holder_in(locks: &str, device: u64, inode: u64) -> Option<u32> {
    let wanted =
        format!("{:02x}:{:02x}:{inode}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    locks.lines().find_map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [_, "FLOCK", _, _, pid, place, ..] if place == wanted => pid.parse().ok(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_read_from_proc() {
        let locks = "1: FLOCK  ADVISORY  WRITE 17 00:2a:5678 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 18 00:2a:5678 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 19 00:2a:99 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 20 fe:00:12 0 EOF\n";
        let device = nix::sys::stat::makedev(0, 0x2a);
        assert_eq!(holder_in(locks, device, 5678), Some(17));
        assert_eq!(holder_in(locks, device, 99), None, "another kind of lock");
        assert_eq!(holder_in(locks, nix::sys::stat::makedev(0xfe, 0), 12), Some(20));
        assert_eq!(holder_in("nonsense\n", device, 5678), None);
    }

    #[test]
    fn a_lock_is_where_pins_can_be() {
        let elsewhere = tempfile::tempdir().unwrap();
        let error = Lock::try_take(&elsewhere.path().join("pins")).unwrap_err();
        assert!(matches!(error, KernelError::PinPath { .. }), "{error:?}");
    }
}
