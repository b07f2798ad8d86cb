//! What has led out of containers elsewhere (docs/security.md): file systems, paths and specs made to do so.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::symlink;

use husk_agent::container::{Container, Io};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};

use crate::support::{Bundle, Output, destroy, exec, wait};

/// A directory of the host that every process inherits that does not see to it.
fn leak() -> OwnedFd {
    let leaked = OwnedFd::from(fs::File::open("/").unwrap());
    fcntl_setfd(&leaked, FdFlags::empty()).unwrap();
    leaked
}

/// What a process says that has been given a terminal.
async fn on_a_terminal(launched: husk_agent::container::Launched) -> String {
    let mut master = fs::File::from(launched.console.unwrap());
    let pid = launched.pid;
    launched.gate.release().await.unwrap();
    let read = move || {
        let mut text = String::new();
        // A hung-up terminal reads as an error.
        let _ = std::io::Read::read_to_string(&mut master, &mut text);
        wait(pid);
        text
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

/// CVE-2024-21626.
#[tokio::test]
async fn a_working_directory_by_descriptor_is_no_way_out() {
    const WHERE: &str = "pwd -P; stat -c %d:%i ../../../../../../../../../.. /";
    let leaked = leak();
    let is_inside = |output: &Output| {
        let lines: Vec<&str> = output.stdout.lines().collect();
        let [directory, top, root] = lines[..] else {
            panic!("{output:?}")
        };
        directory.starts_with('/') && top == root
    };
    let mut bundle = Bundle::sh(WHERE);
    let (container, pid, mut streams) = Bundle::sh("mkdir /ways; echo made; sleep 1000")
        .create()
        .await
        .map(|waiting| waiting.start())
        .unwrap()
        .await;
    assert_eq!(streams.line(), "made");
    for number in (3..16).chain([leaked.as_raw_fd()]) {
        let way = format!("/proc/self/fd/{number}");
        bundle = bundle.with("/process/cwd", json!(way));
        if let Ok(waiting) = bundle.create().await {
            let output = waiting.streams.finish(waiting.launched).await.unwrap();
            assert!(is_inside(&output), "{way}: {output:?}");
            waiting.container.delete().await.unwrap();
        }
        let link = format!("ln -s {way} /ways/{number}");
        crate::support::exec_sh(&container, &link).await;
        for cwd in [way, format!("/ways/{number}")] {
            let process = json!({"args": ["sh", "-c", WHERE], "cwd": cwd});
            if let Ok(output) = exec(&container, process).await {
                assert!(is_inside(&output), "{cwd}: {output:?}");
            }
        }
    }
    destroy(container, pid).await;
}

#[tokio::test]
async fn a_process_has_its_streams_and_no_other_descriptors() {
    // The fourth is that of `ls`.
    const STREAMS: [&str; 4] = ["0", "1", "2", "3"];
    let list = ["ls", "-1", "/proc/self/fd"];
    let _leaked = leak();
    let of = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(of(&Bundle::new(&list).run().await.stdout), STREAMS);
    let (container, pid, _streams) = Bundle::sh("sleep 1000")
        .create()
        .await
        .unwrap()
        .start()
        .await;
    let output = exec(&container, json!({"args": list})).await.unwrap();
    assert_eq!(of(&output.stdout), STREAMS);
    let process = json!({"args": list, "terminal": true}).to_string();
    let launched = container.exec(process.as_bytes(), Io::Terminal).await;
    assert_eq!(of(&on_a_terminal(launched.unwrap()).await), STREAMS);
    destroy(container, pid).await;

    let bundle = Bundle::new(&list).with("/process/terminal", json!(true));
    let spec = bundle.spec.to_string();
    let (container, launched) = Container::create(&bundle.id, spec.as_bytes(), Io::Terminal, None)
        .await
        .unwrap();
    assert_eq!(of(&on_a_terminal(launched).await), STREAMS);
    container.delete().await.unwrap();
}

/// CVE-2019-19921, CVE-2023-27561: masks and read-only paths went to where the link led at their turn.
#[tokio::test]
async fn a_link_at_proc_changes_no_mask() {
    for (link, inside) in [("x/y", "x/y"), ("../../outside", "outside"), ("/x", "x")] {
        let bundle = Bundle::sh(
            "readlink /proc; stat -c %F /proc/keys; echo 1 > /proc/sys/kernel/ns_last_pid || echo refused",
        );
        let outside = bundle.directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::remove_dir(bundle.root().join("proc")).unwrap();
        symlink(link, bundle.root().join("proc")).unwrap();
        let output = bundle.run().await;
        let expected = format!("{link}\ncharacter special file\nrefused\n");
        assert_eq!(output.stdout, expected, "{output:?}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert!(bundle.root().join(inside).is_dir());
    }
}

/// CVE-2025-31133: the mask was the container's `/dev/null`.
#[tokio::test]
async fn a_hostile_dev_null_masks_nothing() {
    for link in [
        "/proc/sys/kernel/core_pattern",
        "/etc/passwd",
        "../../outside",
    ] {
        let bundle = Bundle::sh(
            "stat -c %t:%T /secret; wc -c < /secret; chmod 600 /secret || echo refused; grep -c core_pattern /proc/self/mountinfo",
        );
        let outside = bundle.directory.path().join("outside");
        fs::write(&outside, "outside").unwrap();
        fs::write(bundle.root().join("secret"), "secret").unwrap();
        symlink(link, bundle.root().join("dev/null")).unwrap();
        let bundle = bundle
            // Its `/dev` is the image's.
            .with(
                "/mounts",
                json!([{"destination": "/proc", "type": "proc", "source": "proc"}]),
            )
            .with("/linux/maskedPaths", json!(["/secret"]));
        let output = bundle.run().await;
        assert_eq!(output.stdout, "1:3\n0\nrefused\n0\n", "{link}: {output:?}");
        assert_eq!(fs::read_to_string(&outside).unwrap(), "outside");
    }
}

/// CVE-2025-52565: the terminal was mounted by names that the image had.
#[tokio::test]
async fn a_link_at_dev_console_stays_inside() {
    for link in ["/etc/passwd", "../../outside", "/proc/sys/kernel/hostname"] {
        let bundle = Bundle::sh(
            "stat -c %F /dev/console; tty; echo through > /dev/console",
        )
        .with("/process/terminal", json!(true))
        .with(
            "/mounts",
            json!([{"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]}]),
        );
        let outside = bundle.directory.path().join("outside");
        fs::write(&outside, "outside").unwrap();
        let users = fs::read_to_string(bundle.root().join("etc/passwd")).unwrap();
        symlink(link, bundle.root().join("dev/console")).unwrap();
        let spec = bundle.spec.to_string();
        let (container, launched) =
            Container::create(&bundle.id, spec.as_bytes(), Io::Terminal, None)
                .await
                .unwrap();
        let text = on_a_terminal(launched).await;
        container.delete().await.unwrap();
        assert_eq!(text, "symbolic link\r\n/dev/pts/0\r\nthrough\r\n", "{link}");
        assert_eq!(fs::read_to_string(&outside).unwrap(), "outside");
        let now = fs::read_to_string(bundle.root().join("etc/passwd")).unwrap();
        assert_eq!(now, users);
    }
}

/// CVE-2025-52881: what the runtime wrote to `/proc` went to what the image had there.
#[tokio::test]
async fn a_false_procfs_is_not_written_to() {
    const FILES: [&str; 4] = [
        "sys/net/ipv4/ip_forward",
        "self/attr/exec",
        "self/oom_score_adj",
        "thread-self/attr/exec",
    ];
    let bundle = Bundle::sh("echo ready; sleep 1000");
    let proc = bundle.directory.path().join("proc");
    for file in FILES {
        let file = proc.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "false").unwrap();
    }
    let mounts =
        |kind: Value| json!([kind, {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}]);
    let bundle = bundle
        .with("/mounts", mounts(json!({"destination": "/proc", "type": "bind", "source": proc, "options": ["rbind"]})))
        .with("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}))
        .with("/process/oomScoreAdj", json!(500));
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    assert_eq!(streams.line(), "ready");
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    assert_eq!(score, "500\n");
    let true_procfs = Bundle::sh("cat /proc/sys/net/ipv4/ip_forward")
        .with_namespace(json!({"type": "network", "path": format!("/proc/{pid}/ns/net")}))
        .run()
        .await;
    assert_eq!(true_procfs.stdout, "1\n", "{true_procfs:?}");
    let process = json!({"args": ["true"], "oomScoreAdj": 300});
    assert_eq!(exec(&container, process).await.unwrap().code, 0);
    for file in FILES {
        assert_eq!(fs::read_to_string(proc.join(file)).unwrap(), "false");
    }
    destroy(container, pid).await;
}

/// CVE-2026-41579: nodes were made where the link led.
#[tokio::test]
async fn a_link_at_dev_stays_inside() {
    let bundle = Bundle::sh("stat -c %t:%T /dev/null; readlink /dev/stdout");
    let outside = bundle.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::remove_dir(bundle.root().join("dev")).unwrap();
    symlink("../../outside", bundle.root().join("dev")).unwrap();
    let bundle = bundle.with(
        "/mounts",
        json!([{"destination": "/proc", "type": "proc", "source": "proc"}]),
    );
    let output = bundle.run().await;
    assert_eq!(output.stdout, "1:3\n/proc/self/fd/1\n", "{output:?}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(bundle.root().join("outside/null").exists());
}
