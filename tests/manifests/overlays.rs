//! The overlays as a whole: accepted by Kubernetes, consistent, and with no more rights than the agent needs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
};

use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{Container, EnvVar, Probe, Service},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use lb_tests::{Feature, require};
use serde_json::Value;

use crate::{
    kustomize,
    rendered::{Rendered, complaints, folder},
};

const OVERLAYS: [&str; 4] =
    ["base", "overlays/kube-proxy-free", "overlays/beside-kube-proxy", "overlays/kind"];

/// Runs a check on every overlay.
fn for_each(check: impl Fn(&str, &Rendered)) {
    for name in OVERLAYS {
        check(name, &Rendered::of(name));
    }
}

fn agent(rendered: &Rendered) -> Container {
    let pod = rendered.one::<DaemonSet>("DaemonSet").spec.unwrap().template.spec.unwrap();
    let [agent] = <[Container; 1]>::try_from(pod.containers).unwrap();
    agent
}

#[test]
fn kubernetes_knows_every_field() {
    for_each(|name, rendered| {
        let wrong: Vec<String> = rendered.0.iter().flat_map(complaints).collect();
        assert!(wrong.is_empty(), "{name}: {wrong:#?}");
    });
    let wrong: Vec<String> = Rendered::of("monitoring").0.iter().flat_map(complaints).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_agent_may_read_what_it_serves_and_write_events_and_nothing_else() {
    for_each(|name, rendered| {
        let role: ClusterRole = rendered.one("ClusterRole");
        let rules: BTreeMap<String, BTreeSet<String>> = role
            .rules
            .unwrap()
            .into_iter()
            .flat_map(|rule| {
                assert!(rule.resource_names.is_none() && rule.non_resource_urls.is_none());
                let verbs: BTreeSet<String> = rule.verbs.into_iter().collect();
                let groups = rule.api_groups.unwrap();
                let of_group = move |group: &String| {
                    let names = rule.resources.iter().flatten().map(move |name| format!("{group}/{name}"));
                    names.map(|name| (name, verbs.clone())).collect::<Vec<_>>()
                };
                groups.iter().flat_map(of_group).collect::<Vec<_>>()
            })
            .collect();
        let (read, write) = (["list", "watch"], ["create", "patch"]);
        let wanted = [
            ("/nodes", read),
            ("/pods", read),
            ("/services", read),
            ("discovery.k8s.io/endpointslices", read),
            ("networking.k8s.io/servicecidrs", read),
            ("events.k8s.io/events", write),
        ];
        let wanted = wanted.map(|(name, verbs)| (name.to_owned(), verbs.map(str::to_owned).into()));
        assert_eq!(rules, wanted.into(), "{name}");

        let binding: ClusterRoleBinding = rendered.one("ClusterRoleBinding");
        let subject = &binding.subjects.unwrap()[0];
        let pod = rendered.one::<DaemonSet>("DaemonSet").spec.unwrap().template.spec.unwrap();
        assert_eq!(Some(&subject.name), pod.service_account_name.as_ref());
        assert_eq!(subject.namespace.as_deref(), Some("kube-system"));
        assert_eq!(binding.role_ref.name, role.metadata.name.unwrap());
    });
}

#[test]
fn the_pod_is_no_more_privileged_than_its_work() {
    for_each(|name, rendered| {
        let pod = rendered.one::<DaemonSet>("DaemonSet").spec.unwrap().template.spec.unwrap();
        assert_eq!(pod.host_network, Some(true), "{name}");
        assert_eq!((pod.host_pid, pod.host_ipc), (None, None), "{name}");
        assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"));
        assert_eq!(pod.security_context.unwrap().seccomp_profile.unwrap().type_, "RuntimeDefault");
        let security = agent(rendered).security_context.unwrap();
        let capabilities = security.capabilities.unwrap();
        assert_eq!(capabilities.drop.unwrap(), ["ALL"]);
        assert_eq!(capabilities.add.unwrap(), ["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN"]);
        assert_eq!(security.privileged, None);
        assert_eq!(security.read_only_root_filesystem, Some(true));
        assert_eq!(security.allow_privilege_escalation, Some(false));
    });
}

#[test]
fn two_agents_never_share_a_node() {
    for_each(|name, rendered| {
        let update = rendered.one::<DaemonSet>("DaemonSet").spec.unwrap().update_strategy.unwrap();
        assert_eq!(update.rolling_update.unwrap().max_surge, Some(IntOrString::Int(0)), "{name}");
    });
}

/// Probes use the agent's listen addresses in the settings.
#[test]
fn probes_ask_at_the_port_of_the_settings() {
    for_each(|name, rendered| {
        let settings = rendered.settings();
        let port = |key: &str| -> i32 {
            let address = settings[key].as_str().unwrap();
            address.parse::<std::net::SocketAddr>().unwrap().port().into()
        };
        let agent = agent(rendered);
        let asks = |probe: Option<Probe>, path: &str| {
            let ask = probe.unwrap().http_get.unwrap();
            assert_eq!(ask.port, IntOrString::Int(port("healthz-bind-address")), "{name} {path}");
            assert_eq!(ask.path.as_deref(), Some(path), "{name}");
        };
        asks(agent.startup_probe, "/livez");
        asks(agent.liveness_probe, "/livez");
        asks(agent.readiness_probe, "/healthz");
        let (metrics, health) = (port("metrics-bind-address"), port("healthz-bind-address"));
        // kube-proxy's ports, unless kube-proxy runs itself.
        let are_kube_proxys = (metrics, health) == (10249, 10256);
        assert_eq!(
            are_kube_proxys,
            !matches!(name, "overlays/beside-kube-proxy" | "overlays/kind"),
            "{name}"
        );
    });
}

/// Every mount has a volume, and the directories of the variables are mounted.
#[test]
fn what_the_agent_is_told_of_is_mounted() {
    for_each(|name, rendered| {
        let pod = rendered.one::<DaemonSet>("DaemonSet").spec.unwrap().template.spec.unwrap();
        let volumes: BTreeSet<String> = pod.volumes.unwrap().into_iter().map(|volume| volume.name).collect();
        let agent = agent(rendered);
        let mounts = agent.volume_mounts.unwrap();
        assert_eq!(mounts.iter().map(|mount| mount.name.clone()).collect::<BTreeSet<_>>(), volumes, "{name}");
        let variables = agent.env.unwrap();
        for (variable, may_write) in
            [("SOCKLB_CONFIG", false), ("SOCKLB_PIN_PATH", true), ("SOCKLB_STATE_DIR", true)]
        {
            let path =
                variables.iter().find(|found| found.name == variable).and_then(|found| found.value.clone());
            let path = path.unwrap_or_else(|| panic!("{name}: {variable}"));
            let mount = mounts.iter().find(|mount| path.starts_with(&mount.mount_path));
            let mount = mount.unwrap_or_else(|| panic!("{name}: {variable}={path} is not mounted"));
            assert_eq!(mount.read_only.unwrap_or_default(), !may_write, "{name}: {variable}");
        }
        for wanted in ["NODE_NAME", "POD_NAME"] {
            assert!(variables.iter().any(|variable| variable.name == wanted), "{name}: {wanted}");
        }
        // The agent finds the host's cgroups among the mounts itself.
        let cgroup = mounts.iter().find(|mount| mount.name == "cgroup").unwrap();
        assert_eq!(cgroup.read_only, Some(true), "{name}");
    });
}

#[test]
fn the_image_is_the_one_that_is_built() {
    for_each(|name, rendered| {
        let agent = agent(rendered);
        assert_eq!(agent.image.unwrap(), concat!("localhost/socklb:", env!("CARGO_PKG_VERSION")), "{name}");
        assert_eq!(agent.command.unwrap(), ["/usr/local/bin/socklb"], "{name}");
    });
}

/// Without kube-proxy nothing serves the API server's Service while the agent starts.
#[test]
fn in_place_of_kube_proxy_the_api_server_is_named() {
    let settings = Rendered::of("overlays/kube-proxy-free").settings();
    assert!(settings["apiserver"].as_str().unwrap().starts_with("https://"), "{settings}");
}

#[test]
fn the_service_monitor_finds_the_agents() {
    let (monitoring, base) = (Rendered::of("monitoring"), Rendered::of("base"));
    let (service, agents): (Service, DaemonSet) = (monitoring.one("Service"), base.one("DaemonSet"));
    let spec = service.spec.unwrap();
    let labels = agents.spec.unwrap().template.metadata.unwrap().labels.unwrap();
    assert!(spec.selector.unwrap().iter().all(|(key, value)| labels.get(key) == Some(value)));
    let monitor = monitoring.0.iter().find(|object| object["kind"] == "ServiceMonitor").unwrap();
    let wanted: BTreeMap<String, String> =
        serde_json::from_value(monitor["spec"]["selector"]["matchLabels"].clone()).unwrap();
    let has = service.metadata.labels.unwrap();
    assert!(wanted.iter().all(|(key, value)| has.get(key) == Some(value)), "{wanted:?}");
    let port = &spec.ports.unwrap()[0];
    assert_eq!(monitor["spec"]["endpoints"][0]["port"], Value::from(port.name.clone()));
}

/// Current kubectl does not warn, and renders the same objects as these tests. Debian 12's (1.20) cannot read
/// the manifests.
#[test]
fn kubectl_renders_the_same_without_a_warning() {
    if !require(Feature::Command("kubectl")) {
        return;
    }
    let version = Command::new("kubectl").args(["version", "--client", "--output", "json"]).output().unwrap();
    let version: Value = serde_json::from_slice(&version.stdout).unwrap();
    if version["kustomizeVersion"].is_null() {
        // Versions before 1.24 do not report theirs. From 1.21 on they do the same.
        return;
    }
    for name in OVERLAYS.into_iter().chain(["monitoring"]) {
        let (ours, theirs) = (Rendered::of(name), Rendered::by_kubectl(&folder().join(name)));
        assert_eq!(without_hashes(&ours), without_hashes(&theirs), "{name}");
    }
}

/// The objects by kind and name, without the hashes of generated names.
fn without_hashes(rendered: &Rendered) -> BTreeMap<(String, String), Value> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let hashed = rendered.0.iter().filter(|object| object["kind"] == "ConfigMap");
    let hashed: Vec<String> = hashed.map(|object| text(&object["metadata"]["name"])).collect();
    let objects = rendered.0.iter().map(|object| {
        let mut json = object.to_string();
        for name in &hashed {
            // `socklb-h7m4g9b2k5`
            if let Some((name_of, hash)) = name.rsplit_once('-').filter(|(_, hash)| hash.len() == 10) {
                json = json.replace(&format!("{name_of}-{hash}"), name_of);
            }
        }
        let object: Value = serde_json::from_str(&json).unwrap();
        ((text(&object["kind"]), text(&object["metadata"]["name"])), object)
    });
    objects.collect()
}

/// A per-node setting as in OPERATIONS.md: Kubernetes expands the names of variables defined earlier.
#[test]
fn a_setting_of_each_node_stands_where_it_works() {
    let page = fs::read_to_string(folder().join("../docs/OPERATIONS.md")).unwrap();
    let mut blocks = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let example = blocks.find(|block| block.contains("$(NODE_NAME)")).unwrap();
    let base = folder().join("overlays/beside-kube-proxy");
    let text = example.replace("../socklb/manifests/overlays/beside-kube-proxy", base.to_str().unwrap());
    assert_ne!(text, example);
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("kustomization.yaml"), text).unwrap();
    let variables = agent(&Rendered(kustomize::render(temp.path()))).env.unwrap();
    let place = |wanted: &dyn Fn(&EnvVar) -> bool| variables.iter().position(wanted).unwrap();
    let takes_it =
        |variable: &EnvVar| variable.value.as_ref().is_some_and(|value| value.contains("$(NODE_NAME)"));
    let (name, taker) = (place(&|variable| variable.name == "NODE_NAME"), place(&takes_it));
    assert!(name < taker, "{variables:#?}");
    // A patch in the form of an object would put its variables before this one.
    assert_eq!(name, 0);
}
