//! `cargo xtask bench scale`: how costs grow with services and endpoints.
//!
//! Calls: the maps have the same capacity for every number of services. Each number has its own programs,
//! maps, network namespace and cgroup, and they alternate in small blocks on one CPU. Memory: maps created
//! for exactly that number. The agent: the part of `sync` for one size, run for several.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use aya::maps::MapData;
use clap::Args;
use lb_core::{model::Protocol::Udp, plan::Capacity};
use lb_tests::Sandbox;

use crate::{
    Common,
    calls::{self, Call, EMPTY, Kind, Programs, SOCKLB, Services, Target, To},
    quantile::real,
    result::{ResultFile, Run, Suite, Unit},
    sync,
};

const BLOCK: usize = 200;
pub(crate) const KINDS: [Call; 4] = [
    ("re-connect, no service", Kind::Again, To::Endpoint),
    ("re-connect, one service", Kind::Again, To::OneService),
    ("re-connect, any service", Kind::Again, To::AnyService),
    ("fresh socket, any service", Kind::Fresh, To::AnyService),
];
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
    calls(&options, &mut run)?;
    memory(&options, &mut run)?;
    let time = Duration::from_millis(if common.smoke { 500 } else { 8000 });
    sync::growth(&options.socklb, &options.agent, time, &mut run)?;
    Ok(run.finish())
}

/// Calls by the number of services, in maps of one capacity.
fn calls(options: &Options, run: &mut Run) -> anyhow::Result<()> {
    let object = fs::read(&options.object).with_context(|| options.object.display().to_string())?;
    let capacity = Capacity { services: options.max_services, endpoints: options.max_endpoints };
    let services = |n| Services { n, n_endpoints: options.endpoints, protocols: &[Udp] };
    let programs = Programs::Bench(&object, EMPTY.1);
    let mut targets = vec![Target { name: EMPTY.0, n_services: None, services: services(0), programs }];
    targets.extend(options.services.iter().map(|&n| Target {
        name: SOCKLB,
        n_services: Some(n),
        services: services(n),
        programs: Programs::Socklb(capacity),
    }));
    calls::measure(run, targets, &KINDS.map(|call| (call, options.blocks)), BLOCK)
}

/// The kernel's accounted memory of maps that fit exactly each number.
fn memory(options: &Options, run: &mut Run) -> anyhow::Result<()> {
    for &n_services in &options.services {
        let capacity = Capacity { services: n_services, endpoints: n_services * options.endpoints };
        let bytes = Sandbox::run(|sandbox| {
            let _kernel = calls::open(sandbox, capacity, true)?;
            let mut sum = 0;
            for name in lb_common::maps::MAPS.iter().map(|map| map.name) {
                let map =
                    MapData::from_pin(sandbox.pin_path().join(name)).with_context(|| name.to_owned())?;
                sum += locked(map.fd().as_fd().as_raw_fd())?;
            }
            anyhow::Ok(sum)
        })?;
        let memory = real(bytes) / real(1 << 20);
        run.of("memory", Some(n_services)).figure(MAPS, Unit::Mebibytes, memory);
    }
    Ok(())
}

/// The memory of a map in bytes, by its file descriptor.
fn locked(descriptor: i32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    value.and_then(|value| value.trim().parse().ok()).context("the kernel does not report a map's memory")
}
