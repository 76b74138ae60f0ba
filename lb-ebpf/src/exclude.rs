//! Callers that are excluded from load balancing.

use aya_ebpf::helpers::bpf_get_current_ancestor_cgroup_id;
use lb_common::limits;

use crate::{
    config::{self, is_on},
    maps,
};

/// Whether the caller's cgroup or an ancestor is excluded. No code, if no agent excludes any.
///
/// Checks the ancestors at levels with excluded cgroups, usually one. A program cannot walk up the hierarchy.
/// A look-up of the caller's own cgroup would need every cgroup below an excluded one in the map, including
/// future ones.
///
/// Checked first. A check only after a frontend was found would save other calls a look-up where cgroups are
/// excluded. But it would keep more values on the stack everywhere: a third more instructions for the
/// verifier.
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
            // SAFETY: no preconditions; 0 for a level deeper than the caller's, which is not a cgroup id.
            let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level.cast_signed()) };
            if ancestor == 0 {
                return false;
            }
            // SAFETY: the value is not read.
            if unsafe { maps::EXCLUDED.get(ancestor) }.is_some() {
                return true;
            }
        }
    }
    false
}
