//! What to serve before the source has said everything.

use std::time::Duration;

/// How long a source is waited for before the snapshot is served in its stead.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// What the tables should follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Nothing: they stay as they were found.
    Nothing,
    /// The last good snapshot, until the source is complete.
    Snapshot,
    /// The source.
    Source,
}

/// What is known while starting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Whether the first list of every kind is complete.
    pub is_complete: bool,
    /// Whether some list is complete. The others may follow at any moment, and the objects of the snapshot would take
    /// the place of live ones.
    pub has_answered: bool,
    /// How long the source has been waited for.
    pub waited: Duration,
    /// Whether the tables were found with frontends of an earlier agent.
    pub has_adopted: bool,
}

/// Decides what the tables should follow.
///
/// Tables that an earlier agent left are at least as new as its snapshot, which is written seconds later: they stay.
/// So the snapshot is for a host that has started while the API server is away.
#[must_use]
pub fn basis(start: Start) -> Basis {
    match start {
        Start { is_complete: true, .. } => Basis::Source,
        Start { waited, has_answered: false, has_adopted: false, .. } if waited >= PATIENCE => {
            Basis::Snapshot
        }
        _ => Basis::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshot_is_served_on_empty_tables_after_a_wait() {
        let short = Duration::from_millis(1999);
        for (is_complete, has_answered, waited, has_adopted, expected) in [
            (true, true, Duration::ZERO, false, Basis::Source),
            (true, true, PATIENCE, true, Basis::Source),
            (false, false, short, false, Basis::Nothing),
            (false, false, PATIENCE, false, Basis::Snapshot),
            (false, true, PATIENCE, false, Basis::Nothing),
            (false, false, PATIENCE, true, Basis::Nothing),
        ] {
            let start = Start { is_complete, has_answered, waited, has_adopted };
            assert_eq!(basis(start), expected, "{start:?}");
        }
    }
}
