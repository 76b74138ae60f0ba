//! Label and field selectors, without lists of values (`in`, `notin`).

use serde_json::Value;

use super::store::Refusal;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Exists,
    Absent,
    Equal(String),
    NotEqual(String),
}

impl Test {
    /// Parses `KEY`, `!KEY`, `KEY=VALUE`, `KEY==VALUE` or `KEY!=VALUE`.
    fn parse(term: &str) -> Result<(String, Self), Refusal> {
        let (key, test) = if let Some(key) = term.strip_prefix('!') {
            (key, Self::Absent)
        } else if let Some((key, value)) = term.split_once("!=") {
            (key, Self::NotEqual(value.trim().to_owned()))
        } else if let Some((key, value)) = term.split_once('=') {
            (key, Self::Equal(value.trim_start_matches('=').trim().to_owned()))
        } else {
            (term, Self::Exists)
        };
        let key = key.trim();
        if key.is_empty() || key.contains(char::is_whitespace) {
            let message = format!("unable to parse the selector {term:?}");
            return Err(Refusal::new(400, "BadRequest", message));
        }
        Ok((key.to_owned(), test))
    }

    fn holds(&self, value: Option<&str>) -> bool {
        match self {
            Self::Exists => value.is_some(),
            Self::Absent => value.is_none(),
            Self::Equal(wanted) => value == Some(wanted),
            Self::NotEqual(unwanted) => value != Some(unwanted),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    labels: Vec<(String, Test)>,
    fields: Vec<(String, Test)>,
    namespace: Option<String>,
}

impl Selector {
    pub(super) fn parse(labels: &str, fields: &str, namespace: Option<&str>) -> Result<Self, Refusal> {
        let parse = |text: &str| -> Result<Vec<_>, Refusal> {
            text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(Test::parse).collect()
        };
        let (labels, fields) = (parse(labels)?, parse(fields)?);
        let is_known = |path: &str| {
            matches!(path, "metadata.name" | "metadata.namespace" | "spec.nodeName" | "spec.clusterIP")
        };
        if let Some((path, _)) = fields.iter().find(|(path, _)| !is_known(path)) {
            return Err(Refusal::new(400, "BadRequest", format!("field label not supported: {path}")));
        }
        Ok(Self { labels, fields, namespace: namespace.map(str::to_owned) })
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let field = |path: &str| path.split('.').fold(object, |object, key| &object[key]).as_str();
        self.labels.iter().all(|(key, test)| test.holds(metadata["labels"][key].as_str()))
            // A field that is not set is empty.
            && self.fields.iter().all(|(path, test)| test.holds(Some(field(path).unwrap_or_default())))
            && self.namespace.as_ref().is_none_or(|namespace| metadata["namespace"] == namespace.as_str())
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
            ("", "metadata.name=web,metadata.namespace=shop", true),
            ("", "metadata.name!=web", false),
            ("", "spec.clusterIP!=None", true),
        ] {
            let selector = Selector::parse(labels, fields, None).unwrap();
            assert_eq!(selector.matches(&object), expected, "{labels:?} {fields:?}");
        }
        assert!(!Selector::parse("", "", Some("other")).unwrap().matches(&object));
        for (labels, fields) in [("a in (x)", ""), ("=x", ""), ("", "spec.x=1"), ("", "x")] {
            assert_eq!(Selector::parse(labels, fields, None).unwrap_err().code, 400, "{labels:?} {fields:?}");
        }
    }
}
