use std::env;
use std::io::Read as _;

use flate2::read::GzDecoder;
use serde_json::Value;

use super::*;

/// The limit for the whole archive.
const MAX_BYTES: usize = 30_000_000;

fn sample() -> Tree {
    let mut tree = Tree::from([
        (BINARY.to_owned(), Entry::File { contents: b"binary".to_vec(), mode: 0o755 }),
        ("tmp".to_owned(), Entry::Folder { mode: 0o1777 }),
    ]);
    with_parents(&mut tree);
    tree
}

/// The files of a tar archive.
fn files(tar: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(tar);
    let entries = archive.entries().unwrap().map(Result::unwrap);
    let files = entries.filter(|entry| entry.header().entry_type().is_file());
    files
        .map(|mut entry| {
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents).unwrap();
            (entry.path().unwrap().to_str().unwrap().to_owned(), contents)
        })
        .collect()
}

/// Reads an archive as the specification says, and returns its layer. Every digest and size on the way must be right.
fn read(archive: &[u8]) -> Vec<u8> {
    let files = files(archive);
    let json = |data: &[u8]| -> Value { serde_json::from_slice(data).unwrap() };
    let blob = |descriptor: &Value, media_type: &str| -> &[u8] {
        assert_eq!(descriptor["mediaType"], media_type);
        let digest = descriptor["digest"].as_str().unwrap();
        let data = &files[&format!("blobs/{}", digest.replace(':', "/"))];
        assert_eq!(format!("sha256:{}", sha256(data)), digest);
        assert_eq!(descriptor["size"], data.len());
        data
    };
    assert_eq!(json(&files["oci-layout"]), json!({ "imageLayoutVersion": "1.0.0" }));
    let index = json(&files["index.json"]);
    assert_eq!((&index["schemaVersion"], index["manifests"].as_array().unwrap().len()), (&json!(2), 1));
    let descriptor = &index["manifests"][0];
    assert_eq!(descriptor["annotations"]["io.containerd.image.name"], NAME);
    let manifest = json(blob(descriptor, "application/vnd.oci.image.manifest.v1+json"));
    assert_eq!((&manifest["schemaVersion"], manifest["layers"].as_array().unwrap().len()), (&json!(2), 1));
    let config = json(blob(&manifest["config"], "application/vnd.oci.image.config.v1+json"));
    assert_eq!(config["config"]["Entrypoint"], json!(["/usr/local/bin/socklb"]));
    assert_eq!(config["os"], "linux");
    let mut plain = Vec::new();
    let layer = blob(&manifest["layers"][0], "application/vnd.oci.image.layer.v1.tar+gzip");
    GzDecoder::new(layer).read_to_end(&mut plain).unwrap();
    let diff_ids = json!([format!("sha256:{}", sha256(&plain))]);
    assert_eq!(config["rootfs"], json!({ "type": "layers", "diff_ids": diff_ids }));
    // The same blobs under the names of `docker load`.
    let for_docker = json(&files["manifest.json"]);
    assert_eq!(for_docker[0]["RepoTags"][0], NAME);
    for name in [&for_docker[0]["Config"], &for_docker[0]["Layers"][0]] {
        assert!(files.contains_key(name.as_str().unwrap()), "{name}");
    }
    plain
}

#[test]
fn the_archive_is_an_image_layout_with_right_digests() {
    let layer = read(&archive(&sample()).unwrap());
    assert_eq!(files(&layer)[BINARY], b"binary");
}

#[test]
fn equal_files_make_equal_bytes() {
    assert!(archive(&sample()).unwrap() == archive(&sample()).unwrap());
}

#[test]
fn folders_come_before_what_they_hold_and_have_their_modes() {
    let layer = layer(&sample()).unwrap();
    let mut archive = tar::Archive::new(layer.as_slice());
    let listed: Vec<(String, u32)> = archive
        .entries()
        .unwrap()
        .map(Result::unwrap)
        .map(|entry| (entry.path().unwrap().to_str().unwrap().to_owned(), entry.header().mode().unwrap()))
        .collect();
    let expected = [
        ("tmp/", 0o1777),
        ("usr/", 0o755),
        ("usr/local/", 0o755),
        ("usr/local/bin/", 0o755),
        ("usr/local/bin/socklb", 0o755),
    ];
    assert_eq!(listed, expected.map(|(path, mode)| (path.to_owned(), mode)));
}

#[test]
fn libraries_are_read_from_ldd() {
    let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
    let found = libraries(text).unwrap();
    assert_eq!(found, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from));
    assert_eq!(libraries("\tstatically linked\n").unwrap(), [""; 0].map(PathBuf::from));
    assert!(libraries("\tlibx.so => not found\n").unwrap_err().to_string().starts_with("libx.so is not"));
}

/// Runs a program of the image with the image as its root, in a mount namespace of its own. The file system of the image
/// is only read, and pins are at the place of the manifests.
fn run(root: &Path, args: &[&str]) -> std::process::Output {
    const MOUNTS: &str = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" && \
                          for name in proc sys dev; do mount --rbind /$name \"$1/$name\" || exit; done && \
                          mount -t tmpfs none \"$1/tmp\" && mount -t bpf none \"$1/host/bpf\" && root=$1 && shift && exec chroot \"$root\" \"$@\"";
    Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", MOUNTS, "sh"])
        .arg(root)
        .arg(format!("/{BINARY}"))
        .args(args)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .unwrap()
}

/// The image holds all that the binary needs: it runs where nothing else is.
#[test]
fn the_binary_runs_with_the_image_as_its_root() {
    let Some(binary) = env::var_os("SOCKLB_BIN").filter(|_| process::is_root()) else {
        eprintln!("SKIPPED: it needs root, and SOCKLB_BIN, which `cargo xtask test` sets");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let small = directory.path().join("stripped");
    stripped(Path::new(&binary), &small).unwrap();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let archive = archive(&tree(workspace, &small).unwrap()).unwrap();
    assert!(archive.len() < MAX_BYTES, "{} bytes", archive.len());

    let root = directory.path().join("root");
    fs::create_dir(&root).unwrap();
    let layer = read(&archive);
    let mut layer = tar::Archive::new(layer.as_slice());
    layer.set_preserve_permissions(true);
    layer.unpack(&root).unwrap();

    let version = run(&root, &["--version"]);
    assert_eq!(String::from_utf8_lossy(&version.stdout), concat!("socklb ", env!("CARGO_PKG_VERSION"), "\n"));
    let check = run(&root, &["check", "--pin-path", "/host/bpf/socklb"]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.success() && said.contains("the kernel's verifier takes"), "{said}{check:?}");
    // In namespaces and a cgroup of its own.
    let demo = run(&root, &["demo", "--exit"]);
    let said = String::from_utf8_lossy(&demo.stdout).into_owned();
    assert!(demo.status.success() && said.contains("checks hold"), "{said}{demo:?}");
}
