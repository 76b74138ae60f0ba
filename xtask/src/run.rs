//! `cargo xtask run`: builds and starts `socklb`.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::build;
use crate::process::{self, step};
use crate::setup::Purpose;
use crate::workspace::Workspace;

/// Runs `cargo xtask run`. Returns only on an error before `socklb` replaces this process.
///
/// # Errors
/// If setup or building fails, or `socklb` cannot be started.
pub(crate) fn command(workspace: &Workspace, args: &[String]) -> Result<()> {
    let object = build::object(workspace, &[Purpose::Build, Purpose::Run])?;
    // The demo uses a debug build: a release build takes three times as long and makes no call faster, since
    // the kernel does the work.
    let is_demo = args.is_empty();
    let socklb = build::socklb(workspace, &object, !is_demo, is_demo)?;
    let binary = if is_demo { socklb.with_file_name(build::DEMO) } else { socklb };
    let mut socklb = process::as_root(&binary, "socklb needs root to load BPF programs");
    if !is_demo {
        socklb.arg("run").args(args);
    }
    step(&format!("running {}", binary.display()));
    // Replaces this process, so that signals, the terminal and the exit status are socklb's.
    let error = socklb.exec();
    Err(error).with_context(|| {
        let remedy = if process::is_root() { "build again" } else { "install sudo or run as root" };
        format!("cannot start {}; {remedy}", socklb.get_program().display())
    })
}
