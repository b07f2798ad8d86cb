//! `husk`, without any daemon: what users of docker expect of it.

mod containers;
mod cp;
mod init;
mod left;
mod network;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use husk_tests::{
    ctr::{self, Output},
    host, wait,
};
use serde_json::Value;

use crate::{Test, context::Context, husk_test};

pub const TESTS: &[Test] = &[
    husk_test("exit_codes_and_streams", containers::exit_codes_and_streams),
    husk_test("a_container_lives_and_lives_again", containers::lives_again),
    husk_test("flags_reach_the_container", containers::flags),
    husk_test(
        "a_terminal_is_left_and_attached_to_again",
        containers::terminal,
    ),
    husk_test("volumes_show_what_the_host_changes", containers::volumes),
    husk_test("networks_names_and_ports", network::networks),
    husk_test(
        "files_are_copied_from_and_to_a_running_container",
        cp::running,
    ),
    husk_test(
        "files_are_copied_from_and_to_a_stopped_container",
        cp::stopped,
    ),
    husk_test("a_container_leads_no_copy_out_of_itself", cp::hostile),
    husk_test("an_init_reaps_forwards_and_ends_as_the_program", init::init),
];

pub const ALONE: &[Test] = &[
    husk_test("killed_processes_leave_nothing", left::killed),
    husk_test("what_does_not_start_leaves_nothing", left::refused),
    husk_test("containers_outlive_a_reboot", left::reboot),
];

const IMAGE: &str = "busybox:husk";

/// A root directory with the image in it. Dropped, its containers are removed, and it.
struct Husk {
    bin: PathBuf,
    root: PathBuf,
}

impl Husk {
    fn new(suite: &Context) -> Result<Self> {
        let id = suite.containerd.fresh_id("cli");
        let husk = Self {
            bin: suite.bin.join("husk"),
            // On a disk, as an overlay's upper directory is.
            root: Path::new("/var/lib/husk-e2e").join(id),
        };
        fs::create_dir_all(&husk.root)?;
        husk.run(&["load", "-q", "-i", "/srv/images/busybox.tar"])?
            .ok()?;
        Ok(husk)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.bin);
        command.arg("--root").arg(&self.root).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Result<Output> {
        ctr::output(&mut self.command(args))
    }

    /// What a command prints; it must succeed.
    fn text(&self, args: &[&str]) -> Result<String> {
        Ok(self.run(args)?.ok()?.text())
    }

    /// `husk run --rm` of a script.
    fn sh(&self, flags: &[&str], script: &str) -> Result<Output> {
        let args = [
            &["run", "--rm", "--network", "none"],
            flags,
            &[IMAGE, "sh", "-c", script],
        ];
        self.run(&args.concat())
    }

    /// `husk run -d` of a script, without a network; the container's id.
    fn detached(&self, name: &str, flags: &[&str], script: &str) -> Result<String> {
        let args = [
            &["run", "-d", "--name", name, "--network", "none"],
            flags,
            &[IMAGE, "sh", "-c", script],
        ];
        self.text(&args.concat())
    }

    /// Waits until a container has said that it is ready, and nothing else.
    fn is_ready(&self, name: &str) -> Result<()> {
        wait::until("the container to be ready", || {
            let said = self.text(&["logs", name]).ok()?;
            (said == "ready").then_some(())
        })
    }

    fn inspect(&self, name: &str) -> Result<Value> {
        let all: Value = serde_json::from_str(&self.text(&["inspect", name])?)?;
        all.get(0).cloned().context("nothing was inspected")
    }

    fn state(&self, name: &str) -> Result<String> {
        let state = self.inspect(name)?["State"]["Status"].clone();
        Ok(state.as_str().unwrap_or_default().to_owned())
    }

    /// The process that looks after a container.
    fn monitor(&self, name: &str) -> Result<i32> {
        let id = self.inspect(name)?["Id"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let of_it = |process: &host::Process| {
            let line =
                fs::read_to_string(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            line.contains("monitor") && line.contains(&id)
        };
        let found = host::processes().into_iter().find(of_it);
        Ok(found
            .context("the container has no monitor")?
            .pid
            .cast_signed())
    }
}

impl Drop for Husk {
    fn drop(&mut self) {
        let ids = self.text(&["ps", "-aq", "--no-trunc"]).unwrap_or_default();
        for id in ids.lines() {
            // What stays, the next test for traces finds.
            let _ = self.run(&["rm", "-f", id]);
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}
