//! Containers that try what has let others out, with a root file system of their own or every capability of the guest's kernel.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{host::Traces, spec::SpecRun};
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
