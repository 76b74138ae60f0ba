//! What to serve before the source's first lists are complete.

use std::time::Duration;

/// How long to wait for a source before serving the snapshot.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// What the tables should follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Nothing: they stay as found.
    Nothing,
    /// The last good snapshot, until the source is complete.
    Snapshot,
    /// The source.
    Source,
}

/// What is known at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Whether the first list of every kind is complete.
    pub is_complete: bool,
    /// Whether any list is complete. Then the others may follow at any moment, and the snapshot's objects
    /// would replace live ones.
    pub has_answered: bool,
    /// Time since the start.
    pub waited: Duration,
    /// Whether frontends of an earlier agent were adopted.
    pub has_adopted: bool,
}

/// Decides what the tables should follow.
///
/// Adopted tables are at least as new as the snapshot, which is written seconds later, so they stay. The
/// snapshot is for a host that starts while the API server is unreachable.
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
