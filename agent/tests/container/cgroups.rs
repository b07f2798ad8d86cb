//! The cgroup as a whole: its processes, freezing, killing, removal.

use serde_json::json;

use crate::support::{Bundle, destroy, exec_sh, wait};

#[tokio::test]
async fn freeze_thaw_and_kill() {
    let bundle = Bundle::sh("sleep 1000 & sleep 1000 & echo up; wait");
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    assert_eq!(streams.line(), "up");
    let procs = container.cgroup().procs().unwrap();
    assert!(procs.contains(&pid) && procs.len() == 3, "{procs:?}");
    container.cgroup().freeze().await.unwrap();
    assert!(container.cgroup().is_frozen());
    container.cgroup().thaw().await.unwrap();
    assert!(!container.cgroup().is_frozen());
    // A frozen container dies as well.
    container.cgroup().freeze().await.unwrap();
    container.cgroup().kill().unwrap();
    let code = tokio::task::spawn_blocking(move || wait(pid))
        .await
        .unwrap();
    assert_eq!(code, 137);
    container.delete().await.unwrap();
    assert!(!container.cgroup().path().exists());
}

#[tokio::test]
async fn cgroups_of_the_containers_own() {
    let bundle = Bundle::sh("mkdir /sys/fs/cgroup/inner && echo 1 > /sys/fs/cgroup/inner/cgroup.procs; echo moved; sleep 1000")
        .with_mount(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}));
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    assert_eq!(streams.line(), "moved");
    assert!(container.cgroup().procs().unwrap().contains(&pid));
    assert_eq!(exec_sh(&container, "echo in").await.stdout, "in\n");
    destroy(container, pid).await;
}

/// As the guest's root may: make cgroups below its own, move into one, and hand controllers down.
#[tokio::test]
async fn who_runs_in_a_cgroup_may_divide_it() {
    let script = "cd /sys/fs/cgroup && mkdir inner && echo $$ > inner/cgroup.procs && \
                  echo > cgroup.subtree_control && echo divided; echo 7 > cgroup.max.depth || echo denied; sleep 1000";
    let mount = |options: serde_json::Value| json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options});
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let mapped = |options| {
        let bundle = Bundle::sh(script)
            .with_namespace(json!({"type": "user"}))
            .with("/linux/uidMappings", mappings.clone())
            .with("/linux/gidMappings", mappings.clone())
            .with_mount(mount(options));
        std::os::unix::fs::chown(bundle.root(), Some(100_000), Some(100_000)).unwrap();
        bundle
    };
    let of_a_user = Bundle::sh(script)
        .with("/process/user", json!({"uid": 33, "gid": 34}))
        .with_mount(mount(json!(["rw"])));
    for bundle in [mapped(json!(["nosuid", "rw"])), of_a_user] {
        let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
        assert_eq!(
            (streams.line(), streams.line()),
            ("divided".into(), "denied".into())
        );
        assert!(container.cgroup().path().join("inner").exists());
        assert_eq!(exec_sh(&container, "echo in").await.stdout, "in\n");
        destroy(container, pid).await;
    }
    let (container, pid, mut streams) = mapped(json!(["ro"])).create().await.unwrap().start().await;
    assert_eq!(streams.line(), "denied");
    let owner = std::fs::metadata(container.cgroup().path()).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner), 0);
    destroy(container, pid).await;
}

#[tokio::test]
async fn deleting_kills_what_is_left() {
    let bundle = Bundle::sh("sleep 1000 & echo up").without_namespace("pid");
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    assert_eq!(streams.line(), "up");
    tokio::task::spawn_blocking(move || wait(pid))
        .await
        .unwrap();
    assert_eq!(container.cgroup().procs().unwrap().len(), 1);
    container.delete().await.unwrap();
    assert!(!container.cgroup().path().exists());
}

#[tokio::test]
async fn an_update_replaces_the_device_rules() {
    let (container, pid, _streams) = Bundle::sh("sleep 1000")
        .with(
            "/linux/devices",
            json!([{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}]),
        )
        .create()
        .await
        .unwrap()
        .start()
        .await;
    let open = "( : > /dev/kmsg ) && echo open";
    assert_eq!(exec_sh(&container, open).await.stdout, "");
    let rules =
        json!({"devices": [{"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"}]});
    container
        .update(rules.to_string().as_bytes())
        .await
        .unwrap();
    assert_eq!(exec_sh(&container, open).await.stdout, "open\n");
    // Nothing said, nothing changed.
    container.update(b"{}").await.unwrap();
    assert_eq!(exec_sh(&container, open).await.stdout, "open\n");
    let none = json!({"devices": [{"allow": false, "access": "rwm"}]});
    container.update(none.to_string().as_bytes()).await.unwrap();
    assert_eq!(exec_sh(&container, open).await.stdout, "");
    assert!(container.update(b"nonsense").await.is_err());
    destroy(container, pid).await;
}
