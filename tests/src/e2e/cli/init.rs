//! `--init`.

use anyhow::{Result, ensure};

use super::{Husk, IMAGE};
use crate::{
    context::Context,
    terminal::{Session, size},
};

pub fn init(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    // Without one the program is PID 1 itself.
    ensure!(husk.sh(&[], "echo $$")?.ok()?.text() == "1");
    let out = husk
        .sh(
            &["--init"],
            "cat /proc/1/comm; test $$ = 1 && echo first; kill -9 $$",
        )?
        .exited(137)?;
    ensure!(out.text() == "husk-init", "{out:?}");
    husk.run(&["run", "--rm", "--init", IMAGE, "no-such-program"])?
        .exited(127)?;
    let orphans = "(sleep 0.1 & echo $! >/pid); pid=$(cat /pid); n=0
        while test -e /proc/$pid; do n=$((n + 1)); test $n = 300 && exit 1; sleep 0.1; done; exit 5";
    husk.sh(&["--init"], orphans)?.exited(5)?;
    // A program without a handler ends by a signal, which as PID 1 it would not notice; and one that is a user's gets it too.
    let run = [
        "run",
        "-d",
        "--init",
        "--name",
        "one",
        "--network",
        "none",
        "-u",
        "1000",
        IMAGE,
        "sleep",
        "1000",
    ];
    husk.text(&run)?;
    husk.text(&["kill", "-s", "TERM", "one"])?;
    ensure!(husk.text(&["wait", "one"])? == "143");
    let script = "trap 'echo asked; exit 4' USR1; echo ready; while :; do sleep 0.1; done";
    husk.detached("two", &["--init"], script)?;
    husk.is_ready("two")?;
    husk.text(&["kill", "-s", "USR1", "two"])?;
    ensure!(husk.text(&["wait", "two"])? == "4");
    ensure!(husk.text(&["logs", "two"])? == "ready\nasked");
    // Ctrl-C is the program's.
    let mut command = husk.command(&[
        "run",
        "-it",
        "--rm",
        "--init",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ]);
    let mut session = Session::start(&mut command, size(20, 40))?;
    session.expect("ready")?;
    session.type_in("\x03")?;
    ensure!(session.finish()? == 130);
    Ok(())
}
