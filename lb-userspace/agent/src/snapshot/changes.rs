//! Contents of a journal's record. Pure.

use std::{cmp::Ordering, sync::Arc};

use lb_core::model::{Node, Service, ServiceCidr, ServiceKey, Slice, SliceKey, Store};
use serde::{Deserialize, Serialize};

use super::Snapshot;

/// The difference between two snapshots.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Changes {
    /// The settings of the later snapshot, and its objects that are new or differ.
    set: Snapshot,
    /// Objects that only the earlier snapshot has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    gone_services: Vec<ServiceKey>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    gone_slices: Vec<SliceKey>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    gone_nodes: Vec<Arc<str>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    gone_service_cidrs: Vec<Arc<str>>,
}

fn by_service(a: &Service, b: &Service) -> Ordering {
    a.key.cmp(&b.key)
}

fn by_slice(a: &Slice, b: &Slice) -> Ordering {
    (&a.service, &a.name).cmp(&(&b.service, &b.name))
}

fn by_node(a: &Node, b: &Node) -> Ordering {
    a.name.cmp(&b.name)
}

fn by_cidr(a: &ServiceCidr, b: &ServiceCidr) -> Ordering {
    a.name.cmp(&b.name)
}

/// The objects of `new` that are new or differ, and those that only `old` has. Both must be sorted.
fn differences<'a, T: Eq>(
    old: &'a [Arc<T>],
    new: &[Arc<T>],
    order: impl Fn(&T, &T) -> Ordering,
) -> (Vec<Arc<T>>, Vec<&'a T>) {
    let (mut set, mut gone) = (Vec::new(), Vec::new());
    let mut old = old.iter().peekable();
    for object in new {
        while let Some(past) = old.next_if(|past| order(past, object).is_lt()) {
            gone.push(&**past);
        }
        // Nearly all are the same allocation, which `Arc` compares first.
        if old.next_if(|same| order(same, object).is_eq()).is_none_or(|same| same != object) {
            set.push(Arc::clone(object));
        }
    }
    gone.extend(old.map(Arc::as_ref));
    (set, gone)
}

impl Changes {
    /// The changes from `old` to `new`; `None` if they are equal.
    pub(super) fn between(old: &Snapshot, new: &Snapshot) -> Option<Self> {
        let (services, gone_services) = differences(&old.services, &new.services, by_service);
        let (slices, gone_slices) = differences(&old.slices, &new.slices, by_slice);
        let (nodes, gone_nodes) = differences(&old.nodes, &new.nodes, by_node);
        let (service_cidrs, gone_service_cidrs) =
            differences(&old.service_cidrs, &new.service_cidrs, by_cidr);
        let changes = Self {
            set: Snapshot { services, slices, nodes, service_cidrs, ..new.without_objects() },
            gone_services: gone_services.into_iter().map(|service| service.key.clone()).collect(),
            gone_slices: gone_slices.into_iter().map(Slice::key).collect(),
            gone_nodes: gone_nodes.into_iter().map(|node| node.name.clone()).collect(),
            gone_service_cidrs: gone_service_cidrs.into_iter().map(|cidr| cidr.name.clone()).collect(),
        };
        (changes != Self { set: old.without_objects(), ..Self::default() }).then_some(changes)
    }

    /// Applies the changes to the objects, and returns the settings.
    pub(super) fn apply(self, store: &mut Store) -> Snapshot {
        // A slice whose service has changed is in both lists: remove it first.
        for key in &self.gone_slices {
            let _changes = store.set_slice(key, None);
        }
        for key in &self.gone_services {
            let _changes = store.set_service(key, None);
        }
        for name in &self.gone_nodes {
            let _changes = store.set_node(name, None);
        }
        for name in &self.gone_service_cidrs {
            let _changes = store.set_service_cidr(name, None);
        }
        let Snapshot { services, slices, nodes, service_cidrs, .. } = &self.set;
        for service in services {
            let _changes = store.set_service(&service.key, Some(Service::clone(service)));
        }
        for slice in slices {
            let _changes = store.set_slice(&slice.key(), Some(Slice::clone(slice)));
        }
        for node in nodes {
            let _changes = store.set_node(&node.name, Some(Node::clone(node)));
        }
        for cidr in service_cidrs {
            let _changes = store.set_service_cidr(&cidr.name, Some(ServiceCidr::clone(cidr)));
        }
        self.set.without_objects()
    }
}

impl Snapshot {
    fn without_objects(&self) -> Self {
        Self {
            node_name: Arc::clone(&self.node_name),
            node_ports: self.node_ports,
            node_port_addresses: self.node_port_addresses.clone(),
            external_ips: self.external_ips,
            packets: self.packets,
            interfaces: self.interfaces.clone(),
            // Not `..Self::default()`: a field that is forgotten here would be lost with the first record.
            services: Vec::new(),
            slices: Vec::new(),
            nodes: Vec::new(),
            service_cidrs: Vec::new(),
        }
    }
}
