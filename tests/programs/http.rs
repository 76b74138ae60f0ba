//! The agent's HTTP endpoints, fetched with curl.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Command,
};

use aya::maps::{HashMap, Map, MapData};
use k8s_openapi::api::{
    core::v1::Taint,
    discovery::v1::{EndpointConditions, EndpointSlice},
};
use lb_common::{limits::MAX_NODE_ADDRS, maps::MAPS};
use lb_core::model::Protocol::Tcp;
use lb_tests::{
    cluster::{self, Cluster, PortOf},
    command::text,
    installed::{Place, Running, eventually},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    socklb::{is_up, serve, servers, with_town},
    town::{self, Town},
    turns,
};

/// On ports that the kernel chooses, and without the self-test's service, because map entries are counted.
pub(crate) const LISTEN: [&str; 3] =
    ["--metrics-bind-address=127.0.0.1:0", "--healthz-bind-address=127.0.0.1:0", "--self-test-interval=0"];

/// The address on which the agent listens for a flag.
pub(crate) fn address(agent: &Running, flag: &str) -> String {
    let find = || {
        let log = agent.log();
        let line = log.iter().find(|line| line.contains("listening") && line.contains(flag))?;
        let address = line.split("address=").nth(1)?;
        Some(address.split_whitespace().next()?.to_owned())
    };
    eventually("the agent listens", || find().is_some());
    find().unwrap()
}

/// Fetches a page: its status and its body.
pub(crate) fn fetch(method: &str, url: &str) -> (u16, String) {
    let args = ["--silent", "--show-error", "--max-time", "30", "--write-out", "\n%{http_code}"];
    let output = text("curl", &[&args[..], &["--request", method, url]].concat());
    let (body, status) = output.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

/// Fetches pages from where the agent answers health checks.
pub(crate) fn health_pages(agent: &Running) -> impl Fn(&str) -> (u16, String) + use<> {
    let address = address(agent, "--healthz-bind-address");
    move |page| fetch("GET", &format!("http://{address}/{page}"))
}

/// One scrape: values as written, by name and labels.
pub(crate) struct Scrape(BTreeMap<String, String>);

impl Scrape {
    pub(crate) fn of(address: &str) -> Self {
        let (status, body) = fetch("GET", &format!("http://{address}/metrics"));
        assert_eq!(status, 200, "{body}");
        let lines = body.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        let value = |line: &str| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series.to_owned(), value.to_owned())
        };
        Self(lines.map(value).collect())
    }

    /// A whole number.
    pub(crate) fn get(&self, series: &str) -> u64 {
        let value = self.0.get(series).unwrap_or_else(|| panic!("{series} is not among {:#?}", self.0));
        value.parse().unwrap_or_else(|error| panic!("{series} {value}: {error}"))
    }

    fn connections(&self, service: &str, result: &str) -> u64 {
        self.get(&format!(
            r#"socklb_connections_total{{namespace="default",service="{service}",port="80",protocol="TCP",result="{result}"}}"#
        ))
    }
}

/// The map of IPv4 frontends, which a test damages.
fn services4(place: &Place) -> HashMap<MapData, [u8; 8], [u8; 4]> {
    let data = MapData::from_pin(format!("{}/services4", place.pin_path)).unwrap();
    Map::from_map_data(data).unwrap().try_into().unwrap()
}

/// Runs an agent with the services of a town.
fn with_agent(flags: &[&str], test: impl FnOnce(&Place, &Town, &Running) + Send) {
    with_town(|place, town| {
        let agent = serve(place, &town.cluster(0..2), &[&LISTEN[..], flags].concat());
        test(place, town, &agent);
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

/// Two steps in two seconds, without another change.
#[test]
fn a_slow_start_is_synced_until_it_ends() {
    with_town(|place, town| {
        let cluster = |pods| town.cluster(pods).annotated("socklb.io/slow-start", "2s");
        let agent = serve(place, &cluster(0..1), &LISTEN);
        let metrics = address(&agent, "--metrics-bind-address");
        let n_syncs = || Scrape::of(&metrics).get("kubeproxy_sync_proxy_rules_duration_seconds_count");
        let before = n_syncs();
        place.write(&cluster(0..2));
        eventually("the change and both steps are synced", || n_syncs() >= before + 3);
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

#[test]
fn a_scrape_tells_of_changes_calls_and_repairs() {
    with_agent(&["--audit-interval=100ms"], |place, town, agent| {
        let metrics = address(agent, "--metrics-bind-address");
        let before = Scrape::of(&metrics);
        servers(10);
        assert!(!is_up(town::empty()));
        let after = Scrape::of(&metrics);
        let more = |service, result| after.connections(service, result) - before.connections(service, result);
        assert_eq!((more("web-v4", "redirected"), more("web-v4", "refused")), (10, 0));
        assert_eq!((more("empty", "redirected"), more("empty", "refused")), (0, 1));
        assert_eq!(after.get("socklb_source_complete"), 1);
        assert_eq!(after.get("socklb_serves_snapshot"), 0);
        assert_eq!(after.get("socklb_sync_errors_total"), 0);
        assert_eq!(after.get("socklb_changes_waiting"), 0);
        assert_eq!(after.get("socklb_issues"), 0);
        assert_eq!(after.get(r#"socklb_map_entries{map="services4"}"#), 4);
        assert_eq!(after.get(r#"socklb_map_capacity{map="services4"}"#), 4_096);
        assert_eq!(after.get("socklb_programming_duration_seconds_count"), 0, "a first list is not a change");

        // A change, timed from its arrival to the kernel. The scrape comes after it.
        let syncs = "kubeproxy_sync_proxy_rules_duration_seconds_count";
        place.write(&town.cluster(1..2));
        eventually("the change is counted", || {
            let scrape = Scrape::of(&metrics);
            scrape.get("socklb_programming_duration_seconds_count") == 1
                && scrape.get(syncs) > after.get(syncs)
        });
        let changed = Scrape::of(&metrics);
        assert!(changed.get("socklb_sync_operations_total") > after.get("socklb_sync_operations_total"));
        let last: f64 = changed.0["kubeproxy_sync_proxy_rules_last_timestamp_seconds"].parse().unwrap();
        assert!(last > 1e9, "{last} is not a current time");

        // Damage, and its repair.
        let mut services4 = services4(place);
        let keys: Vec<_> = services4.keys().map(Result::unwrap).collect();
        for key in &keys {
            // An audit may have repaired it already.
            let _there_again_or_not = services4.remove(key);
        }
        eventually("the audit has counted its repairs", || {
            Scrape::of(&metrics).get(r#"socklb_audit_repairs_total{map="services4"}"#) == 4
        });
        assert!(is_up(town::web()[0]));
        let repaired = Scrape::of(&metrics);
        assert!(repaired.get(r#"socklb_audits_total{result="repaired"}"#) >= 1);
        assert_eq!(repaired.get(r#"socklb_audits_total{result="error"}"#), 0);
        assert_eq!(repaired.get(r#"socklb_audit_repairs_total{map="endpoints4"}"#), 0);
        let lines = agent.n_said("an audit repaired");
        assert!((1..=4).contains(&lines), "one line for each audit that repaired: {lines}");
    });
}

/// The kernel counts all pages of a mapping as memory of the process, each time that it is mapped.
#[test]
fn no_map_is_mapped_twice() {
    const MMAPABLE: u32 = 1 << 10;
    with_agent(&[], |_place, _town, agent| {
        let _read = Scrape::of(&address(agent, "--metrics-bind-address"));
        let mmapable = MAPS.iter().filter(|map| map.flags & MMAPABLE != 0);
        // A sweep maps the records of sockets while it reads them.
        let n_maps = mmapable.filter(|map| !["socket_slots", "sockets"].contains(&map.name)).count();
        let mappings = || fs::read_to_string(format!("/proc/{}/maps", agent.id())).unwrap();
        let n_mapped = || mappings().lines().filter(|line| line.ends_with("bpf-map")).count();
        eventually("each map is mapped once", || n_mapped() == n_maps);
    });
}

#[test]
fn pages_are_those_of_kube_proxy() {
    with_agent(&[], |place, _town, agent| {
        let metrics = format!("http://{}", address(agent, "--metrics-bind-address"));
        let healthz = format!("http://{}", address(agent, "--healthz-bind-address"));
        let get = |url: &str| fetch("GET", url);
        assert_eq!(get(&format!("{metrics}/proxyMode")), (200, "socklb".to_owned()));
        assert_eq!(get(&format!("{metrics}/healthz")), (200, "ok".to_owned()));
        let (status, config) = get(&format!("{metrics}/configz"));
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!((status, &config["socklb"]["node-name"]), (200, &json!("node")));
        assert_eq!(config["socklb"]["pin-path"], *place.pin_path);

        let (status, body) = get(&format!("{healthz}/healthz"));
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &body["nodeEligible"]), (200, &json!(true)));
        assert!(body["lastUpdated"].is_string() && body["currentTime"].is_string(), "{body}");
        let (status, body) = get(&format!("{healthz}/livez"));
        assert_eq!((status, body.contains("nodeEligible")), (200, false));

        for url in [format!("{metrics}/"), format!("{metrics}/livez"), format!("{healthz}/metrics")] {
            assert_eq!(get(&url).0, 404, "{url}");
        }
        for method in ["POST", "PUT", "DELETE"] {
            assert_eq!(fetch(method, &format!("{metrics}/metrics")).0, 405, "{method}");
        }

        // Another agent with the same address and its own pins reports the error and changes nothing.
        let taken = address(agent, "--healthz-bind-address");
        let flags = ["--metrics-bind-address=", &format!("--healthz-bind-address={taken}")];
        let pins = format!("{}-of-another", place.pin_path);
        let places = ["--node-name", "node", "--cgroup", &place.cgroup, "--pin-path", &pins];
        let another = place.spawn(Command::new(&place.binary), &[&places[..], &flags].concat());
        let (code, log) = another.wait();
        assert_eq!((code, log.len()), (Some(1), 1), "{log:?}");
        for part in ["--healthz-bind-address", &taken, "in use", "kube-proxy", "\"\""] {
            assert!(log[0].contains(part), "{part} is not in {log:?}");
        }
    });
}

/// A kubelet's probe waits for one second. On a busy node Linux takes longer to verify the programs.
#[test]
fn probes_are_answered_while_the_programs_are_loaded() {
    with_town(|place, town| {
        place.write(&town.cluster(0..2));
        let agent = place.start(&[&turns::PORTS[..], &["--self-test-interval=0"]].concat());
        let health: SocketAddr = (Ipv4Addr::LOCALHOST, 10256).into();
        eventually("the agent listens", || is_up(health));
        let get = |page: &str| fetch("GET", &format!("http://{health}/{page}"));
        let (status, body) = get("healthz");
        assert_eq!(status, 503, "{body}");
        assert!(body.contains("the programs are being loaded"), "{body}");
        assert_eq!(get("livez").0, 200);
        eventually("it is ready", || get("healthz").0 == 200);
        eventually("the service answers", || is_up(town::web()[0]));
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
    });
}

#[test]
fn a_node_that_is_being_deleted_asks_for_no_traffic() {
    with_agent(&[], |place, town, agent| {
        let health = health_pages(agent);
        let mut node = cluster::node("node", &[]);
        node.spec.get_or_insert_default().taints = Some(vec![Taint {
            key: "ToBeDeletedByClusterAutoscaler".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        }]);
        place.write(&town.cluster(0..2).with([node]));
        eventually("/healthz is 503", || health("healthz").0 == 503);
        assert_eq!(health("livez").0, 200, "the agent itself is healthy");
        place.write(&town.cluster(0..2));
        eventually("/healthz is 200", || health("healthz").0 == 200);
    });
}

#[test]
fn a_full_table_is_no_readiness() {
    with_town(|place, town| {
        let mut one = town.cluster(0..2);
        one.services.retain(|(_, name), _| name == "web-v4");
        place.write(&one);
        let agent = place.start(&[&LISTEN[..], &["--max-services=1"]].concat());
        let health = health_pages(&agent);
        eventually("/healthz is 200", || health("healthz").0 == 200);

        place.write(&town.cluster(0..2));
        eventually("/healthz is 503", || health("healthz").0 == 503);
        assert!(health("healthz").1.contains(r#""frontendsWithoutRoom":"#));
        assert!(is_up(town::web()[0]), "services that fit are served");
        assert_eq!(health("livez").0, 200, "the agent itself is healthy");

        place.write(&one);
        eventually("/healthz is 200 again", || health("healthz").0 == 200);
        let (status, log) = agent.end_with_log(Signal::SIGTERM);
        assert_eq!(status, Some(0));
        // The refused service, the full map, and the remedy.
        let told = |line: &String| line.contains("default/dns-udp-v4") && line.contains("--max-services");
        assert!(log.iter().any(told), "{log:#?}");
    });
}

/// A Node with more addresses than all Nodes may have, and foreign entries that fill the maps: services that
/// fit are served, changes are applied, and no probe kills the agent.
#[test]
fn a_hostile_node_and_a_stranger_end_no_agent() {
    with_agent(&[], |place, town, agent| {
        let metrics = address(agent, "--metrics-bind-address");
        let health = health_pages(agent);
        let status = |page: &str| health(page).0;

        let first = u32::from(Ipv4Addr::new(10, 200, 0, 0));
        let addresses = (first..=first + MAX_NODE_ADDRS).map(|ip| Ipv4Addr::from(ip).into());
        let hostile = cluster::node("hostile", &addresses.collect::<Vec<IpAddr>>());
        place.write(&town.cluster(0..2).with([hostile]));
        eventually("the Node is named", || agent.n_said("Node hostile: status.addresses: more than 64") == 1);
        let nodes = || Scrape::of(&metrics).get(r#"socklb_map_entries{map="node_addrs"}"#);
        eventually("some of its addresses are taken", || nodes() >= 64);
        assert!(nodes() < 128, "{}", nodes());
        assert_eq!((status("livez"), status("healthz")), (200, 200));

        // The only audit within a minute is the one that a full map requests.
        let mut services4 = services4(place);
        let n_foreign = (0..65_535u16).find(|n| {
            let [low, high] = n.to_ne_bytes();
            services4.insert([10, 96, 200, 1, low, high, 6, 0], [0; 4], 0).is_err()
        });
        let web = town::web()[0];
        let new = SocketAddr::new(web.ip(), 8080);
        let mut changed = town.cluster(0..1);
        changed.serve("new", new, Tcp, &[SocketAddr::new(town.pods[0].ips[0], town::HTTP)]);
        place.write(&changed);
        eventually("foreign entries are removed", || is_up(new));
        assert!(is_up(web));
        eventually("nothing is missing", || status("healthz") == 200);
        assert_eq!(status("livez"), 200);
        assert_eq!(
            agent.n_said("Service default/new: map services4 is full"),
            2,
            "once when it holds, once when it is over"
        );
        let scrape = Scrape::of(&metrics);
        assert_eq!(scrape.get("socklb_sync_errors_total"), 0);
        let repaired = scrape.get(r#"socklb_audit_repairs_total{map="services4"}"#);
        assert_eq!(repaired, u64::from(n_foreign.unwrap()) + 1);
    });
}

/// A Service of type `LoadBalancer` with a health check port, and slices whose endpoints are on this node.
fn load_balanced(mut cluster: Cluster, port: i32, conditions: &EndpointConditions) -> Cluster {
    let address = "10.96.0.99:80".parse().unwrap();
    cluster.serve("balanced", address, Tcp, &[]);
    let service = cluster::with_spec(
        cluster::service("balanced", &[address.ip()], &[cluster::port("", Tcp, 80)]),
        |spec| {
            spec.type_ = Some("LoadBalancer".to_owned());
            spec.external_traffic_policy = Some("Local".to_owned());
            spec.health_check_node_port = Some(port);
        },
    );
    let of = PortOf { service: "balanced", name: "", protocol: Tcp };
    let endpoints = ["10.244.1.2:8080", "10.244.2.2:8080"].map(|endpoint| endpoint.parse().unwrap());
    let local = |mut slice: EndpointSlice| {
        for endpoint in &mut slice.endpoints {
            endpoint.node_name = Some("node".to_owned());
            endpoint.conditions = Some(conditions.clone());
        }
        slice
    };
    cluster.with([service]).with(cluster::slices(&of, &endpoints).into_iter().map(local))
}

#[test]
fn a_service_answers_the_health_checks_of_its_load_balancer() {
    with_agent(&[], |place, town, _agent| {
        let ready = EndpointConditions { ready: Some(true), ..EndpointConditions::default() };
        let ending = EndpointConditions { ready: Some(false), serving: Some(true), terminating: Some(true) };
        // The network namespace is the test's own, and so are its ports.
        let is_closed = |port: u16| !is_up(([127, 0, 0, 1], port).into());
        let check = |port: u16| {
            let (status, body) = fetch("GET", &format!("http://127.0.0.1:{port}/healthz"));
            (status, serde_json::from_str::<Value>(&body).unwrap()["localEndpoints"].clone())
        };
        let write = |port, conditions| place.write(&load_balanced(town.cluster(0..2), port, conditions));
        assert!(is_closed(31_000));
        write(31_000, &ready);
        eventually("the port is open", || !is_closed(31_000));
        assert_eq!(check(31_000), (200, json!(2)));
        write(31_000, &ending);
        eventually("terminating endpoints do not count", || check(31_000) == (503, json!(0)));
        write(31_001, &ready);
        eventually("the port has moved", || is_closed(31_000) && !is_closed(31_001));
        assert_eq!(check(31_001), (200, json!(2)));
        place.write(&town.cluster(0..2));
        eventually("the port is closed", || is_closed(31_001));
    });
}
