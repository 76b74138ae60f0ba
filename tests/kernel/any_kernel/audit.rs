//! Maps that another program has changed, and the audit that repairs them.

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData},
};
use lb_core::{
    desired::FrontendAddress,
    model::Protocol::{Tcp, Udp},
    plan::audit::Faults,
    tables::Image,
};
use lb_kernel::{Findings, Maps, Repaired};
use lb_tests::{
    Sandbox,
    agent::Agent,
    client::{Domain, call},
    cluster::{self, Cluster},
    server::Servers,
};
use nix::errno::Errno;

use crate::fixture::{addresses, service_address};

/// Address, port in host order, protocol number, zero: see `FrontendKey4`.
fn key4(address: SocketAddr, protocol: u8) -> [u8; 8] {
    let IpAddr::V4(ip) = address.ip() else { panic!("{address} is not IPv4") };
    let mut key = [0; 8];
    key[..4].copy_from_slice(&ip.octets());
    key[4..6].copy_from_slice(&address.port().to_ne_bytes());
    key[6] = protocol;
    key
}

fn pinned(sandbox: &Sandbox, name: &str) -> Map {
    Map::from_map_data(MapData::from_pin(sandbox.pin_path().join(name)).unwrap()).unwrap()
}

fn hash<K: Pod, V: Pod>(sandbox: &Sandbox, name: &str) -> HashMap<MapData, K, V> {
    pinned(sandbox, name).try_into().unwrap()
}

/// Inserts a key that refers to a frontend's entry.
fn insert4(sandbox: &Sandbox, key: [u8; 8], id: u32) {
    hash::<[u8; 8], [u8; 4]>(sandbox, "services4").insert(key, id.to_ne_bytes(), 0).unwrap();
}

fn remove4(sandbox: &Sandbox, key: [u8; 8]) {
    hash::<[u8; 8], [u8; 4]>(sandbox, "services4").remove(&key).unwrap();
}

/// Changes an entry of an array in place.
fn alter<const N: usize>(sandbox: &Sandbox, name: &str, index: u32, change: impl FnOnce(&mut [u8; N])) {
    let mut array: Array<MapData, [u8; N]> = pinned(sandbox, name).try_into().unwrap();
    let mut entry = array.get(&index, 0).unwrap();
    change(&mut entry);
    array.set(index, entry, 0).unwrap();
}

/// The findings of a comparison by another process.
fn compare(sandbox: &Sandbox, agent: &Agent) -> Findings {
    Maps::open(&sandbox.pin_path()).unwrap().compare(agent.state.image()).unwrap()
}

/// An audit, as in the agent's loop.
fn audit(sandbox: &Sandbox, agent: &mut Agent) -> Faults {
    let findings = compare(sandbox, agent);
    agent.kernel.repair(agent.state.image(), &findings).unwrap().faults
}

/// The servers and addresses of these tests.
struct Scene {
    web: SocketAddr,
    other: SocketAddr,
    web6: SocketAddr,
    servers: [SocketAddr; 2],
    server6: SocketAddr,
}

impl Scene {
    fn new() -> Self {
        let web = service_address(Domain::V4);
        Self {
            web,
            other: SocketAddr::new(web.ip(), 81),
            web6: service_address(Domain::V6),
            servers: addresses(Domain::V4, 8001),
            server6: addresses::<1>(Domain::V6, 8001)[0],
        }
    }

    /// Two services with one endpoint each, one of them IPv6, and a node.
    fn cluster(&self) -> Cluster {
        let mut cluster = Cluster::new();
        cluster.serve("web", self.web, Tcp, &self.servers[..1]);
        cluster.serve("other", self.other, Tcp, &self.servers[1..]);
        cluster.serve("web6", self.web6, Tcp, &[self.server6]);
        cluster.with([cluster::node("other-node", &[IpAddr::from([192, 0, 2, 9])])])
    }

    fn foreign(&self) -> SocketAddr {
        SocketAddr::new(self.web.ip(), 99)
    }

    fn assert_served(&self, what: &str) {
        assert_eq!(call(self.web, Tcp), Ok(self.servers[0]), "{what}");
        assert_eq!(call(self.other, Tcp), Ok(self.servers[1]), "{what}");
        assert_eq!(call(self.web6, Tcp), Ok(self.server6), "{what}");
    }
}

fn with_agent(test: impl FnOnce(&Sandbox, &mut Agent, &Scene) + Send) {
    Sandbox::test(|sandbox| {
        let scene = Scene::new();
        let _servers = Servers::tcp(scene.servers.into_iter().chain([scene.server6]));
        let mut agent = Agent::start(sandbox);
        agent.follow(&scene.cluster());
        scene.assert_served("before");
        assert!(compare(sandbox, &agent).is_empty(), "the maps are unchanged");
        test(sandbox, &mut agent, &scene);
    });
}

/// An agent whose maps are damaged, and their former content.
struct Victim<'a> {
    sandbox: &'a Sandbox,
    agent: &'a mut Agent,
    scene: &'a Scene,
    image: Image,
}

impl Victim<'_> {
    /// The key of the tested service, and the entries of it and of the other service.
    fn web(&self) -> ([u8; 8], u32, u32) {
        let id = |address: SocketAddr| {
            let address = FrontendAddress { ip: address.ip(), port: address.port(), protocol: Tcp };
            self.image.services[&address]
        };
        (key4(self.scene.web, 6), id(self.scene.web), id(self.scene.other))
    }

    /// Damages the maps, checks the effect on calls of the service, and audits.
    fn check(
        &mut self,
        what: &str,
        damage: impl FnOnce(),
        effect: Result<SocketAddr, Errno>,
        counts: &[(&'static str, u64)],
    ) {
        damage();
        assert_eq!(call(self.scene.web, Tcp), effect, "{what}");
        assert_eq!(audit(self.sandbox, self.agent), counts.iter().copied().collect(), "{what}");
        assert_eq!(self.agent.image(), self.image, "{what}");
        self.scene.assert_served(what);
        assert_eq!(call(self.scene.foreign(), Tcp), Err(Errno::ENETUNREACH), "{what}");
        assert_eq!(audit(self.sandbox, self.agent), Faults::new(), "{what}: nothing is left");
        assert!(self.agent.state.sync().is_empty(), "{what}: the state has nothing to add");
    }
}

fn with_victim(test: impl FnOnce(&mut Victim<'_>, &Sandbox, &Scene) + Send) {
    with_agent(|sandbox, agent, scene| {
        let image = agent.image();
        test(&mut Victim { sandbox, agent, scene, image }, sandbox, scene);
    });
}

#[test]
fn keys_are_repaired_and_counted() {
    with_victim(|victim, sandbox, scene| {
        let (key, web, other) = victim.web();
        let (untouched, as_ever) = (Err(Errno::ENETUNREACH), Ok(scene.servers[0]));
        let one = [("services4", 1)];
        victim.check("a deleted frontend", || remove4(sandbox, key), untouched, &one);
        victim.check("another's frontend", || insert4(sandbox, key, other), Ok(scene.servers[1]), &one);
        let of_another_protocol = key4(scene.web, 132);
        victim.check("no call's key", || insert4(sandbox, of_another_protocol, web), as_ever, &one);
        let foreign = || {
            insert4(sandbox, key4(scene.foreign(), 6), web);
            assert_eq!(call(scene.foreign(), Tcp), Ok(scene.servers[0]));
        };
        victim.check("a foreign frontend", foreign, as_ever, &one);
        let deleted6 = || {
            let mut services6 = hash::<[u8; 20], [u8; 4]>(sandbox, "services6");
            let keys: Vec<_> = services6.keys().map(Result::unwrap).collect();
            services6.remove(&keys[0]).unwrap();
            assert_eq!(call(scene.web6, Tcp), Err(Errno::ENETUNREACH));
        };
        victim.check("a deleted frontend of IPv6", deleted6, as_ever, &[("services6", 1)]);
        let node = |last: u8| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, last];
        let nodes = || hash::<[u8; 16], [u8; 4]>(sandbox, "node_addrs");
        let gone = || nodes().remove(&node(9)).unwrap();
        victim.check("a deleted node address", gone, as_ever, &[("node_addrs", 1)]);
        let own = || {
            nodes().insert(node(9), 1u32.to_ne_bytes(), 0).unwrap();
            nodes().insert(node(8), 1u32.to_ne_bytes(), 0).unwrap();
        };
        victim.check("a node that became this one, and a foreign one", own, as_ever, &[("node_addrs", 2)]);
        let by_hand = || {
            let done = Command::new("bpftool")
                .args(["map", "delete", "pinned"])
                .arg(sandbox.pin_path().join("services4"))
                .arg("key")
                .args(key.map(|octet| octet.to_string()))
                .status();
            // Without bpftool the change is made by other means.
            if !done.is_ok_and(|status| status.success()) {
                remove4(sandbox, key);
            }
        };
        victim.check("a hand with bpftool", by_hand, untouched, &one);
    });
}

#[test]
fn entries_and_endpoints_are_repaired_and_counted() {
    with_victim(|victim, sandbox, scene| {
        let (key, web, other) = victim.web();
        let runs = [web, other].map(|id| victim.image.frontends[&id].run.offset);
        let of_ipv6 = *victim.image.runs6.keys().next().unwrap();
        let (as_the_other, as_ever) = (Ok(scene.servers[1]), Ok(scene.servers[0]));
        let emptied = || alter::<24>(sandbox, "frontends", web, |entry| entry[4..8].fill(0));
        victim.check("no endpoints", emptied, Err(Errno::ECONNREFUSED), &[("frontends", 1)]);
        let mangled = || {
            alter::<24>(sandbox, "frontends", web, |entry| {
                entry[..4].copy_from_slice(&runs[1].to_ne_bytes());
                (entry[12], entry[20]) = (7, 7);
            });
        };
        victim.check("another's run, and other words", mangled, as_the_other, &[("frontends", 1)]);
        let led_astray = || {
            alter::<12>(sandbox, "endpoints4", runs[0], |entry| {
                entry[4..6].copy_from_slice(&scene.servers[1].port().to_ne_bytes());
            });
        };
        victim.check("an altered endpoint", led_astray, as_the_other, &[("endpoints4", 1)]);
        let wiped6 = || {
            alter::<24>(sandbox, "endpoints6", of_ipv6, |entry| entry.fill(0));
            assert!(call(scene.web6, Tcp).is_err());
        };
        victim.check("a wiped endpoint of IPv6", wiped6, as_ever, &[("endpoints6", 1)]);
        let nobodys = || {
            alter::<24>(sandbox, "frontends", 200, |entry| entry.fill(1));
            alter::<12>(sandbox, "endpoints4", 2000, |entry| entry.fill(1));
        };
        victim.check("entries that no call reads", nobodys, as_ever, &[]);
        let everything = || {
            remove4(sandbox, key);
            remove4(sandbox, key4(scene.other, 6));
            insert4(sandbox, key4(scene.foreign(), 17), web);
            alter::<24>(sandbox, "frontends", web, |entry| entry.fill(0));
            alter::<12>(sandbox, "endpoints4", runs[0], |entry| entry.fill(0));
        };
        let counts = [("services4", 3), ("frontends", 1), ("endpoints4", 1)];
        victim.check("everything at once", everything, Err(Errno::ENETUNREACH), &counts);
    });
}

/// Changes of plans between comparison and repair are not faults, and deleted entries stay deleted.
#[test]
fn changes_under_way_are_no_faults() {
    with_agent(|sandbox, agent, scene| {
        let mut cluster = scene.cluster();
        for round in 0..20 {
            // Compares with the image before the change, as a slow comparison would.
            let old = agent.state.image().clone();
            let endpoints = &scene.servers[round % 2..=round % 2];
            cluster.serve("web", scene.web, Tcp, endpoints);
            if round % 3 == 0 {
                cluster.serve("extra", SocketAddr::new(scene.web.ip(), 82), Udp, endpoints);
            } else {
                cluster.services.retain(|(_, name), _| name != "extra");
            }
            agent.follow(&cluster);
            let findings = Maps::open(&sandbox.pin_path()).unwrap().compare(&old).unwrap();
            assert_eq!(findings.is_empty(), old == *agent.state.image());
            assert_eq!(agent.kernel.repair(agent.state.image(), &findings).unwrap(), Repaired::default());
            assert_eq!(agent.image(), *agent.state.image());
            assert_eq!(call(scene.web, Tcp), Ok(endpoints[0]));
        }
    });
}

/// Fills a map with foreign keys. Returns how many fit.
fn fill<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>, value: V, key: impl Fn(u32) -> K) -> u64 {
    let n_foreign = (0..=u32::MAX).find(|n| map.insert(key(*n), value, 0).is_err()).unwrap();
    assert!(n_foreign > 100, "{n_foreign} foreign keys fit");
    n_foreign.into()
}

/// A key of a port without service.
fn foreign4(scene: &Scene, n: u32) -> [u8; 8] {
    key4(SocketAddr::new(scene.web.ip(), u16::try_from(1000 + n).unwrap()), 6)
}

/// Foreign keys that fill the map are removed for the missing ones.
#[test]
fn a_table_filled_by_a_stranger_is_repaired() {
    with_agent(|sandbox, agent, scene| {
        let image = agent.image();
        let mut services4 = hash::<[u8; 8], [u8; 4]>(sandbox, "services4");
        services4.remove(&key4(scene.web, 6)).unwrap();
        let n_foreign = fill(&mut services4, 0u32.to_ne_bytes(), |n| foreign4(scene, n));
        assert_eq!(audit(sandbox, agent), Faults::from([("services4", n_foreign + 1)]));
        assert_eq!(agent.image(), image);
        scene.assert_served("after");
    });
}

/// Then only what is new waits for the next audit.
#[test]
fn a_table_filled_by_a_stranger_keeps_out_what_is_new_alone() {
    with_agent(|sandbox, agent, scene| {
        let node = |n: u32| [n.to_ne_bytes(); 4].concat().try_into().unwrap();
        let mut services4 = hash::<[u8; 8], [u8; 4]>(sandbox, "services4");
        let mut node_addrs = hash::<[u8; 16], [u8; 4]>(sandbox, "node_addrs");
        let n_foreign = [
            fill(&mut services4, 0u32.to_ne_bytes(), |n| foreign4(scene, n)),
            fill(&mut node_addrs, 1u32.to_ne_bytes(), node),
        ];
        let mut cluster = scene.cluster();
        let new = SocketAddr::new(scene.web.ip(), 82);
        cluster.serve("new", new, Tcp, &scene.servers[..1]);
        cluster.serve("other", scene.other, Tcp, &scene.servers[..1]);
        cluster.set(cluster::node("new-node", &[IpAddr::from([192, 0, 2, 10])]));
        agent.follow(&cluster);
        assert_eq!(call(new, Tcp), Err(Errno::ENETUNREACH));
        assert_eq!(call(scene.other, Tcp), Ok(scene.servers[0]), "changes are followed");
        assert_eq!(call(scene.web6, Tcp), Ok(scene.server6));
        let issues: Vec<String> = agent.state.issues().map(|issue| issue.to_string()).collect();
        assert!(
            issues.len() == 2
                && issues[0].starts_with("Service default/new: map services4 is full")
                && issues[1].starts_with("Node new-node: map node_addrs is full"),
            "{issues:?}"
        );
        assert_eq!(agent.state.n_refused(), 2);

        let findings = compare(sandbox, agent);
        let Repaired { faults, no_room } = agent.kernel.repair(agent.state.image(), &findings).unwrap();
        let counts = [("services4", n_foreign[0] + 1), ("node_addrs", n_foreign[1] + 1)];
        assert_eq!((faults, no_room.is_empty()), (Faults::from(counts), true));
        agent.state.found(no_room);
        assert_eq!((agent.state.n_refused(), agent.state.issues().count()), (0, 0));
        assert_eq!(call(new, Tcp), Ok(scene.servers[0]));
        assert_eq!(agent.image(), *agent.state.image());
    });
}
