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
