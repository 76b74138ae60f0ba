//! Runs programs in the network namespace, mount namespace and cgroup of the calling thread.

use std::process::{Command, Output};

pub(crate) fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    output.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Runs a program and returns its output without the last newline. It must succeed.
pub(crate) fn text(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let error = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}\n{error}", output.status);
    text.trim_end().to_owned()
}
