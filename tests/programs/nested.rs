//! A node that is itself a container: it sees only its part of the machine's cgroups, and its pods only
//! theirs.

use std::{fs, path::Path, process::Command};

use lb_tests::{
    cgroup::make_threaded,
    command::text,
    installed::{Place, Running, eventually},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    exclusion::answers_from,
    http::LISTEN,
    socklb::{is_up, with_town},
    town,
};

/// Enters nested cgroups, with a namespace for each. The last is the node's, at `$PLACES/node`. The command
/// runs in the node's cgroup `pod` with its own namespace. The rest of the hierarchy, above all the machine's
/// root, is invisible.
const NEST: &str = r#"set -e
if [ "$1" != -- ]; then
    echo 0 > "$1/cgroup.threads"
    shift
    exec unshare --cgroup sh "$0" "$@"
fi
shift
while read -r _ _ _ _ point _ rest; do
    case "$rest" in *' cgroup2 '*) umount -l "$point";; esac
done < /proc/self/mountinfo
! grep ' - cgroup2 ' /proc/self/mountinfo
mount -t cgroup2 none "$PLACES/node"
[ "$(stat -c %i "$PLACES/node")" != 1 ]
echo 0 > "$PLACES/node/pod/cgroup.threads"
exec unshare --cgroup sh -c '
    mount -t cgroup2 none "$PLACES/own" && mount -o "remount,bind,$ACCESS" "$PLACES/node" && exec "$@"' sh "$@"
"#;

/// Three nested cgroups below the test's, and the pod's mount points of the node's and the pod's hierarchies.
struct Nest {
    cgroups: Vec<String>,
    places: TempDir,
}

impl Nest {
    fn make(place: &Place) -> Self {
        let (mut cgroups, places) = (Vec::new(), tempfile::tempdir().unwrap());
        for name in ["node", "own"] {
            fs::create_dir(places.path().join(name)).unwrap();
        }
        fs::write(places.path().join("nest.sh"), NEST).unwrap();
        for name in ["machine", "middle", "node"] {
            let path = format!("{}/{name}", cgroups.last().unwrap_or(&place.cgroup));
            make_threaded(Path::new(&path)).unwrap();
            cgroups.push(path);
        }
        let nest = Self { cgroups, places };
        for name in ["pod", "client", "excluded"] {
            make_threaded(Path::new(&nest.below(name))).unwrap();
        }
        nest
    }

    /// A cgroup of the node.
    fn below(&self, name: &str) -> String {
        format!("{}/{name}", self.cgroups.last().unwrap())
    }

    /// Where the pod sees the node's hierarchy.
    fn node(&self) -> String {
        self.places.path().join("node").to_str().unwrap().to_owned()
    }

    fn start(&self, place: &Place, access: &str) -> Running {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh"])
            .arg(self.places.path().join("nest.sh"))
            .args(&self.cgroups)
            .args(["--", &place.binary])
            .env("PLACES", self.places.path())
            .env("ACCESS", access);
        let excluded = format!("--exclude-cgroup={}/excluded", self.node());
        let flags =
            ["--node-name=node", "--pin-path", &place.pin_path, &excluded, "--self-test-interval=200ms"];
        place.spawn(command, &[&flags[..], &LISTEN[..2]].concat())
    }

    /// Runs a command in the pod, as `kubectl exec` does.
    fn exec(&self, agent: &Running, place: &Place, command: &[&str]) -> String {
        const ENTER: &str = "echo 0 > \"$0/cgroup.threads\" && exec nsenter --mount --cgroup --target \"$@\"";
        let (pod, id) = (self.below("pod"), agent.id().to_string());
        let command = [&["-c", ENTER, &pod, &id, &place.binary][..], command].concat();
        text("sh", &command)
    }
}

/// Checks the log, `check` and `status`, and whose calls are served.
fn is_served_as_a_node(place: &Place, access: &str) {
    let nest = Nest::make(place);
    let agent = nest.start(place, access);
    let says = |what: &str| eventually(what, || agent.has_said(what));
    says("covers=all processes of this node, which is itself a container");
    eventually("the node's processes are served", || answers_from(&nest.below("client")));
    assert!(!is_up(town::web()[0]), "processes outside the node are not");
    eventually("the excluded ones are not", || !answers_from(&nest.below("excluded")));
    says("calls from these cgroups are excluded");
    assert_eq!(agent.has_said("the self-test calls from the agent's own cgroup"), access == "ro");
    assert!(!agent.has_said("no call has shown"), "{:#?}", agent.log());
    assert!(answers_from(&nest.below("pod")), "nothing of the test call remains");

    let exec = |command: &[&str]| nest.exec(&agent, place, &place.args(command));
    let status: Value = serde_json::from_str(&exec(&["status", "-o", "json"])).unwrap();
    assert_eq!(status["covers"], "node", "{status}");
    assert_eq!(status["hooks"][1]["cgroup"], nest.node(), "{status}");
    let excluded = status["excluded_cgroups"].as_array().unwrap();
    let paths: Vec<&str> = excluded.iter().filter_map(|row| row["cgroup"].as_str()).collect();
    assert_eq!(paths, [format!("{}/excluded", nest.node())], "{status}");
    let check = nest.exec(&agent, place, &["check", "--pin-path", &place.pin_path]);
    let line = check.lines().find(|line| line.contains("cgroup v2")).unwrap();
    assert!(
        line.contains(&nest.node()) && line.ends_with("this node, which is itself a container"),
        "{check}"
    );
}

#[test]
fn a_node_that_is_a_container_is_served_as_a_whole() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        is_served_as_a_node(place, "rw");
    });
}

/// Mounted as by the `DaemonSet`: no cgroup can be created and no process moved, so an exclusion is proven in
/// another way.
#[test]
fn a_pod_that_only_reads_its_nodes_cgroups_serves_the_node() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        is_served_as_a_node(place, "ro");
    });
}
