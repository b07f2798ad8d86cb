//! `podman cp` into a container that runs, and out of it: podman enters the mount namespace of what stands for the container.

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use husk_tests::podman::{IMAGE, Podman};
use husk_tests::runtime::Runtime;

use crate::context::Context;

const NAME: &str = "copied";

pub fn copies(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let dir = tempfile::tempdir()?;
    let copied = copy(&podman, dir.path(), suite.runtime == Runtime::Husk);
    podman.run(&["rm", "-f", "-t", "0", NAME])?.ok()?;
    copied
}

fn copy(podman: &Podman, dir: &Path, is_husk: bool) -> Result<()> {
    let at = |name: &str| dir.join(name).display().to_string();
    fs::create_dir(dir.join("volume"))?;
    fs::write(dir.join("in"), "of the host")?;
    let volume = format!("{}:/volume", at("volume"));
    let run = [
        "run",
        "-d",
        "--name",
        NAME,
        "--network",
        "none",
        "--tmpfs",
        "/scratch",
    ];
    podman
        .run(&[&run[..], &["-v", &volume, IMAGE, "sleep", "1000"]].concat())?
        .ok()?;
    let inside = |script: &str| -> Result<String> {
        Ok(podman
            .run(&["exec", NAME, "sh", "-c", script])?
            .ok()?
            .text())
    };
    let copy = |from: &str, to: &str| podman.run(&["cp", from, to]);

    inside("echo of the guest >/root/out; ln -s / /away")?;
    copy(&at("in"), &format!("{NAME}:/root/in"))?.ok()?;
    ensure!(inside("cat /root/in")? == "of the host");
    copy(&format!("{NAME}:/root/out"), &at("out"))?.ok()?;
    ensure!(fs::read_to_string(dir.join("out"))? == "of the guest\n");
    copy(&at("in"), &format!("{NAME}:/volume/in"))?.ok()?;
    ensure!(inside("cat /volume/in")? == "of the host" && dir.join("volume/in").exists());
    // A link of the container's leads nowhere on the host.
    copy(&at("in"), &format!("{NAME}:/away/root/husk-e2e-copied"))?.ok()?;
    ensure!(inside("cat /root/husk-e2e-copied")? == "of the host");
    ensure!(!Path::new("/root/husk-e2e-copied").exists());
    if is_husk {
        let hidden = copy(&at("in"), &format!("{NAME}:/scratch/in"))?;
        ensure!(
            hidden.code != 0,
            "copied where the container does not see it"
        );
    }
    Ok(())
}
