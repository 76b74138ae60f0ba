//! Writes both files.

use std::{
    fs::{self, File, OpenOptions},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io::{self, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use super::{Changes, FILE_NAME, Found, JOURNAL, Snapshot, SnapshotError, codec};

/// Names of new files before they replace the old ones.
pub(super) const NEW: [&str; 2] = ["snapshot.new", "journal.new"];

/// A journal below this size, in bytes, is never replaced by a new snapshot.
const SMALL_JOURNAL: u64 = 256 << 10;

/// Whether a journal is so long that a new snapshot replaces it.
///
/// With a journal of up to twice the snapshot, a new snapshot costs at most half of the journal's records,
/// and a reader reads at most three times the snapshot.
fn is_too_long(journal_len: u64, snapshot_len: u64) -> bool {
    journal_len > SMALL_JOURNAL.max(2 * snapshot_len)
}

/// Result of a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes written.
    pub n_bytes: u64,
    /// Size of the changes as a journal record, in bytes, whether written as such or as part of a new
    /// snapshot; 0 for the first snapshot.
    pub n_changed: u64,
    /// Whether the files on disk were read first, which takes memory.
    pub has_read: bool,
}

/// Keeps the files of a state directory up to date. Use one writer per directory at a time.
#[derive(Debug)]
pub struct Writer {
    pub(super) files: Files,
    /// The state after the last write, or as found. Others may have changed it since.
    pub(super) on_disk: Option<Found>,
    has_looked: bool,
}

impl Writer {
    /// Creates a writer; accesses no file.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self { files: Files::new(state_dir), on_disk: None, has_looked: false }
    }

    /// Writes the difference to the state on disk, and creates the directory if needed. Written data survives
    /// a power failure.
    ///
    /// Continues an earlier agent's files, and recreates files that were removed or replaced.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::Io`]: a reader still finds the previous state, and the next call retries.
    pub fn write(&mut self, snapshot: Snapshot) -> Result<Written, SnapshotError> {
        self.files.n_bytes = 0;
        let has_read = !std::mem::replace(&mut self.has_looked, true);
        if has_read {
            // Unreadable files are replaced.
            self.on_disk = Found::read(&self.files.dir).ok();
        }
        let error = |name| {
            let path = self.files.dir.join(name);
            move |source| SnapshotError::Io { path: path.clone(), source }
        };
        let (snapshot_error, journal_error) = (error(FILE_NAME), error(JOURNAL));
        let mut n_changed = 0;
        if let Some(found) = &mut self.on_disk
            && let Some(generation) = found.generation
            && self.files.are_in_place(generation, found)
        {
            let Some(changes) = Changes::between(&found.snapshot, &snapshot) else {
                // Share the new objects: equal copies would be in memory twice.
                found.snapshot = snapshot;
                return Ok(Written { has_read, ..Written::default() });
            };
            let record = codec::pack(&changes).and_then(|content| codec::record(&content));
            let record = record.map_err(&journal_error)?;
            let len = record.len() as u64;
            if !is_too_long(found.journal_len + len, found.snapshot_len) {
                found.journal_len =
                    self.files.append(generation, found.journal_len, &record).map_err(journal_error)?;
                found.n_lost = 0;
                found.snapshot = snapshot;
                return Ok(Written { n_bytes: self.files.n_bytes, n_changed: len, has_read });
            }
            n_changed = len;
        }
        let generation = RandomState::new().build_hasher().finish();
        let written = codec::snapshot_file(&snapshot, generation)
            .and_then(|file| self.files.replace(FILE_NAME, &file).map(|()| file.len() as u64));
        let snapshot_len = written.map_err(snapshot_error)?;
        let generation = Some(generation);
        self.on_disk = Some(Found { snapshot, n_lost: 0, generation, snapshot_len, journal_len: 0 });
        Ok(Written { n_bytes: self.files.n_bytes, n_changed, has_read })
    }
}

/// The files of a state directory. All writes are here.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    /// Bytes written since this was last set to 0.
    n_bytes: u64,
    #[cfg(test)]
    pub(super) fault: super::tests::Fault,
}

impl Files {
    fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            n_bytes: 0,
            #[cfg(test)]
            fault: super::tests::Fault::default(),
        }
    }

    /// Whether the files are those found, unchanged by others.
    fn are_in_place(&self, generation: u64, found: &Found) -> bool {
        let (snapshot, journal) = (self.dir.join(FILE_NAME), self.dir.join(JOURNAL));
        let len_of = |path| fs::metadata(path).map_or(0, |data| data.len());
        let line_of = |path| super::read_header(path).unwrap_or_default();
        codec::generation_of(&line_of(&snapshot)) == Some(generation)
            && (found.journal_len == 0
                || (line_of(&journal) == codec::journal_line(generation).as_bytes()
                    && len_of(&journal) == found.journal_len + found.n_lost))
    }

    /// Appends a record after the good ones of a journal, or starts a journal. Returns the journal's length.
    fn append(&mut self, generation: u64, good: u64, record: &[u8]) -> io::Result<u64> {
        if good == 0 {
            let file = [codec::journal_line(generation).as_bytes(), record].concat();
            self.replace(JOURNAL, &file)?;
            return Ok(file.len() as u64);
        }
        self.step()?;
        let mut file = OpenOptions::new().write(true).open(self.dir.join(JOURNAL))?;
        self.step()?;
        file.set_len(good)?;
        let written = file.seek(SeekFrom::Start(good)).and_then(|_at| self.write(&mut file, record));
        if written.is_err() && self.step().is_ok() {
            // A record after a partial one would never be read. If this fails too, the files are recreated.
            let _cut = file.set_len(good);
        }
        written?;
        Ok(good + record.len() as u64)
    }

    /// Replaces a file atomically.
    fn replace(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (path, new) = (self.dir.join(name), self.dir.join(format!("{name}.new")));
        self.step()?;
        fs::create_dir_all(&self.dir)?;
        let replaced = (|| {
            self.step()?;
            let mut file = File::create(&new)?;
            self.write(&mut file, bytes)?;
            self.step()?;
            fs::rename(&new, &path)?;
            self.step()?;
            File::open(&self.dir)?.sync_all()
        })();
        if replaced.is_err() && self.step().is_ok() {
            // Frees space on a full disk.
            let _gone = fs::remove_file(&new);
        }
        replaced
    }

    fn write(&mut self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        self.n_bytes += bytes.len() as u64;
        #[cfg(test)]
        if let Err(error) = self.step() {
            file.write_all(&bytes[..bytes.len() / 2])?;
            return Err(error);
        }
        file.write_all(bytes)?;
        self.step()?;
        file.sync_data()
    }

    /// Called before each change to a file: tests inject faults here.
    #[cfg_attr(
        not(test),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "only tests have faults")
    )]
    fn step(&mut self) -> io::Result<()> {
        #[cfg(test)]
        self.fault.step()?;
        Ok(())
    }
}
