//! What the screen shows, and what a key changes. Pure.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::model::Sort;

/// The user's choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) sort: Sort,
    /// Only rows that contain it.
    pub(super) filter: String,
    /// Whether keys edit the filter.
    pub(super) is_typing: bool,
    pub(super) has_endpoints: bool,
    pub(super) is_paused: bool,
    /// Number of table lines above the first visible one.
    pub(super) scrolled: usize,
}

/// The effect of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Continue.
    GoOn,
    /// Quit.
    Quit,
}

/// Help for the keys, in the last line.
pub(super) const KEYS: &str =
    "q quit  sort: n name c calls r rate x refused o sockets  / filter  e endpoints  space pause";

/// Lines per page key.
const PAGE: usize = 20;

impl View {
    /// The initial view.
    pub(super) fn new(sort: Sort, filter: &str, has_endpoints: bool) -> Self {
        Self {
            sort,
            filter: filter.to_owned(),
            is_typing: false,
            has_endpoints,
            is_paused: false,
            scrolled: 0,
        }
    }

    /// Handles a key. Unknown keys are ignored.
    pub(super) fn press(&mut self, key: KeyEvent) -> Outcome {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            let is_end = matches!(key.code, KeyCode::Char('c' | 'd'));
            return if is_end { Outcome::Quit } else { Outcome::GoOn };
        }
        if self.is_typing {
            self.type_key(key.code);
            return Outcome::GoOn;
        }
        let mut sort = |sort| (self.sort, self.scrolled) = (sort, 0);
        match key.code {
            KeyCode::Char('q') => return Outcome::Quit,
            KeyCode::Char('n') => sort(Sort::Name),
            KeyCode::Char('c') => sort(Sort::Calls),
            KeyCode::Char('r') => sort(Sort::Rate),
            KeyCode::Char('x') => sort(Sort::Refused),
            KeyCode::Char('o') => sort(Sort::Sockets),
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('e') => (self.has_endpoints, self.scrolled) = (!self.has_endpoints, 0),
            KeyCode::Char(' ') => self.is_paused = !self.is_paused,
            KeyCode::Up => self.scrolled = self.scrolled.saturating_sub(1),
            KeyCode::Down => self.scrolled = self.scrolled.saturating_add(1),
            KeyCode::PageUp => self.scrolled = self.scrolled.saturating_sub(PAGE),
            KeyCode::PageDown => self.scrolled = self.scrolled.saturating_add(PAGE),
            KeyCode::Home => self.scrolled = 0,
            _ => {}
        }
        Outcome::GoOn
    }

    fn type_key(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(letter) => self.filter.push(letter),
            _ => return,
        }
        self.scrolled = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pressed(keys: &[KeyCode]) -> (View, Outcome) {
        let mut view = View::new(Sort::Rate, "", true);
        let mut outcome = Outcome::GoOn;
        for key in keys {
            outcome = view.press(KeyEvent::new(*key, KeyModifiers::NONE));
        }
        (view, outcome)
    }

    fn letters(text: &str) -> Vec<KeyCode> {
        text.chars().map(KeyCode::Char).collect()
    }

    #[test]
    fn keys_change_what_is_shown() {
        let start = || View::new(Sort::Rate, "", true);
        for (keys, expected) in [
            (letters("n"), View { sort: Sort::Name, ..start() }),
            (letters("nc"), View { sort: Sort::Calls, ..start() }),
            (letters("x"), View { sort: Sort::Refused, ..start() }),
            (letters("or"), start()),
            (letters("e"), View { has_endpoints: false, ..start() }),
            (letters(" "), View { is_paused: true, ..start() }),
            (letters("  "), start()),
            (vec![KeyCode::Up, KeyCode::Down, KeyCode::PageDown], View { scrolled: 21, ..start() }),
            (vec![KeyCode::Down, KeyCode::Char('n')], View { sort: Sort::Name, ..start() }),
            (letters("z"), start()),
        ] {
            assert_eq!(pressed(&keys), (expected, Outcome::GoOn), "{keys:?}");
        }
    }

    #[test]
    fn a_filter_is_typed_kept_and_cleared() {
        let with = |more: &[KeyCode]| pressed(&[&letters("/qnx")[..], more].concat()).0;
        let typing = with(&[]);
        assert_eq!((typing.filter.as_str(), typing.is_typing, typing.sort), ("qnx", true, Sort::Rate));
        let kept = with(&[KeyCode::Backspace, KeyCode::Enter]);
        assert_eq!((kept.filter.as_str(), kept.is_typing), ("qn", false));
        assert_eq!(with(&[KeyCode::Esc]), View::new(Sort::Rate, "", true));
        assert_eq!(with(&[KeyCode::Enter, KeyCode::Esc]), View::new(Sort::Rate, "", true));
    }

    #[test]
    fn it_ends_when_asked_to() {
        assert_eq!(pressed(&letters("q")).1, Outcome::Quit);
        let mut view = pressed(&letters("/")).0;
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(view.press(control_c), Outcome::Quit, "while typing too");
    }
}
