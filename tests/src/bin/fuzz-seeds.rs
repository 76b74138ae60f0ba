//! Writes the initial corpus of the fuzz target `ingest` from the scenarios: `fuzz-seeds SCENARIOS CORPUS`.

use std::{env, fs, path::Path};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// The objects of a scenario and of its steps as lines, including deletions.
fn lines(scenario: &Value) -> Vec<String> {
    let list = |value: &Value, field: &str| value[field].as_array().cloned().unwrap_or_default();
    let mut lines: Vec<String> = list(scenario, "objects").iter().map(Value::to_string).collect();
    for step in list(scenario, "steps") {
        lines.extend(list(&step, "set").iter().map(Value::to_string));
        for gone in list(&step, "delete") {
            if let Some((kind, name)) = gone.as_str().and_then(|gone| gone.split_once(' ')) {
                let (namespace, name) = name.split_once('/').unwrap_or(("", name));
                let metadata = serde_json::json!({"namespace": namespace, "name": name});
                lines.push(format!("-{}", serde_json::json!({"kind": kind, "metadata": metadata})));
            }
        }
    }
    lines
}

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [scenarios, corpus] = &arguments[..] else { bail!("usage: fuzz-seeds SCENARIOS CORPUS") };
    fs::create_dir_all(corpus)?;
    for entry in fs::read_dir(scenarios)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        let scenario: Value = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
        let name = path.file_stem().unwrap_or_default();
        fs::write(Path::new(corpus).join(name), lines(&scenario).join("\n"))?;
    }
    Ok(())
}
