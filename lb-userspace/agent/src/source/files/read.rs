//! Reads a manifest file or folder, and reports what is new.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File, Metadata},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    mem,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::{Content, Inode, MAX_FILE_LEN, Seen, Snapshot, lease};

/// Seconds since a file's last change until its time stamps are trusted to show the next one. Kernels before
/// 6.13 step them by up to 10 ms: a file written twice within a step looks unchanged.
const SETTLED: i64 = 1;

/// Rereads a path and compares.
#[derive(Debug)]
pub(super) struct Reader {
    path: PathBuf,
    last: Reading,
    /// The files of the last successful reading.
    files: BTreeMap<String, Known>,
}

/// Result of the last reading.
#[derive(Debug, PartialEq, Eq)]
enum Reading {
    None,
    File,
    Folder,
    /// The path could not be read, with the cause.
    Failed(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    stamp: Option<Stamp>,
    /// Hash of the text, or of the error. A collision would hide an edit; at 64 bits that never happens in
    /// practice. The alternative is to keep every text.
    digest: u64,
    is_open: bool,
    inode: Inode,
}

/// Changes whenever a settled file is written or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    changed: (i64, i64),
}

impl Reader {
    pub(super) const fn new(path: PathBuf) -> Self {
        Self { path, last: Reading::None, files: BTreeMap::new() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the path and compares with the previous reading; `None` if nothing changed and nothing was
    /// `asked` for.
    ///
    /// With `trusts_stamps`, files with unchanged time stamps are not opened: with ten thousand files this
    /// saves most of the work per edit. Opened nevertheless: files in `asked`, and files that a program was
    /// writing.
    pub(super) fn read(&mut self, trusts_stamps: bool, asked: Option<&BTreeSet<String>>) -> Option<Snapshot> {
        let (reading, paths) = match self.list() {
            Ok(listed) => listed,
            Err(error) => {
                let cause = error.to_string();
                let reading = Reading::Failed(cause.clone());
                let is_news = self.last != reading;
                self.last = reading;
                let path = self.path.display().to_string();
                return is_news.then_some(Snapshot::Unreadable { path, cause });
            }
        };
        let mut is_news = self.last != reading || asked.is_some();
        self.last = reading;
        let mut before = mem::take(&mut self.files);
        let mut contents = BTreeMap::new();
        for (name, path) in paths {
            let old = before.remove(&name);
            let trusts_stamps = trusts_stamps && !asked.is_some_and(|asked| asked.contains(&name));
            let Some((known, content)) = read_file(&path, old.as_ref(), trusts_stamps, now()) else {
                before.extend(old.map(|old| (name, old)));
                continue;
            };
            is_news |= content != Content::Unchanged || old.is_none_or(|old| old.is_open != known.is_open);
            contents.insert(name.clone(), Seen { content, is_open: known.is_open, inode: known.inode });
            self.files.insert(name, known);
        }
        // What remains has disappeared.
        is_news |= !before.is_empty();
        is_news.then_some(Snapshot::Files(contents))
    }

    fn list(&self) -> io::Result<(Reading, Vec<(String, PathBuf)>)> {
        match fs::metadata(&self.path) {
            Ok(metadata) if metadata.is_dir() => {}
            // A removed single file is an empty list, like a removed file of a folder.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.last == Reading::File => {
                return Ok((Reading::File, Vec::new()));
            }
            Err(error) => return Err(error),
            Ok(_) => {
                let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Ok((Reading::File, vec![(name, self.path.clone())]));
            }
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            if is_manifest(&name) {
                paths.push((name.to_string_lossy().into_owned(), self.path.join(name)));
            }
        }
        Ok((Reading::Folder, paths))
    }
}

/// Whether a folder's file is a manifest: not hidden, and with a known extension. This excludes editors'
/// files (`.web.yaml.swp`, `web.yaml~`, `#web.yaml#`).
pub(super) fn is_manifest(name: &OsStr) -> bool {
    let extension = Path::new(name).extension().unwrap_or_default();
    let is_hidden = name.as_encoded_bytes().starts_with(b".");
    !is_hidden && ["yaml", "yml", "json"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Reads one file at a time `now`; `None` if it does not exist or is not a regular file.
fn read_file(path: &Path, old: Option<&Known>, trusts_stamps: bool, now: i64) -> Option<(Known, Content)> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(metadata),
        // Removed since the folder was listed, a dangling link; or a folder, pipe or device.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Ok(_) => return None,
        Err(error) => Err(error),
    };
    let stamp = metadata.as_ref().ok().and_then(|metadata| Stamp::of(metadata, now));
    if trusts_stamps
        && stamp.is_some()
        && let Some(old) = old.filter(|old| old.stamp == stamp && !old.is_open)
    {
        return Some((Known { stamp, ..*old }, Content::Unchanged));
    }
    let inode = metadata.as_ref().map(|metadata| (metadata.dev(), metadata.ino())).unwrap_or_default();
    let read = metadata.and_then(|metadata| read_text(path, metadata.len()));
    let (text, is_open) = match read {
        // Removed since `metadata`.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => (Err(error.to_string()), false),
        Ok((text, is_open)) => (text.map_err(|error| error.to_string()), is_open),
    };
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let known = Known { stamp, digest: hasher.finish(), is_open, inode };
    let content = if old.is_some_and(|old| old.digest == known.digest) {
        Content::Unchanged
    } else {
        text.map_or_else(Content::Unreadable, Content::Text)
    };
    Some((known, content))
}

/// Reads a text, and whether a program is writing it. If none is, the text is complete.
fn read_text(path: &Path, len: u64) -> io::Result<(io::Result<String>, bool)> {
    let too_large = || io::Error::other(format!("is larger than {} MiB", MAX_FILE_LEN >> 20));
    if len > MAX_FILE_LEN {
        return Err(too_large());
    }
    let file = File::open(path)?;
    let is_open = lease::is_being_written(&file);
    let mut text = Vec::new();
    // One byte more, to detect a file that has grown since.
    file.take(MAX_FILE_LEN + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_LEN {
        return Err(too_large());
    }
    let text = String::from_utf8(text).map_err(|error| {
        io::Error::other(format!("is not UTF-8 text (byte {})", error.utf8_error().valid_up_to() + 1))
    });
    Ok((text, is_open))
}

/// Seconds since 1970. A wrong clock only costs time: full readings, which trust no stamp, find what others
/// missed.
fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| i64::try_from(elapsed.as_secs()).ok())
        .unwrap_or_default()
}

impl Stamp {
    /// The stamp of a file; `None` if the file changed too recently for the stamp to show the next change.
    fn of(metadata: &Metadata, now: i64) -> Option<Self> {
        (now.saturating_sub(metadata.ctime()) > SETTLED).then(|| Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

#[cfg(test)]
mod tests;
