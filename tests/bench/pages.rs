//! Documents with results: the text between marks comes only from result files.
//!
//! `<!-- bench: SUITE/TABLE -->` begins a part, `<!-- /bench -->` ends it; both are kept.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::{
    markdown, plot,
    result::{ResultFile, Suite},
};

/// The directory of result files and plots, relative to the root of the repository.
const RESULTS: &str = "docs/benchmarks";
const PAGES: [&str; 2] = ["docs/BENCHMARKS.md", "README.md"];
const BEGIN: &str = "<!-- bench: ";
const BEGIN_END: &str = " -->";
const END: &str = "<!-- /bench -->";

/// Rewrites plots and documents.
///
/// # Errors
///
/// If a file cannot be read or written, or a document refers to a table that no result has.
pub(crate) fn render(root: &Path) -> anyhow::Result<()> {
    for (path, text) in rendered(root)? {
        fs::write(&path, text).with_context(|| format!("{}: cannot be written", path.display()))?;
    }
    Ok(())
}

fn rendered(root: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    let mut tables = Vec::new();
    for suite in Suite::ALL {
        let path = root.join(RESULTS).join(format!("{}.json", suite.name()));
        if !path.exists() {
            continue;
        }
        let result = ResultFile::read(&path)?;
        if result.suite != suite {
            bail!("{}: is of suite {}", path.display(), result.suite.name());
        }
        for (name, picture) in plot::suite(&result)? {
            files.push((root.join(RESULTS).join(name), picture));
        }
        let sections = markdown::sections(&result);
        tables.extend(
            sections.into_iter().map(|section| (format!("{}/{}", suite.name(), section.name), section.text)),
        );
    }
    for page in PAGES {
        let path = root.join(page);
        let text =
            fs::read_to_string(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let text = replace(&text, &tables).with_context(|| path.display().to_string())?;
        files.push((path, text));
    }
    Ok(files)
}

/// Replaces the tables between their marks.
fn replace(page: &str, tables: &[(String, String)]) -> anyhow::Result<String> {
    let mut text = String::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (name, after) = after.split_once(BEGIN_END).context("a mark without its end")?;
        let (_old, after) = after.split_once(END).with_context(|| format!("{name}: no {END} follows"))?;
        let table = tables.iter().find(|(known, _)| known == name).map(|(_, table)| table);
        let table = table.with_context(|| format!("{name}: no result has such a table"))?;
        for part in [before, BEGIN, name, BEGIN_END, "\n\n", table, "\n", END] {
            text.push_str(part);
        }
        rest = after;
    }
    text.push_str(rest);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> Vec<(String, String)> {
        vec![("path/latency".to_owned(), "| a |\n".to_owned()), ("sync/run".to_owned(), "| b |\n".to_owned())]
    }

    #[test]
    fn marks_stay_and_what_is_between_is_replaced() {
        let page = "x\n<!-- bench: path/latency -->\nold\n<!-- /bench -->\ny\n<!-- bench: sync/run --><!-- /bench -->\n";
        let wanted = "x\n<!-- bench: path/latency -->\n\n| a |\n\n<!-- /bench -->\ny\n<!-- bench: sync/run -->\n\n| b |\n\n<!-- /bench -->\n";
        let once = replace(page, &tables()).unwrap();
        assert_eq!(once, wanted);
        assert_eq!(replace(&once, &tables()).unwrap(), once);
    }

    #[test]
    fn broken_marks_are_named() {
        for (page, part) in [
            ("<!-- bench: path/other --><!-- /bench -->", "path/other"),
            ("<!-- bench: path/latency -->", "path/latency"),
            ("<!-- bench: path/latency", "without its end"),
        ] {
            let error = format!("{:#}", replace(page, &tables()).unwrap_err());
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn documents_and_plots_agree_with_the_result_files() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for (path, text) in rendered(root).unwrap() {
            let found = fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "{}: run `cargo xtask bench render`", path.display());
        }
    }
}
