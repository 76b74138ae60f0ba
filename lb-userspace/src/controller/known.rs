//! What of the state a command asks for. Pure; shares objects and copies none.

use std::{collections::BTreeSet, net::SocketAddr};

use super::State;
use crate::{
    desired::{Frontend, FrontendAddress},
    model::{Family, Service, ServiceKey, address},
    serve::known::{Known, Which},
};

/// The objects that are asked for. What the state does not hold, such as issues of the source, is left empty.
///
/// Costs a reference for each object of [`Which::All`], and a look at each Service for [`Which::At`].
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

/// The services whose objects changed since the last sync, with the frontends of before.
fn former(state: &State, is_wanted: impl Fn(&ServiceKey) -> bool) -> Vec<(ServiceKey, Vec<Frontend>)> {
    let frontends =
        |key| state.desired().frontends_of(key).map(|(frontend, _owns)| frontend.clone()).collect();
    let changed = state.changed_services().filter(|key| is_wanted(key));
    changed.map(|key| (key.clone(), frontends(key))).collect()
}

/// The keys that a call may find: its own address, and that of node ports if it is one of a node.
fn addresses(state: &State, to: FrontendAddress) -> Vec<FrontendAddress> {
    let to = FrontendAddress { ip: to.ip.to_canonical(), ..to };
    let on_nodes = FrontendAddress { ip: address::unspecified(address::family(to.ip)), ..to };
    let is_on_node = to.ip.is_loopback() || state.topology().is_node_address(to.ip);
    if is_on_node { vec![to, on_nodes] } else { vec![to] }
}

/// Whether the object of a service names one of these, whatever its ports: a port may have been left out.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::{
        cli::listing::{is_described, list, state_of_known},
        desired::{ExternalIps, NodePortAddresses, Settings},
        model::{Issue, IssueKind, ObjectRef, Slice, SliceKey},
        plan::Capacity,
        tables::Image,
    };

    fn state() -> State {
        let settings = Settings {
            node_name: "node".into(),
            node_ports: 30000..=32767,
            node_port_addresses: NodePortAddresses::All,
            external_ips: ExternalIps::Any,
            service_cidrs: Some(Vec::new()),
        };
        State::new(settings, vec!["192.0.2.1".parse().unwrap()], Capacity::default(), &Image::default())
    }

    fn key(name: &str) -> ServiceKey {
        ServiceKey::new("shop", name)
    }

    /// A service with a cluster IP and a node port.
    fn service(name: &str, ip: &str, node_port: u16) -> Service {
        serde_json::from_value(json!({
            "key": key(name),
            "created": null,
            "service_type": "NodePort",
            "cluster_ipv4": ip,
            "cluster_ipv6": null,
            "external_ips": [],
            "load_balancer_ips": [],
            "source_ranges": [],
            "has_unreadable_source_range": false,
            "internal_policy": "Cluster",
            "external_policy": "Cluster",
            "affinity_seconds": null,
            "health_check_node_port": null,
            "ports": [{"name": "", "protocol": "TCP", "port": 80, "node_port": node_port}],
            "annotations": [],
        }))
        .unwrap()
    }

    fn slice(name: &str, endpoint: &str) -> Slice {
        serde_json::from_value(json!({
            "name": format!("{name}-1"),
            "service": key(name),
            "ipv6": false,
            "ports": [{"name": "", "protocol": "TCP", "port": 8080}],
            "endpoints": [{
                "address": endpoint, "ready": true, "serving": true, "terminating": false,
                "node": "node", "zone": null, "hints": null,
            }],
            "trigger_time": null,
        }))
        .unwrap()
    }

    fn set(state: &mut State, name: &str, ip: &str, node_port: u16, endpoint: &str) {
        state.change(|store| {
            let mut changes = store.set_service(&key(name), Some(service(name, ip, node_port)));
            let slice = slice(name, endpoint);
            changes.merge(store.set_slice(&slice.key(), Some(slice)));
            changes
        });
    }

    fn two() -> State {
        let mut state = state();
        set(&mut state, "a", "10.96.0.1", 30001, "10.244.0.1");
        set(&mut state, "b", "10.96.0.2", 30002, "10.244.0.2");
        let _plan = state.sync();
        state
    }

    /// As a command hears it.
    fn heard(state: &State, which: Which) -> Known {
        serde_json::from_slice(&serde_json::to_vec(&known(state, which)).unwrap()).unwrap()
    }

    #[test]
    fn an_address_gets_the_services_that_name_it() {
        let state = two();
        for (address, services, n_tables) in [
            ("10.96.0.1:80/tcp", &["a"][..], 1),
            // A port that the service does not have: it is told of all the same.
            ("10.96.0.1:81/tcp", &["a"], 0),
            ("192.0.2.1:30002/tcp", &["b"], 1),
            ("127.0.0.1:30001/tcp", &["a"], 1),
            ("[::ffff:10.96.0.2]:80/tcp", &["b"], 1),
            // The node port is one of this node's addresses only.
            ("192.0.2.9:30002/tcp", &[], 0),
            ("10.96.0.3:80/tcp", &[], 0),
        ] {
            let known = heard(&state, Which::At(address.parse().unwrap()));
            let names: Vec<&str> = known.services.iter().map(|service| &*service.key.name).collect();
            assert_eq!((&*names, known.tables.len()), (services, n_tables), "{address}");
            assert_eq!(known.slices.len(), services.len(), "{address}");
        }
    }

    #[test]
    fn objects_are_shared_and_not_copied() {
        let state = two();
        let known = known(&state, Which::All);
        for (ours, theirs) in known.services.iter().zip(state.store().shared_services()) {
            assert!(Arc::ptr_eq(ours, theirs));
        }
        for (ours, theirs) in known.slices.iter().zip(state.store().shared_slices()) {
            assert!(Arc::ptr_eq(ours, theirs));
        }
        assert_eq!((known.services.len(), known.slices.len()), (2, 2));
    }

    /// Between a change and the next sync the tables hold what no object asks for.
    #[test]
    fn frontends_keep_their_names_until_the_tables_follow() {
        let mut state = two();
        state.change(|store| store.set_service(&key("a"), None));
        set(&mut state, "b", "10.96.0.1", 30002, "10.244.0.2");
        let names = |state: &State, known: Known| -> Vec<(String, bool)> {
            let objects = state_of_known(known);
            let rows = list(state.image(), Some(&objects), &std::collections::BTreeMap::new());
            rows.iter()
                .map(|row| (format!("{} {}", row.name, row.address), is_described(row, &objects)))
                .collect()
        };
        let row = |text: &str, is_described| (text.to_owned(), is_described);
        let before = names(&state, heard(&state, Which::All));
        // The endpoints of a service that is gone are no longer known.
        let expected = [
            row("a 0.0.0.0", false),
            row("a 10.96.0.1", false),
            row("b 0.0.0.0", true),
            row("b 10.96.0.2", true),
        ];
        assert_eq!(before, expected);
        let _plan = state.sync();
        let after = names(&state, heard(&state, Which::All));
        assert_eq!(after, [row("b 0.0.0.0", true), row("b 10.96.0.1", true)]);
    }

    #[test]
    fn an_address_gets_the_issues_that_concern_it() {
        let mut state = two();
        state.change(|store| {
            store.set_slice(&SliceKey { namespace: "shop".into(), name: "a-1".into() }, None)
        });
        let no_ports = |object| Issue::new(object, IssueKind::NoPorts);
        let taken = IssueKind::FrontendTaken { address: "10.96.0.1:80/tcp".into(), winner: "shop/a".into() };
        let issues = [
            (no_ports(ObjectRef::service("shop", "a")), true),
            // One that could not be read, named as Kubernetes does.
            (no_ports(ObjectRef::slice("shop", "a-x2x4z")), true),
            (no_ports(ObjectRef::slice("shop", "ab-x2x4z")), false),
            (no_ports(ObjectRef::service("other", "a")), false),
            (no_ports(ObjectRef::service("shop", "b")), false),
            (Issue::new(ObjectRef::service("other", "c"), taken), true),
            (no_ports(ObjectRef::node("a")), false),
        ];
        let to: FrontendAddress = "10.96.0.1:80".parse().unwrap();
        let all = issues.iter().map(|(issue, _)| issue.clone()).collect();
        let mut known = Known { issues: all, ..known(&state, Which::At(to)) };
        known.keep_issues_at(to);
        let expected: Vec<Issue> =
            issues.into_iter().filter(|(_, is_kept)| *is_kept).map(|(i, _)| i).collect();
        assert_eq!(known.issues, expected);
    }
}
