use std::collections::BTreeMap;

use super::*;
use crate::packets::{
    nft::{
        Base, ChainType, DataType, Element, Expression, Family, Hook, Policy, Rule, SetSpec, TableId,
        ValueType, Verdict,
    },
    sim,
};

fn chain(hook: Option<Hook>, target: Option<&str>) -> Chain {
    let base = hook.map(|hook| Base { kind: ChainType::Nat, hook, priority: 0, policy: Policy::Accept });
    let rule = |target: &str| Rule {
        expressions: vec![Expression::Verdict(Verdict::Goto(target.into()))],
        comment: None,
    };
    Chain { base, rules: target.map(rule).into_iter().collect() }
}

fn map(value: ValueType, flags: SetFlags, elements: &[(u8, Value)]) -> Set {
    let spec = SetSpec { key: vec![DataType::Mark], value, flags, timeout: None, size: None };
    let elements = elements.iter().map(|(key, value)| (Key::from([*key; 4]), Element::from(value.clone())));
    Set { spec, elements: elements.collect() }
}

fn table(chains: &[(&str, Chain)], sets: &[(&str, Set)]) -> Table {
    Table {
        flags: 0,
        chains: chains.iter().map(|(name, chain)| ((*name).into(), chain.clone())).collect(),
        sets: sets.iter().map(|(name, set)| ((*name).into(), set.clone())).collect(),
    }
}

/// Tables that differ in every way.
fn tables() -> Vec<Table> {
    let data = || ValueType::Data(vec![DataType::Mark]);
    let number = |number: u8| Value::Data([number; 4].into());
    let to = |chain: &str| Value::Verdict(Verdict::Goto(chain.into()));
    let none = SetFlags::default();
    vec![
        Table::default(),
        table(&[("a", chain(Some(Hook::Input), None))], &[]),
        table(&[("a", chain(Some(Hook::Input), Some("b"))), ("b", chain(None, None))], &[]),
        // Unused chains that name each other in the order of names.
        table(
            &[
                ("a", chain(Some(Hook::Input), Some("c"))),
                ("b", chain(None, None)),
                ("c", chain(None, Some("b"))),
            ],
            &[(
                "verdicts",
                map(ValueType::Verdict, none, &[(1, to("b")), (2, Value::Verdict(Verdict::Drop))]),
            )],
        ),
        table(&[("a", chain(Some(Hook::Output), None))], &[("data", map(data(), none, &[(1, number(1))]))]),
        table(
            &[("a", chain(Some(Hook::Output), None)), ("d", chain(None, None))],
            &[
                ("data", map(data(), none, &[(1, number(2)), (2, number(2))])),
                ("verdicts", map(ValueType::Verdict, none, &[(1, to("d"))])),
            ],
        ),
        table(&[], &[("data", map(ValueType::None, none, &[(1, Value::None)]))]),
        Table { flags: 1, ..Table::default() },
    ]
}

#[test]
fn changes_make_one_table_of_another() {
    let id = TableId { family: Family::V4, name: "socklb".into() };
    for found in tables().into_iter().map(Some).chain([None]) {
        for wanted in tables() {
            let wanted = Table { flags: 0, ..wanted };
            let changes: Vec<_> =
                diff(found.as_ref(), &wanted).into_iter().map(|change| (id.clone(), change)).collect();
            assert_eq!(changes.is_empty(), found.as_ref() == Some(&wanted));
            let mut kernel: BTreeMap<_, _> = found.iter().map(|found| (id.clone(), found.clone())).collect();
            sim::apply(&mut kernel, &changes).unwrap();
            assert_eq!(kernel.get(&id), Some(&wanted), "from {found:?}");
        }
    }
}

#[test]
fn elements_that_rules_add_stay() {
    let (none, dynamic) = (ValueType::None, SetFlags::DYNAMIC);
    let found = table(&[], &[("clients", map(none.clone(), dynamic, &[(1, Value::None)]))]);
    assert_eq!(diff(Some(&found), &table(&[], &[("clients", map(none, dynamic, &[]))])), []);
}
