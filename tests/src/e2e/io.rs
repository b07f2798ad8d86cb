//! Standard streams: apart, whole, and to the last byte.

use anyhow::{Result, ensure};
use husk_tests::{
    ctr::{self, Running, output_with_input},
    wait,
};

use crate::{
    Test,
    context::{Context, sha256},
    husk_test, test,
};

const BIG: usize = 64 << 20;

pub const TESTS: &[Test] = &[
    test("stdout_and_stderr_apart", apart),
    test("stdin_to_its_end", stdin_to_its_end),
    test("stdout_64_mib", stdout_64_mib),
    test("stdin_64_mib", stdin_64_mib),
    test("output_of_a_process_that_ends_at_once", ends_at_once),
    test("log_to_a_file", log_to_a_file),
    test("log_to_a_program", log_to_a_program),
    husk_test("stdout_can_be_opened_again", stdout_can_be_opened_again),
    test(
        "a_background_child_does_not_hold_the_exec",
        background_child,
    ),
];

fn apart(suite: &Context) -> Result<()> {
    let out = suite.sh("echo to-out; echo to-err >&2")?.ok()?;
    ensure!(
        out.text() == "to-out" && out.errors() == "to-err",
        "{out:?}"
    );
    Ok(())
}

fn stdin_to_its_end(suite: &Context) -> Result<()> {
    let id = suite.containerd.fresh_id("stdin");
    let mut command = suite
        .containerd
        .run_command(suite.runtime, &id, &["--rm"], &["cat"]);
    let mut running = Running::start(&mut command, true)?;
    // ctr passes the end of its input on only once the task is there.
    suite.containerd.running(&id)?;
    running.feed(b"one\ntwo\n".to_vec());
    let out = running.finish()?.ok()?;
    ensure!(out.stdout == b"one\ntwo\n", "{out:?}");
    Ok(())
}

/// Bytes that do not repeat within any buffer on the way.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn stdout_64_mib(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let bytes = pattern(BIG);
    std::fs::write(dir.path().join("data"), &bytes)?;
    let mount = format!(
        "type=bind,src={},dst=/mnt,options=rbind:ro",
        dir.path().display()
    );
    let id = suite.containerd.fresh_id("stdout");
    let script = "cat /mnt/data; read all_seen";
    let flags = ["--rm", "--mount", &mount];
    let mut command =
        suite
            .containerd
            .run_command(suite.runtime, &id, &flags, &["sh", "-c", script]);
    let mut running = Running::start(&mut command, true)?;
    // ctr stops reading a moment after the task's end, whatever the pipe still holds: so the task waits.
    wait::until("all of it", || (running.stdout_len() >= BIG).then_some(()))?;
    running.feed(b"all seen\n".to_vec());
    let out = running.finish()?.ok()?;
    ensure!(out.stdout.len() == BIG, "{} bytes came", out.stdout.len());
    ensure!(sha256(&out.stdout) == sha256(&bytes), "the bytes differ");
    Ok(())
}

fn stdin_64_mib(suite: &Context) -> Result<()> {
    let bytes = pattern(BIG);
    let hash = sha256(&bytes);
    let id = suite.containerd.fresh_id("stdin");
    let mut command = suite
        .containerd
        .run_command(suite.runtime, &id, &["--rm"], &["sha256sum"]);
    let out = output_with_input(&mut command, bytes)?.ok()?;
    ensure!(out.text().starts_with(&hash), "{out:?}");
    Ok(())
}

fn ends_at_once(suite: &Context) -> Result<()> {
    for _ in 0..5 {
        let out = suite.run(&[], &["echo", "brief"])?.ok()?;
        ensure!(out.text() == "brief", "{out:?}");
    }
    Ok(())
}

fn log_to_a_file(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("log");
    let uri = format!("file://{}", log.display());
    let container = suite.detached(
        &["--log-uri", &uri],
        &["sh", "-c", "echo logged; sleep 1000"],
    )?;
    wait::until("the line in the file", || {
        std::fs::read_to_string(&log)
            .is_ok_and(|text| text.contains("logged"))
            .then_some(())
    })?;
    drop(container);
    Ok(())
}

fn log_to_a_program(suite: &Context) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("logger");
    // containerd's contract with a binary logger (runtime/v2/README.md): fd 3 and 4 are the container's outputs, fd 5 is
    // closed once the logger is ready, and CONTAINER_ID names the container.
    std::fs::write(
        &program,
        "#!/bin/sh\nexec 5>&-; cat <&3 >\"$2.out\" & cat <&4 >\"$2.err\" & wait; echo \"$CONTAINER_ID\" >\"$2.end\"\n",
    )?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let log = dir.path().join("log");
    let uri = format!("binary://{}?to={}", program.display(), log.display());
    let container = suite.detached(
        &["--log-uri", &uri],
        &["sh", "-c", "echo to-out; echo to-err >&2; exit 3"],
    )?;
    let file = |name: &str| std::fs::read_to_string(log.with_extension(name));
    // It ends when the container's outputs do.
    wait::until("the logger to end", || {
        file("end")
            .is_ok_and(|text| text.ends_with('\n'))
            .then_some(())
    })?;
    ensure!(file("end")?.trim() == container.id, "{:?}", file("end")?);
    ensure!(file("out")? == "to-out\n" && file("err")? == "to-err\n");
    Ok(())
}

fn stdout_can_be_opened_again(suite: &Context) -> Result<()> {
    // Programs that log to /dev/stdout open it: a socket there would refuse.
    let out = suite
        .sh("echo again > /dev/stdout; echo err > /dev/stderr")?
        .ok()?;
    ensure!(out.text() == "again" && out.errors() == "err", "{out:?}");
    Ok(())
}

fn background_child(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let exec_id = suite.containerd.fresh_id("exec");
    let mut command = suite.containerd.ctr();
    command.args(["task", "exec", "--exec-id", &exec_id, &container.id]);
    command.args(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo done"]);
    let out = ctr::output(&mut command)?.ok()?;
    ensure!(out.text() == "done", "{out:?}");
    Ok(())
}
