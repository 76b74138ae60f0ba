//! `cargo xtask image`: a container image of `socklb`, without a container engine.
//!
//! An archive in the OCI image layout (<https://github.com/opencontainers/image-spec>), which `kind load
//! image-archive`, `ctr images import`, `podman load` and `skopeo` read, with the `manifest.json` of `docker
//! load`. It has one layer with the binary and its libraries, without a shell or a package manager. The same
//! binary and libraries give the same bytes.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use flate2::{Compression, GzBuilder};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::build;
use crate::process::{self, step};
use crate::setup::{self, Purpose};
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

/// Debian's certificate authorities, for API servers whose kubeconfig names none.
const AUTHORITIES: &str = "etc/ssl/certs/ca-certificates.crt";

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

/// A file or folder of the image.
#[derive(Clone, PartialEq, Eq)]
enum Entry {
    File { contents: Vec<u8>, mode: u32 },
    Folder { mode: u32 },
}

/// The image's contents, by path without a leading slash.
type Tree = BTreeMap<String, Entry>;

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
    let mut tree: Tree = TEXTS
        .iter()
        .map(|(path, text)| {
            ((*path).to_owned(), Entry::File { contents: text.as_bytes().to_vec(), mode: 0o644 })
        })
        .collect();
    let mut add = |to: &str, from: &Path, mode: u32| -> Result<()> {
        let contents =
            fs::read(from).with_context(|| format!("cannot read {}: build again", from.display()))?;
        tree.insert(to.to_owned(), Entry::File { contents, mode });
        Ok(())
    };
    add(BINARY, binary, 0o755)?;
    // The loader searches for these names, whatever the files are called.
    for library in libraries(&process::capture(Command::new("ldd").arg(binary))?)? {
        let name = library.to_string_lossy().trim_start_matches('/').to_owned();
        add(&name, &library, 0o755)?;
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        add(&format!("usr/share/doc/socklb/{licence}"), &root.join(licence), 0o644)?;
    }
    // Debian's copyright files of the libraries and the authorities.
    for package in ["libc6", "libgcc-s1", "ca-certificates"] {
        let name = format!("usr/share/doc/{package}/copyright");
        let path = Path::new("/").join(&name);
        if path.is_file() {
            add(&name, &path, 0o644)?;
        }
    }
    let authorities = Path::new("/").join(AUTHORITIES);
    if authorities.is_file() {
        add(AUTHORITIES, &authorities, 0o644)?;
    }
    let folders = FOLDERS.iter().map(|(path, mode)| ((*path).to_owned(), Entry::Folder { mode: *mode }));
    tree.extend(folders);
    with_parents(&mut tree);
    Ok(tree)
}

/// Adds the parent folders of all entries, so that their modes do not depend on the unpacker.
fn with_parents(tree: &mut Tree) {
    let above = |path: &str| -> Vec<String> {
        path.match_indices('/').map(|(end, _)| path[..end].to_owned()).collect()
    };
    let parents: Vec<String> = tree.keys().flat_map(|path| above(path)).collect();
    for parent in parents {
        tree.entry(parent).or_insert(Entry::Folder { mode: 0o755 });
    }
}

/// A tar header without fields that differ between runs.
fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// The files as one uncompressed layer.
fn layer(tree: &Tree) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, entry) in tree {
        match entry {
            Entry::Folder { mode } => {
                let mut header = header(tar::EntryType::Directory, 0, *mode);
                tar.append_data(&mut header, format!("{path}/"), std::io::empty())?;
            }
            Entry::File { contents, mode } => {
                let mut header = header(tar::EntryType::Regular, contents.len() as u64, *mode);
                tar.append_data(&mut header, path, contents.as_slice())?;
            }
        }
    }
    Ok(tar.into_inner()?)
}

fn compress(data: &[u8]) -> Result<Vec<u8>> {
    // Without a time stamp. The best compression takes three times as long and saves less than 1 %.
    let mut gz = GzBuilder::new().mtime(0).write(Vec::new(), Compression::default());
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
    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    let plain = layer(tree)?;
    let mut blobs: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut blob = |media_type: &str, data: Vec<u8>| {
        let (digest, size) = (sha256(&data), data.len());
        blobs.insert(digest.clone(), data);
        json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size })
    };
    let layer = blob(LAYER, compress(&plain)?);
    let config = blob(
        CONFIG,
        serde_json::to_vec(&json!({
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
        }))?,
    );
    let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer] });
    let mut manifest = blob(MANIFEST, serde_json::to_vec(&manifest)?);
    manifest["annotations"] = json!({
        // For readers of the layout, and for containerd, which needs the full name.
        "org.opencontainers.image.ref.name": env!("CARGO_PKG_VERSION"),
        "io.containerd.image.name": NAME,
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] });
    let path_of = |descriptor: &serde_json::Value| {
        format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
    };
    let for_docker = json!([{ "Config": path_of(&config), "RepoTags": [NAME], "Layers": [path_of(&layer)] }]);

    let mut files: Tree = BTreeMap::new();
    let file = |contents: Vec<u8>| Entry::File { contents, mode: 0o644 };
    files.insert(
        "oci-layout".to_owned(),
        file(serde_json::to_vec(&json!({ "imageLayoutVersion": "1.0.0" }))?),
    );
    files.insert("index.json".to_owned(), file(serde_json::to_vec(&index)?));
    files.insert("manifest.json".to_owned(), file(serde_json::to_vec(&for_docker)?));
    files.extend(blobs.into_iter().map(|(digest, data)| (format!("blobs/sha256/{digest}"), file(data))));
    with_parents(&mut files);
    self::layer(&files)
}

/// Writes the contents to a new folder.
fn unpack(tree: &Tree, directory: &Path) -> Result<()> {
    if directory.exists() {
        bail!("--unpacked {}: exists: name a new folder", directory.display());
    }
    fs::create_dir_all(directory).with_context(|| {
        format!("--unpacked {}: cannot be created: name another folder", directory.display())
    })?;
    let tar = layer(tree)?;
    let mut reader = tar::Archive::new(tar.as_slice());
    reader.set_preserve_permissions(true);
    reader
        .unpack(directory)
        .with_context(|| format!("--unpacked {}: cannot be written: check the disk", directory.display()))
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
    let toolchain = setup::ensure(&[Purpose::Build, Purpose::Image])?;
    let object = build::bpf_object(workspace, &toolchain)?;
    let binary = build::socklb(workspace, object.as_os_str(), true, false)?;
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
