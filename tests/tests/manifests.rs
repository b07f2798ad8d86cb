//! The manifests in `deploy/kubernetes`, as `kubectl --dry-run=client` takes them.
//!
//! Even that asks an API server which kinds there are. Here a few lines stand for one: it knows those kinds, and nothing else.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use serde_json::{Value, json};

/// Group, version, kind, plural name, and whether it lives in a namespace.
const KINDS: [(&str, &str, &str, &str, bool); 2] = [
    ("apps", "v1", "DaemonSet", "daemonsets", true),
    ("node.k8s.io", "v1", "RuntimeClass", "runtimeclasses", false),
];

#[test]
fn kubectl_takes_the_manifests() {
    let server = api_server().unwrap();
    let home = tempfile::tempdir().unwrap();
    let create = |what: &[&str]| {
        let out = Command::new("kubectl")
            .env("HOME", home.path())
            .env_remove("KUBECONFIG")
            .args(["--server", &server, "create", "--dry-run=client"])
            .args(["--validate=false", "--output", "json"])
            .args(what)
            .current_dir(repository())
            .output()
            .expect("kubectl (Debian's kubernetes-client) is installed by `make deps`");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        (out.status.success(), said, out.stdout)
    };
    let (ok, said, made) = create(&["--kustomize", "deploy/kubernetes"]);
    assert!(ok, "{said}");
    // One document after another.
    let mut made: Vec<Value> = serde_json::Deserializer::from_slice(&made)
        .into_iter()
        .collect::<Result<_, _>>()
        .unwrap();
    made.sort_by_key(|object| object["kind"].to_string());
    let [installer, class] = made.as_slice() else {
        panic!("{made:#?}");
    };
    assert_eq!(installer["kind"], "DaemonSet");
    assert_eq!(class["kind"], "RuntimeClass");
    assert_eq!(class["handler"], "husk");
    // Where the class sends pods is where the installer goes.
    let node = "/spec/template/spec/nodeSelector/husk.io~1runtime";
    assert_eq!(installer.pointer(node), Some(&json!("true")));
    let scheduling = &class["scheduling"]["nodeSelector"]["husk.io/runtime"];
    assert_eq!(scheduling, "true");
    let version = env!("CARGO_PKG_VERSION");
    for containers in ["initContainers", "containers"] {
        let image = &installer["spec"]["template"]["spec"][containers][0]["image"];
        assert_eq!(image, &format!("husk-installer:{version}"));
    }

    // The server bites.
    let odd = home.path().join("odd.yaml");
    std::fs::write(
        &odd,
        "apiVersion: apps/v1\nkind: DemonSet\nmetadata: { name: x }\n",
    )
    .unwrap();
    let (ok, said, _) = create(&["--filename", odd.to_str().unwrap()]);
    assert!(!ok && said.contains("DemonSet"), "{said}");
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Starts one that serves discovery (`/api`, `/apis`, `/apis/GROUP/VERSION`) as long as the test runs.
fn api_server() -> io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let server = format!("http://{}", listener.local_addr()?);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(&stream));
        }
    });
    Ok(server)
}

fn answer(stream: &TcpStream) -> Option<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    let path = request.split(' ').nth(1)?.split('?').next()?.to_owned();
    // The head ends with an empty line.
    while !lines.next()?.ok()?.is_empty() {}
    let (status, body) = match discovery(&path) {
        Some(body) => ("200 OK", body),
        None => ("404 Not Found", json!({ "kind": "Status", "code": 404 })),
    };
    let body = body.to_string();
    write!(
        &*stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .ok()
}

fn discovery(path: &str) -> Option<Value> {
    match path {
        "/api" => Some(json!({ "kind": "APIVersions", "versions": ["v1"] })),
        "/api/v1" => Some(resources("v1", &[])),
        "/apis" => {
            let groups = KINDS.map(|(group, version, ..)| {
                let version =
                    json!({ "groupVersion": format!("{group}/{version}"), "version": version });
                json!({ "name": group, "versions": [version], "preferredVersion": version })
            });
            Some(json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups }))
        }
        _ => {
            let (group, version) = path.strip_prefix("/apis/")?.split_once('/')?;
            let kind = KINDS
                .iter()
                .find(|kind| (kind.0, kind.1) == (group, version))?;
            let resource = json!({
                "name": kind.3, "singularName": "", "namespaced": kind.4, "kind": kind.2, "verbs": ["create", "get"],
            });
            Some(resources(&format!("{group}/{version}"), &[resource]))
        }
    }
}

fn resources(version: &str, resources: &[Value]) -> Value {
    json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources,
    })
}
