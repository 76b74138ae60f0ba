use std::{
    cell::Cell,
    net::Ipv4Addr,
    ops::Range,
    time::{Duration, Instant},
};

use lb_core::model::{
    Cidr, Placement, Protocol, ServiceKey, ServicePort, SliceEndpoint, SlicePort, Unselected,
    annotation::DEFAULT_WEIGHT,
};
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::controller::save::SnapshotSchedule;

/// Injects faults into the writer's steps: see [`Files::step`](super::writer).
#[derive(Debug, Default)]
pub(super) struct Fault {
    /// Number of steps before the fault.
    n_steps: Option<u32>,
    /// Whether all further steps fail, as after a kill; else one step fails, as on a full disk.
    kills: bool,
    n_done: Cell<u32>,
}

impl Fault {
    pub(super) fn step(&self) -> io::Result<()> {
        let n_done = self.n_done.replace(self.n_done.get() + 1);
        let fails = |n_steps| if self.kills { n_done >= n_steps } else { n_done == n_steps };
        if self.n_steps.is_some_and(fails) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

fn settings() -> Settings {
    Settings {
        node_name: "node-a".into(),
        node_ports: 30000..=32767,
        node_port_addresses: NodePortAddresses::Primary,
        external_ips: ExternalIps::Nodes,
        packets: PacketMode::External,
        service_cidrs: Some(Vec::new()),
    }
}

fn ipv4(number: u64) -> Ipv4Addr {
    u32::try_from(number).unwrap().into()
}

fn service(n: u64) -> Service {
    let ports = vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: None }];
    Service {
        created: Some(1_700_000_000 + n.cast_signed()),
        cluster_ipv4: Some(ipv4(0x0a60_0000 + n)),
        ..Service::with_ports(ServiceKey::new("shop", &format!("web-{n}")), ports)
    }
}

fn service_cidr(name: &str, n: u64) -> ServiceCidr {
    ServiceCidr { name: name.into(), cidrs: vec![Cidr::new(ipv4(0x0a00_0000 | n << 16).into(), 16).unwrap()] }
}

/// Numbers that do not compress.
fn scatter(n: u64) -> u64 {
    let mixed = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A slice as in a cluster of a thousand nodes. `version` changes one endpoint, `seed` all.
fn slice(service: u64, n_endpoints: u64, seed: u64, version: u64) -> Slice {
    let endpoint = |n: u64| {
        let random = scatter(service << 32 ^ n << 24 ^ seed << 40 ^ if n == 0 { version } else { 0 });
        let node = random % 1000;
        SliceEndpoint {
            address: ipv4(0x0a80_0000 | node << 8 | random >> 32 & 0xff).into(),
            ready: true,
            serving: true,
            terminating: false,
            placement: Arc::new(Placement {
                node: Some(format!("worker-{node}").into()),
                zone: Some(format!("zone-{}", node % 3).into()),
            }),
            hints: None,
            hostname: None,
            weight: DEFAULT_WEIGHT,
        }
    };
    let suffix = scatter(service) & 0xf_ffff;
    Slice {
        name: format!("web-{service}-{suffix:05x}").into(),
        service: ServiceKey::new("shop", &format!("web-{service}")),
        ipv6: false,
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: (0..n_endpoints).map(endpoint).collect(),
        trigger_time: Some(1_700_000_000_000_000_000 + (scatter(version) % 3_600_000_000_000).cast_signed()),
    }
}

/// A snapshot that differs for each number.
fn numbered(n: u64) -> Snapshot {
    let mut store = Store::new();
    let _changes = store.set_service(&service(n % 3).key.clone(), Some(service(n % 3)));
    let _changes = store.set_node("node-a", Some(Node { name: "node-a".into(), ..Node::default() }));
    let other = Service { unselected: Some(Unselected::Labelled("a=b".into())), ..service(3) };
    let _changes = store.set_service(&other.key.clone(), Some(other));
    let _changes = store.set_service_cidr("kubernetes", Some(service_cidr("kubernetes", n)));
    Snapshot::of(&settings(), &[ipv4(n).into()], &store)
}

fn read(directory: &Path) -> Snapshot {
    Snapshot::read(directory).unwrap()
}

#[test]
fn what_is_written_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let state_dir = directory.path().join("made/on/demand");
    let written = numbered(1);
    Writer::new(&state_dir).write(written.clone()).unwrap();
    // The next agent finds the same state, and shares its own objects from then on.
    let mut next = Writer::new(&state_dir);
    let again = next.write(written.clone()).unwrap();
    assert_eq!((again.n_bytes, again.has_read), (0, true));
    let kept = &next.on_disk.as_ref().unwrap().snapshot;
    assert!(Arc::ptr_eq(&kept.services[0], &written.services[0]));
    assert_eq!(read(&state_dir), written);
    assert_eq!(written.settings(), settings());
    assert!(modified(&state_dir).is_some());
}

#[test]
fn damage_is_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(Snapshot::read(directory.path()), Err(SnapshotError::Missing { .. })));
    Writer::new(directory.path()).write(numbered(1)).unwrap();
    let path = directory.path().join(FILE_NAME);
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 1;
        for damage in [&damaged, &good[..at]] {
            fs::write(&path, damage).unwrap();
            assert!(matches!(Snapshot::read(directory.path()), Err(SnapshotError::Corrupt { .. })), "{at}");
        }
    }
    let newer = b"socklb-snapshot format=4 and so on\n";
    fs::write(&path, newer).unwrap();
    let error = Snapshot::read(directory.path()).unwrap_err().to_string();
    assert!(error.contains("format 4, this socklb reads 2 and 3"), "{error}");
}

/// The format of agents without a journal.
#[test]
fn the_format_without_a_journal_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE_NAME);
    let json = r#"{"node_name":"node-a","node_ports":[30000,32767],"node_port_addresses":"Primary","interfaces":["10.0.0.7"],"services":[],"slices":[],"nodes":[{"name":"node-a","zone":"zone-1","addresses":["10.0.0.7"],"being_deleted":false}]}"#;
    let header = format!("socklb-snapshot format=2 bytes={} crc32=d1405d33\n", json.len());
    fs::write(&path, format!("{header}{json}")).unwrap();
    // A journal that a later version left is ignored.
    fs::write(directory.path().join(JOURNAL), codec::journal_line(0)).unwrap();
    let found = read(directory.path());
    assert_eq!(found.nodes[0].zone.as_deref(), Some("zone-1"));
    assert_eq!(found.service_cidrs, []);
    let mut writer = Writer::new(directory.path());
    writer.write(found.clone()).unwrap();
    assert_eq!(read(directory.path()), found);
    assert!(fs::read(&path).unwrap().starts_with(b"socklb-snapshot format=3 "), "but no longer written");
}

/// Services and slices that are added, changed and removed; slices also move to another service.
fn histories() -> impl Strategy<Value = Vec<Snapshot>> {
    let object = || (0..4_u64, prop::option::of((0..3_u16, 0..3_u64)));
    let step = (vec(object(), 0..4), vec(object(), 0..4), vec(object(), 0..2), vec(object(), 0..2));
    vec(step, 2..8).prop_map(|steps| {
        let mut store = Store::new();
        let history = steps.into_iter().enumerate().map(|(n, (services, slices, nodes, cidrs))| {
            for (name, change) in services {
                let changed = change.map(|(port, _)| Service {
                    ports: vec![ServicePort { port: 80 + port, ..service(name).ports.remove(0) }],
                    ..service(name)
                });
                let _changes = store.set_service(&service(name).key.clone(), changed);
            }
            for (name, change) in slices {
                let key = slice(name, 0, 0, 0).key();
                let changed = change.map(|(of, seed)| Slice {
                    service: ServiceKey::new("shop", &format!("web-{of}")),
                    ..slice(name, 2, seed, 0)
                });
                let _changes = store.set_slice(&key, changed);
            }
            for (name, change) in nodes {
                let name: Arc<str> = format!("node-{name}").into();
                let changed = change.map(|(zone, _)| Node {
                    name: name.clone(),
                    zone: Some(format!("zone-{zone}").into()),
                    ..Node::default()
                });
                let _changes = store.set_node(&name, changed);
            }
            for (name, change) in cidrs {
                let name = format!("cidr-{name}");
                let changed = change.map(|(network, _)| service_cidr(&name, network.into()));
                let _changes = store.set_service_cidr(&name, changed);
            }
            Snapshot::of(&settings(), &[ipv4(n as u64 / 2).into()], &store)
        });
        history.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Also across restarts of the agent.
    #[test]
    fn any_history_is_read_as_it_was_written(history in histories(), restarts in vec(any::<bool>(), 8)) {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(directory.path());
        for (snapshot, restarts) in history.into_iter().zip(restarts) {
            if restarts {
                writer = Writer::new(directory.path());
            }
            writer.write(snapshot.clone()).unwrap();
            let found = Found::read(directory.path()).unwrap();
            prop_assert_eq!(found.snapshot, snapshot);
            prop_assert_eq!(found.n_lost, 0);
        }
    }

    /// Reading returns the state as written up to that place. The next agent continues after it.
    #[test]
    fn a_journal_that_is_cut_or_altered_loses_its_end_only(
        history in histories(),
        at in any::<prop::sample::Index>(),
        flips in 0..=8_u8,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(JOURNAL);
        let mut writer = Writer::new(directory.path());
        let mut ends = Vec::new();
        for snapshot in &history {
            writer.write(snapshot.clone()).unwrap();
            ends.push(fs::metadata(&path).map_or(0, |data| data.len()));
        }
        let Ok(mut journal) = fs::read(&path) else { return Ok(()) };
        let at = at.index(journal.len());
        match flips {
            8 => journal.truncate(at),
            bit => journal[at] ^= 1 << bit,
        }
        fs::write(&path, &journal).unwrap();
        let found = Found::read(directory.path()).unwrap();
        let expected = ends.iter().rposition(|end| *end <= at as u64).unwrap();
        prop_assert_eq!(&found.snapshot, &history[expected]);
        let mut next = Writer::new(directory.path());
        for snapshot in [&history[0], history.last().unwrap()] {
            next.write(snapshot.clone()).unwrap();
            prop_assert_eq!(&read(directory.path()), snapshot);
        }
    }
}

/// An agent is killed, or a step fails, at each place in turn: while it writes a snapshot, starts a journal,
/// or appends to it.
#[test]
fn every_step_leaves_the_former_or_the_new_state() {
    for n_before in 0..3 {
        for kills in [false, true] {
            for n_steps in 0.. {
                let what = format!("{n_before} written before, {n_steps} steps, killed: {kills}");
                let directory = tempfile::tempdir().unwrap();
                let mut writer = Writer::new(directory.path());
                for n in 0..n_before {
                    writer.write(numbered(n)).unwrap();
                }
                writer.files.fault = Fault { n_steps: Some(n_steps), kills, ..Fault::default() };
                let result = writer.write(numbered(n_before));
                let found = Snapshot::read(directory.path()).ok();
                let (former, new) = (n_before.checked_sub(1).map(numbered), Some(numbered(n_before)));
                if result.is_ok() {
                    assert_eq!(found, new, "{what}");
                } else {
                    assert!(found == former || found == new, "{what}: {found:?}");
                }
                writer.files.fault = Fault::default();
                if kills {
                    writer = Writer::new(directory.path());
                }
                for n in [n_before + 1, n_before + 2] {
                    writer.write(numbered(n)).unwrap();
                    assert_eq!(Found::read(directory.path()).unwrap().n_lost, 0, "{what}");
                    assert_eq!(read(directory.path()), numbered(n), "{what}");
                }
                if result.is_ok() {
                    assert!(n_steps >= 4, "{what}: every step fails once");
                    break;
                }
            }
        }
    }
}

#[test]
fn files_that_others_removed_or_replaced_are_made_anew() {
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 5] = [
        ("removed", |dir| assert_eq!(remove(dir).unwrap().len(), 2)),
        ("the journal is gone", |dir| fs::remove_file(dir.join(JOURNAL)).unwrap()),
        ("the snapshot is gone", |dir| fs::remove_file(dir.join(FILE_NAME)).unwrap()),
        ("another agent", |dir| {
            Writer::new(dir).write(numbered(70)).unwrap();
        }),
        ("the journal is cut", |dir| {
            File::options().write(true).open(dir.join(JOURNAL)).unwrap().set_len(60).unwrap();
        }),
    ];
    for (what, harm) in harms {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(directory.path());
        for n in 0..3 {
            writer.write(numbered(n)).unwrap();
        }
        harm(directory.path());
        for n in 3..6 {
            writer.write(numbered(n)).unwrap();
            assert_eq!(read(directory.path()), numbered(n), "{what}");
        }
    }
}

/// A reader that began before a new snapshot does not take the old one for the newest.
#[test]
fn a_reader_never_goes_back() {
    let directory = tempfile::tempdir().unwrap();
    let numbered = |n: u64| {
        // A record of a quarter of the maximum journal of a small snapshot.
        let interfaces = (0..3_000).map(|k| IpAddr::V6((u128::from(scatter(n << 32 | k)) << 64).into()));
        Snapshot { node_ports: (0, n.try_into().unwrap()), interfaces: interfaces.collect(), ..numbered(0) }
    };
    let mut writer = Writer::new(directory.path());
    writer.write(numbered(0)).unwrap();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let (mut n_snapshots, mut len) = (0, 0);
            for n in 1..300 {
                writer.write(numbered(n)).unwrap();
                let found = writer.on_disk.as_ref().unwrap().journal_len;
                n_snapshots += u32::from(found < len);
                len = found;
            }
            n_snapshots
        });
        let mut last = 0;
        while !writing.is_finished() {
            let (_, n) = read(directory.path()).node_ports;
            assert!(n >= last, "{n} after {last}");
            last = n;
        }
        assert!(writing.join().unwrap() > 10, "snapshots were replaced");
    });
}

/// Writes what an agent writes while a cluster of 10,000 services with 10 endpoints each changes. Returns the
/// bytes per minute. The agent is killed at second `killed`. `change` gets the seconds since the last write.
fn octets_by_minute(n_minutes: u64, killed: u64, mut change: impl FnMut(&mut Store, Range<u64>)) -> Vec<u64> {
    let directory = tempfile::tempdir().unwrap();
    let (mut writer, mut store) = (Writer::new(directory.path()), Store::new());
    let start = Instant::now();
    let mut saving = SnapshotSchedule::new(start);
    let (mut minutes, mut changed) = (vec![0; usize::try_from(n_minutes).unwrap()], 0);
    for seconds in (2..n_minutes * 60).step_by(2) {
        let now = start + Duration::from_secs(seconds);
        if seconds == killed {
            (writer, saving) = (Writer::new(directory.path()), SnapshotSchedule::new(now));
        }
        saving.changed();
        if saving.begin(now) {
            change(&mut store, std::mem::replace(&mut changed, seconds)..seconds);
            let written = writer.write(Snapshot::of(&settings(), &[], &store)).unwrap();
            saving.ended(Some(written.n_changed), now);
            minutes[usize::try_from(seconds / 60).unwrap()] += written.n_bytes;
        }
    }
    assert_eq!(read(directory.path()), Snapshot::of(&settings(), &[], &store));
    minutes
}

const N_SERVICES: u64 = 10_000;

fn set(store: &mut Store, n: u64, n_endpoints: u64, seed: u64, version: u64) {
    let _changes = store.set_service(&service(n).key.clone(), Some(service(n)));
    let slice = slice(n, n_endpoints, seed, version);
    let _changes = store.set_slice(&slice.key(), Some(slice));
}

/// Whatever changes in a cluster of this size.
#[test]
fn at_most_two_megabytes_are_written_a_minute() {
    type Change = fn(&mut Store, Range<u64>);
    let cases: [(&str, u64, u64, Change); 3] = [
        ("created in five minutes, with an event for each endpoint", 2, 30, |store, seconds| {
            for event in seconds.start * 333..seconds.end * 333 {
                // A hundred services start at a time.
                set(store, event / 1000 * 100 + event % 100, 1 + event % 1000 / 100, 0, 0);
            }
        }),
        ("50 changes a second", 3, 90, |store, seconds| {
            let all = if seconds.start == 0 { 0..N_SERVICES } else { 0..0 };
            all.for_each(|n| set(store, n, 10, 0, 0));
            for change in seconds.start * 50..seconds.end * 50 {
                set(store, scatter(change) % N_SERVICES, 10, 0, change);
            }
        }),
        ("everything, all the time", 4, 0, |store, seconds| {
            (0..N_SERVICES).for_each(|n| set(store, n, 10, seconds.end, seconds.end));
        }),
    ];
    for (what, n_minutes, killed, change) in cases {
        let minutes = octets_by_minute(n_minutes, killed, change);
        // The first minute includes the first snapshot.
        let mean = minutes[1..].iter().sum::<u64>() / (n_minutes - 1);
        assert!(mean <= 2_000_000, "{what}: {mean} a minute: {minutes:?}");
        eprintln!("{what}: {minutes:?}");
    }
}
