//! An arbitrary server in an API server's place: the agent reads a bounded part of what it sends, reports
//! that, and retries.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

use lb_agent::source::Source as _;

use crate::follower::Follower;

/// Listens, and answers each request with a head and a number of bytes `x`, which depend on the request's
/// first line.
fn answer(of: impl Fn(&str) -> (&'static str, usize) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let of = Arc::new(of);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, of) = (stream.unwrap(), Arc::clone(&of));
            thread::spawn(move || {
                let mut request = [0; 4096];
                let n_read = stream.read(&mut request).unwrap_or_default();
                let request = String::from_utf8_lossy(&request[..n_read]).into_owned();
                let (head, mut n_left) = of(request.lines().next().unwrap_or_default());
                let mut sent =
                    stream.write_all(format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n").as_bytes());
                let chunk = vec![b'x'; 1 << 20];
                while sent.is_ok() && n_left > 0 {
                    let length = n_left.min(chunk.len());
                    sent = stream.write_all(&chunk[..length]);
                    n_left -= length;
                }
            });
        }
    });
    url
}

/// Follows a server until the outage is reported with all of this.
fn until_reported(url: &str, parts: &[&str]) -> (tempfile::TempDir, Follower) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: a\nclusters: [{{name: a, cluster: {{server: '{url}'}}}}]\n\
         users: [{{name: a, user: {{}}}}]\ncontexts: [{{name: a, context: {{cluster: a, user: a}}}}]\n"
    );
    fs::write(&path, text).unwrap();
    let mut follower = Follower::with_kubeconfig(&path);
    let contact = follower.source.contact().unwrap().clone();
    follower.until("it is reported", |_| {
        contact.outage().is_some_and(|outage| parts.iter().all(|part| outage.problem.contains(part)))
    });
    (directory, follower)
}

/// A list may be as large as a cluster's, but not larger than memory.
#[test]
fn a_list_without_end_is_not_read_to_its_end() {
    let n_lists = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n_lists);
    let url = answer(move |request| {
        if request.contains("sendInitialEvents") {
            return ("400 Bad Request", 0);
        }
        if !request.contains("/services?") {
            return ("503 Service Unavailable", 0);
        }
        let _before = counted.fetch_add(1, Relaxed);
        ("200 OK", 300 << 20)
    });
    let (_directory, mut follower) = until_reported(&url, &["the list is larger than 256 MiB", &url]);
    follower.until("the agent retries", |_| n_lists.load(Relaxed) > 1);
    assert!(!follower.source.is_complete());
}

/// A line of a watch is one object.
#[test]
fn an_event_without_end_is_not_read_to_its_end() {
    until_reported(&answer(|_| ("200 OK", 40 << 20)), &["an event is larger than 32 MiB"]);
}

/// The status code of a refusal is reported, not its body.
#[test]
fn a_refusal_without_end_is_a_refusal() {
    until_reported(&answer(|_| ("403 Forbidden", 40 << 20)), &[": 403 "]);
}
