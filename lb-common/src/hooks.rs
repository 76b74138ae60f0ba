//! The table of all hooks: where programs are attached, in which order, and on which kernels.

/// What a hook requires of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// Nothing beyond the oldest supported kernel.
    Nothing,
    /// Slots of sockets: without them, no slot is taken or freed.
    Slots,
    /// Nothing of the kernel: it is attached with `--passive-health=on` only.
    PassiveHealth,
}

/// The declaration of a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HookSpec {
    /// Name of the program in the object, and of the link below `--pin-path`.
    pub name: &'static str,
    /// `enum bpf_attach_type`
    pub attach_type: u32,
    /// What it requires of the kernel.
    pub needs: Requirement,
    /// Whether it has a program for each mode (docs/decisions/0003).
    pub has_modes: bool,
}

/// A hook with a program for each mode.
const fn hook(name: &'static str, attach_type: u32) -> HookSpec {
    HookSpec { name, attach_type, needs: Requirement::Nothing, has_modes: true }
}

/// All hooks in the order of attachment.
///
/// The hook that frees slots comes first: no socket may take a slot that nothing frees.
pub const HOOKS: &[HookSpec] = &[
    HookSpec { name: "sock_release", attach_type: 34, needs: Requirement::Slots, has_modes: false },
    hook("connect4", 10),
    hook("connect6", 11),
    hook("sendmsg4", 14),
    hook("sendmsg6", 15),
    hook("recvmsg4", 19),
    hook("recvmsg6", 20),
    hook("getpeername4", 29),
    hook("getpeername6", 30),
    // Last: it observes calls that the others redirected.
    HookSpec { name: "sock_ops", attach_type: 3, needs: Requirement::PassiveHealth, has_modes: true },
];

/// Names of links that only earlier versions pinned. A starting agent detaches and removes them.
pub const REMOVED: &[&str] = &[];
