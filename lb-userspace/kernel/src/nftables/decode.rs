//! The kernel's messages as values. What has no value becomes [`Unknown`]; nothing here fails or panics,
//! whatever the octets are.

use std::{collections::BTreeMap, num::NonZeroU32};

use lb_core::packets::nft::{
    Base, Chain, CtKey, DataType, Direction, Element, Expression, Family, Key, LookupTo, MetaKey, Name,
    Octets, Policy, Register, Reject, Rule, Set, SetFlags, SetSpec, Unknown, Value, ValueType, Verdict,
    registers_len,
};

use super::wire;
use crate::nfnetlink::{Attributes, family_number};

/// A chain without rules, and its name.
pub(super) fn chain(attributes: Attributes<'_>) -> Option<(Name, Chain)> {
    let name = attributes.text(wire::chain::NAME)?.into();
    let mut chain = Chain::default();
    if let Some(hook) = attributes.nested(wire::chain::HOOK) {
        chain.base = base(attributes, hook);
        if chain.base.is_none() {
            chain.rules.push(unknown_rule("a base chain of another kind"));
        }
    }
    Some((name, chain))
}

fn base(chain: Attributes<'_>, hook: Attributes<'_>) -> Option<Base> {
    Some(Base {
        kind: wire::chain_type(chain.text(wire::chain::TYPE)?)?,
        hook: wire::hook_of(hook.be32(wire::hook::NUMBER)?)?,
        priority: hook.be32(wire::hook::PRIORITY)?.cast_signed(),
        policy: chain.be32(wire::chain::POLICY).map_or(Some(Policy::Accept), wire::policy)?,
    })
}

fn unknown_rule(what: &str) -> Rule {
    Rule { expressions: vec![Expression::Unknown(Unknown(what.to_owned()))], comment: None }
}

/// A rule, and the name of its chain.
pub(super) fn rule(attributes: Attributes<'_>, family: Family) -> Option<(Name, Rule)> {
    let chain = attributes.text(wire::rule::CHAIN)?.into();
    let expressions = attributes.nested(wire::rule::EXPRESSIONS).unwrap_or(Attributes(&[]));
    let expressions = expressions.iter().map(|(_, octets)| expression(Attributes(octets), family)).collect();
    Some((chain, Rule { expressions, comment: attributes.get(wire::rule::USERDATA).and_then(comment) }))
}

/// The comment in a rule's user data: entries of type, length and value.
fn comment(mut octets: &[u8]) -> Option<Name> {
    while let [kind, len, rest @ ..] = octets {
        let (value, rest) = rest.split_at_checked(usize::from(*len))?;
        if *kind == wire::COMMENT {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return str::from_utf8(text).ok().map(Into::into);
        }
        octets = rest;
    }
    None
}

/// An expression; [`Expression::Unknown`] if it is of another kind or says more than a value can.
pub(super) fn expression(attributes: Attributes<'_>, family: Family) -> Expression {
    let name = attributes.text(wire::expression::NAME).unwrap_or_default();
    let data = attributes.nested(wire::expression::DATA).unwrap_or(Attributes(&[]));
    known(name, data, family)
        .unwrap_or_else(|| Expression::Unknown(Unknown(format!("expression {name} {:02x?}", data.0))))
}

#[expect(clippy::too_many_lines, reason = "one arm for each expression")]
fn known(name: &str, data: Attributes<'_>, family: Family) -> Option<Expression> {
    use wire::{
        bitwise, compare, ct, dynset, fib, immediate, lookup, masquerade, meta, nat, numgen, payload, reject,
    };
    let register = |kind| data.be32(kind).and_then(wire::register);
    let has_only = |kinds: &[u16]| data.are_all_in(kinds).then_some(());
    Some(match name {
        "meta" if data.get(meta::SREG).is_some() => {
            has_only(&[meta::KEY, meta::SREG])?;
            let MetaKey::Mark = wire::meta_key(data.be32(meta::KEY)?)? else { return None };
            Expression::SetMark { from: register(meta::SREG)? }
        }
        "meta" => {
            has_only(&[meta::KEY, meta::DREG])?;
            Expression::Meta { key: wire::meta_key(data.be32(meta::KEY)?)?, to: register(meta::DREG)? }
        }
        "payload" => {
            has_only(&[payload::DREG, payload::BASE, payload::OFFSET, payload::LEN])?;
            Expression::Payload {
                header: wire::header(data.be32(payload::BASE)?)?,
                offset: data.be32(payload::OFFSET)?.try_into().ok()?,
                len: data.be32(payload::LEN)?.try_into().ok()?,
                to: register(payload::DREG)?,
            }
        }
        "ct" => {
            has_only(&[ct::KEY, ct::DREG, ct::DIRECTION])?;
            let direction = match data.get(ct::DIRECTION) {
                None => None,
                Some([0]) => Some(Direction::Original),
                Some([1]) => Some(Direction::Reply),
                Some(_) => return None,
            };
            Expression::Ct { key: ct_key(data.be32(ct::KEY)?, direction)?, to: register(ct::DREG)? }
        }
        "fib" => {
            has_only(&[fib::FLAGS, fib::RESULT, fib::DREG])?;
            if data.be32(fib::RESULT)? != wire::FIB_ADDRESS_TYPE {
                return None;
            }
            Expression::FibType { of: wire::fib_address(data.be32(fib::FLAGS)?)?, to: register(fib::DREG)? }
        }
        "immediate" => {
            has_only(&[immediate::DREG, immediate::DATA])?;
            let (value, to) = (data.nested(immediate::DATA)?, data.be32(immediate::DREG)?);
            if to == wire::VERDICT_REGISTER {
                Expression::Verdict(verdict(value.nested(wire::data::VERDICT)?)?)
            } else {
                Expression::Immediate { value: octets(value)?, to: wire::register(to)? }
            }
        }
        "bitwise" => {
            has_only(&[
                bitwise::SREG,
                bitwise::DREG,
                bitwise::LEN,
                bitwise::MASK,
                bitwise::XOR,
                bitwise::OP,
            ])?;
            let mask = octets(data.nested(bitwise::MASK)?)?;
            let is_boolean = data.get(bitwise::OP).is_none_or(|op| op == [0; 4]);
            if !is_boolean || data.be32(bitwise::LEN)? as usize != mask.as_slice().len() {
                return None;
            }
            let xor = octets(data.nested(bitwise::XOR)?)?;
            Expression::Bitwise { from: register(bitwise::SREG)?, mask, xor, to: register(bitwise::DREG)? }
        }
        "cmp" => {
            has_only(&[compare::SREG, compare::OP, compare::DATA])?;
            Expression::Compare {
                from: register(compare::SREG)?,
                op: wire::comparison(data.be32(compare::OP)?)?,
                value: octets(data.nested(compare::DATA)?)?,
            }
        }
        "lookup" => {
            has_only(&[lookup::SET, lookup::SREG, lookup::DREG, lookup::FLAGS])?;
            let flags = data.get(lookup::FLAGS).map_or(Some(0), |_| data.be32(lookup::FLAGS))?;
            let to = match (data.get(lookup::DREG), flags) {
                (None, 0) => LookupTo::Matches,
                (None, wire::LOOKUP_INVERTED) => LookupTo::MatchesNot,
                (Some([0, 0, 0, 0]), 0) => LookupTo::Verdict,
                (Some(_), 0) => LookupTo::Register(register(lookup::DREG)?),
                _ => return None,
            };
            Expression::Lookup { set: data.text(lookup::SET)?.into(), from: register(lookup::SREG)?, to }
        }
        "numgen" => {
            has_only(&[numgen::DREG, numgen::MODULUS, numgen::TYPE, numgen::OFFSET])?;
            Expression::Numgen {
                kind: wire::numgen_kind(data.be32(numgen::TYPE)?)?,
                modulus: data.be32(numgen::MODULUS)?,
                offset: data.be32(numgen::OFFSET).unwrap_or_default(),
                to: register(numgen::DREG)?,
            }
        }
        "dynset" => {
            has_only(&[
                dynset::SET,
                dynset::OP,
                dynset::SREG_KEY,
                dynset::SREG_DATA,
                dynset::TIMEOUT,
                dynset::PAD,
                dynset::FLAGS,
            ])?;
            if data.get(dynset::FLAGS).is_some_and(|flags| flags != [0; 4]) {
                return None;
            }
            let value = data.get(dynset::SREG_DATA).map(|_| register(dynset::SREG_DATA));
            Expression::Dynset {
                set: data.text(dynset::SET)?.into(),
                op: wire::dynset_op(data.be32(dynset::OP)?)?,
                key: register(dynset::SREG_KEY)?,
                value: match value {
                    Some(value) => Some(value?),
                    None => None,
                },
                timeout: data.be64(dynset::TIMEOUT).and_then(milliseconds),
            }
        }
        "nat" => {
            let family_is_ours = data.be32(nat::FAMILY)? == u32::from(family_number(family));
            let flags = data.be32(nat::FLAGS).unwrap_or_default() & !wire::NAT_DERIVED;
            let (address, port) =
                (same(data, nat::REG_ADDR_MIN, nat::REG_ADDR_MAX)?, data.get(nat::REG_PROTO_MIN));
            if data.be32(nat::TYPE)? != wire::DNAT || !family_is_ours || flags != 0 {
                return None;
            }
            has_only(&[1, 2, 3, 4, 5, 6, 7])?;
            let port = match port {
                Some(_) => Some(same(data, nat::REG_PROTO_MIN, nat::REG_PROTO_MAX)?),
                None => None,
            };
            Expression::Dnat { address, port }
        }
        "masq" => {
            has_only(&[masquerade::FLAGS, masquerade::REG_PROTO_MIN, masquerade::REG_PROTO_MAX])?;
            let flags = data.get(masquerade::FLAGS).map_or(Some(0), |_| data.be32(masquerade::FLAGS))?;
            let ports = match data.get(masquerade::REG_PROTO_MIN) {
                Some(_) => {
                    let port = |attribute| wire::register(data.be32(attribute)?);
                    Some((port(masquerade::REG_PROTO_MIN)?, port(masquerade::REG_PROTO_MAX)?))
                }
                None => None,
            };
            let of_ports = if ports.is_some() { wire::PORTS_SPECIFIED } else { 0 };
            if flags & !wire::FULLY_RANDOM != of_ports {
                return None;
            }
            Expression::Masquerade { ports, is_fully_random: flags & wire::FULLY_RANDOM != 0 }
        }
        "reject" => {
            has_only(&[reject::TYPE, reject::CODE])?;
            match data.be32(reject::TYPE)? {
                wire::TCP_RESET => Expression::Reject(Reject::TcpReset),
                wire::UNREACHABLE => Expression::Reject(Reject::Unreachable(data.octet(reject::CODE)?)),
                _ => return None,
            }
        }
        "counter" => Expression::Counter,
        "notrack" => Expression::Notrack,
        _ => return None,
    })
}

/// The register in two attributes: the ends of a range of one. The second may be absent.
fn same(data: Attributes<'_>, min: u16, max: u16) -> Option<Register> {
    let register = wire::register(data.be32(min)?)?;
    let is_same = data.get(max).is_none() || data.be32(max).and_then(wire::register) == Some(register);
    is_same.then_some(register)
}

fn ct_key(number: u32, direction: Option<Direction>) -> Option<CtKey> {
    Some(match (number, direction) {
        (0, None) => CtKey::State,
        (1, None) => CtKey::Direction,
        (2, None) => CtKey::Status,
        (3, None) => CtKey::Mark,
        (11, Some(direction)) => CtKey::SourcePort(direction),
        (12, Some(direction)) => CtKey::DestinationPort(direction),
        (19, Some(direction)) => CtKey::Source(Family::V4, direction),
        (20, Some(direction)) => CtKey::Destination(Family::V4, direction),
        (21, Some(direction)) => CtKey::Source(Family::V6, direction),
        (22, Some(direction)) => CtKey::Destination(Family::V6, direction),
        _ => return None,
    })
}

/// A set without elements, and its name.
pub(super) fn set(attributes: Attributes<'_>) -> Option<(Name, Set)> {
    use wire::set;
    let flags = attributes.be32(set::FLAGS).unwrap_or_default();
    let key = fields(attributes, set::KEY_TYPE, set::KEY_LEN);
    let value = match (flags & wire::MAP != 0, attributes.be32(set::DATA_TYPE)) {
        (false, _) => ValueType::None,
        (true, Some(wire::VERDICT_TYPE)) => ValueType::Verdict,
        (true, _) => ValueType::Data(fields(attributes, set::DATA_TYPE, set::DATA_LEN)),
    };
    let flags = if flags & SetFlags::INTERVAL.0 != 0 { flags & !wire::CONCAT } else { flags };
    let size = attributes.nested(set::DESC).and_then(|desc| desc.be32(wire::desc::SIZE));
    let spec = SetSpec {
        key,
        value,
        flags: SetFlags(flags & !wire::MAP),
        timeout: attributes.be64(set::TIMEOUT).and_then(milliseconds),
        size: size.and_then(NonZeroU32::new),
    };
    Some((attributes.text(set::NAME)?.into(), Set { spec, elements: BTreeMap::new() }))
}

/// The fields of a type. If the length is another, something else is stored under the type's name.
fn fields(set: Attributes<'_>, kind: u16, len: u16) -> Vec<DataType> {
    let mut rest = set.be32(kind).unwrap_or_default();
    let mut fields = Vec::new();
    while rest != 0 {
        fields.push(wire::data_type(rest & ((1 << wire::TYPE_BITS) - 1)));
        rest >>= wire::TYPE_BITS;
    }
    fields.reverse();
    if set.be32(len).map(|len| len as usize) == Some(registers_len(&fields)) {
        fields
    } else {
        vec![DataType::Other(0)]
    }
}

/// An element, and its key.
pub(super) fn element(attributes: Attributes<'_>) -> (Key, Element) {
    use wire::element;
    let start = attributes.nested(element::KEY).and_then(octets).unwrap_or([].into());
    let end = attributes.nested(element::KEY_END).and_then(octets);
    let known =
        [element::KEY, element::KEY_END, element::DATA, element::TIMEOUT, element::EXPIRATION, element::PAD];
    let value = match attributes.nested(element::DATA) {
        None => Some(Value::None),
        Some(data) => {
            let verdict = data.nested(wire::data::VERDICT).and_then(verdict).map(Value::Verdict);
            verdict.or_else(|| octets(data).map(Value::Data))
        }
    };
    let value = value.filter(|_| attributes.are_all_in(&known) && !start.as_slice().is_empty());
    let value = value.unwrap_or_else(|| Value::Unknown(Unknown(format!("element {:02x?}", attributes.0))));
    let timeout = attributes.be64(element::TIMEOUT).and_then(milliseconds);
    (Key { start, end }, Element { value, timeout })
}

/// What is longer than 49 days ends there.
fn milliseconds(number: u64) -> Option<NonZeroU32> {
    NonZeroU32::new(u32::try_from(number).unwrap_or(u32::MAX))
}

/// The data in `NFTA_DATA_VALUE`.
fn octets(data: Attributes<'_>) -> Option<Octets> {
    let octets = data.get(wire::data::VALUE)?;
    (octets.len() <= Octets::MAX).then(|| octets.into())
}

fn verdict(attributes: Attributes<'_>) -> Option<Verdict> {
    let chain = || attributes.text(wire::verdict::CHAIN).map(Name::from);
    Some(match attributes.be32(wire::verdict::CODE)?.cast_signed() {
        0 => Verdict::Drop,
        1 => Verdict::Accept,
        wire::CONTINUE => Verdict::Continue,
        wire::RETURN => Verdict::Return,
        wire::JUMP => Verdict::Jump(chain()?),
        wire::GOTO => Verdict::Goto(chain()?),
        _ => return None,
    })
}
