//! Pins, detaching, restarts, and error messages.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapInfo},
    programs::{
        CgroupSockAddr,
        links::{FdLink, PinnedLink},
    },
};
use lb_common::maps::{self, MAPS, Role, Size};
use lb_core::{model::Protocol::Tcp, plan::Capacity, state::State, tables::Image};
use lb_kernel::{Features, Kernel, KernelError, Maps, Options, Pins, lock::Lock, object, pins, syscall};
use lb_tests::{
    Sandbox,
    agent::{self, Agent, content},
    client::{Domain, Socket, call},
    cluster::{self, Cluster, node},
    number,
    server::Servers,
};
use nix::{
    errno::Errno,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};

use crate::{
    calls::{addresses, service_address},
    load::{Load, Window},
};

fn cluster(endpoints: &[SocketAddr]) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.serve("web", service_address(Domain::V4), Tcp, endpoints);
    cluster
}

/// The ids of the programs of the pinned links.
fn program_ids(sandbox: &Sandbox) -> Vec<u32> {
    let id = |name: &str| {
        let link = PinnedLink::from_pin(sandbox.pin_path().join(name)).unwrap();
        FdLink::from(link).info().unwrap().program_id()
    };
    pins::hooks(Features::probe()).map(|hook| id(hook.name)).collect()
}

#[test]
fn maps_and_links_are_pinned_under_their_names() {
    Sandbox::test(|sandbox| {
        let _agent = Agent::start(sandbox);
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

#[test]
fn removing_the_pins_ends_the_effect() {
    Sandbox::test(|sandbox| {
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let service = service_address(Domain::V4);
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster(&endpoints));
        let connected = Socket::new(Domain::V4, Tcp);
        connected.connect(service).unwrap();
        connected.ask().unwrap();
        drop(agent);
        assert!(call(service, Tcp).is_ok(), "it is served without an agent");

        let mut removed = pins::remove(&sandbox.pin_path()).unwrap();
        let mut wanted = Agent::pins(sandbox);
        removed.sort();
        wanted.sort();
        assert_eq!(removed, wanted);
        assert!(!sandbox.pin_path().exists());
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH));
        connected.send(b"still here").unwrap();
        assert_eq!(connected.receive().unwrap().0, b"still here");
        assert!(matches!(pins::remove(&sandbox.pin_path()), Err(KernelError::NothingPinned { .. })));
    });
}

/// Pins of other programs in the same directory are kept.
#[test]
fn only_own_pins_are_removed() {
    Sandbox::test(|sandbox| {
        let _agent = Agent::start(sandbox);
        let foreign = sandbox.pin_path().join("theirs");
        fs::create_dir(&foreign).unwrap();
        let map = syscall::open_pin(&sandbox.pin_path().join("meta")).unwrap();
        let beside =
            [sandbox.pin_path().join("their_map"), foreign.join("services4"), sandbox.bpffs().join("meta")];
        for pin in &beside {
            syscall::pin(map.as_fd(), pin).unwrap();
        }
        let removed = pins::remove(&sandbox.pin_path()).unwrap();
        assert_eq!(removed.len(), Agent::pins(sandbox).len());
        assert!(foreign.is_dir());
        for pin in &beside {
            assert!(syscall::open_pin(pin).is_ok(), "{}", pin.display());
        }
        // Remnants of a version that exited before it was complete are removed too.
        for name in ["services4", "connect4"] {
            syscall::pin(map.as_fd(), &sandbox.pin_path().join(name)).unwrap();
        }
        fs::create_dir(sandbox.pin_path().join(pins::NEXT)).unwrap();
        syscall::pin(map.as_fd(), &sandbox.pin_path().join(pins::NEXT).join("of_a_newer_layout")).unwrap();
        assert_eq!(pins::remove(&sandbox.pin_path()).unwrap().len(), 3);
    });
}

#[test]
fn a_restarted_agent_finds_everything_as_it_should_be() {
    Sandbox::test(|sandbox| {
        let cluster = cluster(&addresses::<3>(Domain::V4, 8001));
        let mut agent = Agent::start(sandbox);
        assert!(!agent.follow(&cluster).is_empty());
        let (image, programs) = (agent.image(), program_ids(sandbox));
        assert_eq!(&image, agent.state.image());
        drop(agent);

        let mut agent = Agent::start(sandbox);
        let plan = agent.follow(&cluster);
        assert!(plan.is_empty(), "{plan:?}");
        assert_eq!(agent.image(), image);
        let replaced = program_ids(sandbox);
        for (old, new) in programs.iter().zip(&replaced) {
            assert_ne!(old, new, "each link runs a new program");
        }
    });
}

#[test]
fn a_restarted_agent_takes_away_what_is_gone() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<1>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        Agent::start(sandbox).follow(&cluster(&endpoints));
        assert_eq!(call(service, Tcp), Ok(endpoints[0]));
        let mut agent = Agent::start(sandbox);
        assert_eq!(call(service, Tcp), Ok(endpoints[0]), "before the first sync");
        agent.follow(&Cluster::new());
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH));
        assert_eq!(agent.image(), lb_core::tables::Image::default());
    });
}

/// Ten restarts, each with new programs, while eight threads connect.
#[test]
fn a_restart_fails_no_call() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<3>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let cluster = cluster(&endpoints);
        Agent::start(sandbox).follow(&cluster);
        Load { n_calls: 4000, n_changes: 10 }.run(
            |_generation| {
                let plan = Agent::start(sandbox).follow(&cluster);
                assert!(plan.is_empty(), "{plan:?}");
            },
            |_thread| call(service, Tcp),
            |_: Window, answer| answer.is_ok_and(|server| endpoints.contains(&server)),
        );
    });
}

/// When an agent stops after any operation of a plan for all maps, the next one completes the change; calls
/// succeed all the time. A killed agent runs no code, so dropping one after that number of operations is
/// equivalent. `LB_FAULT_STEP=N` tests one operation in N: each costs two starts, in which an emulated CPU
/// verifies for seconds.
#[test]
fn an_end_after_any_operation_is_made_up_for() {
    Sandbox::test(|sandbox| {
        let families = [Domain::V4, Domain::V6];
        let endpoints = families.map(|domain| addresses::<4>(domain, 8001));
        let _servers = endpoints.map(Servers::tcp);
        let state = |second: bool| {
            let mut cluster = Cluster::new();
            cluster.set(node("node", &["192.0.2.1".parse().unwrap()]));
            cluster.set(node("other", &[if second { "192.0.2.3" } else { "192.0.2.2" }.parse().unwrap()]));
            for (domain, endpoints) in families.into_iter().zip(endpoints) {
                let mut address = service_address(domain);
                cluster.serve(
                    &format!("steady-{domain:?}"),
                    address,
                    Tcp,
                    &endpoints[usize::from(second)..][..3],
                );
                address.set_port(if second { 1001 } else { 1002 });
                cluster.serve(&format!("passing-{second}-{domain:?}"), address, Tcp, &endpoints);
            }
            cluster
        };
        let states = [state(false), state(true)];
        let one_in = number("LB_FAULT_STEP", 1).max(1);
        Agent::start(sandbox).follow(&states[0]);
        let stop = AtomicBool::new(false);
        let n_ops = thread::scope(|scope| {
            for (domain, endpoints) in families.into_iter().zip(endpoints) {
                let stop = &stop;
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let server = call(service_address(domain), Tcp);
                        assert!(
                            server.is_ok_and(|server| endpoints.contains(&server)),
                            "{domain:?}: {server:?}"
                        );
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            let _stops = StopOnDrop(&stop);
            let mut agent = Agent::start(sandbox);
            for n in (0..).step_by(one_in) {
                agent.follow(&states[0]);
                states[1].feed(&mut agent.state);
                let plan = agent.state.sync();
                let ops = plan.ops();
                let n = ops.len().min(n);
                agent.kernel.apply(&plan.part(|index, _| index < n)).unwrap();
                agent = Agent::start(sandbox);
                agent.follow(&states[1]);
                let (there, scratch) = (agent.image(), scratch(&states[1]));
                assert_eq!(&there, agent.state.image(), "after {n} of {ops:?}");
                assert_eq!(content(&there).unwrap(), content(&scratch).unwrap(), "after {n} of {ops:?}");
                assert_eq!(there.node_addrs, scratch.node_addrs);
                if n == ops.len() {
                    return n;
                }
            }
            unreachable!("a plan is finite")
        });
        assert!(n_ops > 20, "{n_ops}");
    });
}

/// The image for a cluster, computed without a kernel.
fn scratch(cluster: &Cluster) -> Image {
    let mut state = State::new(agent::settings(), Vec::new(), agent::SMALL, &Image::default());
    cluster.feed(&mut state);
    let _plan = state.sync();
    state.image().clone()
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The ids of the endpoints in an image.
fn endpoint_ids(image: &Image) -> BTreeMap<SocketAddr, u32> {
    let runs = [false, true].into_iter().flat_map(|ipv6| image.runs(ipv6).values());
    runs.flat_map(|run| run.iter().map(|entry| (entry.address, entry.endpoint_id))).collect()
}

/// The content of the pin directory.
fn pinned(sandbox: &Sandbox) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(sandbox.pin_path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

fn wanted_pins(sandbox: &Sandbox) -> Vec<PathBuf> {
    let mut wanted = Agent::pins(sandbox);
    wanted.sort();
    wanted
}

/// Sizes change with a restart: larger, smaller, and back, while eight threads connect. Ids, records,
/// counters and affinity persist.
#[test]
fn other_sizes_fail_no_call_and_lose_nothing() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<3>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let cluster = cluster(&endpoints);
        let options = agent::options(sandbox);
        let mut first = Agent::start(sandbox);
        first.follow(&cluster);
        let ids = endpoint_ids(&first.image());
        drop(first);
        let connected = Socket::new(Domain::V4, Tcp);
        connected.connect(service).unwrap();
        let connects = |agent: &Agent| -> u64 {
            let image = agent.image();
            let service_id = image.frontends.values().next().unwrap().service_id;
            agent.kernel.maps().service_stats(service_id).connects
        };
        let before = connects(&Agent::start(sandbox));
        assert!(before > 0);
        let sizes = [(512, 4096), (512, 2048), (4, 16), (256, 16), (1 << 14, 1 << 15), (256, 2048)];
        Load { n_calls: 4000, n_changes: 12 }.run(
            |generation| {
                let (services, endpoints) = sizes[generation % sizes.len()];
                let capacity = Capacity { services, endpoints };
                let options = Options { capacity, ..options.clone() };
                let mut agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
                let plan = agent.follow(&cluster);
                assert!(plan.is_empty(), "everything was adopted: {plan:?}");
                assert!(!agent.kernel.is_staged());
                assert_eq!(endpoint_ids(&agent.image()), ids);
                assert_eq!(Maps::open(&sandbox.pin_path()).unwrap().capacity(), capacity);
            },
            |_thread| call(service, Tcp),
            |_: Window, answer| answer.is_ok_and(|server| endpoints.contains(&server)),
        );
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        assert_eq!(connected.peer_name(), Ok(service), "its record is in its place");
        let options = Options { capacity: Maps::open(&sandbox.pin_path()).unwrap().capacity(), ..options };
        let agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
        assert!(connects(&agent) > before, "counters continue");
    });
}

/// Five services with the same three endpoints, which answer: 15 entries of endpoints.
fn five_services() -> (Cluster, Vec<SocketAddr>, Servers) {
    let endpoints = addresses::<3>(Domain::V4, 8001);
    let services: Vec<SocketAddr> = (0..5).map(|n| SocketAddr::from(([10, 96, 7, n], 80))).collect();
    let mut cluster = Cluster::new();
    for (n, service) in services.iter().enumerate() {
        cluster.serve(&format!("web-{n}"), *service, Tcp, &endpoints);
    }
    (cluster, services, Servers::tcp(endpoints))
}

/// Sizes that would drop what is served are rejected: the maps stay, and the agent reports it.
#[test]
fn sizes_that_are_too_small_leave_the_maps_as_they_are() {
    Sandbox::test(|sandbox| {
        let (cluster, services, _servers) = five_services();
        let options = agent::options(sandbox);
        Agent::start(sandbox).follow(&cluster);
        let (maps, former) = (map_ids(sandbox), options.capacity);
        let all_answer = || services.iter().all(|service| call(*service, Tcp).is_ok());
        for (services, endpoints, used, refused) in [
            (4, former.endpoints, former, vec![("max-services", 4, 5)]),
            (former.services, 14, former, vec![("max-endpoints", 14, 15)]),
            (1, 1, former, vec![("max-services", 1, 5), ("max-endpoints", 1, 15)]),
            // The one that fits is used.
            (4, 15, Capacity { endpoints: 15, ..former }, vec![("max-services", 4, 5)]),
            (5, 15, Capacity { services: 5, endpoints: 15 }, vec![]),
        ] {
            let capacity = Capacity { services, endpoints };
            let options = Options { capacity, ..options.clone() };
            let mut agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            let told: Vec<_> = agent.kernel.too_small().iter().collect();
            let expected: Vec<_> = told
                .iter()
                .map(|size| (size.setting, size.wanted, size.n_served.unwrap_or_default()))
                .collect();
            assert_eq!(expected, refused, "{capacity:?}");
            assert!(all_answer(), "{capacity:?}");
            let plan = agent.follow(&cluster);
            assert!(plan.is_empty(), "{capacity:?}: {plan:?}");
            assert!(all_answer(), "{capacity:?}");
            assert_eq!(Maps::open(&sandbox.pin_path()).unwrap().capacity(), used);
            assert_eq!(map_ids(sandbox) == maps, used == former, "{capacity:?}");
            assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        }
    });
}

/// The entries of a map with another layout cannot be counted: the map does not shrink in the same start, but
/// in the next.
#[test]
fn another_layout_and_smaller_sizes_together_take_nothing_away() {
    Sandbox::test(|sandbox| {
        let (cluster, services, _servers) = five_services();
        let options = agent::options(sandbox);
        Agent::start(sandbox).follow(&cluster);
        let former = options.capacity;
        for (changes, wanted, used, refused) in [
            (true, (2, 6), former, vec![("max-services", 2, None), ("max-endpoints", 6, None)]),
            (false, (2, 6), former, vec![("max-services", 2, Some(5)), ("max-endpoints", 6, Some(15))]),
            (true, (5, 4096), Capacity { endpoints: 4096, ..former }, vec![("max-services", 5, None)]),
            (false, (5, 15), Capacity { services: 5, endpoints: 15 }, vec![]),
        ] {
            if changes {
                change_layout(sandbox, "frontends");
            }
            let options =
                Options { capacity: Capacity { services: wanted.0, endpoints: wanted.1 }, ..options.clone() };
            let mut agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            let told: Vec<_> = agent.kernel.too_small().iter().collect();
            let told: Vec<_> = told.iter().map(|size| (size.setting, size.wanted, size.n_served)).collect();
            assert_eq!(told, refused, "{wanted:?}");
            agent.follow(&cluster);
            assert_eq!(Maps::open(&sandbox.pin_path()).unwrap().capacity(), used, "{wanted:?}");
            assert!(services.iter().all(|service| call(*service, Tcp).is_ok()), "{wanted:?}");
        }
    });
}

/// Until the desired state is complete, the adopted state is served, and a smaller map loses nothing that
/// fits.
#[test]
fn former_maps_serve_until_the_first_plan() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        Agent::start(sandbox).follow(&cluster(&endpoints));
        let programs = program_ids(sandbox);
        for others in [&["frontends"][..], &[]] {
            for name in others {
                change_layout(sandbox, name);
            }
            let capacity = Capacity { services: 128, endpoints: 64 };
            let options = Options { capacity, ..agent::options(sandbox) };
            let agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            assert!(agent.kernel.is_staged());
            assert_eq!(program_ids(sandbox), programs);
            assert!(call(service, Tcp).is_ok_and(|server| endpoints.contains(&server)));
            drop(agent);
            assert!(call(service, Tcp).is_ok(), "one that stops here has changed nothing");
            for name in others {
                change_layout(sandbox, name);
            }
        }
        assert!(Agent::start(sandbox).follow(&cluster(&endpoints)).is_empty());
        assert_eq!(pinned(sandbox), wanted_pins(sandbox), "nor left anything");
    });
}

/// The map with the layout of each map, by map id.
fn layouts(sandbox: &Sandbox) -> HashMap<MapData, u32, [u8; 16]> {
    let data = MapData::from_pin(sandbox.pin_path().join(maps::LAYOUTS)).unwrap();
    Map::from_map_data(data).unwrap().try_into().unwrap()
}

fn map_id(sandbox: &Sandbox, name: &str) -> u32 {
    MapInfo::from_pin(sandbox.pin_path().join(name)).unwrap().id()
}

fn map_ids(sandbox: &Sandbox) -> BTreeMap<&'static str, u32> {
    MAPS.iter().map(|map| (map.name, map_id(sandbox, map.name))).collect()
}

/// Changes a pinned map's layout, or restores it.
fn change_layout(sandbox: &Sandbox, name: &str) {
    let (mut layouts, id) = (layouts(sandbox), map_id(sandbox, name));
    let mut identity = layouts.get(&id, 0).unwrap();
    identity[0] ^= 0xff;
    layouts.insert(id, identity, 0).unwrap();
}

/// Makes a map unknown to every earlier version.
fn forget(sandbox: &Sandbox, name: &str) {
    layouts(sandbox).remove(&map_id(sandbox, name)).unwrap();
    fs::remove_file(sandbox.pin_path().join(name)).unwrap();
}

/// Maps of other layouts are replaced without reading them, while eight threads connect.
#[test]
fn another_layout_fails_no_call() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<3>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let cluster = cluster(&endpoints);
        Agent::start(sandbox).follow(&cluster);
        let of_image: Vec<&str> =
            MAPS.iter().filter(|map| map.role == Role::Image).map(|map| map.name).collect();
        Load { n_calls: 4000, n_changes: 10 }.run(
            |generation| {
                let name = of_image[generation % of_image.len()];
                if generation % 3 == 0 {
                    // Deleted while no agent runs to restore it.
                    fs::remove_file(sandbox.pin_path().join(name)).unwrap();
                    assert!(matches!(Maps::open(&sandbox.pin_path()), Err(KernelError::NotPinned { .. })));
                } else {
                    change_layout(sandbox, name);
                    assert!(matches!(Maps::open(&sandbox.pin_path()), Err(KernelError::Layout { .. })));
                }
                let mut agent = Agent::start(sandbox);
                assert!(agent.kernel.is_staged());
                assert!(!agent.follow(&cluster).is_empty(), "all of it is rewritten");
                assert_eq!(&agent.image(), agent.state.image());
            },
            |_thread| call(service, Tcp),
            |_: Window, answer| answer.is_ok_and(|server| endpoints.contains(&server)),
        );
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

/// Does something to a pinned map.
type Change = fn(&Sandbox, &str);

/// A service with affinity, its clients and its counters lose nothing when single maps are recreated while
/// eight threads connect, except what the map itself holds.
#[test]
fn a_map_beside_the_image_is_made_anew_alone() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<8>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let mut cluster = cluster(&endpoints);
        let object = cluster.services.values().next().unwrap().clone();
        cluster.set(cluster::with_spec(object, |spec| spec.session_affinity = Some("ClientIP".to_owned())));
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster);
        let image = agent.image();
        let connects = |agent: &Agent| {
            let service_id = image.frontends.values().next().unwrap().service_id;
            agent.kernel.maps().service_stats(service_id).connects
        };
        let connected = Socket::new(Domain::V4, Tcp);
        connected.connect(service).unwrap();
        let mut chosen = call(service, Tcp).unwrap();
        let mut n_before = connects(&agent);
        assert!(n_before > 0);
        drop(agent);

        let changes: [(&str, Change); 8] = [
            ("affinity", change_layout),
            ("excluded", forget),
            ("excluded_levels", |sandbox, name| fs::remove_file(sandbox.pin_path().join(name)).unwrap()),
            ("service_stats", change_layout),
            ("endpoint_stats", forget),
            ("meta", change_layout),
            ("sockets", change_layout),
            ("socket_storage", forget),
        ];
        Load { n_calls: 2000, n_changes: changes.len() }.run(
            |generation| {
                if generation == 0 {
                    return;
                }
                let (name, change) = changes[generation - 1];
                let before = map_ids(sandbox);
                change(sandbox, name);
                let mut agent = Agent::start(sandbox);
                assert!(!agent.kernel.is_staged(), "{name}");
                assert_eq!(agent.image(), image, "{name}: ids stay");
                let after = map_ids(sandbox);
                let replaced: Vec<&str> =
                    after.keys().copied().filter(|name| before[name] != after[name]).collect();
                assert_eq!(replaced, [name], "nothing else is recreated");
                if name == "affinity" {
                    chosen = call(service, Tcp).unwrap();
                }
                assert_eq!(call(service, Tcp), Ok(chosen), "{name}: the client stays");
                if name == "service_stats" {
                    n_before = 0;
                }
                assert!(connects(&agent) > n_before, "{name}: counters continue");
                n_before = connects(&agent);
                if name != "sockets" && changes[..generation].iter().all(|(name, _)| *name != "sockets") {
                    assert_eq!(connected.peer_name(), Ok(service), "{name}: its record is in its place");
                }
                assert!(agent.follow(&cluster).is_empty(), "{name}");
                assert_eq!(pinned(sandbox), wanted_pins(sandbox), "{name}");
            },
            |_thread| call(service, Tcp),
            |_: Window, answer| answer.is_ok_and(|server| endpoints.contains(&server)),
        );
    });
}

/// An earlier version wrote one layout for all maps into `meta` and had no `layouts`. Its maps serve until
/// the first plan. After a downgrade it treats these maps in the same way.
#[test]
fn maps_of_an_agent_without_layouts_are_replaced() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        Agent::start(sandbox).follow(&cluster(&endpoints));
        assert_ne!(maps::find("meta").unwrap().layout, 2, "the earlier version wrote another one");
        fs::remove_file(sandbox.pin_path().join(maps::LAYOUTS)).unwrap();
        let before = map_ids_but_layouts(sandbox);
        let mut agent = Agent::start(sandbox);
        assert!(agent.kernel.is_staged());
        assert_eq!(map_ids_but_layouts(sandbox), before);
        assert!(call(service, Tcp).is_ok_and(|server| endpoints.contains(&server)));
        agent.follow(&cluster(&endpoints));
        assert!(call(service, Tcp).is_ok_and(|server| endpoints.contains(&server)));
        let after = map_ids_but_layouts(sandbox);
        assert!(after.iter().all(|(name, id)| before[name] != *id), "all are new: {after:?}");
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

fn map_ids_but_layouts(sandbox: &Sandbox) -> BTreeMap<&'static str, u32> {
    let others = MAPS.iter().filter(|map| map.name != maps::LAYOUTS);
    others.map(|map| (map.name, map_id(sandbox, map.name))).collect()
}

/// A map with an unknown name is kept, and so is its recorded layout. The layouts of deleted maps are
/// removed.
#[test]
fn maps_of_a_newer_version_are_left_alone() {
    Sandbox::test(|sandbox| {
        drop(Agent::start(sandbox));
        let newer = sandbox.pin_path().join("of_a_newer_one");
        let id = map_id(sandbox, "affinity");
        fs::rename(sandbox.pin_path().join("affinity"), &newer).unwrap();
        let gone = map_id(sandbox, "excluded");
        fs::remove_file(sandbox.pin_path().join("excluded")).unwrap();
        drop(Agent::start(sandbox));
        assert_eq!(map_id(sandbox, "of_a_newer_one"), id);
        assert!(layouts(sandbox).get(&id, 0).is_ok(), "a newer version adopts it");
        assert!(layouts(sandbox).get(&gone, 0).is_err());
        assert_eq!(layouts(sandbox).keys().count(), MAPS.len() + 1);
    });
}

/// The object's programs with maps of their own: they have no services.
pub(crate) fn load_object() -> Ebpf {
    // Kernels before 5.11 charge maps to the process. Others do not need this and may not permit it.
    let _not_needed = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    let mut loader = EbpfLoader::new();
    for map in MAPS.iter().filter(|map| !matches!(map.size, Size::Fixed(_))) {
        loader.map_max_entries(map.name, 1);
    }
    loader.load(object::bytes().unwrap()).unwrap()
}

/// Pins of earlier versions only are removed by name, and their programs stop running.
#[test]
fn maps_and_links_of_earlier_versions_are_removed() {
    Sandbox::test(|sandbox| {
        let pin = |name: &str| sandbox.pin_path().join(name);
        drop(Agent::start(sandbox));
        fs::rename(pin("connect4"), pin("old_hook")).unwrap();
        fs::rename(pin("excluded"), pin("old_map")).unwrap();
        drop(Agent::start(sandbox));
        let programs = || {
            let cgroup = fs::File::open(sandbox.cgroup().path()).unwrap();
            let link = syscall::cgroup_link(syscall::open_pin(&pin("connect4")).unwrap().as_fd()).unwrap();
            syscall::attached_to(cgroup.as_fd(), link.attach_type).unwrap().programs
        };
        assert_eq!(programs().len(), 2, "unknown programs stay attached");
        let removed = pins::remove_former(&sandbox.pin_path(), &["old_map", "none"], &["old_hook"]).unwrap();
        assert_eq!(removed, [pin("old_hook"), pin("old_map")]);
        assert_eq!(programs().len(), 1);
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

/// The tables of maps and hooks match the object and the kernel.
#[test]
fn maps_and_hooks_are_as_the_tables_say() {
    Sandbox::test(|sandbox| {
        let object = load_object();
        let names = object.maps().map(|(name, _)| name);
        let names: BTreeSet<&str> = names.filter(|name| !matches!(*name, ".rodata" | "AYA_LOGS")).collect();
        assert_eq!(names, MAPS.iter().map(|map| map.name).collect());
        let _agent = Agent::start(sandbox);
        let sizing = maps::Sizing {
            services: 256,
            endpoints: 2048,
            n_cpus: aya::util::nr_cpus().unwrap().try_into().unwrap(),
        };
        for map in MAPS {
            let info = MapInfo::from_pin(sandbox.pin_path().join(map.name)).unwrap();
            let found = (
                info.map_type().unwrap() as u32,
                info.key_size(),
                info.value_size(),
                info.map_flags(),
                info.max_entries(),
            );
            let wanted = (map.kind as u32, map.key_size, map.value_size, map.flags, map.max_entries(&sizing));
            assert_eq!(found, wanted, "{}", map.name);
        }
        for hook in pins::hooks(Features::probe()) {
            let link = syscall::open_pin(&sandbox.pin_path().join(hook.name)).unwrap();
            assert_eq!(
                syscall::cgroup_link(link.as_fd()).unwrap().attach_type,
                hook.attach_type,
                "{}",
                hook.name
            );
        }
    });
}

/// The next agent completes or discards what an agent left that stopped while it changed the maps. Removal
/// works too.
#[test]
fn an_unfinished_change_of_maps_is_ended() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let cluster = cluster(&endpoints);
        let larger = |add: u32| {
            let capacity = Capacity { services: 256 + add, endpoints: 2048 };
            Agent::start_with(&Options { capacity, ..agent::options(sandbox) }, agent::settings(), Vec::new())
        };
        Agent::start(sandbox).follow(&cluster);
        // Filled, but not complete.
        drop(larger(1).unwrap());
        assert!(sandbox.pin_path().join(pins::NEXT).is_dir());
        drop(Agent::start(sandbox));
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        assert!(call(service, Tcp).is_ok());
        // Complete, but not used yet.
        drop(larger(2).unwrap());
        pins::commit(&sandbox.pin_path()).unwrap();
        // An agent with the former sizes turns it into another change; one with the new sizes adopts it.
        drop(Agent::start(sandbox));
        assert!(call(service, Tcp).is_ok());
        let mut agent = larger(2).unwrap();
        assert!(!agent.kernel.is_staged());
        assert!(agent.follow(&cluster).is_empty());
        assert!(call(service, Tcp).is_ok());
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        // Removal works in the middle of either.
        for is_complete in [false, true] {
            drop(agent);
            drop(larger(3).unwrap());
            if is_complete {
                pins::commit(&sandbox.pin_path()).unwrap();
            }
            pins::remove(&sandbox.pin_path()).unwrap();
            assert!(!sandbox.pin_path().exists());
            agent = larger(2).unwrap();
            agent.follow(&cluster);
        }
    });
}

/// Removed pins are reported by name and restored. Without a pin the service continues: the agent has the
/// link and the map open.
#[test]
fn pins_that_are_removed_or_replaced_are_put_back() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster(&endpoints));
        let lock = Lock::try_take(&sandbox.pin_path()).unwrap().unwrap();
        let maps = map_ids(sandbox);
        for name in pins::names(Features::probe()) {
            let pin = sandbox.pin_path().join(name);
            let other = sandbox.pin_path().join(if name == "meta" { "affinity" } else { "meta" });
            // Removed, and replaced by another object.
            for is_replaced in [false, true] {
                assert_eq!(agent.kernel.pins(&lock), Pins::InPlace, "{name}");
                fs::remove_file(&pin).unwrap();
                if is_replaced {
                    syscall::pin(syscall::open_pin(&other).unwrap().as_fd(), &pin).unwrap();
                }
                assert_eq!(agent.kernel.pins(&lock), Pins::Lost(vec![name]));
                assert!(call(service, Tcp).is_ok(), "{name}");
                let (restored, result) = agent.kernel.restore_pins(&lock);
                result.unwrap();
                assert_eq!(restored, [name]);
                assert!(call(service, Tcp).is_ok(), "{name}");
            }
        }
        assert_eq!(map_ids(sandbox), maps, "the same maps as before");
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

/// A hook whose program is detached or replaced gets its own program again.
#[test]
fn programs_that_are_detached_or_replaced_are_put_back() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster(&endpoints));
        let lock = Lock::try_take(&sandbox.pin_path()).unwrap().unwrap();
        let programs = program_ids(sandbox);
        let link = |hook: &str| syscall::open_pin(&sandbox.pin_path().join(hook)).unwrap();
        for hook in pins::hooks(Features::probe()) {
            syscall::detach(link(hook.name).as_fd()).unwrap();
            assert_eq!(agent.kernel.pins(&lock), Pins::Lost(vec![hook.name]));
            assert_eq!(call(service, Tcp).is_ok(), hook.name != "connect4", "{}", hook.name);
            let (restored, result) = agent.kernel.restore_pins(&lock);
            result.unwrap();
            assert_eq!((restored, agent.kernel.pins(&lock)), (vec![hook.name], Pins::InPlace));
            assert!(call(service, Tcp).is_ok(), "{}", hook.name);
        }
        assert_eq!(program_ids(sandbox), programs);

        // The same program with other maps: it has no services.
        let mut other = load_object();
        let name = if Features::probe().compare_and_swap { "connect4" } else { "connect4_s" };
        let program: &mut CgroupSockAddr = other.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
        syscall::replace_program(link("connect4").as_fd(), program.fd().unwrap().as_fd()).unwrap();
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH));
        assert_eq!(agent.kernel.pins(&lock), Pins::Lost(vec!["connect4"]));
        agent.kernel.restore_pins(&lock).1.unwrap();
        assert_eq!(program_ids(sandbox), programs);
        assert!(call(service, Tcp).is_ok());

        // If all are gone, they were removed on purpose.
        pins::remove(&sandbox.pin_path()).unwrap();
        assert_eq!(agent.kernel.pins(&lock), Pins::Gone);
        fs::create_dir(sandbox.pin_path()).unwrap();
        assert_eq!(agent.kernel.pins(&lock), Pins::Gone, "the directory was replaced");
        assert!(agent.kernel.restore_pins(&lock).0.is_empty());
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH));
        assert_eq!(pinned(sandbox), Vec::<PathBuf>::new());
    });
}

/// A link that was detached while no agent ran, or that belongs to another cgroup, does not break the next
/// start.
#[test]
fn links_of_no_use_are_made_anew_at_the_start() {
    Sandbox::test(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster(&endpoints));
        drop(agent);
        syscall::detach(syscall::open_pin(&sandbox.pin_path().join("connect4")).unwrap().as_fd()).unwrap();
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH));
        drop(Agent::start(sandbox));
        assert!(call(service, Tcp).is_ok());
        // Attach below this test's cgroup, and back.
        let below = Below::make(sandbox);
        let elsewhere = Options { cgroup: below.0.clone(), ..agent::options(sandbox) };
        drop(Agent::start_with(&elsewhere, agent::settings(), Vec::new()).unwrap());
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH), "this process is no longer served");
        drop(Agent::start(sandbox));
        assert!(call(service, Tcp).is_ok());
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

/// A cgroup below the sandbox's, removed on drop.
struct Below(PathBuf);

impl Below {
    fn make(sandbox: &Sandbox) -> Self {
        let path = sandbox.cgroup().path().join("below");
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        let _removed_with_the_sandbox = fs::remove_dir(&self.0);
    }
}

fn open_error(options: &Options) -> KernelError {
    match Kernel::open(options, || {}) {
        Ok(_kernel) => panic!("opened"),
        Err(error) => error,
    }
}

#[test]
fn wrong_places_are_named() {
    Sandbox::test(|sandbox| {
        let options = agent::options(sandbox);
        let elsewhere = tempfile::tempdir().unwrap();
        let says = |options: &Options, flag: &str, place: &Path| {
            let error = open_error(options).to_string();
            assert!(error.contains(flag) && error.contains(&*place.to_string_lossy()), "{error}");
            error
        };
        for cgroup in [elsewhere.path().to_owned(), elsewhere.path().join("missing")] {
            says(&Options { cgroup: cgroup.clone(), ..options.clone() }, "--cgroup", &cgroup);
        }
        let pin_path = elsewhere.path().join("pins");
        says(&Options { pin_path: pin_path.clone(), ..options.clone() }, "--pin-path", &pin_path);
        assert!(!pin_path.exists(), "nothing unusable remains");
        assert!(matches!(Maps::open(&sandbox.pin_path()), Err(KernelError::NothingPinned { .. })));
        assert!(Kernel::open(&options, || {}).is_ok(), "the right paths work");
    });
}
