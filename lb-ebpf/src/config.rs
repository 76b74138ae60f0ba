//! Settings and kernel features, as read-only globals that user space sets before it loads the object.
//!
//! The map behind them is frozen, so the verifier knows their values and removes disabled branches, with
//! helpers that this kernel may lack.

use aya_ebpf::Global;
use lb_common::limits;

macro_rules! globals {
    ($($(#[$meta:meta])* static $name:ident: $ty:ty = $default:expr;)+) => {
        $($(#[$meta])*
        #[unsafe(no_mangle)]
        pub(crate) static $name: Global<$ty> = Global::new($default);)+
    };
}

globals! {
    /// 1 if the kernel has `bpf_set_retval` (5.18) and it works in this hook.
    static HAS_SET_RETVAL: u8 = 0;
    /// 1 if the kernel has `bpf_skc_to_mptcp_sock` (5.19), and the offsets below are known.
    static HAS_MPTCP: u8 = 0;
    /// 1 if the kernel has `bpf_probe_read_kernel`, and the offsets in `struct sock` below are known.
    static HAS_SOCK_FIELDS: u8 = 0;
    /// Offset of the socket in `struct bpf_sock_addr_kern`, the kernel's context.
    static CONTEXT_SOCK: u32 = 0;
    /// Offset of `skc_cookie` in `struct sock`.
    static SOCK_COOKIE: u32 = 0;
    /// Offset of `skc_state` in `struct sock`.
    static SOCK_STATE: u32 = 0;
    /// Offset of the octet with `sk_kern_sock` in `struct sock`.
    static SOCK_KERNEL: u32 = 0;
    /// The bit of `sk_kern_sock` in it.
    static SOCK_KERNEL_MASK: u8 = 0;
    /// Offset of `sk_err` in `struct sock`.
    static SOCK_ERROR: u32 = 0;
    /// 1 with `--passive-health=on`; otherwise the programs neither read nor write `endpoint_health`.
    static PASSIVE_HEALTH: u8 = 0;
    /// First port of the node-port range.
    static NODE_PORT_FIRST: u16 = limits::NODE_PORTS.0;
    /// Last port of the node-port range.
    static NODE_PORT_LAST: u16 = limits::NODE_PORTS.1;
    /// 1 if node ports answer on loopback addresses of the node itself.
    static LOCALHOST_NODEPORTS: u8 = 1;
    /// 1 if cgroups may be excluded; otherwise the programs do not check them.
    static EXCLUDES: u8 = 0;
    /// Number of ids with counters in `service_stats`, on each CPU.
    static COUNTED_SERVICES: u32 = 0;
    /// Number of ids with counters in `endpoint_stats`, on each CPU.
    static COUNTED_ENDPOINTS: u32 = 0;
    /// Cookie of the node's network namespace; 0 means the initial one.
    static NODE_NETNS: u64 = 0;
}

/// A global that is a switch.
#[inline(always)]
pub(crate) fn is_on(switch: &Global<u8>) -> bool {
    switch.load() != 0
}

/// Variants that a global cannot select: they differ in more than dead branches. Each hook has a program for
/// each mode, and the loader loads one (docs/decisions/0003).
pub(crate) trait Mode {
    /// Whether records are kept in slots, which needs compare-and-swap and [`HAS_SOCK_FIELDS`]. Kernels
    /// before 5.12 reject a compare-and-swap even in dead code.
    const SLOTS: bool;
    /// Whether a diagnostic line is written for each verdict. aya-log adds a BPF function. With functions,
    /// the verifier of kernels before 6.3 compares every number exactly, and a search of ten thousand
    /// instructions takes more than a million.
    const LOG: bool;
}

/// The usual mode.
pub(crate) struct Slots;
/// For kernels that lack a feature for slots.
pub(crate) struct Storage;
/// The usual mode, with diagnostics.
pub(crate) struct Logged;

impl Mode for Slots {
    const SLOTS: bool = true;
    const LOG: bool = false;
}

impl Mode for Storage {
    const SLOTS: bool = false;
    const LOG: bool = false;
}

impl Mode for Logged {
    const SLOTS: bool = true;
    const LOG: bool = true;
}
