//! Ids.

use std::collections::{BTreeSet, VecDeque};

/// Gives out numbers from 0 to `capacity - 1`.
///
/// A freed number queues behind all that were freed before, so that what still names it (a counter, an affinity entry) has
/// the longest time to be forgotten. Whoever frees it has waited for a grace period.
#[derive(Clone, Debug)]
pub struct Pool {
    capacity: u32,
    /// Numbers from here on were never given out.
    fresh: u32,
    /// Below `fresh`, never given out either: gaps between adopted numbers.
    free: VecDeque<u32>,
}

impl Pool {
    /// A pool in which the given numbers are taken.
    ///
    /// Numbers at or above `capacity` are ignored: they cannot be freed into the pool again.
    #[must_use]
    pub fn new(capacity: u32, taken: &BTreeSet<u32>) -> Self {
        let fresh = taken.range(..capacity).next_back().map_or(0, |highest| highest + 1);
        let free = (0..fresh).filter(|id| !taken.contains(id)).collect();
        Self { capacity, fresh, free }
    }

    /// Takes a number, or `None` if none is free now.
    pub fn take(&mut self) -> Option<u32> {
        // Fresh numbers last: the maps behind them are touched page by page, so low numbers keep them small.
        if let Some(id) = self.free.pop_front() {
            return Some(id);
        }
        if self.fresh == self.capacity {
            return None;
        }
        self.fresh += 1;
        Some(self.fresh - 1)
    }

    /// Gives numbers back that nothing reads.
    pub fn free(&mut self, ids: impl IntoIterator<Item = u32>) {
        self.free.extend(ids);
    }

    /// Gives a number back that was taken and has not been used for anything.
    pub fn give_back(&mut self, id: u32) {
        self.free.push_front(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_number_waits_for_those_before_it() {
        let mut pool = Pool::new(3, &BTreeSet::new());
        assert_eq!([pool.take(), pool.take(), pool.take(), pool.take()], [Some(0), Some(1), Some(2), None]);
        pool.free([1, 0]);
        pool.give_back(2);
        assert_eq!([pool.take(), pool.take(), pool.take(), pool.take()], [Some(2), Some(1), Some(0), None]);
    }

    #[test]
    fn adopted_numbers_are_not_given_out() {
        let mut pool = Pool::new(6, &BTreeSet::from([1, 3, 9]));
        let all: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(all, [0, 2, 4, 5]);
    }
}
