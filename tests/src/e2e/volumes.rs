//! Volumes that the host changes. The kubelet keeps some up to date: who watches one in a container is told of each swap, in the steps of a plain
//! host.
//!
//! busybox has no inotifyd in the image, so the watcher is a workload of this binary.

use std::{
    fs, io,
    os::unix::fs::{FileExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{PodContainer, container, v1},
    wait,
};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::{
    Test,
    context::Context,
    test,
    workload::{self, Workload},
};

pub const TESTS: &[Test] = &[test(
    "a_swap_of_the_kubelet_is_seen_by_who_watches",
    swap_is_seen,
)];

/// The group of the volume's files, as a pod's fsGroup gives them one.
const GROUP: u32 = 2000;

/// A file that nobody has changed since the testbed's image was made: a guest keeps what it has of such a file.
const OLD: (&str, &str) = ("/srv/debian-rootfs/etc", "issue.net");

/// A volume on the host, written as the kubelet's AtomicWriter does (`pkg/volume/util/atomic_writer.go`).
struct Volume(PathBuf);

impl Volume {
    fn new(dir: &Path) -> Result<Self> {
        let path = dir.join("volumes/kubernetes.io~configmap/config");
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Makes these keys the volume's, each with the version as its value.
    fn write(&self, version: &str, keys: &[&str]) -> Result<()> {
        let at = |name: &str| self.0.join(name);
        let old = fs::read_link(at("..data"))
            .ok()
            .map(|link| self.0.join(link));
        fs::create_dir(at(version))?;
        for key in keys {
            let file = at(version).join(key);
            fs::write(&file, version)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o440))?;
            chown(&file, None, Some(GROUP))?;
        }
        for key in keys.iter().filter(|key| !at(key).is_symlink()) {
            symlink(Path::new("..data").join(key), at(key))?;
        }
        symlink(version, at("..data_tmp"))?;
        fs::rename(at("..data_tmp"), at("..data"))?;
        if let Some(old) = old {
            for entry in fs::read_dir(&old)? {
                let name = entry?.file_name();
                if !keys.iter().any(|key| name == *key) {
                    fs::remove_file(self.0.join(name))?;
                }
            }
            fs::remove_dir_all(old)?;
        }
        Ok(())
    }
}

fn swap_is_seen(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let workload = Workload::new(suite, dir.path())?;
    let volume = Volume::new(dir.path())?;
    volume.write("..v1", &["key", "old"])?;

    let pod = suite.cri()?.pod()?;
    let start = |mut config: v1::ContainerConfig| {
        config.mounts.extend([
            workload::mount(&volume.0, "/etc/config"),
            workload::mount(Path::new(OLD.0), "/etc/old"),
        ]);
        pod.start(config)
    };
    let watcher = start(workload.container(&["watch-workload", "/etc/config"]))?;
    wait::until("the watcher to watch", || {
        (watcher.logged("stdout") == "ready").then_some(())
    })?;
    ensure!(watcher.exec(&["cat", "/etc/config/key"])?.ok()? == "..v1");
    let stat = watcher
        .exec(&["stat", "-L", "-c", "%a %u %g", "/etc/config/key"])?
        .ok()?;
    ensure!(stat == format!("440 0 {GROUP}"), "{stat}");

    volume.write("..v2", &["key", "extra"])?;
    let steps = wait::until("the end of the swap", || {
        let steps = watcher.logged("stdout");
        let is_over = ["deleted old", "deleted ..v1"]
            .iter()
            .all(|end| steps.contains(end));
        is_over.then_some(steps)
    })?;
    // Each once, and none before what it builds on.
    let order = [
        ("ready", "created ..v2"),
        ("ready", "created extra"),
        ("created ..v2", "created ..data_tmp"),
        ("created extra", "moved to ..data"),
        ("created ..data_tmp", "moved from ..data_tmp"),
        ("moved from ..data_tmp", "moved to ..data"),
        ("moved to ..data", "key is ..v2"),
        ("key is ..v2", "deleted old"),
        ("key is ..v2", "deleted ..v1"),
    ];
    let place = |step: &str| steps.lines().position(|line| line == step);
    for (first, then) in order {
        ensure!(
            place(first).is_some() && place(first) < place(then),
            "{first:?} should come before {then:?}: {steps}"
        );
    }
    ensure!(steps.lines().count() == order.len(), "{steps}");

    // One that comes later shares the volume, and both go on when one of them has gone.
    let other = start(container(&["sleep", "1000000"]))?;
    ensure!(other.exec(&["cat", "/etc/config/extra"])?.ok()? == "..v2");
    ensure!(other.sh("echo x > /etc/config/mine")?.code != 0);
    watcher.remove()?;
    volume.write("..v3", &["key"])?;
    wait::until("the next swap", || {
        (other.exec(&["cat", "/etc/config/key"]).ok()?.out == "..v3").then_some(())
    })?;
    a_change_that_only_ctime_tells(&other)
}

/// As tar and rsync make it, which put mtime back: the guest's kernel looks at size and mtime alone.
fn a_change_that_only_ctime_tells(container: &PodContainer<'_>) -> Result<()> {
    let path = Path::new(OLD.0).join(OLD.1);
    let inside = format!("/etc/old/{}", OLD.1);
    let read = || container.exec(&["cat", &inside])?.ok();
    let before = fs::read(&path)?;
    ensure!(before.len() > 1, "{} is empty", path.display());
    // Read, so that the guest has it; opened, so that it knows that it may keep it.
    for _ in 0..3 {
        ensure!(read()?.as_bytes() == before.trim_ascii());
    }
    let file = fs::File::options().write(true).open(&path)?;
    let modified = file.metadata()?.modified()?;
    file.write_all_at(b"#", 0)?;
    file.set_modified(modified)?;
    let seen = read()?;
    file.write_all_at(&before[..1], 0)?;
    file.set_modified(modified)?;
    ensure!(
        seen.starts_with('#') && seen.len() == before.trim_ascii().len(),
        "{seen:?}"
    );
    ensure!(read()?.as_bytes() == before.trim_ascii());
    Ok(())
}

/// The watcher: tells what happens in a directory until it is killed, and at each swap what is read then.
pub fn watch_workload(dir: &Path) -> Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let events = [
        (AddWatchFlags::IN_CREATE, "created"),
        (AddWatchFlags::IN_MOVED_FROM, "moved from"),
        (AddWatchFlags::IN_MOVED_TO, "moved to"),
        (AddWatchFlags::IN_DELETE, "deleted"),
    ];
    let all = events.iter().map(|(flag, _)| *flag).collect();
    inotify
        .add_watch(dir, all)
        .with_context(|| format!("watching {}", dir.display()))?;
    println!("ready");
    loop {
        for event in inotify.read_events().map_err(io::Error::from)? {
            let name = event.name.unwrap_or_default();
            for (_, what) in events.iter().filter(|(flag, _)| event.mask.contains(*flag)) {
                println!("{what} {}", name.display());
            }
            if event.mask.contains(AddWatchFlags::IN_MOVED_TO) {
                println!("key is {}", fs::read_to_string(dir.join("key"))?);
            }
        }
    }
}
