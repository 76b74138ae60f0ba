//! The changes that turn one table into another.

use std::collections::BTreeMap;

use super::nft::{Chain, Change, Key, Name, Set, SetFlags, Table, Value};

/// The changes that turn `found`, a table of the kernel, into `wanted`. Empty if they are equal.
///
/// Elements that rules add (`dynamic`) stay as they are. A set with another specification, or a base chain at
/// another hook, makes the table be replaced as a whole; packets see the one or the other.
///
/// In the order of the result, each change is possible: what a rule or verdict names exists before, and is
/// deleted after it.
#[must_use]
pub fn diff(found: Option<&Table>, wanted: &Table) -> Vec<Change> {
    let anew: &[Change] = match found {
        Some(found) if can_change(found, wanted) => return changes(found, wanted),
        // Deleting a table that has gone meanwhile would fail.
        Some(_) => &[Change::AddTable, Change::DeleteTable, Change::AddTable],
        None => &[Change::AddTable],
    };
    anew.iter().cloned().chain(changes(&Table::default(), wanted)).collect()
}

/// Whether every object that is in both tables can become the wanted one.
fn can_change(found: &Table, wanted: &Table) -> bool {
    let is_base_equal =
        |(name, chain): (&Name, &Chain)| wanted.chains.get(name).is_none_or(|other| other.base == chain.base);
    let is_spec_equal =
        |(name, set): (&Name, &Set)| wanted.sets.get(name).is_none_or(|other| other.spec == set.spec);
    found.flags == wanted.flags
        && found.chains.iter().all(is_base_equal)
        && found.sets.iter().all(is_spec_equal)
}

fn changes(found: &Table, wanted: &Table) -> Vec<Change> {
    let (mut first, mut elements, mut last) = (Vec::new(), Vec::new(), Vec::new());
    for (name, set) in &wanted.sets {
        if !found.sets.contains_key(name) {
            first.push(Change::AddSet(name.clone(), set.spec.clone()));
        }
    }
    for (name, chain) in &wanted.chains {
        if !found.chains.contains_key(name) {
            first.push(Change::AddChain(name.clone(), chain.base));
        }
    }
    for (name, chain) in &wanted.chains {
        let before = found.chains.get(name);
        if before.is_some_and(|before| before.rules == chain.rules) {
            continue;
        }
        if before.is_some_and(|before| !before.rules.is_empty()) {
            first.push(Change::FlushChain(name.clone()));
        }
        first.extend(chain.rules.iter().map(|rule| Change::AddRule(name.clone(), rule.clone())));
    }
    for (name, set) in &wanted.sets {
        if !set.spec.flags.contains(SetFlags::DYNAMIC) {
            elements.extend(element_changes(name, found.sets.get(name), set));
        }
    }
    let unused = |name: &&Name| !wanted.chains.contains_key(*name);
    // Unused chains may name each other.
    last.extend(found.chains.keys().filter(unused).cloned().map(Change::FlushChain));
    last.extend(found.chains.keys().filter(unused).cloned().map(Change::DeleteChain));
    let unused = |name: &&Name| !wanted.sets.contains_key(*name);
    for (name, set) in found.sets.iter().filter(|(name, _)| unused(name)) {
        // The chains that verdicts name are deleted before their set could be.
        if set.elements.values().any(|element| matches!(element.value, Value::Verdict(_))) {
            elements.push(Change::FlushSet(name.clone()));
        }
        last.push(Change::DeleteSet(name.clone()));
    }
    first.append(&mut elements);
    first.append(&mut last);
    first
}

/// Deletions first: an element with another value is deleted and added.
fn element_changes(name: &Name, found: Option<&Set>, wanted: &Set) -> Vec<Change> {
    let none = BTreeMap::new();
    let found = found.map_or(&none, |set| &set.elements);
    let differs = |key: &Key, other: &BTreeMap<_, _>, element| other.get(key) != Some(element);
    let deleted: Vec<_> = found
        .iter()
        .filter(|(key, element)| differs(key, &wanted.elements, *element))
        .map(|(key, _)| key.clone())
        .collect();
    let added: Vec<_> = wanted
        .elements
        .iter()
        .filter(|(key, element)| differs(key, found, *element))
        .map(|(key, element)| (key.clone(), element.clone()))
        .collect();
    let deletion = (!deleted.is_empty()).then(|| Change::DeleteElements(name.clone(), deleted));
    let addition = (!added.is_empty()).then(|| Change::AddElements(name.clone(), added));
    deletion.into_iter().chain(addition).collect()
}

#[cfg(test)]
mod tests;
