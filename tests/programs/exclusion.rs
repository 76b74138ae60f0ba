//! Programs that opt out.

use std::{fs, path::Path, process::Command};

use lb_tests::{
    cgroup::{make_threaded, remove_tree},
    installed::eventually,
};
use nix::sys::signal::Signal;

use crate::{
    http::LISTEN,
    socklb::{is_up, serve, with_town},
    town,
};

/// Runs curl in a cgroup, as a container runtime would. `false` if it cannot connect.
pub(crate) fn answers_from(cgroup: &str) -> bool {
    let script =
        "echo 0 > \"$0/cgroup.threads\" && exec curl --silent --max-time 5 --output /dev/null \"$1\"";
    let url = format!("http://{}/", town::web()[0]);
    Command::new("sh").args(["-c", script, cgroup, &url]).status().unwrap().success()
}

/// One cgroup exists from the start, the other is created later.
#[test]
fn processes_are_excluded_by_their_cgroup() {
    with_town(|place, town| {
        let [early, late] = ["early", "late"].map(|name| format!("{}/{name}", place.cgroup));
        let make = |path: &str| make_threaded(Path::new(path)).unwrap();
        make(&early);
        let flag = format!("--exclude-cgroup={early},{late}");
        let agent = serve(place, &town.cluster(0..2), &[&LISTEN[..], &[&flag]].concat());
        eventually("the first cgroup is excluded", || !answers_from(&early));
        let said = |what: &str| agent.has_said_all(&[what, &late]);
        eventually("the missing cgroup is reported", || said("not excluded until it exists"));
        make(&late);
        eventually("it is excluded once it exists", || !answers_from(&late));
        eventually("that is reported", || said("found and excluded"));
        assert!(agent.has_said("no call has shown that its calls bypass services"), "{:#?}", agent.log());
        let status = || place.text(&["status"]);
        eventually("both are listed", || [&early, &late].iter().all(|path| status().contains(*path)));
        assert!(is_up(town::web()[0]), "the others are served");

        // The exclusion lasts while no agent runs, and ends with the next agent that does not exclude it.
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        assert!(!answers_from(&early));
        let agent = place.start(&LISTEN);
        eventually("it is served again", || answers_from(&early));
        drop(agent);
        for path in [early, late] {
            eventually("the cgroup is empty", || fs::remove_dir(&path).is_ok());
        }
    });
}

/// An agent above serves what the one below excludes: the exclusion is not confirmed before a call has shown
/// it.
#[test]
fn an_exclusion_that_a_call_disproves_is_not_claimed() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        let often = "--self-test-interval=200ms";
        let above = place.start(&[LISTEN[0], LISTEN[1], often]);
        eventually("the agent above is ready", || above.has_said("self-test passed"));
        let (served, excluded) = (format!("{}/below", place.cgroup), format!("{}/below/batch", place.cgroup));
        for path in [&served, &excluded] {
            make_threaded(Path::new(path)).unwrap();
        }
        let flag = format!("--exclude-cgroup={excluded}");
        let mut command = Command::new(&place.binary);
        command.env("SOCKLB_PIN_PATH", format!("{}-below", place.pin_path)).env("SOCKLB_CGROUP", &served);
        let below = place.spawn(command, &[LISTEN[0], LISTEN[1], often, "--node-name=node", &flag]);
        eventually("the agent below is ready", || below.has_said("self-test passed"));
        eventually("it reports a doubt", || {
            let doubt = "no call has shown that its calls bypass services";
            below.has_said_all(&[doubt, &excluded, "redirected despite the exclusion"])
        });
        assert!(!below.has_said("calls from these cgroups are excluded"), "{:#?}", below.log());

        drop(above);
        place.text(&["cleanup"]);
        eventually("a call shows it once nothing above serves it", || {
            below.has_said("calls from these cgroups are excluded")
        });
        drop(below);
        eventually("the cgroups are empty", || remove_tree(Path::new(&served)).is_ok());
    });
}

/// The reason is in the Service, and `explain` reports it.
#[test]
fn an_excluded_service_is_explained() {
    with_town(|place, town| {
        let mut cluster = town.cluster(0..2);
        let (_, service) = cluster.services.iter_mut().find(|((_, name), _)| name == "web-v4").unwrap();
        let annotations = service.metadata.annotations.get_or_insert_default();
        annotations.insert("socklb.io/exclude".to_owned(), "true".to_owned());
        place.write(&cluster);
        let _agent = place.start(&LISTEN);
        let address = town::web()[0].to_string();
        let explain = || place.text(&["explain", &address]);
        eventually("the snapshot is written", || place.state_dir().read_dir().unwrap().count() > 0);
        eventually("the reason is named", || {
            explain().contains("default/web-v4 is excluded by its annotation")
        });
        assert!(!is_up(town::web()[0]));
        assert!(is_up(town::web()[1]), "the others are served");
    });
}
