//! Containers, from their making to their removal.

use std::fs;

use anyhow::{Result, ensure};
use husk_tests::{ctr, wait};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{Husk, IMAGE};
use crate::{
    context::{Context, hex},
    terminal::{Session, has_size, is_terminal_of_size, size},
};

pub fn exit_codes_and_streams(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    // What this host is good for, the suites show.
    let found = husk.text(&["doctor"])?;
    ensure!(
        found.contains("KVM: AMD-V") && !found.contains("FAIL"),
        "{found}"
    );
    let out = husk.sh(&[], "echo out; echo err >&2; exit 3")?.exited(3)?;
    ensure!(
        (out.text(), out.errors()) == ("out".into(), "err".into()),
        "{out:?}"
    );
    husk.sh(&[], "sh -c 'kill -9 $$'; exit $?")?.exited(137)?;
    let out = husk
        .run(&["run", "--rm", IMAGE, "no-such-program"])?
        .exited(127)?;
    ensure!(out.errors().contains("no-such-program"), "{out:?}");
    let out = husk
        .run(&["run", "--rm", IMAGE, "/etc/passwd"])?
        .exited(126)?;
    ensure!(out.errors().contains("permission denied"), "{out:?}");
    for bad in [
        &["--memory", "much"][..],
        &["--network", "nowhere"],
        &["-v", "x"],
        &["--user", "nobody-here"],
    ] {
        husk.run(&[&["run", "--rm"], bad, &[IMAGE, "true"]].concat())?
            .exited(125)?;
    }
    // More than any pipe holds, in and out.
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut cat = husk.command(&["run", "--rm", "-i", "--network", "none", IMAGE, "cat"]);
    let out = ctr::output_with_input(&mut cat, data.clone())?.ok()?;
    ensure!(
        hex(&Sha256::digest(&out.stdout)) == hex(&Sha256::digest(&data)),
        "{} bytes came back",
        out.stdout.len()
    );
    ensure!(husk.text(&["ps", "-aq"])?.is_empty(), "a container is left");
    Ok(())
}

pub fn lives_again(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let script = "echo run $(cat /count 2>/dev/null); echo x >>/count; trap 'echo asked; exit 4' TERM; while :; do sleep 0.2; done";
    let id = husk.detached("one", &[], script)?;
    ensure!(id.len() == 64, "{id:?} is no id");
    let list: Value = serde_json::from_str(&husk.text(&["ps", "--format", "json"])?)?;
    ensure!(
        list["Names"] == "one" && list["State"] == "running",
        "{list}"
    );
    husk.run(&["run", "-d", "--name", "one", IMAGE])?
        .exited(125)?;
    let out = husk
        .run(&["exec", "-i", "one", "sh", "-c", "cat; exit 5"])?
        .exited(5)?;
    ensure!(out.text().is_empty(), "{out:?}");
    let out = husk
        .run(&[
            "exec",
            "-e",
            "A=b",
            "-w",
            "/etc",
            "-u",
            "1000:10",
            "one",
            "sh",
            "-c",
            "echo $A $PWD $(id -u):$(id -g)",
        ])?
        .ok()?;
    ensure!(out.text() == "b /etc 1000:10", "{out:?}");
    husk.run(&["exec", "one", "no-such-program"])?.exited(127)?;
    let used: Value =
        serde_json::from_str(&husk.text(&["stats", "--no-stream", "--format", "json", "one"])?)?;
    ensure!(
        used["Name"] == "one" && used["PIDs"].as_str() > Some("0"),
        "{used}"
    );
    husk.text(&["pause", "one"])?;
    husk.text(&["unpause", "one"])?;
    husk.run(&["rm", "one"])?.exited(1)?;
    husk.run(&["rmi", IMAGE])?.exited(1)?;
    // The end of the log comes with the container's end.
    let follower = ctr::Running::start(&mut husk.command(&["logs", "-f", "one"]), false)?;
    ensure!(husk.text(&["stop", "one"])? == "one");
    let followed = follower.finish()?.ok()?.text();
    ensure!(followed == "run\nasked", "{followed:?}");
    ensure!(husk.state("one")? == "exited" && husk.text(&["wait", "one"])? == "4");
    ensure!(husk.text(&["ps", "-q"])?.is_empty());
    // What it has written is there when it runs again.
    husk.text(&["start", "one"])?;
    wait::until("the second run's words", || {
        let logs = husk.text(&["logs", "one"]).ok()?;
        logs.ends_with("run x").then_some(())
    })?;
    husk.run(&["kill", "-s", "KILL", &id[..12]])?.ok()?;
    ensure!(husk.text(&["wait", "one"])? == "137");
    let logs = husk.text(&["logs", "one"])?;
    ensure!(logs == "run\nasked\nrun x", "{logs:?}");
    ensure!(husk.text(&["logs", "-n", "1", "one"])? == "run x");
    husk.text(&["rm", "one"])?;
    husk.run(&["inspect", "one"])?.exited(1)?;
    husk.text(&["create", "--name", "two", IMAGE, "true"])?;
    ensure!(husk.state("two")? == "created");
    let removed = husk.text(&["prune", "--force", "--all"])?;
    ensure!(
        !removed.contains("two") && removed.contains("pause"),
        "{removed}"
    );
    Ok(())
}

pub fn flags(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let env = husk.root.join("env");
    fs::write(&env, "FROM_FILE=f\n")?;
    let env = env.display().to_string();
    let flags = [
        "-e",
        "A=b",
        "--env-file",
        &env,
        "-w",
        "/var",
        "-u",
        "user",
        "--hostname",
        "guest",
        "--memory",
        "300m",
        "--cpus",
        "1",
        "--pids-limit",
        "33",
        "--read-only",
        "--tmpfs",
        "/scratch:size=1m",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "NET_RAW",
        "--ulimit",
        "nofile=77",
        "--security-opt",
        "no-new-privileges",
    ];
    let script = "echo $A $FROM_FILE $PWD $(id -u):$(id -g) $(hostname) $(ulimit -n)
        cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max
        touch /no 2>/dev/null || echo read-only; touch /scratch/yes && echo scratch
        grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t '
        cat /etc/hostname";
    let out = husk.sh(&flags, script)?.ok()?.text();
    let wanted = format!(
        "b f /var 1000:1000 guest 77\n{}\n33\n100000 100000\nread-only\nscratch\nCapBnd:0000000000002000\nNoNewPrivs:1\nSeccomp:2\nguest",
        300 << 20
    );
    ensure!(out == wanted, "{out}");
    let out = husk
        .sh(
            &["--security-opt", "seccomp=unconfined"],
            "grep ^Seccomp: /proc/self/status",
        )?
        .ok()?;
    ensure!(out.text().ends_with('0'), "{out:?}");
    Ok(())
}

pub fn terminal(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let mut command = husk.command(&[
        "run",
        "-it",
        // Its terminal is the program's, not the init's.
        "--init",
        "--name",
        "tty",
        "--network",
        "none",
        IMAGE,
        "sh",
    ]);
    let mut session = Session::start(&mut command, size(33, 77))?;
    is_terminal_of_size(&mut session)?;
    session.type_in("MINE=kept\n\x10\x11")?;
    ensure!(session.finish()? == 0);
    ensure!(husk.state("tty")? == "running");
    let mut command = husk.command(&["attach", "tty"]);
    let mut session = Session::start(&mut command, size(20, 40))?;
    session.type_in("echo it-is-$MINE\n")?;
    session.expect("it-is-kept")?;
    let mut exec = husk.command(&["exec", "-it", "tty", "sh"]);
    let mut other = Session::start(&mut exec, size(20, 40))?;
    has_size(&mut other, "20 40")?;
    other.type_in("exit 6\n")?;
    ensure!(other.finish()? == 6);
    session.type_in("exit 7\n")?;
    ensure!(session.finish()? == 7);
    Ok(())
}

pub fn volumes(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let host = husk.root.join("shared");
    fs::create_dir(&host)?;
    fs::write(host.join("file"), "before")?;
    let (dir, file) = (
        format!("{}:/dir", host.display()),
        format!("{}:/file:ro", host.join("file").display()),
    );
    let script = "cat /dir/file; (echo x >/file) 2>/dev/null || echo read-only; echo mine >/data/kept; echo from-guest >/dir/guest; sleep 1000";
    let flags = ["-v", &dir, "-v", &file, "-v", "data:/data"];
    husk.detached("volumes", &flags, script)?;
    wait::until("the container's file", || {
        fs::read_to_string(host.join("guest"))
            .ok()
            .filter(|text| !text.is_empty())
    })?;
    ensure!(husk.text(&["logs", "volumes"])? == "beforeread-only");
    fs::write(host.join("file"), "after")?;
    wait::until("the change in the guest", || {
        let seen = husk
            .text(&["exec", "volumes", "cat", "/dir/file", "/file"])
            .ok()?;
        (seen == "afterafter").then_some(())
    })?;
    husk.text(&["rm", "-f", "volumes"])?;
    // A volume outlives its container.
    let out = husk
        .sh(
            &["-v", "data:/data:ro"],
            "cat /data/kept; touch /data/no || echo read-only",
        )?
        .ok()?;
    ensure!(out.text() == "mine\nread-only", "{out:?}");
    Ok(())
}
