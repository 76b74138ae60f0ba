//! What a socket remembers of the services it uses, so that it sees their addresses and not the endpoints'.
//!
//! A record lives in one of two homes (docs/decisions/0002 has the measurements):
//!
//! - a **slot** of the array `sockets`, found by the low bits of the socket's cookie, owned by the socket whose cookie
//!   `socket_slots` holds for it, and given up when the socket is closed. Ten times cheaper to take than
//! - **socket storage**, for a socket whose slots belong to other live sockets, for the second and later services of
//!   an unconnected socket, and for everything on kernels without compare-and-swap. The kernel frees it with the
//!   socket.
//!
//! Neither evicts the record of another socket. The kernel holds the socket's lock in all hooks that come here
//! (`BPF_CGROUP_RUN_SA_PROG_LOCK`; `inet_getname` locks by itself), so that a socket's own records have one reader or
//! writer at a time; between sockets the cookie decides.

use core::marker::PhantomData;

use aya_ebpf::programs::SockContext;
use lb_common::{
    address::Octets6,
    layout::{SLOT_WAYS, SOCKET_RECORDS, SocketRecord, SocketRecords, SocketSlots},
    limits::SOCKET_SETS,
    resolve::Choice,
};

use crate::{
    config::Mode,
    ctx::{SockAddr, compare_and_swap, sock_cookie},
    maps,
};

/// An address and port, IPv4 in mapped form.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(crate) struct Peer {
    /// Address.
    pub(crate) address: Octets6,
    /// Port, host order.
    pub(crate) port: u16,
}

/// Compares addresses that lie at multiples of 8, as two words: byte by byte it is 32 loads and 16 branches.
#[inline(always)]
fn same(a: &Octets6, b: &Octets6) -> bool {
    #[expect(clippy::cast_ptr_alignment, reason = "the alignment is what the caller promises")]
    let (a, b) = ((&raw const *a).cast::<[u64; 2]>(), (&raw const *b).cast::<[u64; 2]>());
    // SAFETY: `Peer` is 8-aligned with the address first, and `layout` asserts it for records.
    let (a, b) = unsafe { (*a, *b) };
    a[0] == b[0] && a[1] == b[1]
}

impl Peer {
    #[inline(always)]
    fn is_service_of(&self, record: &SocketRecord) -> bool {
        record.service_port == self.port && same(&record.service_address, &self.address)
    }

    #[inline(always)]
    fn is_endpoint_of(&self, record: &SocketRecord) -> bool {
        record.endpoint_port == self.port && same(&record.endpoint_address, &self.address)
    }
}

/// A socket and where its records may be, for the length of one call.
pub(crate) struct Socket<'a, M> {
    ctx: &'a SockAddr<'a>,
    cookie: u64,
    slots: Option<Slots>,
    mode: PhantomData<M>,
}

/// The slots that a socket may own. Other sockets may own and change them at the same time, so that it is words that are
/// read and written, never references.
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

    /// The slot of a socket, by its number in the set.
    #[inline(always)]
    fn way_of(self, cookie: u64) -> Option<usize> {
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

    /// The slot of a socket, taking one if need be. `None` if others own all.
    #[inline(always)]
    fn way_or_new(self, cookie: u64) -> Option<usize> {
        // The one that is mine before one that is free: a socket has one slot at most.
        if let Some(way) = self.way_of(cookie) {
            return Some(way);
        }
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

    /// The record of a slot. Only its owner may look at it.
    #[inline(always)]
    fn record<'a>(self, way: usize) -> Option<&'a mut SocketRecord> {
        #[expect(clippy::cast_possible_truncation, reason = "of two slots, number 0 or 1")]
        let index = self.set * SLOT_WAYS as u32 + way as u32;
        let record = maps::SOCKETS.get_ptr_mut(index)?;
        // SAFETY: a live array element that belongs to the caller's socket, which is locked.
        Some(unsafe { &mut *record })
    }

    #[inline(always)]
    fn give_up(self, way: usize) {
        // SAFETY: one aligned word. Volatile, since another CPU may read it.
        unsafe { self.owner(way).write_volatile(0) };
    }

    /// Whether a socket of this set may have storage.
    #[inline(always)]
    fn has_spilled(self) -> bool {
        // SAFETY: as above.
        unsafe { (&raw const (*self.slots).spills).read_volatile() != 0 }
    }

    #[inline(always)]
    fn count_spill(self) {
        // SAFETY: as above. Two CPUs at once may count one instead of two; it never goes back to 0.
        unsafe {
            let spills = &raw mut (*self.slots).spills;
            spills.write_volatile(spills.read_volatile() + 1);
        }
    }
}

impl<'a, M: Mode> Socket<'a, M> {
    /// The socket of a call.
    #[inline(always)]
    pub(crate) fn of(ctx: &'a SockAddr<'a>) -> Self {
        let cookie = ctx.cookie();
        Self { ctx, cookie, slots: if M::SLOTS { Slots::of(cookie) } else { None }, mode: PhantomData }
    }

    /// The record in the socket's slot, if it has one.
    #[inline(always)]
    fn own_record(&self) -> Option<&'a mut SocketRecord> {
        let slots = self.slots?;
        slots.record(slots.way_of(self.cookie)?)
    }

    /// The record in the socket's slot, taking one if need be. `None` if others own all that it may have.
    #[inline(always)]
    fn own_or_new_record(&self) -> Option<&'a mut SocketRecord> {
        let slots = self.slots?;
        slots.record(slots.way_or_new(self.cookie)?)
    }

    /// The socket's storage, if it has any.
    #[inline(always)]
    fn storage(&self) -> Option<&'a mut SocketRecords> {
        if M::SLOTS && !self.slots?.has_spilled() {
            return None;
        }
        // SAFETY: the storage belongs to this socket, which is locked.
        unsafe { maps::SOCKET_STORAGE.get_ptr_mut(self.ctx.aya()).as_mut() }
    }

    /// The socket's storage, made if need be. `None` only when the kernel is out of memory.
    #[inline(always)]
    fn storage_or_new(&self) -> Option<&'a mut SocketRecords> {
        if let Some(storage) = self.storage() {
            return Some(storage);
        }
        if let Some(slots) = self.slots {
            slots.count_spill();
        }
        // SAFETY: as above.
        unsafe { maps::SOCKET_STORAGE.get_or_insert_ptr_mut(self.ctx.aya(), None).as_mut() }
    }

    /// The endpoint that this socket used last for a service address, or [`Choice::NONE`].
    #[inline(always)]
    pub(crate) fn earlier(&self, service: &Peer) -> Choice {
        let found = |record: &SocketRecord| Choice { endpoint_id: record.endpoint_id, index: record.index };
        if let Some(slot) = self.own_record()
            && service.is_service_of(slot)
        {
            return found(slot);
        }
        let Some(storage) = self.storage() else { return Choice::NONE };
        storage
            .records
            .iter()
            .find(|record| record.cookie != 0 && service.is_service_of(record))
            .map_or(Choice::NONE, found)
    }

    /// Notes that the socket is connected to an endpoint; forgets all else.
    #[inline(always)]
    pub(crate) fn connected(&self, record: &SocketRecord) {
        let record = SocketRecord { cookie: self.cookie, ..*record };
        if let Some(slot) = self.own_or_new_record() {
            *slot = record;
            self.forget_stored(|_| true);
        } else if let Some(storage) = self.storage_or_new() {
            forget(storage, |_| true);
            storage.records[0] = record;
            storage.next = 1;
        }
    }

    /// Notes that the socket sent a datagram to an endpoint; keeps what it knows of other services.
    ///
    /// An answer from an endpoint that stands behind two services of the socket is taken for one from the service
    /// asked last.
    #[inline(always)]
    pub(crate) fn sent(&self, service: &Peer, record: &SocketRecord) {
        let record = SocketRecord { cookie: self.cookie, ..*record };
        let answerer = Peer { address: record.endpoint_address, port: record.endpoint_port };
        let is_replaced = |old: &SocketRecord| service.is_service_of(old) || answerer.is_endpoint_of(old);
        let had_slot = match self.own_record() {
            // The common case: one more datagram on the same way.
            Some(slot) if slot.endpoint_id == record.endpoint_id && slot.index == record.index => {
                if service.is_service_of(slot) && answerer.is_endpoint_of(slot) {
                    return;
                }
                true
            }
            slot => slot.is_some(),
        };
        if let Some(slot) = self.own_or_new_record()
            && (!had_slot || is_replaced(slot))
        {
            *slot = record;
            self.forget_stored(is_replaced);
            return;
        }
        let Some(storage) = self.storage_or_new() else { return };
        forget(storage, is_replaced);
        let oldest = storage.next as usize % SOCKET_RECORDS;
        if let Some(free) = storage.records.iter_mut().find(|old| old.cookie == 0) {
            *free = record;
        } else {
            storage.records[oldest] = record;
            storage.next = storage.next.wrapping_add(1);
        }
    }

    /// Notes that the socket connected to a plain address.
    #[inline(always)]
    pub(crate) fn connected_elsewhere(&self) {
        if let Some(slots) = self.slots
            && let Some(way) = slots.way_of(self.cookie)
        {
            slots.give_up(way);
        }
        self.forget_stored(|_| true);
    }

    /// Notes that the socket sent a datagram to a plain address: an answer from there is from there.
    #[inline(always)]
    pub(crate) fn sent_elsewhere(&self, peer: &Peer) {
        if let Some(slots) = self.slots
            && let Some(way) = slots.way_of(self.cookie)
            && let Some(record) = slots.record(way)
            && peer.is_endpoint_of(record)
        {
            slots.give_up(way);
        }
        self.forget_stored(|record| peer.is_endpoint_of(record));
    }

    /// The service address behind which this socket knows a peer.
    #[inline(always)]
    pub(crate) fn service_of(&self, peer: &Peer) -> Option<Peer> {
        let found =
            |record: &SocketRecord| Peer { address: record.service_address, port: record.service_port };
        if let Some(slot) = self.own_record()
            && peer.is_endpoint_of(slot)
        {
            return Some(found(slot));
        }
        let storage = self.storage()?;
        storage.records.iter().find(|record| record.cookie != 0 && peer.is_endpoint_of(record)).map(found)
    }

    #[inline(always)]
    fn forget_stored(&self, is_forgotten: impl Fn(&SocketRecord) -> bool) {
        if let Some(storage) = self.storage() {
            forget(storage, is_forgotten);
        }
    }
}

/// Gives up the slot of a socket that is being closed.
#[inline(always)]
pub(crate) fn released(ctx: &SockContext) {
    let cookie = sock_cookie(ctx);
    if let Some(slots) = Slots::of(cookie)
        && let Some(way) = slots.way_of(cookie)
    {
        slots.give_up(way);
    }
}

#[inline(always)]
fn forget(storage: &mut SocketRecords, is_forgotten: impl Fn(&SocketRecord) -> bool) {
    for record in &mut storage.records {
        if is_forgotten(record) {
            record.cookie = 0;
        }
    }
}
