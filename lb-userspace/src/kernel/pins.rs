//! What is pinned, under which name.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Features, KernelError};

/// Maps by the names of the object; each is pinned under its name.
pub const MAPS: [&str; 13] = [
    "services4",
    "services6",
    "frontends",
    "endpoints4",
    "endpoints6",
    "node_addrs",
    "affinity",
    "sockets",
    "socket_storage",
    "socket_spills",
    "service_stats",
    "endpoint_stats",
    "meta",
];

/// Hooks in the order in which they are attached; the link of each is pinned under its name.
///
/// The one that gives up what the others take comes first: no socket may take a slot that nobody gives up.
pub const HOOKS: [&str; 9] = [
    "sock_release",
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
];

/// The hooks that are attached on a kernel: without compare-and-swap no socket takes a slot, and none is given up.
pub fn hooks(features: Features) -> impl Iterator<Item = &'static str> {
    HOOKS.into_iter().filter(move |hook| features.compare_and_swap || *hook != "sock_release")
}

/// Makes the directory for pins, if it is not there.
///
/// # Errors
///
/// [`KernelError::PinPath`] if it is not on a BPF file system.
pub fn prepare(pin_path: &Path) -> Result<(), KernelError> {
    let error = |source| KernelError::PinPath { path: pin_path.to_owned(), source };
    fs::create_dir_all(pin_path).map_err(error)?;
    let kind = nix::sys::statfs::statfs(pin_path).map_err(|errno| error(errno.into()))?.filesystem_type();
    if kind == nix::sys::statfs::BPF_FS_MAGIC {
        return Ok(());
    }
    // Leave no directory behind on a file system that cannot hold pins; it goes only if it is empty.
    let _not_empty = fs::remove_dir(pin_path);
    Err(error(io::Error::new(io::ErrorKind::InvalidInput, "not on a BPF file system")))
}

/// Removes the links, which detaches the programs, then the maps, then the directory. Returns what was removed.
///
/// Removes names that socklb gives and nothing else; a directory that holds something else stays.
///
/// # Errors
///
/// [`KernelError::NothingPinned`] if there was nothing, [`KernelError::Remove`] for the first pin that stays.
pub fn remove(pin_path: &Path) -> Result<Vec<PathBuf>, KernelError> {
    let mut removed = Vec::new();
    for name in HOOKS.iter().chain(&MAPS) {
        let path = pin_path.join(name);
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(KernelError::Remove { path, source }),
        }
    }
    let directory = fs::remove_dir(pin_path);
    if removed.is_empty() && directory.is_err() {
        return Err(KernelError::NothingPinned { path: pin_path.to_owned() });
    }
    Ok(removed)
}
