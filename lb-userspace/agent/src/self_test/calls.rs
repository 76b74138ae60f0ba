//! The calls of the self-test, made by a separate process: the hidden command `socklb self-test-calls`.

use std::{
    fmt, fs,
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use lb_core::model::Family;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::service_address;

/// Timeout of one step of a call. On loopback each takes microseconds.
const PATIENCE: Duration = Duration::from_secs(2);
/// The interface that calls are bound to.
const LOOPBACK: &[u8] = b"lo";
const PAYLOAD: &[u8] = b"socklb self-test";

/// The process's report: one line of JSON on standard output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallReport {
    /// Why it did not enter the given cgroup.
    pub stayed: Option<String>,
    /// The calls that failed, each with its result.
    pub problems: Vec<String>,
}

/// Enters a cgroup, if given, and makes all calls. A failure to enter does not count against the calls.
#[must_use]
pub fn make(cgroup: Option<&PathBuf>, families: &[Family]) -> CallReport {
    let stayed = cgroup.and_then(|cgroup| enter(cgroup).err());
    let ways = families.iter().flat_map(|family| WAYS.map(|way| (way, *family)));
    let problems = ways.filter_map(|(way, family)| {
        call(way, family).err().map(|problem| format!("{way} over {}: {problem}", Name(family)))
    });
    CallReport { stayed, problems: problems.collect() }
}

/// Enters a cgroup, if given, and makes a call that should pass unchanged because the cgroup is excluded.
/// Makes no call if the cgroup cannot be entered.
///
/// The call passes unchanged if it reaches its own address, which has an endpoint only in the tables. A
/// program of this host that listens on port 7 of all addresses makes it look redirected.
#[must_use]
pub fn make_excluded(cgroup: Option<&PathBuf>) -> CallReport {
    if let Some(error) = cgroup.and_then(|cgroup| enter(cgroup).err()) {
        return CallReport { stayed: Some(error), problems: Vec::new() };
    }
    let problem =
        match open(Way::Tcp, Family::V4).map(|socket| socket.connect(&service_address(Family::V4).into())) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => None,
            Ok(Ok(())) => Some("a call was redirected despite the exclusion".to_owned()),
            Ok(Err(error)) | Err(error) => Some(format!("a call that should be refused: {error}")),
        };
    CallReport { stayed: None, problems: problem.into_iter().collect() }
}

/// Moves this process into a cgroup.
fn enter(cgroup: &Path) -> Result<(), String> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, "0").map_err(|error| format!("{}: {error}", procs.display()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `connect()` on a TCP socket.
    Tcp,
    /// `connect()` on a UDP socket.
    ConnectedUdp,
    /// `sendto()` on a UDP socket.
    Udp,
}

const WAYS: [Way; 3] = [Way::Tcp, Way::ConnectedUdp, Way::Udp];

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::ConnectedUdp => "connected UDP",
            Self::Udp => "unconnected UDP",
        })
    }
}

struct Name(Family);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("{step}: {source}")]
    Call { step: &'static str, source: io::Error },
    /// The endpoint's address shows instead of the service's.
    #[error("{step} returns {found} instead of {expected}")]
    Peer { step: &'static str, found: SocketAddr, expected: SocketAddr },
    #[error("the answer differs from what was sent: another program answers instead of the agent's endpoint")]
    Answer,
}

impl Problem {
    fn of(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Call { step, source }
    }
}

fn call(way: Way, family: Family) -> Result<(), Problem> {
    let service = service_address(family);
    let mut socket = open(way, family).map_err(Problem::of("opening a socket that stays on this host"))?;
    if way == Way::Udp {
        let _length = socket.send_to(PAYLOAD, &service.into()).map_err(Problem::of("sendto"))?;
    } else {
        socket.connect(&service.into()).map_err(Problem::of("connect"))?;
        let peer = socket.peer_addr().map_err(Problem::of("getpeername"))?;
        is_service(peer.as_socket(), service, "getpeername")?;
        socket.write_all(PAYLOAD).map_err(Problem::of("send"))?;
    }
    let mut answer = [0; PAYLOAD.len()];
    if way == Way::Tcp {
        socket.read_exact(&mut answer).map_err(Problem::of("recv"))?;
    } else {
        // Requests the sender's address, which a hook translates.
        let datagrams = std::net::UdpSocket::from(socket);
        let (_length, sender) = datagrams.recv_from(&mut answer).map_err(Problem::of("recvfrom"))?;
        is_service(Some(sender), service, "recvfrom")?;
    }
    if answer == PAYLOAD { Ok(()) } else { Err(Problem::Answer) }
}

fn is_service(found: Option<SocketAddr>, expected: SocketAddr, step: &'static str) -> Result<(), Problem> {
    match found {
        Some(found) if found != expected => Err(Problem::Peer { step, found, expected }),
        _ => Ok(()),
    }
}

fn open(way: Way, family: Family) -> io::Result<Socket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let kind = if way == Way::Tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(domain, kind, None)?;
    // Needs no capability since kernel 5.7.
    socket.bind_device(Some(LOOPBACK))?;
    // Applies to connect() as well.
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}
