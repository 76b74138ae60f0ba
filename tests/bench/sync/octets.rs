//! The bytes that an agent reads from the API server, with objects of realistic size.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use k8s_openapi::{api::core::v1::Node, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use lb_tests::{Sandbox, apiserver::ApiServer, cluster::Object};

use super::{Options, agent::Agent, objects::Size, report::Report};

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

/// Prefix of the measures, in MiB: the reader follows, and after a comma the event.
pub(crate) const MEASURE: &str = "read from the API server by ";
const START: &str = "start";
const QUIET_HOUR: &str = "one hour of a quiet cluster";
const BROKEN: &str = "each connection breaks once (rolling restart of API servers)";
const ALL_STARTS: &str = "all nodes: rolling restart of the agents";

/// A client of the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    Default,
    OtherNodes,
    /// The requests of kube-proxy (`cmd/kube-proxy/app/server.go`), as JSON.
    KubeProxy,
}

impl Reader {
    const fn name(self) -> &'static str {
        match self {
            Self::Default => "socklb",
            Self::OtherNodes => "socklb --node-ports-of-other-nodes",
            Self::KubeProxy => "what kube-proxy asks for",
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

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
const fn real(n: u64) -> f64 {
    n as f64
}

/// Measures each reader with its own server.
pub(super) fn run(options: &Options, size: Size, report: &mut Report) -> anyhow::Result<()> {
    report.part(&size.to_string(), None);
    for reader in [Reader::Default, Reader::OtherNodes, Reader::KubeProxy] {
        Sandbox::run(|sandbox| measure(options, sandbox, size, reader, report))?;
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

fn measure(
    options: &Options,
    sandbox: &Sandbox,
    size: Size,
    reader: Reader,
    report: &mut Report,
) -> anyhow::Result<()> {
    let (server, nodes) = server(size);
    server.set_faults(|faults| faults.bookmark_interval = Duration::from_secs(3600));
    let (agent, _watches) = begin(options, sandbox, size, reader, &server)?;
    let start = settled(&server, 0)?;
    let mut say = |what: &str, octets: f64| {
        report.mebibytes(&format!("{MEASURE}{}, {what}", reader.name()), mebibytes(octets));
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
    if reader != Reader::KubeProxy {
        server.cut_watches();
        let broken = settled(&server, of_nodes)?;
        say(BROKEN, real(broken - of_nodes));
    }
    if let Some(agent) = agent {
        agent.end_and_clean(&options.socklb)?;
    }
    say(QUIET_HOUR, hour + bookmarks(size, options, sandbox, reader)?);
    Ok(())
}

/// Bytes of an hour's bookmarks, from a small server that sends them more often.
fn bookmarks(size: Size, options: &Options, sandbox: &Sandbox, reader: Reader) -> anyhow::Result<f64> {
    let (server, _nodes) = server(Size { n_services: 1, n_nodes: 1, ..size });
    server.set_faults(|faults| faults.bookmark_interval = SHORT_BOOKMARK);
    let one = Size { n_services: 1, n_nodes: 1, ..size };
    let (agent, _watches) = begin(options, sandbox, one, reader, &server)?;
    thread::sleep(QUIET);
    let (before, since) = (server.requests().octets, Instant::now());
    thread::sleep(SHORT_BOOKMARK * 40);
    let n_bookmarks = since.elapsed().as_secs_f64() / SHORT_BOOKMARK.as_secs_f64();
    let each = real(server.requests().octets - before) / n_bookmarks;
    if let Some(agent) = agent {
        agent.end_and_clean(&options.socklb)?;
    }
    Ok(each * HOUR.as_secs_f64() / BOOKMARK.as_secs_f64())
}

/// Starts a reader and waits until it has read everything. The result continues to read until dropped.
fn begin(
    options: &Options,
    sandbox: &Sandbox,
    size: Size,
    reader: Reader,
    server: &ApiServer,
) -> anyhow::Result<(Option<Agent>, Vec<TcpStream>)> {
    if reader == Reader::KubeProxy {
        return Ok((None, kube_proxy(server)?));
    }
    let flags: &[&str] = if reader == Reader::OtherNodes { &["--node-ports-of-other-nodes"] } else { &[] };
    let agent = Agent::start_with(&options.socklb, sandbox, server, flags)?;
    let (mut tables, _opened) = agent.tables()?;
    tables.until_right(size).with_context(|| agent.last_words())?;
    Ok((Some(agent), Vec::new()))
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

/// Streaming lists of what kube-proxy watches, read by threads.
fn kube_proxy(server: &ApiServer) -> anyhow::Result<Vec<TcpStream>> {
    let labels =
        "labelSelector=%21service.kubernetes.io%2Fheadless%2C%21service.kubernetes.io%2Fservice-proxy-name";
    let initial = "watch=true&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&timeoutSeconds=3600";
    let (mut streams, (sender, complete)) = (Vec::new(), mpsc::channel());
    for path in [
        format!("/api/v1/services?{labels}&{initial}"),
        format!("/apis/discovery.k8s.io/v1/endpointslices?{labels}&{initial}"),
        format!("/api/v1/nodes?fieldSelector=metadata.name%3Dnode-0000&{initial}"),
    ] {
        let mut stream = TcpStream::connect(server.address())?;
        stream.write_all(
            format!("GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: application/json\r\n\r\n").as_bytes(),
        )?;
        streams.push(stream.try_clone()?);
        let sender = sender.clone();
        // Stops with the server, which is dropped after the measurement.
        let _reading = thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if line.contains("k8s.io/initial-events-end") {
                    let _gave_up = sender.send(());
                }
            }
        });
    }
    for _ in &streams {
        complete.recv_timeout(PATIENCE).context("a list is never complete")?;
    }
    Ok(streams)
}
