//! Rules about names and words in the whole tree.

use std::path::Path;

use super::{TreeFile, Violation};

/// The pattern of a rule.
enum Find {
    /// A word in any source but prose, outside tests.
    Word(&'static str),
    /// A word, alone or joined by `_`, in the name of a module's file or folder.
    ModuleName(&'static str),
}

struct Rule {
    find: Find,
    reason: &'static str,
}

const MACHINE_PATH: &str = "the path exists on one machine only: take it from an argument or the environment";
const HOST: &str =
    "where packages and images come from is the machine's choice: read it from its configuration";
const NO_TOPIC: &str = "the name does not say what is inside: name the topic";

/// The rules. Words are split where this file would violate its own rule.
const RULES: &[Rule] = &[
    Rule { find: Find::Word(concat!("/tm", "p/")), reason: MACHINE_PATH },
    Rule { find: Find::Word(concat!("/wor", "k/")), reason: MACHINE_PATH },
    Rule { find: Find::Word(concat!("/roo", "t/")), reason: MACHINE_PATH },
    Rule { find: Find::Word(concat!("/hom", "e/")), reason: MACHINE_PATH },
    Rule { find: Find::Word(concat!("deb.deb", "ian.org")), reason: HOST },
    Rule { find: Find::Word(concat!("security.deb", "ian.org")), reason: HOST },
    Rule { find: Find::Word(concat!("index.cra", "tes.io")), reason: HOST },
    Rule { find: Find::Word(concat!("static.cra", "tes.io")), reason: HOST },
    Rule { find: Find::Word(concat!("static.rust", "-lang.org")), reason: HOST },
    Rule { find: Find::Word(concat!("doc", "ker.io")), reason: HOST },
    Rule { find: Find::Word(concat!("gh", "cr.io")), reason: HOST },
    Rule { find: Find::Word(concat!("qu", "ay.io")), reason: HOST },
    Rule { find: Find::Word(concat!("registry", ".k8s.io")), reason: HOST },
    Rule { find: Find::ModuleName("util"), reason: NO_TOPIC },
    Rule { find: Find::ModuleName("utils"), reason: NO_TOPIC },
    Rule { find: Find::ModuleName("helper"), reason: NO_TOPIC },
    Rule { find: Find::ModuleName("helpers"), reason: NO_TOPIC },
    Rule { find: Find::ModuleName("common"), reason: NO_TOPIC },
    Rule { find: Find::ModuleName("manager"), reason: NO_TOPIC },
];

/// Applies every rule to every file.
pub(super) fn check(files: &[TreeFile]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in files {
        let mut report = |line, rule: String, reason: &str| {
            violations.push(Violation { file: file.path.clone(), line, rule, reason: reason.to_owned() });
        };
        for rule in RULES {
            for (line, what) in matches(&rule.find, file) {
                report(line, what, rule.reason);
            }
        }
        if file.path.ends_with("Cargo.toml") && file.text.contains("[package]") && !inherits_lints(&file.text)
        {
            report(
                1,
                "no `[lints] workspace = true`".to_owned(),
                "the workspace's lint table does nothing without it",
            );
        }
    }
    violations.extend(changelog(files));
    violations.extend(unproved(files));
    violations
}

/// The page whose rows name their tests in the last column.
const RULES_PAGE: &str = "docs/SEMANTICS.md";

/// Rows of [`RULES_PAGE`] that name a missing test, for example after a rename.
fn unproved(files: &[TreeFile]) -> Vec<Violation> {
    let is_function = |name: &str| {
        let definition = format!("fn {name}(");
        files.iter().filter(|file| is_rust(&file.path)).any(|file| file.text.contains(&definition))
    };
    let page = files.iter().filter(|file| file.path == Path::new(RULES_PAGE));
    let rows = page.flat_map(|page| page.text.lines().zip(1..)).filter(|(row, _)| row.starts_with("| "));
    let mut violations = Vec::new();
    for (row, line) in rows {
        let last = row.trim_end_matches([' ', '|']).rsplit(" | ").next().unwrap_or_default();
        // Between backticks, after an optional path, or folder and colon.
        for quoted in last.split('`').skip(1).step_by(2) {
            let name = quoted.rsplit([' ', ':']).next().unwrap_or_default();
            let is_crate_or_file =
                !name.contains('_') || name.contains(['-', '/', '.']) || name.starts_with("lb_");
            if !is_crate_or_file && !is_function(name) {
                violations.push(Violation {
                    file: RULES_PAGE.into(),
                    line,
                    rule: format!("no test `{name}`"),
                    reason: "each rule needs an existing test: use the test's current name".to_owned(),
                });
            }
        }
    }
    violations
}

fn matches(find: &Find, file: &TreeFile) -> Vec<(usize, String)> {
    match find {
        Find::Word(word) => {
            if is_prose(&file.path) || is_test(&file.path) {
                return Vec::new();
            }
            // Unit tests are at the end of a file.
            let lines = file.text.lines().take_while(|text| *text != "#[cfg(test)]").zip(1..);
            lines
                .filter(|(text, _)| text.contains(word))
                .map(|(_, line)| (line, format!("`{word}`")))
                .collect()
        }
        Find::ModuleName(word) => {
            if !is_rust(&file.path) || !module_words(&file.path).any(|part| part == *word) {
                return Vec::new();
            }
            vec![(1, format!("a module called `{word}`"))]
        }
    }
}

/// Words in the names of a file and its folders. A crate's own folder is not a module.
fn module_words(path: &Path) -> impl Iterator<Item = String> {
    let names: Vec<String> =
        path.with_extension("").iter().skip(1).map(|name| name.to_string_lossy().into_owned()).collect();
    names.into_iter().flat_map(|name| name.split('_').map(str::to_owned).collect::<Vec<_>>())
}

fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs")
}

/// Prose may name a path or host as an example; a lock file names where cargo found a crate.
fn is_prose(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "md" || extension == "lock")
}

fn is_test(path: &Path) -> bool {
    path.iter().any(|part| part == "tests" || part == "tests.rs")
}

fn inherits_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().map(str::trim).skip_while(|line| *line != "[lints]").skip(1);
    lines.find(|line| !line.is_empty()).is_some_and(|line| line == "workspace = true")
}

fn changelog(files: &[TreeFile]) -> Option<Violation> {
    let path = Path::new("CHANGELOG.md");
    let text = files.iter().find(|file| file.path == path).map_or("", |file| file.text.as_str());
    let is_heading = |line: &str| line.starts_with("## Unreleased") || line.starts_with("## [Unreleased]");
    if text.lines().any(is_heading) {
        return None;
    }
    Some(Violation {
        file: path.to_owned(),
        line: 1,
        rule: "no section `## Unreleased`".to_owned(),
        reason: "users read there what the next release changes".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGELOG: (&str, &str) = ("CHANGELOG.md", "# Changelog\n\n## [Unreleased]\n");

    fn rules(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<TreeFile> = files
            .iter()
            .map(|(path, text)| TreeFile { path: path.into(), text: (*text).to_owned() })
            .collect();
        check(&files).into_iter().map(|v| format!("{}:{}: {}", v.file.display(), v.line, v.rule)).collect()
    }

    #[track_caller]
    fn passes(path: &str, text: &str) {
        assert_eq!(rules(&[CHANGELOG, (path, text)]), [""; 0]);
    }

    #[track_caller]
    fn fails(path: &str, text: &str, rule: &str) {
        assert_eq!(rules(&[CHANGELOG, (path, text)]), [rule]);
    }

    #[test]
    fn rules_name_tests_that_are_there() {
        let test = ("a/src/tests.rs", "fn r1_labels() {}\n");
        let page = "| rule | tests |\n| --- | --- |\n| One `is_so`. | `r1_labels`, `lb_common::resolve` `a::r1_labels`, `tests/x: r1_labels` |\n";
        assert_eq!(rules(&[CHANGELOG, test, (RULES_PAGE, page)]), [""; 0]);
        let renamed = ("a/src/tests.rs", "fn r1_other() {}\n");
        let found = rules(&[CHANGELOG, renamed, (RULES_PAGE, page)]);
        assert_eq!(found, ["docs/SEMANTICS.md:3: no test `r1_labels`"; 3]);
    }

    #[test]
    fn machine_paths_are_for_tests_and_prose_only() {
        fails("a/src/lib.rs", "const A: &str = \"/tmp/x\";", "a/src/lib.rs:1: `/tmp/`");
        fails(".ci/run", "cd /root/x", ".ci/run:1: `/root/`");
        fails("manifests/a.yaml", "image: ghcr.io/a/b", "manifests/a.yaml:1: `ghcr.io`");
        passes("a/src/lib.rs", "#[cfg(test)]\nmod tests {\n const A: &str = \"/tmp/x\";\n}");
        passes("tests/kernel/a.rs", "const A: &str = \"/tmp/x\";");
        passes("docs/a.md", "cd /tmp/x");
    }

    #[test]
    fn modules_are_named_by_topic() {
        fails("a/src/utils.rs", "", "a/src/utils.rs:1: a module called `utils`");
        fails("a/src/map_helpers/b.rs", "", "a/src/map_helpers/b.rs:1: a module called `helpers`");
        passes("lb-common/src/lib.rs", "");
    }

    #[test]
    fn every_crate_inherits_the_lints() {
        passes("a/Cargo.toml", "[package]\nname = \"a\"\n[lints]\nworkspace = true\n");
        passes("Cargo.toml", "[workspace]\n");
        fails("a/Cargo.toml", "[package]\nname = \"a\"\n", "a/Cargo.toml:1: no `[lints] workspace = true`");
    }

    #[test]
    fn the_changelog_has_room_for_the_next_release() {
        assert_eq!(rules(&[("CHANGELOG.md", "## 0.1.0")]), ["CHANGELOG.md:1: no section `## Unreleased`"]);
        assert_eq!(rules(&[]), ["CHANGELOG.md:1: no section `## Unreleased`"]);
    }
}
