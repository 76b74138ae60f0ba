//! Programs that a test runs to their end, and threads that run until a test ends.

use std::{
    process::{Command, Output},
    sync::atomic::{AtomicBool, Ordering},
};

/// Runs a program in the network namespace, mount namespace and cgroup of the calling thread.
///
/// # Panics
///
/// If it cannot be started.
#[must_use]
pub fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    output.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Runs a program and returns its output without the last newline.
///
/// # Panics
///
/// If it fails.
#[expect(clippy::must_use_candidate, reason = "a program may run for its effect alone")]
pub fn text(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let error = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}\n{error}", output.status);
    text.trim_end().to_owned()
}

/// Sets a flag on drop, even after a panic: a scope waits for its threads.
#[derive(Debug)]
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
