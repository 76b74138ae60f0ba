//! Pods behind a bridge, as CNI's plugin `bridge` makes it: in one network, so that their packets to each
//! other are bridged and not routed.

use std::fs;

use lb_tests::{
    Feature,
    bed::{
        Bed, FAMILIES,
        Place::{self, Far, Node, Outside, Pod, Second},
        address,
    },
    command::text,
    require,
};
use serde_json::json;

use crate::packets::{
    ALL_FROM_POD, ALL_MASQUERADED, Expected, LOCAL_KEPT, Source, To, check, cluster, on_a_bed,
};

/// Puts the bed's pods behind a bridge of the node, and lets rules see what is bridged, or not.
fn bridge(bed: &Bed, is_filtered: bool) {
    let gateways = FAMILIES.map(|family| [[10, 1, 1, 1], [10, 1, 2, 1]].map(|v4| address(family, v4)));
    let ip = |line: &str| {
        text("ip", &line.split(' ').collect::<Vec<_>>());
    };
    bed.at(Node).run(|| {
        ip("link add cni0 type bridge");
        for port in ["pod", "second"] {
            ip(&format!("address flush dev {port}"));
            ip(&format!("link set {port} master cni0"));
            ip(&format!("link set {port} type bridge_slave hairpin on"));
        }
        for gateway in gateways.as_flattened() {
            let (prefix, nodad) = if gateway.is_ipv4() { (24, "") } else { (64, " nodad") };
            ip(&format!("address add {gateway}/{prefix} dev cni0{nodad}"));
        }
        ip("link set cni0 up");
        for setting in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
            let written =
                fs::write(format!("/proc/sys/net/bridge/{setting}"), if is_filtered { "1" } else { "0" });
            // Without the module, rules see nothing that is bridged.
            assert!(written.is_ok() || !is_filtered, "{setting}: {written:?}");
        }
    });
    for pod in [Pod, Second] {
        bed.at(pod).run(|| {
            for network in ["10.1.0.0/16", "fd00:10:1::/48"] {
                ip(&format!("route add {network} dev up"));
            }
        });
    }
}

fn behind_a_bridge(is_filtered: bool, test: impl FnOnce(&mut Bed)) {
    on_a_bed(|bed| {
        bridge(bed, is_filtered);
        bed.follow(&cluster(&json!({}), &[Pod, Second, Far]));
        test(bed);
    });
}

/// What does not depend on whether rules see what is bridged.
fn check_routed(bed: &mut Bed) {
    check(bed, &[(Outside, To::NodePort, ALL_MASQUERADED), (Node, To::ClusterIp, ALL_MASQUERADED)]);
    // Masqueraded, so the answer comes back through the node.
    check(bed, &[(Pod, To::NodePort, ALL_MASQUERADED), (Pod, To::LoadBalancer, ALL_MASQUERADED)]);
    bed.follow(&cluster(&json!({"externalTrafficPolicy": "Local"}), &[Pod, Second, Far]));
    check(bed, &[(Outside, To::NodePort, LOCAL_KEPT), (Outside, To::LoadBalancer, LOCAL_KEPT)]);
    // To itself.
    bed.follow(&cluster(&json!({}), &[Pod]));
    check(bed, &[(Pod, To::ClusterIp, Expected::Reach(&[(Pod, Source::Node)]))]);
}

#[test]
fn pods_behind_a_bridge_that_rules_see() {
    if !require(Feature::BridgeFilter) {
        return;
    }
    behind_a_bridge(true, |bed| {
        check(bed, &[(Pod, To::ClusterIp, ALL_FROM_POD)]);
        check_routed(bed);
    });
}

/// As with kube-proxy: an endpoint behind the same bridge answers the pod itself, whose connection is with
/// another address. `socklb check` reports such bridges.
#[test]
fn pods_behind_a_bridge_that_rules_do_not_see() {
    const SAME_BRIDGE: &[Place] = &[Second];
    behind_a_bridge(false, |bed| {
        check_routed(bed);
        bed.follow(&cluster(&json!({}), &[Far]));
        check(bed, &[(Pod, To::ClusterIp, Expected::Reach(&[(Far, Source::Kept)]))]);
        bed.follow(&cluster(&json!({}), SAME_BRIDGE));
        check(bed, &[(Pod, To::ClusterIp, Expected::Dropped)]);
    });
}
