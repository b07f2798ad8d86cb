//! Pods through CRI, as a kubelet makes them: several containers in one VM.

use std::{fs, time::Instant};

use anyhow::{Result, ensure};
use husk_tests::{
    cri::{Cri, container, security, v1},
    host::Traces,
    wait,
};

use crate::{Test, context::Context, test};

pub const TESTS: &[Test] = &[
    test("containers_of_a_pod_share_what_they_should", sharing),
    test("containers_live_and_end_by_themselves", lives),
    test("security_context", security_context),
    test("privileged_is_privileged_in_its_own_kernel", privileged),
    test("volumes_and_dns_of_the_kubelet", volumes),
    test("graceful_stop", graceful_stop),
    test("limits_of_a_container_and_their_update", limits),
    test("exec_and_logs", exec_and_logs),
    test("a_pod_stops_and_leaves_nothing", leaves_nothing),
];

const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn sharing(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let (a, b) = (pod.start(container(&SLEEP))?, pod.start(container(&SLEEP))?);
    // One network; processes and files of their own.
    for (namespace, same) in [("net", true), ("pid", false), ("mnt", false)] {
        let path = format!("/proc/self/ns/{namespace}");
        let shared = a.exec(&["readlink", &path])?.ok()? == b.exec(&["readlink", &path])?.ok()?;
        ensure!(
            shared == same,
            "namespace {namespace}: shared should be {same}"
        );
    }
    a.sh("echo from-a > /tmp/note")?.ok()?;
    ensure!(b.sh("cat /tmp/note")?.code == 1, "b sees a's /tmp");
    // The loopback interface is one, too.
    let server = pod.start(container(&["sh", "-c", "echo hello | nc -l -p 7777"]))?;
    let heard = wait::until("the server to answer", || {
        let answer = b.sh("nc -w 5 127.0.0.1 7777 </dev/null").ok()?;
        (answer.code == 0).then_some(answer.out)
    })?;
    ensure!(heard == "hello", "{heard}");
    // It has answered, and may not have ended yet: containerd 2 does not remove it then.
    server.ended()?;
    server.remove()?;
    Ok(())
}

fn lives(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let sidecar = pod.start(container(&SLEEP))?;
    // Init containers: one after another, each to its end.
    for code in [0, 3] {
        let ended = pod.sh(&format!("echo init-{code}; exit {code}"))?;
        ensure!(
            ended.code == code && ended.out == format!("init-{code}"),
            "{ended:?}"
        );
    }
    // One crashes and is made again.
    for attempt in 0..2 {
        let mut config = container(&["sh", "-c", "kill -9 $$; sleep 1; exit 7"]);
        config.metadata.get_or_insert_default().attempt = attempt;
        let crashed = pod.start(config)?;
        ensure!(crashed.ended()?.code == 7);
        crashed.remove()?;
    }
    sidecar.exec(&["true"])?.ok()?;
    // The last one goes, the pod stays and takes a new one.
    sidecar.remove()?;
    ensure!(pod.status()?.state() == v1::PodSandboxState::SandboxReady);
    ensure!(pod.sh("echo back")?.ok()? == "back");
    Ok(())
}

fn security_context(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let mut config = container(&[
        "sh",
        "-c",
        "id -u; id -g; id -G; grep -E 'NoNewPrivs|Seccomp:|CapEff' /proc/self/status; touch /x",
    ]);
    let context = security(&mut config);
    context.run_as_user = Some(v1::Int64Value { value: 1000 });
    context.run_as_group = Some(v1::Int64Value { value: 3000 });
    context.supplemental_groups = vec![4000, 5000];
    context.readonly_rootfs = true;
    context.no_new_privs = true;
    context.seccomp = Some(v1::SecurityProfile::default());
    let ended = pod.start(config)?.ended()?;
    let lines: Vec<&str> = ended.out.lines().collect();
    ensure!(lines.starts_with(&["1000", "3000"]), "{ended:?}");
    let groups: Vec<&str> = lines.get(2).unwrap_or(&"").split(' ').collect();
    ensure!(
        ["3000", "4000", "5000"].iter().all(|g| groups.contains(g)),
        "{ended:?}"
    );
    // RuntimeDefault is a filter.
    for part in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
        ensure!(ended.out.contains(part), "no {part} in {ended:?}");
    }
    ensure!(
        ended.code == 1 && ended.err.contains("Read-only file system"),
        "{ended:?}"
    );

    let mut config = container(&["sh", "-c", "grep CapEff /proc/self/status"]);
    security(&mut config).capabilities = Some(v1::Capability {
        add_capabilities: vec!["NET_ADMIN".into()],
        drop_capabilities: vec!["ALL".into()],
        ..Default::default()
    });
    let caps = pod.start(config)?.ended()?.ok()?;
    ensure!(caps == "CapEff:\t0000000000001000", "{caps}");
    Ok(())
}

fn privileged(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let mut config = cri.pod_config();
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = cri.run_pod(config)?;
    let mut config = container(&[
        "sh",
        "-c",
        "mount -t tmpfs none /mnt 2>&1 || { mkdir /m && mount -t tmpfs none /m; }; grep CapEff /proc/self/status",
    ]);
    security(&mut config).privileged = true;
    let caps = pod.start(config)?.ended()?.ok()?;
    // Every capability of the kernel.
    ensure!(caps.contains("ffffffffff"), "{caps}");
    Ok(())
}

fn volumes(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("shared"))?;
    fs::write(path("hosts"), "127.0.0.1 localhost\n10.1.2.3 friend\n")?;
    // A projected volume, as the kubelet swaps it: ..data is a link that is replaced.
    for version in ["v1", "v2"] {
        fs::create_dir_all(path("config").join(version))?;
        fs::write(path("config").join(version).join("key"), version)?;
    }
    std::os::unix::fs::symlink("v1", path("config/..data"))?;
    std::os::unix::fs::symlink("..data/key", path("config/key"))?;
    let mount = |host: &str, inside: &str, readonly: bool| v1::Mount {
        host_path: path(host).to_string_lossy().into_owned(),
        container_path: inside.into(),
        readonly,
        ..Default::default()
    };
    let mut pod_config = cri.pod_config();
    pod_config.dns_config = Some(v1::DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["default.svc.cluster.local".into()],
        options: vec!["ndots:5".into()],
    });
    let pod = cri.run_pod(pod_config)?;
    let start = |readonly: bool| {
        let mut config = container(&SLEEP);
        config.mounts = vec![
            mount("shared", "/data", readonly),
            mount("hosts", "/etc/hosts", false),
            mount("config", "/etc/config", true),
        ];
        pod.start(config)
    };
    let (a, b) = (start(false)?, start(true)?);
    ensure!(
        a.exec(&["cat", "/etc/hosts"])?
            .ok()?
            .contains("10.1.2.3 friend")
    );
    let dns = a.exec(&["cat", "/etc/resolv.conf"])?.ok()?;
    ensure!(
        dns.contains("nameserver 10.96.0.10") && dns.contains("ndots:5"),
        "{dns}"
    );
    a.sh("echo written > /data/file")?.ok()?;
    ensure!(b.exec(&["cat", "/data/file"])?.ok()? == "written");
    ensure!(fs::read_to_string(path("shared/file"))? == "written\n");
    ensure!(
        b.sh("echo x > /data/other")?.code != 0,
        "a read-only volume was written"
    );
    ensure!(a.exec(&["cat", "/etc/config/key"])?.ok()? == "v1");
    std::os::unix::fs::symlink("v2", path("config/..data_tmp"))?;
    fs::rename(path("config/..data_tmp"), path("config/..data"))?;
    wait::until("the swap to be seen in the pod", || {
        (a.exec(&["cat", "/etc/config/key"]).ok()?.out == "v2").then_some(())
    })
}

fn graceful_stop(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let polite = pod.start(container(&[
        "sh",
        "-c",
        "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done",
    ]))?;
    wait::until("it to be up", || {
        (polite.logged("stdout") == "up").then_some(())
    })?;
    polite.stop(60)?;
    let ended = polite.ended()?;
    ensure!(ended.code == 5 && ended.out == "up\nbye", "{ended:?}");
    // PID 1 without a handler does not hear SIGTERM.
    let deaf = pod.start(container(&SLEEP))?;
    let begin = Instant::now();
    deaf.stop(2)?;
    ensure!(
        begin.elapsed().as_secs() >= 2,
        "killed before its grace was over"
    );
    let ended = deaf.ended()?;
    ensure!(ended.code == 137, "{ended:?}");
    Ok(())
}

fn limits(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let resources = |memory: i64, quota: i64| v1::LinuxContainerResources {
        memory_limit_in_bytes: memory,
        memory_swap_limit_in_bytes: memory,
        cpu_quota: quota,
        cpu_period: 100_000,
        ..Default::default()
    };
    let mut config = container(&[
        "sh",
        "-c",
        "x=$(head -c 10000000 /dev/zero | tr '\\0' a); sleep 1000000",
    ]);
    config.linux.get_or_insert_default().resources = Some(resources(64 << 20, 50_000));
    let limited = pod.start(config)?;
    let files = || {
        limited
            .sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")?
            .ok()
    };
    let before = files()?;
    ensure!(before == format!("{}\n50000 100000", 64 << 20), "{before}");
    limited.update(resources(96 << 20, 20_000))?;
    let after = files()?;
    ensure!(after == format!("{}\n20000 100000", 96 << 20), "{after}");
    let used = wait::until("memory in the stats", || {
        let used = limited.stats().ok()?.memory?.working_set_bytes?.value;
        (used > 8 << 20).then_some(used)
    })?;
    ensure!(used < 96 << 20, "{used}");
    Ok(())
}

fn exec_and_logs(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let main = pod.start(container(&[
        "sh",
        "-c",
        "echo out; echo err >&2; exec sleep 1000",
    ]))?;
    wait::until("both lines", || {
        (main.logged("stdout") == "out" && main.logged("stderr") == "err").then_some(())
    })?;
    for code in [0, 1, 42] {
        let ended = main.sh(&format!("echo e; echo f >&2; exit {code}"))?;
        ensure!(
            ended.code == code && ended.out == "e" && ended.err == "f",
            "{ended:?}"
        );
    }
    let missing = main
        .exec(&["no-such-program"])
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(
        missing.contains("executable file not found in $PATH"),
        "{missing}"
    );
    let mut config = container(&["no-such-program"]);
    config.args.clear();
    let refused = pod
        .start(config)
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(
        refused.contains("executable file not found in $PATH"),
        "{refused}"
    );
    Ok(())
}

fn leaves_nothing(suite: &Context) -> Result<()> {
    let cri: &Cri = suite.cri()?;
    let before = Traces::now();
    let pod = cri.pod()?;
    let running = pod.start(container(&SLEEP))?;
    pod.stop()?;
    ensure!(pod.status()?.state() == v1::PodSandboxState::SandboxNotready);
    ensure!(running.status()?.state() == v1::ContainerState::ContainerExited);
    drop(pod);
    before.restored()
}
