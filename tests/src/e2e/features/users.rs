//! Pods with users of their own: `hostUsers: false`.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    containerd::Containerd,
    cri::{Cri, Pod, PodContainer, container, security, v1},
    host,
    runtime::Runtime,
    wait,
};

use crate::context::Context;

/// The pod's user 0 for everybody else; a kubelet gives each pod 65536 of them.
const FIRST: u32 = 655_360;
const COUNT: u32 = 65_536;

fn map() -> Vec<v1::IdMapping> {
    vec![v1::IdMapping {
        host_id: FIRST,
        container_id: 0,
        length: COUNT,
    }]
}

fn users() -> v1::UserNamespace {
    v1::UserNamespace {
        mode: v1::NamespaceMode::Pod.into(),
        uids: map(),
        gids: map(),
    }
}

fn config(command: &[&str]) -> v1::ContainerConfig {
    let mut config = container(command);
    let options = &mut security(&mut config).namespace_options;
    options.get_or_insert_default().userns_options = Some(users());
    config
}

fn pod_config(cri: &Cri) -> v1::PodSandboxConfig {
    let mut config = cri.pod_config();
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    let options = context.namespace_options.get_or_insert_default();
    options.userns_options = Some(users());
    config
}

/// A volume, id-mapped as the kubelet asks for it.
fn mount(host: &Path, inside: &str, readonly: bool) -> v1::Mount {
    v1::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.into(),
        readonly,
        uid_mappings: map(),
        gid_mappings: map(),
        ..Default::default()
    }
}

pub fn own_users(suite: &Context) -> Result<()> {
    let (containerd, cri) = suite.cri_and_containerd()?;
    own_users_with(containerd, cri, suite.runtime)
}

/// The same with this containerd, whatever the pods' sandbox is.
pub fn own_users_with(containerd: &Containerd, cri: &Cri, runtime: Runtime) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data");
    fs::create_dir(&data)?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o777))?;
    fs::write(data.join("theirs"), "of user 7\n")?;
    chown(data.join("theirs"), Some(7), Some(8))?;
    // As the kubelet writes a Secret: nobody else may read it.
    let secret = dir.path().join("volumes/kubernetes.io~secret/s");
    fs::create_dir_all(secret.join("..v1"))?;
    fs::write(secret.join("..v1/key"), "hidden")?;
    fs::set_permissions(secret.join("..v1/key"), fs::Permissions::from_mode(0o400))?;
    std::os::unix::fs::symlink("..v1", secret.join("..data"))?;
    std::os::unix::fs::symlink("..data/key", secret.join("key"))?;

    let mut pod = pod_config(cri);
    let linux = pod.linux.get_or_insert_default();
    // Not what containerd sets by itself: with it low ports would be everybody's.
    let ports = "net.ipv4.ip_unprivileged_port_start".to_owned();
    linux.sysctls = [(ports, "1000".to_owned())].into();
    let pod = cri.run_pod(pod)?;
    let a = pod.start(config(&["sleep", "1000000"]))?;
    // Whoever it is outside, inside it is root, with the image's files its own.
    let seen = a
        .sh("id -u; id -g; tr -s ' ' </proc/self/uid_map; tr -s ' ' </proc/self/gid_map; stat -c %u:%g /bin/busybox /etc")?
        .ok()?;
    let line = format!(" 0 {FIRST} {COUNT}");
    ensure!(seen == format!("0\n0\n{line}\n{line}\n0:0\n0:0"), "{seen}");
    // Of the image's file system all is writable to it, devices and shared memory are there.
    a.sh("echo x > /etc/new && chown 7:7 /etc/new && echo x > /dev/null && echo x > /dev/shm/x && head -c 1 /dev/zero | wc -c")?
        .ok()?;
    // Capabilities are those of the namespace.
    ensure!(a.sh("mknod /tmp/d c 1 3")?.code != 0, "a device was made");
    let caps = a.sh("grep CapEff /proc/self/status")?.ok()?;
    ensure!(caps.ends_with("a80425fb"), "{caps}");
    network(&pod, &a).context("the pod's network")?;
    // A process of user 1000, in the same users' world. Its streams are its own; runc 1.1 leaves them to the host's root.
    let stderr = match runtime {
        Runtime::Husk => ">/dev/stderr",
        _ => ">&2",
    };
    let script = format!("id -u; readlink /proc/self/ns/user; echo said {stderr}");
    let mut other = config(&["sh", "-c", &script]);
    security(&mut other).run_as_user = Some(v1::Int64Value { value: 1000 });
    let ended = pod.start(other)?.ended()?;
    let namespace = a.exec(&["readlink", "/proc/self/ns/user"])?.ok()?;
    ensure!(
        ended.code == 0 && ended.out == format!("1000\n{namespace}"),
        "{ended:?}"
    );
    ensure!(ended.err == "said", "{ended:?}");

    let mut with_volumes = config(&[
        "sh",
        "-c",
        "cd /data; stat -c %u:%g theirs; echo a >by-root; echo b >by-user; chown 1000:1000 by-user; \
         cat /secret/key; stat -L -c ' %u:%g' /secret/key; stat -c %u /etc/resolv.conf",
    ]);
    with_volumes.mounts = vec![
        mount(&data, "/data", false),
        mount(&secret, "/secret", true),
    ];
    let started = pod.start(with_volumes);
    if containerd.version()?.starts_with('1') {
        // 1.7 gives no volume to such a pod.
        let refused = started.err().context("a volume was mapped")?.to_string();
        ensure!(
            refused.contains("idmap mounts not yet supported"),
            "{refused}"
        );
        return Ok(());
    }
    let ended = started?.ended()?;
    let seen = ended.ok()?;
    ensure!(seen == "7:8\nhidden 0:0\n0", "{seen}");
    for (file, owner) in [("by-root", 0), ("by-user", 1000)] {
        let of = fs::metadata(data.join(file))?;
        ensure!(
            (of.uid(), of.gid()) == (owner, owner),
            "{file}: {}:{}",
            of.uid(),
            of.gid()
        );
    }
    Ok(())
}

/// containerd 1.7 gives no image to such a pod where the shim is its sandbox: the files stay the host's users', of whom the pod has none.
pub fn own_users_without_image(cri: &Cri) -> Result<()> {
    let pod = cri.run_pod(pod_config(cri))?;
    let started = pod.start(config(&["true"]));
    let refused = started.err().context("an image was mapped")?.to_string();
    ensure!(refused.contains("permission denied"), "{refused}");
    Ok(())
}

/// The network is the pod's: its root may do with it what a root may.
fn network(pod: &Pod<'_>, container: &PodContainer<'_>) -> Result<()> {
    let seen = container
        .sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ls /sys/class/net; httpd -p 80 -h /etc; \
             ping -c 1 -W 30 127.0.0.1 >/dev/null && echo answered")?
        .ok()?;
    ensure!(seen == "1000\neth0\nlo\nanswered", "{seen}");
    let ip = pod.ips()?.into_iter().next().context("no address")?;
    let mut connection = TcpStream::connect((ip.as_str(), 80))?;
    connection.set_read_timeout(Some(wait::HANG))?;
    connection.write_all(b"GET /new HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    ensure!(answer.trim_end().ends_with("\r\n\r\nx"), "{answer}");
    // As containerd dials for `kubectl port-forward`.
    let dial = "exec 3<>/dev/tcp/127.0.0.1/80; printf 'GET /new HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3";
    let netns = format!("--net={}", pod.netns()?);
    let answer = host::run(&["nsenter", &netns, "bash", "-c", dial]).context("a port-forward")?;
    ensure!(answer.trim_end().ends_with("\r\n\r\nx"), "{answer}");
    Ok(())
}
