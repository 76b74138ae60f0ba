//! Topologies for tests, and frontends as text.

use std::net::IpAddr;

use lb_common::layout::frontend_flags::{EXTERNAL_LOCAL, NO_LOCAL_ENDPOINT};
use serde_json::{Value, json};

use super::{Frontend, Settings, Topology};
use crate::model::{Node, Slice, fixture};

/// The default settings of `node-a`.
pub(crate) fn settings() -> Settings {
    Settings::of_node("node-a")
}

/// `node-a` (this node) and `node-c` in zone `a`, `node-b` in zone `b`, each with an address of each family.
pub(crate) fn nodes() -> Vec<Node> {
    vec![
        fixture::node("node-a", "a", &["192.168.0.1", "fd01::1"]),
        fixture::node("node-b", "b", &["192.168.0.2", "fd01::2"]),
        fixture::node("node-c", "a", &["192.168.0.3", "fd01::3"]),
    ]
}

/// The topology of [`nodes`] as seen from a node.
pub(crate) fn topology_of(node_name: &str) -> Topology {
    Topology::new(&nodes(), &Settings { node_name: node_name.into(), ..settings() }, &[])
}

/// The topology of [`nodes`] as seen from `node-a`.
pub(crate) fn topology() -> Topology {
    topology_of("node-a")
}

/// An endpoint from one line: `address node state [hint...]`, where the node may be `-`, the state is letters
/// out of `r`eady, `s`erving, `t`erminating (or `-`), and hints are `zone=NAME` or `node=NAME`.
///
/// No rule uses the zone of the endpoint.
pub(crate) fn endpoint(line: &str) -> Value {
    let words: Vec<_> = line.split_whitespace().collect();
    let [address, node, state, hints @ ..] = &words[..] else { panic!("{line}") };
    let named = |prefix: &str| -> Vec<_> {
        hints.iter().filter_map(|hint| hint.strip_prefix(prefix)).map(|name| json!({"name": name})).collect()
    };
    json!({
        "addresses": [address],
        "nodeName": Some(node).filter(|node| **node != "-"),
        "conditions": {
            "ready": state.contains('r'), "serving": state.contains('s'), "terminating": state.contains('t'),
        },
        "hints": {"forZones": named("zone="), "forNodes": named("node=")},
    })
}

/// The slice `web-1` of the Service `default/web`, port 8080, with endpoints in the form of [`endpoint`].
pub(crate) fn slice(endpoints: &[&str]) -> Slice {
    let endpoints: Vec<_> = endpoints.iter().map(|line| endpoint(line)).collect();
    fixture::slice(&json!({"endpoints": endpoints}))
}

/// As [`slice`], another slice with an annotation for its weight.
pub(crate) fn weighted(weight: &str, endpoints: &[&str]) -> Slice {
    let endpoints: Vec<_> = endpoints.iter().map(|line| endpoint(line)).collect();
    let metadata = json!({"name": format!("web-{weight}"), "annotations": {"socklb.io/weight": weight}});
    fixture::slice(&json!({"metadata": metadata, "endpoints": endpoints}))
}

/// One frontend as `address kind endpoints [flags]`; endpoints without the common start of their addresses.
pub(crate) fn line(frontend: &Frontend) -> String {
    let endpoints: Vec<_> = frontend.endpoints.iter().map(ToString::to_string).collect();
    let mut line = format!("{} {:?} {}", frontend.address, frontend.kind, endpoints.join(" "));
    for (flag, name) in [(EXTERNAL_LOCAL, "external-local"), (NO_LOCAL_ENDPOINT, "no-local-endpoint")] {
        if frontend.flags & flag != 0 {
            line = format!("{} ({name})", line.trim_end());
        }
    }
    line.trim_end().to_owned()
}

/// Frontends as text, one line each.
pub(crate) fn lines(frontends: &[Frontend]) -> Vec<String> {
    frontends.iter().map(line).collect()
}

/// Parses an address.
pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
