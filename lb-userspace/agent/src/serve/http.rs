//! A small HTTP server, with bounds on everything that a client controls.

use std::{
    convert::Infallible,
    io::{self, Write},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http_body_util::{Either, Full};
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::{Body, Bytes, Frame, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time,
};
use tracing::debug;

/// Maximum number of connections per listener; others wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// Maximum size of a request's line and headers, in bytes: hyper's minimum.
const MAX_HEAD: usize = 8192;
/// Maximum number of headers.
const MAX_HEADERS: usize = 64;
/// Timeout of the request's head.
const HEAD: Duration = Duration::from_secs(5);
/// Timeout of a whole connection.
const WHOLE: Duration = Duration::from_secs(30);
/// Pause after a failed `accept()`, as when descriptors run out.
const PAUSE: Duration = Duration::from_millis(100);

/// Buffer of a large answer ahead of the client: this many chunks of this many bytes.
const CHUNKS: usize = 2;
const CHUNK: usize = 64 << 10;

/// An answer.
pub type Answer = Response<Either<Full<Bytes>, Chunks>>;

/// The pages of a server.
pub trait Pages: Send + Sync + 'static {
    /// Answers a GET request for a path with its query. `None` if there is no such page.
    fn get(&self, uri: &Uri) -> impl Future<Output = Option<Answer>> + Send;
}

/// A source of connections.
pub trait Accept: Send {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection to serve.
    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn next(&self) -> io::Result<Self::Stream> {
        self.accept().await.map(|(stream, _address)| stream)
    }
}

/// A body that is generated while it is sent, so that at most a few chunks are in memory.
#[derive(Debug)]
pub struct Chunks(mpsc::Receiver<Bytes>);

impl Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(|chunk| Ok(Frame::data(chunk))))
    }
}

/// Writes the body of an answer. Blocks on the client, so use it on a blocking thread. Fails when the client
/// disconnects or times out.
#[derive(Debug)]
pub struct ChunkWriter {
    chunks: mpsc::Sender<Bytes>,
    pending: Vec<u8>,
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= CHUNK {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = std::mem::take(&mut self.pending);
        if chunk.is_empty() {
            return Ok(());
        }
        self.chunks.blocking_send(chunk.into()).map_err(|_gone| io::ErrorKind::BrokenPipe.into())
    }
}

/// A large JSON answer, and the writer of its body, which ends when the writer is dropped.
#[must_use]
pub fn large_json() -> (Answer, ChunkWriter) {
    let (chunks, receiver) = mpsc::channel(CHUNKS);
    let mut answer = Response::new(Either::Right(Chunks(receiver)));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    (answer, ChunkWriter { chunks, pending: Vec::with_capacity(CHUNK) })
}

/// Builds an answer.
#[must_use]
pub fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Either::Left(Full::new(body.into())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// Builds an answer in plain text.
#[must_use]
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    answer(status, "text/plain; charset=utf-8", body)
}

/// Serves a listener until the future is dropped. One request per connection: clients ask rarely, and an idle
/// connection would take a place from others.
pub async fn serve(listener: impl Accept, pages: Arc<impl Pages>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        while connections.try_join_next().is_some() {}
        let stream = match listener.next().await {
            Ok(stream) => stream,
            Err(error) => {
                debug!(%error, "cannot accept a connection");
                time::sleep(PAUSE).await;
                continue;
            }
        };
        let pages = Arc::clone(&pages);
        connections.spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let pages = Arc::clone(&pages);
                async move { Ok::<_, Infallible>(respond(&*pages, request.method(), request.uri()).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(MAX_HEAD)
                .max_headers(MAX_HEADERS)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // Only the client needs to see a connection's errors.
            let _closed = time::timeout(WHOLE, connection).await;
            drop(place);
        });
    }
}

/// The answer to a request: 405 for methods other than GET and HEAD, 404 for an unknown page.
async fn respond(pages: &impl Pages, method: &Method, uri: &Uri) -> Answer {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    let found = pages.get(uri).await;
    found.unwrap_or_else(|| text(StatusCode::NOT_FOUND, "not found\n"))
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    /// A server's answer for a page, with the head.
    pub(crate) async fn get(server: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(server).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    struct One;

    impl Pages for One {
        async fn get(&self, uri: &Uri) -> Option<Answer> {
            (uri.path() == "/one").then(|| text(StatusCode::OK, "1\n"))
        }
    }

    /// Sends bytes and reads until the server closes. An error counts as the end: a server that has not read
    /// everything may reset the connection.
    async fn exchange(listener: &TcpStream, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(listener.peer_addr().unwrap()).await.unwrap();
        let _closed_meanwhile = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[tokio::test]
    async fn requests_are_answered_or_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, Arc::new(One)));
        let probe = TcpStream::connect(address).await.unwrap();
        let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(2 * MAX_HEAD));
        let many = format!("GET /one HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(2 * MAX_HEADERS));
        for (request, status) in [
            ("GET /one HTTP/1.1\r\nHost: x\r\n\r\n", "200"),
            ("GET /one?a=b HTTP/1.0\r\n\r\n", "200"),
            ("GET /two HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
            ("GET /one/ HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
            ("POST /one HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n", "405"),
            ("DELETE /two HTTP/1.1\r\nHost: x\r\n\r\n", "405"),
            (&long, "414"),
            (&many, "431"),
            ("nonsense\r\n\r\n", "400"),
        ] {
            let answer = exchange(&probe, request.as_bytes()).await;
            let expected = format!("HTTP/1.1 {status} ");
            // A parser may refuse with another code of the same class.
            let is_refused = status == "414" && answer.starts_with("HTTP/1.1 4");
            let is_old = answer.starts_with(&format!("HTTP/1.0 {status} "));
            assert!(answer.starts_with(&expected) || is_refused || is_old, "{status}: {answer}");
        }
        let head = exchange(&probe, b"HEAD /one HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
        server.abort();
    }

    /// Silent clients occupy all places and no more. A later client is served once one of them disconnects.
    #[tokio::test]
    async fn silent_clients_take_a_bounded_number_of_places() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, Arc::new(One)));
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS + 8 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut late = TcpStream::connect(address).await.unwrap();
        late.write_all(b"GET /one HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        drop(silent);
        let mut answer = String::new();
        late.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        server.abort();
    }
}
