//! What a socket remembers of the services it uses, so that it sees their addresses and not the endpoints'.
//!
//! A record lives in one of two homes (docs/decisions/0002 has the measurements):
//!
//! - a **slot** of the array `sockets`, found by the low bits of the socket's cookie, owned by the cookie in it, and
//!   given up when the socket is closed. Ten times cheaper to take than
//! - **socket storage**, for a socket whose slots belong to other live sockets, for the second and later services of
//!   an unconnected socket, and for everything on kernels without compare-and-swap. The kernel frees it with the
//!   socket.
//!
//! Neither evicts the record of another socket. The kernel holds the socket's lock in all hooks that come here
//! (`BPF_CGROUP_RUN_SA_PROG_LOCK`; `inet_getname` locks by itself), so that a socket's own records have one reader or
//! writer at a time; between sockets the cookie decides.
//!
//! `SLOTS` is whether slots are in use at all.

use aya_ebpf::programs::SockContext;
use lb_common::{
    address::Octets6,
    layout::{SOCKET_RECORDS, SocketRecord, SocketRecords},
    limits::{SLOT_WAYS, SOCKET_SLOTS},
    resolve::Choice,
};

use crate::{
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

/// The slots that a socket with this cookie may own.
#[inline(always)]
fn slots(cookie: u64) -> [Option<*mut SocketRecord>; SLOT_WAYS as usize] {
    const SETS: u32 = SOCKET_SLOTS / SLOT_WAYS;
    #[expect(clippy::cast_possible_truncation, reason = "the low bits are what is wanted")]
    let first = (cookie as u32 & (SETS - 1)) * SLOT_WAYS;
    [maps::SOCKETS.get_ptr_mut(first), maps::SOCKETS.get_ptr_mut(first + 1)]
}

/// The slot that belongs to a socket, if it has one.
#[inline(always)]
fn own_slot<'a>(cookie: u64) -> Option<&'a mut SocketRecord> {
    for slot in slots(cookie) {
        let slot = slot?;
        // SAFETY: a live array element. Only its owner goes on beyond the cookie, which is one word.
        unsafe {
            if (&raw const (*slot).cookie).read_volatile() == cookie {
                return Some(&mut *slot);
            }
        }
    }
    None
}

/// The slot that belongs to a socket, taking one if need be. `None` if others own all that it may have.
#[inline(always)]
fn own_or_take_slot<'a>(cookie: u64) -> Option<&'a mut SocketRecord> {
    if let Some(slot) = own_slot(cookie) {
        return Some(slot);
    }
    for slot in slots(cookie) {
        let slot = slot?;
        // SAFETY: as above. Nobody owns a slot with cookie 0, so taking it takes the whole record.
        unsafe {
            let owner = &raw mut (*slot).cookie;
            if owner.read_volatile() == 0 && compare_and_swap(owner, 0, cookie) {
                return Some(&mut *slot);
            }
        }
    }
    None
}

/// The socket's storage, if it has any. Asks nobody while no socket has: `socket_spills` counts them.
#[inline(always)]
fn storage<'a, const SLOTS: bool>(ctx: &SockAddr<'_>) -> Option<&'a mut SocketRecords> {
    if SLOTS && *maps::SOCKET_SPILLS.get(0)? == 0 {
        return None;
    }
    // SAFETY: the storage belongs to this socket, which is locked.
    unsafe { maps::SOCKET_STORAGE.get_ptr_mut(ctx.aya()).as_mut() }
}

/// The socket's storage, made if need be. `None` only when the kernel is out of memory.
#[inline(always)]
fn storage_or_new<'a, const SLOTS: bool>(ctx: &SockAddr<'_>) -> Option<&'a mut SocketRecords> {
    if let Some(storage) = storage::<SLOTS>(ctx) {
        return Some(storage);
    }
    if SLOTS && let Some(spills) = maps::SOCKET_SPILLS.get_ptr_mut(0) {
        // SAFETY: one word. Two CPUs at once may count one instead of two; it never goes back to 0.
        unsafe { spills.write_volatile(spills.read_volatile() + 1) };
    }
    // SAFETY: as above.
    unsafe { maps::SOCKET_STORAGE.get_or_insert_ptr_mut(ctx.aya(), None).as_mut() }
}

/// The endpoint that this socket used last for a service address.
#[inline(always)]
pub(crate) fn earlier<const SLOTS: bool>(ctx: &SockAddr<'_>, service: &Peer) -> Option<Choice> {
    let found = |record: &SocketRecord| Choice { endpoint_id: record.endpoint_id, index: record.index };
    if SLOTS
        && let Some(slot) = own_slot(ctx.cookie())
        && service.is_service_of(slot)
    {
        return Some(found(slot));
    }
    let storage = storage::<SLOTS>(ctx)?;
    for record in &storage.records {
        if record.cookie != 0 && service.is_service_of(record) {
            return Some(found(record));
        }
    }
    None
}

/// Notes that the socket is connected to an endpoint; forgets all else.
#[inline(always)]
pub(crate) fn connected<const SLOTS: bool>(ctx: &SockAddr<'_>, record: &SocketRecord) {
    if SLOTS && let Some(slot) = own_or_take_slot(record.cookie) {
        *slot = *record;
        if let Some(storage) = storage::<SLOTS>(ctx) {
            forget_all(storage);
        }
    } else if let Some(storage) = storage_or_new::<SLOTS>(ctx) {
        forget_all(storage);
        storage.records[0] = *record;
        storage.next = 1;
    }
}

/// Notes that the socket sent a datagram to an endpoint; keeps what it knows of other services.
///
/// An answer from an endpoint that stands behind two services of the socket is taken for one from the service asked
/// last.
#[inline(always)]
pub(crate) fn sent<const SLOTS: bool>(ctx: &SockAddr<'_>, service: &Peer, record: &SocketRecord) {
    let answerer = Peer { address: record.endpoint_address, port: record.endpoint_port };
    let is_replaced = |old: &SocketRecord| service.is_service_of(old) || answerer.is_endpoint_of(old);
    if SLOTS {
        let owned = own_slot(record.cookie);
        let replaced = owned.as_deref().is_none_or(is_replaced);
        let slot = if owned.is_some() { owned } else { own_or_take_slot(record.cookie) };
        if replaced && let Some(slot) = slot {
            *slot = *record;
            if let Some(storage) = storage::<SLOTS>(ctx) {
                forget_if(storage, is_replaced);
            }
            return;
        }
    }
    let Some(storage) = storage_or_new::<SLOTS>(ctx) else { return };
    forget_if(storage, is_replaced);
    for old in &mut storage.records {
        if old.cookie == 0 {
            *old = *record;
            return;
        }
    }
    let oldest = storage.next as usize % SOCKET_RECORDS;
    storage.records[oldest] = *record;
    storage.next = storage.next.wrapping_add(1);
}

/// Notes that the socket connected to a plain address.
#[inline(always)]
pub(crate) fn connected_elsewhere<const SLOTS: bool>(ctx: &SockAddr<'_>) {
    if SLOTS && let Some(slot) = own_slot(ctx.cookie()) {
        slot.cookie = 0;
    }
    if let Some(storage) = storage::<SLOTS>(ctx) {
        forget_all(storage);
    }
}

/// Notes that the socket sent a datagram to a plain address: an answer from there is from there.
#[inline(always)]
pub(crate) fn sent_elsewhere<const SLOTS: bool>(ctx: &SockAddr<'_>, peer: &Peer) {
    if SLOTS
        && let Some(slot) = own_slot(ctx.cookie())
        && peer.is_endpoint_of(slot)
    {
        slot.cookie = 0;
    }
    if let Some(storage) = storage::<SLOTS>(ctx) {
        forget_if(storage, |record| peer.is_endpoint_of(record));
    }
}

/// The service address behind which this socket knows a peer.
#[inline(always)]
pub(crate) fn service_of<const SLOTS: bool>(ctx: &SockAddr<'_>, peer: &Peer) -> Option<Peer> {
    let found = |record: &SocketRecord| Peer { address: record.service_address, port: record.service_port };
    if SLOTS
        && let Some(slot) = own_slot(ctx.cookie())
        && peer.is_endpoint_of(slot)
    {
        return Some(found(slot));
    }
    let storage = storage::<SLOTS>(ctx)?;
    for record in &storage.records {
        if record.cookie != 0 && peer.is_endpoint_of(record) {
            return Some(found(record));
        }
    }
    None
}

/// Gives up the slot of a socket that is being closed.
#[inline(always)]
pub(crate) fn released(ctx: &SockContext) {
    if let Some(slot) = own_slot(sock_cookie(ctx)) {
        // SAFETY: one aligned word of a live element, which belongs to this socket.
        unsafe { (&raw mut slot.cookie).write_volatile(0) };
    }
}

#[inline(always)]
fn forget_all(storage: &mut SocketRecords) {
    forget_if(storage, |_| true);
}

#[inline(always)]
fn forget_if(storage: &mut SocketRecords, is_forgotten: impl Fn(&SocketRecord) -> bool) {
    for record in &mut storage.records {
        if is_forgotten(record) {
            record.cookie = 0;
        }
    }
}
