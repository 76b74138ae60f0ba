//! The rules for packets: whatever the history, and as the desired frontends say.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lb_core::{
    desired::{Frontend, FrontendAddress, FrontendKind, PacketMode, PacketSide, Settings},
    model::{Protocol, TrafficPolicy},
    packets::{
        diff,
        nft::{Change, Table, TableId},
        sim::{self, Outcome, Packet},
    },
    plan::Capacity,
    state::State,
    tables::Image,
};
use proptest::{prelude::*, sample::select};

use crate::clusters::{RandomCluster, calls, history, settings};

fn mode() -> impl Strategy<Value = PacketMode> {
    select(vec![PacketMode::External, PacketMode::All])
}

fn state(packets: PacketMode) -> State {
    let settings = Settings { packets, ..settings() };
    State::new(settings, Vec::new(), Capacity::default(), &Image::default())
}

/// Applies a cluster, and completes what waits for a grace period.
fn follow(state: &mut State, cluster: &RandomCluster) {
    cluster.feed(state);
    while state.needs_sync() {
        let plan = state.sync();
        state.settled(plan.number());
    }
}

fn fresh(mode: PacketMode, cluster: &RandomCluster) -> State {
    let mut state = state(mode);
    follow(&mut state, cluster);
    state
}

/// A packet as the first of its connection. The last address is an endpoint's, and a pod's if the Node says
/// so.
fn packets(cluster: &RandomCluster) -> Vec<Packet> {
    let own = cluster.node_addresses();
    let others = ["198.51.100.7", "198.51.101.8", "10.1.77.1", "10.0.0.1", "10.2.0.1", "10.3.0.1"]
        .into_iter()
        .chain(["2001:db8::7", "2001:db9::7", "fd00:1::77", "fd00::1", "fd00:2::1"])
        .map(|ip| ip.parse().unwrap());
    let sources: Vec<(IpAddr, bool)> =
        own.iter().map(|ip| (*ip, true)).chain(others.map(|ip| (ip, false))).collect();
    let destinations: BTreeSet<FrontendAddress> = calls().into_iter().map(|(to, _)| to).collect();
    let with_sctp = destinations.into_iter().flat_map(|to| {
        let sctp = FrontendAddress { protocol: Protocol::Sctp, ..to };
        [Some(to), (to.protocol == Protocol::Tcp).then_some(sctp)].into_iter().flatten()
    });
    with_sctp
        .filter(|to| !to.ip.is_loopback() && !to.ip.is_unspecified())
        .flat_map(|to| {
            let protocol = match to.protocol {
                Protocol::Tcp => 6,
                Protocol::Udp => 17,
                Protocol::Sctp => 132,
            };
            let of_family = sources.iter().filter(move |(ip, _)| ip.is_ipv4() == to.ip.is_ipv4());
            of_family.map(move |(source, is_own)| Packet {
                source: *source,
                destination: SocketAddr::new(to.ip, to.port),
                protocol,
                is_own: *is_own,
            })
        })
        .collect()
}

/// The frontend that a packet is for.
fn frontend<'a>(
    state: &'a State,
    cluster: &RandomCluster,
    packet: Packet,
) -> Option<(&'a Frontend, &'a PacketSide)> {
    let protocol = match packet.protocol {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        _ => Protocol::Sctp,
    };
    let (ip, port) = (packet.destination.ip(), packet.destination.port());
    let any: IpAddr = if ip.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let at = |ip| state.desired().packet_owner(&FrontendAddress { ip, port, protocol });
    let on_node = || cluster.node_addresses().contains(&ip).then(|| at(any)).flatten();
    at(ip).or_else(on_node)
}

/// What must become of a packet: each possible outcome.
fn expected(mode: PacketMode, state: &State, cluster: &RandomCluster, packet: Packet) -> BTreeSet<Outcome> {
    let only = |outcome| BTreeSet::from([outcome]);
    if packet.is_own && mode == PacketMode::External {
        return only(Outcome::Passes);
    }
    let ip = packet.destination.ip();
    let Some((frontend, side)) = frontend(state, cluster, packet) else {
        let image = state.image();
        return only(match image.cluster_ips.get(&ip) {
            _ if mode == PacketMode::External => Outcome::Passes,
            Some(true) => Outcome::Rejected,
            None if image.service_cidrs.iter().any(|network| network.contains(ip)) => Outcome::Dropped,
            Some(false) | None => Outcome::Passes,
        });
    };
    let pods = cluster.pods();
    let is_of_pod = pods.iter().any(|network| network.contains(packet.source));
    if side.sources.as_ref().is_some_and(|ranges| !ranges.iter().any(|range| range.contains(packet.source))) {
        return only(Outcome::Dropped);
    }
    let is_inside = packet.is_own || is_of_pod;
    let endpoints = match &side.outside {
        Some(outside) if !is_inside => outside,
        _ => &frontend.endpoints,
    };
    if endpoints.is_empty() {
        let is_elsewhere = !frontend.endpoints.is_empty();
        return only(if is_elsewhere { Outcome::Dropped } else { Outcome::Rejected });
    }
    let is_masqueraded = match (frontend.kind, frontend.policy) {
        (FrontendKind::ClusterIP, _) if pods.iter().any(|network| network.family() == family(ip)) => {
            !is_of_pod
        }
        (FrontendKind::ClusterIP, _) | (_, TrafficPolicy::Local) => packet.is_own,
        (_, TrafficPolicy::Cluster) => true,
    };
    let translated = endpoints.iter().map(|endpoint| {
        let calls_itself = endpoint.ip() == packet.source && is_local(state, endpoint.ip());
        Outcome::Translated { endpoint: *endpoint, is_masqueraded: is_masqueraded || calls_itself }
    });
    translated.collect()
}

fn family(ip: IpAddr) -> lb_core::model::Family {
    if ip.is_ipv4() { lb_core::model::Family::V4 } else { lb_core::model::Family::V6 }
}

/// Whether an endpoint is on this node, as a frontend that packets reach has it.
fn is_local(state: &State, ip: IpAddr) -> bool {
    let of = |(_, side): (&Frontend, &PacketSide)| side.local.iter().any(|endpoint| endpoint.ip() == ip);
    let desired = state.desired();
    let all = desired.services().flat_map(|key| desired.frontends_of(key));
    all.filter_map(|(frontend, _)| desired.packet_owner(&frontend.address)).any(of)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Each transaction leads to the tables, and these are those of an agent that starts with the same
    /// objects.
    #[test]
    fn only_the_last_cluster_counts(history in history(4), mode in mode(), syncs: [bool; 5]) {
        let mut state = state(mode);
        let mut kernel = BTreeMap::new();
        for (cluster, takes) in history.iter().zip(syncs) {
            follow(&mut state, cluster);
            if takes {
                apply(&mut kernel, &state.take_packet_changes().changes)?;
                prop_assert_eq!(&kernel, &state.packets().tables());
            }
        }
        let last = &history[history.len() - 1];
        apply(&mut kernel, &state.take_packet_changes().changes)?;
        prop_assert_eq!(&kernel, &state.packets().tables());
        prop_assert!(state.take_packet_changes().changes.is_empty());
        while state.packets().has_leaving() {
            state.settle_packets();
            apply(&mut kernel, &state.take_packet_changes().changes)?;
        }
        let fresh = fresh(mode, last);
        prop_assert_eq!(&kernel, &fresh.packets().tables());
        prop_assert_eq!(state.packets().sizes(), fresh.packets().sizes());
    }

    /// A difference applied is the other table, and no change of it is refused.
    #[test]
    fn a_difference_applied_is_the_other_table(one in history(1), other in history(1), modes in [mode(), mode()]) {
        let of = |mode, history: &[RandomCluster]| fresh(mode, &history[history.len() - 1]).packets().tables();
        let (mut kernel, wanted) = (of(modes[0], &one), of(modes[1], &other));
        let mut changes = Vec::new();
        for (id, table) in &wanted {
            changes.extend(diff(kernel.get(id), table).into_iter().map(|change| (id.clone(), change)));
        }
        apply(&mut kernel, &changes)?;
        prop_assert_eq!(kernel, wanted);
    }

}

proptest! {
    // Each sends some ten thousand packets.
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// The rules do what the desired frontends say, for packets from everywhere to everything.
    #[test]
    fn packets_get_what_the_frontends_say(history in history(1), mode in mode()) {
        let last = &history[history.len() - 1];
        let state = fresh(mode, last);
        let tables = state.packets().tables();
        for packet in packets(last) {
            let (_, table) = tables.iter().find(|(id, _)| id.family == family(packet.source)).unwrap();
            let expected = expected(mode, &state, last, packet);
            prop_assert_eq!(sim::outcomes(table, packet).all, expected, "{:?}", packet);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// A table with no elements but those that a packet's rules look for does to it what the whole table
    /// does.
    #[test]
    fn what_a_packet_looks_for_decides(history in history(1), mode in mode(), first in 0..32_usize) {
        let last = &history[history.len() - 1];
        let tables = fresh(mode, last).packets().tables();
        for packet in packets(last).into_iter().skip(first).step_by(32) {
            let (_, table) = tables.iter().find(|(id, _)| id.family == family(packet.source)).unwrap();
            let mut part = table.clone();
            part.sets.values_mut().for_each(|set| set.elements.clear());
            let mut asked = BTreeSet::new();
            loop {
                let new: Vec<_> = sim::lookups(&part, packet).difference(&asked).cloned().collect();
                if new.is_empty() {
                    break;
                }
                for (set, key) in &new {
                    let element = table.sets[set].element(key.as_slice());
                    let found = element.map(|(key, element)| (key.clone(), element.clone()));
                    part.sets.get_mut(set).unwrap().elements.extend(found);
                }
                asked.extend(new);
            }
            prop_assert_eq!(sim::outcomes(&part, packet), sim::outcomes(table, packet), "{:?}", packet);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// While the endpoints of a frontend change, a packet in the middle of the transaction reaches one of
    /// those before or after it.
    #[test]
    fn a_packet_in_the_middle_of_a_transaction_is_served(history in history(1), mode in mode()) {
        let (first, last) = (&history[0], &history[history.len() - 1]);
        let mut state = fresh(mode, first);
        let (former, before) = (fresh(mode, first), state.packets().tables());
        follow(&mut state, last);
        let after = state.packets().tables();
        let endpoints = |outcomes: &BTreeSet<Outcome>| -> Option<BTreeSet<SocketAddr>> {
            let endpoint = |outcome: &Outcome| match outcome {
                Outcome::Translated { endpoint, .. } => Some(*endpoint),
                _ => None,
            };
            outcomes.iter().map(endpoint).collect()
        };
        let is_same_place = first.node_addresses() == last.node_addresses() && first.pods() == last.pods();
        for packet in packets(last).into_iter().filter(|_| is_same_place) {
            // What else changes of a frontend may make one packet wait for its repetition.
            let what = |(frontend, side): (&Frontend, &PacketSide)| {
                (frontend.address, frontend.kind, frontend.policy, side.outside.is_some(), side.sources.clone())
            };
            let [was, is] = [frontend(&former, first, packet), frontend(&state, last, packet)];
            if was.map(what) != is.map(what) {
                continue;
            }
            let Some((id, old)) = before.iter().find(|(id, _)| id.family == family(packet.source)) else { continue };
            let new = &after[id];
            let [earlier, later] = [old, new].map(|table| endpoints(&sim::outcomes(table, packet).all));
            let (Some(earlier), Some(later)) = (earlier, later) else { continue };
            let meanwhile = endpoints(&sim::outcomes_meanwhile(old, new, packet));
            let allowed: BTreeSet<_> = earlier.union(&later).copied().collect();
            prop_assert!(meanwhile.is_some_and(|reached| reached.is_subset(&allowed)), "{:?}", packet);
        }
    }
}

fn apply(kernel: &mut BTreeMap<TableId, Table>, changes: &[(TableId, Change)]) -> Result<(), TestCaseError> {
    sim::apply(kernel, changes)
        .map_err(|(change, problem)| TestCaseError::fail(format!("{change:?}: {problem}")))
}
