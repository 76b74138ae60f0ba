//! Names that the agent answers, asked by dig, by the C library and by curl.

use std::{collections::BTreeSet, fs};

use lb_tests::{
    cluster::Cluster,
    command::{run, text},
    installed::{Place, QUIET, Running, eventually},
};
use nix::mount::{MsFlags, mount};
use tempfile::NamedTempFile;

use crate::{
    socklb::with_town,
    town::{self, Town},
};

const SERVER: &str = "127.0.0.153";
const FLAGS: [&str; 3] =
    ["--names=on", "--names-bind-address=127.0.0.153:53", "--names-service=default/dns-udp-v4"];

/// Services without frontends, which have names alone.
const MORE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, ports: [{name: sql, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, labels: {kubernetes.io/service-name: db, service.kubernetes.io/headless: ""}}
addressType: IPv4
ports: [{name: sql, port: 5432}]
endpoints:
- {addresses: [10.244.1.2], hostname: db-0}
- {addresses: [10.244.2.2], hostname: db-1, conditions: {ready: false}}
---
apiVersion: v1
kind: Service
metadata: {name: away}
spec: {type: ExternalName, externalName: example.test}
"#;

/// Starts an agent that answers names, and waits until it does.
fn start(place: &Place, cluster: &Cluster) -> Running {
    place.write(cluster);
    fs::write(place.manifests().join("more.yaml"), MORE).unwrap();
    let agent = place.start(&[&QUIET[..], &FLAGS].concat());
    eventually("names are answered", || !dig(&["web-v4.default.svc.cluster.local"]).is_empty());
    agent
}

/// The data of the answers, sorted.
fn dig(args: &[&str]) -> BTreeSet<String> {
    let server = format!("@{SERVER}");
    let output = run("dig", &[&["+short", "+time=5", "+tries=1", &server], args].concat());
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| !line.starts_with(';'))
        .map(str::to_owned)
        .collect()
}

/// The status that dig shows, such as `NXDOMAIN`.
fn status(name: &str, kind: &str) -> String {
    let answer = text("dig", &["+time=5", "+tries=1", &format!("@{SERVER}"), name, kind]);
    let status = answer.split("status: ").nth(1).and_then(|rest| rest.split(',').next());
    status.unwrap_or_else(|| panic!("no status: {answer}")).to_owned()
}

fn set<T: ToString>(all: impl IntoIterator<Item = T>) -> BTreeSet<String> {
    all.into_iter().map(|one| one.to_string()).collect()
}

#[test]
fn dig_gets_the_records_of_manifests_and_what_upstream_knows() {
    with_town(|place, town| {
        let _agent = start(place, &town.cluster(0..2));
        for transport in ["+notcp", "+tcp"] {
            for (args, expected) in [
                (&["web-v4.default.svc.cluster.local", "A"][..], set([town::web()[0].ip()])),
                (&["WEB-v6.Default.svc.cluster.local", "AAAA"], set([town::web()[1].ip()])),
                (&["db.default.svc.cluster.local", "A"], set(["10.244.1.2"])),
                (&["db-0.db.default.svc.cluster.local", "A"], set(["10.244.1.2"])),
                (&["-x", "10.244.1.2"], set(["db-0.db.default.svc.cluster.local."])),
                (&["-x", "10.96.0.80"], set(["web-v4.default.svc.cluster.local."])),
                (&["away.default.svc.cluster.local", "CNAME"], set(["example.test."])),
                (&["dns-version.cluster.local", "TXT"], set(["\"1.1.0\""])),
            ] {
                assert_eq!(dig(&[&[transport], args].concat()), expected, "{transport} {args:?}");
            }
            let pods = set(town.pods.iter().map(|pod| pod.ips[0]));
            let forwarded = dig(&[transport, "example.test", "A"]);
            assert!(!forwarded.is_empty() && forwarded.is_subset(&pods), "{transport}: {forwarded:?}");
            // The alias, and what upstream says about its target.
            let followed = dig(&[transport, "away.default.svc.cluster.local", "A"]);
            assert!(followed.contains("example.test.") && followed.len() > 1, "{transport}: {followed:?}");
        }
        for (name, kind, expected) in [
            ("web-v4.default.svc.cluster.local", "AAAA", "NOERROR"),
            ("nothing.default.svc.cluster.local", "A", "NXDOMAIN"),
            // As search lists make it.
            ("example.test.default.svc.cluster.local", "A", "NXDOMAIN"),
        ] {
            assert_eq!(status(name, kind), expected, "{name} {kind}");
        }
        for (name, expected) in [
            ("web-v4.default.svc.cluster.local", "web-v4.default.svc.cluster.local. 5 IN A 10.96.0.80"),
            (
                "nothing.default.svc.cluster.local.",
                "nothing.default.svc.cluster.local. does not exist (NXDOMAIN)",
            ),
            ("example.test", "example.test. is forwarded: 10.244.1.2:1053, 10.244.2.2:1053"),
        ] {
            assert_eq!(place.text(&["resolve", name]), expected);
        }
    });
}

#[test]
fn names_follow_the_manifests_and_end_with_the_agent() {
    with_town(|place, town| {
        let agent = start(place, &town.cluster(0..2));
        fs::remove_file(place.manifests().join("more.yaml")).unwrap();
        eventually("its names are gone", || status("db.default.svc.cluster.local", "A") == "NXDOMAIN");
        fs::write(place.manifests().join("more.yaml"), MORE.replace("10.244.1.2", "10.244.1.9")).unwrap();
        eventually("the new address", || dig(&["db.default.svc.cluster.local"]) == set(["10.244.1.9"]));
        assert_eq!(agent.end(nix::sys::signal::Signal::SIGTERM), Some(0));
        assert_eq!(dig(&["web-v4.default.svc.cluster.local"]), BTreeSet::new(), "no server is left");
    });
}

/// `resolv.conf` as OPERATIONS.md has it for a host.
#[test]
fn programs_on_a_host_call_services_by_name() {
    with_town(|place, town: &Town| {
        let _agent = start(place, &town.cluster(0..2));
        let conf = NamedTempFile::new().unwrap();
        let search = "search default.svc.cluster.local svc.cluster.local cluster.local";
        fs::write(conf.path(), format!("nameserver {SERVER}\n{search}\noptions ndots:5\n")).unwrap();
        // In the sandbox's own mount namespace only.
        let target = fs::canonicalize("/etc/resolv.conf").unwrap();
        mount(Some(conf.path()), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        for name in ["web-v4.default.svc.cluster.local", "web-v4.default.svc", "web-v4"] {
            let url = format!("http://{name}/");
            let page = text("curl", &["--silent", "--show-error", "--max-time", "30", &url]);
            assert!(town.pods.iter().any(|pod| page.starts_with(&pod.ips[0].to_string())), "{url}: {page}");
        }
        let answer = text("getent", &["ahostsv4", "example.test"]);
        assert!(town.pods.iter().any(|pod| answer.starts_with(&pod.ips[0].to_string())), "{answer}");
    });
}

#[test]
fn an_address_in_use_is_logged_and_tried_again() {
    with_town(|place, town| {
        let taken = std::net::UdpSocket::bind("127.0.0.153:53").unwrap();
        place.write(&town.cluster(0..1));
        let agent = place.start(&[&QUIET[..], &FLAGS].concat());
        eventually("the problem is logged", || {
            agent.has_said_all(&["--names-bind-address 127.0.0.153:53", "in use", "use another address"])
        });
        drop(taken);
        eventually("names are answered", || !dig(&["web-v4.default.svc.cluster.local"]).is_empty());
    });
}
