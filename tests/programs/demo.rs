//! `socklb-demo`, which checks every statement that it prints.

use std::{env, fs, path::Path};

use lb_tests::{Feature, cgroup::ThreadCgroup, command::text, require};
use serde_json::Value;

fn demo(args: &[&str]) -> Option<String> {
    let needs = [Feature::Programs, Feature::Variable("SOCKLB_BIN"), Feature::Command("curl")];
    if !needs.into_iter().all(require) {
        return None;
    }
    // Namespaces, cgroup and pins are the demo's own. It starts in this test's cgroup, which is removed.
    let _cgroup = ThreadCgroup::enter().unwrap();
    let program = Path::new(&env::var("SOCKLB_BIN").unwrap()).with_file_name("socklb-demo");
    Some(text(program.to_str().unwrap(), &[&["--exit"], args].concat()))
}

#[test]
fn what_it_says_holds_and_nothing_stays_behind() {
    let Some(text) = demo(&[]) else { return };
    let last = text.lines().find(|line| line.contains("checks hold")).unwrap_or_default();
    assert!(last.starts_with("All "), "{text}");
    // Fits a terminal, and no colours without one.
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
    let cgroup = text.lines().find_map(|line| line.trim().strip_prefix("cgroup")).unwrap().trim();
    assert!(!fs::exists(cgroup).unwrap(), "{cgroup} still exists");
}

#[test]
fn it_says_the_same_to_programs() {
    let Some(text) = demo(&["-o", "json"]) else { return };
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["ok"], true, "{text}");
    assert!(!report["checks"].as_array().unwrap().is_empty(), "{text}");
}
