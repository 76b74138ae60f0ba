//! `socklb monitor`: a sample of new connections, and the endpoints that are ejected and restored.
//!
//! The programs report no calls: they only write a record for the socket, so that monitoring adds no cost to
//! a call. The monitor polls the records and shows new sockets. Sockets opened and closed between two polls
//! are missed; the services' counters count them.

mod stream;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal as _,
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use clap::{Args, ValueEnum};
use jiff::Timestamp;
use lb_common::layout::ServiceStats;
use lb_core::{
    ejection::{self, Change, Ejection, EjectionTracker, Endpoint},
    model::{Balance, Protocol},
    state::State,
    tables::Image,
};
use lb_kernel::{
    Maps, Observations, host,
    sockets::{Record, SocketTable},
};
use tokio::{runtime, sync::watch, time};

use self::stream::{Connection, Ejected, Filter, Line, Named, OfEndpoint, Seen, Summary, header};
use super::{
    PinArgs, listing, objects::Objects, run::stop_signals, sample::frontend_of, show_more, top::interval,
};

/// Flags of `socklb monitor`.
#[derive(Debug, Args)]
pub struct MonitorArgs {
    /// Only calls of this Service.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = service)]
    service: Option<(String, String)>,
    /// Only calls of this protocol.
    #[arg(long, value_enum)]
    protocol: Option<Transport>,
    /// Time between two polls, at least 10ms. A shorter one misses fewer sockets.
    #[arg(long, default_value = "100ms", value_name = "DURATION", value_parser = |text: &str| interval(text, SHORTEST))]
    interval: Duration,
    /// Exit after this many connections [default: run until Ctrl-C]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    pins: PinArgs,
}

/// Output formats of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One line for people, coloured on a terminal.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
    /// A stream of YAML documents.
    Yaml,
}

/// A protocol to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Transport {
    Tcp,
    Udp,
}

/// Minimum time between two polls.
const SHORTEST: Duration = Duration::from_millis(10);
/// How often tables and counters are read, which takes much longer than reading the slots of sockets.
const TABLES: Duration = Duration::from_secs(1);
/// Time between two summaries.
const SUMMARY: Duration = Duration::from_secs(10);

fn service(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("expected NAMESPACE/NAME, such as kube-system/kube-dns".to_owned()),
    }
}

/// The present time in RFC 3339.
fn time_text() -> String {
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
    now.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// The tables by ids and addresses.
#[derive(Default)]
struct Names {
    image: Image,
    ports: BTreeMap<u32, Named>,
    /// The ports whose open connections are counted.
    counted: BTreeSet<u32>,
    /// The nodes of endpoints, if known.
    nodes: BTreeMap<SocketAddr, String>,
}

impl Names {
    fn new(image: Image, objects: Option<&State>) -> Self {
        let (mut ports, mut counted, mut nodes) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        for row in listing::list(&image, objects, &BTreeMap::new()) {
            let frontend = image.services.get(&row.frontend()).and_then(|id| image.frontends.get(id));
            let Some(frontend) = frontend else { continue };
            for endpoint in row.endpoints {
                nodes.insert(SocketAddr::new(endpoint.address, endpoint.port), endpoint.node);
            }
            let (namespace, name, port_name, protocol) =
                (row.namespace, row.name, row.port_name, row.protocol);
            ports.insert(frontend.service_id, Named { namespace, name, port_name, protocol });
            if Balance::of_flags(frontend.flags) == Balance::LeastConnections {
                counted.insert(frontend.service_id);
            }
        }
        Self { image, ports, counted, nodes }
    }

    /// The port of a record's frontend, if the tables still hold it.
    fn port(&self, record: &Record) -> Option<&Named> {
        frontend_of(&self.image, record)?;
        self.ports.get(&record.service_id)
    }

    /// A change of an endpoint's health. `now` is in nanoseconds of `CLOCK_MONOTONIC`, `active` returns open
    /// connections by endpoint id.
    fn change(
        &self,
        endpoint: Endpoint,
        port: &Named,
        change: Change,
        now: u64,
        active: impl Fn(u32) -> u32,
    ) -> Line {
        let Endpoint { service_id, id, address: endpoint } = endpoint;
        let Named { namespace, name, port_name, protocol } = port.clone();
        let node = self.nodes.get(&endpoint).cloned().unwrap_or_default();
        let of = OfEndpoint { time: time_text(), namespace, name, port_name, protocol, endpoint, node };
        match change {
            Change::Restored => Line::Restoration(of),
            Change::Ejected(Ejection { until, failures, errno }) => {
                let seconds = until.saturating_sub(now).div_ceil(1_000_000_000);
                let reason = ejection::text(seconds, failures, errno);
                let active = self.counted.contains(&service_id).then(|| active(id));
                Line::Ejection(Ejected { of, failures, seconds, active, reason })
            }
        }
    }

    fn connection(&self, record: &Record, port: &Named) -> Connection {
        let Named { namespace, name, port_name, protocol } = port.clone();
        Connection {
            time: time_text(),
            namespace,
            name,
            port_name,
            protocol,
            service: record.service,
            endpoint: record.endpoint,
            node: self.nodes.get(&record.endpoint).cloned().unwrap_or_default(),
            cookie: record.cookie,
        }
    }
}

struct Monitor<'a> {
    args: &'a MonitorArgs,
    filter: Filter,
    table: SocketTable,
    maps: Maps,
    observations: Observations,
    objects: Objects,
    names: Names,
    seen: Seen,
    ejections: EjectionTracker,
    n_shown: u64,
    has_colour: bool,
}

/// `socklb monitor`. Changes nothing.
///
/// # Errors
///
/// If nothing is pinned or readable, if this kernel does not list sockets, or if standard output cannot be
/// written.
pub fn monitor(args: &MonitorArgs) -> anyhow::Result<ExitCode> {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let stop = {
        let _entered = runtime.enter();
        stop_signals()?
    };
    let maps = Maps::open(&args.pins.pin_path)?;
    let observations = Observations::open(&args.pins.pin_path)?;
    let table = SocketTable::open(&args.pins.pin_path)?;
    let protocol = args.protocol.map(|protocol| match protocol {
        Transport::Tcp => Protocol::Tcp,
        Transport::Udp => Protocol::Udp,
    });
    let mut monitor = Monitor {
        args,
        filter: Filter { service: args.service.clone(), protocol },
        table,
        maps,
        observations,
        objects: Objects::new(&args.pins.state_dir),
        names: Names::default(),
        seen: Seen::default(),
        ejections: EjectionTracker::default(),
        n_shown: 0,
        has_colour: args.output == Format::Text && std::io::stdout().is_terminal(),
    };
    monitor.read_tables()?;
    if let Some(problem) = monitor.objects.problem() {
        eprintln!("socklb: {problem}");
    }
    if args.output == Format::Text
        && !show_more(&(header(args.interval, SUMMARY, monitor.has_colour) + "\n"))?
    {
        return Ok(ExitCode::SUCCESS);
    }
    let _begins_the_count = (monitor.seen.summary(monitor.counts()), monitor.print_new()?);
    if !monitor.print_ejections()? {
        return Ok(ExitCode::SUCCESS);
    }
    runtime.block_on(monitor.run(stop))?;
    Ok(ExitCode::SUCCESS)
}

impl Monitor<'_> {
    async fn run(&mut self, mut stop: watch::Receiver<bool>) -> anyhow::Result<()> {
        let mut looks = time::interval(self.args.interval);
        looks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let (mut tables_due, mut summary_due) = (Instant::now() + TABLES, Instant::now() + SUMMARY);
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                _ = looks.tick() => {}
            }
            if Instant::now() >= tables_due {
                self.read_tables()?;
                tables_due = Instant::now() + TABLES;
                if !self.print_ejections()? {
                    return Ok(());
                }
            }
            if !self.print_new()? || self.args.count.is_some_and(|count| self.n_shown >= count) {
                break;
            }
            if Instant::now() >= summary_due {
                if !self.summarize()? {
                    return Ok(());
                }
                summary_due = Instant::now() + SUMMARY;
            }
        }
        self.summarize().map(drop)
    }

    /// Updates names from the agent or the snapshot.
    fn read_tables(&mut self) -> anyhow::Result<()> {
        self.names = Names::new(self.maps.image()?, self.objects.now());
        Ok(())
    }

    /// Shows what became of endpoints since the last time; at first, which ones are ejected. `false` once the
    /// reader has closed standard output.
    fn print_ejections(&mut self) -> anyhow::Result<bool> {
        let image = &self.names.image;
        let entries = image.reachable();
        let n_ids = entries.map(|entry| entry.endpoint_id.saturating_add(1)).max().unwrap_or_default();
        let changes = self.ejections.scan(n_ids, |id| self.observations.endpoint_health(id), image, true);
        let now = host::monotonic();
        for (endpoint, change) in changes {
            let port = self.names.ports.get(&endpoint.service_id).filter(|port| self.filter.takes(port));
            let Some(port) = port else { continue };
            let active = |id| self.observations.active(id);
            if !self.show(&self.names.change(endpoint, port, change, now, active))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Shows a line. `false` once the reader has closed standard output.
    fn show(&self, line: &Line) -> anyhow::Result<bool> {
        show_more(&match self.args.output {
            Format::Text => line.text(self.has_colour) + "\n",
            Format::Json => format!("{}\n", serde_json::to_string(line)?),
            Format::Yaml => format!("---\n{}", serde_saphyr::to_string(line)?),
        })
    }

    /// Shows new sockets. `false` once the reader has closed standard output.
    fn print_new(&mut self) -> anyhow::Result<bool> {
        let new = self.seen.new_records(self.table.records()?);
        // The service may be newer than the last read of the tables.
        if new.iter().any(|record| self.names.port(record).is_none()) {
            self.read_tables()?;
        }
        for record in new {
            // The frontend is already gone, with its name and its counters.
            let Some(port) = self.names.port(&record).filter(|port| self.filter.takes(port)) else {
                continue;
            };
            if self.args.count.is_some_and(|count| self.n_shown >= count) {
                break;
            }
            let connection = self.names.connection(&record, port);
            self.n_shown += 1;
            self.seen.shown(1);
            if !self.show(&Line::Connection(connection))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Prints the summary. `false` once the reader has closed standard output.
    fn summarize(&mut self) -> anyhow::Result<bool> {
        let counts = self.counts();
        let summary: Summary = self.seen.summary(counts);
        if summary.is_empty() {
            return Ok(true);
        }
        self.show(&Line::Summary(summary))
    }

    /// The counters of the selected ports.
    fn counts(&self) -> BTreeMap<u32, ServiceStats> {
        let wanted = self.names.ports.iter().filter(|(_, port)| self.filter.takes(port));
        wanted.map(|(id, _)| (*id, self.observations.service_stats(*id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_named_with_its_namespace() {
        assert_eq!(service("kube-system/dns"), Ok(("kube-system".to_owned(), "dns".to_owned())));
        for wrong in ["", "dns", "/dns", "default/", "a/b/c"] {
            assert!(service(wrong).is_err(), "{wrong}");
        }
    }
}
