//! `husk`, without any daemon: what users of docker expect of it.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    ctr::{self, Output},
    host::{self, Traces},
    wait,
};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::{
    Test,
    context::{Context, hex},
    husk_test,
    terminal::{Session, has_size, size},
};

pub const TESTS: &[Test] = &[
    husk_test("exit_codes_and_streams", exit_codes_and_streams),
    husk_test("a_container_lives_and_lives_again", lives_again),
    husk_test("flags_reach_the_container", flags),
    husk_test("a_terminal_is_left_and_attached_to_again", terminal),
    husk_test("volumes_show_what_the_host_changes", volumes),
    husk_test("networks_names_and_ports", networks),
];

pub const ALONE: &[Test] = &[
    husk_test("killed_processes_leave_nothing", killed),
    husk_test("what_does_not_start_leaves_nothing", refused),
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

fn exit_codes_and_streams(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    // What this host is good for, the suites show.
    let found = husk.text(&["doctor"])?;
    ensure!(
        found.contains("KVM: AMD-V") && !found.contains("FAIL"),
        "{found}"
    );
    let out = husk.sh(&[], "echo out; echo err >&2; exit 3")?.exited(3)?;
    ensure!(
        (out.text(), out.errors()) == ("out".into(), "err".into()),
        "{out:?}"
    );
    husk.sh(&[], "sh -c 'kill -9 $$'; exit $?")?.exited(137)?;
    let out = husk
        .run(&["run", "--rm", IMAGE, "no-such-program"])?
        .exited(127)?;
    ensure!(out.errors().contains("no-such-program"), "{out:?}");
    let out = husk
        .run(&["run", "--rm", IMAGE, "/etc/passwd"])?
        .exited(126)?;
    ensure!(out.errors().contains("permission denied"), "{out:?}");
    for bad in [
        &["--memory", "much"][..],
        &["--network", "nowhere"],
        &["-v", "x"],
        &["--user", "nobody-here"],
    ] {
        husk.run(&[&["run", "--rm"], bad, &[IMAGE, "true"]].concat())?
            .exited(125)?;
    }
    // More than any pipe holds, in and out.
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut cat = husk.command(&["run", "--rm", "-i", "--network", "none", IMAGE, "cat"]);
    let out = ctr::output_with_input(&mut cat, data.clone())?.ok()?;
    ensure!(
        hex(&Sha256::digest(&out.stdout)) == hex(&Sha256::digest(&data)),
        "{} bytes came back",
        out.stdout.len()
    );
    ensure!(husk.text(&["ps", "-aq"])?.is_empty(), "a container is left");
    Ok(())
}

fn lives_again(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let script = "echo run $(cat /count 2>/dev/null); echo x >>/count; trap 'echo asked; exit 4' TERM; while :; do sleep 0.2; done";
    let id = husk.text(&[
        "run",
        "-d",
        "--name",
        "one",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ])?;
    ensure!(id.len() == 64, "{id:?} is no id");
    let list: Value = serde_json::from_str(&husk.text(&["ps", "--format", "json"])?)?;
    ensure!(
        list["Names"] == "one" && list["State"] == "running",
        "{list}"
    );
    husk.run(&["run", "-d", "--name", "one", IMAGE])?
        .exited(125)?;
    let out = husk
        .run(&["exec", "-i", "one", "sh", "-c", "cat; exit 5"])?
        .exited(5)?;
    ensure!(out.text().is_empty(), "{out:?}");
    let out = husk
        .run(&[
            "exec",
            "-e",
            "A=b",
            "-w",
            "/etc",
            "-u",
            "1000:10",
            "one",
            "sh",
            "-c",
            "echo $A $PWD $(id -u):$(id -g)",
        ])?
        .ok()?;
    ensure!(out.text() == "b /etc 1000:10", "{out:?}");
    husk.run(&["exec", "one", "no-such-program"])?.exited(127)?;
    let used: Value =
        serde_json::from_str(&husk.text(&["stats", "--no-stream", "--format", "json", "one"])?)?;
    ensure!(
        used["Name"] == "one" && used["PIDs"].as_str() > Some("0"),
        "{used}"
    );
    husk.text(&["pause", "one"])?;
    husk.text(&["unpause", "one"])?;
    husk.run(&["rm", "one"])?.exited(1)?;
    husk.run(&["rmi", IMAGE])?.exited(1)?;
    // The end of the log comes with the container's end.
    let follower = ctr::Running::start(&mut husk.command(&["logs", "-f", "one"]), false)?;
    ensure!(husk.text(&["stop", "one"])? == "one");
    let followed = follower.finish()?.ok()?.text();
    ensure!(followed == "run\nasked", "{followed:?}");
    ensure!(husk.state("one")? == "exited" && husk.text(&["wait", "one"])? == "4");
    ensure!(husk.text(&["ps", "-q"])?.is_empty());
    // What it has written is there when it runs again.
    husk.text(&["start", "one"])?;
    wait::until("the second run's words", || {
        let logs = husk.text(&["logs", "one"]).ok()?;
        logs.ends_with("run x").then_some(())
    })?;
    husk.run(&["kill", "-s", "KILL", &id[..12]])?.ok()?;
    ensure!(husk.text(&["wait", "one"])? == "137");
    let logs = husk.text(&["logs", "one"])?;
    ensure!(logs == "run\nasked\nrun x", "{logs:?}");
    ensure!(husk.text(&["logs", "-n", "1", "one"])? == "run x");
    husk.text(&["rm", "one"])?;
    husk.run(&["inspect", "one"])?.exited(1)?;
    husk.text(&["create", "--name", "two", IMAGE, "true"])?;
    ensure!(husk.state("two")? == "created");
    let removed = husk.text(&["prune", "--force", "--all"])?;
    ensure!(
        !removed.contains("two") && removed.contains("pause"),
        "{removed}"
    );
    Ok(())
}

fn flags(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let env = husk.root.join("env");
    fs::write(&env, "FROM_FILE=f\n")?;
    let env = env.display().to_string();
    let flags = [
        "-e",
        "A=b",
        "--env-file",
        &env,
        "-w",
        "/var",
        "-u",
        "user",
        "--hostname",
        "guest",
        "--memory",
        "300m",
        "--cpus",
        "1",
        "--pids-limit",
        "33",
        "--read-only",
        "--tmpfs",
        "/scratch:size=1m",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "NET_RAW",
        "--ulimit",
        "nofile=77",
        "--security-opt",
        "no-new-privileges",
    ];
    let script = "echo $A $FROM_FILE $PWD $(id -u):$(id -g) $(hostname) $(ulimit -n)
        cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max
        touch /no 2>/dev/null || echo read-only; touch /scratch/yes && echo scratch
        grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t '
        cat /etc/hostname";
    let out = husk.sh(&flags, script)?.ok()?.text();
    let wanted = format!(
        "b f /var 1000:1000 guest 77\n{}\n33\n100000 100000\nread-only\nscratch\nCapBnd:0000000000002000\nNoNewPrivs:1\nSeccomp:2\nguest",
        300 << 20
    );
    ensure!(out == wanted, "{out}");
    let out = husk
        .sh(
            &["--security-opt", "seccomp=unconfined"],
            "grep ^Seccomp: /proc/self/status",
        )?
        .ok()?;
    ensure!(out.text().ends_with('0'), "{out:?}");
    Ok(())
}

fn terminal(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let mut command = husk.command(&[
        "run",
        "-it",
        "--name",
        "tty",
        "--network",
        "none",
        IMAGE,
        "sh",
    ]);
    let mut session = Session::start(&mut command, size(33, 77))?;
    session.type_in("tty\n")?;
    session.expect("/dev/pts/0")?;
    has_size(&mut session, "33 77")?;
    session.resize(size(44, 99))?;
    has_size(&mut session, "44 99")?;
    session.type_in("MINE=kept\n\x10\x11")?;
    ensure!(session.finish()? == 0);
    ensure!(husk.state("tty")? == "running");
    let mut command = husk.command(&["attach", "tty"]);
    let mut session = Session::start(&mut command, size(20, 40))?;
    session.type_in("echo it-is-$MINE\n")?;
    session.expect("it-is-kept")?;
    let mut exec = husk.command(&["exec", "-it", "tty", "sh"]);
    let mut other = Session::start(&mut exec, size(20, 40))?;
    has_size(&mut other, "20 40")?;
    other.type_in("exit 6\n")?;
    ensure!(other.finish()? == 6);
    session.type_in("exit 7\n")?;
    ensure!(session.finish()? == 7);
    Ok(())
}

fn volumes(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let host = husk.root.join("shared");
    fs::create_dir(&host)?;
    fs::write(host.join("file"), "before")?;
    let (dir, file) = (
        format!("{}:/dir", host.display()),
        format!("{}:/file:ro", host.join("file").display()),
    );
    let script = "cat /dir/file; (echo x >/file) 2>/dev/null || echo read-only; echo mine >/data/kept; echo from-guest >/dir/guest; sleep 1000";
    husk.text(&[
        "run",
        "-d",
        "--name",
        "volumes",
        "--network",
        "none",
        "-v",
        &dir,
        "-v",
        &file,
        "-v",
        "data:/data",
        IMAGE,
        "sh",
        "-c",
        script,
    ])?;
    wait::until("the container's file", || {
        fs::read_to_string(host.join("guest"))
            .ok()
            .filter(|text| !text.is_empty())
    })?;
    ensure!(husk.text(&["logs", "volumes"])? == "beforeread-only");
    fs::write(host.join("file"), "after")?;
    wait::until("the change in the guest", || {
        let seen = husk
            .text(&["exec", "volumes", "cat", "/dir/file", "/file"])
            .ok()?;
        (seen == "afterafter").then_some(())
    })?;
    husk.text(&["rm", "-f", "volumes"])?;
    // A volume outlives its container.
    let out = husk
        .sh(
            &["-v", "data:/data:ro"],
            "cat /data/kept; touch /data/no || echo read-only",
        )?
        .ok()?;
    ensure!(out.text() == "mine\nread-only", "{out:?}");
    Ok(())
}

fn networks(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let serve = "mkdir /w; echo page >/w/index.html; exec httpd -f -p 80 -h /w";
    let web = [
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        "127.0.0.1:18080:80",
        IMAGE,
        "sh",
        "-c",
        serve,
    ];
    husk.text(&web)?;
    ensure!(husk.text(&["ps"])?.contains("127.0.0.1:18080->80/tcp"));
    let fetch = |from: &str| {
        let script = format!(
            "import urllib.request as r; print(r.urlopen('http://{from}/', timeout=5).read().decode().strip())"
        );
        host::run(&["python3", "-c", &script])
    };
    let address = husk.inspect("web")?["NetworkSettings"]["Addresses"][0].clone();
    let address = address.as_str().context("it has no address")?.to_owned();
    for from in [&*address, "127.0.0.1:18080"] {
        let page = wait::until(&format!("a page from {from}"), || fetch(from).ok())?;
        ensure!(page == "page", "{page}");
    }
    // By its name, from one that comes later; and the later one by its own.
    let get = [
        "run",
        "--rm",
        "--name",
        "later",
        IMAGE,
        "sh",
        "-c",
        "wget -q -O- http://web/; grep -c later /etc/hosts",
    ];
    ensure!(husk.text(&get)? == "page\n1");
    husk.text(&["run", "-d", "--name", "third", IMAGE, "sleep", "1000"])?;
    wait::until("the name of the newcomer", || {
        husk.text(&["exec", "web", "grep", "third", "/etc/hosts"])
            .ok()
    })?;
    // Another network does not know them.
    husk.text(&["network", "create", "mine"])?;
    let alone = [
        "run",
        "--rm",
        "--network",
        "mine",
        IMAGE,
        "sh",
        "-c",
        "ip -o -4 addr show eth0 | wc -l; grep -c web /etc/hosts",
    ];
    let out = husk.run(&alone)?.exited(1)?;
    ensure!(out.text() == "1\n0", "{out:?}");
    husk.text(&["network", "rm", "mine"])?;
    husk.run(&["network", "rm", "bridge"])?.exited(1)?;
    let out = husk
        .run(&["run", "--network", "host", IMAGE])?
        .exited(125)?;
    ensure!(out.errors().contains("of its own"), "{out:?}");
    Ok(())
}

fn killed(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    // The bridge stays, as docker's does.
    husk.text(&["run", "--rm", IMAGE, "true"])?;
    let before = Traces::now();
    // The caller: its container goes on, and its output is kept.
    let script = "echo begun; sleep 3; echo went-on; sleep 1000";
    let mut caller = husk
        .command(&["run", "--name", "one", IMAGE, "sh", "-c", script])
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()?;
    wait::until("the container to run", || {
        husk.text(&["logs", "one"])
            .ok()
            .filter(|text| text.contains("begun"))
    })?;
    // As the end of its terminal does, and all its processes with it.
    killpg(Pid::from_raw(caller.id().cast_signed()), Signal::SIGKILL)?;
    caller.wait()?;
    wait::until("the rest of the output", || {
        husk.text(&["logs", "one"])
            .ok()
            .filter(|text| text.contains("went-on"))
    })?;
    ensure!(husk.state("one")? == "running");
    // Its monitor: it has ended then, it can be started again, and removed.
    kill(Pid::from_raw(husk.monitor("one")?), Signal::SIGKILL)?;
    wait::until("the container to have ended", || {
        (husk.state("one").ok()? == "exited").then_some(())
    })?;
    ensure!(husk.inspect("one")?["State"]["ExitCode"] == 255);
    husk.text(&["start", "one"])?;
    ensure!(husk.state("one")? == "running");
    kill(Pid::from_raw(husk.monitor("one")?), Signal::SIGKILL)?;
    husk.text(&["rm", "-f", "one"])?;
    before.restored()?;
    // The VMM: its end is the container's.
    husk.text(&["run", "-d", "--name", "two", IMAGE, "sleep", "1000"])?;
    let pid = husk.inspect("two")?["State"]["Pid"]
        .as_i64()
        .context("it has no pid")?;
    let vmm = host::processes()
        .into_iter()
        .find(|p| p.name == "husk-vmm")
        .context("there is no VMM")?;
    kill(Pid::from_raw(vmm.pid.cast_signed()), Signal::SIGKILL)?;
    ensure!(husk.text(&["wait", "two"])? == "137", "of pid {pid}");
    husk.text(&["rm", "two"])?;
    before.restored()
}

fn refused(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    husk.text(&["run", "--rm", IMAGE, "true"])?;
    let before = Traces::now();
    husk.run(&["run", "--name", "refused", IMAGE, "no-such-program"])?
        .exited(127)?;
    let inspected = husk.inspect("refused")?;
    ensure!(inspected["State"]["ExitCode"] == 127, "{inspected}");
    husk.run(&["start", "refused"])?.exited(1)?;
    // A plugin that fails: the address it had is given back.
    let mut command = husk.command(&["run", "--rm", IMAGE, "true"]);
    let out = ctr::output(command.env("CNI_PATH", "/nonexistent"))?.exited(125)?;
    ensure!(
        out.errors().contains("containernetworking-plugins"),
        "{out:?}"
    );
    let mut command = husk.command(&["run", "--rm", IMAGE, "true"]);
    let config = husk.root.join("config.toml");
    fs::write(&config, "kernel = \"/nonexistent\"\n")?;
    let out = ctr::output(command.env("HUSK_CONFIG", &config))?.exited(125)?;
    ensure!(out.errors().contains("/nonexistent"), "{out:?}");
    husk.text(&["rm", "refused"])?;
    before.restored()
}
