//! Settings and kernel features, as read-only globals that user space sets before it loads the object.
//!
//! The map behind them is frozen, so the verifier knows their values and removes the branches that they switch
//! off, with the helpers in them that this kernel may not have.

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
    /// 1 if the kernel has `bpf_set_retval` (5.18) and it does in this hook what it says.
    static HAS_SET_RETVAL: u8 = 0;
    /// 1 to write a diagnostic line for each decision to the ring buffer of aya-log.
    static LOG: u8 = 0;
    /// First port of the node-port range.
    static NODE_PORT_FIRST: u16 = limits::NODE_PORTS.0;
    /// Last port of the node-port range.
    static NODE_PORT_LAST: u16 = limits::NODE_PORTS.1;
    /// 1 if node ports answer on loopback addresses of the node itself.
    static LOCALHOST_NODEPORTS: u8 = 1;
    /// Cookie of the node's network namespace; 0 means the initial one.
    static NODE_NETNS: u64 = 0;
}

/// A global that is a switch.
#[inline(always)]
pub(crate) fn is_on(switch: &Global<u8>) -> bool {
    switch.load() != 0
}
