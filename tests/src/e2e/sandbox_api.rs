//! Pods whose sandbox is the shim itself (`sandboxer = "shim"`): containerd's Sandbox API in place of a pause container.

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{NAMESPACE, Pod, container, v1},
    host, wait,
};

use crate::{Test, context::Context, features, husk_test};

pub const TESTS: &[Test] = &[
    husk_test("a_pods_life", life),
    husk_test("what_the_pod_asked_for", asked_for),
    husk_test("containers_come_and_go", come_and_go),
    husk_test("users_of_a_pod", own_users),
];

/// Those that count what the host holds, or end a containerd.
pub const ALONE: &[Test] = &[
    husk_test("nothing_is_left", nothing_is_left),
    husk_test("containerd_killed", containerd_killed),
    husk_test("vmm_killed", vmm_killed),
];

const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn pod(suite: &Context) -> Result<Pod<'_>> {
    suite.sandboxer()?.1.pod()
}

fn life(suite: &Context) -> Result<()> {
    let pod = pod(suite)?;
    ensure!(pod.status()?.state() == v1::PodSandboxState::SandboxReady);
    let (containerd, _) = suite.sandboxer()?;
    let all = containerd.run_ctr(&["--namespace", NAMESPACE, "containers", "list", "--quiet"])?;
    ensure!(
        !all.ok()?.text().contains(&pod.id),
        "the pod has a pause container"
    );
    let main = pod.start(container(&SLEEP))?;
    let ip = pod.ips()?.into_iter().next().context("no address")?;
    host::run(&["ping", "-c", "2", "-W", "30", &ip])?;
    ensure!(
        main.exec(&["ip", "-o", "addr", "show", "dev", "eth0"])?
            .ok()?
            .contains(&ip)
    );
    pod.stop()?;
    ensure!(pod.status()?.state() == v1::PodSandboxState::SandboxNotready);
    ensure!(main.ended()?.code == 137);
    // As often as the kubelet likes.
    pod.stop()
}

fn asked_for(suite: &Context) -> Result<()> {
    let (_, cri) = suite.sandboxer()?;
    let mut config = cri.pod_config();
    let hostname = config.hostname.clone();
    config.dns_config = Some(v1::DnsConfig {
        servers: vec!["10.96.0.10".into()],
        ..Default::default()
    });
    let linux = config.linux.get_or_insert_default();
    linux
        .sysctls
        .insert("net.ipv4.ip_unprivileged_port_start".into(), "80".into());
    linux.resources = Some(v1::LinuxContainerResources {
        cpu_quota: 200_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 300 << 20,
        ..Default::default()
    });
    let pod = cri.run_pod(config)?;
    let main = pod.start(container(&SLEEP))?;
    ensure!(main.exec(&["uname", "-n"])?.ok()? == hostname);
    ensure!(
        main.exec(&["cat", "/etc/resolv.conf"])?
            .ok()?
            .contains("10.96.0.10")
    );
    let port = main
        .exec(&["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"])?
        .ok()?;
    ensure!(port == "80", "{port}");
    let memory = main.exec(&["grep", "MemTotal", "/proc/meminfo"])?.ok()?;
    let kib: u64 = memory
        .split_whitespace()
        .nth(1)
        .context("no figure")?
        .parse()?;
    ensure!((250_000..450_000).contains(&kib), "{memory}");
    Ok(())
}

fn own_users(suite: &Context) -> Result<()> {
    let (containerd, cri) = suite.sandboxer()?;
    if containerd.version()?.starts_with('1') {
        return features::own_users_without_image(cri);
    }
    features::own_users_with(containerd, cri, suite.runtime)
}

fn come_and_go(suite: &Context) -> Result<()> {
    let pod = pod(suite)?;
    for code in [0, 3] {
        let ended = pod.sh(&format!("echo {code}; exit {code}"))?;
        ensure!(
            ended.code == code && ended.out == code.to_string(),
            "{ended:?}"
        );
    }
    let (a, b) = (pod.start(container(&SLEEP))?, pod.start(container(&SLEEP))?);
    for namespace in ["net", "ipc", "uts"] {
        let path = format!("/proc/self/ns/{namespace}");
        ensure!(
            a.exec(&["readlink", &path])?.ok()? == b.exec(&["readlink", &path])?.ok()?,
            "{namespace}"
        );
    }
    a.sh("echo note >/dev/shm/note")?.ok()?;
    ensure!(b.exec(&["cat", "/dev/shm/note"])?.ok()? == "note");
    a.remove()?;
    b.remove()?;
    ensure!(pod.status()?.state() == v1::PodSandboxState::SandboxReady);
    ensure!(pod.sh("echo last")?.ok()? == "last");
    Ok(())
}

fn nothing_is_left(suite: &Context) -> Result<()> {
    // The bridge is there from the first pod on.
    drop(pod(suite)?);
    let before = host::Traces::now();
    let pod = pod(suite)?;
    let _running = pod.start(container(&SLEEP))?;
    pod.stop()?;
    drop(pod);
    before.restored()
}

fn containerd_killed(suite: &Context) -> Result<()> {
    let (containerd, cri) = suite.sandboxer()?;
    let pod = pod(suite)?;
    let main = pod.start(container(&SLEEP))?;
    containerd.kill();
    containerd.relaunch()?;
    cri.ready()?;
    main.exec(&["true"])?.ok()?;
    ensure!(pod.status()?.state() == v1::PodSandboxState::SandboxReady);
    ensure!(pod.sh("echo new")?.ok()? == "new");
    Ok(())
}

fn vmm_killed(suite: &Context) -> Result<()> {
    let pod = pod(suite)?;
    let main = pod.start(container(&SLEEP))?;
    let shim = host::shim_of(&pod.id).context("the pod has no shim")?;
    let vmm = host::vmm_of(&shim).context("the shim has no VMM")?;
    host::run(&["kill", "-9", &vmm.pid.to_string()])?;
    ensure!(main.ended()?.code == 137);
    wait::until("the pod to be seen as not ready", || {
        (pod.status().ok()?.state() == v1::PodSandboxState::SandboxNotready).then_some(())
    })
}
