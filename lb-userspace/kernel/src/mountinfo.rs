//! Mounts, from the text of `/proc/PID/mountinfo` (proc(5)).

use std::{ffi::OsString, os::unix::ffi::OsStringExt as _, path::PathBuf};

/// The used fields of a mount.
#[derive(Debug)]
pub(super) struct Mount<'a> {
    /// The mount id, as in `/proc/PID/fdinfo`.
    pub(super) id: u32,
    /// The mounted directory of the file system, with escapes.
    pub(super) root: &'a [u8],
    /// The mount point.
    pub(super) point: PathBuf,
    /// Type of the file system.
    pub(super) file_system: &'a [u8],
}

/// The mounts in the order of the text. Malformed lines are skipped.
pub(super) fn mounts(text: &[u8]) -> impl Iterator<Item = Mount<'_>> {
    text.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let (root, point) = (fields.nth(2)?, fields.next()?);
        // Options and any number of optional fields, a dash, then the type.
        let file_system = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some(Mount { id, root, point: PathBuf::from(OsString::from_vec(unescape(point))), file_system })
    })
}

/// Decodes the escapes of mountinfo: a backslash and three octal digits for blanks, line ends and
/// backslashes.
pub(super) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| first == b'\\');
        plain.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    plain
}
