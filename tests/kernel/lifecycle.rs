//! Pins, detaching, restarts, and what is said when something is not as it should be.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
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
    agent::{self, Agent},
    client::{Domain, Socket, call},
    cluster::Cluster,
    require,
    server::Servers,
};
use lb_userspace::{
    kernel::{Kernel, KernelError, Options, pins, store::Maps},
    model::Protocol::Tcp,
    plan::Capacity,
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

/// Polls, because the kernel may carry something out a moment later: on 5.10 a detachment.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
    panic!("never happened: {what}");
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
        let mut found: Vec<PathBuf> =
            fs::read_dir(sandbox.pin_path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        let mut wanted = Agent::pins(sandbox);
        found.sort();
        wanted.sort();
        assert_eq!(found, wanted);
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
        eventually("calls are untouched", || call(service, Tcp) == Err(Errno::ENETUNREACH));
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
        let removed = pins::remove(&sandbox.pin_path()).unwrap();
        assert_eq!(removed.len(), Agent::pins(sandbox).len());
        assert!(foreign.is_dir());
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

/// What was made with other settings is not touched, and the message says which setting it is.
#[test]
fn pinned_maps_of_another_size_or_layout_are_refused() {
    if !require(Feature::Programs) {
        return;
    }
    Sandbox::run(|sandbox| {
        let options = agent::options(sandbox);
        drop(Kernel::open(&options, || {}).unwrap());
        let larger = Capacity { services: options.capacity.services + 1, ..options.capacity };
        let error = open_error(&Options { capacity: larger, ..options.clone() });
        assert!(matches!(error, KernelError::Size { flag: "--max-services", .. }), "{error:?}");
        assert!(error.to_string().contains("--max-services 256, now 257 is asked for"), "{error}");

        let path = sandbox.pin_path().join("meta");
        let data = MapData::from_pin(path).unwrap();
        let mut array: Array<_, [u32; size_of::<Meta>() / 4]> =
            Map::from_map_data(data).unwrap().try_into().unwrap();
        let mut meta = array.get(&0, 0).unwrap();
        assert_eq!(meta[0], limits::LAYOUT_VERSION);
        let found = limits::LAYOUT_VERSION + 1;
        meta[0] = found;
        array.set(0, meta, 0).unwrap();
        let error = open_error(&options);
        assert!(matches!(error, KernelError::Layout { found: other, .. } if other == found), "{error:?}");
        assert!(matches!(Maps::open(&sandbox.pin_path()), Err(KernelError::Layout { .. })));
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
