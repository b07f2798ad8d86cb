//! Who the process is, what it may, how it starts and fails to.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use husk_agent::container::{Container, Io, LaunchError};
use serde_json::json;

use crate::support::{Bundle, destroy, exec, exec_sh, pipes, wait};

#[tokio::test]
async fn output_and_exit_code() {
    let output = Bundle::sh("echo out; echo err >&2; exit 42").run().await;
    assert_eq!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()),
        (42, "out\n", "err\n")
    );
}

#[tokio::test]
async fn a_signal_is_a_signal() {
    // Not the init of its pid namespace: that one's signals are ignored.
    let output = Bundle::sh("kill -TERM $$; echo survived")
        .without_namespace("pid")
        .run()
        .await;
    assert_eq!(output.code, 128 + 15, "{output:?}");
}

#[tokio::test]
async fn signals_have_their_default_effect() {
    let output = Bundle::new(&["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"])
        .run()
        .await;
    assert_eq!(
        output.stdout.replace('\t', " "),
        "SigBlk: 0000000000000000\nSigIgn: 0000000000000000\n"
    );
}

#[tokio::test]
async fn the_words_for_a_missing_executable() {
    for (name, words) in [
        ("foo", "exec: \"foo\": executable file not found in $PATH"),
        ("/x", "exec: \"/x\": stat /x: no such file or directory"),
    ] {
        let error = Bundle::new(&[name]).fail().await;
        assert_eq!(error, LaunchError::NotFound(words.to_owned()));
    }
    for (name, words) in [
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ("/etc", "exec: \"/etc\": is a directory"),
    ] {
        let error = Bundle::new(&[name]).fail().await;
        assert_eq!(error, LaunchError::PermissionDenied(words.to_owned()));
    }
}

#[tokio::test]
async fn execve_fails_at_start() {
    for (content, words) in [
        (
            "#!/no/such/interpreter\n",
            "exec /script: no such file or directory",
        ),
        ("nonsense", "exec /script: exec format error"),
    ] {
        let bundle = Bundle::new(&["/script"]);
        let script = bundle.root().join("script");
        fs::write(&script, content).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let waiting = bundle.create().await.unwrap();
        let error = waiting.streams.finish(waiting.launched).await.unwrap_err();
        assert_eq!(error.to_string(), words);
        waiting.container.delete().await.unwrap();
    }
}

#[tokio::test]
async fn a_gate_that_is_given_up_ends_the_process() {
    let bundle = Bundle::sh("echo never");
    let waiting = bundle.create().await.unwrap();
    let pid = waiting.launched.pid;
    drop(waiting.launched);
    let output = waiting.streams.collect(pid).await;
    assert_eq!((output.code, output.stdout.as_str()), (0, ""));
    waiting.container.delete().await.unwrap();
}

#[tokio::test]
async fn users_groups_umask_and_home() {
    let user = json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 0o27});
    let output = Bundle::sh("id -u; id -g; id -G; umask; echo $HOME")
        .with("/process/user", user)
        .run()
        .await;
    assert_eq!(output.stdout, "1000\n1001\n1001 7 8\n0027\n/\n");
    let output = Bundle::sh("id -u; id -g; id -G; echo $HOME")
        .with("/process/user", json!({"username": "www"}))
        .run()
        .await;
    assert_eq!(output.stdout, "33\n34\n34 4\n/var/www\n");
    let error = Bundle::sh("true")
        .with("/process/user", json!({"username": "foo"}))
        .fail()
        .await;
    assert_eq!(
        error.to_string(),
        "unable to find user foo: no matching entries in passwd file"
    );
}

#[tokio::test]
async fn a_user_can_reopen_its_streams() {
    let output = Bundle::sh("echo again > /dev/stdout; echo oops > /dev/stderr")
        .with("/process/user", json!({"uid": 1000, "gid": 1000}))
        .run()
        .await;
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("again\n", "oops\n")
    );
}

#[tokio::test]
async fn all_five_capability_sets() {
    let sets = json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_FUTURE"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_CHOWN", "CAP_KILL"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL", "CAP_CHOWN"],
    });
    let bundle = Bundle::sh("grep ^Cap /proc/self/status | tr -d '\\t'")
        .with("/process/capabilities", sets)
        .with("/process/user", json!({"uid": 1000, "gid": 1000}));
    // After execve as a user: only what is ambient is left to use.
    assert_eq!(
        bundle.run().await.stdout,
        "CapInh:0000000000000020\nCapPrm:0000000000000020\nCapEff:0000000000000020\n\
         CapBnd:0000000000000021\nCapAmb:0000000000000020\n"
    );
    let none = Bundle::sh("grep ^Cap /proc/self/status | tr -d '\\t'")
        .with("/process/capabilities", json!(null))
        .run()
        .await;
    assert!(
        none.stdout
            .lines()
            .all(|line| line.ends_with(":0000000000000000")),
        "{none:?}"
    );
}

#[tokio::test]
async fn limits_of_the_process() {
    let limits = json!([
        {"type": "RLIMIT_NOFILE", "hard": 200, "soft": 100},
        {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
        {"type": "RLIMIT_STACK", "hard": u64::MAX, "soft": 16777216},
    ]);
    let output =
        Bundle::sh("ulimit -n; ulimit -Hn; ulimit -c; ulimit -s; cat /proc/self/oom_score_adj")
            .with("/process/rlimits", limits)
            .with("/process/oomScoreAdj", json!(500))
            .run()
            .await;
    assert_eq!(output.stdout, "100\n200\n0\n16384\n500\n");
    let error = Bundle::sh("true")
        .with("/process/oomScoreAdj", json!(5000))
        .fail()
        .await;
    assert!(error.to_string().contains("oomScoreAdj"), "{error}");
}

#[tokio::test]
async fn working_directory_and_environment() {
    let output = Bundle::sh("pwd; echo $A; stat -c %a:%u .")
        .with("/process/cwd", json!("/made/../made/here"))
        .with("/process/env", json!(["PATH=/bin", "A=b c", "HOME=/h"]))
        .run()
        .await;
    assert_eq!(output.stdout, "/made/here\nb c\n755:0\n");
    let error = Bundle::sh("true")
        .with("/process/cwd", json!("/etc/passwd"))
        .fail()
        .await;
    assert_eq!(
        error.to_string(),
        "chdir to cwd (\"/etc/passwd\") set in config.json failed: not a directory"
    );
}

#[tokio::test]
async fn exec_joins_everything() {
    let bundle = Bundle::sh("hostname; sleep 1000").with("/hostname", json!("inside"));
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    assert_eq!(streams.line(), "inside");
    let output = exec_sh(
        &container,
        "hostname; for n in pid mnt uts ipc net cgroup user time; do readlink /proc/1/ns/$n; done > /tmp/init; \
         for n in pid mnt uts ipc net cgroup user time; do readlink /proc/self/ns/$n; done > /tmp/self; \
         [ \"$(cat /tmp/init)\" = \"$(cat /tmp/self)\" ] && echo same; cat /proc/self/cgroup; exit 7",
    )
    .await;
    assert_eq!(
        (output.code, output.stdout.lines().last().unwrap()),
        (7, "0::/"),
        "{output:?}"
    );
    assert!(output.stdout.starts_with("inside\nsame\n"), "{output:?}");
    let restricted = exec(
        &container,
        json!({"args": ["sh", "-c", "id -u; pwd; grep -E '^(CapEff|Seccomp):' /proc/self/status | tr -d '\\t'"],
            "cwd": "/tmp", "user": {"uid": 5, "gid": 5}}),
    )
    .await
    .unwrap();
    assert_eq!(
        restricted.stdout,
        "5\n/tmp\nCapEff:0000000000000000\nSeccomp:2\n"
    );
    let error = exec(&container, json!({"args": ["foo"]}))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "exec: \"foo\": executable file not found in $PATH"
    );
    destroy(container, pid).await;
}

#[tokio::test]
async fn twenty_execs_at_once() {
    let (container, pid, _streams) = Bundle::sh("sleep 1000")
        .create()
        .await
        .unwrap()
        .start()
        .await;
    let container = std::sync::Arc::new(container);
    let execs: Vec<_> = (0..20)
        .map(|number| {
            let container = std::sync::Arc::clone(&container);
            tokio::spawn(async move { exec_sh(&container, &format!("echo {number}")).await.stdout })
        })
        .collect();
    for (number, exec) in execs.into_iter().enumerate() {
        assert_eq!(exec.await.unwrap(), format!("{number}\n"));
    }
    let container = std::sync::Arc::into_inner(container).unwrap();
    destroy(container, pid).await;
}

#[tokio::test]
async fn exec_in_a_dead_or_paused_container() {
    let (container, pid, _streams) = Bundle::sh("sleep 1000")
        .create()
        .await
        .unwrap()
        .start()
        .await;
    container.cgroup().freeze().await.unwrap();
    let error = exec(&container, json!({"args": ["true"]}))
        .await
        .unwrap_err();
    assert!(matches!(error, LaunchError::NotRunning(_)), "{error:?}");
    container.cgroup().thaw().await.unwrap();
    assert_eq!(exec_sh(&container, "echo thawed").await.stdout, "thawed\n");
    container.cgroup().kill().unwrap();
    tokio::task::spawn_blocking(move || wait(pid))
        .await
        .unwrap();
    let error = exec(&container, json!({"args": ["true"]}))
        .await
        .unwrap_err();
    assert!(matches!(error, LaunchError::NotRunning(_)), "{error:?}");
    container.delete().await.unwrap();
}

#[tokio::test]
async fn a_terminal_is_the_containers_own() {
    check_terminal(Bundle::sh(TERMINAL)).await;
}

#[tokio::test]
async fn a_terminal_on_a_read_only_dev() {
    let script = format!("touch /dev/new 2> /dev/null && echo writable; {TERMINAL}");
    let dev = json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "ro"]});
    check_terminal(Bundle::sh(&script).with("/mounts/1", dev)).await;
}

const TERMINAL: &str =
    "tty; stty size; test -t 0 && test -t 2 && echo yes; ls /dev/console; exit 3";

async fn check_terminal(bundle: Bundle) {
    let bundle = bundle
        .with("/process/terminal", json!(true))
        .with("/process/consoleSize", json!({"height": 33, "width": 101}));
    let (container, launched) = Container::create(
        &bundle.id,
        bundle.spec.to_string().as_bytes(),
        Io::Terminal,
        None,
    )
    .await
    .unwrap();
    let mut master = fs::File::from(launched.console.unwrap());
    let pid = launched.pid;
    launched.gate.release().await.unwrap();
    let text = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        // A hung-up terminal reads as an error.
        let _ = std::io::Read::read_to_string(&mut master, &mut text);
        (text, wait(pid))
    })
    .await
    .unwrap();
    assert_eq!(
        text,
        (
            "/dev/pts/0\r\n33 101\r\nyes\r\n/dev/console\r\n".to_owned(),
            3
        )
    );
    container.delete().await.unwrap();
}

#[tokio::test]
async fn exec_with_a_terminal() {
    let (container, pid, _streams) = Bundle::sh("sleep 1000")
        .create()
        .await
        .unwrap()
        .start()
        .await;
    let process = json!({"args": ["sh", "-c", "tty; stty size; exit 9"], "terminal": true,
        "consoleSize": {"height": 20, "width": 80}, "user": {"uid": 1000, "gid": 1000}});
    let launched = container
        .exec(process.to_string().as_bytes(), Io::Terminal)
        .await
        .unwrap();
    let mut master = fs::File::from(launched.console.unwrap());
    let terminal_pid = launched.pid;
    launched.gate.release().await.unwrap();
    let ended = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        // A hung-up terminal reads as an error.
        let _ = std::io::Read::read_to_string(&mut master, &mut text);
        (text, wait(terminal_pid))
    })
    .await
    .unwrap();
    assert_eq!(ended, ("/dev/pts/0\r\n20 80\r\n".to_owned(), 9));
    destroy(container, pid).await;
}

#[tokio::test]
async fn a_terminal_comes_from_devpts_alone() {
    let bundle = Bundle::sh("mkdir /dev/pts; echo > /dev/pts/ptmx; echo made; sleep 1000").with(
        "/mounts",
        json!([{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}]),
    );
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    assert_eq!(streams.line(), "made");
    let process = json!({"args": ["true"], "terminal": true});
    let error = container
        .exec(process.to_string().as_bytes(), Io::Terminal)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("not on a devpts"), "{error}");
    destroy(container, pid).await;
}

#[tokio::test]
async fn session_keyrings_have_no_name_to_join_them_by() {
    let bundle = Bundle::sh("sleep 1000").with("/linux/maskedPaths", json!([]));
    let (container, pid, _streams) = bundle.create().await.unwrap().start().await;
    // Serial, flags, references, expiry, permissions, owner, group, type, name.
    let session = "grep ' _ses' /proc/keys | tr -s ' ' | cut -d ' ' -f 1,9";
    let first = exec_sh(&container, session).await;
    let second = exec_sh(&container, session).await;
    for output in [&first, &second] {
        assert!(output.stdout.contains(" _ses:"), "{output:?}");
        for name in [&bundle.id, "exec"] {
            let named = format!("_ses.{name}:");
            assert!(!output.stdout.contains(&named), "{output:?}");
        }
    }
    assert_ne!(first.stdout, second.stdout);
    destroy(container, pid).await;
}

#[tokio::test]
async fn hooks_run_where_they_belong() {
    let bundle = Bundle::sh("cat /tmp/start; sleep 1000");
    let out = bundle.directory.path().join("log");
    let out = out.display();
    // The runtime's hooks see the guest's files; startContainer sees the container's.
    let hook = |name: &str| {
        json!([{"path": "/bin/sh", "args": ["sh", "-c",
            format!("echo {name} $(grep -o '\"status\":\"[a-z]*\"') >> {out}")], "env": ["PATH=/bin:/usr/bin"]}])
    };
    let bundle = bundle.with(
        "/hooks",
        json!({
            "prestart": hook("prestart"),
            "createRuntime": hook("createRuntime"),
            "createContainer": hook("createContainer"),
            "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "grep -o '\"id\":\"[^\"]*' > /tmp/start"],
                "env": ["PATH=/bin"]}],
            "poststart": hook("poststart"),
            "poststop": hook("poststop"),
        }),
    );
    let (container, pid, mut streams) = bundle.create().await.unwrap().start().await;
    assert_eq!(streams.line(), format!("\"id\":\"{}", bundle.id));
    destroy(container, pid).await;
    assert_eq!(
        fs::read_to_string(bundle.directory.path().join("log")).unwrap(),
        "prestart \"status\":\"creating\"\ncreateRuntime \"status\":\"creating\"\n\
         createContainer \"status\":\"creating\"\npoststart \"status\":\"running\"\npoststop \"status\":\"stopped\"\n"
    );
}

#[tokio::test]
async fn hooks_do_not_inherit_the_agents_oom_score() {
    // PID 1 has -1000, which not every root may set. The other tests' containers set their own.
    fs::write("/proc/self/oom_score_adj", "321").unwrap();
    let bundle = Bundle::sh("true");
    let log = bundle.directory.path().join("log");
    let script = format!("cat /proc/self/oom_score_adj > {}", log.display());
    let hook = json!({"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    let bundle = bundle.with("/hooks", hook);
    bundle.run().await;
    assert_eq!(fs::read_to_string(log).unwrap(), "0\n");
}

#[tokio::test]
async fn a_failed_hook_fails_the_create() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let hook =
            json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", "echo because >&2; exit 1"]}]});
        let error = Bundle::sh("true").with("/hooks", hook).fail().await;
        assert!(
            error.to_string().contains(kind) && error.to_string().contains("because"),
            "{error}"
        );
    }
    let hook = json!({"poststart": [{"path": "/bin/sh", "args": ["sh", "-c", "exit 1"]}]});
    let waiting = Bundle::sh("sleep 1000")
        .with("/hooks", hook)
        .create()
        .await
        .unwrap();
    let error = waiting.streams.finish(waiting.launched).await.unwrap_err();
    assert!(error.to_string().contains("poststart"), "{error}");
    waiting.container.delete().await.unwrap();
}

#[tokio::test]
async fn ids_are_taken_once() {
    let bundle = Bundle::sh("true");
    let waiting = bundle.create().await.unwrap();
    let (io, _streams) = pipes();
    let again = Container::create(&bundle.id, bundle.spec.to_string().as_bytes(), io, None).await;
    assert!(again.unwrap_err().to_string().contains("exists already"));
    waiting.streams.finish(waiting.launched).await.unwrap();
    waiting.container.delete().await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), waiting.container.delete())
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn scheduling() {
    let output = Bundle::sh("set -- $(cat /proc/self/stat); shift 40; echo policy:$1; uname -m")
        .with(
            "/process/scheduler",
            json!({"policy": "SCHED_BATCH", "nice": 3}),
        )
        .with(
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_IDLE", "priority": 7}),
        )
        .with("/linux/personality", json!({"domain": "LINUX32"}))
        .run()
        .await;
    assert!(output.stdout.contains("policy:3"), "{output:?}");
    assert!(output.stdout.contains("i686"), "{output:?}");
    let (container, pid, _streams) = Bundle::sh("sleep 1000")
        .create()
        .await
        .unwrap()
        .start()
        .await;
    let pinned = exec(
        &container,
        json!({"args": ["grep", "Cpus_allowed_list", "/proc/self/status"],
            "execCPUAffinity": {"initial": "0-1", "final": "0"}}),
    )
    .await
    .unwrap();
    assert_eq!(pinned.stdout, "Cpus_allowed_list:\t0\n");
    destroy(container, pid).await;
}
