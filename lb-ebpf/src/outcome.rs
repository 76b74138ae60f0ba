//! The outcome of `connect()`, which counts for the health of the endpoint.
//!
//! The kernel calls it about four times for each TCP connection below the cgroup. A connection that is no
//! call of a service costs two reads of kernel memory at its SYN, and nothing else but the calls.
//!
//! # What counts
//!
//! | event | callback | counts as |
//! | --- | --- | --- |
//! | the SYN is sent | `TCP_CONNECT` | the beginning |
//! | SYN and ACK arrive | `ACTIVE_ESTABLISHED` | established |
//! | the SYN is sent again | `RTO` in `SYN_SENT` | a failure |
//! | reset, ICMP error | `STATE` from `SYN_SENT` to `CLOSE` with an error | a failure |
//! | `close()`, `shutdown()`, `connect(AF_UNSPEC)`, the process is killed | the same without an error | nothing |

use core::hint::black_box;

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::bpf_ktime_get_ns,
};
use lb_common::{
    health::{self, Failure, Policy},
    layout::{ConnectLatency, EndpointHealth, LATENCY_BUCKETS},
};

use crate::{
    config::{self, Mode, is_on},
    ctx::{SockOps, add},
    maps,
    record::{Attempted, attempted},
};

/// `TCP_SYN_SENT`
const SYN_SENT: u32 = 2;
/// `TCP_CLOSE`
const CLOSE: u32 = 7;
/// `ETIMEDOUT`, which follows retransmissions that counted already.
const ETIMEDOUT: u32 = 110;

const CALLBACKS: u32 = BPF_SOCK_OPS_RTO_CB_FLAG | BPF_SOCK_OPS_STATE_CB_FLAG;

/// The return value has no effect: some operations read a reply, which stays the kernel's default.
#[inline(always)]
pub(crate) fn observe<M: Mode>(ctx: &SockOps) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => begin::<M>(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB if ctx.callbacks() & CALLBACKS == CALLBACKS => {
            established::<M>(ctx);
        }
        BPF_SOCK_OPS_RTO_CB if ctx.state() == SYN_SENT => failed::<M>(ctx, 0),
        BPF_SOCK_OPS_STATE_CB
            if is_on(&config::HAS_SOCK_FIELDS) && ctx.argument(0) == SYN_SENT && ctx.argument(1) == CLOSE =>
        {
            let errno = ctx.error();
            if errno != 0 && errno != ETIMEDOUT {
                failed::<M>(ctx, errno);
            }
        }
        _ => {}
    }
    1
}

/// The attempt and its policy, if the socket's connection is the recorded one.
#[inline(always)]
fn current<'a, M: Mode>(ctx: &SockOps) -> Option<(Attempted<'a>, Policy)> {
    let attempted = attempted::<M>(ctx)?;
    let policy = Policy::from_word(attempted.health)?;
    // A socket whose call failed may call a plain address next.
    attempted.is_to(&ctx.peer()).then_some((attempted, policy))
}

#[inline(always)]
fn begin<M: Mode>(ctx: &SockOps) {
    let Some((attempted, _)) = current::<M>(ctx) else { return };
    let requested = ctx.callbacks();
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    attempted.attempt.sent_at = now & !1 | u64::from(requested & CALLBACKS != 0);
    ctx.set_callbacks(requested | CALLBACKS);
}

#[inline(always)]
fn established<M: Mode>(ctx: &SockOps) {
    let Some((attempted, policy)) = current::<M>(ctx) else { return };
    // No later event of the connection is about health.
    if attempted.attempt.sent_at & 1 == 0 {
        ctx.set_callbacks(ctx.callbacks() & !CALLBACKS);
    }
    let Some(health) = maps::ENDPOINT_HEALTH.get_ptr_mut(attempted.record.endpoint_id) else { return };
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let latency = health::latency(now.wrapping_sub(attempted.attempt.sent_at));
    // SAFETY: a live array element; other programs may write at the same time, and the last one counts.
    unsafe {
        let before = health.read_volatile();
        let after = before.established(policy, attempted.attempt.netns, now);
        health.write_volatile(after.with_latency(latency));
    }
    count(attempted.record.service_id, latency);
}

/// Adds a time in microseconds to those of a service port. Not by CPU, as calls are counted: that would take
/// the memory of all other counters together, for one addition to each connection.
#[inline(always)]
fn count(service_id: u32, latency: u32) {
    let Some(times) = maps::CONNECT_LATENCY.get_ptr_mut(service_id) else { return };
    // `black_box` keeps the comparison, which the verifier needs and the compiler does not.
    let bucket = black_box(ConnectLatency::bucket(latency));
    if bucket < LATENCY_BUCKETS {
        // SAFETY: aligned words of a live array element.
        unsafe {
            add(&raw mut (*times).sum, latency.into());
            add((&raw mut (*times).buckets).cast::<u32>().add(bucket), 1);
        }
    }
}

#[inline(always)]
fn failed<M: Mode>(ctx: &SockOps, errno: u32) {
    let Some((attempted, policy)) = current::<M>(ctx) else { return };
    let Some(health) = maps::ENDPOINT_HEALTH.get_ptr_mut(attempted.record.endpoint_id) else { return };
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let failure = Failure { sent_at: attempted.attempt.sent_at, netns: attempted.attempt.netns, errno };
    // SAFETY: as above. Of failures on two CPUs at once, one may be lost.
    unsafe {
        let before: EndpointHealth = health.read_volatile();
        health.write_volatile(before.failed(policy, failure, now));
    }
}
