//! The hooks: read the call, resolve it, write the result back.

use aya_ebpf::{
    Global,
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_ns},
};
use aya_log_ebpf::debug;
use lb_common::{
    Caller, Verdict,
    address::{Address, Octets4, Octets6, mapped_ipv4},
    layout::{
        Affinity, AffinityKey, EndpointStats, ServiceStats, SocketRecord, frontend_flags::LEAST_CONNECTIONS,
        record_flags,
    },
    resolve::{Call, Choice, Target, resolve},
};

use crate::{
    config::{self, Mode, is_on},
    ctx::{
        ECONNREFUSED, EHOSTUNREACH, Multipath, PROCEED, Peer, REJECT, SockAddr, fail_call,
        initial_netns_cookie,
    },
    exclude::is_excluded,
    maps,
    record::Socket,
    tables::Kernel,
};

/// What kind of call a program handles.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `connect()`: the socket gets one peer.
    Connect,
    /// `sendto()`: each datagram has its own destination.
    Send,
}

#[inline(always)]
pub(crate) fn connect4<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    forward4::<M>(ctx, Kind::Connect)
}

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
    let call = Pending::<M>::new(ctx, kind, &address, ctx.peer4());
    if call.has_implicit_destination() {
        return PROCEED;
    }
    let decision = call.resolve4(address);
    call.finish(&decision, || ctx.set_ipv4(Octets4::from_mapped(&decision.address)))
}

#[inline(always)]
fn forward6<M: Mode>(ctx: &SockAddr<'_>, kind: Kind) -> i32 {
    if is_excluded() {
        return PROCEED;
    }
    let address = ctx.ipv6();
    let call = Pending::<M>::new(ctx, kind, &address, ctx.peer6());
    if call.has_implicit_destination() {
        return PROCEED;
    }
    // An IPv4-mapped destination uses the IPv4 tables and records, and is written back as mapped.
    let decision = match mapped_ipv4(&address) {
        Some(address) => call.resolve4(address),
        None => call.resolve6(address),
    };
    call.finish(&decision, || ctx.set_ipv6(decision.address))
}

/// A verdict of either family.
///
/// Every field always has a value: of an enum, LLVM reads the payload before it checks the variant, and the
/// verifier rejects a read of uninitialised stack.
struct FlatVerdict {
    kind: u32,
    /// The endpoint's address; IPv4 in mapped form.
    address: Octets6,
    port: u16,
    choice: Choice,
    service_id: u32,
    health: u32,
    /// [`record_flags::COUNTED`] if the endpoint's connections are counted.
    counted: u8,
}

impl FlatVerdict {
    const PASS: u32 = 0;
    const REFUSE: u32 = 1;
    const REDIRECT: u32 = 2;
    const UNREACHABLE: u32 = 3;

    #[inline(always)]
    fn of<A: Address>(verdict: Verdict<A>) -> Self {
        let pass = Self {
            kind: Self::PASS,
            address: Peer::NONE.address,
            port: 0,
            choice: Choice::NONE,
            service_id: 0,
            health: 0,
            counted: 0,
        };
        match verdict {
            Verdict::Pass => pass,
            // Without `bpf_set_retval` the error cannot be chosen, so the call goes to the network.
            Verdict::Unreachable if !is_on(&config::HAS_SET_RETVAL) => pass,
            Verdict::Unreachable => Self { kind: Self::UNREACHABLE, ..pass },
            Verdict::Refuse { service_id } => {
                // For kernels without `bpf_set_retval`: see `Pending::finish`.
                let mut address = Peer::NONE.address;
                if A::FAMILY == lb_common::Family::V4 {
                    address = [127, 0, 0, 1].to_mapped();
                } else {
                    address[15] = 1;
                }
                Self { kind: Self::REFUSE, address, service_id, ..pass }
            }
            Verdict::Redirect(Target { address, port, choice, service_id, health, flags, .. }) => Self {
                kind: Self::REDIRECT,
                address: address.to_mapped(),
                port,
                choice,
                service_id,
                health,
                counted: if flags & LEAST_CONNECTIONS != 0 { record_flags::COUNTED } else { 0 },
            },
        }
    }
}

/// A call in progress.
struct Pending<'a, M> {
    ctx: &'a SockAddr<'a>,
    kind: Kind,
    called: Peer,
    /// The socket's current peer, or [`Peer::NONE`].
    former: Peer,
    socket: Socket<'a, M>,
}

impl<M: Mode> Caller for Pending<'_, M> {
    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn loopback_is_node(&self) -> bool {
        if !is_on(&config::LOCALHOST_NODEPORTS) {
            return false;
        }
        let node = match config::NODE_NETNS.load() {
            0 => initial_netns_cookie(),
            cookie => cookie,
        };
        self.ctx.netns_cookie() == node
    }

    /// A `connect()` chooses anew; a datagram keeps the choice of the one before it.
    #[inline(always)]
    fn earlier_choice(&self) -> Option<Choice> {
        let earlier = match self.kind {
            Kind::Connect => Choice::NONE,
            Kind::Send => self.socket.earlier(&self.called, &self.former),
        };
        earlier.some()
    }

    #[inline(always)]
    fn client(&self) -> u32 {
        // Fibonacci hashing: cookies ascend.
        (self.ctx.netns_cookie().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        const NANOSECONDS: u64 = 1_000_000_000;
        // SAFETY: no preconditions.
        unsafe { bpf_ktime_get_ns() / NANOSECONDS }
    }

    #[inline(always)]
    fn affinity(&self, service_id: u32) -> Option<Affinity> {
        let key = &self.affinity_key(service_id);
        // SAFETY: copied out at once. An LRU element may be recycled meanwhile. The endpoint read then counts
        // only if it is in the frontend's run: at worst it is another endpoint of the same service.
        unsafe { maps::AFFINITY.get(key).copied() }
    }

    #[inline(always)]
    fn renew_affinity(&self, service_id: u32, now: u64) {
        let key = &self.affinity_key(service_id);
        if let Some(entry) = maps::AFFINITY.get_ptr_mut(key) {
            // SAFETY: one aligned word of a live element.
            unsafe { (&raw mut (*entry).last_used).write_volatile(now) };
        }
    }

    #[inline(always)]
    fn remember_affinity(&self, service_id: u32, replaces: Option<Affinity>, new: Affinity) -> u32 {
        let flags = if replaces.is_none() { BPF_NOEXIST } else { BPF_ANY };
        let key = &self.affinity_key(service_id);
        if maps::AFFINITY.insert(key, new, flags.into()).is_ok() {
            return new.endpoint_id;
        }
        // Another CPU was faster, or the kernel had no free element: then this choice stands.
        // SAFETY: as in `Self::affinity`.
        unsafe { maps::AFFINITY.get(key) }.map_or(new.endpoint_id, |standing| standing.endpoint_id)
    }
}

impl<'a, M: Mode> Pending<'a, M> {
    #[inline(always)]
    fn new<A: Address>(ctx: &'a SockAddr<'a>, kind: Kind, address: &A, former: Peer) -> Self {
        let called = Peer { address: address.to_mapped(), port: ctx.port() };
        Self { ctx, kind, called, former, socket: Socket::of(ctx) }
    }

    /// Whether the program named no destination, and the kernel filled in the peer of a connected socket.
    ///
    /// The kernel runs `sendmsg4` for a plain `send()` on an `AF_INET6` socket connected to an IPv4-mapped
    /// address (`udpv6_sendmsg`).
    #[inline(always)]
    fn has_implicit_destination(&self) -> bool {
        self.kind == Kind::Send && self.former.is(&self.called)
    }

    /// Resolves with the IPv4 tables.
    #[inline(always)]
    fn resolve4(&self, address: Octets4) -> FlatVerdict {
        let Some(protocol) = self.ctx.protocol() else { return FlatVerdict::of(Verdict::<Octets4>::Pass) };
        FlatVerdict::of(resolve(&Kernel, self, &Call { address, port: self.called.port, protocol }))
    }

    /// Resolves with the IPv6 tables.
    #[inline(always)]
    fn resolve6(&self, address: Octets6) -> FlatVerdict {
        let Some(protocol) = self.ctx.protocol() else { return FlatVerdict::of(Verdict::<Octets6>::Pass) };
        FlatVerdict::of(resolve(&Kernel, self, &Call { address, port: self.called.port, protocol }))
    }

    #[inline(always)]
    fn affinity_key(&self, service_id: u32) -> AffinityKey {
        AffinityKey { client: self.ctx.netns_cookie(), service_id, reserved: 0 }
    }

    /// Writes the verdict to the context, the socket's record and the counters.
    #[inline(always)]
    fn finish(&self, decision: &FlatVerdict, set_address: impl FnOnce()) -> i32 {
        if decision.kind == FlatVerdict::PASS {
            // A connected socket receives only from its peer, whatever it sends elsewhere.
            if self.kind == Kind::Connect || self.former.port == 0 {
                self.socket.record_plain_call(&self.called);
            }
            if let Some(socket) = self.multipath()
                && !socket.is_established()
            {
                Socket::<M>::record_plain_multipath(socket, &self.called);
            }
            return PROCEED;
        }
        let multipath = self.multipath();
        if multipath.is_some_and(Multipath::is_established) {
            return PROCEED;
        }
        if decision.kind == FlatVerdict::UNREACHABLE {
            return fail_call(EHOSTUNREACH);
        }
        if decision.kind == FlatVerdict::REFUSE {
            count_refusal(decision.service_id);
            log::<M>(self.ctx, decision.service_id, u32::MAX);
            if is_on(&config::HAS_SET_RETVAL) {
                return fail_call(ECONNREFUSED);
            }
            // Kernel users such as NFS keep the address they passed, and before 6.6 programs change it in
            // place (`kernel_connect`). They would call the changed address for ever.
            if self.ctx.is_kernel_socket() {
                return REJECT;
            }
            // Port 0 of a loopback address cannot be bound, so the kernel refuses: TCP gets a reset,
            // connected UDP port unreachable, and a datagram to port 0 fails at once with EINVAL.
        } else {
            self.note(decision, multipath);
            count(self.kind, decision);
            log::<M>(self.ctx, decision.service_id, decision.choice.endpoint_id);
        }
        set_address();
        self.ctx.set_port(decision.port);
        PROCEED
    }

    /// The multipath TCP socket whose subflow is being connected.
    #[inline(always)]
    fn multipath(&self) -> Option<Multipath> {
        if self.kind == Kind::Connect { self.ctx.multipath() } else { None }
    }

    #[inline(always)]
    fn note(&self, decision: &FlatVerdict, multipath: Option<Multipath>) {
        let Some(protocol) = self.ctx.protocol() else { return };
        #[expect(clippy::cast_possible_truncation, reason = "bounded")]
        let index = decision.choice.index.min(u16::MAX.into()) as u16;
        let record = SocketRecord {
            service_address: self.called.address,
            endpoint_address: decision.address,
            service_port: self.called.port,
            endpoint_port: decision.port,
            endpoint_id: decision.choice.endpoint_id,
            service_id: decision.service_id,
            index,
            protocol: protocol.0,
            // Without slots, no program sees the socket close.
            flags: record_flags::ANSWERS | if M::SLOTS { decision.counted } else { 0 },
        };
        match self.kind {
            Kind::Connect => {
                self.socket.record_call(&record, Some(&self.former), decision.health);
                if let Some(socket) = multipath {
                    Socket::<M>::record_multipath(socket, &record);
                }
            }
            Kind::Send if self.former.port != 0 => {}
            Kind::Send => self.socket.record_call(&record, None, 0),
        }
    }
}

/// `recvmsg()` and `getpeername()` on an `AF_INET` socket: replaces an endpoint's address by its service's.
#[inline(always)]
pub(crate) fn restore4<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    let peer = Peer { address: ctx.ipv4().to_mapped(), port: ctx.port() };
    let service = Socket::<M>::of(ctx).service_of(&peer);
    if service.port != 0 {
        ctx.set_ipv4(Octets4::from_mapped(&service.address));
        ctx.set_port(service.port);
    }
    PROCEED
}

/// `recvmsg()` and `getpeername()` on an `AF_INET6` socket.
#[inline(always)]
pub(crate) fn restore6<M: Mode>(ctx: &SockAddr<'_>) -> i32 {
    let peer = Peer { address: ctx.ipv6(), port: ctx.port() };
    let service = Socket::<M>::of(ctx).service_of(&peer);
    if service.port != 0 {
        ctx.set_ipv6(service.address);
        ctx.set_port(service.port);
    }
    PROCEED
}

/// Index of this CPU's counters of an id; `None` for an id that is not counted.
#[inline(always)]
fn place(n_counted: &Global<u32>, id: u32) -> Option<u32> {
    let n_counted = n_counted.load();
    if id >= n_counted {
        return None;
    }
    // SAFETY: the helper takes no arguments and reads no memory of the program's.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    Some(cpu * n_counted + id)
}

#[inline(always)]
fn service_stats(id: u32) -> Option<*mut ServiceStats> {
    maps::SERVICE_STATS.get_ptr_mut(place(&config::COUNTED_SERVICES, id)?)
}

#[inline(always)]
fn endpoint_stats(id: u32) -> Option<*mut EndpointStats> {
    maps::ENDPOINT_STATS.get_ptr_mut(place(&config::COUNTED_ENDPOINTS, id)?)
}

#[inline(always)]
fn count_refusal(service_id: u32) {
    if let Some(stats) = service_stats(service_id) {
        // SAFETY: this CPU's element. Preemption in between may lose a count, nothing else.
        unsafe { (*stats).refusals += 1 };
    }
}

#[inline(always)]
fn count(kind: Kind, decision: &FlatVerdict) {
    if let Some(stats) = service_stats(decision.service_id) {
        // SAFETY: as above.
        let stats = unsafe { &mut *stats };
        match kind {
            Kind::Connect => stats.connects += 1,
            Kind::Send => stats.datagrams += 1,
        }
    }
    if let Some(stats) = endpoint_stats(decision.choice.endpoint_id) {
        // SAFETY: as above.
        let stats = unsafe { &mut *stats };
        match kind {
            Kind::Connect => stats.connects += 1,
            Kind::Send => stats.datagrams += 1,
        }
    }
}

/// Writes a diagnostic line for a verdict, in programs with [`Mode::LOG`].
#[inline(always)]
fn log<M: Mode>(ctx: &SockAddr<'_>, service_id: u32, endpoint_id: u32) {
    if M::LOG {
        debug!(ctx.aya(), "port {} -> service {} endpoint {}", ctx.port(), service_id, endpoint_id);
    }
}
