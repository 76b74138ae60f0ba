//! What is encoded is decoded to the same values, and octets of any kind are decoded without a panic.

use std::num::NonZeroU32;

use lb_core::packets::nft::{
    Base, Chain, ChainType, Comparison, CtKey, DataType, Direction, DynsetOp, Element, Expression, Family,
    FibAddress, Header, Hook, Key, LookupTo, MetaKey, Numgen, Octets, Policy, Register, Reject, Rule,
    SetFlags, SetSpec, TableId, Unknown, Value, ValueType, Verdict,
};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;
use crate::nfnetlink::messages;

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

fn id(family: Family) -> TableId {
    TableId { family, name: "t".into() }
}

fn name() -> impl Strategy<Value = Name> {
    "[a-z][a-z0-9-]{0,40}".prop_map(Name::from)
}

fn register() -> impl Strategy<Value = Register> {
    (0..Register::COUNT).prop_map(|n| Register::new(n).unwrap())
}

fn octets(max: usize) -> impl Strategy<Value = Octets> {
    vec(any::<u8>(), 1..=max).prop_map(Octets::from)
}

fn milliseconds() -> impl Strategy<Value = Option<NonZeroU32>> {
    option::of(any::<NonZeroU32>())
}

fn verdict() -> impl Strategy<Value = Verdict> {
    let plain = select(vec![Verdict::Accept, Verdict::Drop, Verdict::Continue, Verdict::Return]);
    prop_oneof![plain, name().prop_map(Verdict::Jump), name().prop_map(Verdict::Goto)]
}

fn ct_key() -> impl Strategy<Value = CtKey> {
    let directed = [Direction::Original, Direction::Reply].into_iter().flat_map(|direction| {
        let addresses = FAMILIES.into_iter().flat_map(move |family| {
            [CtKey::Source(family, direction), CtKey::Destination(family, direction)]
        });
        addresses.chain([CtKey::SourcePort(direction), CtKey::DestinationPort(direction)])
    });
    select(
        [CtKey::State, CtKey::Status, CtKey::Direction, CtKey::Mark]
            .into_iter()
            .chain(directed)
            .collect::<Vec<_>>(),
    )
}

fn expression() -> impl Strategy<Value = Expression> {
    let meta = select(vec![
        MetaKey::Mark,
        MetaKey::InputIndex,
        MetaKey::OutputIndex,
        MetaKey::InputName,
        MetaKey::OutputName,
        MetaKey::NfProto,
        MetaKey::L4Proto,
    ]);
    let comparison = select(vec![
        Comparison::Equal,
        Comparison::NotEqual,
        Comparison::Less,
        Comparison::LessOrEqual,
        Comparison::Greater,
        Comparison::GreaterOrEqual,
    ]);
    let to = prop_oneof![
        select(vec![LookupTo::Matches, LookupTo::MatchesNot, LookupTo::Verdict]),
        register().prop_map(LookupTo::Register),
    ];
    let dynset = (
        name(),
        select(vec![DynsetOp::Add, DynsetOp::Update, DynsetOp::Delete]),
        register(),
        option::of(register()),
        milliseconds(),
    );
    let reject = prop_oneof![Just(Reject::TcpReset), any::<u8>().prop_map(Reject::Unreachable)];
    let loads = prop_oneof![
        (meta, register()).prop_map(|(key, to)| Expression::Meta { key, to }),
        (select(vec![Header::Network, Header::Transport]), any::<u8>(), any::<u8>(), register())
            .prop_map(|(header, offset, len, to)| Expression::Payload { header, offset, len, to }),
        (ct_key(), register()).prop_map(|(key, to)| Expression::Ct { key, to }),
        (select(vec![FibAddress::Source, FibAddress::Destination]), register())
            .prop_map(|(of, to)| Expression::FibType { of, to }),
        (octets(16), register()).prop_map(|(value, to)| Expression::Immediate { value, to }),
        (register(), octets(16), octets(16), register())
            .prop_map(|(from, mask, xor, to)| Expression::Bitwise { from, mask, xor, to }),
        (select(vec![Numgen::Incremental, Numgen::Random]), any::<u32>(), any::<u32>(), register())
            .prop_map(|(kind, modulus, offset, to)| Expression::Numgen { kind, modulus, offset, to }),
    ];
    prop_oneof![
        loads,
        register().prop_map(|from| Expression::SetMark { from }),
        verdict().prop_map(Expression::Verdict),
        (register(), comparison, octets(16)).prop_map(|(from, op, value)| Expression::Compare {
            from,
            op,
            value
        }),
        (name(), register(), to).prop_map(|(set, from, to)| Expression::Lookup { set, from, to }),
        dynset.prop_map(|(set, op, key, value, timeout)| Expression::Dynset { set, op, key, value, timeout }),
        (register(), option::of(register())).prop_map(|(address, port)| Expression::Dnat { address, port }),
        (option::of((register(), register())), any::<bool>())
            .prop_map(|(ports, is_fully_random)| Expression::Masquerade { ports, is_fully_random }),
        reject.prop_map(Expression::Reject),
        Just(Expression::Counter),
        Just(Expression::Notrack),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    (vec(expression(), 0..8), option::of("[ -~]{0,120}".prop_map(Name::from)))
        .prop_map(|(expressions, comment)| Rule { expressions, comment })
}

fn base() -> impl Strategy<Value = Base> {
    let kind = select(vec![ChainType::Filter, ChainType::Nat, ChainType::Route]);
    let hook = select(vec![Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting]);
    (kind, hook, any::<i32>(), select(vec![Policy::Accept, Policy::Drop]))
        .prop_map(|(kind, hook, priority, policy)| Base { kind, hook, priority, policy })
}

fn fields(n: usize) -> impl Strategy<Value = Vec<DataType>> {
    use DataType::{InterfaceName, Ipv4, Ipv6, Mark, Port, Protocol};
    // The type of a concatenation has 32 bits, six for each.
    vec(select(vec![Ipv4, Ipv6, Protocol, Port, Mark, InterfaceName]), 1..=n)
}

fn spec() -> impl Strategy<Value = SetSpec> {
    let value =
        prop_oneof![Just(ValueType::None), Just(ValueType::Verdict), fields(3).prop_map(ValueType::Data),];
    let none = SetFlags::default();
    let flags = (
        select(vec![none, SetFlags::CONSTANT]),
        select(vec![none, SetFlags::INTERVAL]),
        select(vec![none, SetFlags::TIMEOUT | SetFlags::DYNAMIC]),
    )
        .prop_map(|(first, second, third)| first | second | third);
    (fields(5), value, flags, milliseconds(), option::of(any::<NonZeroU32>()))
        .prop_map(|(key, value, flags, timeout, size)| SetSpec { key, value, flags, timeout, size })
}

fn element_entry() -> impl Strategy<Value = (Key, Element)> {
    let value = prop_oneof![
        Just(Value::None),
        octets(Octets::MAX).prop_map(Value::Data),
        verdict().prop_map(Value::Verdict),
    ];
    (octets(Octets::MAX), option::of(octets(Octets::MAX)), value, milliseconds())
        .prop_map(|(start, end, value, timeout)| (Key { start, end }, Element { value, timeout }))
}

/// The attributes of each change, as the kernel receives them.
fn sent(family: Family, changes: Vec<Change>) -> Vec<(u16, Vec<u8>)> {
    let changes = changes.into_iter().map(|change| (id(family), change)).collect();
    let batch = encode::batch(&Transaction { changes, generation: None }, 1, true).unwrap();
    let mut sent: Vec<_> = messages(&batch.octets)
        .map(|message| message.unwrap())
        .map(|message| (message.kind, message.attributes().0.to_vec()))
        .collect();
    assert_eq!(sent.remove(0).0, wire::message::BEGIN);
    assert_eq!(sent.pop().unwrap().0, wire::message::END);
    sent
}

fn decoded_elements(octets: &[u8]) -> Vec<(Key, Element)> {
    let list = Attributes(octets).nested(wire::elements::ELEMENTS).unwrap();
    list.iter().map(|(_, octets)| element(Attributes(octets))).collect()
}

proptest! {
    #[test]
    fn rules_are_decoded_as_they_were(rule in rule(), family in select(FAMILIES.to_vec())) {
        let sent = sent(family, vec![Change::AddRule("c".into(), rule.clone())]);
        prop_assert_eq!(decode::rule(Attributes(&sent[0].1), family), Some(("c".into(), rule)));
    }

    #[test]
    fn chains_are_decoded_as_they_were(name in name(), base in option::of(base())) {
        let sent = sent(Family::V4, vec![Change::AddChain(name.clone(), base)]);
        let expected = Some((name, Chain { base, rules: vec![] }));
        prop_assert_eq!(decode::chain(Attributes(&sent[0].1)), expected);
    }

    #[test]
    fn sets_are_decoded_as_they_were(name in name(), spec in spec()) {
        let sent = sent(Family::V6, vec![Change::AddSet(name.clone(), spec.clone())]);
        let (decoded_name, decoded) = decode::set(Attributes(&sent[0].1)).unwrap();
        prop_assert_eq!((decoded_name, decoded.spec), (name, spec));
    }

    #[test]
    fn elements_are_decoded_as_they_were(elements in vec(element_entry(), 1..5)) {
        let sent = sent(Family::V4, vec![Change::AddElements("s".into(), elements.clone())]);
        prop_assert_eq!(decoded_elements(&sent[0].1), elements);
    }

    #[test]
    fn no_octets_are_too_bad(octets in vec(any::<u8>(), 0..200), family in select(FAMILIES.to_vec())) {
        decode_all(&octets, family);
    }

    /// Octets that are almost a message reach deeper.
    #[test]
    fn no_damage_is_too_bad(
        rule in rule(),
        spec in spec(),
        element in element_entry(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        family in select(FAMILIES.to_vec()),
    ) {
        let changes = vec![
            Change::AddRule("c".into(), rule),
            Change::AddSet("s".into(), spec),
            Change::AddElements("s".into(), vec![element]),
        ];
        for (_, mut octets) in sent(family, changes) {
            for (at, octet) in &damage {
                let at = at.index(octets.len());
                octets[at] = *octet;
            }
            decode_all(&octets, family);
        }
    }
}

/// Decodes octets as everything that they could be.
fn decode_all(octets: &[u8], family: Family) {
    let attributes = Attributes(octets);
    let _whatever_it_is = (
        decode::chain(attributes),
        decode::rule(attributes, family),
        decode::set(attributes),
        decode::expression(attributes, family),
        element(attributes),
    );
    for (_, octets) in attributes.iter() {
        let _whatever_it_is = element(Attributes(octets));
    }
    for message in messages(octets) {
        let _whatever_it_is = message.map(|message| message.refusal());
    }
}

#[test]
fn many_elements_go_into_many_messages() {
    let elements: Vec<(Key, Element)> =
        (0..5000u32).map(|n| (n.to_be_bytes().into(), Value::Data([7; 16].into()).into())).collect();
    let sent = sent(Family::V4, vec![Change::AddElements("s".into(), elements.clone())]);
    assert!(sent.len() > 1);
    assert!(sent.iter().all(|(_, octets)| octets.len() < 66_000), "the length of a list has 16 bits");
    let decoded: Vec<_> = sent.iter().flat_map(|(_, octets)| decoded_elements(octets)).collect();
    assert!(decoded == elements);
}

#[test]
fn what_is_unknown_equals_nothing() {
    let unknown = Expression::Unknown(Unknown(String::new()));
    let rule = Rule { expressions: vec![unknown], comment: None };
    assert_ne!(rule, rule.clone());
    // It is never written as something else.
    let sent = sent(Family::V4, vec![Change::AddRule("c".into(), rule)]);
    let (_, decoded) = decode::rule(Attributes(&sent[0].1), Family::V4).unwrap();
    assert!(matches!(decoded.expressions[..], [Expression::Unknown(_)]));
    let unknown = Element::from(Value::Unknown(Unknown(String::new())));
    let sent = self::sent(Family::V4, vec![Change::AddElements("s".into(), vec![([1; 4].into(), unknown)])]);
    assert!(matches!(decoded_elements(&sent[0].1)[..], [(_, Element { value: Value::Unknown(_), .. })]));
}

/// An expression with attributes of four octets.
fn decoded(name: &str, numbers: &[(u16, u32)]) -> Expression {
    let mut writer = Writer::default();
    writer.text(wire::expression::NAME, name);
    writer.nested(wire::expression::DATA, |writer| {
        for (kind, number) in numbers {
            writer.be32(*kind, *number);
        }
    });
    decode::expression(Attributes(&writer.finish().unwrap()), Family::V4)
}

#[test]
fn what_says_more_than_a_value_is_unknown() {
    use wire::{masquerade, meta, nat};
    let load = [(meta::KEY, 3), (meta::DREG, 8)];
    assert!(matches!(decoded("meta", &load), Expression::Meta { key: MetaKey::Mark, .. }));
    let dnat = [(nat::TYPE, wire::DNAT), (nat::FAMILY, 2), (nat::REG_ADDR_MIN, 8), (nat::REG_ADDR_MAX, 8)];
    assert!(matches!(decoded("nat", &dnat), Expression::Dnat { port: None, .. }));
    for (name, numbers) in [
        ("limit", &load[..]),
        ("meta", &[(meta::KEY, 99), (meta::DREG, 8)]),
        ("meta", &[(meta::KEY, 3), (meta::DREG, 24)]),
        ("meta", &[(meta::KEY, 3), (meta::DREG, 8), (9, 0)]),
        // A range of addresses, another family, flags.
        ("nat", &[(nat::TYPE, wire::DNAT), (nat::FAMILY, 2), (nat::REG_ADDR_MIN, 8), (nat::REG_ADDR_MAX, 9)]),
        ("nat", &[(nat::TYPE, wire::DNAT), (nat::FAMILY, 10), (nat::REG_ADDR_MIN, 8)]),
        ("nat", &[(nat::TYPE, wire::DNAT), (nat::FAMILY, 2), (nat::REG_ADDR_MIN, 8), (nat::FLAGS, 8)]),
        ("masq", &[(masquerade::FLAGS, 4)]),
        ("masq", &[(masquerade::FLAGS, wire::PORTS_SPECIFIED)]),
        ("masq", &[(masquerade::REG_PROTO_MIN, 8), (masquerade::REG_PROTO_MAX, 8)]),
    ] {
        assert!(matches!(decoded(name, numbers), Expression::Unknown(_)), "{name} {numbers:?}");
    }
}

#[test]
fn an_attribute_that_is_too_long_is_an_error() {
    let name = Name::from("x".repeat(70_000));
    let transaction =
        Transaction { changes: vec![(id(Family::V4), Change::DeleteSet(name))], generation: None };
    assert!(encode::batch(&transaction, 1, true).is_err());
}
