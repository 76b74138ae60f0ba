//! Plans: ordered ops on the maps.
//!
//! # Purpose
//!
//! A [`Plan`] is what one sync does to the maps, as data. It comes from the [`Encoder`] (changes) or from
//! [`diff`] (repairs). The encoder keeps ids and runs stable while they are in use, and reuses nothing that a
//! program may still read.
//!
//! # Invariants
//!
//! - Every prefix of a plan is safe: a call in the middle reaches an old or a new endpoint, always one if
//!   both states have one, and never an endpoint of another service. The order of [`Phase`] ensures this, and
//!   tests run every prefix of random plans on the simulator.
//! - An op is one system call or one aligned store, so "in the middle" means between two ops.
//!
//! # Depends on
//!
//! `tables`, `desired`.

pub mod audit;
pub mod encoder;
mod transfer;

use std::{net::IpAddr, sync::Arc};

use lb_common::layout::{Frontend, Run};

pub use self::{
    encoder::{Capacity, Encoder, Full},
    transfer::transfer,
};
use crate::{
    desired::FrontendAddress,
    tables::{AddressTable, Cidr, Image, StoredRun},
};

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a run into an unused part of the endpoint table.
    WriteRun {
        /// Which endpoint table.
        ipv6: bool,
        /// Index of the first entry.
        offset: u32,
        /// The run.
        run: StoredRun,
    },
    /// Writes an unused entry of `frontends`.
    WriteFrontend {
        /// Index.
        id: u32,
        /// The whole entry.
        frontend: Frontend,
    },
    /// Zeroes the counters of a service port before its id is reused.
    ResetService(u32),
    /// Zeroes the counters of endpoints before their ids are reused.
    ResetEndpoints(Arc<[u32]>),
    /// Inserts an address, or replaces its flag.
    InsertAddress {
        /// The table.
        table: AddressTable,
        /// The address.
        address: IpAddr,
        /// Its flag: see [`Image`].
        flag: bool,
    },
    /// Inserts the key of a frontend, so that calls find it.
    InsertService {
        /// The key.
        address: FrontendAddress,
        /// Index of its entry in `frontends`, which is already written.
        frontend_id: u32,
    },
    /// Changes the flags, affinity or service id of a frontend in use, each by one aligned store.
    SetFrontend {
        /// Index.
        id: u32,
        /// The new entry; its `run` is ignored.
        frontend: Frontend,
    },
    /// Switches a frontend in use to another run by one aligned 64-bit store.
    SwitchRun {
        /// Index.
        id: u32,
        /// The run, which is already written.
        run: Run,
    },
    /// Deletes the key of a frontend, so that calls no longer find it.
    DeleteService(FrontendAddress),
    /// Deletes an address from a table.
    DeleteAddress(AddressTable, IpAddr),
    /// Sets the service networks. In an encoder's plan, either the former or the new list is empty.
    SetServiceCidrs(Arc<[Cidr]>),
    /// Removes a run from the image. The maps do not change: its entries stay until the space is reused.
    DropRun {
        /// Which endpoint table.
        ipv6: bool,
        /// Index of the first entry.
        offset: u32,
    },
    /// Removes an entry of `frontends` from the image. The maps do not change.
    DropFrontend(u32),
}

/// The order of ops within a plan.
///
/// An entry is written before it is referenced, and deletions come last. Exact node-port keys of other nodes
/// are inserted before the flag that relies on them is set, and deleted after it is cleared.
///
/// Within [`Phase::Insert`] the order is exact keys, addresses, wildcard keys; within [`Phase::Delete`] it is
/// the reverse: a node port with the policy Local is refused on every other node's address without an exact
/// key, and a cluster IP on every port without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Writes to unused entries.
    Write,
    /// New keys.
    Insert,
    /// Stores to entries in use.
    Switch,
    /// Deleted keys.
    Delete,
    /// Bookkeeping of unused entries, without effect on the maps.
    Drop,
}

impl Op {
    /// The phase of a plan that the op belongs to.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self {
            Self::WriteRun { .. }
            | Self::WriteFrontend { .. }
            | Self::ResetService(_)
            | Self::ResetEndpoints(_) => Phase::Write,
            Self::InsertAddress { .. } | Self::InsertService { .. } => Phase::Insert,
            Self::SetFrontend { .. } | Self::SwitchRun { .. } | Self::SetServiceCidrs(_) => Phase::Switch,
            Self::DeleteService(_) | Self::DeleteAddress(..) => Phase::Delete,
            Self::DropRun { .. } | Self::DropFrontend(_) => Phase::Drop,
        }
    }

    /// The position within the phase: see [`Phase`].
    fn rank(&self) -> u8 {
        match self {
            Self::InsertService { address, .. } if address.ip.is_unspecified() => 2,
            Self::DeleteService(address) if !address.ip.is_unspecified() => 2,
            Self::InsertAddress { .. } | Self::DeleteAddress(..) => 1,
            _ => 0,
        }
    }

    /// Whether it makes the kernel allocate a hash element, possibly one that was just freed.
    #[must_use]
    pub fn takes_element(&self) -> bool {
        matches!(self, Self::InsertService { .. } | Self::InsertAddress { .. })
    }

    /// Applies the op to an image.
    pub fn apply(&self, image: &mut Image) {
        match self {
            Self::WriteRun { ipv6, offset, run } => {
                image.runs_mut(*ipv6).insert(*offset, run.clone());
            }
            Self::WriteFrontend { id, frontend } => {
                image.frontends.insert(*id, *frontend);
            }
            Self::ResetService(_) | Self::ResetEndpoints(_) => {}
            Self::InsertAddress { table, address, flag } => {
                image.addresses_mut(*table).insert(*address, *flag);
            }
            Self::InsertService { address, frontend_id } => {
                image.services.insert(*address, *frontend_id);
            }
            Self::SetFrontend { id, frontend } => {
                if let Some(entry) = image.frontends.get_mut(id) {
                    *entry = Frontend { run: entry.run, ..*frontend };
                }
            }
            Self::SwitchRun { id, run } => {
                if let Some(entry) = image.frontends.get_mut(id) {
                    entry.run = *run;
                }
            }
            Self::DeleteService(address) => {
                image.services.remove(address);
            }
            Self::DeleteAddress(table, address) => {
                image.addresses_mut(*table).remove(address);
            }
            Self::SetServiceCidrs(networks) => image.service_cidrs = networks.to_vec(),
            Self::DropRun { ipv6, offset } => {
                image.runs_mut(*ipv6).remove(offset);
            }
            Self::DropFrontend(id) => {
                image.frontends.remove(id);
            }
        }
    }
}

/// Ops in the order of execution.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    number: u64,
    ops: Vec<Op>,
    frees: bool,
}

impl Plan {
    /// Sorts ops by [`Phase`].
    fn ordered(number: u64, mut ops: Vec<Op>, frees: bool) -> Self {
        ops.sort_by_key(|op| (op.phase(), op.rank()));
        Self { number, ops, frees }
    }

    /// The ops that `is_in` selects, in their order.
    #[must_use]
    pub fn part(&self, is_in: impl Fn(usize, &Op) -> bool) -> Self {
        let ops = self.ops.iter().enumerate().filter(|(index, op)| is_in(*index, op));
        Self { ops: ops.map(|(_, op)| op.clone()).collect(), ..*self }
    }

    /// The encoder numbers its plans from 1; those of [`diff`] have 0.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether it frees anything that a running program may still read: an id, a run or a hash element.
    #[must_use]
    pub fn frees(&self) -> bool {
        self.frees
    }

    /// The ops.
    #[must_use]
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Whether it has no ops.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Applies the plan to an image.
    pub fn apply(&self, image: &mut Image) {
        for op in &self.ops {
            op.apply(image);
        }
    }
}

/// What programs may still read, apart from what an encoder holds back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StillRead {
    /// Nothing: a grace period has passed.
    Nothing,
    /// Freed elements of hash maps, which the kernel reuses at once.
    Elements,
    /// Anything: an earlier agent may have freed it just now.
    Anything,
}

impl StillRead {
    /// Whether a plan must wait for a grace period, because it may overwrite what is still read.
    #[must_use]
    pub fn must_wait(self, plan: &Plan) -> bool {
        match self {
            Self::Nothing => false,
            Self::Elements => plan.ops.iter().any(Op::takes_element),
            Self::Anything => !plan.is_empty(),
        }
    }
}

/// The plan that turns one image into another.
///
/// For repairs: `from` is read from the maps and may be damaged. Entries are overwritten in place, so
/// prefixes are safe only if `from` is an image of the encoder.
#[must_use]
pub fn diff(from: &Image, to: &Image) -> Plan {
    let mut ops = Vec::new();
    for ipv6 in [false, true] {
        for (&offset, run) in to.runs(ipv6) {
            if from.runs(ipv6).get(&offset) != Some(run) {
                ops.push(Op::WriteRun { ipv6, offset, run: run.clone() });
            }
        }
        for &offset in from.runs(ipv6).keys() {
            if !to.runs(ipv6).contains_key(&offset) {
                ops.push(Op::DropRun { ipv6, offset });
            }
        }
    }
    for (&id, &frontend) in &to.frontends {
        match from.frontends.get(&id) {
            None => ops.push(Op::WriteFrontend { id, frontend }),
            Some(&old) => ops.extend(encoder::changes(id, old, frontend)),
        }
    }
    ops.extend(
        from.frontends.keys().filter(|id| !to.frontends.contains_key(*id)).map(|&id| Op::DropFrontend(id)),
    );
    for (&address, &frontend_id) in &to.services {
        if from.services.get(&address) != Some(&frontend_id) {
            ops.push(Op::InsertService { address, frontend_id });
        }
    }
    ops.extend(from.services.keys().filter(|a| !to.services.contains_key(*a)).map(|&a| Op::DeleteService(a)));
    for table in AddressTable::ALL {
        let (there, wanted) = (from.addresses(table), to.addresses(table));
        let differing = wanted.iter().filter(|(address, flag)| there.get(*address) != Some(*flag));
        ops.extend(differing.map(|(&address, &flag)| Op::InsertAddress { table, address, flag }));
        let foreign = there.keys().filter(|address| !wanted.contains_key(*address));
        ops.extend(foreign.map(|&address| Op::DeleteAddress(table, address)));
    }
    if from.service_cidrs != to.service_cidrs {
        ops.push(Op::SetServiceCidrs(to.service_cidrs.as_slice().into()));
    }
    // If a key had another value, its element is replaced.
    let frees = ops.iter().any(|op| match op {
        Op::InsertService { address, .. } => from.services.contains_key(address),
        Op::InsertAddress { table, address, .. } => from.addresses(*table).contains_key(address),
        op => op.phase() >= Phase::Delete,
    });
    Plan::ordered(0, ops, frees)
}
