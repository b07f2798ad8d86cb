//! systemd as a container's first process, in podman and in Docker: the commands of docs/engines/systemd.md, and what they come to.
//!
//! The controls have the same commands: podman's runtime `husk` is crun then, and Docker's default is runc.

use std::{fs, path::Path, process::Command, sync::OnceLock};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    ctr::{self, Output},
    host,
    runtime::Runtime,
    wait,
};

use crate::{Test, context::Context, test};

pub const TESTS: &[Test] = &[
    test("in_podman", podman).needs("/usr/bin/podman"),
    test("in_docker", docker).needs("/usr/sbin/dockerd"),
];

const PAGE: &str = include_str!("../../../docs/engines/systemd.md");
/// On a disk, as an overlay's upper directory is.
const DIR: &str = "/var/lib/husk-e2e-systemd";

/// From the Debian tree to `$0`: systemd with its units, a web server, a login on the console, what a shell needs. Nothing is left to be brought up
/// to date at the first start, and what nobody misses does not start: each unit takes seconds here.
const TREE: &str = r#"
rm -rf "$0"; mkdir -p "$0"/usr/bin "$0"/usr/sbin "$0"/usr/lib64 "$0"/usr/lib/x86_64-linux-gnu "$0"/tmp "$0"/proc "$0"/sys "$0"/dev "$0"/run \
    "$0"/root "$0"/var/log/nginx "$0"/var/tmp
for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$0/$dir"; done
cd /srv/debian-rootfs
cp -a --parents usr/lib/systemd usr/lib/tmpfiles.d/tmp.conf usr/lib/sysusers.d usr/lib/x86_64-linux-gnu/systemd etc/systemd etc/nginx \
    etc/passwd etc/group etc/shadow etc/nsswitch.conf usr/lib/nginx usr/share/nginx var/www var/lib/nginx "$0"
programs="usr/lib/systemd/systemd usr/bin/systemctl usr/bin/journalctl usr/bin/systemd-tmpfiles usr/bin/systemd-sysusers usr/bin/sh usr/bin/cat \
    usr/bin/mount usr/bin/sleep usr/sbin/agetty usr/sbin/nginx usr/sbin/start-stop-daemon"
libraries=$(for program in $programs usr/lib/systemd/systemd-*; do chroot . ldd "/$program" 2>/dev/null; done | grep -o '/lib[^ :]* ' | sort -u | sed 's,^/,,')
cp -aL --parents $programs "$0"
for library in $libraries; do [ -e "$0/$library" ] || cp -aL --parents "$library" "$0"; done
ln -s ../lib/systemd/systemd "$0/usr/sbin/init"
for unit in redis-server ldconfig modprobe@ systemd-journal-flush systemd-tmpfiles-setup-dev-early systemd-tmpfiles-setup-dev systemd-remount-fs; do
    ln -sf /dev/null "$0/etc/systemd/system/$unit.service"
done
for unit in dev-hugepages.mount sys-fs-fuse-connections.mount apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer; do
    ln -sf /dev/null "$0/etc/systemd/system/$unit"
done
: >"$0/etc/machine-id"; touch "$0/etc/.updated" "$0/var/.updated"
"#;

/// What is looked at in it, one line each.
const LOOK: &str = r#"
cat /proc/1/comm
read id </etc/machine-id; echo ${#id}
read pid </sys/fs/cgroup/system.slice/nginx.service/cgroup.procs && cat /proc/$pid/comm
systemctl stop nginx && systemctl is-active nginx
systemctl start nginx && systemctl is-active nginx
systemctl list-units --failed --no-legend
"#;

/// The page's commands below a heading.
fn commands(heading: &str) -> Result<Vec<&'static str>> {
    let section = PAGE.split_once(&format!("## {heading}\n"));
    let (_, block) = section
        .and_then(|(_, rest)| rest.split_once("```sh\n"))
        .context("the page has no such commands")?;
    let (block, _) = block.split_once("```").context("the block does not end")?;
    Ok(block.lines().collect())
}

/// The tree, which the first who asks makes.
fn tree() -> Result<String> {
    static MADE: OnceLock<Result<(), String>> = OnceLock::new();
    let tree = format!("{DIR}/tree");
    let make = || {
        fs::create_dir_all(DIR)?;
        host::run(&["sh", "-ec", TREE, &tree])
    };
    let made = MADE.get_or_init(|| make().map(drop).map_err(|e| format!("{e:?}")));
    made.clone().map_err(anyhow::Error::msg)?;
    Ok(tree)
}

/// An engine, with what takes the place of the page's IMAGE.
struct Engine<'a> {
    name: &'static str,
    image: String,
    /// What podman and Docker say of the container that has been stopped.
    ended: &'static str,
    /// A shell that finds it.
    shell: &'a dyn Fn() -> Command,
}

impl Engine<'_> {
    fn sh(&self, line: &str) -> Result<Output> {
        let line = line.replace("IMAGE", &self.image);
        ctr::output((self.shell)().args(["-ec", &line]))
    }

    fn machine(&self, verb: &str, rest: &str) -> Result<String> {
        let line = format!("{} {verb} machine {rest}", self.name);
        Ok(self.sh(&line)?.ok()?.text())
    }

    /// The page's commands, one after another; without a trace, also where they fail.
    fn follow(&self, heading: &str) -> Result<()> {
        let followed = self.to_the_end(heading);
        if followed.is_err() {
            let _ = self.sh(&format!("{} rm -f machine", self.name));
        }
        followed
    }

    fn to_the_end(&self, heading: &str) -> Result<()> {
        let commands = commands(heading)?;
        let [run, is_running, restart, journal, stop, remove] = commands.as_slice() else {
            anyhow::bail!("{commands:?}");
        };
        self.sh(run)?.ok()?;
        // Its console: to ask inside would slow it down, and there is nobody to answer yet. Step by step, as it takes long, and by names that it
        // does not abbreviate.
        for line in [
            "systemd-journald.service",
            "sysinit.target",
            "Graphical Interface",
        ] {
            wait::until(&format!("{line:?} on the console"), || {
                let log = self.sh(&format!("{} logs machine", self.name)).ok()?;
                log.text().contains(line).then_some(())
            })
            .with_context(|| format!("{:?}", self.machine("logs", "")))?;
        }
        let state = self.sh(is_running)?;
        ensure!(
            state.text() == "running",
            "{state:?}: {:?}",
            self.machine("exec", "systemctl list-units --failed --no-legend")
        );
        self.sh(restart)?.ok()?;
        let journal = self.sh(journal)?.ok()?.text();
        ensure!(journal.matches("Started nginx").count() == 2, "{journal}");
        let seen = self.machine("exec", &format!("sh -c '{LOOK}'"))?;
        let wanted = ["systemd", "32", "nginx", "inactive", "active"];
        ensure!(seen.lines().eq(wanted), "{seen}");
        let address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        let address = self.machine(&format!("inspect --format '{address}'"), "")?;
        let page = host::run(&[
            "busybox",
            "wget",
            "-q",
            "-O",
            "-",
            &format!("http://{address}/"),
        ])?;
        ensure!(page.contains("nginx"), "{page}");
        self.sh(stop)?.ok()?;
        let state = "{{.State.Status}} {{.State.ExitCode}}";
        let state = self.machine(&format!("inspect --format '{state}'"), "")?;
        ensure!(
            state == self.ended,
            "{state}: {:?}",
            self.machine("logs", "")
        );
        self.sh(remove)?.ok().map(drop)
    }
}

fn podman(suite: &Context) -> Result<()> {
    let program = match suite.runtime {
        Runtime::Husk => suite.bin.join("husk-oci"),
        _ => "/usr/bin/crun".into(),
    };
    let tree = tree()?;
    let [settings, storage] =
        ["settings.conf", "storage.conf"].map(|name| Path::new(DIR).join(name));
    // The testbed has no systemd of its own.
    fs::write(
        &settings,
        format!(
            "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n[engine.runtimes]\nhusk = [\"{}\"]\n",
            program.display()
        ),
    )?;
    fs::write(
        &storage,
        format!(
            "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/husk-e2e-systemd\"\ngraphroot = \"{DIR}/storage\"\n"
        ),
    )?;
    let shell = || {
        let mut shell = Command::new("sh");
        shell
            .env("CONTAINERS_CONF_OVERRIDE", &settings)
            .env("CONTAINERS_STORAGE_CONF", &storage);
        shell
    };
    let engine = Engine {
        name: "podman",
        image: format!("--rootfs {tree}:O"),
        ended: "exited 0",
        shell: &shell,
    };
    engine.follow("podman")
}

fn docker(suite: &Context) -> Result<()> {
    const IMAGE: &str = "machine:husk";
    let docker = suite.docker()?;
    docker.import(Path::new(&tree()?), IMAGE)?;
    let engine = Engine {
        name: "docker",
        image: IMAGE.to_owned(),
        // It has CAP_SYS_BOOT, and to halt a pid namespace is to end its first process with SIGINT (reboot(2)).
        ended: "exited 130",
        shell: &|| docker.program("sh"),
    };
    engine.follow("Docker")
}
