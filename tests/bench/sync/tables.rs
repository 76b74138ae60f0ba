//! The current content of the pinned maps.

use std::{
    net::Ipv4Addr,
    os::fd::AsFd as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use aya::maps::{HashMap, Map, MapData, MapError};
use lb_common::{
    layout::{Endpoint4, Frontend, FrontendKey4, FrontendRef, Protocol},
    limits,
};
use lb_kernel::mapped::Mapped;
use lb_tests::Sandbox;

use crate::{
    daemon::Daemon,
    objects::{PORT, Pod, Size, cluster_ip},
};

/// Interval of polls of the maps. A busy loop would take one of two cores from the agent.
pub(crate) const LOOK: Duration = Duration::from_micros(50);
/// Timeout of a change.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T>(T);
// SAFETY: `repr(C)` types of lb_common whose padding is checked at compile time.
unsafe impl aya::Pod for Plain<FrontendKey4> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<FrontendRef> {}

/// The maps that decide about IPv4 calls.
pub(crate) struct Tables {
    services: HashMap<MapData, Plain<FrontendKey4>, Plain<FrontendRef>>,
    frontends: Mapped<Frontend>,
    endpoints: Mapped<Endpoint4>,
    /// The entry of each service in `frontends`, which is constant while the service exists.
    frontend_ids: Vec<u32>,
}

impl Tables {
    /// Opens maps of the default sizes. Fails until all of them are pinned.
    fn open(pin_path: &Path) -> anyhow::Result<Self> {
        let data = |name: &str| MapData::from_pin(pin_path.join(name)).with_context(|| name.to_owned());
        Ok(Self {
            services: Map::from_map_data(data("services4")?)?.try_into()?,
            frontends: Mapped::new(data("frontends")?.fd().as_fd(), limits::MAX_FRONTENDS * 2)?,
            endpoints: Mapped::new(data("endpoints4")?.fd().as_fd(), limits::MAX_ENDPOINTS)?,
            frontend_ids: Vec::new(),
        })
    }

    /// Waits until the maps of an agent exist and are right. Returns also the time from its start until they
    /// existed.
    pub(crate) fn of(agent: &Daemon, sandbox: &Sandbox, size: Size) -> anyhow::Result<(Self, Duration)> {
        let (mut tables, opened) = loop {
            match Self::open(&sandbox.pin_path()) {
                Ok(tables) => break (tables, agent.started.elapsed()),
                Err(error) if agent.started.elapsed() > PATIENCE => return Err(error),
                Err(_not_yet) => thread::sleep(LOOK),
            }
        };
        tables.until_right(size)?;
        Ok((tables, opened))
    }

    /// Waits until every service of a size has all its pods. Polls one service after the other until it is
    /// right.
    pub(crate) fn until_right(&mut self, size: Size) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        for service in 0..size.n_services {
            let pods = size.pods(service);
            while !self.find(service)? || !self.has_exactly(service, &pods) {
                if Instant::now() > end {
                    bail!("service {service} of {} is never right", size.n_services);
                }
                thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    /// Finds the frontend of the next service. `false` while it is missing.
    fn find(&mut self, service: u32) -> anyhow::Result<bool> {
        if self.frontend_ids.len() > service as usize {
            return Ok(true);
        }
        let (address, protocol) = (cluster_ip(service).octets(), Protocol::TCP.0);
        let key = FrontendKey4 { address, port: PORT, protocol, reserved: 0 };
        match self.services.get(&Plain(key), 0) {
            Ok(Plain(found)) => {
                self.frontend_ids.push(found.frontend_id);
                Ok(true)
            }
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(error).context("services4"),
        }
    }

    /// The addresses that calls to a service reach now. May be torn while the run is switched.
    fn pods(&self, service: u32) -> impl Iterator<Item = (Ipv4Addr, u16)> {
        let frontend = self.frontend_ids.get(service as usize).and_then(|id| self.frontends.read(*id));
        let run = frontend.map(|frontend| frontend.run).unwrap_or_default();
        (run.offset..run.offset + run.len)
            .filter_map(|index| self.endpoints.read(index))
            .map(|entry| (entry.address.into(), entry.port))
    }

    fn has_exactly(&self, service: u32, pods: &[Pod]) -> bool {
        let mut found: Vec<_> = self.pods(service).collect();
        found.sort_unstable();
        let mut wanted: Vec<_> = pods.iter().map(|pod| (pod.ip, pod.port)).collect();
        wanted.sort_unstable();
        found == wanted
    }

    /// Whether calls to a service may reach a pod.
    pub(crate) fn has(&self, service: u32, ip: Ipv4Addr) -> bool {
        self.pods(service).any(|(found, _)| found == ip)
    }
}
