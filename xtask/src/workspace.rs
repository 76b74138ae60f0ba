//! Paths of the tree and its build results.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

/// Folders that commands use.
pub(crate) struct Workspace {
    /// The folder of the root `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Cargo's target folder.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Finds the tree of this program.
    ///
    /// # Errors
    /// If there is no current folder or the program is not in a workspace.
    pub(crate) fn locate() -> Result<Self> {
        // Cargo sets the variable at run time too; a compiled-in value would be wrong after the tree moves.
        let manifest_dir = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest_dir.parent().context("xtask must lie in a workspace: run it as `cargo xtask`")?;
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => env::current_dir().context("no current folder: run this from the tree")?.join(dir),
            None => root.join("target"),
        };
        Ok(Self { root: root.to_owned(), target })
    }

    /// A cargo command for the tree, of the cargo that started this program.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut cargo = process::cargo();
        cargo.current_dir(&self.root).arg(subcommand);
        cargo
    }

    /// The `socklb` binary.
    pub(crate) fn socklb(&self, release: bool) -> PathBuf {
        self.target.join(if release { "release/socklb" } else { "debug/socklb" })
    }
}

/// A folder that survives `cargo clean`: tools and downloads that all checkouts share.
///
/// # Errors
/// If neither `XDG_CACHE_HOME` nor `HOME` is set.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let not_empty = |name| env::var_os(name).filter(|value: &OsString| !value.is_empty());
    let base = match not_empty("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(&not_empty("HOME").context("no cache folder: set HOME or XDG_CACHE_HOME")?)
            .join(".cache"),
    };
    Ok(base.join("socklb"))
}
