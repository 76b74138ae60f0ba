//! kubectl works with the API server of these tests.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use lb_tests::{Feature, apiserver::ApiServer, require};

const MANIFEST: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: '', port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.1.0.1]}]
";

fn kubectl(config: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("kubectl");
    command.arg("--kubeconfig").arg(config).args(arguments);
    command.env("HOME", config.parent().unwrap_or(config));
    command
}

fn run(config: &Path, arguments: &[&str]) -> String {
    let output = kubectl(config, arguments).output().unwrap();
    assert!(output.status.success(), "kubectl {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn kubectl_works_against_the_server() {
    if !require(Feature::Command("kubectl")) {
        return;
    }
    let server = ApiServer::start();
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("kubeconfig");
    let manifest = directory.path().join("web.yaml");
    fs::write(&config, server.kubeconfig()).unwrap();
    fs::write(&manifest, MANIFEST).unwrap();
    let file = manifest.to_str().unwrap();

    let mut watch = kubectl(&config, &["get", "services", "--watch", "-o", "name"]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    let created = run(&config, &["apply", "-f", file]);
    assert_eq!(created, "service/web created\nendpointslice.discovery.k8s.io/web-1 created\n");
    let mut line = String::new();
    BufReader::new(watch.stdout.take().unwrap()).read_line(&mut line).unwrap();
    watch.kill().unwrap();
    watch.wait().unwrap();
    assert_eq!(line, "service/web\n");

    let unchanged = run(&config, &["apply", "-f", file]);
    assert_eq!(unchanged, "service/web unchanged\nendpointslice.discovery.k8s.io/web-1 unchanged\n");
    let allocated =
        run(&config, &["get", "svc", "web", "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort}"]);
    assert_eq!(allocated, "10.96.0.1 30000");
    fs::write(&manifest, MANIFEST.replace("10.1.0.1", "10.1.0.2")).unwrap();
    let changed = run(&config, &["apply", "-f", file]);
    assert!(changed.contains("web-1 configured"), "{changed}");
    run(&config, &["label", "service", "web", "app=web"]);
    assert_eq!(run(&config, &["get", "services", "-A", "-l", "app=web", "-o", "name"]), "service/web\n");
    assert_eq!(run(&config, &["get", "services", "-A", "-l", "!app", "-o", "name"]), "");
    run(&config, &["delete", "-f", file]);
    assert_eq!(server.cluster().services.len() + server.cluster().slices.len(), 0);
}
