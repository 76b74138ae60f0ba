//! Files and folders of a container image or an initramfs, and the archives of them.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use anyhow::Result;
use cpio::newc::{Builder, ModeFileType};
use fs_err as fs;

/// Contents of a file, `None` for a folder.
type Contents = Option<Vec<u8>>;

/// Contents and permissions by path, without a leading slash. Parents come before what they hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tree(BTreeMap<String, (Contents, u32)>);

impl Tree {
    /// Adds a file, or a folder if there are no contents. Parents that are not added before get the mode 755,
    /// so that it does not depend on the unpacker.
    pub(crate) fn add(&mut self, path: impl AsRef<Path>, mode: u32, contents: Option<&[u8]>) {
        let path = path.as_ref();
        for above in path.ancestors().skip(1) {
            self.0.entry(name(above)).or_insert((None, 0o755));
        }
        self.0.insert(name(path), (contents.map(<[u8]>::to_vec), mode));
        // The root.
        self.0.remove("");
    }

    /// Adds a copy of a file.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn copy(&mut self, from: &Path, to: impl AsRef<Path>, mode: u32) -> Result<()> {
        self.add(to, mode, Some(&fs::read(from)?));
        Ok(())
    }

    /// A tar archive. Equal trees give equal bytes.
    ///
    /// # Errors
    /// If a path is too long for the format.
    pub(crate) fn tar(&self) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, (contents, mode)) in &self.0 {
            let data = contents.as_deref().unwrap_or_default();
            let mut header = tar::Header::new_ustar();
            header.set_size(data.len() as u64);
            header.set_mode(*mode);
            header.set_mtime(0);
            header.set_uid(0);
            header.set_gid(0);
            if contents.is_some() {
                tar.append_data(&mut header, path, data)?;
            } else {
                header.set_entry_type(tar::EntryType::Directory);
                tar.append_data(&mut header, format!("{path}/"), data)?;
            }
        }
        Ok(tar.into_inner()?)
    }

    /// A cpio archive in the kernel's newc format. Several make one initramfs, one after the other.
    ///
    /// # Errors
    /// If a file is longer than the format allows.
    pub(crate) fn cpio(&self) -> Result<Vec<u8>> {
        let files = self.0.iter().zip(1..).map(|((path, (contents, mode)), inode)| {
            let kind = if contents.is_some() { ModeFileType::Regular } else { ModeFileType::Directory };
            let header = Builder::new(path).ino(inode).mode(*mode).set_mode_file_type(kind);
            (header, io::Cursor::new(contents.as_deref().unwrap_or_default()))
        });
        Ok(cpio::write_cpio(files, Vec::new())?)
    }
}

fn name(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::default();
        tree.add("/a/b/one", 0o755, Some(b"12345"));
        tree.add("/a/two", 0o644, Some(b""));
        tree.add("tmp", 0o1777, None);
        tree.add("tmp/a", 0o755, None);
        tree
    }

    const SAMPLE: [(&str, u32); 6] = [
        ("a/", 0o755),
        ("a/b/", 0o755),
        ("a/b/one", 0o755),
        ("a/two", 0o644),
        ("tmp/", 0o1777),
        ("tmp/a/", 0o755),
    ];

    #[test]
    fn folders_come_before_what_they_hold_and_have_their_modes() {
        let tar = sample().tar().unwrap();
        let mut archive = tar::Archive::new(tar.as_slice());
        let entries = archive.entries().unwrap().map(Result::unwrap);
        let listed: Vec<_> = entries
            .map(|entry| (entry.path().unwrap().to_str().unwrap().to_owned(), entry.header().mode().unwrap()))
            .collect();
        assert_eq!(listed, SAMPLE.map(|(path, mode)| (path.to_owned(), mode)));
    }

    #[test]
    fn an_initramfs_has_the_same_entries() {
        let archive = sample().cpio().unwrap();
        // The kernel reads the next archive at a multiple of four.
        assert_eq!(archive.len() % 4, 0);
        let mut input = archive.as_slice();
        for (path, mode) in SAMPLE {
            let mut reader = cpio::NewcReader::new(input).unwrap();
            let kind = if path.ends_with('/') { 0o040_000 } else { 0o100_000 };
            assert_eq!(reader.entry().name(), path.trim_end_matches('/'));
            assert_eq!(reader.entry().mode(), kind | mode, "{path}");
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents).unwrap();
            assert_eq!(contents, if path == "a/b/one" { b"12345".as_slice() } else { b"" });
            input = reader.finish().unwrap();
        }
        assert!(cpio::NewcReader::new(input).unwrap().entry().is_trailer());
    }
}
