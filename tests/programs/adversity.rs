//! An agent whose environment fails: it reports that, is not ready if that matters, and keeps serving.

use std::{fs, os::fd::AsFd as _, path::Path};

use lb_common::maps::MAPS;
use lb_kernel::{
    Features, pins,
    syscall::{detach, open_pin},
};
use lb_tests::{command::text, installed::eventually};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::Signal,
};

use crate::{
    deployed::{capabilities, confined},
    socklb::{is_up, serve, with_town},
    town,
    turns::{PORTS, status_of},
};

fn is_ready() -> bool {
    status_of(10256, "healthz") == "200"
}

fn is_alive_and_not_ready() -> bool {
    status_of(10256, "healthz") == "503" && status_of(10256, "livez") == "200"
}

/// Unmounting the BPF file system takes the pins from the next agent, not from calls: this agent keeps them
/// alive.
#[test]
fn without_its_pins_an_agent_is_not_ready_and_serves_on() {
    with_town(|place, town| {
        let service = town::web()[0];
        let agent = serve(place, &town.cluster(0..2), &PORTS);
        eventually("it is ready", is_ready);
        let bpffs = Path::new(&place.pin_path).parent().unwrap();
        // The sandbox's mount namespace is the test's own.
        umount2(bpffs, MntFlags::MNT_DETACH).unwrap();
        eventually("it is logged", || agent.has_said_all(&["ERROR", "pins are gone", "restart"]));
        assert!(is_alive_and_not_ready());
        assert!(is_up(service), "attached programs stay");
        place.write(&town.cluster(0..0));
        eventually("changes are followed", || !is_up(service));
        let (code, log) = agent.end_with_log(Signal::SIGTERM);
        assert_eq!(code, Some(0), "{log:#?}");
        assert!(!log.iter().any(|line| line.contains("panicked")), "{log:#?}");

        // The next one cannot start, and names the missing mount.
        let (code, log) = place.start(&PORTS).wait();
        assert_eq!(code, Some(1), "{log:#?}");
        assert!(log.iter().any(|line| line.contains("mount -t bpf")), "{log:#?}");
    });
}

/// A deleted pin or a detached program: the agent is not ready until its next audit has restored everything.
#[test]
fn what_is_removed_comes_back_within_the_audits_interval() {
    with_town(|place, town| {
        let service = town::web()[0];
        let agent = serve(
            place,
            &town.cluster(0..2),
            &[&PORTS[..], &["--audit-interval=15s", "--self-test-interval=2s"]].concat(),
        );
        eventually("it is ready", is_ready);
        let pin = |name: &str| Path::new(&place.pin_path).join(name);
        let page =
            |port: u16, page: &str| text("curl", &["--silent", &format!("http://127.0.0.1:{port}/{page}")]);
        let has_counted = |name: &str, n: u32| {
            page(10249, "metrics").contains(&format!("socklb_pin_repairs_total{{pin=\"{name}\"}} {n}\n"))
        };
        let hooks: Vec<&str> = pins::hooks(Features::probe(), true).map(|hook| hook.name).collect();
        let maps: Vec<&str> = MAPS.iter().map(|map| map.name).collect();
        for (round, (what, names, is_detached)) in
            [("links", &hooks, false), ("maps", &maps, false), ("programs", &hooks, true)]
                .into_iter()
                .enumerate()
        {
            for name in names {
                if is_detached {
                    detach(open_pin(&pin(name)).unwrap().as_fd()).unwrap();
                } else {
                    fs::remove_file(pin(name)).unwrap();
                }
            }
            assert_eq!(is_up(service), !is_detached, "{what}: only pinned programs serve without an agent");
            eventually("it is not ready", || page(10256, "healthz").contains(r#""pinsLost":true"#));
            assert!(is_alive_and_not_ready(), "{what}");
            assert!(agent.has_said_all(&["WARN", "next audit restores them", names[0]]), "{what}");
            eventually("everything is restored", is_ready);
            assert!(is_up(service), "{what}");
            let n_links = u32::try_from(round / 2 + 1).unwrap();
            assert!(names.iter().all(|name| pin(name).exists() && has_counted(name, n_links)), "{what}");
            assert!(agent.has_said_all(&["WARN", "an audit restored", names[0]]), "{what}");
        }
        let n_lines = agent.n_said("an audit restored");
        assert_eq!(n_lines, 3, "one for each: {:#?}", agent.log());
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        assert!(is_up(service), "what was restored is pinned");
    });
}

/// The snapshot is for a start without the source: without disk space for it, everything else continues.
#[test]
fn a_state_directory_that_takes_nothing_is_named_once_and_harms_nothing() {
    with_town(|place, town| {
        let service = town::web()[0];
        let state_dir = place.state_dir().to_str().unwrap();
        for options in ["ro", "size=4k"] {
            place.write(&town.cluster(0..2));
            text("mount", &["-t", "tmpfs", "-o", options, "tmpfs", state_dir]);
            if options != "ro" {
                // Less than a page remains.
                fs::write(place.state_dir().join("filler"), vec![0; 4096]).unwrap();
            }
            let agent = place.start(&PORTS);
            let cause = if options == "ro" { "Read-only file system" } else { "No space left on device" };
            eventually("it is logged", || {
                agent.has_said_all(&["WARN", "snapshot is not up to date", state_dir, cause])
            });
            place.write(&town.cluster(0..0));
            eventually("changes are followed", || !is_up(service));
            place.write(&town.cluster(0..1));
            eventually("changes are followed", || is_up(service));
            // The first self-test may still be running.
            eventually("the node is ready", is_ready);
            let n_lines = agent.n_said("snapshot is not up to date");
            assert_eq!(n_lines, 1, "{options}");
            // It is written when there is space again.
            if options == "ro" {
                text("mount", &["-o", "remount,rw", state_dir]);
            } else {
                fs::remove_file(place.state_dir().join("filler")).unwrap();
                text("mount", &["-o", "remount,size=1m", state_dir]);
            }
            place.write(&town.cluster(0..2));
            eventually("the snapshot is written", || place.state_dir().join("snapshot").exists());
            eventually("it is logged", || {
                agent.has_said_all(&["INFO", "no longer", "snapshot is not up to date"])
            });
            assert_eq!(agent.end(Signal::SIGTERM), Some(0));
            text("umount", &[state_dir]);
        }
    });
}

/// Map sizes that are too small for what is served are rejected by name, with both numbers, and nothing is
/// removed.
#[test]
fn a_size_that_is_too_small_is_named_and_harms_nothing() {
    with_town(|place, town| {
        let service = town::web()[0];
        let agent = serve(place, &town.cluster(0..2), &PORTS);
        eventually("it is ready", is_ready);
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        let agent = place.start(&[&PORTS[..], &["--max-services=1"]].concat());
        eventually("it is logged", || {
            agent.has_said_all(&[
                "WARN",
                "--max-services=1 is too small",
                "4096 is used as before",
                "restart the agent",
            ])
        });
        eventually("it is ready", is_ready);
        let body = text("curl", &["--silent", "http://127.0.0.1:10256/healthz"]);
        assert!(body.contains(r#""sizesRefused":["max-services=1: "#), "{body}");
        assert!(is_up(service));
        place.write(&town.cluster(0..0));
        eventually("changes are followed", || !is_up(service));
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

/// Without any one of the documented capabilities, an agent does not start, reports it, and leaves nothing.
#[test]
fn an_agent_without_a_capability_names_what_it_may_not() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        // SYS_ADMIN includes the others; only destroying the sockets of pods needs it.
        let all: Vec<String> =
            capabilities().split(',').filter(|name| *name != "+sys_admin").map(str::to_owned).collect();
        let start = |missing: Option<&str>| {
            let some: Vec<&str> =
                all.iter().map(String::as_str).filter(|name| Some(*name) != missing).collect();
            assert_eq!(some.len() + usize::from(missing.is_some()), all.len(), "{all:?}");
            let some = some.join(",");
            let mut command = confined(&some);
            command.arg(&place.binary);
            let places = ["--node-name", "node", "--cgroup", &place.cgroup, "--pin-path", &place.pin_path];
            place.spawn(command, &[&places, &PORTS[..]].concat())
        };
        for missing in ["+bpf", "+net_admin", "+perfmon"] {
            let (code, log) = start(Some(missing)).wait();
            assert_eq!(code, Some(1), "without {missing}: {log:#?}");
            let last = log.last().unwrap();
            assert!(
                last.contains("ermitted") && !log.iter().any(|line| line.contains("panicked")),
                "{log:#?}"
            );
            // Remnants of the refused start do not break the next one, and serve no calls.
            assert!(!is_up(town::web()[0]));
            let _removed_if_any = place.run(&["cleanup"]);
        }
        let _agent = start(None);
        eventually("the service answers without SYS_ADMIN", || is_up(town::web()[0]));
    });
}
