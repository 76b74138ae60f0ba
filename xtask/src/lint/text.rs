//! Rules about names and words in the whole tree.

use std::path::Path;

use super::TreeFile;

/// Words that no source holds outside tests and prose, and why. They are split where this file would violate
/// its own rule.
const WORDS: &[(&[&str], &str)] = &[
    (
        &[concat!("/tm", "p/"), concat!("/wor", "k/"), concat!("/roo", "t/"), concat!("/hom", "e/")],
        "the path exists on one machine only: take it from an argument or the environment",
    ),
    (
        &[
            concat!("deb.deb", "ian.org"),
            concat!("security.deb", "ian.org"),
            concat!("index.cra", "tes.io"),
            concat!("static.cra", "tes.io"),
            concat!("static.rust", "-lang.org"),
            concat!("doc", "ker.io"),
            concat!("gh", "cr.io"),
            concat!("qu", "ay.io"),
            concat!("registry", ".k8s.io"),
        ],
        "where packages and images come from is the machine's choice: read it from its configuration",
    ),
];

/// Words that are not in the name of a module's file or folder, alone or joined by `_`: such a name does not
/// tell the topic.
const MODULE_NAMES: &[&str] = &["util", "utils", "helper", "helpers", "common", "manager"];

/// Applies every rule to every file. Returns violations as `file:line: rule (reason)`.
pub(super) fn check(files: &[TreeFile]) -> Vec<String> {
    let mut violations = Vec::new();
    for TreeFile { path, text } in files {
        let mut report = |line: usize, rule: &str, reason: &str| {
            violations.push(format!("{}:{line}: {rule} ({reason})", path.display()));
        };
        if !is_prose(path) && !is_test(path) {
            // Unit tests are at the end of a file.
            for (text, line) in text.lines().take_while(|text| *text != "#[cfg(test)]").zip(1..) {
                for (words, reason) in WORDS {
                    for word in words.iter().filter(|word| text.contains(**word)) {
                        report(line, &format!("`{word}`"), reason);
                    }
                }
            }
        }
        if let Some(word) = is_rust(path).then(|| unspecific_name(path)).flatten() {
            report(1, &format!("a module called `{word}`"), "name the topic that is inside");
        }
        if path.ends_with("Cargo.toml") && text.contains("[package]") && !inherits_lints(text) {
            report(1, "no `[lints] workspace = true`", "the workspace's lints do not apply without it");
        }
        if path == Path::new(RULES_PAGE) {
            for (name, line) in missing_tests(text, files) {
                report(line, &format!("no test `{name}`"), "each rule has a test: use its current name");
            }
        }
    }
    let is_changelog = |file: &&TreeFile| file.path == Path::new("CHANGELOG.md");
    let mut changelog = files.iter().filter(is_changelog).flat_map(|file| file.text.lines());
    if !changelog.any(|line| line == "## Unreleased") {
        violations.push(
            "CHANGELOG.md:1: no section `## Unreleased` (users read there what the next release changes)"
                .to_owned(),
        );
    }
    violations
}

/// The page whose rows name their tests in the last column.
const RULES_PAGE: &str = "docs/SEMANTICS.md";

/// Tests that are not in the tree, for example after a rename, with the line of [`RULES_PAGE`] that names
/// them.
fn missing_tests<'a>(page: &'a str, files: &[TreeFile]) -> Vec<(&'a str, usize)> {
    let is_function = |name: &str| {
        let definition = format!("fn {name}(");
        files.iter().filter(|file| is_rust(&file.path)).any(|file| file.text.contains(&definition))
    };
    let mut missing = Vec::new();
    for (row, line) in page.lines().zip(1..).filter(|(row, _)| row.starts_with("| ")) {
        let last = row.trim_end_matches([' ', '|']).rsplit(" | ").next().unwrap_or_default();
        // Between backticks, after an optional path, or folder and colon.
        for quoted in last.split('`').skip(1).step_by(2) {
            let name = quoted.rsplit([' ', ':']).next().unwrap_or_default();
            let is_crate_or_file =
                !name.contains('_') || name.contains(['-', '/', '.']) || name.starts_with("lb_");
            if !is_crate_or_file && !is_function(name) {
                missing.push((name, line));
            }
        }
    }
    missing
}

/// The word of [`MODULE_NAMES`] in the names of a file and its folders. A crate's own folder is not a module.
fn unspecific_name(path: &Path) -> Option<&'static str> {
    let path = path.with_extension("");
    let mut words = path.iter().skip(1).filter_map(|name| name.to_str()).flat_map(|name| name.split('_'));
    words.find_map(|word| MODULE_NAMES.iter().find(|name| **name == word).copied())
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

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGELOG: (&str, &str) = ("CHANGELOG.md", "# Changelog\n\n## Unreleased\n");

    fn rules(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<TreeFile> = files
            .iter()
            .map(|(path, text)| TreeFile { path: path.into(), text: (*text).to_owned() })
            .collect();
        let rule = |violation: String| Some(violation.rsplit_once(" (")?.0.to_owned());
        check(&files).into_iter().filter_map(rule).collect()
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
