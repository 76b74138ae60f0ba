//! Objects of the kernel's `nf_tables` as values: tables, chains, rules, sets and their elements, and
//! transactions that change them.
//!
//! The values correspond one to one to what the kernel's netlink messages say
//! (`linux/netfilter/nf_tables.h`), so that what was written can be compared with what is read.
//! `lb_kernel::nftables` encodes and decodes them. What it reads and cannot express becomes [`Unknown`],
//! which equals nothing.
//!
//! A map is a set whose elements have values. A rule is a program over sixteen registers of four octets; each
//! rule must load what it uses, because no kernel promises what registers hold before.
//!
//! # What `nft` can list
//!
//! `nft list ruleset` decompiles every rule of the namespace, and an assertion ends it at a rule that it does
//! not understand, also for the user of another table. nft 1.0.6 understands what a lookup found only as the
//! operand of [`Expression::Dnat`] and [`Expression::SetMark`]: never as a key or a part of one (so no chain
//! of two lookups, be the second a verdict map), and never as the value of [`Expression::Dynset`]. Each field
//! of such a value must be loaded by an expression of its own, for example from [`CtKey`]. Constants as a
//! part of a key are listed as numbers.

use std::{collections::BTreeMap, fmt, num::NonZeroU32, ops::BitOr, sync::Arc};

pub use lb_common::address::Family;

/// The name of a table, chain or set. The kernel takes up to 255 octets.
pub type Name = Arc<str>;

/// Something in the kernel that no value expresses, with a short description. It equals nothing, not even
/// itself, so a comparison always finds it.
#[derive(Clone, Debug)]
pub struct Unknown(pub String);

impl PartialEq for Unknown {
    fn eq(&self, _other: &Self) -> bool {
        false
    }
}

/// Which table: `ip` or `ip6`, and its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableId {
    /// `ip` or `ip6`.
    pub family: Family,
    /// For example `socklb`.
    pub name: Name,
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        write!(f, "{family} {}", self.name)
    }
}

/// A table with its chains and sets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// `NFT_TABLE_F_*`: 0, unless another program made the table dormant.
    pub flags: u32,
    /// The chains by name.
    pub chains: BTreeMap<Name, Chain>,
    /// The sets and maps by name.
    pub sets: BTreeMap<Name, Set>,
}

/// A chain with its rules.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chain {
    /// Where packets enter; `None` for a chain that only other chains go to.
    pub base: Option<Base>,
    /// The rules in order.
    pub rules: Vec<Rule>,
}

/// What makes a chain a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// `filter` or `nat`.
    pub kind: ChainType,
    /// The hook.
    pub hook: Hook,
    /// Lower numbers run first: -100 is destination NAT, 0 the filter, 100 source NAT.
    pub priority: i32,
    /// What happens to packets that no rule decides.
    pub policy: Policy,
}

/// The type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainType {
    /// Every packet passes it.
    Filter,
    /// Only the first packet of each connection passes it.
    Nat,
    /// A packet whose mark changes is routed again. Only at [`Hook::Output`].
    Route,
}

/// A hook of the families `ip` and `ip6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets that arrive, before they are routed.
    Prerouting,
    /// Packets for this host.
    Input,
    /// Packets that are routed on.
    Forward,
    /// Packets of this host.
    Output,
    /// Packets that leave.
    Postrouting,
}

/// The policy of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// They continue. The only policy that chains of socklb have.
    Accept,
    /// They are dropped.
    Drop,
}

/// A rule: expressions that run in order until one of them does not match or gives a verdict.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    /// The expressions.
    pub expressions: Vec<Expression>,
    /// What `nft list` shows behind the rule; at most 128 octets.
    pub comment: Option<Name>,
}

/// One of the sixteen registers of four octets, `NFT_REG32_00 + n`. Longer values continue in those behind
/// it, each field from a register of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Register(u8);

impl Register {
    /// How many there are.
    pub const COUNT: u8 = 16;
    /// The first one.
    pub const FIRST: Self = Self(0);
    /// The last one.
    pub const LAST: Self = Self(Self::COUNT - 1);

    /// Register `n`; `None` from 16 on.
    #[must_use]
    pub const fn new(n: u8) -> Option<Self> {
        if n < Self::COUNT { Some(Self(n)) } else { None }
    }

    /// Its number, from 0 to 15.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// Up to 64 octets as registers hold them: addresses and ports in network order, marks in host order, each
/// field padded with zeros to four octets.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Octets(Box<[u8]>);

impl Octets {
    /// Most octets that the registers hold.
    pub const MAX: usize = 64;

    /// The octets.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

impl From<&[u8]> for Octets {
    fn from(octets: &[u8]) -> Self {
        Self(octets.into())
    }
}

impl<const N: usize> From<[u8; N]> for Octets {
    fn from(octets: [u8; N]) -> Self {
        Self(octets.into())
    }
}

impl From<Vec<u8>> for Octets {
    fn from(octets: Vec<u8>) -> Self {
        Self(octets.into())
    }
}

impl fmt::Debug for Octets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

/// One expression of a rule. `from` and `key` are read, `to` is written.
#[derive(Clone, Debug, PartialEq)]
pub enum Expression {
    /// Loads a property of the packet.
    Meta {
        /// Which.
        key: MetaKey,
        /// Four octets; 16 for names.
        to: Register,
    },
    /// Sets the packet's mark.
    SetMark {
        /// The mark, in host order.
        from: Register,
    },
    /// Loads octets of the packet. Does not match if the packet is shorter, or is a later fragment and the
    /// header is the transport's.
    Payload {
        /// Where to count from.
        header: Header,
        /// First octet.
        offset: u8,
        /// Number of octets.
        len: u8,
        /// Where they go.
        to: Register,
    },
    /// Loads a property of the connection. Does not match without one, except for [`CtKey::State`].
    Ct {
        /// Which, and of which direction.
        key: CtKey,
        /// Where it goes.
        to: Register,
    },
    /// Loads the type of an address (`RTN_*` of `linux/rtnetlink.h`, in host order), as the routing tables
    /// have it.
    FibType {
        /// Which address.
        of: FibAddress,
        /// Four octets.
        to: Register,
    },
    /// Loads a constant.
    Immediate {
        /// The constant, of at most 16 octets.
        value: Octets,
        /// Where it goes.
        to: Register,
    },
    /// Decides.
    Verdict(Verdict),
    /// `to = (from & mask) ^ xor`
    Bitwise {
        /// The operand.
        from: Register,
        /// As long as the operand, at most 16 octets.
        mask: Octets,
        /// As long as the operand.
        xor: Octets,
        /// The result.
        to: Register,
    },
    /// Compares octet by octet, the first being the most significant. Does not match if it is not so.
    Compare {
        /// The left side.
        from: Register,
        /// How.
        op: Comparison,
        /// The right side, of at most 16 octets.
        value: Octets,
    },
    /// Searches a set of the same table. Does not match without an element; inverted: with one.
    Lookup {
        /// Its name.
        set: Name,
        /// The key.
        from: Register,
        /// What becomes of the value of the element. May overlap with `from`.
        to: LookupTo,
    },
    /// Loads a number: below `modulus`, plus `offset`, in host order.
    Numgen {
        /// Random or counting.
        kind: Numgen,
        /// At least 1.
        modulus: u32,
        /// Added to it.
        offset: u32,
        /// Four octets.
        to: Register,
    },
    /// Adds an element to a dynamic set, renews or deletes it. Does not match if the set is full.
    Dynset {
        /// Its name.
        set: Name,
        /// What is done.
        op: DynsetOp,
        /// The key.
        key: Register,
        /// For a map the value, also to delete an element.
        value: Option<Register>,
        /// Time-out in milliseconds, instead of the set's own.
        timeout: Option<NonZeroU32>,
    },
    /// Translates the destination. A verdict: accepts. Only in chains of type `nat`.
    Dnat {
        /// The address.
        address: Register,
        /// The port, in network order; `None` keeps it.
        port: Option<Register>,
    },
    /// Translates the source to an address of the interface by which the packet leaves. A verdict: accepts.
    /// Only in chains of type `nat` at [`Hook::Postrouting`].
    Masquerade {
        /// The first and the last source port, in network order; `None` for all that are like the packet's
        /// own.
        ports: Option<(Register, Register)>,
        /// Source ports are random (`NF_NAT_RANGE_PROTO_RANDOM_FULLY`).
        is_fully_random: bool,
    },
    /// Answers with an error and drops. Not at [`Hook::Postrouting`]; at [`Hook::Prerouting`] since kernel
    /// 5.9.
    Reject(Reject),
    /// Counts packets and octets. What it counted is no part of the value.
    Counter,
    /// The packet is not tracked. Only at priorities below -200.
    Notrack,
    /// An expression, or attributes of one, that has no value here.
    Unknown(Unknown),
}

/// A property of a packet (`NFT_META_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaKey {
    /// `meta mark`, in host order.
    Mark,
    /// `meta iif`, the index of the input interface, in host order.
    InputIndex,
    /// `meta oif`, the index of the output interface, in host order.
    OutputIndex,
    /// `meta iifname`, 16 octets.
    InputName,
    /// `meta oifname`, 16 octets.
    OutputName,
    /// `meta nfproto`, one octet.
    NfProto,
    /// `meta l4proto`, one octet.
    L4Proto,
}

/// Where [`Expression::Payload`] counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// The IP header.
    Network,
    /// The TCP, UDP or SCTP header.
    Transport,
}

/// A property of a connection (`NFT_CT_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtKey {
    /// `ct state`, [`ct_state`] bits in host order.
    State,
    /// `ct status`, [`ct_status`] bits in host order.
    Status,
    /// `ct direction`, one octet: 0 is original, 1 reply.
    Direction,
    /// `ct mark`, in host order.
    Mark,
    /// `ct original ip saddr` and so on, by the table's family.
    Source(Family, Direction),
    /// `ct original ip daddr` and so on, by the table's family.
    Destination(Family, Direction),
    /// `ct original proto-src`, in network order.
    SourcePort(Direction),
    /// `ct original proto-dst`, in network order.
    DestinationPort(Direction),
}

/// A direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// As the first packet had it, before translation.
    Original,
    /// As answers have it, before they are translated back.
    Reply,
}

/// Bits of [`CtKey::State`].
pub mod ct_state {
    /// Not part of a valid connection.
    pub const INVALID: u32 = 1;
    /// Part of a connection with packets in both directions.
    pub const ESTABLISHED: u32 = 2;
    /// A new connection, or an ICMP error, that belongs to another.
    pub const RELATED: u32 = 4;
    /// The first packet.
    pub const NEW: u32 = 8;
    /// Excluded from tracking.
    pub const UNTRACKED: u32 = 64;
}

/// Bits of [`CtKey::Status`].
pub mod ct_status {
    /// The source is translated.
    pub const SNAT: u32 = 16;
    /// The destination is translated.
    pub const DNAT: u32 = 32;
}

/// Which address [`Expression::FibType`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FibAddress {
    /// `fib saddr type`
    Source,
    /// `fib daddr type`
    Destination,
}

/// `RTN_LOCAL`: the type of this host's own addresses.
pub const FIB_LOCAL: u32 = 2;

/// How [`Expression::Compare`] compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `==`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
}

/// What becomes of the value that a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupTo {
    /// The set has none: the rule continues if there is an element.
    Matches,
    /// The set has none: the rule continues if there is no element.
    MatchesNot,
    /// It goes to a register.
    Register(Register),
    /// It is a verdict, and it is obeyed.
    Verdict,
}

/// How [`Expression::Numgen`] makes numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numgen {
    /// Each packet gets the next.
    Incremental,
    /// At random.
    Random,
}

/// What [`Expression::Dynset`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DynsetOp {
    /// Adds the element, if there is none.
    Add,
    /// Adds the element. If there is one, its time-out begins anew; its value stays.
    Update,
    /// Deletes the element.
    Delete,
}

/// With what [`Expression::Reject`] answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// A TCP reset. Only for TCP.
    TcpReset,
    /// ICMP or `ICMPv6` "destination unreachable", by the table's family, with this code.
    Unreachable(u8),
}

impl Reject {
    /// "Port unreachable" of a family.
    #[must_use]
    pub const fn port_unreachable(family: Family) -> Self {
        Self::Unreachable(match family {
            Family::V4 => 3,
            Family::V6 => 4,
        })
    }
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leaves the base chain. Later chains of the hook still see the packet.
    Accept,
    /// The packet is gone.
    Drop,
    /// Continues with the next rule.
    Continue,
    /// Returns to the chain that jumped here; in a base chain, the policy.
    Return,
    /// Goes to a chain of the same table, and returns.
    Jump(Name),
    /// Goes to a chain of the same table, without coming back.
    Goto(Name),
}

/// A set or map with its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Set {
    /// What it holds.
    pub spec: SetSpec,
    /// The elements.
    pub elements: BTreeMap<Key, Element>,
}

impl Set {
    /// The element with a key; of ranges, the one that has it in each field.
    #[must_use]
    pub fn element(&self, key: &[u8]) -> Option<(&Key, &Element)> {
        if !self.spec.flags.contains(SetFlags::INTERVAL) {
            return self.elements.get_key_value(&Key::from(key));
        }
        let is_within = |range: &&Key| {
            let fields = self.spec.key.iter().map(|field| field.len().next_multiple_of(4));
            let mut at = 0;
            let end = range.end.as_ref().unwrap_or(&range.start);
            fields.into_iter().all(|len| {
                let field = at..at + len;
                at += len;
                let of = |octets: &[u8]| octets.get(field.clone()).map(<[u8]>::to_vec);
                let value = of(key);
                of(range.start.as_slice()) <= value && value <= of(end.as_slice())
            })
        };
        self.elements.iter().find(|(range, _)| is_within(range))
    }
}

/// What a set or map holds. It cannot be changed: only deleted and added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetSpec {
    /// The fields of a key.
    pub key: Vec<DataType>,
    /// What elements have for values.
    pub value: ValueType,
    /// What it can do.
    pub flags: SetFlags,
    /// Milliseconds after which elements expire, unless they say otherwise. Needs [`SetFlags::TIMEOUT`].
    pub timeout: Option<NonZeroU32>,
    /// Most elements. The kernel chooses the structure by it; dynamic sets need it.
    pub size: Option<NonZeroU32>,
}

impl SetSpec {
    /// Octets of a key.
    #[must_use]
    pub fn key_len(&self) -> usize {
        registers_len(&self.key)
    }

    /// Octets of a value; 0 if elements have none, or verdicts.
    #[must_use]
    pub fn value_len(&self) -> usize {
        match &self.value {
            ValueType::Data(fields) => registers_len(fields),
            ValueType::None | ValueType::Verdict => 0,
        }
    }
}

/// Octets of fields in registers: each begins in a register of its own.
#[must_use]
pub fn registers_len(fields: &[DataType]) -> usize {
    fields.iter().map(|field| field.len().next_multiple_of(4)).sum()
}

/// What the elements of a set have for values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// Nothing: it is a set, no map.
    None,
    /// Data of these fields.
    Data(Vec<DataType>),
    /// Verdicts. The kernel checks all chains of a table for loops when it adds an element with a jump or
    /// goto, so such maps ought to be small.
    Verdict,
}

/// What a field of a key or value is. The kernel knows only lengths; `nft` shows values by the type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataType {
    /// `ipv4_addr`, four octets.
    Ipv4,
    /// `ipv6_addr`, 16 octets.
    Ipv6,
    /// `inet_proto`, one octet.
    Protocol,
    /// `inet_service`, two octets in network order.
    Port,
    /// `mark`, four octets in host order. Serves for every number.
    Mark,
    /// `ifname`, 16 octets.
    InterfaceName,
    /// Another one, or one with another length than it has here, by nft's number.
    Other(u8),
}

impl DataType {
    /// Octets of a value, without padding; 0 if unknown.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a type is never empty")]
    pub const fn len(self) -> usize {
        match self {
            Self::Ipv4 | Self::Mark => 4,
            Self::Ipv6 | Self::InterfaceName => 16,
            Self::Protocol => 1,
            Self::Port => 2,
            Self::Other(_) => 0,
        }
    }
}

/// What a set can do: `NFT_SET_*`, without what follows from the rest of the spec (`MAP`, `CONCAT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetFlags(pub u32);

impl SetFlags {
    /// Elements never change while a rule uses it.
    pub const CONSTANT: Self = Self(2);
    /// Keys are ranges. The set needs at least two fields: with one, elements have another form in the
    /// kernel.
    pub const INTERVAL: Self = Self(4);
    /// Elements may expire.
    pub const TIMEOUT: Self = Self(0x10);
    /// Rules add elements (`dynamic`).
    pub const DYNAMIC: Self = Self(0x20);

    /// Whether it has all of these.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for SetFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The key of an element.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The key; of a range, its beginning in each field.
    pub start: Octets,
    /// The end of the range in each field, inclusive. Every element of a set with [`SetFlags::INTERVAL`] has
    /// one, others have none.
    pub end: Option<Octets>,
}

impl<T: Into<Octets>> From<T> for Key {
    fn from(octets: T) -> Self {
        Self { start: octets.into(), end: None }
    }
}

/// What an element has beside its key.
#[derive(Clone, Debug, PartialEq)]
pub struct Element {
    /// The value.
    pub value: Value,
    /// Milliseconds after which it expires, instead of the set's.
    pub timeout: Option<NonZeroU32>,
}

impl From<Value> for Element {
    fn from(value: Value) -> Self {
        Self { value, timeout: None }
    }
}

/// The value of an element.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// None: an element of a set.
    None,
    /// Data.
    Data(Octets),
    /// A verdict.
    Verdict(Verdict),
    /// The element has attributes that no value expresses. It cannot be written.
    Unknown(Unknown),
}

/// Changes that the kernel makes all at once, or none of them.
///
/// A later change sees the earlier ones: a table that was added, a name that was deleted and is free again.
/// Packets see all or nothing, except that a rule may run on the old chain while its lookups find new
/// elements: elements become visible with the generation, which a packet reads anew for each set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transaction {
    /// In order.
    pub changes: Vec<(TableId, Change)>,
    /// The generation that the changes were computed for. If the kernel has another by then, it refuses them.
    pub generation: Option<u32>,
}

/// One change to a table.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Adds the table, if there is none. A dormant one wakes up.
    AddTable,
    /// Deletes it with all that it holds. Refused if there is none: add it before.
    DeleteTable,
    /// Adds a chain. If there is one, only its policy changes; another base is refused.
    AddChain(Name, Option<Base>),
    /// Deletes a chain. Refused if there is none, or while a verdict names it.
    DeleteChain(Name),
    /// Deletes all rules of a chain.
    FlushChain(Name),
    /// Appends a rule to a chain.
    AddRule(Name, Rule),
    /// Adds a set or map without elements. If there is one with another spec, it is refused.
    AddSet(Name, SetSpec),
    /// Deletes a set. Refused if there is none, or while a rule uses it.
    DeleteSet(Name),
    /// Deletes all elements of a set.
    FlushSet(Name),
    /// Adds elements. Refused if there is one with this key and another value: delete it before, in the same
    /// transaction.
    AddElements(Name, Vec<(Key, Element)>),
    /// Deletes elements. Refused if one of them is missing.
    DeleteElements(Name, Vec<Key>),
}
