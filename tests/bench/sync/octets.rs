//! The bytes that an agent reads from the API server, with objects of realistic size.

use std::{
    collections::BTreeMap,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use k8s_openapi::{api::core::v1::Node, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use lb_tests::{Sandbox, apiserver::ApiServer, cluster::Object};

use super::tables::Tables;
use crate::{
    daemon::{self, Daemon},
    objects::Size,
    quantile::real,
    result::{Report, Run, Unit},
};

/// Bytes of a Node: images, conditions, annotations and managed fields.
const NODE: usize = 20_000;
/// Bytes of managed fields and of the annotation of `kubectl apply` in a Service.
const SERVICE_EXTRA: usize = 1_500;
/// Bytes of managed fields in a slice.
const SLICE_EXTRA: usize = 800;
/// How often a kubelet writes the status of an unchanged Node.
const STATUS: Duration = Duration::from_secs(300);
/// How often a server sends a bookmark.
const BOOKMARK: Duration = Duration::from_secs(60);
/// How often the server sends one in this measurement.
const SHORT_BOOKMARK: Duration = Duration::from_millis(50);
const HOUR: Duration = Duration::from_secs(3600);
/// Everything has been sent after this silence, even on a busy machine.
const QUIET: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(180);

/// The names of the readers: the agent, the agent with a flag, and kube-proxy, to which the test server sends
/// JSON.
const READERS: [&str; 3] = ["socklb", "socklb --node-ports-of-other-nodes", "what kube-proxy asks for"];
const START: &str = "start";
const QUIET_HOUR: &str = "one hour of a quiet cluster";
const BROKEN: &str = "each connection breaks once (rolling restart of API servers)";
const ALL_STARTS: &str = "all nodes: rolling restart of the agents";

/// The name of a measure, which is in MiB.
fn name(reader: &str, event: &str) -> String {
    format!("read from the API server by {reader}, {event}")
}

/// All measures.
pub(crate) fn measures() -> impl Iterator<Item = String> {
    READERS
        .into_iter()
        .flat_map(|reader| [START, ALL_STARTS, BROKEN, QUIET_HOUR].map(|event| name(reader, event)))
}

/// A client of the API server.
#[derive(Clone, Copy, Debug)]
enum Reader<'a> {
    /// The agent, with flags.
    Agent(&'a Path, &'static [&'static str]),
    KubeProxy(&'a Path),
}

impl Reader<'_> {
    const fn name(self) -> &'static str {
        match self {
            Self::Agent(_, []) => READERS[0],
            Self::Agent(..) => READERS[1],
            Self::KubeProxy(_) => READERS[2],
        }
    }

    /// Starts it and waits until it has read everything.
    fn start(self, sandbox: &Sandbox, size: Size, server: &ApiServer) -> anyhow::Result<Daemon> {
        match self {
            Self::Agent(socklb, flags) => {
                let agent = Daemon::socklb(socklb, sandbox, server, flags)?;
                let _tables = Tables::of(&agent, sandbox, size).with_context(|| agent.last_words())?;
                Ok(agent)
            }
            Self::KubeProxy(program) => Daemon::kube_proxy(program, "nftables", server),
        }
    }

    fn stop(self, sandbox: &Sandbox, daemon: Daemon) -> anyhow::Result<()> {
        match self {
            Self::Agent(socklb, _) => daemon.end_and_clean(socklb, sandbox),
            Self::KubeProxy(_) => Ok(()),
        }
    }
}

/// Text of about this size, like managed fields.
fn filler(length: usize) -> String {
    let field = |number: usize| format!("f:status-{number:x}:{{f:conditions:{{k:type-{number}}}}},");
    let mut text: String = (0..=length / 40).map(field).collect();
    text.truncate(length);
    text
}

fn enlarge(metadata: &mut ObjectMeta, length: usize) {
    // The server drops managed fields; an annotation has the same size.
    let annotations = metadata.annotations.get_or_insert_with(BTreeMap::new);
    let _none = annotations.insert("example.com/managed-fields".to_owned(), filler(length));
}

fn mebibytes(octets: f64) -> f64 {
    octets / f64::from(1 << 20)
}

/// Measures each reader with its own server.
pub(super) fn run(socklb: &Path, size: Size, run: &mut Run) -> anyhow::Result<()> {
    let kube_proxy = daemon::kube_proxy()?;
    let mut readers =
        vec![Reader::Agent(socklb, &[]), Reader::Agent(socklb, &["--node-ports-of-other-nodes"])];
    readers.extend(kube_proxy.as_deref().map(Reader::KubeProxy));
    eprintln!("{size}");
    for reader in readers {
        Sandbox::run(|sandbox| measure(reader, sandbox, size, &mut run.of(&size.to_string(), None)))?;
    }
    Ok(())
}

/// An API server with all objects of a size, as large as real ones, and its Nodes.
fn server(size: Size) -> (ApiServer, Vec<Node>) {
    let server = ApiServer::start();
    let mut objects = size.cluster();
    for service in objects.services.values_mut() {
        enlarge(&mut service.metadata, SERVICE_EXTRA);
    }
    for slice in objects.slices.values_mut() {
        enlarge(&mut slice.metadata, SLICE_EXTRA);
    }
    for node in objects.nodes.values_mut() {
        enlarge(&mut node.metadata, NODE);
    }
    let nodes = objects.nodes.values().cloned().collect();
    server.set(&objects);
    server.compact();
    (server, nodes)
}

fn measure(reader: Reader<'_>, sandbox: &Sandbox, size: Size, report: &mut Report<'_>) -> anyhow::Result<()> {
    let (server, nodes) = server(size);
    server.set_faults(|faults| faults.bookmark_interval = HOUR);
    let daemon = reader.start(sandbox, size, &server)?;
    let start = settled(&server, 0).with_context(|| daemon.last_words())?;
    let mut say = |what: &str, octets: f64| {
        report.figure(&name(reader.name(), what), Unit::Mebibytes, mebibytes(octets));
    };
    say(START, real(start));
    say(ALL_STARTS, real(start) * f64::from(size.n_nodes));

    // Each kubelet writes the status of its Node once.
    for mut node in nodes {
        let annotations = node.metadata.annotations.get_or_insert_default();
        let _none = annotations.insert("example.com/heartbeat".to_owned(), "1".to_owned());
        server.apply(Object::Node(node));
    }
    let of_nodes = settled(&server, start)?;
    let hour = f64::from(u32::try_from(HOUR.as_secs() / STATUS.as_secs())?) * real(of_nodes - start);
    server.cut_watches();
    let broken = settled(&server, of_nodes)?;
    say(BROKEN, real(broken - of_nodes));
    reader.stop(sandbox, daemon)?;
    say(QUIET_HOUR, hour + bookmarks(size, sandbox, reader)?);
    Ok(())
}

/// Bytes of an hour's bookmarks, from a small server that sends them more often.
fn bookmarks(size: Size, sandbox: &Sandbox, reader: Reader<'_>) -> anyhow::Result<f64> {
    let one = Size { n_services: 1, n_nodes: 1, ..size };
    let (server, _nodes) = server(one);
    server.set_faults(|faults| faults.bookmark_interval = SHORT_BOOKMARK);
    let daemon = reader.start(sandbox, one, &server)?;
    thread::sleep(QUIET);
    let (before, since) = (server.requests().octets, Instant::now());
    thread::sleep(SHORT_BOOKMARK * 40);
    let n_bookmarks = since.elapsed().as_secs_f64() / SHORT_BOOKMARK.as_secs_f64();
    let each = real(server.requests().octets - before) / n_bookmarks;
    reader.stop(sandbox, daemon)?;
    Ok(each * HOUR.as_secs_f64() / BOOKMARK.as_secs_f64())
}

/// Waits until the server sends nothing more. Returns the bytes sent.
fn settled(server: &ApiServer, before: u64) -> anyhow::Result<u64> {
    let started = Instant::now();
    let (mut octets, mut since) = (server.requests().octets, Instant::now());
    while octets == before || since.elapsed() < QUIET {
        if started.elapsed() > PATIENCE {
            bail!("{octets} bytes were sent, and it continues or has not begun");
        }
        thread::sleep(Duration::from_millis(10));
        let now = server.requests().octets;
        if now != octets {
            (octets, since) = (now, Instant::now());
        }
    }
    Ok(octets)
}
