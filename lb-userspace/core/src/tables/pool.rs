//! Allocation of ids.

use std::collections::{BTreeSet, VecDeque};

/// Allocates numbers from 0 to `capacity - 1`.
///
/// Freed numbers are reused in the order of freeing, so affinity entries that still name them have the
/// longest time to expire. The caller frees a number only after a grace period.
#[derive(Clone, Debug)]
pub struct Pool {
    capacity: u32,
    /// Numbers from here on were never allocated.
    fresh: u32,
    /// Freed numbers, and the gaps between adopted ones.
    free: VecDeque<u32>,
}

impl Pool {
    /// A pool in which the given numbers are taken.
    ///
    /// Taken numbers at or above `capacity` are ignored; they must not be freed into the pool.
    #[must_use]
    pub fn new(capacity: u32, taken: &BTreeSet<u32>) -> Self {
        let fresh = taken.range(..capacity).next_back().map_or(0, |highest| highest + 1);
        let free = (0..fresh).filter(|id| !taken.contains(id)).collect();
        Self { capacity, fresh, free }
    }

    /// Takes a number, or `None` if none is free now.
    pub fn take(&mut self) -> Option<u32> {
        // Fresh numbers come last: low numbers keep few pages of the maps in use.
        if let Some(id) = self.free.pop_front() {
            return Some(id);
        }
        if self.fresh == self.capacity {
            return None;
        }
        self.fresh += 1;
        Some(self.fresh - 1)
    }

    /// The taken numbers are below this one.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.fresh
    }

    /// Frees numbers that no program reads.
    pub fn free(&mut self, ids: impl IntoIterator<Item = u32>) {
        self.free.extend(ids);
    }

    /// Returns a number that was taken but not used. It is reused first.
    pub fn put_back(&mut self, id: u32) {
        self.free.push_front(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_number_waits_for_those_before_it() {
        let mut pool = Pool::new(3, &BTreeSet::new());
        assert_eq!(pool.end(), 0);
        assert_eq!([pool.take(), pool.take(), pool.take(), pool.take()], [Some(0), Some(1), Some(2), None]);
        pool.free([1, 0]);
        pool.put_back(2);
        assert_eq!([pool.take(), pool.take(), pool.take(), pool.take()], [Some(2), Some(1), Some(0), None]);
        assert_eq!(pool.end(), 3);
    }

    #[test]
    fn adopted_numbers_are_not_given_out() {
        let mut pool = Pool::new(6, &BTreeSet::from([1, 3, 9]));
        let all: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(all, [0, 2, 4, 5]);
    }
}
