//! The subset of kustomize that the overlays use. It checks them where kubectl is older than they need
//! (1.21), as Debian 12's is. Unknown fields are errors, and so are those that current kubectl warns about.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[derive(Default)]
struct Kustomization {
    api_version: String,
    kind: String,
    namespace: Option<String>,
    resources: Vec<PathBuf>,
    config_map_generator: Vec<Generator>,
    generator_options: Value,
    patches: Vec<Patch>,
    images: Vec<Image>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Generator {
    name: String,
    behavior: Option<String>,
    files: Vec<PathBuf>,
    #[serde(default)]
    options: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    path: Option<PathBuf>,
    /// The patch itself, in place of a file.
    #[serde(rename = "patch")]
    text: Option<String>,
    /// Only for a list of operations.
    target: Option<Target>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Image {
    name: String,
    new_tag: String,
}

/// Renders a folder. Generated names have no hash, and so their references.
pub(crate) fn render(folder: &Path) -> Vec<Value> {
    let read = |path: &Path| {
        fs::read_to_string(folder.join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let this: Kustomization = serde_saphyr::from_str(&read(Path::new("kustomization.yaml")))
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    assert_eq!(this.api_version, "kustomize.config.k8s.io/v1beta1");
    assert_eq!(this.kind, "Kustomization");
    let mut objects: Vec<Value> = Vec::new();
    for path in &this.resources {
        if folder.join(path).is_dir() {
            objects.extend(render(&folder.join(path)));
        } else {
            objects.extend(serde_saphyr::from_multiple::<Value>(&read(path)).unwrap());
        }
    }
    for generator in &this.config_map_generator {
        let name_of = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let data: serde_json::Map<_, _> =
            generator.files.iter().map(|path| (name_of(path), read(path).into())).collect();
        let mut metadata = json!({ "name": generator.name });
        let of_options = [&generator.options, &this.generator_options].map(|options| options.get("labels"));
        if let Some(labels) = of_options.into_iter().flatten().next() {
            metadata["labels"] = labels.clone();
        }
        let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data });
        let is_same = |object: &&mut Value| {
            object["kind"] == "ConfigMap" && object["metadata"]["name"] == generator.name.as_str()
        };
        match (generator.behavior.as_deref(), objects.iter_mut().find(is_same)) {
            (None, None) => objects.push(map),
            (Some("replace"), Some(found)) => found["data"] = map["data"].clone(),
            (behavior, _) => panic!("{}: {behavior:?}", generator.name),
        }
    }
    for patch in this.patches {
        let text = patch.path.map_or_else(|| patch.text.clone().unwrap(), |path| read(&path));
        let change: Value = serde_saphyr::from_str(&text).unwrap();
        let target = patch.target.map_or_else(
            || (change["kind"].clone(), change["metadata"]["name"].clone()),
            |target| (target.kind.into(), target.name.into()),
        );
        let mut found = objects
            .iter_mut()
            .filter(|object| (&object["kind"], &object["metadata"]["name"]) == (&target.0, &target.1));
        let object = found.next().unwrap_or_else(|| panic!("nothing to patch: {target:?}"));
        match change {
            Value::Array(operations) => operations.iter().for_each(|operation| operate(object, operation)),
            change => merge(object, &change),
        }
    }
    for object in &mut objects {
        let is_clusters = object["kind"].as_str().unwrap().starts_with("Cluster");
        if let Some(namespace) = this.namespace.as_deref().filter(|_| !is_clusters) {
            object["metadata"]["namespace"] = namespace.into();
        }
        if let Some(containers) = object.pointer_mut("/spec/template/spec/containers") {
            for container in containers.as_array_mut().unwrap() {
                let found = this.images.iter().find(|image| container["image"] == image.name.as_str());
                if let Some(Image { name, new_tag }) = found {
                    container["image"] = format!("{name}:{new_tag}").into();
                }
            }
        }
    }
    objects
}

/// A strategic merge patch: lists with named items are merged by name, and new items come first.
fn merge(object: &mut Value, change: &Value) {
    match (object, change) {
        (Value::Object(object), Value::Object(change)) => {
            for (key, value) in change {
                merge(object.entry(key.as_str()).or_insert(Value::Null), value);
            }
        }
        (Value::Array(object), Value::Array(change))
            if change.iter().all(|item| item["name"].is_string()) =>
        {
            for (n, item) in change.iter().enumerate() {
                match object.iter_mut().find(|known| known["name"] == item["name"]) {
                    Some(known) => merge(known, item),
                    None => object.insert(n, item.clone()),
                }
            }
        }
        (object, change) => *object = change.clone(),
    }
}

/// An operation of a JSON patch: the only one that documents use.
fn operate(object: &mut Value, operation: &Value) {
    assert_eq!(operation["op"], "add");
    let path = operation["path"].as_str().unwrap().strip_suffix("/-").unwrap();
    object.pointer_mut(path).unwrap().as_array_mut().unwrap().push(operation["value"].clone());
}
