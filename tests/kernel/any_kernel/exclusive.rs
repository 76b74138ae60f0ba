//! Other programs, attached in a mode that allows no further program.

use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

use aya::{
    Ebpf,
    maps::MapInfo,
    programs::{CgroupSockAddr, Program},
};
use lb_common::{
    hooks::{HOOKS, HookSpec},
    maps::LAYOUTS,
};
use lb_kernel::{Features, Kernel, KernelError, Options, host, pins, syscall};
use lb_tests::{Sandbox, agent};
use nix::{errno::Errno, libc};

use crate::{
    fixture::{Below, with_web},
    lifecycle::load_object,
};

/// `BPF_F_ALLOW_*` not set: no other program at this cgroup or below it.
const NONE: u32 = 0;
const OVERRIDE: u32 = 1;
const MULTI: u32 = 2;

fn hook(name: &str) -> &'static HookSpec {
    HOOKS.iter().find(|hook| hook.name == name).unwrap()
}

/// Another owner of attached programs, with copies of this object's.
struct Stranger(Ebpf);

impl Stranger {
    /// Attaches its program as `bpftool cgroup attach` does, for the life of the cgroup. Returns its id.
    fn attach(&mut self, cgroup: &Path, hook: &HookSpec, flags: u32) -> u32 {
        let storage = !Features::probe().compare_and_swap && hook.has_modes;
        let name = if storage { format!("{}_s", hook.name) } else { hook.name.to_owned() };
        let program = self.0.program_mut(&name).unwrap();
        if let Program::CgroupSockAddr(program) = program {
            let program: &mut CgroupSockAddr = program;
            if program.fd().is_err() {
                program.load().unwrap();
            }
        }
        let id = program.info().unwrap().id();
        let cgroup = fs::File::open(cgroup).unwrap();
        let program = program.fd().unwrap().as_fd().as_raw_fd();
        attach(cgroup.as_raw_fd(), program, hook.attach_type, flags);
        id
    }
}

fn attach(target_fd: i32, attach_bpf_fd: i32, attach_type: u32, attach_flags: u32) {
    /// `BPF_PROG_ATTACH` of `enum bpf_cmd`.
    const BPF_PROG_ATTACH: libc::c_int = 8;
    #[repr(C)]
    struct ProgAttach {
        target_fd: i32,
        attach_bpf_fd: i32,
        attach_type: u32,
        attach_flags: u32,
        replace_bpf_fd: u32,
    }
    let attr = ProgAttach { target_fd, attach_bpf_fd, attach_type, attach_flags, replace_bpf_fd: 0 };
    // SAFETY: the kernel reads `size_of` bytes of integers at the pointer, which outlives the call.
    #[expect(unsafe_code, reason = "the older attach command, without links")]
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<ProgAttach>()) };
    Errno::result(result).unwrap();
}

fn open(options: &Options) -> Result<(), KernelError> {
    Kernel::open(options, || {}).map(drop)
}

/// The programs attached to this agent's hooks of a cgroup.
fn attached(cgroup: &Path) -> Vec<u32> {
    let cgroup = fs::File::open(cgroup).unwrap();
    let of = |hook: &HookSpec| syscall::attached_to(cgroup.as_fd(), hook.attach_type).unwrap().programs;
    pins::hooks(Features::probe(), true).flat_map(of).collect()
}

/// At the cgroup itself and above it, at the first hook and at the last: the error names the program, its
/// cgroup and the remedy, and nothing has changed.
#[test]
fn a_program_that_refuses_others_is_named_and_nothing_is_left() {
    Sandbox::test(|sandbox| {
        let mut stranger = Stranger(load_object());
        for (is_above, name, flags, says) in [
            (false, "connect4", NONE, Some("none")),
            (false, "getpeername6", OVERRIDE, Some("override")),
            (false, "connect4", MULTI, None),
            (true, "getpeername6", NONE, Some("none")),
            (true, "connect4", OVERRIDE, None),
            (true, "connect4", MULTI, None),
        ] {
            let what = format!("{name} with {flags}, above: {is_above}");
            let above = Below::make(sandbox.cgroup().path(), &what);
            let below = Below::make(&above.0, "below");
            let options = Options { cgroup: below.0.clone(), ..agent::options(sandbox) };
            let holder = if is_above { &above.0 } else { &below.0 };
            let id = stranger.attach(holder, hook(name), flags);
            let before = attached(&below.0);
            let exclusives = host::probe(Some(below.0.clone()), &options.pin_path).exclusives.unwrap();
            let result = open(&options);
            let Some(says) = says else {
                result.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(exclusives.is_empty(), "{what}: {exclusives:?}");
                pins::remove(&options.pin_path).unwrap();
                continue;
            };
            let error = result.unwrap_err();
            assert!(matches!(error, KernelError::Exclusive { .. }), "{what}: {error:?}");
            let error = error.to_string();
            let (id, says_so, place) = (format!("id {id}"), format!("{says:?}"), holder.to_string_lossy());
            for part in [name, &id, &says_so, "BPF_F_ALLOW_MULTI", &place] {
                assert!(error.contains(part), "{what}: no {part} in {error}");
            }
            assert_eq!(error.lines().count(), 1, "{error}");
            let [(hook, exclusive)] = &exclusives[..] else { panic!("{what}: {exclusives:?}") };
            assert_eq!((*hook, &exclusive.cgroup, exclusive.flags), (name, holder, says), "{what}");
            assert_eq!(attached(&below.0), before, "{what}: a refused start detaches what it attached");
            assert_eq!(fs::read_dir(&options.pin_path).unwrap().count(), 0, "{what}: no pins");
        }
    });
}

/// If a later start is refused a hook, the earlier maps, links and programs continue to serve.
#[test]
fn a_start_that_is_refused_a_hook_changes_nothing() {
    with_web(2, |sandbox, web| {
        drop(web.serve(sandbox));
        // A hook without its link, as one that a new version adds, and a map that has to be recreated.
        let lost = sandbox.pin_path().join("getpeername6");
        syscall::detach(syscall::open_pin(&lost).unwrap().as_fd()).unwrap();
        fs::remove_file(&lost).unwrap();
        let mut stranger = Stranger(load_object());
        let _id = stranger.attach(sandbox.cgroup().path(), hook("getpeername6"), NONE);
        fs::remove_file(sandbox.pin_path().join("affinity")).unwrap();
        let pinned = || {
            let mut ids: Vec<(String, Option<u32>)> = fs::read_dir(sandbox.pin_path())
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .map(|path| (path.display().to_string(), MapInfo::from_pin(&path).ok().map(|info| info.id())))
                .collect();
            ids.sort();
            ids
        };
        let before = (pinned(), attached(sandbox.cgroup().path()));
        let error = open(&agent::options(sandbox)).unwrap_err();
        assert!(matches!(error, KernelError::Exclusive { hook: "getpeername6", .. }), "{error}");
        assert_eq!((pinned(), attached(sandbox.cgroup().path())), before);
        assert!(sandbox.pin_path().join(LAYOUTS).exists());
        assert!(web.answers());
    });
}
