//! Containers do not see each other, nor the host.

use anyhow::{Result, ensure};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("processes", processes),
    test("files", files),
    husk_test("network", network),
    husk_test("kernel_log_and_devices", kernel_log_and_devices),
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
