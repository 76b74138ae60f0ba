//! Passive health: the outcomes of `connect()` eject an endpoint that does not accept connections.
//!
//! # Purpose
//!
//! The `sock_ops` program observes each TCP connection to a service. An endpoint that does not accept
//! connections is ejected: [`crate::resolve`] prefers the others until the ejection ends. The rules are plain
//! functions over [`EndpointHealth`]; the programs apply them to the kernel's map, tests to plain values.
//!
//! # Invariants
//!
//! - An ejection ends by the clock. No agent is needed to end it.
//! - The failures of one network namespace eject an endpoint only if no other namespace has reached it
//!   within [`WITNESS`]: a pod's own egress policy does not eject for all.
//! - A SYN without an answer is a failure only if no connection was established since it was sent. So random
//!   packet loss ejects no endpoint that serves others.
//! - A program that closes its socket while it connects causes no failure (`lb_ebpf::outcome`).

use crate::layout::EndpointHealth;

/// Nanoseconds in a millisecond.
const MILLISECOND: u64 = 1_000_000;
/// Nanoseconds in a second.
const SECOND: u64 = 1000 * MILLISECOND;

/// Time without any established connection after which unanswered SYNs eject, in nanoseconds.
///
/// Longer than an accept queue is full in an ordinary burst: two seconds are no reason to eject. The third
/// transmission of a SYN leaves 2 s (kernel 6.5 and later) or 3 s after the first.
pub const SILENCE: u64 = 2200 * MILLISECOND;

/// Time for which an established connection from another network namespace vouches for an endpoint, in
/// nanoseconds.
pub const WITNESS: u64 = SECOND;

/// Time that one connection gets to show that an endpoint has recovered, in nanoseconds. Until then, other
/// calls still avoid it.
pub const TRIAL: u64 = 3 * SECOND;

/// [`EndpointHealth::failing_netns`] if connections of several network namespaces failed.
pub const SEVERAL: u64 = u64::MAX;

/// When an endpoint of a frontend is ejected, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Policy {
    /// Failures in a row that eject, 1 to [`Self::MAX_FAILURES`].
    pub failures: u32,
    /// Length of the first ejection in seconds, 1 to [`Self::MAX_SECONDS`]. The n-th in a row takes n times
    /// as long.
    pub base: u32,
    /// Longest ejection in seconds, 1 to [`Self::MAX_SECONDS`].
    pub max: u32,
}

impl Policy {
    /// The largest number of failures.
    pub const MAX_FAILURES: u32 = 0xff;
    /// The longest time in seconds: 68 minutes.
    pub const MAX_SECONDS: u32 = 0xfff;
    /// The policy of a Service without annotation.
    pub const DEFAULT: Self = Self { failures: 3, base: 10, max: 300 };

    /// The policy as [`crate::layout::Frontend::health`]: bits 0 to 7 are the failures, 8 to 19 the base, 20
    /// to 31 the maximum. Never 0.
    #[must_use]
    pub const fn to_word(self) -> u32 {
        self.failures & 0xff | (self.base & 0xfff) << 8 | (self.max & 0xfff) << 20
    }

    /// The inverse of [`Self::to_word`]; `None` for a word without failures, which means that nothing ejects.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u32) -> Option<Self> {
        let failures = word & 0xff;
        if failures == 0 {
            return None;
        }
        Some(Self { failures, base: word >> 8 & 0xfff, max: word >> 20 })
    }

    /// Length of the n-th ejection in a row, in nanoseconds.
    #[inline(always)]
    const fn length(self, n: u32) -> u64 {
        let (seconds, max) = (self.base as u64 * n as u64, self.max as u64);
        SECOND * if seconds < max { seconds } else { max }
    }
}

/// The time from a SYN to established in microseconds: 1 to 268 seconds.
#[inline(always)]
#[must_use]
pub fn latency(nanoseconds: u64) -> u32 {
    (nanoseconds / 1000).clamp(1, 0x0fff_ffff) as u32
}

/// Whether a call may choose an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Admission {
    /// It is not ejected.
    Open,
    /// Its ejection has ended: this call shows whether it has recovered. The caller stores the time in
    /// [`EndpointHealth::tried_at`].
    Trial,
    /// It is ejected, or another call is on trial.
    Ejected,
}

/// A connection that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// When its SYN was first sent.
    pub sent_at: u64,
    /// Cookie of the caller's network namespace.
    pub netns: u64,
    /// The error that ended it (`errno`); 0 for a SYN that is retransmitted.
    pub errno: u32,
}

/// All times are nanoseconds of `CLOCK_MONOTONIC`.
impl EndpointHealth {
    /// Whether a call may choose the endpoint.
    #[inline(always)]
    #[must_use]
    pub fn admission(&self, now: u64) -> Admission {
        if self.ejected_until == 0 {
            Admission::Open
        } else if now < self.ejected_until
            || (self.tried_at >= self.ejected_until && now.wrapping_sub(self.tried_at) < TRIAL)
        {
            Admission::Ejected
        } else {
            Admission::Trial
        }
    }

    /// 1 if calls avoid the endpoint at a time, else 0: [`Admission::Ejected`], without a branch. For times
    /// below 2^63, as all are.
    #[inline(always)]
    #[must_use]
    pub fn is_avoided(&self, now: u64) -> u64 {
        let is_less = |a: u64, b: u64| core::hint::black_box(a.wrapping_sub(b)) >> 63;
        let is_on_trial = (is_less(self.tried_at, self.ejected_until) ^ 1)
            & is_less(now.wrapping_sub(self.tried_at), TRIAL);
        is_less(0, self.ejected_until) & (is_less(now, self.ejected_until) | is_on_trial)
    }

    /// Seconds until the ejection ends, rounded up: 0 from then until a connection is established. `None` if
    /// it is not ejected.
    #[must_use]
    pub const fn ejected_seconds(&self, now: u64) -> Option<u64> {
        if self.ejected_until == 0 {
            return None;
        }
        Some(self.ejected_until.saturating_sub(now).div_ceil(SECOND))
    }

    /// The state after a connection was established.
    ///
    /// It ends an ejection: whatever failed before, the endpoint accepts connections.
    #[inline(always)]
    #[must_use]
    pub fn established(self, policy: Policy, netns: u64, now: u64) -> Self {
        // The next ejection is the first one of a row if the last trial is as long ago as the longest
        // ejection.
        let is_settled = now.wrapping_sub(self.tried_at) >= policy.length(u32::MAX);
        Self {
            ejected_until: 0,
            failures: 0,
            failing_netns: 0,
            reached_at: now,
            reached_netns: netns,
            ejections: if is_settled { 0 } else { self.ejections },
            ..self
        }
    }

    /// The state after a connection took a time from its SYN to established, in microseconds.
    #[inline(always)]
    #[must_use]
    pub fn with_latency(self, microseconds: u32) -> Self {
        let latency = if self.latency == 0 {
            microseconds
        } else {
            ((self.latency & 0x0fff_ffff) * 7 + microseconds) / 8
        };
        Self { latency: latency.max(1), ..self }
    }

    /// The state after a failure. A caller that finds another [`Self::ejected_until`] than before has ejected
    /// the endpoint.
    #[inline(always)]
    #[must_use]
    pub fn failed(self, policy: Policy, failure: Failure, now: u64) -> Self {
        let Failure { sent_at, netns, errno } = failure;
        // A call from before the end of the ejection is part of its cause, whenever it fails.
        let is_known = sent_at < self.ejected_until || sent_at <= self.reached_at && errno == 0;
        if is_known {
            return self;
        }
        let is_first = self.failures == 0;
        let failing_netns = if is_first || self.failing_netns == netns { netns } else { SEVERAL };
        let failing_since = if is_first { sent_at } else { self.failing_since };
        let failures = self.failures.saturating_add(1);
        let next = Self { failing_since, failing_netns, failures, errno, ..self };
        // The trial failed: it needs no further witness.
        let is_trial = self.ejected_until != 0;
        let is_silent = errno != 0 || now.wrapping_sub(failing_since) >= SILENCE;
        let is_vouched_for = failing_netns != SEVERAL
            && self.reached_netns != netns
            && now.wrapping_sub(self.reached_at) < WITNESS;
        if !is_trial && (failures < policy.failures || !is_silent || is_vouched_for) {
            return next;
        }
        let ejections = self.ejections.saturating_add(1);
        Self { ejections, ejected_until: now.wrapping_add(policy.length(ejections)), ..next }
    }
}

#[cfg(test)]
mod tests;
