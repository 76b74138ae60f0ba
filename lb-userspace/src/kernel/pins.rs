//! What is pinned, under which name.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Features, KernelError};

/// Maps by the names of the object; each is pinned under its name.
pub const MAPS: [&str; 15] = [
    "services4",
    "services6",
    "frontends",
    "endpoints4",
    "endpoints6",
    "node_addrs",
    "affinity",
    "socket_slots",
    "sockets",
    "socket_storage",
    "excluded",
    "excluded_levels",
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
    // Looked at before the directory is made: nothing is left behind on a file system that cannot hold pins.
    check(pin_path)?;
    fs::create_dir_all(pin_path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => {
            KernelError::NotPermitted { what: format!("--pin-path {}", pin_path.display()) }
        }
        _ => KernelError::PinPath { path: pin_path.to_owned(), source },
    })
}

/// Tells whether a directory for pins is on a BPF file system, or would be if it were made.
///
/// # Errors
///
/// As [`prepare`].
pub fn check(pin_path: &Path) -> Result<(), KernelError> {
    let error = |source| KernelError::PinPath { path: pin_path.to_owned(), source };
    let mut existing = pin_path;
    let kind = loop {
        match nix::sys::statfs::statfs(existing) {
            Ok(found) => break found.filesystem_type(),
            Err(nix::errno::Errno::ENOENT) => match existing.parent() {
                Some(parent) if parent != Path::new("") => existing = parent,
                _ => return Err(error(io::ErrorKind::NotFound.into())),
            },
            Err(errno) => return Err(error(errno.into())),
        }
    };
    if kind == nix::sys::statfs::BPF_FS_MAGIC {
        return Ok(());
    }
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
