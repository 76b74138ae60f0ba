//! The demo's clients: their calls, and how the demo starts them and reads their reports.
//!
//! # Purpose
//!
//! A client is a process that connects and sends like any program: curl, or plain sockets of the standard
//! library. [`run`] is the code of that process, behind the hidden command `client`; [`Clients`] is the
//! demo's side.
//!
//! # Invariants
//!
//! - A client's calls know nothing of socklb. Its only preparation is to enter the demo's cgroup, as a
//!   container runtime would do.
//! - A client exits with the demo, however that exits.

use std::{
    ffi::OsString,
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{self, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::{
    errno::Errno,
    sys::{prctl, signal::Signal},
    time::{ClockId, clock_gettime},
    unistd::{Pid, getppid},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};

/// Timeout of a call.
const PATIENCE: Duration = Duration::from_secs(2);
/// Timeout of a client with a limited number of calls.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);
/// What an echo server sends after its name.
const PAYLOAD: &str = "hello";

/// Arguments of the hidden command.
#[derive(Debug, clap::Args)]
pub(crate) struct ClientArgs {
    /// The parent process; the client exits with it.
    #[arg(long)]
    parent: i32,
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, clap::Subcommand)]
enum Act {
    /// Call addresses in turn and report each call as a line of JSON.
    Call {
        #[arg(long)]
        cgroup: PathBuf,
        #[arg(long)]
        n: u32,
        /// Microseconds between two calls.
        #[arg(long, default_value_t = 0)]
        pause: u64,
        how: How,
        #[arg(required = true)]
        addresses: Vec<SocketAddr>,
    },
    /// Become the agent, with this program and these arguments.
    Agent {
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// How a client calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum How {
    /// A curl process per call.
    Curl,
    /// `connect()` on a new TCP socket per call.
    Tcp,
    /// `sendto()` on a new UDP socket per call.
    Udp,
    /// `connect()` once on a UDP socket, `send()` per call.
    ConnectedUdp,
}

/// One call, as seen by the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Call {
    /// Its start, in microseconds of `CLOCK_MONOTONIC`.
    pub began: u64,
    /// Duration of `connect()` in nanoseconds; absent if the client does not call it itself.
    pub connect_ns: Option<u64>,
    /// Duration of the call in microseconds.
    pub took: u64,
    pub outcome: Outcome,
}

/// Result of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Outcome {
    /// A server answered.
    Answered {
        /// The server's name.
        by: String,
        /// The peer that the client sees: `getpeername()` of a connected socket, `recvfrom()` of another.
        /// Absent if the client did not ask.
        peer: Option<SocketAddr>,
    },
    /// No answer.
    Failed {
        /// The cause, as the system or curl words it.
        error: String,
        /// The error's number; absent with curl.
        errno: Option<i32>,
    },
}

/// Microseconds of `CLOCK_MONOTONIC`, which is one clock for all processes.
pub(super) fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("clock_gettime")?;
    Ok(micros(Duration::from(now)))
}

/// The command line of a curl call.
pub(super) fn curl_line(address: SocketAddr) -> String {
    format!("curl {}", curl_arguments(address).join(" "))
}

fn curl_arguments(address: SocketAddr) -> [String; 4] {
    let patience = format!("-m{}", PATIENCE.as_secs());
    let url = if address.port() == 80 {
        // A socket address without the port: an IPv6 address keeps its brackets.
        format!("http://{}/", address.to_string().trim_end_matches(":80"))
    } else {
        format!("http://{address}/")
    };
    // -q: a call must not depend on the user's .curlrc, which may name a proxy.
    ["-q".to_owned(), "-sS".to_owned(), patience, url]
}

/// Runs the hidden command, inside the client process.
///
/// # Errors
///
/// If the process cannot be set up. A failed call is reported, and is no error.
pub(super) fn run(args: ClientArgs) -> Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
    if getppid() != Pid::from_raw(args.parent) {
        // The demo exited before the line above, or a user typed this command.
        bail!("internal command: run `socklb-demo`");
    }
    match args.act {
        Act::Agent { program, arguments } => {
            let error = process::Command::new(&program).arg0("socklb").args(arguments).exec();
            Err(error).with_context(|| format!("cannot start {}", program.display()))
        }
        Act::Call { cgroup, n, pause, how, addresses } => {
            let procs = cgroup.join("cgroup.procs");
            fs::write(&procs, "0")
                .with_context(|| format!("cannot enter the cgroup: {}", procs.display()))?;
            let mut stdout = io::stdout().lock();
            let pause = Duration::from_micros(pause);
            let reported = call_all(how, &addresses, n, pause, |call| {
                let line = serde_json::to_string(call)?;
                writeln!(stdout, "{line}")
            });
            match reported {
                // The demo needs no more calls.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                other => other.context("cannot report")?,
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Makes `n` calls to the addresses in turn and reports each one.
fn call_all(
    how: How,
    addresses: &[SocketAddr],
    n: u32,
    pause: Duration,
    mut report: impl FnMut(&Call) -> io::Result<()>,
) -> io::Result<()> {
    let mut socket = None;
    for (_, &address) in (0..n).zip(addresses.iter().cycle()) {
        let began = now().map_err(io::Error::other)?;
        let timer = Instant::now();
        let mut connect = None;
        let result = match how {
            How::Curl => call_curl(address),
            How::Tcp => call_tcp(address, &mut connect),
            How::Udp => call_udp(address),
            How::ConnectedUdp => call_connected_udp(address, &mut socket, &mut connect),
        };
        let outcome = match result {
            Ok((by, peer)) => Outcome::Answered { by, peer },
            Err(error) => {
                let errno = error.raw_os_error();
                let error =
                    errno.map_or_else(|| error.to_string(), |errno| Errno::from_raw(errno).desc().to_owned());
                Outcome::Failed { error, errno }
            }
        };
        let connect_ns = connect.map(|time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        report(&Call { began, connect_ns, took: micros(timer.elapsed()), outcome })?;
        thread::sleep(pause);
    }
    Ok(())
}

/// The answering server, and the peer that the client sees.
type Answer = io::Result<(String, Option<SocketAddr>)>;

fn call_curl(address: SocketAddr) -> Answer {
    let output = process::Command::new("curl")
        .args(curl_arguments(address))
        // The call must not depend on http_proxy either.
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| name == "PATH"))
        .stdin(Stdio::null())
        .output()?;
    let text = |octets: &[u8]| String::from_utf8_lossy(octets).trim().to_owned();
    if output.status.success() {
        Ok((text(&output.stdout), None))
    } else {
        Err(io::Error::other(text(&output.stderr)))
    }
}

fn call_tcp(address: SocketAddr, connect: &mut Option<Duration>) -> Answer {
    let timer = Instant::now();
    let stream = TcpStream::connect_timeout(&address, PATIENCE);
    *connect = Some(timer.elapsed());
    let mut stream = stream?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let peer = stream.peer_addr()?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    match response.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => {
            Ok((body.trim_end().to_owned(), Some(peer)))
        }
        _ => Err(io::Error::new(ErrorKind::UnexpectedEof, "the connection was closed without an answer")),
    }
}

/// A new UDP socket of the address's family.
fn udp_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = if address.is_ipv4() {
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
    } else {
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))
    }?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn call_udp(address: SocketAddr) -> Answer {
    let socket = udp_socket(address)?;
    socket.send_to(PAYLOAD.as_bytes(), address)?;
    let mut answer = [0; 1024];
    let (length, from) = socket.recv_from(&mut answer)?;
    Ok((echo_name(&answer[..length])?, Some(from)))
}

/// Keeps the socket for later calls.
fn call_connected_udp(
    address: SocketAddr,
    kept: &mut Option<UdpSocket>,
    connect: &mut Option<Duration>,
) -> Answer {
    let socket = if let Some(socket) = kept {
        socket
    } else {
        let socket = udp_socket(address)?;
        let timer = Instant::now();
        let connected = socket.connect(address);
        *connect = Some(timer.elapsed());
        connected?;
        kept.insert(socket)
    };
    let peer = socket.peer_addr()?;
    socket.send(PAYLOAD.as_bytes())?;
    let mut answer = [0; 1024];
    let length = socket.recv(&mut answer)?;
    Ok((echo_name(&answer[..length])?, Some(peer)))
}

/// The name in an echo server's answer.
fn echo_name(answer: &[u8]) -> io::Result<String> {
    let answer = String::from_utf8_lossy(answer);
    match answer.split_once(' ') {
        Some((name, PAYLOAD)) => Ok(name.to_owned()),
        _ => Err(io::Error::new(ErrorKind::InvalidData, format!("an unexpected answer: {answer:?}"))),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Starts clients in the demo's cgroup and in the calling thread's namespaces.
#[derive(Clone, Debug)]
pub(super) struct Clients {
    cgroup: PathBuf,
}

impl Clients {
    /// Clients in this cgroup.
    pub(super) fn new(cgroup: &Path) -> Self {
        Self { cgroup: cgroup.to_owned() }
    }

    /// Makes `n` calls in sequence.
    pub(super) async fn call(&self, how: How, address: SocketAddr, n: u32) -> Result<Vec<Call>> {
        self.call_in_turn(how, &[address], n).await
    }

    /// Makes `n` calls in sequence, to each address in turn.
    pub(super) async fn call_in_turn(&self, how: How, addresses: &[SocketAddr], n: u32) -> Result<Vec<Call>> {
        let output = self.command(how, addresses, n, Duration::ZERO).output();
        let output = timeout(CLIENT_PATIENCE, output)
            .await
            .with_context(|| format!("{n} calls to {addresses:?} took longer than {CLIENT_PATIENCE:?}"))?
            .context("cannot start a client")?;
        let lines = String::from_utf8_lossy(&output.stdout);
        let calls: Vec<Call> = lines.lines().map(read).collect::<Result<_>>()?;
        if calls.len() != n as usize {
            let complaint = String::from_utf8_lossy(&output.stderr);
            let complaint = complaint.trim();
            bail!("a client reported {} of {n} calls to {addresses:?}: {complaint}", calls.len());
        }
        Ok(calls)
    }

    fn command(&self, how: How, addresses: &[SocketAddr], n: u32, pause: Duration) -> Command {
        let mut command = own_command("call");
        command.arg("--cgroup").arg(&self.cgroup).args(["--n", &n.to_string()]);
        let how = how.to_possible_value().map(|value| value.get_name().to_owned());
        command.args(["--pause", &pause.as_micros().to_string()]).args(how);
        command.args(addresses.iter().map(ToString::to_string)).stdin(Stdio::null());
        command
    }

    /// Starts a client whose reports the caller reads.
    pub(super) fn start(
        &self,
        how: How,
        addresses: &[SocketAddr],
        n: u32,
        pause: Duration,
    ) -> Result<Client> {
        let mut command = self.command(how, addresses, n, pause);
        let mut process = command.stdout(Stdio::piped()).spawn().context("cannot start a client")?;
        let stdout = process.stdout.take().context("a client has no output")?;
        let (heard, reports) = mpsc::unbounded_channel();
        let mut listener = JoinSet::new();
        listener.spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if heard.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Client { process, reports, _listener: listener })
    }
}

/// A call, as a client reported it.
fn read(line: &str) -> Result<Call> {
    serde_json::from_str(line).with_context(|| format!("a client reported {line:?}"))
}

/// This program, as a process that exits with the calling thread.
pub(super) fn own_command(act: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("socklb-demo").arg("client").args(["--parent", &process::id().to_string(), act]);
    // Ctrl-C in a terminal must reach only the demo, which stops its children in order.
    command.process_group(0).kill_on_drop(true);
    command
}

/// A running client. A task reads its reports, so that the client never blocks.
#[derive(Debug)]
pub(super) struct Client {
    process: Child,
    reports: mpsc::UnboundedReceiver<String>,
    _listener: JoinSet<()>,
}

impl Client {
    /// The next call; `None` when there are no more.
    pub(super) async fn next(&mut self) -> Result<Option<Call>> {
        let Some(line) = self.reports.recv().await else { return Ok(None) };
        read(&line).map(Some)
    }

    /// Stops the client. Returns its unread reports.
    pub(super) async fn stop(mut self) -> Result<Vec<Call>> {
        self.process.kill().await.context("cannot kill a client")?;
        let mut calls = Vec::new();
        while let Some(line) = self.reports.recv().await {
            // The last line may be incomplete.
            calls.extend(serde_json::from_str::<Call>(&line).ok());
        }
        Ok(calls)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        net::TcpListener,
    };

    use super::*;

    fn calls(how: How, address: SocketAddr, n: u32) -> Vec<Call> {
        let mut calls = Vec::new();
        call_all(how, &[address], n, Duration::ZERO, |call| {
            calls.push(call.clone());
            Ok(())
        })
        .unwrap();
        calls
    }

    #[test]
    fn a_tcp_client_reports_who_answered_and_its_peer() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = BufReader::new(stream.try_clone().unwrap()).lines();
            assert_eq!(request.next().unwrap().unwrap(), "GET / HTTP/1.1");
            while request.next().is_some_and(|line| !line.unwrap().is_empty()) {}
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npod-9\n").unwrap();
        });
        let before = now().unwrap();
        let [call] = calls(How::Tcp, address, 1).try_into().unwrap();
        server.join().unwrap();
        assert_eq!(call.outcome, Outcome::Answered { by: "pod-9".to_owned(), peer: Some(address) });
        assert!(call.connect_ns.is_some() && call.began >= before);

        // The listener is closed.
        let [call] = calls(How::Tcp, address, 1).try_into().unwrap();
        let refused = Outcome::Failed {
            error: "Connection refused".to_owned(),
            errno: Some(Errno::ECONNREFUSED as i32),
        };
        assert_eq!(call.outcome, refused);
    }

    #[test]
    fn udp_clients_report_who_answered_and_its_peer() {
        let server = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let address = server.local_addr().unwrap();
        let _ends_with_the_test = thread::spawn(move || {
            let mut clients = Vec::new();
            for _ in 0..4 {
                let mut datagram = [0; 64];
                let (length, client) = server.recv_from(&mut datagram).unwrap();
                clients.push(client);
                let answer = [b"pod-9 ", &datagram[..length]].concat();
                server.send_to(&answer, client).unwrap();
            }
        });
        let answered = Outcome::Answered { by: "pod-9".to_owned(), peer: Some(address) };
        let outcomes = |how| calls(how, address, 2).into_iter().map(|call| call.outcome).collect::<Vec<_>>();
        assert_eq!(outcomes(How::Udp), [answered.clone(), answered.clone()]);
        assert_eq!(outcomes(How::ConnectedUdp), [answered.clone(), answered]);
    }

    #[test]
    fn a_curl_line_is_what_one_would_type() {
        let line = |address: &str| curl_line(address.parse().unwrap());
        assert_eq!(line("10.96.0.80:80"), "curl -q -sS -m2 http://10.96.0.80/");
        assert_eq!(line("[fd00:10:96::80]:80"), "curl -q -sS -m2 http://[fd00:10:96::80]/");
        assert_eq!(line("10.10.0.1:30080"), "curl -q -sS -m2 http://10.10.0.1:30080/");
    }

    #[test]
    fn an_answer_to_another_question_is_none() {
        assert!(echo_name(b"pod-9 bye").is_err());
        assert!(echo_name(b"").is_err());
        assert_eq!(echo_name(b"pod-9 hello").unwrap(), "pod-9");
    }
}
