//! A command in a container: its exit code, its output, the sentence one reads when it cannot run.

use anyhow::{Result, ensure};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("output_and_exit_code_0", output_and_exit_code_0),
    test("exit_codes_pass_through", exit_codes_pass_through),
    test("death_by_signal_is_128_plus_n", death_by_signal),
    test(
        "environment_directory_and_user",
        environment_directory_and_user,
    ),
    test("unknown_executable", unknown_executable),
    test(
        "executable_without_permission",
        executable_without_permission,
    ),
    test("unknown_user", unknown_user),
    test("missing_mount_source", missing_mount_source),
    test("bind_mounts_both_ways", bind_mounts),
    husk_test("runs_its_own_kernel", own_kernel),
];

fn output_and_exit_code_0(suite: &Context) -> Result<()> {
    let out = suite.run(&[], &["echo", "hello from inside"])?.ok()?;
    ensure!(out.text() == "hello from inside", "{out:?}");
    Ok(())
}

fn exit_codes_pass_through(suite: &Context) -> Result<()> {
    for code in [1, 42, 126, 127, 255] {
        suite.sh(&format!("exit {code}"))?.exited(code)?;
    }
    // What a shell says of a command it cannot find or run.
    suite.sh("no-such-command")?.exited(127)?;
    suite.sh("/etc/passwd")?.exited(126)?;
    Ok(())
}

fn death_by_signal(suite: &Context) -> Result<()> {
    // PID 1 cannot kill itself; its child can.
    suite.sh("sh -c 'kill -9 $$'; exit $?")?.exited(137)?;
    suite.sh("sh -c 'kill -15 $$'; exit $?")?.exited(143)?;
    Ok(())
}

fn environment_directory_and_user(suite: &Context) -> Result<()> {
    let out = suite
        .run(
            &[
                "--env",
                "COLOUR=green",
                "--cwd",
                "/tmp",
                "--user",
                "1000:1000",
            ],
            &["sh", "-c", "echo $COLOUR; pwd; id -u; id -g"],
        )?
        .ok()?;
    ensure!(out.text() == "green\n/tmp\n1000\n1000", "{out:?}");
    Ok(())
}

fn unknown_executable(suite: &Context) -> Result<()> {
    let out = suite.run(&[], &["no-such-program"])?;
    ensure!(out.code != 0, "{out:?}");
    // The sentence that docker and nerdctl turn into exit code 127.
    let message = "exec: \"no-such-program\": executable file not found in $PATH";
    ensure!(out.errors().contains(message), "{out:?}");
    let out = suite.run(&[], &["/no/such/program"])?;
    ensure!(
        out.errors().contains("no such file or directory"),
        "{out:?}"
    );
    Ok(())
}

fn executable_without_permission(suite: &Context) -> Result<()> {
    let out = suite.run(&[], &["/etc/passwd"])?;
    ensure!(
        out.code != 0 && out.errors().contains("permission denied"),
        "{out:?}"
    );
    Ok(())
}

fn unknown_user(suite: &Context) -> Result<()> {
    // ctr looks the name up in the image itself; a number it passes on, and any number is a user.
    let out = suite.run(&["--user", "nobody-of-that-name"], &["id"])?;
    ensure!(
        out.code != 0
            && (out.errors().contains("nobody-of-that-name")
                || out.errors().contains("no users found")),
        "{out:?}"
    );
    let out = suite
        .run(&["--user", "4321:1234"], &["sh", "-c", "id -u; id -g"])?
        .ok()?;
    ensure!(out.text() == "4321\n1234", "{out:?}");
    Ok(())
}

fn missing_mount_source(suite: &Context) -> Result<()> {
    let out = suite.run(
        &[
            "--mount",
            "type=bind,src=/no/such/source,dst=/mnt,options=rbind:ro",
        ],
        &["true"],
    )?;
    ensure!(
        out.code != 0 && out.errors().contains("/no/such/source"),
        "{out:?}"
    );
    Ok(())
}

fn bind_mounts(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("from-host"), "host\n")?;
    let mount = |options: &str| {
        format!(
            "type=bind,src={},dst=/mnt,options={options}",
            dir.path().display()
        )
    };
    let out = suite
        .run(
            &["--mount", &mount("rbind:rw")],
            &[
                "sh",
                "-c",
                "cat /mnt/from-host; echo guest > /mnt/from-guest",
            ],
        )?
        .ok()?;
    ensure!(out.text() == "host", "{out:?}");
    ensure!(std::fs::read_to_string(dir.path().join("from-guest"))? == "guest\n");

    let out = suite.run(
        &["--mount", &mount("rbind:ro")],
        &["sh", "-c", "echo x > /mnt/refused"],
    )?;
    ensure!(
        out.code != 0 && out.errors().contains("Read-only file system"),
        "{out:?}"
    );
    // A single file.
    let file = dir.path().join("from-host");
    let mount = format!(
        "type=bind,src={},dst=/etc/motd,options=bind:ro",
        file.display()
    );
    let out = suite
        .run(&["--mount", &mount], &["cat", "/etc/motd"])?
        .ok()?;
    ensure!(out.text() == "host", "{out:?}");
    Ok(())
}

fn own_kernel(suite: &Context) -> Result<()> {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let guest = suite.run(&[], &["uname", "-r"])?.ok()?.text();
    ensure!(
        !guest.is_empty() && guest != host.trim(),
        "the container sees the host's kernel {guest}"
    );
    Ok(())
}
