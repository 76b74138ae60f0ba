//! `cargo xtask man`: the manual pages, which `socklb` writes from its own flags.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::build;
use crate::process;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;

/// Runs `cargo xtask man`.
///
/// # Errors
/// When building fails or the folder cannot be written.
pub(crate) fn command(workspace: &Workspace, directory: Option<PathBuf>) -> Result<()> {
    let toolchain = setup::ensure(&[Purpose::Build])?;
    let object = build::bpf_object(workspace, &toolchain)?;
    let binary = build::socklb(workspace, object.as_os_str(), false)?;
    let directory = directory.unwrap_or_else(|| workspace.target.join("man"));
    process::run(Command::new(binary).arg("man").arg(directory), "name a folder that can be written")
}
