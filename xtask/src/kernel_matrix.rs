//! `cargo xtask kernel-matrix`: the kernel tests on Debian's kernels, in QEMU.
//!
//! The guest is a Debian cloud kernel and an initramfs with a static init, the static test executable and a
//! few modules. It has no disk and no network device. Kernels and QEMU are unpacked into the cache folder,
//! not installed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use fs_err as fs;
use serde_json::Value;
use walkdir::WalkDir;

use crate::build::{self, OBJECT_VARIABLE};
use crate::process::{self, step};
use crate::setup::Purpose;
use crate::tree::Tree;
use crate::workspace::{Workspace, cache_dir};

mod archive;
mod guest_kernel;
mod qemu;

use guest_kernel::GuestKernel;
use qemu::{Outcome, Qemu};

/// Target of the kernel tests, and thus the required host.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The crates that load the BPF object. Optimising them makes a load five times cheaper in user space, which
/// matters under emulation; optimising all crates takes longer than it saves.
const OPTIMIZED: &[&str] = &["aya", "aya-obj", "object"];

/// Time limit of one kernel. Booting takes 4 s, but under emulation the verifier needs seconds for each of
/// the many loads. A hung guest does not exit by itself.
const LIMIT: Duration = Duration::from_secs(40 * 60);

/// Tests that run at once in a guest: they wait for time-outs, so more than its processors.
const N_TEST_THREADS: u8 = 3;

/// Module of the tests that do not depend on the kernel's version. They run on the oldest kernel alone.
const ANY_KERNEL: &str = "any_kernel::";

/// Output lines of a guest in an error.
const SERIAL_TAIL: usize = 40;

/// Folders that tests read at run time, at the same path in the guest.
const GUEST_FOLDERS: &[&str] = &["tests/scenarios", "tests/kernel", "manifests"];

/// A kernel of the matrix.
struct Row {
    name: &'static str,
    /// The Debian release of the cloud kernel.
    suite: &'static str,
    /// Processors of the guest.
    n_cpus: u8,
    /// If false, a failure is reported but allowed.
    is_required: bool,
}

/// The kernels, oldest first. Add a row for each kernel of a Debian release in use.
///
/// One guest has a single processor, for code that only runs there ([`qemu::Qemu::boot`] enables full
/// preemption).
const KERNELS: [Row; 4] = [
    Row { name: "5.10", suite: "bullseye", n_cpus: 2, is_required: true },
    Row { name: "6.1", suite: "bookworm", n_cpus: 1, is_required: true },
    Row { name: "6.12", suite: "trixie", n_cpus: 2, is_required: true },
    // In sid names and packaging change, so a failure need not be the fault of the tested change.
    Row { name: "newest", suite: "sid", n_cpus: 2, is_required: false },
];

/// Options of the command.
#[derive(Args)]
pub(crate) struct Options {
    /// Kernels to test [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAME", value_parser = KERNELS.map(|row| row.name))]
    kernel: Vec<String>,
    /// How to execute the guest
    #[arg(long, value_enum, default_value_t = Accelerator::Tcg)]
    accel: Accelerator,
    /// Look for newer kernels and QEMU in place of the cached ones
    #[arg(long)]
    refresh: bool,
    /// Filters and options of the test executable
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<String>,
}

impl Options {
    /// The requested kernels, oldest first.
    fn rows(&self) -> impl Iterator<Item = &'static Row> {
        let is_chosen =
            |row: &&Row| self.kernel.is_empty() || self.kernel.iter().any(|name| name == row.name);
        KERNELS.iter().filter(is_chosen)
    }
}

/// How the guest is executed. `/dev/kvm` is no proof: on nested hosts it may exist and fail later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accelerator {
    /// Emulation, which works everywhere
    Tcg,
    /// The processor's virtualization, on hosts that support it
    Kvm,
}

/// Result of a kernel.
struct KernelResult {
    row: &'static Row,
    release: String,
    outcome: Outcome,
    seconds: f64,
}

impl KernelResult {
    fn is_fatal(&self) -> bool {
        self.row.is_required && self.outcome.failure.is_some()
    }

    fn result(&self) -> String {
        let allowed = if self.outcome.failure.is_some() && !self.is_fatal() { " (allowed)" } else { "" };
        format!("{}{allowed}", self.outcome)
    }
}

/// The path of an executable in cargo's messages.
fn executable(messages: &str, name: &str, is_test: bool) -> Result<PathBuf> {
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut named = artifacts
        .filter(|artifact| artifact["target"]["name"] == name && artifact["profile"]["test"] == is_test);
    let path = named.find_map(|artifact| artifact["executable"].as_str().map(PathBuf::from));
    path.with_context(|| {
        format!("cargo built no executable {name}: is it still a target of lb-tests or lb-userspace?")
    })
}

/// Builds the part of the initramfs that all kernels share.
fn base_initramfs(workspace: &Workspace, object: &Path) -> Result<Tree> {
    step("building the kernel tests, statically linked");
    let mut cargo = workspace.cargo("build");
    cargo
        .args(["--package", "lb-tests", "--package", "lb-userspace"])
        .args(["--bin", "vm-init", "--bin", "socklb", "--test", "kernel"])
        .args(["--message-format", "json-render-diagnostics", "--target", TARGET, "--target-dir"])
        .arg(workspace.target.join("kernel-matrix"))
        .args(OPTIMIZED.iter().map(|name| format!("--config=profile.dev.package.{name}.opt-level=2")))
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env(OBJECT_VARIABLE, object)
        // Small, since the guest unpacks every byte under emulation.
        .env("CARGO_PROFILE_DEV_DEBUG", "none")
        .env("CARGO_PROFILE_DEV_STRIP", "symbols")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stderr(Stdio::inherit());
    let messages = process::capture(&mut cargo)
        .context("the guest's programs were not built: correct the errors above")?;

    let mut tree = Tree::default();
    for (program, is_test, path) in
        [("vm-init", false, "/init"), ("kernel", true, "/test"), ("socklb", false, "/socklb")]
    {
        tree.copy(&executable(&messages, program, is_test)?, path, 0o755)?;
    }
    for folder in GUEST_FOLDERS {
        for entry in WalkDir::new(workspace.root.join(folder)) {
            let entry = entry?;
            if entry.file_type().is_file() {
                tree.copy(entry.path(), entry.path(), 0o644)?;
            }
        }
    }
    // Files, since the kernel's command line has a length limit and no quoting. Emulation is slow, so tests
    // make fewer calls and agent starts here; `cargo xtask test` makes all of them.
    let environment = format!(
        "CARGO_MANIFEST_DIR={}\nSOCKLB_BIN=/socklb\nRUST_BACKTRACE=1\nRUST_TEST_THREADS={N_TEST_THREADS}\n\
         LB_TEST_CYCLES=20000\nLB_TEST_STATES=2\nLB_FAULT_STEP=4\n",
        workspace.root.join("tests").display()
    );
    tree.add("/vm.env", 0o644, Some(environment.as_bytes()));
    Ok(tree)
}

/// The arguments of the test executable on a kernel.
fn test_args(row: &Row, args: &[String]) -> Vec<String> {
    let is_oldest = row.name == KERNELS[0].name;
    let skipped = ["--skip", ANY_KERNEL].into_iter().filter(|_| !is_oldest).map(str::to_owned);
    args.iter().cloned().chain(skipped).collect()
}

/// Waits until no other run of this command uses a folder. Dropping the value releases the lock.
fn lock(dir: &Path, what: &str) -> Result<File> {
    fs::create_dir_all(dir)?;
    let file = File::create(dir.join("lock"))?;
    if file.try_lock().is_err() {
        step(&format!("another `cargo xtask kernel-matrix` {what}: waiting for it"));
        file.lock()?;
    }
    Ok(file)
}

/// Boots one kernel and evaluates its output.
fn boot(
    kernel: &GuestKernel,
    qemu: &Qemu,
    base: &[u8],
    row: &Row,
    args: &[String],
    work: &Path,
) -> Result<Outcome> {
    step(&format!("running the kernel tests on {}", kernel.release));
    let name = row.name;
    let image = work.join(format!("initramfs-{name}.cpio"));
    let mut own = Tree::default();
    own.add("/vm.args", 0o644, Some(test_args(row, args).join("\n").as_bytes()));
    fs::write(&image, [base, &kernel.modules.cpio()?, &own.cpio()?].concat())?;
    let log = work.join(format!("{name}.log"));
    let outcome = qemu.boot(name, row.n_cpus, &kernel.vmlinuz, &image, &log, LIMIT)?;
    if outcome.failure.is_some() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(SERIAL_TAIL)..].join(&format!("\n    [{name}] | "));
        // One write, because other guests print meanwhile.
        eprintln!("    [{name}] {outcome}; the last lines of {}:\n    [{name}] | {tail}", log.display());
    }
    Ok(outcome)
}

/// Runs jobs on one thread per core: a guest with two processors keeps one busy most of the time. Results
/// keep the order of the jobs.
fn run_on_all_cores<J: Send, R: Send>(jobs: Vec<J>, run: impl Fn(J) -> R + Sync) -> Vec<R> {
    let n_threads = thread::available_parallelism().map_or(1, usize::from);
    let mut results: Vec<_> = jobs.iter().map(|_| None).collect();
    let queue = Mutex::new(jobs.into_iter().zip(&mut results));
    thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some((job, result)) = next else { return };
                    *result = Some(run(job));
                }
            });
        }
    });
    drop(queue);
    results.into_iter().flatten().collect()
}

/// Prints the table of results.
fn publish(results: &[KernelResult]) {
    let width = results.iter().map(|result| result.result().len()).max().unwrap_or(0).max("result".len());
    println!(
        "{:<8} {:<26} {:<width$} {:>12} {:>8}",
        "kernel", "release", "result", "tests passed", "seconds"
    );
    for result in results {
        let KernelResult { row, release, outcome, seconds } = result;
        let (name, n_passed, result) = (row.name, outcome.tally.n_passed, result.result());
        println!("{name:<8} {release:<26} {result:<width$} {n_passed:>12} {seconds:>8.1}");
    }
}

/// Runs `cargo xtask kernel-matrix`.
///
/// # Errors
/// If setup or building fails, or the tests fail on a required kernel.
pub(crate) fn command(workspace: &Workspace, options: &Options) -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!(
            "the kernel matrix needs an x86_64 host, because its kernels and tests are built for x86_64: run it on one"
        );
    }
    let object = build::object(workspace, &[Purpose::Build, Purpose::KernelMatrix])?;
    let cache = cache_dir()?.join("kernel-matrix");
    let work = workspace.target.join("kernel-matrix");
    let downloads = lock(&cache, "is downloading")?;
    let archive = archive::Archive::locate(&cache)?;
    let qemu = Qemu::find(&archive, &cache, options.accel, options.refresh)?;
    let fetch = |row: &'static Row| {
        let kernel = GuestKernel::fetch(&archive, &cache, row.suite, options.refresh);
        (row, kernel)
    };
    let kernels: Vec<_> = options.rows().map(fetch).collect();
    drop(downloads);
    let _only_one = lock(&work, "runs in this tree")?;
    let base = base_initramfs(workspace, &object)?.cpio()?;

    let run = |(row, kernel): (&'static Row, Result<GuestKernel>)| {
        let start = Instant::now();
        let (release, outcome) = match kernel {
            Ok(kernel) => {
                let outcome = boot(&kernel, &qemu, &base, row, &options.args, &work)?;
                (kernel.release, outcome)
            }
            Err(error) => {
                eprintln!("error: {error:#}");
                ("-".to_owned(), Outcome::failed("no kernel"))
            }
        };
        Ok(KernelResult { row, release, outcome, seconds: start.elapsed().as_secs_f64() })
    };
    let results = run_on_all_cores(kernels, run).into_iter().collect::<Result<Vec<_>>>()?;
    publish(&results);
    let failed: Vec<&str> =
        results.iter().filter(|result| result.is_fatal()).map(|result| result.row.name).collect();
    if !failed.is_empty() {
        bail!("the kernel tests did not pass on {}: see the output above", failed.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn kernels_are_chosen_by_name() {
        let names = |args: &[&str]| {
            let cli = Cli::try_parse_from(["kernel-matrix"].iter().chain(args)).ok()?;
            Some(cli.options.rows().map(|row| row.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap(), ["5.10", "6.1", "6.12", "newest"]);
        assert_eq!(names(&["--kernel", "6.12,5.10"]).unwrap(), ["5.10", "6.12"]);
        assert!(names(&["--kernel", "4.19"]).is_none());
    }

    #[test]
    fn what_no_kernel_decides_runs_on_the_oldest_alone() {
        let on = |row: usize| test_args(&KERNELS[row], &["audit::".to_owned()]);
        assert_eq!(on(0), ["audit::"]);
        for row in 1..KERNELS.len() {
            assert_eq!(on(row), ["audit::", "--skip", ANY_KERNEL]);
        }
    }

    #[test]
    fn there_are_guests_with_one_processor_and_with_two() {
        for n_cpus in 1..=2 {
            assert!(KERNELS.iter().any(|row| row.is_required && row.n_cpus == n_cpus), "{n_cpus}");
        }
    }

    #[test]
    fn executables_are_read_from_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"kernel"},"profile":{"test":false},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"kernel"},"profile":{"test":true},"executable":"/t/kernel-1"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"vm-init"},"profile":{"test":false},"executable":"/t/vm-init"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable(messages, "kernel", true).unwrap(), Path::new("/t/kernel-1"));
        assert_eq!(executable(messages, "vm-init", false).unwrap(), Path::new("/t/vm-init"));
        assert!(executable(messages, "kernel", false).is_err());
    }

    #[test]
    fn results_keep_the_order_of_the_jobs() {
        let doubled = run_on_all_cores((0..20).collect(), |n: u32| n * 2);
        assert_eq!(doubled, (0..20).map(|n| n * 2).collect::<Vec<_>>());
        assert!(run_on_all_cores(Vec::<u32>::new(), |n| n).is_empty());
    }

    #[test]
    fn only_a_required_kernel_fails_the_command() {
        let result = |row, outcome| KernelResult { row, release: String::new(), outcome, seconds: 0.0 };
        assert!(result(&KERNELS[0], Outcome::failed("time limit")).is_fatal());
        assert!(!result(&KERNELS[0], Outcome::default()).is_fatal());
        let newest = result(&KERNELS[3], Outcome::failed("no kernel"));
        assert!(!newest.is_fatal());
        assert_eq!(newest.result(), "failed: no kernel (allowed)");
    }
}
