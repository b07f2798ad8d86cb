//! From `docker run` to a container's end.

use anyhow::{Result, ensure};
use husk_tests::{ctr::output_with_input, docker::BUSYBOX, wait};

use crate::{
    context::Context,
    terminal::{Session, is_terminal_of_size, size},
};

pub fn run(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    // All that a run has settings for, in one container; its end is the command's.
    let script = "tr a-z A-Z; echo $A; id -u; pwd; hostname; echo oops >&2; ulimit -n; cat /proc/sys/kernel/msgmax; exit 7";
    let flags = [
        "run",
        "--rm",
        "--interactive",
        "--env",
        "A=b",
        "--user",
        "user",
        "--workdir",
        "/home/user",
        "--hostname",
        "inner",
        "--ulimit",
        "nofile=77",
        "--sysctl",
        "kernel.msgmax=4321",
    ];
    let all = [&flags[..], &[BUSYBOX, "sh", "-c", script]].concat();
    let out = output_with_input(&mut docker.command(&all), b"input\n".to_vec())?.exited(7)?;
    ensure!(
        out.text() == "INPUT\nb\n1000\n/home/user\ninner\n77\n4321" && out.errors() == "oops",
        "{out:?}"
    );
    // As the runtime is named without any setting of the daemon's.
    let explicit = ["run", "--rm", "--runtime", suite.runtime.containerd_type()];
    docker.ok(&[&explicit[..], &[BUSYBOX, "true"]].concat())?;
    let missing = docker
        .run(&["run", "--rm", BUSYBOX, "no-such-program"])?
        .exited(127)?;
    ensure!(missing.errors().contains("no-such-program"), "{missing:?}");
    docker
        .run(&["run", "--rm", BUSYBOX, "/etc/passwd"])?
        .exited(126)?;
    Ok(())
}

pub fn terminal(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let name = docker.fresh("tty");
    let container = docker.named(&name);
    let mut command = docker.command(&["run", "-it", "--name", &name, BUSYBOX, "sh"]);
    let mut session = Session::start(&mut command, size(33, 77))?;
    is_terminal_of_size(&mut session)?;
    // ctrl-p ctrl-q
    session.type_in("\u{10}\u{11}")?;
    let code = session.finish()?;
    ensure!(code == 0, "exit code {code} of a client that leaves");
    let mut again = Session::start(&mut docker.command(&["attach", &name]), size(24, 80))?;
    again.type_in("echo still-$((1 + 2))\n")?;
    again.expect("still-3")?;
    // Meanwhile another one in the same container.
    let mut exec = docker.command(&["exec", "-it", "--env", "B=c", &name, "sh"]);
    let mut exec = Session::start(&mut exec, size(24, 80))?;
    exec.type_in("test -t 0 && echo all-$B$((1 + 2)); exit 5\n")?;
    exec.expect("all-c3")?;
    let code = exec.finish()?;
    ensure!(code == 5, "exit code {code} of an exec");
    again.type_in("exit 6\n")?;
    let code = again.finish()?;
    ensure!(code == 6, "exit code {code}");
    let logs = container.logs()?;
    ensure!(logs.contains("still-3"), "{logs}");
    Ok(())
}

pub fn stop(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let script = "trap 'echo stopping; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let polite = docker.detached(&[BUSYBOX, "sh", "-c", script])?;
    let follower = docker.start_client(&["logs", "--follow", &polite.name], false)?;
    polite.until_logs("ready")?;
    polite.ok(&["stop", "--time", "60"])?;
    let followed = follower.finish()?.ok()?;
    ensure!(followed.text() == "ready\nstopping", "{followed:?}");
    let state = polite.inspect("{{.State.Status}} {{.State.ExitCode}}")?;
    ensure!(state == "exited 3", "{state}");
    // It starts again, with its files, and does not want to end.
    polite.ok(&["start"])?;
    wait::until("it to run again", || {
        (polite.logs().ok()?.matches("ready").count() == 2).then_some(())
    })?;
    polite.ok(&["kill", "--signal", "KILL"])?;
    let code = polite.ok(&["wait"])?;
    ensure!(code == "137", "{code}");
    Ok(())
}

pub fn restart(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let script = "echo run; exit 4";
    let failing = docker.detached(&["--restart", "on-failure:2", BUSYBOX, "sh", "-c", script])?;
    // The probe follows a file.
    let healthy = docker.detached(&[
        "--health-cmd",
        "test -e /ok",
        "--health-interval",
        "1s",
        "--health-retries",
        "1",
        "--health-timeout",
        "60s",
        BUSYBOX,
        "sh",
        "-c",
        "touch /ok; sleep 1000",
    ])?;
    healthy.until("{{.State.Health.Status}}", "healthy")?;
    healthy.sh("rm /ok")?.ok()?;
    healthy.until("{{.State.Health.Status}}", "unhealthy")?;
    failing.until(
        "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}",
        "2 exited 4",
    )?;
    ensure!(failing.logs()? == "run\nrun\nrun", "{}", failing.logs()?);
    healthy.ok(&["restart", "--time", "0"])?;
    healthy.until("{{.State.Health.Status}}", "healthy")?;
    Ok(())
}

pub fn refused(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    for (flags, words) in [
        (
            &["--network", "host"][..],
            "hostNetwork is not possible for a container in a VM",
        ),
        (&["--runtime", "husk-missing"], "missing.toml"),
        (&["--runtime", "husk-wrong"], "no_such_key"),
        (&["--runtime", "io.containerd.hask.v2"], "hask"),
    ] {
        let head = [&["run", "--rm"], flags].concat();
        let out = docker
            .run(&[&head[..], &[BUSYBOX, "true"]].concat())?
            .exited(125)?;
        ensure!(out.errors().contains(words), "no {words:?} in {out:?}");
    }
    Ok(())
}
