//! Lists socket storage with a BPF iterator, since no system call does: the kernel runs a program for each
//! element of the map.
//!
//! The program writes only the used records: a listing is read in pieces of 32 KiB, and for each the kernel
//! walks the earlier elements again (`bpf_sk_storage_map_seq_find_next`). Its few instructions are assembled
//! here: aya loads a program only with all maps of its object, and `socklb top` needs none of them.

use std::{
    fs::File,
    io::{self, Read as _},
    mem::offset_of,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::LazyLock,
};

use lb_common::layout::{SOCKET_RECORDS, SocketRecord, SocketRecords};

use super::{btf::Btf, syscall};

/// The program's output for one record: the cookie of the socket, and the record.
const ENTRY: usize = size_of::<u64>() + size_of::<SocketRecord>();

/// Largest number of reads without output: each runs the program for a million elements.
const MOST_EMPTY_READS: usize = 100;

/// The listing of a map of type `BPF_MAP_TYPE_SK_STORAGE` whose values are [`SocketRecords`].
#[derive(Debug)]
pub(super) struct StorageList {
    link: OwnedFd,
}

impl StorageList {
    /// Prepares to list a map.
    ///
    /// # Errors
    ///
    /// As [`load`].
    pub(super) fn open(map: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self { link: syscall::link_iterator(load()?.as_fd(), map)? })
    }

    /// The used records of all sockets on the host, each with its socket's cookie. Multipath TCP sockets have
    /// no cookie here and are left out: their subflows have the same records.
    ///
    /// Not a snapshot: a record that is being written may be torn, and one may be missing or repeated if
    /// sockets open or close meanwhile.
    ///
    /// # Errors
    ///
    /// A failing system call.
    pub(super) fn read(&self) -> io::Result<Vec<(u64, SocketRecord)>> {
        let mut file = File::from(syscall::iterate(self.link.as_fd())?);
        let (mut bytes, mut piece, mut n_empty) = (Vec::new(), vec![0; 32 << 10], 0);
        loop {
            match file.read(&mut piece) {
                Ok(0) => break,
                Ok(n) => bytes.extend_from_slice(piece.get(..n).unwrap_or_default()),
                // The program wrote nothing for a million elements.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && n_empty < MOST_EMPTY_READS => {
                    n_empty += 1;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(entries(&bytes).collect())
    }
}

/// Loads the program.
///
/// # Errors
///
/// `EPERM` without `CAP_BPF` and `CAP_PERFMON`; `NotFound` and `Unsupported` on a kernel without BTF or
/// without the iterator.
///
/// # Kernel
///
/// 5.9, with `CONFIG_DEBUG_INFO_BTF`
pub(super) fn load() -> io::Result<OwnedFd> {
    /// BTF id of the iterator's function. The kernel's BTF has megabytes and is read once.
    static TARGET: LazyLock<Result<u32, io::ErrorKind>> = LazyLock::new(|| {
        let btf = Btf::of_kernel().map_err(|error| error.kind())?;
        btf.function("bpf_iter_bpf_sk_storage_map").ok_or(io::ErrorKind::Unsupported)
    });
    syscall::load_iterator((*TARGET)?, &program())
}

/// The program: writes the cookie and the record for each used record of an element.
fn program() -> Vec<u64> {
    /// Offsets in `struct bpf_iter__bpf_sk_storage_map`, the context. `meta` begins with `seq`.
    const META: usize = 0;
    const VALUE: usize = 24;
    /// `BPF_FUNC_seq_write`
    const SEQ_WRITE: usize = 127;
    const MOVE: u8 = 0xbf;
    const MOVE_CONSTANT: u8 = 0xb7;
    const ADD_CONSTANT: u8 = 0x07;
    const LOAD_WORD: u8 = 0x79;
    const LOAD_OCTET: u8 = 0x71;
    const JUMP_IF_ZERO: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    let write = |offset: usize, len: usize| {
        [
            instruction(MOVE, 1, 9, 0, 0),
            instruction(MOVE, 2, 7, 0, 0),
            instruction(ADD_CONSTANT, 2, 0, 0, offset),
            instruction(MOVE_CONSTANT, 3, 0, 0, len),
            instruction(CALL, 0, 0, 0, SEQ_WRITE),
        ]
    };
    let records = (0..SOCKET_RECORDS).flat_map(|n| {
        let at = offset_of!(SocketRecords, records) + n * size_of::<SocketRecord>();
        let writes = [
            write(offset_of!(SocketRecords, cookie), size_of::<u64>()),
            write(at, size_of::<SocketRecord>()),
        ];
        let used = [
            instruction(LOAD_OCTET, 1, 7, at + offset_of!(SocketRecord, protocol), 0),
            instruction(JUMP_IF_ZERO, 1, 0, writes.as_flattened().len(), 0),
        ];
        used.into_iter().chain(writes.into_iter().flatten())
    });
    let records: Vec<u64> = records.collect();
    let with_cookie = [
        instruction(LOAD_WORD, 1, 7, offset_of!(SocketRecords, cookie), 0),
        instruction(JUMP_IF_ZERO, 1, 0, 2 + records.len(), 0),
        instruction(LOAD_WORD, 1, 6, META, 0),
        instruction(LOAD_WORD, 9, 1, 0, 0),
    ];
    // At the end of a listing the kernel runs it once more, without an element.
    let with_value = [
        instruction(MOVE, 6, 1, 0, 0),
        instruction(LOAD_WORD, 7, 6, VALUE, 0),
        instruction(JUMP_IF_ZERO, 7, 0, with_cookie.len() + records.len(), 0),
    ];
    let end = [instruction(MOVE_CONSTANT, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)];
    [&with_value[..], &with_cookie, &records, &end].concat()
}

/// `struct bpf_insn`. All offsets and constants are small and positive.
fn instruction(code: u8, target: u8, source: u8, offset: usize, constant: usize) -> u64 {
    let registers = if cfg!(target_endian = "little") { source << 4 | target } else { target << 4 | source };
    let offset = i16::try_from(offset).unwrap_or_default().to_ne_bytes();
    let [a, b, c, d] = i32::try_from(constant).unwrap_or_default().to_ne_bytes();
    u64::from_ne_bytes([code, registers, offset[0], offset[1], a, b, c, d])
}

/// Parses the program's output.
fn entries(bytes: &[u8]) -> impl Iterator<Item = (u64, SocketRecord)> {
    bytes.chunks_exact(ENTRY).filter_map(|entry| {
        let (cookie, bytes) = entry.split_first_chunk()?;
        let record = SocketRecord {
            service_address: field(bytes, offset_of!(SocketRecord, service_address))?,
            endpoint_address: field(bytes, offset_of!(SocketRecord, endpoint_address))?,
            service_port: u16::from_ne_bytes(field(bytes, offset_of!(SocketRecord, service_port))?),
            endpoint_port: u16::from_ne_bytes(field(bytes, offset_of!(SocketRecord, endpoint_port))?),
            endpoint_id: u32::from_ne_bytes(field(bytes, offset_of!(SocketRecord, endpoint_id))?),
            service_id: u32::from_ne_bytes(field(bytes, offset_of!(SocketRecord, service_id))?),
            index: u16::from_ne_bytes(field(bytes, offset_of!(SocketRecord, index))?),
            protocol: field::<1>(bytes, offset_of!(SocketRecord, protocol))?[0],
            flags: field::<1>(bytes, offset_of!(SocketRecord, flags))?[0],
        };
        Some((u64::from_ne_bytes(*cookie), record))
    })
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_from_what_the_program_writes() {
        let record = SocketRecord {
            service_address: [1; 16],
            endpoint_address: [2; 16],
            service_port: 53,
            endpoint_port: 1053,
            endpoint_id: 3,
            service_id: 4,
            index: 5,
            protocol: 17,
            flags: 1,
        };
        let mut bytes = 4711u64.to_ne_bytes().to_vec();
        bytes.extend([1; 16]);
        bytes.extend([2; 16]);
        bytes.extend([53u16, 1053].map(u16::to_ne_bytes).as_flattened());
        bytes.extend([3u32, 4].map(u32::to_ne_bytes).as_flattened());
        bytes.extend(5u16.to_ne_bytes());
        bytes.extend([17, 1]);
        assert_eq!(entries(&bytes.repeat(2)).collect::<Vec<_>>(), [(4711, record), (4711, record)]);
        assert_eq!(entries(&bytes[1..]).count(), 0);
    }

    /// Each jump leads to the next record or to the end, for any sizes of the layout.
    #[test]
    fn jumps_stay_inside_of_the_program() {
        let program = program();
        for (at, word) in program.iter().enumerate() {
            let bytes = word.to_ne_bytes();
            if bytes[0] == 0x15 {
                let target = at + 1 + usize::try_from(i16::from_ne_bytes([bytes[2], bytes[3]])).unwrap();
                assert!(target + 2 <= program.len(), "{at} -> {target} of {}", program.len());
            }
        }
    }
}
