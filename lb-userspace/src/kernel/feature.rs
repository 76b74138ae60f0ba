//! What this kernel can do, found out by asking it.

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};

/// Features that decide which branches of the programs are alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `bpf_set_retval`: a refused call fails with `ECONNREFUSED` itself (kernel 5.18).
    pub set_retval: bool,
}

impl Features {
    /// Asks the kernel, by having its verifier judge a minimal program for each feature. Versions are not looked at:
    /// distributions backport.
    ///
    /// A probe that fails for another reason counts as "not there".
    #[must_use]
    pub fn probe() -> Self {
        Self {
            set_retval: is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)
                .unwrap_or(false),
        }
    }
}
