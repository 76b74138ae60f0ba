use core::cell::{Cell, RefCell};
use std::{collections::BTreeMap, vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::{
    address::{Address, Octets4},
    layout::{Endpoint4, FrontendKey4},
};

const VIP: Octets4 = [10, 96, 0, 10];
const OWN: Octets4 = [192, 168, 0, 1];
const OTHER: Octets4 = [192, 168, 0, 2];

/// The tables of one test. Every part that the kernel would supply is a plain value.
#[derive(Default)]
struct Fake {
    services: BTreeMap<FrontendKey4, u32>,
    frontends: Vec<Frontend>,
    endpoints: Vec<Endpoint4>,
    nodes: BTreeMap<Octets6, NodeAddress>,
    networks: Vec<(Octets4, Octets4)>,
    cluster_ips: BTreeMap<Octets6, bool>,
    /// A frontend that another CPU inserts between the look-up that misses and the one of the cluster IP.
    created: Cell<Option<(FrontendKey4, u32)>>,
    late: RefCell<BTreeMap<FrontendKey4, u32>>,
    loopback_is_node: bool,
    earlier: Option<Choice>,
    random: Cell<u32>,
    /// What is added to it by each draw.
    random_step: u32,
    now: Cell<u64>,
    affinity: RefCell<BTreeMap<u32, Affinity>>,
    /// Endpoint ids that are ejected.
    ejected: Vec<u32>,
    /// Open connections by endpoint id.
    active: BTreeMap<u32, i32>,
    /// What another CPU remembers between our look-up and our insertion.
    faster_cpu: Option<u32>,
}

impl Fake {
    /// Adds a frontend with the given endpoint ids; endpoint `n` is 10.0.0.n:8080.
    fn serve(&mut self, address: Octets4, port: u16, protocol: Protocol, ids: &[u32]) -> &mut Frontend {
        let offset = u32::try_from(self.endpoints.len()).unwrap();
        for &endpoint_id in ids {
            let last = u8::try_from(endpoint_id).unwrap();
            self.endpoints.push(Endpoint4 { address: [10, 0, 0, last], port: 8080, extra: 0, endpoint_id });
        }
        let frontend_id = u32::try_from(self.frontends.len()).unwrap();
        let previous = self.services.insert(Octets4::key(address, port, protocol), frontend_id);
        assert!(previous.is_none(), "two frontends with one key");
        let run = Run { offset, len: u32::try_from(ids.len()).unwrap() };
        self.frontends.push(Frontend { run, service_id: 100 + frontend_id, ..Frontend::default() });
        self.frontends.last_mut().unwrap()
    }

    fn call(&self, address: Octets4, port: u16, protocol: Protocol) -> Verdict<Octets4> {
        resolve(self, self, &Call { address, port, protocol })
    }

    /// The endpoint id that a TCP call reaches, or `None` if it is passed or refused.
    fn reached(&self, address: Octets4, port: u16) -> Option<u32> {
        match self.call(address, port, Protocol::TCP) {
            Verdict::Redirect(target) => Some(target.choice.endpoint_id),
            Verdict::Pass | Verdict::Refuse { .. } | Verdict::Unreachable => None,
        }
    }
}

impl Tables<Octets4> for Fake {
    fn frontend_id(&self, key: &FrontendKey4) -> Option<u32> {
        self.services.get(key).or(self.late.borrow().get(key)).copied()
    }
    fn frontend(&self, id: u32) -> Option<Frontend> {
        self.frontends.get(id as usize).copied()
    }
    fn endpoint(&self, index: u32) -> Option<Endpoint4> {
        self.endpoints.get(index as usize).copied()
    }
    fn is_suspect(&self, endpoint_id: u32) -> bool {
        self.ejected.contains(&endpoint_id)
    }
    fn admits(&self, endpoint_id: u32) -> u32 {
        u32::from(!self.ejected.contains(&endpoint_id))
    }
    fn active(&self, endpoint_id: u32) -> i32 {
        self.active.get(&endpoint_id).copied().unwrap_or_default()
    }
    fn begin_trial(&self, _endpoint_id: u32) {}
    fn node_ports(&self) -> (u16, u16) {
        crate::limits::NODE_PORTS
    }
    fn node_address(&self, mapped: &Octets6) -> Option<NodeAddress> {
        self.nodes.get(mapped).copied()
    }
    fn is_in_service_network(&self, address: &Octets4) -> bool {
        self.networks.iter().any(|(network, mask)| address.is_within(network, mask))
    }
    fn cluster_ip(&self, mapped: &Octets6) -> Option<bool> {
        if let Some((key, id)) = self.created.take() {
            let _none = self.late.borrow_mut().insert(key, id);
        }
        self.cluster_ips.get(mapped).copied()
    }
}

impl Caller for Fake {
    fn loopback_is_node(&self) -> bool {
        self.loopback_is_node
    }
    fn earlier_choice(&self) -> Option<Choice> {
        self.earlier
    }
    fn random(&self) -> u32 {
        self.random.replace(self.random.get().wrapping_add(self.random_step))
    }
    fn now(&self) -> u64 {
        self.now.get()
    }
    fn affinity(&self, service_id: u32) -> Option<Affinity> {
        self.affinity.borrow().get(&service_id).copied()
    }
    fn renew_affinity(&self, service_id: u32, now: u64) {
        if let Some(affinity) = self.affinity.borrow_mut().get_mut(&service_id) {
            affinity.last_used = now;
        }
    }
    fn remember_affinity(&self, service_id: u32, replaces: Option<Affinity>, new: Affinity) -> u32 {
        if let (None, Some(faster)) = (replaces, self.faster_cpu) {
            return faster;
        }
        let _previous = self.affinity.borrow_mut().insert(service_id, new);
        new.endpoint_id
    }
}

/// A client without a socket: what a name server or a packet path knows.
struct AnyClient(u32);

impl Caller for AnyClient {
    fn random(&self) -> u32 {
        self.0
    }
}

#[test]
fn any_client_needs_a_random_number_alone() {
    let mut tables = Fake { nodes: BTreeMap::from([(OWN.to_mapped(), NodeAddress::Own)]), ..Fake::default() };
    let _ = tables.serve(VIP, 80, Protocol::TCP, &[1, 2]);
    tables.serve(VIP, 81, Protocol::TCP, &[3, 4]).affinity_seconds = 60;
    let _ = tables.serve(VIP, 82, Protocol::TCP, &[]);
    let _ = tables.serve([0; 4], 30_000, Protocol::TCP, &[5]);
    // The service with affinity remembers nothing: each call goes by its own random number.
    for (address, port, random, expected) in [
        (VIP, 80, 0, Some(1)),
        (VIP, 80, u32::MAX, Some(2)),
        (VIP, 81, u32::MAX, Some(4)),
        (VIP, 81, 0, Some(3)),
        (OWN, 30_000, 0, Some(5)),
        // The client's loopback is its own, not this node's.
        ([127, 0, 0, 1], 30_000, 0, None),
        ([0; 4], 30_000, 0, None),
        (OTHER, 80, 0, None),
    ] {
        let verdict = resolve(&tables, &AnyClient(random), &Call { address, port, protocol: Protocol::TCP });
        let reached = match verdict {
            Verdict::Redirect(target) => Some(target.choice.endpoint_id),
            other => {
                assert_eq!(other, Verdict::Pass, "{address:?}:{port}");
                None
            }
        };
        assert_eq!(reached, expected, "{address:?}:{port} {random}");
    }
    let refused = resolve(&tables, &AnyClient(0), &Call { address: VIP, port: 82, protocol: Protocol::TCP });
    assert_eq!(refused, Verdict::Refuse { service_id: 102 });
    assert!(tables.affinity.borrow().is_empty());
}

#[test]
fn an_unknown_destination_passes() {
    let mut tables = Fake::default();
    let _ = tables.serve(VIP, 80, Protocol::TCP, &[1]);
    for (address, port, protocol) in [
        (VIP, 81, Protocol::TCP),
        (VIP, 80, Protocol::UDP),
        ([10, 96, 0, 11], 80, Protocol::TCP),
        ([0, 0, 0, 0], 80, Protocol::TCP),
        (VIP, 80, Protocol::SCTP),
    ] {
        assert_eq!(tables.call(address, port, protocol), Verdict::Pass, "{address:?}:{port} {protocol:?}");
    }
}

/// kube-proxy's nftables mode rejects the one and drops the other (`cluster-ips-check`).
#[test]
fn what_is_no_frontend_of_a_service_network_fails_at_once() {
    const LEFT_ALONE: Octets4 = [10, 96, 0, 12];
    let mut tables = Fake::default();
    let _ = tables.serve(VIP, 80, Protocol::TCP, &[1]);
    tables.cluster_ips = [(VIP.to_mapped(), true), (LEFT_ALONE.to_mapped(), false)].into();
    let (undefined, unallocated) = (Verdict::Refuse { service_id: NO_SERVICE }, Verdict::Unreachable);
    let calls = [
        (VIP, 81, Protocol::TCP, undefined),
        (VIP, 80, Protocol::UDP, undefined),
        (VIP, 30_080, Protocol::TCP, undefined),
        (LEFT_ALONE, 80, Protocol::TCP, Verdict::Pass),
        ([10, 96, 0, 11], 80, Protocol::TCP, unallocated),
        ([10, 111, 255, 255], 53, Protocol::UDP, unallocated),
        ([10, 112, 0, 0], 53, Protocol::UDP, Verdict::Pass),
        ([10, 95, 255, 255], 80, Protocol::TCP, Verdict::Pass),
        ([0, 0, 0, 0], 80, Protocol::TCP, Verdict::Pass),
    ];
    for (address, port, protocol, _) in calls {
        assert_eq!(tables.call(address, port, protocol), Verdict::Pass, "without a network");
    }
    tables.networks = vec![([10, 96, 0, 0], [255, 240, 0, 0])];
    for (address, port, protocol, expected) in calls {
        assert_eq!(tables.call(address, port, protocol), expected, "{address:?}:{port} {protocol:?}");
    }
    assert_eq!(tables.reached(VIP, 80), Some(1));
}

/// The frontends of a new Service are there before its cluster IP is.
#[test]
fn a_service_that_is_created_during_a_call_does_not_refuse_it() {
    let mut tables = Fake::default();
    let _ = tables.serve(VIP, 80, Protocol::TCP, &[1]);
    let key = Octets4::key(VIP, 80, Protocol::TCP);
    let id = tables.services.remove(&key).unwrap();
    tables.networks = vec![([10, 96, 0, 0], [255, 240, 0, 0])];
    tables.cluster_ips = [(VIP.to_mapped(), true)].into();
    tables.created.set(Some((key, id)));
    assert_eq!(tables.reached(VIP, 80), Some(1));
}

#[test]
fn a_service_address_reaches_its_endpoint() {
    let mut tables = Fake::default();
    let _ = tables.serve(VIP, 80, Protocol::TCP, &[7]);
    assert_eq!(
        tables.call(VIP, 80, Protocol::TCP),
        Verdict::Redirect(Target {
            address: [10, 0, 0, 7],
            port: 8080,
            choice: Choice { endpoint_id: 7, index: 0 },
            frontend_id: 0,
            service_id: 100,
            health: 0,
            flags: 0,
        })
    );
}

#[test]
fn equal_ports_of_two_protocols_are_two_frontends() {
    let mut tables = Fake::default();
    let _ = tables.serve(VIP, 53, Protocol::TCP, &[1]);
    let _ = tables.serve(VIP, 53, Protocol::UDP, &[2]);
    let id = |protocol| match tables.call(VIP, 53, protocol) {
        Verdict::Redirect(target) => target.choice.endpoint_id,
        other => panic!("{other:?}"),
    };
    assert_eq!((id(Protocol::TCP), id(Protocol::UDP)), (1, 2));
}

#[test]
fn no_endpoint_is_refused() {
    let mut tables = Fake::default();
    let _ = tables.serve(VIP, 80, Protocol::TCP, &[]);
    assert_eq!(tables.call(VIP, 80, Protocol::TCP), Verdict::Refuse { service_id: 100 });
}

#[test]
fn extremes_of_the_random_number_stay_in_the_run() {
    let mut tables = Fake::default();
    let _ = tables.serve(VIP, 80, Protocol::TCP, &[1, 2, 3]);
    let _ = tables.serve(VIP, 81, Protocol::TCP, &[9]);
    for (random, endpoint) in [(0, 1), (u32::MAX / 3 + 1, 2), (u32::MAX, 3)] {
        tables.random.set(random);
        assert_eq!(tables.reached(VIP, 80), Some(endpoint), "random {random}");
    }
}

mod node_ports {
    use super::*;

    /// One node port, 30080 -> endpoint 1, with an exact entry of node `OTHER` -> endpoint 2 if `local`.
    fn tables(local: bool) -> Fake {
        let mut tables = Fake::default();
        let _ = tables.nodes.insert(OWN.to_mapped(), NodeAddress::Own);
        let _ = tables.nodes.insert(OTHER.to_mapped(), NodeAddress::Other);
        let _ = tables.nodes.insert([192, 168, 0, 3].to_mapped(), NodeAddress::Other);
        let wildcard = tables.serve([0; 4], 30080, Protocol::TCP, &[1]);
        wildcard.flags = frontend_flags::NODE_PORT;
        if local {
            wildcard.flags |= frontend_flags::EXTERNAL_LOCAL;
            tables.serve(OTHER, 30080, Protocol::TCP, &[2]).flags = frontend_flags::NODE_PORT;
        }
        tables
    }

    #[test]
    fn answer_on_every_node_address() {
        let tables = tables(false);
        assert_eq!(tables.reached(OWN, 30080), Some(1));
        assert_eq!(tables.reached(OTHER, 30080), Some(1));
    }

    #[test]
    fn do_not_answer_elsewhere() {
        let tables = tables(false);
        assert_eq!(tables.call([8, 8, 8, 8], 30080, Protocol::TCP), Verdict::Pass, "not a node");
        assert_eq!(tables.call(OWN, 30081, Protocol::TCP), Verdict::Pass, "not allocated");
        assert_eq!(tables.call(OWN, 30080, Protocol::UDP), Verdict::Pass, "other protocol");
        assert_eq!(tables.call(OWN, 80, Protocol::TCP), Verdict::Pass, "outside the range");
    }

    #[test]
    fn answer_on_loopback_only_for_the_node_itself() {
        let mut tables = tables(false);
        for address in [[127, 0, 0, 1], [127, 1, 2, 3], [0, 0, 0, 0]] {
            tables.loopback_is_node = false;
            assert_eq!(tables.call(address, 30080, Protocol::TCP), Verdict::Pass, "{address:?} in a pod");
            tables.loopback_is_node = true;
            assert_eq!(tables.reached(address, 30080), Some(1), "{address:?} on the node");
        }
    }

    #[test]
    fn with_the_policy_local_another_node_answers_with_its_own_endpoints() {
        let tables = tables(true);
        assert_eq!(tables.reached(OWN, 30080), Some(1), "own address: the cluster set (R6)");
        assert_eq!(tables.reached(OTHER, 30080), Some(2), "a node with endpoints");
        assert_eq!(
            tables.call([192, 168, 0, 3], 30080, Protocol::TCP),
            Verdict::Refuse { service_id: 100 },
            "a node without endpoints"
        );
    }
}

mod affinity {
    use super::*;

    fn tables() -> Fake {
        let mut tables = Fake::default();
        tables.serve(VIP, 80, Protocol::TCP, &[1, 2, 3]).affinity_seconds = 10;
        tables
    }

    #[test]
    fn keeps_the_endpoint_while_calls_keep_coming() {
        let tables = tables();
        tables.random.set(u32::MAX);
        assert_eq!(tables.reached(VIP, 80), Some(3));
        tables.random.set(0);
        // Each call renews the timer: 27 s after the first call the entry still counts.
        for now in [9, 18, 27] {
            tables.now.set(now);
            assert_eq!(tables.reached(VIP, 80), Some(3), "at {now} s");
        }
        tables.now.set(37);
        assert_eq!(tables.reached(VIP, 80), Some(1), "10 s idle: expired");
    }

    #[test]
    fn forgets_an_endpoint_that_left_the_set() {
        let mut tables = tables();
        tables.random.set(u32::MAX);
        assert_eq!(tables.reached(VIP, 80), Some(3));
        tables.frontends[0].run.len = 2;
        assert_eq!(tables.reached(VIP, 80), Some(2));
        tables.frontends[0].run.len = 3;
        assert_eq!(tables.reached(VIP, 80), Some(2), "and does not return to it");
    }

    #[test]
    fn can_be_switched_live() {
        let mut tables = tables();
        tables.random.set(u32::MAX);
        assert_eq!(tables.reached(VIP, 80), Some(3));
        tables.random.set(0);
        tables.frontends[0].affinity_seconds = 0;
        assert_eq!(tables.reached(VIP, 80), Some(1));
        tables.frontends[0].affinity_seconds = 10;
        assert_eq!(tables.reached(VIP, 80), Some(3));
    }

    #[test]
    fn two_first_calls_at_once_agree() {
        let mut tables = tables();
        tables.faster_cpu = Some(2);
        assert_eq!(tables.reached(VIP, 80), Some(2), "the other CPU's choice stands");
        tables.faster_cpu = Some(77);
        assert_eq!(tables.reached(VIP, 80), Some(1), "unless this frontend's set does not hold it");
    }
}

#[test]
fn an_earlier_choice_stands_while_its_endpoint_serves() {
    let mut tables = Fake::default();
    let _ = tables.serve(VIP, 53, Protocol::TCP, &[1, 2, 3]);
    tables.earlier = Some(Choice { endpoint_id: 2, index: 1 });
    assert_eq!(tables.reached(VIP, 53), Some(2), "at its old position");
    tables.earlier = Some(Choice { endpoint_id: 2, index: 7 });
    assert_eq!(tables.reached(VIP, 53), Some(2), "at another position");
    tables.earlier = Some(Choice { endpoint_id: 9, index: 1 });
    assert_eq!(tables.reached(VIP, 53), Some(1), "gone: a new choice");
}

proptest! {
    /// Whatever the tables hold, a redirect names an entry of the frontend's own run.
    #[test]
    fn a_redirect_stays_in_the_run(
        sets in prop::collection::vec(prop::collection::btree_set(0u32..200, 0..12), 1..6),
        random in any::<u32>(),
        affinity in prop::option::of((0u32..200, 0u64..40)),
        seconds in prop_oneof![Just(0u32), 1u32..30],
        earlier in prop::option::of((0u32..200, 0u32..20)),
        which in any::<prop::sample::Index>(),
    ) {
        let mut tables = Fake { now: Cell::new(30), ..Fake::default() };
        for (n, set) in sets.iter().enumerate() {
            let ids: Vec<u32> = set.iter().copied().collect();
            let port = u16::try_from(n).unwrap();
            tables.serve(VIP, port, Protocol::TCP, &ids).affinity_seconds = seconds;
        }
        tables.random.set(random);
        tables.earlier = earlier.map(|(endpoint_id, index)| Choice { endpoint_id, index });
        let n = which.index(sets.len());
        if let Some((endpoint_id, last_used)) = affinity {
            let entry = Affinity { last_used, endpoint_id, reserved: 0 };
            let _ = tables.affinity.borrow_mut().insert(100 + u32::try_from(n).unwrap(), entry);
        }
        match tables.call(VIP, u16::try_from(n).unwrap(), Protocol::TCP) {
            Verdict::Pass => prop_assert!(false, "a known frontend passed"),
            Verdict::Refuse { .. } => prop_assert!(sets[n].is_empty()),
            Verdict::Unreachable => prop_assert!(false, "a known frontend is unreachable"),
            Verdict::Redirect(target) => {
                prop_assert!(sets[n].contains(&target.choice.endpoint_id));
                prop_assert_eq!(target.frontend_id as usize, n);
                let run = tables.frontends[n].run;
                prop_assert_eq!(
                    tables.endpoints[(run.offset + target.choice.index) as usize].endpoint_id,
                    target.choice.endpoint_id
                );
                if let Some((id, _)) = earlier && sets[n].contains(&id) {
                    prop_assert_eq!(target.choice.endpoint_id, id, "an earlier choice stands");
                }
            }
        }
    }

    /// The search finds exactly what a linear scan finds.
    #[test]
    fn search_agrees_with_a_scan(set in prop::collection::btree_set(0u32..200, 0..80), id in 0u32..200) {
        let mut tables = Fake::default();
        let ids: Vec<u32> = set.iter().copied().collect();
        let _ = tables.serve([1, 1, 1, 1], 1, Protocol::TCP, &[199]);
        let run = tables.serve(VIP, 80, Protocol::TCP, &ids).run;
        let found = find_endpoint(&tables, run, id).map(|(index, entry)| (index as usize, entry.endpoint_id));
        prop_assert_eq!(found, ids.iter().position(|&other| other == id).map(|index| (index, id)));
    }

    /// Every endpoint has an equal share of the random numbers.
    #[test]
    fn shares_are_equal(len in 1u8..50) {
        let mut tables = Fake::default();
        let ids: Vec<u32> = (0..u32::from(len)).collect();
        let _ = tables.serve(VIP, 80, Protocol::TCP, &ids);
        let mut hits = vec![0u32; usize::from(len)];
        let steps = u32::from(len) * 64;
        for step in 0..steps {
            tables.random.set(step * (u32::MAX / steps));
            hits[tables.reached(VIP, 80).unwrap() as usize] += 1;
        }
        prop_assert!(hits.iter().all(|&n| (63..=65).contains(&n)), "{:?}", hits);
    }
}

#[test]
fn an_ejected_endpoint_is_chosen_only_by_the_last_draw() {
    const EIGHTH: u32 = 1 << 29;
    let reached = |ejected: &[u32], health: u32, first: u32, step: u32| {
        let mut tables = Fake { ejected: ejected.to_vec(), random_step: step, ..Fake::default() };
        tables.serve(VIP, 80, Protocol::TCP, &[0, 1, 2, 3, 4, 5, 6, 7]).health = health;
        tables.random.set(first);
        tables.reached(VIP, 80).unwrap()
    };
    // The first number is 0. The second one selects among the seven others.
    for (ejected, step, expected) in [
        (&[1, 2][..], 0, 0),
        (&[0], 0, 1),
        (&[0], 3 * EIGHTH, 3),
        (&[0], u32::MAX, 7),
        (&[0, 1, 2], 0, 3),
        (&[0, 7], u32::MAX, 1),
        (&[0, 1, 2, 3], 0, 3),
        (&[0, 1, 2, 3, 4, 5, 6, 7], u32::MAX, 2),
    ] {
        assert_eq!(reached(ejected, 1, 0, step), expected, "{ejected:?}, {step}");
    }
    assert_eq!(reached(&[0], 0, 0, 0), 0, "a frontend without a policy");
    assert_eq!(reached(&[6], 1, 6 * EIGHTH, 6 * EIGHTH), 2, "the others begin behind it");
}

#[test]
fn runs_of_any_length_avoid_up_to_three_ejected_endpoints() {
    for n in 1..6u32 {
        for n_ejected in 0..=n {
            for random in (0..64).map(|n| n << 26) {
                let ids: Vec<u32> = (0..n).collect();
                let ejected: Vec<u32> = (0..n_ejected).collect();
                let mut tables = Fake { ejected, random_step: 0x9e37_79b9, ..Fake::default() };
                tables.serve(VIP, 80, Protocol::TCP, &ids).health = 1;
                tables.random.set(random);
                let reached = tables.reached(VIP, 80).unwrap();
                assert!(reached < n);
                let is_ejected = reached < n_ejected;
                assert!(!is_ejected || n_ejected == n || n_ejected > 3, "{n_ejected} of {n}: {reached}");
            }
        }
    }
}

#[test]
fn affinity_leaves_an_ejected_endpoint() {
    let mut tables = Fake { ejected: vec![0], random_step: 1 << 31, ..Fake::default() };
    let frontend = tables.serve(VIP, 80, Protocol::TCP, &[0, 1]);
    (frontend.health, frontend.affinity_seconds) = (1, 60);
    let earlier = Affinity { last_used: 0, endpoint_id: 0, reserved: 0 };
    let _ = tables.affinity.borrow_mut().insert(100, earlier);
    assert_eq!(tables.reached(VIP, 80), Some(1));
    assert_eq!(tables.affinity.borrow()[&100].endpoint_id, 1);
}
