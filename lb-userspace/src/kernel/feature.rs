//! What this kernel can do, found out by asking it.

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};

use super::syscall;

/// Features that decide which branches of the programs are alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `bpf_set_retval`: a refused call fails with `ECONNREFUSED` itself (kernel 5.18).
    pub set_retval: bool,
    /// Compare-and-swap: records of sockets are kept in slots instead of socket storage alone (kernel 5.12).
    pub compare_and_swap: bool,
}

/// A program that swaps a word on its stack, as the kernel encodes instructions.
const COMPARE_AND_SWAP: [u64; 5] = [
    0x0000_0000_0000_00b7, // r0 = 0
    0x0000_0000_fff8_0a7b, // *(u64 *)(r10 - 8) = r0
    0x0000_00f1_fff8_0adb, // r0 = cmpxchg_64(r10 - 8, r0, r0)
    0x0000_0001_0000_00b7, // r0 = 1
    0x0000_0000_0000_0095, // exit
];

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
            compare_and_swap: syscall::loads(&COMPARE_AND_SWAP),
        }
    }
}
