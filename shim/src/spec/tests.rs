//! Specs as engines write them, before and after the rewriting.

use super::*;

fn spec(json: Value) -> BundleSpec {
    BundleSpec::parse(Path::new("/b"), &serde_json::to_vec(&json).unwrap()).unwrap()
}

fn rewritten(json: Value) -> Value {
    let paths = GuestPaths {
        rootfs: "/run/husk/share/c/rootfs".into(),
        mounts: HashMap::from([(1, "/run/husk/share/c/mounts/1".into())]),
        huge_volumes: Vec::new(),
    };
    spec(json)
        .for_guest(&paths, 2, &Neighbours::default())
        .unwrap()
        .spec
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

/// Docker's way.
#[test]
fn a_new_network_that_its_engine_fills_is_the_guests() {
    let json = json!({
        "ociVersion": "1", "root": {"path": "/r"},
        "linux": { "namespaces": [{"type": "network"}, {"type": "uts"}] },
    });
    let namespaces = |spec: BundleSpec| {
        let out = spec.for_guest(&GuestPaths::default(), 1, &Neighbours::default());
        out.unwrap().spec["linux"]["namespaces"].clone()
    };
    let mut docker = spec(json.clone());
    docker.join_network();
    assert_eq!(docker.network_namespace(), NetworkNamespace::New);
    assert_eq!(namespaces(docker), json!([{"type": "uts"}]));
    assert_eq!(namespaces(spec(json)).as_array().unwrap().len(), 2);
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

#[test]
fn the_pods_limit_on_huge_pages_stands_in_for_a_containers() {
    let limited = |mut spec: Value| {
        limit_huge_pages(&mut spec, 4 << 20);
        spec.pointer("/linux/resources/hugepageLimits").cloned()
    };
    let of_pod = json!([{"pageSize": "2MB", "limit": 4 << 20}]);
    assert_eq!(limited(json!({"linux": {}})), Some(of_pod.clone()));
    assert_eq!(
        limited(json!({"linux": {"resources": {"cpu": {}}}})),
        Some(of_pod)
    );
    let own = json!([{"pageSize": "2MB", "limit": 2 << 20}]);
    let with_own = json!({"linux": {"resources": {"hugepageLimits": own}}});
    assert_eq!(limited(with_own), Some(own));
    assert_eq!(limited(json!({})), None);
}

/// A pod's specs as containerd's CRI writes them (1.7 and 2.1 agree on what is in here), with a tmpfs at `shm`.
mod pods {
    use husk_protocol::{JOINED_NAMESPACE, guest_path};
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };

    use super::*;
    use crate::pod::PodSpec;

    const POD: &str = "8fa1";

    fn sandbox(shm: &Path) -> Value {
        json!({
            "ociVersion": "1.2.0", "root": {"path": "rootfs", "readonly": true}, "hostname": "web-0",
            "process": {"args": ["/pause"], "cwd": "/", "oomScoreAdj": -998},
            "annotations": {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": POD},
            "mounts": [
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "ro", "nosuid", "nodev", "noexec"]},
                {"destination": "/etc/resolv.conf", "type": "bind", "source": "/resolv.conf", "options": ["rbind", "ro"]},
            ],
            "linux": {
                "sysctl": {"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "0"},
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                    {"type": "network", "path": "/var/run/netns/cni-1"},
                ],
            },
        })
    }

    fn member(shm: &Path) -> Value {
        json!({
            "ociVersion": "1.2.0", "root": {"path": "rootfs"},
            "process": {"args": ["sh"], "cwd": "/", "env": ["HOSTNAME=web-0"]},
            "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": POD},
            "mounts": [
                {"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "rprivate", "rw"]},
            ],
            "linux": {"namespaces": [
                {"type": "pid"}, {"type": "ipc", "path": "/proc/4711/ns/ipc"}, {"type": "uts", "path": "/proc/4711/ns/uts"},
                {"type": "mount"}, {"type": "network", "path": "/proc/4711/ns/net"}, {"type": "cgroup"},
            ]},
        })
    }

    fn set_namespace(spec: &mut Value, namespace: Value) {
        let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
        list.retain(|ns| ns["type"] != namespace["type"]);
        list.push(namespace);
    }

    /// Its sandbox container's task has the pid 4711, and that of one more 4712.
    fn neighbours(pause: Option<&str>) -> Neighbours {
        let mut by_pid = HashMap::from([(4712, "other".to_owned())]);
        by_pid.extend(pause.map(|id| (4711, id.to_owned())));
        Neighbours {
            by_pid,
            pause: pause.map(str::to_owned),
        }
    }

    fn for_guest(json: Value, pause: Option<&str>) -> GuestSpec {
        spec(json)
            .for_guest(&GuestPaths::default(), 1, &neighbours(pause))
            .unwrap()
    }

    fn refusal(json: &Value) -> String {
        let bytes = serde_json::to_vec(json).unwrap();
        BundleSpec::parse(Path::new("/b"), &bytes)
            .unwrap_err()
            .to_string()
    }

    const NO_SHM: &str = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/8fa1/shm";

    #[test]
    fn the_pods_network_uts_and_ipc_namespaces_are_the_guests() {
        let own = json!([{"type": "pid"}, {"type": "mount"}]);
        let pause = for_guest(sandbox(NO_SHM.as_ref()), None);
        assert_eq!(pause.spec["linux"]["namespaces"], own);
        // They are set for the guest: in a user namespace the container may not.
        assert!(
            pause.spec.get("hostname").is_none() && pause.spec["linux"].get("sysctl").is_none()
        );
        let pod = PodSpec::of_spec(&spec(sandbox(NO_SHM.as_ref())));
        assert_eq!(pod.hostname, "web-0");
        assert_eq!(pod.sysctls["kernel.shm_rmid_forced"], "1");
        assert_eq!(pod.sysctls.len(), 2);
        for there in [Some(POD), None] {
            let mut json = member(NO_SHM.as_ref());
            json["hostname"] = json!("web-0");
            let out = for_guest(json, there);
            assert_eq!(
                out.spec["linux"]["namespaces"],
                json!([{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}])
            );
            assert!(out.spec.get("hostname").is_none() && out.joins.is_empty());
        }
        let alone = PodSpec::of_spec(&spec(member(NO_SHM.as_ref())));
        assert!(alone.hostname.is_empty() && alone.sysctls.is_empty());
        assert_eq!(alone.shm_size_bytes, 0);
    }

    #[test]
    fn shared_processes_are_the_sandbox_containers() {
        let mut json = member(NO_SHM.as_ref());
        set_namespace(
            &mut json,
            json!({"type": "pid", "path": "/proc/4711/ns/pid"}),
        );
        let out = for_guest(json.clone(), Some(POD));
        assert_eq!(out.joins, POD);
        assert_eq!(
            out.spec["linux"]["namespaces"][2],
            json!({"type": "pid", "path": JOINED_NAMESPACE})
        );
        let error = spec(json.clone())
            .for_guest(&GuestPaths::default(), 1, &Neighbours::default())
            .unwrap_err();
        assert!(
            error.to_string().contains("shareProcessNamespace"),
            "{error}"
        );
        // One that is targeted, with a sandbox container or without.
        let path = |pid| json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")});
        set_namespace(&mut json, path(4712));
        for there in [Some(POD), None] {
            let out = for_guest(json.clone(), there);
            assert_eq!(out.joins, "other");
            assert_eq!(out.spec["linux"]["namespaces"][2]["path"], JOINED_NAMESPACE);
        }
        set_namespace(&mut json, path(4713));
        let error = spec(json.clone()).for_guest(&GuestPaths::default(), 1, &neighbours(Some(POD)));
        assert!(error.unwrap_err().to_string().contains("4713"));
        set_namespace(&mut json, json!({"type": "pid"}));
    }

    #[test]
    fn a_pods_own_users_are_one_namespace_of_the_guest() {
        let users = json!({"type": "user", "path": guest_path::USERS});
        let mut member = member(NO_SHM.as_ref());
        set_namespace(
            &mut member,
            json!({"type": "user", "path": "/proc/4711/ns/user"}),
        );
        for there in [Some(POD), None] {
            let out = for_guest(member.clone(), there);
            let own = json!([{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}, users]);
            assert_eq!(out.spec["linux"]["namespaces"], own);
            assert_eq!(out.joins, "");
        }
        // containerd 2.1 pins the sandbox container's; 1.7 has the runtime make it, and the network in it.
        for (user, network) in [
            (
                json!({"type": "user", "path": "/run/containerd/pinned-namespaces/user"}),
                json!({"type": "network", "path": "/var/run/netns/cni-1"}),
            ),
            (json!({"type": "user"}), json!({"type": "network"})),
        ] {
            let mut json = sandbox(NO_SHM.as_ref());
            set_namespace(&mut json, user);
            set_namespace(&mut json, network);
            let range = json!({"containerID": 0, "hostID": 65536, "size": 1000});
            json["linux"]["uidMappings"] = json!([range]);
            json["linux"]["gidMappings"] =
                json!([range, {"containerID": 1000, "hostID": 7, "size": 1}]);
            let pod = PodSpec::of_spec(&spec(json.clone())).users.unwrap();
            assert_eq!(pod.uid_map, "0 65536 1000\n");
            assert_eq!(pod.gid_map, "0 65536 1000\n1000 7 1\n");
            let own = json!([{"type": "pid"}, {"type": "mount"}, users]);
            assert_eq!(for_guest(json, None).spec["linux"]["namespaces"], own);
        }
        let pod = PodSpec::of_spec(&spec(sandbox(NO_SHM.as_ref())));
        assert_eq!(pod.users, None);
    }

    #[test]
    fn who_may_ping_is_told_by_who_they_are_outside() {
        let name = "net.ipv4.ping_group_range";
        let users = Users {
            uid_map: String::new(),
            gid_map: "0 65536 1000\n1000 7 1\n".into(),
        };
        for (inside, outside) in [
            ("0 0", "65536 65536"),
            ("0\t1000", "65536 7"),
            ("999 1000", "66535 7"),
            ("1 0", "65537 65536"),
            ("0 2147483647", "0 2147483647"),
            ("0 1001", "0 1001"),
            ("0", "0"),
            ("all", "all"),
        ] {
            let sysctls = HashMap::from([(name.to_owned(), inside.to_owned())]);
            let made = sysctls_outside(sysctls.clone(), Some(&users));
            assert_eq!(made[name], outside, "{inside}");
            assert_eq!(sysctls_outside(sysctls.clone(), None), sysctls);
        }
    }

    #[test]
    fn a_container_without_a_pod_keeps_what_is_its_own() {
        for annotations in [Value::Null, json!({"io.containerd.runc.v2.group": POD})] {
            let mut json = member(NO_SHM.as_ref());
            json["annotations"] = annotations;
            json["hostname"] = json!("box");
            json["linux"]["sysctl"] = json!({"kernel.shmmax": "1"});
            let out = for_guest(json, Some(POD)).spec;
            assert_eq!(out["hostname"], "box");
            assert_eq!(out["linux"]["sysctl"], json!({"kernel.shmmax": "1"}));
            let types: Vec<_> = out["linux"]["namespaces"]
                .as_array()
                .unwrap()
                .iter()
                .map(|ns| ns["type"].as_str())
                .collect();
            assert_eq!(types, ["pid", "ipc", "uts", "mount", "cgroup"].map(Some));
            assert_eq!(out["mounts"][0]["source"], NO_SHM);
        }
    }

    #[test]
    fn what_a_pod_cannot_have_of_its_host_is_refused_by_its_name() {
        for (typ, field) in [("ipc", "hostIPC"), ("pid", "hostPID")] {
            for mut json in [sandbox(NO_SHM.as_ref()), member(NO_SHM.as_ref())] {
                let list = json["linux"]["namespaces"].as_array_mut().unwrap();
                list.retain(|ns| ns["type"] != typ);
                assert!(
                    refusal(&json).contains(&format!("{field} is not possible")),
                    "{}",
                    refusal(&json)
                );
                json["annotations"] = json!({});
                spec(json);
            }
        }
    }

    #[test]
    fn mounts_that_are_to_appear_on_the_host_are_refused() {
        let with = |source: &str, options: &[&str]| {
            json!({
                "ociVersion": "1", "root": {"path": "/r"},
                "mounts": [{"destination": "/csi", "type": "bind", "source": source, "options": options}],
            })
        };
        let message = refusal(&with("/var/lib/csi", &["rbind", "rshared", "rw"]));
        assert!(
            message.contains("mount /csi") && message.contains("Bidirectional"),
            "{message}"
        );
        refusal(&with("/var/lib/csi", &["bind", "shared"]));
        spec(with("/var/lib/csi", &["rbind", "rslave"]));
        spec(with("/var/lib/csi", &["rbind", "rshared", "rslave"]));
        // The guest's.
        spec(with("/sys", &["rbind", "rshared"]));
    }

    /// In a mount namespace of its own, on a thread of its own. Needs root, as husk does.
    fn with_tmpfs(path: &str, test: impl FnOnce(&Path) + Send) {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let shm = dir.path().join(path);
            std::fs::create_dir_all(&shm).unwrap();
            let tmpfs = Some("tmpfs");
            mount(
                tmpfs,
                &shm,
                tmpfs,
                MsFlags::empty(),
                Some("mode=1777,size=32m"),
            )
            .unwrap();
            test(&shm);
            nix::mount::umount(&shm).unwrap();
        };
        std::thread::scope(|scope| scope.spawn(run).join().unwrap());
    }

    #[test]
    fn the_pods_shared_memory_is_the_guests() {
        // containerd, then CRI-O.
        for path in ["sandboxes/8fa1/shm", "overlay-containers/8fa1/userdata/shm"] {
            with_tmpfs(path, |shm| {
                let pause = spec(sandbox(shm));
                assert_eq!(pause.pod_shm_size(), 32 << 20);
                let binds: Vec<_> = pause.bind_mounts().iter().map(|bind| bind.index).collect();
                assert_eq!(binds, [2]);
                assert_eq!(
                    for_guest(sandbox(shm), None).spec["mounts"][1]["source"],
                    "/run/husk/shm"
                );
                let mut json = member(shm);
                let mappings = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
                json["mounts"][0]["uidMappings"] = mappings.clone();
                json["mounts"][0]["gidMappings"] = mappings;
                let options = json!(["rbind", "rprivate", "rw"]);
                let mount = json!({"destination": "/dev/shm", "type": "bind", "source": "/run/husk/shm", "options": options});
                assert_eq!(for_guest(json, Some(POD)).spec["mounts"][0], mount);
            });
        }
        // Without a sandbox container CRI gives each its own.
        let mut json = member(NO_SHM.as_ref());
        json["mounts"][0] = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "size=64k"]});
        let mut own = spec(json);
        own.share_shm();
        let paths = GuestPaths::default();
        let mount = own
            .for_guest(&paths, 1, &Neighbours::default())
            .unwrap()
            .spec["mounts"][0]
            .clone();
        let options = json!(["rbind", "rprivate", "rw"]);
        assert_eq!(
            mount,
            json!({"destination": "/dev/shm", "type": "bind", "source": "/run/husk/shm", "options": options})
        );
        // The guest has one all the same.
        assert_eq!(
            spec(sandbox(NO_SHM.as_ref())).pod_shm_size(),
            DEFAULT_SHM_SIZE
        );
    }

    #[test]
    fn the_files_of_a_user_namespace_are_mapped_on_the_host() {
        let mut json = member(NO_SHM.as_ref());
        let range = |host: u32| json!({"containerID": 0, "hostID": host, "size": 1000});
        json["mounts"][0] = json!({
            "destination": "/data", "type": "bind", "source": "/data", "options": ["rbind"],
            "uidMappings": [range(65536)], "gidMappings": [range(65536), range(9)],
        });
        let parsed = spec(json);
        let maps = ["uidmap=0:65536:1000", "gidmap=0:65536:1000,0:9:1000"];
        assert_eq!(parsed.bind_mounts()[0].id_maps, maps);
        let paths = GuestPaths {
            mounts: HashMap::from([(0, "/share/0".into())]),
            ..GuestPaths::default()
        };
        let mount = json!({"destination": "/data", "type": "bind", "source": "/share/0", "options": ["rbind"]});
        assert_eq!(
            parsed
                .for_guest(&paths, 1, &Neighbours::default())
                .unwrap()
                .spec["mounts"][0],
            mount
        );
    }

    #[test]
    fn a_volume_at_dev_shm_is_a_volume() {
        with_tmpfs("pods/uid/volumes/kubernetes.io~empty-dir/shm", |shm| {
            let member = spec(member(shm));
            assert_eq!(member.bind_mounts().len(), 1);
        });
        // Nor is a directory of that name, should the engine not have mounted it.
        let dir = tempfile::tempdir_in("/").unwrap();
        let shm = dir.path().join("8fa1/shm");
        std::fs::create_dir_all(&shm).unwrap();
        assert_eq!(spec(member(&shm)).bind_mounts().len(), 1);
    }
}
