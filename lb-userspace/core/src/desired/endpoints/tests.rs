use proptest::{prelude::*, sample::Index};
use serde_json::json;

use super::*;
use crate::{
    desired::fixture::{endpoint, slice, topology, topology_of, weighted},
    model::{Protocol, fixture},
};

fn port(name: &str, protocol: Protocol) -> ServicePort {
    ServicePort { name: name.into(), protocol, port: 80, node_port: None }
}

/// The unnamed TCP port that the slices of the fixture have.
fn unite<'a>(slices: impl IntoIterator<Item = &'a Slice>) -> PortEndpoints<'a> {
    PortEndpoints::new(&port("", Protocol::Tcp), Family::V4, slices)
}

fn addresses(set: &[SocketAddr]) -> Vec<String> {
    set.iter().map(ToString::to_string).collect()
}

/// Checks which of the addresses `10.1.0.N` are in the cluster set and in the local set of `node-a`, zone
/// `a`.
fn check(rule: &str, endpoints: &[&str], cluster: &[u8], local: &[u8]) {
    let slice = slice(endpoints);
    let (known, topology) = (unite([&slice]), topology());
    for (scope, expected) in [(Scope::Cluster, cluster), (Scope::Node("node-a"), local)] {
        let expected: Vec<_> = expected.iter().map(|last| format!("10.1.0.{last}:8080")).collect();
        assert_eq!(addresses(&known.set(scope, &topology)), expected, "{rule}: {scope:?} of {endpoints:#?}");
    }
}

/// R5 (KEP-1669): ready endpoints first; only without any, those that serve while they terminate.
#[test]
fn r5_first_and_second_choice() {
    check("ready only", &["10.1.0.1 node-b rs", "10.1.0.2 node-b -"], &[1], &[]);
    check("a ready one excludes the second choice", &["10.1.0.1 node-b rs", "10.1.0.2 node-b st"], &[1], &[]);
    check("second choice", &["10.1.0.1 node-b st", "10.1.0.2 node-b -"], &[1], &[]);
    check("terminating and no longer serving", &["10.1.0.1 node-b t"], &[], &[]);
    check("serving, not ready, not terminating", &["10.1.0.1 node-b s"], &[], &[]);
    check(
        "publishNotReadyAddresses: ready while terminating",
        &["10.1.0.1 node-b rt", "10.1.0.2 node-b st"],
        &[1],
        &[],
    );
    check("ready counts whatever serving says", &["10.1.0.1 node-b r"], &[1], &[]);
    check("none at all", &[], &[], &[]);
}

/// R5: the second choice is taken separately for the cluster set and the local set.
#[test]
fn r5_the_second_choice_is_separate_for_each_set() {
    check("ready elsewhere", &["10.1.0.1 node-b rs", "10.1.0.2 node-a st"], &[1], &[2]);
    check("ready here", &["10.1.0.1 node-a rs", "10.1.0.2 node-b st"], &[1], &[1]);
    check("none ready", &["10.1.0.1 node-a st", "10.1.0.2 node-b st"], &[1, 2], &[1]);
}

/// R4: an endpoint is local if it names this node.
#[test]
fn r4_an_endpoint_without_a_node_is_never_local() {
    check("no node", &["10.1.0.1 - rs"], &[1], &[]);
    check(
        "names are compared as a whole",
        &["10.1.0.1 node-a.example rs", "10.1.0.2 node-a rs"],
        &[1, 2],
        &[2],
    );
}

/// R7 (`topologyModeFromHints`): node hints, then zone hints, each only if every ready endpoint has one and
/// at least one names this node or zone.
#[test]
fn r7_hints() {
    check(
        "same zone",
        &["10.1.0.1 node-b rs zone=b", "10.1.0.2 node-c rs zone=a", "10.1.0.3 node-b rs zone=b zone=a"],
        &[2, 3],
        &[],
    );
    check(
        "one ready endpoint without a hint",
        &["10.1.0.1 node-b rs", "10.1.0.2 node-c rs zone=a"],
        &[1, 2],
        &[],
    );
    check(
        "no hint names our zone",
        &["10.1.0.1 node-b rs zone=b", "10.1.0.2 node-b rs zone=c"],
        &[1, 2],
        &[],
    );
    check(
        "endpoints that are not ready do not matter",
        &[
            "10.1.0.1 node-b rs zone=b",
            "10.1.0.2 node-c rs zone=a",
            "10.1.0.3 node-c s",
            "10.1.0.4 node-c st",
        ],
        &[2],
        &[],
    );
    check(
        "a hint of an endpoint that is not ready does not start the mode",
        &["10.1.0.1 node-b rs zone=b", "10.1.0.2 node-c s zone=a"],
        &[1],
        &[],
    );
    check(
        "same node before same zone",
        &["10.1.0.1 node-c rs zone=a node=node-c", "10.1.0.2 node-a rs zone=a node=node-a"],
        &[2],
        &[2],
    );
    check(
        "no node hint names us: same zone",
        &["10.1.0.1 node-c rs zone=a node=node-c", "10.1.0.2 node-b rs zone=b node=node-b"],
        &[1],
        &[],
    );
    check(
        "not all have node hints: same zone",
        &["10.1.0.1 node-c rs zone=a", "10.1.0.2 node-a rs zone=a node=node-a", "10.1.0.3 node-b rs zone=b"],
        &[1, 2],
        &[2],
    );
    check(
        "the local set ignores hints",
        &["10.1.0.1 node-a rs zone=b", "10.1.0.2 node-c rs zone=a"],
        &[2],
        &[1],
    );
    check(
        "the second choice ignores hints",
        &["10.1.0.1 node-b st zone=b", "10.1.0.2 node-c st zone=a"],
        &[1, 2],
        &[],
    );
    check(
        "hints against the node's own place count",
        &["10.1.0.1 node-b rs zone=a", "10.1.0.2 node-a rs zone=b"],
        &[1],
        &[2],
    );
}

/// Passive health: calls spill to every ready endpoint, if hints leave some out.
#[test]
fn calls_spill_to_the_ready_endpoints_that_hints_leave_out() {
    for (endpoints, expected) in [
        (&["10.1.0.1 node-b rs", "10.1.0.2 node-b rs"][..], &[][..]),
        (&["10.1.0.1 node-b rs zone=a", "10.1.0.2 node-b rs zone=b"], &["10.1.0.2:8080"]),
        (&["10.1.0.2 node-b rs node=node-b", "10.1.0.1 node-a rs node=node-a"], &["10.1.0.2:8080"]),
        // Hints that leave none out, and hints that do not apply.
        (&["10.1.0.1 node-b rs zone=a", "10.1.0.2 node-b rs zone=a zone=b"], &[]),
        (&["10.1.0.1 node-b rs zone=b", "10.1.0.2 node-b rs zone=c"], &[]),
        (&["10.1.0.1 node-b rs zone=a", "10.1.0.2 node-b rs"], &[]),
        // Only ready ones.
        (&["10.1.0.1 node-b rs zone=a", "10.1.0.2 node-b st zone=b", "10.1.0.3 node-b s zone=b"], &[]),
        (&["10.1.0.1 node-b st zone=a", "10.1.0.2 node-b st zone=b"], &[]),
        (&[], &[]),
    ] {
        let slice = slice(endpoints);
        let spill = unite([&slice]).spill(&topology());
        assert_eq!(addresses(&spill), expected, "{endpoints:?}");
        assert!(spill.is_sorted(), "{endpoints:?}");
    }
}

/// R7: a node without the zone label has no zone mode; node mode needs no label.
#[test]
fn r7_a_node_without_a_zone() {
    let slice = slice(&["10.1.0.1 node-b rs zone=b", "10.1.0.2 node-c rs zone=a"]);
    let set = unite([&slice]).set(Scope::Cluster, &topology_of("node-x"));
    assert_eq!(addresses(&set), ["10.1.0.1:8080", "10.1.0.2:8080"]);

    let slice = self::slice(&["10.1.0.1 node-b rs node=node-b", "10.1.0.2 node-x rs node=node-x"]);
    let set = unite([&slice]).set(Scope::Cluster, &topology_of("node-x"));
    assert_eq!(addresses(&set), ["10.1.0.2:8080"]);
}

/// R7: the same endpoints give each node its own set.
#[test]
fn r7_each_node_has_its_own_set() {
    let slice = slice(&["10.1.0.1 node-a rs zone=a node=node-a", "10.1.0.2 node-b rs zone=b node=node-b"]);
    for (node, expected) in [
        ("node-a", vec!["10.1.0.1:8080"]),
        ("node-b", vec!["10.1.0.2:8080"]),
        ("node-c", vec!["10.1.0.1:8080"]),
    ] {
        assert_eq!(addresses(&unite([&slice]).set(Scope::Cluster, &topology_of(node))), expected, "{node}");
    }
}

/// R4: ports match by name and protocol, never by number; one name may have another number in each slice.
#[test]
fn r4_ports_match_by_name_and_protocol() {
    let slices = [
        fixture::slice(&json!({
            "metadata": {"name": "one"},
            "ports": [{"name": "http", "port": 8080}, {"name": "http", "port": 8081, "protocol": "UDP"}],
            "endpoints": [{"addresses": ["10.1.0.1"]}],
        })),
        fixture::slice(&json!({
            "metadata": {"name": "two"},
            "ports": [{"name": "http", "port": 9090}, {"name": "metrics", "port": 80}],
            "endpoints": [{"addresses": ["10.1.0.2"]}],
        })),
        fixture::slice(&json!({"metadata": {"name": "three"}, "endpoints": [{"addresses": ["10.1.0.3"]}]})),
    ];
    for (name, protocol, expected) in [
        ("http", Protocol::Tcp, vec!["10.1.0.1:8080", "10.1.0.2:9090"]),
        ("http", Protocol::Udp, vec!["10.1.0.1:8081"]),
        ("metrics", Protocol::Tcp, vec!["10.1.0.2:80"]),
        ("", Protocol::Tcp, vec!["10.1.0.3:8080"]),
        ("HTTP", Protocol::Tcp, vec![]),
    ] {
        let known = PortEndpoints::new(&port(name, protocol), Family::V4, &slices);
        assert_eq!(addresses(&known.set(Scope::Cluster, &topology())), expected, "{name} {protocol}");
    }
}

/// R4: the families are separate.
#[test]
fn r4_slices_count_for_their_family() {
    let slices = [
        slice(&["10.1.0.1 node-a rs"]),
        fixture::slice(&json!({"addressType": "IPv6", "endpoints": [endpoint("fd00::1 node-a rs")]})),
    ];
    for (family, expected) in [(Family::V4, "10.1.0.1:8080"), (Family::V6, "[fd00::1]:8080")] {
        let known = PortEndpoints::new(&port("", Protocol::Tcp), family, &slices);
        assert_eq!(addresses(&known.set(Scope::Cluster, &topology())), [expected]);
    }
}

/// R4: an address in several slices counts once; a terminating entry does not hide another.
#[test]
fn r4_duplicates() {
    for (one, two, cluster) in [
        ("10.1.0.1 node-a rs", "10.1.0.1 node-a rs", vec!["10.1.0.1:8080"]),
        ("10.1.0.1 node-a rs", "10.1.0.1 node-a st", vec!["10.1.0.1:8080"]),
        ("10.1.0.1 node-a s", "10.1.0.1 node-a st", vec![]),
        ("10.1.0.1 node-a -", "10.1.0.1 node-a rs", vec!["10.1.0.1:8080"]),
    ] {
        let (one, two) = (slice(&[one]), slice(&[two]));
        for slices in [[&one, &two], [&two, &one]] {
            assert_eq!(addresses(&unite(slices).set(Scope::Cluster, &topology())), cluster, "{slices:?}");
        }
    }
}

/// The shares of the cluster set, by the last octet.
fn shares_of<'a>(slices: impl IntoIterator<Item = &'a Slice>) -> String {
    let known = unite(slices);
    let set = known.set(Scope::Cluster, &topology());
    let shares = known.shares(&set, &Ramp::default()).unwrap_or_else(|| vec![0; set.len()].into());
    assert_eq!(shares.len(), set.len());
    let shown = set.iter().zip(&*shares).map(|(address, share)| {
        let ip = address.ip().to_string();
        format!("{}={share}", ip.rsplit('.').next().unwrap())
    });
    shown.collect::<Vec<_>>().join(" ")
}

/// The largest share of a set is 255, the least 1. Here 0 stands for equal shares.
#[test]
fn shares_follow_the_weights_of_slices() {
    let (one, two, three) = ("10.1.0.1 - rs", "10.1.0.2 - rs", "10.1.0.3 - rs");
    for (slices, expected) in [
        (vec![weighted("7", &[one, two])], "1=0 2=0"),
        (vec![weighted("50", &[one]), weighted("100", &[two, three])], "1=128 2=255 3=255"),
        // Without the annotation: 100.
        (vec![slice(&[one]), weighted("100", &[two])], "1=0 2=0"),
        (vec![slice(&[one]), weighted("200", &[two])], "1=128 2=255"),
        (vec![weighted("1", &[one]), weighted("65535", &[two])], "1=1 2=255"),
        (vec![weighted("65534", &[one]), weighted("65535", &[two])], "1=0 2=0"),
        // The largest of the set counts, not that of an endpoint that is left out.
        (vec![weighted("1", &[one]), weighted("2", &[two]), weighted("9", &["10.1.0.3 - s"])], "1=128 2=255"),
        // 0: no new calls.
        (vec![weighted("0", &[one]), weighted("1", &[two])], "2=0"),
        (vec![weighted("0", &[one]), weighted("1", &["10.1.0.2 - st"])], "2=0"),
        (vec![weighted("0", &[one, "10.1.0.2 - st"])], ""),
        // The weight is that of the entry that counts.
        (
            vec![weighted("1", &[one]), weighted("3", &["10.1.0.1 - st"]), weighted("2", &[two])],
            "1=128 2=255",
        ),
        (vec![weighted("0", &[one]), weighted("1", &[one]), weighted("2", &[two])], "1=128 2=255"),
    ] {
        assert_eq!(shares_of(&slices), expected, "{slices:#?}");
        assert_eq!(shares_of(slices.iter().rev()), expected, "{slices:#?}");
    }
}

/// R7: endpoints of weight 0 matter as little as those that are not ready.
#[test]
fn hints_of_endpoints_of_weight_0_do_not_count() {
    for (zero, expected) in [("10.1.0.3 - rs", "1=0"), ("10.1.0.3 - rs zone=a", "1=0")] {
        let hinted = slice(&["10.1.0.1 - rs zone=a", "10.1.0.2 - rs zone=b"]);
        assert_eq!(shares_of(&[hinted, weighted("0", &[zero])]), expected, "{zero}");
    }
    let (other, here) = (slice(&["10.1.0.1 - rs zone=b", "10.1.0.2 - rs zone=b"]), "10.1.0.3 - rs zone=a");
    assert_eq!(shares_of(&[other, weighted("0", &[here])]), "1=0 2=0");
}

/// R10: they serve.
#[test]
fn sockets_stay_with_endpoints_of_weight_0() {
    let slices = [weighted("0", &["10.1.0.1 - rs"]), slice(&["10.1.0.2 - rs"])];
    assert!(unite(&slices).keeps_sockets(&"10.1.0.1:8080".parse().unwrap()));
}

#[test]
fn every_endpoint_that_is_left_out_has_a_reason() {
    let reasons = |scope, endpoints: &[&str]| -> Vec<String> {
        let slice = slice(endpoints);
        let known = unite([&slice]);
        let topology = topology();
        let judged = known.classify(scope, &topology);
        judged.map(|(_, _, left_out)| left_out.map_or("in".to_owned(), |reason| reason.to_string())).collect()
    };
    let endpoints = [
        "10.1.0.1 node-a rs",
        "10.1.0.2 node-b s",
        "10.1.0.3 node-b st",
        "10.1.0.4 node-b t",
        "10.1.0.5 - rs",
    ];
    assert_eq!(
        reasons(Scope::Cluster, &endpoints),
        ["in", "not ready", "terminating, and others are ready", "terminating and not serving", "in"]
    );
    let drained = weighted("0", &["10.1.0.1 - rs"]);
    let reason = unite([&drained]).classify(Scope::Cluster, &topology()).next().unwrap().2.unwrap();
    assert_eq!(reason.to_string(), "weight 0");
    let other = "on another node, and the policy is Local";
    assert_eq!(reasons(Scope::Node("node-a"), &endpoints), ["in", other, other, other, other]);
    assert_eq!(
        reasons(Scope::Cluster, &["10.1.0.1 node-a rs zone=a", "10.1.0.2 node-b rs zone=b"]),
        ["in", "hinted to other zones"]
    );
    assert_eq!(
        reasons(Scope::Cluster, &["10.1.0.1 node-a rs node=node-a", "10.1.0.2 node-b rs node=node-b"]),
        ["in", "hinted to other nodes"]
    );
}

/// An endpoint line over few addresses, nodes and zones, so that duplicates and shared hints are common.
fn any_endpoint() -> impl Strategy<Value = String> {
    ("[1-5]", "node-a|node-b|-", "r?s?t?", "( zone=[ab])?", "( node=node-[ab])?").prop_map(
        |(last, node, state, zone, node_hint)| format!("10.1.0.{last} {node} {state}-{zone}{node_hint}"),
    )
}

proptest! {
    /// R4: the result does not depend on how endpoints are split into slices, or on their order.
    #[test]
    fn r4_splitting_and_order_do_not_matter(
        lines in prop::collection::vec(any_endpoint(), 0..10),
        parts in prop::collection::vec(any::<Index>(), 10),
        n_parts in 1usize..4,
        seed in any::<Index>(),
    ) {
        let texts: Vec<_> = lines.iter().map(String::as_str).collect();
        let whole = slice(&texts);
        let mut split = vec![Vec::new(); n_parts];
        for (text, part) in texts.iter().zip(&parts) {
            split[part.index(n_parts)].push(*text);
        }
        let mut slices: Vec<_> = split.iter().map(|texts| slice(texts)).collect();
        slices.rotate_left(seed.index(n_parts));
        for slice in &mut slices {
            slice.endpoints.reverse();
        }
        let (one, many) = (unite([&whole]), unite(&slices));
        for scope in [Scope::Cluster, Scope::Node("node-a"), Scope::Node("node-b")] {
            prop_assert_eq!(one.set(scope, &topology()), many.set(scope, &topology()));
        }
    }

    /// R5, R7: properties of every set.
    #[test]
    fn r5_sets_hold_usable_endpoints_only(lines in prop::collection::vec(any_endpoint(), 0..10)) {
        let texts: Vec<_> = lines.iter().map(String::as_str).collect();
        let slice = slice(&texts);
        let known = unite([&slice]);
        for scope in [Scope::Cluster, Scope::Node("node-a")] {
            let judged: Vec<_> = known.classify(scope, &topology()).collect();
            let usable = |endpoint: &SliceEndpoint| endpoint.ready || (endpoint.serving && endpoint.terminating);
            let chosen: Vec<_> = judged.iter().filter(|(_, _, left_out)| left_out.is_none()).collect();
            prop_assert!(chosen.iter().all(|(_, endpoint, _)| usable(endpoint) && is_in(scope, endpoint)));
            // It is not empty while the scope holds a usable endpoint, and it does not mix ready and
            // terminating ones.
            let any_usable = judged.iter().any(|(_, endpoint, _)| usable(endpoint) && is_in(scope, endpoint));
            prop_assert_eq!(chosen.is_empty(), !any_usable);
            let n_ready = chosen.iter().filter(|(_, endpoint, _)| endpoint.ready).count();
            prop_assert!(n_ready == 0 || n_ready == chosen.len());
            let set = known.set(scope, &topology());
            prop_assert!(set.is_sorted_by(|a, b| a < b));
        }
    }
}
