//! The machine and tools of a measurement.

use std::{collections::BTreeMap, fs, path::Path, process::Command, time::Duration};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Model name of the first CPU.
    pub(crate) cpu: String,
    pub(crate) n_cpus: usize,
    pub(crate) memory_mib: u64,
    pub(crate) architecture: String,
    pub(crate) kernel: String,
    /// Whether the CPU reports a hypervisor.
    pub(crate) is_virtual: bool,
    /// Load averages over 1, 5 and 15 minutes before the run.
    pub(crate) load_before: [f64; 3],
    /// The same after it, including the run's own load.
    pub(crate) load_after: [f64; 3],
}

/// The load averages; zeros if proc(5) is not readable.
pub(crate) fn load() -> [f64; 3] {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut words = text.split_whitespace().map(|word| word.parse().unwrap_or_default());
    std::array::from_fn(|_| words.next().unwrap_or_default())
}

impl Machine {
    pub(crate) fn observe() -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = field(&memory, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        let (load, name) = (load(), nix::sys::utsname::uname().ok());
        Self {
            cpu: field(&cpu, "model name").unwrap_or("unknown").to_owned(),
            n_cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory.unwrap_or_default() / 1024,
            architecture: std::env::consts::ARCH.to_owned(),
            kernel: name
                .map_or_else(|| "unknown".to_owned(), |name| name.release().to_string_lossy().into_owned()),
            is_virtual: field(&cpu, "flags")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            load_before: load,
            load_after: load,
        }
    }
}

/// The value of a line `key : value`.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

/// The run time of a thread so far, from its directory in proc(5); 0 if the kernel does not count it.
pub(crate) fn thread_time(thread: &Path) -> Duration {
    let text = fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
    let nanoseconds = text.split_whitespace().next().and_then(|number| number.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or_default())
}

/// The first line of a program's version output, if it can be started.
pub(crate) fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// The versions of those programs that exist.
pub(crate) fn versions(programs: &[&str]) -> BTreeMap<String, String> {
    programs.iter().filter_map(|program| Some(((*program).to_owned(), version(program)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_with_any_spaces() {
        let text = "processor\t: 0\nmodel name\t: A CPU @ 1 GHz\nMemTotal:   1024 kB\n";
        let table = [
            ("model name", Some("A CPU @ 1 GHz")),
            ("MemTotal", Some("1024 kB")),
            ("flags", None),
            ("model", None),
        ];
        for (key, wanted) in table {
            assert_eq!(field(text, key), wanted, "{key}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_has_no_version() {
        assert_eq!(version("no-such-program-here"), None);
    }
}
