//! The thread of the UDP sockets.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Relaxed},
        },
    },
    time::Instant,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::EventFd,
        socket::{
            ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, setsockopt,
            sockopt,
        },
    },
};
use tokio::sync::mpsc;

use crate::{
    Shared,
    forward::Cached,
    message::{Body, Input, Local, Request, ask, read, write},
    statistics::{From, Protocol},
};
use hickory_proto::op::ResponseCode;

/// Datagrams in one system call.
const BATCH: usize = 32;
/// Longer queries are cut off, and malformed then.
const MAX_QUERY: usize = 4096;
/// Milliseconds without a datagram until the next heartbeat.
const IDLE: u8 = 200;

/// A question for the tasks, with the way back.
pub(crate) struct Job {
    pub(crate) request: Box<Request>,
    pub(crate) client: SocketAddr,
    pub(crate) socket: Arc<UdpSocket>,
    pub(crate) since: Instant,
    /// The answer was given already.
    pub(crate) is_refresh: bool,
}

/// Asks the kernel for each datagram's interface.
pub(crate) fn prepare(socket: &UdpSocket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    if socket.local_addr()?.is_ipv4() {
        setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    Ok(())
}

pub(crate) fn run(
    sockets: &[Arc<UdpSocket>],
    shared: &Shared,
    jobs: &mpsc::Sender<Job>,
    stop: (&AtomicBool, &EventFd),
    on_alive: &mut (dyn FnMut() + Send),
) {
    let mut buffers = vec![[0u8; MAX_QUERY]; BATCH];
    while !stop.0.load(Acquire) {
        if shared.beats.are_recent() {
            on_alive();
        }
        let readable = {
            let mut polled: Vec<PollFd<'_>> =
                sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
            polled.push(PollFd::new(stop.1.as_fd(), PollFlags::POLLIN));
            match poll(&mut polled, PollTimeout::from(IDLE)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the name server's UDP sockets cannot be polled: it stops");
                    return;
                }
            }
            polled.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<bool>>()
        };
        for (socket, _) in sockets.iter().zip(readable).filter(|(_, is_readable)| *is_readable) {
            batch(socket, shared, jobs, &mut buffers);
        }
    }
}

/// One batch of a socket: the others get their turn after it.
fn batch(
    socket: &Arc<UdpSocket>,
    shared: &Shared,
    jobs: &mpsc::Sender<Job>,
    buffers: &mut [[u8; MAX_QUERY]],
) {
    let since = Instant::now();
    let received = receive(socket, buffers);
    if received.is_empty() {
        return;
    }
    let authority = shared.authority.borrow().clone();
    let mut replies = Vec::with_capacity(received.len());
    for ((client, interface_index, n_octets), buffer) in received.into_iter().zip(buffers.iter()) {
        let Some((client, octets)) = client.zip(buffer.get(..n_octets)) else { continue };
        if !shared.clients.admits(client.ip().to_canonical(), interface_index) {
            shared.counters().foreign.fetch_add(1, Relaxed);
            continue;
        }
        let request = match read(octets, false) {
            Input::Drop => {
                shared.counters().malformed.fetch_add(1, Relaxed);
                continue;
            }
            Input::Reply(octets, code) => {
                shared.counters().refused(code);
                replies.push((client, octets));
                continue;
            }
            Input::Request(request) => request,
        };
        shared.counters().request(Protocol::Udp, client.ip(), &request.query);
        let (body, from) = match ask(&*authority, &request.query) {
            Local::Done(body) => (body, From::Zone),
            Local::Upstream(body, query) => {
                let cached = shared.forwarder.cached(&request, &body, &query, since);
                let job = |is_refresh| Job {
                    request: request.clone(),
                    client,
                    socket: socket.clone(),
                    since,
                    is_refresh,
                };
                match cached {
                    Cached::Answer(body, from) => (body, from),
                    Cached::Due(body, from) => {
                        // Without room it ends, and is fetched when it is asked for next.
                        let _full = jobs.try_send(job(true));
                        (body, from)
                    }
                    Cached::Miss(_) if jobs.try_send(job(false)).is_ok() => continue,
                    Cached::Miss(_) => {
                        shared.counters().overload.fetch_add(1, Relaxed);
                        (Body { code: ResponseCode::ServFail, ..Body::default() }, From::Upstream)
                    }
                }
            }
        };
        let code = body.code;
        replies.push((client, write(&request, body)));
        shared.counters().answered(client, &request.query, code, from, since);
    }
    send(socket, &replies);
}

type Received = (Option<SocketAddr>, u32, usize);

fn receive(socket: &UdpSocket, buffers: &mut [[u8; MAX_QUERY]]) -> Vec<Received> {
    let space = nix::cmsg_space!(nix::libc::in6_pktinfo);
    // Anew for each batch: nix does not restore the lengths that the kernel writes into the headers.
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(buffers.len(), Some(space));
    let mut slices: Vec<[IoSliceMut<'_>; 1]> =
        buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
    let flags = MsgFlags::MSG_DONTWAIT;
    let received = match recvmmsg(socket.as_raw_fd(), &mut headers, slices.iter_mut(), flags, None) {
        Ok(received) => received,
        Err(Errno::EAGAIN | Errno::EINTR) => return Vec::new(),
        Err(error) => {
            // An ICMP error for an earlier answer, for example: the kernel reports it once.
            tracing::debug!(%error, "the name server's UDP socket reports an error");
            return Vec::new();
        }
    };
    received
        .map(|message| {
            let interface_index = message.cmsgs().ok().and_then(|mut controls| {
                controls.find_map(|control| match control {
                    ControlMessageOwned::Ipv4PacketInfo(info) => u32::try_from(info.ipi_ifindex).ok(),
                    ControlMessageOwned::Ipv6PacketInfo(info) => Some(info.ipi6_ifindex),
                    _ => None,
                })
            });
            let is_whole = !message.flags.contains(MsgFlags::MSG_TRUNC);
            let client = message.address.as_ref().and_then(socket_address).filter(|_| is_whole);
            (client, interface_index.unwrap_or(0), message.bytes)
        })
        .collect()
}

fn socket_address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| SocketAddr::V4((*address).into()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|address| SocketAddr::V6((*address).into())))
}

/// A datagram that the kernel does not take is lost, as one on the way is.
fn send(socket: &UdpSocket, replies: &[(SocketAddr, Vec<u8>)]) {
    let mut rest = replies;
    while !rest.is_empty() {
        let addresses: Vec<Option<SockaddrStorage>> =
            rest.iter().map(|(client, _)| Some(SockaddrStorage::from(*client))).collect();
        let slices: Vec<[IoSlice<'_>; 1]> = rest.iter().map(|(_, octets)| [IoSlice::new(octets)]).collect();
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(rest.len(), None);
        let flags = MsgFlags::MSG_DONTWAIT;
        let n_sent = match sendmmsg(socket.as_raw_fd(), &mut headers, &slices, &addresses, [], flags) {
            Ok(sent) => sent.count().max(1),
            Err(Errno::EINTR) => 0,
            // It is about the first.
            Err(_) => 1,
        };
        rest = rest.get(n_sent..).unwrap_or_default();
    }
}
