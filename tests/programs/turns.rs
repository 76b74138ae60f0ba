//! Two agents for the same pins: one runs, the other waits.

use std::path::Path;

use lb_core::model::Protocol;
use lb_tests::{client::call, command::run, installed::eventually};
use nix::{errno::Errno, sys::signal::Signal};

use crate::{
    socklb::{is_up, serve, with_town},
    town,
};

/// In the sandbox's network namespace, where nothing else listens.
pub(crate) const PORTS: [&str; 2] =
    ["--metrics-bind-address=127.0.0.1:10249", "--healthz-bind-address=127.0.0.1:10256"];

/// The status of a page, `000` without a response.
pub(crate) fn status_of(port: u16, page: &str) -> String {
    let url = format!("http://127.0.0.1:{port}/{page}");
    let output = run("curl", &["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", &url]);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// As in an update that starts the new agent before it stops the old one, with the same ports.
#[test]
fn the_second_agent_waits_for_the_first_and_takes_over() {
    with_town(|place, town| {
        let service = town::web()[0];
        let first = serve(place, &town.cluster(0..2), &PORTS);
        let waits = format!("process {}", first.id());
        let second = place.start(&PORTS);
        eventually("the second reports which agent it waits for", || {
            second.has_said_all(&["waiting", &waits])
        });
        assert_eq!(status_of(10256, "livez"), "200");
        assert_eq!(status_of(10256, "healthz"), "200", "the first one's answer");

        let third = place.start(&["--metrics-bind-address=", "--healthz-bind-address=127.0.0.1:10257"]);
        eventually("the third answers", || status_of(10257, "livez") == "200");
        assert_eq!(status_of(10257, "healthz"), "503", "it is not ready");
        assert_eq!(third.end(Signal::SIGTERM), Some(0), "a waiting agent can be stopped");
        place.write(&town.cluster(0..0));
        eventually("the first one applies changes", || !is_up(service));
        place.write(&town.cluster(0..2));
        eventually("the first one applies changes", || is_up(service));

        assert_eq!(first.end(Signal::SIGTERM), Some(0));
        assert!(is_up(service));
        eventually("the second has taken over", || second.has_said_all(&["taking over"]));
        eventually("it listens", || {
            status_of(10256, "healthz") == "200" && status_of(10249, "proxyMode") == "200"
        });
        place.write(&town.cluster(0..0));
        eventually("it follows", || !is_up(service));

        // A killed agent leaves no lock, and its ports are free a moment later.
        let fourth = place.start(&PORTS);
        eventually("the fourth waits", || fourth.has_said_all(&["waiting"]));
        assert_eq!(second.end(Signal::SIGKILL), None);
        place.write(&town.cluster(0..1));
        eventually("it follows", || is_up(service));
        eventually("it listens", || status_of(10256, "healthz") == "200");
        assert_eq!(fourth.end(Signal::SIGTERM), Some(0));
    });
}

#[test]
fn cleanup_beside_an_agent_names_it_and_the_next_one_starts_anew() {
    with_town(|place, town| {
        let service = town::web()[0];
        let first =
            serve(place, &town.cluster(0..2), &["--metrics-bind-address=", "--healthz-bind-address="]);
        let output = place.run(&["cleanup"]);
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && message.contains(&format!("process {}", first.id())),
            "{output:?}"
        );
        assert!(message.contains("stop it"), "{message}");
        assert_eq!(call(service, Protocol::Tcp), Err(Errno::ENETUNREACH));

        // Neither agent disturbs the other: the first has no pins in common with the second.
        let second = place.start(&["--metrics-bind-address=", "--healthz-bind-address="]);
        eventually("the service answers again", || is_up(service));
        assert_eq!(first.end(Signal::SIGTERM), Some(0));
        assert!(is_up(service));
        assert_eq!(second.end(Signal::SIGTERM), Some(0));
        place.text(&["cleanup"]);
        assert!(!Path::new(&place.pin_path).exists());
    });
}

/// An error during start leaves nothing behind.
#[test]
fn an_agent_without_its_port_leaves_no_directory() {
    with_town(|place, _town| {
        let _taken = std::net::TcpListener::bind("127.0.0.1:10249").unwrap();
        let (code, log) = place.start(&PORTS).wait();
        assert_eq!(code, Some(1), "{log:#?}");
        assert!(!Path::new(&place.pin_path).exists());
    });
}
