//! Excluded callers, by cgroup.

use std::{collections::BTreeSet, fs, net::SocketAddr, path::Path, thread, time::Duration};

use lb_common::limits;
use lb_core::model::Protocol::{Tcp, Udp};
use lb_kernel::{
    KernelError, Options,
    cgroup::{self, Extent},
    exclusion::{CgroupPosition, Exclusion, Hierarchy},
};
use lb_tests::{
    Sandbox,
    cgroup::make_threaded,
    client::{Domain, Socket, call},
};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use crate::fixture::{addresses, in_each_mode, servers_of, service_address, services, start};

fn empty_service() -> SocketAddr {
    "10.96.0.2:80".parse().unwrap()
}

pub(crate) fn place(directory: &Path) -> CgroupPosition {
    Hierarchy::find().unwrap().position_of(directory).unwrap()
}

/// The outcome of a call of each kind from this thread.
fn outcomes() -> Vec<Result<(), Errno>> {
    let sent = |domain| Socket::new(domain, Udp).send_to(b"?", service_address(domain)).map(drop);
    let mut outcomes = vec![call(empty_service(), Tcp).map(drop)];
    for domain in Domain::ALL {
        outcomes.extend([
            Socket::new(domain, Tcp).connect(service_address(domain)),
            Socket::new(domain, Udp).connect(service_address(domain)),
            sent(domain),
        ]);
    }
    outcomes
}

fn are_served() -> bool {
    let (refused, others) = (Err(Errno::ECONNREFUSED), 1..);
    let outcomes = outcomes();
    outcomes[0] == refused && outcomes[others].iter().all(Result::is_ok)
}

/// Whether calls pass: the sandbox has no routes.
fn are_left_alone() -> bool {
    outcomes().iter().all(|outcome| *outcome == Err(Errno::ENETUNREACH))
}

/// Runs a closure on a thread in a child cgroup.
pub(crate) fn in_child<R: Send>(parent: &Path, body: impl FnOnce(&Path) -> R + Send) -> R {
    let child = parent.join("child");
    make_threaded(&child).unwrap();
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            fs::write(child.join("cgroup.threads"), nix::unistd::gettid().to_string()).unwrap();
            body(&child)
        });
        thread.join()
    });
    // A thread still counts for a moment after it exits.
    for _ in 0..1000 {
        if fs::remove_dir(&child).is_ok() {
            break;
        }
        thread::sleep(Duration::from_millis(1));
    }
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn with_agent(excludes: bool, test: impl Fn(&Sandbox, &mut Exclusion) + Send + Sync) {
    Sandbox::test(|sandbox| {
        let cluster = services(&[Tcp, Udp], |domain| {
            vec![(service_address(domain), addresses::<1>(domain, 8001).to_vec())]
        });
        let cluster = cluster.serving("empty", empty_service(), Tcp, &[]);
        let _servers = servers_of(&cluster);
        in_each_mode(sandbox, |options| {
            let mut agent = start(&Options { excludes, ..options.clone() });
            agent.follow(&cluster);
            test(sandbox, &mut Exclusion::open(&options.pin_path).unwrap());
        });
    });
}

#[test]
fn calls_from_an_excluded_cgroup_are_left_alone() {
    with_agent(true, |sandbox, exclusion| {
        assert!(are_served());
        let own = place(sandbox.cgroup().path());
        assert!(exclusion.set(&[own].into()).unwrap());
        assert!(are_left_alone());
        assert!(in_child(sandbox.cgroup().path(), |_| are_left_alone()), "and those from below it");
        assert_eq!(exclusion.ids().unwrap(), BTreeSet::from([own.id]));

        assert!(!exclusion.set(&[own].into()).unwrap(), "nothing changed");
        // Another level, another cgroup: this one is served again.
        let elsewhere = CgroupPosition { id: own.id + 1_000_000, levels: own.levels << 1 };
        assert!(exclusion.set(&[elsewhere].into()).unwrap());
        assert!(are_served());
        assert!(exclusion.set(&BTreeSet::new()).unwrap());
        assert!(are_served());
    });
}

#[test]
fn the_cgroups_beside_and_above_an_excluded_one_are_served() {
    with_agent(true, |sandbox, exclusion| {
        let in_child_alone = in_child(sandbox.cgroup().path(), |child| {
            assert!(are_served());
            exclusion.set(&[place(child)].into()).unwrap();
            are_left_alone()
        });
        assert!(in_child_alone);
        assert!(are_served());
        exclusion.set(&BTreeSet::new()).unwrap();
    });
}

/// Runs a closure in a cgroup namespace whose root is the calling thread's cgroup. Only this part of the
/// hierarchy is mounted, as on a node that is a container. The closure gets the mount point.
fn in_container<R>(body: impl FnOnce(&Path) -> R) -> R {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWNS).unwrap();
    let node = tempfile::tempdir().unwrap();
    while let Ok(mounted) = cgroup::find_any() {
        umount2(&mounted, MntFlags::MNT_DETACH).unwrap();
    }
    mount(Some("none"), node.path(), Some("cgroup2"), MsFlags::empty(), NONE).unwrap();
    let result = body(node.path());
    umount2(node.path(), MntFlags::MNT_DETACH).unwrap();
    result
}

/// Runs a closure as deep as this, each in a child cgroup of the one above.
fn in_containers(parent: &Path, depth: usize, body: &(dyn Fn(&Path) + Sync)) {
    in_child(parent, |_| {
        in_container(|node| if depth == 1 { body(node) } else { in_containers(node, depth - 1, body) });
    });
}

/// The node's view lacks the machine's root, from which programs count levels.
#[test]
fn exclusion_holds_three_cgroup_namespaces_deep() {
    with_agent(true, |sandbox, exclusion| {
        let levels = place(sandbox.cgroup().path()).levels;
        in_containers(sandbox.cgroup().path(), 3, &|node| {
            assert!(matches!(cgroup::find_root(), Err(KernelError::OwnCgroup { .. })));
            in_child(node, |pod| {
                assert_eq!(cgroup::find_root().unwrap(), node);
                assert_eq!(cgroup::extent(node), Extent::Node);
                assert_eq!(cgroup::extent(pod), Extent::Cgroup);
                assert!(are_served());
                let place = place(pod);
                assert_eq!(Hierarchy::find().unwrap().own_position().unwrap(), place);
                let mut exclusion = Exclusion::open(&sandbox.pin_path()).unwrap();
                assert!(exclusion.set(&[place].into()).unwrap());
                assert!(are_left_alone());
                assert_eq!(place.levels.count_ones(), 14, "from the second level");
                assert_ne!(place.levels & (levels << 4), 0);
            });
            assert!(are_served(), "the cgroup above");
        });
        exclusion.set(&BTreeSet::new()).unwrap();
    });
}

/// Without exclusions, the programs have no code that reads the map.
#[test]
fn agents_that_exclude_nobody_do_not_look() {
    with_agent(false, |sandbox, exclusion| {
        exclusion.set(&[place(sandbox.cgroup().path())].into()).unwrap();
        assert!(are_served());
        exclusion.set(&BTreeSet::new()).unwrap();
    });
}

/// The map is full of wanted cgroups, or of foreign entries.
#[test]
fn a_full_map_keeps_the_oldest_and_loses_strangers() {
    with_agent(true, |sandbox, exclusion| {
        let most = u64::from(limits::MAX_EXCLUDED);
        let places = |ids: std::ops::Range<u64>| -> BTreeSet<CgroupPosition> {
            ids.map(|id| CgroupPosition { id: 1_000_000_000 + id, levels: 1 << 3 }).collect()
        };
        let ids =
            |places: BTreeSet<CgroupPosition>| places.iter().map(|place| place.id).collect::<BTreeSet<u64>>();
        let full = exclusion.set(&places(0..most + 1));
        assert!(matches!(full, Err(KernelError::MapFull { name: "excluded" })), "{full:?}");
        assert_eq!(exclusion.ids().unwrap(), ids(places(0..most)));

        // None of these is wanted, as if another program had filled the map.
        let wanted = in_child(sandbox.cgroup().path(), |directory| {
            let wanted = BTreeSet::from([place(directory)]);
            assert!(exclusion.set(&wanted).unwrap());
            assert!(are_left_alone());
            wanted
        });
        assert_eq!(exclusion.ids().unwrap(), ids(wanted));
    });
}
