//! The agent as the manifests deploy it: with the same capabilities and mounts.

use std::{fs, path::Path, process::Command};

use lb_core::model::Protocol;
use lb_tests::{
    Feature,
    client::{Domain, Socket},
    command::text,
    installed::eventually,
    require,
};
use nix::errno::Errno;
use serde_json::Value;

use crate::{
    socklb::{is_up, with_town},
    town,
};

/// In the sandbox's network namespace, where nothing else listens.
const METRICS: &str = "127.0.0.1:10249";

/// The names after `add:` in the `DaemonSet`, in setpriv's form.
pub(crate) fn capabilities() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/base/daemonset.yaml");
    let object: Value = serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let container = &object["spec"]["template"]["spec"]["containers"][0];
    let names = container["securityContext"]["capabilities"]["add"].as_array().unwrap();
    let names = names.iter().map(|name| format!("+{}", name.as_str().unwrap().to_lowercase()));
    std::iter::once("-all".to_owned()).chain(names).collect::<Vec<_>>().join(",")
}

/// Runs what follows with these capabilities, and none that can be gained.
pub(crate) fn confined(capabilities: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", capabilities, "--inh-caps", capabilities, "--no-new-privs"]);
    command.args(["--clear-groups", "--"]);
    command
}

/// Only the `DaemonSet`'s capabilities, none that can be gained, a read-only cgroup, and a BPF file system
/// mounted at a second path, as in a container.
#[test]
fn the_capabilities_and_mounts_of_the_daemon_set_are_enough() {
    with_town(|place, town| {
        // One pod, which reaches only itself.
        place.write(&town.cluster(0..1));
        let mounts = tempfile::tempdir().unwrap();
        let (cgroup, pins) = (mounts.path().join("cgroup"), mounts.path().join("bpf"));
        for directory in [&cgroup, &pins] {
            fs::create_dir(directory).unwrap();
        }
        let bpffs = Path::new(&place.pin_path).parent().unwrap();
        // The sandbox's mount namespace is the test's own.
        for (from, to, options) in [(Path::new(&place.cgroup), &cgroup, "bind,ro"), (bpffs, &pins, "bind")] {
            let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
            text("mount", &["--bind", "-o", options, from, to]);
        }
        let capabilities = capabilities();
        // As container runtimes do.
        let (netns, in_pod) = (mounts.path().join("netns"), &town.pods[0].netns);
        in_pod.mount_at(&netns).unwrap();
        let contained = || {
            let mut command = confined(&capabilities);
            command
                .arg(&place.binary)
                .env("SOCKLB_CGROUP", &cgroup)
                .env("SOCKLB_PIN_PATH", pins.join("socklb"))
                .env("SOCKLB_STATE_DIR", place.state_dir())
                .env("SOCKLB_METRICS_BIND_ADDRESS", METRICS)
                .env("SOCKLB_HEALTHZ_BIND_ADDRESS", "")
                .env("NODE_NAME", "node");
            command
        };
        let agent = place.spawn(contained(), &[]);
        eventually("the service answers", || is_up(town::web()[0]));
        let status = fs::read_to_string(format!("/proc/{}/status", agent.id())).unwrap();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
        // CAP_NET_ADMIN 12, CAP_SYS_ADMIN 21, CAP_PERFMON 38, CAP_BPF 39.
        assert_eq!(u64::from_str_radix(effective, 16), Ok((1 << 12) | (1 << 21) | (1 << 38) | (1 << 39)));
        // A command of `kubectl exec` finds everything by the same variables.
        let output = contained().args(["status", "-o", "json"]).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        assert_eq!(status["agent"]["state"], "running", "{status}");
        for hook in status["hooks"].as_array().unwrap() {
            assert!(matches!(hook["state"].as_str(), Some("attached" | "not needed")), "{hook}");
            assert_eq!(hook["cgroup"], cgroup.to_str().unwrap(), "{hook}");
        }
        assert!(output.status.success(), "{status}");
        // From the agent's own cgroup: the served one is read-only.
        let log = |text: &str| agent.has_said(text);
        eventually("the self-test is passed", || log("self-test passed"));
        assert!(log("calls from the agent's own cgroup"), "{:#?}", agent.log());
        // Changes are applied, a pod's socket is destroyed, and no permission is missing.
        let socket = in_pod.run(|| Socket::new(Domain::V4, Protocol::Udp));
        socket.connect(town::dns()[0]).unwrap();
        place.write(&town.cluster(0..0));
        eventually("the service refuses", || !is_up(town::web()[0]));
        if require(Feature::SocketDestroy) {
            assert_eq!(socket.receive(), Err(Errno::ECONNABORTED));
        }
        let log = agent.log();
        assert!(!log.iter().any(|line| line.contains("ERROR") || line.contains("not permitted")), "{log:#?}");
    });
}
