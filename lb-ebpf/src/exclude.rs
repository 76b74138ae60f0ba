//! Callers that are excluded from load balancing.

use aya_ebpf::helpers::bpf_get_current_ancestor_cgroup_id;
use lb_common::limits;

use crate::{
    config::{self, is_on},
    maps,
};

/// Whether the caller's cgroup or an ancestor is excluded. If no agent excludes any, the verifier removes
/// this code.
///
/// Checks the ancestors at levels with excluded cgroups, usually one: a program cannot walk up the hierarchy.
/// A look-up of the caller's own cgroup would need every present and future cgroup below an excluded one in
/// the map.
///
/// Checked first. A check after the look-up of a frontend would spare other calls, but keep more values on
/// the stack even without exclusions: a third more instructions for the verifier.
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
