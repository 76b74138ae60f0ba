//! What is pinned, under which name.

use std::{
    ffi::OsString,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use lb_common::{
    hooks::{self, HOOKS, HookSpec, Needs},
    maps::{self, MAPS},
};

use super::{Features, KernelError, fault, lock, syscall};

/// The hooks that are attached on a kernel, in their order.
pub fn hooks(features: Features) -> impl Iterator<Item = &'static HookSpec> {
    HOOKS.iter().filter(move |hook| match hook.needs {
        Needs::Nothing => true,
        Needs::Slots => features.has_slots(),
    })
}

/// The names that an agent pins on a kernel: maps, then links.
pub fn names(features: Features) -> impl Iterator<Item = &'static str> {
    MAPS.iter().map(|map| map.name).chain(hooks(features).map(|hook| hook.name))
}

/// Directory below that of the pins, where maps of another size or layout are filled. They serve nobody.
pub const NEXT: &str = "next";
/// What [`NEXT`] is called once it is complete: its maps take the place of the others, whatever happens.
pub const READY: &str = "ready";

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

/// Ends a change of maps that was under way when an agent ended: one that was complete is carried on, any other is
/// forgotten.
///
/// # Errors
///
/// [`KernelError::Remove`] for a pin that cannot be moved or removed.
pub fn recover(pin_path: &Path) -> Result<(), KernelError> {
    forget(pin_path)?;
    promote(pin_path)
}

/// Makes an empty [`NEXT`], and returns where.
///
/// # Errors
///
/// [`KernelError::PinPath`] if it cannot be made, [`KernelError::Remove`] if a former one cannot be removed.
pub fn stage(pin_path: &Path) -> Result<PathBuf, KernelError> {
    forget(pin_path)?;
    let next = pin_path.join(NEXT);
    fs::create_dir(&next).map_err(|source| KernelError::PinPath { path: next.clone(), source })?;
    Ok(next)
}

/// Pins maps that go on as they are in a second directory, too.
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

/// Forgets an unfinished [`NEXT`].
///
/// # Errors
///
/// [`KernelError::Remove`] for a pin that cannot be removed.
pub fn forget(pin_path: &Path) -> Result<(), KernelError> {
    discard(&pin_path.join(NEXT), &mut Vec::new())
}

/// From here on, the maps in [`NEXT`] are the ones to go on with. Nothing is done if that was said before.
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

/// Moves each map of [`READY`] to its place, where it takes that of the former one. Nothing is done without that
/// directory.
///
/// `meta` comes last: what is read in between is of the sizes that are found there, or is no image at all.
///
/// # Errors
///
/// [`KernelError::Remove`] for a pin that cannot be moved; the others have been, and it can be tried again.
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

/// The names in a directory; none if it is not there.
fn entries(directory: &Path) -> Result<Vec<OsString>, KernelError> {
    let error = |source| KernelError::PinPath { path: directory.to_owned(), source };
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.file_name()).map_err(error)).collect(),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(error(source)),
    }
}

/// Removes a directory of ours with all that is pinned in it.
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

/// Pins a map where it should be, in the place of whatever is there.
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

/// Removes pins of maps and links that only earlier versions have, by their names. Their programs are detached. Returns what was removed.
///
/// # Errors
///
/// [`KernelError::Remove`] for the first pin that stays.
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
/// A link whose last pin goes is detached by a work queue, milliseconds later, and not at all while an agent has it open. What
/// cannot be opened or is no link has no program to detach: only its name is removed.
fn remove_link(path: PathBuf, removed: &mut Vec<PathBuf>) -> Result<(), KernelError> {
    if let Ok(link) = syscall::open_pin(&path) {
        let _no_link = syscall::detach(link.as_fd());
    }
    remove_pin(path, removed)
}

/// Detaches the programs, removes the links, then the maps, then the directory. Returns what was removed.
///
/// Removes names that socklb gives and nothing else; a directory that holds something else stays. A call that begins when
/// this has returned is not rewritten any longer, even beside an agent that runs.
///
/// # Errors
///
/// [`KernelError::NothingPinned`] if there was nothing, [`KernelError::Remove`] for the first pin that stays.
pub fn remove(pin_path: &Path) -> Result<Vec<PathBuf>, KernelError> {
    // An agent that restores pins does so before or after, when the directory is gone.
    let _alone = lock::Change::begin(pin_path);
    let mut removed = Vec::new();
    for name in HOOKS.iter().map(|hook| hook.name) {
        remove_link(pin_path.join(name), &mut removed)?;
    }
    for name in MAPS.iter().map(|map| map.name) {
        remove_pin(pin_path.join(name), &mut removed)?;
    }
    removed.extend(remove_former(pin_path, maps::FORMER, hooks::FORMER)?);
    for name in [NEXT, READY] {
        discard(&pin_path.join(name), &mut removed)?;
    }
    let directory = fs::remove_dir(pin_path);
    if removed.is_empty() && directory.is_err() {
        return Err(KernelError::NothingPinned { path: pin_path.to_owned() });
    }
    Ok(removed)
}
