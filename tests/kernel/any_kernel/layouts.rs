//! Maps of other sizes and layouts: what the next agent adopts, replaces and removes.

use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path};

use aya::maps::{HashMap, Map, MapData, MapInfo};
use lb_common::maps::{self, MAPS, Role};
use lb_core::{model::Protocol::Tcp, plan::Capacity, tables::Image};
use lb_kernel::{KernelError, Maps, Observations, Options, pins};
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Domain, call},
    cluster::{self, Cluster},
};

use crate::{
    fixture::{addresses, connected, servers_of, start, with_web},
    lifecycle::{pinned, program_ids, wanted_pins},
};

/// The ids of the endpoints in an image.
fn endpoint_ids(image: &Image) -> BTreeMap<SocketAddr, u32> {
    image.reachable().map(|entry| (entry.address(), entry.endpoint_id)).collect()
}

/// Sizes change with a restart: larger, smaller, and back, while eight threads connect. Ids, records,
/// counters and affinity persist.
#[test]
fn other_sizes_fail_no_call_and_lose_nothing() {
    with_web(3, |sandbox, web| {
        let ids = endpoint_ids(&web.serve(sandbox).image());
        let connected = connected(Domain::V4, Tcp, web.service);
        let before = connects(&Agent::start(sandbox));
        assert!(before > 0);
        let sizes = [(512, 4096), (512, 2048), (4, 16), (256, 16), (1 << 14, 1 << 15), (256, 2048)]
            .map(|(services, endpoints)| Capacity { services, endpoints });
        web.under_load(4000, 12, |generation| {
            let capacity = sizes[generation % sizes.len()];
            let n_before = times(&sandbox.pin_path());
            let mut agent = start_sized(sandbox, capacity);
            let plan = agent.follow(&web.cluster);
            assert!(plan.is_empty(), "everything was adopted: {plan:?}");
            assert!(!agent.kernel.is_staged());
            assert_eq!(endpoint_ids(&agent.image()), ids);
            assert_eq!(capacity_of(sandbox), capacity);
            let n_times = times(&sandbox.pin_path());
            assert!(n_times >= n_before, "{n_before} times were counted, {n_times} are left");
        });
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        assert_eq!(connected.peer_name(), Ok(web.service), "its record is in its place");
        assert!(connects(&start_sized(sandbox, capacity_of(sandbox))) > before, "counters continue");
    });
}

/// An agent with maps of other sizes.
fn start_sized(sandbox: &Sandbox, capacity: Capacity) -> Agent {
    start(&Options { capacity, ..agent::options(sandbox) })
}

fn capacity_of(sandbox: &Sandbox) -> Capacity {
    Maps::open(&sandbox.pin_path()).unwrap().capacity()
}

/// The counted connections of the only service.
fn connects(agent: &Agent) -> u64 {
    let service_id = agent.image().frontends.values().next().unwrap().service_id;
    agent.kernel.observations().service_stats(service_id).connects
}

/// The number of connections whose time was counted.
fn times(pin_path: &Path) -> u32 {
    let image = Maps::open(pin_path).unwrap().image().unwrap();
    let service_id = image.frontends.values().next().unwrap().service_id;
    Observations::open(pin_path).unwrap().connect_latency(service_id).buckets.iter().sum()
}

/// The sizes that were rejected: setting, value, and what is served if it could be counted.
fn refused(agent: &Agent) -> Vec<(&'static str, u32, Option<u32>)> {
    agent.kernel.too_small().iter().map(|size| (size.setting, size.wanted, size.n_served)).collect()
}

/// Runs a test with an agent of five services with the same three endpoints: 15 entries of endpoints. The
/// closure that it gets calls all of them.
fn with_five_services(test: impl FnOnce(&Sandbox, &Cluster, &dyn Fn() -> bool) + Send) {
    Sandbox::test(|sandbox| {
        let endpoints = addresses::<3>(Domain::V4, 8001);
        let services: Vec<SocketAddr> = (0..5).map(|n| SocketAddr::from(([10, 96, 7, n], 80))).collect();
        let cluster = services.iter().fold(Cluster::new(), |cluster, service| {
            cluster.serving(&format!("web-{}", service.ip()), *service, Tcp, &endpoints)
        });
        let _servers = servers_of(&cluster);
        Agent::start(sandbox).follow(&cluster);
        test(sandbox, &cluster, &|| services.iter().all(|service| call(*service, Tcp).is_ok()));
    });
}

/// Sizes that would drop what is served are rejected: the maps stay, and the agent reports it.
#[test]
fn sizes_that_are_too_small_leave_the_maps_as_they_are() {
    with_five_services(|sandbox, cluster, all_answer| {
        let (maps, former) = (map_ids(sandbox), agent::SMALL);
        for (services, endpoints, used, rejected) in [
            (4, former.endpoints, former, vec![("max-services", 4, Some(5))]),
            (former.services, 14, former, vec![("max-endpoints", 14, Some(15))]),
            (1, 1, former, vec![("max-services", 1, Some(5)), ("max-endpoints", 1, Some(15))]),
            // The one that fits is used.
            (4, 15, Capacity { endpoints: 15, ..former }, vec![("max-services", 4, Some(5))]),
            (5, 15, Capacity { services: 5, endpoints: 15 }, vec![]),
        ] {
            let capacity = Capacity { services, endpoints };
            let mut agent = start_sized(sandbox, capacity);
            assert_eq!(refused(&agent), rejected, "{capacity:?}");
            assert!(all_answer(), "{capacity:?}");
            let plan = agent.follow(cluster);
            assert!(plan.is_empty(), "{capacity:?}: {plan:?}");
            assert!(all_answer(), "{capacity:?}");
            assert_eq!(capacity_of(sandbox), used);
            assert_eq!(map_ids(sandbox) == maps, used == former, "{capacity:?}");
            assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        }
    });
}

/// The entries of a map with another layout cannot be counted: the map does not shrink in the same start, but
/// in the next.
#[test]
fn another_layout_and_smaller_sizes_together_take_nothing_away() {
    with_five_services(|sandbox, cluster, all_answer| {
        let former = agent::SMALL;
        for (changes, (services, endpoints), used, rejected) in [
            (true, (2, 6), former, vec![("max-services", 2, None), ("max-endpoints", 6, None)]),
            (false, (2, 6), former, vec![("max-services", 2, Some(5)), ("max-endpoints", 6, Some(15))]),
            (true, (5, 4096), Capacity { endpoints: 4096, ..former }, vec![("max-services", 5, None)]),
            (false, (5, 15), Capacity { services: 5, endpoints: 15 }, vec![]),
        ] {
            if changes {
                change_layout(sandbox, "frontends");
            }
            let capacity = Capacity { services, endpoints };
            let mut agent = start_sized(sandbox, capacity);
            assert_eq!(refused(&agent), rejected, "{capacity:?}");
            agent.follow(cluster);
            assert_eq!(capacity_of(sandbox), used, "{capacity:?}");
            assert!(all_answer(), "{capacity:?}");
        }
    });
}

/// Until the desired state is complete, the adopted state is served, and a smaller map loses nothing that
/// fits.
#[test]
fn former_maps_serve_until_the_first_plan() {
    with_web(2, |sandbox, web| {
        drop(web.serve(sandbox));
        let programs = program_ids(sandbox);
        for others in [&["frontends"][..], &[]] {
            for name in others {
                change_layout(sandbox, name);
            }
            let agent = start_sized(sandbox, Capacity { services: 128, endpoints: 64 });
            assert!(agent.kernel.is_staged());
            assert_eq!(program_ids(sandbox), programs);
            assert!(web.answers());
            drop(agent);
            assert!(web.answers(), "one that stops here has changed nothing");
            for name in others {
                change_layout(sandbox, name);
            }
        }
        assert!(Agent::start(sandbox).follow(&web.cluster).is_empty());
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

pub(crate) fn map_ids(sandbox: &Sandbox) -> BTreeMap<&'static str, u32> {
    MAPS.iter().map(|map| (map.name, map_id(sandbox, map.name))).collect()
}

/// Changes a pinned map's layout, or restores it.
pub(crate) fn change_layout(sandbox: &Sandbox, name: &str) {
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
    with_web(3, |sandbox, web| {
        drop(web.serve(sandbox));
        let of_image: Vec<&str> =
            MAPS.iter().filter(|map| map.role == Role::Image).map(|map| map.name).collect();
        web.under_load(4000, 10, |generation| {
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
            assert!(!agent.follow(&web.cluster).is_empty(), "all of it is rewritten");
            assert_eq!(&agent.image(), agent.state.image());
        });
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
    });
}

/// Does something to a pinned map.
type Change = fn(&Sandbox, &str);

/// A service with affinity, its clients and its counters lose nothing when single maps are recreated while
/// eight threads connect, except what the map itself holds.
#[test]
fn a_map_beside_the_image_is_made_anew_alone() {
    with_web(8, |sandbox, web| {
        let (service, mut cluster) = (web.service, web.cluster.clone());
        let object = cluster.services.values().next().unwrap().clone();
        cluster.set(cluster::with_affinity(object, None));
        let mut agent = Agent::start(sandbox);
        agent.follow(&cluster);
        let image = agent.image();
        let connected = connected(Domain::V4, Tcp, service);
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
        web.under_load(2000, changes.len(), |generation| {
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
        });
    });
}

/// An earlier version wrote one layout for all maps into `meta` and had no `layouts`. Its maps serve until
/// the first plan. After a downgrade it treats these maps in the same way.
#[test]
fn maps_of_an_agent_without_layouts_are_replaced() {
    with_web(2, |sandbox, web| {
        drop(web.serve(sandbox));
        assert_ne!(maps::find("meta").unwrap().layout, 2, "the earlier version wrote another one");
        fs::remove_file(sandbox.pin_path().join(maps::LAYOUTS)).unwrap();
        let before = map_ids_but_layouts(sandbox);
        let mut agent = Agent::start(sandbox);
        assert!(agent.kernel.is_staged());
        assert_eq!(map_ids_but_layouts(sandbox), before);
        assert!(web.answers());
        agent.follow(&web.cluster);
        assert!(web.answers());
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

/// The next agent completes or discards what an agent left that stopped while it changed the maps. Removal
/// works too.
#[test]
fn an_unfinished_change_of_maps_is_ended() {
    with_web(2, |sandbox, web| {
        let larger = |add: u32| {
            let Capacity { services, endpoints } = agent::SMALL;
            start_sized(sandbox, Capacity { services: services + add, endpoints })
        };
        drop(web.serve(sandbox));
        // Filled, but not complete.
        drop(larger(1));
        assert!(sandbox.pin_path().join(pins::NEXT).is_dir());
        drop(Agent::start(sandbox));
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        assert!(web.answers());
        // Complete, but not used yet.
        drop(larger(2));
        pins::commit(&sandbox.pin_path()).unwrap();
        // An agent with the former sizes turns it into another change; one with the new sizes adopts it.
        drop(Agent::start(sandbox));
        assert!(web.answers());
        let mut agent = larger(2);
        assert!(!agent.kernel.is_staged());
        assert!(agent.follow(&web.cluster).is_empty());
        assert!(web.answers());
        assert_eq!(pinned(sandbox), wanted_pins(sandbox));
        // Removal works in the middle of either.
        for is_complete in [false, true] {
            drop(agent);
            drop(larger(3));
            if is_complete {
                pins::commit(&sandbox.pin_path()).unwrap();
            }
            pins::remove(&sandbox.pin_path()).unwrap();
            assert!(!sandbox.pin_path().exists());
            agent = larger(2);
            agent.follow(&web.cluster);
        }
    });
}
