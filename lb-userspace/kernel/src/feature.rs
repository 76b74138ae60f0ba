//! Features of this kernel, found by probing.

use std::sync::LazyLock;

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};

use super::{btf::Btf, syscall};

/// Features that decide which branches of the programs are live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `bpf_set_retval`: a refused call fails with `ECONNREFUSED` itself (kernel 5.18).
    pub set_retval: bool,
    /// Compare-and-swap (kernel 5.12).
    pub compare_and_swap: bool,
    /// Offsets of the kernel's socket fields; `None` if programs cannot read them: without BTF, without
    /// `bpf_probe_read_kernel` in these programs, or under kernel lockdown.
    pub sock_fields: Option<SockFields>,
    /// `bpf_skc_to_mptcp_sock`: finds the multipath TCP socket of a subflow (kernel 5.19).
    pub mptcp: bool,
}

/// Offsets in octets, from the kernel's BTF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SockFields {
    /// The socket in `struct bpf_sock_addr_kern`.
    pub context_sock: u32,
    /// `sk_err` in `struct sock`.
    pub error: u32,
    /// `skc_cookie` in `struct sock`.
    pub cookie: u32,
    /// `skc_state` in `struct sock`.
    pub state: u32,
    /// The octet with `sk_kern_sock` in `struct sock`.
    pub kernel: u32,
    /// The bit of `sk_kern_sock` in that octet.
    pub kernel_mask: u8,
}

impl SockFields {
    /// `None` for a kernel without one of the fields.
    fn of(btf: &Btf) -> Option<Self> {
        let octet = |structure, field| {
            let bit = btf.field(structure, field)?.bit;
            bit.is_multiple_of(8).then_some(bit / 8)
        };
        let common = octet("sock", "__sk_common")?;
        let kernel = btf.field("sock", "sk_kern_sock")?.bit;
        Some(Self {
            context_sock: octet("bpf_sock_addr_kern", "sk")?,
            error: octet("sock", "sk_err")?,
            cookie: common + octet("sock_common", "skc_cookie")?,
            state: common + octet("sock_common", "skc_state")?,
            kernel: kernel / 8,
            kernel_mask: if cfg!(target_endian = "little") {
                1 << (kernel % 8)
            } else {
                0x80 >> (kernel % 8)
            },
        })
    }
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
    /// Probes the kernel by loading a minimal program for each feature. Kernel versions are ignored, since
    /// distributions backport. The first call in a process takes some milliseconds.
    ///
    /// A probe that fails for another reason counts as "not supported".
    #[must_use]
    pub fn probe() -> Self {
        static FEATURES: LazyLock<Features> = LazyLock::new(Features::ask);
        *FEATURES
    }

    fn ask() -> Self {
        let has = |program, helper| is_helper_supported(program, helper).unwrap_or(false);
        let can_read = has(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_probe_read_kernel)
            && has(ProgramType::CgroupSock, BpfHelper::BPF_FUNC_probe_read_kernel)
            && has(ProgramType::SockOps, BpfHelper::BPF_FUNC_probe_read_kernel);
        let sock_fields = Btf::of_kernel().ok().as_ref().and_then(SockFields::of);
        Self {
            set_retval: has(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval),
            compare_and_swap: syscall::loads(&COMPARE_AND_SWAP),
            sock_fields: sock_fields.filter(|_| can_read),
            mptcp: sock_fields.is_some()
                && has(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_skc_to_mptcp_sock),
        }
    }

    /// Whether records are kept in slots, and not in socket storage alone.
    #[must_use]
    pub const fn has_slots(&self) -> bool {
        self.compare_and_swap && self.sock_fields.is_some()
    }
}
