//! How soon the readiness of a pod affects calls.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::mpsc::Receiver,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use lb_core::model::Protocol::{self, Tcp, Udp};
use lb_tests::{
    apiserver::{ApiServer, Kind, Written},
    client::{Domain, Socket, call},
    cluster::{self, NAMESPACE, PortOf},
    netns::{NetNs, Resident},
    server::Servers,
};
use nix::errno::Errno;

use super::tables::PATIENCE;
use crate::objects::{self, PORT, Pod};

const NAME: &str = "probe";
pub(crate) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 111, 0, 1);
const RESOLVER: &str = "resolver";
const RESOLVER_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 111, 0, 2);
/// Calls in a row that must reach another pod before a pod counts as removed. Each call would reach it with
/// probability one half.
const N_ALONE: u32 = 40;

/// Makes the second of two pods ready and unready a few times while calls are made. The pods answer already.
///
/// Returns two durations since the server wrote the event: until the end of the first call that reached the
/// pod, and until the beginning of the last call that did.
pub(crate) fn flips(
    server: &ApiServer,
    pods: [SocketAddr; 2],
    n_flips: u32,
    patience: Duration,
) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let to = SocketAddr::from((SERVICE, PORT));
    let written = server.written();
    let set = |ready: [bool; 2]| -> anyhow::Result<Instant> {
        written.try_iter().for_each(drop);
        let pod = |index: usize, ready| match pods[index] {
            SocketAddr::V4(pod) => Ok(Pod { ip: *pod.ip(), port: pod.port(), ready }),
            SocketAddr::V6(_) => bail!("not an IPv4 pod"),
        };
        server.apply(objects::slice(NAME, &[pod(0, ready[0])?, pod(1, ready[1])?]));
        written_at(&written, NAME)
    };
    server.apply(objects::service(NAME, SERVICE));
    let _first = set([true, false])?;
    until(to, Tcp, pods[0], patience)?;
    let (mut taken, mut left) = (Vec::new(), Vec::new());
    for _ in 0..n_flips {
        let at = set([true, true])?;
        until(to, Tcp, pods[1], patience)?;
        taken.push(at.elapsed());
        thread::sleep(Duration::from_millis(5));
        let at = set([true, false])?;
        left.push(last_call(to, pods[1], patience)?.saturating_duration_since(at));
        thread::sleep(Duration::from_millis(5));
    }
    server.delete(Kind::Slice, NAMESPACE, NAME);
    server.delete(Kind::Service, NAMESPACE, NAME);
    Ok((taken, left))
}

/// Replaces the pod of a connected UDP socket a few times, as for a resolver: the socket is in another
/// network namespace than the agent and waits for an answer.
///
/// Returns the duration from the server's write of the event until the socket was destroyed, reconnected, and
/// had an answer from the other pod.
pub(crate) fn moves(
    server: &ApiServer,
    pods: [SocketAddr; 2],
    n_moves: u32,
) -> anyhow::Result<Vec<Duration>> {
    let to = SocketAddr::from((RESOLVER_SERVICE, PORT));
    let netns = NetNs::new()?;
    let (_servers, _resident) = (netns.run(|| Servers::udp(pods)), Resident::of(&netns)?);
    let written = server.written();
    let port = PortOf { service: RESOLVER, name: "", protocol: Udp };
    let set = |pod: SocketAddr| -> anyhow::Result<Instant> {
        written.try_iter().for_each(drop);
        let mut slices = cluster::slices(&port, &[pod]);
        slices[0].metadata.name = Some(RESOLVER.to_owned());
        server.apply(slices.swap_remove(0));
        written_at(&written, RESOLVER)
    };
    let ports = [cluster::port("", Udp, PORT)];
    server.apply(cluster::service(RESOLVER, &[RESOLVER_SERVICE.into()], &ports));
    let _first = set(pods[0])?;
    netns.run(|| until(to, Udp, pods[0], PATIENCE))?;
    let socket = netns.run(|| Socket::new(Domain::V4, Udp));
    socket.connect(to)?;
    let mut times = Vec::new();
    for pod in pods.into_iter().rev().cycle().take(usize::try_from(n_moves)?) {
        let at = set(pod)?;
        match socket.receive() {
            Err(Errno::ECONNABORTED) => {}
            other => bail!("{other:?} instead of the destruction of a socket whose pod is gone"),
        }
        socket.connect(to)?;
        let answer = socket.ask()?.server;
        times.push(at.elapsed());
        if answer != pod {
            bail!("{answer} answers and not {pod}");
        }
    }
    server.delete(Kind::Slice, NAMESPACE, RESOLVER);
    server.delete(Kind::Service, NAMESPACE, RESOLVER);
    Ok(times)
}

/// When the event of a slice was written.
fn written_at(written: &Receiver<Written>, name: &str) -> anyhow::Result<Instant> {
    let end = Instant::now() + PATIENCE;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let event = written.recv_timeout(left).context("no watch is open: has the agent exited?")?;
        if event.kind == Kind::Slice && event.name.1 == name {
            return Ok(event.at);
        }
    }
}

/// Calls until a pod answers.
fn until(to: SocketAddr, protocol: Protocol, pod: SocketAddr, patience: Duration) -> anyhow::Result<()> {
    let began = Instant::now();
    while call(to, protocol) != Ok(pod) {
        if began.elapsed() > patience {
            bail!("{to} never reaches {pod}");
        }
        // Leaves a CPU to what takes long. A hundredth is exact enough.
        if began.elapsed() > Duration::from_millis(10) {
            thread::sleep(began.elapsed() / 100);
        }
    }
    Ok(())
}

/// Calls until a pod is no longer reached, and returns when the last call to it began.
fn last_call(to: SocketAddr, pod: SocketAddr, patience: Duration) -> anyhow::Result<Instant> {
    let (mut last, mut n_alone) = (Instant::now(), 0);
    let end = last + patience;
    // Without such a call, the moment before the first call, which is at most that much after the event.
    while n_alone < N_ALONE {
        let began = Instant::now();
        if began > end {
            bail!("{to} still reaches {pod}");
        }
        let server = call(to, Tcp).with_context(|| format!("{to} has a ready pod"))?;
        n_alone += 1;
        if server == pod {
            (last, n_alone) = (began, 0);
        }
    }
    Ok(last)
}
