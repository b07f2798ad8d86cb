//! A volume of huge pages (emptyDir of medium HugePages), as the kubelet mounts one.

use std::{
    fs::{self, File},
    io::Write as _,
    num::NonZeroUsize,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    slice,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{container, security, v1},
    runtime::Runtime,
};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

use super::volumes::Mounted;
use crate::{cgroup::PodCgroup, context::Context, workload::Workload};

const MIB: u64 = 1 << 20;

/// The pod's `fsGroup`.
const GROUP: u32 = 2000;

/// How many pages the host makes on demand.
const OF_HOST: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

/// Pages of the host's, for a container that uses them. Dropped, there are as many as before.
struct HostPages(String);

impl HostPages {
    fn allow(pages: u64) -> Result<Self> {
        let before = fs::read_to_string(OF_HOST)?;
        fs::write(OF_HOST, pages.to_string())?;
        Ok(Self(before))
    }
}

impl Drop for HostPages {
    fn drop(&mut self) {
        let _ = fs::write(OF_HOST, self.0.trim());
    }
}

/// Bytes of a page.
const PAGE: usize = 2 << 20;

/// The user's part: maps two pages of a file and writes to both; then tries to map more than the pod may have.
pub fn map_workload(volume: &Path) -> Result<()> {
    let pages = map(&volume.join("file"), 2)?;
    for (mut page, text) in pages.chunks_mut(PAGE).zip(["first", "second"]) {
        page.write_all(text.as_bytes())?;
    }
    let maps = fs::read_to_string("/proc/self/smaps")?;
    let of_file = maps.lines().skip_while(|line| !line.ends_with("/file"));
    let mut sizes = of_file.filter(|line| line.starts_with("KernelPageSize:"));
    println!("{}", sizes.next().context("it is not mapped")?);
    let refused = map(&volume.join("more"), 32).err().context("too much")?;
    println!("{refused}");
    Ok(())
}

/// A new file of so many pages.
#[allow(unsafe_code, reason = "mmap is what this is about")]
fn map(path: &Path, pages: usize) -> Result<&'static mut [u8]> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(path)?;
    let length = pages * PAGE;
    file.set_len(u64::try_from(length)?)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let size = NonZeroUsize::new(length).context("no pages")?;
    // SAFETY: a new mapping where the kernel likes it replaces nothing.
    let at = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: it is readable, writable and `length` bytes long, is never unmapped, and nobody else has the file.
    Ok(unsafe { slice::from_raw_parts_mut(at.as_ptr().cast(), length) })
}

const READER: &str = "
    head -c 5 /huge/file && echo && tail -c 2097152 /huge/file | head -c 6 && echo
    stat -c '%a %g' /huge /huge/file
    awk '$2 == \"/huge\" { print $3; if ($4 ~ /pagesize=2M/) print \"2M\" }' /proc/mounts";

pub fn volume(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mounted = |name: &str, options: &str| -> Result<(PathBuf, Mounted)> {
        let at = dir.path().join(name);
        fs::create_dir(&at)?;
        let mount = Mounted::new(
            Some("hugetlbfs"),
            Path::new("nodev"),
            at.clone(),
            Some(options),
        )?;
        Ok((at, mount))
    };
    let (huge, _mount) = mounted("huge", "pagesize=2M")?;
    chown(&huge, None, Some(GROUP))?;
    fs::set_permissions(&huge, fs::Permissions::from_mode(0o2770))?;
    // In a VM they are its own.
    let is_vm = suite.runtime == Runtime::Husk;
    let _pages = (!is_vm).then(|| HostPages::allow(32)).transpose()?;

    let cri = suite.cri()?;
    let mut config = cri.pod_config();
    let cgroup = PodCgroup::new(&config.hostname)?;
    for file in ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"] {
        cgroup.set(file, 16 * MIB)?;
    }
    config.linux.get_or_insert_default().cgroup_parent = cgroup.path.clone();
    let pod = cri.run_pod(config)?;
    let mount = |host: &Path, inside: &str| v1::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.into(),
        ..Default::default()
    };

    // A user's, who has the volume by its group.
    let mut writer = Workload::new(suite, dir.path())?.container(&["map-workload", "/huge"]);
    writer.mounts.push(mount(&huge, "/huge"));
    let context = security(&mut writer);
    context.run_as_user = Some(v1::Int64Value { value: 1000 });
    context.supplemental_groups = vec![GROUP.into()];
    let out = pod.start(writer)?.ended()?.ok()?;
    let lines: Vec<_> = out.lines().collect();
    ensure!(
        matches!(lines[..], [size, refused] if size.ends_with(" 2048 kB") && refused.starts_with("ENOMEM")),
        "{out}"
    );

    let mut reader = container(&["sh", "-c", READER]);
    reader.mounts = vec![mount(&huge, "/huge")];
    let wanted = format!("first\nsecond\n2770 {GROUP}\n640 {GROUP}\nhugetlbfs\n2M");
    let out = pod.start(reader)?.ended()?.ok()?;
    ensure!(out == wanted, "{out}");

    if is_vm {
        // Pages that no VM of this size can have.
        let (giant, _mount) = mounted("giant", "pagesize=1G")?;
        let mut config = container(&["true"]);
        config.mounts = vec![mount(&giant, "/giant")];
        let refused = pod.start(config).err();
        let message = refused.map(|e| e.to_string()).unwrap_or_default();
        ensure!(
            message.contains("/giant") && message.contains("1024 MiB"),
            "{message:?}"
        );
    }
    Ok(())
}
