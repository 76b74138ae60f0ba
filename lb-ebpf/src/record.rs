//! What a socket remembers of the services it uses, so that it sees their addresses and not the endpoints'.
//!
//! Socket storage: it is freed with the socket, found without a key, and cannot be evicted by another socket
//! (docs/decisions/0002).

use lb_common::{
    address::Octets6,
    layout::{SOCKET_RECORDS, SocketRecord, SocketRecords},
    resolve::Choice,
};

use crate::{ctx::SockAddr, maps};

/// An address and port, IPv4 in mapped form.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Address.
    pub address: Octets6,
    /// Port, host order.
    pub port: u16,
}

impl Peer {
    #[inline(always)]
    fn is_service_of(&self, record: &SocketRecord) -> bool {
        record.service_port == self.port && record.service_address == self.address
    }

    #[inline(always)]
    fn is_endpoint_of(&self, record: &SocketRecord) -> bool {
        // A free record has service port 0; without this test a peer of all zeroes would match it.
        record.endpoint_port == self.port && record.service_port != 0 && record.endpoint_address == self.address
    }
}

#[inline(always)]
fn existing<'a>(ctx: &SockAddr<'_>) -> Option<&'a mut SocketRecords> {
    // SAFETY: the storage belongs to this socket, and the kernel holds the socket's lock in all these hooks
    // (`BPF_CGROUP_RUN_SA_PROG_LOCK`; `inet_getname` locks by itself), so there is one reference at a time.
    unsafe { maps::SOCKETS.get_ptr_mut(ctx.aya()).as_mut() }
}

#[inline(always)]
fn existing_or_new<'a>(ctx: &SockAddr<'_>) -> Option<&'a mut SocketRecords> {
    // SAFETY: as above. Null only when the kernel is out of memory.
    unsafe { maps::SOCKETS.get_or_insert_ptr_mut(ctx.aya(), None).as_mut() }
}

/// The endpoint that this socket used last for a service address.
#[inline(always)]
pub fn earlier(ctx: &SockAddr<'_>, service: &Peer) -> Option<Choice> {
    for record in &existing(ctx)?.records {
        if service.is_service_of(record) {
            return Some(Choice { endpoint_id: record.endpoint_id, index: record.index });
        }
    }
    None
}

/// Notes that the socket is connected to an endpoint; forgets all else.
#[inline(always)]
pub fn connected(ctx: &SockAddr<'_>, record: &SocketRecord) {
    if let Some(socket) = existing_or_new(ctx) {
        let [first, rest @ ..] = &mut socket.records;
        *first = *record;
        for other in rest {
            other.service_port = 0;
        }
        socket.next = 1;
    }
}

/// Notes that the socket sent a datagram to an endpoint; keeps what it knows of other services.
#[inline(always)]
pub fn sent(ctx: &SockAddr<'_>, service: &Peer, record: &SocketRecord) {
    let Some(socket) = existing_or_new(ctx) else { return };
    for old in &mut socket.records {
        if service.is_service_of(old) || old.service_port == 0 {
            *old = *record;
            return;
        }
    }
    let oldest = socket.next as usize % SOCKET_RECORDS;
    socket.records[oldest] = *record;
    socket.next = socket.next.wrapping_add(1);
}

/// Notes that the socket connected to a plain address.
#[inline(always)]
pub fn connected_elsewhere(ctx: &SockAddr<'_>) {
    if let Some(socket) = existing(ctx) {
        for record in &mut socket.records {
            record.service_port = 0;
        }
    }
}

/// Notes that the socket sent a datagram to a plain address: an answer from there is from there.
#[inline(always)]
pub fn sent_elsewhere(ctx: &SockAddr<'_>, peer: &Peer) {
    if let Some(socket) = existing(ctx) {
        for record in &mut socket.records {
            if peer.is_endpoint_of(record) {
                record.service_port = 0;
            }
        }
    }
}

/// The service address behind which this socket knows a peer.
#[inline(always)]
pub fn service_of(ctx: &SockAddr<'_>, peer: &Peer) -> Option<Peer> {
    for record in &existing(ctx)?.records {
        if peer.is_endpoint_of(record) {
            return Some(Peer { address: record.service_address, port: record.service_port });
        }
    }
    None
}
