//! What commands say about packets that reach no hook, with an agent that serves them.

use std::{fs, thread, time::Duration};

use lb_core::packets::{
    self,
    nft::{Base, ChainType, Change, Family, Hook, Policy, TableId, Transaction},
};
use lb_kernel::nftables::Nftables;
use lb_tests::{
    Feature,
    cluster::{Cluster, Object, object},
    command::text,
    installed::{Place, QUIET, eventually},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
};
use serde_json::{Value, json};

use crate::{knowledge::Lines, town::Town};

/// Runs a test with a node that has the pods `10.244.1.2` and `fd00:244:1::2`.
fn with_node(test: impl FnOnce(&Place) + Send) {
    Place::test(&[Feature::Nftables], |sandbox, place| {
        let _town = Town::new(sandbox, 1);
        test(place);
    });
}

/// A Service with the policy Local, source ranges and SCTP, and its endpoints, the first of them on this
/// node.
fn cluster(n_endpoints: u8) -> Cluster {
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.80",
            "clusterIPs": ["10.96.0.80"],
            "ipFamilies": ["IPv4"],
            "externalTrafficPolicy": "Local",
            "loadBalancerSourceRanges": ["198.51.100.0/24"],
            "ports": [
                {"name": "http", "port": 80},
                {"name": "sip", "port": 5060, "protocol": "SCTP"},
            ],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
    });
    let endpoint = |n: u8| {
        let (ip, node) =
            if n == 1 { ("10.244.1.2".to_owned(), "node") } else { (format!("10.244.9.{n}"), "other") };
        json!({"addresses": [ip], "nodeName": node})
    };
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": "web-a", "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}, {"name": "sip", "port": 5060, "protocol": "SCTP"}],
        "endpoints": (1..=n_endpoints).map(endpoint).collect::<Vec<_>>(),
    });
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node"},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
    });
    let objects: Vec<Object> = [service, slice, node].iter().map(|value| object(value).unwrap()).collect();
    Cluster::new().with(objects)
}

/// The exit status of `status`, and what it says of packets.
fn status(place: &Place) -> (Option<i32>, Value) {
    let output = place.run(&["status", "--cgroup", &place.cgroup, "-o", "json"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.code(), status["packets"].clone())
}

/// The verdict for a packet, and its endpoints, each with whose address it sees.
fn packet(place: &Place, to: &str, from: &str) -> (String, Vec<(String, String)>) {
    let from = if from.is_empty() { vec![] } else { vec!["--from", from] };
    let explained = place.json(&[&["explain", to, "-o", "json"], &from[..]].concat());
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let endpoints = explained["packet"]["endpoints"].as_array().unwrap().iter();
    let endpoints = endpoints.map(|endpoint| (text(&endpoint["endpoint"]), text(&endpoint["sees"])));
    (text(&explained["packet"]["verdict"]), endpoints.collect())
}

fn tables() -> Vec<String> {
    let mut nftables = Nftables::open().unwrap();
    let found = packets::table_ids().into_iter().filter(|id| nftables.has(id).unwrap());
    found.map(|id| id.to_string()).collect()
}

const BOTH: [&str; 2] = ["ip socklb", "ip6 socklb"];

#[test]
fn commands_say_what_packets_get() {
    with_node(|place| {
        place.write(&cluster(2));
        let flags =
            [&QUIET[..], &["--packets=all", "--audit-interval=0", "--service-cidr=10.96.0.0/16"]].concat();
        let agent = place.start(&flags);
        eventually("the rules are there", || {
            status(place).1["last_transaction"]["changes"].as_u64() > Some(0)
        });
        let (code, told) = status(place);
        assert_eq!((code, &told["tables"]), (Some(0), &json!(BOTH)), "{told}");
        assert_eq!((&told["missing_tables"], &told["problem"]), (&json!([]), &Value::Null));
        // Two cluster IPs and two load-balancer addresses.
        assert_eq!(told["frontends"], 4);

        let both = |sees: &str| {
            vec![
                ("10.244.1.2:8080".to_owned(), sees.to_owned()),
                ("10.244.9.2:8080".to_owned(), sees.to_owned()),
            ]
        };
        let none = Vec::new;
        for (to, from, verdict, endpoints) in [
            ("10.96.0.80:80", "", "translated", both("node")),
            ("10.96.0.80:80", "10.244.1.9", "translated", both("client")),
            // One of the node's own.
            ("10.96.0.80:80", "127.0.0.1", "translated", both("node")),
            ("203.0.113.1:80", "198.51.100.7", "translated", both("client")[..1].to_vec()),
            ("203.0.113.1:80", "", "dropped", none()),
            ("10.96.0.80:81", "", "refused", none()),
            ("10.96.0.99:80", "", "dropped", none()),
            ("192.168.7.7:80", "", "untouched", none()),
        ] {
            assert_eq!(packet(place, to, from), (verdict.to_owned(), endpoints), "{to} from {from:?}");
        }
        assert_eq!(packet(place, "10.96.0.80:5060/sctp", "").0, "translated");
        let own = place.text(&["explain", "10.96.0.80:80", "--from", "127.0.0.1"]);
        assert!(own.contains("packet from 127.0.0.1 (this node) -> translated: one of 2"), "{own}");
        let text = place.text(&["explain", "203.0.113.1:80"]);
        assert!(
            text.contains("packet from 192.0.2.1 (outside) -> dropped: loadBalancerSourceRanges"),
            "{text}"
        );
        let usage = place.run(&["explain", "10.96.0.80:80", "--from", "fd00::1"]);
        assert_eq!(usage.status.code(), Some(2));

        let services = place.json(&["services", "-o", "json"]);
        let find = |address: &str, protocol: &str| {
            let rows = services.as_array().unwrap();
            let row = rows.iter().find(|row| row["address"] == address && row["protocol"] == protocol);
            row.unwrap_or_else(|| panic!("{address} {protocol}: {services}"))["packets"].clone()
        };
        let part = |only, outside, ranges: Value| json!({"only": only, "endpoints_from_outside": outside, "source_ranges": ranges});
        assert_eq!(find("10.96.0.80", "TCP"), part(false, 2, Value::Null));
        assert_eq!(find("10.96.0.80", "SCTP"), part(true, 2, Value::Null));
        assert_eq!(find("203.0.113.1", "TCP"), part(true, 1, json!(["198.51.100.0/24"])));

        // A lost table is reported, and comes back with the next change.
        let [_, v6] = packets::table_ids();
        assert_eq!(Nftables::open().unwrap().remove(&[v6]).unwrap().len(), 1);
        let (code, told) = status(place);
        assert_eq!((code, &told["missing_tables"]), (Some(1), &json!([BOTH[1]])), "{told}");
        // A change of IPv4 alone: after its error the agent compares both.
        let [v4, _] = packets::table_ids();
        assert_eq!(Nftables::open().unwrap().remove(&[v4]).unwrap().len(), 1);
        let lines = Lines::start(place, &["explain", "10.96.0.80:80", "--watch"]);
        assert!(!lines.next().contains("packet from"), "there is no table");
        place.write(&cluster(3));
        // The rules follow the maps, and a line says so.
        let all = "packet from 192.0.2.1 (outside) -> translated: one of 3, ";
        let n_lines = (1..10).find(|_| lines.next().contains(all));
        assert!(n_lines.is_some());
        eventually("the tables are back", || status(place).0 == Some(0) && tables() == BOTH);
        let (_, endpoints) = packet(place, "10.96.0.80:80", "");
        assert_eq!(endpoints.len(), 3, "{endpoints:?}");

        // They stay without an agent.
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        let (code, told) = status(place);
        assert_eq!((code, &told["tables"], &told["frontends"]), (Some(0), &json!(BOTH), &Value::Null));
        assert_eq!(packet(place, "10.96.0.80:80", "").0, "translated");

        // An agent that serves no packets removes them.
        let agent = place.start(&QUIET);
        eventually("the tables are gone", || tables().is_empty());
        eventually("the agent answers", || status(place) == (Some(0), Value::Null));
        let explained = place.json(&["explain", "10.96.0.80:80", "-o", "json"]);
        assert_eq!((&explained["verdict"], &explained["packet"]), (&"redirected".into(), &Value::Null));
        let text = place.text(&["explain", "10.96.0.80:80"]);
        assert!(text.contains("the rules of other programs decide"), "{text}");
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

#[test]
fn cleanup_removes_the_rules_for_good() {
    with_node(|place| {
        place.write(&cluster(1));
        let agent = place.start(&[&QUIET[..], &["--packets=all", "--audit-interval=200ms"]].concat());
        eventually("the rules are there", || tables() == BOTH);
        // Foreign rules stay.
        let theirs = TableId { family: Family::V4, name: "theirs".into() };
        let mut nftables = Nftables::open().unwrap();
        let changes = vec![(theirs.clone(), Change::AddTable)];
        nftables.apply(&Transaction { changes, generation: None }).unwrap();
        eventually("the first sync is over", || status(place).1["last_transaction"].is_object());

        let told = place.text(&["cleanup"]);
        for table in BOTH {
            assert!(told.contains(&format!("removed nftables table {table}\n")), "{told}");
        }
        assert_eq!(tables(), [""; 0]);
        // Whatever the agent does next, audits included, it restores nothing.
        for n in 2..5 {
            place.write(&cluster(n));
            thread::sleep(Duration::from_millis(500));
        }
        assert_eq!(tables(), [""; 0]);
        assert!(nftables.has(&theirs).unwrap());
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));

        // The next agent begins anew.
        let agent = place.start(&[&QUIET[..], &["--packets=all"]].concat());
        eventually("the rules are back", || tables() == BOTH);
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

/// The status of a finding of `check`, and its text.
fn finding(place: &Place, what: &str) -> Option<(String, String)> {
    let output = place.run(&["check", "--cgroup", &place.cgroup, "-o", "json"]);
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let found = findings.as_array().unwrap().iter().find(|finding| finding["what"] == what)?;
    Some((text(&found["status"]), text(&found["found"])))
}

/// Firewalls that drop, and bridges whose packets no rules see.
#[test]
fn check_names_what_prevents_others_packets() {
    const NONE: Option<&str> = None;
    with_node(|place| {
        let [own, _] = packets::table_ids();
        let theirs = TableId { family: Family::V6, name: "filter".into() };
        let forward = |policy| Base { kind: ChainType::Filter, hook: Hook::Forward, priority: 0, policy };
        let changes = vec![
            (own, Change::AddTable),
            (theirs.clone(), Change::AddTable),
            (theirs.clone(), Change::AddChain("FORWARD".into(), Some(forward(Policy::Drop)))),
            (theirs, Change::AddChain("OTHER".into(), Some(forward(Policy::Accept)))),
        ];
        let mut nftables = Nftables::open().unwrap();
        assert_eq!(finding(place, "FORWARD drops"), None);
        nftables.apply(&Transaction { changes, generation: None }).unwrap();
        let (status, found) = finding(place, "FORWARD drops").unwrap();
        assert!(status == "note" && found.starts_with("ip6 filter FORWARD: "), "{found}");

        // The host's sysfs shows the host's interfaces.
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NONE).unwrap();
        let without = finding(place, "bridges");
        for bridge in ["cni0", "unused"] {
            text("ip", &["link", "add", bridge, "type", "bridge"]);
        }
        text("ip", &["link", "set", "pod1", "master", "cni0"]);
        // Off by default without the module.
        let _off = fs::write("/proc/sys/net/bridge/bridge-nf-call-ip6tables", "0");
        let with = finding(place, "bridges");
        // The sandbox's cgroup is below it.
        umount2("/sys", MntFlags::MNT_DETACH).unwrap();
        assert_eq!(without, None);
        let (status, found) = with.unwrap();
        assert!(status == "note" && found.starts_with("cni0: "), "{found}");
    });
}

#[test]
fn check_finds_what_kube_proxy_has_left() {
    with_node(|place| {
        let find = |what: &str| finding(place, what);
        let (status, found) = find("kube-proxy").unwrap();
        assert!(status == "ok" || found.starts_with("iptables-legacy"), "{found}");
        assert_eq!(find("packets").unwrap().0, "ok");
        assert_eq!(find("forwarding"), None, "without rules it does not matter");

        let table = |family, name: &str| TableId { family, name: name.into() };
        let base =
            Base { kind: ChainType::Nat, hook: Hook::Prerouting, priority: -100, policy: Policy::Accept };
        let nat = table(Family::V6, "nat");
        let [own, _] = packets::table_ids();
        let changes = vec![
            (table(Family::V4, "kube-proxy"), Change::AddTable),
            (nat.clone(), Change::AddTable),
            (nat.clone(), Change::AddChain("PREROUTING".into(), Some(base))),
            (nat, Change::AddChain("KUBE-SERVICES".into(), None)),
            (own, Change::AddTable),
        ];
        Nftables::open().unwrap().apply(&Transaction { changes, generation: None }).unwrap();
        fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        let (status, found) = find("kube-proxy").unwrap();
        assert_eq!(status, "note", "{found}");
        let names = "nftables table ip kube-proxy, iptables chain KUBE-SERVICES in table ip6 nat: ";
        assert!(found.starts_with(names) && found.contains("`kube-proxy --cleanup`"), "{found}");
        let (status, found) = find("forwarding").unwrap();
        assert!(status == "note" && found.starts_with("/proc/sys/net/ipv4/ip_forward is 0"), "{found}");
    });
}
