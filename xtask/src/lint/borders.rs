//! Module borders of lb-userspace: who may use whom, and which names stay out of which modules.
//!
//! The data flows one way (see the picture in docs/ARCHITECTURE.md), so a module uses only what stands upstream of
//! it. A module that may not name a crate cannot depend on it by accident. Test code is free of both: it does not
//! ship, and a test of `plan` may well ask `sim` what a caller would see.

use std::path::{Component, Path};

use super::source::{RustSource, UsedPath};
use super::{TreeFile, Violation};

/// The sources that the borders hold for.
const SOURCES: &str = "lb-userspace/src";

/// What a module may use of its own crate.
enum MayUse {
    /// Itself and these.
    Only(&'static [&'static str]),
    /// Everything.
    All,
}

struct Module {
    name: &'static str,
    may_use: MayUse,
    reason: &'static str,
}

/// The modules in the order of the data flow. A new module of lb-userspace needs a row.
const MODULES: &[Module] = &[
    Module {
        name: "model",
        may_use: MayUse::Only(&[]),
        reason: "the model of the objects is the start of the flow",
    },
    Module {
        name: "desired",
        may_use: MayUse::Only(&["model"]),
        reason: "policy is computed from the model alone",
    },
    Module {
        name: "tables",
        may_use: MayUse::Only(&["desired", "model"]),
        reason: "the image encodes the desired state and nothing else",
    },
    Module {
        name: "plan",
        may_use: MayUse::Only(&["tables", "desired"]),
        reason: "a plan leads from one image to the desired one, and knows no objects and no kernel",
    },
    Module {
        name: "sim",
        may_use: MayUse::Only(&["tables", "desired", "model"]),
        reason: "the simulator answers from an image, so it cannot see what only the kernel knows",
    },
    Module {
        name: "stale",
        may_use: MayUse::Only(&["desired", "model"]),
        reason: "which sockets are stale follows from the objects; finding and ending them is the kernel's",
    },
    Module {
        name: "snapshot",
        may_use: MayUse::Only(&["desired", "model"]),
        reason: "the snapshot keeps objects and settings on disk, not what was made from them",
    },
    Module {
        name: "source",
        may_use: MayUse::Only(&["model"]),
        reason: "a source delivers objects and knows nothing of what is made from them",
    },
    Module {
        name: "cluster",
        may_use: MayUse::Only(&["source", "model"]),
        reason: "the API server is one source of objects",
    },
    Module {
        name: "kernel",
        may_use: MayUse::Only(&["plan", "tables", "desired", "model"]),
        reason: "the kernel carries plans out and does not decide",
    },
    Module {
        name: "telemetry",
        may_use: MayUse::Only(&["kernel", "source", "plan", "tables", "desired", "model"]),
        reason: "telemetry reports and does not steer",
    },
    Module {
        name: "serve",
        may_use: MayUse::Only(&["telemetry", "kernel", "desired", "model"]),
        reason: "answers over HTTP are made from what telemetry and the model hold, and steer nothing",
    },
    Module {
        name: "self_test",
        may_use: MayUse::Only(&["model"]),
        reason: "the self-test calls as any program does, and knows nothing of what the agent believes",
    },
    Module { name: "controller", may_use: MayUse::All, reason: "the controller joins the modules" },
    Module { name: "cli", may_use: MayUse::All, reason: "the commands join the modules" },
];

/// A set of modules, by path from the crate root.
enum Place {
    In(&'static [&'static str]),
    Outside(&'static [&'static str]),
}

/// A path that must not be named in some modules. A path of one segment is a crate.
struct Ban {
    path: &'static str,
    place: Place,
    reason: &'static str,
}

/// The modules that are plain functions: a value in, a value and issues out.
const PURE: &[&str] = &["model", "desired", "tables", "plan", "sim", "stale", "controller::state"];

const IO_REASON: &str =
    "pure modules do no I/O, so that they run the same in tests, in the agent and in `socklb explain`";
const TIME_REASON: &str = "time is an argument of pure modules, so that a test can choose it";
const ORDER_REASON: &str =
    "the order of a hash map differs between runs, so a plan or an image would differ: use a BTree";

/// Names that stay out of some modules. Add a row when a module must not depend on something.
const BANS: &[Ban] = &[
    Ban {
        path: "aya",
        place: Place::Outside(&["kernel"]),
        reason: "only `kernel` knows aya, so that it can be replaced or faked",
    },
    Ban {
        path: "aya_obj",
        place: Place::Outside(&["kernel"]),
        reason: "only `kernel` knows aya, so that it can be replaced or faked",
    },
    Ban {
        path: "kube",
        place: Place::Outside(&["cluster"]),
        reason: "only `cluster` knows kube, so that a folder of manifests is an equal source",
    },
    Ban {
        path: "k8s_openapi",
        place: Place::Outside(&["model::ingest", "cluster", "source"]),
        reason: "the API's types end at ingest: behind it stand checked values",
    },
    Ban { path: "tokio", place: Place::In(PURE), reason: "pure modules are not async" },
    Ban { path: "std::fs", place: Place::In(PURE), reason: IO_REASON },
    Ban { path: "std::time::Instant::now", place: Place::In(PURE), reason: TIME_REASON },
    Ban { path: "std::time::SystemTime::now", place: Place::In(PURE), reason: TIME_REASON },
    Ban { path: "std::collections::HashMap", place: Place::In(PURE), reason: ORDER_REASON },
    Ban { path: "std::collections::HashSet", place: Place::In(PURE), reason: ORDER_REASON },
];

impl Place {
    fn holds(&self, module: &[String]) -> bool {
        let is_within = |name: &str| {
            let names: Vec<&str> = name.split("::").collect();
            module.len() >= names.len() && names == module[..names.len()]
        };
        let any = |names: &[&str]| names.iter().any(|name| is_within(name));
        match self {
            Self::In(names) => any(names),
            Self::Outside(names) => !any(names),
        }
    }
}

/// True when a used path names the banned one, reaches into it, or imports all that stands beside it.
fn names_banned(used: &[String], banned: &str) -> bool {
    let banned: Vec<&str> = banned.split("::").collect();
    if banned.len() == 1 {
        return used.first().is_some_and(|first| first == banned[0]);
    }
    if let Some((star, parent)) = used.split_last()
        && star == "*"
    {
        return (1..banned.len()).any(|end| parent == &banned[..end]);
    }
    // After `use std::time::Instant` the call reads `Instant::now`: the last two segments are enough.
    (0..=banned.len() - 2).any(|start| holds_run(used, &banned[start..]))
}

fn holds_run(used: &[String], run: &[&str]) -> bool {
    used.windows(run.len()).any(|window| window == run)
}

/// The module that a file holds, from its path below the sources; `None` for files that are no module.
fn module_of(file: &Path) -> Option<Vec<String>> {
    let inner = file.strip_prefix(SOURCES).ok()?;
    let mut names: Vec<String> = inner
        .with_extension("")
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => name.to_str().map(str::to_owned),
            _ => None,
        })
        .collect();
    if names.last().is_some_and(|last| last == "mod")
        || (names.len() == 1 && (names[0] == "lib" || names[0] == "main"))
    {
        names.pop();
    }
    (file.extension()? == "rs").then_some(names)
}

/// Turns `crate::`, `self::` and `super::` into a path from the crate root; `None` for other crates' paths.
fn from_crate_root(path: &UsedPath, module: &[String]) -> Option<Vec<String>> {
    let mut base: Vec<String> = module.iter().chain(&path.scope).cloned().collect();
    let mut rest = path.segments.as_slice();
    match path.segments.first()?.as_str() {
        "crate" => {
            base.clear();
            rest = &rest[1..];
        }
        "self" => rest = &rest[1..],
        "super" => {
            while rest.first().is_some_and(|segment| segment == "super") {
                base.pop();
                rest = &rest[1..];
            }
        }
        _ => return None,
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

/// What is wrong with one path in one module, if anything.
fn judge(path: &UsedPath, module: &[String]) -> Vec<(String, String)> {
    let mut wrong = Vec::new();
    for ban in BANS {
        if ban.place.holds(module) && names_banned(&path.segments, ban.path) {
            let user = if module.is_empty() {
                "the crate root".to_owned()
            } else {
                format!("`{}`", module.join("::"))
            };
            wrong.push((format!("{user} must not name {}", ban.path), ban.reason.to_owned()));
        }
    }
    let Some(user) = module.first() else { return wrong };
    let Some(target) = from_crate_root(path, module).and_then(|path| path.into_iter().next()) else {
        return wrong;
    };
    if target == *user {
        return wrong;
    }
    let Some(row) = MODULES.iter().find(|row| row.name == user.as_str()) else { return wrong };
    match row.may_use {
        MayUse::All => {}
        MayUse::Only(allowed) if allowed.contains(&target.as_str()) => {}
        MayUse::Only(_) => wrong.push((format!("`{user}` must not use `{target}`"), row.reason.to_owned())),
    }
    wrong
}

/// Checks every source of lb-userspace.
pub(super) fn check(files: &[TreeFile]) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut sources = Vec::new();
    let mut test_modules: Vec<Vec<String>> = Vec::new();
    for file in files {
        let Some(module) = module_of(&file.path) else { continue };
        // A file that is no Rust is reported by the text rules.
        let Ok(source) = RustSource::parse(&file.text) else { continue };
        test_modules
            .extend(source.test_modules.iter().map(|name| module.iter().chain(name).cloned().collect()));
        sources.push((file, module, source));
    }
    for (file, module, source) in sources {
        let mut report = |line, rule, reason| {
            violations.push(Violation { file: file.path.clone(), line, rule, reason });
        };
        if let Some(name) = module.first()
            && MODULES.iter().all(|row| row.name != name.as_str())
        {
            let reason =
                "the table MODULES in xtask/src/lint/borders.rs says what each module may use: add a row";
            report(1, format!("`{name}` has no borders"), reason.to_owned());
        }
        if test_modules.iter().any(|test| module.starts_with(test)) {
            continue;
        }
        for path in source.paths.iter().filter(|path| !path.is_test) {
            for (rule, reason) in judge(path, &module) {
                report(path.line, rule, reason);
            }
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<TreeFile> = files
            .iter()
            .map(|(path, text)| TreeFile { path: Path::new(SOURCES).join(path), text: (*text).to_owned() })
            .collect();
        check(&files).into_iter().map(|violation| format!("{}: {}", violation.line, violation.rule)).collect()
    }

    #[track_caller]
    fn passes(path: &str, text: &str) {
        assert_eq!(rules(&[(path, text)]), [""; 0]);
    }

    #[track_caller]
    fn fails(path: &str, text: &str, rule: &str) {
        assert_eq!(rules(&[(path, text)]), [rule]);
    }

    #[test]
    fn upstream_may_be_used() {
        passes("desired/mod.rs", "use crate::model::Service;");
        passes("tables.rs", "use crate::{desired::{self, Frontend}, model};");
        passes("plan/diff.rs", "use super::Op; use crate::tables::Image; use lb_common::Frontend4;");
        passes("cli/top.rs", "use crate::{kernel, cluster, plan};");
        passes("lib.rs", "pub mod kernel; pub use kernel::Store; use crate::plan::Plan;");
    }

    #[test]
    fn downstream_must_not_be_used() {
        fails("model/mod.rs", "\nuse crate::desired::Frontend;", "2: `model` must not use `desired`");
        fails("plan/diff.rs", "use super::super::kernel;", "1: `plan` must not use `kernel`");
        fails("plan/mod.rs", "fn f() { g(crate::model::X) }", "1: `plan` must not use `model`");
        fails("sim.rs", "use crate::{tables, kernel::Store};", "1: `sim` must not use `kernel`");
        fails("cluster/watch.rs", "use crate::controller;", "1: `cluster` must not use `controller`");
        fails("model.rs", "mod inner { use super::super::sim::Flow; }", "1: `model` must not use `sim`");
        fails("plan.rs", "fn f() { println!(\"{}\", crate::sim::x()) }", "1: `plan` must not use `sim`");
        fails("plan.rs", "use crate::Everything;", "1: `plan` must not use `Everything`");
    }

    #[test]
    fn an_unknown_module_needs_a_row() {
        fails("unheard_of.rs", "", "1: `unheard_of` has no borders");
    }

    #[test]
    fn crates_stay_in_their_module() {
        passes("kernel/mod.rs", "use aya::Ebpf;");
        passes("cluster/mod.rs", "use kube::Client;");
        passes("model/ingest.rs", "use k8s_openapi::api::core::v1::Service;");
        passes("controller/run.rs", "use tokio::time::Instant; use std::fs;");
        fails("cli/run.rs", "fn f() -> aya::Ebpf { todo() }", "1: `cli::run` must not name aya");
        fails("main.rs", "extern crate aya;", "1: the crate root must not name aya");
        fails("source/file.rs", "use ::kube::api::ObjectMeta;", "1: `source::file` must not name kube");
        fails("model/service.rs", "use k8s_openapi::List;", "1: `model::service` must not name k8s_openapi");
    }

    #[test]
    fn pure_modules_do_no_io_and_read_no_clock() {
        fails("model.rs", "use std::{fs, net::IpAddr};", "1: `model` must not name std::fs");
        fails(
            "desired.rs",
            "use std::time::Instant;\nfn f() { Instant::now(); }",
            "2: `desired` must not name std::time::Instant::now",
        );
        fails(
            "controller/state.rs",
            "fn f() { std::time::SystemTime::now(); }",
            "1: `controller::state` must not name std::time::SystemTime::now",
        );
        fails(
            "plan.rs",
            "use std::collections::{BTreeMap, HashMap as Map};",
            "1: `plan` must not name std::collections::HashMap",
        );
        fails(
            "plan.rs",
            "use std::collections; type T = collections::HashSet<u8>;",
            "1: `plan` must not name std::collections::HashSet",
        );
        fails("sim.rs", "use std::fs::File;", "1: `sim` must not name std::fs");
        passes("controller/run.rs", "use std::time::Instant; fn f() { Instant::now(); }");
        passes(
            "plan.rs",
            "use std::collections::BTreeMap; use std::time::Duration; fn f(now: std::time::Instant) {}",
        );
    }

    #[test]
    fn a_glob_import_hides_nothing() {
        let expected = [
            "1: `sim` must not name std::collections::HashMap",
            "1: `sim` must not name std::collections::HashSet",
        ];
        assert_eq!(rules(&[("sim.rs", "use std::collections::*;")]), expected);
        passes("sim.rs", "use super::sim::*;");
    }

    #[test]
    fn test_code_is_free() {
        passes("plan/mod.rs", "#[cfg(test)]\nmod tests { use crate::sim; use std::collections::HashMap; }");
        let files = [("plan/mod.rs", "#[cfg(test)]\nmod tests;"), ("plan/tests.rs", "use crate::sim::Flow;")];
        assert_eq!(rules(&files), [""; 0]);
        fails("plan/mod.rs", "#[cfg(not(test))]\nuse crate::sim;", "2: `plan` must not use `sim`");
    }
}
