//! Runs other programs: progress, and errors with cause and remedy in one line.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Number of log lines in an error.
const LOG_TAIL: usize = 15;

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
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`; is it installed?", describe(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
        bail!("`{}` exited with {}: {last}", describe(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether the command can be started and exits with 0. Its output is dropped.
pub(crate) fn works(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Runs a command with its output in `log` and shows only the lines that `progress` selects.
///
/// # Errors
/// If it cannot be started or does not exit with 0; the end of the log is printed first.
pub(crate) fn run_logged(
    command: &mut Command,
    log: &Path,
    progress: impl Fn(&str) -> bool,
    remedy: &str,
) -> Result<()> {
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir)
            .with_context(|| format!("cannot create {}: check its owner", dir.display()))?;
    }
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write {}: check its owner", log.display()))?;
    let both = file.try_clone().context("cannot share the log with the command")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(both)
        .spawn()
        .with_context(|| format!("cannot start `{}`; {remedy}", describe(command)))?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.with_context(|| format!("lost the output of `{}`", describe(command)))?;
            file.write_all(&line).and_then(|()| file.write_all(b"\n")).context("cannot write the log")?;
            let line = String::from_utf8_lossy(&line);
            if progress(&line) {
                eprintln!("    {}", line.trim_end());
            }
        }
    }
    let status = child.wait().with_context(|| format!("lost `{}`", describe(command)))?;
    if !status.success() {
        let text = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(LOG_TAIL)) {
            eprintln!("    | {line}");
        }
        bail!("`{}` exited with {status} (log: {}); {remedy}", describe(command), log.display());
    }
    Ok(())
}

/// Finds an executable on `PATH` or in the system folders that a user's `PATH` often lacks.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| is_executable(file))
}

/// Whether a file has an execute permission.
pub(crate) fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// Whether this process is root.
///
/// Read from `/proc`, so that xtask needs no unsafe code and no crate for one system call.
pub(crate) fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .is_some_and(|ids| ids.split_whitespace().nth(1) == Some("0"))
}
