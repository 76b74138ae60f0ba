//! Rules for packets that the kernel's version does not decide.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
};

use lb_core::{
    model::Protocol::Udp,
    packets::{
        nft::{Change, Expression, Rule, Table, Transaction, Verdict},
        table_ids,
    },
};
use lb_tests::{
    bed::{
        self, Bed, FAMILIES, PATIENCE,
        Place::{self, Far, Node, Other, Outside, Pod, Second},
        SILENCE,
    },
    cluster::Cluster,
};
use serde_json::json;

use crate::packets::{
    ALL_FROM_POD, ALL_MASQUERADED, Expected, Open, Source, To, WAYS, check, cluster, on_a_bed, server,
};

type Foreign = fn(&Table) -> Vec<Change>;
#[test]
fn internal_policy_local() {
    on_a_bed(|bed| {
        let local = json!({"internalTrafficPolicy": "Local"});
        bed.follow(&cluster(&local, &[Second, Far]));
        check(
            bed,
            &[
                (Pod, To::ClusterIp, Expected::Reach(&[(Second, Source::Kept)])),
                (Second, To::ClusterIp, Expected::Reach(&[(Second, Source::Node)])),
                (Node, To::ClusterIp, Expected::Reach(&[(Second, Source::Node)])),
                (Outside, To::ClusterIp, Expected::Reach(&[(Second, Source::Node)])),
                (Outside, To::NodePort, Expected::Reach(&[(Second, Source::Node), (Far, Source::Node)])),
            ],
        );
        bed.follow(&cluster(&local, &[Far]));
        for from in [Pod, Node, Outside] {
            check(bed, &[(from, To::ClusterIp, Expected::Refused)]);
        }
    });
}

#[test]
fn a_service_without_endpoints_refuses() {
    on_a_bed(|bed| {
        for policy in ["Cluster", "Local"] {
            bed.follow(&cluster(&json!({"externalTrafficPolicy": policy}), &[]));
            for from in [Pod, Node, Outside] {
                for to in [To::ClusterIp, To::NodePort, To::ExternalIp, To::LoadBalancer] {
                    check(bed, &[(from, to, Expected::Refused)]);
                }
            }
        }
    });
}

/// Programs of nodes as endpoints.
#[test]
fn endpoints_on_nodes() {
    on_a_bed(|bed| {
        bed.follow(&cluster(&json!({}), &[Node, Other]));
        // What the node itself receives is not masqueraded, since the answer passes here anyway.
        let from_outside = Expected::Reach(&[(Node, Source::Kept), (Other, Source::Node)]);
        check(
            bed,
            &[
                (Pod, To::ClusterIp, Expected::Reach(&[(Node, Source::Kept), (Other, Source::Kept)])),
                (Node, To::ClusterIp, Expected::Reach(&[(Node, Source::Node), (Other, Source::Node)])),
                (Outside, To::ClusterIp, from_outside),
                (Outside, To::NodePort, from_outside),
                (Node, To::NodePort, Expected::Reach(&[(Node, Source::Node), (Other, Source::Node)])),
                (Outside, To::LoadBalancer, from_outside),
            ],
        );
    });
}

#[test]
fn source_ranges() {
    on_a_bed(|bed| {
        let limited = |ranges: &[&str]| cluster(&json!({ "loadBalancerSourceRanges": ranges }), &[Pod, Far]);
        let both = Expected::Reach(&[(Pod, Source::Node), (Far, Source::Node)]);
        bed.follow(&limited(&["198.51.100.0/25", "fd00:198:51:100::/64"]));
        check(
            bed,
            &[
                (Outside, To::LoadBalancer, both),
                (Pod, To::LoadBalancer, Expected::Dropped),
                (Node, To::LoadBalancer, Expected::Dropped),
                (Pod, To::ExternalIp, both),
                (Pod, To::NodePort, both),
            ],
        );
        bed.follow(&limited(&[
            "192.168.0.0/16",
            "198.51.100.8/32",
            "fd00:192:168::/48",
            "fd00:198:51:100::8/128",
        ]));
        check(
            bed,
            &[
                (Outside, To::LoadBalancer, Expected::Dropped),
                (Node, To::LoadBalancer, both),
                (Outside, To::ExternalIp, both),
            ],
        );
    });
}

/// A client keeps no endpoint that the new policy does not give it.
#[test]
fn affinity_follows_the_policy() {
    on_a_bed(|bed| {
        let affinity = |policy| json!({"sessionAffinity": "ClientIP", "externalTrafficPolicy": policy});
        for to in [To::NodePort, To::LoadBalancer] {
            bed.follow(&cluster(&affinity("Cluster"), &[Far]));
            check(bed, &[(Outside, to, Expected::Reach(&[(Far, Source::Node)]))]);
            bed.follow(&cluster(&affinity("Local"), &[Pod, Far]));
            check(bed, &[(Outside, to, Expected::Reach(&[(Pod, Source::Kept)]))]);
        }
    });
}

#[test]
fn endpoints_have_equal_shares() {
    const CALLS: usize = 6000;
    on_a_bed(|bed| {
        bed.follow(&cluster(&json!({}), &[Pod, Second, Far]));
        for family in FAMILIES {
            let to = To::ClusterIp.address(family);
            let mut n = BTreeMap::<Place, usize>::new();
            bed.at(Outside).run(|| {
                for _ in 0..CALLS {
                    *n.entry(server(bed::call(to, Udp, PATIENCE), family)).or_default() += 1;
                }
            });
            // A tenth is more than five standard deviations.
            assert!(n.values().all(|n| n.abs_diff(CALLS / 3) <= CALLS / 30), "{n:?}");
        }
    });
}

/// A socket that sends to one address is served by another endpoint when its own goes.
#[test]
fn datagrams_leave_an_endpoint_that_went() {
    on_a_bed(|bed| {
        bed.follow(&cluster(&json!({}), &[Second]));
        let ways = WAYS.into_iter().flat_map(|way| FAMILIES.map(|family| (way, family)));
        let sockets: Vec<_> = ways
            .map(|((from, to), family)| {
                let at = to.address(family);
                let socket =
                    bed.at(from).run(|| UdpSocket::bind(SocketAddr::new(bed::unspecified(at.ip()), 0)));
                let socket = socket.unwrap();
                socket.connect(at).unwrap();
                (socket, family)
            })
            .collect();
        let check = |endpoint: Place| {
            for (socket, family) in &sockets {
                let (outcome, _) = bed::ask(socket, b"?", PATIENCE).unwrap();
                assert_eq!(server(outcome, *family), endpoint, "{socket:?}");
            }
        };
        check(Second);
        bed.follow(&cluster(&json!({}), &[Second, Pod, Far]));
        check(Second);
        bed.follow(&cluster(&json!({}), &[Far]));
        check(Far);
        bed.follow(&cluster(&json!({}), &[]));
        for (socket, _) in &sockets {
            assert_eq!(bed::ask(socket, b"?", PATIENCE).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
        bed.follow(&cluster(&json!({}), &[Pod]));
        check(Pod);
        bed.follow(&Cluster::new().with(Bed::nodes()));
        for (socket, _) in &sockets {
            assert!(bed::ask(socket, b"?", SILENCE).is_err(), "{socket:?} still has an endpoint");
        }
    });
}

/// What others do to the table is found and repaired, and meanwhile no open connection ends.
#[test]
fn foreign_changes_are_repaired() {
    let cases: [(&str, Foreign); 9] = [
        ("the table is deleted", |_| vec![Change::DeleteTable]),
        ("a rule is added", |_| {
            let drop = Rule { expressions: vec![Expression::Verdict(Verdict::Drop)], comment: None };
            vec![Change::AddRule("check-source".into(), drop)]
        }),
        ("rules are gone", |_| vec![Change::FlushChain("prerouting".into())]),
        ("a chain is added", |_| vec![Change::AddChain("foreign".into(), None)]),
        ("a base chain is added", |table| {
            vec![Change::AddChain("foreign".into(), table.chains["prerouting"].base)]
        }),
        ("a set is added", |table| {
            vec![Change::AddSet("foreign".into(), table.sets["hairpin"].spec.clone())]
        }),
        ("services are gone", |_| vec![Change::FlushSet("services-4".into())]),
        ("an endpoint is gone", |table| {
            let key = table.sets["endpoints"].elements.keys().next().unwrap();
            vec![Change::DeleteElements("endpoints".into(), vec![key.clone()])]
        }),
        ("an element is another", |table| {
            let mut elements = table.sets["endpoints"].elements.iter();
            let ((key, _), (_, other)) = (elements.next().unwrap(), elements.next().unwrap());
            vec![
                Change::DeleteElements("endpoints".into(), vec![key.clone()]),
                Change::AddElements("endpoints".into(), vec![(key.clone(), other.clone())]),
            ]
        }),
    ];
    on_a_bed(|bed| {
        bed.follow(&cluster(&json!({}), &[Pod, Second, Far]));
        let mut open = Open::new(bed);
        open.check("at first");
        for (what, changes) in cases {
            for id in table_ids() {
                let ours = bed.node.state.packets().tables().remove(&id).unwrap();
                let changes = changes(&ours).into_iter().map(|change| (id.clone(), change)).collect();
                bed.node
                    .nftables
                    .apply(&Transaction { changes, generation: None })
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
            }
            assert!(bed.node.repair() > 0, "{what}");
            assert_eq!(bed.node.repair(), 0, "{what}: repaired");
            open.check(what);
            check(bed, &[(Pod, To::ClusterIp, ALL_FROM_POD), (Outside, To::NodePort, ALL_MASQUERADED)]);
        }
    });
}
