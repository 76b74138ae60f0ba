//! The kernel's maps as [`lb_common::Tables`].

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns},
};
use lb_common::{
    Tables,
    address::{Address, Octets4, Octets6},
    layout::{
        AddressKey, Affinity, AffinityKey, Endpoint4, Endpoint6, Frontend, FrontendKey4, FrontendKey6, Run,
    },
    limits::MAX_SERVICE_CIDRS,
    resolve::{Choice, NodeAddress},
};

use crate::{
    config::{self, is_on},
    ctx::{SockAddr, initial_netns_cookie},
    maps,
};

/// Provides a socket's record of the destination.
pub(crate) trait Memory {
    /// The endpoint that the socket uses for the destination, or [`Choice::NONE`].
    fn earlier(&self) -> Choice;
}

/// The tables of IPv4, for one call of one socket.
pub(crate) struct Kernel4<'a, E> {
    pub(crate) ctx: &'a SockAddr<'a>,
    /// Read only for a destination that is a frontend.
    pub(crate) memory: &'a E,
}

/// The tables of IPv6, for one call of one socket.
pub(crate) struct Kernel6<'a, E> {
    pub(crate) ctx: &'a SockAddr<'a>,
    /// Read only for a destination that is a frontend.
    pub(crate) memory: &'a E,
}

#[inline(always)]
fn frontend(frontend_id: u32) -> Option<Frontend> {
    let entry = maps::FRONTENDS_MAP.get_ptr(frontend_id)?;
    #[expect(clippy::cast_ptr_alignment, reason = "array elements are 8-aligned, and the run comes first")]
    let run = entry.cast::<u64>();
    // SAFETY: the pointer is to a live array element, 8-aligned. User space changes its words at any time,
    // hence volatile. The run is one word, so offset and length belong together.
    unsafe {
        Some(Frontend {
            run: Run::from_word(run.read_volatile()),
            service_id: (&raw const (*entry).service_id).read_volatile(),
            affinity_seconds: (&raw const (*entry).affinity_seconds).read_volatile(),
            flags: (&raw const (*entry).flags).read_volatile(),
            reserved: 0,
        })
    }
}

#[inline(always)]
fn node_address(mapped: &Octets6) -> Option<NodeAddress> {
    // SAFETY: the value is copied out at once. The agent waits for a grace period between deleting an entry
    // and inserting another, so the element is not recycled during this read.
    let found = unsafe { maps::NODE_ADDRS.get(AddressKey { address: *mapped })? };
    Some(if found.own == 0 { NodeAddress::Other } else { NodeAddress::Own })
}

#[inline(always)]
fn cluster_ip(mapped: &Octets6) -> Option<bool> {
    // SAFETY: as above.
    let found = unsafe { maps::CLUSTER_IPS.get(AddressKey { address: *mapped })? };
    Some(found.served != 0)
}

#[inline(always)]
fn loopback_is_node(ctx: &SockAddr<'_>) -> bool {
    if !is_on(&config::LOCALHOST_NODEPORTS) {
        return false;
    }
    let node = match config::NODE_NETNS.load() {
        0 => initial_netns_cookie(),
        cookie => cookie,
    };
    ctx.netns_cookie() == node
}

#[inline(always)]
fn now() -> u64 {
    const NANOSECONDS: u64 = 1_000_000_000;
    // SAFETY: no preconditions.
    unsafe { bpf_ktime_get_ns() / NANOSECONDS }
}

#[inline(always)]
fn affinity_key(ctx: &SockAddr<'_>, service_id: u32) -> AffinityKey {
    AffinityKey { client: ctx.netns_cookie(), service_id, reserved: 0 }
}

#[inline(always)]
fn affinity(key: &AffinityKey) -> Option<Affinity> {
    // SAFETY: copied out at once. An LRU element may be recycled meanwhile. The endpoint read then counts
    // only if it is in the frontend's run: at worst it is another endpoint of the same service.
    unsafe { maps::AFFINITY.get(key).copied() }
}

#[inline(always)]
fn renew_affinity(key: &AffinityKey, now: u64) {
    if let Some(entry) = maps::AFFINITY.get_ptr_mut(key) {
        // SAFETY: one aligned word of a live element.
        unsafe { (&raw mut (*entry).last_used).write_volatile(now) };
    }
}

#[inline(always)]
fn remember_affinity(key: &AffinityKey, replaces: Option<Affinity>, new: Affinity) -> u32 {
    let flags = if replaces.is_none() { BPF_NOEXIST } else { BPF_ANY };
    if maps::AFFINITY.insert(key, new, flags.into()).is_ok() {
        return new.endpoint_id;
    }
    // Another CPU was faster, or the kernel had no free element: then this choice stands.
    affinity(key).map_or(new.endpoint_id, |standing| standing.endpoint_id)
}

macro_rules! kernel_tables {
    ($tables:ident, $octets:ty, $key:ty, $entry:ty, $services:ident, $endpoints:ident, $number:ident,
        $networks:ident) => {
        impl<E: Memory> Tables for $tables<'_, E> {
            type Addr = $octets;

            #[inline(always)]
            fn frontend_id(&self, key: &$key) -> Option<u32> {
                // SAFETY: the value is immutable while its key exists, and the agent waits for a grace period
                // before it reuses a deleted element.
                Some(unsafe { maps::$services.get(key)?.frontend_id })
            }
            #[inline(always)]
            fn frontend(&self, frontend_id: u32) -> Option<Frontend> {
                frontend(frontend_id)
            }
            #[inline(always)]
            fn endpoint(&self, index: u32) -> Option<$entry> {
                maps::$endpoints.get(index).copied()
            }
            #[inline(always)]
            fn node_ports(&self) -> (u16, u16) {
                (config::NODE_PORT_FIRST.load(), config::NODE_PORT_LAST.load())
            }
            #[inline(always)]
            fn node_address(&self, mapped: &Octets6) -> Option<NodeAddress> {
                node_address(mapped)
            }
            #[inline(always)]
            fn is_in_service_network(&self, address: &$octets) -> bool {
                let Some(networks) = maps::SERVICE_CIDRS.get_ptr(0) else { return false };
                // SAFETY: a live array element. The agent changes the count at any time, hence volatile, and
                // networks only while the count is 0.
                let number = unsafe { (&raw const (*networks).$number).read_volatile() };
                let mut n = 0;
                while n < MAX_SERVICE_CIDRS && n < number as usize {
                    // SAFETY: as above.
                    let network = unsafe { &(*networks).$networks[n] };
                    if address.is_within(&network.address, &network.mask) {
                        return true;
                    }
                    n += 1;
                }
                false
            }
            #[inline(always)]
            fn cluster_ip(&self, mapped: &Octets6) -> Option<bool> {
                cluster_ip(mapped)
            }
            #[inline(always)]
            fn loopback_is_node(&self) -> bool {
                loopback_is_node(self.ctx)
            }
            #[inline(always)]
            fn earlier_choice(&self) -> Option<Choice> {
                self.memory.earlier().some()
            }
            #[inline(always)]
            fn random(&self) -> u32 {
                // SAFETY: no preconditions.
                unsafe { bpf_get_prandom_u32() }
            }
            #[inline(always)]
            fn now(&self) -> u64 {
                now()
            }
            #[inline(always)]
            fn affinity(&self, service_id: u32) -> Option<Affinity> {
                affinity(&affinity_key(self.ctx, service_id))
            }
            #[inline(always)]
            fn renew_affinity(&self, service_id: u32, now: u64) {
                renew_affinity(&affinity_key(self.ctx, service_id), now);
            }
            #[inline(always)]
            fn remember_affinity(&self, service_id: u32, replaces: Option<Affinity>, new: Affinity) -> u32 {
                remember_affinity(&affinity_key(self.ctx, service_id), replaces, new)
            }
        }
    };
}

kernel_tables!(Kernel4, Octets4, FrontendKey4, Endpoint4, SERVICES4, ENDPOINTS4, n_v4, v4);
kernel_tables!(Kernel6, Octets6, FrontendKey6, Endpoint6, SERVICES6, ENDPOINTS6, n_v6, v6);
