//! The disk under the containers is slow.

use std::{fmt::Display, fs, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::{Result, ensure};
use husk_tests::{
    containerd::{Containerd, Sandboxer},
    cri::{Cri, container},
    host::Traces,
};
use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    sys::stat::{major, minor},
};

use super::SLEEP;
use crate::{cgroup::PodCgroup, context::Context, workload::Workload};

/// Of a pod's reads, in bytes a second: the file, one request of 128 KiB, takes it eight seconds.
const RATE: u64 = 16 << 10;

/// The user's part: has the kernel read ahead, and is over before there is an answer.
pub fn read_ahead_workload(file: &Path) -> Result<()> {
    let file = fs::File::open(file)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
    Ok(())
}

/// A container ends while the host still reads for it: the guest's kernel, which has meanwhile taken its file systems away, gets the
/// answer later.
pub fn ended_in_a_read(suite: &Context) -> Result<()> {
    // Other suites' containers are in memory.
    let dir = Path::new("/var/tmp/husk-e2e-slow");
    let containerd = Containerd::start_with_cri(dir, &suite.bin, Sandboxer::Pause)?;
    let cri = Cri::connect(&containerd, suite.runtime)?;
    let files = tempfile::tempdir_in(dir)?;
    let workload = Workload::new(suite, files.path())?;
    let mut config = cri.pod_config();
    let cgroup = PodCgroup::new(&config.hostname)?;
    config.linux.get_or_insert_default().cgroup_parent = cgroup.path.clone();
    let before = Traces::now();
    let pod = cri.run_pod(config)?;
    let mut reader = workload.container(&[]);
    let program = std::mem::replace(&mut reader.command, SLEEP.map(str::to_owned).into());
    let reader = pod.start(reader)?;
    let read_ahead = |file| {
        let words: Vec<_> = program.iter().map(String::as_str).collect();
        reader
            .exec(&[&words, &["read-ahead-workload", file][..]].concat())?
            .ok()
    };
    // Past the guest's page cache and the host's.
    reader
        .sh("dd if=/dev/zero of=/file bs=128k count=1 oflag=direct")?
        .ok()?;
    // The program itself is in both by then.
    read_ahead("/etc/passwd")?;

    cgroup.set("io.max", reads(dir, RATE)?)?;
    read_ahead("/file")?;
    reader.stop(0)?;
    reader.remove()?;
    cgroup.set("io.max", reads(dir, "max")?)?;

    let next = pod.start(container(&SLEEP))?;
    ensure!(next.sh("echo alive")?.ok()? == "alive");
    drop(next);
    drop(pod);
    before.restored()
}

/// A line of io.max for the disk that holds this path: `rate` in bytes a second, or `max`.
fn reads(path: &Path, rate: impl Display) -> Result<String> {
    let device = fs::metadata(path)?.dev();
    Ok(format!("{}:{} rbps={rate}", major(device), minor(device)))
}
