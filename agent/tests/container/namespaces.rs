//! Namespaces, made and joined.

use std::fs;

use serde_json::json;

use crate::support::{Bundle, destroy, exec_sh, wait};

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

/// A namespace of the spec that is the joined container's.
fn joined(typ: &str) -> serde_json::Value {
    json!({"type": typ, "path": husk_protocol::JOINED_NAMESPACE})
}

#[tokio::test]
async fn a_pod_that_shares_its_process_namespace() {
    let pause = Bundle::sh("echo up; while :; do sleep 1000 & wait; done");
    let (pause, pause_pid, mut streams) = pause.create().await.unwrap().start().await;
    assert_eq!(streams.line(), "up");
    let member = Bundle::sh(
        "orphan=$(sleep 2000 > /dev/null & echo $!); echo $$; readlink /proc/self/ns/pid; \
         tr '\\0' ' ' < /proc/1/cmdline; echo; echo $orphan; sleep 3000",
    )
    .with_namespace(joined("pid"));
    let member = member.create_joining(Some(&pause)).await.unwrap();
    let (member, member_pid, mut streams) = member.start().await;
    assert_ne!(streams.line(), "1");
    let namespace = fs::read_link(format!("/proc/{pause_pid}/ns/pid")).unwrap();
    assert_eq!(streams.line(), namespace.display().to_string());
    assert!(
        streams.line().contains("echo up"),
        "PID 1 is the first container's"
    );
    let orphan = format!("/proc/{}", streams.line());
    // What a container leaves behind is PID 1's, and seen by everyone.
    let script = format!("grep PPid {orphan}/status");
    assert_eq!(exec_sh(&pause, &script).await.stdout.trim(), "PPid:\t1");
    assert_eq!(exec_sh(&member, &script).await.stdout.trim(), "PPid:\t1");

    destroy(member, member_pid).await;
    let left = exec_sh(
        &pause,
        &format!("test -e {orphan}; echo $?; cat /proc/*/cmdline | tr '\\0' ' '"),
    )
    .await;
    assert!(left.stdout.starts_with("1\n"), "{left:?}");
    assert!(
        left.stdout.contains("echo up") && !left.stdout.contains("3000"),
        "{left:?}"
    );

    // Neither of the other's namespaces that the spec does not name, nor of nobody's, nor of one that has ended.
    let alone = Bundle::sh("echo $$")
        .create_joining(Some(&pause))
        .await
        .unwrap();
    let output = alone.streams.finish(alone.launched).await.unwrap();
    assert_eq!(output.stdout, "1\n");
    alone.container.delete().await.unwrap();
    let nobodys = Bundle::sh("true")
        .with_namespace(joined("pid"))
        .fail()
        .await;
    assert!(nobodys.to_string().contains("names none"), "{nobodys}");
    pause.cgroup().kill().unwrap();
    tokio::task::spawn_blocking(move || wait(pause_pid))
        .await
        .unwrap();
    let late = Bundle::sh("true").with_namespace(joined("pid"));
    let error = late.create_joining(Some(&pause)).await.err().unwrap();
    assert!(error.to_string().contains("it has ended"), "{error}");
    pause.delete().await.unwrap();
}

/// As the shim writes a pod's specs: what is not listed is the guest's own.
#[tokio::test]
async fn a_pod_in_a_user_namespace() {
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let podlike = |script: &str| {
        let bundle = Bundle::sh(script)
            .without_namespace("ipc")
            .without_namespace("uts")
            .without_namespace("network")
            .with("/linux/uidMappings", mappings.clone())
            .with("/linux/gidMappings", mappings.clone());
        for path in [bundle.root(), bundle.root().join("tmp")] {
            std::os::unix::fs::chown(path, Some(100_000), Some(100_000)).unwrap();
        }
        bundle
    };
    let pause = podlike("echo up; sleep 1000").with_namespace(json!({"type": "user"}));
    let (pause, pause_pid, mut streams) = pause.create().await.unwrap().start().await;
    assert_eq!(streams.line(), "up");
    let queue = format!("/dev/mqueue/husk-{pause_pid}");
    let member = podlike(&format!(
        "id -u; for n in user pid uts; do readlink /proc/self/ns/$n; done; ls /sys/class/net | grep -c lo; \
         echo $$; touch /tmp/made {queue} && stat -c %u {queue}; mount -t sysfs s /tmp 2>/dev/null || echo denied"
    ))
    .with_namespace(joined("user"));
    let root = member.root();
    let waiting = member.create_joining(Some(&pause)).await.unwrap();
    let output = waiting.streams.finish(waiting.launched).await.unwrap();
    waiting.container.delete().await.unwrap();
    let lines: Vec<&str> = output.stdout.lines().collect();
    let own = |name: &str| {
        fs::read_link(format!("/proc/self/ns/{name}"))
            .unwrap()
            .display()
            .to_string()
    };
    let user = fs::read_link(format!("/proc/{pause_pid}/ns/user")).unwrap();
    assert_eq!(lines[..2], ["0", &user.display().to_string()], "{output:?}");
    assert_ne!(lines[2], own("pid"));
    assert_eq!(lines[3], own("uts"));
    assert_eq!(lines[4..], ["1", "1", "0", "denied"], "{output:?}");
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&fs::metadata(root.join("tmp/made")).unwrap()),
        100_000
    );
    // The queue is the pod's: there also for who comes later.
    let seen = exec_sh(&pause, &format!("ls {queue} && busybox rm {queue}")).await;
    assert_eq!(seen.stdout.trim(), queue, "{seen:?}");
    destroy(pause, pause_pid).await;
}

#[tokio::test]
async fn a_user_namespace() {
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let bundle = Bundle::sh(
        "id -u; tr -s ' ' < /proc/self/uid_map; stat -c %u /bin/busybox /dev/null; echo x > /dev/null && echo null; \
         touch /tmp/made; mount -t tmpfs t /tmp || echo denied; \
         echo opened > /dev/stdout || echo refused; sleep 1000",
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
    let lines: Vec<String> = (0..7).map(|_| streams.line()).collect();
    assert_eq!(lines[0], "0");
    assert_eq!(lines[1].trim(), "0 100000 65536");
    assert_eq!(lines[2], "0");
    assert_eq!(lines[4], "null", "{lines:?}");
    assert_eq!(lines[5], "denied", "{lines:?}");
    // The streams are its root's, who may open them again.
    assert_eq!(lines[6], "opened", "{lines:?}");
    let script = "id -u; hostname; readlink /proc/self/ns/user; echo opened > /dev/stderr";
    let output = exec_sh(&container, script).await;
    let user = fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(output.stdout, format!("0\nmapped\n{}\n", user.display()));
    assert_eq!(output.stderr, "opened\n");
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
