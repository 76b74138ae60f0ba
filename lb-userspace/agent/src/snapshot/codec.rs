//! Encodings of both files. Pure.
//!
//! ```text
//! snapshot   socklb-snapshot format=3 bytes=N crc32=XXXXXXXX generation=XXXXXXXXXXXXXXXX\n
//!            N bytes: all objects and settings, JSON, deflated
//! journal    socklb-journal format=3 generation=XXXXXXXXXXXXXXXX\n
//!            records, each: u32 length, u32 CRC-32 of length and content (little-endian),
//!            content: Changes, JSON, deflated
//! ```
//!
//! Format 2 is from agents without a journal: its snapshot has no generation and is not deflated. It is read
//! but no longer written.

use std::io::{self, BufWriter, Read};

use flate2::{Compression, read::DeflateDecoder, write::DeflateEncoder};
use serde::{Serialize, de::DeserializeOwned};

use super::{MAX_BYTES, Snapshot};

/// Raise it with any change to the contents of the files.
const FORMAT: u32 = 3;
/// The previous format: see above.
const PLAIN: u32 = 2;

/// Maximum length of a first line.
pub(super) const MAX_HEADER_LEN: usize = 200;

/// Length of a record's header, in bytes.
const RECORD_HEADER_LEN: usize = 8;

/// Deflates the JSON of a value.
pub(super) fn pack(value: &impl Serialize) -> io::Result<Vec<u8>> {
    // Buffered: small writes are expensive for the encoder.
    let mut writer = BufWriter::with_capacity(1 << 16, DeflateEncoder::new(Vec::new(), Compression::new(4)));
    serde_json::to_writer(&mut writer, value)?;
    writer.into_inner().map_err(io::IntoInnerError::into_error)?.finish()
}

/// Reads what [`pack`] wrote.
pub(super) fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let mut json = Vec::new();
    DeflateDecoder::new(bytes).take(MAX_BYTES).read_to_end(&mut json).map_err(|error| error.to_string())?;
    serde_json::from_slice(&json).map_err(|error| error.to_string())
}

fn crc32(parts: &[&[u8]]) -> u32 {
    let mut checksum = crc32fast::Hasher::new();
    for part in parts {
        checksum.update(part);
    }
    checksum.finalize()
}

/// The bytes up to and including the first newline.
pub(super) fn first_line(bytes: &[u8]) -> &[u8] {
    let len = bytes.iter().take(MAX_HEADER_LEN).position(|octet| *octet == b'\n').map_or(0, |at| at + 1);
    &bytes[..len]
}

pub(super) fn snapshot_file(snapshot: &Snapshot, generation: u64) -> io::Result<Vec<u8>> {
    let body = pack(snapshot)?;
    let mut file = SnapshotHeader { generation: Some(generation) }.line(&body).into_bytes();
    file.extend(body);
    Ok(file)
}

/// The first line of a snapshot's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SnapshotHeader {
    /// `None` in format 2.
    pub(super) generation: Option<u64>,
}

impl SnapshotHeader {
    fn line(self, body: &[u8]) -> String {
        let n_bytes = body.len();
        match self.generation {
            Some(generation) => {
                let checksum = crc32(&[&generation.to_le_bytes(), body]);
                format!(
                    "socklb-snapshot format={FORMAT} bytes={n_bytes} crc32={checksum:08x} \
                     generation={generation:016x}\n"
                )
            }
            None => format!("socklb-snapshot format={PLAIN} bytes={n_bytes} crc32={:08x}\n", crc32(&[body])),
        }
    }

    /// Splits a file, and checks that it is complete and intact.
    pub(super) fn parse(file: &[u8]) -> Result<(Self, &[u8]), String> {
        let line = first_line(file);
        let body = &file[line.len()..];
        let fields = str::from_utf8(line).ok().and_then(|line| line.strip_prefix("socklb-snapshot "));
        let field = |name: &str| {
            let mut fields = fields.into_iter().flat_map(str::split_ascii_whitespace);
            fields.find_map(|field| field.strip_prefix(name))
        };
        let Some(format) = field("format=").and_then(|format| format.parse::<u32>().ok()) else {
            return Err("not a snapshot".to_owned());
        };
        let generation = match format {
            PLAIN => None,
            FORMAT => generation_of(line),
            _ => return Err(format!("format {format}, this socklb reads {PLAIN} and {FORMAT}")),
        };
        let header = Self { generation };
        if header.line(body).as_bytes() == line {
            Ok((header, body))
        } else {
            Err(format!("{} bytes do not match the first line", body.len()))
        }
    }

    /// Decodes the body that [`Self::parse`] returned.
    pub(super) fn decode(self, body: &[u8]) -> Result<Snapshot, String> {
        match self.generation {
            Some(_) => unpack(body),
            None => serde_json::from_slice(body).map_err(|error| error.to_string()),
        }
    }
}

/// The generation in a snapshot's first line.
pub(super) fn generation_of(line: &[u8]) -> Option<u64> {
    let (_, generation) = str::from_utf8(line).ok()?.trim_end().rsplit_once(" generation=")?;
    u64::from_str_radix(generation, 16).ok()
}

/// The first line of the journal of a snapshot.
pub(super) fn journal_line(generation: u64) -> String {
    format!("socklb-journal format={FORMAT} generation={generation:016x}\n")
}

pub(super) fn record(content: &[u8]) -> io::Result<Vec<u8>> {
    let len = u32::try_from(content.len()).map_err(|_beyond| io::ErrorKind::FileTooLarge)?.to_le_bytes();
    let checksum = crc32(&[&len, content]).to_le_bytes();
    Ok([&len, &checksum, content].concat())
}

pub(super) struct Journal<'a> {
    first_line: usize,
    file: usize,
    records: Vec<&'a [u8]>,
}

impl<'a> Journal<'a> {
    /// Splits a snapshot's journal, up to the first incomplete record. `None` if it is of another snapshot.
    pub(super) fn parse(file: &'a [u8], generation: u64) -> Option<Self> {
        let line = journal_line(generation);
        let mut rest = file.strip_prefix(line.as_bytes())?;
        let mut records = Vec::new();
        while let Some((record, more)) = first_record(rest) {
            records.push(record);
            rest = more;
        }
        Some(Self { first_line: line.len(), file: file.len(), records })
    }

    pub(super) fn records(&self) -> &[&'a [u8]] {
        &self.records
    }

    /// The length of this many records with what precedes them, and that of the rest.
    pub(super) fn split(&self, n_records: usize) -> (u64, u64) {
        let records = self.records.iter().take(n_records).map(|record| RECORD_HEADER_LEN + record.len());
        let len = self.first_line + records.sum::<usize>();
        (len as u64, (self.file - len) as u64)
    }
}

/// The content of the first record, and what follows it.
fn first_record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    let (checksum, rest) = rest.split_first_chunk::<4>()?;
    let (content, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*len)).ok()?)?;
    // After a crash a file may have zeroes, whose checksum is 0.
    let is_whole = !content.is_empty() && crc32(&[len, content]) == u32::from_le_bytes(*checksum);
    is_whole.then_some((content, rest))
}
