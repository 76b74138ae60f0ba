//! A small HTTP server for small answers, with bounds on everything that a client decides about.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet, time};
use tracing::debug;

/// Connections that are served at a time; others wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// Most bytes of a request's line and headers: the least that hyper offers.
const MAX_HEAD: usize = 8192;
/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// How long a client may take to send the head of its request.
const HEAD: Duration = Duration::from_secs(5);
/// How long a connection may take as a whole.
const WHOLE: Duration = Duration::from_secs(30);
/// Pause after a connection could not be accepted, as when descriptors run out.
const PAUSE: Duration = Duration::from_millis(100);

/// An answer.
pub type Answer = Response<Full<Bytes>>;

/// What a server answers.
pub trait Pages: Send + Sync + 'static {
    /// Answers a GET request for a path. `None` if there is no such page.
    fn get(&self, path: &str) -> impl Future<Output = Option<Answer>> + Send;
}

/// Builds an answer.
#[must_use]
pub fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// Builds an answer in plain text.
#[must_use]
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    answer(status, "text/plain; charset=utf-8", body)
}

/// Serves a listener until the future is dropped. One request to a connection: whoever asks here asks seldom, and an
/// idle connection would take a place from others.
pub async fn serve(listener: TcpListener, pages: Arc<impl Pages>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _address)) => stream,
            Err(error) => {
                debug!(%error, "a connection cannot be accepted");
                time::sleep(PAUSE).await;
                continue;
            }
        };
        let pages = Arc::clone(&pages);
        connections.spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let pages = Arc::clone(&pages);
                async move { Ok::<_, Infallible>(respond(&*pages, request.method(), request.uri().path()).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(MAX_HEAD)
                .max_headers(MAX_HEADERS)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // What goes wrong with a connection is the client's to notice.
            let _closed = time::timeout(WHOLE, connection).await;
            drop(place);
        });
    }
}

/// The answer to a request: 405 for a method that changes something, 404 for a page that is not there.
async fn respond(pages: &impl Pages, method: &Method, path: &str) -> Answer {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    let found = pages.get(path).await;
    found.unwrap_or_else(|| text(StatusCode::NOT_FOUND, "not found\n"))
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    struct One;

    impl Pages for One {
        async fn get(&self, path: &str) -> Option<Answer> {
            (path == "/one").then(|| text(StatusCode::OK, "1\n"))
        }
    }

    /// Sends bytes and reads until the server closes. An error counts as an end, since a server that has not read all may
    /// reset the connection.
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
            // A parser may refuse with another number of the same class.
            let is_refused = status == "414" && answer.starts_with("HTTP/1.1 4");
            let is_old = answer.starts_with(&format!("HTTP/1.0 {status} "));
            assert!(answer.starts_with(&expected) || is_refused || is_old, "{status}: {answer}");
        }
        let head = exchange(&probe, b"HEAD /one HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
        server.abort();
    }

    /// Clients that connect and say nothing take up all places, and no more than these; who comes then is served once
    /// one of them has gone.
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
