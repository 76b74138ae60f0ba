//! Decides where a call to an address goes.
//!
//! # Purpose
//!
//! [`resolve`] runs in the BPF programs on kernel maps, and in user space on an image (for the simulator and
//! `socklb explain`). All inputs come through [`Tables`], what a node serves, and [`Caller`], who calls, with
//! which random number, and when.
//!
//! # Invariants
//!
//! - A destination that is not a frontend passes unchanged ([`Verdict::Pass`]).
//! - A frontend without usable endpoints is refused, never passed on ([`Verdict::Refuse`]). So is a port that
//!   a cluster IP lacks. An address of a service network that no Service has is unreachable
//!   ([`Verdict::Unreachable`]).
//! - The endpoint of a [`Verdict::Redirect`] was in the frontend's run at one moment during the call.
//! - Loops have constant bounds; no recursion, no panic: the kernel's verifier must accept the code.

use crate::{
    address::Octets6,
    layout::{Affinity, FamilyLayout, Frontend, Protocol, Run, endpoint_extra, frontend_flags},
};

/// The destination of a `connect()` or `sendto()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call<A> {
    /// Destination address.
    pub address: A,
    /// Destination port, host order.
    pub port: u16,
    /// Protocol of the socket, with UDP-Lite already counted as UDP.
    pub protocol: Protocol,
}

/// An endpoint chosen earlier for the same socket and service address, and its position then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The chosen endpoint.
    pub endpoint_id: u32,
    /// Its position within the run when it was chosen: a hint that makes the common case one look-up.
    pub index: u32,
}

impl Choice {
    /// Stands for "none": endpoint ids are assigned from 0 and never reach it.
    ///
    /// The programs use it instead of an `Option`. LLVM loads the payload of an `Option` before it checks for
    /// `None`, and the verifier of kernels before 6.3 rejects a read of uninitialised stack ("invalid read
    /// from stack").
    pub const NONE: Self = Self { endpoint_id: u32::MAX, index: u32::MAX };

    /// The choice, if it is one.
    #[inline(always)]
    #[must_use]
    pub fn some(self) -> Option<Self> {
        if self.endpoint_id == u32::MAX { None } else { Some(self) }
    }
}

/// The owner of a node address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeAddress {
    /// An address of this node that accepts node ports.
    Own,
    /// An address of another node of the cluster.
    Other,
}

/// What a node serves to addresses of one family, backed by kernel maps or by an image. Says nothing about
/// the caller.
pub trait Tables<A: FamilyLayout> {
    /// Looks a frontend up by its exact key.
    fn frontend_id(&self, key: &A::Key) -> Option<u32>;

    /// Reads an entry of `frontends`. `run` must come from a single 64-bit read.
    fn frontend(&self, frontend_id: u32) -> Option<Frontend>;

    /// Reads an entry of the endpoint table.
    fn endpoint(&self, index: u32) -> Option<A::Endpoint>;

    /// Whether an endpoint was ejected, and no connection was established since. Called only for a frontend
    /// with a health policy.
    fn is_suspect(&self, endpoint_id: u32) -> bool;

    /// 1 if a call may choose an endpoint, 0 if it is ejected ([`EndpointHealth::is_avoided`]). A number,
    /// since a draw without branches is cheap to verify.
    ///
    /// [`EndpointHealth::is_avoided`]: crate::layout::EndpointHealth::is_avoided
    fn admits(&self, endpoint_id: u32) -> u32;

    /// Open connections of this node to an endpoint. Called only for a frontend with
    /// [`frontend_flags::LEAST_CONNECTIONS`].
    fn active(&self, endpoint_id: u32) -> i32;

    /// Notes that a call chose a suspect: others avoid it until the outcome is known.
    fn begin_trial(&self, endpoint_id: u32);

    /// First and last port of the node-port range, inclusive.
    fn node_ports(&self) -> (u16, u16);

    /// The owner of a node address; `None` for any other address. Called only for a port in the node-port
    /// range whose exact look-up missed.
    fn node_address(&self, mapped: &Octets6) -> Option<NodeAddress>;

    /// Whether an address is in a service network. Called only for a destination without a frontend.
    fn is_in_service_network(&self, address: &A) -> bool;

    /// Whether a call to a port that the Service of this cluster IP lacks is refused; `None` if no Service
    /// has the address.
    fn cluster_ip(&self, mapped: &Octets6) -> Option<bool>;
}

/// Who calls: a socket on this node, or any client, of which nothing is known.
///
/// The provided methods answer for any client. It has no network namespace on this node, no former call and
/// no affinity, so a caller such as a name server implements [`Self::random`] alone.
pub trait Caller {
    /// A uniformly distributed 32-bit number.
    fn random(&self) -> u32;

    /// Whether node ports answer on loopback addresses for this caller: the setting is on, and the caller is
    /// in the node's own network namespace. In a pod, loopback is the pod's own (semantics R2).
    #[inline(always)]
    fn loopback_is_node(&self) -> bool {
        false
    }

    /// The endpoint that this caller last used for this service address. Unconnected UDP sockets record it,
    /// so that the datagrams of one flow stay together.
    #[inline(always)]
    fn earlier_choice(&self) -> Option<Choice> {
        None
    }

    /// A number that is the same for all calls of a client (semantics R8), and distributed as
    /// [`Self::random`] among clients.
    #[inline(always)]
    fn client(&self) -> u32 {
        0
    }

    /// Seconds of a monotonic clock; the origin is arbitrary. Read only for [`Self::affinity`].
    #[inline(always)]
    fn now(&self) -> u64 {
        0
    }

    /// The affinity of this caller (a socket's is that of its network namespace, semantics R8) to an endpoint
    /// of a service port.
    #[inline(always)]
    fn affinity(&self, _service_id: u32) -> Option<Affinity> {
        None
    }

    /// Renews the idle timer of an entry that [`Self::affinity`] returned.
    #[inline(always)]
    fn renew_affinity(&self, _service_id: u32, _now: u64) {}

    /// Stores a choice and returns the endpoint that stands. If `replaces` is `None` and another CPU was
    /// faster, its choice stands, so that two concurrent first calls of one client agree.
    #[inline(always)]
    fn remember_affinity(&self, _service_id: u32, _replaces: Option<Affinity>, new: Affinity) -> u32 {
        new.endpoint_id
    }
}

/// Stands for "no service port": ids are assigned from 0 and never reach it.
pub const NO_SERVICE: u32 = u32::MAX;

/// Where a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<A> {
    /// Not a service address: the call passes unchanged.
    Pass,
    /// A service address without a usable endpoint: fail with `ECONNREFUSED`.
    Refuse {
        /// The service port that refused; [`NO_SERVICE`] if the Service has no such port.
        service_id: u32,
    },
    /// An address of a service network that no Service has: fail with `EHOSTUNREACH`.
    Unreachable,
    /// A service address: the call goes to this endpoint instead.
    Redirect(Target<A>),
}

/// The endpoint of a [`Verdict::Redirect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target<A> {
    /// Endpoint address.
    pub address: A,
    /// Endpoint port, host order.
    pub port: u16,
    /// Id and position of the endpoint.
    pub choice: Choice,
    /// The frontend that matched.
    pub frontend_id: u32,
    /// The service port it belongs to.
    pub service_id: u32,
    /// The health policy of the frontend ([`Frontend::health`]).
    pub health: u32,
    /// Its bits of [`frontend_flags`].
    pub flags: u32,
}

/// Decides where a call goes.
///
/// Does not promise that the endpoint is alive, only that the tables listed it. With an unchanged run, no
/// affinity and no ejection each endpoint has the same probability, up to a bias below `len / 2^32`.
#[inline(always)]
pub fn resolve<A: FamilyLayout>(tables: &impl Tables<A>, caller: &impl Caller, call: &Call<A>) -> Verdict<A> {
    let found = find_frontend(tables, caller, call).or_else(|| find_unserved(tables, call));
    let Some((frontend_id, frontend)) = found else {
        return Verdict::Pass;
    };
    let service_id = frontend.service_id;
    let Some((index, entry)) = choose(tables, caller, &frontend) else {
        let is_unallocated = frontend.flags & frontend_flags::UNALLOCATED != 0;
        return if is_unallocated { Verdict::Unreachable } else { Verdict::Refuse { service_id } };
    };
    let (address, port, endpoint_id) = A::entry_parts(&entry);
    Verdict::Redirect(Target {
        address,
        port,
        choice: Choice { endpoint_id, index },
        frontend_id,
        service_id,
        health: frontend.health,
        flags: frontend.flags,
    })
}

/// Finds the frontend of a destination: by its exact address, else as a node port.
///
/// `None` if no service has this destination.
#[inline(always)]
pub fn find_frontend<A: FamilyLayout>(
    tables: &impl Tables<A>,
    caller: &impl Caller,
    call: &Call<A>,
) -> Option<(u32, Frontend)> {
    if let Some(id) = tables.frontend_id(&A::key(call.address, call.port, call.protocol)) {
        let frontend = tables.frontend(id)?;
        // A call to 0.0.0.0 or ::, which Linux treats as loopback, matches the wildcard entry of a node port
        // by key. Then the rule for loopback applies.
        if call.address.is_unspecified() && !caller.loopback_is_node() {
            return None;
        }
        return Some((id, frontend));
    }
    find_node_port(tables, caller, call)
}

/// The node-port part of [`find_frontend`]: the port is in the range and the address is a node's.
#[inline(always)]
fn find_node_port<A: FamilyLayout>(
    tables: &impl Tables<A>,
    caller: &impl Caller,
    call: &Call<A>,
) -> Option<(u32, Frontend)> {
    let (first, last) = tables.node_ports();
    if call.port < first || call.port > last {
        return None;
    }
    let node = if call.address.is_loopback() {
        if !caller.loopback_is_node() {
            return None;
        }
        NodeAddress::Own
    } else {
        tables.node_address(&call.address.to_mapped())?
    };
    let id = tables.frontend_id(&A::key(A::unspecified(), call.port, call.protocol))?;
    let mut frontend = tables.frontend(id)?;
    if node == NodeAddress::Other && frontend.flags & frontend_flags::EXTERNAL_LOCAL != 0 {
        // With the policy Local, a node answers only with its own endpoints. Nodes with endpoints are listed
        // by exact address; an unlisted node has none (semantics R6, last rule). The look-up is repeated:
        // since the first one the address may have been listed, and then the policy changed.
        if let Some(id) = tables.frontend_id(&A::key(call.address, call.port, call.protocol)) {
            return Some((id, tables.frontend(id)?));
        }
        frontend.run = Run::EMPTY;
    }
    Some((id, frontend))
}

/// The frontend that stands for a destination in a service network without one: `pkg/proxy/nftables`, chain
/// `cluster-ips-check`.
///
/// `None` if the call passes. A call that spans the creation and deletion of a Service may be refused; one
/// that spans the removal of its network may pass.
#[inline(always)]
fn find_unserved<A: FamilyLayout>(tables: &impl Tables<A>, call: &Call<A>) -> Option<(u32, Frontend)> {
    if !tables.is_in_service_network(&call.address) {
        return None;
    }
    let flags = match tables.cluster_ip(&call.address.to_mapped()) {
        Some(false) => return None,
        // Repeated: since the first look-up a Service may have been created, its frontends first.
        Some(true) => match tables.frontend_id(&A::key(call.address, call.port, call.protocol)) {
            Some(id) => return Some((id, tables.frontend(id)?)),
            None => 0,
        },
        None => frontend_flags::UNALLOCATED,
    };
    let (run, service_id) = (Run::EMPTY, NO_SERVICE);
    Some((NO_SERVICE, Frontend { run, service_id, affinity_seconds: 0, flags, health: 0 }))
}

/// Chooses an entry of the frontend's run: its position within the run and the entry itself.
#[inline(always)]
fn choose<A: FamilyLayout>(
    tables: &impl Tables<A>,
    caller: &impl Caller,
    frontend: &Frontend,
) -> Option<(u32, A::Endpoint)> {
    let run = frontend.run;
    if run.len == 0 {
        return None;
    }
    if let Some(choice) = caller.earlier_choice()
        && let Some(found) = find_choice(tables, run, choice)
    {
        return Some(found);
    }
    if frontend.affinity_seconds != 0 {
        return choose_with_affinity(tables, caller, frontend);
    }
    choose_at_random(tables, caller, frontend)
}

/// Draws of a choice from a set: the last one counts, ejected or not. With
/// [`frontend_flags::LEAST_CONNECTIONS`], the one with the fewest open connections of as many.
///
/// They are different endpoints, so up to three ejected ones of a frontend are never chosen. With a share `f`
/// of many endpoints ejected, about `f^4` of the calls still reach one of them: 1 in 10,000 at a tenth, 1 in
/// 16 at a half, and all of them if all are ejected. So the number of ejections needs no bound.
pub const DRAWS: u32 = 4;

/// A draw: the position of an entry of an endpoint table, relative to the run.
#[derive(Clone, Copy)]
struct Drawn {
    /// One of the first `len` entries.
    base: u32,
    /// The same, or that of its alias, `len` further.
    position: u32,
}

#[inline(always)]
fn choose_at_random<A: FamilyLayout>(
    tables: &impl Tables<A>,
    caller: &impl Caller,
    frontend: &Frontend,
) -> Option<(u32, A::Endpoint)> {
    let run = frontend.run;
    let mut drawn = draw(tables, run, 0, scaled(caller.random(), run.len))?;
    if frontend.flags & frontend_flags::LEAST_CONNECTIONS != 0 {
        let (first, n_others) = (drawn.base, run.len - 1);
        let mut active = tables.active(entry_at(tables, run, drawn.position)?.2);
        let mut distance = 1 + below(caller.random(), n_others);
        for _ in 1..DRAWS {
            let other = draw(tables, run, first.wrapping_add(distance), caller.random().into())?;
            let active_there = tables.active(entry_at(tables, run, other.position)?.2);
            let is_less = is_below(active_there, active);
            drawn.base = select(is_less, other.base, drawn.base);
            drawn.position = select(is_less, other.position, drawn.position);
            active = select(is_less, active_there.cast_unsigned(), active.cast_unsigned()).cast_signed();
            distance = following(distance, n_others);
        }
    }
    let entry = tables.endpoint(run.offset.wrapping_add(drawn.position))?;
    if !is_suspect(tables, frontend, &entry) {
        return Some((drawn.position, entry));
    }
    let position = draw_again(tables, caller, frontend, drawn)?;
    let entry = tables.endpoint(run.offset.wrapping_add(position))?;
    tables.begin_trial(A::entry_parts(&entry).2);
    Some((position, entry))
}

#[inline(always)]
fn is_suspect<A: FamilyLayout>(tables: &impl Tables<A>, frontend: &Frontend, entry: &A::Endpoint) -> bool {
    frontend.health != 0 && tables.is_suspect(A::entry_parts(entry).2)
}

/// Draws the entry that follows `start` at a distance, or its alias: see [`endpoint_extra`]. `scaled` is the
/// distance, and which part of it was drawn, in 1/2^32.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the two halves")]
fn draw<A: FamilyLayout>(tables: &impl Tables<A>, run: Run, start: u32, scaled: u64) -> Option<Drawn> {
    let base = start.wrapping_add((scaled >> 32) as u32);
    let base = base.wrapping_sub(run.len & is_at_least(base, run.len));
    let extra = A::entry_extra(&tables.endpoint(run.offset.wrapping_add(base))?);
    let is_alias = !is_at_least((scaled as u32) >> 17, (extra & endpoint_extra::ALIAS).into());
    Some(Drawn { base, position: base.wrapping_add(run.len & is_alias) })
}

/// The position of the first endpoint that is not ejected: of [`DRAWS`] from the run, then of as many from
/// the set that an extended run falls back to. If there is none, the last one drawn from the run.
///
/// Redraws disregard shares: they are different endpoints, each with the same probability. Without a branch
/// that depends on a draw: with one, kernel 5.10 verifies what follows once for each of its paths, which
/// makes the start of an agent five times as long.
#[inline(always)]
fn draw_again<A: FamilyLayout>(
    tables: &impl Tables<A>,
    caller: &impl Caller,
    frontend: &Frontend,
    first: Drawn,
) -> Option<u32> {
    let run = frontend.run;
    let (mut position, mut is_found) =
        (first.position, tables.admits(entry_at(tables, run, first.position)?.2));
    // The second draw is any of the others, so that they share the calls of an ejected one equally. After an
    // alias, it is the entry that the alias stood for.
    let n_others = run.len - 1;
    let is_base = is_at_least(first.base, first.position);
    let mut distance = (1 + below(caller.random(), n_others)) & is_base;
    for _ in 1..DRAWS {
        let next = first.base.wrapping_add(distance);
        let next = next.wrapping_sub(run.len & is_at_least(next, run.len));
        let is_admitted = tables.admits(entry_at(tables, run, next)?.2);
        // Stays at the first one that is found.
        position = select(is_found, position, next);
        is_found |= is_admitted;
        distance = following(distance, n_others);
    }
    let is_extended =
        u32::from(entry_at(tables, run, first.base)?.3 / endpoint_extra::EXTENDED).wrapping_neg();
    // An entry of the run stands for the missing count if it is not extended.
    let count_at = run.len.wrapping_mul(2) & is_extended;
    let len = entry_at(tables, run, count_at)?.2 & is_extended;
    // Without such a set nothing changes any more.
    is_found |= !is_at_least(len, 1) & 1;
    // With affinity, the client decides: it keeps its endpoint without being found in the run.
    let has_affinity = is_at_least(frontend.affinity_seconds, 1) & 1;
    let mut next = below(select(has_affinity, caller.client(), caller.random()), len);
    for _ in 0..DRAWS {
        let there = (count_at + 1 + next) & is_at_least(len, 1);
        let is_admitted = tables.admits(entry_at(tables, run, there)?.2);
        position = select(is_admitted & !is_found, there, position);
        is_found |= is_admitted;
        next = (next + 1) & !is_at_least(next + 1, len);
    }
    Some(position)
}

/// The distance after one of 0 to `n_others`, from 1 on.
#[inline(always)]
fn following(distance: u32, n_others: u32) -> u32 {
    1 + (distance & !is_at_least(distance, n_others))
}

/// The parts of an entry: address, port, endpoint id and extra.
#[inline(always)]
fn entry_at<A: FamilyLayout>(tables: &impl Tables<A>, run: Run, position: u32) -> Option<(A, u16, u32, u16)> {
    let entry = tables.endpoint(run.offset.wrapping_add(position))?;
    let (address, port, id) = A::entry_parts(&entry);
    Some((address, port, id, A::entry_extra(&entry)))
}

/// All ones if `a >= b`, else 0, without a branch.
#[inline(always)]
fn is_at_least(a: u32, b: u32) -> u32 {
    let difference = core::hint::black_box(u64::from(a).wrapping_sub(u64::from(b)));
    // Its upper half is 0 or all ones.
    !((difference >> 32) as u32)
}

/// 1 if `a < b`, else 0, without a branch.
#[inline(always)]
fn is_below(a: i32, b: i32) -> u32 {
    let difference = core::hint::black_box(i64::from(a).wrapping_sub(i64::from(b)));
    (difference.cast_unsigned() >> 63) as u32
}

/// `a` if `is_first` is 1, `b` if it is 0, without a branch.
#[inline(always)]
fn select(is_first: u32, a: u32, b: u32) -> u32 {
    let mask = core::hint::black_box(is_first).wrapping_neg();
    (a & mask) | (b & !mask)
}

/// A number below `len` from a random one, times 2^32. Its lower half is random, too.
#[inline(always)]
fn scaled(random: u32, len: u32) -> u64 {
    // A multiplication: a division costs more in BPF, and its bias falls on the first entries.
    u64::from(random) * u64::from(len)
}

/// A number below `len` from a random one.
#[inline(always)]
fn below(random: u32, len: u32) -> u32 {
    (scaled(random, len) >> 32) as u32
}

#[inline(always)]
fn choose_with_affinity<A: FamilyLayout>(
    tables: &impl Tables<A>,
    caller: &impl Caller,
    frontend: &Frontend,
) -> Option<(u32, A::Endpoint)> {
    let (run, service_id, now) = (frontend.run, frontend.service_id, caller.now());
    let remembered = caller.affinity(service_id);
    if let Some(affinity) = remembered
        && now.wrapping_sub(affinity.last_used) < u64::from(frontend.affinity_seconds)
        && let Some(found) = find_endpoint(tables, run, affinity.endpoint_id)
        && !is_suspect(tables, frontend, &found.1)
    {
        caller.renew_affinity(service_id, now);
        return Some(found);
    }
    let (index, entry) = choose_at_random(tables, caller, frontend)?;
    let (_, _, endpoint_id) = A::entry_parts(&entry);
    let new = Affinity { last_used: now, endpoint_id, reserved: 0 };
    let standing = caller.remember_affinity(service_id, remembered, new);
    if standing != endpoint_id
        && let Some(found) = find_endpoint(tables, run, standing)
    {
        return Some(found);
    }
    Some((index, entry))
}

/// Finds an earlier choice in a run: at its old position, else by search.
#[inline(always)]
fn find_choice<A: FamilyLayout>(
    tables: &impl Tables<A>,
    run: Run,
    choice: Choice,
) -> Option<(u32, A::Endpoint)> {
    if choice.index < run.len
        && let Some(entry) = tables.endpoint(run.offset.wrapping_add(choice.index))
        && A::entry_parts(&entry).2 == choice.endpoint_id
    {
        return Some((choice.index, entry));
    }
    find_endpoint(tables, run, choice.endpoint_id)
}

/// Finds an endpoint in a run by its id. Runs are sorted by endpoint id, so the search needs no map of its
/// own.
///
/// Rejected: a hash map (service, endpoint) -> position. It costs one hash look-up more than this search for
/// a thousand endpoints, needs an update for each endpoint of a changed set, and can disagree with the run.
#[inline(always)]
pub fn find_endpoint<A: FamilyLayout>(
    tables: &impl Tables<A>,
    run: Run,
    endpoint_id: u32,
) -> Option<(u32, A::Endpoint)> {
    let (mut low, mut high) = (0, run.len);
    // `limits::MAX_RUN` is 2^24: 24 halvings reach a single entry.
    for _ in 0..=crate::limits::MAX_RUN.trailing_zeros() {
        if low >= high {
            return None;
        }
        let middle = low + (high - low) / 2;
        let entry = tables.endpoint(run.offset.wrapping_add(middle))?;
        let id = A::entry_parts(&entry).2;
        if id == endpoint_id {
            return Some((middle, entry));
        }
        if id < endpoint_id {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    None
}

#[cfg(test)]
mod tests;
