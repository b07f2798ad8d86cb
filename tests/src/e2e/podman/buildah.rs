//! buildah, which calls the runtime without conmon.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use husk_tests::podman::{IMAGE, Podman, RUN_ROOT};
use husk_tests::{ctr, runtime::Runtime};

use crate::{
    context::Context,
    terminal::{Session, size},
};

const FILE: &str = r"FROM IMAGE AS first
COPY given /src/given
RUN --mount=type=cache,target=/cache uname -r >/kernel; cat /src/given >/made; cp /made /cache; \
    ip route | grep -q ^default && id -u user >>/made
FROM IMAGE
COPY --from=first /made /kernel /
RUN --mount=type=cache,target=/cache cat /made /kernel /cache/made
";

/// buildah with the suite's storage.
fn buildah(podman: &Podman, args: &[&str]) -> Command {
    let mut command = Command::new("buildah");
    command
        .arg("--root")
        .arg(podman.storage())
        .args(["--runroot", RUN_ROOT])
        .args(args);
    command
}

/// Writes a Containerfile to a directory of its own, which it is to be built in.
pub fn containerfile(podman: &Podman, name: &str, text: &str) -> Result<std::path::PathBuf> {
    let dir = podman.dir.join(name);
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("Containerfile"), text.replace("IMAGE", IMAGE))?;
    Ok(dir)
}

pub fn build(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let runtime = podman.runtime.to_str().context("its name")?;
    let build = |dir: &Path, flags: &[&str]| {
        let head = ["bud", "--runtime", runtime];
        ctr::output(buildah(&podman, &[&head, flags, &["."]].concat()).current_dir(dir))
    };
    let dir = containerfile(&podman, "build", FILE)?;
    fs::write(dir.join("given"), "given\n")?;
    let built = build(&dir, &["-t", "localhost/built:e2e"])?.ok()?.text();
    let lines: Vec<_> = built.lines().collect();
    let given = lines.iter().position(|line| *line == "given");
    let of_step = lines.get(given.context("no output")?..).unwrap_or_default();
    let is_guests = of_step.get(2).is_some_and(|line| line.ends_with("-husk"));
    ensure!(
        of_step.get(1) == Some(&"1000")
            && of_step.get(3) == Some(&"given")
            && is_guests == (suite.runtime == Runtime::Husk),
        "{built}"
    );
    let dir = containerfile(&podman, "build-fails", "FROM IMAGE\nRUN exit 7\n")?;
    let failed = build(&dir, &["--network", "none", "--isolation", "oci"])?.exited(7)?;
    ensure!(failed.errors().contains("exit status 7"), "{failed:?}");

    let name = ["from", "--name", "e2e-work", "localhost/built:e2e"];
    ctr::output(&mut buildah(&podman, &name))?.ok()?;
    let run = |flags: &[&str]| {
        let head = ["run", "--runtime", runtime];
        buildah(&podman, &[&head, flags].concat())
    };
    let mut cat = run(&["e2e-work", "sh", "-c", "cat - /made; exit 3"]);
    let out = ctr::output_with_input(&mut cat, b"typed\n".to_vec())?.exited(3)?;
    ensure!(out.text() == "typed\ngiven\n1000", "{out:?}");
    let mut session = Session::start(&mut run(&["-t", "e2e-work", "sh"]), size(33, 77))?;
    session.type_in("tty\n")?;
    session.expect("/dev/pts/0")?;
    session.type_in("exit 6\n")?;
    ensure!(session.finish()? == 6);
    ctr::output(&mut buildah(&podman, &["rm", "e2e-work"]))?.ok()?;
    Ok(())
}
