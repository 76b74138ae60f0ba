//! Where the records of sockets are kept, and that they are freed.

use std::{
    env, fs,
    io::{IoSlice, IoSliceMut},
    net::SocketAddr,
    os::{
        fd::{AsFd as _, AsRawFd, BorrowedFd, RawFd},
        unix::net::UnixDatagram,
    },
    panic::{self, AssertUnwindSafe},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData};
use lb_agent::controller::sweep::Reclaim;
use lb_common::{
    layout::{SLOT_WAYS, SocketSlots},
    limits::SOCKET_SETS,
};
use lb_core::model::Protocol::{self, Tcp, Udp};
use lb_kernel::{
    Features, Options,
    sockets::{self, SocketTable},
    syscall,
};
use lb_tests::{
    Sandbox,
    agent::{self, Agent},
    client::{Domain, Socket},
    number,
    server::Servers,
};
use nix::{
    errno::Errno,
    libc,
    sys::{
        signal::{Signal, kill},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, close, fork},
};

use crate::{
    fixture::{connected, in_each_mode, servers_of, service_port, services, start},
    records::{Scene, scenes},
};

/// A pinned array, with values as words.
fn array<const WORDS: usize>(sandbox: &Sandbox, name: &str) -> Array<MapData, [u64; WORDS]> {
    let data = MapData::from_pin(sandbox.pin_path().join(name)).unwrap();
    Map::from_map_data(data).unwrap().try_into().unwrap()
}

/// The number of slots owned by a socket.
pub(crate) fn n_taken(sandbox: &Sandbox) -> usize {
    const { assert!(size_of::<SocketSlots>() == 8 * SLOT_WAYS) }
    let slots = array::<SLOT_WAYS>(sandbox, "socket_slots");
    let owners = (0..slots.len()).flat_map(|set| slots.get(&set, 0).unwrap());
    owners.filter(|owner| *owner != 0).count()
}

/// Gives all slots to sockets that do not exist.
pub(crate) fn fill(options: &Options) {
    let data = MapData::from_pin(options.pin_path.join("socket_slots")).unwrap();
    let mut slots: Array<MapData, [u64; SLOT_WAYS]> = Map::from_map_data(data).unwrap().try_into().unwrap();
    for set in 0..slots.len() {
        slots.set(set, [u64::MAX; SLOT_WAYS], 0).unwrap();
    }
}

/// Runs a test if this kernel's programs keep records in slots.
fn with_slots(test: impl FnOnce(&Sandbox) + Send) {
    Sandbox::test(|sandbox| {
        if Features::probe().has_slots() {
            test(sandbox);
        }
    });
}

/// A socket that is connected to the service of a scene.
fn caller(domain: Domain, protocol: Protocol) -> Socket {
    connected(domain, protocol, Scene::new(domain).service)
}

#[test]
fn a_closed_socket_gives_its_slot_up() {
    with_slots(|sandbox| {
        let mut agent = Agent::start(sandbox);
        for protocol in [Tcp, Udp] {
            let cluster = scenes(protocol);
            let _servers = servers_of(&cluster);
            agent.follow(&cluster);
            let sockets = Domain::ALL.map(|domain| [(); 20].map(|()| caller(domain, protocol)));
            assert_eq!(n_taken(sandbox), 60);
            drop(sockets);
            assert_eq!(n_taken(sandbox), 0);
        }
    });
}

/// A socket that calls no service uses no slot.
#[test]
fn a_socket_without_a_service_takes_no_slot() {
    with_slots(|sandbox| {
        let cluster = scenes(Udp);
        let _servers = servers_of(&cluster);
        Agent::start(sandbox).follow(&cluster);
        for domain in Domain::ALL {
            let Scene { service, plain, .. } = Scene::new(domain);
            let (connected, unconnected) = (connected(domain, Udp, plain), Socket::new(domain, Udp));
            assert_eq!(connected.peer_name(), Ok(plain));
            assert_eq!(unconnected.ask_at(plain).unwrap().seen, Some(plain));
            assert_eq!(n_taken(sandbox), 0, "{domain:?}");
            connected.connect(service).unwrap();
            assert_eq!(n_taken(sandbox), 1, "{domain:?}");
        }
    });
}

/// A call that fails later, or is repeated, uses no second slot.
#[test]
fn a_socket_has_one_slot() {
    with_slots(|sandbox| {
        let mut agent = Agent::start(sandbox);
        agent.follow(&scenes(Udp));
        let socket = Socket::new(Domain::V4, Udp);
        for _ in 0..10 {
            socket.connect(Scene::new(Domain::V4).service).unwrap();
        }
        assert_eq!(n_taken(sandbox), 1);

        agent.follow(&scenes(Tcp));
        let nobody_listens = Socket::new(Domain::V4, Tcp);
        for _ in 0..10 {
            assert_eq!(nobody_listens.connect(Scene::new(Domain::V4).service), Err(Errno::ECONNREFUSED));
        }
        assert_eq!(n_taken(sandbox), 2);
        drop((socket, nobody_listens));
        assert_eq!(n_taken(sandbox), 0);
    });
}

/// More live sockets than slots: none loses its record, and none takes another's.
#[test]
fn more_sockets_than_slots_keep_their_records() {
    Sandbox::test(|sandbox| {
        let n_sockets = SOCKET_SETS as usize * SLOT_WAYS + 2000;
        let scene = Scene::new(Domain::V4);
        let _servers = Servers::udp([scene.endpoint]);
        let mut agent = Agent::start(sandbox);
        agent.follow(&scenes(Udp));
        let sockets: Vec<Socket> = (0..n_sockets).map(|_| caller(Domain::V4, Udp)).collect();
        if Features::probe().has_slots() {
            assert!(n_taken(sandbox) <= SOCKET_SETS as usize * SLOT_WAYS);
        }
        for socket in &sockets {
            assert_eq!(socket.peer_name(), Ok(scene.service));
        }
        for socket in sockets.iter().rev().step_by(100) {
            assert_eq!(socket.ask().unwrap().seen, Some(scene.service));
        }
        drop(sockets);
        if Features::probe().has_slots() {
            assert_eq!(n_taken(sandbox), 0);
        }
    });
}

/// The hook that frees slots is missing while sockets are closed.
#[test]
fn slots_of_sockets_that_are_gone_are_taken_back() {
    with_slots(|sandbox| {
        let cluster = scenes(Udp);
        let _servers = servers_of(&cluster);
        let start = || {
            let mut agent = Agent::start(sandbox);
            agent.follow(&cluster);
            agent
        };
        let scene = Scene::new(Domain::V4);
        let (agent, unconnected) = (start(), Socket::new(Domain::V6, Udp));
        let held = caller(Domain::V4, Udp);
        let _answer = unconnected.ask_at(Scene::new(Domain::V6).service).unwrap();
        let release = sandbox.pin_path().join("sock_release");
        syscall::detach(syscall::open_pin(&release).unwrap().as_fd()).unwrap();
        fs::remove_file(&release).unwrap();
        drop(agent);
        let n_slots = SOCKET_SETS as usize * SLOT_WAYS;
        while n_taken(sandbox) <= n_slots / 2 {
            for _ in 0..1000 {
                drop(caller(Domain::V4, Udp));
            }
        }
        let _agent = start();
        let n_before = n_taken(sandbox);
        drop(caller(Domain::V4, Udp));
        assert_eq!(n_taken(sandbox), n_before, "slots are freed again");

        let mut table = SocketTable::open(&sandbox.pin_path()).unwrap();
        let (mut reclaim, start) = (Reclaim::default(), Instant::now());
        for (second, is_due, expected) in [(0, true, n_before), (10, false, n_before), (20, true, 2)] {
            let now = start + Duration::from_secs(second);
            assert_eq!(reclaim.wants_listing(table.n_owned(), now), is_due, "{second}");
            if is_due {
                let owners = sockets::owners(&sandbox.pin_path()).unwrap();
                let owners = owners.expect("all namespaces of this machine can be entered");
                assert_eq!(owners.listed.len(), 2);
                let _n_freed = table.free(&reclaim.looked(owners, now));
            }
            assert_eq!(n_taken(sandbox), expected, "{second}");
        }
        assert!(!reclaim.wants_listing(table.n_owned(), start + Duration::from_secs(60)));
        assert_eq!(held.ask().unwrap().seen, Some(scene.service));
        let scene = Scene::new(Domain::V6);
        assert_eq!(unconnected.ask_at(scene.service).unwrap().server, scene.endpoint);
    });
}

/// A restart may load other programs, as after an update. Records keep their meaning.
#[test]
fn records_survive_restarts() {
    Sandbox::test(|sandbox| {
        let cluster = scenes(Udp);
        let _servers = servers_of(&cluster);
        let options = agent::options(sandbox);
        start(&options).follow(&cluster);
        let sockets = Domain::ALL.map(|domain| {
            let connected = caller(domain, Udp);
            let unconnected = Socket::new(domain, Udp);
            unconnected.send_to(b"?", Scene::new(domain).service).unwrap();
            (domain, connected, unconnected)
        });
        // Diagnostics are a separate program.
        for log in [options.features.has_slots(), false] {
            start(&Options { log, ..options.clone() }).follow(&cluster);
            for (domain, connected, _) in &sockets {
                assert_eq!(connected.peer_name(), Ok(Scene::new(*domain).service));
                assert_eq!(connected.ask().unwrap().seen, Some(Scene::new(*domain).service));
            }
        }
        for (domain, _, unconnected) in &sockets {
            assert_eq!(unconnected.receive().unwrap().1, Some(Scene::new(*domain).service));
        }
    });
}

/// The total number of cycles of connect and close; fewer on an emulated CPU.
fn n_cycles() -> usize {
    number("LB_TEST_CYCLES", 1_000_000)
}

/// Unreclaimable memory that the kernel charges for the records of sockets, in KiB.
fn unreclaimable_kib() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("SUnreclaim:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The variable that makes a process run this number of cycles.
const CYCLES_OF_THIS_PROCESS: &str = "LB_TEST_SOCKET_CYCLES";

/// Opens and closes sockets in another process: forks of this one would hold sockets of other tests.
fn open_and_close_elsewhere(n_cycles: usize) {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "slots::a_million_sockets_leave_nothing_behind", "--nocapture"])
        .env(CYCLES_OF_THIS_PROCESS, n_cycles.to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
}

/// Calls from eight threads, each socket used once and closed: TCP, multipath TCP and UDP, connected,
/// unconnected, and reconnected, in all families. Sockets are closed in all ways that the kernel has.
fn open_and_close(n_cycles: usize) {
    const N_THREADS: usize = 8;
    // Forked before the threads start: the children would hold their sockets.
    let heirs: Vec<Heir> = (0..N_THREADS).map(|_| Heir::start()).collect();
    thread::scope(|scope| {
        for (number, heir) in heirs.into_iter().enumerate() {
            let _joined_by_the_scope = scope.spawn(move || {
                for cycle in 0..n_cycles / N_THREADS {
                    let domain = Domain::ALL[(number + cycle) % 3];
                    end(called(domain, cycle), cycle, &heir);
                    if cycle % 2000 == 1000 {
                        kill_an_owner(domain);
                    }
                }
            });
        }
    });
    // The kernel's garbage collector finds sockets in an unreachable cycle when another UNIX socket is
    // closed.
    drop(UnixDatagram::pair().unwrap());
}

fn called(domain: Domain, cycle: usize) -> Socket {
    let Scene { service, plain, .. } = Scene::new(domain);
    // A TCP connection costs ten times as much as everything else.
    let (protocol, number) = match cycle % 64 {
        0 => (Tcp, libc::IPPROTO_MPTCP),
        16 | 32 | 48 => (Tcp, 0),
        _ => (Udp, 0),
    };
    // Not every kernel has multipath TCP.
    let socket = Socket::with_protocol_number(domain, protocol, number);
    let socket = socket.unwrap_or_else(|_| Socket::new(domain, protocol));
    match cycle % 16 {
        1..4 => socket.send_to(b"?", service).unwrap(),
        4 => {
            socket.connect(plain).unwrap();
            socket.connect(service).unwrap();
        }
        5 => {
            socket.connect(service).unwrap();
            socket.connect(plain).unwrap();
        }
        6 => {
            socket.connect(service).unwrap();
            socket.disconnect().unwrap();
            socket.send_to(b"?", service).unwrap();
        }
        7 => {
            // More services than a socket has records.
            for port in [SocketAddr::new(service.ip(), 53), SocketAddr::new(service.ip(), 54), service] {
                socket.send_to(b"?", port).unwrap();
            }
        }
        _ => socket.connect(service).unwrap(),
    }
    socket
}

/// Closes a socket, in one of several ways.
fn end(socket: Socket, cycle: usize, heir: &Heir) {
    match cycle % 1000 {
        rest if rest % 20 == 1 => {
            let copy = socket.duplicate();
            drop(socket);
            drop(copy);
        }
        rest if rest % 50 == 2 => heir.give(&socket),
        // In flight to a socket that is closed before it receives it.
        rest if rest % 100 == 3 => {
            let (from, _to) = UnixDatagram::pair().unwrap();
            pass(&from, &[socket.as_fd()]);
        }
        // In the queue of a socket that is in its own queue: only the kernel's garbage collector finds it.
        rest if rest % 250 == 4 => {
            let (from, to) = UnixDatagram::pair().unwrap();
            pass(&from, &[socket.as_fd(), to.as_fd()]);
        }
        // A child keeps it open for longer.
        500 | 501 => {
            let (mine, its) = UnixDatagram::pair().unwrap();
            let child = in_a_child(|| {
                let _n = its.recv(&mut [0]);
            });
            drop(socket);
            assert_eq!(mine.send(b"!").unwrap(), 1);
            assert!(matches!(waitpid(child, None), Ok(WaitStatus::Exited(_, 0))));
        }
        _ => drop(socket),
    }
}

fn pass(from: &UnixDatagram, descriptors: &[BorrowedFd<'_>]) {
    let descriptors: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let sent = sendmsg::<()>(from.as_raw_fd(), &[IoSlice::new(b"!")], &rights, MsgFlags::empty(), None);
    assert_eq!(sent, Ok(1));
}

/// Runs a closure in a child process, which exits after it.
fn in_a_child(body: impl FnOnce()) -> Pid {
    // SAFETY: the C library makes allocation possible in the child, which takes no other lock.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let ended = panic::catch_unwind(AssertUnwindSafe(body));
            // SAFETY: exits the process; the parent drops what this thread borrows.
            unsafe { libc::_exit(i32::from(ended.is_err())) }
        }
    }
}

fn kill_an_owner(domain: Domain) {
    let (mine, its) = UnixDatagram::pair().unwrap();
    let child = in_a_child(|| {
        let sockets: Vec<Socket> = (0..64).map(|cycle| called(domain, cycle)).collect();
        let _n = its.send(b"!");
        // Blocks until it is killed.
        let _n = its.recv(&mut [0]);
        drop(sockets);
    });
    assert_eq!(mine.recv(&mut [0]).unwrap(), 1);
    kill(child, Signal::SIGKILL).unwrap();
    assert!(matches!(waitpid(child, None), Ok(WaitStatus::Signaled(_, Signal::SIGKILL, _))));
}

/// A process that receives sockets and closes them.
struct Heir {
    to: UnixDatagram,
    process: Pid,
}

impl Heir {
    fn start() -> Self {
        let (to, from) = UnixDatagram::pair().unwrap();
        let process = in_a_child(|| {
            let mut space = nix::cmsg_space!(RawFd);
            loop {
                let mut octet = [0];
                let mut octets = [IoSliceMut::new(&mut octet)];
                let received =
                    recvmsg::<()>(from.as_raw_fd(), &mut octets, Some(&mut space), MsgFlags::empty())
                        .unwrap();
                for message in received.cmsgs().unwrap() {
                    if let ControlMessageOwned::ScmRights(descriptors) = message {
                        for descriptor in descriptors {
                            close(descriptor).unwrap();
                        }
                    }
                }
            }
        });
        Self { to, process }
    }

    /// Sends it a socket, which this process or the child closes first.
    fn give(&self, socket: &Socket) {
        pass(&self.to, &[socket.as_fd()]);
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        // Sockets that it has not received yet are closed with it.
        kill(self.process, Signal::SIGKILL).unwrap();
        let _status = waitpid(self.process, None).unwrap();
    }
}

#[test]
fn a_million_sockets_leave_nothing_behind() {
    if let Some(n_cycles) = env::var_os(CYCLES_OF_THIS_PROCESS) {
        open_and_close(n_cycles.to_str().unwrap().parse().unwrap());
        return;
    }
    Sandbox::test(|sandbox| {
        let cluster = services(&[Tcp, Udp], |domain| {
            let Scene { service, endpoint, .. } = Scene::new(domain);
            [service, service_port(domain, 53), service_port(domain, 54)]
                .map(|to| (to, vec![endpoint]))
                .into()
        });
        let _servers = servers_of(&cluster);
        in_each_mode(sandbox, |options| {
            let mut agent = start(options);
            agent.follow(&cluster);
            let has_slots = options.features.has_slots();
            let before = unreclaimable_kib();
            // The kernel frees socket storage by itself: a tenth of the sockets is enough to check it.
            open_and_close_elsewhere(if has_slots { n_cycles() } else { n_cycles() / 10 });
            // A program that reads /proc, as monitoring does, keeps a socket open for a moment.
            for _ in 0..300 {
                if n_taken(sandbox) == 0 {
                    break;
                }
                thread::sleep(Duration::from_millis(100));
            }
            if n_taken(sandbox) > 0 {
                let table = SocketTable::open(&options.pin_path).unwrap();
                panic!("{} slots are still taken: {:?}", n_taken(sandbox), table.records());
            }
            if !has_slots {
                // A record in socket storage takes more than a KiB: those of all sockets would be 100 MiB.
                // The rest of the machine changes by less.
                let grown = unreclaimable_kib().saturating_sub(before);
                assert!(grown < 64 * 1024, "{grown} KiB are still in use");
            }
        });
    });
}
