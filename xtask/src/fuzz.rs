//! `cargo xtask fuzz`: coverage-guided fuzzing.
//!
//! The targets have the layout of cargo-fuzz. This command runs them with the installed compiler: without
//! nightly, without cargo-fuzz, and without `AddressSanitizer`, which finds little in safe code.

use std::env::consts::ARCH;
use std::process::Command;

use anyhow::Result;
use clap::{Args, ValueEnum};
use fs_err as fs;

use crate::build;
use crate::process::{self, step};
use crate::setup::Purpose;
use crate::workspace::Workspace;

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What to feed: objects, or DNS messages
    #[arg(long, value_enum, default_value_t = Target::Ingest)]
    target: Target,
    /// Time limit in seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Arguments of libFuzzer, such as the file of a failing input
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<String>,
}

/// A file of `tests/fuzz/fuzz_targets`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    Ingest,
    Dns,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Dns => "dns",
        }
    }
}

/// Makes the compiler count edges, as libFuzzer requires.
const COVERAGE: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg=fuzzing",
];

/// `a.test`, type `A`, with EDNS of 1,232 octets.
const DNS_SEED: &[u8] =
    b"\x12\x34\x01\0\0\x01\0\0\0\0\0\x01\x01a\x04test\0\0\x01\0\x01\0\0\x29\x04\xd0\0\0\0\0\0\0";

/// Runs `cargo xtask fuzz`.
///
/// # Errors
/// If building fails, or an input makes the target panic.
pub(crate) fn command(workspace: &Workspace, options: &Options) -> Result<()> {
    let object = build::object(workspace, &[Purpose::Build])?;
    let target = workspace.target.join("fuzz");
    let triple = format!("{ARCH}-unknown-linux-gnu");
    let [corpus, seeds, artifacts] =
        ["corpus", "seeds", "artifacts"].map(|name| target.join(name).join(options.target.name()));
    match options.target {
        Target::Ingest => {
            step("making the seed corpus from the scenarios");
            let mut make_seeds = workspace.cargo("run");
            make_seeds.args(["--quiet", "--bin", "fuzz-seeds", "--"]);
            make_seeds.arg(workspace.root.join("tests/scenarios")).arg(&seeds);
            process::run(&mut make_seeds, "correct the errors above")?;
        }
        Target::Dns => {
            fs::create_dir_all(&seeds)?;
            fs::write(seeds.join("query"), DNS_SEED)?;
        }
    }
    step("building the fuzz target");
    let mut cargo = workspace.cargo("build");
    cargo.args(["--package", "lb-fuzz", "--profile", "fuzz", "--target-dir"]).arg(&target);
    // With an explicit target the flags do not apply to build scripts and macros.
    cargo.args(["--target", &triple]).env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\u{1f}"));
    // The target calls no kernel, but a release build without the object fails.
    cargo.env(build::OBJECT_VARIABLE, &object);
    process::run(&mut cargo, "correct the errors above; a C++ compiler is needed for libFuzzer")?;
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&artifacts)?;
    step(&format!("fuzzing for {} s", options.seconds));
    let mut fuzz = Command::new(target.join(&triple).join("fuzz").join(options.target.name()));
    fuzz.arg(format!("-max_total_time={}", options.seconds))
        .args(["-rss_limit_mb=2048", "-timeout=10", "-max_len=16384", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(&options.args);
    if options.args.iter().all(|argument| argument.starts_with('-')) {
        // libFuzzer writes new inputs to the first folder.
        fuzz.arg(&corpus).arg(&seeds);
    }
    process::run(
        &mut fuzz,
        "the input is in the file named above: run it again with `cargo xtask fuzz -- FILE`, and add a test for it",
    )
}
