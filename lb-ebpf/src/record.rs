//! The records of a socket: the services it uses. With them it sees services' addresses, not endpoints'.
//!
//! A record is kept in one of two places (docs/decisions/0002 has the measurements):
//!
//! - a **slot** of the array `sockets`, found by the low bits of the socket's cookie and owned by the socket
//!   whose cookie `socket_slots` holds. Freed when the socket is closed; ten times cheaper to take than
//!   storage.
//! - **socket storage**, for sockets whose slots other live sockets own, for the third and later services of
//!   an unconnected socket, for kernel sockets (no program runs when they are closed), and for kernels that
//!   lack a feature for slots. The kernel frees it with the socket.
//!
//! Neither evicts another socket's record. The programs assign a cookie with a socket's first record, so a
//! socket without a cookie costs no look-up. The kernel holds the socket's lock in all hooks that get here
//! (`BPF_CGROUP_RUN_SA_PROG_LOCK`; `inet_getname` locks by itself): a socket's records have one reader or
//! writer at a time. Between sockets, the cookie decides.
//!
//! A `connect()` is recorded before the kernel does it, and may fail. So it never replaces the record of the
//! socket's current peer, nor that of another service of an unconnected socket. A record counts for a
//! connected socket only if it names the current peer.

use core::{
    hint::black_box,
    marker::PhantomData,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::programs::SockContext;
use lb_common::{
    address::Octets6,
    layout::{
        Attempt, Protocol, SLOT_WAYS, SOCKET_RECORDS, SocketEntry, SocketRecord, SocketRecords, SocketSlots,
        entry_flags,
        record_flags::{ANSWERS, COUNTED},
    },
    limits::SOCKET_SETS,
    resolve::Choice,
};

use crate::{
    config::{self, Mode, is_on},
    ctx::{Multipath, Peer, SockAddr, SockOps, compare_and_swap, sock_cookie, sock_storage},
    maps,
    tables::add_active,
};

/// Zero if two addresses and ports are equal. Addresses are 8-aligned and compared as two words: bytewise it
/// takes 32 loads and 16 branches.
#[inline(always)]
fn difference(a: &Octets6, a_port: u16, b: &Octets6, b_port: u16) -> u64 {
    #[expect(clippy::cast_ptr_alignment, reason = "the alignment is what the caller promises")]
    let (a, b) = ((&raw const *a).cast::<[u64; 2]>(), (&raw const *b).cast::<[u64; 2]>());
    // SAFETY: `Peer` is 8-aligned with the address first, and `layout` asserts it for records.
    let (a, b) = unsafe { (*a, *b) };
    (a[0] ^ b[0]) | (a[1] ^ b[1]) | u64::from(a_port ^ b_port)
}

/// 1 for zero, else 0, without a branch: in a loop over records the verifier follows both sides of each
/// branch.
#[inline(always)]
fn is_zero(number: u64) -> u64 {
    // `black_box` keeps the compiler from creating a branch.
    (black_box(number.wrapping_sub(1)) & !number) >> 63
}

impl Peer {
    /// Whether both are the same address and port.
    #[inline(always)]
    pub(crate) fn is(&self, other: &Self) -> bool {
        difference(&self.address, self.port, &other.address, other.port) == 0
    }

    #[inline(always)]
    fn difference_to_service_of(&self, record: &SocketRecord) -> u64 {
        difference(&self.address, self.port, &record.service_address, record.service_port)
    }

    #[inline(always)]
    fn difference_to_endpoint_of(&self, record: &SocketRecord) -> u64 {
        difference(&self.address, self.port, &record.endpoint_address, record.endpoint_port)
    }
}

#[inline(always)]
fn service_difference(a: &SocketRecord, b: &SocketRecord) -> u64 {
    difference(&a.service_address, a.service_port, &b.service_address, b.service_port)
}

#[inline(always)]
fn endpoint_difference(a: &SocketRecord, b: &SocketRecord) -> u64 {
    difference(&a.endpoint_address, a.endpoint_port, &b.endpoint_address, b.endpoint_port)
}

/// A call to record, and what it must not overwrite. Methods return 1 or 0, for [`is_zero`]'s reason.
struct New<'a> {
    record: &'a SocketRecord,
    /// For a `connect()`, the peer that the socket keeps if the call fails, or [`Peer::NONE`].
    former: Option<&'a Peer>,
}

impl New<'_> {
    /// Whether a record names the socket's current peer.
    #[inline(always)]
    fn is_former(&self, record: &SocketRecord) -> u64 {
        self.former.map_or(0, |former| {
            is_zero(former.difference_to_endpoint_of(record) | u64::from(record.flags & ANSWERS ^ ANSWERS))
        })
    }

    /// Whether it replaces a record: one of the same service and, for a `connect()`, which may fail, of the
    /// same endpoint.
    #[inline(always)]
    fn replaces(&self, record: &SocketRecord) -> u64 {
        let difference = service_difference(record, self.record);
        if self.former.is_none() {
            return is_zero(difference);
        }
        is_zero(difference | endpoint_difference(record, self.record))
    }

    /// Stops an older record from translating this call's endpoint to another service.
    #[inline(always)]
    fn silences(&self, record: &mut SocketRecord) {
        silence(record, endpoint_difference(record, self.record));
    }

    /// Writes it to one of the two records of a slot. Returns 1 if it did not fit and belongs in socket
    /// storage.
    #[inline(always)]
    fn write_to_slot(&self, entry: &mut SocketEntry) -> u64 {
        // An unused second record is garbage; changing it is harmless.
        self.silences(&mut entry.first);
        self.silences(&mut entry.second);
        let is_connected = self.former.map_or(0, |former| is_zero(former.port.into()) ^ 1);
        let has_second = u64::from(entry.flags & entry_flags::SECOND);
        let fits_first = self.replaces(&entry.first);
        let fits_second = (has_second ^ 1) | self.replaces(&entry.second) | self.is_former(&entry.first);
        let is_second = (fits_first ^ 1) & fits_second;
        // A connected socket expects no answer from another service.
        let overflows = (fits_first | fits_second | is_connected) ^ 1;
        #[expect(clippy::cast_possible_truncation, reason = "0 or 1")]
        let (second, storage) = (is_second as u32, overflows as u32);
        entry.flags |= (second * entry_flags::SECOND) | (storage * entry_flags::STORAGE);
        if is_second != 0 {
            entry.second = *self.record;
        } else if overflows == 0 {
            entry.first = *self.record;
        }
        overflows
    }

    /// Writes it to socket storage. If it `is_elsewhere`, only stops records there from translating its
    /// endpoint.
    ///
    /// The first two records are for a `connect()` without a record to replace, so that it evicts no other. A
    /// datagram replaces the record of its service, else an unused one, else the oldest.
    #[inline(always)]
    fn write_to_storage(&self, storage: &mut SocketRecords, is_elsewhere: bool) {
        let (mut of_service, mut unused) = (NO_RECORD, NO_RECORD);
        self.silences(&mut storage.records[0]);
        self.silences(&mut storage.records[1]);
        let (mut n, end) = (CONNECT_RECORDS, n_records());
        while n < end {
            let record = &mut storage.records[n % SOCKET_RECORDS];
            self.silences(record);
            select(&mut of_service, n, self.replaces(record));
            if self.former.is_none() {
                select(&mut unused, n, is_zero(record.protocol.into()));
            }
            n += 1;
        }
        if is_elsewhere {
            return;
        }
        let place = if of_service != NO_RECORD {
            of_service
        } else if self.former.is_some() {
            self.is_former(&storage.records[0])
        } else if unused != NO_RECORD {
            unused
        } else {
            let next = storage.next;
            storage.next = next.wrapping_add(1);
            // Records 0 and 1 are for `connect()`: their turns go to 2 and 3.
            let is_of_connect = is_zero(u64::from(next) % SOCKET_RECORDS as u64 / CONNECT_RECORDS as u64);
            u64::from(next) | (is_of_connect * CONNECT_RECORDS as u64)
        };
        storage.records[index(place)] = *self.record;
    }
}

/// Adds to the open connections of a record's endpoint, if they are counted.
#[inline(always)]
fn count(record: &SocketRecord, number: i32) {
    if record.flags & COUNTED != 0 {
        add_active(record.endpoint_id, number);
    }
}

/// The records in socket storage for `connect()`, at the front.
const CONNECT_RECORDS: usize = 2;

/// [`SOCKET_RECORDS`], hidden from the compiler, which would unroll the loops. The loops are not closures:
/// LLVM makes a BPF function of a closure, which the verifier rejects.
#[inline(always)]
fn n_records() -> usize {
    let number = SOCKET_RECORDS;
    // SAFETY: a live variable.
    unsafe { (&raw const number).read_volatile() }
}

/// Stands for "no record".
const NO_RECORD: u64 = u64::MAX;

/// An index that the verifier accepts.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "of sixteen")]
fn index(place: u64) -> usize {
    place as usize % SOCKET_RECORDS
}

/// Selects an index if `is_wanted` is 1, without a branch.
#[inline(always)]
fn select(index: &mut u64, new: usize, is_wanted: u64) {
    let mask = black_box(is_wanted).wrapping_neg();
    *index = (*index & !mask) | (new as u64 & mask);
}

/// Stops a record from translating its endpoint to its service, if `difference` is zero.
#[inline(always)]
fn silence(record: &mut SocketRecord, difference: u64) {
    #[expect(clippy::cast_possible_truncation, reason = "0 or 1")]
    let is_same = is_zero(difference) as u8;
    record.flags &= !(is_same * ANSWERS);
}

/// A socket and its records, during one call.
pub(crate) struct Socket<'a, M> {
    ctx: &'a SockAddr<'a>,
    mode: PhantomData<M>,
}

/// The slots that a socket may own. Other sockets may take and change them concurrently, so words are read
/// and written, never references.
#[derive(Clone, Copy)]
struct Slots {
    set: u32,
    slots: *mut SocketSlots,
}

impl Slots {
    #[inline(always)]
    fn of(cookie: u64) -> Option<Self> {
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are what is wanted")]
        let set = cookie as u32 & (SOCKET_SETS - 1);
        Some(Self { set, slots: maps::SOCKET_SLOTS.get_ptr_mut(set)? })
    }

    #[inline(always)]
    fn owner(self, way: usize) -> *mut u64 {
        // SAFETY: a live array element; callers pass 0 or 1.
        unsafe { (&raw mut (*self.slots).owners).cast::<u64>().add(way) }
    }

    /// The way of a socket's slot in its set.
    #[inline(always)]
    fn slot_of(self, cookie: u64) -> Option<usize> {
        let is_owner = |way| {
            // SAFETY: one aligned word. Volatile, since another CPU may write it.
            unsafe { self.owner(way).read_volatile() == cookie }
        };
        if is_owner(0) {
            Some(0)
        } else if is_owner(1) {
            Some(1)
        } else {
            None
        }
    }

    /// Takes a free slot for a socket without one. `None` if other sockets own all.
    #[inline(always)]
    fn take(self, cookie: u64) -> Option<usize> {
        let take = |way| {
            // SAFETY: as above.
            let is_free = unsafe { self.owner(way).read_volatile() == 0 };
            is_free && compare_and_swap(self.owner(way), 0, cookie)
        };
        if take(0) {
            Some(0)
        } else if take(1) {
            Some(1)
        } else {
            None
        }
    }

    /// The records of a slot. Only its owner may access them.
    #[inline(always)]
    fn entry<'a>(self, way: usize) -> Option<&'a mut SocketEntry> {
        #[expect(clippy::cast_possible_truncation, reason = "of two slots, number 0 or 1")]
        let index = self.set * SLOT_WAYS as u32 + way as u32;
        let entry = maps::SOCKETS.get_ptr_mut(index)?;
        // SAFETY: a live array element that belongs to the caller's socket, which is locked.
        Some(unsafe { &mut *entry })
    }

    #[inline(always)]
    fn free(self, way: usize) {
        // SAFETY: one aligned word. Volatile, since another CPU may read it.
        unsafe { self.owner(way).write_volatile(0) };
    }
}

impl<'a, M: Mode> Socket<'a, M> {
    #[inline(always)]
    pub(crate) fn of(ctx: &'a SockAddr<'a>) -> Self {
        Self { ctx, mode: PhantomData }
    }

    /// Whether the socket may have records, and its slot if it owns one.
    #[inline(always)]
    fn home(&self) -> (bool, Option<&'a mut SocketEntry>) {
        if !M::SLOTS || self.ctx.is_mptcp() {
            return (true, None);
        }
        match self.ctx.known_cookie() {
            0 => (false, None),
            cookie => {
                let Some(slots) = Slots::of(cookie) else { return (false, None) };
                (true, slots.slot_of(cookie).and_then(|way| slots.entry(way)))
            }
        }
    }

    /// The socket's storage, if it has any.
    #[inline(always)]
    fn storage(&self) -> Option<&'a mut SocketRecords> {
        // SAFETY: the storage belongs to this socket, which is locked.
        unsafe { maps::SOCKET_STORAGE.get_ptr_mut(self.ctx.aya()).as_mut() }
    }

    /// The socket's storage, created if missing. `None` only when the kernel is out of memory.
    #[inline(always)]
    fn storage_or_new(&self) -> Option<&'a mut SocketRecords> {
        // SAFETY: as above.
        let storage = unsafe { maps::SOCKET_STORAGE.get_or_insert_ptr_mut(self.ctx.aya(), None).as_mut() }?;
        storage.cookie = self.ctx.cookie();
        Some(storage)
    }

    /// Finds a record whose `difference` is zero.
    #[inline(always)]
    fn find<T>(
        &self,
        difference: impl Fn(&SocketRecord) -> u64,
        none: T,
        found: impl Fn(&SocketRecord) -> T,
    ) -> T {
        let (may_have_records, entry) = self.home();
        if !may_have_records {
            return none;
        }
        if let Some(entry) = entry {
            if difference(&entry.first) == 0 {
                return found(&entry.first);
            }
            if entry.flags & entry_flags::SECOND != 0 && difference(&entry.second) == 0 {
                return found(&entry.second);
            }
            if entry.flags & entry_flags::STORAGE == 0 {
                return none;
            }
        }
        let Some(storage) = self.storage() else { return none };
        let mut place = NO_RECORD;
        let (mut n, end) = (0, n_records());
        while n < end {
            let record = &storage.records[n % SOCKET_RECORDS];
            select(&mut place, n, is_zero(difference(record)) & !is_zero(record.protocol.into()));
            n += 1;
        }
        if place == NO_RECORD {
            return none;
        }
        found(&storage.records[index(place)])
    }

    /// The endpoint that this socket uses for a service address, or [`Choice::NONE`]. A connected socket
    /// receives only from its peer, so no other endpoint counts.
    #[inline(always)]
    pub(crate) fn earlier(&self, service: &Peer, former: &Peer) -> Choice {
        let is_connected = !is_zero(former.port.into()) & 1;
        let difference = |record: &SocketRecord| {
            service.difference_to_service_of(record)
                | (former.difference_to_endpoint_of(record) * is_connected)
        };
        self.find(difference, Choice::NONE, |record| Choice {
            endpoint_id: record.endpoint_id,
            index: record.index.into(),
        })
    }

    /// The service address of a peer of this socket, or [`Peer::NONE`].
    #[inline(always)]
    pub(crate) fn service_of(&self, peer: &Peer) -> Peer {
        let difference = |record: &SocketRecord| {
            peer.difference_to_endpoint_of(record) | u64::from(record.flags & ANSWERS ^ ANSWERS)
        };
        self.find(difference, Peer::NONE, |record| Peer {
            address: record.service_address,
            port: record.service_port,
        })
    }

    /// Records a call to an endpoint, and keeps the records of other services. A `connect()` also keeps the
    /// record of the current peer, `former` or [`Peer::NONE`].
    #[inline(always)]
    pub(crate) fn record_call(&self, record: &SocketRecord, former: Option<&Peer>, health: u32) {
        let new = New { record, former };
        // A TCP socket receives only from its peer.
        let is_stream = record.protocol == Protocol::TCP.0;
        let mut is_elsewhere = false;
        if let Some((entry, new_owner)) = self.entry_or_new() {
            let first = &mut entry.first;
            let difference = service_difference(first, record) | endpoint_difference(first, record);
            // The common case: another datagram of the same flow. Its endpoint may have a new id by now.
            if new_owner != 0 || is_stream || (difference == 0 && first.flags & ANSWERS != 0) {
                if new_owner == 0 {
                    count(first, -1);
                }
                *first = *record;
                count(record, 1);
                if is_stream && is_on(&config::PASSIVE_HEALTH) {
                    entry.health = health;
                    entry.attempt = self.attempt(health);
                }
                if new_owner != 0 {
                    // Written last: the agent attributes the records to the cookie beside them.
                    compiler_fence(Ordering::Release);
                    entry.cookie = new_owner;
                }
                return;
            }
            is_elsewhere = new.write_to_slot(entry) == 0;
            if entry.flags & entry_flags::STORAGE == 0 {
                return;
            }
        }
        let Some(storage) = self.storage_or_new() else { return };
        if is_stream {
            count(&storage.records[0], -1);
            storage.records[0] = *record;
            count(record, 1);
            if is_on(&config::PASSIVE_HEALTH) {
                storage.health = health;
                storage.attempt = self.attempt(health);
            }
        } else {
            new.write_to_storage(storage, is_elsewhere);
        }
    }

    /// A `connect()` whose SYN is not sent yet.
    #[inline(always)]
    fn attempt(&self, health: u32) -> Attempt {
        Attempt { sent_at: 0, netns: if health == 0 { 0 } else { self.ctx.netns_cookie() } }
    }

    /// The records in the socket's slot, and its cookie if this call took the slot, else 0. A new owner
    /// writes the first record, then its cookie. `None` if other sockets own all its slots, or if nothing
    /// would free the slot.
    #[inline(always)]
    fn entry_or_new(&self) -> Option<(&'a mut SocketEntry, u64)> {
        if !M::SLOTS {
            return None;
        }
        let cookie = self.ctx.cookie();
        let slots = Slots::of(cookie)?;
        // First the own slot, then a free one: a socket has at most one slot.
        if let Some(way) = slots.slot_of(cookie) {
            return Some((slots.entry(way)?, 0));
        }
        // A socket that found no slot earlier keeps its storage.
        if self.ctx.is_kernel_socket() || self.storage().is_some() {
            return None;
        }
        let entry = slots.entry(slots.take(cookie)?)?;
        entry.flags = 0;
        Some((entry, cookie))
    }

    /// Records the call for the multipath TCP socket too, since the program queries that one. It has one
    /// peer.
    #[inline(always)]
    pub(crate) fn record_multipath(socket: Multipath, record: &SocketRecord) {
        // SAFETY: the storage of the subflow's connection, which is locked.
        if let Some(storage) = unsafe { socket.storage_or_new().as_mut() } {
            storage.records[0] = *record;
        }
    }

    /// As [`Self::record_plain_call`], for the multipath TCP socket.
    #[inline(always)]
    pub(crate) fn record_plain_multipath(socket: Multipath, peer: &Peer) {
        // SAFETY: as above.
        if let Some(storage) = unsafe { socket.storage().as_mut() } {
            let record = &mut storage.records[0];
            silence(record, peer.difference_to_endpoint_of(record));
        }
    }

    /// Notes that the socket called a plain address: an answer from there keeps its address.
    #[inline(always)]
    pub(crate) fn record_plain_call(&self, peer: &Peer) {
        let silence = |record: &mut SocketRecord| silence(record, peer.difference_to_endpoint_of(record));
        let (may_have_records, entry) = self.home();
        if !may_have_records {
            return;
        }
        if let Some(entry) = entry {
            silence(&mut entry.first);
            silence(&mut entry.second);
            if entry.flags & entry_flags::STORAGE == 0 {
                return;
            }
        }
        if let Some(storage) = self.storage() {
            let (mut n, end) = (0, n_records());
            while n < end {
                silence(&mut storage.records[n % SOCKET_RECORDS]);
                n += 1;
            }
        }
    }
}

/// The `connect()` of a TCP socket to a service with a health policy, as the records keep it.
pub(crate) struct Attempted<'a> {
    pub(crate) record: &'a SocketRecord,
    pub(crate) health: u32,
    pub(crate) attempt: &'a mut Attempt,
}

impl Attempted<'_> {
    /// Whether it went to this peer.
    #[inline(always)]
    pub(crate) fn is_to(&self, peer: &Peer) -> bool {
        peer.difference_to_endpoint_of(self.record) == 0
    }
}

/// The `connect()` that a callback of the socket is about. `None` if the socket did not call such a service,
/// or was closed.
#[inline(always)]
pub(crate) fn attempted<'a, M: Mode>(ctx: &SockOps) -> Option<Attempted<'a>> {
    if M::SLOTS {
        let cookie = ctx.known_cookie();
        if cookie == 0 {
            return None;
        }
        let slots = Slots::of(cookie)?;
        if let Some(way) = slots.slot_of(cookie) {
            let SocketEntry { first, health, attempt, .. } = slots.entry(way)?;
            return Some(Attempted { record: first, health: *health, attempt });
        }
    }
    // SAFETY: the storage belongs to this socket, which is locked.
    let SocketRecords { records, health, attempt, .. } = unsafe { ctx.storage().as_mut() }?;
    Some(Attempted { record: &records[0], health: *health, attempt })
}

/// Ends the records of a socket that is being closed: frees its slot, and counts it no longer.
#[inline(always)]
pub(crate) fn release(ctx: &SockContext) {
    let cookie = sock_cookie(ctx);
    if cookie == 0 {
        return;
    }
    if let Some(slots) = Slots::of(cookie)
        && let Some(way) = slots.slot_of(cookie)
    {
        if let Some(entry) = slots.entry(way) {
            count(&entry.first, -1);
        }
        slots.free(way);
        return;
    }
    // SAFETY: the storage belongs to this socket, which is locked.
    if let Some(storage) = unsafe { sock_storage(ctx).as_ref() } {
        count(&storage.records[0], -1);
    }
}
