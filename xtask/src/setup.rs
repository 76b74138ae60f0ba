//! `cargo xtask setup`: checks the machine, reports what is missing and why, and installs only that.
//!
//! Every command calls [`ensure`] with its own purposes, so that a build does not require the tools of the
//! tests.

use std::env;
use std::fs;
use std::io;
use std::os::unix;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::process::{self, find_program, step};
use crate::toolchain::{self, BpfToolchain, Gaps};
use crate::workspace::cache_dir;

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
}

/// A program that is required on `PATH`.
struct Tool {
    program: &'static str,
    /// Debian packages that contain it.
    packages: &'static [&'static str],
    purposes: &'static [Purpose],
    reason: &'static str,
}

/// Programs other than the BPF toolchain. Add a row when a command, the demo or a test starts another
/// program.
const TOOLS: &[Tool] = &[
    Tool {
        program: "cc",
        packages: &["gcc", "libc6-dev"],
        purposes: &[Purpose::Build, Purpose::Test, Purpose::Lint, Purpose::KernelMatrix],
        reason: "rustc links with it",
    },
    Tool {
        program: "ip",
        packages: &["iproute2"],
        purposes: &[Purpose::Run, Purpose::Test],
        reason: "the demo and the tests make network namespaces with it",
    },
    Tool {
        program: "nsenter",
        packages: &["util-linux"],
        purposes: &[Purpose::Run, Purpose::Test],
        reason: "enters the demo's namespaces",
    },
    Tool {
        program: "unshare",
        packages: &["util-linux"],
        purposes: &[Purpose::Run, Purpose::Test],
        reason: "makes private namespaces",
    },
    Tool {
        program: "curl",
        packages: &["curl"],
        purposes: &[Purpose::Run, Purpose::Test],
        reason: "an ordinary client for the demo and the tests",
    },
    Tool {
        program: "bpftool",
        packages: &["bpftool"],
        purposes: &[Purpose::Run, Purpose::Test],
        reason: "shows the pinned maps; a test checks that it prints named fields",
    },
    Tool {
        program: "dig",
        packages: &["bind9-dnsutils"],
        purposes: &[Purpose::Test],
        reason: "an ordinary client of a UDP service",
    },
    Tool {
        program: "python3",
        packages: &["python3"],
        purposes: &[Purpose::Test],
        reason: "a client with another socket library than Rust's",
    },
    Tool {
        program: "rsync",
        packages: &["rsync"],
        purposes: &[Purpose::Test],
        reason: "edits manifests as people do",
    },
    Tool {
        program: "git",
        packages: &["git"],
        purposes: &[Purpose::Test],
        reason: "edits manifests as people do",
    },
    Tool {
        program: "node",
        packages: &["nodejs"],
        purposes: &[Purpose::Test],
        reason: "a client that uses IPv6 sockets for IPv4 addresses",
    },
    Tool {
        program: "kubectl",
        packages: &["kubernetes-client"],
        purposes: &[Purpose::Test],
        reason: "a real client of the tests' API server",
    },
    Tool {
        program: "setpriv",
        packages: &["util-linux"],
        purposes: &[Purpose::Test],
        reason: "runs an agent with the capabilities of the manifests",
    },
    Tool {
        program: "mount",
        packages: &["mount"],
        purposes: &[Purpose::Test],
        reason: "mounts the manifests' volumes in tests",
    },
    Tool {
        program: "ldd",
        packages: &["libc-bin"],
        purposes: &[Purpose::Test, Purpose::Image],
        reason: "lists the libraries of the container image",
    },
    Tool {
        program: "strip",
        packages: &["binutils"],
        purposes: &[Purpose::Test, Purpose::Image],
        reason: "strips the binaries of the container image",
    },
    Tool {
        program: "ctr",
        packages: &["containerd"],
        purposes: &[Purpose::Test],
        reason: "runs the container image as a node does",
    },
    Tool {
        program: "runc",
        packages: &["runc"],
        purposes: &[Purpose::Test],
        reason: "starts containers for containerd",
    },
    Tool {
        program: "nft",
        packages: &["nftables"],
        purposes: &[Purpose::BenchPath],
        reason: "loads the rules of kube-proxy's nftables mode, for measurements",
    },
    Tool {
        program: "iptables-restore",
        packages: &["iptables"],
        purposes: &[Purpose::BenchPath],
        reason: "loads the rules of kube-proxy's iptables mode, for measurements",
    },
    Tool {
        program: "xz",
        packages: &["xz-utils"],
        purposes: &[Purpose::KernelMatrix],
        reason: "unpacks modules of newer kernels",
    },
    Tool {
        program: "apt-get",
        packages: &["apt"],
        purposes: &[Purpose::KernelMatrix],
        reason: "downloads kernels and QEMU, which come from Debian only",
    },
];

/// A package to install.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Package {
    name: String,
    reason: String,
}

/// Lists the packages of missing programs, without duplicates.
fn missing_tools(purposes: &[Purpose], has_program: impl Fn(&str) -> bool) -> Vec<Package> {
    let mut packages: Vec<Package> = Vec::new();
    for tool in TOOLS {
        if !tool.purposes.iter().any(|purpose| purposes.contains(purpose)) || has_program(tool.program) {
            continue;
        }
        for &name in tool.packages {
            if packages.iter().all(|package| package.name != name) {
                packages.push(Package {
                    name: name.to_owned(),
                    reason: format!("{}: {}", tool.program, tool.reason),
                });
            }
        }
    }
    packages
}

/// How apt-get gets root's permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Privilege {
    Root,
    Sudo,
    None,
}

/// Installs what is missing for the purposes, and returns the BPF toolchain.
///
/// # Errors
/// If something cannot be installed; the message names the command to run instead.
pub(crate) fn ensure(purposes: &[Purpose]) -> Result<BpfToolchain> {
    let with_clippy = purposes.contains(&Purpose::Lint);
    let facts = toolchain::observe()?;
    let (chosen, gaps) = toolchain::choose(&facts, with_clippy).map_err(|remedy| anyhow!(remedy))?;
    let mut packages = missing_tools(purposes, |program| find_program(program).is_some());
    packages.extend(
        gaps.packages
            .iter()
            .map(|(name, reason)| Package { name: name.clone(), reason: (*reason).to_owned() }),
    );
    let components = if with_clippy { missing_components() } else { Vec::new() };
    if packages.is_empty() && components.is_empty() && gaps == Gaps::default() {
        step(&format!("setup: nothing is missing ({chosen})"));
        return Ok(chosen);
    }

    step("setup: missing on this machine:");
    for Package { name, reason } in &packages {
        eprintln!("    package {name} ({reason})");
    }
    if gaps.needs_linker {
        let root = toolchain::linker_root()?;
        let version = toolchain::LINKER_VERSION;
        eprintln!("    bpf-linker {version}, into {} (links the BPF object)", root.display());
    }
    for component in &components {
        eprintln!("    rustup component {component} (cargo xtask lint)");
    }
    if gaps.needs_nightly_clippy {
        eprintln!("    rustup component clippy of nightly (lints lb-ebpf on the BPF target)");
    }

    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    let facts = verify_packages(with_clippy)?;
    if let (true, Some(library)) = (gaps.needs_linker, &facts.llvm_library) {
        install_linker(library)?;
    }
    if !components.is_empty() {
        let mut rustup = Command::new("rustup");
        rustup.args(["component", "add"]).args(&components);
        process::run(&mut rustup, "install rustfmt and clippy of the toolchain that runs cargo")?;
    }
    if gaps.needs_nightly_clippy {
        let mut rustup = Command::new("rustup");
        rustup.args(["component", "add", "--toolchain", "nightly", "clippy"]);
        process::run(&mut rustup, "choose a nightly that has clippy")?;
    }
    step("setup: complete");
    Ok(chosen)
}

/// Checks again after installing: an old package source may have delivered an old compiler.
fn verify_packages(with_clippy: bool) -> Result<toolchain::Facts> {
    let facts = toolchain::observe()?;
    let (_, gaps) = toolchain::choose(&facts, with_clippy).map_err(|remedy| anyhow!(remedy))?;
    if let Some((name, reason)) = gaps.packages.first() {
        bail!(
            "{name} was installed but is not usable ({reason}; LLVM {} is needed): enable the security archive of \
             this Debian release in apt's sources, or install rustup's nightly with rust-src and bpf-linker",
            toolchain::DEBIAN_LLVM
        );
    }
    Ok(facts)
}

fn missing_components() -> Vec<&'static str> {
    let runs = |subcommand| process::works(process::cargo().args([subcommand, "--version"]));
    [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(subcommand, _)| !runs(subcommand))
        .map(|(_, component)| component)
        .collect()
}

fn privilege() -> Privilege {
    if process::is_root() {
        Privilege::Root
    } else if find_program("sudo").is_some() {
        Privilege::Sudo
    } else {
        Privilege::None
    }
}

/// The command to run as root, for a user without root or sudo.
fn apt_by_hand(packages: &[Package]) -> String {
    let names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    format!("apt-get update && apt-get install --no-install-recommends {}", names.join(" "))
}

fn install_packages(packages: &[Package]) -> Result<()> {
    let by_hand = apt_by_hand(packages);
    if find_program("apt-get").is_none() {
        bail!(
            "missing programs and no apt-get to install them: install rustup's nightly with rust-src, bpf-linker and \
             the packages listed above by other means (Debian: {by_hand})"
        );
    }
    let privilege = privilege();
    match privilege {
        Privilege::None => {
            bail!("installing packages needs root, and sudo is missing: as root run `{by_hand}`")
        }
        Privilege::Sudo => step("installing these packages needs root: using sudo for apt-get alone"),
        Privilege::Root => {}
    }
    let log = cache_dir()?.join("setup.log");
    if without_candidate(packages).is_some() {
        update_package_lists(privilege, &log, &by_hand)?;
        if let Some(package) = without_candidate(packages) {
            bail!(
                "apt knows no package {}: enable main, updates and security of this Debian release in apt's sources, \
                 or install what brings it by other means",
                package.name
            );
        }
    }
    step(&format!("installing {} packages (log: {})", packages.len(), log.display()));
    let install = || {
        let mut apt = apt_get(privilege);
        // --no-remove: nothing that is installed may be removed.
        apt.args(["install", "--yes", "--no-install-recommends", "--no-remove"]);
        apt.args(packages.iter().map(|package| &package.name));
        process::run_logged(
            &mut apt,
            &log,
            |line| line.starts_with("Setting up ") || line.starts_with("Need to get "),
            &format!("find the cause in the log, then as root run `{by_hand}`"),
        )
    };
    if let Err(error) = install() {
        // Outdated lists name files that the archive no longer has.
        step(&format!("{error:#}; trying again with fresh package lists"));
        update_package_lists(privilege, &log, &by_hand)?;
        install()?;
    }
    Ok(())
}

/// The common part of every apt-get command.
fn apt_get(privilege: Privilege) -> Command {
    let mut command = Command::new(if privilege == Privilege::Sudo { "sudo" } else { "env" });
    if privilege == Privilege::Sudo {
        // sudo drops the environment, so `env` sets the variables behind it.
        command.args(["--", "env"]);
    }
    command.args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "apt-get", "--quiet"]);
    // Another apt may be running, for example unattended upgrades after boot.
    command.args(["-o", "DPkg::Lock::Timeout=600"]);
    command
}

fn update_package_lists(privilege: Privilege, log: &Path, by_hand: &str) -> Result<()> {
    step("updating apt's package lists");
    let update = || {
        let mut apt = apt_get(privilege);
        apt.arg("update");
        process::run_logged(
            &mut apt,
            log,
            |_| false,
            &format!("check the network, then as root run `{by_hand}`"),
        )
    };
    // apt's lock timeout does not cover the lock of the lists, so this loop waits for another apt.
    for _ in 0..3 {
        if update().is_ok() {
            return Ok(());
        }
        thread::sleep(Duration::from_secs(20));
    }
    update()
}

/// The first package without a candidate for installation.
fn without_candidate(packages: &[Package]) -> Option<&Package> {
    let mut policy = Command::new("apt-cache");
    policy.env("LC_ALL", "C").arg("policy").args(packages.iter().map(|package| &package.name));
    let text = process::capture(&mut policy).unwrap_or_default();
    packages.iter().find(|package| !policy_has_candidate(&text, &package.name))
}

/// Parses `apt-cache policy`: a block per known package with the name, a colon, and indented lines.
fn policy_has_candidate(text: &str, package: &str) -> bool {
    text.lines()
        .skip_while(|line| line.strip_suffix(':') != Some(package))
        .skip(1)
        .take_while(|line| line.starts_with(' '))
        .find_map(|line| line.trim_start().strip_prefix("Candidate:"))
        .is_some_and(|version| version.trim() != "(none)")
}

/// Makes the folder in which bpf-linker's build searches for LLVM. The linker needs the name `libLLVM.so`,
/// which only the development packages have.
fn llvm_prefix(root: &Path, library: &Path) -> Result<PathBuf> {
    let prefix = root.join("llvm");
    let (folder, link) = (prefix.join("lib"), prefix.join("lib/libLLVM.so"));
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}: check its owner", folder.display()))?;
    // The link of an earlier build may be dangling.
    let made = match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => unix::fs::symlink(library, &link),
    };
    made.with_context(|| format!("cannot make {}: check the folder's owner", link.display()))?;
    Ok(prefix)
}

fn install_linker(library: &Path) -> Result<()> {
    let version = toolchain::LINKER_VERSION;
    let root = toolchain::linker_root()?;
    let target = env::temp_dir().join(format!("bpf-linker-build-{}", std::process::id()));
    let prefix = llvm_prefix(&root, library)?;
    step(&format!("building bpf-linker {version} (about a minute)"));
    // bpf-linker's own release profile has link-time optimisation, whose build time never pays off: LLVM does
    // the work, and comes compiled.
    let quick = [("OPT_LEVEL", "0"), ("LTO", "off"), ("DEBUG", "false"), ("CODEGEN_UNITS", "16")];
    let mut install = process::cargo();
    install
        .args(["install", "bpf-linker", "--version", version, "--locked", "--force", "--no-default-features"])
        .arg("--features")
        .arg(format!("llvm-{}", toolchain::DEBIAN_LLVM))
        .arg("--root")
        .arg(&root)
        .env("CARGO_TARGET_DIR", &target)
        .envs(quick.map(|(key, value)| (format!("CARGO_PROFILE_RELEASE_{key}"), value)))
        // Otherwise the build finds another LLVM or none.
        .env("LLVM_PREFIX", prefix);
    let result =
        process::run(&mut install, "check that crates.io answers, then run `cargo xtask setup` again");
    if target.exists() {
        fs::remove_dir_all(&target)
            .with_context(|| format!("cannot delete {}: delete it", target.display()))?;
    }
    result?;
    let linker = root.join("bin/bpf-linker");
    if !toolchain::linker_works(&linker) {
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
    ensure(&[Purpose::Build, Purpose::Run, Purpose::Test, Purpose::Lint]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(purposes: &[Purpose], present: &[&str]) -> Vec<String> {
        missing_tools(purposes, |program| present.contains(&program))
            .into_iter()
            .map(|package| package.name)
            .collect()
    }

    #[test]
    fn nothing_is_installed_for_programs_that_are_there() {
        let all: Vec<&str> = TOOLS.iter().map(|tool| tool.program).collect();
        let purposes = [
            Purpose::Build,
            Purpose::Run,
            Purpose::Test,
            Purpose::Lint,
            Purpose::KernelMatrix,
            Purpose::Image,
            Purpose::BenchPath,
        ];
        assert_eq!(names(&purposes, &all), [""; 0]);
    }

    #[test]
    fn a_build_asks_for_no_test_tools() {
        assert_eq!(names(&[Purpose::Build], &[]), ["gcc", "libc6-dev"]);
    }

    #[test]
    fn a_package_of_two_missing_programs_is_named_once() {
        let packages = names(&[Purpose::Run], &["ip", "curl", "bpftool"]);
        assert_eq!(packages, ["util-linux"]);
    }

    #[test]
    fn the_command_for_another_root_names_every_package() {
        let packages = missing_tools(&[Purpose::Test], |program| program != "dig" && program != "curl");
        assert_eq!(
            apt_by_hand(&packages),
            "apt-get update && apt-get install --no-install-recommends curl bind9-dnsutils"
        );
    }

    #[test]
    fn reads_candidates() {
        let text = "curl:\n  Installed: (none)\n  Candidate: 7.88.1\n  Version table:\n     7.88.1 500\n\
                    dig:\n  Installed: (none)\n  Candidate: (none)\n";
        assert!(policy_has_candidate(text, "curl"));
        assert!(!policy_has_candidate(text, "dig"));
        assert!(!policy_has_candidate(text, "ip"));
        assert!(!policy_has_candidate("", "curl"));
    }
}
