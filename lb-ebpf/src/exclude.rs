//! Callers that are left alone.

use aya_ebpf::helpers::bpf_get_current_ancestor_cgroup_id;
use lb_common::limits;

use crate::{
    config::{self, is_on},
    maps,
};

/// Whether the caller's cgroup or one above it is excluded. Nothing, if no agent excludes anybody.
///
/// By its ancestors at the levels where excluded cgroups may be, as a rule one: a program cannot walk up, and a look-up of the
/// caller's own cgroup would need all cgroups below an excluded one listed, also those that are made the next moment.
///
/// Asked first of all. To ask only once a frontend was found would spare the calls that are for no service a look-up, but only where
/// somebody is excluded; and there the values that are alive at that point would have to be kept on the stack, also
/// where nobody is: it cost the verifier a third more instructions.
#[inline(always)]
pub(crate) fn is_excluded() -> bool {
    if !is_on(&config::EXCLUDES) {
        return false;
    }
    let Some(levels) = maps::EXCLUDED_LEVELS.get_ptr(0) else { return false };
    // SAFETY: one aligned word of a live array element, which user space may change at any time.
    let levels = unsafe { levels.read_volatile() };
    if levels == 0 {
        return false;
    }
    for level in 1..limits::CGROUP_LEVELS {
        if levels & (1 << level) != 0 {
            // SAFETY: no preconditions; 0 for a level deeper than the caller's, which is no cgroup's id.
            let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level.cast_signed()) };
            if ancestor == 0 {
                return false;
            }
            // SAFETY: the value is not looked at.
            if unsafe { maps::EXCLUDED.get(ancestor) }.is_some() {
                return true;
            }
        }
    }
    false
}
