//! What the programs cost the verifier: a jump in review is a question.

use std::{env, fmt::Write as _, fs, path::Path};

use lb_tests::{Feature, Sandbox, agent::Agent, feature::kernel_version, require};

/// The instructions that the verifier walks through are kept in a file for each kernel version. On a kernel without a
/// file they are printed; `UPDATE_EXPECT=1` writes the file.
#[test]
fn verified_instructions_are_as_expected() {
    if !require(Feature::Programs) {
        return;
    }
    let mut found = String::new();
    for (name, n) in Sandbox::run(|sandbox| Agent::start(sandbox).kernel.verified_instructions().unwrap()) {
        writeln!(found, "{name} {n}").unwrap();
    }
    let (major, minor) = kernel_version();
    let file = format!("verifier-{major}.{minor}.txt");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel").join(&file);
    if env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(path, found).unwrap();
        return;
    }
    match fs::read_to_string(path) {
        Ok(expected) => assert_eq!(found, expected, "{file}: UPDATE_EXPECT=1 writes it anew"),
        Err(_unknown_kernel) => {
            let _nobody_reads = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("no {file}; on this kernel it would be:\n{found}").as_bytes(),
            );
        }
    }
}
