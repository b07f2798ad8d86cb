//! The OCI runtime spec, field by field, through specs that containerd's own flags cannot make.

use anyhow::{Result, ensure};
use husk_tests::spec::SpecRun;
use serde_json::{Value, json};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("root_path_of_the_spec", root_path),
    test("read_only_root", read_only_root),
    test("hostname_and_domainname", hostname),
    test("user_groups_and_umask", user_groups_umask),
    test("capability_sets", capability_sets),
    test("rlimits", rlimits),
    test("seccomp_refuses_with_the_errno_asked_for", seccomp),
    husk_test("seccomp_notify_is_refused", seccomp_notify),
    test("masked_and_read_only_paths", masked_paths),
    test("mounts_of_every_kind", mounts),
    test("mount_targets_are_made_inside_the_root", mount_targets),
    test("devices", devices),
    test("sysctls", sysctls),
    test("oom_score", oom_score),
    test("user_namespace", user_namespace),
    // runc 1.1 of Debian 13 does not know it.
    husk_test("time_namespace", time_namespace),
    test("hooks", hooks),
    test("invalid_specs_are_refused", invalid),
];

/// Makes namespaces of the spec the wanted ones.
fn namespaces(spec: &mut Value, kinds: &[&str]) {
    spec["linux"]["namespaces"] = kinds.iter().map(|kind| json!({ "type": kind })).collect();
}

fn push(spec: &mut Value, pointer: &str, value: Value) {
    if let Some(list) = spec.pointer_mut(pointer).and_then(Value::as_array_mut) {
        list.push(value);
    }
}

fn root_path(suite: &Context) -> Result<()> {
    let out = suite.spec(&["cat", "/etc/group"])?.run()?.ok()?;
    ensure!(out.text().contains("extra:x:2000"), "{out:?}");
    Ok(())
}

fn read_only_root(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["sh", "-c", "echo x > /etc/new || exit 30"])?;
    run.spec["root"]["readonly"] = json!(true);
    let out = run.run()?.exited(30)?;
    ensure!(out.errors().contains("Read-only file system"), "{out:?}");
    Ok(())
}

fn hostname(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["sh", "-c", "hostname; cat /proc/sys/kernel/domainname"])?;
    run.spec["hostname"] = json!("inner");
    run.spec["domainname"] = json!("example.org");
    let out = run.run()?.ok()?;
    ensure!(out.text() == "inner\nexample.org", "{out:?}");
    Ok(())
}

fn user_groups_umask(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["sh", "-c", "id -u; id -g; id -G; umask"])?;
    run.spec["process"]["user"] =
        json!({ "uid": 1000, "gid": 1000, "additionalGids": [2000, 3000], "umask": 0o027 });
    let out = run.run()?.ok()?;
    ensure!(out.text() == "1000\n1000\n1000 2000 3000\n0027", "{out:?}");
    Ok(())
}

fn capability_sets(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["sh", "-c", "grep ^Cap /proc/self/status"])?;
    let (chown, kill, bind) = ("CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE");
    run.spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    run.spec["process"]["capabilities"] = json!({
        "bounding": [chown, kill, bind], "permitted": [chown, bind], "effective": [bind],
        "inheritable": [chown, bind], "ambient": [chown, bind],
    });
    let out = run.run()?.ok()?;
    // CAP_CHOWN 0, CAP_KILL 5, CAP_NET_BIND_SERVICE 10 (linux/capability.h); execve adds the ambient ones.
    for line in [
        "CapInh:\t0000000000000401",
        "CapPrm:\t0000000000000401",
        "CapEff:\t0000000000000401",
        "CapBnd:\t0000000000000421",
        "CapAmb:\t0000000000000401",
    ] {
        ensure!(out.text().contains(line), "no {line:?} in {out:?}");
    }
    Ok(())
}

fn rlimits(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c"])?;
    run.spec["process"]["rlimits"] = json!([
        { "type": "RLIMIT_NOFILE", "soft": 111, "hard": 222 },
        { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
    ]);
    let out = run.run()?.ok()?;
    ensure!(out.text() == "111\n222\n0", "{out:?}");
    Ok(())
}

fn seccomp(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&[
        "sh",
        "-c",
        "mkdir /tmp/d && chmod 777 /tmp/d; grep ^Seccomp: /proc/self/status; sync; echo alive",
    ])?;
    run.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": ["chmod", "fchmodat", "fchmodat2", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
            { "names": ["sync"], "action": "SCMP_ACT_ERRNO" },
        ],
    });
    let out = run.run()?.ok()?;
    ensure!(out.errors().contains("Function not implemented"), "{out:?}");
    ensure!(out.text() == "Seccomp:\t2\nalive", "{out:?}");

    run.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["uname"], "action": "SCMP_ACT_KILL_PROCESS" }],
    });
    run.spec["process"]["args"] = json!(["uname"]);
    run.run()?.exited(128 + 31)?;
    Ok(())
}

fn seccomp_notify(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["true"])?;
    run.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }],
    });
    let out = run.run()?;
    ensure!(
        out.code != 0 && out.errors().contains("SCMP_ACT_NOTIFY"),
        "{out:?}"
    );
    Ok(())
}

fn masked_paths(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&[
        "sh",
        "-c",
        "cat /etc/group | wc -c; ls /home | wc -l; echo x > /etc/passwd || echo refused; echo 1 > /proc/sys/kernel/panic || echo refused",
    ])?;
    run.spec["linux"]["maskedPaths"] = json!(["/etc/group", "/home", "/no/such/path"]);
    run.spec["linux"]["readonlyPaths"] = json!(["/etc/passwd", "/proc/sys", "/nor/this"]);
    let out = run.run()?.ok()?;
    ensure!(out.text() == "0\n0\nrefused\nrefused", "{out:?}");
    Ok(())
}

fn mounts(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir_all(dir.path().join("a/b"))?;
    std::fs::write(dir.path().join("a/b/file"), "deep")?;
    let mut run = suite.spec(&[
        "sh",
        "-c",
        "cat /mnt/t/a/b/file; echo; grep -E ' /(mnt|dev/mqueue)' /proc/self/mounts",
    ])?;
    for mount in [
        json!({ "destination": "/mnt/t", "type": "bind", "source": dir.path(), "options": ["rbind", "ro", "nosuid", "nodev", "noexec", "rprivate"] }),
        json!({ "destination": "/mnt/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "mode=700", "noatime", "nosuid"] }),
        json!({ "destination": "/mnt/proc", "type": "proc", "source": "proc", "options": ["nosuid", "ro"] }),
        json!({ "destination": "/mnt/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] }),
    ] {
        push(&mut run.spec, "/mounts", mount);
    }
    let out = run.run()?.ok()?;
    let text = out.text();
    ensure!(text.starts_with("deep\n"), "{out:?}");
    let options = |point: &str| -> Vec<&str> {
        text.lines()
            .map(|l| l.split(' ').collect::<Vec<_>>())
            .find(|f| f.get(1) == Some(&point))
            .and_then(|f| f.get(3).copied())
            .map(|o| o.split(',').collect())
            .unwrap_or_default()
    };
    for (point, wanted) in [
        ("/mnt/t", &["ro", "nosuid", "nodev", "noexec"][..]),
        (
            "/mnt/tmp",
            &["rw", "noatime", "nosuid", "size=1024k", "mode=700"],
        ),
        ("/mnt/proc", &["ro", "nosuid"]),
        ("/mnt/sys", &["ro"]),
    ] {
        let found = options(point);
        ensure!(
            wanted.iter().all(|o| found.contains(o)),
            "{point} has {found:?}, not {wanted:?}"
        );
    }
    Ok(())
}

fn mount_targets(suite: &Context) -> Result<()> {
    // A link in the image that points out of it must lead nowhere but into the root.
    let link = suite.rootfs.join("escape");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink("../../../../../../run", &link)?;
    let mut run = suite.spec(&[
        "sh",
        "-c",
        "ls -d /run/made/here && grep -c ' /run/made/here ' /proc/self/mounts",
    ])?;
    push(
        &mut run.spec,
        "/mounts",
        json!({ "destination": "/escape/made/here", "type": "tmpfs", "source": "tmpfs" }),
    );
    let out = run.run()?.ok()?;
    ensure!(out.text() == "/run/made/here\n1", "{out:?}");
    Ok(())
}

fn devices(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&[
        "sh",
        "-c",
        "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; readlink /dev/fd; readlink /dev/stdin; \
         stat -c '%a %t:%T %u' /dev/extra; head -c 3 /dev/extra | wc -c; ls -l /dev/ptmx | grep -c pts/ptmx",
    ])?;
    run.spec["linux"]["devices"] = json!([{ "path": "/dev/extra", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 1000, "gid": 0 }]);
    push(
        &mut run.spec,
        "/linux/resources/devices",
        json!({ "allow": true, "type": "c", "major": 1, "minor": 5, "access": "rw" }),
    );
    let out = run.run()?.ok()?;
    ensure!(
        out.text() == "/proc/self/fd\n/proc/self/fd/0\n640 1:5 1000\n3\n1",
        "{out:?}"
    );
    Ok(())
}

fn sysctls(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&[
        "sh",
        "-c",
        "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_forward",
    ])?;
    run.spec["linux"]["sysctl"] =
        json!({ "kernel.shm_rmid_forced": "1", "net.ipv4.ip_forward": "1" });
    let out = run.run()?.ok()?;
    ensure!(out.text() == "1\n1", "{out:?}");
    Ok(())
}

fn oom_score(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["cat", "/proc/self/oom_score_adj"])?;
    run.spec["process"]["oomScoreAdj"] = json!(321);
    let out = run.run()?.ok()?;
    ensure!(out.text() == "321", "{out:?}");
    Ok(())
}

fn with_user_namespace<'a>(suite: &'a Context, command: &[&str]) -> Result<SpecRun<'a>> {
    let mut run = suite.spec(command)?;
    namespaces(
        &mut run.spec,
        &["pid", "ipc", "uts", "mount", "network", "cgroup", "user"],
    );
    run.spec["linux"]["uidMappings"] =
        json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    run.spec["linux"]["gidMappings"] =
        json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    Ok(run)
}

fn user_namespace(suite: &Context) -> Result<()> {
    let run = with_user_namespace(
        suite,
        &["sh", "-c", "id -u; tr -s ' ' < /proc/self/uid_map"],
    )?;
    let out = run.run()?.ok()?;
    ensure!(out.text() == "0\n 0 100000 65536", "{out:?}");
    Ok(())
}

fn time_namespace(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["sh", "-c", "cut -d. -f1 /proc/uptime"])?;
    push(
        &mut run.spec,
        "/linux/namespaces",
        json!({ "type": "time" }),
    );
    run.spec["linux"]["timeOffsets"] = json!({ "boottime": { "secs": 1_000_000, "nanosecs": 0 } });
    let out = run.run()?.ok()?;
    ensure!(out.text().parse::<u64>()? >= 1_000_000, "{out:?}");
    Ok(())
}

fn hooks(suite: &Context) -> Result<()> {
    // A hook that runs in the container is the container's own program; its state comes on stdin.
    let mut run = suite.spec(&["sh", "-c", "cat /tmp/hook"])?;
    run.spec["hooks"] = json!({
        "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/hook"], "timeout": 20 }],
    });
    let out = run.run()?.ok()?;
    let state: Value = serde_json::from_slice(&out.stdout)?;
    ensure!(
        state["id"]
            .as_str()
            .is_some_and(|id| id.starts_with("spec-")),
        "{out:?}"
    );
    ensure!(
        state["ociVersion"].is_string() && state["bundle"].is_string(),
        "{out:?}"
    );
    Ok(())
}

fn invalid(suite: &Context) -> Result<()> {
    for (what, change, words) in [
        (
            "no command",
            (|spec| spec["process"]["args"] = json!([])) as fn(&mut Value),
            "args",
        ),
        (
            "relative directory",
            |spec| spec["process"]["cwd"] = json!("tmp"),
            "cwd",
        ),
        (
            "unknown rlimit",
            |spec| {
                spec["process"]["rlimits"] =
                    json!([{ "type": "RLIMIT_NONSENSE", "soft": 1, "hard": 1 }]);
            },
            "RLIMIT_NONSENSE",
        ),
        (
            "sysctl of the host",
            |spec| spec["linux"]["sysctl"] = json!({ "no.such.key": "1" }),
            "no.such.key",
        ),
    ] {
        let mut run = suite.spec(&["true"])?;
        change(&mut run.spec);
        let out = run.run()?;
        ensure!(out.code != 0, "{what} was accepted: {out:?}");
        if suite.runtime == husk_tests::runtime::Runtime::Husk {
            ensure!(
                out.errors().to_lowercase().contains(&words.to_lowercase()),
                "{what}: {out:?}"
            );
        }
    }
    Ok(())
}
