//! Volumes, bind mounts, and files that come and go.

use std::{fs, os::unix::fs::MetadataExt as _};

use anyhow::{Result, ensure};
use husk_tests::docker::BUSYBOX;

use crate::context::Context;

pub fn volumes(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("given"), "from the host")?;
    let shown = dir.path().display().to_string();
    let volume = docker.fresh("volume");
    let (data, read_only) = (format!("{volume}:/home"), format!("{shown}:/ro:ro"));
    let writable = format!("{shown}:/rw");
    let flags = [
        "--volume",
        &data,
        "--volume",
        &writable,
        "--volume",
        &read_only,
        "--tmpfs",
        "/scratch:size=1m",
        "--read-only",
        BUSYBOX,
        "sleep",
        "1000000",
    ];
    let container = docker.detached(&flags)?;
    let script = "cat /rw/given; echo out >/rw/made; touch /ro/x || echo read-only; touch /x || echo read-only; ls /home
        echo kept >/home/kept; chown 1000:1000 /rw/made; head -c 2m /dev/zero >/scratch/x || echo full";
    let said = container.sh(script)?.ok()?.text();
    ensure!(
        said == "from the hostread-only\nread-only\nuser\nfull",
        "{said}"
    );
    let made = dir.path().join("made");
    ensure!(fs::read_to_string(&made)? == "out\n" && fs::metadata(&made)?.uid() == 1000);
    drop(container);

    // Another one finds what the first has left in the volume, and files come and go while it runs.
    let container = docker.detached(&["--volume", &data, BUSYBOX, "sleep", "1000000"])?;
    let place = |path: &str| format!("{}:{path}", container.name);
    ensure!(container.sh("test -e /tmp/in")?.code == 1);
    docker.ok(&["cp", &made.display().to_string(), &place("/tmp/in")])?;
    let said = container
        .sh("cat /home/kept /tmp/in; stat -c %u /tmp/in; echo back >/tmp/back")?
        .ok()?
        .text();
    ensure!(said == "kept\nout\n1000", "{said}");
    let back = dir.path().join("back");
    docker.ok(&["cp", &place("/tmp/back"), &back.display().to_string()])?;
    docker.ok(&[
        "cp",
        &place("/home/kept"),
        &dir.path().join("kept").display().to_string(),
    ])?;
    ensure!(
        fs::read_to_string(back)? == "back\n"
            && fs::read_to_string(dir.path().join("kept"))? == "kept\n"
    );
    let changed = container.ok(&["diff"])?;
    ensure!(
        changed.contains("A /tmp/back") && changed.contains("A /tmp/in"),
        "{changed}"
    );
    drop(container);
    docker.ok(&["volume", "rm", &volume])?;
    Ok(())
}
