use super::*;

fn web() -> ObjectRef {
    ObjectRef::service("default", "web")
}

#[test]
fn an_issue_names_place_object_field_cause_and_consequence() {
    let issue = Issue {
        source: Some("web.yaml:12".to_owned()),
        ..Issue::new(
            web(),
            IssueKind::InvalidAddress { field: "spec.externalIPs[0]".into(), value: "x".into() },
        )
    };
    assert_eq!(
        issue.to_string(),
        "web.yaml:12: Service default/web: spec.externalIPs[0]: \"x\" is not an IP address; it is left out"
    );
}

#[test]
fn objects_are_named_as_kubectl_does() {
    for (object, expected) in [
        (web(), "Service default/web"),
        (ObjectRef::slice("ns", "web-1"), "EndpointSlice ns/web-1"),
        (ObjectRef::node("node-a"), "Node node-a"),
        (ObjectRef::file("/etc/socklb/web.yaml"), "file /etc/socklb/web.yaml"),
        (ObjectRef { kind: ObjectKind::Other("ConfigMap".into()), ..web() }, "ConfigMap default/web"),
        (ObjectRef::node(""), "Node (without a name)"),
    ] {
        assert_eq!(object.to_string(), expected);
    }
}

/// Names from objects must not forge log lines or control the terminal.
#[test]
fn no_control_character_is_shown() {
    let object = ObjectRef {
        kind: ObjectKind::Other("A\rB".into()),
        namespace: "\u{1b}[2J".into(),
        name: "x\ny".into(),
    };
    let kind = IssueKind::BrokenFile {
        cause: "line\u{85}end, größer".into(),
        last_good: false,
        since: String::new(),
    };
    let issue = Issue { source: Some("a\nb.yaml:1".into()), ..Issue::new(object, kind) };
    assert_eq!(
        issue.to_string(),
        r"a\nb.yaml:1: A\rB \u{1b}[2J/x\ny: line\u{85}end, größer; the file is left out"
    );
}

#[test]
fn the_serialised_form_is_stable() {
    let issue = Issue::new(
        web(),
        IssueKind::FrontendTaken { address: "192.0.2.1:80/tcp".into(), winner: "default/old".into() },
    );
    let json = serde_json::to_value(&issue).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "object": {"kind": "Service", "namespace": "default", "name": "web"},
            "reason": "FrontendTaken",
            "address": "192.0.2.1:80/tcp",
            "winner": "default/old",
        })
    );
    assert_eq!(serde_json::from_value::<Issue>(json).unwrap(), issue);
}

#[test]
fn an_unknown_kind_survives_serialisation() {
    for kind in [ObjectKind::Service, ObjectKind::File, ObjectKind::Other("ConfigMap".into())] {
        let json = serde_json::to_string(&kind).unwrap();
        assert_eq!(serde_json::from_str::<ObjectKind>(&json).unwrap(), kind, "{json}");
    }
}
