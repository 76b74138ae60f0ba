//! `cargo xtask bench scale`: how costs grow with services and endpoints.
//!
//! Calls: the maps have the same capacity for every number of services. Each number has its own programs,
//! maps, network namespace and cgroup, and they alternate in small blocks on one CPU. Memory: maps created
//! for exactly that number. The agent: the part of `sync` for one size, run for several.

pub(crate) mod calls;

use std::os::fd::AsFd as _;
use std::{fs, net::IpAddr, os::fd::AsRawFd as _, path::PathBuf, time::Duration};

use anyhow::Context as _;
use aya::maps::MapData;
use clap::Args;
use lb_core::{
    desired::FrontendAddress,
    model::Protocol,
    plan::{Capacity, diff},
    tables::{Entry, Image},
};
use lb_kernel::{Kernel, Options as KernelOptions};
use lb_tests::{Sandbox, agent};

use crate::{
    Common,
    quantile::real,
    result::{Better, Key, ResultFile, Run, Suite, Unit},
    sync,
};

/// Memory of the maps, as the kernel accounts it.
pub(crate) const MAPS: &str = "maps";

/// Options of `scale`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// The compiled programs to compare with
    #[arg(long, value_name = "FILE")]
    object: PathBuf,
    /// The agent's binary
    #[arg(long, value_name = "FILE")]
    socklb: PathBuf,
    /// Numbers of services for calls and maps
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 10, 100, 1_000, 10_000, 100_000])]
    services: Vec<u32>,
    /// Endpoints of each service, for calls and maps
    #[arg(long, value_name = "N", default_value_t = 10)]
    endpoints: u32,
    /// Numbers of services for the agent, each with five endpoints
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [100, 1_000, 10_000, 44_000])]
    agent: Vec<u32>,
    /// Capacity of all maps for services while calls are measured
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    max_services: u32,
    /// Capacity of all maps for endpoints while calls are measured
    #[arg(long, value_name = "N", default_value_t = 1_048_576)]
    max_endpoints: u32,
    /// Number of blocks of 200 calls, for each kind of call and number of services
    #[arg(long, value_name = "N", default_value_t = 100)]
    blocks: u32,
}

impl Options {
    fn smoke(self) -> Self {
        Self {
            services: vec![1, 100],
            agent: vec![50],
            max_services: 128,
            max_endpoints: 2048,
            blocks: 2,
            ..self
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        let largest = self.services.iter().copied().max().unwrap_or_default();
        anyhow::ensure!(
            self.services.iter().all(|n| *n > 0) && self.endpoints > 0 && self.agent.iter().all(|n| *n > 0),
            "--services, --endpoints and --agent: numbers above 0"
        );
        anyhow::ensure!(
            largest <= self.max_services
                && u64::from(largest) * u64::from(self.endpoints) <= self.max_endpoints.into(),
            "{largest} services with {} endpoints each do not fit into --max-services {} and --max-endpoints {}",
            self.endpoints,
            self.max_services,
            self.max_endpoints
        );
        // Each has an address in 10.96.0.0/11 and endpoints in 127.0.0.0/8.
        anyhow::ensure!(
            self.max_services <= 1 << 20 && self.max_endpoints <= 1 << 23,
            "--max-services and --max-endpoints: at most {} and {}",
            1 << 20,
            1 << 23
        );
        Ok(())
    }
}

pub(crate) fn run(options: &Options, common: &Common) -> anyhow::Result<ResultFile> {
    let options = if common.smoke { options.clone().smoke() } else { options.clone() };
    options.check()?;
    let list = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    let mut run = common.start(Suite::Scale);
    run.setting("services", list(&options.services));
    run.setting("endpoints of each service", options.endpoints);
    run.setting(
        "capacity while calls are measured",
        format!("{}, {}", options.max_services, options.max_endpoints),
    );
    run.setting("blocks of 200 calls", options.blocks);
    run.setting("services of the agent, with 5 endpoints each", list(&options.agent));
    calls::measure(&options, &mut run)?;
    memory(&options, &mut run)?;
    let time = if common.smoke { Duration::from_millis(500) } else { Duration::from_secs(8) };
    sync::growth(&options.socklb, &options.agent, time, &mut run)?;
    Ok(run.finish())
}

/// Programs and maps of a capacity in a sandbox.
fn open(sandbox: &Sandbox, capacity: Capacity) -> anyhow::Result<Kernel> {
    let options = KernelOptions { capacity, ..agent::options(sandbox) };
    Ok(Kernel::open(&options, || {})?)
}

fn service(number: u32) -> IpAddr {
    (u32::from_be_bytes([10, 96, 0, 1]) + number).to_be_bytes().into()
}

/// Services with loopback endpoints, which a datagram socket can connect to without a server.
fn image(n_services: u32, n_endpoints: u32) -> Image {
    let mut image = Image::default();
    for id in 0..n_services {
        let offset = id * n_endpoints;
        let entries: Vec<Entry> = (offset..offset + n_endpoints)
            .map(|endpoint_id| {
                let ip: IpAddr = (u32::from_be_bytes([127, 0, 0, 1]) + endpoint_id).to_be_bytes().into();
                Entry { endpoint_id, address: (ip, 8080).into() }
            })
            .collect();
        image.runs4.insert(offset, entries.into());
        let run = lb_common::layout::Run { offset, len: n_endpoints };
        let frontend = lb_common::layout::Frontend { run, service_id: id, ..Default::default() };
        image.frontends.insert(id, frontend);
        image.services.insert(FrontendAddress { ip: service(id), port: 80, protocol: Protocol::Udp }, id);
    }
    image
}

fn fill(kernel: &mut Kernel, n_services: u32, n_endpoints: u32) -> anyhow::Result<()> {
    let _done = kernel.apply(&diff(&Image::default(), &image(n_services, n_endpoints)))?;
    Ok(())
}

/// The kernel's accounted memory of maps that fit exactly each number.
fn memory(options: &Options, run: &mut Run) -> anyhow::Result<()> {
    for &n_services in &options.services {
        let capacity = Capacity { services: n_services, endpoints: n_services * options.endpoints };
        let bytes = Sandbox::run(|sandbox| {
            let _kernel = open(sandbox, capacity)?;
            let mut sum = 0;
            for name in lb_common::maps::MAPS.iter().map(|map| map.name) {
                let map =
                    MapData::from_pin(sandbox.pin_path().join(name)).with_context(|| name.to_owned())?;
                sum += locked(map.fd().as_fd().as_raw_fd())?;
            }
            anyhow::Ok(sum)
        })?;
        let key = Key::new(MAPS, "memory").at(n_services);
        run.figure(key, Unit::Mebibytes, Better::Lower, real(bytes) / real(1 << 20));
    }
    Ok(())
}

/// The memory of a map in bytes, by its file descriptor.
fn locked(descriptor: i32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    value.and_then(|value| value.trim().parse().ok()).context("the kernel does not report a map's memory")
}
