//! One agent at a time for a directory of pins.
//!
//! # Invariants
//!
//! - The lock is the kernel's, on the directory itself: it ends with the process however that ends, and it is one lock in
//!   all mount namespaces that share the BPF file system.
//! - Whoever holds it holds that of the directory which the path leads to, not of one that was removed.

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
    /// Device and number of its inode.
    inode: (u64, u64),
    _directory: Flock<File>,
}

impl Lock {
    /// Takes the lock of a directory for pins, which is made if it is not there. `None` if another process has it.
    ///
    /// # Errors
    ///
    /// [`KernelError::PinPath`] if there can be no such directory.
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
                // Removed since.
                Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(error(source)),
            };
            let inode = directory.metadata().map(|data| (data.dev(), data.ino())).map_err(error)?;
            let directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(directory) => directory,
                Err((_directory, Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_directory, errno)) => return Err(error(errno.into())),
            };
            // The former holder may have removed the directory: then others lock the new one.
            if fs::metadata(pin_path).is_ok_and(|now| (now.dev(), now.ino()) == inode) {
                return Ok(Some(Self { pin_path: pin_path.to_owned(), inode, _directory: directory }));
            }
        }
    }
}

impl Lock {
    /// Whether the path leads to the directory still. It does not after `socklb cleanup`, or once the file system is no
    /// longer mounted there; the lock itself keeps that alive, and what is pinned in it.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        fs::metadata(&self.pin_path).is_ok_and(|now| (now.dev(), now.ino()) == self.inode)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // After `socklb cleanup` the path may lead to another agent's directory.
        if self.is_in_place() {
            // Only an empty one can be removed: that of an agent which ended before it pinned anything.
            let _holds_pins = fs::remove_dir(&self.pin_path);
        }
    }
}

/// Keeps whoever removes all pins and an agent that restores some apart. Ends with this value, or with the process.
#[derive(Debug)]
pub(super) struct Change {
    _above: Flock<File>,
}

impl Change {
    /// Waits until it is alone. `None` if the directory above the pins cannot be locked.
    pub(super) fn begin(pin_path: &Path) -> Option<Self> {
        Self::take(pin_path, FlockArg::LockExclusive)
    }

    /// `None` if another process is at it.
    pub(super) fn try_begin(pin_path: &Path) -> Option<Self> {
        Self::take(pin_path, FlockArg::LockExclusiveNonblock)
    }

    /// The lock of the directory above: that of the pins may be an agent's for as long as it runs.
    fn take(pin_path: &Path, how: FlockArg) -> Option<Self> {
        let above = File::open(pin_path.parent()?).ok()?;
        Flock::lock(above, how).ok().map(|above| Self { _above: above })
    }
}

/// Names the process that holds the lock, by its number in this PID namespace if it has one here.
#[must_use]
pub fn describe_holder(pin_path: &Path) -> String {
    let pid = fs::metadata(pin_path).ok().and_then(|directory| {
        holder_in(&fs::read_to_string("/proc/locks").ok()?, directory.dev(), directory.ino())
    });
    pid.map_or_else(|| "a process of another container".to_owned(), |pid| format!("process {pid}"))
}

/// Finds a holder in the text of `/proc/locks`, which has device numbers in hex:
/// `1: FLOCK  ADVISORY  WRITE 1234 00:2a:5678 0 EOF`. Lines of those who wait have `->` in the second place.
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
