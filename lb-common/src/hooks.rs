//! The one table of all hooks: where the programs are attached, in which order, and where they are needed.

/// What a kernel must have for a hook to be of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing beyond the oldest kernel that is served.
    Nothing,
    /// Slots of sockets: without, no socket takes one, and none is given up.
    Slots,
}

/// What is known of a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HookSpec {
    /// Its name: that of the program in the object, and of the link below `--pin-path`.
    pub name: &'static str,
    /// `enum bpf_attach_type`
    pub attach_type: u32,
    /// Where it is attached.
    pub needs: Needs,
    /// Whether the object has a program for each mode (docs/decisions/0003), or one for all.
    pub has_modes: bool,
}

/// A hook with a program for each mode.
const fn hook(name: &'static str, attach_type: u32) -> HookSpec {
    HookSpec { name, attach_type, needs: Needs::Nothing, has_modes: true }
}

/// All hooks in the order in which they are attached.
///
/// The one that gives up what the others take comes first: no socket may take a slot that nothing gives up.
pub const HOOKS: &[HookSpec] = &[
    HookSpec { name: "sock_release", attach_type: 34, needs: Needs::Slots, has_modes: false },
    hook("connect4", 10),
    hook("connect6", 11),
    hook("sendmsg4", 14),
    hook("sendmsg6", 15),
    hook("recvmsg4", 19),
    hook("recvmsg6", 20),
    hook("getpeername4", 29),
    hook("getpeername6", 30),
];

/// Names of links that earlier versions pinned and this one does not. An agent that starts detaches and removes them.
pub const FORMER: &[&str] = &[];
