//! Reads a Rust source as tokens: which paths it names, which macros it calls, which part of it is test code.
//!
//! Tokens rather than lines, because comments and strings must not count and a `use` may have any shape; tokens
//! rather than a syntax tree, because paths inside macro calls must count.

use std::ops::RangeInclusive;

use proc_macro2::{Delimiter, Group, Spacing, TokenStream, TokenTree};

/// Words that may stand before a path that starts with `::` and are no segment of it.
const KEYWORDS: &[&str] = &[
    "as", "async", "await", "break", "const", "dyn", "else", "enum", "extern", "false", "fn", "for", "if",
    "impl", "in", "let", "loop", "match", "move", "mut", "pub", "ref", "return", "static", "struct", "trait",
    "true", "type", "unsafe", "where", "while",
];

/// A path such as `crate::tables::Image` or a leaf of a `use` tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UsedPath {
    /// The segments; a glob ends with `*`.
    pub(super) segments: Vec<String>,
    /// Inline modules around it, outermost first.
    pub(super) scope: Vec<String>,
    pub(super) line: usize,
    pub(super) is_test: bool,
}

/// A name and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) name: String,
    pub(super) line: usize,
}

/// What the rules look at.
#[derive(Debug, Default)]
pub(super) struct RustSource {
    pub(super) paths: Vec<UsedPath>,
    /// Macro calls, by the last segment.
    pub(super) macros: Vec<Mark>,
    /// Attributes, by the first segment.
    pub(super) attributes: Vec<Mark>,
    /// Lines of items under `#[cfg(test)]` or `#[test]`.
    pub(super) test_lines: Vec<RangeInclusive<usize>>,
    /// Modules in other files that are declared under `#[cfg(test)]`.
    pub(super) test_modules: Vec<Vec<String>>,
}

impl RustSource {
    /// Reads a source.
    ///
    /// # Errors
    /// The line at which it stops being Rust tokens.
    pub(super) fn parse(text: &str) -> Result<Self, usize> {
        let stream: TokenStream =
            text.parse().map_err(|error: proc_macro2::LexError| error.span().start().line)?;
        let mut source = Self::default();
        source.walk(stream, &Place { scope: Vec::new(), is_test: false });
        Ok(source)
    }

    /// True when the line belongs to a test item.
    pub(super) fn is_test_line(&self, line: usize) -> bool {
        self.test_lines.iter().any(|range| range.contains(&line))
    }

    fn walk(&mut self, stream: TokenStream, place: &Place) {
        let tokens: Vec<TokenTree> = stream.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            if let Some((attribute, width)) = attribute_at(&tokens[at..]) {
                if is_inner(&tokens[at..]) || !marks_test(attribute) {
                    self.attribute(attribute, place);
                    at += width;
                } else {
                    let end = at + item_end(&tokens[at..]);
                    self.attribute(attribute, place);
                    self.test_item(&tokens[at + width..end], place);
                    at = end;
                }
                continue;
            }
            at += self.token(&tokens, at, place);
        }
    }

    /// Handles what starts at `at` and returns how many tokens it took.
    fn token(&mut self, tokens: &[TokenTree], at: usize, place: &Place) -> usize {
        match &tokens[at] {
            TokenTree::Group(group) => {
                self.walk(group.stream(), place);
                1
            }
            TokenTree::Ident(ident) if ident == "use" => {
                let end = at + item_end(&tokens[at..]);
                self.use_tree(&tokens[at + 1..end], &[], place);
                end - at
            }
            TokenTree::Ident(ident) if ident == "mod" => self.module(tokens, at, place),
            TokenTree::Ident(ident) if KEYWORDS.iter().any(|keyword| ident == keyword) => 1,
            TokenTree::Ident(_) => self.path(tokens, at, place),
            TokenTree::Punct(_) if is_double_colon(&tokens[at..]) => {
                let follows_type =
                    at > 0 && matches!(&tokens[at - 1], TokenTree::Punct(punct) if punct.as_char() == '>');
                let next = at + 2;
                if follows_type || !matches!(tokens.get(next), Some(TokenTree::Ident(_))) {
                    2 + usize::from(matches!(tokens.get(next), Some(TokenTree::Ident(_))))
                } else {
                    2 + self.path(tokens, next, place)
                }
            }
            TokenTree::Punct(_) | TokenTree::Literal(_) => 1,
        }
    }

    fn attribute(&mut self, attribute: &Group, place: &Place) {
        if let Some(TokenTree::Ident(name)) = attribute.stream().into_iter().next() {
            self.attributes.push(Mark { name: name.to_string(), line: name.span().start().line });
        }
        self.walk(attribute.stream(), place);
    }

    fn test_item(&mut self, item: &[TokenTree], place: &Place) {
        if let (Some(first), Some(last)) = (item.first(), item.last()) {
            self.test_lines.push(first.span().start().line..=last.span().end().line);
        }
        if let Some(name) = module_in_other_file(item) {
            self.test_modules.push(place.scope.iter().cloned().chain([name]).collect());
        }
        let stream: TokenStream = item.iter().cloned().collect();
        self.walk(stream, &Place { scope: place.scope.clone(), is_test: true });
    }

    fn module(&mut self, tokens: &[TokenTree], at: usize, place: &Place) -> usize {
        if let (Some(TokenTree::Ident(name)), Some(TokenTree::Group(body))) =
            (tokens.get(at + 1), tokens.get(at + 2))
        {
            let mut scope = place.scope.clone();
            scope.push(name.to_string());
            self.walk(body.stream(), &Place { scope, is_test: place.is_test });
            return 3;
        }
        1
    }

    /// Reads `a::b::c`, which starts at `at`, and returns how many tokens it took.
    fn path(&mut self, tokens: &[TokenTree], at: usize, place: &Place) -> usize {
        let mut segments = Vec::new();
        let line = tokens[at].span().start().line;
        let mut next = at;
        while let Some(TokenTree::Ident(ident)) = tokens.get(next) {
            segments.push(ident.to_string());
            next += 1;
            if !is_double_colon(&tokens[next..]) || !matches!(tokens.get(next + 2), Some(TokenTree::Ident(_)))
            {
                break;
            }
            next += 2;
        }
        let is_call = matches!(tokens.get(next), Some(TokenTree::Punct(punct)) if punct.as_char() == '!')
            && matches!(tokens.get(next + 1), Some(TokenTree::Group(_)));
        if is_call && let Some(name) = segments.last() {
            self.macros.push(Mark { name: name.clone(), line });
        }
        let follows_extern_crate =
            at > 0 && matches!(&tokens[at - 1], TokenTree::Ident(word) if word == "crate");
        if segments.len() > 1 || follows_extern_crate {
            self.add_path(segments, line, place);
        }
        next - at
    }

    /// Reads the tree of a `use` into one path for each leaf.
    fn use_tree(&mut self, tokens: &[TokenTree], prefix: &[String], place: &Place) {
        let mut segments = prefix.to_vec();
        let mut line = None;
        let mut is_renamed = false;
        for token in tokens {
            line = line.or(Some(token.span().start().line));
            match token {
                TokenTree::Ident(ident) if ident == "as" => is_renamed = true,
                TokenTree::Ident(_) if is_renamed => {}
                // `use a::{self}` names `a`.
                TokenTree::Ident(ident)
                    if ident == "self" && segments.len() == prefix.len() && !prefix.is_empty() => {}
                TokenTree::Ident(ident) => segments.push(ident.to_string()),
                TokenTree::Punct(punct) if punct.as_char() == '*' => segments.push("*".to_owned()),
                TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                    let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                    for leaf in inner.split(is_comma).filter(|leaf| !leaf.is_empty()) {
                        self.use_tree(leaf, &segments, place);
                    }
                    return;
                }
                TokenTree::Punct(_) | TokenTree::Group(_) | TokenTree::Literal(_) => {}
            }
        }
        if let Some(line) = line.filter(|_| !segments.is_empty()) {
            self.add_path(segments, line, place);
        }
    }

    fn add_path(&mut self, segments: Vec<String>, line: usize, place: &Place) {
        self.paths.push(UsedPath { segments, scope: place.scope.clone(), line, is_test: place.is_test });
    }
}

/// What surrounds a token.
struct Place {
    scope: Vec<String>,
    is_test: bool,
}

/// The brackets of an attribute that starts here, and how many tokens it takes.
fn attribute_at(tokens: &[TokenTree]) -> Option<(&Group, usize)> {
    if !matches!(tokens.first(), Some(TokenTree::Punct(punct)) if punct.as_char() == '#') {
        return None;
    }
    let skip = 1 + usize::from(is_inner(tokens));
    match tokens.get(skip) {
        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Bracket => Some((group, skip + 1)),
        _ => None,
    }
}

/// True for `#!`.
fn is_inner(tokens: &[TokenTree]) -> bool {
    matches!(tokens.get(1), Some(TokenTree::Punct(punct)) if punct.as_char() == '!')
}

/// True for `test`, `cfg(test)` and `cfg(all(test, ..))`, false for `cfg(not(test))`.
fn marks_test(attribute: &Group) -> bool {
    let text: String = attribute.stream().to_string().split_whitespace().collect();
    text == "test" || text.starts_with("cfg(test)") || text.starts_with("cfg(all(test,")
}

/// How many tokens the item takes that starts here, its attributes included.
fn item_end(tokens: &[TokenTree]) -> usize {
    let mut is_use = false;
    for (at, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Ident(ident) if ident == "use" => is_use = true,
            TokenTree::Punct(punct) if punct.as_char() == ';' => return at + 1,
            // The braces of a `use` tree do not end it.
            TokenTree::Group(group) if !is_use && group.delimiter() == Delimiter::Brace => return at + 1,
            TokenTree::Ident(_) | TokenTree::Punct(_) | TokenTree::Group(_) | TokenTree::Literal(_) => {}
        }
    }
    tokens.len()
}

/// The name in `mod name;`.
fn module_in_other_file(item: &[TokenTree]) -> Option<String> {
    let at = item.iter().position(|token| matches!(token, TokenTree::Ident(ident) if ident == "mod"))?;
    match (item.get(at + 1), item.get(at + 2)) {
        (Some(TokenTree::Ident(name)), Some(TokenTree::Punct(end))) if end.as_char() == ';' => {
            Some(name.to_string())
        }
        _ => None,
    }
}

fn is_double_colon(tokens: &[TokenTree]) -> bool {
    matches!(tokens, [TokenTree::Punct(a), TokenTree::Punct(b), ..]
        if a.as_char() == ':' && a.spacing() == Spacing::Joint && b.as_char() == ':')
}

fn is_comma(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == ',')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        RustSource::parse(text).unwrap().paths.into_iter().map(|path| path.segments.join("::")).collect()
    }

    #[test]
    fn a_use_tree_becomes_one_path_for_each_leaf() {
        assert_eq!(paths("use a::{self, b::{c as d, e}, f::*};"), ["a", "a::b::c", "a::b::e", "a::f::*"]);
        assert_eq!(paths("pub(crate) use ::a::b;"), ["a::b"]);
    }

    #[test]
    fn paths_in_expressions_types_and_macro_calls_count() {
        let text = "fn f(x: &a::B<c::D>) -> <E as ::g::H>::I { m!(\"{}\", n::o()); p::<q::R>::s() }";
        assert_eq!(paths(text), ["a::B", "c::D", "g::H", "n::o", "q::R"]);
    }

    #[test]
    fn comments_and_strings_do_not_count() {
        assert_eq!(paths("/// See [`a::b`].\nfn f() { let _s = \"a::b\"; /* a::b */ }"), [""; 0]);
    }

    #[test]
    fn test_items_are_known() {
        let text = "use a::b;\n#[cfg(test)]\nmod tests {\n    use c::d;\n}\nfn f() { e::f() }\n#[cfg(not(test))]\nfn g() {}\n";
        let source = RustSource::parse(text).unwrap();
        let tests: Vec<bool> = source.paths.iter().map(|path| path.is_test).collect();
        assert_eq!(tests, [false, true, false]);
        assert!(source.is_test_line(4));
        assert!(!source.is_test_line(6) && !source.is_test_line(8));
        let source = RustSource::parse("#[cfg(test)]\nmod tests;\nmod real;").unwrap();
        assert_eq!(source.test_modules, [["tests"]]);
    }

    #[test]
    fn an_attribute_on_a_use_does_not_swallow_what_follows() {
        let source = RustSource::parse("#[cfg(test)] use a::{b};\nfn f() { c::d() }").unwrap();
        let tests: Vec<bool> = source.paths.iter().map(|path| path.is_test).collect();
        assert_eq!(tests, [true, false]);
    }

    #[test]
    fn macro_calls_and_attributes_are_marked() {
        let source =
            RustSource::parse("#[ignore = \"slow\"]\nfn f() {\n    std::todo!();\n    if a != (b) {}\n}")
                .unwrap();
        assert_eq!(source.macros, [Mark { name: "todo".to_owned(), line: 3 }]);
        assert_eq!(source.attributes, [Mark { name: "ignore".to_owned(), line: 1 }]);
    }

    #[test]
    fn a_broken_source_names_a_line() {
        assert_eq!(RustSource::parse("fn f() {\n").err(), Some(1));
    }
}
