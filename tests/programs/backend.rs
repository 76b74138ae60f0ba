//! The servers behind the services.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufStream},
    net::{TcpListener, TcpStream, UdpSocket},
    runtime::{Builder, Runtime},
};

/// A web server and a name server, in the network namespace of the thread that starts them. They stop on
/// drop.
///
/// Each page names the server and the client: `10.244.1.2 for 10.244.1.1`. Every query is answered with the
/// server's own address.
pub(crate) struct Backend {
    _runtime: Runtime,
}

impl Backend {
    pub(crate) fn start(ips: [IpAddr; 2], http: u16, dns: u16) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listen = |address: SocketAddr| {
            let bound = runtime.block_on(TcpListener::bind(address));
            bound.unwrap_or_else(|error| panic!("{address}: {error}"))
        };
        for ip in ips {
            let (http, dns) = (SocketAddr::new(ip, http), SocketAddr::new(ip, dns));
            drop(runtime.spawn(accept(listen(http), serve_pages)));
            drop(runtime.spawn(accept(listen(dns), serve_queries)));
            let socket = runtime.block_on(UdpSocket::bind(dns)).unwrap();
            drop(runtime.spawn(answer_datagrams(socket, ip)));
        }
        Self { _runtime: runtime }
    }
}

async fn accept<F>(listener: TcpListener, serve: fn(TcpStream) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    while let Ok((stream, _)) = listener.accept().await {
        // It ends when the client goes away.
        drop(tokio::spawn(serve(stream)));
    }
}

async fn serve_pages(stream: TcpStream) -> io::Result<()> {
    let page = format!("{} for {}\n", stream.local_addr()?.ip(), stream.peer_addr()?.ip());
    let mut stream = BufStream::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).await? > 0 {
        // The end of a request.
        if line == "\r\n" {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", page.len());
            stream.write_all((head + &page).as_bytes()).await?;
            stream.flush().await?;
        }
        line.clear();
    }
    Ok(())
}

async fn serve_queries(mut stream: TcpStream) -> io::Result<()> {
    let ip = stream.local_addr()?.ip();
    loop {
        let mut query = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut query).await?;
        if let Some(answer) = answer(&query, ip) {
            let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
            stream.write_all(&[&len.to_be_bytes(), &*answer].concat()).await?;
        }
    }
}

async fn answer_datagrams(socket: UdpSocket, ip: IpAddr) {
    let mut query = [0; 1024];
    loop {
        let Ok((n, client)) = socket.recv_from(&mut query).await else { continue };
        if let Some(answer) = answer(&query[..n], ip) {
            let _client_went_away = socket.send_to(&answer, client).await;
        }
    }
}

/// Answers a query with one question (RFC 1035): the server's address if the question has its family, else no
/// record.
fn answer(query: &[u8], ip: IpAddr) -> Option<Vec<u8>> {
    let labels = query.get(12..)?;
    let end = 12 + labels.iter().position(|octet| *octet == 0)? + 5;
    let question = query.get(12..end)?;
    let (kind, data): (u8, Vec<u8>) = match ip {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (28, ip.octets().to_vec()),
    };
    let is_asked_for = question[question.len() - 4..] == [0, kind, 0, 1];
    // The query's id, then: an answer with authority, recursion available, one question.
    let mut answer =
        [&query[..2], &[0x85, 0x80, 0, 1, 0, u8::from(is_asked_for), 0, 0, 0, 0], question].concat();
    if is_asked_for {
        // The name of the question, type, class, TTL 0.
        answer.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 0, 0, u8::try_from(data.len()).ok()?]);
        answer.extend(data);
    }
    Some(answer)
}
