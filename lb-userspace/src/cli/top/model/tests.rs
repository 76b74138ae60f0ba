use expect_test::expect;
use lb_common::{
    health::Policy,
    layout::{EndpointHealth, EndpointStats, Frontend, Run, ServiceStats, frontend_flags},
};
use lb_core::tables::{Entry, Image, StoredRun};
use lb_kernel::sockets::Record;

use super::*;
use crate::cli::listing::EndpointCounts;

fn address(text: &str, protocol: Protocol) -> FrontendAddress {
    let address: SocketAddr = text.parse().unwrap();
    FrontendAddress { ip: address.ip(), port: address.port(), protocol }
}

/// A service with two endpoints and a node port, one without endpoints, and sockets of each kind.
fn reading() -> Reading {
    let mut image = Image::default();
    let endpoints = ["10.244.1.10:8080", "10.244.2.10:8080"].map(|text| text.parse().unwrap());
    let entries = (7..).zip(endpoints).map(|(endpoint_id, address)| Entry::new(endpoint_id, address));
    image.runs4.insert(0, entries.collect());
    let run = Run { offset: 0, len: 2 };
    for (id, text, frontend) in [
        (0, "10.96.0.80:80", Frontend { run, service_id: 3, ..Frontend::default() }),
        (1, "0.0.0.0:30080", Frontend { run, service_id: 3, ..Frontend::default() }),
        (2, "10.96.0.90:80", Frontend { run: Run::EMPTY, service_id: 4, ..Frontend::default() }),
    ] {
        image.services.insert(address(text, Protocol::Tcp), id);
        image.frontends.insert(id, frontend);
    }
    let record = |service: &str, endpoint: &str, service_id, endpoint_id| Record {
        cookie: 1,
        protocol: Protocol::Tcp,
        service: service.parse().unwrap(),
        endpoint: endpoint.parse().unwrap(),
        service_id,
        endpoint_id,
    };
    let records = vec![
        record("10.96.0.80:80", "10.244.1.10:8080", 3, 7),
        record("192.0.2.1:30080", "10.244.2.10:8080", 3, 8),
        // The endpoint is gone, the service exists.
        record("10.96.0.80:80", "10.244.9.10:8080", 3, 7),
        // The service is gone.
        record("10.96.0.99:80", "10.244.1.10:8080", 4, 7),
    ];
    Reading {
        image,
        services: BTreeMap::from([
            (3, ServiceStats { connects: 100, refusals: 0, datagrams: 20 }),
            (4, ServiceStats { connects: 0, refusals: 5, datagrams: 0 }),
        ]),
        endpoints: BTreeMap::from([(7, called(60, 20))]),
        records: Some(records),
    }
}

fn called(connects: u64, datagrams: u64) -> EndpointCounts {
    EndpointCounts { calls: EndpointStats { connects, datagrams }, ..EndpointCounts::default() }
}

fn later(reading: &Reading) -> Reading {
    let mut later = reading.clone();
    later.services.insert(3, ServiceStats { connects: 150, refusals: 0, datagrams: 21 });
    later.services.insert(4, ServiceStats { connects: 0, refusals: 15, datagrams: 0 });
    later.endpoints.insert(8, called(51, 0));
    later
}

fn two_looks() -> Report {
    let before = Sample::new(&reading(), None, Duration::from_secs(10));
    Sample::new(&later(&reading()), None, Duration::from_secs(12)).report(Some(&before), String::new())
}

#[test]
fn rates_are_made_from_two_looks() {
    for (what, earlier, now, seconds, expected) in [
        ("the first sample", None, 7, None, None),
        ("a new port", None, 7, Some(1.0), None),
        ("nothing happened", Some(7), 7, Some(1.0), Some(0.0)),
        ("growth", Some(7), 12, Some(2.0), Some(2.5)),
        ("to a tenth", Some(0), 1, Some(3.0), Some(0.3)),
        ("a counter that restarted", Some(100), 4, Some(2.0), Some(2.0)),
        ("no time has passed", Some(1), 2, Some(0.0), None),
        ("the largest", Some(0), u64::MAX, Some(1.0), Some(18_446_744_073_709_552_000.0)),
    ] {
        assert_eq!(per_second(earlier, now, seconds), expected, "{what}");
    }
}

#[test]
fn one_look_has_totals_and_no_rates() {
    let report = Sample::new(&reading(), None, Duration::ZERO).report(None, String::new());
    expect![[r"
        SERVICE  ADDRESS            CALLS  CALLS/S  REFUSED  SOCKETS  ACTIVE  SHARE  CONNECT  HEALTH
        -        10.96.0.80:80/tcp    120        -        0        3       -
          -      10.244.1.10:8080      80        -                 1       -    255        -
          -      10.244.2.10:8080       0        -                 1       -    255        -
        -        10.96.0.90:80/tcp      0        -        5        0       -
    "]]
    .assert_eq(&report.text(true));
}

#[test]
fn two_looks_have_rates() {
    expect![[r"
        SERVICE  ADDRESS            CALLS  CALLS/S  REFUSED  SOCKETS  ACTIVE  SHARE  CONNECT  HEALTH
        -        10.96.0.80:80/tcp    171     25.5        0        3       -
          -      10.244.1.10:8080      80      0.0                 1       -    255        -
          -      10.244.2.10:8080      51     25.5                 1       -    255        -
        -        10.96.0.90:80/tcp      0      0.0       15        0       -
    "]]
    .assert_eq(&two_looks().text(true));
}

#[test]
fn an_id_that_was_given_to_another_service_has_no_rate() {
    let before = Sample::new(&reading(), None, Duration::from_secs(10));
    let mut image = reading().image;
    let id = image.services.remove(&address("10.96.0.90:80", Protocol::Tcp)).unwrap();
    image.services.insert(address("10.96.0.91:81", Protocol::Tcp), id);
    let now = Sample::new(&Reading { image, ..reading() }, None, Duration::from_secs(11));
    let report = now.report(Some(&before), String::new());
    let rates: Vec<_> = report.services.iter().map(|row| (row.port, row.calls_per_second)).collect();
    assert_eq!(rates, [(80, Some(0.0)), (81, None)]);
}

#[test]
fn sockets_are_unknown_where_they_cannot_be_listed() {
    let reading = Reading { records: None, ..reading() };
    let report = Sample::new(&reading, None, Duration::ZERO).report(None, String::new());
    assert!(report.services.iter().all(|row| row.sockets.is_none()));
    assert!(report.services.iter().flat_map(|row| &row.endpoints).all(|row| row.sockets.is_none()));
}

fn port(name: &str, calls: u64, rate: Option<f64>, refused: u64, sockets: Option<u64>) -> PortRow {
    PortRow {
        namespace: "shop".into(),
        name: name.into(),
        port_name: String::new(),
        protocol: Protocol::Udp,
        address: IpAddr::from([10, 96, 0, 1]),
        port: 53,
        calls,
        calls_per_second: rate,
        refused,
        refused_per_second: None,
        sockets,
        active: None,
        ejected: 0,
        endpoints: vec![EndpointRow {
            address: IpAddr::from([10, 244, 0, u8::try_from(calls).unwrap()]),
            port: 1053,
            node: format!("Node-{name}"),
            calls,
            calls_per_second: rate,
            sockets,
            active: None,
            share: u8::MAX,
            health: HealthPart::default(),
        }],
    }
}

#[test]
fn rows_are_sorted_and_filtered() {
    let rows = [
        port("a", 1, Some(0.0), 9, None),
        port("b", 2, Some(9.5), 0, Some(0)),
        port("c", 3, Some(10.0), 0, Some(4)),
        port("d", 4, None, 0, Some(4)),
    ];
    let arranged = |namespace, filter: &str, sort| {
        let mut report =
            Report { time: String::new(), seconds: None, sockets_complete: true, services: rows.to_vec() };
        report.arrange(namespace, filter, sort);
        report.services.into_iter().map(|row| row.name).collect::<String>()
    };
    for (filter, sort, expected) in [
        ("", Sort::Name, "abcd"),
        ("", Sort::Calls, "dcba"),
        ("", Sort::Rate, "cbad"),
        ("", Sort::Refused, "abcd"),
        ("", Sort::Sockets, "cdba"),
        ("SHOP/C", Sort::Name, "c"),
        ("node-b", Sort::Name, "b"),
        ("10.244.0.4", Sort::Name, "d"),
        ("/udp", Sort::Name, "abcd"),
        ("nowhere", Sort::Name, ""),
    ] {
        assert_eq!(arranged(None, filter, sort), expected, "{filter:?} by {sort:?}");
    }
    assert_eq!(arranged(Some("shop"), "", Sort::Name), "abcd");
    assert_eq!(arranged(Some("sho"), "", Sort::Name), "");
}

/// One endpoint is ejected, the other one has failures.
#[test]
fn ejected_endpoints_are_named_with_the_reason() {
    let mut reading = reading();
    for frontend in [0, 1] {
        reading.image.frontends[&frontend].health = Policy::DEFAULT.to_word();
    }
    let now = 100_000_000_000;
    let failing =
        EndpointHealth { failures: 2, failing_since: now / 2, latency: 1250, ..EndpointHealth::default() };
    let ejected = EndpointHealth {
        failures: 3,
        ejected_until: now + now / 20,
        ejections: 1,
        errno: 111,
        latency: 0,
        ..failing
    };
    let of = |calls, health| EndpointCounts { health, now, ..calls };
    reading.endpoints = BTreeMap::from([(7, of(called(60, 20), ejected)), (8, of(called(0, 0), failing))]);
    let mut report = Sample::new(&reading, None, Duration::ZERO).report(None, String::new());
    expect![[r"
        SERVICE  ADDRESS            CALLS  CALLS/S  REFUSED  SOCKETS  ACTIVE  SHARE  CONNECT  HEALTH
        -        10.96.0.80:80/tcp    120        -        0        3       -                  1 ejected
          -      10.244.1.10:8080      80        -                 1       -    255        -  ejected for 5 s: 3 failures in a row, the last one: connection refused; failing for 50 s
          -      10.244.2.10:8080       0        -                 1       -    255    1.2ms  2 failed in a row
        -        10.96.0.90:80/tcp      0        -        5        0       -
    "]].assert_eq(&report.text(true));
    assert_eq!((report.services[0].ejected, report.services[1].ejected), (1, 0));
    report.services.truncate(1);
    report.services[0].endpoints.truncate(1);
    let json = serde_json::to_value(&report).unwrap();
    let endpoint = &json["services"][0]["endpoints"][0];
    assert_eq!(
        (&endpoint["failures"], &endpoint["ejected_seconds"], &endpoint["ejections"]),
        (&3.into(), &5.into(), &1.into())
    );
}

/// Calls choose by open connections, and one endpoint has half the share of the other.
#[test]
fn load_is_shown_for_endpoints_and_summed_up() {
    let mut reading = reading();
    let entries = reading.image.runs4[&0].endpoints().to_vec();
    let run = StoredRun::extended(&[(entries[0], 255), (entries[1], 128)], &[]);
    reading.image.runs4.insert(0, run);
    for frontend in [0, 1] {
        reading.image.frontends[&frontend].flags = frontend_flags::LEAST_CONNECTIONS;
    }
    reading.endpoints = BTreeMap::from([
        (7, EndpointCounts { active: 40, ..called(60, 20) }),
        (8, EndpointCounts { active: 2, ..called(30, 0) }),
    ]);
    let report = Sample::new(&reading, None, Duration::ZERO).report(None, String::new());
    expect![[r"
        SERVICE  ADDRESS            CALLS  CALLS/S  REFUSED  SOCKETS  ACTIVE  SHARE  CONNECT  HEALTH
        -        10.96.0.80:80/tcp    120        -        0        3      42
          -      10.244.1.10:8080      80        -                 1      40    255        -
          -      10.244.2.10:8080      30        -                 1       2    128        -
        -        10.96.0.90:80/tcp      0        -        5        0       -
    "]]
    .assert_eq(&report.text(true));
    let json = serde_json::to_value(&report).unwrap();
    let endpoints = &json["services"][0]["endpoints"];
    let load = |row: &serde_json::Value| (row["active"].clone(), row["share"].clone());
    assert_eq!(json["services"][0]["active"], 42);
    assert_eq!([load(&endpoints[0]), load(&endpoints[1])], [(40.into(), 255.into()), (2.into(), 128.into())]);
}

#[test]
fn times_are_short() {
    for (microseconds, expected) in
        [(1, "1us"), (999, "999us"), (1000, "1.0ms"), (999_949, "999.9ms"), (3_000_000, "3.0s")]
    {
        assert_eq!(time_text(microseconds), expected);
    }
}

/// Field names are stable.
#[test]
fn the_json_has_stable_names() {
    let mut report = two_looks();
    report.services.truncate(1);
    report.services[0].endpoints.truncate(1);
    expect![[r#"
        {
          "time": "",
          "seconds": 2.0,
          "sockets_complete": true,
          "services": [
            {
              "namespace": "",
              "name": "",
              "port_name": "",
              "protocol": "TCP",
              "address": "10.96.0.80",
              "port": 80,
              "calls": 171,
              "calls_per_second": 25.5,
              "refused": 0,
              "refused_per_second": 0.0,
              "sockets": 3,
              "active": null,
              "ejected": 0,
              "endpoints": [
                {
                  "address": "10.244.1.10",
                  "port": 8080,
                  "node": "",
                  "calls": 80,
                  "calls_per_second": 0.0,
                  "sockets": 1,
                  "active": null,
                  "share": 255,
                  "failures": null,
                  "ejected_seconds": null,
                  "ejected_reason": null,
                  "ejections": 0,
                  "connect_microseconds": null
                }
              ]
            }
          ]
        }"#]]
    .assert_eq(&serde_json::to_string_pretty(&report).unwrap());
}
