//! Audit and repair: compares the maps with the image and writes what differs.

use std::net::{Ipv4Addr, Ipv6Addr};

use lb_common::layout::{Endpoint4, Endpoint6, FrontendKey4, FrontendKey6};
use lb_core::{
    plan::{
        Phase,
        audit::{Faults, Suspects, faults, suspects},
        diff,
    },
    tables::{AddressTable, Entry, Image},
};

use crate::{
    Done, Kernel, KernelError, Maps,
    maps::{Key, address_key, ignore_missing, key},
    pod::Plain,
};

/// A key that no agent writes and no call matches, such as one of another protocol. It occupies an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForeignKey {
    V4(FrontendKey4),
    V6(FrontendKey6),
}

impl ForeignKey {
    const fn map(self) -> &'static str {
        match self {
            Self::V4(_) => "services4",
            Self::V6(_) => "services6",
        }
    }
}

/// The findings of an audit. Not all are faults: see [`Suspects`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    suspects: Suspects,
    strays: Vec<ForeignKey>,
}

impl Findings {
    /// Adds keys that are known to be missing.
    pub fn suspect(&mut self, missing: &Suspects) {
        self.suspects.extend(missing.clone());
    }

    /// Whether the audit found no difference.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.suspects.is_empty() && self.strays.is_empty()
    }
}

/// The result of a repair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Number of repaired entries of each map.
    pub faults: Faults,
    /// Keys still missing: the map is full again.
    pub no_room: Suspects,
}

impl Maps {
    /// Compares the maps that decide about calls with an image. Slow: two system calls for each key.
    ///
    /// Runs on its own thread while plans are applied: concurrent changes may be among the findings.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn compare(&self, expected: &Image) -> Result<Findings, KernelError> {
        let (found, strays) = self.read()?;
        Ok(Findings { suspects: suspects(expected, &found), strays })
    }

    /// Reads the keys of suspects, and the entries and runs that `expected` has for them.
    fn reread(&self, suspects: &Suspects, expected: &Image) -> Result<Image, KernelError> {
        let mut found = Image::default();
        for address in &suspects.services {
            let id = match key(address) {
                Some(Key::V4(key)) => entry("services4", self.services4.get(&Plain(key), 0))?,
                Some(Key::V6(key)) => entry("services6", self.services6.get(&Plain(key), 0))?,
                None => None,
            };
            found.services.extend(id.map(|Plain(value)| (*address, value.frontend_id)));
        }
        for &id in expected.frontends.keys() {
            found.frontends.extend(self.frontends.read(id).map(|frontend| (id, frontend)));
        }
        for ipv6 in [false, true] {
            for (&offset, run) in expected.runs(ipv6) {
                let there: Option<Vec<Entry>> =
                    (offset..).take(run.entries().len()).map(|index| self.read_entry(ipv6, index)).collect();
                found.runs_mut(ipv6).extend(there.map(|there| (offset, run.with_entries(there))));
            }
        }
        for &(table, address) in &suspects.addresses {
            let key = Plain(address_key(address));
            let flag = match table {
                AddressTable::Nodes => {
                    entry(table.map(), self.node_addrs.get(&key, 0))?.map(|Plain(value)| value.own != 0)
                }
                AddressTable::ClusterIps => {
                    entry(table.map(), self.cluster_ips.get(&key, 0))?.map(|Plain(value)| value.served != 0)
                }
            };
            found.addresses_mut(table).extend(flag.map(|flag| (address, flag)));
        }
        if suspects.service_cidrs {
            found.service_cidrs = self.read_service_cidrs();
        }
        Ok(found)
    }

    /// Reads an entry of an endpoint table; `None` if out of range.
    pub(super) fn read_entry(&self, ipv6: bool, index: u32) -> Option<Entry> {
        if ipv6 {
            let Endpoint6 { address, port, extra, endpoint_id } = self.endpoints6.read(index)?;
            let address = (Ipv6Addr::from(address), port).into();
            return Some(Entry::new(endpoint_id, address).with_extra(extra));
        }
        let Endpoint4 { address, port, extra, endpoint_id } = self.endpoints4.read(index)?;
        let address = (Ipv4Addr::from(address), port).into();
        Some(Entry::new(endpoint_id, address).with_extra(extra))
    }
}

impl Kernel {
    /// Reads suspect entries again and repairs those that differ from `expected`, the image after all applied
    /// plans.
    ///
    /// May wait for a grace period. An altered endpoint is overwritten in place: a concurrent call may still
    /// read a part of the altered entry, as calls before it did.
    ///
    /// # Errors
    ///
    /// As [`Self::apply`]: read the image and plan again.
    pub fn repair(&mut self, expected: &Image, findings: &Findings) -> Result<Repaired, KernelError> {
        let expected = findings.suspects.part_of(expected);
        let found = self.maps.reread(&findings.suspects, &expected)?;
        let plan = diff(&found, &expected);
        let mut removed_strays = Faults::new();
        for &stray in &findings.strays {
            let removed = match stray {
                ForeignKey::V4(key) => ignore_missing(stray.map(), self.maps.services4.remove(&Plain(key))),
                ForeignKey::V6(key) => ignore_missing(stray.map(), self.maps.services6.remove(&Plain(key))),
            };
            removed?;
            *removed_strays.entry(stray.map()).or_default() += 1;
        }
        if !findings.strays.is_empty() {
            self.freed();
        }
        // Deletes foreign entries first, to make room for missing ones.
        self.apply(&plan.part(|_, op| op.phase() == Phase::Delete))?;
        let Done { no_room, .. } = self.apply(&plan.part(|_, op| op.phase() != Phase::Delete))?;
        let mut faults = faults(plan.part(|_, op| !no_room.has_key_of(op)).ops(), &found);
        for (map, n) in removed_strays {
            *faults.entry(map).or_default() += n;
        }
        Ok(Repaired { faults, no_room })
    }
}

/// The value of a key, or `None` if the key does not exist.
fn entry<T>(name: &'static str, result: Result<T, aya::maps::MapError>) -> Result<Option<T>, KernelError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(aya::maps::MapError::KeyNotFound) => Ok(None),
        Err(source) => Err(KernelError::map(name, source)),
    }
}
