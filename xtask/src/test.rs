//! `cargo xtask test`: every test of the host crates, including the kernel tests.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::num::NonZero;
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::bench;
use crate::build;
use crate::process::{self, step};
use crate::setup::Purpose;
use crate::workspace::Workspace;

/// Sums of libtest's result lines.
#[expect(clippy::struct_field_names, reason = "counts are called `n_foos` in this tree")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) n_passed: u64,
    pub(crate) n_failed: u64,
    pub(crate) n_ignored: u64,
    /// Completed test executables and doc tests.
    pub(crate) n_suites: u64,
}

impl Tally {
    /// Adds a line of output, if it is a result line: `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
    pub(crate) fn add_line(&mut self, line: &str) {
        let Some(result) = line.trim().strip_prefix("test result: ") else { return };
        self.n_suites += 1;
        for part in result.split([';', '.']) {
            let mut words = part.split_whitespace();
            if let (Some(Ok(number)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) {
                match what {
                    "passed" => self.n_passed += number,
                    "failed" => self.n_failed += number,
                    "ignored" => self.n_ignored += number,
                    _ => {}
                }
            }
        }
    }
}

/// Cargo features of the tests and of their `socklb`: it can kill itself on request.
pub(crate) const FEATURES: &str = "lb-tests/fault-points";

/// How many tests libtest runs in parallel.
const THREADS_VARIABLE: &str = "RUST_TEST_THREADS";

/// Runs `cargo xtask test`.
///
/// # Errors
/// If setup or building fails, or a test fails.
pub(crate) fn command(workspace: &Workspace, args: &[String]) -> Result<()> {
    let start = Instant::now();
    let object = build::object(workspace, &[Purpose::Build, Purpose::Run, Purpose::Test])?;
    step("building socklb and the tests");
    // One command with all test targets, not `build::socklb` first: with other packages selected, cargo
    // enables other features and rebuilds many crates. It also builds the executables of lb-tests, which
    // tests start.
    let programs = ["--tests", "--bin", "socklb", "--bin", build::DEMO, "--features", FEATURES];
    build::programs(workspace, &object, &programs)?;
    step("running the tests");
    let mut test = workspace.cargo("test");
    if env::var_os(THREADS_VARIABLE).is_none() {
        // Most tests wait for timers and other processes: two per processor keep it busy.
        let n_processors = thread::available_parallelism().map_or(1, NonZero::get);
        test.env(THREADS_VARIABLE, (2 * n_processors).to_string());
    }
    if !process::is_root() {
        if process::find_program("sudo").is_none() {
            bail!(
                "kernel tests need root and there is no sudo: run `cargo xtask test` as root, or `cargo test` for the others"
            );
        }
        step("kernel tests need root to load BPF programs: starting the test executables with sudo");
        test.args(["--config", "target.'cfg(unix)'.runner = 'sudo -E'"]);
    }
    test.args(["--no-fail-fast", "--features", FEATURES, "--"])
        .args(args)
        .env(build::OBJECT_VARIABLE, &object)
        .env("SOCKLB_BIN", workspace.socklb(false))
        .env("SOCKLB_BENCH_OBJECT", bench::bench_object(workspace))
        // Otherwise a test that this kernel could run might be skipped.
        .env("LB_TEST_STRICT", "1")
        .stdout(Stdio::piped());
    let mut child = test.spawn().context("cannot start `cargo test`: is cargo installed?")?;
    let mut tally = Tally::default();
    if let Some(stdout) = child.stdout.take() {
        let mut out = std::io::stdout().lock();
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.context("lost the output of `cargo test`: run it again")?;
            out.write_all(&line).and_then(|()| out.write_all(b"\n")).context("standard output is closed")?;
            tally.add_line(&String::from_utf8_lossy(&line));
        }
    }
    let status = child.wait().context("lost `cargo test`: run it again")?;
    let Tally { n_passed, n_failed, n_ignored, n_suites } = tally;
    println!(
        "xtask test: {}: {n_passed} passed, {n_failed} failed, {n_ignored} ignored in {n_suites} suites, {} s",
        if status.success() { "ok" } else { "FAILED" },
        start.elapsed().as_secs()
    );
    if !status.success() {
        bail!("`cargo test` exited with {status}: correct the failures above");
    }
    if n_ignored > 0 {
        bail!("{n_ignored} tests are ignored: run them, or let them check for what they need");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_add_up() {
        let mut tally = Tally::default();
        tally.add_line(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        );
        tally.add_line("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 4 filtered out; finished in 1.10s");
        tally.add_line("test a::result ... ok");
        assert_eq!(tally, Tally { n_passed: 15, n_failed: 2, n_ignored: 1, n_suites: 2 });
    }
}
