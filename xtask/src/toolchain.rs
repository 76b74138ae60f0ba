//! Selects the compiler and linker of the BPF object.
//!
//! Compiling `core` for the BPF target needs unstable features of rustc, the library sources, and a
//! bpf-linker whose LLVM is not older than rustc's. Two pairs are known to work: rustup's nightly with a
//! bpf-linker on `PATH`, and Debian's rustc-web with a bpf-linker that setup builds against Debian's LLVM.
//! Their parts are never mixed, because their LLVM versions differ.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::process;
use crate::workspace::cache_dir;

/// The bpf-linker that setup builds. Its feature for the LLVM version must match [`DEBIAN_LLVM`].
pub(crate) const LINKER_VERSION: &str = "0.13.0";

/// LLVM major version of Debian's rustc-web and of the packages that bpf-linker is built against.
pub(crate) const DEBIAN_LLVM: u32 = 22;

/// Debian's compiler, by absolute path because rustup's comes first on `PATH`.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";
const DEBIAN_CORE: &str = "/usr/lib/rustlib/src/rust/library/core/src/lib.rs";

/// A matching compiler and linker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BpfToolchain {
    /// Rustup's nightly with the component rust-src.
    Rustup {
        /// The bpf-linker on `PATH`.
        linker: PathBuf,
    },
    /// Debian's rustc-web, cargo-web and rust-web-src.
    Debian {
        /// The bpf-linker in the cache folder.
        linker: PathBuf,
    },
}

impl fmt::Display for BpfToolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rustup { linker } => write!(f, "rustup's nightly and {}", linker.display()),
            Self::Debian { linker } => write!(f, "Debian's rustc-web and {}", linker.display()),
        }
    }
}

impl BpfToolchain {
    /// A cargo command of this toolchain, with unstable options and the linker.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let (mut command, linker) = match self {
            Self::Rustup { linker } => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo", subcommand]);
                (command, linker)
            }
            Self::Debian { linker } => {
                // `cargo clippy` would search rustup's folder for cargo-clippy first.
                let mut command =
                    Command::new(if subcommand == "clippy" { DEBIAN_CLIPPY } else { DEBIAN_CARGO });
                command.arg(subcommand);
                command.env("CARGO", DEBIAN_CARGO).env("RUSTC_BOOTSTRAP", "1");
                (command, linker)
            }
        };
        // The cargo that runs xtask sets these for its own toolchain.
        for name in ["RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH", "RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTC"] {
            command.env_remove(name);
        }
        match self {
            Self::Rustup { .. } => command.env_remove("CARGO"),
            Self::Debian { .. } => command.env("RUSTC", DEBIAN_RUSTC),
        };
        command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker);
        command.env("CARGO_TARGET_BPFEB_UNKNOWN_NONE_LINKER", linker);
        command
    }
}

/// Setup's install folder of bpf-linker.
///
/// # Errors
/// If there is no cache folder.
pub(crate) fn linker_root() -> Result<PathBuf> {
    Ok(cache_dir()?.join(format!("bpf-linker-{LINKER_VERSION}")))
}

/// Folder of Debian's libLLVM, if installed.
fn llvm_library() -> Option<PathBuf> {
    let multiarch = format!("/usr/lib/{}-linux-gnu", env::consts::ARCH);
    let name = format!("libLLVM.so.{DEBIAN_LLVM}");
    let mut files: Vec<_> = fs::read_dir(multiarch)
        .ok()?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&name)))
        .collect();
    files.sort();
    files.pop()
}

/// The user's choice of toolchain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Requested {
    /// Rustup's if complete, else Debian's.
    Any,
    /// Only rustup's.
    Rustup,
    /// Only Debian's.
    Debian,
}

/// Installed components that affect the choice.
#[expect(clippy::struct_excessive_bools, reason = "each is one independent observation, not a state")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Value of `SOCKLB_BPF_TOOLCHAIN`.
    pub(crate) wanted: Requested,
    /// Rustup has a nightly with rust-src.
    pub(crate) has_nightly_with_sources: bool,
    /// That nightly has clippy.
    pub(crate) has_nightly_clippy: bool,
    /// A bpf-linker on `PATH` that runs.
    pub(crate) linker_on_path: Option<PathBuf>,
    /// LLVM major version of Debian's rustc, if installed.
    pub(crate) debian_rustc_llvm: Option<u32>,
    /// Debian's cargo is installed.
    pub(crate) has_debian_cargo: bool,
    /// Debian's library sources are installed.
    pub(crate) has_debian_sources: bool,
    /// Debian's clippy for that rustc is installed.
    pub(crate) has_debian_clippy: bool,
    /// Path of setup's bpf-linker, installed or not.
    pub(crate) cached_linker: PathBuf,
    /// Setup's bpf-linker exists and runs.
    pub(crate) cached_linker_works: bool,
    /// The libLLVM of Debian's rustc, which bpf-linker is linked with too.
    pub(crate) llvm_library: Option<PathBuf>,
}

/// Missing parts of the chosen toolchain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Gaps {
    /// Packages, each with a reason.
    pub(crate) packages: Vec<(String, &'static str)>,
    /// Setup's bpf-linker must be built.
    pub(crate) needs_linker: bool,
    /// The nightly needs clippy.
    pub(crate) needs_nightly_clippy: bool,
}

/// Chooses a toolchain and lists its missing parts.
///
/// # Errors
/// A remedy, if setup cannot complete the user's choice.
pub(crate) fn choose(facts: &Facts, with_clippy: bool) -> Result<(BpfToolchain, Gaps), String> {
    match (facts.wanted, facts.has_nightly_with_sources, &facts.linker_on_path) {
        (Requested::Any | Requested::Rustup, true, Some(linker)) => {
            let gaps =
                Gaps { needs_nightly_clippy: with_clippy && !facts.has_nightly_clippy, ..Gaps::default() };
            return Ok((BpfToolchain::Rustup { linker: linker.clone() }, gaps));
        }
        (Requested::Rustup, false, _) => {
            return Err("SOCKLB_BPF_TOOLCHAIN=rustup, but there is no nightly with library sources: \
                        run `rustup toolchain install nightly --component rust-src`"
                .to_owned());
        }
        (Requested::Rustup, true, None) => {
            return Err("SOCKLB_BPF_TOOLCHAIN=rustup, but no bpf-linker on PATH runs: \
                        run `cargo install bpf-linker`"
                .to_owned());
        }
        (Requested::Any | Requested::Debian, ..) => {}
    }
    let mut gaps = Gaps::default();
    let mut need = |package: &str, why| gaps.packages.push((package.to_owned(), why));
    if facts.debian_rustc_llvm != Some(DEBIAN_LLVM) {
        need("rustc-web", "compiles for the BPF target; rustup has no nightly with rust-src and bpf-linker");
    }
    if !facts.has_debian_cargo {
        need("cargo-web", "builds core from source; must match rustc-web");
    }
    if !facts.has_debian_sources {
        need("rust-web-src", "the sources of core");
    }
    if with_clippy && !facts.has_debian_clippy {
        need("rust-web-clippy", "lints lb-ebpf on the BPF target; must match rustc-web");
    }
    if !facts.cached_linker_works {
        if facts.llvm_library.is_none() {
            // It needs nothing else of LLVM: its bindings have their own declarations, so the 400 MiB of
            // `llvm-22-dev` are not required. rustc-web depends on it; it is named nevertheless so that apt
            // lists too old to know it are updated.
            need(&format!("libllvm{DEBIAN_LLVM}"), "bpf-linker is linked with it");
        }
        gaps.needs_linker = true;
    }
    Ok((BpfToolchain::Debian { linker: facts.cached_linker.clone() }, gaps))
}

/// Inspects this machine.
///
/// # Errors
/// If there is no cache folder or `SOCKLB_BPF_TOOLCHAIN` has an unknown value.
pub(crate) fn observe() -> Result<Facts> {
    let wanted = match env::var("SOCKLB_BPF_TOOLCHAIN").as_deref() {
        Err(_) | Ok("") => Requested::Any,
        Ok("rustup") => Requested::Rustup,
        Ok("debian") => Requested::Debian,
        Ok(other) => {
            anyhow::bail!("SOCKLB_BPF_TOOLCHAIN is {other:?}: set it to rustup or debian, or unset it")
        }
    };
    let nightly_sysroot = if wanted == Requested::Debian { None } else { nightly_sysroot() };
    let has_nightly_with_sources = nightly_sysroot
        .as_ref()
        .is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists());
    let cached_linker = linker_root()?.join("bin/bpf-linker");
    Ok(Facts {
        wanted,
        has_nightly_with_sources,
        has_nightly_clippy: nightly_sysroot.is_some_and(|sysroot| sysroot.join("bin/clippy-driver").exists()),
        linker_on_path: process::find_program("bpf-linker").filter(|file| linker_works(file)),
        debian_rustc_llvm: rustc_llvm(Path::new(DEBIAN_RUSTC)),
        has_debian_cargo: Path::new(DEBIAN_CARGO).exists(),
        has_debian_sources: Path::new(DEBIAN_CORE).exists(),
        has_debian_clippy: Path::new(DEBIAN_CLIPPY).exists(),
        cached_linker_works: linker_works(&cached_linker),
        llvm_library: llvm_library(),
        cached_linker,
    })
}

/// Whether a bpf-linker starts: it does not if its libLLVM was removed or upgraded.
pub(crate) fn linker_works(file: &Path) -> bool {
    process::is_executable(file)
        && process::works(Command::new(file).arg("--version").env_remove("LD_LIBRARY_PATH"))
}

fn nightly_sysroot() -> Option<PathBuf> {
    // `rustup run nightly` may install a missing nightly; listing toolchains does not.
    let list = process::capture(Command::new("rustup").args(["toolchain", "list"])).ok()?;
    if !list.lines().any(|line| line.starts_with("nightly-") && !line.starts_with("nightly-20")) {
        return None;
    }
    let mut rustc = Command::new("rustup");
    rustc.args(["run", "nightly", "rustc", "--print", "sysroot"]).env_remove("LD_LIBRARY_PATH");
    process::capture(&mut rustc).ok().map(|path| PathBuf::from(path.trim_end()))
}

fn rustc_llvm(rustc: &Path) -> Option<u32> {
    let mut command = Command::new(rustc);
    command.arg("-vV").env_remove("LD_LIBRARY_PATH");
    parse_llvm_major(&process::capture(&mut command).ok()?)
}

/// Parses the LLVM major version of `rustc -vV`.
fn parse_llvm_major(text: &str) -> Option<u32> {
    let version = text.lines().find_map(|line| line.strip_prefix("LLVM version:"))?;
    version.trim().split('.').next()?.parse().ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine without any component.
    pub(crate) fn bare() -> Facts {
        Facts {
            wanted: Requested::Any,
            has_nightly_with_sources: false,
            has_nightly_clippy: false,
            linker_on_path: None,
            debian_rustc_llvm: None,
            has_debian_cargo: false,
            has_debian_sources: false,
            has_debian_clippy: false,
            cached_linker: PathBuf::from("/cache/bpf-linker"),
            cached_linker_works: false,
            llvm_library: None,
        }
    }

    /// A machine after setup for all purposes.
    pub(crate) fn complete() -> Facts {
        Facts {
            debian_rustc_llvm: Some(DEBIAN_LLVM),
            has_debian_cargo: true,
            has_debian_sources: true,
            has_debian_clippy: true,
            cached_linker_works: true,
            llvm_library: Some(PathBuf::from("/lib/libLLVM.so.22.1")),
            ..bare()
        }
    }

    fn packages(facts: &Facts, with_clippy: bool) -> Vec<String> {
        choose(facts, with_clippy).unwrap().1.packages.into_iter().map(|(package, _)| package).collect()
    }

    #[test]
    fn a_complete_rustup_pair_comes_first() {
        let linker = PathBuf::from("/bin/bpf-linker");
        let facts =
            Facts { has_nightly_with_sources: true, linker_on_path: Some(linker.clone()), ..complete() };
        assert_eq!(choose(&facts, false), Ok((BpfToolchain::Rustup { linker }, Gaps::default())));
        assert!(choose(&facts, true).unwrap().1.needs_nightly_clippy);
        let facts = Facts { wanted: Requested::Debian, ..facts };
        assert!(matches!(choose(&facts, false), Ok((BpfToolchain::Debian { .. }, _))));
    }

    #[test]
    fn half_of_a_rustup_pair_falls_back_to_debian() {
        let nightly_only = Facts { has_nightly_with_sources: true, ..complete() };
        let linker_only = Facts { linker_on_path: Some(PathBuf::from("/bin/bpf-linker")), ..complete() };
        for facts in [nightly_only, linker_only] {
            let (toolchain, gaps) = choose(&facts, true).unwrap();
            assert!(matches!(toolchain, BpfToolchain::Debian { .. }));
            assert_eq!(gaps, Gaps::default());
            assert!(choose(&Facts { wanted: Requested::Rustup, ..facts }, false).is_err());
        }
    }

    #[test]
    fn a_bare_machine_needs_all_of_debians_pair() {
        assert_eq!(packages(&bare(), false), ["rustc-web", "cargo-web", "rust-web-src", "libllvm22"]);
        assert!(choose(&bare(), false).unwrap().1.needs_linker);
        assert!(packages(&bare(), true).contains(&"rust-web-clippy".to_owned()));
    }

    #[test]
    fn a_rustc_with_another_llvm_is_replaced() {
        let facts = Facts { debian_rustc_llvm: Some(19), ..complete() };
        assert_eq!(packages(&facts, true), ["rustc-web"]);
    }

    #[test]
    fn a_broken_linker_is_built_again() {
        let facts = Facts { cached_linker_works: false, ..complete() };
        let (_, gaps) = choose(&facts, true).unwrap();
        assert_eq!(gaps, Gaps { needs_linker: true, ..Gaps::default() });
    }

    #[test]
    fn reads_the_llvm_version() {
        assert_eq!(parse_llvm_major("rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(parse_llvm_major("rustc 1.63.0\n"), None);
    }
}
