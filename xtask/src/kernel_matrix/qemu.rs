//! Finds QEMU, boots a guest and evaluates its output.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use fs_err::File;

use super::Accelerator;
use super::archive::Archive;
use crate::process::{self, find_program, step};
use crate::test::Tally;

const PROGRAM: &str = "qemu-system-x86_64";

/// The oldest usable QEMU: 7.2 crashes one of four guests with kernel 6.12 during boot.
const MIN_VERSION: &[u32] = &[10, 0, 2];

/// Init's last line; see `vm-init` in lb-tests.
const END_MARK: &str = "INIT DONE rc=";

/// The result of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) tally: Tally,
    /// What failed; `None` if the tests exited with 0 and all result lines say ok.
    pub(super) failure: Option<String>,
}

impl Outcome {
    pub(super) fn failed(cause: impl Into<String>) -> Self {
        Self { failure: Some(cause.into()), ..Self::default() }
    }

    /// Evaluates the serial output only, because qemu also exits with 0 when the guest panics.
    fn judge(serial: &str) -> Self {
        let mut tally = Tally::default();
        let mut panic = None;
        for line in serial.lines() {
            tally.add_line(line);
            if let Some(status) = line.trim().strip_prefix(END_MARK) {
                let failure = match (status, tally.n_failed) {
                    // A run without tests proves nothing.
                    (_, 0) if tally.n_passed == 0 => Some("no test completed".to_owned()),
                    ("0", 0) => None,
                    (_, n_failed) => Some(format!("{n_failed} tests")),
                };
                return Self { tally, failure };
            }
            if let Some((_, cause)) = line.split_once("INIT FAILED: ") {
                return Self::failed(cause.trim());
            }
            if panic.is_none()
                && let Some(at) = line.find("Kernel panic - ")
            {
                panic = Some(line[at..].trim());
            }
        }
        Self::failed(panic.unwrap_or("exited without a result"))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.failure {
            None => f.write_str("passed"),
            Some(cause) => write!(f, "failed: {cause}"),
        }
    }
}

/// A QEMU.
pub(super) struct Qemu {
    program: PathBuf,
    /// The folder it is unpacked into; `None` for an installed one.
    root: Option<PathBuf>,
    accelerator: Accelerator,
}

impl Qemu {
    /// Takes the installed QEMU if it is new enough, else one from the cache, else one from the archive.
    ///
    /// Unpacked, not installed: installing the backport removes packages of the older QEMU.
    ///
    /// # Errors
    /// If no QEMU is new enough.
    pub(super) fn find(
        archive: &Archive,
        cache: &Path,
        accelerator: Accelerator,
        refresh: bool,
    ) -> Result<Self> {
        let installed = find_program(PROGRAM).map(|program| Self { program, root: None, accelerator });
        if let Some(installed) = installed.filter(Self::is_usable) {
            return Ok(installed);
        }
        let root = cache.join("qemu");
        let qemu =
            Self { program: root.join("usr/bin").join(PROGRAM), root: Some(root.clone()), accelerator };
        if refresh || !qemu.is_usable() {
            step(&format!("unpacking QEMU into {} (none is installed that is new enough)", root.display()));
            let backports = format!("{}-backports", archive.system);
            let updates = format!("{}-updates", archive.system);
            // Against the system's status, so that installed packages are not unpacked again.
            let status = Path::new("/var/lib/dpkg/status");
            let lists = archive.lists(&[&archive.system, &updates, &backports], Some(status))?;
            let packages = lists.would_install("qemu-system-x86", &backports)?;
            lists.unpack(&packages, &root, |_| true)?;
        }
        if !qemu.is_usable() {
            bail!(
                "the QEMU in {} does not run or is older than {MIN_VERSION:?}: install a newer qemu-system-x86",
                root.display()
            );
        }
        Ok(qemu)
    }

    /// A command for this QEMU.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env_remove("LD_LIBRARY_PATH");
        if let Some(root) = &self.root {
            let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|dir| root.join(dir));
            command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap_or_default());
            // The firmware's folder, and the targets of its links.
            for data in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
                command.arg("-L").arg(root.join(data));
            }
        }
        command
    }

    /// Whether it runs and is new enough.
    fn is_usable(&self) -> bool {
        let version = process::capture(self.command().arg("--version"));
        version.is_ok_and(|text| parse_version(&text).as_slice() >= MIN_VERSION)
    }

    /// Boots a kernel, writes its output to `log`, and evaluates it. Progress is shown under `name`.
    ///
    /// With one processor the kernel is fully preemptible if it supports `preempt=full` (5.12 and later),
    /// also in the middle of a BPF program. With more, another processor can overtake a program anyway.
    ///
    /// # Errors
    /// If qemu cannot be started or the log cannot be written.
    pub(super) fn boot(
        &self,
        name: &str,
        n_cpus: u8,
        kernel: &Path,
        initramfs: &Path,
        log: &Path,
        limit: Duration,
    ) -> Result<Outcome> {
        let (machine, cpu) = match self.accelerator {
            Accelerator::Tcg => ("pc,accel=tcg", "max"),
            Accelerator::Kvm => ("pc,accel=kvm", "host"),
        };
        // `no_timer_check`: the kernel counts ticks during boot, and panics if a busy host delivers too few.
        let command_line = match n_cpus {
            1 => "console=ttyS0 quiet panic=-1 no_timer_check preempt=full",
            _ => "console=ttyS0 quiet panic=-1 no_timer_check",
        };
        let mut command = self.command();
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-machine", machine, "-cpu", cpu, "-m", "1024", "-smp"])
            .args([&n_cpus.to_string(), "-append", command_line, "-kernel"])
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut file = File::create(log)?;
        let mut guest = command.spawn().context("cannot start qemu: run the command again with --refresh")?;
        let stdout = guest.stdout.take().context("qemu has no standard output")?;
        // Reading blocks, so another thread enforces the time limit.
        let (done, end) = mpsc::channel::<()>();
        let killer = thread::spawn(move || {
            let is_late = end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            // Both fail only if it has exited already.
            guest.kill().ok();
            guest.wait().ok();
            is_late
        });
        let mut serial = String::new();
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end();
            writeln!(file, "{line}")?;
            if is_test_line(line) {
                eprintln!("    [{name}] {line}");
            }
            serial.push_str(line);
            serial.push('\n');
            // The result is complete here, and a kernel may hang in power-off.
            if line.trim().starts_with(END_MARK) {
                break;
            }
        }
        drop(done);
        let Ok(is_late) = killer.join() else { bail!("cannot end qemu: run the command again") };
        if is_late {
            return Ok(Outcome { tally: count_tests(&serial), ..Outcome::failed("time limit") });
        }
        Ok(Outcome::judge(&serial))
    }
}

/// Whether this is libtest's line of one test.
fn is_test_line(line: &str) -> bool {
    line.starts_with("test ")
        && [" ... ok", " ... FAILED", " ... ignored"].iter().any(|end| line.ends_with(end))
}

/// Counts single tests, for a run without result lines.
fn count_tests(serial: &str) -> Tally {
    let count = |end| serial.lines().filter(|line| is_test_line(line) && line.ends_with(end)).count() as u64;
    Tally {
        n_passed: count(" ... ok"),
        n_failed: count(" ... FAILED"),
        n_ignored: count(" ... ignored"),
        n_suites: 0,
    }
}

/// The three numbers of a version, or fewer if there are not as many.
fn parse_version(text: &str) -> Vec<u32> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).take(3).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use super::*;

    fn tally(n_passed: u64, n_failed: u64) -> Tally {
        Tally { n_passed, n_failed, n_ignored: 0, n_suites: 1 }
    }

    #[test]
    fn only_inits_last_line_is_a_pass() {
        let closing = "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 8.00s\r\n";
        let outcome = Outcome::judge(&format!("{closing}INIT DONE rc=0\r\n"));
        assert_eq!(outcome, Outcome { tally: tally(5, 0), failure: None });
        assert_eq!(outcome.to_string(), "passed");
        assert_eq!(Outcome::judge(closing).to_string(), "failed: exited without a result");
        let failed = Outcome::judge(&format!("{closing}INIT DONE rc=101\r\n"));
        assert_eq!(failed, Outcome { tally: tally(5, 0), failure: Some("0 tests".to_owned()) });
        assert_eq!(Outcome::judge("").to_string(), "failed: exited without a result");
    }

    #[test]
    fn a_status_of_zero_without_tests_is_no_pass() {
        assert_eq!(Outcome::judge("INIT DONE rc=0").to_string(), "failed: no test completed");
        let failed =
            "test result: FAILED. 4 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\nINIT DONE rc=0";
        let expected = Outcome { tally: tally(4, 1), failure: Some("1 tests".to_owned()) };
        assert_eq!(Outcome::judge(failed), expected);
    }

    #[test]
    fn a_dead_guest_says_why() {
        let panic = "[    0.9] Kernel panic - not syncing: Attempted to kill init!";
        assert_eq!(
            Outcome::judge(panic).to_string(),
            "failed: Kernel panic - not syncing: Attempted to kill init!"
        );
        let init = "INIT FAILED: cannot mount /proc: EPERM";
        assert_eq!(Outcome::judge(init).to_string(), "failed: cannot mount /proc: EPERM");
    }

    #[test]
    fn a_late_guest_keeps_what_it_did() {
        let serial = "running 3 tests\ntest a::b ... ok\ntest a::c ... FAILED\ntest a::d ... oktober\n";
        assert_eq!(count_tests(serial), Tally { n_passed: 1, n_failed: 1, n_ignored: 0, n_suites: 0 });
    }

    /// What a shell command in place of QEMU gives, with a limit in milliseconds.
    fn boot(shell: &str, limit: u64) -> Outcome {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("qemu");
        fs_err::write(&program, format!("#!/bin/sh\n{shell}\n")).unwrap();
        fs_err::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let qemu = Qemu { program, root: None, accelerator: Accelerator::Tcg };
        let (none, log) = (Path::new("none"), dir.path().join("log"));
        qemu.boot("test", 1, none, none, &log, Duration::from_millis(limit)).unwrap()
    }

    #[test]
    fn a_guest_that_hangs_is_killed() {
        let start = Instant::now();
        let late = boot("echo 'test a::b ... ok'; exec sleep 300", 300);
        let tally = Tally { n_passed: 1, ..Tally::default() };
        assert_eq!(late, Outcome { tally, ..Outcome::failed("time limit") });
        let in_power_off = boot("echo 'INIT DONE rc=0'; exec sleep 300", 200_000);
        assert_eq!(in_power_off.to_string(), "failed: no test completed");
        assert!(start.elapsed() < Duration::from_secs(100));
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        let debian = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright";
        assert_eq!(parse_version(debian), MIN_VERSION);
        assert!(parse_version("QEMU emulator version 7.2.22 (Debian)").as_slice() < MIN_VERSION);
        assert_eq!(parse_version("no such program"), [0; 0]);
    }
}
