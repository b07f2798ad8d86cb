//! Containers that try what has let others out, with a root file system of their own or every capability of the guest's kernel.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{ctr::Running, host::Traces, spec::SpecRun, wait};
use serde_json::json;

use super::attack::{Attack, tree};
use crate::context::Context;

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
