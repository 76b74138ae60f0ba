//! Transactions as batches of messages.

use std::io;

use lb_core::packets::nft::{
    Base, Change, CtKey, DataType, Direction, Element, Expression, Family, Key, LookupTo, MetaKey, Octets,
    Reject, Rule, SetFlags, SetSpec, TableId, Transaction, Value, ValueType, Verdict, registers_len,
};
use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST};

use super::wire;
use crate::nfnetlink::{Head, Writer, family_number};

/// Most octets of the elements in one message: the length of an attribute has 16 bits, its header included.
const MAX_LIST: usize = u16::MAX as usize;

/// A transaction as one datagram.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) octets: Vec<u8>,
    /// For each message behind the beginning: which change it is of, and its first octet.
    pub(super) messages: Vec<(usize, usize)>,
}

/// Encodes a transaction. Messages are numbered from `sequence` on, the beginning of the batch first.
///
/// Without an end, the kernel checks the changes and makes none.
///
/// # Errors
///
/// `EMSGSIZE` if a name or rule is longer than an attribute can be.
pub(super) fn batch(transaction: &Transaction, sequence: u32, has_end: bool) -> io::Result<Batch> {
    let mut encoder = Encoder { writer: Writer::default(), sequence, messages: Vec::new() };
    encoder.delimiter(wire::message::BEGIN, transaction.generation);
    for (n, (table, change)) in transaction.changes.iter().enumerate() {
        encoder.change(n, table, change);
    }
    if let Some((_, last)) = encoder.messages.last() {
        encoder.writer.add_flags(*last, NLM_F_ACK);
    }
    if has_end {
        encoder.delimiter(wire::message::END, None);
    }
    Ok(Batch { octets: encoder.writer.finish()?, messages: encoder.messages })
}

struct Encoder {
    writer: Writer,
    /// The number of the next message.
    sequence: u32,
    messages: Vec<(usize, usize)>,
}

impl Encoder {
    fn delimiter(&mut self, kind: u16, generation: Option<u32>) {
        let head = Head { kind, flags: NLM_F_REQUEST, family: 0, resource: wire::message::BATCH_OF };
        self.writer.message(head, self.sequence, |writer| {
            if let Some(generation) = generation {
                writer.be32(wire::batch::GENERATION, generation);
            }
        });
        self.sequence = self.sequence.wrapping_add(1);
    }

    fn change(&mut self, n: usize, table: &TableId, change: &Change) {
        use wire::{chain, message, rule, set};
        match change {
            Change::AddTable => self.message(n, table, message::NEW_TABLE, NLM_F_CREATE, |writer| {
                writer.text(wire::table::NAME, &table.name);
                writer.be32(wire::table::FLAGS, 0);
            }),
            Change::DeleteTable => self.message(n, table, message::DELETE_TABLE, 0, |writer| {
                writer.text(wire::table::NAME, &table.name);
            }),
            Change::AddChain(name, base) => {
                self.message(n, table, message::NEW_CHAIN, NLM_F_CREATE, |writer| {
                    writer.text(chain::TABLE, &table.name);
                    writer.text(chain::NAME, name);
                    if let Some(base) = base {
                        write_base(writer, *base);
                    }
                });
            }
            Change::DeleteChain(name) => self.message(n, table, message::DELETE_CHAIN, 0, |writer| {
                writer.text(chain::TABLE, &table.name);
                writer.text(chain::NAME, name);
            }),
            Change::FlushChain(name) => self.message(n, table, message::DELETE_RULE, 0, |writer| {
                writer.text(rule::TABLE, &table.name);
                writer.text(rule::CHAIN, name);
            }),
            Change::AddRule(name, value) => {
                self.message(n, table, message::NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, |writer| {
                    writer.text(rule::TABLE, &table.name);
                    writer.text(rule::CHAIN, name);
                    write_rule(writer, value, table.family);
                });
            }
            Change::AddSet(name, spec) => {
                // The kernel needs a number for sets that are named later in the batch; names do as well.
                let id = self.sequence;
                self.message(n, table, message::NEW_SET, NLM_F_CREATE, |writer| {
                    writer.text(set::TABLE, &table.name);
                    writer.text(set::NAME, name);
                    writer.be32(set::ID, id);
                    write_spec(writer, spec);
                });
            }
            Change::DeleteSet(name) => self.message(n, table, message::DELETE_SET, 0, |writer| {
                writer.text(set::TABLE, &table.name);
                writer.text(set::NAME, name);
            }),
            Change::FlushSet(name) => self.message(n, table, message::DELETE_ELEMENT, 0, |writer| {
                writer.text(wire::elements::TABLE, &table.name);
                writer.text(wire::elements::SET, name);
            }),
            Change::AddElements(name, elements) => {
                let write = |writer: &mut Writer, (key, element): &(Key, Element)| {
                    write_element(writer, key, Some(element));
                };
                self.elements(n, table, (message::NEW_ELEMENT, NLM_F_CREATE), name, elements, write);
            }
            Change::DeleteElements(name, keys) => {
                let write = |writer: &mut Writer, key: &Key| write_element(writer, key, None);
                self.elements(n, table, (message::DELETE_ELEMENT, 0), name, keys, write);
            }
        }
    }

    fn message(&mut self, n: usize, table: &TableId, kind: u16, flags: u16, body: impl FnOnce(&mut Writer)) {
        self.messages.push((n, self.writer.len()));
        let head =
            Head { kind, flags: NLM_F_REQUEST | flags, family: family_number(table.family), resource: 0 };
        self.writer.message(head, self.sequence, body);
        self.sequence = self.sequence.wrapping_add(1);
    }

    /// Writes elements, as many to a message as fit.
    fn elements<T>(
        &mut self,
        n: usize,
        table: &TableId,
        (kind, flags): (u16, u16),
        set: &str,
        mut elements: &[T],
        write: impl Fn(&mut Writer, &T),
    ) {
        while !elements.is_empty() {
            let mut n_written = 0;
            self.message(n, table, kind, flags, |writer| {
                writer.text(wire::elements::TABLE, &table.name);
                writer.text(wire::elements::SET, set);
                let start = writer.len();
                writer.nested(wire::elements::ELEMENTS, |writer| {
                    for element in elements {
                        let before = writer.len();
                        writer.nested(wire::list::ELEMENT, |writer| write(writer, element));
                        // One element alone always fits.
                        if n_written > 0 && writer.len() - start > MAX_LIST {
                            writer.truncate(before);
                            break;
                        }
                        n_written += 1;
                    }
                });
            });
            elements = &elements[n_written..];
        }
    }
}

fn write_base(writer: &mut Writer, base: Base) {
    writer.text(wire::chain::TYPE, wire::chain_type_name(base.kind));
    writer.nested(wire::chain::HOOK, |writer| {
        writer.be32(wire::hook::NUMBER, wire::hook_number(base.hook));
        writer.be32(wire::hook::PRIORITY, base.priority.cast_unsigned());
    });
    writer.be32(wire::chain::POLICY, wire::policy_number(base.policy));
}

fn write_rule(writer: &mut Writer, rule: &Rule, family: Family) {
    writer.nested(wire::rule::EXPRESSIONS, |writer| {
        for expression in &rule.expressions {
            writer.nested(wire::list::ELEMENT, |writer| write_expression(writer, expression, family));
        }
    });
    if let Some(comment) = &rule.comment {
        // Type, length, and the text with its terminator.
        let len = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
        let text = [&[wire::COMMENT, len], comment.as_bytes(), &[0]].concat();
        writer.octets(wire::rule::USERDATA, &text);
    }
}

fn write_spec(writer: &mut Writer, spec: &SetSpec) {
    use wire::set;
    let is_map = if spec.value == ValueType::None { 0 } else { wire::MAP };
    let is_interval = spec.flags.contains(SetFlags::INTERVAL);
    let has_ranges = if is_interval { wire::CONCAT } else { 0 };
    writer.be32(set::FLAGS, spec.flags.0 | is_map | has_ranges);
    writer.be32(set::KEY_TYPE, concatenation(&spec.key));
    writer.be32(set::KEY_LEN, len(&spec.key));
    match &spec.value {
        ValueType::None => {}
        ValueType::Verdict => writer.be32(set::DATA_TYPE, wire::VERDICT_TYPE),
        ValueType::Data(fields) => {
            writer.be32(set::DATA_TYPE, concatenation(fields));
            writer.be32(set::DATA_LEN, len(fields));
        }
    }
    if is_interval || spec.size.is_some() {
        writer.nested(set::DESC, |writer| {
            if let Some(size) = spec.size {
                writer.be32(wire::desc::SIZE, size.get());
            }
            if is_interval {
                writer.nested(wire::desc::CONCAT, |writer| {
                    for field in &spec.key {
                        let len = u32::try_from(field.len()).unwrap_or_default();
                        writer.nested(wire::list::ELEMENT, |writer| writer.be32(wire::field::LEN, len));
                    }
                });
            }
        });
    }
    if let Some(timeout) = spec.timeout {
        writer.be64(set::TIMEOUT, timeout.get().into());
    }
    // Without this, nft shows a mark that is the whole key or value in network order.
    let is_mark = |fields: &[DataType]| fields == [DataType::Mark];
    let key = is_mark(&spec.key).then_some(wire::KEY_ORDER);
    let value =
        matches!(&spec.value, ValueType::Data(fields) if is_mark(fields)).then_some(wire::VALUE_ORDER);
    let orders: Vec<u8> = [key, value]
        .into_iter()
        .flatten()
        .flat_map(|entry| [&[entry, 4][..], &wire::HOST_ORDER.to_ne_bytes()].concat())
        .collect();
    if !orders.is_empty() {
        writer.octets(set::USERDATA, &orders);
    }
}

/// nft's number of a concatenation.
fn concatenation(fields: &[DataType]) -> u32 {
    fields.iter().fold(0, |number, field| number << wire::TYPE_BITS | wire::type_number(*field))
}

fn len(fields: &[DataType]) -> u32 {
    u32::try_from(registers_len(fields)).unwrap_or(u32::MAX)
}

fn write_element(writer: &mut Writer, key: &Key, element: Option<&Element>) {
    use wire::element;
    write_data(writer, element::KEY, &key.start);
    if let Some(end) = &key.end {
        write_data(writer, element::KEY_END, end);
    }
    let Some(content) = element else { return };
    match &content.value {
        Value::Data(octets) => write_data(writer, element::DATA, octets),
        Value::Verdict(verdict) => write_verdict(writer, element::DATA, verdict),
        Value::None => {}
        // The kernel refuses data without a value.
        Value::Unknown(_) => writer.nested(element::DATA, |_none| {}),
    }
    if let Some(timeout) = content.timeout {
        writer.be64(element::TIMEOUT, timeout.get().into());
    }
}

/// Writes a list of one element, which has only a key.
pub(super) fn key(writer: &mut Writer, key: &Octets) {
    writer.nested(wire::elements::ELEMENTS, |writer| {
        writer.nested(wire::list::ELEMENT, |writer| write_data(writer, wire::element::KEY, key));
    });
}

fn write_data(writer: &mut Writer, kind: u16, octets: &Octets) {
    writer.nested(kind, |writer| writer.octets(wire::data::VALUE, octets.as_slice()));
}

fn write_verdict(writer: &mut Writer, kind: u16, verdict: &Verdict) {
    let (code, chain) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Continue => (wire::CONTINUE, None),
        Verdict::Return => (wire::RETURN, None),
        Verdict::Jump(chain) => (wire::JUMP, Some(chain)),
        Verdict::Goto(chain) => (wire::GOTO, Some(chain)),
    };
    writer.nested(kind, |writer| {
        writer.nested(wire::data::VERDICT, |writer| {
            writer.be32(wire::verdict::CODE, code.cast_unsigned());
            if let Some(chain) = chain {
                writer.text(wire::verdict::CHAIN, chain);
            }
        });
    });
}

/// `NFT_CT_*`, and the direction.
pub(super) fn ct_number(key: CtKey) -> (u32, Option<Direction>) {
    match key {
        CtKey::State => (0, None),
        CtKey::Direction => (1, None),
        CtKey::Status => (2, None),
        CtKey::Mark => (3, None),
        CtKey::SourcePort(direction) => (11, Some(direction)),
        CtKey::DestinationPort(direction) => (12, Some(direction)),
        CtKey::Source(Family::V4, direction) => (19, Some(direction)),
        CtKey::Destination(Family::V4, direction) => (20, Some(direction)),
        CtKey::Source(Family::V6, direction) => (21, Some(direction)),
        CtKey::Destination(Family::V6, direction) => (22, Some(direction)),
    }
}

#[expect(clippy::too_many_lines, reason = "one arm for each expression")]
fn write_expression(writer: &mut Writer, expression: &Expression, family: Family) {
    use wire::{
        bitwise, compare, ct, dynset, fib, immediate, lookup, masquerade, meta, nat, numgen, payload,
        register_number as number, reject,
    };
    /// An expression's name and attributes.
    fn named(writer: &mut Writer, name: &str, body: impl FnOnce(&mut Writer)) {
        writer.text(wire::expression::NAME, name);
        writer.nested(wire::expression::DATA, body);
    }
    match expression {
        Expression::Meta { key, to } => named(writer, "meta", |writer| {
            writer.be32(meta::KEY, wire::meta_number(*key));
            writer.be32(meta::DREG, number(*to));
        }),
        Expression::SetMark { from } => named(writer, "meta", |writer| {
            writer.be32(meta::KEY, wire::meta_number(MetaKey::Mark));
            writer.be32(meta::SREG, number(*from));
        }),
        Expression::Payload { header, offset, len, to } => named(writer, "payload", |writer| {
            writer.be32(payload::DREG, number(*to));
            writer.be32(payload::BASE, wire::header_number(*header));
            writer.be32(payload::OFFSET, (*offset).into());
            writer.be32(payload::LEN, (*len).into());
        }),
        Expression::Ct { key, to } => named(writer, "ct", |writer| {
            let (key, direction) = ct_number(*key);
            writer.be32(ct::KEY, key);
            writer.be32(ct::DREG, number(*to));
            if let Some(direction) = direction {
                writer.octets(ct::DIRECTION, &[u8::from(direction == Direction::Reply)]);
            }
        }),
        Expression::FibType { of, to } => named(writer, "fib", |writer| {
            writer.be32(fib::FLAGS, wire::fib_number(*of));
            writer.be32(fib::RESULT, wire::FIB_ADDRESS_TYPE);
            writer.be32(fib::DREG, number(*to));
        }),
        Expression::Immediate { value, to } => named(writer, "immediate", |writer| {
            writer.be32(immediate::DREG, number(*to));
            write_data(writer, immediate::DATA, value);
        }),
        Expression::Verdict(verdict) => named(writer, "immediate", |writer| {
            writer.be32(immediate::DREG, wire::VERDICT_REGISTER);
            write_verdict(writer, immediate::DATA, verdict);
        }),
        Expression::Bitwise { from, mask, xor, to } => named(writer, "bitwise", |writer| {
            writer.be32(bitwise::SREG, number(*from));
            writer.be32(bitwise::DREG, number(*to));
            writer.be32(bitwise::LEN, u32::try_from(mask.as_slice().len()).unwrap_or(u32::MAX));
            write_data(writer, bitwise::MASK, mask);
            write_data(writer, bitwise::XOR, xor);
        }),
        Expression::Compare { from, op, value } => named(writer, "cmp", |writer| {
            writer.be32(compare::SREG, number(*from));
            writer.be32(compare::OP, wire::comparison_number(*op));
            write_data(writer, compare::DATA, value);
        }),
        Expression::Lookup { set, from, to } => named(writer, "lookup", |writer| {
            writer.text(lookup::SET, set);
            writer.be32(lookup::SREG, number(*from));
            match to {
                LookupTo::Matches => {}
                LookupTo::MatchesNot => writer.be32(lookup::FLAGS, wire::LOOKUP_INVERTED),
                LookupTo::Register(to) => writer.be32(lookup::DREG, number(*to)),
                LookupTo::Verdict => writer.be32(lookup::DREG, wire::VERDICT_REGISTER),
            }
        }),
        Expression::Numgen { kind, modulus, offset, to } => named(writer, "numgen", |writer| {
            writer.be32(numgen::DREG, number(*to));
            writer.be32(numgen::MODULUS, *modulus);
            writer.be32(numgen::TYPE, wire::numgen_number(*kind));
            writer.be32(numgen::OFFSET, *offset);
        }),
        Expression::Dynset { set, op, key, value, timeout } => named(writer, "dynset", |writer| {
            writer.text(dynset::SET, set);
            writer.be32(dynset::OP, wire::dynset_number(*op));
            writer.be32(dynset::SREG_KEY, number(*key));
            if let Some(value) = value {
                writer.be32(dynset::SREG_DATA, number(*value));
            }
            if let Some(timeout) = timeout {
                writer.be64(dynset::TIMEOUT, timeout.get().into());
            }
        }),
        Expression::Dnat { address, port } => named(writer, "nat", |writer| {
            writer.be32(nat::TYPE, wire::DNAT);
            writer.be32(nat::FAMILY, family_number(family).into());
            writer.be32(nat::REG_ADDR_MIN, number(*address));
            if let Some(port) = port {
                writer.be32(nat::REG_PROTO_MIN, number(*port));
            }
        }),
        Expression::Masquerade { ports, is_fully_random } => named(writer, "masq", |writer| {
            let of_ports = if ports.is_some() { wire::PORTS_SPECIFIED } else { 0 };
            let flags = of_ports | if *is_fully_random { wire::FULLY_RANDOM } else { 0 };
            if flags != 0 {
                writer.be32(masquerade::FLAGS, flags);
            }
            if let Some((first, last)) = ports {
                writer.be32(masquerade::REG_PROTO_MIN, number(*first));
                writer.be32(masquerade::REG_PROTO_MAX, number(*last));
            }
        }),
        Expression::Reject(answer) => named(writer, "reject", |writer| match answer {
            Reject::TcpReset => writer.be32(reject::TYPE, wire::TCP_RESET),
            Reject::Unreachable(code) => {
                writer.be32(reject::TYPE, wire::UNREACHABLE);
                writer.octets(reject::CODE, &[*code]);
            }
        }),
        Expression::Counter => named(writer, "counter", |_no_attributes| {}),
        Expression::Notrack => writer.text(wire::expression::NAME, "notrack"),
        // The kernel refuses the name, so that what cannot be expressed is never written as something else.
        Expression::Unknown(_) => writer.text(wire::expression::NAME, "unknown"),
    }
}
