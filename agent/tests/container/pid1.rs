//! The init that the agent supplies.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{Bundle, wait};

fn with_init(bundle: Bundle) -> Bundle {
    bundle.with("/annotations", json!({"io.husk.init": "true"}))
}

#[tokio::test]
async fn it_ends_as_the_program_does() {
    let script =
        "cat /proc/1/comm; echo $$; grep -E 'Sig(Blk|Ign)' /proc/self/status | tr -d '\\t'; exit 7";
    let output = with_init(Bundle::sh(script)).run().await;
    let wanted = "husk-init\n2\nSigBlk:0000000000000000\nSigIgn:0000000000000000\n";
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (7, wanted),
        "{output:?}"
    );
    let output = with_init(Bundle::sh("kill -TERM $$; echo survived"))
        .run()
        .await;
    assert_eq!((output.code, output.stdout.as_str()), (128 + 15, ""));
}

#[tokio::test]
async fn it_takes_orphans() {
    let script = "(sleep 0.1 & echo $! >/tmp/pid); pid=$(cat /tmp/pid)
        for n in $(yes | head -n 200); do test -e /proc/$pid || { echo gone; exit 0; }; sleep 0.05; done
        grep State /proc/$pid/status";
    assert_eq!(with_init(Bundle::sh(script)).run().await.stdout, "gone\n");
}

#[tokio::test]
async fn signals_reach_the_program() {
    let script = "trap 'exit 4' USR1; touch /tmp/ready; while :; do sleep 0.05; done";
    let bundle = with_init(Bundle::sh(script));
    let (container, pid, _streams) = bundle.create().await.unwrap().start().await;
    while !bundle.root().join("tmp/ready").exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    kill(Pid::from_raw(pid), Signal::SIGUSR1).unwrap();
    assert_eq!(wait(pid), 4);
    // One that the program does not handle ends it, where it is not PID 1.
    container.delete().await.unwrap();
    let bundle = with_init(Bundle::new(&["sleep", "1000"]));
    let (container, pid, _streams) = bundle.create().await.unwrap().start().await;
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    assert_eq!(wait(pid), 128 + 15);
    container.delete().await.unwrap();
}

#[tokio::test]
async fn it_has_what_the_program_has_and_nothing_of_the_agents() {
    let script =
        "grep -E '^(Uid|CapEff|NoNewPrivs|Seccomp):' /proc/1/status | tr '\\t' ' '; ls /proc/1/fd";
    let bundle = with_init(Bundle::sh(script))
        .with("/process/user", json!({"uid": 1000, "gid": 1000}))
        .with("/process/noNewPrivileges", json!(true))
        .with("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": []}));
    let output = bundle.run().await;
    assert!(
        output.stdout.contains("Uid: 1000 1000 1000 1000\n")
            && output.stdout.contains("NoNewPrivs: 1\nSeccomp: 2\n"),
        "{output:?}"
    );
    assert!(
        output.stdout.contains("CapEff: 0000000000000000"),
        "{output:?}"
    );
    assert!(output.stderr.contains("Permission denied"), "{output:?}");
}

#[tokio::test]
async fn what_does_not_start_is_told_as_ever() {
    let bundle = with_init(Bundle::new(&["/script"]));
    let script = bundle.root().join("script");
    fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let waiting = bundle.create().await.unwrap();
    let error = waiting.streams.finish(waiting.launched).await.unwrap_err();
    assert_eq!(error.to_string(), "exec /script: no such file or directory");
    waiting.container.delete().await.unwrap();
    let error = Bundle::sh("true")
        .with("/annotations", json!({"io.husk.init": "yes"}))
        .fail()
        .await;
    assert!(error.to_string().contains("true or false"), "{error}");
}
