//! Which issues are new, and which are gone.

use std::collections::BTreeSet;

use lb_core::model::Issue;

/// Maximum log lines at once, of either kind: a cluster may have as many issues as objects.
pub const MAX_LINES: usize = 100;

/// The issues already logged.
#[derive(Clone, Debug, Default)]
pub struct LoggedIssues {
    known: BTreeSet<Issue>,
}

/// What to log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IssueChanges {
    /// New issues, at most [`MAX_LINES`].
    pub new: Vec<Issue>,
    /// Issues that no longer hold, at most [`MAX_LINES`].
    pub gone: Vec<Issue>,
    /// Number of further issues of either kind.
    pub n_more: usize,
}

impl LoggedIssues {
    /// Number of current issues.
    #[must_use]
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there are no current issues.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Replaces the current issues and returns the difference. An unchanged issue costs a comparison; it is
    /// not formatted again.
    pub fn follow(&mut self, issues: impl IntoIterator<Item = Issue>) -> IssueChanges {
        let now: BTreeSet<Issue> = issues.into_iter().collect();
        let mut n_more = 0;
        let mut first = |from: &BTreeSet<Issue>, without: &BTreeSet<Issue>| {
            let mut all = from.difference(without);
            let first: Vec<Issue> = all.by_ref().take(MAX_LINES).cloned().collect();
            n_more += all.count();
            first
        };
        let (new, gone) = (first(&now, &self.known), first(&self.known, &now));
        self.known = now;
        IssueChanges { new, gone, n_more }
    }
}

impl IssueChanges {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.new.is_empty() && self.gone.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use lb_core::model::{IssueKind, ObjectRef};

    use super::*;

    fn issues(numbers: impl IntoIterator<Item = usize>) -> Vec<Issue> {
        let of = |n| Issue::new(ObjectRef::service("shop", &format!("web-{n:04}")), IssueKind::NoPorts);
        numbers.into_iter().map(of).collect()
    }

    #[test]
    fn an_issue_is_told_when_it_comes_and_when_it_goes() {
        let mut reported = LoggedIssues::default();
        for (now, new, gone, n_more) in [
            (0..0, 0..0, 0..0, 0),
            (0..2, 0..2, 0..0, 0),
            (0..2, 0..0, 0..0, 0),
            (1..3, 2..3, 0..1, 0),
            (1..1000, 3..103, 0..0, 897),
            (1..1000, 0..0, 0..0, 0),
            (0..0, 0..0, 1..101, 899),
        ] {
            let found = reported.follow(issues(now.clone()));
            assert_eq!(reported.len(), now.len());
            assert_eq!(found, IssueChanges { new: issues(new), gone: issues(gone), n_more }, "{now:?}");
            assert_eq!(found.is_empty(), found == IssueChanges::default());
        }
    }
}
