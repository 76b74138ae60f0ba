//! The programs in their hooks: links are created, adopted and restored.
//!
//! # Invariants
//!
//! - A program is replaced in its link, never detached and attached again.
//! - Links are pinned once all missing ones are created: a start that fails to create one leaves none.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use lb_common::hooks::HookSpec;

use super::{
    KernelError, exclusive, fault,
    syscall::{self, CgroupLink},
};

/// A program for a hook.
pub(super) struct Hook {
    pub(super) spec: &'static HookSpec,
    pub(super) program: OwnedFd,
    pub(super) program_id: u32,
}

/// The hooks of one cgroup.
pub(super) struct Hooks {
    pin_path: PathBuf,
    cgroup: File,
    cgroup_path: PathBuf,
    cgroup_id: u64,
    /// Each hook with its link, once it has one. An open link keeps the program attached, even without a pin.
    all: Vec<(Hook, Option<OwnedFd>)>,
}

/// Links that are created but not pinned, by the index of their hook. Dropping this value detaches them.
pub(super) struct Created(Vec<(usize, OwnedFd)>);

impl Hooks {
    /// # Errors
    ///
    /// [`KernelError::Cgroup`] if the cgroup cannot be read.
    pub(super) fn new(
        pin_path: &Path,
        cgroup: File,
        cgroup_path: &Path,
        hooks: Vec<Hook>,
    ) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Cgroup { path: cgroup_path.to_owned(), source };
        Ok(Self {
            pin_path: pin_path.to_owned(),
            cgroup_id: cgroup.metadata().map_err(failed)?.ino(),
            cgroup,
            cgroup_path: cgroup_path.to_owned(),
            all: hooks.into_iter().map(|hook| (hook, None)).collect(),
        })
    }

    /// The pinned link of a hook, if its program runs for this cgroup.
    fn pinned(&self, hook: &HookSpec) -> Result<Option<(OwnedFd, CgroupLink)>, KernelError> {
        let found = link_at(&self.pin_path.join(hook.name));
        let found = found.map_err(|source| KernelError::Link { name: hook.name, source })?;
        Ok(found.filter(|(_, link)| link.cgroup_id == self.cgroup_id && link.attach_type == hook.attach_type))
    }

    fn make(&self, hook: &Hook) -> Result<OwnedFd, KernelError> {
        let Hook { spec, program, .. } = hook;
        syscall::attach(self.cgroup.as_fd(), program.as_fd(), spec.attach_type).map_err(|source| {
            if source.raw_os_error() == Some(nix::libc::EPERM) {
                exclusive::refusal(spec, &self.cgroup_path)
            } else {
                KernelError::Link { name: spec.name, source }
            }
        })
    }

    /// Creates the links of hooks that have none for this cgroup. Their programs run from then on; nothing is
    /// pinned.
    ///
    /// # Errors
    ///
    /// [`KernelError::Exclusive`], [`KernelError::NotPermitted`], [`KernelError::Link`]. Everything is then
    /// as before.
    pub(super) fn create_missing(&self) -> Result<Created, KernelError> {
        let mut made = Vec::new();
        for (index, (hook, _)) in self.all.iter().enumerate() {
            if self.pinned(hook.spec)?.is_none() {
                fault::point();
                made.push((index, self.make(hook)?));
            }
        }
        Ok(Created(made))
    }

    /// Pins the created links, and sets these programs in the existing ones. Each step can be repeated.
    ///
    /// # Errors
    ///
    /// [`KernelError::Link`]
    pub(super) fn install(&mut self, Created(made): Created) -> Result<(), KernelError> {
        for (index, link) in made {
            fault::point();
            self.put(index, link)?;
        }
        for index in 0..self.all.len() {
            let (hook, held) = &self.all[index];
            if held.is_some() && self.is_in_place(index)? {
                continue;
            }
            let Some((link, _)) = self.pinned(hook.spec)? else { continue };
            fault::point();
            replace(hook, &link)?;
            self.all[index].1 = Some(link);
        }
        Ok(())
    }

    /// Pins a link under the name of its hook. A former link under this name is detached: its cgroup is
    /// another one, or was removed.
    fn put(&mut self, index: usize, link: OwnedFd) -> Result<(), KernelError> {
        let name = self.all[index].0.spec.name;
        let failed = |source| KernelError::Link { name, source };
        let pin = self.pin_path.join(name);
        let former = syscall::open_pin(&pin).ok();
        match fs::remove_file(&pin) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        syscall::pin(link.as_fd(), &pin).map_err(failed)?;
        let own = syscall::cgroup_link(link.as_fd()).map_err(failed)?.id;
        if let Some(former) = former
            && syscall::cgroup_link(former.as_fd()).is_ok_and(|former| former.id != own)
        {
            let _gone_already = syscall::detach(former.as_fd());
        }
        self.all[index].1 = Some(link);
        Ok(())
    }

    /// Whether a hook runs its program, and its link is the pinned one.
    fn is_in_place(&self, index: usize) -> Result<bool, KernelError> {
        let (Hook { spec, program_id, .. }, Some(link)) = &self.all[index] else { return Ok(false) };
        let failed = |source| KernelError::Link { name: spec.name, source };
        let held = syscall::cgroup_link(link.as_fd()).map_err(failed)?;
        let pinned = self.pinned(spec)?.map(|(_, link)| link.id);
        Ok((held.cgroup_id, held.program_id, pinned) == (self.cgroup_id, *program_id, Some(held.id)))
    }

    /// The hooks whose program does not run, or whose link is not pinned.
    pub(super) fn lost(&self) -> impl Iterator<Item = &'static str> {
        // If that is unknown, `restore` tries, and returns the error.
        let is_lost = |index: &usize| !self.is_in_place(*index).unwrap_or(false);
        (0..self.all.len()).filter(is_lost).map(|index| self.all[index].0.spec.name)
    }

    /// Restores a lost hook: pins its link again, sets its program again, or attaches a new link.
    ///
    /// # Errors
    ///
    /// As [`Self::create_missing`].
    pub(super) fn restore(&mut self, name: &str) -> Result<(), KernelError> {
        let Some(index) = self.all.iter().position(|(hook, _)| hook.spec.name == name) else {
            return Ok(());
        };
        let (hook, held) = &self.all[index];
        let attached = held.as_ref().and_then(|link| {
            syscall::cgroup_link(link.as_fd()).ok().filter(|state| state.cgroup_id == self.cgroup_id)
        });
        let link = match (held, attached) {
            (Some(link), Some(state)) => {
                if state.program_id != hook.program_id {
                    replace(hook, link)?;
                }
                link.try_clone().map_err(|source| KernelError::Link { name: hook.spec.name, source })?
            }
            // A detached link cannot be attached again.
            _ => self.make(hook)?,
        };
        self.put(index, link)
    }
}

/// Sets the program of a link, atomically.
fn replace(hook: &Hook, link: &OwnedFd) -> Result<(), KernelError> {
    syscall::replace_program(link.as_fd(), hook.program.as_fd())
        .map_err(|source| KernelError::Link { name: hook.spec.name, source })
}

/// The link to a cgroup that is pinned at a path; `None` for anything else.
fn link_at(pin: &Path) -> io::Result<Option<(OwnedFd, CgroupLink)>> {
    let link = match syscall::open_pin(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match syscall::cgroup_link(link.as_fd()) {
        Ok(info) => Ok(Some((link, info))),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(error),
    }
}
