//! The pins: their names, and how they are created, moved and removed.

use std::{
    ffi::OsString,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use lb_common::{
    hooks::{self, HOOKS, HookSpec, Requirement},
    maps::{self, MAPS},
};

use super::{Features, KernelError, fault, lock, syscall};

/// The hooks that are attached on a kernel, in order.
pub fn hooks(features: Features, passive_health: bool) -> impl Iterator<Item = &'static HookSpec> {
    HOOKS.iter().filter(move |hook| match hook.needs {
        Requirement::Nothing => true,
        Requirement::Slots => features.has_slots(),
        Requirement::PassiveHealth => passive_health,
    })
}

/// The names that an agent pins on a kernel: maps, then links.
pub fn names(features: Features, passive_health: bool) -> impl Iterator<Item = &'static str> {
    MAPS.iter().map(|map| map.name).chain(hooks(features, passive_health).map(|hook| hook.name))
}

/// Whether no map is pinned: as after `socklb cleanup`.
#[must_use]
pub fn are_gone(pin_path: &Path) -> bool {
    !MAPS.iter().any(|map| pin_path.join(map.name).exists())
}

/// Directory below the pin directory, for maps that are being filled and do not serve yet.
pub const NEXT: &str = "next";
/// The name of a complete [`NEXT`]. From then on its maps replace the others, even if the agent exits.
pub const READY: &str = "ready";

/// Creates the pin directory if it is missing.
///
/// # Errors
///
/// [`KernelError::PinPath`] if it is not on a BPF file system.
pub fn prepare(pin_path: &Path) -> Result<(), KernelError> {
    // Checked first, so that no directory is left on a file system that cannot hold pins.
    check(pin_path)?;
    fs::create_dir_all(pin_path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => {
            KernelError::NotPermitted { what: format!("--pin-path {}", pin_path.display()) }
        }
        _ => KernelError::PinPath { path: pin_path.to_owned(), source },
    })
}

/// Checks that the pin directory is on a BPF file system, or would be once created.
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

/// Finishes a map change that an earlier agent left: a committed one is completed, any other is discarded.
///
/// # Errors
///
/// [`KernelError::Remove`] for a pin that cannot be moved or removed.
pub fn recover(pin_path: &Path) -> Result<(), KernelError> {
    forget(pin_path)?;
    promote(pin_path)
}

/// Creates an empty [`NEXT`] and returns its path.
///
/// # Errors
///
/// [`KernelError::PinPath`] if it cannot be created, [`KernelError::Remove`] if an earlier one cannot be
/// removed.
pub fn stage(pin_path: &Path) -> Result<PathBuf, KernelError> {
    forget(pin_path)?;
    let next = pin_path.join(NEXT);
    fs::create_dir(&next).map_err(|source| KernelError::PinPath { path: next.clone(), source })?;
    Ok(next)
}

/// Pins kept maps in a second directory as well.
///
/// # Errors
///
/// [`KernelError::Pin`] with the name of a map that cannot be pinned.
pub fn share(pin_path: &Path, other: &Path, names: &[&'static str]) -> Result<(), KernelError> {
    for &name in names {
        fault::point();
        let map = syscall::open_pin(&pin_path.join(name));
        let pinned = map.and_then(|map| syscall::pin(map.as_fd(), &other.join(name)));
        pinned.map_err(|source| KernelError::Pin { name, source })?;
    }
    Ok(())
}

/// Discards an unfinished [`NEXT`].
///
/// # Errors
///
/// [`KernelError::Remove`] for a pin that cannot be removed.
pub fn forget(pin_path: &Path) -> Result<(), KernelError> {
    discard(&pin_path.join(NEXT), &mut Vec::new())
}

/// Commits [`NEXT`]: from now on its maps are the ones to adopt. Does nothing if it is already committed.
///
/// # Errors
///
/// [`KernelError::Remove`]; then nothing has changed.
pub fn commit(pin_path: &Path) -> Result<(), KernelError> {
    fault::point();
    let next = pin_path.join(NEXT);
    match fs::rename(&next, pin_path.join(READY)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::Remove { path: next, source: error })
        }
        _ => Ok(()),
    }
}

/// Moves each map of [`READY`] to its place and replaces the earlier one. Does nothing without that
/// directory.
///
/// `meta` comes last: a concurrent reader gets an image whose sizes match, or an error.
///
/// # Errors
///
/// [`KernelError::Remove`] for a pin that cannot be moved. Earlier ones have been moved; the call can be
/// repeated.
pub fn promote(pin_path: &Path) -> Result<(), KernelError> {
    let ready = pin_path.join(READY);
    let mut names = entries(&ready)?;
    names.sort_by_key(|name| name == "meta");
    for name in names {
        fault::point();
        let path = ready.join(&name);
        fs::rename(&path, pin_path.join(&name)).map_err(|source| KernelError::Remove { path, source })?;
    }
    fault::point();
    discard(&ready, &mut Vec::new())
}

/// The names in a directory; none if it does not exist.
fn entries(directory: &Path) -> Result<Vec<OsString>, KernelError> {
    let error = |source| KernelError::PinPath { path: directory.to_owned(), source };
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.file_name()).map_err(error)).collect(),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(error(source)),
    }
}

/// Removes one of our directories with all its pins.
fn discard(directory: &Path, removed: &mut Vec<PathBuf>) -> Result<(), KernelError> {
    for name in entries(directory)? {
        remove_pin(directory.join(name), removed)?;
    }
    match fs::remove_dir(directory) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::Remove { path: directory.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Pins a map at a path and replaces whatever is there.
///
/// # Errors
///
/// [`KernelError::Pin`]
pub(super) fn replace(path: &Path, map: BorrowedFd<'_>, name: &'static str) -> Result<(), KernelError> {
    remove_pin(path.to_owned(), &mut Vec::new())?;
    syscall::pin(map, path).map_err(|source| KernelError::Pin { name, source })
}

fn remove_pin(path: PathBuf, removed: &mut Vec<PathBuf>) -> Result<(), KernelError> {
    match fs::remove_file(&path) {
        Ok(()) => removed.push(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(KernelError::Remove { path, source }),
    }
    Ok(())
}

/// Removes the pins of maps and links that only earlier versions have, and detaches their programs. Returns
/// the removed paths.
///
/// # Errors
///
/// [`KernelError::Remove`] for the first pin that cannot be removed.
pub fn remove_former(pin_path: &Path, maps: &[&str], links: &[&str]) -> Result<Vec<PathBuf>, KernelError> {
    let mut removed = Vec::new();
    for name in links {
        remove_link(pin_path.join(name), &mut removed)?;
    }
    for name in maps {
        remove_pin(pin_path.join(name), &mut removed)?;
    }
    Ok(removed)
}

/// Detaches a link and removes its pin.
///
/// Removing the last pin of a link detaches it milliseconds later, in a work queue, and not at all while an
/// agent has it open. A pin that cannot be opened or is not a link has no program to detach: only its name is
/// removed.
fn remove_link(path: PathBuf, removed: &mut Vec<PathBuf>) -> Result<(), KernelError> {
    if let Ok(link) = syscall::open_pin(&path) {
        let _no_link = syscall::detach(link.as_fd());
    }
    remove_pin(path, removed)
}

/// Detaches the programs, removes the links, then the maps, then the directory. Returns the removed paths.
///
/// Removes only names that socklb uses; a directory with other content stays. Calls that begin after the
/// return are not rewritten, even if an agent still runs.
///
/// # Errors
///
/// [`KernelError::NothingPinned`] if there was nothing, [`KernelError::Remove`] for the first pin that cannot
/// be removed.
pub fn remove(pin_path: &Path) -> Result<Vec<PathBuf>, KernelError> {
    // An agent restores pins before this, or finds the directory gone after it.
    let _alone = lock::Change::begin(pin_path);
    let mut removed = Vec::new();
    for name in HOOKS.iter().map(|hook| hook.name) {
        remove_link(pin_path.join(name), &mut removed)?;
    }
    for name in MAPS.iter().map(|map| map.name) {
        remove_pin(pin_path.join(name), &mut removed)?;
    }
    removed.extend(remove_former(pin_path, maps::REMOVED, hooks::REMOVED)?);
    for name in [NEXT, READY] {
        discard(&pin_path.join(name), &mut removed)?;
    }
    let directory = fs::remove_dir(pin_path);
    if removed.is_empty() && directory.is_err() {
        return Err(KernelError::NothingPinned { path: pin_path.to_owned() });
    }
    Ok(removed)
}
