//! An agent with `--packets`: its rules, and calls that only they serve.

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use lb_core::{
    desired::{PacketMode, Settings},
    model::{
        Family,
        Protocol::{Tcp, Udp},
    },
    plan::Capacity,
    state::State,
    tables::Image,
};
use lb_kernel::{addresses, conntrack::Conntrack, nftables::Nftables};
use lb_tests::{
    Feature, agent,
    bed::{self, Outcome},
    client::{Domain, Socket, call},
    cluster::{self, Cluster, PortOf},
    command::text,
    installed::{Place, QUIET, eventually},
    outside, require,
    server::Servers,
};
use nix::sys::signal::Signal;

use crate::deployed::confined;

const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// Whether the kernel has the rules of a cluster, in the caller's network namespace.
pub(crate) fn are_right(cluster: &Cluster) -> bool {
    let settings = Settings { packets: PacketMode::All, ..agent::settings() };
    let mut state = State::new(settings, addresses::read(), Capacity::default(), &Image::default());
    let _issues = cluster.feed(&mut state);
    let _plan = state.sync();
    let Ok(mut nftables) = Nftables::open() else { return false };
    state.packets().tables().iter().all(|(id, wanted)| {
        let found = nftables.read(id).ok().and_then(|(found, _)| found);
        found.map(bed::without_clients).as_ref() == Some(wanted)
    })
}

fn endpoint(last: u8) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, last], 8080))
}

/// A load balancer whose source ranges hooks cannot check: only packets serve its address.
fn limited(ranges: &[&str], endpoints: &[SocketAddr]) -> Cluster {
    let service = cluster::service(
        "web",
        &[IpAddr::from([10, 96, 0, 1])],
        &[cluster::port("tcp", Tcp, 80), cluster::port("udp", Udp, 80)],
    );
    let mut service = cluster::with_spec(service, |spec| {
        spec.type_ = Some("LoadBalancer".to_owned());
        spec.load_balancer_source_ranges = Some(ranges.iter().map(ToString::to_string).collect());
    });
    let status = serde_json::json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}});
    service.status = Some(serde_json::from_value(status).unwrap());
    let mut cluster = Cluster::new();
    cluster.set(cluster::node("node", &[NODE]));
    cluster.set(service);
    for (name, protocol) in [("tcp", Tcp), ("udp", Udp)] {
        cluster.set_endpoints(&PortOf { service: "web", name, protocol }, endpoints);
    }
    cluster
}

const FLAGS: [&str; 2] = ["--packets=all", "--audit-interval=1s"];

#[test]
fn what_hooks_leave_alone_is_served_as_packets() {
    Place::test(&[Feature::Nftables], |sandbox, place| {
        sandbox.own([NODE, endpoint(1).ip(), endpoint(2).ip()]);
        text("ip", &["route", "add", "203.0.113.0/24", "dev", "lo"]);
        let _servers =
            Servers::start([1, 2].into_iter().flat_map(|n| [(endpoint(n), Tcp), (endpoint(n), Udp)]));
        let address = SocketAddr::from(([203, 0, 113, 1], 80));
        let admitting = limited(&["192.0.2.0/24", "127.0.0.0/8", "198.51.100.0/24"], &[endpoint(1)]);
        place.write(&admitting);
        let agent = place.start(&[&FLAGS[..], &QUIET].concat());
        eventually("the rules are there", || are_right(&admitting));
        for protocol in [Tcp, Udp] {
            assert_eq!(call(address, protocol).unwrap(), endpoint(1));
        }
        // A flow of UDP leaves the endpoint that is gone.
        let moved = limited(&["192.0.2.0/24", "127.0.0.0/8", "198.51.100.0/24"], &[endpoint(2)]);
        place.write(&moved);
        eventually("the rules have changed", || are_right(&moved));
        for protocol in [Tcp, Udp] {
            eventually("calls go to the new endpoint", || call(address, protocol).unwrap() == endpoint(2));
        }
        // A Service that is deleted while no agent runs leaves no flow either.
        let flow = Socket::new(Domain::V4, Udp);
        flow.connect(address).unwrap();
        assert_eq!(flow.ask().unwrap().server, endpoint(2));
        let (code, log) = agent.end_with_log(Signal::SIGKILL);
        assert!(code.is_none() && !log.iter().any(|line| line.contains("WARN")), "{log:#?}");
        let none = Cluster::new().with([cluster::node("node", &[NODE])]);
        place.write(&none);
        let agent = place.start(&[&FLAGS[..], &QUIET].concat());
        let n_flows = || {
            let flows = Conntrack::open().unwrap().entries(Family::V4, Udp).unwrap();
            flows.iter().filter(|flow| flow.destination == address).count()
        };
        eventually("the flow is deleted", || n_flows() == 0);
        eventually("the rules are gone", || are_right(&none));
        place.write(&moved);
        eventually("the rules are back", || are_right(&moved));
        let excluding = limited(&["192.0.2.128/25"], &[endpoint(2)]);
        place.write(&excluding);
        eventually("the rules have changed", || are_right(&excluding));
        let refused = TcpStream::connect_timeout(&address, Duration::from_millis(300)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        assert!(!agent.has_said("WARN"), "{:#?}", agent.log());
    });
}

#[test]
fn rules_that_others_change_are_repaired_and_outlive_the_agent() {
    Place::test(&[Feature::Nftables, Feature::Command("nft")], |sandbox, place| {
        sandbox.own([NODE]);
        let cluster = limited(&["192.0.2.0/24"], &[endpoint(1)]);
        place.write(&cluster);
        let flags = [&FLAGS[..], &QUIET].concat();
        let agent = place.start(&flags);
        eventually("the rules are there", || are_right(&cluster));
        for harm in [
            "flush ruleset",
            "delete table ip socklb",
            "add rule ip socklb services drop",
            "flush chain ip6 socklb refusals",
            "delete element ip socklb endpoints { 10.96.0.1 . tcp . 80 . 0x00000000 }",
            "add element ip socklb refused { 10.96.0.1 . tcp . 80 }",
            "add set ip socklb other { type ipv4_addr; }",
        ] {
            text("nft", &[harm]);
            assert!(!are_right(&cluster), "{harm}");
            eventually(harm, || are_right(&cluster));
        }
        // Rules of others stay.
        text("nft", &["add table ip theirs"]);
        let next = place.start(&flags);
        eventually("the next one waits", || next.has_said("waiting"));
        assert_eq!(agent.end(Signal::SIGKILL), None);
        eventually("the next one has synced", || {
            assert!(are_right(&cluster));
            next.has_said("synced")
        });
        assert!(are_right(&cluster));
        assert_eq!(next.end(Signal::SIGTERM), Some(0));
        assert!(are_right(&cluster));
        let without = place.start(&QUIET);
        eventually("they are removed", || without.has_said("removed the nftables rules"));
        assert_eq!(text("nft", &["list", "tables"]).trim(), "table ip theirs");
    });
}

/// As on a kernel without nftables: the probe fails before anything is pinned.
#[test]
fn an_agent_that_cannot_have_the_rules_attaches_nothing() {
    Place::test(&[Feature::Nftables, Feature::Command("setpriv")], |_sandbox, place| {
        let start = |more: &[&str]| {
            let mut command = confined("-net_admin");
            command.arg(&place.binary);
            let places = ["--node-name", "node", "--cgroup", &place.cgroup, "--pin-path", &place.pin_path];
            place.spawn(command, &[&places, &QUIET[..], more].concat())
        };
        let n_pinned = || fs::read_dir(&place.pin_path).map_or(0, Iterator::count);
        let (code, log) = start(&["--packets=all"]).wait();
        let refusal = "--packets: nftables: not permitted: run as root, or with CAP_NET_ADMIN; --packets=off";
        assert!(log.iter().any(|line| line.contains(refusal)), "{log:#?}");
        assert_eq!((code, n_pinned()), (Some(1), 0), "{log:#?}");
        // What it has is enough without packets.
        let agent = start(&[]);
        eventually("it attaches", || agent.has_said("attached"));
        assert!(n_pinned() > 0);
    });
}

/// Seconds of what `cargo xtask bench outside` does for a minute.
#[test]
fn no_connection_from_outside_fails_while_endpoints_and_agents_change() {
    let needs = [Feature::Programs, Feature::Nftables, Feature::Variable("SOCKLB_BIN")];
    if !needs.into_iter().all(require) {
        return;
    }
    let binary = env::var_os("SOCKLB_BIN").map(PathBuf::from).unwrap();
    let outcome = outside::run(&binary, &outside::Options::short(1));
    assert_eq!(outcome.failures, [""; 0], "{outcome}");
    assert!(outcome.n_calls > 0 && outcome.n_replaced > 0 && outcome.n_exchanges > 0, "{outcome}");
    assert!(outcome.n_agents.iter().all(|n| *n > 0), "{outcome}");
}

/// Before any audit, and an open connection continues.
#[test]
fn tables_that_others_delete_come_back_at_once() {
    Place::test(&[Feature::Nftables, Feature::Command("nft")], |sandbox, place| {
        sandbox.own([NODE, endpoint(1).ip()]);
        text("ip", &["route", "add", "203.0.113.0/24", "dev", "lo"]);
        let _servers = bed::serve([(endpoint(1), Tcp)]);
        let address = SocketAddr::from(([203, 0, 113, 1], 80));
        let cluster = limited(&["192.0.2.0/24", "127.0.0.0/8", "198.51.100.0/24"], &[endpoint(1)]);
        place.write(&cluster);
        let agent = place.start(&[&["--packets=all", "--audit-interval=60m"][..], &QUIET].concat());
        eventually("the rules are there", || are_right(&cluster));
        // As a service does that loads saved rules: another table is in the place of the first.
        let saved = "flush ruleset\ntable ip theirs { }\ntable ip socklb { }\ntable ip6 socklb { }\n";
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, saved).unwrap();
        let (mut open, _) = bed::connect(address, bed::PATIENCE).unwrap();
        let harms: [&[&str]; 4] = [
            &["flush", "ruleset"],
            &["delete", "table", "ip", "socklb"],
            &["delete", "table", "ip6", "socklb"],
            &["-f", file.path().to_str().unwrap()],
        ];
        for harm in harms {
            text("nft", harm);
            eventually("the tables are back", || are_right(&cluster));
            let Outcome::Reached { server, .. } = bed::call(address, Tcp, bed::PATIENCE) else {
                panic!("{harm:?}: not reached")
            };
            assert_eq!(server, endpoint(1), "{harm:?}");
            open.write_all(b"?").unwrap();
            open.read_exact(&mut [0]).unwrap();
        }
        assert!(text("nft", &["list", "tables"]).contains("table ip theirs"));
        assert_eq!(agent.n_said("repaired nftables rules that another program had changed"), 4);
        // Changes of others elsewhere cause none here.
        for n in 0..20 {
            text("nft", &["add", "table", "ip", &format!("other{n}")]);
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(agent.n_said("repaired nftables rules that another program had changed"), 4);
    });
}
