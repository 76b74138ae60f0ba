use serde_json::{Value, json};

use super::*;

#[test]
fn cluster_ips_and_families_are_filled_in_from_each_other() {
    for (given, expected) in [
        (
            json!({"clusterIP": "10.0.0.1"}),
            json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ipFamilies": ["IPv4"]}),
        ),
        (
            json!({"clusterIPs": ["fd00::1", "10.0.0.1"]}),
            json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.0.0.1"], "ipFamilies": ["IPv6", "IPv4"]}),
        ),
        (
            json!({"clusterIP": "10.0.0.1", "ipFamilies": ["IPv4"]}),
            json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ipFamilies": ["IPv4"]}),
        ),
        (
            json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "nonsense"]}),
            json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "nonsense"], "ipFamilies": ["IPv4", "IPv4"]}),
        ),
        (
            json!({"clusterIP": "None"}),
            json!({"clusterIP": "None", "clusterIPs": ["None"], "ipFamilies": []}),
        ),
        (json!({}), json!({"clusterIPs": [], "ipFamilies": []})),
    ] {
        let mut service = serde_json::from_value(json!({"spec": given})).unwrap();
        fill_service(&mut service);
        assert_eq!(service.metadata.namespace.as_deref(), Some("default"));
        let filled: Value = serde_json::to_value(service.spec).unwrap();
        assert_eq!(filled, expected, "{given}");
    }
    let mut without_spec = serde_json::from_value(json!({"metadata": {"namespace": "ns"}})).unwrap();
    fill_service(&mut without_spec);
    assert_eq!(without_spec.metadata.namespace.as_deref(), Some("ns"));
}

/// R4: the API server gives a port without a name the empty one, and TCP to a port without a protocol.
#[test]
fn r4_slice_ports_get_their_defaults() {
    let mut slice = serde_json::from_value(json!({
        "addressType": "IPv4", "ports": [{"port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    }))
    .unwrap();
    fill_slice(&mut slice);
    let ports: Vec<_> =
        slice.ports.unwrap().into_iter().map(|port| (port.name.unwrap(), port.protocol.unwrap())).collect();
    assert_eq!(ports, [(String::new(), "TCP".to_owned()), ("dns".to_owned(), "UDP".to_owned())]);
}
