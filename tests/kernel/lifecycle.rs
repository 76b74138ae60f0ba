//! Pins, detaching, restarts, and error messages. [`crate::layouts`] has maps of other sizes and layouts.

use std::{
    collections::BTreeSet,
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::MapInfo,
    programs::{
        CgroupSockAddr,
        links::{FdLink, PinnedLink},
    },
};
use lb_common::maps::{self, MAPS, Size};
use lb_core::{model::Protocol::Tcp, state::State, tables::Image};
use lb_kernel::{Features, Kernel, KernelError, Maps, Options, Pins, lock::Lock, object, pins, syscall};
use lb_tests::{
    Sandbox,
    agent::{self, Agent, content},
    client::{Domain, call},
    cluster::{Cluster, node},
    command::SetOnDrop,
    number,
    server::Servers,
};
use nix::{
    errno::Errno,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};

use crate::{
    any_kernel::layouts::map_ids,
    fixture::{Below, FAMILIES, addresses, connected, service_address, service_port, start, with_web},
};

/// The ids of the programs of the pinned links.
pub(crate) fn program_ids(sandbox: &Sandbox) -> Vec<u32> {
    let id = |name: &str| {
        let link = PinnedLink::from_pin(sandbox.pin_path().join(name)).unwrap();
        FdLink::from(link).info().unwrap().program_id()
    };
    pins::hooks(Features::probe(), true).map(|hook| id(hook.name)).collect()
}

#[test]
fn removing_the_pins_ends_the_effect() {
    with_web(2, |sandbox, web| {
        let agent = web.serve(sandbox);
        let connected = connected(Domain::V4, Tcp, web.service);
        connected.ask().unwrap();
        drop(agent);
        assert!(web.answers(), "it is served without an agent");

        let mut removed = pins::remove(&sandbox.pin_path()).unwrap();
        removed.sort();
        assert_eq!(removed, wanted_pins(sandbox));
        assert!(!sandbox.pin_path().exists());
        assert_eq!(call(web.service, Tcp), Err(Errno::ENETUNREACH));
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
    with_web(3, |sandbox, web| {
        let mut agent = Agent::start(sandbox);
        assert!(!agent.follow(&web.cluster).is_empty());
        let (image, programs) = (agent.image(), program_ids(sandbox));
        assert_eq!(&image, agent.state.image());
        drop(agent);

        let mut agent = Agent::start(sandbox);
        let plan = agent.follow(&web.cluster);
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
    with_web(1, |sandbox, web| {
        drop(web.serve(sandbox));
        assert!(web.answers());
        let mut agent = Agent::start(sandbox);
        assert!(web.answers(), "before the first sync");
        agent.follow(&Cluster::new());
        assert_eq!(call(web.service, Tcp), Err(Errno::ENETUNREACH));
        assert_eq!(agent.image(), Image::default());
    });
}

/// Ten restarts, each with new programs, while eight threads connect.
#[test]
fn a_restart_fails_no_call() {
    with_web(3, |sandbox, web| {
        drop(web.serve(sandbox));
        web.under_load(4000, 10, |_generation| {
            let plan = Agent::start(sandbox).follow(&web.cluster);
            assert!(plan.is_empty(), "{plan:?}");
        });
    });
}

/// When an agent stops after any operation of a plan for all maps, the next one completes the change; calls
/// succeed all the time. A killed agent runs no code, so dropping one after that number of operations is
/// equivalent. `LB_FAULT_STEP=N` tests one operation in N: each costs two starts, in which an emulated CPU
/// verifies for seconds.
#[test]
fn an_end_after_any_operation_is_made_up_for() {
    Sandbox::test(|sandbox| {
        let endpoints = FAMILIES.map(|domain| addresses::<4>(domain, 8001));
        let _servers = endpoints.map(Servers::tcp);
        let state = |second: bool| {
            let others = if second { "192.0.2.3" } else { "192.0.2.2" };
            let mut cluster = Cluster::new().with(
                [("node", "192.0.2.1"), ("other", others)]
                    .map(|(name, ip)| node(name, &[ip.parse().unwrap()])),
            );
            for (domain, endpoints) in FAMILIES.into_iter().zip(endpoints) {
                let steady = &endpoints[usize::from(second)..][..3];
                cluster.serve(&format!("steady-{domain:?}"), service_address(domain), Tcp, steady);
                let passing = service_port(domain, if second { 1001 } else { 1002 });
                cluster.serve(&format!("passing-{second}-{domain:?}"), passing, Tcp, &endpoints);
            }
            cluster
        };
        let states = [state(false), state(true)];
        let one_in = number("LB_FAULT_STEP", 1).max(1);
        Agent::start(sandbox).follow(&states[0]);
        let stop = AtomicBool::new(false);
        let n_ops = thread::scope(|scope| {
            for (domain, endpoints) in FAMILIES.into_iter().zip(endpoints) {
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
            let _stops = SetOnDrop(&stop);
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

/// The content of the pin directory.
pub(crate) fn pinned(sandbox: &Sandbox) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(sandbox.pin_path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

pub(crate) fn wanted_pins(sandbox: &Sandbox) -> Vec<PathBuf> {
    let mut wanted = Agent::pins(sandbox);
    wanted.sort();
    wanted
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
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
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
        for hook in pins::hooks(Features::probe(), true) {
            let link = syscall::open_pin(&sandbox.pin_path().join(hook.name)).unwrap();
            let attach_type = syscall::cgroup_link(link.as_fd()).unwrap().attach_type;
            assert_eq!(attach_type, hook.attach_type, "{}", hook.name);
        }
    });
}

/// Removed pins are reported by name and restored. Without a pin the service continues: the agent has the
/// link and the map open.
#[test]
fn pins_that_are_removed_or_replaced_are_put_back() {
    with_web(2, |sandbox, web| {
        let mut agent = web.serve(sandbox);
        let lock = Lock::try_take(&sandbox.pin_path()).unwrap().unwrap();
        let maps = map_ids(sandbox);
        for name in pins::names(Features::probe(), true) {
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
                assert!(web.answers(), "{name}");
                let (restored, result) = agent.kernel.restore_pins(&lock);
                result.unwrap();
                assert_eq!(restored, [name]);
                assert!(web.answers(), "{name}");
            }
        }
        assert_eq!(map_ids(sandbox), maps, "the same maps as before");
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

/// A hook whose program is detached or replaced gets its own program again.
#[test]
fn programs_that_are_detached_or_replaced_are_put_back() {
    with_web(2, |sandbox, web| {
        let mut agent = web.serve(sandbox);
        let lock = Lock::try_take(&sandbox.pin_path()).unwrap().unwrap();
        let programs = program_ids(sandbox);
        let link = |hook: &str| syscall::open_pin(&sandbox.pin_path().join(hook)).unwrap();
        for hook in pins::hooks(Features::probe(), true) {
            syscall::detach(link(hook.name).as_fd()).unwrap();
            assert_eq!(agent.kernel.pins(&lock), Pins::Lost(vec![hook.name]));
            assert_eq!(web.answers(), hook.name != "connect4", "{}", hook.name);
            let (restored, result) = agent.kernel.restore_pins(&lock);
            result.unwrap();
            assert_eq!((restored, agent.kernel.pins(&lock)), (vec![hook.name], Pins::InPlace));
            assert!(web.answers(), "{}", hook.name);
        }
        assert_eq!(program_ids(sandbox), programs);

        // The same program with other maps: it has no services.
        let mut other = load_object();
        let name = if Features::probe().compare_and_swap { "connect4" } else { "connect4_s" };
        let program: &mut CgroupSockAddr = other.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
        syscall::replace_program(link("connect4").as_fd(), program.fd().unwrap().as_fd()).unwrap();
        assert_eq!(call(web.service, Tcp), Err(Errno::ENETUNREACH));
        assert_eq!(agent.kernel.pins(&lock), Pins::Lost(vec!["connect4"]));
        agent.kernel.restore_pins(&lock).1.unwrap();
        assert_eq!(program_ids(sandbox), programs);
        assert!(web.answers());

        // If all are gone, they were removed on purpose.
        pins::remove(&sandbox.pin_path()).unwrap();
        assert_eq!(agent.kernel.pins(&lock), Pins::Gone);
        fs::create_dir(sandbox.pin_path()).unwrap();
        assert_eq!(agent.kernel.pins(&lock), Pins::Gone, "the directory was replaced");
        assert!(agent.kernel.restore_pins(&lock).0.is_empty());
        assert_eq!(call(web.service, Tcp), Err(Errno::ENETUNREACH));
        assert_eq!(pinned(sandbox), Vec::<PathBuf>::new());
    });
}

/// A link that was detached while no agent ran, or that belongs to another cgroup, does not break the next
/// start.
#[test]
fn links_of_no_use_are_made_anew_at_the_start() {
    with_web(2, |sandbox, web| {
        drop(web.serve(sandbox));
        syscall::detach(syscall::open_pin(&sandbox.pin_path().join("connect4")).unwrap().as_fd()).unwrap();
        assert_eq!(call(web.service, Tcp), Err(Errno::ENETUNREACH));
        drop(Agent::start(sandbox));
        assert!(web.answers());
        // Attach below this test's cgroup, and back.
        let below = Below::make(sandbox.cgroup().path(), "below");
        drop(start(&Options { cgroup: below.0.clone(), ..agent::options(sandbox) }));
        assert_eq!(call(web.service, Tcp), Err(Errno::ENETUNREACH), "this process is no longer served");
        drop(Agent::start(sandbox));
        assert!(web.answers());
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
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
