//! The chains and sets of a table, without the services.
//!
//! # Layout
//!
//! "Frontend" is an address, a protocol and a port. Those marked *n* are there twice: node ports, which
//! answer on whatever address of the node, have sets of their own, `nodeport-services-N` and so on, without
//! the address.
//!
//! | set or map | key | value |
//! | --- | --- | --- |
//! | `services-N` *n* | frontend with more than N/2 and at most N endpoints | |
//! | `inside-N` *n* | the same, by the endpoints for senders on this node, where they have others | |
//! | `endpoints` *n* | frontend, index | endpoint address and port |
//! | `affinity` *n* | client, frontend | endpoint address and port, while the client uses it |
//! | `affinity-SECONDS` *n* | frontend with this time-out | |
//! | `refused`, `dropped` *n* | frontend without an endpoint; without one for senders outside | |
//! | `limited` | frontend with source ranges | |
//! | `allowed` | frontend, range of clients | |
//! | `masquerade-all`, `-own`, `-strangers` *n* | frontend, by whose address its endpoints must not see | |
//! | `hairpin` | endpoint address, twice: of an endpoint on this node | |
//! | `node-addresses` | address on which node ports answer | |
//! | `cluster-ips`, `other-ips` | address whose undefined ports are refused; are not | |
//!
//! # Choosing an endpoint
//!
//! A rule draws an index below N. If there is no such endpoint, the next rule draws again, at last below N/2,
//! where there always is one. So all endpoints are equally likely to 3 %, and a new number of endpoints, as
//! long as it belongs to the same N, changes elements of `endpoints` alone.
//!
//! A packet may see two generations of elements, since it reads each set anew: the last rule takes the first
//! endpoint.
//!
//! # Affinity
//!
//! Behind the translation, a rule records the endpoint of the client. The next connection looks it up first.
//! When endpoints go, the agent deletes what names them ([`super::Rules::stale_clients`]).
//!
//! Nothing that one look-up found is the key of another: nft 1.0.6 cannot list that ([`super::nft`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroU32,
    ops::RangeInclusive,
};

use super::{
    AFFINITY_MAPS,
    nft::{
        Base, Chain, ChainType, Comparison, CtKey, DataType, Direction, DynsetOp, Expression, FIB_LOCAL,
        Family, FibAddress, Header, Hook, LookupTo, MetaKey, Name, Numgen, Octets, Policy, Register, Reject,
        Rule, Set, SetFlags, SetSpec, Table, ValueType, Verdict, ct_state, ct_status,
    },
    sim::{Outcome, Outcomes},
};
use crate::{desired::PacketMode, model::Cidr};

/// The index in `endpoints` of the first endpoint for senders on this node, where senders outside have
/// others.
pub(super) const INSIDE: u32 = 1 << 24;

/// Most entries of the affinity map of a family.
const MAX_CLIENTS: NonZeroU32 = NonZeroU32::MIN.saturating_add((1 << 20) - 1);

/// How often an index is drawn that may be beyond the endpoints. Each finds none with a chance below a half.
const N_DRAWS: usize = 5;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The first port that the kernel masquerades other ports than the privileged ones to.
const FIRST_PORT: u16 = 1024;

/// The priority of the translation: before kube-proxy's and Docker's at -100. Among equal ones the last that
/// was added decides, so that it would change with each restart of theirs.
const DNAT: i32 = -101;

/// The map that records the endpoints of clients.
const AFFINITY: &str = AFFINITY_MAPS[0];

/// Before the names of what is for node ports.
const NODE_PORT: &str = "nodeport-";

const MILLISECONDS: NonZeroU32 = NonZeroU32::MIN.saturating_add(999);

/// Whose addresses the endpoints of a frontend must not see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Masquerade {
    /// External, policy Cluster: all, because the endpoint may be on another node and answer past this one.
    All,
    /// External, policy Local: this node's own.
    Own,
    /// A cluster IP: those of others than this node's pods.
    Strangers,
}

impl Masquerade {
    /// Those that frontends may have: a node port is no cluster IP.
    fn of(form: Form) -> impl Iterator<Item = Self> {
        let strangers = (form == Form::Address).then_some(Self::Strangers);
        [Self::All, Self::Own].into_iter().chain(strangers)
    }

    /// Name of the chain, and of the set of frontends.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::All => "masquerade-all",
            Self::Own => "masquerade-own",
            Self::Strangers => "masquerade-strangers",
        }
    }
}

/// The senders that a set of endpoints is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// Those outside, or all.
    Outside,
    /// Those on this node, where they have other endpoints.
    Inside,
}

/// The choice of an endpoint: a number of indices, of which more than half have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pick {
    form: Form,
    side: Side,
    n_indices: u32,
}

impl Pick {
    /// `None` without an endpoint.
    pub(super) fn new(form: Form, side: Side, n_endpoints: usize) -> Option<Self> {
        let n_endpoints = u32::try_from(n_endpoints).ok().filter(|n| (1..INSIDE).contains(n))?;
        Some(Self { form, side, n_indices: n_endpoints.next_power_of_two() })
    }

    /// Name of the set of frontends.
    pub(super) fn set(self) -> Name {
        let side = match self.side {
            Side::Outside => "services",
            Side::Inside => "inside",
        };
        self.form.name(&format!("{side}-{}", self.n_indices))
    }

    fn chain(self) -> Name {
        self.form.name(&format!(
            "pick-{}{}",
            self.n_indices,
            if self.side == Side::Inside { "-inside" } else { "" }
        ))
    }
}

/// Whether a frontend has an address in its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Form {
    /// Yes.
    Address,
    /// No: a node port, on whatever address of the node.
    NodePort,
}

impl Form {
    pub(super) const ALL: [Self; 2] = [Self::Address, Self::NodePort];

    /// The name of a set or chain for frontends of this form.
    pub(super) fn name(self, name: &str) -> Name {
        match self {
            Self::Address => name.into(),
            Self::NodePort => format!("{NODE_PORT}{name}").into(),
        }
    }
}

/// What the rules of a family depend on beside the elements of their sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ground {
    pub(super) family: Family,
    pub(super) mode: PacketMode,
    /// Source ports of masqueraded datagrams: see [`ports_without`].
    pub(super) datagram_ports: Option<RangeInclusive<u16>>,
    /// Networks of this node's pods.
    pub(super) pods: BTreeSet<Cidr>,
    /// Networks of cluster IPs.
    pub(super) networks: BTreeSet<Cidr>,
    /// The choices that frontends have.
    pub(super) picks: BTreeSet<Pick>,
    /// The time-outs of affinity that frontends have, seconds.
    pub(super) affinities: BTreeSet<(Form, NonZeroU32)>,
}

/// The table without elements.
pub(super) fn table(ground: &Ground) -> Table {
    let mut builder = Builder { ground, table: sets(ground) };
    for form in Form::ALL {
        builder.add_services(form);
    }
    builder.add_base_chains();
    builder.add_refusals();
    builder.add_masquerade();
    builder.table
}

/// The ports from 1024 on that are no node ports, below or above them, whichever are more; `None` if there
/// are none.
///
/// A server answers a masqueraded client with `sendto()` on a node's address and the source port. If that
/// were a node port, the hooks would take the answer for a call of the Service.
pub(super) fn ports_without(node_ports: &RangeInclusive<u16>) -> Option<RangeInclusive<u16>> {
    let below = node_ports.start().checked_sub(1).map(|last| FIRST_PORT..=last);
    let above = node_ports.end().checked_add(1).map(|first| first.max(FIRST_PORT)..=u16::MAX);
    [below, above].into_iter().flatten().filter(|ports| !ports.is_empty()).max_by_key(ExactSizeIterator::len)
}

/// The sets of the table, without elements.
pub(super) fn sets(ground: &Ground) -> Table {
    let ip = match ground.family {
        Family::V4 => DataType::Ipv4,
        Family::V6 => DataType::Ipv6,
    };
    let frontend = |form: Form, more: &[DataType]| {
        let address: &[DataType] = if form == Form::Address { &[ip] } else { &[] };
        [address, &[DataType::Protocol, DataType::Port], more].concat()
    };
    let endpoint = || ValueType::Data(vec![ip, DataType::Port]);
    let none = SetFlags::default();
    let mut table = Table::default();
    let mut add = |name: Name, key: Vec<DataType>, value: ValueType, flags: SetFlags| {
        let size = flags.contains(SetFlags::DYNAMIC).then_some(MAX_CLIENTS);
        let spec = SetSpec { key, value, flags, timeout: None, size };
        table.sets.insert(name, Set { spec, elements: BTreeMap::new() });
    };
    for pick in &ground.picks {
        add(pick.set(), frontend(pick.form, &[]), ValueType::None, none);
    }
    for &(form, seconds) in &ground.affinities {
        add(affinity_set(form, seconds), frontend(form, &[]), ValueType::None, none);
    }
    for form in Form::ALL {
        for name in Masquerade::of(form).map(Masquerade::name).chain(["refused", "dropped"]) {
            add(form.name(name), frontend(form, &[]), ValueType::None, none);
        }
        add(form.name("endpoints"), frontend(form, &[DataType::Mark]), endpoint(), none);
        let client = [&[ip], &frontend(form, &[])[..]].concat();
        add(form.name(AFFINITY), client, endpoint(), SetFlags::DYNAMIC | SetFlags::TIMEOUT);
    }
    // Ranges are for load-balancer addresses.
    add("limited".into(), frontend(Form::Address, &[]), ValueType::None, none);
    add("allowed".into(), frontend(Form::Address, &[ip]), ValueType::None, SetFlags::INTERVAL);
    add("hairpin".into(), vec![ip, ip], ValueType::None, none);
    let of_cluster_ips = ["cluster-ips", "other-ips"].into_iter().filter(|_| ground.mode == PacketMode::All);
    for name in of_cluster_ips.chain(["node-addresses"]) {
        add(name.into(), vec![ip], ValueType::None, none);
    }
    table
}

/// Name of the set of frontends with a time-out.
pub(super) fn affinity_set(form: Form, seconds: NonZeroU32) -> Name {
    form.name(&format!("affinity-{seconds}"))
}

/// The address as registers hold it.
pub(super) fn address(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Why a packet gets its outcomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No rule is about it.
    NoFrontend,
    /// An endpoint is drawn.
    Drawn,
    /// The client keeps the endpoint of its last connection.
    Kept,
    /// The frontend has no endpoint.
    NoEndpoint,
    /// It has none on this node, as its policy Local demands for senders outside.
    NoLocalEndpoint,
    /// The source ranges do not have the client.
    SourceRanges,
    /// The Service of the cluster IP does not define the port.
    UndefinedPort,
    /// No Service has this address of the cluster IPs' networks.
    NoService,
}

impl Reason {
    /// The reason of [`outcomes`](super::sim::outcomes) in a table of socklb.
    #[must_use]
    pub fn of(outcomes: &Outcomes) -> Self {
        let set = outcomes.decided_by.as_deref().unwrap_or_default();
        match set.strip_prefix(NODE_PORT).unwrap_or(set) {
            "endpoints" => Self::Drawn,
            AFFINITY => Self::Kept,
            "refused" => Self::NoEndpoint,
            "dropped" => Self::NoLocalEndpoint,
            "limited" => Self::SourceRanges,
            "cluster-ips" => Self::UndefinedPort,
            _ if outcomes.all.contains(&Outcome::Dropped) => Self::NoService,
            _ => Self::NoFrontend,
        }
    }
}

struct Builder<'a> {
    ground: &'a Ground,
    table: Table,
}

impl Builder<'_> {
    fn add_chain(&mut self, name: impl Into<Name>, base: Option<Base>, rules: Vec<Rule>) {
        self.table.chains.insert(name.into(), Chain { base, rules });
    }

    /// The chains that translate: `services`.
    fn add_services(&mut self, form: Form) {
        let layout = self.layout();
        let mut rules = Vec::new();
        if self.ground.affinities.iter().any(|(of, _)| *of == form) {
            let mut same = layout.client(form);
            same.push(lookup(&form.name(AFFINITY), 0, LookupTo::Register(register(0))));
            same.push(layout.dnat());
            rules.push(rule(same));
        }
        let inside: Vec<Rule> = self.to_picks(form, Side::Inside).collect();
        if !inside.is_empty() {
            let name = form.name("inside");
            rules.extend(self.of_pods(&[jump(&name)]));
            rules.push(rule([&from_this_node()[..], &[jump(&name)]].concat()));
            self.add_chain(name, None, inside);
        }
        rules.extend(self.to_picks(form, Side::Outside));
        self.add_chain(form.name("services"), None, rules);
        for pick in self.ground.picks.iter().filter(|pick| pick.form == form) {
            self.add_chain(pick.chain(), None, layout.picking(*pick));
        }
    }

    fn to_picks(&self, form: Form, side: Side) -> impl Iterator<Item = Rule> {
        let layout = self.layout();
        let of_both = self.ground.picks.iter().filter(move |pick| (pick.form, pick.side) == (form, side));
        of_both.map(move |pick| layout.is_frontend(form, &pick.set(), goto(&pick.chain())))
    }

    fn add_base_chains(&mut self) {
        let layout = self.layout();
        let base = |kind, hook, priority| Some(Base { kind, hook, priority, policy: Policy::Accept });
        let nat = |hook, priority| base(ChainType::Nat, hook, priority);
        let filter = |hook, priority| base(ChainType::Filter, hook, priority);
        let new = |chain: &str| vec![rule([&is_new()[..], &[jump(chain)]].concat())];

        let mut on_node = is_on_node(layout.destination(0));
        on_node.push(jump(&Form::NodePort.name("services")));
        let services = vec![rule(vec![jump(&Form::Address.name("services"))]), rule(on_node)];
        self.add_chain("prerouting", nat(Hook::Prerouting, DNAT), services.clone());
        self.add_chain("filter-prerouting", filter(Hook::Prerouting, -110), new("check-source"));
        self.add_chain("filter-input", filter(Hook::Input, -10), new("refusals"));
        self.add_chain("filter-forward", filter(Hook::Forward, -10), new("refusals"));
        if self.ground.mode == PacketMode::All {
            self.add_chain("output", nat(Hook::Output, DNAT), services);
            self.add_chain("filter-output", filter(Hook::Output, -110), new("check-source"));
            // Behind the translation: what is still for a service address was not translated.
            self.add_chain("filter-output-late", filter(Hook::Output, -90), new("refusals"));
        }
        let translated = |chain: &str| vec![rule([&is_translated()[..], &[jump(chain)]].concat())];
        let mut leaving = translated("record-client");
        leaving.extend(translated("check-masquerade"));
        // Before the rules of others, which would keep the address of an endpoint that calls itself.
        self.add_chain("postrouting", nat(Hook::Postrouting, 90), leaving);
        // What this node's own processes receive passes no postrouting.
        self.add_chain("input", nat(Hook::Input, 90), translated("record-client"));
        let record =
            self.ground.affinities.iter().map(|(form, seconds)| layout.record_client(*form, *seconds));
        self.add_chain("record-client", None, record.collect());
    }

    /// The chains that check source ranges, and that answer what has no endpoint.
    fn add_refusals(&mut self) {
        let layout = self.layout();
        let mut excluded = layout.frontend(Form::Address, 0);
        excluded.push(lookup("limited", 0, LookupTo::Matches));
        excluded.push(layout.source(layout.n_frontend(Form::Address)));
        excluded.push(lookup("allowed", 0, LookupTo::MatchesNot));
        excluded.push(Expression::Verdict(Verdict::Drop));
        self.add_chain("check-source", None, vec![rule(excluded)]);

        let of_frontends = |form| {
            let dropped = Expression::Verdict(Verdict::Drop);
            [
                layout.is_frontend(form, &form.name("refused"), goto("refuse")),
                layout.is_frontend(form, &form.name("dropped"), dropped),
            ]
        };
        let mut refusals = of_frontends(Form::Address).to_vec();
        let mut on_node = is_on_node(layout.destination(0));
        on_node.push(jump(&Form::NodePort.name("refusals")));
        refusals.push(rule(on_node));
        self.add_chain(Form::NodePort.name("refusals"), None, of_frontends(Form::NodePort).to_vec());
        if self.ground.mode == PacketMode::All {
            let is_in = |set: &str, then: Expression| {
                rule(vec![layout.destination(0), lookup(set, 0, LookupTo::Matches), then])
            };
            refusals.push(is_in("cluster-ips", goto("refuse")));
            refusals.push(is_in("other-ips", Expression::Verdict(Verdict::Return)));
            refusals.extend(self.ground.networks.iter().map(|network| {
                let within = within(network, layout.destination(0));
                rule([&within[..], &[Expression::Verdict(Verdict::Drop)]].concat())
            }));
        }
        self.add_chain("refusals", None, refusals);
        let is_tcp = [
            Expression::Meta { key: MetaKey::L4Proto, to: register(0) },
            equals(0, [TCP]),
            Expression::Reject(Reject::TcpReset),
        ];
        let unreachable = Expression::Reject(Reject::port_unreachable(self.ground.family));
        self.add_chain("refuse", None, vec![rule(is_tcp.to_vec()), rule(vec![unreachable])]);
    }

    /// The chains that decide about the source address.
    fn add_masquerade(&mut self) {
        let layout = self.layout();
        let masquerade = goto("masquerade-now");
        let mut by_protocol = Vec::new();
        if let Some(ports) = &self.ground.datagram_ports {
            let load =
                |port: &u16, to| Expression::Immediate { value: port.to_be_bytes().into(), to: register(to) };
            by_protocol.push(rule(vec![
                Expression::Meta { key: MetaKey::L4Proto, to: register(0) },
                equals(0, [UDP]),
                load(ports.start(), 0),
                load(ports.end(), 1),
                Expression::Masquerade { ports: Some((register(0), register(1))), is_fully_random: true },
            ]));
        }
        by_protocol.push(rule(vec![Expression::Masquerade { ports: None, is_fully_random: true }]));
        self.add_chain("masquerade-now", None, by_protocol);
        let calls_itself = vec![
            layout.source(0),
            layout.destination(layout.n_address),
            lookup("hairpin", 0, LookupTo::Matches),
            masquerade.clone(),
        ];
        let mut check = vec![rule(calls_itself)];
        for form in Form::ALL {
            for class in Masquerade::of(form) {
                let mut was_one = layout.original(form);
                let is_in = lookup(&form.name(class.name()), 0, LookupTo::Matches);
                was_one.extend([is_in, goto(class.name())]);
                check.push(rule(was_one));
            }
        }
        self.add_chain("check-masquerade", None, check);
        let all = rule(vec![masquerade.clone()]);
        let own = rule([&from_this_node()[..], &[masquerade]].concat());
        // Without knowledge of this node's pods, every other sender may be one.
        let mut strangers = self.of_pods(&[Expression::Verdict(Verdict::Return)]);
        strangers.push(if strangers.is_empty() { own.clone() } else { all.clone() });
        self.add_chain(Masquerade::All.name(), None, vec![all]);
        self.add_chain(Masquerade::Own.name(), None, vec![own]);
        self.add_chain(Masquerade::Strangers.name(), None, strangers);
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
    const fn n_frontend(self, form: Form) -> u8 {
        match form {
            Form::Address => self.n_address + 2,
            Form::NodePort => 2,
        }
    }

    fn source(self, to: u8) -> Expression {
        Expression::Payload { header: Header::Network, offset: self.source, len: self.len, to: register(to) }
    }

    fn destination(self, to: u8) -> Expression {
        let offset = self.destination;
        Expression::Payload { header: Header::Network, offset, len: self.len, to: register(to) }
    }

    /// Loads the key of the frontend that a packet is for.
    fn frontend(self, form: Form, to: u8) -> Vec<Expression> {
        let port =
            |to| Expression::Payload { header: Header::Transport, offset: 2, len: 2, to: register(to) };
        key(self, form, to, |to| self.destination(to), port)
    }

    /// Loads the key of the frontend that a translated connection was for.
    fn original_frontend(self, form: Form, to: u8) -> Vec<Expression> {
        let (address, port) = (
            CtKey::Destination(self.family, Direction::Original),
            CtKey::DestinationPort(Direction::Original),
        );
        key(self, form, to, |to| ct(address, to), |to| ct(port, to))
    }

    /// Loads the address of a client, and the key of the frontend.
    fn client(self, form: Form) -> Vec<Expression> {
        let mut all = vec![self.source(0)];
        all.extend(self.frontend(form, self.n_address));
        all
    }

    /// Matches packets to a frontend of a set.
    fn is_frontend(self, form: Form, set: &str, then: Expression) -> Rule {
        let mut all = self.frontend(form, 0);
        all.extend([lookup(set, 0, LookupTo::Matches), then]);
        rule(all)
    }

    /// As [`Self::original_frontend`] from the first register on. Node ports match on addresses of this node
    /// only.
    fn original(self, form: Form) -> Vec<Expression> {
        let mut all = match form {
            Form::Address => Vec::new(),
            Form::NodePort => is_on_node(ct(CtKey::Destination(self.family, Direction::Original), 0)),
        };
        all.extend(self.original_frontend(form, 0));
        all
    }

    /// The rules that choose an endpoint.
    fn picking(self, Pick { form, side, n_indices }: Pick) -> Vec<Rule> {
        let first = if side == Side::Inside { INSIDE } else { 0 };
        let draw = |kind: Numgen, modulus: u32| {
            let mut all = self.frontend(form, 0);
            let to = register(self.n_frontend(form));
            all.push(Expression::Numgen { kind, modulus, offset: first, to });
            all.push(lookup(&form.name("endpoints"), 0, LookupTo::Register(register(0))));
            all.push(self.dnat());
            rule(all)
        };
        let mut rules = Vec::new();
        if n_indices > 1 {
            rules.extend((0..N_DRAWS).map(|_| draw(Numgen::Random, n_indices)));
            rules.push(draw(Numgen::Random, n_indices / 2));
        }
        rules.push(draw(Numgen::Incremental, 1));
        rules
    }

    /// Translates to the address and port in the first registers.
    fn dnat(self) -> Expression {
        Expression::Dnat { address: register(0), port: Some(register(self.n_address)) }
    }

    /// Records to which endpoint a client's connection was translated, for a frontend with this time-out.
    fn record_client(self, form: Form, seconds: NonZeroU32) -> Rule {
        let value = self.n_address + self.n_frontend(form);
        let mut all = self.original(form);
        all.push(lookup(&affinity_set(form, seconds), 0, LookupTo::Matches));
        all.push(ct(CtKey::Source(self.family, Direction::Original), 0));
        all.extend(self.original_frontend(form, self.n_address));
        all.push(ct(CtKey::Source(self.family, Direction::Reply), value));
        all.push(ct(CtKey::SourcePort(Direction::Reply), value + self.n_address));
        all.push(Expression::Dynset {
            set: form.name(AFFINITY),
            op: DynsetOp::Update,
            key: register(0),
            value: Some(register(value)),
            timeout: Some(seconds.saturating_mul(MILLISECONDS)),
        });
        rule(all)
    }
}

/// Loads the key of a frontend, with what loads its address and its port.
fn key(
    layout: Layout,
    form: Form,
    to: u8,
    address: impl Fn(u8) -> Expression,
    port: impl Fn(u8) -> Expression,
) -> Vec<Expression> {
    let mut all = Vec::new();
    if form == Form::Address {
        all.push(address(to));
    }
    let last = to + layout.n_frontend(form) - 1;
    all.extend([Expression::Meta { key: MetaKey::L4Proto, to: register(last - 1) }, port(last)]);
    all
}

fn ct(key: CtKey, to: u8) -> Expression {
    Expression::Ct { key, to: register(to) }
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

/// Matches an address of this node on which node ports answer. `address` loads it.
fn is_on_node(address: Expression) -> Vec<Expression> {
    vec![address, lookup("node-addresses", 0, LookupTo::Matches)]
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
    has_bit(CtKey::State, ct_state::NEW)
}

/// Matches connections with a translated destination.
fn is_translated() -> [Expression; 3] {
    has_bit(CtKey::Status, ct_status::DNAT)
}

fn has_bit(key: CtKey, bit: u32) -> [Expression; 3] {
    let (mask, xor) = (bit.to_ne_bytes().into(), [0; 4].into());
    [
        Expression::Ct { key, to: register(0) },
        Expression::Bitwise { from: register(0), mask, xor, to: register(0) },
        Expression::Compare { from: register(0), op: Comparison::NotEqual, value: [0; 4].into() },
    ]
}

fn jump(chain: &str) -> Expression {
    Expression::Verdict(Verdict::Jump(chain.into()))
}

fn goto(chain: &str) -> Expression {
    Expression::Verdict(Verdict::Goto(chain.into()))
}
