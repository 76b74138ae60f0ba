//! Init process of a virtual machine of `cargo xtask kernel-matrix`.
//!
//! Sets up what a test expects of a running system, runs `/test`, reports its exit status and powers the
//! machine off. Inputs are files of the initramfs: `/vm.args` has one argument of `/test` per line, `/vm.env`
//! one `NAME=value` of its environment per line. Modules in `/modules` are loaded in the order of their
//! names.
//!
//! The caller reads the serial console: `INIT DONE rc=N` is the status of `/test`; `INIT FAILED: cause` means
//! that it did not run. Linked statically, because the initramfs has no libraries.
#![expect(clippy::print_stdout, reason = "standard output is the serial line that the caller reads")]

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::termios::tcdrain;

/// Type and mount point of every file system, in mount order.
const MOUNTS: &[(&str, &str)] = &[
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
];

fn mount_all() -> Result<()> {
    for &(kind, place) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("cannot create {place}"))?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {kind} on {place}"))?;
    }
    // Not mounted separately: the root is already in memory, and the tests' directory may be below them.
    for place in ["/tmp", "/run"] {
        fs::create_dir_all(place).with_context(|| format!("cannot create {place}"))?;
    }
    Ok(())
}

fn load_modules() -> Result<()> {
    let dir = Path::new("/modules");
    if !dir.exists() {
        return Ok(());
    }
    let entries = fs::read_dir(dir).context("cannot list /modules")?;
    let mut modules: Vec<PathBuf> =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    modules.sort();
    for path in modules {
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        finit_module(file, c"", ModuleInitFlags::empty())
            .with_context(|| format!("cannot load {}", path.display()))?;
    }
    Ok(())
}

fn run_test() -> Result<ExitStatus> {
    let args = fs::read_to_string("/vm.args").context("cannot read /vm.args")?;
    let environment = fs::read_to_string("/vm.env").context("cannot read /vm.env")?;
    let mut test = Command::new("/test");
    test.args(args.lines()).envs(environment.lines().filter_map(|line| line.split_once('=')));
    // As under cargo, which runs tests in the directory of their crate.
    if let Some(dir) = environment.lines().find_map(|line| line.strip_prefix("CARGO_MANIFEST_DIR=")) {
        test.current_dir(dir);
    }
    test.status().context("cannot run /test")
}

fn run() -> Result<i32> {
    mount_all()?;
    // Kernels before 5.11 count BPF maps against this limit.
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)
        .context("cannot raise RLIMIT_MEMLOCK")?;
    load_modules()?;
    lb_netns::set_up_loopback().context("cannot set the loopback device up")?;
    let status = run_test()?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
}

fn main() -> Result<()> {
    if std::process::id() != 1 {
        bail!("vm-init powers the machine off: run it only as the first process of a virtual machine");
    }
    match run() {
        Ok(status) => println!("INIT DONE rc={status}"),
        Err(error) => println!("INIT FAILED: {error:#}"),
    }
    // The error has no reader, and the machine must power off.
    io::stdout().flush().ok();
    tcdrain(io::stdout()).ok();
    reboot(RebootMode::RB_POWER_OFF).map(|_| ()).context("cannot power off")
}
