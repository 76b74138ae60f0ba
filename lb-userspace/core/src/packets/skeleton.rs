//! The chains, sets and verdicts of a table: all but the services themselves.
//!
//! # Layout
//!
//! | map or set | key | value |
//! | --- | --- | --- |
//! | `services` | address, protocol, port | [`Behavior`], as three numbers |
//! | `translate`, `translate-nodeports` | behavior | goto the chain that chooses an endpoint |
//! | `masquerade` | behavior | goto the chain that decides about the source address |
//! | `refuse` | behavior | goto `reject` or drop: no endpoint |
//! | `firewall` | behavior | goto the check of source ranges |
//! | `endpoints` | address, protocol, port, index | endpoint address and port |
//! | `affinity` | client, address, protocol, port | endpoint address and port, for as long as it is used |
//! | `members` | address, protocol, port, endpoint address and port | that the endpoint may keep its clients |
//! | `allowed` | address, protocol, port, range of clients | that they may call |
//! | `hairpin` | endpoint address, twice | that an endpoint on this node may call itself |
//! | `node-addresses` | address | that node ports answer there |
//! | `cluster-ips`, `other-ips` | address | that undefined ports are refused; that they are not |
//!
//! Node ports have the unspecified address in all keys.
//!
//! A packet may see the elements of two generations, since it reads each set anew. Where an endpoint's index is
//! beyond the new number of endpoints, the rule behind takes the first one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroU32,
};

use super::nft::{
    Base, Chain, ChainType, Comparison, CtKey, DataType, Direction, DynsetOp, Expression, FIB_LOCAL, Family,
    FibAddress, Header, Hook, Key, LookupTo, MetaKey, Name, Numgen, Octets, Policy, Register, Reject, Rule,
    Set, SetFlags, SetSpec, Table, Value, ValueType, Verdict, ct_state, ct_status,
};
use crate::{desired::PacketMode, model::Cidr};

/// The index in `endpoints` of the first endpoint for senders on this node, where senders outside have others.
pub(super) const INSIDE: u32 = 1 << 24;

/// Most entries of the affinity map of a family.
const MAX_CLIENTS: NonZeroU32 = NonZeroU32::MIN.saturating_add((1 << 20) - 1);

const TCP: u8 = 6;

/// Which sources are masqueraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sources {
    /// A cluster IP: those that are neither pods of this node.
    ClusterIp = 0,
    /// External, policy Cluster: all, because the endpoint may be on another node.
    External = 1,
    /// External, policy Local: this node's own.
    Local = 2,
}

/// What happens to new connections to a frontend. Frontends with equal behavior share all rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Behavior {
    /// Number of endpoints for senders outside, or for all.
    pub(super) n_endpoints: u32,
    /// Number of endpoints for senders on this node, where they have others.
    pub(super) n_inside: Option<u32>,
    /// Idle time-out of the affinity; 0 = none.
    pub(super) affinity_seconds: u32,
    pub(super) sources: Sources,
    /// Whether source ranges are checked.
    pub(super) is_limited: bool,
}

impl Behavior {
    /// The value in `services`, which the maps of verdicts have as their key.
    pub(super) fn octets(self) -> Octets {
        // A time-out is at most 86,400 seconds: 17 bits.
        let flags = self.affinity_seconds
            | u32::from(self.is_limited) << 24
            | (self.sources as u32) << 25
            | u32::from(self.n_inside.is_some()) << 27;
        let words = [self.n_endpoints, self.n_inside.unwrap_or(0), flags];
        words.map(u32::to_ne_bytes).concat().into()
    }

    /// Whether no sender reaches an endpoint.
    fn refuses_all(self) -> bool {
        self.n_endpoints == 0 && self.n_inside.unwrap_or(0) == 0
    }

    fn outside(self) -> Option<Pick> {
        Pick::new(self.n_endpoints, 0, self.affinity_seconds)
    }

    fn inside(self) -> Option<Pick> {
        Pick::new(self.n_inside?, INSIDE, self.affinity_seconds)
    }
}

/// The choice of one of `n` endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Pick {
    n: u32,
    first: u32,
    affinity_seconds: u32,
}

impl Pick {
    fn new(n: u32, first: u32, affinity_seconds: u32) -> Option<Self> {
        (n > 0).then_some(Self { n, first, affinity_seconds })
    }

    fn chain(self, form: Form) -> Name {
        let inside = if self.first == 0 { "" } else { "-inside" };
        let affinity = match self.affinity_seconds {
            0 => String::new(),
            seconds => format!("-affinity-{seconds}"),
        };
        format!("{}{}{inside}{affinity}", form.prefix("pick-"), self.n).into()
    }
}

/// Where the address of a frontend's key comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Form {
    /// From the packet.
    Address,
    /// It is unspecified: a node port, on whatever address of the node.
    NodePort,
}

impl Form {
    fn prefix(self, name: &str) -> String {
        match self {
            Self::Address => name.to_owned(),
            Self::NodePort => format!("nodeport-{name}"),
        }
    }
}

/// What the rules of a family depend on beside the services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ground {
    pub(super) family: Family,
    pub(super) mode: PacketMode,
    /// Networks of this node's pods.
    pub(super) pods: BTreeSet<Cidr>,
    /// Networks of cluster IPs.
    pub(super) networks: BTreeSet<Cidr>,
}

/// The table without elements of services.
pub(super) fn table(
    ground: &Ground,
    behaviors: &BTreeSet<Behavior>,
    of_node_ports: &BTreeSet<Behavior>,
) -> Table {
    let mut builder = Builder { ground, table: sets(ground) };
    builder.add_verdicts(Form::Address, behaviors);
    builder.add_verdicts(Form::NodePort, of_node_ports);
    builder.add_chains();
    builder.table
}

/// The sets of the table, without elements.
pub(super) fn sets(ground: &Ground) -> Table {
    let mut builder = Builder { ground, table: Table::default() };
    builder.add_sets();
    builder.table
}

/// The address as registers hold it.
pub(super) fn address(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

struct Builder<'a> {
    ground: &'a Ground,
    table: Table,
}

impl Builder<'_> {
    fn add_sets(&mut self) {
        let ip = match self.ground.family {
            Family::V4 => DataType::Ipv4,
            Family::V6 => DataType::Ipv6,
        };
        let frontend = [ip, DataType::Protocol, DataType::Port];
        let endpoint = vec![ip, DataType::Port];
        let behavior = vec![DataType::Mark; 3];
        let with = |more: &[DataType]| [&frontend[..], more].concat();
        let none = SetFlags::default();
        let mut add = |name: &str, key: Vec<DataType>, value: ValueType, flags: SetFlags| {
            let size = flags.contains(SetFlags::DYNAMIC).then_some(MAX_CLIENTS);
            let spec = SetSpec { key, value, flags, timeout: None, size };
            self.table.sets.insert(name.into(), Set { spec, elements: BTreeMap::new() });
        };
        add("services", frontend.to_vec(), ValueType::Data(behavior.clone()), none);
        add("endpoints", with(&[DataType::Mark]), ValueType::Data(endpoint.clone()), none);
        add(
            "affinity",
            [&[ip][..], &frontend].concat(),
            ValueType::Data(endpoint),
            SetFlags::DYNAMIC | SetFlags::TIMEOUT,
        );
        add("members", with(&[ip, DataType::Port]), ValueType::None, none);
        add("allowed", with(&[ip]), ValueType::None, SetFlags::INTERVAL);
        add("hairpin", vec![ip, ip], ValueType::None, none);
        add("node-addresses", vec![ip], ValueType::None, none);
        if self.ground.mode == PacketMode::All {
            add("cluster-ips", vec![ip], ValueType::None, none);
            add("other-ips", vec![ip], ValueType::None, none);
        }
        for name in ["translate", "translate-nodeports", "masquerade", "refuse", "firewall"] {
            add(name, behavior.clone(), ValueType::Verdict, none);
        }
    }

    fn add_verdict(&mut self, map: &str, behavior: Behavior, verdict: Verdict) {
        if let Some(set) = self.table.sets.get_mut(map) {
            set.elements.insert(Key::from(behavior.octets()), Value::Verdict(verdict).into());
        }
    }

    fn add_verdicts(&mut self, form: Form, behaviors: &BTreeSet<Behavior>) {
        let map = match form {
            Form::Address => "translate",
            Form::NodePort => "translate-nodeports",
        };
        for &behavior in behaviors {
            let (outside, inside) = (behavior.outside(), behavior.inside());
            for pick in [outside, inside].into_iter().flatten() {
                self.add_pick(form, pick);
            }
            let chain = match (outside, inside) {
                (outside, Some(inside)) => Some(self.add_local(form, outside, inside)),
                (Some(outside), None) => Some(outside.chain(form)),
                (None, None) => None,
            };
            if let Some(chain) = chain {
                self.add_verdict(map, behavior, Verdict::Goto(chain));
            }
            if behavior.refuses_all() {
                self.add_verdict("refuse", behavior, Verdict::Goto("reject".into()));
            } else if outside.is_none() {
                self.add_verdict("refuse", behavior, Verdict::Drop);
            }
            if behavior.is_limited {
                self.add_verdict("firewall", behavior, Verdict::Goto("check-source".into()));
            }
            let chain = match behavior.sources {
                Sources::ClusterIp => "masquerade-strangers",
                Sources::External => "masquerade-all",
                Sources::Local => "masquerade-own",
            };
            self.add_verdict("masquerade", behavior, Verdict::Goto(chain.into()));
        }
    }

    fn add_chain(&mut self, name: Name, base: Option<Base>, rules: Vec<Rule>) {
        self.table.chains.insert(name, Chain { base, rules });
    }

    /// The chain that sends senders on this node to all endpoints, others to those of this node.
    fn add_local(&mut self, form: Form, outside: Option<Pick>, inside: Pick) -> Name {
        let n_outside = outside.map_or(0, |pick| pick.n);
        let affinity = match inside.affinity_seconds {
            0 => String::new(),
            seconds => format!("-affinity-{seconds}"),
        };
        let name: Name = format!("{}{n_outside}-of-{}{affinity}", form.prefix("local-"), inside.n).into();
        let goto_inside = Expression::Verdict(Verdict::Goto(inside.chain(form)));
        let mut rules = self.of_pods(&[goto_inside.clone()]);
        rules.push(rule([&from_this_node()[..], &[goto_inside]].concat()));
        rules.extend(outside.map(|pick| rule(vec![Expression::Verdict(Verdict::Goto(pick.chain(form)))])));
        self.add_chain(name.clone(), None, rules);
        name
    }

    fn add_pick(&mut self, form: Form, pick: Pick) {
        let name = pick.chain(form);
        if self.table.chains.contains_key(&name) {
            return;
        }
        let layout = self.layout();
        let frontend = layout.frontend(form, 0);
        let (n_key, n_client) = (layout.n_frontend(), layout.n_client());
        let draw = |modulus: u32, kind: Numgen, to: u8| {
            let mut all = frontend.clone();
            all.push(Expression::Numgen { kind, modulus, offset: pick.first, to: register(n_key) });
            all.push(lookup("endpoints", 0, LookupTo::Register(register(to))));
            all
        };
        let dnat = |from: u8| Expression::Dnat {
            address: register(from),
            port: Some(register(from + layout.n_address)),
        };
        let mut rules = Vec::new();
        if let Some(milliseconds) = NonZeroU32::new(pick.affinity_seconds.saturating_mul(1000)) {
            let client = layout.client(form, 0);
            let keep = |op: DynsetOp, value: Option<u8>| Expression::Dynset {
                set: "affinity".into(),
                op,
                key: register(0),
                value: value.map(register),
                timeout: value.map(|_| milliseconds),
            };
            // A client stays as long as its endpoint does.
            let mut stay = frontend.clone();
            stay.extend(layout.client(form, n_key));
            stay.push(lookup("affinity", n_key, LookupTo::Register(register(n_key))));
            stay.push(lookup("members", 0, LookupTo::Matches));
            stay.extend(client.clone());
            stay.push(lookup("affinity", 0, LookupTo::Register(register(n_client))));
            stay.extend([keep(DynsetOp::Update, Some(n_client)), dnat(n_client)]);
            rules.push(rule(stay));
            let mut choose = draw(pick.n, Numgen::Random, n_client);
            choose.extend(client);
            choose.extend([
                keep(DynsetOp::Delete, None),
                keep(DynsetOp::Add, Some(n_client)),
                dnat(n_client),
            ]);
            rules.push(rule(choose));
        }
        // Without affinity, and for a client that does not fit into the map.
        let mut choose = draw(pick.n, Numgen::Random, 0);
        choose.push(dnat(0));
        rules.push(rule(choose));
        if pick.n > 1 {
            let mut first = draw(1, Numgen::Incremental, 0);
            first.push(dnat(0));
            rules.push(rule(first));
        }
        self.add_chain(name, None, rules);
    }

    fn add_chains(&mut self) {
        let layout = self.layout();
        let (is_all, family) = (self.ground.mode == PacketMode::All, self.ground.family);
        let base = |kind, hook, priority| Some(Base { kind, hook, priority, policy: Policy::Accept });
        let jump = |chain: &str| Expression::Verdict(Verdict::Jump(chain.into()));
        let new = |chain: &str| rule([&is_new()[..], &[jump(chain)]].concat());

        let services = vec![
            rule(layout.behavior(layout.frontend(Form::Address, 0), "translate")),
            rule(layout.behavior(layout.on_node(None), "translate-nodeports")),
        ];
        let nat = |hook| base(ChainType::Nat, hook, -100);
        self.add_chain("prerouting".into(), nat(Hook::Prerouting), services.clone());
        let filter = |hook, priority| base(ChainType::Filter, hook, priority);
        self.add_chain(
            "filter-prerouting".into(),
            filter(Hook::Prerouting, -110),
            vec![new("check-firewall")],
        );
        self.add_chain("filter-input".into(), filter(Hook::Input, -10), vec![new("refusals")]);
        self.add_chain("filter-forward".into(), filter(Hook::Forward, -10), vec![new("refusals")]);
        if is_all {
            self.add_chain("output".into(), nat(Hook::Output), services);
            self.add_chain("filter-output".into(), filter(Hook::Output, -110), vec![new("check-firewall")]);
            // Behind the translation: what is still for a service address was not translated.
            self.add_chain("filter-output-late".into(), filter(Hook::Output, -90), vec![new("refusals")]);
        }
        self.add_chain(
            "check-firewall".into(),
            None,
            vec![rule(layout.behavior(layout.frontend(Form::Address, 0), "firewall"))],
        );
        let mut from_client = layout.frontend(Form::Address, 0);
        from_client.push(layout.source(layout.n_frontend()));
        from_client.push(lookup("allowed", 0, LookupTo::MatchesNot));
        from_client.push(Expression::Verdict(Verdict::Drop));
        self.add_chain("check-source".into(), None, vec![rule(from_client)]);

        let mut refusals = vec![
            rule(layout.behavior(layout.frontend(Form::Address, 0), "refuse")),
            rule(layout.behavior(layout.on_node(None), "refuse")),
        ];
        if is_all {
            let is_in = |set: &str, verdict: Verdict| {
                let lookup = lookup(set, 0, LookupTo::Matches);
                rule(vec![layout.destination(0), lookup, Expression::Verdict(verdict)])
            };
            refusals.push(is_in("cluster-ips", Verdict::Goto("reject".into())));
            if !self.ground.networks.is_empty() {
                refusals.push(is_in("other-ips", Verdict::Return));
            }
            refusals.extend(self.ground.networks.iter().map(|network| {
                let within = within(network, layout.destination(0));
                rule([&within[..], &[Expression::Verdict(Verdict::Drop)]].concat())
            }));
        }
        self.add_chain("refusals".into(), None, refusals);
        let is_tcp = [
            Expression::Meta { key: MetaKey::L4Proto, to: register(0) },
            equals(0, [TCP]),
            Expression::Reject(Reject::TcpReset),
        ];
        self.add_chain(
            "reject".into(),
            None,
            vec![rule(is_tcp.to_vec()), rule(vec![Expression::Reject(Reject::port_unreachable(family))])],
        );

        let status = ct_status::DNAT.to_ne_bytes();
        let is_translated = vec![
            Expression::Ct { key: CtKey::Status, to: register(0) },
            Expression::Bitwise {
                from: register(0),
                mask: status.into(),
                xor: [0; 4].into(),
                to: register(0),
            },
            Expression::Compare { from: register(0), op: Comparison::NotEqual, value: [0; 4].into() },
            jump("check-masquerade"),
        ];
        self.add_chain(
            "postrouting".into(),
            // Before the rules of others, which would keep the address of a client that calls itself.
            base(ChainType::Nat, Hook::Postrouting, 90),
            vec![rule(is_translated)],
        );
        let masquerade = Expression::Masquerade { is_fully_random: true };
        let calls_itself = vec![
            layout.source(0),
            layout.destination(layout.n_address),
            lookup("hairpin", 0, LookupTo::Matches),
            masquerade.clone(),
        ];
        self.add_chain(
            "check-masquerade".into(),
            None,
            vec![
                rule(calls_itself),
                rule(layout.behavior(layout.original(), "masquerade")),
                rule(layout.behavior(layout.on_node(Some(Direction::Original)), "masquerade")),
            ],
        );
        self.add_chain("masquerade-all".into(), None, vec![rule(vec![masquerade.clone()])]);
        let own = rule([&from_this_node()[..], &[masquerade.clone()]].concat());
        self.add_chain("masquerade-own".into(), None, vec![own.clone()]);
        // Without knowledge of this node's pods, any other sender may be one.
        let strangers = if self.of_pods(&[]).is_empty() {
            vec![own]
        } else {
            let mut rules = self.of_pods(&[Expression::Verdict(Verdict::Return)]);
            rules.push(rule(vec![masquerade]));
            rules
        };
        self.add_chain("masquerade-strangers".into(), None, strangers);
    }

    /// One rule for each network of this node's pods, which matches packets from there.
    fn of_pods(&self, then: &[Expression]) -> Vec<Rule> {
        let source = self.layout().source(0);
        let rule_of = |network: &Cidr| rule([&within(network, source.clone())[..], then].concat());
        self.ground.pods.iter().map(rule_of).collect()
    }

    fn layout(&self) -> Layout {
        match self.ground.family {
            Family::V4 => Layout { family: Family::V4, n_address: 1, source: 12, destination: 16, len: 4 },
            Family::V6 => Layout { family: Family::V6, n_address: 4, source: 8, destination: 24, len: 16 },
        }
    }
}

/// Where the fields of keys are in registers, and addresses in packets.
#[derive(Clone, Copy)]
struct Layout {
    family: Family,
    /// Registers of an address.
    n_address: u8,
    /// Offset of the source address in the network header, octets.
    source: u8,
    destination: u8,
    /// Octets of an address.
    len: u8,
}

impl Layout {
    /// Registers of the key of a frontend.
    const fn n_frontend(self) -> u8 {
        self.n_address + 2
    }

    /// Registers of the key of a client's affinity.
    const fn n_client(self) -> u8 {
        2 * self.n_address + 2
    }

    fn source(self, to: u8) -> Expression {
        Expression::Payload { header: Header::Network, offset: self.source, len: self.len, to: register(to) }
    }

    fn destination(self, to: u8) -> Expression {
        let offset = self.destination;
        Expression::Payload { header: Header::Network, offset, len: self.len, to: register(to) }
    }

    /// Loads the key of a frontend of a packet.
    fn frontend(self, form: Form, to: u8) -> Vec<Expression> {
        let address = match form {
            Form::Address => self.destination(to),
            Form::NodePort => self.unspecified(to),
        };
        vec![
            address,
            Expression::Meta { key: MetaKey::L4Proto, to: register(to + self.n_address) },
            Expression::Payload {
                header: Header::Transport,
                offset: 2,
                len: 2,
                to: register(to + self.n_address + 1),
            },
        ]
    }

    /// Loads the address of a client, and the key of the frontend.
    fn client(self, form: Form, to: u8) -> Vec<Expression> {
        let mut all = vec![self.source(to)];
        all.extend(self.frontend(form, to + self.n_address));
        all
    }

    /// Loads the key of the frontend that a translated connection was for.
    fn original(self) -> Vec<Expression> {
        let direction = Direction::Original;
        let address = CtKey::Destination(self.family, direction);
        [&[Expression::Ct { key: address, to: register(0) }], &self.original_port()[..]].concat()
    }

    fn original_port(self) -> [Expression; 2] {
        [
            Expression::Meta { key: MetaKey::L4Proto, to: register(self.n_address) },
            Expression::Ct {
                key: CtKey::DestinationPort(Direction::Original),
                to: register(self.n_address + 1),
            },
        ]
    }

    /// Matches what is for an address of the node, and loads the key of a node port: of the packet, or of the
    /// connection as it was before its translation.
    fn on_node(self, direction: Option<Direction>) -> Vec<Expression> {
        let (address, port) = match direction {
            None => (self.destination(0), self.frontend(Form::NodePort, 0)[1..].to_vec()),
            Some(direction) => {
                let key = CtKey::Destination(self.family, direction);
                (Expression::Ct { key, to: register(0) }, self.original_port().to_vec())
            }
        };
        let mut all = vec![address, lookup("node-addresses", 0, LookupTo::Matches), self.unspecified(0)];
        all.extend(port);
        all
    }

    /// What a map of verdicts says about the behavior of the frontend that `key` loads.
    fn behavior(self, mut key: Vec<Expression>, verdicts: &str) -> Vec<Expression> {
        let value = self.n_frontend();
        key.push(lookup("services", 0, LookupTo::Register(register(value))));
        key.push(lookup(verdicts, value, LookupTo::Verdict));
        key
    }

    fn unspecified(self, to: u8) -> Expression {
        Expression::Immediate { value: vec![0; self.len.into()].into(), to: register(to) }
    }
}

/// A register by number.
fn register(number: u8) -> Register {
    debug_assert!(number < Register::COUNT, "register {number}");
    Register::new(number).unwrap_or(Register::LAST)
}

fn rule(expressions: Vec<Expression>) -> Rule {
    Rule { expressions, comment: None }
}

fn lookup(set: &str, from: u8, to: LookupTo) -> Expression {
    Expression::Lookup { set: set.into(), from: register(from), to }
}

fn equals(from: u8, value: impl Into<Octets>) -> Expression {
    Expression::Compare { from: register(from), op: Comparison::Equal, value: value.into() }
}

/// Matches addresses within a network.
fn within(network: &Cidr, load: Expression) -> Vec<Expression> {
    let mask = address(network.mask());
    let zero = vec![0; mask.len()];
    let masked =
        Expression::Bitwise { from: register(0), mask: mask.into(), xor: zero.into(), to: register(0) };
    vec![load, masked, equals(0, address(network.address))]
}

/// Matches packets with one of the node's own addresses as their source.
fn from_this_node() -> [Expression; 2] {
    [Expression::FibType { of: FibAddress::Source, to: register(0) }, equals(0, FIB_LOCAL.to_ne_bytes())]
}

/// Matches the first packet of a connection.
fn is_new() -> [Expression; 3] {
    let new = ct_state::NEW.to_ne_bytes();
    [
        Expression::Ct { key: CtKey::State, to: register(0) },
        Expression::Bitwise { from: register(0), mask: new.into(), xor: [0; 4].into(), to: register(0) },
        Expression::Compare { from: register(0), op: Comparison::NotEqual, value: [0; 4].into() },
    ]
}
