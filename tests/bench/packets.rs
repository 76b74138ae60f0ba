//! `cargo xtask bench packets`: what the rules for packets cost the agent and the kernel: all of them at
//! once, one change of endpoints, and reading them.
//!
//! State and kernel are those of the agent, in this process and in a network namespace of their own.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Args;
use lb_core::{
    desired::{PacketMode, Settings},
    model::{Protocol, ingest},
    packets::{
        diff,
        nft::{Family, TableId, Transaction},
        sim::{self, Packet},
        table_ids,
    },
    plan::Capacity,
    state::State,
    tables::Image,
};
use lb_kernel::nftables::Nftables;
use lb_tests::netns::NetNs;

use crate::{
    Common,
    objects::{self, MAX_SERVICES, PORT, SERVICE_NETWORK, Size},
    result::{Report, ResultFile, Suite},
};

pub(crate) const MEASURES: [&str; 8] =
    [ALL, ALL_MADE, ALL_LOADED, CHANGE_WITHOUT, CHANGE_MADE, CHANGE_LOADED, READ, READ_ONE];
const ALL: &str = "all: together";
const ALL_MADE: &str = "all: the agent makes the transaction";
const ALL_LOADED: &str = "all: the kernel gets and carries it out";
const CHANGE_WITHOUT: &str = "one change: a sync of the agent without packets";
const CHANGE_MADE: &str = "one change: a sync with packets, and the transaction";
const CHANGE_LOADED: &str = "one change: the kernel gets and carries it out";
const READ: &str = "reading a table";
const READ_ONE: &str = "reading what one packet looks for";

/// More than the sizes need.
const CAPACITY: Capacity = Capacity { services: 1 << 17, endpoints: 1 << 21 };
/// What the kernel leaves to be done behind a transaction is done by then.
const PAUSE: Duration = Duration::from_millis(2);

/// Options of `packets`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Numbers of services, one measurement for each
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [100, 10_000, 30_000])]
    services: Vec<u32>,
    /// Endpoints of each service
    #[arg(long, value_name = "N", default_value_t = 10)]
    endpoints: u32,
    /// Number of loads of all
    #[arg(long, value_name = "N", default_value_t = 5)]
    loads: u32,
    /// Number of changes of one endpoint
    #[arg(long, value_name = "N", default_value_t = 1000)]
    changes: u32,
}

pub(crate) fn run(options: &Options, common: &Common) -> anyhow::Result<ResultFile> {
    let mut options = options.clone();
    if common.smoke {
        options = Options { services: vec![10, 50], loads: 1, changes: 5, ..options };
    }
    let most = CAPACITY.endpoints / options.endpoints.max(1);
    ensure!(
        options.endpoints > 0 && options.services.iter().all(|n| (1..=MAX_SERVICES.min(most)).contains(n)),
        "--services and --endpoints: 1 to {MAX_SERVICES} services, {} endpoints together",
        CAPACITY.endpoints
    );
    let mut run = common.start(Suite::Packets);
    run.setting("endpoints of each service", options.endpoints);
    run.setting("loads of all", options.loads);
    run.setting("changes", format!("{}, each of one endpoint of a random service", options.changes));
    run.setting("services", "TCP cluster IPs of IPv4");
    for &n_services in &options.services {
        eprintln!("{n_services} services");
        let size = Size { n_services, n_endpoints: options.endpoints, n_nodes: 1000 };
        let mut report = run.of("socklb", Some(n_services));
        NetNs::new()?.run(|| measure(size, &options, &mut report))?;
    }
    Ok(run.finish())
}

/// A state with the objects of a cluster, after its first sync.
fn state(size: Size, packets: PacketMode) -> anyhow::Result<State> {
    let networks = vec![SERVICE_NETWORK.parse().ok().context("a network")?];
    let settings = Settings { packets, service_cidrs: Some(networks), ..Settings::of_node("node-0000") };
    let mut state = State::new(settings, Vec::new(), CAPACITY, &Image::default());
    let issues = size.cluster().feed(&mut state);
    ensure!(issues.is_empty(), "{} issues", issues.len());
    let _plan = state.sync();
    Ok(state)
}

fn measure(size: Size, options: &Options, report: &mut Report<'_>) -> anyhow::Result<()> {
    let mut nftables = Nftables::open()?;
    let (mut with, mut without) = (state(size, PacketMode::All)?, state(size, PacketMode::Off)?);
    let (mut made, mut loaded, mut both) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.loads {
        let _former = nftables.remove(&table_ids())?;
        thread::sleep(PAUSE);
        let began = Instant::now();
        let mut changes = Vec::new();
        for (id, table) in with.adopt_packet_tables() {
            changes.extend(diff(None, &table).into_iter().map(|change| (id.clone(), change)));
        }
        let transaction = Transaction { changes, generation: None };
        made.push(began.elapsed());
        let sent = Instant::now();
        nftables.apply(&transaction)?;
        loaded.push(sent.elapsed());
        both.push(began.elapsed());
    }
    let (mut synced, mut changed, mut applied) = (Vec::new(), Vec::new(), Vec::new());
    let mut random = fastrand::Rng::with_seed(size.n_services.into());
    for number in 0..options.changes {
        let service = random.u32(..size.n_services);
        let mut pods = size.pods(service);
        let pod = random.usize(..pods.len());
        pods[pod] = objects::Pod::ready(objects::new_pod(number));
        let (slice, _no_issues) = ingest::slice(&objects::slice(&objects::name(service), &pods));
        let slice = slice.context("a slice")?;
        let key = slice.key();
        for state in [&mut without, &mut with] {
            state.change(|store| store.set_slice(&key, Some(slice.clone())));
        }
        thread::sleep(PAUSE);
        let began = Instant::now();
        let plan = without.sync();
        synced.push(began.elapsed());
        without.settled(plan.number());
        let began = Instant::now();
        let plan = with.sync();
        let transaction = with.take_packet_changes();
        changed.push(began.elapsed());
        with.settled(plan.number());
        ensure!(!transaction.changes.is_empty(), "a change without a transaction");
        let sent = Instant::now();
        nftables.apply(&transaction)?;
        applied.push(sent.elapsed());
    }
    let (mut read, mut read_one) = (Vec::new(), Vec::new());
    let id = table_ids().into_iter().find(|id| id.family == Family::V4).context("a table")?;
    for _ in 0..options.loads {
        let began = Instant::now();
        let table = nftables.read(&id)?.0.context("the table is gone")?;
        read.push(began.elapsed());
        ensure!(with.packets().tables().get(&id) == Some(&table), "the kernel has another table");
        read_one.push(read_for_one(&mut nftables, &id, size, random.u32(..size.n_services))?);
    }
    for (measure, times) in [
        (ALL, both),
        (ALL_MADE, made),
        (ALL_LOADED, loaded),
        (CHANGE_WITHOUT, synced),
        (CHANGE_MADE, changed),
        (CHANGE_LOADED, applied),
        (READ, read),
        (READ_ONE, read_one),
    ] {
        report.times(measure, &times);
    }
    Ok(())
}

/// Reads what decides about a packet to a service, as `socklb explain` does.
fn read_for_one(nftables: &mut Nftables, id: &TableId, size: Size, service: u32) -> anyhow::Result<Duration> {
    let packet = Packet {
        source: [198, 51, 100, 7].into(),
        destination: (objects::cluster_ip(service), PORT).into(),
        protocol: Protocol::Tcp.number(),
        is_own: false,
    };
    let began = Instant::now();
    let (part, _generation) = nftables.read_wanted(id, |part| sim::lookups(part, packet))?;
    let outcomes = sim::outcomes(&part.context("the table is gone")?, packet);
    let took = began.elapsed();
    ensure!(outcomes.all.len() == size.n_endpoints as usize, "{outcomes:?} is not what the service has");
    Ok(took)
}
