//! `cargo xtask build`: the BPF object, then the `socklb` binary that embeds it.

use std::env::consts::ARCH;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use fs_err as fs;
use object::{build::elf, elf::SHT_STRTAB};

use crate::process::{self, step};
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;

/// The BPF target that matches the host's byte order.
pub(crate) const BPF_TARGET: &str =
    if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// The variable that tells `lb-userspace/kernel/build.rs` which object to embed.
pub(crate) const OBJECT_VARIABLE: &str = "SOCKLB_BPF_OBJECT";

/// The demo program.
pub(crate) const DEMO: &str = "socklb-demo";

/// Compiler flags of the BPF build, one per entry.
fn bpf_rustflags() -> [String; 4] {
    [
        // aya-ebpf selects the layout of pt_regs and other types by the kernel's architecture, which the BPF
        // target does not tell.
        format!("--cfg=bpf_target_arch=\"{ARCH}\""),
        // BTF is made from debug info: without it maps have no types and the verifier's log has no source
        // lines.
        "-Cdebuginfo=2".to_owned(),
        // Compare-and-swap, which reserves slots of sockets, is an instruction of BPF's third version (kernel
        // 5.12); programs for older kernels do not contain it.
        "-Ctarget-cpu=v3".to_owned(),
        // bpf-linker writes .BTF and .BTF.ext only on request.
        "-Clink-arg=--btf".to_owned(),
    ]
}

/// Adds the arguments for compiling `lb-ebpf` for the BPF target to a `cargo build` or `cargo clippy`
/// command.
pub(crate) fn add_bpf_arguments(command: &mut Command, workspace: &Workspace) {
    command
        .current_dir(&workspace.root)
        .args(["--package", "lb-ebpf", "--target", BPF_TARGET, "-Zbuild-std=core"])
        // A separate folder: another rustc and other flags must not invalidate the host's results.
        .arg("--target-dir")
        .arg(workspace.target.join("bpf"))
        .env("CARGO_ENCODED_RUSTFLAGS", bpf_rustflags().join("\u{1f}"));
}

/// Installs what is missing for some purposes, builds the BPF object and returns its path.
///
/// # Errors
/// If something cannot be installed, the compiler or bpf-linker fails, or the object cannot be copied.
pub(crate) fn object(workspace: &Workspace, purposes: &[Purpose]) -> Result<PathBuf> {
    let toolchain = setup::ensure(purposes)?;
    step(&format!("building the BPF object with {toolchain}"));
    let mut cargo = toolchain.cargo("build");
    cargo.arg("--release");
    add_bpf_arguments(&mut cargo, workspace);
    process::run(&mut cargo, "correct lb-ebpf, or check the toolchain with `cargo xtask setup`")?;
    let built = workspace.target.join("bpf").join(BPF_TARGET).join("release/lb-ebpf");
    let object = workspace.target.join("bpf/socklb.bpf.o");
    let built = without_debug_sections(&fs::read(&built)?)
        .with_context(|| format!("cannot remove debug sections from {}", built.display()))?;
    write_if_changed(&object, &built)?;
    Ok(object)
}

/// The object without DWARF, which BTF was made from, and without the relocations of BTF, which loaders
/// ignore. Otherwise the agent would keep them in memory: they are six sevenths of the object.
fn without_debug_sections(object: &[u8]) -> Result<Vec<u8>> {
    const UNUSED: [&[u8]; 3] = [b".debug_", b".rel.debug_", b".rel.BTF"];
    let mut builder = elf::Builder::read(object)?;
    for section in &mut builder.sections {
        section.delete = UNUSED.iter().any(|prefix| section.name.as_slice().starts_with(prefix));
    }
    // LLVM keeps the names of sections and of symbols in one section, which the builder does not.
    let names = builder.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = elf::SectionData::SectionString;
    builder.delete_orphans();
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}

/// Writes a file unless it has the same bytes, because cargo rebuilds on a new time stamp.
fn write_if_changed(path: &Path, new: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == new) {
        return Ok(());
    }
    Ok(fs::write(path, new)?)
}

/// Runs `cargo build` with arguments, for programs that embed the BPF object.
///
/// # Errors
/// If cargo fails.
pub(crate) fn programs(workspace: &Workspace, object: &Path, args: &[&str]) -> Result<()> {
    let mut cargo = workspace.cargo("build");
    process::run(cargo.args(args).env(OBJECT_VARIABLE, object), "correct the errors above")
}

/// Builds the `socklb` binary with a BPF object, and `socklb-demo` if requested. Returns the path of
/// `socklb`.
///
/// # Errors
/// If cargo fails.
pub(crate) fn socklb(
    workspace: &Workspace,
    object: &Path,
    release: bool,
    with_demo: bool,
) -> Result<PathBuf> {
    step(if release { "building socklb (release)" } else { "building socklb (debug)" });
    let mut args = vec!["--package", "lb-userspace", "--bin", "socklb"];
    if with_demo {
        args.extend(["--package", "lb-demo", "--bin", DEMO]);
    }
    if release {
        args.push("--release");
    }
    programs(workspace, object, &args)?;
    Ok(workspace.socklb(release))
}

/// Runs `cargo xtask build`.
///
/// # Errors
/// If setting up or building fails.
pub(crate) fn command(workspace: &Workspace, release: bool) -> Result<()> {
    let object = object(workspace, &[Purpose::Build])?;
    let binary = socklb(workspace, &object, release, true)?;
    println!("{}", binary.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_equal_file_keeps_its_time_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("object");
        write_if_changed(&path, b"one").unwrap();
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        write_if_changed(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
        write_if_changed(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
    }

    #[test]
    fn no_flag_holds_the_separator() {
        assert!(bpf_rustflags().iter().all(|flag| !flag.contains('\u{1f}')));
    }
}
