//! When the snapshot is written: beside the loop, one at a time.

/// What is to be done about the snapshot on disk.
///
/// A snapshot is written by a task of its own, while changes go on arriving. It holds what there was when its writing
/// began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saving {
    /// Whether something changed that neither the file nor the writing under way holds.
    is_outdated: bool,
    is_writing: bool,
}

impl Saving {
    /// The objects or settings changed.
    pub fn changed(&mut self) {
        self.is_outdated = true;
    }

    /// Whether to write what there is now. If so, say so with [`Self::ended`] when that is over.
    ///
    /// `false` while another one is being written: two would race for the file.
    #[must_use]
    pub fn begin(&mut self) -> bool {
        let begins = self.is_outdated && !self.is_writing;
        if begins {
            *self = Self { is_outdated: false, is_writing: true };
        }
        begins
    }

    /// The writing is over. What was not written is tried again.
    pub fn ended(&mut self, is_written: bool) {
        self.is_writing = false;
        self.is_outdated |= !is_written;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Changed,
        /// A moment to write, and whether that is done.
        Begin(bool),
        Written,
        Failed,
    }

    #[test]
    fn every_change_is_written_in_the_end_by_one_writer_at_a_time() {
        use Step::{Begin, Changed, Failed, Written};
        for (what, steps) in [
            ("nothing to write", &[Begin(false)][..]),
            ("a change", &[Changed, Begin(true), Written, Begin(false)]),
            ("changes are written together", &[Changed, Changed, Begin(true), Written, Begin(false)]),
            ("one at a time", &[Changed, Begin(true), Begin(false), Written]),
            ("a change while writing", &[Changed, Begin(true), Changed, Begin(false), Written, Begin(true)]),
            ("a failure", &[Changed, Begin(true), Failed, Begin(true), Written, Begin(false)]),
            (
                "a change and a failure",
                &[Changed, Begin(true), Changed, Failed, Begin(true), Written, Begin(false)],
            ),
        ] {
            let mut saving = Saving::default();
            for (n, step) in steps.iter().enumerate() {
                match *step {
                    Changed => saving.changed(),
                    Begin(expected) => assert_eq!(saving.begin(), expected, "{what}: step {n}"),
                    Written => saving.ended(true),
                    Failed => saving.ended(false),
                }
            }
        }
    }
}
