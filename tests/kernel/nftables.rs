//! nftables over netlink: what is written is read back, `nft` shows it, and packets follow it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
};

use lb_core::packets::nft::{
    Base, Chain, ChainType, Change, Comparison, CtKey, DataType, Direction, DynsetOp, Element, Expression,
    FIB_LOCAL, Family, FibAddress, Header, Hook, Key, LookupTo, MetaKey, Name, Numgen, Octets, Policy,
    Register, Reject, Rule, Set, SetFlags, SetSpec, Table, TableId, Transaction, Value, ValueType, Verdict,
    ct_state, ct_status,
};
use lb_core::{
    desired::{FrontendAddress, PacketMode, Settings},
    model::Protocol::Tcp,
    packets::{
        self,
        sim::{self, Packet},
    },
    plan::Capacity,
    state::State,
    tables::Image,
};
use lb_kernel::nftables::{Nftables, NftablesError};
use lb_tests::{
    Feature, Sandbox, client::call, command::text, feature::kernel_version, number, require, server::Servers,
};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};

use crate::clusters;

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

fn id(family: Family) -> TableId {
    TableId { family, name: "socklb".into() }
}

fn r(n: u8) -> Register {
    Register::new(n).unwrap()
}

/// Registers of an address.
fn width(family: Family) -> u8 {
    if family == Family::V4 { 1 } else { 4 }
}

fn address_type(family: Family) -> DataType {
    if family == Family::V4 { DataType::Ipv4 } else { DataType::Ipv6 }
}

/// `ip saddr` or `ip daddr`
fn address(family: Family, is_source: bool, to: u8) -> Expression {
    let (offset, len) = match (family, is_source) {
        (Family::V4, true) => (12, 4),
        (Family::V4, false) => (16, 4),
        (Family::V6, true) => (8, 16),
        (Family::V6, false) => (24, 16),
    };
    Expression::Payload { header: Header::Network, offset, len, to: r(to) }
}

/// `meta l4proto . th dport`
fn port(to: u8) -> [Expression; 2] {
    [
        Expression::Meta { key: MetaKey::L4Proto, to: r(to) },
        Expression::Payload { header: Header::Transport, offset: 2, len: 2, to: r(to + 1) },
    ]
}

/// `ip daddr . meta l4proto . th dport`, from a register on; and the register behind.
fn frontend(family: Family, to: u8) -> (Vec<Expression>, u8) {
    let behind = to + width(family);
    let mut expressions = vec![address(family, false, to)];
    expressions.extend(port(behind));
    (expressions, behind + 2)
}

fn lookup(set: &str, from: u8, to: LookupTo) -> Expression {
    Expression::Lookup { set: set.into(), from: r(from), to }
}

fn draw(kind: Numgen, modulus: u32, to: u8) -> Expression {
    Expression::Numgen { kind, modulus, offset: 0, to: r(to) }
}

fn equals(from: u8, value: impl Into<Octets>) -> Expression {
    Expression::Compare { from: r(from), op: Comparison::Equal, value: value.into() }
}

fn rule(parts: impl IntoIterator<Item = Expression>) -> Rule {
    Rule { expressions: parts.into_iter().collect(), comment: None }
}

fn base(kind: ChainType, hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { base: Some(Base { kind, hook, priority, policy: Policy::Accept }), rules }
}

fn set(key: Vec<DataType>, value: ValueType) -> Set {
    let spec = SetSpec { key, value, flags: SetFlags::default(), timeout: None, size: None };
    Set { spec, elements: [].into() }
}

/// A table that has every expression, in the form that services use.
#[expect(clippy::too_many_lines, reason = "it is data")]
fn table(family: Family) -> Table {
    use DataType::{Mark, Port, Protocol};
    let (ip, w) = (address_type(family), width(family));
    let original = Direction::Original;
    let octets = |last: u8| -> Vec<u8> {
        if family == Family::V4 {
            vec![10, 96, 0, last]
        } else {
            [&[0xfd, 0][..], &[0; 13], &[last]].concat()
        }
    };
    let service = |last: u8, port: u16| -> Vec<u8> {
        [&octets(last)[..], &[6, 0, 0, 0], &port.to_be_bytes(), &[0, 0]].concat()
    };
    let endpoint =
        |last: u8, port: u16| -> Vec<u8> { [&octets(last)[..], &port.to_be_bytes(), &[0, 0]].concat() };
    let milliseconds = NonZeroU32::new(10_800_000);

    let mut services = set(vec![ip, Protocol, Port], ValueType::Data(vec![Mark]));
    let mut behaviours = set(vec![Mark], ValueType::Verdict);
    let mut endpoints = set(vec![ip, Protocol, Port, Mark], ValueType::Data(vec![ip, Port]));
    services.spec.size = NonZeroU32::new(65_536);
    services.elements.insert(service(1, 80).into(), Value::Data(3u32.to_ne_bytes().into()).into());
    services.elements.insert(service(2, 443).into(), Value::Data(4u32.to_ne_bytes().into()).into());
    let verdict = Value::Verdict(Verdict::Goto("affinity-3".into()));
    behaviours.elements.insert(4u32.to_ne_bytes().into(), verdict.into());
    for index in 0..3u8 {
        let key = [service(1, 80), u32::from(index).to_ne_bytes().to_vec()].concat();
        endpoints.elements.insert(key.into(), Value::Data(endpoint(10 + index, 8080).into()).into());
    }
    let to_pick = || Element::from(Value::Verdict(Verdict::Goto("pick-3".into())));
    let mut exceptions = set(vec![ip, Protocol, Port], ValueType::Verdict);
    exceptions.elements.insert(service(3, 53).into(), to_pick());
    let mut nodeports = set(vec![Protocol, Port], ValueType::Verdict);
    nodeports
        .elements
        .insert([&[6, 0, 0, 0][..], &30080u16.to_be_bytes(), &[0, 0]].concat().into(), to_pick());
    let mut affinity = set(vec![ip, ip, Protocol, Port], ValueType::Data(vec![ip, Port]));
    affinity.spec.flags = SetFlags::DYNAMIC | SetFlags::TIMEOUT;
    affinity.spec.size = NonZeroU32::new(65_536);
    affinity.spec.timeout = milliseconds;
    let mut hairpin = set(vec![ip, ip], ValueType::None);
    hairpin.elements.insert([octets(10), octets(10)].concat().into(), Value::None.into());
    let mut allowed = set(vec![ip, Protocol, Port, ip], ValueType::None);
    allowed.spec.flags = SetFlags::INTERVAL;
    let range = |last| Octets::from([service(1, 80), octets(last)].concat());
    allowed.elements.insert(Key { start: range(0), end: Some(range(255)) }, Value::None.into());
    let mut seen = set(vec![ip], ValueType::None);
    seen.spec.flags = SetFlags::DYNAMIC | SetFlags::TIMEOUT;
    seen.spec.size = NonZeroU32::new(1024);
    let mut kept = set(vec![ip], ValueType::None);
    kept.spec.flags = SetFlags::TIMEOUT;
    let element = Element { value: Value::None, timeout: milliseconds };
    kept.elements.insert(octets(7).into(), element);

    // How a service is found: by a verdict, by a set, and by a mark.
    let (key, n) = frontend(family, 0);
    let with = |expressions: &[Expression], more: Vec<Expression>| rule([expressions, &more].concat());
    let to_service = vec![
        with(&key, vec![lookup("exceptions", 0, LookupTo::Verdict)]),
        with(
            &key,
            vec![
                lookup("masquerade", 0, LookupTo::Matches),
                Expression::Verdict(Verdict::Goto("pick-3".into())),
            ],
        ),
        with(&key, vec![lookup("services", 0, LookupTo::Register(r(0))), Expression::SetMark { from: r(0) }]),
        rule([Expression::Meta { key: MetaKey::Mark, to: r(0) }, lookup("behaviours", 0, LookupTo::Verdict)]),
    ];
    let mut to_nodeport = vec![
        Expression::FibType { of: FibAddress::Destination, to: r(0) },
        equals(0, FIB_LOCAL.to_ne_bytes()),
    ];
    to_nodeport.extend(port(0));
    to_nodeport.push(lookup("nodeports", 0, LookupTo::Verdict));
    let pick = |numbers: Expression| {
        let translate = Expression::Dnat { address: r(0), port: Some(r(w)) };
        let mut expressions = key.clone();
        expressions.extend([numbers, lookup("endpoints", 0, LookupTo::Register(r(0))), translate]);
        rule(expressions)
    };
    let mut sticky = vec![address(family, true, 0)];
    sticky.extend(frontend(family, w).0);
    sticky.extend([
        lookup("affinity", 0, LookupTo::Register(r(0))),
        Expression::Dnat { address: r(0), port: Some(r(w)) },
    ]);
    // The translation is what the connection's answers come from.
    let remembered = [
        Expression::Ct { key: CtKey::Source(family, original), to: r(0) },
        Expression::Ct { key: CtKey::Destination(family, original), to: r(w) },
        Expression::Meta { key: MetaKey::L4Proto, to: r(2 * w) },
        Expression::Ct { key: CtKey::DestinationPort(original), to: r(2 * w + 1) },
        Expression::Ct { key: CtKey::Source(family, Direction::Reply), to: r(2 * w + 2) },
        Expression::Ct { key: CtKey::SourcePort(Direction::Reply), to: r(3 * w + 2) },
        Expression::Dynset {
            set: "affinity".into(),
            op: DynsetOp::Update,
            key: r(0),
            value: Some(r(2 * w + 2)),
            timeout: milliseconds,
        },
    ];
    let hairpinned = [
        Expression::Ct { key: CtKey::Status, to: r(0) },
        Expression::Bitwise {
            from: r(0),
            mask: ct_status::DNAT.to_ne_bytes().into(),
            xor: [0; 4].into(),
            to: r(0),
        },
        Expression::Compare { from: r(0), op: Comparison::NotEqual, value: [0; 4].into() },
        address(family, true, 0),
        address(family, false, w),
        lookup("hairpin", 0, LookupTo::Matches),
        Expression::Masquerade { ports: None, is_fully_random: false },
    ];
    let masqueraded = [
        Expression::Ct { key: CtKey::Destination(family, original), to: r(0) },
        Expression::Meta { key: MetaKey::L4Proto, to: r(w) },
        Expression::Ct { key: CtKey::DestinationPort(original), to: r(w + 1) },
        lookup("masquerade", 0, LookupTo::Matches),
        Expression::Masquerade { ports: None, is_fully_random: true },
    ];
    let mut masquerade = set(vec![ip, Protocol, Port], ValueType::None);
    masquerade.elements.insert(service(1, 80).into(), Value::None.into());

    let is_state = |state: u32| {
        [
            Expression::Ct { key: CtKey::State, to: r(0) },
            Expression::Bitwise {
                from: r(0),
                mask: state.to_ne_bytes().into(),
                xor: [0; 4].into(),
                to: r(0),
            },
            Expression::Compare { from: r(0), op: Comparison::NotEqual, value: [0; 4].into() },
        ]
    };
    let refused = |answer: Vec<Expression>| {
        let mut expressions = is_state(ct_state::NEW).to_vec();
        expressions.extend(key.clone());
        expressions.push(lookup("masquerade", 0, LookupTo::Matches));
        expressions.extend(answer);
        rule(expressions)
    };
    let mut not_allowed = key.clone();
    not_allowed.extend([
        address(family, true, n),
        lookup("allowed", 0, LookupTo::MatchesNot),
        Expression::Counter,
        Expression::Verdict(Verdict::Drop),
    ]);
    let filter = vec![
        rule([&is_state(ct_state::INVALID)[..], &[Expression::Verdict(Verdict::Drop)]].concat()),
        refused(vec![
            Expression::Meta { key: MetaKey::L4Proto, to: r(0) },
            equals(0, [6]),
            Expression::Reject(Reject::TcpReset),
        ]),
        refused(vec![Expression::Reject(Reject::port_unreachable(family))]),
        Rule {
            expressions: vec![
                address(family, false, 0),
                equals(0, octets(9)),
                Expression::Verdict(Verdict::Jump("marks".into())),
            ],
            comment: Some("undefined ports".into()),
        },
        rule(not_allowed),
    ];
    let marks = vec![
        rule([
            Expression::Immediate { value: 0x4000u32.to_ne_bytes().into(), to: r(0) },
            Expression::SetMark { from: r(0) },
        ]),
        rule([
            Expression::Meta { key: MetaKey::Mark, to: r(0) },
            equals(0, 0x4000u32.to_ne_bytes()),
            Expression::Meta { key: MetaKey::InputName, to: r(0) },
            equals(0, *b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            Expression::Verdict(Verdict::Return),
        ]),
        rule([
            Expression::Ct { key: CtKey::Direction, to: r(0) },
            equals(0, [1]),
            address(family, true, 0),
            Expression::Dynset {
                set: "seen".into(),
                op: DynsetOp::Add,
                key: r(0),
                value: None,
                timeout: milliseconds,
            },
            Expression::Verdict(Verdict::Accept),
        ]),
        rule([
            Expression::Ct { key: CtKey::Source(family, Direction::Reply), to: r(0) },
            lookup("kept", 0, LookupTo::Matches),
            Expression::Meta { key: MetaKey::L4Proto, to: r(0) },
            equals(0, [17]),
            Expression::Payload { header: Header::Transport, offset: 0, len: 2, to: r(0) },
            Expression::Compare {
                from: r(0),
                op: Comparison::GreaterOrEqual,
                value: 1024u16.to_be_bytes().into(),
            },
            Expression::Verdict(Verdict::Drop),
        ]),
    ];
    let chains: [(&str, Chain); 9] = [
        (
            "prerouting",
            base(
                ChainType::Nat,
                Hook::Prerouting,
                -110,
                [to_service.clone(), vec![rule(to_nodeport)]].concat(),
            ),
        ),
        ("output", base(ChainType::Nat, Hook::Output, -150, to_service)),
        (
            "postrouting",
            base(ChainType::Nat, Hook::Postrouting, 90, vec![rule(hairpinned), rule(masqueraded)]),
        ),
        ("remember", base(ChainType::Filter, Hook::Postrouting, 150, vec![rule(remembered)])),
        ("filter-forward", base(ChainType::Filter, Hook::Forward, -110, filter)),
        (
            "untracked",
            base(
                ChainType::Filter,
                Hook::Prerouting,
                -300,
                vec![rule([address(family, false, 0), equals(0, octets(8)), Expression::Notrack])],
            ),
        ),
        (
            "pick-3",
            Chain {
                base: None,
                rules: vec![pick(draw(Numgen::Random, 3, n)), pick(draw(Numgen::Incremental, 1, n))],
            },
        ),
        ("affinity-3", Chain { base: None, rules: vec![rule(sticky)] }),
        ("marks", Chain { base: None, rules: marks }),
    ];
    let sets: [(&str, Set); 10] = [
        ("services", services),
        ("behaviours", behaviours),
        ("endpoints", endpoints),
        ("nodeports", nodeports),
        ("affinity", affinity),
        ("exceptions", exceptions),
        ("hairpin", hairpin),
        ("allowed", allowed),
        ("seen", seen),
        ("kept", kept),
    ];
    let mut table = Table {
        flags: 0,
        chains: chains.map(|(name, chain)| (Name::from(name), chain)).into(),
        sets: sets.map(|(name, set)| (Name::from(name), set)).into(),
    };
    table.sets.insert("masquerade".into(), masquerade);
    table
}

/// All that adds a table.
pub(crate) fn load(id: &TableId, table: &Table) -> Transaction {
    let mut changes = vec![Change::AddTable];
    changes.extend(table.chains.iter().map(|(name, chain)| Change::AddChain(name.clone(), chain.base)));
    changes.extend(table.sets.iter().map(|(name, set)| Change::AddSet(name.clone(), set.spec.clone())));
    for (name, chain) in &table.chains {
        changes.extend(chain.rules.iter().map(|rule| Change::AddRule(name.clone(), rule.clone())));
    }
    for (name, set) in &table.sets {
        let elements = set.elements.iter().map(|(key, element)| (key.clone(), element.clone())).collect();
        changes.push(Change::AddElements(name.clone(), elements));
    }
    Transaction {
        changes: changes.into_iter().map(|change| (id.clone(), change)).collect(),
        generation: None,
    }
}

fn loaded(family: Family) -> (Nftables, TableId, Table) {
    let (id, table) = (id(family), table(family));
    let mut nftables = Nftables::open().unwrap();
    nftables.apply(&load(&id, &table)).unwrap();
    (nftables, id, table)
}

#[test]
fn what_is_written_is_read_back() {
    Sandbox::test_with(&[Feature::Nftables], |_sandbox| {
        for family in FAMILIES {
            let (mut nftables, id, table) = loaded(family);
            let (read, generation) = nftables.read(&id).unwrap();
            let read = read.unwrap();
            for (name, chain) in &table.chains {
                assert_eq!(read.chains.get(name), Some(chain), "{id} {name}");
            }
            for (name, set) in &table.sets {
                assert_eq!(read.sets.get(name), Some(set), "{id} {name}");
            }
            assert_eq!(read, table);
            assert_eq!(nftables.generation().unwrap(), generation);
        }
    });
}

#[test]
fn nft_shows_what_is_written() {
    Sandbox::test_with(&[Feature::Nftables, Feature::Command("nft")], |_sandbox| {
        for (family, name, expected) in [
            (Family::V4, "ip", expect_test::expect_file!["nftables/ip.nft"]),
            (Family::V6, "ip6", expect_test::expect_file!["nftables/ip6.nft"]),
        ] {
            let (_nftables, _id, _table) = loaded(family);
            let listed = text("nft", &["list", "table", name, "socklb"]);
            // The time until an element expires is another each time.
            let lines = listed.lines().map(|line| match line.split_once(" expires ") {
                Some((before, _)) => format!("{before} }}\n"),
                None => format!("{line}\n"),
            });
            expected.assert_eq(&lines.collect::<String>());
            // Programs such as firewalld read this form.
            let _json = text("nft", &["--json", "list", "ruleset"]);
        }
    });
}

fn transaction(id: &TableId, changes: impl IntoIterator<Item = Change>) -> Transaction {
    Transaction {
        changes: changes.into_iter().map(|change| (id.clone(), change)).collect(),
        generation: None,
    }
}

/// A table whose chain at the output hook translates connections to `10.96.0.1:80` or `[fd00::1]:80`, if they
/// draw the index of one of these endpoints. It draws often enough for that.
pub(crate) fn service(family: Family, protocol: u8, endpoints: &[SocketAddr]) -> (TableId, Table) {
    let (ip, w) = (address_type(family), width(family));
    let mut map = set(
        vec![ip, DataType::Protocol, DataType::Port, DataType::Mark],
        ValueType::Data(vec![ip, DataType::Port]),
    );
    map.elements =
        (0..).zip(endpoints).map(|(n, endpoint)| endpoint_element(protocol, n, *endpoint)).collect();
    let (key, n) = frontend(family, 0);
    let pick = rule(key.into_iter().chain([
        draw(Numgen::Random, 4, n),
        lookup("endpoints", 0, LookupTo::Register(r(0))),
        Expression::Dnat { address: r(0), port: Some(r(w)) },
    ]));
    let chain = base(ChainType::Nat, Hook::Output, -110, vec![pick; 32]);
    let table = Table {
        flags: 0,
        chains: [("output".into(), chain)].into(),
        sets: [("endpoints".into(), map)].into(),
    };
    (id(family), table)
}

/// The service's address.
pub(crate) fn service_address(family: Family) -> SocketAddr {
    if family == Family::V4 { "10.96.0.1:80" } else { "[fd00::1]:80" }.parse().unwrap()
}

/// An element of the service's map.
pub(crate) fn endpoint_element(protocol: u8, index: u32, endpoint: SocketAddr) -> (Key, Element) {
    let octets = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let family = if endpoint.is_ipv4() { Family::V4 } else { Family::V6 };
    let key =
        [&octets(service_address(family))[..], &[protocol, 0, 0, 0], &[0, 80, 0, 0], &index.to_ne_bytes()];
    let value = [&octets(endpoint)[..], &endpoint.port().to_be_bytes(), &[0, 0]].concat();
    (key.concat().into(), Value::Data(value.into()).into())
}

/// Three endpoints of a family.
pub(crate) fn endpoints(family: Family) -> [SocketAddr; 3] {
    let address = |last| {
        if family == Family::V4 { format!("10.244.0.{last}:8080") } else { format!("[fd01::{last}]:8080") }
    };
    [1, 2, 3].map(|last| address(last).parse().unwrap())
}

#[test]
fn packets_follow_the_elements() {
    Sandbox::test_with(&[Feature::Nftables], |sandbox| {
        for family in FAMILIES {
            let (address, endpoints) = (service_address(family), endpoints(family));
            sandbox.own([address.ip()].into_iter().chain(endpoints.map(|endpoint| endpoint.ip())));
            let _servers = Servers::tcp(endpoints);
            let (id, table) = service(family, 6, &endpoints);
            let mut nftables = Nftables::open().unwrap();
            nftables.apply(&load(&id, &table)).unwrap();
            let reached =
                || -> BTreeSet<SocketAddr> { (0..60).map(|_| call(address, Tcp).unwrap()).collect() };
            assert_eq!(reached(), endpoints.into());
            // The first endpoint goes, and the last takes its index, in one transaction.
            let [(first, _), (last, _)] = [0, 2].map(|n| endpoint_element(6, n, endpoints[0]));
            let changes = [
                Change::DeleteElements("endpoints".into(), vec![first, last]),
                Change::AddElements("endpoints".into(), vec![endpoint_element(6, 0, endpoints[2])]),
            ];
            nftables.apply(&transaction(&id, changes)).unwrap();
            assert_eq!(reached(), endpoints[1..].iter().copied().collect());
        }
    });
}

#[test]
fn a_refused_transaction_changes_nothing_and_names_the_element() {
    Sandbox::test_with(&[Feature::Nftables], |_sandbox| {
        let (mut nftables, id, table) = loaded(Family::V4);
        let generation = nftables.generation().unwrap();
        // The last of many elements has another value than the kernel's.
        let key = |n: u32| Key::from([&n.to_be_bytes()[..], &[6, 0, 0, 0, 0, 80, 0, 0]].concat());
        let mut elements: Vec<_> =
            (0..5000).map(|n| (key(n), Element::from(Value::Data(n.to_ne_bytes().into())))).collect();
        elements.push((key(0x0a60_0001), Value::Data([9; 4].into()).into()));
        let changes = [
            Change::AddSet("new".into(), table.sets["hairpin"].spec.clone()),
            Change::AddElements("services".into(), elements),
            Change::DeleteChain("none".into()),
        ];
        let error = nftables.apply(&transaction(&id, changes)).unwrap_err().to_string();
        assert!(
            error.starts_with("nftables: table ip socklb: cannot add elements to set services"),
            "{error}"
        );
        assert!(error.ends_with("; 1 more changes are refused"), "{error}");
        // The kernel names the attribute since 6.0.
        if kernel_version() >= (6, 1) {
            assert!(error.contains(", element 0a600001060000000050"), "{error}");
        }
        assert_eq!(nftables.read(&id).unwrap(), (Some(table), generation));
    });
}

/// More refusals than the socket's buffer takes.
#[test]
fn of_very_many_refusals_the_first_is_named() {
    Sandbox::test_with(&[Feature::Nftables], |_sandbox| {
        let (mut nftables, id, _table) = loaded(Family::V4);
        let changes = (0..20_000).map(|n| Change::DeleteChain(format!("none-{n}").into()));
        let error = nftables.apply(&transaction(&id, changes)).unwrap_err().to_string();
        assert!(error.starts_with("nftables: table ip socklb: cannot delete chain none-0: "), "{error}");
        // The socket still works.
        let _read = nftables.read(&id).unwrap();
    });
}

#[test]
fn what_is_checked_is_not_done() {
    Sandbox::test_with(&[Feature::Nftables], |_sandbox| {
        let (id, table) = (id(Family::V6), table(Family::V6));
        let mut nftables = Nftables::open().unwrap();
        let generation = nftables.generation().unwrap();
        nftables.check(&load(&id, &table)).unwrap();
        assert_eq!(nftables.read(&id).unwrap(), (None, generation));
        let missing = transaction(&id, [Change::DeleteTable]);
        let error = nftables.check(&missing).unwrap_err();
        assert!(matches!(error, NftablesError::Refused { .. }), "{error}");
        assert!(error.to_string().starts_with("nftables: table ip6 socklb: cannot delete it"), "{error}");
        // An empty transaction is not sent.
        nftables.apply(&Transaction::default()).unwrap();
        assert_eq!(nftables.generation().unwrap(), generation);
    });
}

#[test]
fn a_transaction_for_another_generation_is_refused() {
    Sandbox::test_with(&[Feature::Nftables], |_sandbox| {
        let (mut nftables, id, table) = loaded(Family::V4);
        let generation = nftables.generation().unwrap();
        nftables.apply(&transaction(&id, [Change::FlushSet("hairpin".into())])).unwrap();
        let late = Transaction { generation: Some(generation), ..transaction(&id, [Change::DeleteTable]) };
        assert!(matches!(nftables.apply(&late), Err(NftablesError::Changed)));
        let (read, now) = nftables.read(&id).unwrap();
        assert_eq!(read.unwrap().chains, table.chains);
        nftables.apply(&Transaction { generation: Some(now), ..late }).unwrap();
        assert_eq!(nftables.read(&id).unwrap().0, None);
    });
}

/// Every change of another program makes what is read differ from what was written, and one transaction
/// replaces all of it.
#[test]
fn changes_of_others_are_seen_and_undone() {
    Sandbox::test_with(&[Feature::Nftables, Feature::Command("nft")], |_sandbox| {
        let (mut nftables, id, table) = loaded(Family::V4);
        for change in [
            "add rule ip socklb pick-3 limit rate 10/second accept",
            "insert rule ip socklb output ip daddr 10.96.0.1 accept",
            "add rule ip socklb pick-3 dnat to 10.244.0.1-10.244.0.9",
            "add rule ip socklb marks ct mark set 7",
            "add rule ip socklb marks meta l4proto { tcp, udp } drop",
            "flush chain ip socklb output",
            "add chain ip socklb other",
            "add chain ip socklb output { policy drop ; }",
            "add set ip socklb other { type ipv4_addr ; flags interval ; elements = { 10.0.0.0/8 } ; }",
            "add map ip socklb other { type ipv4_addr : counter ; }",
            "add element ip socklb hairpin { 10.0.0.1 . 10.0.0.2 comment \"mine\" }",
            "delete element ip socklb hairpin { 10.96.0.10 . 10.96.0.10 }",
            "add table ip socklb { flags dormant ; }",
            "flush ruleset",
        ] {
            text("nft", &[change]);
            let (read, _) = nftables.read(&id).unwrap();
            assert_ne!(read.as_ref(), Some(&table), "{change}");
            assert_eq!(read.is_none(), change == "flush ruleset");
            let mut again = transaction(&id, [Change::AddTable, Change::DeleteTable]);
            again.changes.extend(load(&id, &table).changes);
            nftables.apply(&again).unwrap();
            assert_eq!(nftables.read(&id).unwrap().0.as_ref(), Some(&table), "{change}");
        }
    });
}

#[test]
fn a_part_of_a_table_is_replaced() {
    Sandbox::test_with(&[Feature::Nftables], |_sandbox| {
        let (mut nftables, id, mut table) = loaded(Family::V4);
        let kept = table.sets["kept"].spec.clone();
        let rules = &mut table.chains.get_mut("pick-3").unwrap().rules;
        rules.reverse();
        let services = &mut table.sets.get_mut("services").unwrap().elements;
        let (key, element) = services.iter_mut().next().unwrap();
        element.value = Value::Data(7u32.to_ne_bytes().into());
        let mut changes = vec![
            Change::FlushChain("pick-3".into()),
            Change::DeleteElements("services".into(), vec![key.clone()]),
            Change::AddElements("services".into(), vec![(key.clone(), element.clone())]),
            Change::FlushSet("allowed".into()),
            Change::DeleteChain("remember".into()),
            Change::AddSet("more".into(), kept.clone()),
            Change::AddChain("more".into(), None),
        ];
        changes.extend(rules.iter().map(|rule| Change::AddRule("pick-3".into(), rule.clone())));
        table.sets.get_mut("allowed").unwrap().elements.clear();
        table.chains.remove("remember");
        table.chains.insert("more".into(), Chain::default());
        table.sets.insert("more".into(), Set { spec: kept, elements: [].into() });
        // A base chain must be flushed before it goes: its rules use sets.
        changes.insert(0, Change::FlushChain("remember".into()));
        nftables.apply(&transaction(&id, changes)).unwrap();
        assert_eq!(nftables.read(&id).unwrap().0.unwrap(), table);
    });
}

/// Their hosts have an nft that fails when it lists such rules.
#[test]
fn kernels_before_5_13_are_refused() {
    Sandbox::test(|_sandbox| {
        let probed = lb_kernel::nftables::probe(Family::V4);
        let is_too_old = matches!(probed, Err(NftablesError::TooOld { .. }));
        assert_eq!(is_too_old, kernel_version() < (5, 13), "{probed:?}");
    });
}

/// A probe leaves nothing behind.
#[test]
fn a_probe_changes_nothing() {
    Sandbox::test_with(&[Feature::Nftables], |_sandbox| {
        let mut nftables = Nftables::open().unwrap();
        let before = nftables.generation().unwrap();
        for family in FAMILIES {
            lb_kernel::nftables::probe(family).unwrap();
        }
        assert_eq!(nftables.generation().unwrap(), before);
    });
}

/// Random histories: all kinds of elements occur among them.
const N_HISTORIES: usize = 12;

/// A packet from outside to each of a few frontends.
fn packets_to(state: &State, family: Family) -> Vec<Packet> {
    let source = match family {
        Family::V4 => "198.51.100.7",
        Family::V6 => "2001:db8::7",
    };
    let source: IpAddr = source.parse().unwrap();
    let desired = state.desired();
    let all =
        desired.services().flat_map(|key| desired.frontends_of(key)).map(|(frontend, _)| frontend.address);
    let of_family = all.filter(|at| at.ip.is_ipv4() == source.is_ipv4() && !at.ip.is_unspecified());
    let packet = |at: FrontendAddress| Packet {
        source,
        destination: SocketAddr::new(at.ip, at.port),
        protocol: at.protocol.number(),
        is_own: false,
    };
    of_family.take(4).map(packet).collect()
}

/// The changes of each sync lead to the tables that are made from scratch, whatever was before, and `nft`
/// lists them.
#[test]
fn the_tables_of_random_clusters_follow_their_changes() {
    Sandbox::test_with(&[Feature::Nftables], |_sandbox| {
        let mut nftables = Nftables::open().unwrap();
        let mut random = TestRunner::deterministic();
        let has_nft = require(Feature::Command("nft"));
        let mut used = BTreeSet::new();
        let n_histories = number("LB_TEST_STATES", N_HISTORIES);
        let is_complete = n_histories >= N_HISTORIES;
        for _ in 0..n_histories {
            let settings = Settings { packets: PacketMode::All, ..clusters::settings() };
            let capacity = Capacity { services: 256, endpoints: 4096 };
            let mut state = State::new(settings, Vec::new(), capacity, &Image::default());
            for cluster in clusters::history(8).new_tree(&mut random).unwrap().current() {
                cluster.feed(&mut state);
                let _plan = state.sync();
                nftables.apply(&state.take_packet_changes()).unwrap();
                for (id, table) in state.packets().tables() {
                    let (read, generation) = nftables.read(&id).unwrap();
                    let read = read.unwrap();
                    assert_eq!(packets::diff(Some(&read), &table), [], "{id}");
                    assert_eq!(read, table);
                    for packet in packets_to(&state, id.family) {
                        let (part, _) = nftables.read_wanted(&id, |part| sim::lookups(part, packet)).unwrap();
                        let [part, whole] = [&part.unwrap(), &read].map(|table| sim::outcomes(table, packet));
                        assert_eq!(part, whole, "{packet:?}");
                    }
                    let sets = table.sets.iter().filter(|(_, set)| !set.elements.is_empty());
                    used.extend(sets.map(|(name, _)| name.to_string()));
                    // From nothing, in the same kernel.
                    let whole = packets::diff(None, &table);
                    let changes = [Change::AddTable, Change::DeleteTable].into_iter().chain(whole);
                    nftables.check(&transaction(&id, changes)).unwrap();
                    assert_eq!(nftables.generation().unwrap(), generation);
                }
                if has_nft {
                    text("nft", &["list", "ruleset"]);
                }
            }
            nftables.remove(&packets::table_ids()).unwrap();
        }
        for name in
            ["allowed", "dropped", "endpoints", "hairpin", "nodeport-endpoints", "refused", "other-ips"]
        {
            assert!(
                used.contains(name) || !is_complete,
                "{name} has no elements in any of these clusters: {used:?}"
            );
        }
    });
}
