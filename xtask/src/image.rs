//! `cargo xtask image`: a container image of `socklb`, without a container engine.
//!
//! An archive in the OCI image layout (<https://github.com/opencontainers/image-spec>), which `kind load
//! image-archive`, `ctr images import`, `podman load` and `skopeo` read, with the `manifest.json` of `docker
//! load`. It has one layer with the binary and its libraries, without a shell or a package manager. The same
//! binary and libraries give the same bytes.

use std::env::consts::ARCH;
use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::build;
use crate::process::{self, step};
use crate::setup::Purpose;
use crate::tree::Tree;
use crate::workspace::Workspace;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Path of the archive [default: target/socklb-image.tar]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write the image's files into this folder instead, for a builder to copy (see Containerfile)
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    unpacked: Option<PathBuf>,
}

/// The image's name. No registry has this host, so no engine tries to pull it.
const NAME: &str = concat!("localhost/socklb:", env!("CARGO_PKG_VERSION"));

/// Path of the binary in the image.
const BINARY: &str = "usr/local/bin/socklb";

/// Files of the build machine, as far as it has them: Debian's certificate authorities, for API servers whose
/// kubeconfig names none, and the copyright files of what the image contains.
const HOST_FILES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/usr/share/doc/libc6/copyright",
    "/usr/share/doc/libgcc-s1/copyright",
    "/usr/share/doc/ca-certificates/copyright",
];

/// Mount points, since a read-only root cannot get new ones.
const FOLDERS: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc/socklb", 0o755),
    ("host", 0o755),
    ("host/bpf", 0o755),
    ("host/cgroup", 0o755),
    ("host/netns", 0o755),
    ("proc", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var/lib/socklb", 0o755),
];

/// Files that the C library reads.
const TEXTS: &[(&str, &str)] = &[
    ("etc/passwd", "root:x:0:0:root:/:/sbin/nologin\n"),
    ("etc/group", "root:x:0:\n"),
    ("etc/nsswitch.conf", "hosts: files dns\n"),
];

/// The libraries that the dynamic loader loads, from the output of `ldd`.
fn libraries(ldd: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in ldd.lines().map(str::trim) {
        let path = match line.split_once(" => ") {
            Some((name, "not found")) => bail!("{name} is not installed: install it, then build again"),
            Some((_, path)) => path,
            None => line,
        };
        // The vDSO has a name and no path.
        let Some(path) = path.split(" (0x").next().filter(|path| path.starts_with('/')) else { continue };
        found.push(PathBuf::from(path));
    }
    Ok(found)
}

/// The contents of the image of a binary.
///
/// # Errors
/// If a file cannot be read or `ldd` fails.
fn tree(root: &Path, binary: &Path) -> Result<Tree> {
    let mut tree = Tree::default();
    for (path, mode) in FOLDERS {
        tree.add(path, *mode, None);
    }
    for (path, text) in TEXTS {
        tree.add(path, 0o644, Some(text.as_bytes()));
    }
    tree.copy(binary, BINARY, 0o755)?;
    // The loader searches for these names, whatever the files are called.
    for library in libraries(&process::capture(Command::new("ldd").arg(binary))?)? {
        tree.copy(&library, &library, 0o755)?;
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        tree.copy(&root.join(licence), format!("usr/share/doc/socklb/{licence}"), 0o644)?;
    }
    for path in HOST_FILES.iter().map(Path::new).filter(|path| path.is_file()) {
        tree.copy(path, path, 0o644)?;
    }
    Ok(tree)
}

fn compress(data: &[u8]) -> Result<Vec<u8>> {
    // Without a time stamp. The best compression takes three times as long and saves less than 1 %.
    let mut gz = GzEncoder::new(Vec::new(), Compression::default());
    gz.write_all(data)?;
    Ok(gz.finish()?)
}

fn sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().fold(String::new(), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

/// The image format's name of this architecture.
fn architecture() -> &'static str {
    match ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The archive with one layer.
fn archive(tree: &Tree) -> Result<Vec<u8>> {
    let mut files = Tree::default();
    let mut add = |path: &str, data: &[u8]| files.add(path, 0o644, Some(data));
    // Adds a blob and returns its descriptor.
    let mut blob = |kind: &str, data: &[u8]| {
        let digest = sha256(data);
        add(&format!("blobs/sha256/{digest}"), data);
        let media_type = format!("application/vnd.oci.image.{kind}");
        json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": data.len() })
    };
    let plain = tree.tar()?;
    let layer = blob("layer.v1.tar+gzip", &compress(&plain)?);
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Entrypoint": [format!("/{BINARY}")],
            "Cmd": ["run"],
            "Env": ["PATH=/usr/local/bin"],
            "Labels": {
                "org.opencontainers.image.title": "socklb",
                "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                "org.opencontainers.image.licenses": "Apache-2.0 OR MIT",
            },
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", sha256(&plain))] },
    });
    let config = blob("config.v1+json", config.to_string().as_bytes());
    let kind = "manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": format!("application/vnd.oci.image.{kind}"),
        "config": config,
        "layers": [layer],
    });
    let mut manifest = blob(kind, manifest.to_string().as_bytes());
    manifest["annotations"] = json!({
        // For readers of the layout, and for containerd, which needs the full name.
        "org.opencontainers.image.ref.name": env!("CARGO_PKG_VERSION"),
        "io.containerd.image.name": NAME,
    });
    let path_of = |descriptor: &serde_json::Value| {
        format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
    };
    let for_docker = json!([{ "Config": path_of(&config), "RepoTags": [NAME], "Layers": [path_of(&layer)] }]);
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    add("index.json", index.to_string().as_bytes());
    add("manifest.json", for_docker.to_string().as_bytes());
    files.tar()
}

/// Writes the contents to a new folder.
fn unpack(tree: &Tree, directory: &Path) -> Result<()> {
    if directory.exists() {
        bail!("--unpacked {}: exists: name a new folder", directory.display());
    }
    let tar = tree.tar()?;
    let mut reader = tar::Archive::new(tar.as_slice());
    reader.set_preserve_permissions(true);
    fs::create_dir_all(directory).and_then(|()| reader.unpack(directory)).with_context(|| {
        format!("--unpacked {}: cannot be written: name another folder", directory.display())
    })
}

/// A stripped copy of a binary.
fn stripped(binary: &Path, copy: &Path) -> Result<()> {
    let mut strip = Command::new("strip");
    strip.arg("--strip-all").arg("-o").arg(copy).arg(binary);
    process::run(&mut strip, "install binutils, which comes with gcc")
}

/// Runs `cargo xtask image`.
///
/// # Errors
/// If building fails or the archive cannot be written.
pub(crate) fn command(workspace: &Workspace, options: &Options) -> Result<()> {
    let object = build::object(workspace, &[Purpose::Build, Purpose::Image])?;
    let binary = build::socklb(workspace, &object, true, false)?;
    let small = workspace.target.join("socklb.stripped");
    stripped(&binary, &small)?;
    let tree = tree(&workspace.root, &small)?;
    if let Some(directory) = &options.unpacked {
        step(&format!("writing the files of {NAME}"));
        unpack(&tree, directory)?;
        println!("{}", directory.display());
        return Ok(());
    }
    step(&format!("writing {NAME}"));
    let output = options.output.clone().unwrap_or_else(|| workspace.target.join("socklb-image.tar"));
    let data = archive(&tree)?;
    fs::write(&output, &data)
        .with_context(|| format!("--output {}: cannot be written: name another file", output.display()))?;
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let size = data.len() as f64 / f64::from(1 << 20);
    println!("{} ({NAME}, {size:.1} MiB)", output.display());
    Ok(())
}

#[cfg(test)]
mod tests;
