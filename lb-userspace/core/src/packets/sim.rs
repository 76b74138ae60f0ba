//! What the kernel does with these values: transactions applied to tables, and packets sent through them.
//!
//! For `explain`, and for tests without a kernel. A packet is the first of its connection. Expressions that
//! socklb's rules do not have match nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
};

use super::{
    nft::{
        Chain, ChainType, Change, Comparison, CtKey, Direction, DynsetOp, Element, Expression, FIB_LOCAL,
        FibAddress, Header, Hook, Key, LookupTo, MetaKey, Name, Numgen, Octets, Register, Reject, Rule, Set,
        Table, TableId, Value, Verdict, ct_state, ct_status,
    },
    skeleton::address as octets,
};

/// Applies changes as the kernel does: all, or none.
///
/// # Errors
///
/// The change that the kernel refuses, and why.
pub fn apply(
    tables: &mut BTreeMap<TableId, Table>,
    changes: &[(TableId, Change)],
) -> Result<(), (Change, &'static str)> {
    let mut after = tables.clone();
    for (id, change) in changes {
        apply_one(&mut after, id, change).map_err(|problem| (change.clone(), problem))?;
    }
    for table in after.values() {
        let rules = || table.chains.values().flat_map(|chain| &chain.rules);
        let expressions = || rules().flat_map(|rule| &rule.expressions);
        for expression in expressions() {
            if let Expression::Lookup { set, .. } | Expression::Dynset { set, .. } = expression
                && !table.sets.contains_key(set)
            {
                return Err((Change::DeleteSet(set.clone()), "a rule uses it"));
            }
        }
        let of_rules = expressions().filter_map(|expression| match expression {
            Expression::Verdict(verdict) => Some(verdict),
            _ => None,
        });
        let of_sets = table.sets.values().flat_map(|set| set.elements.values());
        let of_sets = of_sets.filter_map(|element| match &element.value {
            Value::Verdict(verdict) => Some(verdict),
            _ => None,
        });
        for verdict in of_rules.chain(of_sets) {
            if let Verdict::Jump(chain) | Verdict::Goto(chain) = verdict
                && !table.chains.contains_key(chain)
            {
                return Err((Change::DeleteChain(chain.clone()), "a verdict names it"));
            }
        }
    }
    *tables = after;
    Ok(())
}

fn apply_one(
    tables: &mut BTreeMap<TableId, Table>,
    id: &TableId,
    change: &Change,
) -> Result<(), &'static str> {
    if *change == Change::AddTable {
        tables.entry(id.clone()).or_default().flags = 0;
        return Ok(());
    }
    let table = tables.get_mut(id).ok_or("there is no such table")?;
    match change {
        Change::AddTable => {}
        Change::DeleteTable => drop(tables.remove(id)),
        Change::AddChain(name, base) => {
            let chain =
                table.chains.entry(name.clone()).or_insert_with(|| Chain { base: *base, rules: Vec::new() });
            if chain.base != *base {
                return Err("it has another base");
            }
        }
        Change::DeleteChain(name) => {
            let chain = table.chains.remove(name).ok_or("there is no such chain")?;
            if !chain.rules.is_empty() {
                return Err("it has rules");
            }
        }
        Change::FlushChain(name) => {
            table.chains.get_mut(name).ok_or("there is no such chain")?.rules.clear();
        }
        Change::AddRule(name, rule) => {
            table.chains.get_mut(name).ok_or("there is no such chain")?.rules.push(rule.clone());
        }
        Change::AddSet(name, spec) => {
            let new = || Set { spec: spec.clone(), elements: BTreeMap::new() };
            if table.sets.entry(name.clone()).or_insert_with(new).spec != *spec {
                return Err("it has another specification");
            }
        }
        Change::DeleteSet(name) => drop(table.sets.remove(name).ok_or("there is no such set")?),
        Change::FlushSet(name) => {
            table.sets.get_mut(name).ok_or("there is no such set")?.elements.clear();
        }
        Change::AddElements(name, elements) => {
            let set = table.sets.get_mut(name).ok_or("there is no such set")?;
            for (key, element) in elements {
                if key.start.as_slice().len() != set.spec.key_len() {
                    return Err("a key has another length");
                }
                if set.elements.get(key).is_some_and(|standing| standing.value != element.value) {
                    return Err("there is such an element with another value");
                }
                set.elements.insert(key.clone(), element.clone());
            }
        }
        Change::DeleteElements(name, keys) => {
            let set = table.sets.get_mut(name).ok_or("there is no such set")?;
            for key in keys {
                set.elements.remove(key).ok_or("there is no such element")?;
            }
        }
    }
    Ok(())
}

/// The first packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: SocketAddr,
    /// The number of its protocol.
    pub protocol: u8,
    /// Whether this node sends it; else it arrives.
    pub is_own: bool,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// No rule is about it.
    Passes,
    /// It goes to an endpoint.
    Translated {
        /// The endpoint.
        endpoint: SocketAddr,
        /// Whether the endpoint sees an address of this node as the sender.
        is_masqueraded: bool,
    },
    /// It is answered with a TCP reset, or with "port unreachable".
    Rejected,
    /// It is gone.
    Dropped,
}

/// Sends a packet through a table. `draw` returns a number below the one it gets.
///
/// Elements that rules add stay in the table. What is routed on and what is for this node is treated alike:
/// the rules for both are the same.
pub fn send(table: &mut Table, packet: Packet, draw: &mut dyn FnMut(u32) -> u32) -> Outcome {
    let (outcome, passage) = pass(table, packet, draw);
    for Update { set, op, key, value, .. } in passage.updates {
        let Some(set) = table.sets.get_mut(&set) else { continue };
        match op {
            DynsetOp::Delete => drop(set.elements.remove(&key)),
            DynsetOp::Add | DynsetOp::Update => {
                set.elements.entry(key).or_insert_with(|| value.into());
            }
        }
    }
    outcome
}

/// All that may become of a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// One for each endpoint that may be drawn, else one.
    pub all: BTreeSet<Outcome>,
    /// The set or map with the element that decides; `None` if a rule alone does, or no rule is about the
    /// packet.
    pub decided_by: Option<Name>,
    /// How long a rule records the endpoint of the client, milliseconds.
    pub recorded: Option<NonZeroU32>,
}

/// What may become of a packet, whichever numbers are drawn. The table stays as it is.
///
/// For tables of socklb: there each index that can be drawn first has an endpoint, or leads to one that can.
#[must_use]
pub fn outcomes(table: &Table, packet: Packet) -> Outcomes {
    let mut found = Outcomes::default();
    each_draw(most_draws(table), |draw| {
        let (outcome, Passage { decided_by, updates, .. }) = pass(table, packet, draw);
        found.all.insert(outcome);
        found.decided_by = decided_by;
        found.recorded = found.recorded.or(updates.iter().find_map(|update| update.timeout));
    });
    found
}

/// The elements that a packet's rules look for, whichever numbers are drawn and whether they are there or
/// not. Each look-up is a set and a key.
///
/// In a table without some elements it does not get further than those lead: add what the kernel has of them,
/// and ask again, until nothing new is looked for. Then [`outcomes`] are those of the whole table.
#[must_use]
pub fn lookups(table: &Table, packet: Packet) -> BTreeSet<(Name, Octets)> {
    let mut found = BTreeSet::new();
    each_draw(most_draws(table), |draw| found.extend(pass(table, packet, draw).1.lookups));
    found
}

/// What may become of a packet while a transaction makes `after` of `before`. Its first look-ups see the
/// elements of `before`, the others those of `after`; a hook that it enters meanwhile has the rules of its
/// own beginning.
#[must_use]
pub fn outcomes_meanwhile(before: &Table, after: &Table, packet: Packet) -> BTreeSet<Outcome> {
    let mut found = BTreeSet::new();
    let (mut n_before, mut is_over) = (0, false);
    while !is_over {
        is_over = true;
        each_draw(u32::MAX, |draw| {
            let mut passage = Passage::new(before, packet, draw);
            passage.later = Some((n_before, after));
            found.insert(passage.hooks());
            is_over &= passage.later.is_some();
        });
        n_before += 1;
    }
    found
}

/// How many numbers may be drawn in a table of socklb: more than half of the indices have an element. Another
/// program may have added a rule with more.
fn most_draws(table: &Table) -> u32 {
    let n_elements = table.sets.values().map(|set| set.elements.len()).max().unwrap_or_default();
    u32::try_from(n_elements).unwrap_or(u32::MAX).saturating_mul(2)
}

/// Repeats a passage with each number that may be drawn below the largest bound that it asks for, at most
/// `most`.
fn each_draw(most: u32, mut pass: impl FnMut(&mut dyn FnMut(u32) -> u32)) {
    let (mut n, mut n_numbers) = (0, 1);
    while n < n_numbers {
        pass(&mut |below| {
            n_numbers = n_numbers.max(below.min(most));
            n % below.max(1)
        });
        n += 1;
    }
}

fn pass<'a>(table: &'a Table, packet: Packet, draw: &'a mut dyn FnMut(u32) -> u32) -> (Outcome, Passage<'a>) {
    let mut passage = Passage::new(table, packet, draw);
    let outcome = passage.hooks();
    (outcome, passage)
}

enum Step {
    /// To the next rule: this one does not match, or says so.
    Next,
    Return,
    Accepted,
    Dropped,
    Rejected,
    Translated(SocketAddr),
    Masqueraded,
}

/// The kernel allows as many jumps (`NFT_JUMP_STACK_SIZE`).
const MAX_DEPTH: usize = 16;

struct Passage<'a> {
    /// The rules of this hook.
    table: &'a Table,
    /// The elements.
    sets: &'a Table,
    /// After how many look-ups the elements are others.
    later: Option<(usize, &'a Table)>,
    registers: [u8; 4 * Register::COUNT as usize],
    packet: Packet,
    original: SocketAddr,
    is_translated: bool,
    /// The last set in which the rule has found something.
    found: Option<&'a Name>,
    decided_by: Option<Name>,
    updates: Vec<Update>,
    lookups: Vec<(Name, Octets)>,
    draw: &'a mut dyn FnMut(u32) -> u32,
}

/// What a rule does to an element.
struct Update {
    set: Name,
    op: DynsetOp,
    key: Key,
    value: Value,
    timeout: Option<NonZeroU32>,
}

impl<'a> Passage<'a> {
    fn new(table: &'a Table, packet: Packet, draw: &'a mut dyn FnMut(u32) -> u32) -> Self {
        Self {
            table,
            sets: table,
            later: None,
            registers: [0; 4 * Register::COUNT as usize],
            packet,
            original: packet.destination,
            is_translated: false,
            found: None,
            decided_by: None,
            updates: Vec::new(),
            lookups: Vec::new(),
            draw,
        }
    }

    fn hooks(&mut self) -> Outcome {
        let hooks: &[Hook] = if self.packet.is_own {
            &[Hook::Output, Hook::Postrouting]
        } else {
            &[Hook::Prerouting, Hook::Forward, Hook::Postrouting]
        };
        let mut is_masqueraded = false;
        let mut translated_by = None;
        for hook in hooks {
            self.table = self.sets;
            let at_hook = |chain: &'a Chain| {
                let base = chain.base.filter(|base| base.hook == *hook)?;
                Some((base.priority, base.kind, chain))
            };
            let mut chains: Vec<_> = self.table.chains.values().filter_map(at_hook).collect();
            chains.sort_by_key(|(priority, ..)| *priority);
            let mut has_translation = false;
            for (_, kind, chain) in chains {
                // The first chain of type nat that translates decides.
                if kind == ChainType::Nat && has_translation {
                    continue;
                }
                match self.chain(chain, 0) {
                    Step::Rejected => return Outcome::Rejected,
                    Step::Dropped => return Outcome::Dropped,
                    Step::Translated(to) => {
                        has_translation = true;
                        translated_by = self.decided_by.take();
                        self.packet.destination = to;
                        self.is_translated = true;
                    }
                    Step::Masqueraded => is_masqueraded = true,
                    Step::Next | Step::Return | Step::Accepted => {}
                }
            }
        }
        self.decided_by = translated_by;
        if self.is_translated {
            Outcome::Translated { endpoint: self.packet.destination, is_masqueraded }
        } else {
            Outcome::Passes
        }
    }

    fn chain(&mut self, chain: &'a Chain, depth: usize) -> Step {
        for rule in &chain.rules {
            match self.rule(rule, depth) {
                Step::Next => {}
                Step::Return => return Step::Next,
                decided => return decided,
            }
        }
        Step::Next
    }

    /// A missing chain, or too many jumps: no table of the kernel has them.
    fn jump(&mut self, name: &Name, depth: usize) -> Step {
        if self.found.is_some() {
            self.decided_by = self.found.cloned();
        }
        match self.table.chains.get(name).filter(|_| depth < MAX_DEPTH) {
            Some(chain) => self.chain(chain, depth),
            None => Step::Dropped,
        }
    }

    fn rule(&mut self, rule: &'a Rule, depth: usize) -> Step {
        self.found = None;
        for expression in &rule.expressions {
            let verdict = match expression {
                Expression::Verdict(verdict) => verdict.clone(),
                Expression::Lookup { set, from, to: LookupTo::Verdict } => {
                    match self.find(set, *from).map(|element| &element.value) {
                        Some(Value::Verdict(verdict)) => verdict.clone(),
                        _ => return Step::Next,
                    }
                }
                Expression::Dnat { address, port } => {
                    self.decided_by = self.found.cloned();
                    return self.dnat(*address, *port);
                }
                Expression::Masquerade { .. } => return Step::Masqueraded,
                Expression::Reject(Reject::TcpReset | Reject::Unreachable(_)) => return Step::Rejected,
                other if self.matches(other) => continue,
                _ => return Step::Next,
            };
            return match verdict {
                Verdict::Continue => continue,
                Verdict::Accept => Step::Accepted,
                Verdict::Drop => {
                    self.decided_by = self.found.cloned();
                    Step::Dropped
                }
                Verdict::Return => Step::Return,
                Verdict::Jump(chain) => self.jump(&chain, depth + 1),
                Verdict::Goto(chain) => match self.jump(&chain, depth + 1) {
                    Step::Next => Step::Return,
                    decided => decided,
                },
            };
        }
        Step::Next
    }

    /// Runs an expression without a verdict; `false` ends the rule.
    fn matches(&mut self, expression: &'a Expression) -> bool {
        match expression {
            Expression::Meta { key: MetaKey::L4Proto, to } => self.store(*to, &[self.packet.protocol]),
            Expression::Payload { header, offset, len, to } => {
                let is_v6 = self.packet.destination.is_ipv6();
                let octets = match (header, offset, is_v6) {
                    (Header::Transport, 2, _) => self.packet.destination.port().to_be_bytes().to_vec(),
                    (Header::Network, 12, false) | (Header::Network, 8, true) => octets(self.packet.source),
                    (Header::Network, 16, false) | (Header::Network, 24, true) => {
                        octets(self.packet.destination.ip())
                    }
                    _ => return false,
                };
                octets.len() == usize::from(*len) && self.store(*to, &octets)
            }
            Expression::Ct { key, to } => match key {
                CtKey::State => self.store(*to, &ct_state::NEW.to_ne_bytes()),
                CtKey::Status => {
                    let status = if self.is_translated { ct_status::DNAT } else { 0 };
                    self.store(*to, &status.to_ne_bytes())
                }
                CtKey::Source(_, Direction::Original) => self.store(*to, &octets(self.packet.source)),
                CtKey::Destination(_, Direction::Original) => self.store(*to, &octets(self.original.ip())),
                CtKey::DestinationPort(Direction::Original) => {
                    self.store(*to, &self.original.port().to_be_bytes())
                }
                CtKey::Source(_, Direction::Reply) => self.store(*to, &octets(self.packet.destination.ip())),
                CtKey::SourcePort(Direction::Reply) => {
                    self.store(*to, &self.packet.destination.port().to_be_bytes())
                }
                _ => false,
            },
            Expression::FibType { of: FibAddress::Source, to } => {
                let kind = if self.packet.is_own { FIB_LOCAL } else { 1 };
                self.store(*to, &kind.to_ne_bytes())
            }
            Expression::Immediate { value, to } => self.store(*to, value.as_slice()),
            Expression::Bitwise { from, mask, xor, to } => {
                let operand = self.load(*from, mask.as_slice().len());
                let masked = operand.iter().zip(mask.as_slice()).zip(xor.as_slice());
                let result: Vec<u8> = masked.map(|((octet, mask), xor)| (octet & mask) ^ xor).collect();
                self.store(*to, &result)
            }
            Expression::Compare { from, op, value } => {
                let order = self.load(*from, value.as_slice().len()).as_slice().cmp(value.as_slice());
                match op {
                    Comparison::Equal => order.is_eq(),
                    Comparison::NotEqual => order.is_ne(),
                    Comparison::Less => order.is_lt(),
                    Comparison::LessOrEqual => order.is_le(),
                    Comparison::Greater => order.is_gt(),
                    Comparison::GreaterOrEqual => order.is_ge(),
                }
            }
            Expression::Lookup { set, from, to } => {
                let element = self.find(set, *from);
                if element.is_some() {
                    self.found = Some(set);
                }
                match (element, to) {
                    (Some(_), LookupTo::Matches) | (None, LookupTo::MatchesNot) => true,
                    (Some(Element { value: Value::Data(value), .. }), LookupTo::Register(to)) => {
                        self.store(*to, value.as_slice())
                    }
                    _ => false,
                }
            }
            Expression::Numgen { kind, modulus, offset, to } => {
                let number = match kind {
                    Numgen::Random => (self.draw)(*modulus),
                    Numgen::Incremental => 0,
                };
                self.store(*to, &(number + offset).to_ne_bytes())
            }
            Expression::Dynset { set, op, key, value, timeout } => {
                let Some(Set { spec, .. }) = self.table.sets.get(set) else { return false };
                let value = value.map_or(Value::None, |value| {
                    Value::Data(Octets::from(self.load(value, spec.value_len())))
                });
                let key = Key::from(self.load(*key, spec.key_len()));
                self.updates.push(Update { set: set.clone(), op: *op, key, value, timeout: *timeout });
                true
            }
            Expression::Counter => true,
            _ => false,
        }
    }

    fn find(&mut self, name: &Name, from: Register) -> Option<&'a Element> {
        match self.later {
            Some((0, after)) => (self.sets, self.later) = (after, None),
            Some((n, after)) => self.later = Some((n - 1, after)),
            None => {}
        }
        let set = self.sets.sets.get(name)?;
        let key = self.load(from, set.spec.key_len());
        self.lookups.push((name.clone(), key.clone().into()));
        set.element(&key).map(|(_, element)| element)
    }

    fn dnat(&self, address: Register, port: Option<Register>) -> Step {
        let ip = if self.packet.destination.is_ipv6() {
            self.load(address, 16).first_chunk().map(|octets: &[u8; 16]| IpAddr::from(*octets))
        } else {
            self.load(address, 4).first_chunk().map(|octets: &[u8; 4]| IpAddr::from(*octets))
        };
        let port =
            port.and_then(|port| self.load(port, 2).first_chunk().map(|octets| u16::from_be_bytes(*octets)));
        match ip {
            Some(ip) => Step::Translated(SocketAddr::new(ip, port.unwrap_or(self.packet.destination.port()))),
            None => Step::Next,
        }
    }

    /// Up to the last register.
    fn load(&self, from: Register, len: usize) -> Vec<u8> {
        let start = usize::from(from.number()) * 4;
        self.registers.iter().skip(start).take(len).copied().collect()
    }

    /// Pads with zeros to a whole register. `false` if it does not fit.
    fn store(&mut self, to: Register, octets: &[u8]) -> bool {
        let start = usize::from(to.number()) * 4;
        let end = start + octets.len().next_multiple_of(4);
        let Some(place) = self.registers.get_mut(start..end) else { return false };
        place.fill(0);
        place.iter_mut().zip(octets).for_each(|(place, octet)| *place = *octet);
        true
    }
}
