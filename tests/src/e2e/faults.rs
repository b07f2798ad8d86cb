//! What goes wrong is told clearly and leaves nothing behind.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    ctr::{self, Output, Running},
    host::{self, Traces},
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::{Test, context::Context, husk_test};

pub const TESTS: &[Test] = &[
    husk_test("no_dev_kvm", no_dev_kvm),
    husk_test("dev_kvm_is_something_else", wrong_dev_kvm),
    husk_test("missing_kernel", missing_kernel),
    husk_test("wrong_kernel", wrong_kernel),
    husk_test("missing_vmm", missing_vmm),
    husk_test("broken_config_names_the_line", broken_config),
    husk_test("more_memory_than_the_host_has", too_much_memory),
    husk_test("root_file_system_missing", rootfs_missing),
    husk_test("guest_without_an_init", guest_without_init),
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

/// Runs `true` with a configuration of its own.
fn run_with_config(suite: &Context, config: &str) -> Result<Output> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("config.toml");
    fs::write(&path, config)?;
    suite.run(
        &["--runtime-config-path", &path.to_string_lossy()],
        &["true"],
    )
}

/// It fails, the sentence says these words, and the host is as before.
fn fails(suite: &Context, config: &str, words: &[&str]) -> Result<()> {
    let before = Traces::now();
    let out = run_with_config(suite, config)?;
    ensure!(out.code != 0, "{out:?}");
    for word in words {
        ensure!(out.errors().contains(word), "no {word:?} in {out:?}");
    }
    before.restored()
}

/// Puts something else in place of `/dev/kvm` while `test` runs.
fn without_kvm(replacement: Option<&str>, test: impl FnOnce() -> Result<()>) -> Result<()> {
    let (kvm, aside) = (Path::new("/dev/kvm"), Path::new("/dev/kvm.aside"));
    fs::rename(kvm, aside)?;
    if let Some(text) = replacement {
        fs::write(kvm, text)?;
    }
    let result = test();
    // Missing is as it should be where there was no replacement.
    let _ = fs::remove_file(kvm);
    fs::rename(aside, kvm)?;
    result
}

fn no_dev_kvm(suite: &Context) -> Result<()> {
    without_kvm(None, || fails(suite, "", &["/dev/kvm"]))
}

fn wrong_dev_kvm(suite: &Context) -> Result<()> {
    without_kvm(Some("not a device"), || fails(suite, "", &["/dev/kvm"]))
}

fn missing_kernel(suite: &Context) -> Result<()> {
    fails(
        suite,
        "kernel = \"/no/such/vmlinux\"\n",
        &["/no/such/vmlinux"],
    )
}

fn wrong_kernel(suite: &Context) -> Result<()> {
    fails(suite, "kernel = \"/etc/passwd\"\n", &["/etc/passwd", "ELF"])
}

fn missing_vmm(suite: &Context) -> Result<()> {
    fails(
        suite,
        "vmm = \"/no/such/husk-vmm\"\n",
        &["/no/such/husk-vmm"],
    )
}

fn broken_config(suite: &Context) -> Result<()> {
    fails(
        suite,
        "# a comment\nkernal = \"/boot/vmlinux\"\n",
        &["config.toml", "kernal", "line 2"],
    )
}

fn too_much_memory(suite: &Context) -> Result<()> {
    fails(
        suite,
        "default_memory_mib = 900000\nmax_memory_mib = 900000\n",
        &["memory", "MiB"],
    )
}

fn rootfs_missing(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let mut run = suite.spec(&["true"])?;
    run.spec["root"]["path"] = json!("/no/such/rootfs");
    let out = run.run()?;
    ensure!(
        out.code != 0 && out.errors().contains("/no/such/rootfs"),
        "{out:?}"
    );
    before.restored()
}

fn guest_without_init(suite: &Context) -> Result<()> {
    fails(
        suite,
        "kernel_params = \"rdinit=/no-such-init\"\n",
        &["panic"],
    )
}

fn guest_panic(suite: &Context) -> Result<()> {
    let before = Traces::now();
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
        suite
            .containerd
            .log()
            .contains("Kernel panic")
            .then_some(())
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
    for _ in 0..5 {
        let out = suite.run(&[], &["no-such-program"])?;
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
    }
    before.restored()
}

/// Waits until a task is stopped or gone.
fn not_running(suite: &Context, id: &str) -> Result<()> {
    wait::until("the task to stop", || {
        (suite.containerd.state(id).ok()? != "RUNNING").then_some(())
    })
}

/// A running container and the daemon's events from before it began.
fn watched(suite: &Context, test: impl FnOnce(&str) -> Result<()>) -> Result<String> {
    let mut events = suite.containerd.ctr();
    let events = Running::start(events.arg("events"), false)?;
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let result = test(&container.id);
    drop(container);
    thread::sleep(Duration::from_millis(500));
    kill(Pid::from_raw(events.pid().cast_signed()), Signal::SIGKILL)?;
    let told = events.finish()?.text();
    result.map(|()| told)
}

fn vmm_killed(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let told = watched(suite, |id| {
        end(&vmm(id).context("no VMM")?)?;
        not_running(suite, id)
    })?;
    ensure!(
        told.matches("/tasks/exit").count() == 1,
        "one exit event, not:\n{told}"
    );
    ensure!(told.contains("137"), "exit status 137 in:\n{told}");
    before.restored()
}

fn shim_killed(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let told = watched(suite, |id| {
        let shim = host::shim_of(id).context("no shim")?;
        let vmm = host::vmm_of(&shim).context("no VMM")?;
        end(&shim)?;
        wait::until("the VMM to follow its shim", || {
            (!host::processes().iter().any(|p| p.pid == vmm.pid)).then_some(())
        })?;
        not_running(suite, id)
    })?;
    ensure!(
        told.contains("/tasks/exit") && told.contains("137"),
        "an exit event with 137, not:\n{told}"
    );
    before.restored()
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
