//! Allocation of runs in an endpoint table.

use std::collections::{BTreeMap, BTreeSet};

/// Allocates non-overlapping ranges of a table with `capacity` entries.
///
/// Best fit, lowest offset first. The caller frees a used range only after a grace period.
#[derive(Clone, Debug, Default)]
pub struct Space {
    /// Free ranges by offset. No two of them touch.
    by_offset: BTreeMap<u32, u32>,
    /// The same ranges as (length, offset), to find the smallest that fits.
    by_len: BTreeSet<(u32, u32)>,
}

impl Space {
    /// A table in which the given ranges (offset → length) are taken.
    ///
    /// Returns `None` if taken ranges overlap or exceed the capacity: this allocator did not write them.
    #[must_use]
    pub fn new(capacity: u32, taken: &BTreeMap<u32, u32>) -> Option<Self> {
        let mut space = Self { by_offset: BTreeMap::new(), by_len: BTreeSet::new() };
        let mut end = 0;
        for (&offset, &len) in taken {
            space.insert(end, offset.checked_sub(end)?);
            end = offset.checked_add(len)?;
        }
        space.insert(end, capacity.checked_sub(end)?);
        Some(space)
    }

    /// Takes `len` consecutive entries and returns their offset, or `None` if no gap is large enough.
    pub fn take(&mut self, len: u32) -> Option<u32> {
        if len == 0 {
            return Some(0);
        }
        let &(gap, offset) = self.by_len.range((len, 0)..).next()?;
        self.remove(offset, gap);
        self.insert(offset + len, gap - len);
        Some(offset)
    }

    /// Frees a range.
    pub fn free(&mut self, offset: u32, len: u32) {
        let (mut start, mut total) = (offset, len);
        if let Some((&before, &gap)) = self.by_offset.range(..offset).next_back()
            && before + gap == offset
        {
            self.remove(before, gap);
            start = before;
            total += gap;
        }
        if let Some(&gap) = self.by_offset.get(&(offset + len)) {
            self.remove(offset + len, gap);
            total += gap;
        }
        self.insert(start, total);
    }

    /// Entries that are free now.
    #[must_use]
    pub fn n_free(&self) -> u32 {
        self.by_offset.values().sum()
    }

    fn insert(&mut self, offset: u32, len: u32) {
        if len > 0 {
            self.by_offset.insert(offset, len);
            self.by_len.insert((len, offset));
        }
    }

    fn remove(&mut self, offset: u32, len: u32) {
        self.by_offset.remove(&offset);
        self.by_len.remove(&(len, offset));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_freed_range_joins_its_neighbours() {
        let mut space = Space::new(8, &BTreeMap::new()).unwrap();
        assert_eq!((space.take(5), space.take(3), space.take(1)), (Some(0), Some(5), None));
        space.free(0, 5);
        space.free(5, 3);
        assert_eq!(space.take(8), Some(0));
    }

    #[test]
    fn overlapping_or_foreign_ranges_are_refused() {
        assert!(Space::new(8, &BTreeMap::from([(0, 4), (3, 2)])).is_none());
        assert!(Space::new(8, &BTreeMap::from([(6, 3)])).is_none());
        assert_eq!(Space::new(8, &BTreeMap::from([(2, 3), (5, 1)])).map(|space| space.n_free()), Some(4));
    }

    proptest! {
        /// After any sequence of takes and frees, ranges in use do not overlap; once all are freed, one gap
        /// remains.
        #[test]
        fn ranges_never_overlap(steps in prop::collection::vec((1u32..20, any::<prop::sample::Index>(), 0u8..3), 0..200)) {
            let mut space = Space::new(256, &BTreeMap::new()).unwrap();
            let mut used: Vec<(u32, u32)> = Vec::new();
            for (len, which, action) in steps {
                match action {
                    0 | 1 => if let Some(offset) = space.take(len) {
                        for &(o, l) in &used {
                            prop_assert!(offset + len <= o || o + l <= offset, "{offset}+{len} overlaps {o}+{l}");
                        }
                        prop_assert!(offset + len <= 256);
                        used.push((offset, len));
                    },
                    2 if !used.is_empty() => {
                        let (offset, len) = used.swap_remove(which.index(used.len()));
                        space.free(offset, len);
                    }
                    _ => {}
                }
            }
            for (offset, len) in used { space.free(offset, len); }
            prop_assert_eq!(space.take(256), Some(0));
        }
    }
}
