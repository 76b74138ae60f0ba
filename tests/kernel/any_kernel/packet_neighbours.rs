//! Rules of other programs beside socklb's: the same endpoints answer, and see the same addresses.
//!
//! The files in `packet_neighbours` are what Docker 20.10 (with a container that publishes port 8088),
//! firewalld
//! 1.3 and the plugins of CNI 1.1 (`bridge` with `ipMasq`, `portmap`, `firewall`) wrote in a namespace, and what the
//! sources of flannel and Calico write. Addresses and devices are the bed's. Calico's sets of addresses are
//! networks here.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use lb_core::model::{Family, Protocol::Tcp};
use lb_tests::{
    Feature,
    bed::{
        Bed, FAMILIES, PATIENCE,
        Place::{Far, Node, Outside, Pod, Second},
    },
    require,
};
use serde_json::json;

use crate::packets::{
    ALL_FROM_POD, ALL_MASQUERADED, Expected, LOCAL_KEPT, Source, To, check, cluster, on_a_bed, server,
};

/// Rules as a program writes them.
#[derive(Clone, Copy)]
enum Rules {
    /// For `iptables-restore` and `ip6tables-restore`, of the given kind.
    Iptables(&'static str, [&'static str; 2]),
    /// For `nft -f`.
    Nft(&'static str),
}

macro_rules! iptables {
    ($kind:literal, $name:literal) => {
        Rules::Iptables(
            $kind,
            [
                include_str!(concat!("packet_neighbours/", $name, ".v4")),
                include_str!(concat!("packet_neighbours/", $name, ".v6")),
            ],
        )
    };
}

/// Runs a program on the node, with a text as its input.
fn run(bed: &Bed, program: &str, args: &[&str], input: &str) {
    bed.at(Node).run(|| {
        let mut command = Command::new(program);
        let mut child = command.args(args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{program} {args:?}");
    });
}

const fn iptables(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

impl Rules {
    fn load(self, bed: &Bed) {
        match self {
            Self::Nft(text) => run(bed, "nft", &["-f", "-"], text),
            Self::Iptables(kind, texts) => {
                for (family, text) in FAMILIES.into_iter().zip(texts) {
                    run(bed, &format!("{}-{kind}-restore", iptables(family)), &[], text);
                }
            }
        }
    }

    /// What docs/OPERATIONS.md asks for where packets are not forwarded.
    fn accept_translated(self, bed: &Bed) {
        let Self::Iptables(kind, _) = self else { return };
        for family in FAMILIES {
            let args = "-I FORWARD -m conntrack --ctstate DNAT -j ACCEPT";
            let args: Vec<_> = args.split(' ').collect();
            run(bed, &format!("{}-{kind}", iptables(family)), &args, "");
        }
    }
}

/// Runs a test on a bed with a neighbour's rules, and then with those of a Service with three endpoints.
fn beside(rules: Rules, test: impl Fn(&mut Bed)) {
    on_a_bed(|bed| {
        if ["nft", "iptables-nft"].into_iter().all(|program| require(Feature::Command(program))) {
            rules.load(bed);
            bed.follow(&cluster(&json!({}), &[Pod, Second, Far]));
            test(bed);
        }
    });
}

/// Checks calls of all kinds. `from_pod` is what becomes of a pod's calls of a cluster IP.
fn check_all(bed: &mut Bed, from_pod: Expected) {
    check(
        bed,
        &[
            (Outside, To::NodePort, ALL_MASQUERADED),
            (Pod, To::ClusterIp, from_pod),
            (Node, To::ClusterIp, ALL_MASQUERADED),
        ],
    );
    bed.follow(&cluster(&json!({"externalTrafficPolicy": "Local"}), &[Pod, Second, Far]));
    check(bed, &[(Outside, To::NodePort, LOCAL_KEPT), (Outside, To::LoadBalancer, LOCAL_KEPT)]);
}

/// Docker sets the policy of FORWARD to drop.
fn docker(rules: Rules) {
    beside(rules, |bed| {
        check(bed, &[(Node, To::ClusterIp, ALL_MASQUERADED)]);
        bed.follow(&cluster(&json!({}), &[Pod]));
        for from in [Outside, Pod] {
            check(bed, &[(from, To::NodePort, Expected::Dropped)]);
        }
        bed.follow(&cluster(&json!({}), &[Pod, Second, Far]));
        rules.accept_translated(bed);
        check_all(bed, ALL_FROM_POD);
    });
}

#[test]
fn docker_with_nftables() {
    docker(iptables!("nft", "docker"));
}

#[test]
fn docker_with_legacy_iptables() {
    docker(iptables!("legacy", "docker"));
}

/// firewalld rejects what it does not know, and accepts what is translated.
#[test]
fn firewalld() {
    beside(Rules::Nft(include_str!("packet_neighbours/firewalld.nft")), |bed| {
        check_all(bed, ALL_FROM_POD);
    });
}

/// flannel masquerades what enters the pods' network, except for the pods of this node, and accepts the pods'
/// packets: here beside a policy of drop.
#[test]
fn flannel() {
    beside(iptables!("nft", "flannel"), |bed| check_all(bed, ALL_FROM_POD));
}

/// Calico masquerades what leaves the pods' networks, and accepts or drops each pod's packets.
#[test]
fn calico() {
    beside(iptables!("nft", "calico"), |bed| check_all(bed, ALL_FROM_POD));
}

/// `ipMasq` masquerades whatever leaves the first pod's network of 256, also without a Service.
#[test]
fn plugins_of_cni() {
    beside(iptables!("nft", "cni"), |bed| {
        check_all(bed, ALL_MASQUERADED);
        for family in FAMILIES {
            let mut host_port = To::NodePort.address(family);
            host_port.set_port(8081);
            let outcome = bed.call(Outside, host_port, Tcp, PATIENCE);
            assert_eq!(server(outcome, family), Pod);
        }
    });
}

/// A port of the host that is a node port too is the Service's, in either order of loading.
#[test]
fn a_node_port_that_is_published_too() {
    let Rules::Iptables(kind, texts) = iptables!("nft", "cni") else { unreachable!() };
    let load = |bed: &Bed| {
        for (family, text) in FAMILIES.into_iter().zip(texts) {
            let restore = format!("{}-{kind}-restore", iptables(family));
            run(bed, &restore, &[], &text.replace("8081", "30080"));
        }
    };
    for is_first in [true, false] {
        on_a_bed(|bed| {
            if !require(Feature::Command("iptables-nft")) {
                return;
            }
            if is_first {
                load(bed);
            }
            bed.follow(&cluster(&json!({}), &[Second, Far]));
            if !is_first {
                load(bed);
            }
            let both = Expected::Reach(&[(Second, Source::Node), (Far, Source::Node)]);
            check(bed, &[(Outside, To::NodePort, both), (Node, To::NodePort, both)]);
        });
    }
}
