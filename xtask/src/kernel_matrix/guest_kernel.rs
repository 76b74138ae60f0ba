//! Debian's cloud kernels, reduced to the guest's needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use fs_err as fs;
use walkdir::WalkDir;

use super::archive::Archive;
use crate::process::{self, step};
use crate::tree::Tree;

/// The tests' modules in dependency order: for `SOCK_DESTROY`, for namespaces, and for nftables.
const MODULES: &[&str] = &[
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "veth",
    "crc32c_generic",
    "libcrc32c",
    "nfnetlink",
    "nf_defrag_ipv4",
    "nf_defrag_ipv6",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nf_tables",
    "nft_chain_nat",
    "nft_counter",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_numgen",
    "nft_fib",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "nf_reject_ipv4",
    "nf_reject_ipv6",
    "nft_reject",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
];

/// Those that newer kernels lack: built into other code, or not needed.
const OLD_MODULES: &[&str] = &["crc32c_generic", "libcrc32c", "nfnetlink", "nft_counter"];

/// The package that depends on a release's current cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel in the cache folder.
pub(super) struct GuestKernel {
    /// Its `uname -r`.
    pub(super) release: String,
    pub(super) vmlinuz: PathBuf,
    /// The folder `/modules` of the guest, with names in load order.
    pub(super) modules: Tree,
}

impl GuestKernel {
    /// Takes a kernel from the cache, or from the archive if it is not cached or `refresh` is set.
    ///
    /// # Errors
    /// If the archive lacks it, or its packaging is unknown.
    pub(super) fn fetch(archive: &Archive, cache: &Path, suite: &str, refresh: bool) -> Result<Self> {
        let dir = cache.join("cloud-kernels").join(suite);
        if !refresh && let Ok(kernel) = Self::load(&dir) {
            return Ok(kernel);
        }
        step(&format!("downloading the cloud kernel of Debian {suite}"));
        let lists = archive.lists(&[suite], None)?;
        let mut packages = lists.depends(META_PACKAGE)?;
        packages.retain(|package| is_kernel_part(package));
        lists.unpack(&packages, &dir, is_needed)?;
        Self::load(&dir).context("check how this Debian release packages its kernel")
    }

    fn load(dir: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for entry in WalkDir::new(dir) {
            let entry = entry?;
            if entry.file_type().is_file() {
                files.push((entry.file_name().to_string_lossy().into_owned(), entry.into_path()));
            }
        }
        let find = |accept: &dyn Fn(&str) -> bool| {
            files.iter().find(|(name, _)| accept(name)).map(|(_, path)| path.clone())
        };
        let vmlinuz = find(&|name| name.starts_with("vmlinuz"))
            .with_context(|| format!("no vmlinuz in {}", dir.display()))?;
        let release = files
            .iter()
            .find_map(|(_, path)| release_in_path(path))
            .with_context(|| format!("no folder of modules in {}", dir.display()))?;
        let built_in = match find(&|name| name == "modules.builtin") {
            Some(list) => fs::read_to_string(list)?,
            None => String::new(),
        };
        let mut modules = Tree::default();
        for (at, module) in MODULES.iter().enumerate() {
            let name = format!("{module}.ko");
            let plain = if let Some(plain) = find(&|file| file == name) {
                fs::read(plain)?
            } else if let Some(packed) = find(&|file| file == format!("{name}.xz")) {
                process::capture_bytes(Command::new("xz").args(["--decompress", "--stdout"]).arg(packed))?
            } else if built_in.contains(&format!("/{name}")) || OLD_MODULES.contains(module) {
                continue;
            } else {
                bail!(
                    "kernel {release} has no module {module}, which the tests need: find its new name or package"
                );
            };
            modules.add(format!("/modules/{at:02}-{name}"), 0o644, Some(&plain));
        }
        Ok(Self { release, vmlinuz, modules })
    }
}

/// Whether a package has the kernel or its modules.
///
/// Up to trixie that is one package, later two, so packages are recognised by name. The meta package is one
/// of them; it is almost empty.
fn is_kernel_part(package: &str) -> bool {
    package.starts_with("linux-") && package.contains("-cloud-")
}

/// Whether a file of those packages is kept in the cache.
fn is_needed(name: &str) -> bool {
    let is_module = |module| name.strip_prefix(module).is_some_and(|end| end == ".ko" || end == ".ko.xz");
    name.starts_with("vmlinuz") || name == "modules.builtin" || MODULES.iter().any(is_module)
}

/// The release in a path such as `usr/lib/modules/6.1.0-50-cloud-amd64/kernel/net/veth.ko`.
fn release_in_path(file: &Path) -> Option<String> {
    let parts: Vec<_> = file.iter().filter_map(|part| part.to_str()).collect();
    let at = parts.windows(2).position(|pair| pair == ["lib", "modules"])?;
    // The component after the release is in it.
    (parts.len() > at + 3).then(|| parts[at + 2].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_parts_are_known_by_name() {
        for part in ["linux-image-6.1.0-50-cloud-amd64", "linux-modules-7.2.13+deb14-cloud-amd64"] {
            assert!(is_kernel_part(part));
        }
        for other in ["linux-base", "kmod", "linux-initramfs-tool"] {
            assert!(!is_kernel_part(other));
        }
    }

    #[test]
    fn the_release_is_read_from_the_module_folder() {
        let path = Path::new("/c/usr/lib/modules/7.2.13+deb14-cloud-amd64/vmlinuz");
        assert_eq!(release_in_path(path).as_deref(), Some("7.2.13+deb14-cloud-amd64"));
        assert_eq!(release_in_path(Path::new("/c/boot/vmlinuz-6.1.0")), None);
    }

    #[test]
    fn a_cached_kernel_has_its_modules_in_load_order() {
        let dir = tempfile::tempdir().unwrap();
        let release = dir.path().join("usr/lib/modules/6.1.0-cloud-amd64");
        fs::create_dir_all(release.join("net")).unwrap();
        let built_in = MODULES.iter().filter(|name| !["udp_diag", "veth"].contains(name));
        let built_in = built_in.flat_map(|name| ["kernel/net/", name, ".ko\n"]).collect::<String>();
        fs::write(release.join("modules.builtin"), built_in).unwrap();
        fs::write(release.join("net/veth.ko"), "veth").unwrap();
        fs::write(release.join("net/udp_diag.ko"), "udp").unwrap();
        let error = |result: Result<GuestKernel>| result.err().unwrap().to_string();
        assert!(error(GuestKernel::load(dir.path())).contains("no vmlinuz"));
        fs::write(release.join("vmlinuz"), "").unwrap();
        let kernel = GuestKernel::load(dir.path()).unwrap();
        assert_eq!(kernel.release, "6.1.0-cloud-amd64");
        let mut expected = Tree::default();
        expected.add("modules/02-udp_diag.ko", 0o644, Some(b"udp"));
        expected.add("modules/03-veth.ko", 0o644, Some(b"veth"));
        assert_eq!(kernel.modules, expected);
        fs::remove_file(release.join("net/veth.ko")).unwrap();
        assert!(error(GuestKernel::load(dir.path())).contains("no module veth"));
    }
}
