//! The dashboard: its metrics and labels exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use lb_agent::telemetry::metrics::{ALL, Kind};
use serde_json::Value;

use crate::rendered::folder;

/// The label that the scrape adds (servicemonitor.yaml).
const OF_THE_SCRAPE: &str = "node";

/// The names of all series, with their labels.
fn series() -> BTreeMap<String, BTreeSet<&'static str>> {
    let suffixes = |kind| match kind {
        Kind::Histogram => &["_bucket", "_sum", "_count"][..],
        Kind::Counter | Kind::Gauge => &[""],
    };
    ALL.iter()
        .flat_map(|metric| {
            suffixes(metric.kind).iter().map(|suffix| {
                let le = (*suffix == "_bucket").then_some("le");
                let labels = metric.labels.iter().copied().chain(le).chain([OF_THE_SCRAPE]);
                (format!("{}{suffix}", metric.name), labels.collect())
            })
        })
        .collect()
}

/// Keywords and functions of `PromQL` that the dashboard uses.
const WORDS: [&str; 17] = [
    "sum",
    "max",
    "count",
    "topk",
    "by",
    "or",
    "on",
    "rate",
    "increase",
    "histogram_quantile",
    "clamp_min",
    "vector",
    "time",
    "ignoring",
    "group_left",
    "min",
    "avg",
];

/// The tokens of a query, in order.
#[derive(Debug, PartialEq, Eq)]
enum Token<'a> {
    Name(&'a str),
    Sign(char),
}

/// Names and signs of a query, without strings, numbers and durations.
fn tokens(query: &str) -> Vec<Token<'_>> {
    let (mut tokens, mut rest) = (Vec::new(), query);
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '"' => rest[1..].find('"').map_or(rest.len(), |end| end + 2),
            '[' => rest.find(']').map_or(rest.len(), |end| end + 1),
            c if c.is_ascii_alphanumeric() || c == '_' => {
                let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'));
                end.unwrap_or(rest.len())
            }
            c => c.len_utf8(),
        };
        let (token, after) = rest.split_at(length);
        match first {
            c if c.is_ascii_alphabetic() => tokens.push(Token::Name(token)),
            '"' | '[' | ' ' => {}
            c if c.is_ascii_digit() => {}
            c => tokens.push(Token::Sign(c)),
        }
        rest = after;
    }
    tokens
}

/// Wrong names in a query of Grafana.
fn problems(query: &str) -> Vec<String> {
    let known = series();
    let (mut wrong, mut groups, mut series) = (Vec::new(), BTreeSet::new(), Vec::new());
    // The series whose labels are in the braces, and those of `by`.
    let (mut current, mut is_in_braces, mut is_in_by, mut depth) = (None, false, false, 0);
    let tokens = tokens(query);
    for (n, token) in tokens.iter().enumerate() {
        match token {
            Token::Sign('{') => is_in_braces = true,
            Token::Sign('}') => is_in_braces = false,
            Token::Sign('(') => {
                depth += 1;
                is_in_by = n > 0 && tokens[n - 1] == Token::Name("by");
            }
            Token::Sign(')') => (depth, is_in_by) = (depth - 1, false),
            Token::Sign(_) => {}
            Token::Name(label) if is_in_braces => {
                let labels = current.and_then(|name: &str| known.get(name));
                if labels.is_some_and(|labels| !labels.contains(label)) {
                    wrong.push(format!("{query}: {} has no label {label}", current.unwrap_or_default()));
                }
            }
            Token::Name(label) if is_in_by => drop(groups.insert(*label)),
            Token::Name(word) if WORDS.contains(word) => {}
            Token::Name(name) => {
                current = Some(name);
                series.push(*name);
                if !known.contains_key(*name) {
                    wrong.push(format!("{query}: no metric {name}"));
                }
            }
        }
    }
    for label in groups {
        for name in &series {
            if known.get(*name).is_some_and(|labels| !labels.contains(label)) {
                wrong.push(format!("{query}: {name} has no label {label}"));
            }
        }
    }
    if series.is_empty() || depth != 0 || is_in_braces {
        wrong.push(format!("{query}: empty or incomplete"));
    }
    wrong
}

fn dashboard() -> Value {
    serde_json::from_str(&fs::read_to_string(folder().join("monitoring/socklb-dashboard.json")).unwrap())
        .unwrap()
}

#[test]
fn every_query_asks_for_series_that_are_exposed() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let queries: Vec<&str> = targets.map(|target| target["expr"].as_str().unwrap()).collect();
    assert!(queries.len() > 15, "{queries:#?}");
    let wrong: Vec<String> = queries.iter().flat_map(|query| problems(query)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_variable_is_read_from_a_series() {
    let dashboard = dashboard();
    let known = series();
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let Some(query) = variable["query"]["query"].as_str() else { continue };
        let inner = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
        let (name, label) = inner.split_once(", ").unwrap();
        assert!(known[name].contains(label), "{query}");
    }
}

#[test]
fn panels_have_ids_of_their_own_and_do_not_overlap() {
    let dashboard = dashboard();
    let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(x < 24 && cells.insert((x, y)), "{panel}");
            }
        }
    }
}

#[test]
fn wrong_names_are_found() {
    assert_eq!(problems("sum by (map) (socklb_map_entries)"), [""; 0]);
    for wrong in [
        "socklb_nonsense",
        "sum by (service) (socklb_map_entries)",
        "socklb_issues{a=\"b\"}",
        "1",
        "rate(socklb_issues",
    ] {
        assert_eq!(problems(wrong).len(), 1, "{wrong}");
    }
}
