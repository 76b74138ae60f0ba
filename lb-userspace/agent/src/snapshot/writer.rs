//! Writing both files.

use std::{
    fs::{self, File, OpenOptions},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io::{self, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use super::{Changes, FILE_NAME, Found, JOURNAL, Snapshot, SnapshotError, codec};

/// Names under which new files are written before they take the place of the former ones.
pub(super) const NEW: [&str; 2] = ["snapshot.new", "journal.new"];

/// A journal below this is not worth a new snapshot.
const SMALL_JOURNAL: u64 = 256 << 10;

/// Whether a journal would be so long that a new snapshot is written instead.
///
/// With a journal of up to twice the snapshot, the next snapshot costs at most half of what the journal's records have cost,
/// and a reader reads three times the snapshot at most.
fn is_too_long(journal_len: u64, snapshot_len: u64) -> bool {
    journal_len > SMALL_JOURNAL.max(2 * snapshot_len)
}

/// What one writing came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Octets that were written.
    pub n_bytes: u64,
    /// Octets that the changes take in a journal, whether they were written there or with everything else; 0 for the first
    /// snapshot.
    pub n_changed: u64,
    /// Whether all that was on disk was read for it, which takes memory.
    pub has_read: bool,
}

/// Keeps the files of a state directory up to date. One at a time for a directory.
#[derive(Debug)]
pub struct Writer {
    pub(super) files: Files,
    /// What the last writing left, or what was found. Others may have changed it since.
    pub(super) on_disk: Option<Found>,
    has_looked: bool,
}

impl Writer {
    /// Touches nothing yet.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self { files: Files::new(state_dir), on_disk: None, has_looked: false }
    }

    /// Writes what differs from what is on disk, making the directory if needed. What is written survives a loss of power.
    ///
    /// Goes on with the files of an earlier agent, and makes them anew if they were removed or replaced.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::Io`]; then a reader finds what was written before, and the next call writes what this one did not.
    pub fn write(&mut self, snapshot: Snapshot) -> Result<Written, SnapshotError> {
        self.files.n_bytes = 0;
        let has_read = !std::mem::replace(&mut self.has_looked, true);
        if has_read {
            // What cannot be read is replaced.
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
                // Equal ones that are not shared would be in memory twice.
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

/// The files of a state directory. Everything that is written to them is written here.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    /// Octets written since this was last set to 0.
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

    /// Whether the files are those that were found, and nothing else has been written to them.
    fn are_in_place(&self, generation: u64, found: &Found) -> bool {
        let (snapshot, journal) = (self.dir.join(FILE_NAME), self.dir.join(JOURNAL));
        let len_of = |path| fs::metadata(path).map_or(0, |data| data.len());
        let line_of = |path| super::read_header(path).unwrap_or_default();
        codec::generation_of(&line_of(&snapshot)) == Some(generation)
            && (found.journal_len == 0
                || (line_of(&journal) == codec::journal_line(generation).as_bytes()
                    && len_of(&journal) == found.journal_len + found.n_lost))
    }

    /// Adds a record behind the good ones of a journal, or begins one. Returns its length.
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
            // A record behind a part of one would not be read. If this fails too, the files are made anew.
            let _cut = file.set_len(good);
        }
        written?;
        Ok(good + record.len() as u64)
    }

    /// Puts a new file in the place of another.
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
            // A full disk may need the room.
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

    /// Before each change to a file: a test ends it here.
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
