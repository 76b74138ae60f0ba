use std::io;

use expect_test::expect;
use lb_agent::serve::{LastTransaction, PacketStatus, known::Which};
use lb_core::{
    desired::Settings,
    model::{IssueKind, ObjectRef},
};
use serde_json::json;

use super::*;
use crate::cli::agent::AgentAddress;

fn source() -> SourcePart {
    SourcePart {
        source: "kube".to_owned(),
        is_complete: true,
        serves_snapshot: false,
        last_event_age_seconds: Some(Age(3.24)),
        last_sync_age_seconds: Some(Age(3.2)),
        changes_waiting: 0,
        sync_errors: 0,
    }
}

fn hook(hook: &'static str) -> HookRow {
    let link = Link { program_id: 7, cgroup: Some("/sys/fs/cgroup".into()), is_effective: Some(true) };
    HookRow::new(hook, Ok(link))
}

fn tcp(address: &str) -> AgentAddress {
    AgentAddress::Tcp(address.parse().unwrap())
}

fn answers(place: &str, livez: Answer) -> Asked {
    Asked {
        name: Some((tcp("127.0.0.1:10249"), Ok((200, "socklb".to_owned())))),
        health: Some((tcp(place), livez.clone(), livez)),
        ..Asked::default()
    }
}

fn well() -> Status {
    Status {
        agent: AgentPart::new(&answers("127.0.0.1:10256", Ok((200, String::new()))), &[hook("connect4")]),
        self_test: Some("passed".to_owned()),
        source: Some(source()),
        snapshot: SnapshotPart {
            path: "/var/lib/socklb/snapshot".into(),
            age_seconds: Some(Age(7300.0)),
            services: 12,
            endpoint_slices: 14,
            nodes: 3,
            problem: None,
            write_problem: None,
        },
        pin_path: "/sys/fs/bpf/socklb".into(),
        pin_problem: None,
        maps: vec![
            MapRow { map: "services4", entries: 12, capacity: 65536 },
            MapRow { map: "endpoints4", entries: 262_144, capacity: 262_144 },
        ],
        hooks: vec![hook("connect4"), hook("getpeername6")],
        covers: Some(Extent::Host),
        packets: None,
        excluded_cgroups: Vec::new(),
        other_programs: BTreeMap::new(),
        n_issues: Some(0),
        issues: Vec::new(),
        outdated: Vec::new(),
        refused_sizes: Vec::new(),
        issues_problem: None,
    }
}

#[test]
fn an_agent_at_work() {
    assert!(well().is_attached());
    expect![[r"
        agent     running: 127.0.0.1:10256: /livez says 200
        source    kube: first lists complete
                  last event 3 s ago, last sync 3 s ago, 0 changes waiting
        snapshot  /var/lib/socklb/snapshot: 12 services, 14 slices, 3 nodes, 2 h old
        pins      /sys/fs/bpf/socklb
        covers    all processes of this host
        self-test passed

        MAP            ENTRIES  CAPACITY   FULL
        services4           12     65536    0 %
        endpoints4      262144    262144  100 %

        HOOK          STATE       CGROUP
        connect4      attached    /sys/fs/cgroup
        getpeername6  attached    /sys/fs/cgroup

        no issues
    "]]
    .assert_eq(&well().text());
}

#[test]
fn nothing_at_all() {
    let nobody = Err("127.0.0.1:10249: Connection refused (os error 111)".to_owned());
    let asked = Asked { name: Some((tcp("127.0.0.1:10249"), nobody)), ..Asked::default() };
    let status = Status {
        agent: AgentPart::new(&asked, &[hook("connect4")]),
        self_test: None,
        source: None,
        snapshot: SnapshotPart::new(
            "/var/lib/socklb/snapshot".into(),
            None,
            Err(&SnapshotError::Missing { path: "/var/lib/socklb/snapshot".into() }),
            None,
        ),
        pin_problem: Some("/sys/fs/bpf/socklb: nothing is pinned".to_owned()),
        maps: Vec::new(),
        covers: None,
        hooks: vec![
            HookRow::new("sock_release", Err(LinkProblem::NotNeeded)),
            HookRow::new("connect4", Err(LinkProblem::Missing)),
            HookRow::new("connect6", Err(LinkProblem::Detached)),
            HookRow::new("sendmsg4", Err(LinkProblem::Io(io::Error::other("no")))),
        ],
        n_issues: None,
        ..well()
    };
    assert!(!status.is_attached());
    expect![[r"
        agent     stopped: 127.0.0.1:10249: Connection refused (os error 111)
        source    not known: no agent answers
        snapshot  /var/lib/socklb/snapshot: no snapshot: has an agent run with this --state-dir?
        pins      /sys/fs/bpf/socklb: nothing is pinned
        hooks     not attached: connect4 connect6: calls of these kinds are not served; see HOOK
        hooks     not known: sendmsg4; see HOOK

        HOOK          STATE       CGROUP
        sock_release  not needed  not used on this kernel or with these settings
        connect4      missing     nothing is pinned under this name
        connect6      detached    it was detached, or its cgroup was removed: an agent attaches a new link at its next audit or start
        sendmsg4      unknown     no

        issues are not known
    "]]
    .assert_eq(&status.text());
}

#[test]
fn what_is_wrong_is_said_first() {
    let issue = |port: i64| {
        let kind = IssueKind::InvalidPort { field: format!("spec.ports[{port}].port"), value: port };
        Issue::new(ObjectRef::service("default", "web"), kind)
    };
    let status = Status {
        agent: AgentPart::new(&answers("127.0.0.1:10256", Ok((503, String::new()))), &[hook("connect4")]),
        self_test: Some("failed: TCP over IPv4: connect: Connection refused (os error 111)".to_owned()),
        other_programs: [("cil_sock4_connect".to_owned(), vec!["connect4"])].into(),
        source: Some(SourcePart {
            is_complete: false,
            serves_snapshot: true,
            last_event_age_seconds: None,
            sync_errors: 2,
            changes_waiting: 5,
            ..source()
        }),
        n_issues: Some(25),
        issues: (0..25).map(issue).collect(),
        ..well()
    };
    let text = status.text();
    assert!(text.starts_with("agent     stuck: 127.0.0.1:10256: /livez says 503, /healthz says"), "{text}");
    for part in [
        "does not answer; the snapshot is served",
        "last event never, last sync 3 s ago, 5 changes waiting, 2 syncs failed",
        "self-test failed: TCP over IPv4: connect: Connection refused",
        "  cil_sock4_connect: connect4\n",
        "ISSUES (25)\n",
        "Service default/web: spec.ports[0].port",
        "and 5 more: -o json lists all",
    ] {
        assert!(text.contains(part), "{part}\nis not in\n{text}");
    }
}

/// The agent keeps running after `socklb cleanup`.
#[test]
fn an_agent_whose_programs_are_detached_serves_no_calls() {
    let hooks = vec![HookRow::new("connect4", Err(LinkProblem::Missing))];
    let status = Status {
        agent: AgentPart::new(&answers("127.0.0.1:10256", Ok((200, String::new()))), &hooks),
        self_test: Some("out of date: the programs are no longer attached".to_owned()),
        hooks,
        pin_problem: Some("nothing is pinned under /sys/fs/bpf/socklb".to_owned()),
        maps: Vec::new(),
        covers: None,
        ..well()
    };
    expect![[r"
        agent     detached: 127.0.0.1:10256: /livez says 200, but it serves no calls: its programs are not attached; restart it
        source    kube: first lists complete
                  last event 3 s ago, last sync 3 s ago, 0 changes waiting
        snapshot  /var/lib/socklb/snapshot: 12 services, 14 slices, 3 nodes, 2 h old
        pins      nothing is pinned under /sys/fs/bpf/socklb
        hooks     no program is attached: no calls are served; see HOOK
        self-test out of date: the programs are no longer attached

        HOOK          STATE       CGROUP
        connect4      missing     nothing is pinned under this name

        no issues
    "]].assert_eq(&status.text());
    assert!(!status.text().contains("running") && !status.text().contains("passed"));
}

#[test]
fn an_agent_that_loads_its_programs_is_not_taken_for_one_that_lost_them() {
    let mut asked = answers("127.0.0.1:10256", Ok((200, String::new())));
    let body = lb_agent::telemetry::health::starting(std::time::SystemTime::UNIX_EPOCH);
    asked.health = asked.health.map(|(place, livez, _)| (place, livez, Ok((503, body))));
    let agent = AgentPart::new(&asked, &[]);
    assert_eq!((agent.state, agent.healthy), ("running", Some(false)));
    assert_eq!(agent.not_ready, ["the programs are being loaded"]);
}

#[test]
fn hooks_without_a_program_are_named_at_the_top() {
    let status = Status {
        hooks: vec![
            hook("connect4"),
            HookRow::new("connect6", Err(LinkProblem::Detached)),
            HookRow::new("sendmsg4", Err(LinkProblem::Missing)),
            HookRow::new("sock_release", Err(LinkProblem::NotNeeded)),
        ],
        ..well()
    };
    assert_eq!(
        status.text().lines().nth(5),
        Some("hooks     not attached: connect6 sendmsg4: calls of these kinds are not served; see HOOK")
    );
}

#[test]
fn who_does_not_get_traffic_is_told_why() {
    let body =
        r#"{"notReady":["the Node is being deleted","self-test not run yet: it waits for the first sync"]}"#;
    let mut asked = answers("127.0.0.1:10256", Ok((200, String::new())));
    asked.health = asked.health.map(|(place, livez, _)| (place, livez, Ok((503, body.to_owned()))));
    let full_disk = Some("/var/lib/socklb/snapshot: No space left on device (os error 28)".to_owned());
    let missing = SnapshotError::Missing { path: "/var/lib/socklb/snapshot".into() };
    let status = Status {
        agent: AgentPart::new(&asked, &[hook("connect4")]),
        snapshot: SnapshotPart::new("/var/lib/socklb/snapshot".into(), None, Err(&missing), full_disk),
        refused_sizes: vec!["max-services=20: 123 are served".to_owned()],
        outdated: vec![
            "the source does not answer, since 2026-01-01T00:00:00Z: refused; serving the snapshot"
                .to_owned(),
        ],
        ..well()
    };
    let text = status.text();
    let head: Vec<&str> = text.lines().take(10).collect();
    expect![[r"
        agent     running: 127.0.0.1:10256: /livez says 200
                  not ready: the Node is being deleted
                  not ready: self-test not run yet: it waits for the first sync
        source    kube: first lists complete
                  last event 3 s ago, last sync 3 s ago, 0 changes waiting
        snapshot  /var/lib/socklb/snapshot: no snapshot: has an agent run with this --state-dir?
                  the last write failed: /var/lib/socklb/snapshot: No space left on device (os error 28)
        pins      /sys/fs/bpf/socklb
        refused   max-services=20: 123 are served
        outdated  the source does not answer, since 2026-01-01T00:00:00Z: refused; serving the snapshot
    "]]
    .assert_eq(&(head.join("\n") + "\n"));
}

#[test]
fn what_is_older_than_the_source_is_told() {
    let broken = |last_good| {
        let kind = serde_json::from_value(json!({
            "reason": "BrokenFile", "cause": "line 2: bad", "last_good": last_good, "since": "2026-01-01T00:00:00Z",
        }));
        Issue::new(ObjectRef::file("a.yaml"), kind.unwrap())
    };
    let away = |source: Value| json!({ "lastUpdated": "", "source": source });
    let snapshot = SourcePart { serves_snapshot: true, ..source() };
    for (source, healthz, issues, expected) in [
        (Some(source()), None, vec![], None),
        (Some(source()), Some(json!({})), vec![broken(false)], None),
        (
            Some(source()),
            None,
            vec![broken(true)],
            Some("file a.yaml: line 2: bad; the objects read from it before"),
        ),
        (Some(snapshot), None, vec![], Some("the source does not answer; the snapshot is served")),
        (
            None,
            Some(away(
                json!({"serves": "last-known", "since": "2026-01-01T00:00:00Z", "problem": "refused"}),
            )),
            vec![],
            Some(
                "the source does not answer, since 2026-01-01T00:00:00Z: refused; serving the last known objects",
            ),
        ),
        (
            None,
            Some(away(json!({"serves": "found"}))),
            vec![],
            Some(
                "the source does not answer: its first lists are not complete; serving the state of an earlier agent in the kernel",
            ),
        ),
    ] {
        let found = outdated(source.as_ref(), healthz.as_ref(), &issues);
        assert_eq!(found.len(), usize::from(expected.is_some()), "{found:?}");
        assert!(found.iter().all(|found| found.starts_with(expected.unwrap())), "{found:?}");
    }
}

#[test]
fn who_answers_decides_what_the_agent_is() {
    let at = |name: Option<Answer>, livez: Option<Answer>| {
        let place = || tcp("127.0.0.1:1");
        let asked = Asked {
            name: name.map(|answer| (place(), answer)),
            health: livez.map(|answer| (place(), answer.clone(), answer)),
            ..Asked::default()
        };
        let AgentPart { state, healthy, .. } = AgentPart::new(&asked, &[hook("connect4")]);
        (state, healthy)
    };
    let ok = |text: &str| Some(Ok((200, text.to_owned())));
    let refused = || Some(Err("refused".to_owned()));
    for (name, livez, expected) in [
        (None, None, ("unknown", None)),
        (ok("socklb"), ok(""), ("running", Some(true))),
        (ok("socklb"), None, ("running", None)),
        (None, ok(""), ("running", Some(true))),
        (None, refused(), ("stopped", None)),
        (refused(), refused(), ("stopped", None)),
        (ok("socklb"), refused(), ("stuck", None)),
        (ok("iptables"), ok(""), ("stopped", None)),
    ] {
        assert_eq!(at(name.clone(), livez.clone()), expected, "{name:?} {livez:?}");
    }
}

#[test]
fn a_program_that_the_kernel_does_not_run_is_not_attached() {
    let link = |is_effective, cgroup: Option<&str>| Link {
        program_id: 1,
        cgroup: cgroup.map(Into::into),
        is_effective,
    };
    assert_eq!(HookRow::new("connect4", Ok(link(Some(false), Some("/a")))).state, "detached");
    let unseen = HookRow::new("connect4", Ok(link(None, None)));
    assert_eq!(unseen.state, "attached");
    assert!(unseen.problem.unwrap().contains("--cgroup"));
}

#[test]
fn excluded_cgroups_are_listed_with_their_pods() {
    let row = |cgroup: Option<&str>, id, pod_uid: Option<&str>| ExcludedRow {
        cgroup: cgroup.map(Into::into),
        id,
        pod_uid: pod_uid.map(str::to_owned),
    };
    let rows = vec![
        row(Some("/sys/fs/cgroup/batch"), 7, None),
        row(Some("/sys/fs/cgroup/kubepods/pod0a-1b"), 8, Some("0a-1b")),
        row(None, 9, None),
    ];
    let status = Status { excluded_cgroups: rows, covers: Some(Extent::Node), ..well() };
    assert!(status.text().contains("\ncovers    all processes of this node, which is itself a container\n"));
    expect![[r"

        EXCLUDED CGROUPS (their calls pass unchanged)
          /sys/fs/cgroup/batch
          /sys/fs/cgroup/kubepods/pod0a-1b (pod 0a-1b)
          not found: id 9
    "]]
    .assert_eq(&status.excluded_list());
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["covers"], "node");
    assert_eq!(
        json["excluded_cgroups"][1],
        json!({ "cgroup": "/sys/fs/cgroup/kubepods/pod0a-1b", "id": 8, "pod_uid": "0a-1b" })
    );
    assert_eq!(well().excluded_list(), "");
}

/// Names that scripts use.
#[test]
fn the_json_has_these_names() {
    let mut status = serde_json::to_value(well()).unwrap();
    status["hooks"].as_array_mut().unwrap().truncate(1);
    status["maps"].as_array_mut().unwrap().truncate(1);
    let expected = json!({
        "agent": {
            "state": "running",
            "healthy": true,
            "reason": "127.0.0.1:10256: /livez says 200",
            "not_ready": [],
        },
        "self_test": "passed",
        "source": {
            "source": "kube",
            "complete": true,
            "serves_snapshot": false,
            "last_event_age_seconds": 3.2,
            "last_sync_age_seconds": 3.2,
            "changes_waiting": 0,
            "sync_errors": 0,
        },
        "snapshot": {
            "path": "/var/lib/socklb/snapshot",
            "age_seconds": 7300.0,
            "services": 12,
            "endpoint_slices": 14,
            "nodes": 3,
            "problem": null,
            "write_problem": null,
        },
        "pin_path": "/sys/fs/bpf/socklb",
        "pin_problem": null,
        "maps": [{ "map": "services4", "entries": 12, "capacity": 65536 }],
        "hooks": [{
            "hook": "connect4",
            "state": "attached",
            "cgroup": "/sys/fs/cgroup",
            "program_id": 7,
            "problem": null,
        }],
        "covers": "host",
        "excluded_cgroups": [],
        "other_programs": {},
        "issues_of_agent": 0,
        "issues": [],
        "outdated": [],
        "packets": null,
        "refused_sizes": [],
        "issues_problem": null,
    });
    assert_eq!(status, expected);
}

#[test]
fn tables_for_packets_are_named_with_what_is_wrong() {
    let now = SystemTime::now();
    let tables = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let both = tables(&["ip socklb", "ip6 socklb"]);
    let last =
        LastTransaction { n_changes: 3, took: Duration::from_micros(2140), at: now - Duration::from_secs(5) };
    let agent = |last, problem: Option<&str>| {
        let (tables, problem) = (both.clone(), problem.map(Into::into));
        Some(PacketStatus { tables, n_frontends: 12, n_elements: 140, last, problem })
    };
    let state = State::new(Settings::of_node("node"), Vec::new(), Capacity::default(), &Image::default());
    let known = |packets| Known { packets, ..Known::of(&state.view(), Which::Issues) };
    let mut text = String::new();
    for (found, known, is_whole) in [
        (Ok(both.clone()), Some(known(agent(Some(last), None))), true),
        (Ok(both.clone()), Some(known(agent(Some(last), Some("nftables: no")))), true),
        (Ok(tables(&["ip socklb"])), Some(known(agent(Some(last), None))), false),
        (Ok(Vec::new()), Some(known(agent(None, None))), true),
        (Err("not permitted".to_owned()), Some(known(agent(Some(last), None))), true),
        (Ok(both.clone()), None, true),
        (Ok(both.clone()), Some(known(None)), true),
    ] {
        let packets = PacketsPart::new(found, known.as_ref(), now);
        text += &packets.as_ref().unwrap().text();
        assert_eq!(Status { packets, ..well() }.has_tables(), is_whole);
    }
    expect![[r"
        packets   nftables tables ip socklb, ip6 socklb: 12 frontends, 140 elements
                  last transaction 5 s ago: 3 changes in 2.1 ms
        packets   nftables tables ip socklb, ip6 socklb: 12 frontends, 140 elements
                  last transaction 5 s ago: 3 changes in 2.1 ms
                  nftables: no
        packets   nftables tables ip socklb: 12 frontends, 140 elements
                  the kernel lacks ip6 socklb: packets are not served; the next audit restores it (--audit-interval), unless `socklb cleanup` removed it
                  last transaction 5 s ago: 3 changes in 2.1 ms
        packets   no transaction yet
        packets   last transaction 5 s ago: 3 changes in 2.1 ms
                  not permitted
        packets   nftables tables ip socklb, ip6 socklb
        packets   nftables tables ip socklb, ip6 socklb
                  the agent runs with --packets=off, and could not remove these rules: restart it, or run `socklb cleanup`
    "]].assert_eq(&text);
    assert_eq!(PacketsPart::new(Ok(Vec::new()), Some(&known(None)), now), None);
    assert_eq!(PacketsPart::new(Err("not permitted".to_owned()), None, now), None);

    let packets = PacketsPart::new(Ok(both.clone()), Some(&known(agent(Some(last), None))), now);
    let json = serde_json::to_value(Status { packets, ..well() }).unwrap();
    assert_eq!(
        json["packets"],
        json!({
            "tables": ["ip socklb", "ip6 socklb"],
            "missing_tables": [],
            "frontends": 12,
            "elements": 140,
            "last_transaction": {"changes": 3, "duration_seconds": 0.00214, "age_seconds": 5.0},
            "problem": null,
        })
    );
}
