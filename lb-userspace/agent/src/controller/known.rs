//! The part of the state that a command asks for. Pure; shares objects without copying.

use std::{collections::BTreeSet, net::SocketAddr};

use lb_core::state::State;
use lb_core::{
    desired::{Frontend, FrontendAddress},
    model::{Family, Service, ServiceKey, address},
};

use crate::serve::known::{Known, Which};

/// The requested objects. Fields that the state cannot fill, such as the source's issues, are empty.
///
/// Costs one reference per object for [`Which::All`], and reads each Service for [`Which::At`].
#[must_use]
pub fn known(state: &State, which: Which) -> Known {
    let store = state.store();
    let mut known = Known {
        has_synced: false,
        settings: state.settings().clone(),
        interfaces: state.interfaces().to_vec(),
        services: Vec::new(),
        slices: Vec::new(),
        nodes: Vec::new(),
        former: Vec::new(),
        tables: Vec::new(),
        cluster_ip: None,
        networks: Vec::new(),
        issues: Vec::new(),
        save_problem: None,
    };
    match which {
        Which::Issues => {}
        Which::All => {
            known.services = store.shared_services().cloned().collect();
            known.slices = store.shared_slices().cloned().collect();
            known.nodes = store.shared_nodes().cloned().collect();
            known.former = former(state, |_key| true);
        }
        Which::At(to) => {
            let addresses = addresses(state, to);
            let owners =
                addresses.iter().filter_map(|address| Some(&state.desired().owner(address)?.port.service));
            let named = store.shared_services().filter(|service| is_named(service, &addresses));
            let keys: BTreeSet<&ServiceKey> = named.map(|service| &service.key).chain(owners).collect();
            for key in &keys {
                known.services.extend(store.shared_service(key).cloned());
                known.slices.extend(store.shared_slices_of(key).cloned());
            }
            known.nodes = store.shared_nodes().cloned().collect();
            known.former = former(state, |key| keys.contains(key));
            known.cluster_ip = state.image().cluster_ips.get(&to.ip.to_canonical()).copied();
            known.networks.clone_from(&state.image().service_cidrs);
            known.tables = addresses.into_iter().filter_map(|address| held(state, address)).collect();
        }
    }
    known
}

/// Services whose objects changed since the last sync, with the frontends that it wrote.
fn former(state: &State, is_wanted: impl Fn(&ServiceKey) -> bool) -> Vec<(ServiceKey, Vec<Frontend>)> {
    let frontends =
        |key| state.desired().frontends_of(key).map(|(frontend, _owns)| frontend.clone()).collect();
    let changed = state.changed_services().filter(|key| is_wanted(key));
    changed.map(|key| (key.clone(), frontends(key))).collect()
}

/// The keys that a call may match: its own address, and the wildcard of node ports if the address is a
/// node's.
fn addresses(state: &State, to: FrontendAddress) -> Vec<FrontendAddress> {
    let to = FrontendAddress { ip: to.ip.to_canonical(), ..to };
    let on_nodes = FrontendAddress { ip: address::unspecified(address::family(to.ip)), ..to };
    let is_on_node = to.ip.is_loopback() || state.topology().is_node_address(to.ip);
    if is_on_node { vec![to, on_nodes] } else { vec![to] }
}

/// Whether a service's object names one of these addresses. Its ports do not matter: one may have been left
/// out.
fn is_named(service: &Service, addresses: &[FrontendAddress]) -> bool {
    addresses.iter().any(|address| {
        let ip = address.ip;
        let cluster_ip = service.cluster_ip(if ip.is_ipv6() { Family::V6 } else { Family::V4 });
        cluster_ip == Some(ip)
            || service.external_ips.contains(&ip)
            || service.load_balancer_ips.contains(&ip)
            || (ip.is_unspecified() && service.ports.iter().any(|port| port.node_port == Some(address.port)))
    })
}

/// The frontend in the tables at an address, and its endpoints there.
fn held(state: &State, address: FrontendAddress) -> Option<(FrontendAddress, Vec<SocketAddr>)> {
    let image = state.image();
    let frontend = image.frontends.get(image.services.get(&address)?)?;
    let entries = image.entries(address.ip.is_ipv6(), frontend.run)?;
    Some((address, entries.iter().map(|entry| entry.address).collect()))
}
