//! The command `socklb`, as people run it.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use lb_core::model::Protocol;
use lb_tests::{
    Feature,
    client::{Domain, Socket, call},
    cluster::{Cluster, key},
    command::{run, text},
    installed::{Place, QUIET, Running, eventually},
};
use nix::{errno::Errno, sys::signal::Signal};
use serde_json::Value;

use crate::town::{self, Town};

pub(crate) fn with_town(test: impl FnOnce(&Place, &Town) + Send) {
    Place::test(&[Feature::Command("curl")], |sandbox, place| test(place, &Town::new(sandbox, 2)));
}

/// Starts an agent with these manifests, and waits until the town's web service answers.
pub(crate) fn serve(place: &Place, cluster: &Cluster, flags: &[&str]) -> Running {
    place.write(cluster);
    let agent = place.start(flags);
    eventually("the service answers", || is_up(town::web()[0]));
    agent
}

/// The pods that answer calls of the web service.
pub(crate) fn servers(n_calls: usize) -> BTreeSet<String> {
    let url = format!("http://{}/", town::web()[0]);
    (0..n_calls)
        .map(|_| text("curl", &["--silent", "--show-error", "--max-time", "30", &url]))
        .map(|page| page.split(' ').next().unwrap_or_default().to_owned())
        .collect()
}

/// Whether a connection to the service is accepted.
pub(crate) fn is_up(service: SocketAddr) -> bool {
    Socket::new(Domain::of(service.ip()), Protocol::Tcp).connect(service).is_ok()
}

#[test]
fn the_agent_follows_manifests_and_survives_its_end() {
    with_town(|place, town| {
        let ip = |pod: usize| town.pods[pod].ips[0].to_string();
        let agent = serve(place, &town.cluster(0..2), &QUIET);
        assert_eq!(servers(40), BTreeSet::from([ip(0), ip(1)]));

        place.write(&town.cluster(1..2));
        eventually("one pod is left", || servers(20) == BTreeSet::from([ip(1)]));

        assert_eq!(agent.end(Signal::SIGTERM), Some(0), "a stopped agent succeeds");
        assert_eq!(servers(20), BTreeSet::from([ip(1)]), "it is served without an agent");

        // Killed and restarted with changed manifests: it applies what it missed.
        let agent = place.start(&QUIET);
        assert_eq!(agent.end(Signal::SIGKILL), None);
        place.write(&town.cluster(0..1));
        let _agent = place.start(&QUIET);
        eventually("the other pod is back", || servers(20) == BTreeSet::from([ip(0)]));
    });
}

#[test]
fn commands_tell_what_the_kernel_holds() {
    with_town(|place, town| {
        let agent = serve(place, &town.cluster(0..2), &QUIET);
        assert_eq!(agent.end(Signal::SIGINT), Some(0));

        let services = place.json(&["services", "-o", "json"]);
        let web = services.as_array().unwrap().iter().find(|row| row["name"] == "web-v4").unwrap();
        assert_eq!(
            (&web["namespace"], &web["kind"], &web["protocol"]),
            (&"default".into(), &"ClusterIP".into(), &"TCP".into())
        );
        assert_eq!((&web["address"], &web["port"]), (&"10.96.0.80".into(), &80.into()));
        let endpoints: Vec<&str> =
            web["endpoints"].as_array().unwrap().iter().map(|e| e["address"].as_str().unwrap()).collect();
        assert_eq!(endpoints, ["10.244.1.2", "10.244.2.2"]);
        let first = &web["endpoints"][0];
        assert!(first["connections"].is_u64(), "{first}");
        let health = |row: &Value| (row["failures"].clone(), row["ejected_seconds"].clone());
        assert_eq!(health(first), (0.into(), Value::Null), "{first}");
        let udp = services.as_array().unwrap().iter().find(|row| row["protocol"] == "UDP").unwrap();
        let first = &udp["endpoints"][0];
        assert_eq!(health(first), (Value::Null, Value::Null), "UDP has no outcome: {first}");

        let explain = |to: &str| place.json(&["explain", to, "-o", "json"]);
        assert_eq!(explain("10.96.0.80:80/tcp")["verdict"], "redirected");
        assert_eq!(explain("10.96.0.81:80")["verdict"], "refused");
        assert_eq!(explain("10.96.0.80:80/udp")["verdict"], "untouched");
        assert_eq!(explain("[fd00:96::53]:53/udp")["candidates"].as_array().unwrap().len(), 2);
        assert_eq!(explain("10.96.0.80:80/tcp")["frontend"]["name"], *key("web-v4").name);
    });
}

/// Every fault that a manifest may have, beside valid services.
const BAD_MANIFESTS: [(&str, &str); 7] = [
    ("broken.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: broken\nspec: [\n"),
    (
        "kinds.yaml",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n---\nkind: Nonsense\napiVersion: v1\nmetadata: {name: x}\n",
    ),
    (
        "no-ports.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: no-ports}\nspec: {clusterIP: 10.96.1.1}\n",
    ),
    (
        "zero.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: zero}\nspec:\n  clusterIP: 10.96.1.2\n  ports: [{port: 0}]\n",
    ),
    (
        "large.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: large}\nspec:\n  clusterIP: 10.96.1.3\n  ports:\n  - port: 65536\n",
    ),
    (
        "family.yaml",
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: family\n  labels: {kubernetes.io/service-name: empty}\n\
         addressType: IPv4\nports: [{name: '', port: 80}]\nendpoints:\n- addresses: ['fd00::1']\n",
    ),
    (
        "same.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: zz-same}\nspec: {clusterIP: 10.96.0.80, ports: [{port: 80}]}\n",
    ),
];

#[test]
fn bad_manifests_are_named_and_the_rest_is_served() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        for (name, text) in BAD_MANIFESTS {
            fs::write(place.manifests().join(name), text).unwrap();
        }
        let agent = place.start(&QUIET);
        eventually("the service answers", || is_up(town::web()[0]));
        assert_eq!(servers(40).len(), 2);
        assert!(is_up(town::web()[1]));
        let status = place.run(&["status", "-o", "json", "--cgroup", &place.cgroup]);
        let status: Value = serde_json::from_slice(&status.stdout).unwrap();
        let explained = place.text(&["explain", "10.96.0.80:80"]);
        let taken =
            "  issue      Service default/zz-same: 10.96.0.80:80/tcp belongs to service default/web-v4";
        assert!(explained.contains(taken), "{explained}");
        let explained = place.text(&["explain", "10.96.1.3:80"]);
        assert!(explained.contains("default/large: spec.ports[0].port: 65536 is not a port"), "{explained}");
        let (code, log) = agent.end_with_log(Signal::SIGTERM);
        assert_eq!(code, Some(0), "{log:#?}");
        // One of each that is named below.
        assert_eq!(status["issues_of_agent"], status["issues"].as_array().unwrap().len(), "{status}");
        let listed = status["issues"].as_array().unwrap();
        for wanted in [
            // File, line, object and field of each.
            &["broken.yaml:"][..],
            &["kinds.yaml:", "Deployment"],
            &["kinds.yaml:", "Nonsense"],
            &["no-ports.yaml:", "default/no-ports", "ports"],
            &["zero.yaml:", "default/zero", "ports[0].port"],
            &["large.yaml:", "default/large", "ports[0].port", "65536"],
            &["family.yaml:", "default/family", "endpoints[0].addresses", "fd00::1"],
            &["default/zz-same", "10.96.0.80:80", "default/web-v4"],
        ] {
            let is_told = log.iter().any(|line| wanted.iter().all(|part| line.contains(part)));
            assert!(is_told, "no line with {wanted:?} in {log:#?}");
            let issues = listed.iter().map(Value::to_string);
            let parts = || wanted.iter().flat_map(|part| part.split(['/', ':']));
            let is_listed = issues.into_iter().any(|issue| parts().all(|part| issue.contains(part)));
            assert!(is_listed, "no issue with {wanted:?} in {listed:#?}");
        }
    });
}

#[test]
fn cleanup_takes_everything_away() {
    with_town(|place, town| {
        let service = town::web()[0];
        let agent = serve(place, &town.cluster(0..2), &QUIET);
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));

        // A reader that stops early, as in `socklb services | head -1`, breaks nothing.
        for command in ["services", "cleanup"] {
            let mut child = Command::new(&place.binary)
                .args(place.args(&[command]))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            drop(child.stdout.take());
            let output = child.wait_with_output().unwrap();
            let message = String::from_utf8_lossy(&output.stderr);
            // Without an agent, names come from the snapshot.
            let is_said =
                message.is_empty() || (command == "services" && message.contains("from the snapshot"));
            assert!(output.status.success() && is_said, "{command}: {}: {message}", output.status);
        }
        assert_eq!(call(service, Protocol::Tcp), Err(Errno::ENETUNREACH));
        assert!(!Path::new(&place.pin_path).exists());
        assert_eq!(fs::read_dir(place.state_dir()).into_iter().flatten().count(), 0);

        let nothing = place.run(&["services"]);
        assert_eq!(nothing.status.code(), Some(1));
        let message = String::from_utf8_lossy(&nothing.stderr).into_owned();
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.contains("nothing is pinned"), "{message}");
    });
}

/// As an operator removes it from a cluster: first the programs, on each node, then the agents.
#[test]
fn cleanup_beside_an_agent_that_runs_is_for_good() {
    with_town(|place, town| {
        let service = town::web()[0];
        // A foreign directory among the pins keeps the pin directory.
        for keeps_directory in [false, true] {
            let agent =
                serve(place, &town.cluster(0..2), &[&QUIET[..], &["--audit-interval=200ms"]].concat());
            let theirs = Path::new(&place.pin_path).join("theirs");
            if keeps_directory {
                fs::create_dir(&theirs).unwrap();
            }
            place.text(&["cleanup"]);
            assert_eq!(call(service, Protocol::Tcp), Err(Errno::ENETUNREACH));
            let status = place.run(&["status", "--cgroup", &place.cgroup]);
            let told = String::from_utf8_lossy(&status.stdout).into_owned();
            assert!(status.status.code() == Some(1) && told.contains("it serves no calls"), "{told}");
            assert!(told.starts_with("agent     detached: ") && !told.contains("passed"), "{told}");
            // Whatever the agent does next, audits included, it does not attach again.
            place.write(&town.cluster(0..1));
            thread::sleep(Duration::from_secs(1));
            assert_eq!(call(service, Protocol::Tcp), Err(Errno::ENETUNREACH));
            assert_eq!(agent.end(Signal::SIGTERM), Some(0));
            assert_eq!(call(service, Protocol::Tcp), Err(Errno::ENETUNREACH));
            assert_eq!(Path::new(&place.pin_path).exists(), keeps_directory);
            if keeps_directory {
                assert_eq!(fs::read_dir(&place.pin_path).unwrap().count(), 1);
                fs::remove_dir(&theirs).unwrap();
            }
        }
    });
}

#[test]
fn status_tells_of_an_agent_that_runs_and_of_one_that_does_not() {
    with_town(|place, town| {
        const FLAGS: [&str; 2] =
            ["--metrics-bind-address=127.0.0.1:10249", "--healthz-bind-address=127.0.0.1:10256"];
        let command = |flags: &[&str]| -> (Option<i32>, Value) {
            let flags = if flags.is_empty() { &["--cgroup", &place.cgroup][..] } else { flags };
            let args = [&["status", "-o", "json"][..], &FLAGS, flags].concat();
            let output = place.run(&args);
            let parsed = serde_json::from_slice(&output.stdout);
            (output.status.code(), parsed.unwrap_or_else(|error| panic!("{error}: {output:?}")))
        };
        let (code, nothing) = command(&[]);
        assert_eq!((code, &nothing["agent"]["state"]), (Some(1), &"stopped".into()), "{nothing}");
        assert!(nothing["pin_problem"].as_str().unwrap().contains("nothing is pinned"), "{nothing}");

        let mut cluster = town.cluster(0..2);
        // A second Service that claims an address is omitted and reported.
        cluster.serve("zz-same", town::web()[0], Protocol::Tcp, &[]);
        let agent = serve(place, &cluster, &FLAGS);
        eventually("the snapshot is written", || place.state_dir().join("snapshot").exists());
        eventually("the self-test is passed", || command(&[]).1["self_test"] == "passed");
        let (code, running) = command(&[]);
        assert_eq!(code, Some(0), "{running}");
        assert_eq!(
            (&running["agent"]["state"], &running["agent"]["healthy"]),
            (&"running".into(), &true.into())
        );
        let source = &running["source"];
        assert!(source["source"].as_str().unwrap().starts_with("file:"), "{running}");
        assert_eq!((&source["complete"], &source["changes_waiting"]), (&true.into(), &0.into()));
        assert!(source["last_sync_age_seconds"].is_number() && source["last_event_age_seconds"].is_number());
        for hook in running["hooks"].as_array().unwrap() {
            assert!(matches!(hook["state"].as_str(), Some("attached" | "not needed")), "{hook}");
            let is_there = hook["state"] == "not needed" || hook["cgroup"] == *place.cgroup;
            assert!(is_there, "{hook}");
        }
        let map = |status: &Value, name: &str| {
            let maps = status["maps"].as_array().unwrap();
            maps.iter().find(|map| map["map"] == name).unwrap()["entries"].as_u64().unwrap()
        };
        // Two frontends and two endpoints of each family belong to the self-test.
        assert_eq!((map(&running, "services4"), map(&running, "endpoints6")), (6, 8), "{running}");
        assert_eq!(running["issues_of_agent"], 1, "{running}");
        assert!(running["issues"].to_string().contains("zz-same"), "{running}");

        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        let (code, stopped) = command(&[]);
        assert_eq!(
            (code, &stopped["agent"]["state"]),
            (Some(0), &"stopped".into()),
            "what is pinned continues"
        );
        assert_eq!((&stopped["source"], map(&stopped, "services4")), (&Value::Null, 6));
        // In another cgroup the pinned one is not found; that is not a failure.
        let (code, elsewhere) = command(&["--cgroup", "/proc/self/fd"]);
        assert_eq!((code, &elsewhere["hooks"][1]["cgroup"]), (Some(0), &Value::Null), "{elsewhere}");
    });
}

/// Another balancer is a foreign program on the same hooks: here that of a second agent.
#[test]
fn check_tells_what_the_host_offers() {
    with_town(|place, town| {
        let check = |pin_path: &str, status: i32| -> Vec<Value> {
            let args = ["check", "-o", "json", "--cgroup", &place.cgroup, "--pin-path", pin_path];
            let output = run(&place.binary, &args);
            assert_eq!(output.status.code(), Some(status), "{output:?}");
            serde_json::from_slice(&output.stdout).unwrap()
        };
        let of = |findings: &[Value], what: &str| {
            let found = findings.iter().find(|finding| finding["what"] == what).unwrap();
            (found["status"].as_str().unwrap().to_owned(), found["found"].as_str().unwrap().to_owned())
        };
        let agent = serve(place, &town.cluster(0..1), &QUIET);

        let own = check(&place.pin_path, 0);
        assert!(own.iter().all(|finding| finding["status"] != "missing"), "{own:?}");
        assert_eq!(of(&own, "programs").0, "ok");
        assert_eq!(of(&own, "other balancers").0, "ok");

        let elsewhere = format!("{}/elsewhere", Path::new(&place.pin_path).parent().unwrap().display());
        let (status, found) = of(&check(&elsewhere, 0), "other balancers");
        assert_eq!(status, "note");
        assert!(found.contains("connect4"), "{found}");
        assert!(!Path::new(&elsewhere).exists(), "checking changes nothing");

        let no_bpffs = check("/proc/socklb", 1);
        assert_eq!(of(&no_bpffs, "BPF file system").0, "missing");
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

#[test]
fn wrong_usage_has_a_status_of_its_own() {
    with_town(|place, _town| {
        for args in [
            &["run", "--source", "nonsense"][..],
            &["run", "--max-services", "0"],
            &["nonsense"],
            &["explain", "x"],
        ] {
            let output = run(&place.binary, args);
            assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        }
    });
}
