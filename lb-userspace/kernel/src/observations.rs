//! What the programs observe: calls and connections, counted by service and endpoint.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use lb_common::layout::{ConnectLatency, EndpointHealth, EndpointLoad, EndpointStats, ServiceStats};
use lb_core::{plan::Op, tables::Entry};

use crate::{
    KernelError, Maps, adoption::Adoption, counters::Counters, layouts::Directory, mapped::Mapped,
    maps::map_memory,
};

/// The maps in which the programs count, by id of a service port or an endpoint.
///
/// A clone shares the mappings: the kernel counts every page of a mapping as resident memory of the process,
/// each time that the process maps it, whether it is read or not.
#[derive(Clone, Debug)]
pub struct Observations(Arc<Tables>);

#[derive(Debug)]
struct Tables {
    service_stats: Counters<ServiceStats>,
    endpoint_stats: Counters<EndpointStats>,
    endpoint_health: Mapped<EndpointHealth>,
    endpoint_load: Mapped<EndpointLoad>,
    connect_latency: Mapped<ConnectLatency>,
}

impl Observations {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// [`KernelError::NotPinned`], [`KernelError::Layout`], or a failing system call.
    pub fn open(pin_path: &Path) -> Result<Self, KernelError> {
        Self::of(&Directory::open(pin_path)?)
    }

    pub(crate) fn of(directory: &Directory) -> Result<Self, KernelError> {
        Ok(Self(Arc::new(Tables {
            service_stats: Counters::open(directory, "service_stats")?,
            endpoint_stats: Counters::open(directory, "endpoint_stats")?,
            endpoint_health: map_memory("endpoint_health", &directory.map("endpoint_health")?.0)?,
            endpoint_load: map_memory("endpoint_load", &directory.map("endpoint_load")?.0)?,
            connect_latency: map_memory("connect_latency", &directory.map("connect_latency")?.0)?,
        })))
    }

    /// Copies what earlier maps of another size counted for the ids in the image.
    pub(crate) fn fill_from(
        &self,
        former: &Directory,
        adoption: &Adoption,
        maps: &Maps,
    ) -> Result<(), KernelError> {
        if adoption.refills("service_stats") {
            let former = Counters::open(former, "service_stats")?;
            for frontend in maps.image()?.frontends.values() {
                self.0.service_stats.copy_from(&former, frontend.service_id);
            }
        }
        if adoption.refills("connect_latency") {
            let former: Mapped<ConnectLatency> =
                map_memory("connect_latency", &former.map("connect_latency")?.0)?;
            for frontend in maps.image()?.frontends.values() {
                if let Some(times) = former.read(frontend.service_id) {
                    let _beyond = self.0.connect_latency.write(frontend.service_id, times);
                }
            }
        }
        if adoption.refills("endpoint_stats") {
            let former = Counters::open(former, "endpoint_stats")?;
            for entry in maps.image()?.reachable() {
                self.0.endpoint_stats.copy_from(&former, entry.endpoint_id);
            }
        }
        Ok(())
    }

    /// Resets what an operation gives to another service port or endpoint. An id beyond a map has nothing
    /// there.
    pub(crate) fn apply(&self, op: &Op) {
        match op {
            Op::ResetService(id) => {
                self.0.service_stats.reset(*id);
                let _beyond = self.0.connect_latency.write(*id, ConnectLatency::default());
            }
            Op::ResetEndpoints(ids) => {
                for &id in ids.iter() {
                    self.0.endpoint_stats.reset(id);
                    let _beyond = self.0.endpoint_health.write(id, EndpointHealth::default());
                    let _beyond = self.0.endpoint_load.write(id, EndpointLoad::default());
                }
            }
            _ => {}
        }
    }

    /// Calls to a service port since it got its id, summed over all CPUs. Zero for an id beyond the map,
    /// which is not counted.
    #[must_use]
    pub fn service_stats(&self, service_id: u32) -> ServiceStats {
        self.0.service_stats.read(service_id).fold(ServiceStats::default(), |sum, cpu| ServiceStats {
            connects: sum.connects.wrapping_add(cpu.connects),
            refusals: sum.refusals.wrapping_add(cpu.refusals),
            datagrams: sum.datagrams.wrapping_add(cpu.datagrams),
        })
    }

    /// Calls to an endpoint since it got its id, summed over all CPUs. Zero for an id beyond the map, which
    /// is not counted.
    #[must_use]
    pub fn endpoint_stats(&self, endpoint_id: u32) -> EndpointStats {
        self.0.endpoint_stats.read(endpoint_id).fold(EndpointStats::default(), |sum, cpu| EndpointStats {
            connects: sum.connects.wrapping_add(cpu.connects),
            datagrams: sum.datagrams.wrapping_add(cpu.datagrams),
        })
    }

    /// How long connections to a service port took since it got its id. Zero for a port whose connections are
    /// not observed, and for an id beyond the map.
    #[must_use]
    pub fn connect_latency(&self, service_id: u32) -> ConnectLatency {
        self.0.connect_latency.read(service_id).unwrap_or_default()
    }

    /// The outcomes of connections to an endpoint since it got its id. The default for an endpoint that is
    /// not observed, and for an id beyond the map.
    ///
    /// Programs write it meanwhile: the fields may belong to two events.
    #[must_use]
    pub fn endpoint_health(&self, endpoint_id: u32) -> EndpointHealth {
        self.0.endpoint_health.read(endpoint_id).unwrap_or_default()
    }

    /// Open connections to an endpoint, as programs and agent count them. 0 for an id beyond the map.
    #[must_use]
    pub fn active(&self, endpoint_id: u32) -> u32 {
        self.0.endpoint_load.read(endpoint_id).unwrap_or_default().active.max(0).cast_unsigned()
    }

    /// [`Self::endpoint_health`] of these endpoints, by id.
    #[must_use]
    pub fn health_of<'a>(
        &self,
        entries: impl IntoIterator<Item = &'a Entry>,
    ) -> BTreeMap<u32, EndpointHealth> {
        entries
            .into_iter()
            .map(|entry| (entry.endpoint_id, self.endpoint_health(entry.endpoint_id)))
            .collect()
    }

    /// The counts of open connections that are not 0, by endpoint id.
    pub fn loads(&self) -> impl Iterator<Item = (u32, i32)> {
        let loads = &self.0.endpoint_load;
        let loads = (0..loads.n_entries()).filter_map(|id| Some((id, loads.read(id)?.active)));
        loads.filter(|(_, active)| *active != 0)
    }

    /// Adds to counts of open connections. Programs may add to them at the same time. An id beyond the map
    /// has no count.
    pub fn correct_loads(&self, corrections: &BTreeMap<u32, i32>) {
        for (&id, &number) in corrections {
            let _beyond = self.0.endpoint_load.add(id, number.cast_unsigned());
        }
    }
}
