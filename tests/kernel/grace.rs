//! Waiting until no program reads freed memory.
#![expect(unsafe_code, reason = "bpf(2) for a slow program, and thread scheduling")]

use std::{
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::channel,
    },
    thread,
    time::{Duration, Instant},
};

use lb_kernel::syscall::MapOfMaps;
use lb_tests::{Feature, require};
use nix::{
    libc,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// The length of a run of the program: calls of `bpf_ktime_get_ns()`.
const N_STEPS: i32 = 2000;

/// The timeout until enough waits overlapped a program.
const PATIENCE: Duration = Duration::from_secs(60);

/// Commands of `enum bpf_cmd`.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Command {
    MapCreate = 0,
    MapLookup = 1,
    ProgLoad = 5,
    TestRun = 10,
}

/// bpf(2) with an attribute of 64-bit words, as `union bpf_attr` is on a 64-bit machine.
fn bpf(command: Command, attr: &mut [u64]) -> io::Result<RawFd> {
    // SAFETY: the kernel reads and writes this number of bytes. Pointers among the words are the callers',
    // who keep their targets alive.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_int, attr.as_mut_ptr(), size_of_val(attr)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(RawFd::try_from(result).unwrap()) }
}

/// Two 32-bit fields in one word.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: a new file descriptor without other owners.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// A program that counts its starts and its ends, in an RCU read-side section like those of cgroup hooks.
struct Slow {
    counts: OwnedFd,
    program: OwnedFd,
}

/// Opcode, destination and source registers, offset, immediate: see the kernel's
/// `Documentation/bpf/standardization/instruction-set.rst`.
fn insn(code: u8, dst: u8, src: u8, offset: i16, imm: i32) -> u64 {
    let head = u64::from(code) | u64::from(dst | src << 4) << 8;
    head | u64::from(offset.cast_unsigned()) << 16 | u64::from(imm.cast_unsigned()) << 32
}

fn instructions(counts: &OwnedFd) -> [u64; 12] {
    const LOAD_ADDRESS: u8 = 0x18;
    const MAP_VALUE: u8 = 2;
    const MOVE: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const ATOMIC_ADD: u8 = 0xdb;
    const CALL: u8 = 0x85;
    const JUMP_IF_LESS: u8 = 0xa5;
    const EXIT: u8 = 0x95;
    const KTIME_GET_NS: i32 = 5;
    [
        insn(LOAD_ADDRESS, 6, MAP_VALUE, 0, counts.as_raw_fd()),
        0,
        insn(MOVE, 1, 0, 0, 1),
        insn(ATOMIC_ADD, 6, 1, 0, 0),
        insn(MOVE, 7, 0, 0, 0),
        insn(CALL, 0, 0, 0, KTIME_GET_NS),
        insn(ADD, 7, 0, 0, 1),
        insn(JUMP_IF_LESS, 7, 0, -3, N_STEPS),
        insn(MOVE, 1, 0, 0, 1),
        insn(ATOMIC_ADD, 6, 1, 8, 0),
        insn(MOVE, 0, 0, 0, 0),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

impl Slow {
    fn load() -> Self {
        const SOCKET_FILTER: u32 = 1;
        // An array of one element of 16 bytes: the number of starts, the number of ends.
        let counts = owned(bpf(Command::MapCreate, &mut [pair(2, 4), pair(16, 1), 0, 0, 0]).unwrap());
        let instructions = instructions(&counts);
        let n = u32::try_from(instructions.len()).unwrap();
        let (code, license) = (instructions.as_ptr() as u64, c"Dual MIT/GPL".as_ptr() as u64);
        let program = bpf(Command::ProgLoad, &mut [pair(SOCKET_FILTER, n), code, license, 0, 0, 0, 0, 0, 0]);
        Self { counts, program: owned(program.unwrap()) }
    }

    fn run(&self) {
        let data = [0u8; 64];
        let mut attr = [pair(number(&self.program), 0), pair(64, 0), data.as_ptr() as u64, 0, 0];
        bpf(Command::TestRun, &mut attr).unwrap();
    }

    fn counts(&self) -> [u64; 2] {
        let (key, mut value) = (0u32, [0u64; 2]);
        let (key, place) = ((&raw const key) as u64, value.as_mut_ptr() as u64);
        bpf(Command::MapLookup, &mut [pair(number(&self.counts), 0), key, place, 0]).unwrap();
        value
    }
}

fn stay_on(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// Gives this thread real-time priority, if permitted.
fn go_first() {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads the parameter, which outlives the call.
    let _may_be_forbidden = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameter) };
}

/// Whether the kernel preempts BPF programs.
fn is_preemptible() -> bool {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    read("/proc/version").contains("PREEMPT_DYNAMIC") && read("/proc/cmdline").contains("preempt=full")
}

/// Runs a program repeatedly on one CPU, and waits on the same or another one, until `n_beside` waits began
/// while a program was running. Other tests need the CPUs too.
fn wait_beside_programs(reader: usize, waiter: usize, n_beside: usize) {
    let slow = Slow::load();
    let maps = MapOfMaps::new().unwrap();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (ready, is_ready) = channel();
        let slow = &slow;
        let _running = scope.spawn({
            let is_over = &is_over;
            move || {
                stay_on(reader);
                ready.send(()).unwrap();
                while !is_over.load(Ordering::Relaxed) {
                    slow.run();
                }
            }
        });
        let waiting = scope.spawn(move || {
            is_ready.recv().unwrap();
            stay_on(waiter);
            go_first();
            let began = Instant::now();
            let (mut n_waits, mut n_found) = (0, 0);
            while n_waits < 20 || n_found < n_beside {
                thread::sleep(Duration::from_micros(500 + 70 * (n_waits % 16)));
                let [started, ended] = slow.counts();
                maps.wait_for_grace_period().unwrap();
                assert!(
                    slow.counts()[1] >= started,
                    "wait {n_waits}: one of {started} programs has not ended"
                );
                n_waits += 1;
                n_found += usize::from(started > ended);
                assert!(began.elapsed() < PATIENCE, "{n_found} of {n_waits} waits were beside a program");
            }
            eprintln!("{n_found} of {n_waits} waits were beside a program, {:?}", began.elapsed());
        });
        let end = waiting.join();
        is_over.store(true, Ordering::Relaxed);
        end.unwrap();
    });
}

/// The kernel's shortcut for one CPU is invalid where programs are preempted.
#[test]
fn after_a_grace_period_every_program_has_ended() {
    if !require(Feature::Programs) {
        return;
    }
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap()).collect();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    eprint!("on one CPU: ");
    wait_beside_programs(first, first, if is_preemptible() { 5 } else { 0 });
    if first != last {
        eprint!("on two CPUs: ");
        wait_beside_programs(last, first, 5);
    }
}
