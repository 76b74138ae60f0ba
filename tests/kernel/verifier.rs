//! The verifier's cost of the programs: a jump must be noticed in review.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, io::Write as _, path::Path};

use lb_tests::{
    Feature, Sandbox,
    agent::{self, Agent},
    feature::kernel_version,
    require,
};

/// A file for each kernel version has the number of instructions that the verifier processes. It varies a
/// little with the compiler, so a program fails if it exceeds the file by a quarter. Without a file the
/// numbers are printed; `UPDATE_EXPECT=1` writes the file.
#[test]
fn verified_instructions_are_as_expected() {
    if !require(Feature::Programs) {
        return;
    }
    let found: BTreeMap<String, u32> = Sandbox::run(|sandbox| {
        let mut found = BTreeMap::new();
        for (mode, options) in ["", " (storage)"].iter().zip(agent::modes(sandbox)) {
            let agent = Agent::start_with(&options, agent::settings(), Vec::new()).unwrap();
            let counts = agent.kernel.verified_instructions().unwrap();
            found.extend(counts.into_iter().map(|(name, n)| (format!("{name}{mode}"), n)));
        }
        found
    });
    if found.values().all(|n| *n == 0) {
        // Kernels before 5.16 do not report them.
        return;
    }
    let mut text = String::new();
    for (name, n) in &found {
        writeln!(text, "{name}: {n}").unwrap();
    }
    let (major, minor) = kernel_version();
    let file = format!("verifier-{major}.{minor}.txt");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel").join(&file);
    if env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(path, text).unwrap();
        return;
    }
    let Ok(expected) = fs::read_to_string(path) else {
        let _nobody_reads = writeln!(std::io::stderr(), "no {file}; on this kernel it would be:\n{text}");
        return;
    };
    let expected: BTreeMap<&str, u32> = expected
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, n)| (name, n.parse().unwrap()))
        .collect();
    for (name, n) in &found {
        let allowed = expected.get(&**name).map_or(0, |n| n + n / 4);
        assert!(
            *n <= allowed,
            "{name} takes {n} instructions; if that is intended, UPDATE_EXPECT=1 writes {file}\n{text}"
        );
    }
}
