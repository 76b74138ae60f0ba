//! `cargo xtask lint`: all checks of the sources.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use walkdir::{DirEntry, WalkDir};

use crate::build;
use crate::process::{self, step};
use crate::setup::{self, Purpose};
use crate::test::FEATURES;
use crate::toolchain::BpfToolchain;
use crate::workspace::Workspace;

mod text;

/// A text file of the tree, with its path from the root.
struct TreeFile {
    path: PathBuf,
    text: String,
}

/// Reads every text file of the tree, without build results and tools' hidden state.
///
/// Walks the folders instead of asking git, so that an unpacked archive is checked the same way.
fn read_tree(root: &Path) -> Result<Vec<TreeFile>> {
    let mut files = Vec::new();
    // In a worktree `.git` is a file.
    let is_source = |entry: &DirEntry| !matches!(entry.file_name().to_str(), Some(".git" | "target"));
    for entry in WalkDir::new(root).sort_by_file_name().into_iter().filter_entry(is_source) {
        let entry = entry?;
        if entry.file_type().is_file()
            && let Ok(text) = fs::read_to_string(entry.path())
        {
            files.push(TreeFile { path: entry.path().strip_prefix(root)?.to_owned(), text });
        }
    }
    Ok(files)
}

fn check_tree(workspace: &Workspace) -> Result<()> {
    step("checking text rules");
    let violations = text::check(&read_tree(&workspace.root)?);
    for violation in &violations {
        println!("{violation}");
    }
    if !violations.is_empty() {
        bail!(
            "{} places break the rules of the tree: correct each one, or the tables in xtask/src/lint",
            violations.len()
        );
    }
    Ok(())
}

fn check_format(workspace: &Workspace) -> Result<()> {
    step("rustfmt --check");
    process::run(workspace.cargo("fmt").args(["--all", "--check"]), "run `cargo fmt --all`")
}

fn clippy_host(workspace: &Workspace) -> Result<()> {
    step("clippy on the host crates");
    let mut clippy = workspace.cargo("clippy");
    clippy
        .args(["--workspace", "--exclude", "lb-ebpf", "--all-targets", "--features", FEATURES])
        .args(["--", "--deny", "warnings"])
        // The fuzz target is checked and not linked: with the library named, its build script needs no C++
        // compiler.
        .env("CUSTOM_LIBFUZZER_PATH", workspace.root.join("tests/fuzz/Cargo.toml"))
        // The stub object is enough for checking, so no BPF build is needed before.
        .env_remove(build::OBJECT_VARIABLE);
    process::run(&mut clippy, "correct the lints above")
}

/// Lints `lb-ebpf` for the BPF target, with that toolchain's clippy.
///
/// Stable clippy on the host would see the host's pointer casts, bindings and `cfg`s, and cannot lint code
/// that compiles only for the BPF target.
fn clippy_bpf(workspace: &Workspace, toolchain: &BpfToolchain) -> Result<()> {
    step("clippy on lb-ebpf for the BPF target");
    let mut clippy = toolchain.cargo("clippy");
    clippy.arg("--release");
    build::add_bpf_arguments(&mut clippy, workspace);
    // --no-deps: lb-common is linted on the host; two versions of clippy disagree about which `#[expect]` is
    // needed.
    clippy.args(["--", "--no-deps", "--deny", "warnings"]);
    process::run(&mut clippy, "correct the lints above")
}

/// Runs `cargo xtask lint`: all checks, even after one failed.
///
/// # Errors
/// If a check fails or cannot run.
pub(crate) fn command(workspace: &Workspace) -> Result<()> {
    let toolchain = setup::ensure(&[Purpose::Build, Purpose::Lint])?;
    let results = [
        check_tree(workspace),
        check_format(workspace),
        clippy_host(workspace),
        clippy_bpf(workspace, &toolchain),
    ];
    let mut n_failed = 0;
    for error in results.into_iter().filter_map(Result::err) {
        n_failed += 1;
        eprintln!("error: {error:#}");
    }
    if n_failed > 0 {
        bail!("{n_failed} of 4 lint checks failed: see the errors above");
    }
    println!("xtask lint: text rules, format, clippy on host and BPF target: all passed");
    Ok(())
}
