//! Selects the compiler and linker of the BPF object.
//!
//! Compiling `core` for the BPF target needs unstable features of rustc, the library sources, and a
//! bpf-linker whose LLVM is not older than rustc's. Two pairs are known to work: rustup's nightly with a
//! bpf-linker on `PATH`, and Debian's rustc-web with a bpf-linker that setup builds against Debian's LLVM.
//! Their parts are never mixed, because their LLVM versions differ.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::process;
use crate::workspace::cache_dir;

/// The bpf-linker that setup builds. Its feature for the LLVM version must match [`DEBIAN_LLVM`].
pub(crate) const LINKER_VERSION: &str = "0.13.0";

/// LLVM major version of Debian's rustc-web and of the packages that bpf-linker is built against.
pub(crate) const DEBIAN_LLVM: u32 = 22;

/// File name of the library of [`DEBIAN_LLVM`].
pub(crate) const LLVM_LIBRARY: &str = "libLLVM-22.so";

/// Debian's compiler, by absolute path because rustup's comes first on `PATH`.
pub(crate) const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
pub(crate) const DEBIAN_CARGO: &str = "/usr/bin/cargo";
pub(crate) const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";
pub(crate) const DEBIAN_CORE: &str = "/usr/lib/rustlib/src/rust/library/core/src/lib.rs";

/// A matching compiler and linker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BpfToolchain {
    compiler: Compiler,
    /// The bpf-linker.
    pub(crate) linker: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compiler {
    /// Rustup's nightly with the component rust-src.
    Rustup,
    /// Debian's rustc-web, cargo-web and rust-web-src.
    Debian,
}

impl fmt::Display for BpfToolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compiler = if self.is_debian() { "Debian's rustc-web" } else { "rustup's nightly" };
        write!(f, "{compiler} and {}", self.linker.display())
    }
}

impl BpfToolchain {
    /// Whether it is Debian's, whose parts setup installs.
    pub(crate) fn is_debian(&self) -> bool {
        self.compiler == Compiler::Debian
    }

    /// A cargo command of this toolchain, with unstable options and the linker.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        // `cargo clippy` would search rustup's folder for cargo-clippy first.
        let program = match self.compiler {
            Compiler::Rustup => "rustup",
            Compiler::Debian if subcommand == "clippy" => DEBIAN_CLIPPY,
            Compiler::Debian => DEBIAN_CARGO,
        };
        let mut command = Command::new(program);
        // The cargo that runs xtask sets these for its own toolchain.
        for name in
            ["RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH", "RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTC", "CARGO"]
        {
            command.env_remove(name);
        }
        match self.compiler {
            Compiler::Rustup => command.args(["run", "nightly", "cargo"]),
            Compiler::Debian => {
                command.env("CARGO", DEBIAN_CARGO).env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1")
            }
        };
        command.arg(subcommand);
        command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker);
        command.env("CARGO_TARGET_BPFEB_UNKNOWN_NONE_LINKER", &self.linker);
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

/// Path of [`LLVM_LIBRARY`], installed or not.
pub(crate) fn llvm_library() -> PathBuf {
    Path::new("/usr/lib").join(format!("{}-linux-gnu", env::consts::ARCH)).join(LLVM_LIBRARY)
}

/// Chooses rustup's pair if it is complete, else Debian's, which setup can complete.
pub(crate) fn choice(
    nightly_has_sources: bool,
    linker_on_path: Option<PathBuf>,
    cached_linker: PathBuf,
) -> BpfToolchain {
    match linker_on_path.filter(|_| nightly_has_sources) {
        Some(linker) => BpfToolchain { compiler: Compiler::Rustup, linker },
        None => BpfToolchain { compiler: Compiler::Debian, linker: cached_linker },
    }
}

/// Chooses the toolchain for this machine.
///
/// # Errors
/// If there is no cache folder.
pub(crate) fn choose() -> Result<BpfToolchain> {
    let sources = "lib/rustlib/src/rust/library/core/src/lib.rs";
    let nightly_has_sources = nightly_sysroot().is_some_and(|sysroot| sysroot.join(sources).exists());
    let linker = process::find_program("bpf-linker").filter(|file| linker_works(file));
    Ok(choice(nightly_has_sources, linker, linker_root()?.join("bin/bpf-linker")))
}

/// Whether a bpf-linker starts: it does not if its libLLVM was removed or upgraded.
pub(crate) fn linker_works(file: &Path) -> bool {
    process::capture(Command::new(file).arg("--version").env_remove("LD_LIBRARY_PATH")).is_ok()
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

/// Whether Debian's rustc is installed and has the LLVM of the linker.
pub(crate) fn debian_rustc_is_usable() -> bool {
    let mut rustc = Command::new(DEBIAN_RUSTC);
    let version = process::capture(rustc.arg("-vV").env_remove("LD_LIBRARY_PATH"));
    version.is_ok_and(|text| llvm_major(&text) == Some(DEBIAN_LLVM))
}

/// Parses the LLVM major version of `rustc -vV`.
fn llvm_major(text: &str) -> Option<u32> {
    let version = text.lines().find_map(|line| line.strip_prefix("LLVM version:"))?;
    version.trim().split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_a_rustup_pair_falls_back_to_debian() {
        let (on_path, cached) = (PathBuf::from("/bin/bpf-linker"), PathBuf::from("/cache/bpf-linker"));
        let complete = choice(true, Some(on_path.clone()), cached.clone());
        assert_eq!(complete, BpfToolchain { compiler: Compiler::Rustup, linker: on_path.clone() });
        for half in [choice(true, None, cached.clone()), choice(false, Some(on_path), cached.clone())] {
            assert_eq!(half, BpfToolchain { compiler: Compiler::Debian, linker: cached.clone() });
        }
    }

    #[test]
    fn the_library_is_that_of_the_llvm_version() {
        assert_eq!(LLVM_LIBRARY, format!("libLLVM-{DEBIAN_LLVM}.so"));
    }

    #[test]
    fn reads_the_llvm_version() {
        assert_eq!(llvm_major("rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.63.0\n"), None);
    }
}
