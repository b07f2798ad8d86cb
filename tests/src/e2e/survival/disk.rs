//! The disk under the containers is full.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use husk_tests::{
    containerd::{Containerd, Sandboxer},
    cri::{Cri, container},
    host::{self, Traces},
    runtime::Runtime,
    wait,
};
use nix::sys::{
    quota::{Dqblk, QuotaType, QuotaValidFlags, quotactl_set},
    statvfs::statvfs,
};

use super::{SLEEP, shared};
use crate::context::Context;

/// Room for the images and what containerd knows of them, and a little for containers.
const DISK_MIB: u64 = 64;

/// Copies a line until the disk is full; dd's own words are the reason.
const FILL: &str = "dd if=/dev/zero of=/big bs=64k 2>&1";

pub fn full(suite: &Context) -> Result<()> {
    let dir = Path::new("/run/husk-e2e-disk");
    let disk = Disk::mount(dir)?;
    let containerd = Containerd::start_with_cri(dir, &suite.bin, Sandboxer::Pause)?;
    let cri = Cri::connect(&containerd, suite.runtime)?;
    let before = Traces::now();
    let pod = cri.pod()?;
    let (writer, other) = (pod.start(container(&SLEEP))?, pod.start(container(&SLEEP))?);
    let files = tempfile::tempdir()?;
    let mut talk = container(&[
        "sh",
        "-c",
        // More than pipes and sockets hold, in few lines: containerd says of each that it could not be written.
        "until [ -e /shared/go ]; do sleep 0.2; done; yes $(printf %05000d 0) | head -c 2000000; exit 7",
    ]);
    talk.mounts.push(shared(files.path()));
    let talk = pod.start(talk)?;
    let late = pod.create(container(&SLEEP))?;

    let filled = writer.sh(FILL)?;
    ensure!(
        filled.code != 0 && filled.out.contains("No space left on device"),
        "{filled:?}"
    );
    // What rests is smaller than a block of dd's.
    writer.sh("cat /dev/zero >>/big")?;
    ensure!(disk.free_mib()? == 0, "{} MiB free", disk.free_mib()?);
    disk.take_the_rest()?;

    // The others live, logs that cannot be written stop nobody, and what needs room says so.
    other.exec(&["true"])?.ok()?;
    fs::write(files.path().join("go"), "")?;
    let talked = talk.ended()?.code;
    ensure!(talked == 7, "it ended with {talked}");
    says_why(suite, late.start(), "starting a container")?;
    says_why(suite, cri.pod().map(drop), "starting a pod")?;
    writer.exec(&["true"])?.ok()?;
    disk.give_the_rest_back()?;

    // What goes makes room again: a file, a container, a pod.
    writer.exec(&["rm", "/big"])?.ok()?;
    room_again(&disk)?;
    ensure!(pod.sh("echo again >/file; cat /file")?.ok()? == "again");
    writer.sh(FILL)?;
    writer.remove()?;
    room_again(&disk)?;
    other.sh(FILL)?;
    drop(pod);
    room_again(&disk)?;
    before.restored()
}

fn room_again(disk: &Disk) -> Result<()> {
    wait::until("room on the disk", || {
        (disk.free_mib().ok()? >= DISK_MIB / 4).then_some(())
    })
}

/// It failed for want of room. The kernel mounts an overlay read-only where its disk is full, and runc goes on with that.
fn says_why(suite: &Context, outcome: Result<()>, doing: &str) -> Result<()> {
    let Err(error) = outcome else {
        bail!("{doing} on a full disk went through");
    };
    let why = format!("{error:#}").to_lowercase();
    let is_told = why.contains("no space left on device")
        || suite.runtime == Runtime::Runc && why.contains("read-only file system");
    ensure!(is_told, "{doing} on a full disk: {why}");
    Ok(())
}

/// A small disk for a containerd's root and its pods' logs. Dropped, it is gone.
pub struct Disk {
    image: PathBuf,
    root: PathBuf,
}

impl Disk {
    fn mount(dir: &Path) -> Result<Self> {
        let disk = Self::with(dir, &[], "loop")?;
        fs::create_dir(disk.root.join("pods"))?;
        fs::create_dir(disk.rest())?;
        std::os::unix::fs::symlink("root/pods", dir.join("pods"))?;
        Ok(disk)
    }

    /// One on which users have quotas, once they are set.
    pub fn with_quotas(dir: &Path) -> Result<Self> {
        Self::with(dir, &["-O", "quota"], "loop,usrquota")
    }

    fn with(dir: &Path, features: &[&str], options: &str) -> Result<Self> {
        let (root, image) = (dir.join("root"), dir.join("disk.ext4"));
        fs::create_dir_all(&root)?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let size = format!("{DISK_MIB}M");
        let make = ["mke2fs", "-q", "-t", "ext4", "-m", "0"];
        host::run(&[&make, features, &[&text(&image), &size]].concat())?;
        host::run(&["mount", "-o", options, &text(&image), &text(&root)])?;
        Ok(Self { image, root })
    }

    /// Gives a user so many KiB and files at most.
    pub fn limit(&self, user: u32, kib: u64, files: u64) -> Result<()> {
        let device = host::run(&[
            "findmnt",
            "-n",
            "-o",
            "SOURCE",
            &self.root.to_string_lossy(),
        ])?;
        let mut quota = Dqblk::default();
        quota.set_blocks_hard_limit(kib);
        quota.set_inodes_hard_limit(files);
        let valid = QuotaValidFlags::QIF_LIMITS;
        let id = user.cast_signed();
        quotactl_set(QuotaType::USRQUOTA, device.as_str(), id, &quota, valid)?;
        Ok(())
    }

    /// Where it is mounted.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn free_mib(&self) -> Result<u64> {
        let stat = statvfs(&self.root).with_context(|| format!("{}", self.root.display()))?;
        Ok(stat.blocks_available() * stat.fragment_size() / (1 << 20))
    }

    /// Takes what a file does not get, as ext4 keeps some blocks back until it has written the file out: until there is none for a
    /// directory.
    fn take_the_rest(&self) -> Result<()> {
        nix::unistd::sync();
        for number in 0.. {
            match fs::create_dir(self.rest().join(number.to_string())) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn give_the_rest_back(&self) -> Result<()> {
        Ok(fs::remove_dir_all(self.rest())?)
    }

    /// There from the start: on a full disk it could not be made.
    fn rest(&self) -> PathBuf {
        self.root.join("rest")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It is dropped after containerd, which has emptied what it could of the directory.
        let _ = host::run(&["umount", "-l", &self.root.to_string_lossy()]);
        let _ = fs::remove_file(&self.image);
        if let Some(dir) = self.root.parent() {
            let _ = fs::remove_dir_all(dir);
        }
    }
}
