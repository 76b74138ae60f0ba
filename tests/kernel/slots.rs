//! Where the records of sockets are kept, and that they come to an end.

use std::{
    fs,
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData};
use lb_common::{
    layout::{SLOT_WAYS, SocketSlots},
    limits::SOCKET_SETS,
};
use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    cluster::Cluster,
    number, require,
    server::Servers,
};
use lb_userspace::{
    controller::sweep::Reclaim,
    kernel::{
        Features, Options, pins,
        sockets::{self, SocketTable},
        syscall,
    },
    model::Protocol::{Tcp, Udp},
};
use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
};

use crate::records::{Scene, scenes};

/// A pinned array, its values as words.
fn array<const WORDS: usize>(sandbox: &Sandbox, name: &str) -> Array<MapData, [u64; WORDS]> {
    let data = MapData::from_pin(sandbox.pin_path().join(name)).unwrap();
    Map::from_map_data(data).unwrap().try_into().unwrap()
}

/// Slots that belong to a socket.
pub(crate) fn n_taken(sandbox: &Sandbox) -> usize {
    const { assert!(size_of::<SocketSlots>() == 8 * SLOT_WAYS) }
    let slots = array::<SLOT_WAYS>(sandbox, "socket_slots");
    let owners = (0..slots.len()).flat_map(|set| slots.get(&set, 0).unwrap());
    owners.filter(|owner| *owner != 0).count()
}

/// Gives all slots to sockets that are not there.
pub(crate) fn fill(options: &Options) {
    let data = MapData::from_pin(options.pin_path.join("socket_slots")).unwrap();
    let mut slots: Array<MapData, [u64; SLOT_WAYS]> = Map::from_map_data(data).unwrap().try_into().unwrap();
    for set in 0..slots.len() {
        slots.set(set, [u64::MAX; SLOT_WAYS], 0).unwrap();
    }
}

#[test]
fn a_closed_socket_gives_its_slot_up() {
    if !require(Feature::Programs) || !Features::probe().has_slots() {
        return;
    }
    Sandbox::run(|sandbox| {
        let servers = Domain::ALL.map(|domain| Scene::new(domain).endpoint);
        let _servers =
            Servers::start([servers[0], servers[1]].into_iter().flat_map(|s| [(s, Tcp), (s, Udp)]));
        let mut agent = Agent::start(sandbox);
        for protocol in [Tcp, Udp] {
            agent.follow(&scenes(protocol).0);
            let mut sockets = Vec::new();
            for domain in Domain::ALL {
                for _ in 0..20 {
                    let socket = Socket::new(domain, protocol);
                    socket.connect(Scene::new(domain).service).unwrap();
                    sockets.push(socket);
                }
            }
            assert_eq!(n_taken(sandbox), sockets.len());
            drop(sockets);
            assert_eq!(n_taken(sandbox), 0);
        }
    });
}

/// A socket that calls no service takes nothing.
#[test]
fn a_socket_without_a_service_takes_no_slot() {
    if !require(Feature::Programs) || !Features::probe().has_slots() {
        return;
    }
    Sandbox::run(|sandbox| {
        let (cluster, servers) = scenes(Udp);
        let _servers = Servers::start(servers);
        Agent::start(sandbox).follow(&cluster);
        for domain in Domain::ALL {
            let Scene { service, plain, .. } = Scene::new(domain);
            let (connected, unconnected) = (Socket::new(domain, Udp), Socket::new(domain, Udp));
            connected.connect(plain).unwrap();
            assert_eq!(connected.peer_name(), Ok(plain));
            assert_eq!(unconnected.ask_at(plain).unwrap().seen, Some(plain));
            assert_eq!(n_taken(sandbox), 0, "{domain:?}");
            connected.connect(service).unwrap();
            assert_eq!(n_taken(sandbox), 1, "{domain:?}");
        }
    });
}

/// A call that fails later, or is made again and again, takes no second slot.
#[test]
fn a_socket_has_one_slot() {
    if !require(Feature::Programs) || !Features::probe().has_slots() {
        return;
    }
    Sandbox::run(|sandbox| {
        let mut agent = Agent::start(sandbox);
        agent.follow(&scenes(Udp).0);
        let socket = Socket::new(Domain::V4, Udp);
        for _ in 0..10 {
            socket.connect(Scene::new(Domain::V4).service).unwrap();
        }
        assert_eq!(n_taken(sandbox), 1);

        agent.follow(&scenes(Tcp).0);
        let nobody_listens = Socket::new(Domain::V4, Tcp);
        for _ in 0..10 {
            assert_eq!(nobody_listens.connect(Scene::new(Domain::V4).service), Err(Errno::ECONNREFUSED));
        }
        assert_eq!(n_taken(sandbox), 2);
        drop((socket, nobody_listens));
        assert_eq!(n_taken(sandbox), 0);
    });
}

/// More live sockets than slots: none loses its record, and none takes another one's.
#[test]
fn more_sockets_than_slots_keep_their_records() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let n_sockets = SOCKET_SETS as usize * SLOT_WAYS + 2000;
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let wanted = most.max(n_sockets as u64 + 1000);
        setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).unwrap();
        let scene = Scene::new(Domain::V4);
        let _servers = Servers::udp([scene.endpoint]);
        let mut agent = Agent::start(sandbox);
        agent.follow(&scenes(Udp).0);
        let mut sockets = Vec::with_capacity(n_sockets);
        for _ in 0..n_sockets {
            let socket = Socket::new(Domain::V4, Udp);
            socket.connect(scene.service).unwrap();
            sockets.push(socket);
        }
        if Features::probe().has_slots() {
            assert!(n_taken(sandbox) <= SOCKET_SETS as usize * SLOT_WAYS);
        }
        for socket in &sockets {
            assert_eq!(socket.peer_name(), Ok(scene.service));
        }
        for socket in sockets.iter().rev().step_by(100) {
            assert_eq!(socket.ask().unwrap().seen, Some(scene.service));
        }
        drop(sockets);
        if Features::probe().has_slots() {
            assert_eq!(n_taken(sandbox), 0);
        }
    });
}

/// The hook that gives slots up is away for a while, in which sockets are closed.
#[test]
fn slots_of_sockets_that_are_gone_are_taken_back() {
    if !require(Feature::Programs) || !Features::probe().has_slots() {
        return;
    }
    Sandbox::run(|sandbox| {
        let (cluster, servers) = scenes(Udp);
        let _servers = Servers::start(servers);
        let start = || {
            let mut agent = Agent::start(sandbox);
            agent.follow(&cluster);
            agent
        };
        let scene = Scene::new(Domain::V4);
        let (agent, connected, unconnected) =
            (start(), Socket::new(Domain::V4, Udp), Socket::new(Domain::V6, Udp));
        connected.connect(scene.service).unwrap();
        let _answer = unconnected.ask_at(Scene::new(Domain::V6).service).unwrap();
        let release = sandbox.pin_path().join("sock_release");
        syscall::detach(syscall::open_pin(&release).unwrap().as_fd()).unwrap();
        fs::remove_file(&release).unwrap();
        drop(agent);
        let n_slots = SOCKET_SETS as usize * SLOT_WAYS;
        while n_taken(sandbox) <= n_slots / 2 {
            for _ in 0..1000 {
                Socket::new(Domain::V4, Udp).connect(scene.service).unwrap();
            }
        }
        let _agent = start();
        let n_before = n_taken(sandbox);
        Socket::new(Domain::V4, Udp).connect(scene.service).unwrap();
        assert_eq!(n_taken(sandbox), n_before, "slots are given up again");

        let mut table = SocketTable::open(&sandbox.pin_path()).unwrap();
        let (mut reclaim, start) = (Reclaim::default(), Instant::now());
        for (second, is_due, expected) in [(0, true, n_before), (10, false, n_before), (20, true, 2)] {
            let now = start + Duration::from_secs(second);
            assert_eq!(reclaim.wants_look(table.n_owned(), now), is_due, "{second}");
            if is_due {
                let owners = sockets::owners(&sandbox.pin_path()).unwrap();
                let owners = owners.expect("all namespaces of this machine can be entered");
                assert_eq!(owners.listed.len(), 2);
                let _n_freed = table.free(&reclaim.looked(owners, now));
            }
            assert_eq!(n_taken(sandbox), expected, "{second}");
        }
        assert!(!reclaim.wants_look(table.n_owned(), start + Duration::from_secs(60)));
        assert_eq!(connected.ask().unwrap().seen, Some(scene.service));
        assert_eq!(
            unconnected.ask_at(Scene::new(Domain::V6).service).unwrap().server,
            Scene::new(Domain::V6).endpoint
        );
    });
}

/// A restart may come with other programs, as after an update; records stay what they are.
#[test]
fn records_survive_restarts() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let (cluster, servers) = scenes(Udp);
        let _servers = Servers::start(servers);
        let options = agent::options(sandbox);
        let start = |options: &Options| {
            Agent::start_with(options, agent::settings(), Vec::new()).unwrap().follow(&cluster);
        };
        start(&options);
        let sockets = Domain::ALL.map(|domain| {
            let connected = Socket::new(domain, Udp);
            connected.connect(Scene::new(domain).service).unwrap();
            let unconnected = Socket::new(domain, Udp);
            unconnected.send_to(b"?", Scene::new(domain).service).unwrap();
            (domain, connected, unconnected)
        });
        // Diagnostics are a program of their own.
        for log in [options.features.has_slots(), false] {
            start(&Options { log, ..options.clone() });
            for (domain, connected, _) in &sockets {
                assert_eq!(connected.peer_name(), Ok(Scene::new(*domain).service));
                assert_eq!(connected.ask().unwrap().seen, Some(Scene::new(*domain).service));
            }
        }
        for (domain, _, unconnected) in &sockets {
            assert_eq!(unconnected.receive().unwrap().1, Some(Scene::new(*domain).service));
        }
    });
}

/// Connect and close as often as this in all; fewer where a CPU is emulated.
fn n_cycles() -> usize {
    number("LB_TEST_CYCLES", 1_000_000)
}

/// The memory that the kernel charges for a socket's records and cannot take back by itself, in KiB.
fn unreclaimable_kib() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("SUnreclaim:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Calls from eight threads, each socket used once and closed: TCP and UDP, connected and not, in all families.
fn connect_and_close(n_cycles: usize) {
    const N_THREADS: usize = 8;
    thread::scope(|scope| {
        for number in 0..N_THREADS {
            let _joined_by_the_scope = scope.spawn(move || {
                for cycle in 0..n_cycles / N_THREADS {
                    let domain = Domain::ALL[(number + cycle) % 3];
                    let service = Scene::new(domain).service;
                    match cycle % 16 {
                        // A TCP connection costs ten times as much as all else.
                        0 => Socket::new(domain, Tcp).connect(service).unwrap(),
                        1..4 => Socket::new(domain, Udp).send_to(b"?", service).unwrap(),
                        _ => Socket::new(domain, Udp).connect(service).unwrap(),
                    }
                }
            });
        }
    });
}

#[test]
fn a_million_sockets_leave_nothing_behind() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let (mut cluster, mut servers) = (Cluster::new(), Vec::new());
        for domain in [Domain::V4, Domain::V6] {
            let Scene { service, endpoint, .. } = Scene::new(domain);
            for protocol in [Tcp, Udp] {
                let name = format!("{protocol}-{domain:?}");
                cluster.serve(&name, service, protocol, &[endpoint]);
                servers.push((endpoint, protocol));
            }
        }
        let _servers = Servers::start(servers);
        for options in agent::modes(sandbox) {
            let mut agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            agent.follow(&cluster);
            let has_slots = options.features.has_slots();
            let before = unreclaimable_kib();
            // Socket storage is the kernel's to free: a tenth of the sockets shows whether it does.
            connect_and_close(if has_slots { n_cycles() } else { n_cycles() / 10 });
            // A program that looks through /proc, as monitoring does, keeps a socket open for a moment longer.
            for _ in 0..300 {
                if n_taken(sandbox) == 0 {
                    break;
                }
                thread::sleep(Duration::from_millis(100));
            }
            if n_taken(sandbox) > 0 {
                let table = SocketTable::open(&options.pin_path).unwrap();
                panic!("{} slots are still taken: {:?}", n_taken(sandbox), table.records());
            }
            if !has_slots {
                // A record in socket storage takes more than a KiB: those of all sockets would be 100 MiB. What the
                // rest of the machine does is less.
                let grown = unreclaimable_kib().saturating_sub(before);
                assert!(grown < 64 * 1024, "{grown} KiB are still in use");
            }
            pins::remove(&sandbox.pin_path()).unwrap();
        }
    });
}
