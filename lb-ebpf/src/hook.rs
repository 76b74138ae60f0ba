//! What each hook does: read the call, decide, write the result back.

use aya_log_ebpf::debug;
use lb_common::{
    Verdict,
    address::{Address, Octets4, Octets6, mapped_ipv4},
    layout::SocketRecord,
    resolve::{Call, Choice, Target, resolve},
};

use crate::{
    config::{self, Mode, is_on},
    ctx::{PROCEED, SockAddr, refuse_call},
    exclude::is_excluded,
    maps,
    record::{Peer, Socket},
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
pub(crate) fn connect4<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    forward4::<M>(ctx, Kind::Connect)
}

/// `sendto()` on an `AF_INET` socket.
#[inline(always)]
pub(crate) fn sendmsg4<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    forward4::<M>(ctx, Kind::Send)
}

/// `connect()` on an `AF_INET6` socket, also to an IPv4 peer.
#[inline(always)]
pub(crate) fn connect6<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    forward6::<M>(ctx, Kind::Connect)
}

/// `sendto()` on an `AF_INET6` socket, also to an IPv4 peer.
#[inline(always)]
pub(crate) fn sendmsg6<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    forward6::<M>(ctx, Kind::Send)
}

#[inline(always)]
fn forward4<M: Mode>(ctx: &SockAddr<'_>, kind: Kind) -> i32 {
    if is_excluded() {
        return PROCEED;
    }
    let address = ctx.ipv4();
    let mut call = Pending::<M>::new(ctx, kind, &address);
    let verdict = call.decide4(address);
    call.finish(verdict, |target| ctx.set_ipv4(target))
}

#[inline(always)]
fn forward6<M: Mode>(ctx: &SockAddr<'_>, kind: Kind) -> i32 {
    if is_excluded() {
        return PROCEED;
    }
    let address = ctx.ipv6();
    let mut call = Pending::<M>::new(ctx, kind, &address);
    // An IPv4-mapped destination is an IPv4 call: the same tables, the same records, written back as mapped.
    if let Some(address) = mapped_ipv4(&address) {
        let verdict = call.decide4(address);
        call.finish(verdict, |target| ctx.set_ipv6(target.to_mapped()))
    } else {
        let verdict = call.decide6(address);
        call.finish(verdict, |target| ctx.set_ipv6(target))
    }
}

/// A call whose destination is to be decided.
struct Pending<'a, M> {
    ctx: &'a SockAddr<'a>,
    kind: Kind,
    called: Peer,
    socket: Socket<'a, M>,
}

impl<'a, M: Mode> Pending<'a, M> {
    #[inline(always)]
    fn new<A: Address>(ctx: &'a SockAddr<'a>, kind: Kind, address: &A) -> Self {
        Self {
            ctx,
            kind,
            called: Peer { address: address.to_mapped(), port: ctx.port() },
            socket: Socket::of(ctx),
        }
    }

    /// Runs the decision on the IPv4 tables.
    #[inline(always)]
    fn decide4(&mut self, address: Octets4) -> Verdict<Octets4> {
        let Some(protocol) = self.ctx.protocol() else { return Verdict::Pass };
        let tables = Kernel4 { ctx: self.ctx, earlier: self.earlier() };
        resolve(&tables, &Call { address, port: self.called.port, protocol })
    }

    /// Runs the decision on the IPv6 tables.
    #[inline(always)]
    fn decide6(&mut self, address: Octets6) -> Verdict<Octets6> {
        let Some(protocol) = self.ctx.protocol() else { return Verdict::Pass };
        let tables = Kernel6 { ctx: self.ctx, earlier: self.earlier() };
        resolve(&tables, &Call { address, port: self.called.port, protocol })
    }

    /// A `connect()` chooses anew; a datagram follows the one before it.
    #[inline(always)]
    fn earlier(&mut self) -> Choice {
        match self.kind {
            Kind::Connect => Choice::NONE,
            Kind::Send => self.socket.earlier(&self.called),
        }
    }

    /// Writes the verdict into the context, the socket's record and the counters.
    #[inline(always)]
    fn finish<A: Address>(&mut self, verdict: Verdict<A>, set_address: impl FnOnce(A)) -> i32 {
        match verdict {
            Verdict::Pass => {
                match self.kind {
                    Kind::Connect => self.socket.connected_elsewhere(),
                    // A connected socket hears its peer only, so that its record is that of its `connect()`.
                    Kind::Send if self.ctx.is_connected() => {}
                    Kind::Send => self.socket.sent_elsewhere(&self.called),
                }
                PROCEED
            }
            Verdict::Refuse { service_id } => {
                count_refusal(service_id);
                log::<M>(self.ctx, service_id, u32::MAX);
                refuse(self.ctx, set_address)
            }
            Verdict::Redirect(target) => {
                let record = SocketRecord {
                    service_address: self.called.address,
                    endpoint_address: target.address.to_mapped(),
                    service_port: self.called.port,
                    endpoint_port: target.port,
                    endpoint_id: target.choice.endpoint_id,
                    index: target.choice.index,
                    service_id: target.service_id,
                    ..SocketRecord::default()
                };
                match self.kind {
                    Kind::Connect => self.socket.connected(&record),
                    Kind::Send if self.ctx.is_connected() => {}
                    Kind::Send => self.socket.sent(&self.called, &record),
                }
                count(self.kind, &target);
                log::<M>(self.ctx, target.service_id, target.choice.endpoint_id);
                set_address(target.address);
                self.ctx.set_port(target.port);
                PROCEED
            }
        }
    }
}

/// Fails the call with `ECONNREFUSED`, or on kernels that cannot, sends it where nobody listens.
#[inline(always)]
fn refuse<A: Address>(ctx: &SockAddr<'_>, set_address: impl FnOnce(A)) -> i32 {
    if is_on(&config::HAS_SET_RETVAL) {
        return refuse_call();
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
pub(crate) fn restore4<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    let peer = Peer { address: ctx.ipv4().to_mapped(), port: ctx.port() };
    if let Some(service) = Socket::<M>::of(ctx).service_of(&peer) {
        ctx.set_ipv4(Octets4::from_mapped(&service.address));
        ctx.set_port(service.port);
    }
    PROCEED
}

/// `recvmsg()` and `getpeername()` on an `AF_INET6` socket.
#[inline(always)]
pub(crate) fn restore6<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    let peer = Peer { address: ctx.ipv6(), port: ctx.port() };
    if let Some(service) = Socket::<M>::of(ctx).service_of(&peer) {
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
        let stats = unsafe { &mut *stats };
        match kind {
            Kind::Connect => stats.connects += 1,
            Kind::Send => stats.datagrams += 1,
        }
    }
    if let Some(stats) = maps::ENDPOINT_STATS.get_ptr_mut(target.choice.endpoint_id) {
        // SAFETY: as above.
        let stats = unsafe { &mut *stats };
        match kind {
            Kind::Connect => stats.connects += 1,
            Kind::Send => stats.datagrams += 1,
        }
    }
}

/// One diagnostic line for a decision, in the programs that write any.
#[inline(always)]
fn log<M: Mode>(ctx: &SockAddr<'_>, service_id: u32, endpoint_id: u32) {
    if M::LOG {
        debug!(ctx.aya(), "port {} -> service {} endpoint {}", ctx.port(), service_id, endpoint_id);
    }
}
