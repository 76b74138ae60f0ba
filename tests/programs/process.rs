//! Running programs. They are in the network namespace, mount namespace and cgroup of the thread that runs them.

use std::process::{Command, Output};

/// Runs a program to its end.
pub(crate) fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    output.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Runs a program and returns what it prints, without the last newline. It must end well.
pub(crate) fn text(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let error = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}\n{error}", output.status);
    text.trim_end().to_owned()
}
