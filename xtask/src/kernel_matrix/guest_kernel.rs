//! Debian's cloud kernels, reduced to the guest's needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::archive::{self, Archive, Lists};
use crate::process::{self, step};

/// The tests' modules in dependency order; the first three are for `SOCK_DESTROY`.
const MODULES: &[&str] = &["inet_diag", "tcp_diag", "udp_diag", "veth"];

/// The package that depends on a release's current cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel in the cache folder.
pub(super) struct GuestKernel {
    /// Its `uname -r`.
    pub(super) release: String,
    pub(super) vmlinuz: PathBuf,
    /// File name and content, in load order.
    pub(super) modules: Vec<(String, Vec<u8>)>,
}

impl GuestKernel {
    /// Takes a kernel from the cache, or from the archive if it is not cached or `refresh` is set.
    ///
    /// # Errors
    /// If the archive lacks it, or its packaging is unknown.
    pub(super) fn fetch(archive: &Archive, cache: &Path, suite: &str, refresh: bool) -> Result<Self> {
        let dir = cache.join("kernels").join(suite);
        if !refresh && let Ok(kernel) = Self::load(&dir) {
            return Ok(kernel);
        }
        step(&format!("downloading the cloud kernel of Debian {suite}"));
        let unpacked = cache.join("kernels").join(format!("{suite}.unpacked"));
        let lists = archive.lists(&[suite], None)?;
        let packages = kernel_packages(&lists)?;
        lists.unpack(&packages, &unpacked)?;
        let reduced = cache.join("kernels").join(format!("{suite}.new"));
        reduce(&unpacked, &reduced)?;
        archive::recreate(&dir)?;
        fs::rename(&reduced, &dir).with_context(|| format!("cannot replace {}: delete it", dir.display()))?;
        fs::remove_dir_all(&unpacked)
            .with_context(|| format!("cannot delete {}: delete it", unpacked.display()))?;
        Self::load(&dir)
    }

    fn load(dir: &Path) -> Result<Self> {
        let context = || format!("no kernel in {}: run the command again with --refresh", dir.display());
        let release = fs::read_to_string(dir.join("release")).with_context(context)?;
        let vmlinuz = dir.join("vmlinuz");
        if !vmlinuz.is_file() {
            bail!(context());
        }
        let mut modules = Vec::new();
        for entry in fs::read_dir(dir.join("modules")).with_context(context)? {
            let path = entry.with_context(context)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            modules.push((name, fs::read(&path).with_context(context)?));
        }
        modules.sort();
        Ok(Self { release, vmlinuz, modules })
    }
}

/// Finds the packages with the image and the modules of the meta package.
///
/// Up to trixie that is one package, later two, so packages are recognised by name.
fn kernel_packages(lists: &Lists) -> Result<Vec<String>> {
    let mut packages = vec![META_PACKAGE.to_owned()];
    let mut at = 0;
    while at < packages.len() {
        for package in lists.depends(&packages[at])? {
            if is_kernel_part(&package) && !packages.contains(&package) {
                packages.push(package);
            }
        }
        at += 1;
    }
    if packages.len() == 1 {
        bail!("{META_PACKAGE} names no kernel: check how this Debian release packages its kernel");
    }
    Ok(packages.split_off(1))
}

fn is_kernel_part(package: &str) -> bool {
    package.starts_with("linux-") && package.contains("-cloud-")
}

/// Copies the image and the modules from unpacked packages.
fn reduce(unpacked: &Path, to: &Path) -> Result<()> {
    archive::recreate(&to.join("modules"))?;
    let mut files = Vec::new();
    list_files(unpacked, &mut files)?;
    let find = |accept: &dyn Fn(&str) -> bool| {
        files.iter().find(|file| file.file_name().and_then(|name| name.to_str()).is_some_and(accept))
    };
    let Some(vmlinuz) = find(&|name| name == "vmlinuz" || name.starts_with("vmlinuz-")) else {
        bail!("the kernel package holds no vmlinuz: check how this Debian release packages its kernel");
    };
    let Some(release) = files.iter().find_map(|file| release_in_path(file)) else {
        bail!("the kernel package holds no module folder: check how this Debian release packages its kernel");
    };
    let copy = |from: &Path, to: &Path| {
        fs::copy(from, to)
            .with_context(|| format!("cannot write {}: check its owner and the disk", to.display()))
    };
    copy(vmlinuz, &to.join("vmlinuz"))?;
    let built_in = find(&|name| name == "modules.builtin")
        .and_then(|file| fs::read_to_string(file).ok())
        .unwrap_or_default();
    for (at, module) in MODULES.iter().enumerate() {
        let target = to.join("modules").join(format!("{at}-{module}.ko"));
        if let Some(plain) = find(&|name| name == format!("{module}.ko")) {
            copy(plain, &target)?;
        } else if let Some(packed) = find(&|name| name == format!("{module}.ko.xz")) {
            let packed_copy = target.with_extension("ko.xz");
            copy(packed, &packed_copy)?;
            process::capture(Command::new("xz").arg("--decompress").arg(&packed_copy))?;
        } else if !built_in.contains(&format!("/{module}.ko")) {
            bail!(
                "kernel {release} has no module {module}, which the tests need: find its new name or package"
            );
        }
    }
    fs::write(to.join("release"), release).context("cannot write the kernel's release: check the disk")
}

/// The release in a path such as `usr/lib/modules/6.1.0-50-cloud-amd64/kernel/net/veth.ko`.
fn release_in_path(file: &Path) -> Option<String> {
    let parts: Vec<_> = file.iter().filter_map(|part| part.to_str()).collect();
    let at = parts.windows(2).position(|pair| pair == ["lib", "modules"])?;
    // The component after the release is in it.
    (parts.len() > at + 3).then(|| parts[at + 2].to_owned())
}

fn list_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(dir).with_context(|| format!("cannot list {}: check its owner", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}: check the disk", dir.display()))?;
        let kind = entry.file_type().context("cannot read a file's type")?;
        if kind.is_dir() {
            list_files(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
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
}
