//! The maps: opening, reading, and one write for each [`Op`].

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::Path,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use lb_common::{
    address::{Address, Octets6, mapped_ipv4},
    layout::{
        self, AddressKey, ClusterIp, Endpoint4, Endpoint6, Frontend, FrontendKey4, FrontendKey6, FrontendRef,
        MapValue, Meta, Network4, Network6, NodeAddr, ServiceCidrs,
    },
    maps::{self, MAPS},
};
use lb_core::{
    desired::FrontendAddress,
    model::{Cidr, Protocol},
    plan::{self, Capacity, Op},
    tables::{AddressTable, Entry, Image, StoredRun, wire_protocol},
};

use crate::{
    KernelError, Options,
    adoption::{self, Adoption},
    audit::ForeignKey,
    fault,
    layouts::Directory,
    mapped::Mapped,
    pod::Plain,
};

/// The maps, open for reading and writing.
pub struct Maps {
    pub(crate) services4: HashMap<MapData, Plain<FrontendKey4>, Plain<FrontendRef>>,
    pub(crate) services6: HashMap<MapData, Plain<FrontendKey6>, Plain<FrontendRef>>,
    pub(crate) node_addrs: HashMap<MapData, Plain<AddressKey>, Plain<NodeAddr>>,
    pub(crate) cluster_ips: HashMap<MapData, Plain<AddressKey>, Plain<ClusterIp>>,
    service_cidrs: Mapped<ServiceCidrs>,
    pub(crate) frontends: Mapped<Frontend>,
    pub(crate) endpoints4: Mapped<Endpoint4>,
    pub(crate) endpoints6: Mapped<Endpoint6>,
    pub(crate) capacity: Capacity,
    pinned_meta: Array<MapData, Plain<Meta>>,
    meta: Meta,
}

impl Maps {
    /// Opens the pinned maps without loading or changing anything.
    ///
    /// # Errors
    ///
    /// [`KernelError::NothingPinned`], [`KernelError::NotPinned`], [`KernelError::Layout`],
    /// [`KernelError::Mixed`], or a failing system call.
    pub fn open(pin_path: &Path) -> Result<Self, KernelError> {
        let directory = Directory::open(pin_path)?;
        Self::open_each(|_name| &directory).map_err(|error| match error {
            KernelError::NotPinned { .. } if !MAPS.iter().any(|map| pin_path.join(map.name).exists()) => {
                KernelError::NothingPinned { path: pin_path.to_owned() }
            }
            error => error,
        })
    }

    /// Opens the maps; `place` returns the directory of each.
    pub(crate) fn open_each<'a>(place: impl Fn(&'static str) -> &'a Directory) -> Result<Self, KernelError> {
        let (pinned_meta, _): (Array<MapData, Plain<Meta>>, _) = place("meta").typed("meta")?;
        let Plain(meta) = pinned_meta.get(&0, 0).map_err(|source| KernelError::map("meta", source))?;
        let (services4, shape4) = place("services4").typed("services4")?;
        let (services6, shape6) = place("services6").typed("services6")?;
        let (frontends, frontends_shape) = place("frontends").map("frontends")?;
        let (endpoints4, endpoints4_shape) = place("endpoints4").map("endpoints4")?;
        let (endpoints6, endpoints6_shape) = place("endpoints6").map("endpoints6")?;
        let capacity = Capacity { services: shape4.max_entries, endpoints: endpoints4_shape.max_entries };
        let of_one_image = shape6.max_entries == capacity.services
            && frontends_shape.max_entries == capacity.services.saturating_mul(2)
            && endpoints6_shape.max_entries == capacity.endpoints;
        if !of_one_image {
            return Err(KernelError::Mixed { path: place("services4").path().to_owned() });
        }
        Ok(Self {
            services4,
            services6,
            node_addrs: place("node_addrs").typed("node_addrs")?.0,
            cluster_ips: place("cluster_ips").typed("cluster_ips")?.0,
            service_cidrs: map_memory("service_cidrs", &place("service_cidrs").map("service_cidrs")?.0)?,
            frontends: map_memory("frontends", &frontends)?,
            endpoints4: map_memory("endpoints4", &endpoints4)?,
            endpoints6: map_memory("endpoints6", &endpoints6)?,
            capacity,
            pinned_meta,
            meta,
        })
    }

    /// Takes the maps out of a loaded object.
    pub(crate) fn take(object: &mut Ebpf, options: &Options) -> Result<Self, KernelError> {
        let capacity = options.capacity;
        let meta = Meta {
            layout_version: maps::find("meta").map_or(0, fault::layout),
            max_services: capacity.services,
            max_endpoints: capacity.endpoints,
            localhost_nodeports: options.localhost_nodeports.into(),
            node_netns: options.node_netns.unwrap_or_default(),
            node_port_first: options.node_ports.0,
            node_port_last: options.node_ports.1,
            passive_health: options.passive_health.into(),
        };
        Ok(Self {
            services4: take_map(object, "services4")?,
            services6: take_map(object, "services6")?,
            node_addrs: take_map(object, "node_addrs")?,
            cluster_ips: take_map(object, "cluster_ips")?,
            service_cidrs: map_memory("service_cidrs", map_data(object, "service_cidrs")?)?,
            frontends: map_memory("frontends", map_data(object, "frontends")?)?,
            endpoints4: map_memory("endpoints4", map_data(object, "endpoints4")?)?,
            endpoints6: map_memory("endpoints6", map_data(object, "endpoints6")?)?,
            capacity,
            pinned_meta: take_map(object, "meta")?,
            meta,
        })
    }

    /// Records the settings that the programs were loaded with.
    pub(crate) fn write_meta(&mut self) -> Result<(), KernelError> {
        self.pinned_meta.set(0, Plain(self.meta), 0).map_err(|source| KernelError::map("meta", source))
    }

    /// Fills recreated maps from earlier ones of the same layout, as far as entries fit: frontends, endpoints
    /// and nodes under their ids.
    pub(crate) fn fill_from(
        &mut self,
        former: &Directory,
        made: &Directory,
        takeover: &Adoption,
    ) -> Result<(), KernelError> {
        if takeover.image == adoption::Image::Moves {
            // A map that is new in this version is read from the new directory, where it is empty.
            let place = |name| if takeover.known.contains(&name) { former } else { made };
            let image = plan::transfer(&Self::open_each(place)?.image()?, self.capacity);
            for op in plan::diff(&Image::default(), &image).ops() {
                fault::point();
                self.apply(op)?;
            }
        }
        Ok(())
    }

    /// The sizes of the maps.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The settings that the programs were loaded with.
    #[must_use]
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    pub(crate) fn apply(&mut self, op: &Op) -> Result<(), KernelError> {
        match op {
            Op::WriteRun { ipv6, offset, run } => self.write_run(*ipv6, *offset, run.entries()),
            Op::WriteFrontend { id, frontend } => {
                in_range("frontends", *id, self.frontends.write(*id, *frontend))
            }
            Op::SetFrontend { id, frontend } => {
                // Words 0 and 1 are the run, which has its own operation.
                let words = [
                    (2, frontend.service_id),
                    (3, frontend.affinity_seconds),
                    (4, frontend.flags),
                    (5, frontend.health),
                ];
                let done = words.iter().all(|&(word, value)| self.frontends.store_u32(*id, word, value));
                in_range("frontends", *id, done)
            }
            Op::SwitchRun { id, run } => {
                in_range("frontends", *id, self.frontends.store_u64(*id, 0, run.to_word()))
            }
            Op::InsertAddress { table, address, flag } => {
                let (key, flag) = (Plain(address_key(*address)), u32::from(*flag));
                let inserted = match table {
                    AddressTable::Nodes => self.node_addrs.insert(key, Plain(NodeAddr { own: flag }), 0),
                    AddressTable::ClusterIps => {
                        self.cluster_ips.insert(key, Plain(ClusterIp { served: flag }), 0)
                    }
                };
                inserted.map_err(|source| KernelError::map(table.map(), source))
            }
            Op::DeleteAddress(table, address) => {
                let key = Plain(address_key(*address));
                let removed = match table {
                    AddressTable::Nodes => self.node_addrs.remove(&key),
                    AddressTable::ClusterIps => self.cluster_ips.remove(&key),
                };
                ignore_missing(table.map(), removed)
            }
            Op::SetServiceCidrs(networks) => self.write_service_cidrs(networks),
            Op::InsertService { address, frontend_id } => {
                let value = Plain(FrontendRef { frontend_id: *frontend_id });
                match key(address) {
                    Some(Key::V4(key)) => self
                        .services4
                        .insert(Plain(key), value, 0)
                        .map_err(|source| KernelError::map("services4", source)),
                    Some(Key::V6(key)) => self
                        .services6
                        .insert(Plain(key), value, 0)
                        .map_err(|source| KernelError::map("services6", source)),
                    None => Ok(()),
                }
            }
            Op::DeleteService(address) => match key(address) {
                Some(Key::V4(key)) => ignore_missing("services4", self.services4.remove(&Plain(key))),
                Some(Key::V6(key)) => ignore_missing("services6", self.services6.remove(&Plain(key))),
                None => Ok(()),
            },
            // Unreferenced entries stay until they are overwritten.
            Op::DropRun { .. }
            | Op::DropFrontend(_)
            // Not of these maps: `Observations::apply`.
            | Op::ResetService(_)
            | Op::ResetEndpoints(_) => Ok(()),
        }
    }

    /// Writes the networks while their counts are 0, then stores the counts.
    fn write_service_cidrs(&mut self, networks: &[Cidr]) -> Result<(), KernelError> {
        let cidrs = service_cidrs(networks);
        let hidden = ServiceCidrs { n_v4: 0, n_v6: 0, ..cidrs };
        let done = (networks.is_empty() || self.service_cidrs.write(0, hidden))
            && self.service_cidrs.store_u32(0, 0, cidrs.n_v4)
            && self.service_cidrs.store_u32(0, 1, cidrs.n_v6);
        in_range("service_cidrs", 0, done)
    }

    fn write_run(&mut self, ipv6: bool, offset: u32, entries: &[Entry]) -> Result<(), KernelError> {
        for (index, entry) in (offset..).zip(entries) {
            let (port, extra, endpoint_id) = (entry.address().port(), entry.extra, entry.endpoint_id);
            let done = match entry.address().ip() {
                IpAddr::V4(ip) if !ipv6 => {
                    self.endpoints4.write(index, Endpoint4 { address: ip.octets(), port, extra, endpoint_id })
                }
                IpAddr::V6(ip) if ipv6 => {
                    self.endpoints6.write(index, Endpoint6 { address: ip.octets(), port, extra, endpoint_id })
                }
                _ => false,
            };
            in_range(if ipv6 { "endpoints6" } else { "endpoints4" }, index, done)?;
        }
        Ok(())
    }

    /// Reads the tables: every frontend that a call can find, and the runs they refer to.
    ///
    /// Not a snapshot: while an agent applies plans, entries read early may be older than entries read late.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub fn image(&self) -> Result<Image, KernelError> {
        self.read().map(|(image, _strays)| image)
    }

    /// As [`Self::image`], with the keys that name no frontend.
    pub(crate) fn read(&self) -> Result<(Image, Vec<ForeignKey>), KernelError> {
        let (mut image, mut strays) = (Image::default(), Vec::new());
        for item in &self.services4 {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("services4", source))?;
            match address(Ipv4Addr::from(key.address).into(), key.port, key.protocol, key.reserved) {
                Some(address) => self.read_frontend(&mut image, address, value),
                None => strays.push(ForeignKey::V4(key)),
            }
        }
        for item in &self.services6 {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("services6", source))?;
            match address(Ipv6Addr::from(key.address).into(), key.port, key.protocol, key.reserved) {
                Some(address) => self.read_frontend(&mut image, address, value),
                None => strays.push(ForeignKey::V6(key)),
            }
        }
        for item in &self.node_addrs {
            let (Plain(key), Plain(value)) = item.map_err(|source| KernelError::map("node_addrs", source))?;
            image.node_addrs.insert(ip_of(&key.address), value.own != 0);
        }
        for item in &self.cluster_ips {
            let (Plain(key), Plain(value)) =
                item.map_err(|source| KernelError::map("cluster_ips", source))?;
            image.cluster_ips.insert(ip_of(&key.address), value.served != 0);
        }
        image.service_cidrs = self.read_service_cidrs();
        Ok((image, strays))
    }

    pub(crate) fn read_service_cidrs(&self) -> Vec<Cidr> {
        self.service_cidrs.read(0).as_ref().map(networks).unwrap_or_default()
    }

    fn read_frontend(&self, image: &mut Image, address: FrontendAddress, value: FrontendRef) {
        image.services.insert(address, value.frontend_id);
        let Some(frontend) = self.frontends.read(value.frontend_id) else { return };
        image.frontends.insert(value.frontend_id, frontend);
        let ipv6 = address.ip.is_ipv6();
        if frontend.run.len > 0
            && !image.runs(ipv6).contains_key(&frontend.run.offset)
            && let Some(run) = StoredRun::read(frontend.run, |index| self.read_entry(ipv6, index))
        {
            image.runs_mut(ipv6).insert(frontend.run.offset, run);
        }
    }
}

fn take_map<T: TryFrom<Map, Error = MapError>>(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<T, KernelError> {
    let map = object.take_map(name).ok_or(KernelError::Missing { kind: "map", name })?;
    T::try_from(map).map_err(|source| KernelError::map(name, source))
}

fn map_data<'a>(object: &'a Ebpf, name: &'static str) -> Result<&'a MapData, KernelError> {
    match object.map(name) {
        Some(Map::Array(data)) => Ok(data),
        _ => Err(KernelError::Missing { kind: "map", name }),
    }
}

pub(crate) fn map_memory<T: MapValue>(name: &'static str, map: &MapData) -> Result<Mapped<T>, KernelError> {
    let n = map.info().map_err(|source| KernelError::map(name, source))?.max_entries();
    Mapped::new(map.fd().as_fd(), n).map_err(|source| KernelError::Mmap { name, source })
}

fn in_range(name: &'static str, index: u32, done: bool) -> Result<(), KernelError> {
    if done { Ok(()) } else { Err(KernelError::OutOfRange { name, index }) }
}

/// Accepts that the entry is deleted already.
pub(crate) fn ignore_missing(name: &'static str, result: Result<(), MapError>) -> Result<(), KernelError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| KernelError::map(name, source)),
    }
}

/// The frontend that a key names; `None` if no call can match it. No agent writes such a key.
fn address(ip: IpAddr, port: u16, protocol: u8, reserved: u8) -> Option<FrontendAddress> {
    let protocol = match layout::Protocol(protocol) {
        layout::Protocol::TCP => Protocol::Tcp,
        layout::Protocol::UDP => Protocol::Udp,
        _ => return None,
    };
    (reserved == 0).then_some(FrontendAddress { ip, port, protocol })
}

pub(crate) enum Key {
    V4(FrontendKey4),
    V6(FrontendKey6),
}

/// The key of a frontend; `None` for protocols that no hook serves.
pub(crate) fn key(address: &FrontendAddress) -> Option<Key> {
    let protocol = wire_protocol(address.protocol)?.0;
    Some(match address.ip {
        IpAddr::V4(ip) => {
            Key::V4(FrontendKey4 { address: ip.octets(), port: address.port, protocol, reserved: 0 })
        }
        IpAddr::V6(ip) => {
            Key::V6(FrontendKey6 { address: ip.octets(), port: address.port, protocol, reserved: 0 })
        }
    })
}

pub(crate) fn address_key(address: IpAddr) -> AddressKey {
    let address = match address {
        IpAddr::V4(ip) => ip.octets().to_mapped(),
        IpAddr::V6(ip) => ip.octets(),
    };
    AddressKey { address }
}

/// Networks in the layout of the map. `Encoder` guarantees that they fit.
fn service_cidrs(networks: &[Cidr]) -> ServiceCidrs {
    let mut cidrs = ServiceCidrs::default();
    for network in networks {
        match (network.address, network.mask()) {
            (IpAddr::V4(address), IpAddr::V4(mask)) => {
                if let Some(place) = cidrs.v4.get_mut(cidrs.n_v4 as usize) {
                    *place = Network4 { address: address.octets(), mask: mask.octets() };
                    cidrs.n_v4 += 1;
                }
            }
            (IpAddr::V6(address), IpAddr::V6(mask)) => {
                if let Some(place) = cidrs.v6.get_mut(cidrs.n_v6 as usize) {
                    *place = Network6 { address: address.octets(), mask: mask.octets() };
                    cidrs.n_v6 += 1;
                }
            }
            _ => {}
        }
    }
    cidrs
}

/// The active networks, IPv4 first. Content that no agent writes yields 0.0.0.0/0, which no setting allows.
fn networks(cidrs: &ServiceCidrs) -> Vec<Cidr> {
    let prefix_len = |mask: &[u8]| {
        let n_ones: u32 = mask.iter().map(|octet| octet.count_ones()).sum();
        u8::try_from(n_ones).unwrap_or(u8::MAX)
    };
    let v4 = cidrs.v4.iter().take(cidrs.n_v4 as usize).map(|network| Cidr {
        address: Ipv4Addr::from(network.address).into(),
        prefix_len: prefix_len(&network.mask),
    });
    let v6 = cidrs.v6.iter().take(cidrs.n_v6 as usize).map(|network| Cidr {
        address: Ipv6Addr::from(network.address).into(),
        prefix_len: prefix_len(&network.mask),
    });
    let found: Vec<Cidr> = v4.chain(v6).collect();
    let written = service_cidrs(&found);
    let is_same = (written.n_v4, written.n_v6) == (cidrs.n_v4, cidrs.n_v6)
        && written.v4.iter().zip(&cidrs.v4).take(written.n_v4 as usize).all(|(a, b)| a == b)
        && written.v6.iter().zip(&cidrs.v6).take(written.n_v6 as usize).all(|(a, b)| a == b);
    if is_same { found } else { vec![Cidr { address: Ipv4Addr::UNSPECIFIED.into(), prefix_len: 0 }] }
}

fn ip_of(octets: &Octets6) -> IpAddr {
    match mapped_ipv4(octets) {
        Some(ip) => Ipv4Addr::from(ip).into(),
        None => Ipv6Addr::from(*octets).into(),
    }
}
