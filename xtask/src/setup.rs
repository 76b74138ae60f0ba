//! `cargo xtask setup`: checks the machine, reports what is missing and why, and installs only that.
//!
//! Every command calls [`ensure`] with its own purposes, so that a build does not require the tools of the
//! tests.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use fs_err as fs;

use crate::process::{self, find_program, step};
use crate::toolchain::{self, BpfToolchain};

use Purpose::{BenchPath, Build, DebianBuild, DebianLint, Image, KernelMatrix, Lint, Run, Test};

/// The purpose of a command; it decides what is required.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Compile the BPF object and `socklb`.
    Build,
    /// Run `socklb` and its demo.
    Run,
    /// Run the tests.
    Test,
    /// Check format and lints.
    Lint,
    /// Run the kernel tests in virtual machines.
    KernelMatrix,
    /// Make a container image.
    Image,
    /// Measure against NAT rules.
    BenchPath,
    /// Compile the BPF object with Debian's toolchain.
    DebianBuild,
    /// Lint `lb-ebpf` with Debian's toolchain.
    DebianLint,
}

/// What must be installed: a program on `PATH`, a file by absolute path, or [`toolchain::LLVM_LIBRARY`]; the
/// Debian packages that contain it, separated by spaces; for which purposes; and why.
type Tool = (&'static str, &'static str, &'static [Purpose], &'static str);

/// Everything that is installed from packages. Add a row when a command, the demo or a test starts another
/// program.
const TOOLS: &[Tool] = &[
    ("cc", "gcc libc6-dev", &[Build, Test, Lint, KernelMatrix], "rustc links with it"),
    ("ip", "iproute2", &[Run, Test], "the demo and the tests make network namespaces with it"),
    ("nsenter", "util-linux", &[Run, Test], "enters the demo's namespaces"),
    ("unshare", "util-linux", &[Run, Test], "makes private namespaces"),
    ("curl", "curl", &[Run, Test], "an ordinary client for the demo and the tests"),
    ("bpftool", "bpftool", &[Run, Test], "shows the pinned maps; a test checks the fields' names"),
    ("dig", "bind9-dnsutils", &[Test], "an ordinary client of a UDP service"),
    ("python3", "python3", &[Test], "a client with another socket library than Rust's"),
    ("rsync", "rsync", &[Test], "edits manifests as people do"),
    ("git", "git", &[Test], "edits manifests as people do"),
    ("node", "nodejs", &[Test], "a client that uses IPv6 sockets for IPv4 addresses"),
    ("kubectl", "kubernetes-client", &[Test], "a real client of the tests' API server"),
    ("setpriv", "util-linux", &[Test], "runs an agent with the capabilities of the manifests"),
    ("mount", "mount", &[Test], "mounts the manifests' volumes in tests"),
    ("ldd", "libc-bin", &[Test, Image], "lists the libraries of the container image"),
    ("strip", "binutils", &[Test, Image], "strips the binaries of the container image"),
    ("ctr", "containerd", &[Test], "runs the container image as a node does"),
    ("runc", "runc", &[Test], "starts containers for containerd"),
    (
        "nft",
        "nftables",
        &[Test, BenchPath],
        "drops packets in tests; loads the rules of kube-proxy's nftables mode",
    ),
    (
        "iptables-restore",
        "iptables",
        &[Test, BenchPath],
        "loads the rules of Docker and of CNIs in tests, and those of kube-proxy's iptables mode",
    ),
    ("xz", "xz-utils", &[KernelMatrix], "unpacks modules of newer kernels"),
    ("apt-get", "apt", &[KernelMatrix], "downloads kernels and QEMU, which come from Debian only"),
    (toolchain::DEBIAN_RUSTC, "rustc-web", &[DebianBuild], "compiles for the BPF target"),
    (toolchain::DEBIAN_CARGO, "cargo-web", &[DebianBuild], "builds core; must match rustc-web"),
    (toolchain::DEBIAN_CORE, "rust-web-src", &[DebianBuild], "the sources of core"),
    // The 400 MiB of `llvm-22-dev` are not required, since bpf-linker's bindings have their own declarations.
    // rustc-web depends on this package; it is named nevertheless, so that it is never the wrong version.
    (toolchain::LLVM_LIBRARY, "libllvm22", &[DebianBuild], "bpf-linker is linked with it"),
    (toolchain::DEBIAN_CLIPPY, "rust-web-clippy", &[DebianLint], "lints lb-ebpf; must match rustc-web"),
];

/// Lists the packages of what is missing, each with the reason, without duplicates.
fn missing_packages(
    purposes: &[Purpose],
    is_installed: impl Fn(&str) -> bool,
) -> Vec<(&'static str, String)> {
    let mut packages: Vec<(&str, String)> = Vec::new();
    for (file, names, required, reason) in TOOLS {
        if !required.iter().any(|purpose| purposes.contains(purpose)) || is_installed(file) {
            continue;
        }
        for name in names.split(' ') {
            if packages.iter().all(|(package, _)| *package != name) {
                packages.push((name, format!("{file}: {reason}")));
            }
        }
    }
    packages
}

/// Whether the file of a [`Tool`] is usable.
fn is_installed(file: &str) -> bool {
    match file {
        toolchain::DEBIAN_RUSTC => toolchain::debian_rustc_is_usable(),
        toolchain::LLVM_LIBRARY => toolchain::llvm_library().exists(),
        file if file.starts_with('/') => Path::new(file).exists(),
        program => find_program(program).is_some(),
    }
}

/// The purposes of a command with those of its BPF toolchain.
fn with_toolchain(purposes: &[Purpose], toolchain: &BpfToolchain) -> Vec<Purpose> {
    let mut purposes = purposes.to_vec();
    if toolchain.is_debian() {
        purposes.push(DebianBuild);
        if purposes.contains(&Lint) {
            purposes.push(DebianLint);
        }
    }
    purposes
}

/// Arguments of `rustup component add` for what linting lacks.
fn missing_components(toolchain: &BpfToolchain) -> Vec<&'static [&'static str]> {
    let host = |subcommand| {
        let mut cargo = process::cargo();
        cargo.arg(subcommand);
        cargo
    };
    let mut needs: Vec<(Command, &[&str])> = vec![(host("fmt"), &["rustfmt"]), (host("clippy"), &["clippy"])];
    if !toolchain.is_debian() {
        needs.push((toolchain.cargo("clippy"), &["--toolchain", "nightly", "clippy"]));
    }
    needs.retain_mut(|(command, _)| process::capture(command.arg("--version")).is_err());
    needs.into_iter().map(|(_, component)| component).collect()
}

/// Installs what is missing for the purposes, and returns the BPF toolchain.
///
/// # Errors
/// If something cannot be installed; the message names the command to run instead.
pub(crate) fn ensure(purposes: &[Purpose]) -> Result<BpfToolchain> {
    let toolchain = toolchain::choose()?;
    let required = with_toolchain(purposes, &toolchain);
    let packages = missing_packages(&required, is_installed);
    let components = if purposes.contains(&Lint) { missing_components(&toolchain) } else { Vec::new() };
    let needs_linker = !toolchain::linker_works(&toolchain.linker);
    if packages.is_empty() && components.is_empty() && !needs_linker {
        step(&format!("setup: nothing is missing ({toolchain})"));
        return Ok(toolchain);
    }

    step("setup: missing on this machine:");
    for (name, reason) in &packages {
        eprintln!("    package {name} ({reason})");
    }
    if needs_linker {
        eprintln!("    {} (links the BPF object)", toolchain.linker.display());
    }
    for component in &components {
        eprintln!("    rustup component {} (cargo xtask lint)", component.join(" "));
    }

    if !packages.is_empty() {
        install_packages(&packages.iter().map(|(name, _)| *name).collect::<Vec<_>>())?;
    }
    // An old package source may have delivered an old compiler.
    if let Some((name, reason)) = missing_packages(&required, is_installed).first() {
        bail!(
            "{name} was installed but is not usable ({reason}; LLVM {} is needed): enable the security archive of \
             this Debian release in apt's sources, or install rustup's nightly with rust-src and bpf-linker",
            toolchain::DEBIAN_LLVM
        );
    }
    if needs_linker {
        install_linker(&toolchain.linker)?;
    }
    for component in components {
        let mut rustup = Command::new("rustup");
        rustup.args(["component", "add"]).args(component);
        process::run(&mut rustup, "install rustfmt and clippy of the toolchain that runs cargo")?;
    }
    step("setup: complete");
    Ok(toolchain)
}

/// The command to run as root, for a user without root or sudo.
fn apt_by_hand(names: &[&str]) -> String {
    format!("apt-get update && apt-get install --no-install-recommends {}", names.join(" "))
}

fn install_packages(names: &[&str]) -> Result<()> {
    let by_hand = apt_by_hand(names);
    if find_program("apt-get").is_none() {
        bail!(
            "missing programs and no apt-get to install them: install rustup's nightly with rust-src, bpf-linker and \
             the packages listed above by other means (Debian: {by_hand})"
        );
    }
    let apt_get = |args: &[&str]| {
        let mut apt = process::as_root("env", "installing these packages needs root");
        // sudo drops the environment, so `env` sets the variables behind it.
        apt.args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "apt-get", "-q", "--yes"]);
        // Another apt may be running, for example unattended upgrades after boot.
        apt.args(["-o", "DPkg::Lock::Timeout=600"]).args(args).stdin(Stdio::null());
        apt
    };
    let remedy = format!(
        "correct the error above, enable main, updates and security of this Debian release in apt's sources, or as \
         root run `{by_hand}`"
    );
    step("updating apt's package lists");
    // apt's lock timeout does not cover the lock of the lists, so this loop waits for another apt.
    let mut n_left = 3;
    while let Err(error) = process::run(&mut apt_get(&["update"]), "check the network") {
        n_left -= 1;
        if n_left == 0 {
            step(&format!("{error:#}; using the lists as they are"));
            break;
        }
        thread::sleep(Duration::from_secs(20));
    }
    step(&format!("installing {} packages", names.len()));
    // --no-remove: nothing that is installed may be removed.
    let mut install = apt_get(&["install", "--no-install-recommends", "--no-remove"]);
    process::run(install.args(names), &remedy)
}

/// Builds bpf-linker, with Debian's LLVM.
fn install_linker(linker: &Path) -> Result<()> {
    let version = toolchain::LINKER_VERSION;
    let root = toolchain::linker_root()?;
    // The linker needs the name `libLLVM.so`, which only LLVM's development packages have. The link of an
    // earlier build may be dangling.
    let prefix = root.join("llvm");
    let link = prefix.join("lib/libLLVM.so");
    fs::create_dir_all(prefix.join("lib"))?;
    if link.is_symlink() {
        fs::remove_file(&link)?;
    }
    fs::os::unix::fs::symlink(toolchain::llvm_library(), &link)?;
    step(&format!("building bpf-linker {version} (about a minute)"));
    // bpf-linker's own release profile has link-time optimisation, whose build time never pays off: LLVM does
    // the work, and comes compiled.
    let quick = [("OPT_LEVEL", "0"), ("LTO", "off"), ("DEBUG", "false"), ("CODEGEN_UNITS", "16")];
    let mut install = process::cargo();
    install
        .args(["install", "bpf-linker", "--version", version, "--locked", "--force", "--no-default-features"])
        .arg(format!("--features=llvm-{}", toolchain::DEBIAN_LLVM))
        .arg("--root")
        .arg(&root)
        // Without it cargo builds in a temporary folder.
        .env_remove("CARGO_TARGET_DIR")
        .envs(quick.map(|(key, value)| (format!("CARGO_PROFILE_RELEASE_{key}"), value)))
        // Otherwise the build finds another LLVM or none.
        .env("LLVM_PREFIX", prefix);
    process::run(&mut install, "check that crates.io answers, then run `cargo xtask setup` again")?;
    if !toolchain::linker_works(linker) {
        bail!(
            "{} does not run after it was built: delete {} and run `cargo xtask setup` again",
            linker.display(),
            root.display()
        );
    }
    Ok(())
}

/// Runs `cargo xtask setup`.
///
/// # Errors
/// If something cannot be installed.
pub(crate) fn command() -> Result<()> {
    ensure(&[Build, Run, Test, Lint]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(purposes: &[Purpose], present: &[&str]) -> Vec<&'static str> {
        let packages = missing_packages(purposes, |file| present.contains(&file));
        packages.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn nothing_is_installed_for_programs_that_are_there() {
        let all: Vec<&str> = TOOLS.iter().map(|(file, ..)| *file).collect();
        let purposes = [Build, Run, Test, Lint, KernelMatrix, Image, BenchPath, DebianBuild, DebianLint];
        assert_eq!(names(&purposes, &all), [""; 0]);
    }

    #[test]
    fn a_build_asks_for_no_test_tools() {
        assert_eq!(names(&[Build], &[]), ["gcc", "libc6-dev"]);
    }

    #[test]
    fn a_package_of_two_missing_programs_is_named_once() {
        assert_eq!(names(&[Run], &["ip", "curl", "bpftool"]), ["util-linux"]);
    }

    #[test]
    fn a_bare_machine_needs_all_of_debians_toolchain() {
        let debian = toolchain::choice(false, None, "/cache/bpf-linker".into());
        let build = with_toolchain(&[Build], &debian);
        assert_eq!(names(&build, &["cc"]), ["rustc-web", "cargo-web", "rust-web-src", "libllvm22"]);
        assert!(names(&with_toolchain(&[Lint], &debian), &[]).contains(&"rust-web-clippy"));
        let rustup = toolchain::choice(true, Some("/bin/bpf-linker".into()), "/cache/bpf-linker".into());
        assert_eq!(names(&with_toolchain(&[Lint], &rustup), &["cc"]), [""; 0]);
    }

    #[test]
    fn the_command_for_another_root_names_every_package() {
        let packages = missing_packages(&[Test], |program| program != "dig" && program != "curl");
        let names: Vec<&str> = packages.into_iter().map(|(name, _)| name).collect();
        assert_eq!(
            apt_by_hand(&names),
            "apt-get update && apt-get install --no-install-recommends curl bind9-dnsutils"
        );
    }
}
