//! Runs other programs: progress, and errors with cause and remedy in one line.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Prints the next step to standard error.
pub(crate) fn step(text: &str) {
    eprintln!("==> {text}");
}

/// The cargo that started this program, so that nested builds use the same toolchain.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The program and its arguments in one line.
fn describe(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(name).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Runs a command that shares this program's output.
///
/// # Errors
/// If it cannot be started or does not exit with 0; `remedy` then ends the message.
pub(crate) fn run(command: &mut Command, remedy: &str) -> Result<()> {
    let status =
        command.status().with_context(|| format!("cannot start `{}`; {remedy}", describe(command)))?;
    if let Some(signal) = status.signal() {
        bail!("`{}` was killed by signal {signal}; run it again", describe(command));
    }
    if !status.success() {
        bail!("`{}` exited with {status}; {remedy}", describe(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output. Its standard error is dropped unless it fails.
///
/// # Errors
/// If it cannot be started or does not exit with 0; the message has the last line of its standard error.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    capture_bytes(command).map(|output| String::from_utf8_lossy(&output).into_owned())
}

/// The same for output that is not text.
///
/// # Errors
/// Those of [`capture`].
pub(crate) fn capture_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`; is it installed?", describe(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
        bail!("`{}` exited with {}: {last}", describe(command), output.status);
    }
    Ok(output.stdout)
}

/// Finds an executable on `PATH` or in the system folders that a user's `PATH` often lacks.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let is_executable = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(is_executable)
}

/// Whether this process is root. The owner of `/proc/self` is the effective user.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0)
}

/// A command that runs a program as root: with sudo, and with `reason` as a message, unless this process is
/// root.
pub(crate) fn as_root(program: impl AsRef<OsStr>, reason: &str) -> Command {
    if is_root() {
        return Command::new(program);
    }
    step(&format!("{reason}: starting it with sudo"));
    let mut sudo = Command::new("sudo");
    sudo.arg("--").arg(program);
    sudo
}
