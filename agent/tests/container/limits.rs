//! Limits that need the memory, cpu, cpuset, io and pids controllers of cgroup v2.
//!
//! A machine with the older hybrid layout gives these to cgroup v1. There the tests can only say so; the
//! testbed runs this same binary with `HUSK_REQUIRE_CONTROLLERS=1`, where saying so is a failure.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Bundle, cgroup_root, destroy, exec, exec_sh};

/// Whether the controllers are v2's.
fn here(controllers: &[&str]) -> bool {
    let available = fs::read_to_string(cgroup_root().join("cgroup.controllers")).unwrap();
    let all = controllers
        .iter()
        .all(|name| available.split_whitespace().any(|other| other == *name));
    assert!(
        all || std::env::var_os("HUSK_REQUIRE_CONTROLLERS").is_none(),
        "cgroup v2 has only: {available}"
    );
    if !all {
        println!(
            "NOT RUN: {controllers:?} belong to cgroup v1 on this machine; the testbed runs this test"
        );
    }
    all
}

fn limited(script: &str, resources: Value) -> Bundle {
    Bundle::sh(script).with("/linux/resources", resources)
}

#[tokio::test]
async fn every_limit_reaches_its_file() {
    if !here(&["memory", "cpu", "cpuset", "pids", "io"]) {
        return;
    }
    let resources = json!({
        "memory": {"limit": 67108864, "reservation": 33554432},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000, "burst": 10000, "cpus": "0-63", "mems": "0"},
        "pids": {"limit": 50},
        "unified": {"memory.high": "60000000"},
    });
    let (container, pid, _streams) = limited("sleep 1000", resources)
        .create()
        .await
        .unwrap()
        .start()
        .await;
    let read = |file: &str| {
        fs::read_to_string(container.cgroup().path().join(file))
            .unwrap()
            .trim()
            .to_owned()
    };
    assert_eq!(read("memory.max"), "67108864");
    assert_eq!(read("memory.low"), "33554432");
    assert_eq!(read("memory.oom.group"), "0");
    assert_eq!(read("cpu.max"), "50000 100000");
    assert_eq!(read("cpu.max.burst"), "10000");
    assert_eq!(read("cpu.weight"), "59");
    assert_eq!(read("pids.max"), "50");
    assert_eq!(read("memory.high"), "59998208");
    assert!(!read("cpuset.cpus").is_empty());
    let update =
        json!({"memory": {"limit": 134217728}, "cpu": {"period": 50000}, "pids": {"limit": -1}});
    container
        .update(update.to_string().as_bytes())
        .await
        .unwrap();
    assert_eq!(read("memory.max"), "134217728");
    assert_eq!(read("cpu.max"), "50000 50000");
    assert_eq!(read("pids.max"), "max");
    assert_eq!(read("memory.low"), "33554432");
    destroy(container, pid).await;
}

#[tokio::test]
async fn a_fork_bomb_stays_inside() {
    if !here(&["pids"]) {
        return;
    }
    let bomb = "i=0; while [ $i -lt 100 ]; do sleep 1000 & i=$((i+1)); done; echo done";
    let output = limited(bomb, json!({"pids": {"limit": 20}})).run().await;
    assert!(output.stderr.contains("fork"), "{output:?}");
}

#[tokio::test]
async fn out_of_memory() {
    if !here(&["memory"]) {
        return;
    }
    let resources = json!({"memory": {"limit": 33554432, "swap": 33554432}});
    let (container, pid, _streams) = limited("sleep 1000", resources)
        .create()
        .await
        .unwrap()
        .start()
        .await;
    assert_eq!(container.cgroup().oom_kills(), 0);
    let hungry = exec_sh(&container, "head -c 100000000 /dev/zero | tail -n 1 | wc -c; dd if=/dev/zero of=/dev/null bs=100M count=1").await;
    assert_ne!(hungry.code, 0, "{hungry:?}");
    assert!(container.cgroup().oom_kills() > 0, "{hungry:?}");
    destroy(container, pid).await;
    let error = limited("true", json!({"memory": {"limit": 4096}}))
        .fail()
        .await;
    assert_eq!(
        error.to_string(),
        "container init was OOM-killed (memory limit too low?)"
    );
}

#[tokio::test]
async fn a_container_full_of_processes_can_still_be_killed() {
    if !here(&["pids"]) {
        return;
    }
    let (container, pid, mut streams) = limited(
        "f() { f | f & }; f; echo bomb; sleep 1000",
        json!({"pids": {"limit": 30}}),
    )
    .create()
    .await
    .unwrap()
    .start()
    .await;
    assert_eq!(streams.line(), "bomb");
    // As often as not there is no room for one more.
    if let Err(error) = exec(&container, json!({"args": ["true"]})).await {
        assert!(error.to_string().contains("pids limit"), "{error}");
    }
    destroy(container, pid).await;
}

#[tokio::test]
async fn huge_pages_and_controls_that_do_not_exist() {
    if !here(&["hugetlb"]) {
        return;
    }
    let resources = json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]});
    let (container, pid, _streams) = Bundle::sh("sleep 1000")
        .with("/linux/resources", resources)
        .create()
        .await
        .unwrap()
        .start()
        .await;
    let read = |file: &str| fs::read_to_string(container.cgroup().path().join(file)).unwrap();
    assert_eq!(read("hugetlb.2MB.max"), "4194304\n");
    assert_eq!(read("hugetlb.2MB.rsvd.max"), "4194304\n");
    destroy(container, pid).await;
    let error = Bundle::sh("true")
        .with("/linux/resources", json!({"unified": {"no.such": "1"}}))
        .fail()
        .await;
    assert!(error.to_string().contains("no.such"), "{error}");
}
