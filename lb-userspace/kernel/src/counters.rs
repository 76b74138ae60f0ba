//! Counters of calls, which programs increment without contention.
//!
//! Each possible CPU has its own counters, after those of the CPU before. A per-CPU array would do, but the
//! kernel allocates its values one by one: 330 ms of system time at the default sizes, against 2 ms.

use std::{fs, io};

use lb_common::layout::MapValue;

use super::{KernelError, layouts::Directory, mapped::Mapped, maps::map_memory};

/// An array of counters: `id` of CPU `n` is at `n * n_ids + id`.
#[derive(Debug)]
pub(super) struct Counters<T> {
    values: Mapped<T>,
    n_ids: u32,
}

impl<T: MapValue + Default> Counters<T> {
    /// Maps a pinned array.
    ///
    /// # Errors
    ///
    /// As [`Directory::map`]; [`KernelError::Mmap`], or [`KernelError::Cpus`].
    pub(super) fn open(directory: &Directory, name: &'static str) -> Result<Self, KernelError> {
        let values: Mapped<T> = map_memory(name, &directory.map(name)?.0)?;
        let n_ids = values.n_entries() / n_cpus()?;
        Ok(Self { values, n_ids })
    }

    /// The indices of an id's counters, one for each CPU; none for an id that is not counted.
    fn places(&self, id: u32) -> impl Iterator<Item = u32> + use<T> {
        let end = if id < self.n_ids { self.values.n_entries() } else { 0 };
        (id..end).step_by(usize::try_from(self.n_ids.max(1)).unwrap_or(usize::MAX))
    }

    /// The values of an id on each CPU. Programs may increment them meanwhile.
    pub(super) fn read(&self, id: u32) -> impl Iterator<Item = T> {
        self.places(id).filter_map(|place| self.values.read(place))
    }

    /// Sets the counters of an id to zero.
    pub(super) fn reset(&self, id: u32) {
        for place in self.places(id) {
            let _inside = self.values.write(place, T::default());
        }
    }

    /// Copies the values of an id from another array, as far as both have it.
    pub(super) fn copy_from(&self, other: &Self, id: u32) {
        for (place, value) in self.places(id).zip(other.read(id)) {
            let _inside = self.values.write(place, value);
        }
    }
}

/// Possible CPUs, counted from 0 without gaps: programs index their counters by CPU number.
///
/// # Errors
///
/// [`KernelError::Cpus`] if the kernel does not report them.
pub(super) fn n_cpus() -> Result<u32, KernelError> {
    let possible = fs::read_to_string("/sys/devices/system/cpu/possible").map_err(KernelError::Cpus)?;
    above(&possible).ok_or_else(|| KernelError::Cpus(io::ErrorKind::InvalidData.into()))
}

/// One more than the highest number of an ascending list such as `0-3,8`.
fn above(list: &str) -> Option<u32> {
    list.trim_end().rsplit([',', '-']).next()?.parse::<u32>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_counted_with_the_gaps_between_them() {
        for (list, n_cpus) in [
            ("0\n", Some(1)),
            ("0-1\n", Some(2)),
            ("0,2-3", Some(4)),
            ("0-3,8", Some(9)),
            ("", None),
            ("0-\n", None),
            ("4294967295", None),
        ] {
            assert_eq!(above(list), n_cpus, "{list:?}");
        }
        assert!(n_cpus().is_ok_and(|n| n > 0));
    }
}
