//! Specs as engines write them, before and after the rewriting.

use super::*;

fn spec(json: Value) -> BundleSpec {
    BundleSpec::parse(Path::new("/b"), &serde_json::to_vec(&json).unwrap()).unwrap()
}

fn rewritten(json: Value) -> Value {
    let paths = GuestPaths {
        rootfs: "/run/husk/share/c/rootfs".into(),
        mounts: HashMap::from([(1, "/run/husk/share/c/mounts/1".into())]),
    };
    spec(json).for_guest(&paths, 2)
}

#[test]
fn each_unusable_bundle_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let load = || BundleSpec::load(dir.path()).unwrap_err().to_string();
    assert!(
        load().starts_with("cannot read the container's spec"),
        "{}",
        load()
    );
    let write = |text: &str| std::fs::write(dir.path().join(CONFIG), text).unwrap();
    write("{\n  \"root\": }");
    assert!(load().contains("line 2"), "{}", load());
    write("{\"ociVersion\": \"1.0.2\"}");
    assert!(load().contains("no root.path"), "{}", load());
    write("[]");
    assert!(load().contains("invalid container spec"), "{}", load());
    assert!(load().contains(&dir.path().display().to_string()));
}

#[test]
fn paths_become_the_guests() {
    let out = rewritten(json!({
        "ociVersion": "1.0.2", "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/d", "type": "bind", "source": "/data", "options": ["rbind", "ro"]},
        ],
        "linux": {"cgroupsPath": "/default/c"}, "unknown": {"kept": 1},
    }));
    assert_eq!(
        out["root"],
        json!({"path": "/run/husk/share/c/rootfs", "readonly": true})
    );
    assert_eq!(out["mounts"][0]["source"], "proc");
    assert_eq!(out["mounts"][1]["source"], "/run/husk/share/c/mounts/1");
    assert_eq!(out["mounts"][1]["options"], json!(["rbind", "ro"]));
    assert_eq!(out["linux"], json!({}));
    assert_eq!(out["unknown"]["kept"], 1);
    assert_eq!(
        spec(json!({"ociVersion": "1", "root": {"path": "rootfs"}})).root_path(),
        Path::new("/b/rootfs")
    );
}

#[test]
fn what_belongs_to_the_host_is_dropped() {
    let out = rewritten(json!({
        "ociVersion": "1.0.2", "root": {"path": "/r"},
        "process": {"cwd": "/", "apparmorProfile": "x", "selinuxLabel": "y"},
        "hooks": {
            "createRuntime": [{"path": "/usr/bin/host"}],
            "startContainer": [{"path": "/bin/inside"}],
        },
        "linux": {
            "mountLabel": "z",
            "namespaces": [
                {"type": "network", "path": "/run/netns/a"}, {"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"},
            ],
            "devices": [
                {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                {"path": "/dev/strange"},
            ],
            "resources": {"cpu": {"cpus": "4-7", "mems": "1", "quota": 5}},
        },
    }));
    assert_eq!(out["process"], json!({"cwd": "/"}));
    assert_eq!(
        out["hooks"],
        json!({"startContainer": [{"path": "/bin/inside"}]})
    );
    assert_eq!(
        out["linux"]["namespaces"],
        json!([{"type": "pid"}, {"type": "ipc"}])
    );
    assert_eq!(out["linux"]["devices"].as_array().unwrap().len(), 1);
    assert_eq!(
        out["linux"]["resources"]["cpu"],
        json!({"cpus": "0-1", "quota": 5})
    );
    assert!(out["linux"].get("mountLabel").is_none());
}

#[test]
fn a_new_network_namespace_stays_new() {
    let out = rewritten(json!({
        "ociVersion": "1.0.2", "root": {"path": "/r"}, "linux": {"namespaces": [{"type": "network"}]},
    }));
    assert_eq!(out["linux"]["namespaces"], json!([{"type": "network"}]));
}

#[test]
fn only_binds_of_host_paths_are_shared() {
    let spec = spec(json!({
        "ociVersion": "1.0.2", "root": {"path": "/r"},
        "mounts": [
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/a", "source": "/a", "options": ["bind"]},
            {"destination": "/b", "type": "bind", "source": "rel", "options": ["rbind"]},
            {"destination": "/dev/x", "type": "bind", "source": "/dev/null"},
            {"destination": "/sys", "type": "bind", "source": "/sys"},
            {"destination": "/devices", "type": "bind", "source": "/devices"},
        ],
    }));
    let binds: Vec<_> = spec
        .bind_mounts()
        .into_iter()
        .map(|b| (b.index, b.source.display().to_string(), b.recursive))
        .collect();
    assert_eq!(
        binds,
        [
            (1, "/a".into(), false),
            (2, "/b/rel".into(), true),
            (5, "/devices".into(), false),
        ]
    );
}

#[test]
fn what_a_bind_mount_may_do_is_read_from_its_options() {
    let bind = |options: &[&str]| {
        let mount =
            json!({"destination": "/d", "type": "bind", "source": "/d", "options": options});
        let spec = spec(json!({"ociVersion": "1", "root": {"path": "/r"}, "mounts": [mount]}));
        let bind = spec.bind_mounts().remove(0);
        (bind.read_only, bind.private)
    };
    assert_eq!(bind(&["rbind"]), (false, false));
    assert_eq!(bind(&["rbind", "rprivate"]), (false, true));
    assert_eq!(bind(&["rbind", "rprivate", "rslave"]), (false, false));
    assert_eq!(bind(&["rbind", "ro"]), (true, true));
    assert_eq!(bind(&["rbind", "rro", "rslave"]), (true, true));
    assert_eq!(bind(&["ro", "rw"]), (false, false));
    assert_eq!(bind(&["rw", "ro"]), (true, true));
}

#[test]
fn the_vm_is_killed_as_its_container_would_be() {
    let score = |process: Value, kind: &str| {
        spec(json!({
            "ociVersion": "1", "root": {"path": "/r"}, "process": process,
            "annotations": {"io.kubernetes.cri.container-type": kind},
        }))
        .oom_score_adj()
    };
    assert_eq!(score(json!({"oomScoreAdj": -500}), ""), -500);
    assert_eq!(score(json!({"cwd": "/"}), ""), 0);
    assert_eq!(score(Value::Null, ""), 0);
    assert_eq!(score(json!({"oomScoreAdj": -998}), "sandbox"), 0);
}

#[test]
fn hints_come_from_the_pod_or_else_the_container() {
    let limits = json!({"memory": {"limit": 1 << 28}, "cpu": {"quota": 200_000, "period": 100_000, "cpus": "0,2"}});
    let own =
        spec(json!({"ociVersion": "1", "root": {"path": "/r"}, "linux": {"resources": limits}}));
    assert_eq!(own.hints().memory_limit, 1 << 28);
    assert_eq!(own.hints().cpuset_cpus, 2);
    let pod = spec(json!({
        "ociVersion": "1", "root": {"path": "/r"}, "linux": {"resources": limits},
        "annotations": {"io.kubernetes.cri.sandbox-memory": "1024"},
    }));
    assert_eq!(
        pod.hints(),
        Hints {
            memory_limit: 1024,
            ..Hints::default()
        }
    );
}
