//! Folds the events of a streaming list into the objects at its end.
//!
//! A server sends the objects of its cache, then the changes since, then the bookmark that ends the list. So
//! an object may be changed or deleted before the list is complete.

use std::collections::BTreeMap;

use lb_core::model::{Issue, ObjectRef};

use super::kinds::Trimmed;

/// The objects so far: the last event of each object counts, as in client-go's reflector.
#[derive(Debug)]
pub(super) struct Fold<M>(BTreeMap<ObjectRef, (Option<M>, Vec<Issue>)>);

impl<M> Fold<M> {
    pub(super) const fn new() -> Self {
        Self(BTreeMap::new())
    }

    pub(super) fn set(&mut self, Trimmed { object, model, issues }: Trimmed<M>) {
        let _before = self.0.insert(object, (model, issues));
    }

    pub(super) fn delete(&mut self, object: &ObjectRef) {
        let _before = self.0.remove(object);
    }

    /// All relevant objects, and the issues of all objects.
    pub(super) fn end(self) -> (Vec<M>, Vec<Issue>) {
        let (models, issues): (Vec<_>, Vec<_>) = self.0.into_values().unzip();
        (models.into_iter().flatten().collect(), issues.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lb_core::model::IssueKind;
    use proptest::prelude::*;

    use super::*;

    /// An event about one of three objects: present, present but irrelevant, or deleted.
    fn event() -> impl Strategy<Value = (u8, Option<Option<u8>>)> {
        (0_u8..3, any::<Option<Option<u8>>>())
    }

    proptest! {
        /// Events of several objects, mixed in any order: the last one of each counts.
        #[test]
        fn the_last_event_of_each_object_counts(events in prop::collection::vec(event(), 0..12)) {
            let (mut fold, mut expected) = (Fold::new(), BTreeMap::new());
            for (name, state) in events {
                let object = ObjectRef::service("shop", &name.to_string());
                if let Some(model) = state {
                    let cause = format!("{name} {model:?}");
                    let issues = vec![Issue::new(object.clone(), IssueKind::Unreadable { cause })];
                    let _before = expected.insert(object.clone(), (model, issues.clone()));
                    fold.set(Trimmed { object, model, issues });
                } else {
                    let _before = expected.remove(&object);
                    fold.delete(&object);
                }
            }
            let (models, issues) = fold.end();
            prop_assert_eq!(models, expected.values().filter_map(|(model, _)| *model).collect::<Vec<_>>());
            prop_assert_eq!(issues, expected.into_values().flat_map(|(_, issues)| issues).collect::<Vec<_>>());
        }
    }
}
