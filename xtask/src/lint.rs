//! `cargo xtask lint`: all checks of the sources.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::build;
use crate::process::{self, step};
use crate::setup::{self, Purpose};
use crate::test::FEATURES;
use crate::toolchain::BpfToolchain;
use crate::workspace::Workspace;

mod text;

/// A violation of a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Violation {
    file: PathBuf,
    line: usize,
    rule: String,
    reason: String,
}

/// A file of the tree, with its path from the root.
struct TreeFile {
    path: PathBuf,
    text: String,
}

/// Reads every text file of the tree, without build results and tools' hidden state.
///
/// Walks the folders instead of asking git, so that an unpacked archive is checked the same way.
fn read_tree(root: &Path) -> Result<Vec<TreeFile>> {
    let mut files = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries =
            fs::read_dir(&dir).with_context(|| format!("cannot list {}: check its owner", dir.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}: check the disk", dir.display()))?;
            let (path, kind) = (entry.path(), entry.file_type().context("cannot read a file's type")?);
            if kind.is_dir() {
                if !matches!(entry.file_name().to_str(), Some(".git" | "target")) {
                    dirs.push(path);
                }
            // In a worktree `.git` is a file.
            } else if kind.is_file()
                && entry.file_name() != ".git"
                && let Ok(text) = fs::read_to_string(&path)
            {
                let path = path.strip_prefix(root).unwrap_or(&path).to_owned();
                files.push(TreeFile { path, text });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn check_tree(workspace: &Workspace) -> Result<()> {
    step("checking text rules");
    let files = read_tree(&workspace.root)?;
    let mut violations = text::check(&files);
    violations.sort();
    for Violation { file, line, rule, reason } in &violations {
        println!("{}:{line}: {rule} ({reason})", file.display());
    }
    if !violations.is_empty() {
        bail!(
            "{} places break the rules of the tree: correct each one, or the table in xtask/src/lint",
            violations.len()
        );
    }
    Ok(())
}

fn check_format(workspace: &Workspace) -> Result<()> {
    step("rustfmt --check");
    let mut fmt = process::cargo();
    fmt.current_dir(&workspace.root).args(["fmt", "--all", "--check"]);
    process::run(&mut fmt, "run `cargo fmt --all`")
}

fn clippy_host(workspace: &Workspace) -> Result<()> {
    step("clippy on the host crates");
    let mut clippy = process::cargo();
    clippy
        .current_dir(&workspace.root)
        .args(["clippy", "--workspace", "--exclude", "lb-ebpf", "--all-targets", "--features", FEATURES])
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
