//! `healthCheckNodePort`: health checks of external load balancers
//! (`pkg/proxy/healthcheck/service_health.go`).

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use hyper::{Uri, header::HeaderValue};
use lb_core::{
    desired::health::HealthCheck,
    model::{Family, Issue, IssueKind, ObjectRef, ServiceKey, address::family},
};
use serde::Serialize;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::watch,
    task::JoinHandle,
    time,
};
use tracing::info;

use super::{
    http::{Answer, Pages, serve},
    pages::json,
};
use crate::telemetry::health::Vitals;

/// Time between two tries to open a port that is in use.
const RETRY: Duration = Duration::from_secs(5);

/// The desired ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthChecks {
    /// The services with a health check port.
    pub checks: BTreeMap<ServiceKey, HealthCheck>,
    /// The addresses of node ports; `None` for all addresses of the host.
    pub addresses: Option<Vec<IpAddr>>,
}

type PortSocket = (ServiceKey, SocketAddr);

impl HealthChecks {
    /// The sockets to open, each with its number of ready local endpoints.
    fn places(&self) -> BTreeMap<PortSocket, usize> {
        let everywhere = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let addresses = self.addresses.as_deref().unwrap_or(&everywhere);
        let of = |(key, check): (&ServiceKey, &HealthCheck)| {
            let of_family = |ip: &IpAddr| {
                let n_ready_local = *check.n_ready_local.get(&family(*ip))?;
                Some(((key.clone(), SocketAddr::new(*ip, check.port)), n_ready_local))
            };
            addresses.iter().filter_map(of_family).collect::<Vec<_>>()
        };
        self.checks.iter().flat_map(of).collect()
    }
}

/// An open socket. Use [`Server::close`] to stop it, which waits until the port is free.
#[derive(Debug)]
struct Server {
    task: JoinHandle<()>,
    n_ready_local: Arc<AtomicUsize>,
}

impl Server {
    async fn close(self) {
        self.task.abort();
        // The expected result of an abort.
        let _aborted = self.task.await;
    }
}

/// Keeps the desired sockets open until `wanted` is closed. Ports that cannot be opened become issues and are
/// retried.
pub async fn run(
    mut wanted: watch::Receiver<HealthChecks>,
    vitals: watch::Receiver<Vitals>,
    issues: watch::Sender<Vec<Issue>>,
) {
    let mut open: BTreeMap<PortSocket, Server> = BTreeMap::new();
    loop {
        let places = wanted.borrow_and_update().places();
        let found = follow(&mut open, &places, &vitals).await;
        let is_complete = found.is_empty();
        issues.send_if_modified(|issues| {
            let differs = *issues != found;
            if differs {
                *issues = found;
            }
            differs
        });
        let changed = tokio::select! {
            changed = wanted.changed() => changed,
            () = time::sleep(RETRY), if !is_complete => Ok(()),
        };
        if changed.is_err() {
            break;
        }
    }
    for server in open.into_values() {
        server.close().await;
    }
}

/// Closes, opens and updates sockets. Returns an issue for each that cannot be opened.
async fn follow(
    open: &mut BTreeMap<PortSocket, Server>,
    places: &BTreeMap<PortSocket, usize>,
    vitals: &watch::Receiver<Vitals>,
) -> Vec<Issue> {
    // Close first: another service may want the port.
    let gone: Vec<PortSocket> = open.keys().filter(|place| !places.contains_key(*place)).cloned().collect();
    for place in gone {
        if let Some(server) = open.remove(&place) {
            server.close().await;
            info!(service = %place.0, address = %place.1, "stopped answering health checks");
        }
    }
    let mut issues = Vec::new();
    for (place, &n_ready_local) in places {
        if let Some(server) = open.get(place) {
            server.n_ready_local.store(n_ready_local, Ordering::Relaxed);
            continue;
        }
        let (key, address) = place;
        match bind(*address) {
            Ok(listener) => {
                let n_ready_local = Arc::new(AtomicUsize::new(n_ready_local));
                let pages = ServicePages {
                    key: key.clone(),
                    n_ready_local: Arc::clone(&n_ready_local),
                    vitals: vitals.clone(),
                };
                let task = tokio::spawn(serve(listener, Arc::new(pages)));
                open.insert(place.clone(), Server { task, n_ready_local });
                info!(service = %key, %address, "answering health checks");
            }
            Err(error) => {
                let kind = IssueKind::HealthCheckPortTaken { port: address.port(), cause: error.to_string() };
                let issue = Issue::new(ObjectRef::from(key), kind);
                // Not once more for the other family.
                if !issues.contains(&issue) {
                    issues.push(issue);
                }
            }
        }
    }
    issues
}

/// Listens for one family.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match family(address.ip()) {
        Family::V4 => TcpSocket::new_v4()?,
        Family::V6 => {
            let socket = TcpSocket::new_v6()?;
            SockRef::from(&socket).set_only_v6(true)?;
            socket
        }
    };
    // As `TcpListener::bind`.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}

/// The page of a service, the same at every path.
#[derive(Debug)]
struct ServicePages {
    key: ServiceKey,
    n_ready_local: Arc<AtomicUsize>,
    vitals: watch::Receiver<Vitals>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: Name<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

impl Pages for ServicePages {
    async fn get(&self, _uri: &Uri) -> Option<Answer> {
        let is_alive = self.vitals.borrow().evaluate(Instant::now(), SystemTime::now()).is_alive;
        let n_ready_local = self.n_ready_local.load(Ordering::Relaxed);
        let body = Body {
            service: Name { namespace: &self.key.namespace, name: &self.key.name },
            local_endpoints: n_ready_local,
            service_proxy_healthy: is_alive,
        };
        // Names, a number and a bool always serialise.
        let body = serde_json::to_string(&body).unwrap_or_default();
        let mut answer = json(is_alive && n_ready_local > 0, body);
        answer.headers_mut().insert("x-load-balancing-endpoint-weight", HeaderValue::from(n_ready_local));
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[test]
    fn a_service_has_a_socket_on_every_address_that_is_wanted() {
        let key = ServiceKey::new("default", "web");
        let both = BTreeMap::from([(Family::V4, 2), (Family::V6, 1)]);
        let one = BTreeMap::from([(Family::V4, 2)]);
        let ip: IpAddr = "192.0.2.1".parse().unwrap();
        for (n_ready_local, addresses, expected) in [
            (&both, None, vec!["0.0.0.0:31000 2", "[::]:31000 1"]),
            (&one, None, vec!["0.0.0.0:31000 2"]),
            (&both, Some(vec![]), vec![]),
            (&both, Some(vec![ip]), vec!["192.0.2.1:31000 2"]),
        ] {
            let check = HealthCheck { port: 31000, n_ready_local: n_ready_local.clone() };
            let wanted = HealthChecks { checks: BTreeMap::from([(key.clone(), check)]), addresses };
            let places: Vec<String> =
                wanted.places().into_iter().map(|((_, address), n)| format!("{address} {n}")).collect();
            assert_eq!(places, expected);
        }
    }

    #[tokio::test]
    async fn the_answer_is_that_of_kube_proxy() {
        let now = Instant::now();
        let late = now.checked_sub(2 * crate::telemetry::health::PATIENCE);
        for (n_ready_local, waiting_since, status) in [(2, None, 200), (0, None, 503), (2, late, 503)] {
            let vitals = Vitals { waiting_since, ..Vitals::new(now) };
            let (_sender, vitals) = watch::channel(vitals);
            let pages = ServicePages {
                key: ServiceKey::new("default", "web"),
                n_ready_local: Arc::new(AtomicUsize::new(n_ready_local)),
                vitals,
            };
            let answer = pages.get(&Uri::from_static("/anything")).await.unwrap();
            assert_eq!(
                answer.status(),
                if waiting_since.is_some() || n_ready_local == 0 { 503 } else { status }
            );
            assert_eq!(answer.headers()["x-load-balancing-endpoint-weight"], n_ready_local.to_string());
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let is_alive = waiting_since.is_none();
            let expected = serde_json::json!({
                "service": {"namespace": "default", "name": "web"},
                "localEndpoints": n_ready_local,
                "serviceProxyHealthy": is_alive,
            });
            assert_eq!(body, expected);
        }
    }

    /// A port is in use by another program, is opened, moves to another service, and is free again.
    #[tokio::test]
    async fn ports_are_opened_closed_and_reported() {
        let stranger = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = stranger.local_addr().unwrap().port();
        let (_sender, vitals) = watch::channel(Vitals::new(Instant::now()));
        let places = |name: &str, n: usize| {
            let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
            BTreeMap::from([((ServiceKey::new("default", name), address), n)])
        };
        let mut open = BTreeMap::new();
        let issues = follow(&mut open, &places("a", 1), &vitals).await;
        assert_eq!((issues.len(), open.len()), (1, 0));
        assert!(
            issues[0]
                .to_string()
                .contains(&format!("default/a: spec.healthCheckNodePort: cannot listen on port {port}: ")),
            "{}",
            issues[0]
        );

        drop(stranger);
        assert_eq!(follow(&mut open, &places("a", 1), &vitals).await, []);
        assert_eq!(follow(&mut open, &places("a", 7), &vitals).await, []);
        assert_eq!(open.values().next().unwrap().n_ready_local.load(Ordering::Relaxed), 7);
        assert_eq!(
            follow(&mut open, &places("b", 1), &vitals).await,
            [],
            "the port is free for another service"
        );
        assert_eq!(follow(&mut open, &BTreeMap::new(), &vitals).await, []);
        assert!(TcpListener::bind(("127.0.0.1", port)).await.is_ok(), "and for another program");
    }
}
