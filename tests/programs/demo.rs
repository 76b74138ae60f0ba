//! `socklb-demo`, which checks every statement that it prints.

use std::{env, fs, path::Path, process::Command};

use lb_tests::{Feature, cgroup::ThreadCgroup, require};
use serde_json::Value;

fn demo(args: &[&str]) -> Option<String> {
    if !require(Feature::Programs)
        || !require(Feature::Variable("SOCKLB_BIN"))
        || !require(Feature::Command("curl"))
    {
        return None;
    }
    // Namespaces, cgroup and pins are the demo's own. It starts in this test's cgroup, which is removed.
    let _cgroup = ThreadCgroup::enter().unwrap();
    let program = Path::new(&env::var("SOCKLB_BIN").unwrap()).with_file_name("socklb-demo");
    let output = Command::new(program).arg("--exit").args(args).output().unwrap();
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{error}", output.status);
    Some(out.into_owned())
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
