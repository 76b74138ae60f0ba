//! The kernel's maps as [`lb_common::Tables`].

use aya_ebpf::helpers::bpf_ktime_get_ns;
use lb_common::{
    Tables,
    address::{Address, Octets4, Octets6},
    health::Admission,
    layout::{AddressKey, Endpoint4, Endpoint6, EndpointHealth, Frontend, FrontendKey4, FrontendKey6, Run},
    limits::MAX_SERVICE_CIDRS,
    resolve::NodeAddress,
};

use crate::{
    config::{self, is_on},
    ctx::add,
    maps,
};

/// The pinned maps, of both families.
pub(crate) struct Kernel;

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
            health: if is_on(&config::PASSIVE_HEALTH) {
                (&raw const (*entry).health).read_volatile()
            } else {
                0
            },
        })
    }
}

/// The words of an endpoint's health that decide whether calls avoid it.
#[inline(always)]
fn ejection(health: *mut EndpointHealth) -> EndpointHealth {
    // SAFETY: aligned words of a live array element. Other programs change them at any time, hence volatile.
    unsafe {
        EndpointHealth {
            ejected_until: (&raw const (*health).ejected_until).read_volatile(),
            tried_at: (&raw const (*health).tried_at).read_volatile(),
            ..EndpointHealth::default()
        }
    }
}

#[inline(always)]
fn is_suspect(endpoint_id: u32) -> bool {
    let Some(health) = maps::ENDPOINT_HEALTH.get_ptr_mut(endpoint_id) else { return false };
    // SAFETY: as in `ejection`.
    unsafe { (&raw const (*health).ejected_until).read_volatile() != 0 }
}

#[inline(always)]
fn admits(endpoint_id: u32) -> u32 {
    let Some(health) = maps::ENDPOINT_HEALTH.get_ptr_mut(endpoint_id) else { return 1 };
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    #[expect(clippy::cast_possible_truncation, reason = "0 or 1")]
    let is_avoided = ejection(health).is_avoided(now) as u32;
    is_avoided ^ 1
}

#[inline(always)]
fn active(endpoint_id: u32) -> i32 {
    let Some(load) = maps::ENDPOINT_LOAD.get_ptr(endpoint_id) else { return 0 };
    // SAFETY: as in `ejection`.
    unsafe { (&raw const (*load).active).read_volatile() }
}

/// Adds to the open connections of an endpoint.
#[inline(always)]
pub(crate) fn add_active(endpoint_id: u32, number: i32) {
    if let Some(load) = maps::ENDPOINT_LOAD.get_ptr_mut(endpoint_id) {
        // SAFETY: an aligned word of a live array element.
        unsafe { add(&raw mut (*load).active, number) };
    }
}

#[inline(always)]
fn begin_trial(endpoint_id: u32) {
    let Some(health) = maps::ENDPOINT_HEALTH.get_ptr_mut(endpoint_id) else { return };
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if ejection(health).admission(now) == Admission::Trial {
        // SAFETY: as in `ejection`. Calls on two CPUs at once may both be on trial.
        unsafe { (&raw mut (*health).tried_at).write_volatile(now) };
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

macro_rules! kernel_tables {
    ($octets:ty, $key:ty, $entry:ty, $services:ident, $endpoints:ident, $number:ident, $networks:ident) => {
        impl Tables<$octets> for Kernel {
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
            fn is_suspect(&self, endpoint_id: u32) -> bool {
                is_suspect(endpoint_id)
            }
            #[inline(always)]
            fn admits(&self, endpoint_id: u32) -> u32 {
                admits(endpoint_id)
            }
            #[inline(always)]
            fn active(&self, endpoint_id: u32) -> i32 {
                active(endpoint_id)
            }
            #[inline(always)]
            fn begin_trial(&self, endpoint_id: u32) {
                begin_trial(endpoint_id);
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
        }
    };
}

kernel_tables!(Octets4, FrontendKey4, Endpoint4, SERVICES4, ENDPOINTS4, n_v4, v4);
kernel_tables!(Octets6, FrontendKey6, Endpoint6, SERVICES6, ENDPOINTS6, n_v6, v6);
