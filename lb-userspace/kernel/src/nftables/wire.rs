//! The kernel's numbers: `linux/netfilter/nf_tables.h`, and the types of nft's `datatype.h`.

use lb_core::packets::nft::{
    ChainType, Comparison, DataType, DynsetOp, FibAddress, Header, Hook, MetaKey, Numgen, Policy, Register,
};

/// `NFT_MSG_*` with the subsystem, as messages have it.
pub(super) mod message {
    const SUBSYSTEM: u16 = 10 << 8;
    pub(in super::super) const NEW_TABLE: u16 = SUBSYSTEM;
    pub(in super::super) const GET_TABLE: u16 = SUBSYSTEM + 1;
    pub(in super::super) const DELETE_TABLE: u16 = SUBSYSTEM + 2;
    pub(in super::super) const NEW_CHAIN: u16 = SUBSYSTEM + 3;
    pub(in super::super) const GET_CHAIN: u16 = SUBSYSTEM + 4;
    pub(in super::super) const DELETE_CHAIN: u16 = SUBSYSTEM + 5;
    pub(in super::super) const NEW_RULE: u16 = SUBSYSTEM + 6;
    pub(in super::super) const GET_RULE: u16 = SUBSYSTEM + 7;
    pub(in super::super) const DELETE_RULE: u16 = SUBSYSTEM + 8;
    pub(in super::super) const NEW_SET: u16 = SUBSYSTEM + 9;
    pub(in super::super) const GET_SET: u16 = SUBSYSTEM + 10;
    pub(in super::super) const DELETE_SET: u16 = SUBSYSTEM + 11;
    pub(in super::super) const NEW_ELEMENT: u16 = SUBSYSTEM + 12;
    pub(in super::super) const GET_ELEMENT: u16 = SUBSYSTEM + 13;
    pub(in super::super) const DELETE_ELEMENT: u16 = SUBSYSTEM + 14;
    pub(in super::super) const NEW_GENERATION: u16 = SUBSYSTEM + 15;
    pub(in super::super) const GET_GENERATION: u16 = SUBSYSTEM + 16;
    /// `NFNL_MSG_BATCH_BEGIN`
    pub(in super::super) const BEGIN: u16 = 16;
    /// `NFNL_MSG_BATCH_END`
    pub(in super::super) const END: u16 = 17;
    /// `NFNL_SUBSYS_NFTABLES`, which a batch is for.
    pub(in super::super) const BATCH_OF: u16 = 10;
}

/// Defines the attributes of one object.
macro_rules! attributes {
    ($(#[$doc:meta] $object:ident { $($name:ident = $number:literal),* $(,)? })*) => {$(
        #[$doc]
        pub(super) mod $object {
            $(pub(in super::super) const $name: u16 = $number;)*
        }
    )*};
}

attributes! {
    /// `NFTA_LIST_*`
    list { ELEMENT = 1 }
    /// `NFNL_BATCH_*`
    batch { GENERATION = 1 }
    /// `NFTA_GEN_*`
    generation { ID = 1 }
    /// `NFTA_TABLE_*`
    table { NAME = 1, FLAGS = 2, HANDLE = 4 }
    /// `NFTA_CHAIN_*`
    chain { TABLE = 1, NAME = 3, HOOK = 4, POLICY = 5, TYPE = 7 }
    /// `NFTA_HOOK_*`
    hook { NUMBER = 1, PRIORITY = 2 }
    /// `NFTA_RULE_*`
    rule { TABLE = 1, CHAIN = 2, EXPRESSIONS = 4, USERDATA = 7 }
    /// `NFTA_EXPR_*`
    expression { NAME = 1, DATA = 2 }
    /// `NFTA_SET_*`
    set {
        TABLE = 1, NAME = 2, FLAGS = 3, KEY_TYPE = 4, KEY_LEN = 5, DATA_TYPE = 6, DATA_LEN = 7, DESC = 9, ID = 10,
        TIMEOUT = 11, USERDATA = 13,
    }
    /// `NFTA_SET_DESC_*`
    desc { SIZE = 1, CONCAT = 2 }
    /// `NFTA_SET_FIELD_*`
    field { LEN = 1 }
    /// `NFTA_SET_ELEM_LIST_*`
    elements { TABLE = 1, SET = 2, ELEMENTS = 3 }
    /// `NFTA_SET_ELEM_*`
    element {
        KEY = 1, DATA = 2, TIMEOUT = 4, EXPIRATION = 5, PAD = 8, KEY_END = 10,
    }
    /// `NFTA_DATA_*`
    data { VALUE = 1, VERDICT = 2 }
    /// `NFTA_VERDICT_*`
    verdict { CODE = 1, CHAIN = 2 }
    /// `NFTA_META_*`
    meta { DREG = 1, KEY = 2, SREG = 3 }
    /// `NFTA_PAYLOAD_*`
    payload { DREG = 1, BASE = 2, OFFSET = 3, LEN = 4 }
    /// `NFTA_CT_*`
    ct { DREG = 1, KEY = 2, DIRECTION = 3 }
    /// `NFTA_FIB_*`
    fib { DREG = 1, RESULT = 2, FLAGS = 3 }
    /// `NFTA_IMMEDIATE_*`
    immediate { DREG = 1, DATA = 2 }
    /// `NFTA_BITWISE_*`
    bitwise { SREG = 1, DREG = 2, LEN = 3, MASK = 4, XOR = 5, OP = 6 }
    /// `NFTA_CMP_*`
    compare { SREG = 1, OP = 2, DATA = 3 }
    /// `NFTA_LOOKUP_*`
    lookup { SET = 1, SREG = 2, DREG = 3, FLAGS = 5 }
    /// `NFTA_NG_*`
    numgen { DREG = 1, MODULUS = 2, TYPE = 3, OFFSET = 4 }
    /// `NFTA_DYNSET_*`
    dynset { SET = 1, OP = 3, SREG_KEY = 4, SREG_DATA = 5, TIMEOUT = 6, PAD = 8, FLAGS = 9 }
    /// `NFTA_NAT_*`
    nat {
        TYPE = 1, FAMILY = 2, REG_ADDR_MIN = 3, REG_ADDR_MAX = 4, REG_PROTO_MIN = 5, REG_PROTO_MAX = 6, FLAGS = 7,
    }
    /// `NFTA_MASQ_*`
    masquerade { FLAGS = 1, REG_PROTO_MIN = 2, REG_PROTO_MAX = 3 }
    /// `NFTA_REJECT_*`
    reject { TYPE = 1, CODE = 2 }
}

/// Defines a number for each value, and the way back.
macro_rules! numbers {
    ($(#[$doc:meta] $number:ident, $value:ident: $of:ty = { $($variant:path = $code:literal),* $(,)? })*) => {$(
        #[$doc]
        pub(super) const fn $number(value: $of) -> u32 {
            match value { $($variant => $code),* }
        }

        /// The way back.
        pub(super) const fn $value(number: u32) -> Option<$of> {
            Some(match number { $($code => $variant,)* _ => return None })
        }
    )*};
}

numbers! {
    /// `NF_INET_*`
    hook_number, hook_of: Hook = {
        Hook::Prerouting = 0, Hook::Input = 1, Hook::Forward = 2, Hook::Output = 3, Hook::Postrouting = 4,
    }
    /// `NF_DROP` and `NF_ACCEPT`
    policy_number, policy: Policy = { Policy::Drop = 0, Policy::Accept = 1 }
    /// `NFT_META_*`
    meta_number, meta_key: MetaKey = {
        MetaKey::Mark = 3, MetaKey::InputIndex = 4, MetaKey::OutputIndex = 5, MetaKey::InputName = 6,
        MetaKey::OutputName = 7, MetaKey::NfProto = 15, MetaKey::L4Proto = 16,
    }
    /// `NFT_PAYLOAD_*_HEADER`
    header_number, header: Header = { Header::Network = 1, Header::Transport = 2 }
    /// `NFTA_FIB_F_*`
    fib_number, fib_address: FibAddress = { FibAddress::Source = 1, FibAddress::Destination = 2 }
    /// `NFT_CMP_*`
    comparison_number, comparison: Comparison = {
        Comparison::Equal = 0, Comparison::NotEqual = 1, Comparison::Less = 2, Comparison::LessOrEqual = 3,
        Comparison::Greater = 4, Comparison::GreaterOrEqual = 5,
    }
    /// `NFT_NG_*`
    numgen_number, numgen_kind: Numgen = { Numgen::Incremental = 0, Numgen::Random = 1 }
    /// `NFT_DYNSET_OP_*`
    dynset_number, dynset_op: DynsetOp = { DynsetOp::Add = 0, DynsetOp::Update = 1, DynsetOp::Delete = 2 }
}

/// The name of a chain's type.
pub(super) const fn chain_type_name(of: ChainType) -> &'static str {
    match of {
        ChainType::Filter => "filter",
        ChainType::Nat => "nat",
        ChainType::Route => "route",
    }
}

/// The way back.
pub(super) fn chain_type(name: &str) -> Option<ChainType> {
    [ChainType::Filter, ChainType::Nat, ChainType::Route].into_iter().find(|of| chain_type_name(*of) == name)
}

/// `NFT_REG_VERDICT`
pub(super) const VERDICT_REGISTER: u32 = 0;
/// `NFT_REG32_00`
const FIRST_REGISTER: u32 = 8;

pub(super) fn register_number(register: Register) -> u32 {
    FIRST_REGISTER + u32::from(register.number())
}

/// The kernel reports every fourth register by its old name: `NFT_REG_1` to `NFT_REG_4`, of 16 octets each.
pub(super) fn register(number: u32) -> Option<Register> {
    let n = match number {
        1..=4 => 4 * (number - 1),
        _ => number.checked_sub(FIRST_REGISTER)?,
    };
    Register::new(u8::try_from(n).ok()?)
}

/// `NFT_CONTINUE`, `NFT_JUMP`, `NFT_GOTO` and `NFT_RETURN` of `enum nft_verdicts`.
pub(super) const CONTINUE: i32 = -1;
pub(super) const JUMP: i32 = -3;
pub(super) const GOTO: i32 = -4;
pub(super) const RETURN: i32 = -5;

/// `NFT_FIB_RESULT_ADDRTYPE`
pub(super) const FIB_ADDRESS_TYPE: u32 = 3;
/// `NFT_LOOKUP_F_INV`
pub(super) const LOOKUP_INVERTED: u32 = 1;
/// `NFT_NAT_DNAT`
pub(super) const DNAT: u32 = 1;
/// `NF_NAT_RANGE_MAP_IPS` and `NF_NAT_RANGE_PROTO_SPECIFIED`, which the kernel derives.
pub(super) const NAT_DERIVED: u32 = 3;
/// `NF_NAT_RANGE_PROTO_SPECIFIED`, which the kernel does not derive for masquerade.
pub(super) const PORTS_SPECIFIED: u32 = 2;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`
pub(super) const FULLY_RANDOM: u32 = 16;
/// `NFT_REJECT_ICMP_UNREACH` and `NFT_REJECT_TCP_RST`
pub(super) const UNREACHABLE: u32 = 0;
pub(super) const TCP_RESET: u32 = 1;

/// `NFT_SET_MAP`
pub(super) const MAP: u32 = 8;
/// `NFT_SET_CONCAT`: an element has a range for each field.
pub(super) const CONCAT: u32 = 0x80;
/// `NFT_DATA_VERDICT`
pub(super) const VERDICT_TYPE: u32 = 0xffff_ff00;
/// Bits of each type in the type of a concatenation: `TYPE_BITS` of nft.
pub(super) const TYPE_BITS: u32 = 6;
/// `NFTNL_UDATA_RULE_COMMENT`, by which nft stores comments.
pub(super) const COMMENT: u8 = 0;

/// `NFTNL_UDATA_SET_KEYBYTEORDER`, `NFTNL_UDATA_SET_DATABYTEORDER` and `BYTEORDER_HOST_ENDIAN`.
pub(super) const KEY_ORDER: u8 = 0;
pub(super) const VALUE_ORDER: u8 = 1;
pub(super) const HOST_ORDER: u32 = 1;

/// nft's number of a type.
pub(super) const fn type_number(of: DataType) -> u32 {
    match of {
        DataType::Ipv4 => 7,
        DataType::Ipv6 => 8,
        DataType::Protocol => 12,
        DataType::Port => 13,
        DataType::Mark => 19,
        DataType::InterfaceName => 41,
        DataType::Other(number) => number as u32,
    }
}

/// The way back.
pub(super) fn data_type(number: u32) -> DataType {
    match number {
        7 => DataType::Ipv4,
        8 => DataType::Ipv6,
        12 => DataType::Protocol,
        13 => DataType::Port,
        19 => DataType::Mark,
        41 => DataType::InterfaceName,
        // Six bits.
        number => DataType::Other(number.to_le_bytes()[0]),
    }
}
