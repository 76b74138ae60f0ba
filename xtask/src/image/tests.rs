use std::collections::BTreeMap;
use std::env;
use std::io::Read as _;
use std::process::{Child, Output};
use std::thread;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;
use serde_json::Value;

use super::*;

/// Maximum size of the archive, in octets.
const MAX_BYTES: usize = 30_000_000;

fn sample() -> Tree {
    let mut tree = Tree::default();
    tree.add(BINARY, 0o755, Some(b"binary"));
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

/// Reads an archive as the specification says, and returns its layer. Checks every digest and size.
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
    // The same blobs under the names that `docker load` expects.
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
fn libraries_are_read_from_ldd() {
    let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
    let found = libraries(text).unwrap();
    assert_eq!(found, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from));
    assert_eq!(libraries("\tstatically linked\n").unwrap(), [""; 0].map(PathBuf::from));
    assert!(libraries("\tlibx.so => not found\n").unwrap_err().to_string().starts_with("libx.so is not"));
}

/// A private containerd, with its own folders, socket and mount namespace.
struct Containerd {
    daemon: Child,
    directory: tempfile::TempDir,
    /// The containerd namespace, which is also the name of runc's parent cgroups.
    namespace: String,
}

impl Containerd {
    fn start() -> Self {
        // The disabled plug-in needs a network for pods.
        const START: &str = "mount -t bpf none \"$1/bpf\" && exec containerd --config \"$1/config.toml\"";
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display().to_string();
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{path}/socket\"\n[ttrpc]\naddress = \"{path}/ttrpc\"\n"
        );
        fs::write(directory.path().join("config.toml"), config).unwrap();
        fs::create_dir(directory.path().join("bpf")).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let daemon = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", START, "sh", &path])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let containerd = Self { daemon, directory, namespace: format!("socklb-test-{}", std::process::id()) };
        let end = Instant::now() + Duration::from_secs(30);
        while !containerd.ctr(&["version"]).status.success() {
            let log = fs::read_to_string(containerd.directory.path().join("log")).unwrap();
            assert!(Instant::now() < end, "containerd does not answer: {log}");
            thread::sleep(Duration::from_millis(50));
        }
        containerd
    }

    fn ctr(&self, args: &[&str]) -> Output {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(self.directory.path().join("socket"));
        ctr.args(["--namespace", &self.namespace]).args(args).output().unwrap()
    }

    /// Runs socklb in a container with a read-only root file system, and returns its output.
    fn socklb(&self, how: &[&str], args: &[&str]) -> String {
        self.run(how, "/usr/local/bin/socklb", args)
    }

    fn run(&self, how: &[&str], program: &str, args: &[&str]) -> String {
        let bpf =
            format!("type=bind,src={}/bpf,dst=/host/bpf,options=rbind:rw", self.directory.path().display());
        let mut all = vec!["run", "--rm", "--read-only", "--mount", &bpf];
        all.extend(how.iter().copied().chain([NAME, "container", program]));
        all.extend(args);
        let output = self.ctr(&all);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{args:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _none = self.ctr(&["tasks", "kill", "--signal", "SIGKILL", "container"]);
        // Its mounts vanish with its namespace.
        let _ended_already = self.daemon.kill();
        let _ended_already = self.daemon.wait();
        // runc removes a container's cgroups, but not their parents, one in each hierarchy.
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _none_there = fs::remove_dir(hierarchy.path().join(&self.namespace));
        }
        let _none_there = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.namespace));
    }
}

/// A container engine accepts the archive, and the image has all that the binary needs, under the
/// restrictions and with the mounts of the manifests.
#[test]
fn containerd_runs_the_image() {
    let Some(binary) = env::var_os("SOCKLB_BIN").filter(|_| process::is_root()) else {
        eprintln!("SKIPPED: needs root, and SOCKLB_BIN, which `cargo xtask test` sets");
        return;
    };
    let containerd = Containerd::start();
    let small = containerd.directory.path().join("stripped");
    stripped(Path::new(&binary), &small).unwrap();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let archive = archive(&tree(workspace, &small).unwrap()).unwrap();
    assert!(archive.len() < MAX_BYTES, "{} bytes", archive.len());
    let _layer = read(&archive);
    let file = containerd.directory.path().join("image.tar");
    fs::write(&file, archive).unwrap();
    let imported = containerd.ctr(&["images", "import", file.to_str().unwrap()]);
    assert!(imported.status.success(), "{imported:?}");

    assert_eq!(containerd.socklb(&[], &["--version"]), concat!("socklb ", env!("CARGO_PKG_VERSION"), "\n"));
    // As in the DaemonSet: these capabilities, the engine's seccomp profile, cgroups read-only.
    let mut restricted =
        vec!["--seccomp", "--mount", "type=bind,src=/sys/fs/cgroup,dst=/host/cgroup,options=rbind:ro"];
    let rights = ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "CAP_SYS_ADMIN"];
    restricted.extend(rights.iter().flat_map(|right| ["--cap-add", right]));
    let check = containerd.socklb(&restricted, &["check", "--pin-path", "/host/bpf/socklb"]);
    assert!(check.contains("the kernel accepts the programs of all hooks"), "{check}");
    // In its own namespaces and cgroup.
    let demo = Path::new(&binary).with_file_name(build::DEMO);
    let demo =
        format!("type=bind,src={},dst=/usr/local/bin/{},options=rbind:ro", demo.display(), build::DEMO);
    let free = [
        "--privileged",
        "--mount",
        "type=bind,src=/sys/fs/cgroup,dst=/host/cgroup,options=rbind:rw",
        "--mount",
        "type=tmpfs,dst=/tmp",
        "--mount",
        &demo,
    ];
    let demo = containerd.run(&free, &format!("/usr/local/bin/{}", build::DEMO), &["--exit"]);
    assert!(demo.contains("checks hold"), "{demo}");
}
