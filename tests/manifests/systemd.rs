//! The systemd unit: systemd accepts it, and it grants what the `DaemonSet` grants.

use std::{collections::BTreeSet, env, fs, os::unix::fs::PermissionsExt as _, process::Command};

use serde_json::Value;

use crate::rendered::folder;

fn unit() -> String {
    fs::read_to_string(folder().join("systemd/socklb.service")).unwrap()
}

/// The value of a key that occurs once.
fn value<'a>(unit: &'a str, key: &str) -> &'a str {
    let mut values = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let value = values.next().unwrap_or_else(|| panic!("no {key}"));
    assert!(values.next().is_none(), "{key} occurs twice");
    value
}

/// systemd reports unknown keys, invalid values, and a missing program; another program stands in for it
/// here.
#[test]
fn systemd_reads_the_unit() {
    let path = env::var_os("PATH").unwrap_or_default();
    if !env::split_paths(&path).any(|directory| directory.join("systemd-analyze").is_file()) {
        // `cargo xtask setup` does not require it: without systemd the unit is useless.
        eprintln!("systemd-analyze: not found: the unit is not verified");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("socklb");
    fs::write(&program, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let verify = |text: &str| {
        let path = directory.path().join("socklb.service");
        fs::write(&path, text).unwrap();
        let output =
            Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // Other units that this one refers to are not this project's.
        let own: Vec<String> =
            said.lines().filter(|line| line.contains("socklb")).map(str::to_owned).collect();
        (output.status.success(), own)
    };
    let unit = unit().replace("/usr/local/bin/socklb", program.to_str().unwrap());
    assert_eq!(verify(&unit), (true, Vec::new()));
    let (_, wrong) = verify(&unit.replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"));
    assert!(wrong.iter().any(|line| line.contains("NoNewPrivilege")), "{wrong:?}");
}

/// And the host's processes, which a pod of the `DaemonSet` does not see, and port 53 for names.
#[test]
fn the_unit_grants_what_the_daemon_set_grants() {
    let text = fs::read_to_string(folder().join("base/daemonset.yaml")).unwrap();
    let daemon_set: Value = serde_saphyr::from_str(&text).unwrap();
    let container = &daemon_set["spec"]["template"]["spec"]["containers"][0];
    let names = container["securityContext"]["capabilities"]["add"].as_array().unwrap();
    let mut names: BTreeSet<String> =
        names.iter().map(|name| format!("CAP_{}", name.as_str().unwrap())).collect();
    names.extend(["CAP_SYS_PTRACE", "CAP_NET_BIND_SERVICE"].map(str::to_owned));
    let unit = unit();
    let granted: BTreeSet<String> =
        value(&unit, "CapabilityBoundingSet").split(' ').map(str::to_owned).collect();
    assert_eq!(granted, names);
    assert_eq!(value(&unit, "NoNewPrivileges"), "yes");
}

/// It runs the command of the README with the settings file beside it.
#[test]
fn the_unit_runs_the_agent() {
    let unit = unit();
    assert_eq!(value(&unit, "ExecStart"), "/usr/local/bin/socklb run --config /etc/socklb/socklb.yaml");
    assert!(folder().join("systemd/socklb.yaml").is_file());
    // The exit status of wrong usage.
    assert_eq!(value(&unit, "RestartPreventExitStatus"), "2");
}
