//! Passive health on a network that fails: packets are lost, and nothing but dead endpoints is ejected.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead as _, BufReader},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use lb_common::layout::EndpointHealth;
use lb_core::model::Protocol;
use lb_tests::{
    Feature, Sandbox,
    agent::Agent,
    cluster::Cluster,
    command::{SetOnDrop, text},
    installed::eventually,
    netns::NetNs,
    server::Servers,
};

use crate::town::{Town, web};

/// The port of the servers.
const PORT: u16 = 8001;

/// A node with pods that serve one service; and two further pods that call it.
struct Place<'a> {
    node: &'a NetNs,
    town: Town,
    agent: Agent,
    _servers: Vec<Servers>,
}

impl<'a> Place<'a> {
    const N_SERVERS: usize = 3;

    fn test(test: impl FnOnce(&Place<'_>) + Send) {
        Sandbox::test_with(&[Feature::Command("nft")], |sandbox| test(&Place::new(sandbox)));
    }

    fn new(sandbox: &'a Sandbox) -> Self {
        let town = Town::new(sandbox, 5);
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        for pod in &town.pods {
            let gateway = pod.gateways[0].to_string();
            pod.netns.run(|| text("ip", &["route", "add", "10.244.0.0/16", "via", &gateway]));
        }
        let serving = &town.pods[..Self::N_SERVERS];
        let endpoints: Vec<_> = serving.iter().map(|pod| SocketAddr::new(pod.ips[0], PORT)).collect();
        let servers = serving.iter().zip(&endpoints);
        let servers = servers.map(|(pod, endpoint)| pod.netns.run(|| Servers::tcp([*endpoint])));
        let servers = servers.collect();
        let mut agent = Agent::start(sandbox);
        agent.follow(&Cluster::new().serving("web", web()[0], Protocol::Tcp, &endpoints));
        Self { node: sandbox.netns(), town, agent, _servers: servers }
    }

    /// The health of each endpoint, and how many calls were sent there.
    fn endpoints(&self) -> Vec<(EndpointHealth, u64)> {
        let (image, observations) = (self.agent.image(), self.agent.kernel.observations());
        let ids = image.reachable().map(|entry| entry.endpoint_id);
        ids.map(|id| (observations.endpoint_health(id), observations.endpoint_stats(id).connects)).collect()
    }

    /// Checks that each endpoint gets at least 90 % of its share of the calls, and that none is ejected then.
    fn shares_are_kept<R>(&self, calls: impl FnOnce() -> R) -> R {
        let before = self.endpoints();
        let result = calls();
        let after = self.endpoints();
        let n: Vec<u64> = after.iter().zip(&before).map(|((_, after), (_, before))| after - before).collect();
        let sum: u64 = n.iter().sum();
        assert!(sum >= MANY as u64 && n.len() == Self::N_SERVERS, "{n:?}");
        assert!(n.iter().all(|n| n * 30 >= sum * 9), "{n:?} {after:#?}");
        assert!(after.iter().all(|(health, _)| health.ejected_until == 0), "{after:#?}");
        result
    }

    fn was_never_ejected(&self) {
        let endpoints = self.endpoints();
        assert!(endpoints.iter().all(|(health, _)| health.ejections == 0), "{endpoints:#?}");
    }
}

/// With fewer calls, chance alone would leave an endpoint 10 % below its share now and then.
const MANY: usize = 6000;

/// Programs that call the service.
#[derive(Clone, Copy)]
struct Clients {
    n: usize,
    pause: Duration,
    patience: Duration,
}

const STEADY: Clients = Clients { n: 40, pause: Duration::from_millis(10), patience: Duration::from_secs(2) };

impl Clients {
    /// Makes calls from a network namespace. Returns the answers.
    fn call_until(self, netns: &NetNs, is_over: impl Fn(usize) -> bool + Sync) -> Vec<io::Result<String>> {
        let n_calls = AtomicUsize::new(0);
        let client = || {
            let mut answers = Vec::new();
            while !is_over(n_calls.fetch_add(1, Relaxed)) {
                answers.push(ask(self.patience));
                thread::sleep(self.pause);
            }
            answers
        };
        netns.run(|| {
            thread::scope(|scope| {
                let clients: Vec<_> = (0..self.n).map(|_| scope.spawn(client)).collect();
                clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
            })
        })
    }

    /// Makes many calls, for at least this time.
    fn call(self, netns: &NetNs, seconds: u64) -> Vec<io::Result<String>> {
        let end = Instant::now() + Duration::from_secs(seconds);
        self.call_until(netns, |n| n > MANY && Instant::now() > end)
    }
}

/// Asks the service for the server's address.
fn ask(patience: Duration) -> io::Result<String> {
    let stream = TcpStream::connect_timeout(&web()[0], patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line)
}

/// Adds a rule for packets in the calling thread's network namespace.
fn add_rule(hook: &str, rule: &str) {
    for command in [
        "add table inet lossy",
        &format!("add chain inet lossy {hook} {{ type filter hook {hook} priority 0; }}"),
        &format!("add rule inet lossy {hook} {rule}"),
    ] {
        text("nft", &[command]);
    }
}

fn remove_rules() {
    text("nft", &["delete table inet lossy"]);
}

#[test]
fn a_tenth_of_all_packets_is_lost_and_nothing_is_ejected() {
    Place::test(|place| {
        for hook in ["input", "output"] {
            for port in ["sport", "dport"] {
                add_rule(hook, &format!("tcp {port} {PORT} numgen random mod 10 == 0 drop"));
            }
        }
        let clients = Clients { n: 300, ..STEADY };
        let answers = place.shares_are_kept(|| clients.call(place.node, 5));
        let n_late = answers.iter().filter(|answer| answer.is_err()).count();
        assert!(n_late > 0, "nothing was lost");
        place.was_never_ejected();
    });
}

#[test]
fn a_pod_whose_own_egress_is_blocked_ejects_for_no_other() {
    Place::test(|place| {
        let [.., blocked, other] = &place.town.pods[..] else { unreachable!() };
        for verdict in ["drop", "reject with tcp reset"] {
            blocked.netns.run(|| add_rule("output", &format!("tcp dport {PORT} {verdict}")));
            let is_over = AtomicBool::new(false);
            let (failed, answers) = thread::scope(|scope| {
                let failing = scope.spawn(|| STEADY.call_until(&blocked.netns, |_| is_over.load(Relaxed)));
                let stop = SetOnDrop(&is_over);
                let answers = STEADY.call(&other.netns, 4);
                drop(stop);
                (failing.join().unwrap(), answers)
            });
            assert!(failed.len() >= STEADY.n && failed.iter().all(Result::is_err), "{verdict}: {failed:?}");
            let (sum, mut shares) = (answers.len(), BTreeMap::<String, usize>::new());
            for answer in answers {
                *shares.entry(answer.unwrap()).or_default() += 1;
            }
            assert!(shares.len() == 3 && shares.values().all(|n| n * 30 >= sum * 9), "{verdict}: {shares:?}");
            place.was_never_ejected();
            blocked.netns.run(remove_rules);
        }
    });
}

/// While all endpoints are ejected, calls choose among them as if none were.
#[test]
fn a_network_that_is_lost_as_a_whole_leaves_no_endpoint_out() {
    Place::test(|place| {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stops = SetOnDrop(&is_over);
            scope.spawn(|| STEADY.call_until(place.node, |_| is_over.load(Relaxed)));
            thread::sleep(Duration::from_secs(1));
            add_rule("output", &format!("tcp dport {PORT} drop"));
            let are_ejected = |(health, _): &(EndpointHealth, u64)| health.ejected_until != 0;
            eventually("all are ejected", || place.endpoints().iter().all(are_ejected));
            remove_rules();
            // The SYNs of calls that wait are sent again.
            eventually("none is ejected", || !place.endpoints().iter().any(are_ejected));
            place.shares_are_kept(|| {
                let n_calls = || place.endpoints().iter().map(|(_, n)| *n).sum::<u64>();
                let before = n_calls();
                eventually("many calls", || n_calls() - before > MANY as u64);
            });
        });
    });
}

#[test]
fn clients_that_give_up_early_eject_nothing() {
    Place::test(|place| {
        // Longer than what ejects, if each of them waited for a retransmission.
        let slow = place.town.pods[0].ips[0];
        add_rule("output", &format!("ip daddr {slow} tcp dport {PORT} tcp flags syn drop"));
        let impatient = Clients { patience: Duration::from_millis(50), ..STEADY };
        let answers = place.shares_are_kept(|| impatient.call(place.node, 4));
        let n_failed = answers.iter().filter(|answer| answer.is_err()).count();
        assert!(n_failed > MANY / 4, "{n_failed}");
        let endpoints = place.endpoints();
        assert!(endpoints.iter().all(|(health, _)| health.failures == 0), "{endpoints:#?}");
        place.was_never_ejected();
    });
}
