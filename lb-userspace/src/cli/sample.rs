//! One read of the pinned maps, for commands that poll.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use lb_common::layout::ServiceStats;
use lb_core::{
    desired::FrontendAddress,
    tables::{Entry, Image},
};
use lb_kernel::{
    KernelError, Maps, Observations, host,
    sockets::{Record, SocketTable},
};

use super::listing::EndpointCounts;

/// The contents of the maps, as consistent as they can be read while programs run.
#[derive(Clone, Debug, Default)]
pub(super) struct Reading {
    pub(super) image: Image,
    /// Counters by service id.
    pub(super) services: BTreeMap<u32, ServiceStats>,
    /// By endpoint id.
    pub(super) endpoints: BTreeMap<u32, EndpointCounts>,
    /// Socket records; `None` if they cannot be listed: without BTF, or without permission.
    pub(super) records: Option<Vec<Record>>,
}

/// Reads once. Opens the maps each time, since `socklb cleanup` or a new agent may have replaced them.
///
/// # Errors
///
/// If nothing is pinned or it cannot be read.
pub(super) fn read(pin_path: &Path) -> Result<Reading, KernelError> {
    let (image, observations) = (Maps::open(pin_path)?.image()?, Observations::open(pin_path)?);
    let service_ids: BTreeSet<u32> = image.frontends.values().map(|frontend| frontend.service_id).collect();
    Ok(Reading {
        services: service_ids.into_iter().map(|id| (id, observations.service_stats(id))).collect(),
        endpoints: counts(&observations, image.reachable()),
        records: SocketTable::open(pin_path).and_then(|table| table.records()).ok(),
        image,
    })
}

/// What the maps count for these endpoints, by id.
pub(super) fn counts<'a>(
    observations: &Observations,
    entries: impl Iterator<Item = &'a Entry>,
) -> BTreeMap<u32, EndpointCounts> {
    let ids: BTreeSet<u32> = entries.map(|entry| entry.endpoint_id).collect();
    let now = host::monotonic();
    let of = |id| EndpointCounts {
        calls: observations.endpoint_stats(id),
        active: observations.active(id),
        health: observations.endpoint_health(id),
        now,
    };
    ids.into_iter().map(|id| (id, of(id))).collect()
}

/// The frontend of a record; `None` if the tables no longer hold it. Its id alone does not identify it: the
/// id may have been reused since the call.
pub(super) fn frontend_of(image: &Image, record: &Record) -> Option<FrontendAddress> {
    let any: IpAddr = match record.service {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let (port, protocol) = (record.service.port(), record.protocol);
    // The record of a node port has the called address; the frontend's key has none.
    let addresses = [record.service.ip(), any].map(|ip| FrontendAddress { ip, port, protocol });
    let is_its = |address: &FrontendAddress| {
        let frontend = image.services.get(address).and_then(|id| image.frontends.get(id));
        frontend.is_some_and(|frontend| frontend.service_id == record.service_id)
    };
    addresses.into_iter().find(is_its)
}

#[cfg(test)]
mod tests {
    use lb_common::layout::Frontend;
    use lb_core::model::Protocol;

    use super::*;

    #[test]
    fn a_record_belongs_to_the_frontend_of_its_address_and_id() {
        let address = |text: &str, protocol| {
            let address: SocketAddr = text.parse().unwrap();
            FrontendAddress { ip: address.ip(), port: address.port(), protocol }
        };
        let tcp = address("10.96.0.53:53", Protocol::Tcp);
        let udp = address("10.96.0.53:53", Protocol::Udp);
        let node_port = address("0.0.0.0:30080", Protocol::Tcp);
        let mut image = Image::default();
        for (id, address) in (0..).zip([tcp, udp, node_port]) {
            image.services.insert(address, id);
            image.frontends.insert(id, Frontend { service_id: 10 + id, ..Frontend::default() });
        }
        for (protocol, service, service_id, expected) in [
            (Protocol::Tcp, "10.96.0.53:53", 10, Some(tcp)),
            (Protocol::Udp, "10.96.0.53:53", 11, Some(udp)),
            (Protocol::Tcp, "192.0.2.1:30080", 12, Some(node_port)),
            // Reused ids, and a frontend that is gone.
            (Protocol::Tcp, "10.96.0.53:53", 12, None),
            (Protocol::Udp, "10.96.0.53:53", 10, None),
            (Protocol::Tcp, "10.96.0.54:53", 10, None),
            (Protocol::Tcp, "[fd00::1]:30080", 12, None),
        ] {
            let service = service.parse().unwrap();
            let record =
                Record { cookie: 1, protocol, service, endpoint: service, service_id, endpoint_id: 0 };
            assert_eq!(frontend_of(&image, &record), expected, "{record:?}");
        }
    }
}
