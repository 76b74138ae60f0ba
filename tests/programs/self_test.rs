//! The agent's self-test: calls through the real hooks, and what is reported when they fail.

use std::{fs, os::fd::AsFd as _, path::Path};

use lb_kernel::{cgroup, syscall};
use lb_tests::installed::eventually;
use serde_json::Value;

use crate::{
    http::{LISTEN, Scrape, address, fetch},
    socklb::{is_up, with_town},
    town,
};

const OFTEN: &str = "--self-test-interval=100ms";

#[test]
fn a_node_is_ready_once_calls_are_seen_to_work_and_for_as_long() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        let agent = place.start(&[LISTEN[0], LISTEN[1], OFTEN]);
        let metrics = address(&agent, "--metrics-bind-address");
        let health = format!("http://{}", address(&agent, "--healthz-bind-address"));
        let healthz = || fetch("GET", &format!("{health}/healthz"));
        eventually("the node is ready", || healthz().0 == 200);
        eventually("the self-test is repeated", || {
            Scrape::of(&metrics).get(r#"socklb_self_tests_total{result="passed"}"#) > 2
        });
        assert_eq!(Scrape::of(&metrics).get(r#"socklb_self_tests_total{result="failed"}"#), 0);
        assert!(agent.has_said("self-test passed"));
        assert!(!agent.has_said("own cgroup"), "{:#?}", agent.log());

        // Its service is listed like any other.
        let services = place.json(&["services", "-o", "json"]);
        assert!(services.to_string().contains("self-test"), "{services}");

        let status = || {
            let healthz = &health["http://".len()..];
            let asked = ["status", "--metrics-bind-address", &metrics, "--healthz-bind-address", healthz];
            // Whatever the exit status.
            String::from_utf8(place.run(&asked).stdout).unwrap()
        };
        assert!(status().contains("self-test passed"), "{}", status());

        // Removes what serves IPv4 connections, without the agent.
        let link = syscall::open_pin(&Path::new(&place.pin_path).join("connect4")).unwrap();
        syscall::detach(link.as_fd()).unwrap();
        eventually("the node is no longer ready", || healthz().0 == 503);
        let body: Value = serde_json::from_str(&healthz().1).unwrap();
        let said = body["selfTest"].as_str().unwrap();
        for part in ["TCP over IPv4: connect", "connected UDP over IPv4"] {
            assert!(said.contains(part), "{body}");
        }
        assert!(!said.contains("IPv6") && !said.contains("unconnected"), "the others work: {body}");
        let livez = fetch("GET", &format!("{health}/livez")).0;
        assert_eq!(livez, 200, "a restart would do no harm, but would not help");
        assert!(!is_up(town::web()[0]));
        assert!(status().contains("self-test failed: TCP over IPv4"), "{}", status());
        eventually("the log names it", || agent.has_said("TCP over IPv4: connect"));

        // A new agent attaches what is missing.
        drop(agent);
        let agent = place.start(&[LISTEN[0], LISTEN[1], OFTEN]);
        let health = format!("http://{}/healthz", address(&agent, "--healthz-bind-address"));
        eventually("the node is ready again", || fetch("GET", &health).0 == 200);
        assert!(is_up(town::web()[0]));
    });
}

/// In a private cgroup namespace, usually a container's, the hierarchy begins at the container's own cgroup.
#[test]
fn a_containers_own_cgroup_is_not_taken_for_the_hosts() {
    const SCRIPT: &str = "mount --bind \"$ROOT\" \"$PLACES/host\" && \
                          while read -r _ _ _ _ point _ rest; do case \"$rest\" in \
                            *' cgroup2 '*) [ \"$point\" = \"$PLACES/host\" ] || umount -l \"$point\" || exit 9;; esac; \
                          done < /proc/self/mountinfo; \
                          mount -t cgroup2 none \"$PLACES/own\" && \"$@\"; \
                          umount -l \"$PLACES/host\" && exec \"$@\"";
    with_town(|place, _town| {
        let places = tempfile::tempdir().unwrap();
        for name in ["host", "own"] {
            fs::create_dir(places.path().join(name)).unwrap();
        }
        let output = std::process::Command::new("unshare")
            .args(["--cgroup", "--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh"])
            .args([&place.binary, "check", "--pin-path", &place.pin_path])
            .env("ROOT", cgroup::find_root().unwrap())
            .env("PLACES", places.path())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = said.lines().filter(|line| line.contains("cgroup v2")).collect();
        let [with_hosts, without] = lines[..] else {
            panic!("{said}{}", String::from_utf8_lossy(&output.stderr))
        };
        assert!(with_hosts.contains(places.path().join("host").to_str().unwrap()), "{with_hosts}");
        assert!(said.contains("this container's own") && without.contains("own"), "{said}");
        assert_eq!(output.status.code(), Some(1), "{said}");
    });
}
