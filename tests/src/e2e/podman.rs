//! podman, with husk-oci as its runtime, or with crun (`HUSK_TEST_RUNTIME=crun`) as control.

mod buildah;
mod by_hand;
mod copies;
mod pods;
mod quadlet;
mod top;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Result, ensure};
use husk_tests::{
    ctr,
    podman::{IMAGE, PODMAN, Podman, RUN_ROOT},
    runtime::Runtime,
    wait,
};

use crate::{
    Test,
    context::Context,
    husk_test,
    terminal::{Session, has_size, is_terminal_of_size, size},
    test,
};

pub const TESTS: &[Test] = &[
    test("exit_codes_and_streams", exit_codes_and_streams).needs(PODMAN),
    test("a_container_lives_and_lives_again", lives_again).needs(PODMAN),
    test("one_that_is_killed_for_memory", killed_for_memory).needs(PODMAN),
    test("terminals", terminals).needs(PODMAN),
    test("a_network_and_a_volume", network_and_volume).needs(PODMAN),
    test("copies_while_it_runs", copies::copies).needs(PODMAN),
    husk_test("the_pages_commands", the_pages_commands).needs(PODMAN),
    test("a_build", buildah::build).needs(BUILDAH),
    test("a_pod", pods::pod).needs(PODMAN),
    test("a_unit_of_quadlet", quadlet::container).needs(PODMAN),
    test("a_pods_unit_of_quadlet", quadlet::pod).needs(PODMAN),
    test("a_kube_unit_of_quadlet", quadlet::kube).needs(PODMAN),
    husk_test("a_pod_that_shares_some_is_refused", pods::refused).needs(PODMAN),
    husk_test("doctor_reads_containers_conf", crate::doctor::podman).needs(PODMAN),
    husk_test("errors_are_those_of_crun", by_hand::errors).needs(CRUN),
    husk_test("hooks_are_run_on_the_host", by_hand::hooks).needs(CRUN),
    husk_test(
        "a_killed_proxy_takes_its_container_along",
        by_hand::killed_proxy,
    )
    .needs(CRUN),
];

const BUILDAH: &str = "/usr/bin/buildah";
const CRUN: &str = "/usr/bin/crun";

/// podman with the suite's runtime. The image is made by the first who asks.
fn podman(suite: &Context) -> Result<Podman> {
    static IMAGE_MADE: OnceLock<Result<(), String>> = OnceLock::new();
    let podman = Podman::new(&match suite.runtime {
        Runtime::Husk => suite.bin.join("husk-oci"),
        _ => CRUN.into(),
    });
    let make = || podman.import(&suite.rootfs).map_err(|e| format!("{e:?}"));
    IMAGE_MADE
        .get_or_init(make)
        .clone()
        .map_err(anyhow::Error::msg)?;
    Ok(podman)
}

fn exit_codes_and_streams(suite: &Context) -> Result<()> {
    let podman = podman(suite)?;
    let out = podman
        .once(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"])?
        .exited(7)?;
    ensure!(
        (out.text(), out.errors()) == ("out".into(), "err".into()),
        "{out:?}"
    );
    let head = ["run", "--rm", "-i", "--network", "none", IMAGE, "sh", "-c"];
    let mut cat = podman.command(&[&head[..], &["cat; echo done"]].concat());
    let out = ctr::output_with_input(&mut cat, b"typed\n".to_vec())?.ok()?;
    ensure!(out.text() == "typed\ndone", "{out:?}");
    let out = podman.once(&[], &["/nothing"])?.exited(127)?;
    ensure!(out.errors().contains("not found"), "{out:?}");
    let out = podman.once(&[], &["/etc/passwd"])?.exited(126)?;
    ensure!(
        out.errors().to_lowercase().contains("permission denied"),
        "{out:?}"
    );
    let out = podman
        .once(
            &[
                &["--user", "user", "--workdir", "/tmp", "-e", "A=b"][..],
                &["--uidmap", "0:100000:65536"],
            ]
            .concat(),
            &["sh", "-c", "id -un; pwd; echo $A; echo $(cat /proc/self/uid_map) $(cat /proc/sys/net/ipv4/ping_group_range)"],
        )?
        .ok()?;
    ensure!(out.text() == "user\n/tmp\nb\n0 100000 65536 0 0", "{out:?}");
    Ok(())
}

fn lives_again(suite: &Context) -> Result<()> {
    let podman = podman(suite)?;
    let ok = |args: &[&str]| podman.run(args)?.ok();
    let name = "lives";
    let script = "trap 'echo bye; exit 3' TERM; echo started; while :; do sleep 0.2; done";
    ok(&[
        "run",
        "-d",
        "--name",
        name,
        "--network",
        "none",
        "--memory",
        "200m",
        "--shm-size",
        "8m",
        IMAGE,
        "sh",
        "-c",
        script,
    ])?;
    podman.wait_for_log(name, "started")?;
    ensure!(podman.inspect(name, "{{.State.Status}}")? == "running");
    let out = podman
        .run(&[
            "exec",
            name,
            "sh",
            "-c",
            "echo in; echo complaint >&2; exit 9",
        ])?
        .exited(9)?;
    ensure!(
        (out.text(), out.errors()) == ("in".into(), "complaint".into()),
        "{out:?}"
    );
    let mut cat = podman.command(&["exec", "-i", name, "cat"]);
    let out = ctr::output_with_input(&mut cat, b"abc".to_vec())?.ok()?;
    ensure!(out.text() == "abc", "{out:?}");
    podman.run(&["exec", name, "/nothing"])?.exited(127)?;
    let shm = ok(&["exec", name, "sh", "-c", "df -k /dev/shm | tail -n 1"])?;
    ensure!(
        shm.text().split_whitespace().nth(1) == Some("8192"),
        "{shm:?}"
    );
    ok(&["exec", "-d", name, "sh", "-c", "echo detached >/tmp/said"])?;
    wait::until("the detached process", || {
        let said = podman.run(&["exec", name, "cat", "/tmp/said"]).ok()?;
        (said.text() == "detached").then_some(())
    })?;
    top::shows(&podman, name)?;
    ok(&["pause", name])?;
    ensure!(podman.inspect(name, "{{.State.Status}}")? == "paused");
    ok(&["unpause", name])?;
    ok(&["update", "--pids-limit", "50", name])?;
    let pids = ok(&["exec", name, "sh", "-c", "cat /sys/fs/cgroup/pids.max"])?;
    ensure!(pids.text() == "50", "{pids:?}");
    let stats = ok(&["stats", "--no-stream", "--format", "{{.Name}}", name])?;
    ensure!(stats.text() == name, "{stats:?}");
    ok(&["stop", "-t", "30", name])?;
    ensure!(podman.inspect(name, "{{.State.Status}} {{.State.ExitCode}}")? == "exited 3");
    ensure!(ok(&["logs", name])?.text() == "started\nbye");
    ok(&["start", name])?;
    ok(&["kill", "-s", "KILL", name])?;
    ok(&["wait", name])?;
    ensure!(podman.inspect(name, "{{.State.ExitCode}}")? == "137");
    ok(&["start", name])?;
    ok(&["rm", "-f", "-t", "0", name])?;
    let id = podman.run(&["inspect", name])?;
    ensure!(id.code != 0, "{id:?}");
    Ok(())
}

fn killed_for_memory(suite: &Context) -> Result<()> {
    let podman = podman(suite)?;
    let limits = ["--memory", "64m", "--memory-swap", "64m"];
    let head = ["run", "--name", "hungry", "--network", "none"];
    let command = [IMAGE, "tail", "/dev/zero"];
    podman
        .run(&[&head[..], &limits, &command].concat())?
        .exited(137)?;
    ensure!(podman.inspect("hungry", "{{.State.OOMKilled}}")? == "true");
    podman.run(&["rm", "hungry"])?.ok()?;
    Ok(())
}

fn terminals(suite: &Context) -> Result<()> {
    let podman = podman(suite)?;
    let mut command = podman.command(&[
        "run",
        "--rm",
        "-it",
        "--name",
        "tty",
        "--network",
        "none",
        IMAGE,
        "sh",
    ]);
    let mut session = Session::start(&mut command, size(33, 77))?;
    is_terminal_of_size(&mut session)?;
    let mut exec = podman.command(&["exec", "-it", "tty", "sh"]);
    let mut other = Session::start(&mut exec, size(20, 40))?;
    has_size(&mut other, "20 40")?;
    let terminal = top::terminal(&podman, "tty")?;
    ensure!(terminal == "pts/0", "{terminal}");
    other.type_in("exit 6\n")?;
    ensure!(other.finish()? == 6);
    session.type_in("exit 7\n")?;
    ensure!(session.finish()? == 7);
    Ok(())
}

fn network_and_volume(suite: &Context) -> Result<()> {
    let podman = podman(suite)?;
    let host = podman.dir.join("volume");
    fs::create_dir_all(&host)?;
    fs::write(host.join("index.html"), "of the host")?;
    let volume = format!("{}:/www:ro", host.display());
    let serve = [
        "run", "-d", "--name", "served", "-v", &volume, IMAGE, "httpd", "-f", "-h", "/www",
    ];
    podman.run(&serve)?.ok()?;
    let address = podman.inspect("served", "{{.NetworkSettings.IPAddress}}")?;
    let url = format!("http://{address}/");
    let fetch = ["run", "--rm", IMAGE, "wget", "-q", "-O", "-", &url];
    let fetched = podman.run(&fetch)?.ok();
    let removed = podman.run(&["rm", "-f", "-t", "0", "served"])?.ok();
    let fetched = fetched?;
    removed?;
    ensure!(fetched.text() == "of the host", "{fetched:?}");
    Ok(())
}

/// Those of the pages in docs/engines, one after another.
fn the_pages_commands(suite: &Context) -> Result<()> {
    const PAGES: [(&str, usize); 2] = [
        (include_str!("../../../docs/engines/podman.md"), 15),
        (include_str!("../../../docs/engines/buildah.md"), 6),
    ];
    const CONF: &str = include_str!("../../../deploy/podman.conf");
    let podman = podman(suite)?;
    // As `make install` leaves it, and a checkout.
    let installed = Path::new("/usr/local/bin/husk-oci");
    let _ = fs::remove_file(installed);
    std::os::unix::fs::symlink(suite.bin.join("husk-oci"), installed)?;
    let checkout =
        buildah::containerfile(&podman, "checkout", "FROM IMAGE\nRUN uname -r >/kernel\n")?;
    fs::create_dir_all(checkout.join("deploy"))?;
    fs::write(checkout.join("deploy/podman.conf"), CONF)?;
    let pod = pods::yaml("page", &checkout);
    fs::write(checkout.join("pod.yaml"), pod)?;
    // The testbed has no systemd, and the image is in the suite's storage.
    let [settings, storage] = ["settings.conf", "storage.conf"].map(|name| podman.dir.join(name));
    fs::write(
        &settings,
        "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n",
    )?;
    let graph = podman.storage();
    fs::write(
        &storage,
        format!(
            "[storage]\ndriver = \"overlay\"\nrunroot = \"{RUN_ROOT}\"\ngraphroot = \"{}\"\n",
            graph.display()
        ),
    )?;
    for (page, count) in PAGES {
        let mut is_command = false;
        let mut run = 0;
        for line in page.lines() {
            if line.starts_with("```") {
                is_command = line == "```sh";
                continue;
            }
            if !is_command {
                continue;
            }
            let mut command = Command::new("sh");
            command
                .args(["-c", &line.replace("IMAGE", IMAGE)])
                .current_dir(&checkout)
                .env("CONTAINERS_CONF_OVERRIDE", &settings)
                .env("CONTAINERS_STORAGE_CONF", &storage);
            ctr::output(&mut command)?.ok()?;
            run += 1;
        }
        ensure!(run == count, "{run} commands were run");
    }
    Ok(())
}

/// A bundle with the suite's root file system, for what is called by hand.
fn bundle(
    suite: &Context,
    name: &str,
    change: impl FnOnce(&mut serde_json::Value),
) -> Result<PathBuf> {
    let dir = Path::new("/var/lib/husk-e2e-podman").join(name);
    fs::create_dir_all(&dir)?;
    // crun writes none over another.
    let _ = fs::remove_file(dir.join("config.json"));
    ctr::output(Command::new(CRUN).arg("spec").current_dir(&dir))?.ok()?;
    let path = dir.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    spec["root"]["path"] = serde_json::json!(suite.rootfs);
    spec["process"]["terminal"] = serde_json::json!(false);
    spec["process"]["args"] = serde_json::json!(["sleep", "1000"]);
    change(&mut spec);
    fs::write(&path, serde_json::to_vec(&spec)?)?;
    Ok(dir)
}
