//! What the containers of a pod share with each other, and what no pod shares with the host.

use anyhow::{Result, ensure};
use husk_tests::{
    cri::{Cri, Pod, container, security, v1},
    wait,
};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("hostname_ipc_and_shared_memory", names_and_memory),
    test("sysctls_of_the_pod", sysctls),
    test("share_process_namespace", processes),
    husk_test("what_is_the_hosts_is_refused", refusals),
];

const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn names_and_memory(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let config = cri.pod_config();
    let hostname = config.hostname.clone();
    let pod = cri.run_pod(config)?;
    let (a, b) = (pod.start(container(&SLEEP))?, pod.start(container(&SLEEP))?);
    for each in [&a, &b] {
        ensure!(each.exec(&["uname", "-n"])?.ok()? == hostname);
        ensure!(each.exec(&["cat", "/etc/hostname"])?.ok()? == hostname);
    }
    for namespace in ["ipc", "uts"] {
        let path = format!("/proc/self/ns/{namespace}");
        let (in_a, in_b) = (
            a.exec(&["readlink", &path])?.ok()?,
            b.exec(&["readlink", &path])?.ok()?,
        );
        ensure!(in_a == in_b, "{namespace}: {in_a} and {in_b}");
    }
    a.sh("echo from-a > /dev/shm/note && chmod 600 /dev/shm/note")?
        .ok()?;
    ensure!(b.exec(&["cat", "/dev/shm/note"])?.ok()? == "from-a");
    // As the kubelet's pods have it: 64 MiB, open to all users, no programs.
    let df = a.sh("df -k /dev/shm | tail -n 1")?.ok()?;
    ensure!(df.split_whitespace().nth(1) == Some("65536"), "{df}");
    let mode = a.exec(&["stat", "-c", "%a", "/dev/shm"])?.ok()?;
    ensure!(mode == "1777", "{mode}");
    // It goes with the pod, not with the container.
    a.remove()?;
    ensure!(pod.sh("cat /dev/shm/note")?.ok()? == "from-a");
    // Another pod has its own.
    let other = cri.pod()?;
    ensure!(other.sh("ls -A /dev/shm")?.ok()?.is_empty());
    Ok(())
}

fn sysctls(suite: &Context) -> Result<()> {
    let wanted = [
        ("kernel.shm_rmid_forced", "1"),
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("net.ipv4.tcp_keepalive_time", "600"),
    ];
    let cri = suite.cri()?;
    let mut config = cri.pod_config();
    config.linux.get_or_insert_default().sysctls = wanted
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let pod = cri.run_pod(config)?;
    let inside = pod.start(container(&SLEEP))?;
    for (name, value) in wanted {
        let file = format!("/proc/sys/{}", name.replace('.', "/"));
        let seen = inside.exec(&["cat", &file])?.ok()?;
        ensure!(seen == value, "{name}: {seen}");
    }
    Ok(())
}

/// A pod and its containers with one pid namespace.
fn process_sharing_pod(cri: &Cri) -> Result<(Pod<'_>, v1::ContainerConfig)> {
    let shared = v1::NamespaceMode::Pod.into();
    let mut config = cri.pod_config();
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.namespace_options.get_or_insert_default().pid = shared;
    let mut inside = container(&SLEEP);
    security(&mut inside)
        .namespace_options
        .get_or_insert_default()
        .pid = shared;
    Ok((cri.run_pod(config)?, inside))
}

fn processes(suite: &Context) -> Result<()> {
    let (pod, config) = process_sharing_pod(suite.cri()?)?;
    let with = |command: &[&str]| {
        let mut config = config.clone();
        config.command = command.iter().map(ToString::to_string).collect();
        pod.start(config)
    };
    let (a, b) = (
        with(&["sleep", "111111"])?,
        with(&["sh", "-c", "sleep 222222 & wait"])?,
    );
    let seen = || a.exec(&["ps", "-o", "pid,args"])?.ok();
    let all = wait::until("every process of the pod to be seen", || {
        let all = seen().ok()?;
        ["sleep 111111", "sleep 222222"]
            .iter()
            .all(|p| all.contains(p))
            .then_some(all)
    })?;
    // PID 1 is the pod's, not the container's.
    let first = all
        .lines()
        .find(|l| l.trim_start().starts_with("1 "))
        .unwrap_or_default();
    ensure!(!first.contains("111111"), "{all}");
    // A signal reaches the neighbour.
    b.sh("kill -9 $(ps -o pid,args | grep '[s]leep 111111' | awk '{print $1}')")?
        .ok()?;
    ensure!(a.ended()?.code == 137);
    // One that ends takes its own processes along, and nobody else's.
    let c = with(&["sleep", "333333"])?;
    b.stop(0)?;
    ensure!(b.ended()?.code == 137);
    wait::until("the child of the one that was killed to go", || {
        let all = c.exec(&["ps", "-o", "args"]).ok()?.ok().ok()?;
        (all.contains("sleep 333333") && !all.contains("sleep 222222")).then_some(())
    })
}

fn refusals(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let refused = |change: &dyn Fn(&mut v1::NamespaceOption)| {
        let mut config = cri.pod_config();
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        change(context.namespace_options.get_or_insert_default());
        let answer = cri.run_pod(config);
        answer.err().map(|e| e.to_string()).unwrap_or_default()
    };
    let node = v1::NamespaceMode::Node.into();
    for (name, message) in [
        ("hostPID", refused(&|o| o.pid = node)),
        ("hostIPC", refused(&|o| o.ipc = node)),
        ("hostNetwork", refused(&|o| o.network = node)),
    ] {
        ensure!(
            message.contains(name) && message.contains("VM"),
            "{name}: {message:?}"
        );
    }
    let dir = tempfile::tempdir()?;
    let pod = cri.pod()?;
    let mut config = container(&SLEEP);
    config.mounts = vec![v1::Mount {
        host_path: dir.path().to_string_lossy().into_owned(),
        container_path: "/both".into(),
        propagation: v1::MountPropagation::PropagationBidirectional.into(),
        ..Default::default()
    }];
    let message = pod
        .start(config)
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(
        message.contains("propagat") && message.contains("/both"),
        "{message:?}"
    );
    Ok(())
}
