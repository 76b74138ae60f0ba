use serde_json::json;

use super::*;

fn tree(text: &str) -> Tree {
    serde_saphyr::from_str(text).unwrap()
}

#[test]
fn a_field_is_found_with_its_line() {
    let tree = tree("kind: Service\nspec:\n  ports:\n  - port: 80\n    name: http\n  -\n    port: 81\n");
    for (field, line) in [
        ("kind", 1),
        ("spec.ports[0].port", 4),
        ("spec.ports[0].name", 5),
        ("spec.ports[1].port", 7),
        ("spec.ports[0].nodePort", 4),
        ("spec.ports[9]", 4),
        ("spec.ports[x]", 4),
        ("status.loadBalancer", 1),
        ("kind.of.thing", 1),
        ("", 1),
    ] {
        assert_eq!(tree.line_of(field), line, "{field}");
    }
}

#[test]
fn values_keep_their_types() {
    let text = "a: [1, -2, 1.5, true, null, text, '1', 18446744073709551615]\nb: {c: {}}\n";
    let expected = json!({"a": [1, -2, 1.5, true, null, "text", "1", u64::MAX], "b": {"c": {}}});
    assert_eq!(tree(text).to_json(), expected);
    // JSON is YAML, tabs included.
    let text = format!("{expected:#}").replace("  ", "\t");
    assert_eq!(tree(&text).to_json(), expected);
}

#[test]
fn texts_are_found_by_path() {
    let tree = tree("metadata: {name: web, generation: 3}\n");
    assert_eq!(tree.text(&["metadata", "name"]), Some("web"));
    assert_eq!(tree.text(&["metadata", "generation"]), None);
    assert_eq!(tree.text(&["metadata"]), None);
    assert_eq!(tree.text(&["spec", "name"]), None);
}
