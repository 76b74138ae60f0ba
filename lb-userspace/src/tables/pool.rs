//! Ids that are not given out again while anything may still read them.

use std::collections::{BTreeSet, VecDeque};

/// Gives out numbers from 0 to `capacity - 1`.
///
/// A freed number is held back until [`Pool::settled`] and then queues behind all that were freed before, so that
/// what still names it (a counter, an affinity entry) has the longest time to be forgotten.
#[derive(Clone, Debug)]
pub struct Pool {
    capacity: u32,
    /// Numbers from here on were never given out.
    fresh: u32,
    /// Below `fresh`, never given out either: gaps between adopted numbers.
    free: VecDeque<u32>,
    held_back: Vec<u32>,
}

impl Pool {
    /// A pool in which the given numbers are taken.
    ///
    /// Numbers at or above `capacity` are ignored: they cannot be freed into the pool again.
    #[must_use]
    pub fn new(capacity: u32, taken: &BTreeSet<u32>) -> Self {
        let fresh = taken.range(..capacity).next_back().map_or(0, |highest| highest + 1);
        let free = (0..fresh).filter(|id| !taken.contains(id)).collect();
        Self { capacity, fresh, free, held_back: Vec::new() }
    }

    /// Takes a number, or `None` if none is free now. Some may become free by [`Self::settled`].
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

    /// Gives a number back, to be held until [`Self::settled`].
    pub fn free(&mut self, id: u32) {
        self.held_back.push(id);
    }

    /// Gives a number back that was taken and has not been used for anything.
    pub fn give_back(&mut self, id: u32) {
        self.free.push_front(id);
    }

    /// Lets everything that was freed be given out again.
    pub fn settled(&mut self) {
        self.free.extend(self.held_back.drain(..));
    }

    /// Whether [`Self::settled`] would make something free.
    #[must_use]
    pub fn holds_back(&self) -> bool {
        !self.held_back.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_number_waits_for_the_grace_period() {
        let mut pool = Pool::new(2, &BTreeSet::new());
        assert_eq!((pool.take(), pool.take(), pool.take()), (Some(0), Some(1), None));
        pool.free(0);
        assert_eq!(pool.take(), None);
        pool.settled();
        assert_eq!((pool.take(), pool.take()), (Some(0), None));
    }

    #[test]
    fn adopted_numbers_are_not_given_out() {
        let mut pool = Pool::new(6, &BTreeSet::from([1, 3, 9]));
        let all: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(all, [0, 2, 4, 5]);
    }
}
