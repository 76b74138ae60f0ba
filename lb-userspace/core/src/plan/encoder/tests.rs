use lb_common::layout::frontend_flags::{EXTERNAL_LOCAL, NODE_PORT};

use super::*;
use crate::{
    desired::FrontendKind,
    model::{Balance, Protocol, ServiceKey, TrafficPolicy},
    plan::Phase,
    tables::AddressTable::{ClusterIps, Nodes},
};

const ROOM: Capacity = Capacity { services: 8, endpoints: 16 };

fn address(ip: &str, port: u16) -> FrontendAddress {
    FrontendAddress { ip: ip.parse().unwrap(), port, protocol: Protocol::Tcp }
}

/// A frontend of the port `name` of a service, with endpoints on port 8080.
fn frontend(service: &str, name: &str, address: FrontendAddress, endpoints: &[&str]) -> desired::Frontend {
    let mut endpoints: Vec<SocketAddr> =
        endpoints.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 8080)).collect();
    endpoints.sort_unstable();
    desired::Frontend {
        address,
        kind: FrontendKind::ClusterIP,
        policy: TrafficPolicy::Cluster,
        flags: 0,
        affinity_seconds: 0,
        health: 0,
        created: None,
        port: Arc::new(PortKey {
            service: ServiceKey::new("default", service),
            port_name: name.into(),
            protocol: Protocol::Tcp,
            ipv6: address.ip.is_ipv6(),
        }),
        endpoints: endpoints.into(),
        balance: Balance::Random,
        shares: None,
        packets: None,
        spill: Arc::default(),
    }
}

/// Sets frontends, takes the plan and checks that it leads to the encoder's image.
fn set(encoder: &mut Encoder, frontends: &[desired::Frontend]) -> Plan {
    let mut image = encoder.image().clone();
    for frontend in frontends {
        encoder.set(frontend.address, Some(frontend)).unwrap();
    }
    let plan = encoder.take_plan();
    plan.apply(&mut image);
    assert_eq!(image, *encoder.image());
    plan
}

fn remove(encoder: &mut Encoder, address: FrontendAddress) -> Plan {
    encoder.set(address, None).unwrap();
    encoder.take_plan()
}

/// The endpoints of a frontend with their ids.
fn entries(encoder: &Encoder, address: FrontendAddress) -> Vec<(u32, String)> {
    let image = encoder.image();
    let run = image.frontends[&image.services[&address]].run;
    let entries = image.entries(address.ip.is_ipv6(), run).unwrap();
    entries.iter().map(|entry| (entry.endpoint_id, entry.address().ip().to_string())).collect()
}

fn phases(plan: &Plan) -> Vec<Phase> {
    plan.ops().iter().map(Op::phase).collect()
}

#[test]
fn a_new_service_is_written_before_it_is_inserted() {
    let mut encoder = Encoder::new(ROOM);
    let web = frontend("web", "", address("10.96.0.1", 80), &["10.1.0.1", "10.1.0.2"]);
    let plan = set(&mut encoder, std::slice::from_ref(&web));
    assert_eq!(
        plan.ops(),
        [
            Op::ResetService(0),
            Op::ResetEndpoints([0, 1].into()),
            Op::WriteRun {
                ipv6: false,
                offset: 0,
                run: [(0, "10.1.0.1:8080"), (1, "10.1.0.2:8080")]
                    .into_iter()
                    .map(|(id, address)| Entry::new(id, address.parse().unwrap()))
                    .collect(),
            },
            Op::WriteFrontend {
                id: 0,
                frontend: Frontend { run: Run { offset: 0, len: 2 }, ..Frontend::default() },
            },
            Op::InsertService { address: web.address, frontend_id: 0 },
        ]
    );
    assert!(set(&mut encoder, &[web]).is_empty(), "an unchanged frontend costs nothing");
}

#[test]
fn a_changed_set_is_one_switch_and_keeps_ids() {
    let mut encoder = Encoder::new(ROOM);
    let at = address("10.96.0.1", 80);
    set(&mut encoder, &[frontend("web", "", at, &["10.1.0.1", "10.1.0.2", "10.1.0.3"])]);
    let plan = set(&mut encoder, &[frontend("web", "", at, &["10.1.0.1", "10.1.0.3", "10.1.0.4"])]);
    assert_eq!(phases(&plan), [Phase::Write, Phase::Write, Phase::Switch, Phase::Drop]);
    let now = [(0, "10.1.0.1"), (2, "10.1.0.3"), (3, "10.1.0.4")].map(|(id, ip)| (id, ip.to_owned()));
    assert_eq!(entries(&encoder, at), now, "the id of an endpoint that left is not given out yet");
}

#[test]
fn a_set_that_becomes_empty_needs_no_room() {
    let mut encoder = Encoder::new(ROOM);
    let at = address("10.96.0.1", 80);
    set(&mut encoder, &[frontend("web", "", at, &["10.1.0.1"])]);
    let plan = set(&mut encoder, &[frontend("web", "", at, &[])]);
    assert_eq!(
        plan.ops(),
        [Op::SwitchRun { id: 0, run: Run::EMPTY }, Op::DropRun { ipv6: false, offset: 0 }]
    );
}

#[test]
fn frontends_of_a_port_share_a_run_and_ports_do_not() {
    let mut encoder = Encoder::new(ROOM);
    let (one, two, other) = (address("10.96.0.1", 80), address("203.0.113.1", 80), address("10.96.0.2", 80));
    let all = ["10.1.0.1", "10.1.0.2"];
    set(
        &mut encoder,
        &[frontend("web", "", one, &all), frontend("web", "", two, &all), frontend("shop", "", other, &all)],
    );
    let run = |at| encoder.image().frontends[&encoder.image().services[&at]].run;
    assert_eq!(run(one), run(two));
    assert_ne!(run(one), run(other));
    let ids = |at| entries(&encoder, at).into_iter().map(|(id, _)| id).collect::<BTreeSet<_>>();
    assert!(ids(one).is_disjoint(&ids(other)), "an endpoint id belongs to one service port");
    assert_eq!(encoder.n_endpoints(false), 4);

    let plan = remove(&mut encoder, one);
    assert!(
        !plan.ops().iter().any(|op| matches!(op, Op::DropRun { .. })),
        "the other address uses it: {plan:?}"
    );
    let plan = remove(&mut encoder, two);
    assert!(plan.ops().iter().any(|op| matches!(op, Op::DropRun { offset: 0, .. })), "{plan:?}");
}

/// A subset of another set of the port has its own run with the same ids.
#[test]
fn an_endpoint_has_one_id_in_all_runs_of_a_port() {
    let mut encoder = Encoder::new(ROOM);
    let (all, local) = (address("10.96.0.1", 80), address("10.0.0.2", 30080));
    set(
        &mut encoder,
        &[
            frontend("web", "", all, &["10.1.0.1", "10.1.0.2", "10.1.0.3"]),
            frontend("web", "", local, &["10.1.0.2"]),
        ],
    );
    assert_eq!(entries(&encoder, local), [(1, "10.1.0.2".to_owned())]);
    // The id stays as long as one run uses it.
    set(&mut encoder, &[frontend("web", "", all, &["10.1.0.1"])]);
    set(&mut encoder, &[frontend("web", "", all, &["10.1.0.1", "10.1.0.2"])]);
    assert_eq!(entries(&encoder, all), [(0, "10.1.0.1".to_owned()), (1, "10.1.0.2".to_owned())]);
}

#[test]
fn what_is_freed_waits_for_a_grace_period() {
    let mut encoder = Encoder::new(Capacity { services: 8, endpoints: 4 });
    let (one, two) = (address("10.96.0.1", 80), address("10.96.0.2", 80));
    let four = ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4"];
    set(&mut encoder, &[frontend("one", "", one, &four)]);
    let plan = remove(&mut encoder, one);
    assert!(plan.frees() && encoder.holds_back());
    let large = frontend("two", "", two, &four);
    assert_eq!(encoder.set(two, Some(&large)), Err(Full::Endpoints { capacity: 4, needed: 4 }));
    assert!(encoder.take_plan().is_empty(), "a refusal leaves nothing behind");
    encoder.settled(plan.number() - 1);
    assert!(encoder.holds_back());
    encoder.settled(plan.number());
    assert!(!encoder.holds_back());
    set(&mut encoder, &[large]);
    assert_eq!(encoder.image().services[&two], 0, "ids are used again before fresh ones");
}

/// The frontends before, the change, and whether it frees anything.
type Case<'a> = (&'a str, &'a [desired::Frontend], &'a dyn Fn(&mut Encoder), bool);

/// The ops alone do not show whether a plan frees something.
#[test]
fn plans_say_whether_they_free_something() {
    let (one, two) = (address("10.96.0.1", 80), address("10.96.0.2", 80));
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    let web = |at, endpoints: &[&str]| frontend("web", "", at, endpoints);
    let set = |frontend: desired::Frontend| {
        move |encoder: &mut Encoder| {
            encoder.set(frontend.address, Some(&frontend)).unwrap();
        }
    };
    let cases: [Case<'_>; 8] = [
        ("nothing", &[web(one, &[])], &set(web(one, &[])), false),
        ("a new frontend", &[], &set(web(one, &["10.1.0.1"])), false),
        ("an address more", &[web(one, &["10.1.0.1"])], &set(web(two, &["10.1.0.1"])), false),
        ("endpoints", &[web(one, &[])], &set(web(one, &["10.1.0.1"])), false),
        ("a flag", &[web(one, &[])], &set(desired::Frontend { flags: NODE_PORT, ..web(one, &[]) }), false),
        ("an end", &[web(one, &[])], &|encoder| encoder.set(one, None).unwrap(), true),
        ("other endpoints", &[web(one, &["10.1.0.1"])], &set(web(one, &["10.1.0.2"])), true),
        ("another owner, without endpoints", &[web(one, &[])], &set(frontend("shop", "", one, &[])), true),
    ];
    for (what, before, change, frees) in cases {
        let mut encoder = Encoder::new(ROOM);
        self::set(&mut encoder, before);
        change(&mut encoder);
        assert_eq!(encoder.take_plan().frees(), frees, "{what}");
    }
    let mut encoder = Encoder::new(ROOM);
    for (nodes, frees) in [(vec![(ip, true)], false), (vec![(ip, false)], true), (vec![], true)] {
        assert_eq!(encoder.set_node_addrs(&nodes.clone().into_iter().collect()), 0);
        assert_eq!(encoder.take_plan().frees(), frees, "{nodes:?}");
    }
}

/// A plan inserts before it deletes, so a deleted key occupies the map until the plan is executed.
#[test]
fn a_key_that_goes_makes_room_with_the_next_plan() {
    let mut encoder = Encoder::new(Capacity { services: 1, endpoints: 4 });
    let (one, two, v6) = (address("10.96.0.1", 80), address("10.96.0.2", 80), address("fd00::1", 80));
    set(&mut encoder, &[frontend("one", "", one, &[])]);
    encoder.set(one, None).unwrap();
    let next = frontend("two", "", two, &[]);
    assert_eq!(encoder.set(two, Some(&next)), Err(Full::Services { capacity: 1 }));
    encoder.set(v6, Some(&frontend("two", "", v6, &[]))).unwrap();
    let plan = encoder.take_plan();
    encoder.settled(plan.number());
    encoder.set(two, Some(&next)).unwrap();
}

#[test]
fn a_frontend_without_room_for_its_new_set_keeps_the_old_one() {
    let mut encoder = Encoder::new(Capacity { services: 8, endpoints: 4 });
    let at = address("10.96.0.1", 80);
    set(&mut encoder, &[frontend("web", "", at, &["10.1.0.1", "10.1.0.2"])]);
    let before = encoder.image().clone();
    let larger = frontend("web", "", at, &["10.1.0.3", "10.1.0.4", "10.1.0.5"]);
    assert_eq!(encoder.set(at, Some(&larger)), Err(Full::Endpoints { capacity: 4, needed: 3 }));
    assert!(encoder.take_plan().is_empty());
    assert_eq!(*encoder.image(), before);
    assert_eq!(encoder.n_endpoints(false), 2);
}

/// As when a port is renamed: another service port at the same address, which always has a frontend.
#[test]
fn a_new_owner_takes_the_entry_over() {
    let mut encoder = Encoder::new(ROOM);
    let at = address("10.96.0.1", 80);
    set(&mut encoder, &[frontend("web", "old", at, &["10.1.0.1"])]);
    let plan = set(&mut encoder, &[frontend("web", "new", at, &["10.1.0.1"])]);
    assert!(!phases(&plan).contains(&Phase::Insert) && !phases(&plan).contains(&Phase::Delete), "{plan:?}");
    assert_eq!(encoder.image().services[&at], 0);
    assert_eq!(encoder.image().frontends[&0].service_id, 1);
    assert_eq!(entries(&encoder, at), [(1, "10.1.0.1".to_owned())]);
}

/// While the flag is set, calls to other nodes ignore the run.
#[test]
fn the_flag_for_the_policy_local_is_on_whenever_the_run_is_of_that_policy() {
    let mut encoder = Encoder::new(ROOM);
    let at = address("0.0.0.0", 30080);
    let cluster = desired::Frontend { flags: NODE_PORT, ..frontend("web", "", at, &["10.1.0.1"]) };
    let local = desired::Frontend {
        flags: NODE_PORT | EXTERNAL_LOCAL,
        ..frontend("web", "", at, &["10.1.0.1", "10.1.0.2"])
    };
    set(&mut encoder, std::slice::from_ref(&cluster));
    let switches = |plan: &Plan| -> Vec<bool> {
        let ops = plan.ops().iter().filter(|op| op.phase() == Phase::Switch);
        ops.map(|op| matches!(op, Op::SwitchRun { .. })).collect()
    };
    assert_eq!(switches(&set(&mut encoder, &[local])), [false, true]);
    assert_eq!(switches(&set(&mut encoder, &[cluster])), [true, false]);
}

#[test]
fn node_addresses_are_inserted_changed_and_deleted() {
    let mut encoder = Encoder::new(ROOM);
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    assert_eq!(encoder.set_node_addrs(&[(ip("10.0.0.1"), true), (ip("10.0.0.2"), false)].into()), 0);
    assert_eq!(encoder.take_plan().ops().len(), 2);
    assert_eq!(encoder.set_node_addrs(&[(ip("10.0.0.2"), true), (ip("10.0.0.3"), false)].into()), 0);
    assert_eq!(
        encoder.take_plan().ops(),
        [
            Op::InsertAddress { table: Nodes, address: ip("10.0.0.2"), flag: true },
            Op::InsertAddress { table: Nodes, address: ip("10.0.0.3"), flag: false },
            Op::DeleteAddress(Nodes, ip("10.0.0.1")),
        ]
    );
}

/// Deleted addresses occupy the table as well: a plan inserts before it deletes.
#[test]
fn node_addresses_wait_for_room_and_the_own_ones_come_first() {
    let all = |first: u32, n: u32| -> BTreeMap<IpAddr, bool> {
        (first..first + n).map(|ip| (std::net::Ipv4Addr::from(ip).into(), false)).collect()
    };
    let mut encoder = Encoder::new(ROOM);
    assert_eq!(encoder.set_node_addrs(&all(0, limits::MAX_NODE_ADDRS)), 0);
    let _plan = encoder.take_plan();
    let mut next = all(2, limits::MAX_NODE_ADDRS - 1);
    let own = IpAddr::from([255, 0, 0, 1]);
    next.insert(own, true);
    assert_eq!(encoder.set_node_addrs(&next), 2);
    let plan = encoder.take_plan();
    assert_eq!(phases(&plan), [Phase::Delete; 2]);
    assert_eq!(encoder.set_node_addrs(&next), 2, "the plan is not carried out yet");
    encoder.settled(plan.number());
    next.extend(all(u32::MAX / 2, 2));
    assert_eq!(encoder.set_node_addrs(&next), 2);
    assert!(encoder.image().node_addrs.contains_key(&own));
    assert_eq!(encoder.image().node_addrs.len(), limits::MAX_NODE_ADDRS as usize);
}

/// Programs read a network in several steps: changing it in place could pair its address with another's mask.
#[test]
fn networks_are_out_of_force_for_a_grace_period_before_others_are() {
    let cidrs = |text: &str| vec![text.parse::<Cidr>().unwrap()];
    let (old, new) = (cidrs("10.96.0.0/12"), cidrs("fd00:10:96::/112"));
    let set = |cidrs: &[Cidr]| [Op::SetServiceCidrs(cidrs.into())];
    let mut encoder = Encoder::new(ROOM);
    assert!(encoder.set_service_cidrs(&[]));
    assert!(encoder.take_plan().is_empty());
    assert!(encoder.set_service_cidrs(&old));
    assert_eq!(encoder.take_plan().ops(), set(&old));
    assert!(encoder.set_service_cidrs(&old));
    assert!(encoder.take_plan().is_empty());

    assert!(!encoder.set_service_cidrs(&new));
    let plan = encoder.take_plan();
    assert_eq!(plan.ops(), set(&[]));
    assert!(plan.frees());
    assert!(!encoder.set_service_cidrs(&old), "not even the same ones: they would be written anew");
    assert!(encoder.take_plan().is_empty());
    encoder.settled(plan.number());
    assert!(encoder.set_service_cidrs(&new));
    assert_eq!(encoder.take_plan().ops(), set(&new));
}

/// A cluster IP refuses undefined ports only while its frontends can be found.
#[test]
fn a_cluster_ip_comes_after_its_frontends_and_goes_before_them() {
    let mut encoder = Encoder::new(ROOM);
    let frontend = frontend("web", "http", address("10.96.0.1", 80), &["10.0.0.1"]);
    let ip = frontend.address.ip;
    assert!(encoder.set_address(ClusterIps, ip, Some(true)));
    encoder.set(frontend.address, Some(&frontend)).unwrap();
    let place = |plan: &Plan, is_wanted: fn(&Op) -> bool| plan.ops().iter().position(is_wanted).unwrap();
    let plan = encoder.take_plan();
    let key = place(&plan, |op| matches!(op, Op::InsertService { .. }));
    assert!(key < place(&plan, |op| matches!(op, Op::InsertAddress { .. })));

    assert!(encoder.set_address(ClusterIps, ip, None));
    encoder.set(frontend.address, None).unwrap();
    let plan = encoder.take_plan();
    let key = place(&plan, |op| matches!(op, Op::DeleteService(_)));
    assert!(key > place(&plan, |op| matches!(op, Op::DeleteAddress(..))));
}

#[test]
fn ids_and_places_survive_a_restart() {
    let mut encoder = Encoder::new(ROOM);
    let (one, two) = (address("10.96.0.1", 80), address("10.96.0.2", 80));
    let frontends =
        [frontend("one", "", one, &["10.1.0.1", "10.1.0.2"]), frontend("two", "", two, &["10.1.0.1"])];
    set(&mut encoder, &frontends);
    let mut restarted = Encoder::adopt(ROOM, encoder.image());
    assert_eq!(restarted.image(), encoder.image());
    assert!(set(&mut restarted, &frontends).is_empty());
    assert_eq!(restarted.service_id(&frontends[1].port), encoder.service_id(&frontends[1].port));

    // A new endpoint gets a fresh id and a new run.
    set(&mut restarted, &[frontend("two", "", two, &["10.1.0.1", "10.1.0.9"])]);
    assert_eq!(entries(&restarted, two), [(2, "10.1.0.1".to_owned()), (3, "10.1.0.9".to_owned())]);
    assert_eq!(entries(&restarted, one).len(), 2);
}

/// The agent was killed between changing the owner of an address and switching its run.
#[test]
fn a_frontend_with_the_run_of_another_port_gets_its_own() {
    let mut encoder = Encoder::new(ROOM);
    let (contested, one, two) =
        (address("203.0.113.1", 80), address("10.96.0.1", 80), address("10.96.0.2", 80));
    let of_one = ["10.1.0.1", "10.1.0.2"];
    set(
        &mut encoder,
        &[
            frontend("one", "", one, &of_one),
            frontend("one", "", contested, &of_one),
            frontend("two", "", two, &["10.2.0.1"]),
        ],
    );
    let mut found = encoder.image().clone();
    let id = found.services[&contested];
    found.frontends.get_mut(&id).unwrap().service_id = found.frontends[&found.services[&two]].service_id;

    let mut restarted = Encoder::adopt(ROOM, &found);
    assert_eq!(*restarted.image(), found);
    let frontends = [
        frontend("one", "", one, &of_one),
        frontend("two", "", contested, &["10.2.0.1"]),
        frontend("two", "", two, &["10.2.0.1"]),
    ];
    let plan = set(&mut restarted, &frontends);
    let run = restarted.image().frontends[&restarted.image().services[&two]].run;
    assert_eq!(plan.ops(), [Op::SwitchRun { id, run }], "nothing else was wrong");
}

/// A key without an entry of its own is rewritten if it is desired, and deleted otherwise.
#[test]
fn stray_keys_end_with_the_first_plan() {
    let mut encoder = Encoder::new(ROOM);
    let (good, wanted, unwanted) =
        (address("10.96.0.1", 80), address("10.96.0.2", 80), address("10.96.0.3", 80));
    let web = frontend("web", "", good, &["10.1.0.1"]);
    set(&mut encoder, std::slice::from_ref(&web));
    let mut found = encoder.image().clone();
    found.services.extend([(wanted, 7u32), (unwanted, 0)]);

    let mut restarted = Encoder::adopt(ROOM, &found);
    let mut addresses: Vec<_> = restarted.addresses().copied().collect();
    addresses.sort_unstable();
    assert_eq!(addresses, [good, wanted, unwanted]);
    let plan = set(&mut restarted, &[web, frontend("other", "", wanted, &[])]);
    let keys: Vec<_> = plan.ops().iter().filter(|op| op.phase() > Phase::Write).collect();
    assert_eq!(
        keys,
        [&Op::InsertService { address: wanted, frontend_id: 1 }, &Op::DeleteService(unwanted)],
        "the entry that the stray key named is not used: a program may have found it"
    );
}

/// A run that overlaps another, or lies outside the table, is not adopted.
#[test]
fn runs_that_overlap_are_written_anew() {
    let mut encoder = Encoder::new(ROOM);
    let (one, two) = (address("10.96.0.1", 80), address("10.96.0.2", 80));
    let frontends = [
        frontend("one", "", one, &["10.1.0.1", "10.1.0.2", "10.1.0.3"]),
        frontend("two", "", two, &["10.2.0.1"]),
    ];
    set(&mut encoder, &frontends);
    for run in [Run { offset: 2, len: 2 }, Run { offset: u32::MAX, len: 2 }, Run { offset: 15, len: 2 }] {
        let mut found = encoder.image().clone();
        let id = found.services[&two];
        found.frontends.get_mut(&id).unwrap().run = run;
        let mut restarted = Encoder::adopt(ROOM, &found);
        for frontend in &frontends {
            restarted.set(frontend.address, Some(frontend)).unwrap();
        }
        restarted.take_plan().apply(&mut found);
        for (at, n) in [(one, 3), (two, 1)] {
            assert_eq!(entries(&restarted, at).len(), n);
            let run = found.frontends[&found.services[&at]].run;
            assert_eq!(found.entries(false, run), restarted.image().entries(false, run), "{at}");
        }
    }
}
