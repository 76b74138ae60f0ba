//! Calls while the maps change: none fails, and none reaches a wrong endpoint.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use lb_core::{
    model::Protocol::{self, Tcp, Udp},
    plan::Capacity,
};
use lb_kernel::Options;
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket, call},
    cluster::Cluster,
    server::Servers,
};
use nix::errno::Errno;

use crate::fixture::{self, addresses, service_address};

/// Threads that call.
const N_CALLERS: usize = 8;

/// The generations of the maps that a call may have seen: from the last one complete when it began, to the
/// last one begun when it returned.
pub(crate) type Window = RangeInclusive<usize>;

pub(crate) struct Load {
    pub(crate) n_calls: usize,
    /// Changes, spread evenly over the calls.
    pub(crate) n_changes: usize,
}

impl Load {
    /// Calls on eight threads while this thread changes the maps. Generation 0 is their initial content;
    /// `change(n)` makes generation n.
    ///
    /// Panics on the first call whose answer is not `allowed` for its window.
    pub(crate) fn run<A: Debug + Clone + Send>(
        &self,
        mut change: impl FnMut(usize),
        call: impl Fn(usize) -> A + Sync,
        is_allowed: impl Fn(Window, A) -> bool + Sync,
    ) {
        let (begun, complete, n_done) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let failure: Mutex<Option<String>> = Mutex::new(None);
        let has_failed = || failure.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        thread::scope(|scope| {
            for thread in 0..N_CALLERS {
                let (begun, complete, n_done) = (&begun, &complete, &n_done);
                let (call, is_allowed, failure, has_failed) = (&call, &is_allowed, &failure, &has_failed);
                scope.spawn(move || {
                    let _panicked = Told(failure);
                    for _ in 0..self.n_calls / N_CALLERS {
                        let first = complete.load(SeqCst);
                        let answer = call(thread);
                        let window = first..=begun.load(SeqCst);
                        if !is_allowed(window.clone(), answer.clone()) {
                            let text = format!("generations {window:?} do not allow {answer:?}");
                            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
                        }
                        n_done.fetch_add(1, SeqCst);
                        if has_failed() {
                            return;
                        }
                    }
                });
            }
            for generation in 1..=self.n_changes {
                let due = generation * (self.n_calls / (self.n_changes + 1));
                while n_done.load(SeqCst) < due && !has_failed() {
                    thread::yield_now();
                }
                begun.store(generation, SeqCst);
                change(generation);
                complete.store(generation, SeqCst);
            }
        });
        if let Some(failure) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            panic!("{failure}");
        }
    }
}

/// Notifies the other threads that this one panicked: they would wait for its calls.
struct Told<'a>(&'a Mutex<Option<String>>);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some("a caller panicked".to_owned());
        }
    }
}

/// The endpoints of a generation: three out of thirty, different in each.
fn three_of(servers: &[SocketAddr], generation: usize) -> &[SocketAddr] {
    let first = generation * 3 % servers.len();
    &servers[first..first + 3]
}

/// Capacity for the runs of a thousand generations, however long grace periods take.
fn start(sandbox: &Sandbox) -> Agent {
    let capacity = Capacity { services: 256, endpoints: 16_384 };
    fixture::start(&Options { capacity, ..agent::options(sandbox) })
}

/// Local addresses of the sandbox. The kernel uses each as the source of calls to itself, so the local
/// address of a socket names its endpoint.
fn own_addresses(sandbox: &Sandbox, network: u8, n: u8) -> Vec<SocketAddr> {
    let ips: Vec<IpAddr> = (1..=n).map(|host| IpAddr::from([10, 1, network, host])).collect();
    sandbox.own(ips.iter().copied());
    ips.into_iter().map(|ip| SocketAddr::new(ip, 53)).collect()
}

/// Connects a datagram socket and returns its endpoint, without an answer.
fn target_of(service: SocketAddr) -> Result<SocketAddr, Errno> {
    let socket = Socket::new(Domain::of(service.ip()), Udp);
    socket.connect(service)?;
    Ok(SocketAddr::new(socket.local_address()?.ip(), 53))
}

/// Calls a service whose endpoints change a thousand times. Each call reaches an endpoint of its time.
fn follow_a_thousand_changes(
    sandbox: &Sandbox,
    protocol: Protocol,
    servers: &[SocketAddr],
    n_calls: usize,
    call: impl Fn(SocketAddr) -> Result<SocketAddr, Errno> + Sync,
) {
    let service = service_address(Domain::V4);
    let mut agent = start(sandbox);
    let mut change = |generation| {
        let endpoints = three_of(servers, generation);
        agent.follow(&Cluster::new().serving("web", service, protocol, endpoints));
    };
    change(0);
    Load { n_calls, n_changes: 1000 }.run(
        change,
        |_thread| call(service),
        |mut window, answer| {
            let is_of = |server| window.any(|generation| three_of(servers, generation).contains(&server));
            answer.is_ok_and(is_of)
        },
    );
}

#[test]
fn tcp_connects_follow_the_endpoints_through_a_thousand_changes() {
    Sandbox::test(|sandbox| {
        let servers: [SocketAddr; 30] = addresses(Domain::V4, 8001);
        let _servers = Servers::tcp(servers);
        follow_a_thousand_changes(sandbox, Tcp, &servers, 10_000, |service| call(service, Tcp));
    });
}

#[test]
fn udp_connects_follow_the_endpoints_through_a_thousand_changes() {
    Sandbox::test(|sandbox| {
        let servers = own_addresses(sandbox, 0, 30);
        follow_a_thousand_changes(sandbox, Udp, &servers, 100_000, target_of);
    });
}

/// Two services change in each plan, and a third is created or deleted, so that ids, runs and keys are reused
/// constantly. No call ever reaches another service's endpoint.
#[test]
fn services_that_change_together_keep_apart() {
    Sandbox::test(|sandbox| {
        let services = [1, 2, 3].map(|host| SocketAddr::new(IpAddr::from([10, 96, 0, host]), 53));
        let servers = [0, 1, 2].map(|network| own_addresses(sandbox, network, 30));
        let comes_and_goes = |service: usize, generation: usize| service == 2 && generation % 2 == 1;
        let mut agent = start(sandbox);
        let mut change = |generation| {
            let mut cluster = Cluster::new();
            for (n, (service, servers)) in services.iter().zip(&servers).enumerate() {
                if !comes_and_goes(n, generation) {
                    cluster.serve(&format!("service-{n}"), *service, Udp, three_of(servers, generation));
                }
            }
            agent.follow(&cluster);
        };
        change(0);
        Load { n_calls: 30_000, n_changes: 300 }.run(
            change,
            |thread| (thread % 3, target_of(services[thread % 3])),
            |mut window, (n, target)| match target {
                Ok(target) => window.any(|generation| {
                    !comes_and_goes(n, generation) && three_of(&servers[n], generation).contains(&target)
                }),
                Err(Errno::ENETUNREACH) => window.any(|generation| comes_and_goes(n, generation)),
                Err(_) => false,
            },
        );
    });
}

#[test]
fn calls_are_spread_evenly() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let servers = own_addresses(sandbox, 0, 3);
        let mut agent = Agent::start(sandbox);
        agent.follow(&Cluster::new().serving("dns", service, Udp, &servers));
        let n_calls: u32 = 30_000;
        let mut shares: BTreeMap<SocketAddr, u32> = BTreeMap::new();
        for _ in 0..n_calls {
            *shares.entry(target_of(service).unwrap()).or_default() += 1;
        }
        // A tenth of a share is twelve standard deviations.
        let share = n_calls / 3;
        assert_eq!(shares.len(), 3, "{shares:?}");
        assert!(shares.values().all(|n| n.abs_diff(share) < share / 10), "{shares:?}");
    });
}
