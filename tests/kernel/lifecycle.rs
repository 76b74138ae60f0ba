//! Pins, detaching, restarts, and what is said when something is not as it should be.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use aya::{
    maps::{Array, Map, MapData},
    programs::links::{FdLink, PinnedLink},
};
use lb_common::{layout::Meta, limits};
use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent, content},
    client::{Domain, Socket, call},
    cluster::{Cluster, node},
    number, require,
    server::Servers,
};
use lb_userspace::{
    controller::State,
    kernel::{Kernel, KernelError, Options, pins, store::Maps, syscall},
    model::Protocol::Tcp,
    plan::Capacity,
    tables::Image,
};
use nix::errno::Errno;

use crate::{
    calls::{addresses, service_address},
    load::{Load, Window},
};

fn cluster(endpoints: &[SocketAddr]) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.serve("web", service_address(Domain::V4), Tcp, endpoints);
    cluster
}

/// The ids of the programs that the pinned links run.
fn program_ids(sandbox: &Sandbox) -> Vec<u32> {
    let id = |name: &str| {
        let link = PinnedLink::from_pin(sandbox.pin_path().join(name)).unwrap();
        FdLink::from(link).info().unwrap().program_id()
    };
    pins::hooks(lb_userspace::kernel::Features::probe()).map(id).collect()
}

#[test]
fn maps_and_links_are_pinned_under_their_names() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let _agent = Agent::start(sandbox);
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

#[test]
fn removing_the_pins_ends_the_effect() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let service = service_address(Domain::V4);
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster(&endpoints));
        let connected = Socket::new(Domain::V4, Tcp);
        connected.connect(service).unwrap();
        connected.ask().unwrap();
        drop(agent);
        assert!(call(service, Tcp).is_ok(), "nobody is needed to keep it up");

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

/// Somebody else's pins in the same directory are none of our business.
#[test]
fn only_own_pins_are_removed() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
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
        // What a version left that ended before it had everything is removed as well.
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
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
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
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<1>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        Agent::start(sandbox).follow(&cluster(&endpoints));
        assert_eq!(call(service, Tcp), Ok(endpoints[0]));
        let mut agent = Agent::start(sandbox);
        assert_eq!(call(service, Tcp), Ok(endpoints[0]), "before the first sync");
        agent.follow(&Cluster::new());
        assert_eq!(call(service, Tcp), Err(Errno::ENETUNREACH));
        assert_eq!(agent.image(), lb_userspace::tables::Image::default());
    });
}

/// Ten restarts, each with new programs, while eight threads connect.
#[test]
fn a_restart_fails_no_call() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
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

/// An agent that ends after any operation of a plan for all tables is made up for by the next one; calls go right
/// all the time. Nothing runs in an agent that is killed, so one that is dropped after so many operations stands for it.
/// `LB_FAULT_STEP=N` takes one operation in N: each costs two starts, in which an emulated CPU verifies for seconds.
#[test]
fn an_end_after_any_operation_is_made_up_for() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
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
            unreachable!("a plan has an end")
        });
        assert!(n_ops > 20, "{n_ops}");
    });
}

/// The image that a cluster asks for, without a kernel.
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

/// What the directory of the pins holds.
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

/// Other sizes are a matter of a restart: larger, smaller, and back, while eight threads connect. Ids, records, counters
/// and affinity go on.
#[test]
fn other_sizes_fail_no_call_and_lose_nothing() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
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
            agent.kernel.maps().service_stats(service_id).unwrap().connects
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
                assert!(plan.is_empty(), "everything was taken over: {plan:?}");
                assert!(!agent.kernel.is_staged());
                assert_eq!(endpoint_ids(&agent.image()), ids);
                assert_eq!(Maps::open(&sandbox.pin_path()).unwrap().capacity(), capacity);
            },
            |_thread| call(service, Tcp),
            |_: Window, answer| answer.is_ok_and(|server| endpoints.contains(&server)),
        );
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        assert_eq!(connected.peer_name(), Ok(service), "its record is where it was");
        let options = Options { capacity: Maps::open(&sandbox.pin_path()).unwrap().capacity(), ..options };
        let agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
        assert!(connects(&agent) > before, "counters go on");
    });
}

/// Until everything is known that is to be served, what was found serves on, and a smaller table loses nothing that fits.
#[test]
fn former_maps_serve_until_the_first_plan() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<2>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        Agent::start(sandbox).follow(&cluster(&endpoints));
        let programs = program_ids(sandbox);
        for change in [set_layout as fn(&Sandbox, u32), |_, _| ()] {
            change(sandbox, limits::LAYOUT_VERSION + 1);
            let capacity = Capacity { services: 128, endpoints: 64 };
            let options = Options { capacity, ..agent::options(sandbox) };
            let agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            assert!(agent.kernel.is_staged());
            assert_eq!(program_ids(sandbox), programs);
            assert!(call(service, Tcp).is_ok_and(|server| endpoints.contains(&server)));
            drop(agent);
            assert!(call(service, Tcp).is_ok(), "one that ends here has changed nothing");
            set_layout(sandbox, limits::LAYOUT_VERSION);
        }
        assert!(Agent::start(sandbox).follow(&cluster(&endpoints)).is_empty());
        assert_eq!(pinned(sandbox), wanted_pins(sandbox), "nor left anything");
    });
}

/// Has the pinned maps be those of another version.
fn set_layout(sandbox: &Sandbox, version: u32) {
    let data = MapData::from_pin(sandbox.pin_path().join("meta")).unwrap();
    let mut array: Array<_, [u32; size_of::<Meta>() / 4]> =
        Map::from_map_data(data).unwrap().try_into().unwrap();
    let mut meta = array.get(&0, 0).unwrap();
    meta[0] = version;
    array.set(0, meta, 0).unwrap();
}

/// Maps of a newer and of an older layout are replaced without a look at what they hold, while eight threads connect.
#[test]
fn another_layout_fails_no_call() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let service = service_address(Domain::V4);
        let endpoints = addresses::<3>(Domain::V4, 8001);
        let _servers = Servers::tcp(endpoints);
        let cluster = cluster(&endpoints);
        Agent::start(sandbox).follow(&cluster);
        Load { n_calls: 4000, n_changes: 10 }.run(
            |generation| {
                let up = generation % 2 == 0;
                set_layout(sandbox, if up { limits::LAYOUT_VERSION - 1 } else { limits::LAYOUT_VERSION + 1 });
                assert!(matches!(Maps::open(&sandbox.pin_path()), Err(KernelError::Layout { .. })));
                let mut agent = Agent::start(sandbox);
                assert!(agent.kernel.is_staged());
                assert!(!agent.follow(&cluster).is_empty(), "all of it is written anew");
                assert_eq!(&agent.image(), agent.state.image());
            },
            |_thread| call(service, Tcp),
            |_: Window, answer| answer.is_ok_and(|server| endpoints.contains(&server)),
        );
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

/// Whatever an agent left that ended while it changed the maps is carried on or forgotten by the next one, and is no
/// obstacle to a removal.
#[test]
fn an_unfinished_change_of_maps_is_ended() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
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
        // Complete, and nothing more.
        drop(larger(2).unwrap());
        pins::commit(&sandbox.pin_path()).unwrap();
        // An agent with the former sizes makes another change of it, one with the new ones takes it over.
        drop(Agent::start(sandbox));
        assert!(call(service, Tcp).is_ok());
        let mut agent = larger(2).unwrap();
        assert!(!agent.kernel.is_staged());
        assert!(agent.follow(&cluster).is_empty());
        assert!(call(service, Tcp).is_ok());
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        // In the middle of either, everything is removed.
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

fn open_error(options: &Options) -> KernelError {
    match Kernel::open(options, || {}) {
        Ok(_kernel) => panic!("opened"),
        Err(error) => error,
    }
}

#[test]
fn wrong_places_are_named() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
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
        assert!(!pin_path.exists(), "what cannot be used is not left behind");
        assert!(matches!(Maps::open(&sandbox.pin_path()), Err(KernelError::NothingPinned { .. })));
        assert!(Kernel::open(&options, || {}).is_ok(), "the right places do");
    });
}
