//! Label and field selectors.

use serde_json::Value;

use super::store::Refusal;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Exists,
    Absent,
    In(Vec<String>),
    NotIn(Vec<String>),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    labels: Vec<(String, Test)>,
    /// Path, value, and whether it must be equal.
    fields: Vec<(String, String, bool)>,
    namespace: Option<String>,
}

fn invalid(text: &str) -> Refusal {
    Refusal::new(400, "BadRequest", format!("unable to parse the selector {text:?}"))
}

fn parts(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_u32);
    for (index, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect()
}

/// `KEY=VALUE`, `KEY==VALUE` or `KEY!=VALUE`: key, value, and whether they must be equal.
fn equality(text: &str) -> Option<(&str, &str, bool)> {
    let (key, value, is_equal) = match text.split_once("!=") {
        Some((key, value)) => (key, value, false),
        None => {
            text.split_once('=').map(|(key, value)| (key, value.strip_prefix('=').unwrap_or(value), true))?
        }
    };
    Some((key.trim(), value.trim(), is_equal))
}

fn label(text: &str) -> Result<(String, Test), Refusal> {
    if let Some(key) = text.strip_prefix('!') {
        return Ok((key.trim().to_owned(), Test::Absent));
    }
    if let Some((head, list)) = text.split_once('(') {
        let list = list.strip_suffix(')').ok_or_else(|| invalid(text))?;
        let values = list.split(',').map(|value| value.trim().to_owned()).collect();
        return match head.split_whitespace().collect::<Vec<_>>()[..] {
            [key, "in"] => Ok((key.to_owned(), Test::In(values))),
            [key, "notin"] => Ok((key.to_owned(), Test::NotIn(values))),
            _ => Err(invalid(text)),
        };
    }
    if let Some((key, value, is_equal)) = equality(text) {
        let values = vec![value.to_owned()];
        return Ok((key.to_owned(), if is_equal { Test::In(values) } else { Test::NotIn(values) }));
    }
    if text.contains(char::is_whitespace) { Err(invalid(text)) } else { Ok((text.to_owned(), Test::Exists)) }
}

impl Selector {
    pub(super) fn parse(labels: &str, fields: &str, namespace: Option<&str>) -> Result<Self, Refusal> {
        let field = |text: &str| {
            let (path, value, is_equal) = equality(text).ok_or_else(|| invalid(text))?;
            match path {
                "metadata.name" | "metadata.namespace" | "spec.nodeName" => {
                    Ok((path.to_owned(), value.to_owned(), is_equal))
                }
                _ => Err(Refusal::new(400, "BadRequest", format!("field label not supported: {path}"))),
            }
        };
        Ok(Self {
            labels: parts(labels).into_iter().map(label).collect::<Result<_, _>>()?,
            fields: parts(fields).into_iter().map(field).collect::<Result<_, _>>()?,
            namespace: namespace.map(str::to_owned),
        })
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let labels = self.labels.iter().all(|(key, test)| {
            let value = metadata["labels"][key].as_str();
            let is_in =
                |values: &[String]| value.is_some_and(|value| values.iter().any(|listed| listed == value));
            match test {
                Test::Exists => value.is_some(),
                Test::Absent => value.is_none(),
                Test::In(values) => is_in(values),
                Test::NotIn(values) => !is_in(values),
            }
        });
        let fields = self.fields.iter().all(|(path, value, is_equal)| {
            let field = path.split('.').fold(object, |object, key| &object[key]);
            (field.as_str().unwrap_or_default() == value) == *is_equal
        });
        let namespace =
            self.namespace.as_ref().is_none_or(|namespace| metadata["namespace"] == namespace.as_str());
        labels && fields && namespace
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_and_fields_select() {
        let object =
            json!({"metadata": {"name": "web", "namespace": "shop", "labels": {"a.io/b": "c", "empty": ""}}});
        for (labels, fields, expected) in [
            ("", "", true),
            ("a.io/b", "", true),
            ("empty", "", true),
            ("!a.io/b", "", false),
            ("!missing,!other", "", true),
            ("a.io/b=c", "", true),
            ("a.io/b==d", "", false),
            ("a.io/b!=d,missing!=d", "", true),
            ("a.io/b in (x, c),empty", "", true),
            ("a.io/b notin (x, c)", "", false),
            ("missing notin (x)", "", true),
            ("", "metadata.name=web,metadata.namespace=shop", true),
            ("", "metadata.name!=web", false),
        ] {
            let selector = Selector::parse(labels, fields, None).unwrap();
            assert_eq!(selector.matches(&object), expected, "{labels:?} {fields:?}");
        }
        assert!(!Selector::parse("", "", Some("other")).unwrap().matches(&object));
        for (labels, fields) in
            [("a in x", ""), ("a in (x", ""), ("a of (x)", ""), ("", "spec.x=1"), ("", "x")]
        {
            assert_eq!(Selector::parse(labels, fields, None).unwrap_err().code, 400, "{labels:?} {fields:?}");
        }
    }
}
