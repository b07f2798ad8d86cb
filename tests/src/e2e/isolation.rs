//! Containers do not see each other, nor the host.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("processes", processes),
    test("files", files),
    husk_test("network", network),
    husk_test("kernel_log_and_devices", kernel_log_and_devices),
    husk_test("the_vmms_jail", the_vmms_jail),
    husk_test("the_agents_binary", the_agents_binary),
    test("capabilities_and_no_new_privileges", capabilities),
];

fn processes(suite: &Context) -> Result<()> {
    let other = suite.detached(&[], &["sleep", "31415"])?;
    let out = suite
        .sh("ps -o pid,args; ls /proc | grep -c '^[0-9]'")?
        .ok()?;
    ensure!(
        !out.text().contains("31415") && !out.text().contains("containerd"),
        "{out:?}"
    );
    ensure!(out.text().lines().count() < 10, "{out:?}");
    drop(other);
    Ok(())
}

fn files(suite: &Context) -> Result<()> {
    std::fs::write("/tmp/only-on-the-host", "secret")?;
    let other = suite.detached(
        &[],
        &["sh", "-c", "echo secret > /tmp/only-there; exec sleep 1000"],
    )?;
    other.exec(&["cat", "/tmp/only-there"])?.ok()?;
    suite.run(&[], &["cat", "/tmp/only-there"])?.exited(1)?;
    suite
        .run(&[], &["cat", "/tmp/only-on-the-host"])?
        .exited(1)?;
    suite
        .run(&[], &["cat", "/../../../../tmp/only-on-the-host"])?
        .exited(1)?;
    // Neither the share's other directories nor the agent's own files are within reach.
    suite.run(&[], &["ls", "/run/husk"])?.exited(1)?;
    Ok(())
}

fn network(suite: &Context) -> Result<()> {
    let out = suite
        .sh("ls /sys/class/net; cat /proc/net/route | wc -l")?
        .ok()?;
    ensure!(out.text() == "lo\n1", "{out:?}");
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let out = suite.run(&[], &["nc", "-w", "1", "127.0.0.1", &port])?;
    ensure!(
        out.code != 0,
        "the container reached the host's loopback: {out:?}"
    );
    Ok(())
}

fn kernel_log_and_devices(suite: &Context) -> Result<()> {
    suite
        .run(
            &[],
            &[
                "sh",
                "-c",
                "test ! -e /dev/kvm && test ! -e /dev/kmsg && test ! -e /dev/vda",
            ],
        )?
        .ok()?;
    // mknod of a disk may be allowed; opening it is not.
    let out = suite.sh("mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem")?;
    ensure!(out.code != 0, "{out:?}");
    Ok(())
}

fn capabilities(suite: &Context) -> Result<()> {
    let out = suite
        .sh("grep -E 'CapEff|CapBnd|CapAmb|NoNewPrivs' /proc/self/status")?
        .ok()?;
    ensure!(out.text().contains("NoNewPrivs:\t1"), "{out:?}");
    // containerd's default set (oci/spec.go: defaultUnixCaps).
    ensure!(out.text().contains("CapEff:\t00000000a80425fb"), "{out:?}");
    ensure!(out.text().contains("CapBnd:\t00000000a80425fb"), "{out:?}");
    suite
        .run(&[], &["mount", "-t", "tmpfs", "none", "/tmp"])?
        .exited(1)?;
    Ok(())
}

/// `husk doctor --pod` finds of a pod with a volume what the document promises, row by row.
fn the_vmms_jail(suite: &Context) -> Result<()> {
    const DOCUMENT: &str = include_str!("../../../docs/security.md");
    let promises: Vec<(&str, &str)> = DOCUMENT
        .lines()
        .skip_while(|line| !line.starts_with("| check | promise |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .filter_map(|line| line.trim_matches(['|', ' ']).split_once(" | "))
        .collect();
    ensure!(promises.len() >= 9, "{promises:?}");
    let volume = tempfile::tempdir()?;
    let mount = format!(
        "type=bind,src={},dst=/volume,options=rbind:rw",
        volume.path().display()
    );
    let pod = suite.detached(&["--mount", &mount], &["sleep", "1000"])?;
    // As busy as it gets: files opened, a device node made, a socket's worth of output.
    pod.exec(&[
        "sh",
        "-c",
        "echo here > /volume/file; mknod /dev/shm/n b 8 0; mknod /node b 8 0 2>/dev/null && exit 7; ls -lR /etc",
    ])?
    .ok()?;
    let doctor = |arguments: &[&str]| {
        let mut command = Command::new(suite.bin.join("husk"));
        command.arg("doctor").args(arguments).output()
    };
    let told = doctor(&["--pod", &pod.id, "--format", "json"])?;
    ensure!(told.status.success(), "{told:?}");
    let found = String::from_utf8(told.stdout)?
        .lines()
        .map(serde_json::from_str::<serde_json::Value>)
        .collect::<Result<Vec<_>, _>>()?;
    ensure!(found.len() == promises.len(), "{found:?}");
    for (check, promise) in promises {
        let is_kept = found.iter().any(|finding| {
            finding["Check"] == check && finding["Found"] == promise && finding["Verdict"] == "ok"
        });
        ensure!(is_kept, "{check}: {promise}: {found:?}");
    }
    let unknown = doctor(&["--pod", "nobody"])?;
    let words = String::from_utf8(unknown.stderr)?;
    ensure!(
        unknown.status.code() == Some(1) && words.contains(&pod.id),
        "{words}"
    );
    Ok(())
}

/// What a container could reach by a `/proc/self/exe` that the agent resolves (CVE-2019-5736), it has here for the asking: PID 1 of the guest,
/// and the capability to look into it. Nothing of the agent's binary can be changed, its permissions included.
fn the_agents_binary(suite: &Context) -> Result<()> {
    let script = "readlink /proc/1/exe; id -u; chmod 0 /proc/1/exe; touch /proc/1/exe; echo x > /proc/1/exe; true";
    let mut run = suite.spec(&["sh", "-c", script])?;
    if let Some(namespaces) = run.spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|n| n["type"] != "pid");
    }
    for set in ["bounding", "effective", "permitted"] {
        if let Some(set) = run.spec["process"]["capabilities"][set].as_array_mut() {
            set.push("CAP_SYS_PTRACE".into());
        }
    }
    let out = run.run()?;
    ensure!(out.text().lines().last() == Some("0"), "{out:?}");
    let told = String::from_utf8_lossy(&out.stderr);
    let refused = told.matches("Read-only file system").count();
    ensure!(
        refused + told.matches("Text file busy").count() == 3 && refused >= 2,
        "{out:?}"
    );
    Ok(())
}
