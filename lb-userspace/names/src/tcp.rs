//! Connections.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{interval, timeout},
};

use crate::{
    PerClient, Shared,
    message::{Input, framed, read, write},
    statistics::Protocol,
};

/// A connection without a query is closed after so long, and one that takes no answers (RFC 7766, 6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// Queries of one connection that wait for their answers.
const MAX_PIPELINED: usize = 32;

/// Connections of one address: the others get some too.
const MAX_PER_CLIENT: usize = 32;

/// `beat`: index of this task's heartbeat.
pub(crate) async fn accept(
    listener: TcpListener,
    shared: Arc<Shared>,
    connections: Arc<Semaphore>,
    beat: usize,
) {
    let mut open = JoinSet::new();
    let mut clients = PerClient::new(MAX_PER_CLIENT);
    let mut alive = interval(crate::BEAT);
    loop {
        tokio::select! {
            _ = alive.tick() => shared.beats.beat(beat),
            Some(ended) = open.join_next(), if !open.is_empty() => {
                if let Ok(client) = ended {
                    clients.remove(client);
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) => {
                    // The interface of a connection is not known.
                    if !shared.clients.admits(client.ip().to_canonical(), 0) {
                        shared.counters().foreign.fetch_add(1, Relaxed);
                        continue;
                    }
                    let permit = connections.clone().try_acquire_owned().ok();
                    let Some(permit) = permit.filter(|_| clients.add(client.ip())) else {
                        shared.counters().overload.fetch_add(1, Relaxed);
                        continue;
                    };
                    let shared = shared.clone();
                    open.spawn(async move {
                        let _permit = permit;
                        if let Err(error) = serve(stream, client, &shared).await {
                            tracing::debug!(%client, %error, "a connection to the name server ended");
                        }
                        client.ip()
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the name server cannot accept a connection");
                    // Out of descriptors, for example: again at once would only take time.
                    tokio::time::sleep(crate::BEAT).await;
                }
            },
        }
    }
}

async fn serve(stream: TcpStream, client: SocketAddr, shared: &Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = stream.into_split();
    let (replies, mut written) = mpsc::channel::<Vec<u8>>(MAX_PIPELINED);
    let mut tasks = JoinSet::new();
    // Answers go out in the order in which they are known (RFC 7766, 6.2.1.1).
    tasks.spawn(async move {
        while let Some(reply) = written.recv().await {
            let Some(framed) = framed(&reply) else { continue };
            timeout(IDLE, writer.write_all(&framed)).await??;
        }
        io::Result::Ok(())
    });
    let slots = Arc::new(Semaphore::new(MAX_PIPELINED));
    let outcome = loop {
        let slot = timeout(IDLE, slots.clone().acquire_owned()).await?.map_err(io::Error::other)?;
        let octets = match timeout(IDLE, message(&mut reader)).await {
            Ok(Ok(octets)) => octets,
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => break Ok(()),
            Ok(Err(error)) => break Err(error),
            Err(_idle) => break Ok(()),
        };
        let since = Instant::now();
        let request = match read(&octets, true) {
            Input::Drop => {
                shared.counters().malformed.fetch_add(1, Relaxed);
                break Ok(());
            }
            Input::Reply(reply, code) => {
                shared.counters().refused(code);
                if replies.send(reply).await.is_err() {
                    break Ok(());
                }
                continue;
            }
            Input::Request(request) => request,
        };
        shared.counters().request(Protocol::Tcp, client.ip(), &request.query);
        let (shared, replies) = (shared.clone(), replies.clone());
        tasks.spawn(async move {
            let _slot = slot;
            let authority = shared.authority.borrow().clone();
            let (body, from) = shared.forwarder.answer(&request, &*authority).await;
            let code = body.code;
            let reply = write(&request, body);
            shared.counters().answered(client, &request.query, code, from, since);
            let _closed = replies.send(reply).await;
            io::Result::Ok(())
        });
        while tasks.try_join_next().is_some() {}
    };
    // A client that shut down its side still gets what it asked for.
    drop(replies);
    while tasks.join_next().await.is_some() {}
    outcome
}

/// The next message of a stream.
pub(crate) async fn message(reader: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Vec<u8>> {
    let length = reader.read_u16().await?;
    // Grows with what arrives: a length alone takes no memory.
    let mut octets = Vec::new();
    let n_octets = reader.take(length.into()).read_to_end(&mut octets).await?;
    if n_octets < usize::from(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(octets)
}
