//! Whether a program has a file open for writing.
#![expect(unsafe_code, reason = "file leases, which no crate in use offers")]

use std::{fs::File, os::fd::AsRawFd};

use nix::{
    errno::Errno,
    libc,
    sys::statfs::{FsType, fstatfs},
};

/// Network file systems. Their leases depend on what the server has delegated to this client, so a refusal
/// does not show a writer.
const REMOTE: [FsType; 4] = [FsType(0x6969), FsType(0x517b), FsType(0xff53_4d42), FsType(0xfe53_4d42)];

/// `fcntl()`: the signal sent when a program waits for a lease (asm-generic/fcntl.h).
const F_SETSIG: libc::c_int = 10;

/// Whether a program of this host has a file open for writing. `file` must be open for reading only.
///
/// If not, an open for writing blocks until `file` is closed. So read it at once and close it. `false` also
/// if this is unknown: on file systems without leases, on NFS and SMB, and for files of other owners without
/// `CAP_LEASE`.
pub(super) fn is_being_written(file: &File) -> bool {
    if fstatfs(file).is_ok_and(|found| REMOTE.contains(&found.filesystem_type())) {
        return false;
    }
    take(file).is_err_and(|error| error == Errno::EAGAIN)
}

/// Takes a read lease, which closing the file releases.
fn take(file: &File) -> Result<(), Errno> {
    let fd = file.as_raw_fd();
    // When a program waits for the lease, the kernel sends a signal. The default, SIGIO, would terminate this
    // process; SIGURG is ignored by default, and has no handler here.
    //
    // SAFETY: `fd` stays open, since `file` is borrowed. Both commands take an integer and access no memory.
    unsafe {
        Errno::result(libc::fcntl(fd, F_SETSIG, libc::SIGURG))?;
        Errno::result(libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::OpenOptions,
        io::{Read as _, Write as _},
        thread,
        time::Duration,
    };

    use super::*;

    #[test]
    fn a_writer_is_seen_and_waits_for_the_reading() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        let mut writer = File::create(&path).unwrap();
        assert!(is_being_written(&File::open(&path).unwrap()));
        writer.write_all(b"1").unwrap();
        drop(writer);
        let other_reader = File::open(&path).unwrap();
        assert!(!is_being_written(&File::open(&path).unwrap()));
        drop(other_reader);

        // The process survives when another breaks its lease, and reads the old text.
        let mut reading = File::open(&path).unwrap();
        assert!(!is_being_written(&reading));
        let writer = thread::spawn({
            let path = path.clone();
            move || OpenOptions::new().append(true).open(path).unwrap().write_all(b"2").unwrap()
        });
        thread::sleep(Duration::from_millis(50));
        assert!(!writer.is_finished(), "it waits");
        let mut text = String::new();
        reading.read_to_string(&mut text).unwrap();
        assert_eq!(text, "1");
        drop(reading);
        writer.join().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "12");
    }
}
