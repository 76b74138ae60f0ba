//! Writes an initramfs: a cpio archive in the kernel's newc format.
//!
//! Own code: the format is a header of hexadecimal numbers, and the `cpio` program needs root for device
//! nodes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const REGULAR: u32 = 0o100_000;

/// An archive that is built entry by entry.
#[derive(Debug, Clone, Default)]
pub(super) struct Initramfs {
    bytes: Vec<u8>,
    n_entries: u32,
    directories: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// Adds a file at an absolute path, and its parent folders.
    pub(super) fn file(&mut self, path: &Path, permissions: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, REGULAR | permissions, (0, 0), content);
    }

    /// Adds a folder at an absolute path, and its parent folders.
    pub(super) fn directory(&mut self, path: &Path) {
        self.parents(path);
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
        }
    }

    /// Adds `/dev/console`, which the kernel opens as the standard streams of init.
    pub(super) fn console(&mut self) {
        let path = Path::new("/dev/console");
        self.parents(path);
        self.entry(path, CHARACTER_DEVICE | 0o600, (5, 1), &[]);
    }

    /// Finishes the archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry(Path::new("TRAILER!!!"), 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &Path) {
        if let Some(parent) = path.parent()
            && parent.parent().is_some()
        {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &Path, mode: u32, device: (u32, u32), content: &[u8]) {
        self.n_entries += 1;
        let name = path.as_os_str().as_encoded_bytes();
        let name = name.strip_prefix(b"/").unwrap_or(name);
        let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let n_links = if mode & DIRECTORY == 0 { 1 } else { 2 };
        let fields = [
            self.n_entries, // inode
            mode,
            0, // user
            0, // group
            n_links,
            0, // time
            size(content.len()),
            0, // device of the file system, major
            0, // minor
            device.0,
            device.1,
            size(name.len() + 1),
            0, // checksum, not used by newc
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Names and contents are padded to a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Entry {
        name: String,
        mode: u32,
        device: (u32, u32),
        content: Vec<u8>,
    }

    fn read(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let total = bytes.len();
        while !bytes.is_empty() {
            assert_eq!(&bytes[..6], b"070701");
            let field = |at: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * at..14 + 8 * at]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, n_name) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            let name = String::from_utf8(bytes[110..110 + n_name - 1].to_vec()).unwrap();
            let start = (110 + n_name).next_multiple_of(4);
            let content = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            assert_eq!((total - bytes.len()) % 4, 0);
            entries.push(Entry { name, mode, device, content });
        }
        entries
    }

    #[test]
    fn files_come_after_the_folders_above_them() {
        let mut initramfs = Initramfs::default();
        initramfs.file(Path::new("/a/b/one"), 0o755, b"12345");
        initramfs.file(Path::new("/a/two"), 0o644, b"");
        initramfs.console();
        let entries = read(&initramfs.finish());
        let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["a", "a/b", "a/b/one", "a/two", "dev", "dev/console", "TRAILER!!!"]);
        assert_eq!(entries[0].mode, 0o040_755);
        assert_eq!((entries[2].mode, entries[2].content.as_slice()), (0o100_755, b"12345".as_slice()));
        assert_eq!((entries[5].mode, entries[5].device), (0o020_600, (5, 1)));
    }

    #[test]
    fn a_header_is_byte_for_byte_as_the_kernel_documents_it() {
        let mut initramfs = Initramfs::default();
        initramfs.file(Path::new("/init"), 0o755, b"x");
        let bytes = initramfs.finish();
        let header = b"07070100000001000081ed0000000000000000000000010000000000000001\
                       0000000000000000000000000000000000000005\
                       00000000init\0\0";
        assert_eq!(&bytes[..header.len()], header.as_slice());
        assert_eq!(&bytes[header.len()..header.len() + 4], b"x\0\0\0");
    }
}
