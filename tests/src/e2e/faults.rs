//! What breaks in the middle is told clearly and leaves nothing behind.

use std::{process::Command, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    ctr::{self, Running},
    events::{Events, topic},
    host::{self, Traces},
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::{Test, bad_input::fails, context::Context, husk_test};

pub const TESTS: &[Test] = &[
    husk_test("guest_without_an_init", guest_without_init),
    husk_test("agent_that_ends_at_once", agent_ends),
    husk_test("agent_that_never_answers", agent_silent),
    husk_test("agent_that_dies_under_a_task", agent_dies),
    husk_test("guest_kernel_panic_under_a_task", guest_panic),
    husk_test("reader_of_the_output_gone", reader_gone),
    husk_test("failed_starts_leave_nothing", failed_starts),
    husk_test(
        "vmm_killed_at_every_phase_of_a_start",
        vmm_killed_during_start,
    ),
    husk_test("vmm_killed_under_a_task", vmm_killed),
    husk_test("shim_killed_under_a_task", shim_killed),
    husk_test("containerd_killed_under_a_task", containerd_killed),
];

fn guest_without_init(suite: &Context) -> Result<()> {
    fails(
        suite,
        "kernel_params = \"rdinit=/no-such-init\"\n",
        &["panic"],
    )
}

/// A configuration with an initramfs of busybox, whose `applet` is the guest's PID 1.
fn other_agent(suite: &Context, applet: &str, more: &str, words: &[&str]) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let archive = dir.path().join("initramfs.cpio");
    let script = format!(
        "mkdir -p root/dev root/bin && cp /bin/busybox root/bin/ && ln -s busybox root/bin/{applet} && \
         cd root && mknod dev/console c 5 1 && find . | busybox cpio -o -H newc > {}",
        archive.display()
    );
    ctr::output(
        Command::new("sh")
            .args(["-c", &script])
            .current_dir(dir.path()),
    )?
    .ok()?;
    let config = format!(
        "initramfs = \"{}\"\nkernel_params = \"rdinit=/bin/{applet}\"\n{more}",
        archive.display()
    );
    fails(suite, &config, words)
}

fn agent_ends(suite: &Context) -> Result<()> {
    other_agent(suite, "false", "", &["Attempted to kill init"])
}

fn agent_silent(suite: &Context) -> Result<()> {
    // busybox's init waits for somebody at the console.
    other_agent(
        suite,
        "init",
        "start_timeout_ms = 8000\n",
        &["did not report", "start_timeout_ms"],
    )
}

fn agent_dies(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let log = suite.containerd.log().len();
    // In the guest's own pid namespace, and allowed to trace, a container can overwrite the agent's code.
    let script = "set -- $(grep -m 1 r-xp /proc/1/maps | tr - ' '); \
        dd if=/dev/zero of=/proc/1/mem bs=4096 conv=notrunc seek=$((0x$1 / 4096)) count=$(((0x$2 - 0x$1) / 4096)); sleep 1000";
    let mut run = suite.spec(&["sh", "-c", script])?;
    if let Some(namespaces) = run.spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|n| n["type"] != "pid");
    }
    for set in ["bounding", "permitted", "effective"] {
        if let Some(set) = run.spec["process"]["capabilities"][set].as_array_mut() {
            set.push(json!("CAP_SYS_PTRACE"));
        }
    }
    run.run()?.exited(137)?;
    wait::until("the agent's end in the log", || {
        let told = suite.containerd.log_since(log);
        told.contains("Attempted to kill init").then_some(())
    })?;
    before.restored()
}

fn guest_panic(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let log = suite.containerd.log().len();
    // The limit's OOM becomes the kernel's panic; a container that may write the guest's sysctls can do that to
    // its own guest, and to nothing else.
    let mut run = suite.spec(&[
        "sh",
        "-c",
        "echo 2 > /proc/sys/vm/panic_on_oom && x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done",
    ])?;
    run.spec["linux"]["readonlyPaths"] = json!([]);
    run.spec["linux"]["resources"]["memory"] = json!({ "limit": 33_554_432 });
    let out = run.run()?;
    ensure!(out.code == 137, "{out:?}");
    wait::until("the panic in the log", || {
        let told = suite.containerd.log_since(log);
        told.contains("Kernel panic").then_some(())
    })?;
    before.restored()
}

fn reader_gone(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let container = suite.detached(&[], &["sh", "-c", "while :; do echo noise; done"])?;
    // Nobody reads its output: it must neither end nor stand in the way of the rest.
    container.exec(&["echo", "still here"])?.ok()?;
    drop(container);
    before.restored()
}

fn failed_starts(suite: &Context) -> Result<()> {
    let before = Traces::now();
    for _ in 0..3 {
        let out = suite.run(&[], &["no-such-program"])?;
        ensure!(out.code != 0, "{out:?}");
    }
    let mount = "type=bind,src=/no/such/source,dst=/mnt,options=rbind:ro";
    for (flags, command) in [
        (&[][..], "/etc/passwd"),
        (&["--mount", mount], "true"),
        (&["--cwd", "/etc/passwd/x"], "true"),
    ] {
        let out = suite.run(flags, &[command])?;
        ensure!(out.code != 0, "{out:?}");
    }
    before.restored()
}

/// The VMM below whichever shim serves this container, as soon as there is one.
fn vmm(id: &str) -> Option<host::Process> {
    host::vmm_of(&host::shim_of(id)?)
}

fn end(process: &host::Process) -> Result<()> {
    kill(Pid::from_raw(process.pid.cast_signed()), Signal::SIGKILL)
        .with_context(|| format!("killing {} {}", process.name, process.pid))
}

fn vmm_killed_during_start(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let events = Events::listen(&suite.containerd)?;
    for delay in [0, 20, 50, 100, 200, 350, 500, 700, 1000, 1500] {
        let id = suite.containerd.fresh_id("killed");
        let mut command =
            suite
                .containerd
                .run_command(suite.runtime, &id, &["--rm"], &["sleep", "1000"]);
        let running = Running::start(&mut command, false)?;
        let vmm = wait::until("the VMM", || vmm(&id))?;
        thread::sleep(Duration::from_millis(delay));
        end(&vmm)?;
        let out = running.finish()?;
        ensure!(out.code != 0, "killed after {delay} ms: {out:?}");
        suite.containerd.remove(&id)?;
        // A task that had been started has ended by SIGKILL, once; one that had not says nothing but that.
        let told = events.until_removed(&id)?;
        let (starts, exits) = (topic(&told, "/tasks/start"), topic(&told, "/tasks/exit"));
        ensure!(
            exits.len() <= 1 && exits.len() >= starts.len(),
            "killed after {delay} ms: {told:?}"
        );
        ensure!(
            exits
                .iter()
                .all(|exit| exit.contains("\"exit_status\":137")),
            "killed after {delay} ms: {told:?}"
        );
    }
    before.restored()
}

/// Waits until a task is stopped or gone.
fn not_running(suite: &Context, id: &str) -> Result<()> {
    wait::until("the task to stop", || {
        (suite.containerd.state(id).ok()? != "RUNNING").then_some(())
    })
}

/// Does something to a running container's host side that must end the task: with one TaskExit, with 137.
fn ends_with_137(suite: &Context, break_it: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    let before = Traces::now();
    let events = Events::listen(&suite.containerd)?;
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let id = container.id.clone();
    break_it(&id)?;
    not_running(suite, &id)?;
    drop(container);
    let told = events.until_removed(&id)?;
    let exits = topic(&told, "/tasks/exit");
    ensure!(
        exits.len() == 1 && exits.iter().all(|e| e.contains("\"exit_status\":137")),
        "one exit with 137 among {told:#?}"
    );
    before.restored()
}

fn vmm_killed(suite: &Context) -> Result<()> {
    ends_with_137(suite, |id| end(&vmm(id).context("no VMM")?))
}

fn shim_killed(suite: &Context) -> Result<()> {
    ends_with_137(suite, |id| {
        let shim = host::shim_of(id).context("no shim")?;
        let vmm = host::vmm_of(&shim).context("no VMM")?;
        end(&shim)?;
        wait::until("the VMM to follow its shim", || {
            (!host::processes().iter().any(|p| p.pid == vmm.pid)).then_some(())
        })
    })
}

fn containerd_killed(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let container = suite.detached(
        &[],
        &["sh", "-c", "echo before > /tmp/mark; exec sleep 1000"],
    )?;
    suite.containerd.kill();
    suite.containerd.relaunch()?;
    ensure!(
        container.state()? == "RUNNING",
        "the task is {:?}",
        container.state()?
    );
    let out = container.exec(&["cat", "/tmp/mark"])?.ok()?;
    ensure!(out.text() == "before", "{out:?}");
    let wait = suite.containerd.start_ctr(
        &["task", "kill", "--signal", "SIGKILL", &container.id],
        false,
    )?;
    wait.finish()?.ok()?;
    wait::until("the task to stop", || {
        (container.state().ok()? == "STOPPED").then_some(())
    })?;
    let deleted = ctr::output(
        suite
            .containerd
            .ctr()
            .args(["task", "delete", &container.id]),
    )?;
    ensure!(deleted.code == 137 || deleted.code == 0, "{deleted:?}");
    drop(container);
    before.restored()
}
