//! Long calls: the maps change between one look-up and the next.
//!
//! [`crate::prefixes`] tests calls that run between two operations. In the kernel, programs run concurrently
//! with operations. So here each read sees a later state than the one before, and arrays keep the last write,
//! as in the kernel.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use lb_common::{
    Caller, Tables, Verdict,
    address::{Octets4, Octets6},
    layout::{self, Affinity, FamilyLayout, Frontend},
    resolve::{Choice, NodeAddress},
};
use lb_core::{
    desired::{FrontendAddress, PortKey},
    model::{Cidr, Protocol},
    plan::{Capacity, Op, Plan, StillRead},
    state::State,
    tables::{AddressTable, Entry, Image, wire_protocol},
};
use proptest::{collection::vec, prelude::*, sample::Index};

use crate::clusters::{Allowed, Call, Outcomes, calls, history, state};

/// The kernel's maps: entries without references remain.
#[derive(Clone, Debug, Default)]
struct Memory {
    services: BTreeMap<FrontendAddress, u32>,
    frontends: BTreeMap<u32, Frontend>,
    entries: BTreeMap<(bool, u32), Entry>,
    node_addrs: BTreeMap<IpAddr, bool>,
    cluster_ips: BTreeMap<IpAddr, bool>,
    service_cidrs: Vec<Cidr>,
}

impl Memory {
    fn addresses_mut(&mut self, table: AddressTable) -> &mut BTreeMap<IpAddr, bool> {
        match table {
            AddressTable::Nodes => &mut self.node_addrs,
            AddressTable::ClusterIps => &mut self.cluster_ips,
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::WriteRun { ipv6, offset, run } => {
                let entries = (*offset..).zip(run.entries());
                self.entries.extend(entries.map(|(index, entry)| ((*ipv6, index), *entry)));
            }
            Op::WriteFrontend { id, frontend } => drop(self.frontends.insert(*id, *frontend)),
            Op::SetFrontend { id, frontend } => {
                let run = self.frontends[id].run;
                self.frontends.insert(*id, Frontend { run, ..*frontend });
            }
            Op::SwitchRun { id, run } => self.frontends.get_mut(id).unwrap().run = *run,
            Op::InsertService { address, frontend_id } => drop(self.services.insert(*address, *frontend_id)),
            Op::DeleteService(address) => drop(self.services.remove(address)),
            Op::InsertAddress { table, address, flag } => {
                self.addresses_mut(*table).insert(*address, *flag);
            }
            Op::DeleteAddress(table, address) => {
                self.addresses_mut(*table).remove(address);
            }
            Op::SetServiceCidrs(networks) => self.service_cidrs = networks.to_vec(),
            Op::ResetService(_) | Op::ResetEndpoints(_) | Op::DropRun { .. } | Op::DropFrontend(_) => {}
        }
    }
}

/// One call's view: some operations run before each read.
struct Spanning<'a> {
    memory: RefCell<Memory>,
    ops: RefCell<&'a [Op]>,
    /// Number of operations before each read, repeated cyclically.
    pace: &'a [usize],
    n_reads: Cell<usize>,
    on_node: bool,
    random: u32,
    /// Bit `n` is set if the endpoints with the ids n, n + 32 and so on are ejected.
    ejected: u32,
    earlier: Option<Choice>,
    affinity: Cell<Option<Affinity>>,
}

impl Spanning<'_> {
    fn read<T>(&self, read: impl FnOnce(&Memory) -> T) -> T {
        let n = self.pace[self.n_reads.get() % self.pace.len()];
        self.n_reads.set(self.n_reads.get() + 1);
        let mut ops = self.ops.borrow_mut();
        let (now, later) = ops.split_at(n.min(ops.len()));
        for op in now {
            self.memory.borrow_mut().apply(op);
        }
        *ops = later;
        read(&self.memory.borrow())
    }
}

/// The bytes of a family's address.
trait Octets: FamilyLayout + Into<IpAddr> + TryFrom<Vec<u8>> {}

impl Octets for Octets4 {}
impl Octets for Octets6 {}

fn octets<A: Octets>(ip: IpAddr) -> A {
    let octets = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    A::try_from(octets).unwrap_or_else(|_| panic!("{ip} is of the other family"))
}

impl<A: Octets> Tables<A> for Spanning<'_> {
    fn frontend_id(&self, key: &A::Key) -> Option<u32> {
        let (address, port, protocol) = A::key_parts(key);
        let protocol = if protocol == layout::Protocol::TCP { Protocol::Tcp } else { Protocol::Udp };
        self.read(|memory| {
            memory.services.get(&FrontendAddress { ip: address.into(), port, protocol }).copied()
        })
    }
    fn frontend(&self, frontend_id: u32) -> Option<Frontend> {
        // Word by word, the run first, as the programs do.
        let run = self.read(|memory| memory.frontends.get(&frontend_id).map(|frontend| frontend.run))?;
        let rest = self.read(|memory| memory.frontends[&frontend_id]);
        Some(Frontend { run, ..rest })
    }
    fn endpoint(&self, index: u32) -> Option<A::Endpoint> {
        let entry =
            self.read(|memory| memory.entries.get(&(A::FAMILY == lb_common::Family::V6, index)).copied())?;
        Some(A::entry(octets(entry.address().ip()), entry.address().port(), entry.endpoint_id, entry.extra))
    }
    fn is_suspect(&self, endpoint_id: u32) -> bool {
        <Self as Tables<A>>::admits(self, endpoint_id) == 0
    }
    fn admits(&self, endpoint_id: u32) -> u32 {
        !(self.ejected >> (endpoint_id % 32)) & 1
    }
    fn active(&self, endpoint_id: u32) -> i32 {
        self.random.rotate_left(endpoint_id).cast_signed()
    }
    fn begin_trial(&self, _endpoint_id: u32) {}
    fn node_ports(&self) -> (u16, u16) {
        lb_common::limits::NODE_PORTS
    }
    fn node_address(&self, mapped: &Octets6) -> Option<NodeAddress> {
        let ip = Ipv6Addr::from(*mapped).to_canonical();
        let own = self.read(|memory| memory.node_addrs.get(&ip).copied())?;
        Some(if own { NodeAddress::Own } else { NodeAddress::Other })
    }
    fn is_in_service_network(&self, address: &A) -> bool {
        self.read(|memory| memory.service_cidrs.iter().any(|network| network.contains((*address).into())))
    }
    fn cluster_ip(&self, mapped: &Octets6) -> Option<bool> {
        let ip = Ipv6Addr::from(*mapped).to_canonical();
        self.read(|memory| memory.cluster_ips.get(&ip).copied())
    }
}

impl Caller for Spanning<'_> {
    fn loopback_is_node(&self) -> bool {
        self.on_node
    }
    fn earlier_choice(&self) -> Option<Choice> {
        self.earlier
    }
    fn random(&self) -> u32 {
        self.random
    }
    fn now(&self) -> u64 {
        7
    }
    fn affinity(&self, _service_id: u32) -> Option<Affinity> {
        self.affinity.get()
    }
    fn renew_affinity(&self, _service_id: u32, _now: u64) {}
    fn remember_affinity(&self, _service_id: u32, _replaces: Option<Affinity>, new: Affinity) -> u32 {
        self.affinity.set(Some(new));
        new.endpoint_id
    }
}

#[derive(Debug, PartialEq)]
enum Came {
    Untouched,
    Refused,
    Unreachable,
    To(SocketAddr),
}

/// A call in the middle of a plan.
#[derive(Clone, Debug)]
struct Moment {
    call: Index,
    /// The number of operations before the call.
    start: Index,
    pace: Vec<usize>,
    random: u32,
    ejected: u32,
    /// The endpoint of an earlier call through the same socket, or of the same client.
    earlier: Option<u32>,
    affinity: Option<u32>,
}

fn moment() -> impl Strategy<Value = Moment> {
    let pace = vec(prop_oneof![3 => Just(0usize), 1 => Just(1), 1 => Just(2), 1 => 3usize..30], 1..6);
    (
        any::<Index>(),
        any::<Index>(),
        pace,
        any::<u32>(),
        prop_oneof![Just(0), Just(u32::MAX), any::<u32>()],
        prop::option::of(0u32..12),
        prop::option::of(0u32..12),
    )
        .prop_map(|(call, start, pace, random, ejected, earlier, affinity)| Moment {
            call,
            start,
            pace,
            random,
            ejected,
            earlier,
            affinity,
        })
}

fn run<A: Octets>(memory: &Memory, ops: &[Op], (to, on_node): Call, moment: &Moment) -> Came {
    let start = moment.start.index(ops.len() + 1);
    let mut memory = memory.clone();
    ops[..start].iter().for_each(|op| memory.apply(op));
    let tables = Spanning {
        memory: RefCell::new(memory),
        ops: RefCell::new(&ops[start..]),
        pace: &moment.pace,
        n_reads: Cell::new(0),
        on_node,
        random: moment.random,
        ejected: moment.ejected,
        earlier: moment.earlier.map(|endpoint_id| Choice { endpoint_id, index: endpoint_id % 3 }),
        affinity: Cell::new(moment.affinity.map(|endpoint_id| Affinity {
            last_used: 0,
            endpoint_id,
            reserved: 0,
        })),
    };
    let call = lb_common::resolve::Call::<A> {
        address: octets(to.ip),
        port: to.port,
        protocol: wire_protocol(to.protocol).unwrap(),
    };
    match lb_common::resolve(&tables, &tables, &call) {
        Verdict::Pass => Came::Untouched,
        Verdict::Refuse { .. } => Came::Refused,
        Verdict::Unreachable => Came::Unreachable,
        Verdict::Redirect(target) => Came::To(SocketAddr::new(target.address.into(), target.port)),
    }
}

/// The wildcard frontend of a node port, if the destination may be one.
fn wildcard((to, on_node): Call) -> Call {
    let ip = if to.ip.is_ipv4() { IpAddr::from(Ipv4Addr::LOCALHOST) } else { Ipv6Addr::LOCALHOST.into() };
    (FrontendAddress { ip, ..to }, on_node)
}

/// The states that calls since the last grace period see. Programs of earlier calls have finished.
#[derive(Default)]
struct Window {
    /// The memory at its beginning.
    memory: Memory,
    /// The operations since.
    ops: Vec<Op>,
    /// At its beginning and after each plan: the maps, and the meaning of service ids.
    states: Vec<(Image, BTreeMap<u32, Arc<PortKey>>)>,
}

impl Window {
    fn new(memory: Memory, state: &State) -> Self {
        let mut window = Self { memory, ..Self::default() };
        window.note(state);
        window
    }

    fn note(&mut self, state: &State) {
        let ports = state.view().ports.into_iter().map(|(port, id)| (id, port));
        self.states.push((state.image().clone(), ports.collect()));
    }

    fn carry_out(&mut self, plan: &Plan, state: &State) {
        self.ops.extend(plan.ops().iter().cloned());
        self.note(state);
    }

    fn pass(&mut self) {
        for op in std::mem::take(&mut self.ops) {
            self.memory.apply(&op);
        }
        self.states.drain(..self.states.len() - 1);
    }

    fn images(&self) -> Vec<Image> {
        self.states.iter().map(|(image, _)| image.clone()).collect()
    }

    /// Service ids with more than one service port in this time: a call to one counts for the other, and may
    /// get its client's endpoint.
    fn ambiguous_ids(&self) -> BTreeSet<u32> {
        let ids: BTreeSet<_> = self.states.iter().flat_map(|(_, ports)| ports).collect();
        let mut seen = BTreeSet::new();
        ids.into_iter().map(|(id, _port)| *id).filter(|id| !seen.insert(*id)).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// However long a call takes, even over several plans, its outcome is possible in one of the states that
    /// it has seen. It is refused or passes only if one of them says so, and no service id has two meanings
    /// meanwhile. A call may last until the next grace period, which comes when the agent waits for it, or at
    /// any time.
    ///
    /// Exceptions: A call to a node port of another node may also have the outcome of the node port on this
    /// node, because the policy and the endpoints of a node port are two words in memory. A call that spans
    /// the creation and the deletion of a Service may be refused: it found the cluster IP but no port. A call
    /// that spans the removal of its network may pass: it found no port, and then no network. So may one to
    /// an address that another proxy has too.
    #[test]
    fn a_call_that_spans_a_plan_sees_the_old_or_the_new_state(
        history in history(5),
        moments in vec(moment(), 150),
        graces in vec(any::<bool>(), 6),
    ) {
        // A wildcard is tested from the node, where loopback reaches it.
        let mut calls: Vec<Call> = calls().into_iter().filter(|(to, _)| !to.ip.is_unspecified()).collect();
        let n_calls = calls.len();
        calls.extend_from_within(..);
        for call in &mut calls[n_calls..] {
            *call = wildcard((call.0, true));
        }
        let mut state = state(Capacity::default(), &Image::default());
        let mut window = Window::new(Memory::default(), &state);
        let mut unsettled = StillRead::Anything;
        for (cluster, passes) in history.iter().zip(graces) {
            cluster.feed(&mut state);
            let plan = state.sync();
            if unsettled.must_wait(&plan) {
                unsettled = StillRead::Nothing;
                window.pass();
            }
            window.carry_out(&plan, &state);
            if plan.frees() && unsettled == StillRead::Nothing {
                unsettled = StillRead::Elements;
            }
            prop_assert_eq!(window.ambiguous_ids(), BTreeSet::new(), "{:#?}", window.states);
            let images = window.images();
            let allowed = Allowed::among(&images, &calls);
            let is_in = |image: &Image, ip| image.service_cidrs.iter().any(|network| network.contains(ip));
            // From one state to the next.
            let loses_network =
                |ip| images.windows(2).any(|pair| is_in(&pair[0], ip) && !is_in(&pair[1], ip));
            // Another proxy has the address too. Its flag and the port are two entries.
            let is_shared = |ip| images.iter().any(|image| image.cluster_ips.get(&ip) == Some(&false));
            for moment in &moments {
                let n = moment.call.index(n_calls);
                let call = calls[n];
                let came = if call.0.ip.is_ipv4() {
                    run::<Octets4>(&window.memory, &window.ops, call, moment)
                } else {
                    run::<Octets6>(&window.memory, &window.ops, call, moment)
                };
                let is_allowed = match &came {
                    Came::Untouched => {
                        loses_network(call.0.ip)
                            || is_shared(call.0.ip)
                            || allowed.admits(n, &Outcomes::Untouched)
                    }
                    Came::Unreachable => allowed.admits(n, &Outcomes::Unreachable),
                    Came::Refused => {
                        allowed.comes_and_goes(n)
                            || [n, n + n_calls].iter().any(|n| allowed.admits(*n, &Outcomes::Refused))
                    }
                    Came::To(endpoint) => {
                        [n, n + n_calls].iter().any(|n| allowed.admits_endpoint(*n, endpoint))
                    }
                };
                prop_assert!(
                    is_allowed,
                    "{}, on the node: {}: {}, but {came:?} at {moment:?} of {:#?}",
                    call.0, call.1, allowed.describe(n), window.ops,
                );
            }
            if passes {
                unsettled = StillRead::Nothing;
                state.settled(plan.number());
                window.pass();
            }
        }
    }
}
