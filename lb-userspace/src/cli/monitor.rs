//! `socklb monitor`: connections as they are made, sampled.
//!
//! The programs tell nobody of a call: they leave a record for the socket and go on, which costs a call nothing for being
//! watched. So this looks at the records again and again, and shows the sockets that are new. What comes and goes between two
//! looks is missed, and counted by the services' counters.

mod stream;

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use clap::{Args, ValueEnum};
use jiff::Timestamp;
use lb_common::layout::ServiceStats;
use lb_core::{model::Protocol, state::State, tables::Image};
use lb_kernel::{
    Maps,
    sockets::{Record, SocketTable},
};
use tokio::{runtime, sync::watch, time};

use self::stream::{Connection, Filter, Line, Named, Seen, Summary, header};
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
    /// Time between two looks, 10ms at least: the shorter, the fewer sockets are missed.
    #[arg(long, default_value = "100ms", value_name = "DURATION", value_parser = |text: &str| interval(text, SHORTEST))]
    interval: Duration,
    /// End after this many connections; without, go on until Ctrl-C.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// How to print it.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    pins: PinArgs,
}

/// How a stream is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One line for people, coloured on a terminal.
    #[default]
    Text,
    /// One JSON object on each line.
    Json,
    /// One YAML document after the other.
    Yaml,
}

/// A protocol that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Transport {
    Tcp,
    Udp,
}

/// The least time between two looks.
const SHORTEST: Duration = Duration::from_millis(10);
/// How often the tables and counters are read: they take much longer than the slots of sockets do.
const TABLES: Duration = Duration::from_secs(1);
/// How often calls are summed up.
const SUMMARY: Duration = Duration::from_secs(10);

fn service(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("expected NAMESPACE/NAME, such as kube-system/kube-dns".to_owned()),
    }
}

/// What the tables say, by ids and addresses.
#[derive(Default)]
struct Names {
    image: Image,
    ports: BTreeMap<u32, Named>,
    /// The nodes of endpoints, as far as they are known.
    nodes: BTreeMap<SocketAddr, String>,
}

impl Names {
    fn new(image: Image, objects: Option<&State>) -> Self {
        let (mut ports, mut nodes) = (BTreeMap::new(), BTreeMap::new());
        for row in listing::list(&image, objects, &BTreeMap::new()) {
            let frontend = image.services.get(&row.frontend()).and_then(|id| image.frontends.get(id));
            let Some(frontend) = frontend else { continue };
            for endpoint in row.endpoints {
                nodes.insert(SocketAddr::new(endpoint.address, endpoint.port), endpoint.node);
            }
            let (namespace, name, port_name, protocol) =
                (row.namespace, row.name, row.port_name, row.protocol);
            ports.insert(frontend.service_id, Named { namespace, name, port_name, protocol });
        }
        Self { image, ports, nodes }
    }

    /// The port that a record's call found, as long as the tables hold it.
    fn port(&self, record: &Record) -> Option<&Named> {
        frontend_of(&self.image, record)?;
        self.ports.get(&record.service_id)
    }

    fn connection(&self, record: &Record, port: &Named) -> Connection {
        let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
        let Named { namespace, name, port_name, protocol } = port.clone();
        Connection {
            time: now.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string(),
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
    objects: Objects,
    names: Names,
    seen: Seen,
    n_shown: u64,
    has_colour: bool,
}

/// `socklb monitor`. Changes nothing.
///
/// # Errors
///
/// If nothing is pinned or it cannot be read, if this kernel does not list sockets, or standard output takes no more.
pub fn monitor(args: &MonitorArgs) -> anyhow::Result<ExitCode> {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let stop = {
        let _entered = runtime.enter();
        stop_signals()?
    };
    let maps = Maps::open(&args.pins.pin_path)?;
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
        objects: Objects::new(&args.pins.state_dir),
        names: Names::default(),
        seen: Seen::default(),
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
    let _begins_the_count = (monitor.seen.summary(monitor.counts()), monitor.look()?);
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
            }
            if !self.look()? || self.args.count.is_some_and(|count| self.n_shown >= count) {
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

    /// Follows what the agent and the snapshot say.
    fn read_tables(&mut self) -> anyhow::Result<()> {
        self.names = Names::new(self.maps.image()?, self.objects.now());
        Ok(())
    }

    /// Shows the sockets that are new. `false` once the reader has closed standard output.
    fn look(&mut self) -> anyhow::Result<bool> {
        let new = self.seen.new_records(self.table.records()?);
        // A call of a service that has come since the tables were read.
        if new.iter().any(|record| self.names.port(record).is_none()) {
            self.read_tables()?;
        }
        for record in new {
            // A frontend that is gone already: it has no name, and its counters are gone too.
            let Some(port) = self.names.port(&record).filter(|port| self.filter.takes(port)) else {
                continue;
            };
            if self.args.count.is_some_and(|count| self.n_shown >= count) {
                break;
            }
            let connection = self.names.connection(&record, port);
            self.n_shown += 1;
            self.seen.shown(1);
            let text = match self.args.output {
                Format::Text => connection.text(self.has_colour) + "\n",
                _ => self.encode(&Line::Connection(connection))?,
            };
            if !show_more(&text)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tells what was not shown. `false` once the reader has closed standard output.
    fn summarize(&mut self) -> anyhow::Result<bool> {
        let counts = self.counts();
        let summary: Summary = self.seen.summary(counts);
        if summary.is_empty() {
            return Ok(true);
        }
        let text = match self.args.output {
            Format::Text => summary.text(self.has_colour) + "\n",
            _ => self.encode(&Line::Summary(summary))?,
        };
        show_more(&text)
    }

    fn encode(&self, line: &Line) -> anyhow::Result<String> {
        Ok(match self.args.output {
            Format::Yaml => format!("---\n{}", serde_saphyr::to_string(line)?),
            _ => format!("{}\n", serde_json::to_string(line)?),
        })
    }

    /// The counters of the ports that are shown.
    fn counts(&self) -> BTreeMap<u32, ServiceStats> {
        let wanted = self.names.ports.iter().filter(|(_, port)| self.filter.takes(port));
        wanted.map(|(id, _)| (*id, self.maps.service_stats(*id))).collect()
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
