//! Ordered operations on the tables.
//!
//! # Purpose
//!
//! A [`Plan`] is what one sync does to the kernel, as data. It comes from the [`Encoder`] (what a change asks for)
//! or from [`diff`] (what an audit found wrong). The encoder gives out ids and runs, keeps them stable while they
//! are in use, and gives nothing out twice while a program may still read it.
//!
//! # Invariants
//!
//! - Every prefix of a plan is safe: a call in the middle reaches an old or a new endpoint, never none while both
//!   states have one, and never an endpoint of another service. The order of [`Phase`] is the proof, and
//!   `tests` below runs every prefix of random plans on the simulator.
//! - An operation is one system call or one aligned store, so that "in the middle" means between two of them.
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
    tables::{AddressTable, Cidr, Entry, Image},
};

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a run into a part of the endpoint table that nothing refers to.
    WriteRun {
        /// Which endpoint table.
        ipv6: bool,
        /// Index of the first entry.
        offset: u32,
        /// The entries, sorted by endpoint id.
        entries: Arc<[Entry]>,
    },
    /// Writes an entry of `frontends` that no key refers to.
    WriteFrontend {
        /// Index.
        id: u32,
        /// The whole entry.
        frontend: Frontend,
    },
    /// Sets the counters of a service port to zero, before its id is used anew.
    ResetService(u32),
    /// Sets the counters of endpoints to zero, before their ids are used anew.
    ResetEndpoints(Arc<[u32]>),
    /// Inserts an address, or gives it another flag.
    InsertAddress {
        /// The table.
        table: AddressTable,
        /// The address.
        address: IpAddr,
        /// What the table says of it.
        flag: bool,
    },
    /// Lets calls find a frontend.
    InsertService {
        /// The key.
        address: FrontendAddress,
        /// The entry of `frontends`, complete by now.
        frontend_id: u32,
    },
    /// Changes the flags, the affinity or the owner of a frontend in use, each one aligned word.
    SetFrontend {
        /// Index.
        id: u32,
        /// The entry as it shall be; `run` is not looked at.
        frontend: Frontend,
    },
    /// Switches a frontend in use to another run: one aligned 64-bit store.
    SwitchRun {
        /// Index.
        id: u32,
        /// The run, complete by now.
        run: Run,
    },
    /// Lets calls no longer find a frontend.
    DeleteService(FrontendAddress),
    /// Removes an address from a table.
    DeleteAddress(AddressTable, IpAddr),
    /// Puts networks into force where there are none, or none where there are some.
    SetServiceCidrs(Arc<[Cidr]>),
    /// Records that a run is no longer part of the image. No effect on the kernel: the entries stay as they are
    /// until the space is given out again.
    DropRun {
        /// Which endpoint table.
        ipv6: bool,
        /// Index of the first entry.
        offset: u32,
    },
    /// Records that an entry of `frontends` is no longer part of the image. No effect on the kernel.
    DropFrontend(u32),
}

/// The order of operations within a plan.
///
/// What a reference names is written before the reference ([`Phase::Write`] before [`Phase::Insert`] before
/// [`Phase::Switch`]), and what ends is removed after all else. Exact node-port entries of other nodes are
/// inserted before the flag that makes programs rely on them, and deleted after the flag is gone.
///
/// Within [`Phase::Insert`] the order is exact keys, addresses, wildcard keys, and within [`Phase::Delete`] the
/// reverse: a node port with the policy Local is refused for every other node's address that has no exact key, and a cluster
/// IP for every port that has none, so that those keys must be there whenever a call can get that far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Into places that nothing refers to yet.
    Write,
    /// New keys.
    Insert,
    /// Words of entries in use.
    Switch,
    /// Keys that go.
    Delete,
    /// Bookkeeping of what nothing refers to any longer.
    Drop,
}

impl Op {
    /// Where in a plan the operation belongs.
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

    /// The place within the phase: see [`Phase`].
    fn rank(&self) -> u8 {
        match self {
            Self::InsertService { address, .. } if address.ip.is_unspecified() => 2,
            Self::DeleteService(address) if !address.ip.is_unspecified() => 2,
            Self::InsertAddress { .. } | Self::DeleteAddress(..) => 1,
            _ => 0,
        }
    }

    /// Whether the kernel takes a hash element for it, possibly one that was freed a moment ago.
    #[must_use]
    pub fn takes_element(&self) -> bool {
        matches!(self, Self::InsertService { .. } | Self::InsertAddress { .. })
    }

    /// Does to an image what the operation does to the kernel.
    pub fn apply(&self, image: &mut Image) {
        match self {
            Self::WriteRun { ipv6, offset, entries } => {
                image.runs_mut(*ipv6).insert(*offset, Arc::clone(entries));
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

/// Operations in the order in which they are done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    number: u64,
    ops: Vec<Op>,
    frees: bool,
}

impl Plan {
    /// Puts operations into the order of [`Phase`].
    fn ordered(number: u64, mut ops: Vec<Op>, frees: bool) -> Self {
        ops.sort_by_key(|op| (op.phase(), op.rank()));
        Self { number, ops, frees }
    }

    /// Some of the operations, in their order.
    #[must_use]
    pub fn part(&self, is_in: impl Fn(usize, &Op) -> bool) -> Self {
        let ops = self.ops.iter().enumerate().filter(|(index, op)| is_in(*index, op));
        Self { ops: ops.map(|(_, op)| op.clone()).collect(), ..*self }
    }

    /// An encoder numbers its plans from 1; [`diff`]'s have 0.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether it frees anything that a running program may still read, be it an id, a place or an element of a hash map.
    #[must_use]
    pub fn frees(&self) -> bool {
        self.frees
    }

    /// The operations.
    #[must_use]
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Does to an image what the plan does to the kernel.
    pub fn apply(&self, image: &mut Image) {
        for op in &self.ops {
            op.apply(image);
        }
    }
}

/// What may still be read of that which an encoder does not hold back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsettled {
    /// Nothing: a grace period has passed.
    Nothing,
    /// Elements of hash maps, which the kernel gives out again at once.
    Elements,
    /// Anything: an agent that has ended may have freed it a moment ago.
    Anything,
}

impl Unsettled {
    /// Whether a plan has to wait for a grace period, since it might write over what is still read.
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
/// For repairs after an audit, where `from` is what the kernel holds and may be damaged. It overwrites entries in
/// place, so the promise about prefixes holds only as far as `from` was an image that the encoder made.
#[must_use]
pub fn diff(from: &Image, to: &Image) -> Plan {
    let mut ops = Vec::new();
    for ipv6 in [false, true] {
        for (&offset, entries) in to.runs(ipv6) {
            if from.runs(ipv6).get(&offset) != Some(entries) {
                ops.push(Op::WriteRun { ipv6, offset, entries: Arc::clone(entries) });
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
        from.frontends.keys().filter(|id| !to.frontends.contains_key(id)).map(|&id| Op::DropFrontend(id)),
    );
    for (&address, &frontend_id) in &to.services {
        if from.services.get(&address) != Some(&frontend_id) {
            ops.push(Op::InsertService { address, frontend_id });
        }
    }
    ops.extend(from.services.keys().filter(|a| !to.services.contains_key(a)).map(|&a| Op::DeleteService(a)));
    for table in AddressTable::ALL {
        let (there, wanted) = (from.addresses(table), to.addresses(table));
        let differing = wanted.iter().filter(|(address, flag)| there.get(address) != Some(flag));
        ops.extend(differing.map(|(&address, &flag)| Op::InsertAddress { table, address, flag }));
        let foreign = there.keys().filter(|address| !wanted.contains_key(address));
        ops.extend(foreign.map(|&address| Op::DeleteAddress(table, address)));
    }
    if from.service_cidrs != to.service_cidrs {
        ops.push(Op::SetServiceCidrs(to.service_cidrs.as_slice().into()));
    }
    // Where a key had another value, its element is replaced.
    let frees = ops.iter().any(|op| match op {
        Op::InsertService { address, .. } => from.services.contains_key(address),
        Op::InsertAddress { table, address, .. } => from.addresses(*table).contains_key(address),
        op => op.phase() >= Phase::Delete,
    });
    Plan::ordered(0, ops, frees)
}
