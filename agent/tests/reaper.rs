//! The reaper over real children. In a test binary of its own, and in one test: it reaps every child of the process.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::zombie_processes,
    reason = "a test fails by panicking; its reaper waits for the children"
)]

use std::process::{Command, Stdio};
use std::sync::Arc;

use husk_agent::reaper::Reaper;

fn shell(script: &str) -> std::process::Child {
    Command::new("sh")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap()
}

fn pid(child: &std::process::Child) -> i32 {
    i32::try_from(child.id()).unwrap()
}

#[tokio::test]
async fn every_child_is_reaped_and_every_watched_one_reported() {
    let reaper = Arc::new(Reaper::default());
    tokio::spawn(Arc::clone(&reaper).run());

    // Watched before its end, by a signal that has no name in nix.
    let launch = reaper.launch();
    let real_time = shell("read x");
    let mut exit = launch.watch(pid(&real_time));
    drop(launch);
    reaper.signal(pid(&real_time), 40).unwrap();
    assert_eq!(exit.exit().await.unwrap().status, 168);
    assert_eq!(
        reaper
            .signal(pid(&real_time), 9)
            .unwrap_err()
            .raw_os_error(),
        Some(libc::ESRCH)
    );

    // Over before it is watched: a second child, that is watched, ends after it.
    let launch = reaper.launch();
    let early = shell("exit 42");
    let witness = shell("read x");
    let mut witnessed = launch.watch(pid(&witness));
    while nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid(&early)), None).is_ok() {
        tokio::task::yield_now().await;
    }
    drop(witness.stdin);
    assert_eq!(witnessed.exit().await.unwrap().status, 1);
    assert!(!launch.watch(1).is_over());
    assert_eq!(launch.watch(pid(&early)).exit().await.unwrap().status, 42);
    drop(launch);

    // A crowd that nobody watches leaves no zombie.
    let crowd: Vec<i32> = (0..300).map(|_| pid(&shell("exit 0"))).collect();
    for one in crowd {
        while nix::sys::signal::kill(nix::unistd::Pid::from_raw(one), None).is_ok() {
            tokio::task::yield_now().await;
        }
    }
}
