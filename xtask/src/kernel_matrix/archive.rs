//! Packages of other Debian releases, downloaded and unpacked but not installed.
//!
//! Each release has its own package lists in the cache folder, invisible to the system's apt. Needs no root.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use fs_err as fs;
use walkdir::WalkDir;

use crate::process;

/// Keys of all Debian releases, from the package debian-archive-keyring, which every Debian has.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The archive of this system's apt.
pub(super) struct Archive {
    mirror: String,
    /// The code name of this system's release.
    pub(super) system: String,
    dir: PathBuf,
}

impl Archive {
    /// Reads the system's apt configuration.
    ///
    /// # Errors
    /// If this system is not Debian or has no Debian archive configured.
    pub(super) fn locate(cache: &Path) -> Result<Self> {
        let Some(system) = debian_release(&fs::read_to_string("/etc/os-release")?) else {
            bail!(
                "kernels and QEMU for the matrix come from the Debian archive: run this on Debian 12 or newer"
            );
        };
        let format = "$(RELEASE) $(COMPONENT) $(REPO_URI) $(ORIGIN)";
        let mut targets = Command::new("apt-get");
        targets.args(["indextargets", "--format", format, "Identifier: Packages"]);
        let Some(mirror) = mirror(&process::capture(&mut targets)?, &system) else {
            bail!(
                "apt has no source for main of {system}: add the Debian archive to /etc/apt/sources.list.d"
            );
        };
        Ok(Self { mirror, system, dir: cache.join("apt") })
    }

    /// Fetches the package lists of some releases. `status` is the dpkg status to plan installs against.
    ///
    /// # Errors
    /// If the lists cannot be fetched.
    pub(super) fn lists(&self, releases: &[&str], status: Option<&Path>) -> Result<Lists> {
        let dir = self.dir.join(releases.join("+"));
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        for folder in ["lists/partial", "cache/archives/partial", "debs", "empty"] {
            fs::create_dir_all(dir.join(folder))?;
        }
        let source = |release| format!("deb [signed-by={KEYRING}] {} {release} main\n", self.mirror);
        fs::write(dir.join("sources.list"), releases.iter().map(source).collect::<String>())?;
        fs::write(dir.join("status"), "")?;
        let status = status.map_or_else(|| dir.join("status"), Path::to_owned);
        fs::write(dir.join("apt.conf"), configuration(&dir, &status))?;
        let lists = Lists { dir };
        lists
            .apt("apt-get", &["update"])
            .context("check the network, and that the mirror in apt's sources has this release")?;
        Ok(lists)
    }
}

/// Private package lists.
pub(super) struct Lists {
    dir: PathBuf,
}

impl Lists {
    /// Runs an apt command on these lists only, with the system's settings for proxies and the like, and
    /// returns its output.
    fn apt(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        // Not the variable APT_CONFIG: its file is read before the system's files, which then override it.
        command.arg("--config-file").arg(self.dir.join("apt.conf")).arg("--quiet").env("LC_ALL", "C");
        // `download` writes to the current folder.
        process::capture(command.args(args).current_dir(self.dir.join("debs")))
    }

    /// A package and its dependencies, with theirs.
    ///
    /// # Errors
    /// If apt does not know the package.
    pub(super) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let args = ["depends", "--recurse", "--important", package];
        Ok(parse_depends(&self.apt("apt-cache", &args)?))
    }

    /// All packages that installing a package of a release would install.
    ///
    /// # Errors
    /// If apt finds no solution.
    pub(super) fn would_install(&self, package: &str, release: &str) -> Result<Vec<String>> {
        let args = ["--simulate", "--no-install-recommends", "--target-release", release, "install", package];
        Ok(parse_simulation(&self.apt("apt-get", &args)?))
    }

    /// Downloads packages, unpacks the files with needed names into the folder `root`, which it replaces, and
    /// deletes the lists, the larger part of the cache.
    ///
    /// # Errors
    /// If a package cannot be fetched or unpacked.
    pub(super) fn unpack(self, packages: &[String], root: &Path, is_needed: fn(&str) -> bool) -> Result<()> {
        let packages = packages.iter().map(String::as_str);
        self.apt("apt-get", &["download"].into_iter().chain(packages).collect::<Vec<_>>())
            .context("check the network, then run the command again with --refresh")?;
        let new = self.dir.join("root");
        fs::create_dir(&new)?;
        for deb in fs::read_dir(self.dir.join("debs"))? {
            process::capture(Command::new("dpkg-deb").arg("--extract").arg(deb?.path()).arg(&new))?;
        }
        for entry in WalkDir::new(&new) {
            let entry = entry?;
            if !entry.file_type().is_dir() && !entry.file_name().to_str().is_some_and(is_needed) {
                fs::remove_file(entry.path())?;
            }
        }
        if root.exists() {
            fs::remove_dir_all(root)?;
        }
        fs::create_dir_all(root.parent().unwrap_or(root))?;
        fs::rename(new, root)?;
        Ok(fs::remove_dir_all(self.dir)?)
    }
}

/// The apt configuration of package lists in `dir`.
fn configuration(dir: &Path, status: &Path) -> String {
    let (dir, status) = (dir.display(), status.display());
    let settings = [
        ("Dir::State::Lists", format!("{dir}/lists")),
        ("Dir::State::Status", status.to_string()),
        ("Dir::Cache", format!("{dir}/cache")),
        ("Dir::Etc::SourceList", format!("{dir}/sources.list")),
        ("Dir::Etc::SourceParts", format!("{dir}/empty")),
        ("Dir::Etc::Preferences", format!("{dir}/preferences")),
        ("Dir::Etc::PreferencesParts", format!("{dir}/empty")),
        ("Acquire::Languages", "none".to_owned()),
        // An outdated mirror is good enough for tests; signatures are still checked.
        ("Acquire::Check-Valid-Until", "false".to_owned()),
        // apt's own user cannot read a cache below root's home.
        ("APT::Sandbox::User", "root".to_owned()),
    ];
    settings.iter().map(|(name, value)| [name, " \"", value, "\";\n"].concat()).collect()
}

/// The code name in `/etc/os-release`, if the system is Debian.
fn debian_release(os: &str) -> Option<String> {
    let field =
        |name| os.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim_matches('"'));
    (field("ID=") == Some("debian")).then(|| field("VERSION_CODENAME=").map(str::to_owned)).flatten()
}

/// The URL of the Debian archive in apt's lines `RELEASE COMPONENT URI ORIGIN`.
fn mirror(targets: &str, system: &str) -> Option<String> {
    let fields = targets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let of_system: Vec<_> = fields.filter(|f| f.len() >= 3 && f[0] == system && f[1] == "main").collect();
    // Other vendors use Debian's code names too. The origin is empty until the lists are fetched.
    let by_origin = of_system.iter().find(|fields| fields.get(3) == Some(&"Debian"));
    let by_name = || of_system.iter().find(|fields| fields[2].trim_end_matches('/').ends_with("/debian"));
    by_origin.or_else(by_name).map(|fields| fields[2].to_owned())
}

/// The packages in the output of `apt-cache depends --recurse`: each is a line, its dependencies follow
/// indented.
fn parse_depends(text: &str) -> Vec<String> {
    text.lines().filter(|line| !line.starts_with([' ', '<'])).map(str::to_owned).collect()
}

fn parse_simulation(text: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("Inst "));
    // Name, replaced version in brackets if any, new version in parentheses.
    let versions = |line: &str| {
        let name = line.split_whitespace().next()?;
        let version = line.split_once('(')?.1.split_whitespace().next()?;
        Some(format!("{name}={version}"))
    };
    lines.filter_map(versions).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_has_a_release() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(debian_release(debian).as_deref(), Some("bookworm"));
        assert_eq!(debian_release("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n"), None);
    }

    #[test]
    fn the_mirror_is_debians_own() {
        let targets = "bookworm main http://other.example/apt/ Other\n\
                       bookworm-updates main http://mirror.example/debian/ Debian\n\
                       bookworm main http://mirror.example/debian/ Debian\n";
        assert_eq!(mirror(targets, "bookworm").as_deref(), Some("http://mirror.example/debian/"));
        let no_lists_yet =
            "bookworm main http://other.example/apt/ \nbookworm main http://mirror.example/debian \n";
        assert_eq!(mirror(no_lists_yet, "bookworm").as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(mirror("bookworm stable http://other.example/debian/ \n", "bookworm"), None);
    }

    #[test]
    fn reads_what_apt_prints() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-50-cloud-amd64\n\
                       linux-image-6.1.0-50-cloud-amd64\n |Depends: x\n  Depends: <y>\n<y>\n";
        assert_eq!(parse_depends(depends), ["linux-image-cloud-amd64", "linux-image-6.1.0-50-cloud-amd64"]);
        let simulation = "Remv qemu-utils [1:7.2]\n\
                          Inst seabios (1.16.3-2~bpo12+1 Debian Backports:oldstable-backports [all])\n\
                          Inst libx [1.0] (1.1 Debian:12.15/oldstable [amd64])\n\
                          Conf seabios (1.16.3-2~bpo12+1 Debian Backports:oldstable-backports [all])\n";
        assert_eq!(parse_simulation(simulation), ["seabios=1.16.3-2~bpo12+1", "libx=1.1"]);
    }
}
