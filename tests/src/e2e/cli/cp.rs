//! `husk cp`.

use std::{
    fs,
    io::Read as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt, symlink},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{ctr, wait};

use super::{Husk, IMAGE};
use crate::context::Context;

/// A directory of the host with something to copy.
fn something(husk: &Husk) -> Result<PathBuf> {
    let dir = husk.root.join("from");
    fs::create_dir_all(dir.join("sub"))?;
    fs::write(dir.join("sub/deep"), "deep")?;
    fs::write(dir.join("script"), "#!/bin/sh\necho from-the-host\n")?;
    fs::set_permissions(dir.join("script"), PermissionsExt::from_mode(0o755))?;
    nix::unistd::chown(&dir.join("script"), Some(1000.into()), Some(1000.into()))?;
    symlink("sub/deep", dir.join("link"))?;
    Ok(dir)
}

/// A file that no pipe holds.
fn big(husk: &Husk) -> Result<String> {
    let path = husk.root.join("big");
    fs::File::create(&path)?.set_len(8 << 20)?;
    Ok(path.display().to_string())
}

/// One who has begun to read it from the container.
struct Reader {
    process: Child,
    output: ChildStdout,
}

impl Reader {
    fn start(husk: &Husk) -> Result<Self> {
        let mut command = husk.command(&["cp", "one:/big", "-"]);
        let mut process = command.stdout(Stdio::piped()).spawn()?;
        let mut output = process.stdout.take().context("it has no output")?;
        output.read_exact(&mut [0; 512])?;
        Ok(Self { process, output })
    }

    fn finish(mut self) -> Result<()> {
        std::io::copy(&mut self.output, &mut std::io::sink())?;
        ensure!(self.process.wait()?.success(), "the copy has failed");
        Ok(())
    }
}

pub fn running(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let from = something(&husk)?.display().to_string();
    let shared = husk.root.join("shared");
    fs::create_dir(&shared)?;
    let (volume, read_only) = (
        format!("{}:/vol", shared.display()),
        format!("{}:/ro:ro", shared.display()),
    );
    let flags = ["-v", &volume, "-v", &read_only, "--tmpfs", "/scratch"];
    husk.detached("one", &flags, "echo made >/made; sleep 1000")?;
    let exec = |script: &str| husk.text(&["exec", "one", "sh", "-c", script]);
    // In: by docker's rules, root's unless -a says otherwise, and seen at once.
    husk.text(&["cp", &from, "one:/new"])?;
    let seen = exec("/new/script; cat /new/link; stat -c %u:%g:%a /new/script")?;
    ensure!(seen == "from-the-host\ndeep0:0:755", "{seen:?}");
    husk.text(&["cp", "-a", &format!("{from}/script"), "one:/new/kept"])?;
    ensure!(exec("stat -c %u:%g /new/kept")? == "1000:1000");
    husk.text(&["cp", &format!("{from}/."), "one:/vol"])?;
    ensure!(fs::read_to_string(shared.join("sub/deep"))? == "deep");
    ensure!(exec("cat /vol/sub/deep")? == "deep");
    // What it has once seen changes for it.
    fs::write(husk.root.join("changed"), "changed")?;
    let changed = husk.root.join("changed").display().to_string();
    husk.text(&["cp", &changed, "one:/vol/sub/deep"])?;
    husk.text(&["cp", &changed, "one:/new/sub/deep"])?;
    wait::until("the new contents", || {
        let seen = exec("cat /vol/sub/deep /new/sub/deep").ok()?;
        (seen == "changedchanged").then_some(())
    })?;
    // What its name says is a mount, it stays one.
    husk.text(&["cp", &changed, "one:/etc/hostname"])?;
    wait::until("the mounted file's contents", || {
        (exec("cat /etc/hostname").ok()? == "changed").then_some(())
    })?;
    for to in [
        "one:/ro/x",
        "one:/proc/x",
        "one:/scratch/x",
        "one:/dev/shm/",
    ] {
        let out = husk.run(&["cp", &changed, to])?.exited(1)?;
        let is_told = ["read-only", "guest"]
            .iter()
            .any(|word| out.errors().contains(word));
        ensure!(is_told, "{out:?}");
    }
    // Out.
    wait::until("the container's file", || {
        exec("cat /made").ok().filter(|text| text == "made")
    })?;
    let to = husk.root.join("to");
    fs::create_dir(&to)?;
    let to_name = to.display().to_string();
    husk.text(&["cp", "one:made", &to_name])?;
    ensure!(fs::read_to_string(to.join("made"))? == "made\n");
    husk.text(&["cp", "one:/vol", &to_name])?;
    ensure!(fs::read_to_string(to.join("vol/sub/deep"))? == "changed");
    let out = husk.run(&["cp", "one:/nothing", &to_name])?.exited(1)?;
    ensure!(out.errors().contains("/nothing"), "{out:?}");
    husk.run(&["cp", "one:/proc/version", &to_name])?
        .exited(1)?;
    // Archives, through tar's own hands.
    let archive = husk.run(&["cp", "one:/new", "-"])?.ok()?.stdout;
    let mut tar = Command::new("tar");
    let listed = ctr::output_with_input(tar.args(["-tf", "-"]), archive.clone())?
        .ok()?
        .text();
    ensure!(
        listed.contains("new/script") && listed.contains("new/sub/deep"),
        "{listed}"
    );
    let mut cp = husk.command(&["cp", "-", "one:/vol"]);
    ctr::output_with_input(&mut cp, archive)?.ok()?;
    ensure!(exec("/vol/new/script")? == "from-the-host");
    // It may end while it is copied, but is not started again with its files in use.
    husk.text(&["cp", &big(&husk)?, "one:/"])?;
    let reader = Reader::start(&husk)?;
    husk.text(&["stop", "-t", "0", "one"])?;
    let out = husk.run(&["start", "one"])?.exited(1)?;
    ensure!(out.errors().contains("being copied"), "{out:?}");
    reader.finish()?;
    husk.text(&["start", "one"])?;
    husk.text(&["rm", "-f", "one"])?;
    ensure!(fs::read_to_string(shared.join("sub/deep"))? == "changed");
    Ok(())
}

pub fn stopped(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let from = something(&husk)?.display().to_string();
    // Before its first start, its volume's place is made.
    husk.text(&[
        "create",
        "--name",
        "one",
        "--network",
        "none",
        "-v",
        "data:/vol",
        IMAGE,
        "sh",
        "-c",
        "cat /vol/sub/deep; /script; echo x >>/written",
    ])?;
    husk.text(&["cp", &format!("{from}/script"), "one:/"])?;
    husk.text(&["cp", &format!("{from}/sub"), "one:/vol/"])?;
    let out = husk.text(&["start", "-a", "one"])?;
    ensure!(out == "deepfrom-the-host", "{out:?}");
    let to = husk.root.join("to");
    let to_name = to.display().to_string();
    husk.text(&["cp", "one:/written", &to_name])?;
    ensure!(fs::read_to_string(&to)? == "x\n");
    ensure!(fs::metadata(&to)?.uid() == 0);
    // Of the image, and what the container has changed of it.
    husk.text(&["cp", "one:/etc/passwd", &to_name])?;
    ensure!(fs::read_to_string(&to)?.contains("root"));
    let deep = husk.root.join("volumes/data/sub/deep");
    ensure!(fs::read_to_string(deep)? == "deep");
    // It starts again with what was copied.
    fs::write(husk.root.join("script"), "#!/bin/sh\necho another\n")?;
    fs::set_permissions(husk.root.join("script"), PermissionsExt::from_mode(0o755))?;
    husk.text(&[
        "cp",
        &husk.root.join("script").display().to_string(),
        "one:/script",
    ])?;
    ensure!(husk.text(&["start", "-a", "one"])? == "deepanother");
    // While an archive of it is read, nobody starts it or takes it away.
    let big = big(&husk)?;
    husk.text(&["cp", &big, "one:/"])?;
    let reader = Reader::start(&husk)?;
    let out = husk.run(&["rm", "one"])?.exited(1)?;
    ensure!(out.errors().contains("being started or stopped"), "{out:?}");
    reader.finish()?;
    husk.text(&["rm", "one"])?;
    Ok(())
}

pub fn hostile(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    fs::write(husk.root.join("secret"), "the host's")?;
    let root = husk.root.display().to_string();
    fs::write(husk.root.join("planted"), "planted")?;
    let planted = format!("{root}/planted");
    // Links that lead to the host's where they are followed on the host, and a name that is a link at one moment and a directory at the next.
    let script = format!(
        "ln -s {root}/secret /absolute; ln -s {root}/secret /nowhere; ln -s ../../../../../../../../../../{root}/secret /up; ln -s {root} /dir; ln -s /proc/1/root{root}/secret /magic
        mkdir /real /race; echo mine >/real/secret; mkfifo /race/pipe; echo ready
        while :; do ln -sfn {root} /race/x; rm -f /race/x; ln -s /real /race/x; rm -f /race/x; mkdir /race/x 2>/dev/null; echo mine >/race/x/secret; rm -rf /race/x; done"
    );
    husk.detached("one", &[], &script)?;
    husk.is_ready("one")?;
    let to = husk.root.join("to");
    let to_name = to.display().to_string();
    let check = || -> Result<()> {
        for from in ["one:/absolute", "one:/up", "one:/magic", "one:/dir/secret"] {
            let _ = fs::remove_file(&to);
            husk.run(&["cp", "-L", from, &to_name])?.exited(1)?;
            ensure!(!to.exists(), "{from} was copied");
        }
        let out = husk.run(&["cp", &planted, "one:/dir/new"])?.exited(1)?;
        ensure!(out.errors().contains("/dir"), "{out:?}");
        ensure!(!husk.root.join("new").exists());
        // One that leads to nothing becomes a file.
        husk.text(&["cp", &planted, "one:/nowhere"])?;
        ensure!(fs::read_to_string(husk.root.join("secret"))? == "the host's");
        Ok(())
    };
    check()?;
    for round in 0..10 {
        // Whatever is there at the moment; never the host's.
        let to = husk.root.join(format!("race-{round}"));
        let out = husk.run(&["cp", "one:/race", &to.display().to_string()])?;
        ensure!(!to.join("pipe").exists());
        let copied = fs::symlink_metadata(to.join("x")).ok();
        if copied.is_some_and(|there| there.is_dir()) {
            let text = fs::read_to_string(to.join("x/secret")).unwrap_or_default();
            ensure!(text.is_empty() || text == "mine\n", "{text:?} {out:?}");
        }
        let to = husk.root.join(format!("file-{round}"));
        // It fails, or has the container's.
        if husk
            .run(&["cp", "one:/race/x/secret", &to.display().to_string()])?
            .exited(0)
            .is_ok()
        {
            let text = fs::read_to_string(&to)?;
            ensure!(text.is_empty() || text == "mine\n", "{text:?}");
        }
        let _ = husk.run(&["cp", &planted, "one:/race/x/new"])?;
        ensure!(!husk.root.join("new").exists());
    }
    husk.text(&["stop", "-t", "0", "one"])?;
    check()
}
