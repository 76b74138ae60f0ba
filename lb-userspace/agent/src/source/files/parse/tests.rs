use std::fmt::Write;

use proptest::prelude::*;

use super::*;

const WEB: &str = "\
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  clusterIP: 10.0.0.1
  ports:
  - port: 80
";

/// Objects as `line kind of body: name`, then the issues.
fn lines(text: &str) -> Vec<String> {
    let objects = parse("web.yaml", text, None).unwrap();
    let mut lines = Vec::new();
    for object in &objects {
        let body = match &object.body {
            Body::Service(_) => "service",
            Body::Slice(_) => "slice",
            Body::Node(_) => "node",
            Body::ServiceCidr(_) => "cidr",
            Body::Nothing => "nothing",
        };
        lines.push(format!("{} {body}: {}", object.line, object.object));
    }
    lines.extend(objects.iter().flat_map(|object| &object.issues).map(ToString::to_string));
    lines
}

fn error(text: &str) -> (Option<u32>, String) {
    let issue = parse("web.yaml", text, None).unwrap_err();
    (issue.line, issue.cause)
}

#[test]
fn documents_of_the_known_kinds() {
    let text = format!(
        "# comment\n{WEB}---\n---\n# nothing here\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{{addresses: [10.1.0.1]}}]\n---\n\
         {{\"apiVersion\": \"v1\", \"kind\": \"Node\", \"metadata\": {{\"name\": \"node-a\"}}}}\n"
    );
    assert_eq!(
        lines(&text),
        ["2 service: Service default/web", "14 slice: EndpointSlice default/web-1", "21 node: Node node-a"]
    );
}

#[test]
fn files_without_objects() {
    for text in ["", "\n", "# nothing\n", "---\n", "---\n---\n...\n", "null\n", "~\n"] {
        assert_eq!(lines(text), [""; 0], "{text:?}");
    }
}

#[test]
fn lists_and_typed_lists() {
    for (text, expected) in [
        ("apiVersion: v1\nkind: List\nitems: []\n", vec![]),
        ("apiVersion: v1\nkind: List\n", vec![]),
        (
            "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Node\n  metadata: {name: a}\n- apiVersion: \
             v1\n  kind: Secret\n  metadata: {name: b}\n",
            vec![
                "4 node: Node a",
                "7 nothing: Secret b",
                "web.yaml:7: Secret b: unknown kind; it is ignored",
            ],
        ),
        (
            "apiVersion: v1\nkind: NodeList\nitems:\n- metadata: {name: a}\n- metadata:\n    name: b\n",
            vec!["4 node: Node a", "5 node: Node b"],
        ),
        (
            "{\"kind\": \"EndpointSliceList\", \"apiVersion\": \"discovery.k8s.io/v1\", \"items\": [\n{\"metadata\": \
             {\"name\": \"a\", \"namespace\": \"ns\"}, \"addressType\": \"FQDN\", \"endpoints\": null}\n]}",
            vec!["2 nothing: EndpointSlice ns/a"],
        ),
    ] {
        assert_eq!(lines(text), expected, "{text}");
    }
}

#[test]
fn other_kinds_are_told_and_ignored() {
    for (text, expected) in [
        (
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: ns}\n",
            "web.yaml:1: Deployment ns/web: unknown kind; it is ignored",
        ),
        (
            "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: web-1}\n",
            "web.yaml:1: EndpointSlice default/web-1: apiVersion: \"discovery.k8s.io/v1beta1\" is not known, \
             discovery.k8s.io/v1 is; it is ignored",
        ),
        (
            "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: web}\n",
            "web.yaml:1: Service default/web: apiVersion: \"serving.knative.dev/v1\" is not known, v1 is; it is \
             ignored",
        ),
    ] {
        assert_eq!(lines(text)[1..], [expected], "{text}");
    }
}

#[test]
fn an_issue_points_at_the_line_of_its_field() {
    let text = WEB
        .replace("port: 80", "port: 65536")
        .replace("clusterIP:", "externalIPs: [\n  x\n  ]\n  clusterIP:");
    assert_eq!(
        lines(&text),
        [
            "1 service: Service default/web",
            "web.yaml:7: Service default/web: spec.externalIPs[0]: \"x\" is not an IP address; it is left out",
            "web.yaml:11: Service default/web: spec.ports[0].port: 65536 is not a port (1-65535); this port is left out",
            "web.yaml:11: Service default/web: spec.ports: no usable port; the service has no frontend",
        ]
    );
}

#[test]
fn service_cidrs_are_read() {
    let text = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n\
                spec:\n  cidrs:\n  - 10.96.0.0/12\n  - fd00::/8\n---\n\
                apiVersion: networking.k8s.io/v1beta1\nkind: ServiceCIDR\nmetadata: {name: old}\n";
    assert_eq!(
        lines(text),
        [
            "1 cidr: ServiceCIDR kubernetes",
            "9 nothing: ServiceCIDR old",
            "web.yaml:7: ServiceCIDR kubernetes: spec.cidrs[1]: \"fd00::/8\" is too large for service addresses: expected /48 \
             or longer; calls to it pass unchanged",
            "web.yaml:9: ServiceCIDR old: apiVersion: \"networking.k8s.io/v1beta1\" is not known, networking.k8s.io/v1 is; it is \
             ignored",
        ]
    );
}

/// R1: no API server selects by label here, so the file source does.
#[test]
fn r1_labels_select() {
    let label = "metadata:\n  labels: {service.kubernetes.io/service-proxy-name: ours}\n";
    let ours = WEB.replace("metadata:\n", label);
    for (text, name, is_served) in
        [(WEB, None, true), (WEB, Some("ours"), false), (&ours, None, false), (&ours, Some("ours"), true)]
    {
        let objects = parse("web.yaml", text, name).unwrap();
        let Body::Service(service) = &objects[0].body else { panic!("{objects:?}") };
        assert_eq!(service.is_served(), is_served, "{text} {name:?}");
        assert_eq!(objects[0].issues, []);
    }
}

#[test]
fn a_broken_file_names_line_object_and_field() {
    for (text, line, cause) in [
        ("a: b: c\n", 1, "mapping values are not allowed in this context at line 1, column 5"),
        ("just text\n", 1, "not an object: it has no fields"),
        ("- 1\n", 1, "not an object: it has no fields"),
        ("metadata: {name: web}\n", 1, "kind: is missing"),
        ("---\nkind: Service\nmetadata: {name: web}\n", 2, "Service default/web: apiVersion: is missing"),
        ("apiVersion: v1\nkind: List\nitems: {}\n", 3, "List: items: is not a list"),
        ("apiVersion: v1\nkind: NodeList\nitems:\n- 7\n", 4, "not an object: it has no fields"),
        (
            &WEB.replace("port: 80", "port: http"),
            8,
            "Service default/web: spec.ports[0].port: invalid type: string \"http\", expected i32",
        ),
        (
            &WEB.replace("port: 80", "port: 99999999999"),
            8,
            "Service default/web: spec.ports[0].port: invalid value: integer `99999999999`, expected i32",
        ),
        (
            &WEB.replace("clusterIP: 10.0.0.1", "clusterIP: 10"),
            6,
            "Service default/web: spec.clusterIP: invalid type: integer `10`, expected a string",
        ),
        (
            &WEB.replace("spec:", "spec: {}\nspec:"),
            6,
            "duplicate mapping key: spec not allowed here at line 6, column 1",
        ),
    ] {
        assert_eq!(error(text), (Some(line), cause.to_owned()), "{text}");
    }
}

#[test]
fn a_large_file_is_read_and_a_bomb_is_not() {
    // More documents than the crate's default limit.
    let many = format!("---\n{WEB}").repeat(2000);
    assert_eq!(parse("many.yaml", &many, None).unwrap().len(), 2000);

    // Each line expands to ten times the line before.
    let mut bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for (name, inner) in ('b'..='i').zip('a'..) {
        let items = vec![format!("*{inner}"); 10].join(", ");
        writeln!(bomb, "{name}: &{name} [{items}]").unwrap();
    }
    let (line, cause) = error(&bomb);
    assert!(line.is_some() && !cause.contains('\n'), "{line:?} {cause}");

    let deep = format!("a: {}{}\n", "[".repeat(5000), "]".repeat(5000));
    assert!(parse("deep.yaml", &deep, None).is_err());
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "([a-z&*<]{0,2}[:\\-\\[\\]{}#|>!'\"\n ,0-9]{1,3}){0,12}") {
        let _ = parse("any.yaml", &text, None);
    }

    /// Any single edit of a good file gives a result or an error of one line.
    #[test]
    fn no_edit_makes_the_parser_panic(at in 0usize..WEB.len(), with in "[ -~\n]{0,3}") {
        let mut text = WEB.to_owned();
        text.replace_range(at..=at, &with);
        if let Err(issue) = parse("web.yaml", &text, None) {
            prop_assert!(!issue.cause.contains('\n'), "{issue}");
        }
    }
}
