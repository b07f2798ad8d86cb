//! Containers that try what has let others out, with a root file system of their own or every capability of the guest's kernel.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{Cri, Pod, container, security, v1},
    ctr::Running,
    host::Traces,
    spec::SpecRun,
    wait,
};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde_json::json;

use super::attack::{Attack, tree};
use crate::{context::Context, workload::Workload};

/// What runs a program outside of a container, writes where that may not, and reads disks: all of it is the guest's alone.
pub fn privileged(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    let canary = attack.canary().display();
    let pattern = "/proc/sys/kernel/core_pattern";
    let (pattern_before, volume_before) = (fs::read_to_string(pattern)?, tree(attack.volume())?);
    let script = format!(
        "mount -o remount,rw /proc/sys 2>/dev/null; echo '|{canary}/program' > {pattern} && echo pattern is $(cat {pattern})
        sh -c 'kill -SEGV $$'
        mkdir /tmp/c && mount -t cgroup -o rdma none /tmp/c && echo {canary}/program > /tmp/c/release_agent
        mount -o remount,rw /volume; mount -o remount,bind,rw /volume
        echo x > /volume/planted && echo wrote a read-only volume
        rm -f /volume/* && echo removed
        for node in '254 0' '254 1' '8 0' '259 0' '253 0'; do
            rm -f /tmp/n; mknod /tmp/n b $node && dd if=/tmp/n of=/dev/null bs=512 count=1 && echo read a disk $node
        done 2>/dev/null
        for disk in /sys/block/*; do case $disk in *loop*|*ram*|*'*') ;; *) echo has a disk $disk; esac; done
        ls {canary} && echo sees the host; echo done"
    );
    let mount = format!(
        "type=bind,src={},dst=/volume,options=rbind:ro",
        attack.volume().display()
    );
    let flags = ["--privileged", "--mount", &mount];
    let out = suite.run(&flags, &["sh", "-c", &script])?.ok()?;
    let expected = format!("pattern is |{canary}/program\ndone");
    // That it owns its guest's kernel is what makes the rest an attack.
    ensure!(out.text() == expected, "{out:?}");
    ensure!(fs::read_to_string(pattern)? == pattern_before);
    ensure!(tree(attack.volume())? == volume_before);
    attack.nothing_moved()
}

/// A working directory by somebody else's descriptor (CVE-2024-21626) is none, or one of the container's.
pub fn working_directories(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    let pod = suite.detached(&[], &["sleep", "1000"])?;
    let up = "../../../../../../../../../../..";
    // The guest's root has the agent at /init, which no container has.
    let script = format!(
        "ls -d {up}/init || cat {up}{}/secret",
        attack.canary().display()
    );
    // What the agent and its `container-init` hold open is among the first numbers.
    let of_itself = (3..9).map(|fd| format!("/proc/self/fd/{fd}"));
    for directory in of_itself.chain([format!("/proc/1/fd/3/{up}"), format!("/proc/1/cwd/{up}")]) {
        let exec = suite.containerd.fresh_id("exec");
        let out = suite.containerd.run_ctr(&[
            "task",
            "exec",
            "--exec-id",
            &exec,
            "--cwd",
            &directory,
            &pod.id,
            "sh",
            "-c",
            &script,
        ])?;
        ensure!(out.code != 0, "{directory} leads out: {out:?}");
    }
    pod.exec(&["true"])?.ok()?;
    attack.nothing_moved()
}

/// What a process of a container reaches by vsock: nobody, however often it dials, and it keeps nobody from being reached.
pub fn dials(suite: &Context) -> Result<()> {
    // The agent's ports (`husk_protocol::ports`), and some that the host may well listen on. What is sent is no token.
    const SCRIPT: &str = "
import socket, time
heard, silent = [], []
def dial(port):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.settimeout(60)
    s.connect((2, port))
    return s
for port in [1024, 1025, 1026, 1027, 0, 1, 22, 111, 2375, 10250, 0xfffffffe]:
    try:
        s = dial(port)
        s.sendall(bytes(64))
        if got := s.recv(64):
            heard.append((port, got))
    except TimeoutError:
        heard.append((port, 'it stays'))
    except OSError:
        pass
for _ in range(600):
    try:
        silent.append(dial(1025))
    except OSError:
        pass
print('dialled', len(silent) > 500, 'heard', heard, flush=True)
time.sleep(100000)
";
    let program = ["/usr/bin/python3", "-c", SCRIPT];
    let root = Path::new("/srv/debian-rootfs");
    let mut run = SpecRun::new(&suite.containerd, suite.runtime, root, &program)?;
    run.spec["root"]["readonly"] = json!(true);
    let id = suite.containerd.fresh_id("dials");
    let mut running = Running::start(&mut run.command(&id, &["--rm"])?, false)?;
    let told = wait::until("the container to have dialled", || {
        let text = running.text_so_far();
        (text.ends_with('\n') || running.has_ended()).then_some(text)
    })?;
    ensure!(told == "dialled True heard []\n", "{told}");
    // Each of these takes streams of its own, beside all that say nothing.
    for _ in 0..3 {
        let exec = suite.containerd.fresh_id("exec");
        let words = ["task", "exec", "--exec-id", &exec, &id, "echo", "heard"];
        let out = suite.containerd.run_ctr(&words)?.ok()?;
        ensure!(out.text() == "heard", "{out:?}");
    }
    let kill = ["task", "kill", "--signal", "SIGKILL", &id];
    suite.containerd.run_ctr(&kill)?.ok()?;
    running.finish()?.exited(137).map(drop)
}

/// Containers that are made while the parent of what they mount is a directory and a link in turn.
const ROUNDS: u32 = 3;

/// The attacker's part, in a container: exchanges two names of the volume for as long as it lives.
pub fn exchange_workload(volume: &Path) -> Result<()> {
    let at = |name: &str| volume.join(name);
    println!("ready");
    loop {
        renameat2(
            AT_FDCWD,
            &at("real"),
            AT_FDCWD,
            &at("link"),
            RenameFlags::RENAME_EXCHANGE,
        )?;
        // Others of the VM, which may have one CPU, come to run as well.
        thread::sleep(Duration::from_micros(500));
    }
}

/// A volume is mounted below a name that another container of the pod exchanges for a link (CVE-2021-30465): it comes to lie in its own
/// container, in the directory or where the link leads there, and nowhere else in the guest.
pub fn mounts_and_exchanges(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    let work = tempfile::tempdir()?;
    let workload = Workload::new(suite, work.path())?;
    let volume = attack.volume();
    let up = Path::new("../../../../../../../../../..");
    fs::create_dir(volume.join("real"))?;
    symlink(
        up.join(attack.canary().strip_prefix("/")?),
        volume.join("link"),
    )?;
    let extra = tempfile::tempdir()?;
    fs::write(extra.path().join("mark"), "marked")?;
    let mount = |host: &Path, inside: &str| v1::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.into(),
        ..Default::default()
    };

    let cri = suite.cri()?;
    let (pod, looking) = guests_own_view(cri)?;
    let looker = pod.start(looking)?;
    let mut attacker = workload.container(&["exchange-workload", "/vol"]);
    attacker.mounts.push(mount(volume, "/vol"));
    let attacker = pod.start(attacker)?;
    wait::until("the names to be exchanged", || {
        (attacker.logged("stdout") == "ready").then_some(())
    })?;
    let guests_mounts = || looker.sh("cut -d' ' -f5- /proc/1/mountinfo | sort")?.ok();
    let attackers_mounts = || {
        attacker
            .sh("cut -d' ' -f5- /proc/self/mountinfo | sort")?
            .ok()
    };
    let before = (guests_mounts()?, attackers_mounts()?);
    ensure!(
        before.0 != before.1,
        "the guest's own mounts are not seen: {before:?}"
    );
    let (mut started, mut below_the_link, mut gone) = (0, 0, 0);
    for _ in 0..ROUNDS {
        // Where it is; the guest's own root has the agent's file, and no container's has.
        let mut victim = container(&[
            "sh",
            "-c",
            "grep -c ' /[^ ]*inner ' /proc/self/mountinfo; awk '$5 ~ /inner$/ {print $5}' /proc/self/mountinfo; exec sleep 1000000",
        ]);
        victim.mounts = vec![
            mount(volume, "/vol"),
            mount(extra.path(), "/vol/real/inner"),
        ];
        let victim = pod.create(victim)?;
        if let Err(error) = victim.start() {
            let words = format!("{error:#}");
            ensure!(words.contains("/vol/real/inner"), "{words}");
            victim.remove()?;
            continue;
        }
        started += 1;
        let lines = wait::until("the container to say where its mounts are", || {
            let said = victim.logged("stdout");
            (said.lines().count() >= 2).then_some(said)
        })?;
        let place = lines.lines().last().unwrap_or_default().to_owned();
        ensure!(lines.starts_with("1\n"), "{lines}");
        let elsewhere = format!("{}/inner", attack.canary().display());
        below_the_link += u32::from(place == elsewhere);
        let is_inside = ["/vol/real/inner", "/vol/link/inner", &elsewhere].contains(&&*place);
        ensure!(is_inside, "{place}");
        // Found there by one of the names at one time, unless its own kernel has let go of a mount whose directory had gone.
        let look = format!(
            "for n in $(seq 1 100); do cat {place}/mark /vol/link/inner/mark 2>/dev/null && exit; grep -q '/inner ' /proc/self/mountinfo || exit 3; done"
        );
        let looked = victim.sh(&look)?;
        let found = looked.out.starts_with("marked");
        gone += u32::from(looked.code == 3);
        ensure!(found || looked.code == 3, "{place}: {looked:?}");
        ensure!(attackers_mounts()? == before.1, "in the other container");
        victim.remove()?;
    }
    ensure!(started > 0, "no container has started");
    eprintln!(
        "of {ROUNDS} containers {started} started, {below_the_link} with the mount where the link leads, {gone} lost it"
    );
    let after = wait::until("the guest to have the mounts that it had", || {
        let after = guests_mounts().ok()?;
        (after == before.0).then_some(after)
    });
    ensure!(
        after.is_ok(),
        "the guest's mounts were {}\nand are {}",
        before.0,
        guests_mounts()?
    );
    ensure!(fs::read_dir(extra.path())?.count() == 1);
    attack.nothing_moved()
}

/// A pod, and a container in it that sees the guest's first process, with every capability.
fn guests_own_view(cri: &Cri) -> Result<(Pod<'_>, v1::ContainerConfig)> {
    let shared = v1::NamespaceMode::Pod.into();
    let mut config = cri.pod_config();
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.privileged = true;
    context.namespace_options.get_or_insert_default().pid = shared;
    let mut looking = container(&["sleep", "1000000"]);
    let context = security(&mut looking);
    context.privileged = true;
    context.namespace_options.get_or_insert_default().pid = shared;
    Ok((cri.run_pod(config)?, looking))
}

/// A root file system like the suite's, below `dir`.
fn root_file_system(suite: &Context, dir: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(suite.rootfs.join("bin/busybox"), root.join("bin/busybox"))?;
    for name in ["sh", "ls", "cat", "true"] {
        symlink("busybox", root.join("bin").join(name))?;
    }
    Ok(root)
}

/// Directories that the runtime mounts on, files that it opens, and the program itself are links to elsewhere.
pub fn root_file_systems(suite: &Context) -> Result<()> {
    for link in ["dev", "proc", "etc", "dev/null", "shell"] {
        one_root_file_system(suite, link).context(link)?;
    }
    Ok(())
}

fn one_root_file_system(suite: &Context, link: &str) -> Result<()> {
    let attack = Attack::prepare()?;
    let dir = tempfile::tempdir()?;
    let root = root_file_system(suite, dir.path())?;
    let up = Path::new("../../../../../../../../../..");
    let canary = attack.canary();
    let program: &[&str] = &["/bin/sh", "-c", "ls /proc/self/ >/dev/null; echo here"];
    let mut run = SpecRun::new(&suite.containerd, suite.runtime, &root, program)?;
    match link {
        "shell" => {
            fs::remove_file(root.join("bin/sh"))?;
            symlink("/proc/self/exe", root.join("bin/sh"))?;
        }
        // Without a tmpfs of its own on /dev, what the image has there is what the runtime comes upon.
        "dev/null" => {
            symlink(
                up.join(canary.strip_prefix("/")?).join("secret"),
                root.join(link),
            )?;
            if let Some(mounts) = run.spec["mounts"].as_array_mut() {
                mounts.retain(|mount| mount["destination"] != "/dev");
            }
            run.spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/etc"]);
        }
        directory => {
            fs::remove_dir(root.join(directory))?;
            symlink(up.join(canary.strip_prefix("/")?), root.join(directory))?;
        }
    }
    let traces = Traces::now();
    let length = suite.containerd.log().len();
    let out = run.run()?;
    // It runs, as within its root the link leads to a place inside, or it is refused in words.
    let is_told = out.code == 0 && out.text().ends_with("here") || !out.errors().is_empty();
    ensure!(is_told, "{out:?}");
    let log = suite.containerd.log_since(length);
    ensure!(!log.contains("panicked"), "{log}");
    traces.restored()?;
    attack.nothing_moved()
}
