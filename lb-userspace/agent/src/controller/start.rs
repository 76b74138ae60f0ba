//! What to serve before the source's first lists are complete.

use std::time::Duration;

/// How long to wait for a source's first answer.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// The progress of the start, and what the maps follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The source has not answered. The maps stay as found.
    Waiting,
    /// It has not answered within [`PATIENCE`]. The maps stay as found: they are at least as new as the
    /// snapshot, which is written seconds later, or there is no usable snapshot.
    Overdue,
    /// It has not answered within [`PATIENCE`], and no maps of an earlier agent were found. The maps follow
    /// the last good snapshot.
    Snapshot,
    /// It has answered, but not with all lists. The maps stay as they are: a mix of the snapshot and single
    /// lists is a state that never existed.
    Listing,
    /// All lists are complete. The maps follow the source.
    Following,
}

impl Phase {
    /// The phase after the source has answered.
    #[must_use]
    pub fn answered(self) -> Self {
        if self == Self::Following { self } else { Self::Listing }
    }

    /// The phase, given whether all lists are complete.
    #[must_use]
    pub fn listed(self, is_complete: bool) -> Self {
        if is_complete { Self::Following } else { self }
    }

    /// Whether the maps follow the objects.
    #[must_use]
    pub fn may_sync(self) -> bool {
        matches!(self, Self::Snapshot | Self::Following)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_lists_are_never_mixed_with_the_snapshot() {
        for (before, answered, may_sync) in [
            (Phase::Waiting, Phase::Listing, false),
            (Phase::Overdue, Phase::Listing, false),
            (Phase::Snapshot, Phase::Listing, true),
            (Phase::Listing, Phase::Listing, false),
            (Phase::Following, Phase::Following, true),
        ] {
            assert_eq!((before.answered(), before.may_sync()), (answered, may_sync), "{before:?}");
            assert_eq!((before.listed(true), before.listed(false)), (Phase::Following, before));
        }
    }
}
