//! Namespaces, made and joined.

use std::fs;

use serde_json::json;

use crate::support::{Bundle, destroy, exec_sh};

#[tokio::test]
async fn a_world_of_its_own() {
    let output = Bundle::sh("echo $$; ls -d /proc/[0-9]* | wc -l; hostname; cat /proc/sys/kernel/domainname; ip -o link | grep -c .; cat /sys/class/net/lo/operstate; ip -o addr show lo | grep -c 127.0.0.1")
        .with("/hostname", json!("box"))
        .with("/domainname", json!("example.org"))
        .run()
        .await;
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[0], "1", "{output:?}");
    assert!(lines[1].parse::<u32>().unwrap() <= 4, "{output:?}");
    assert_eq!(lines[2..4], ["box", "example.org"], "{output:?}");
    assert_eq!(lines.last().unwrap(), &"1", "{output:?}");
}

#[tokio::test]
async fn none_but_a_mount_namespace() {
    let output =
        Bundle::sh("for n in pid uts ipc net cgroup user time; do readlink /proc/self/ns/$n; done")
            .with("/linux/namespaces", json!([{"type": "mount"}]))
            .run()
            .await;
    let own: Vec<String> = ["pid", "uts", "ipc", "net", "cgroup", "user", "time"]
        .iter()
        .map(|n| {
            fs::read_link(format!("/proc/self/ns/{n}"))
                .unwrap()
                .display()
                .to_string()
        })
        .collect();
    assert_eq!(output.stdout.lines().collect::<Vec<_>>(), own);
}

#[tokio::test]
async fn namespaces_are_joined_by_path() {
    let (first, pid, mut streams) = Bundle::sh("echo up; sleep 1000")
        .create()
        .await
        .unwrap()
        .start()
        .await;
    assert_eq!(streams.line(), "up");
    let path = |name: &str| format!("/proc/{pid}/ns/{name}");
    let mut second = Bundle::sh(
        "for n in pid ipc net uts; do readlink /proc/self/ns/$n; done; ls -d /proc/[0-9]* | wc -l",
    );
    for (typ, file) in [
        ("pid", "pid"),
        ("ipc", "ipc"),
        ("network", "net"),
        ("uts", "uts"),
    ] {
        second = second.with_namespace(json!({"type": typ, "path": path(file)}));
    }
    let output = second.run().await;
    let lines: Vec<&str> = output.stdout.lines().collect();
    for (line, name) in lines.iter().zip(["pid", "ipc", "net", "uts"]) {
        assert_eq!(
            **line,
            *fs::read_link(path(name)).unwrap().as_os_str(),
            "{output:?}"
        );
    }
    // The first container's processes are there too.
    assert!(lines[4].parse::<u32>().unwrap() >= 3, "{output:?}");
    let error = Bundle::sh("true")
        .with_namespace(json!({"type": "ipc", "path": "/no/such"}))
        .fail()
        .await;
    assert!(error.to_string().contains("\"/no/such\""), "{error}");
    destroy(first, pid).await;
}

#[tokio::test]
async fn a_user_namespace() {
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let bundle = Bundle::sh(
        "id -u; tr -s ' ' < /proc/self/uid_map; stat -c %u /bin/busybox /dev/null; echo x > /dev/null && echo null; \
         touch /tmp/made; mount -t tmpfs t /tmp || echo denied; sleep 1000",
    )
    .with_namespace(json!({"type": "user"}))
    .with("/linux/uidMappings", mappings.clone())
    .with("/linux/gidMappings", mappings)
    .with("/process/rlimits", json!([{"type": "RLIMIT_NOFILE", "hard": 10_000, "soft": 1024}]))
    .with("/hostname", json!("mapped"));
    let root = bundle.root();
    for path in [&root, &root.join("tmp"), &root.join("bin/busybox")] {
        std::os::unix::fs::chown(path, Some(100_000), Some(100_000)).unwrap();
    }
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    let lines: Vec<String> = (0..6).map(|_| streams.line()).collect();
    assert_eq!(lines[0], "0");
    assert_eq!(lines[1].trim(), "0 100000 65536");
    assert_eq!(lines[2], "0");
    assert_eq!(lines[4], "null", "{lines:?}");
    assert_eq!(lines[5], "denied", "{lines:?}");
    let output = exec_sh(&container, "id -u; hostname; readlink /proc/self/ns/user").await;
    let user = fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(output.stdout, format!("0\nmapped\n{}\n", user.display()));
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&fs::metadata(root.join("tmp/made")).unwrap()),
        100_000
    );
    destroy(container, pid).await;
}

#[tokio::test]
async fn time_offsets() {
    let bundle = Bundle::sh("cat /proc/uptime; sleep 1000")
        .with_namespace(json!({"type": "time"}))
        .with(
            "/linux/timeOffsets",
            json!({"boottime": {"secs": 1_000_000}, "monotonic": {"secs": 5, "nanosecs": 7}}),
        );
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    let seconds = |line: &str| line.split('.').next().unwrap().parse::<u64>().unwrap();
    assert!(seconds(&streams.line()) > 1_000_000);
    let exec = exec_sh(&container, "cat /proc/uptime").await;
    assert!(seconds(&exec.stdout) > 1_000_000);
    destroy(container, pid).await;
}

#[tokio::test]
async fn sysctls_of_the_namespaces() {
    let output = Bundle::sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced /proc/sys/fs/mqueue/msg_max")
        .with(
            "/linux/sysctl",
            json!({"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "fs/mqueue/msg_max": "77"}),
        )
        .run()
        .await;
    assert_eq!(output.stdout, "1\n1\n77\n");
    let error = Bundle::sh("true")
        .with("/linux/sysctl", json!({"net.no.such": "1"}))
        .fail()
        .await;
    assert!(error.to_string().contains("net.no.such"), "{error}");
}
