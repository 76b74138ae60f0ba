//! ICMP errors about datagrams: each reaches the sender in the sender's own terms.

use lb_core::model::Family;
use lb_tests::bed::{self, FAMILIES, SILENCE};
use serde_json::json;

use super::{
    Expected,
    Place::{self, Far, Node, Other, Outside, Pod},
    To, check, cluster, n_too_big, on_a_bed,
};

/// An endpoint without a server: the ICMP error of its host has the endpoint's address, and the client receives it
/// with the service address.
#[test]
fn closed_ports_of_endpoints() {
    on_a_bed(|bed| {
        bed.follow(&cluster(&json!({}), &[Place::Router]));
        for (from, to) in [
            (Pod, To::ClusterIp),
            (Node, To::ClusterIp),
            (Outside, To::NodePort),
            (Outside, To::LoadBalancer),
        ] {
            check(bed, &[(from, to, Expected::Refused)]);
        }
    });
}

/// More than the links carry at once, and a link on the way that carries less than the first: the sender of
/// IPv6 must learn of it, and routers cut datagrams of IPv4.
#[test]
fn datagrams_where_the_path_narrows() {
    let octets: Vec<u8> = (0..4000_u32).map(|n| n.to_le_bytes()[0]).collect();
    // The other end of the router's narrow link, who calls what, by which policy, and which endpoint answers.
    for (narrow, from, to, policy, endpoint) in [
        (Place::Edge, Outside, To::NodePort, "Cluster", Pod),
        (Place::Edge, Outside, To::LoadBalancer, "Local", Pod),
        (Place::Edge, Outside, To::LoadBalancer, "Cluster", Far),
        (Other, Outside, To::NodePort, "Cluster", Far),
        (Other, Pod, To::ClusterIp, "Cluster", Far),
        (Other, Node, To::ClusterIp, "Cluster", Far),
    ] {
        on_a_bed(|bed| {
            let device = if narrow == Other { "other" } else { "edge" };
            bed.at(Place::Router).set_mtu(device, 1300).unwrap();
            bed.at(narrow).set_mtu("up", 1300).unwrap();
            bed.follow(&cluster(&json!({"externalTrafficPolicy": policy}), &[endpoint]));
            for family in FAMILIES {
                let case = format!("{from:?} to {to:?}, {policy}, {family:?}");
                let at = to.address(family);
                // The first of each direction may be lost.
                let back = bed.at(from).run(|| {
                    let mut answers = (0..20).map(|_| bed::datagram(at, &octets, SILENCE));
                    answers.find_map(Result::ok)
                });
                let (_, back) = back.unwrap_or_else(|| panic!("{case}: no answer"));
                assert!(back == octets, "{case}");
                if family == Family::V6 {
                    let learns = if narrow == Other { from } else { endpoint };
                    assert!(n_too_big(bed, learns, family) > 0, "{case}: {learns:?} got no error");
                }
            }
        });
    }
}
