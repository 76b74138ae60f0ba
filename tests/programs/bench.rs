//! `bench --smoke`: the harness of the benches works. No time is checked.

use std::{collections::BTreeSet, env, fs, path::Path};

use lb_tests::{
    Feature,
    command::{run, text},
    require,
};
use serde_json::Value;

/// Runs a suite, small and short, and returns its result.
fn smoke(suite: &str, check: impl FnOnce(&Value)) {
    let variables = ["SOCKLB_BENCH_OBJECT", "SOCKLB_BIN"];
    if !require(Feature::Programs) || !variables.map(Feature::Variable).into_iter().all(require) {
        return;
    }
    let [object, socklb] = variables.map(|name| env::var(name).unwrap());
    let arguments: &[&str] = match suite {
        "hooks" => &["--object", &object],
        "path" | "sync" => &["--socklb", &socklb],
        "scale" => &["--object", &object, "--socklb", &socklb],
        "health" | "packets" => &[],
        other => unreachable!("{other} is no suite"),
    };
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (json, tables) = (file("result.json"), file("tables.md"));
    let svg = directory.path().to_str().unwrap();
    let fixed = [suite, "--smoke", "--json", &json, "--markdown", &tables, "--svg", svg];
    let _printed = text(bench(), &[&fixed[..], arguments].concat());
    let result: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!((&result["suite"], &result["is_smoke"]), (&suite.into(), &true.into()));
    for series in result["series"].as_array().unwrap() {
        let n = series["n"].as_u64().unwrap();
        assert!(n > 0 && series["quantiles"]["p50"].is_number() && series["blocks"].is_array(), "{series}");
    }
    assert!(fs::read_to_string(&tables).unwrap().starts_with(&format!("# {suite}\n")));
    // A result is the same as itself.
    let comparison = text(bench(), &["compare", &json, &json]);
    assert!(comparison.contains("0 regressions"), "{comparison}");
    check(&result);
}

fn bench() -> &'static str {
    env!("CARGO_BIN_EXE_bench")
}

fn names<'a>(result: &'a Value, field: &str) -> BTreeSet<&'a str> {
    result["series"].as_array().unwrap().iter().filter_map(|series| series[field].as_str()).collect()
}

#[test]
fn hooks() {
    smoke("hooks", |result| {
        let targets = names(result, "target");
        assert!(targets.contains("socklb") && targets.contains("empty"), "{targets:?}");
        assert!(targets.contains("passive health off") && targets.contains("passive health off again"));
    });
}

#[test]
fn sync() {
    smoke("sync", |result| {
        let measures = names(result, "measure");
        assert!(measures.contains("process start to maps that are right"), "{measures:?}");
    });
}

#[test]
fn scale() {
    smoke("scale", |result| {
        let measures = names(result, "measure");
        for measure in ["maps", "re-connect, any service", "event to map, one change at a time"] {
            assert!(measures.contains(measure), "{measures:?}");
        }
    });
}

#[test]
fn packets() {
    if require(Feature::Nftables) {
        smoke("packets", |result| {
            let measures = names(result, "measure");
            for measure in
                ["all: together", "one change: the kernel gets and carries it out", "reading a table"]
            {
                assert!(measures.contains(measure), "{measures:?}");
            }
        });
    }
}

#[test]
fn health() {
    smoke("health", |result| {
        for target in ["socklb", "passive health off"] {
            let value = |measure: &str| {
                let mut series = result["series"].as_array().unwrap().iter();
                let found = series.find(|series| series["measure"] == measure && series["target"] == target);
                found.map(|series| series["quantiles"]["p50"].as_f64().unwrap())
            };
            let share = value("black hole: share of calls to it, 0.0 to 1.0 s");
            assert!(share.is_some_and(|share| share > 0.1), "{target}: {share:?}");
            let refused = value("refusing endpoint: failed calls");
            assert!(refused.is_some_and(|n| n >= 3.0), "{target}: {refused:?}");
        }
    });
}

/// A competitor is measured, or the result has the reason why not.
#[test]
fn path() {
    smoke("path", |result| {
        let targets = names(result, "target");
        let missing: BTreeSet<&str> = result["unavailable"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|entry| entry["target"].as_str())
            .collect();
        for target in ["direct", "socklb", "nftables", "iptables"] {
            assert!(targets.contains(target) || missing.contains(target), "{targets:?} {missing:?}");
        }
        assert!(targets.contains("direct") && targets.contains("socklb"), "{missing:?}");
        let value = |measure: &str, target: &str| {
            let mut series = result["series"].as_array().unwrap().iter();
            let found = series.find(|series| series["measure"] == measure && series["target"] == target);
            found.map(|series| series["quantiles"]["p50"].as_f64().unwrap())
        };
        // The purpose of these counters: without NAT no connection is tracked.
        let tracked = |target: &str| value("keep-alive request: packets tracked", target);
        assert_eq!((tracked("direct"), tracked("socklb")), (Some(0.0), Some(0.0)));
        assert!(tracked("nftables").is_none_or(|packets| packets > 0.5), "{:?}", tracked("nftables"));
        // Clients behind the node need nftables.
        let entries = |target: &str| value("pod: new connection: conntrack entries", target);
        if missing.contains("packets: all") {
            return;
        }
        for target in ["packets: off", "all, pods untracked"] {
            assert_eq!(entries(target), Some(0.0), "{target}");
        }
        for target in ["packets: all", "off, another program tracks"] {
            assert!(entries(target) > Some(0.5), "{target}: {:?}", entries(target));
        }
        for way in ["node port", "load balancer"] {
            for policy in ["Cluster", "Local"] {
                let measure = format!("{way}, policy {policy}: new connection: rate");
                assert!(value(&measure, "socklb") > Some(0.0), "{measure}");
            }
        }
    });
}

#[test]
fn broken_files_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("broken.json");
    fs::write(&path, "{").unwrap();
    for file in [path.as_path(), Path::new("no-such-file.json")] {
        let output = run(bench(), &["compare", file.to_str().unwrap(), file.to_str().unwrap()]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(file.to_str().unwrap()), "{error}");
    }
}
