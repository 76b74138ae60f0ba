//! What each hook does: read the call, decide, write the result back.

use aya_log_ebpf::debug;
use lb_common::{
    Verdict,
    address::{Address, Octets4, Octets6, mapped_ipv4},
    layout::SocketRecord,
    resolve::{Call, Choice, Target, resolve},
};

use crate::{
    config::{self, is_on},
    ctx::{PROCEED, SockAddr},
    maps,
    record::{self, Peer},
    tables::{Kernel4, Kernel6},
};

/// What kind of call a program handles.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `connect()`: the socket gets one peer.
    Connect,
    /// `sendto()`: each datagram has its own destination.
    Send,
}

/// `connect()` on an `AF_INET` socket.
#[inline(always)]
pub(crate) fn connect4<const SLOTS: bool>(ctx: &SockAddr<'_>) -> i32 {
    forward4::<SLOTS>(ctx, Kind::Connect)
}

/// `sendto()` on an `AF_INET` socket.
#[inline(always)]
pub(crate) fn sendmsg4<const SLOTS: bool>(ctx: &SockAddr<'_>) -> i32 {
    forward4::<SLOTS>(ctx, Kind::Send)
}

/// `connect()` on an `AF_INET6` socket, also to an IPv4 peer.
#[inline(always)]
pub(crate) fn connect6<const SLOTS: bool>(ctx: &SockAddr<'_>) -> i32 {
    forward6::<SLOTS>(ctx, Kind::Connect)
}

/// `sendto()` on an `AF_INET6` socket, also to an IPv4 peer.
#[inline(always)]
pub(crate) fn sendmsg6<const SLOTS: bool>(ctx: &SockAddr<'_>) -> i32 {
    forward6::<SLOTS>(ctx, Kind::Send)
}

#[inline(always)]
fn forward4<const SLOTS: bool>(ctx: &SockAddr<'_>, kind: Kind) -> i32 {
    let address = ctx.ipv4();
    let verdict = decide4::<SLOTS>(ctx, kind, address);
    finish::<_, SLOTS>(ctx, kind, address, verdict, |target| ctx.set_ipv4(target))
}

#[inline(always)]
fn forward6<const SLOTS: bool>(ctx: &SockAddr<'_>, kind: Kind) -> i32 {
    let address = ctx.ipv6();
    // An IPv4-mapped destination is an IPv4 call: the same tables, the same records, written back as mapped.
    if let Some(address) = mapped_ipv4(&address) {
        let verdict = decide4::<SLOTS>(ctx, kind, address);
        finish::<_, SLOTS>(ctx, kind, address, verdict, |target| ctx.set_ipv6(target.to_mapped()))
    } else {
        let verdict = decide6::<SLOTS>(ctx, kind, address);
        finish::<_, SLOTS>(ctx, kind, address, verdict, |target| ctx.set_ipv6(target))
    }
}

/// Runs the decision on the IPv4 tables.
#[inline(always)]
fn decide4<const SLOTS: bool>(ctx: &SockAddr<'_>, kind: Kind, address: Octets4) -> Verdict<Octets4> {
    let Some(protocol) = ctx.protocol() else { return Verdict::Pass };
    let port = ctx.port();
    let earlier = earlier::<_, SLOTS>(ctx, kind, address, port);
    resolve(&Kernel4 { ctx, earlier }, &Call { address, port, protocol })
}

/// Runs the decision on the IPv6 tables.
#[inline(always)]
fn decide6<const SLOTS: bool>(ctx: &SockAddr<'_>, kind: Kind, address: Octets6) -> Verdict<Octets6> {
    let Some(protocol) = ctx.protocol() else { return Verdict::Pass };
    let port = ctx.port();
    let earlier = earlier::<_, SLOTS>(ctx, kind, address, port);
    resolve(&Kernel6 { ctx, earlier }, &Call { address, port, protocol })
}

/// A `connect()` chooses anew; a datagram follows the one before it.
#[inline(always)]
fn earlier<A: Address, const SLOTS: bool>(ctx: &SockAddr<'_>, kind: Kind, address: A, port: u16) -> Option<Choice> {
    match kind {
        Kind::Connect => None,
        Kind::Send => record::earlier::<SLOTS>(ctx, &Peer { address: address.to_mapped(), port }),
    }
}

/// Writes the verdict into the context, the socket's record and the counters.
#[inline(always)]
fn finish<A: Address, const SLOTS: bool>(
    ctx: &SockAddr<'_>,
    kind: Kind,
    address: A,
    verdict: Verdict<A>,
    set_address: impl FnOnce(A),
) -> i32 {
    let port = ctx.port();
    let called = Peer { address: address.to_mapped(), port };
    match verdict {
        Verdict::Pass => {
            match kind {
                Kind::Connect => record::connected_elsewhere::<SLOTS>(ctx),
                // A connected socket hears its peer only, so that its record is that of its `connect()`.
                Kind::Send if ctx.is_connected() => {}
                Kind::Send => record::sent_elsewhere::<SLOTS>(ctx, &called),
            }
            PROCEED
        }
        Verdict::Refuse { service_id } => {
            count_refusal(service_id);
            log(ctx, service_id, u32::MAX);
            refuse(ctx, set_address)
        }
        Verdict::Redirect(target) => {
            let record = SocketRecord {
                cookie: ctx.cookie(),
                service_address: called.address,
                endpoint_address: target.address.to_mapped(),
                service_port: called.port,
                endpoint_port: target.port,
                endpoint_id: target.choice.endpoint_id,
                index: target.choice.index,
                service_id: target.service_id,
                reserved: 0,
            };
            match kind {
                Kind::Connect => record::connected::<SLOTS>(ctx, &record),
                Kind::Send if ctx.is_connected() => {}
                Kind::Send => record::sent::<SLOTS>(ctx, &called, &record),
            }
            count(kind, &target);
            log(ctx, target.service_id, target.choice.endpoint_id);
            set_address(target.address);
            ctx.set_port(target.port);
            PROCEED
        }
    }
}

/// Fails the call with `ECONNREFUSED`, or on kernels that cannot, sends it where nobody listens.
#[inline(always)]
fn refuse<A: Address>(ctx: &SockAddr<'_>, set_address: impl FnOnce(A)) -> i32 {
    if is_on(&config::HAS_SET_RETVAL) {
        return ctx.refuse();
    }
    // Port 0 of a loopback address cannot be bound, so the kernel itself answers: TCP with a reset, connected UDP
    // with port unreachable; a datagram to port 0 fails at once with EINVAL.
    let mut loopback = [0; 16];
    if A::FAMILY == lb_common::Family::V4 {
        loopback = [127, 0, 0, 1].to_mapped();
    } else {
        loopback[15] = 1;
    }
    set_address(A::from_mapped(&loopback));
    ctx.set_port(0);
    PROCEED
}

/// `recvmsg()` and `getpeername()` on an `AF_INET` socket: shows the service address for an endpoint's.
#[inline(always)]
pub(crate) fn restore4<const SLOTS: bool>(ctx: &SockAddr<'_>) -> i32 {
    let peer = Peer { address: ctx.ipv4().to_mapped(), port: ctx.port() };
    if let Some(service) = record::service_of::<SLOTS>(ctx, &peer) {
        ctx.set_ipv4(Octets4::from_mapped(&service.address));
        ctx.set_port(service.port);
    }
    PROCEED
}

/// `recvmsg()` and `getpeername()` on an `AF_INET6` socket.
#[inline(always)]
pub(crate) fn restore6<const SLOTS: bool>(ctx: &SockAddr<'_>) -> i32 {
    let peer = Peer { address: ctx.ipv6(), port: ctx.port() };
    if let Some(service) = record::service_of::<SLOTS>(ctx, &peer) {
        ctx.set_ipv6(service.address);
        ctx.set_port(service.port);
    }
    PROCEED
}

#[inline(always)]
fn count_refusal(service_id: u32) {
    if let Some(stats) = maps::SERVICE_STATS.get_ptr_mut(service_id) {
        // SAFETY: this CPU's element. A program that is preempted in between may lose a count, nothing else.
        unsafe { (*stats).refusals += 1 };
    }
}

#[inline(always)]
fn count<A>(kind: Kind, target: &Target<A>) {
    if let Some(stats) = maps::SERVICE_STATS.get_ptr_mut(target.service_id) {
        // SAFETY: as above.
        match kind {
            Kind::Connect => unsafe { (*stats).connects += 1 },
            Kind::Send => unsafe { (*stats).datagrams += 1 },
        }
    }
    if let Some(stats) = maps::ENDPOINT_STATS.get_ptr_mut(target.choice.endpoint_id) {
        // SAFETY: as above.
        match kind {
            Kind::Connect => unsafe { (*stats).connects += 1 },
            Kind::Send => unsafe { (*stats).datagrams += 1 },
        }
    }
}

/// One diagnostic line for a decision, if the global `LOG` was set at load time.
#[inline(always)]
fn log(ctx: &SockAddr<'_>, service_id: u32, endpoint_id: u32) {
    if is_on(&config::LOG) {
        debug!(ctx.aya(), "port {} -> service {} endpoint {}", ctx.port(), service_id, endpoint_id);
    }
}
