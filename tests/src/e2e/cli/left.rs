//! What is left when something dies, does not start, or the host goes down.

use std::{fs, os::unix::process::CommandExt as _, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    ctr,
    host::{self, Traces},
    wait,
};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use super::{Husk, IMAGE};
use crate::context::Context;

pub fn killed(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    // The bridge stays, as docker's does.
    husk.text(&["run", "--rm", IMAGE, "true"])?;
    let before = Traces::now();
    // The caller: its container goes on, and its output is kept.
    let script = "echo begun; sleep 3; echo went-on; sleep 1000";
    let mut caller = husk
        .command(&["run", "--name", "one", IMAGE, "sh", "-c", script])
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()?;
    wait::until("the container to run", || {
        husk.text(&["logs", "one"])
            .ok()
            .filter(|text| text.contains("begun"))
    })?;
    // As the end of its terminal does, and all its processes with it.
    killpg(Pid::from_raw(caller.id().cast_signed()), Signal::SIGKILL)?;
    caller.wait()?;
    wait::until("the rest of the output", || {
        husk.text(&["logs", "one"])
            .ok()
            .filter(|text| text.contains("went-on"))
    })?;
    ensure!(husk.state("one")? == "running");
    // Its monitor: it has ended then, it can be started again, and removed.
    kill(Pid::from_raw(husk.monitor("one")?), Signal::SIGKILL)?;
    wait::until("the container to have ended", || {
        (husk.state("one").ok()? == "exited").then_some(())
    })?;
    ensure!(husk.inspect("one")?["State"]["ExitCode"] == 255);
    husk.text(&["start", "one"])?;
    ensure!(husk.state("one")? == "running");
    kill(Pid::from_raw(husk.monitor("one")?), Signal::SIGKILL)?;
    husk.text(&["rm", "-f", "one"])?;
    before.restored()?;
    // The VMM: its end is the container's.
    husk.text(&["run", "-d", "--name", "two", IMAGE, "sleep", "1000"])?;
    let pid = husk.inspect("two")?["State"]["Pid"]
        .as_i64()
        .context("it has no pid")?;
    let vmm = host::processes()
        .into_iter()
        .find(|p| p.name == "husk-vmm")
        .context("there is no VMM")?;
    kill(Pid::from_raw(vmm.pid.cast_signed()), Signal::SIGKILL)?;
    ensure!(husk.text(&["wait", "two"])? == "137", "of pid {pid}");
    husk.text(&["rm", "two"])?;
    before.restored()
}

pub fn refused(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    husk.text(&["run", "--rm", IMAGE, "true"])?;
    let before = Traces::now();
    husk.run(&["run", "--name", "refused", IMAGE, "no-such-program"])?
        .exited(127)?;
    let inspected = husk.inspect("refused")?;
    ensure!(inspected["State"]["ExitCode"] == 127, "{inspected}");
    husk.run(&["start", "refused"])?.exited(1)?;
    // A plugin that fails: the address it had is given back.
    let mut command = husk.command(&["run", "--rm", IMAGE, "true"]);
    let out = ctr::output(command.env("CNI_PATH", "/nonexistent"))?.exited(125)?;
    ensure!(
        out.errors().contains("containernetworking-plugins"),
        "{out:?}"
    );
    let mut command = husk.command(&["run", "--rm", IMAGE, "true"]);
    let config = husk.root.join("config.toml");
    fs::write(&config, "kernel = \"/nonexistent\"\n")?;
    let out = ctr::output(command.env("HUSK_CONFIG", &config))?.exited(125)?;
    ensure!(out.errors().contains("/nonexistent"), "{out:?}");
    husk.text(&["rm", "refused"])?;
    before.restored()
}

/// What a reboot leaves is emulated: all of husk's processes are gone at once, and with them what lay in memory.
pub fn reboot(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    husk.text(&["run", "--rm", IMAGE, "true"])?;
    let before = Traces::now();
    let script = "echo run; echo x >>/count; sleep 1000";
    for name in ["one", "two"] {
        husk.text(&["run", "-d", "--name", name, IMAGE, "sh", "-c", script])?;
    }
    husk.text(&[
        "run", "-d", "--rm", "--name", "three", IMAGE, "sleep", "1000",
    ])?;
    husk.text(&["create", "--name", "never", IMAGE, "echo", "first"])?;
    wait::until("the containers' words", || {
        let logs = ["one", "two"].map(|name| husk.text(&["logs", name]).ok());
        logs.iter()
            .all(|log| log.as_deref() == Some("run"))
            .then_some(())
    })?;
    let monitors = ["one", "two", "three"].map(|name| husk.monitor(name));
    let mut pids: Vec<i32> = monitors.into_iter().collect::<Result<_>>()?;
    let addresses = ["one", "two", "three"].map(|name| {
        let shim = husk.inspect(name)?["Shim"].clone();
        let path = shim
            .as_str()
            .unwrap_or_default()
            .trim_start_matches("unix://");
        Ok::<_, anyhow::Error>(path.to_owned())
    });
    let ids = ["one", "two", "three"].map(|name| husk.inspect(name));
    let ids =
        ids.map(|inspected| inspected.map(|all| all["Id"].as_str().unwrap_or_default().to_owned()));
    let ids: Vec<String> = ids.into_iter().collect::<Result<_>>()?;
    for id in &ids {
        let shim = host::shim_of(id).context("it has no shim")?;
        let vmm = host::vmm_of(&shim).context("it has no VMM")?;
        pids.extend([shim.pid.cast_signed(), vmm.pid.cast_signed()]);
    }
    // None has the time to see another end.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in &pids {
            // A VMM ends with its shim.
            let _ = kill(Pid::from_raw(*pid), signal);
        }
    }
    wait::until("the processes to be gone", || {
        let is_there = |pid: &i32| {
            host::processes()
                .iter()
                .any(|p| p.pid.cast_signed() == *pid)
        };
        (!pids.iter().any(is_there)).then_some(())
    })?;
    // /run is made anew with each boot.
    for address in addresses {
        let _ = fs::remove_file(address?);
    }
    for id in &ids {
        fs::remove_dir_all(format!("/run/husk-cli/{id}"))?;
        fs::remove_dir_all(format!("/run/husk/husk/{id}"))?;
        let namespace = format!("/run/netns/husk-{}", &id[..12]);
        nix::mount::umount2(&*namespace, nix::mount::MntFlags::MNT_DETACH)?;
        fs::remove_file(&namespace)?;
    }
    wait::until("the cgroups to go", || {
        let remove = |id: &String| {
            let path = format!("/sys/fs/cgroup/husk/{id}");
            let _ = fs::remove_dir(&path);
            !fs::exists(&path).unwrap_or(true)
        };
        ids.iter().all(remove).then_some(())
    })?;
    for name in ["cni-cache", "results"] {
        let _ = fs::remove_dir_all(format!("/run/{name}"));
    }

    ensure!(husk.text(&["ps", "-q"])?.is_empty());
    let list = husk.text(&["ps", "-a"])?;
    ensure!(
        list.matches("Exited (255)").count() == 3 && list.contains("Created"),
        "{list}"
    );
    let inspected = husk.inspect("one")?;
    let (state, error) = (&inspected["State"], &inspected["State"]["Error"]);
    ensure!(
        state["ExitCode"] == 255
            && error
                .as_str()
                .is_some_and(|text| text.contains("went down")),
        "{inspected}"
    );
    ensure!(husk.text(&["logs", "one"])? == "run");
    ensure!(husk.text(&["wait", "two"])? == "255");
    let out = husk.run(&["exec", "one", "true"])?.exited(1)?;
    ensure!(out.errors().contains("not running"), "{out:?}");
    // What it had written is there, and it runs with what it had.
    let copy = husk.root.join("count").display().to_string();
    husk.text(&["cp", "one:/count", &copy])?;
    ensure!(fs::read_to_string(&copy)? == "x\n");
    husk.text(&["start", "one"])?;
    wait::until("the second run", || {
        let counted = husk.text(&["exec", "one", "cat", "/count"]).ok()?;
        (counted == "x\nx").then_some(())
    })?;
    ensure!(husk.text(&["start", "-a", "never"])? == "first");
    husk.text(&["rm", "two"])?;
    husk.text(&["prune", "--force"])?;
    ensure!(husk.text(&["ps", "-aq"])?.lines().count() == 1);
    husk.text(&["rm", "-f", "one"])?;
    before.restored()
}
