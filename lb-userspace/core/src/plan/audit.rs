//! Audits: where the maps differ from the image.
//!
//! # Purpose
//!
//! Maps are large and change while they are read, so an audit has two steps. [`suspects`] compares a slow
//! read with the image as of its start. Differing entries are read again and compared with the current image:
//! what still differs is a fault, which [`faults`] counts and [`super::diff`] repairs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::Op;
use crate::{
    desired::FrontendAddress,
    tables::{AddressTable, Image, StoredRun},
};

/// Entries to read again. They need not be wrong: a plan may have been executed meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Suspects {
    /// Frontends whose key, entry or run differ.
    pub services: BTreeSet<FrontendAddress>,
    /// Addresses, by table.
    pub addresses: BTreeSet<(AddressTable, IpAddr)>,
    /// Whether the service networks differ.
    pub service_cidrs: bool,
}

impl Suspects {
    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && self.addresses.is_empty() && !self.service_cidrs
    }

    /// Adds others.
    pub fn extend(&mut self, others: Self) {
        self.services.extend(others.services);
        self.addresses.extend(others.addresses);
        self.service_cidrs |= others.service_cidrs;
    }

    /// Adds the key that an op inserts. Returns `false` if it inserts none.
    pub fn insert_key_of(&mut self, op: &Op) -> bool {
        match op {
            Op::InsertService { address, .. } => drop(self.services.insert(*address)),
            Op::InsertAddress { table, address, .. } => drop(self.addresses.insert((*table, *address))),
            _ => return false,
        }
        true
    }

    /// Whether it contains the key that an op inserts.
    #[must_use]
    pub fn has_key_of(&self, op: &Op) -> bool {
        match op {
            Op::InsertService { address, .. } => self.services.contains(address),
            Op::InsertAddress { table, address, .. } => self.addresses.contains(&(*table, *address)),
            _ => false,
        }
    }

    /// Retains only what an image has.
    pub fn retain_in(&mut self, image: &Image) {
        self.services.retain(|address| image.services.contains_key(address));
        self.addresses.retain(|(table, address)| image.addresses(*table).contains_key(address));
    }

    /// The part of an image that concerns them.
    #[must_use]
    pub fn part_of(&self, image: &Image) -> Image {
        let mut part = Image::default();
        for address in &self.services {
            let Some(&id) = image.services.get(address) else { continue };
            part.services.insert(*address, id);
            let Some(&frontend) = image.frontends.get(&id) else { continue };
            part.frontends.insert(id, frontend);
            let ipv6 = address.ip.is_ipv6();
            if let Some(run) = image.runs(ipv6).get(&frontend.run.offset).filter(|_| frontend.run.len > 0) {
                part.runs_mut(ipv6).insert(frontend.run.offset, run.clone());
            }
        }
        for (table, address) in &self.addresses {
            let flag = image.addresses(*table).get(address);
            part.addresses_mut(*table).extend(flag.map(|flag| (*address, *flag)));
        }
        if self.service_cidrs {
            part.service_cidrs.clone_from(&image.service_cidrs);
        }
        part
    }
}

/// Compares the expected image with the one that was read.
#[must_use]
pub fn suspects(expected: &Image, found: &Image) -> Suspects {
    let content = |image: &Image, address: &FrontendAddress, id: &u32| {
        let frontend = *image.frontends.get(id)?;
        Some((frontend, image.stored(address.ip.is_ipv6(), frontend.run).cloned()))
    };
    let is_same = |address: &FrontendAddress, id: &u32| {
        found.services.get(address) == Some(id)
            && content(expected, address, id) == content(found, address, id)
    };
    let differing = expected.services.iter().filter(|(address, id)| !is_same(address, id));
    let foreign = found.services.keys().filter(|address| !expected.services.contains_key(*address));
    let addresses = AddressTable::ALL.into_iter().flat_map(|table| {
        let (there, wanted) = (found.addresses(table), expected.addresses(table));
        let differing = wanted.iter().filter(|(address, flag)| there.get(*address) != Some(*flag));
        let foreign = there.keys().filter(|address| !wanted.contains_key(*address));
        differing.map(|(address, _)| address).chain(foreign).map(move |address| (table, *address))
    });
    Suspects {
        services: differing.map(|(address, _)| address).chain(foreign).copied().collect(),
        addresses: addresses.collect(),
        service_cidrs: expected.service_cidrs != found.service_cidrs,
    }
}

/// Numbers of faulty entries, by map.
pub type Faults = BTreeMap<&'static str, u64>;

/// Counts the entries that a repair corrects; `found` is the image before it.
#[must_use]
pub fn faults(repair: &[Op], found: &Image) -> Faults {
    let mut faults = Faults::new();
    let mut frontends = BTreeSet::new();
    for op in repair {
        let (map, n_entries) = match op {
            Op::InsertService { address, .. } | Op::DeleteService(address) => {
                (if address.ip.is_ipv6() { "services6" } else { "services4" }, 1)
            }
            Op::InsertAddress { table, .. } | Op::DeleteAddress(table, _) => (table.map(), 1),
            Op::SetServiceCidrs(_) => ("service_cidrs", 1),
            Op::WriteFrontend { id, .. } | Op::SetFrontend { id, .. } | Op::SwitchRun { id, .. } => {
                ("frontends", u64::from(frontends.insert(*id)))
            }
            Op::WriteRun { ipv6, offset, run } => {
                let there = found.runs(*ipv6).get(offset).map(StoredRun::entries).unwrap_or_default();
                let n_same = there.iter().zip(run.entries()).filter(|(there, entry)| there == entry).count();
                (if *ipv6 { "endpoints6" } else { "endpoints4" }, (run.entries().len() - n_same) as u64)
            }
            Op::ResetService(_) | Op::ResetEndpoints(_) | Op::DropRun { .. } | Op::DropFrontend(_) => {
                continue;
            }
        };
        if n_entries > 0 {
            *faults.entry(map).or_default() += n_entries;
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use lb_common::layout::{Frontend, Run};

    use super::*;
    use crate::{model::Protocol, plan::diff, tables::Entry};

    fn address(last: u8) -> FrontendAddress {
        FrontendAddress { ip: IpAddr::from([10, 96, 0, last]), port: 80, protocol: Protocol::Tcp }
    }

    /// Two frontends with two endpoints each, and a node.
    fn image() -> Image {
        let mut image = Image::default();
        for n in 0..2u8 {
            let (id, offset) = (u32::from(n), 10 * u32::from(n));
            image.services.insert(address(n), id);
            let run = Run { offset, len: 2 };
            image.frontends.insert(id, Frontend { run, service_id: id, ..Frontend::default() });
            let entry = |last: u8| Entry::new(2 * id + u32::from(last), ([10, 244, n, last], 8080).into());
            image.runs4.insert(offset, [0, 1].map(entry).into_iter().collect());
        }
        image.node_addrs.insert(IpAddr::from([192, 0, 2, 1]), true);
        image.cluster_ips.insert(address(0).ip, true);
        image.service_cidrs = vec!["10.96.0.0/12".parse().unwrap()];
        image
    }

    /// The damage, how it is done, and the expected counts by map.
    type Case = (&'static str, fn(&mut Image), &'static [(&'static str, u64)]);

    #[test]
    fn what_differs_is_suspected_repaired_and_counted() {
        let expected = image();
        let cases: [Case; 12] = [
            ("nothing", |_| {}, &[]),
            (
                "a deleted key",
                |image| assert!(image.services.remove(&address(0)).is_some()),
                &[("services4", 1)],
            ),
            (
                "an altered key",
                |image| assert!(image.services.insert(address(0), 1).is_some()),
                &[("services4", 1)],
            ),
            (
                "a foreign key",
                |image| assert!(image.services.insert(address(9), 1).is_none()),
                &[("services4", 1)],
            ),
            (
                "an altered entry",
                |image| image.frontends.get_mut(&1).unwrap().affinity_seconds = 7,
                &[("frontends", 1)],
            ),
            (
                "an entry with two altered words counts once",
                |image| {
                    let frontend = image.frontends.get_mut(&1).unwrap();
                    (frontend.flags, frontend.run) = (1, Run { offset: 0, len: 1 });
                },
                &[("frontends", 1)],
            ),
            (
                "an altered endpoint",
                |image| {
                    let mut entries = image.runs4[&10].entries().to_vec();
                    entries[1].endpoint_id += 1;
                    image.runs4.insert(10, entries.into());
                },
                &[("endpoints4", 1)],
            ),
            ("a node that is gone", |image| image.node_addrs.clear(), &[("node_addrs", 1)]),
            (
                "a foreign node",
                |image| assert!(image.node_addrs.insert(IpAddr::from([192, 0, 2, 2]), false).is_none()),
                &[("node_addrs", 1)],
            ),
            (
                "an altered and a foreign cluster IP",
                |image| {
                    image.cluster_ips = [(address(0).ip, false), (address(9).ip, true)].into_iter().collect();
                },
                &[("cluster_ips", 2)],
            ),
            ("a cluster IP that is gone", |image| image.cluster_ips.clear(), &[("cluster_ips", 1)]),
            ("no networks", |image| image.service_cidrs.clear(), &[("service_cidrs", 1)]),
        ];
        for (what, damage, counts) in cases {
            let mut found = image();
            damage(&mut found);
            let suspects = suspects(&expected, &found);
            assert_eq!(suspects.is_empty(), counts.is_empty(), "{what}");
            let (wanted, mut part) = (suspects.part_of(&expected), suspects.part_of(&found));
            // A second read covers only the indices of the expected entries.
            part.frontends = wanted.frontends.keys().map(|id| (*id, found.frontends[id])).collect();
            part.runs4 = wanted.runs4.keys().map(|offset| (*offset, found.runs4[offset].clone())).collect();
            let repair = diff(&part, &wanted);
            assert_eq!(faults(repair.ops(), &part), counts.iter().copied().collect(), "{what}");
            repair.apply(&mut found);
            assert_eq!(found, expected, "{what}");
        }
    }
}
