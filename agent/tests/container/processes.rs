//! What is told of a container's processes, beside what the container itself reads in its `/proc`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use husk_agent::container::Container;
use husk_agent::processes::describe;
use husk_protocol::agent::ProcessTexts;
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::support::{Bundle, destroy, exec_sh, wait};

fn described(container: &Container, init: i32) -> BTreeMap<u32, ProcessTexts> {
    let own = container.cgroup().procs().unwrap();
    let told = describe(Path::new("/proc"), init, &own).unwrap();
    // 0 where nobody has told the kernel the time.
    let stat = fs::read_to_string("/proc/stat").unwrap();
    let booted = stat.lines().find_map(|line| line.strip_prefix("btime "));
    assert_eq!(booted.unwrap(), told.boot_time.to_string());
    let pid = |process: ProcessTexts| (process.pid, process);
    told.processes.into_iter().map(pid).collect()
}

/// The lines of a `status` that stay as they are.
fn settled(status: &[u8]) -> Vec<String> {
    const MOVING: [&str; 5] = ["Rss", "Vm", "State", "voluntary", "nonvoluntary"];
    let text = String::from_utf8(status.to_vec()).unwrap();
    let lines = text
        .lines()
        .filter(|line| MOVING.iter().all(|name| !line.starts_with(name)));
    lines.map(str::to_owned).collect()
}

/// The first fields of a `stat`, but the state.
fn family(stat: &[u8]) -> Vec<String> {
    let text = String::from_utf8(stat.to_vec()).unwrap();
    let fields = text.split_ascii_whitespace().enumerate();
    let fields = fields.filter(|(index, _)| *index != 2).take(7);
    fields.map(|(_, field)| field.to_owned()).collect()
}

/// Runs a container with a pid namespace below its own, and compares.
async fn compare(bundle: fn(Bundle) -> Bundle) {
    let admin = json!(["CAP_SYS_ADMIN"]);
    let all = json!({"bounding": admin, "effective": admin, "permitted": admin});
    let made = Bundle::sh("sleep 1000 & unshare -p -f sleep 2000 & wait");
    let bundle = bundle(made)
        .with("/process/capabilities", all)
        .with("/linux/seccomp", json!(null));
    let (container, pid, _streams) = bundle.create().await.unwrap().start().await;
    let all_run = async {
        loop {
            let told = described(&container, pid);
            let runs = |command: &[u8]| told.values().any(|told| told.cmdline == command);
            if runs(b"sleep\x001000\0") && runs(b"sleep\x002000\0") {
                return told;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let told = timeout(Duration::from_secs(60), all_run).await.unwrap();
    assert_eq!(told.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    for (pid, told) in &told {
        let read = async |file: &str| exec_sh(&container, &format!("cat /proc/{pid}/{file}")).await;
        let status = read("status").await.stdout;
        assert_eq!(settled(&told.status), settled(status.as_bytes()), "{pid}");
        let stat = read("stat").await.stdout;
        assert_eq!(family(&told.stat), family(stat.as_bytes()), "{pid}");
        let cmdline = read("cmdline").await.stdout;
        assert_eq!(told.cmdline, cmdline.as_bytes(), "{pid}");
    }
    destroy(container, pid).await;
}

#[tokio::test]
async fn processes_are_told_of_as_the_container_reads_them() {
    compare(|bundle| bundle).await;
}

#[tokio::test]
async fn users_are_those_of_its_namespace() {
    let mapped = |bundle: Bundle| {
        let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
        std::os::unix::fs::chown(bundle.root(), Some(100_000), Some(100_000)).unwrap();
        bundle
            .with_namespace(json!({"type": "user"}))
            .with("/linux/uidMappings", ids.clone())
            .with("/linux/gidMappings", ids)
            .with(
                "/process/user",
                json!({"uid": 0, "gid": 34, "additionalGids": [4, 5]}),
            )
    };
    compare(mapped).await;
}

#[tokio::test]
async fn a_container_tells_of_those_it_shares_its_pids_with() {
    let first = Bundle::sh("echo up; exec sleep 1000")
        .create()
        .await
        .unwrap();
    let (first, first_pid, mut streams) = first.start().await;
    assert_eq!(streams.line(), "up");
    let shared = json!({"type": "pid", "path": husk_protocol::JOINED_NAMESPACE});
    let second = Bundle::sh("echo up; exec sleep 2000").with_namespace(shared);
    let second = second.create_joining(Some(&first)).await.unwrap();
    let (second, second_pid, mut streams) = second.start().await;
    assert_eq!(streams.line(), "up");
    let other = Bundle::sh("echo up; exec sleep 3000")
        .create()
        .await
        .unwrap();
    let (other, other_pid, mut streams) = other.start().await;
    assert_eq!(streams.line(), "up");

    let told = described(&second, second_pid);
    let commands: Vec<_> = told.values().map(|told| told.cmdline.as_slice()).collect();
    assert_eq!(commands, [b"sleep\x001000\0", b"sleep\x002000\0"]);
    assert!(told.contains_key(&1));

    for (container, pid) in [(second, second_pid), (first, first_pid), (other, other_pid)] {
        destroy(container, pid).await;
    }
}

#[tokio::test]
async fn one_that_has_ended_is_an_error() {
    let (container, pid, _streams) = Bundle::sh("exit 3").create().await.unwrap().start().await;
    assert_eq!(wait(pid), 3);
    let own = container.cgroup().procs().unwrap();
    describe(Path::new("/proc"), pid, &own).unwrap_err();
    container.delete().await.unwrap();
}
