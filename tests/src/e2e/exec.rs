//! Further processes in a running container.

use anyhow::{Result, ensure};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("joins_the_container", joins),
    test("exit_code_and_output", exit_code_and_output),
    test("unknown_executable", unknown_executable),
    test("twenty_at_once", twenty_at_once),
    husk_test("many_one_after_another", many),
    test("directory_and_user", directory_and_user),
];

fn joins(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sh", "-c", "echo mark > /tmp/mark; exec sleep 1000"])?;
    let out = container
        .exec(&[
            "sh",
            "-c",
            "cat /tmp/mark; hostname; tr '\\0' ' ' < /proc/1/cmdline",
        ])?
        .ok()?;
    ensure!(
        out.text().starts_with("mark\n") && out.text().contains("sleep 1000"),
        "{out:?}"
    );
    Ok(())
}

fn exit_code_and_output(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    for code in [0, 1, 42, 127] {
        let out = container
            .exec(&["sh", "-c", &format!("echo out; echo err >&2; exit {code}")])?
            .exited(code)?;
        ensure!(
            out.text() == "out" && out.errors().starts_with("err"),
            "{out:?}"
        );
    }
    Ok(())
}

fn unknown_executable(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let out = container.exec(&["no-such-program"])?;
    ensure!(out.code != 0, "{out:?}");
    ensure!(
        out.errors().contains("executable file not found in $PATH"),
        "{out:?}"
    );
    container.exec(&["true"])?.ok()?;
    Ok(())
}

fn twenty_at_once(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let started: Vec<_> = (0..20)
        .map(|n| container.start_exec(&["sh", "-c", &format!("echo number {n}; exit {n}")]))
        .collect::<Result<_>>()?;
    for (n, running) in started.into_iter().enumerate() {
        let out = running.finish()?.exited(n.try_into()?)?;
        ensure!(out.text() == format!("number {n}"), "{out:?}");
    }
    Ok(())
}

fn many(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let count = || -> Result<String> {
        Ok(container
            .exec(&["sh", "-c", "set -- /proc/[0-9]*; echo $#"])?
            .ok()?
            .text())
    };
    let before = count()?;
    for n in 0..40 {
        let out = container.exec(&["echo", &n.to_string()])?.ok()?;
        ensure!(out.text() == n.to_string(), "exec {n}: {out:?}");
    }
    ensure!(count()? == before, "processes stay behind in the container");
    Ok(())
}

fn directory_and_user(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let mut command = suite.containerd.ctr();
    command.args([
        "task",
        "exec",
        "--exec-id",
        "u",
        "--cwd",
        "/tmp",
        "--user",
        "1000",
        &container.id,
    ]);
    command.args(["sh", "-c", "pwd; id -u"]);
    let out = husk_tests::ctr::output(&mut command)?.ok()?;
    ensure!(out.text() == "/tmp\n1000", "{out:?}");
    Ok(())
}
