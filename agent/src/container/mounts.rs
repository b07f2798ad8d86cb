//! The mounts of a spec, through the mount API of file descriptors.
//!
//! A mount is built detached, gets its attributes and propagation there, and is then moved onto a mount
//! point that [`super::paths`] has opened inside the rootfs. So it is never visible half made (a read-only
//! bind is never writable for a moment) and no path is looked up twice. Sources of binds are paths of the guest
//! and are cloned before the container's namespaces exist: inside a user namespace they might be out of reach.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount};
use rustix::fs::{CWD, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    fspick, move_mount, open_tree,
};

use super::copy_up;
use super::error::{LaunchError, OsError, Step};
use super::mount_options::{Bind, MountOptions, attr};
use super::namespaces::Plan;
use super::paths::{Missing, is_directory, resolve};
use super::sys::{MountAttributes, mount_setattr};

/// f_type of procfs.
const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// The files of procfs that a container may mount over; anything else there would let an image fake the kernel.
const PROC_MOUNT_POINTS: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
    "/proc/net/dev",
];

/// A detached copy of an existing tree, ready to be moved into place.
#[derive(Debug)]
pub(crate) struct Source {
    tree: OwnedFd,
    directory: bool,
}

impl Source {
    /// Clones the tree at a path of the guest.
    pub(crate) fn open(path: &Path, bind: Bind) -> Result<Self, Errno> {
        let tree = clone_path(path, bind)?;
        Ok(Self {
            directory: is_directory(&tree)?,
            tree,
        })
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.tree.as_fd()
    }
}

/// Clones the tree at a path of the guest, detached. By its path and not by an O_PATH descriptor: that one would not
/// trigger the mount of a virtio-fs submount.
pub(crate) fn clone_path(path: &Path, bind: Bind) -> Result<OwnedFd, Errno> {
    open_tree(CWD, path, clone_flags(bind))
}

/// Clones the mount at an open path of this mount namespace, detached.
pub(crate) fn clone_tree(at: impl AsFd, bind: Bind) -> Result<OwnedFd, Errno> {
    open_tree(at, "", clone_flags(bind) | OpenTreeFlags::AT_EMPTY_PATH)
}

fn clone_flags(bind: Bind) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match bind {
        Bind::Single => flags,
        Bind::Recursive => flags | OpenTreeFlags::AT_RECURSIVE,
    }
}

/// Moves a detached mount onto an opened mount point.
pub(crate) fn attach(tree: impl AsFd, target: impl AsFd) -> Result<(), Errno> {
    move_mount(
        tree,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// Whether a spec's mount binds an existing tree.
pub(crate) fn bind_kind(mount: &Mount, options: &MountOptions) -> Option<Bind> {
    options
        .bind
        .or_else(|| (mount.typ().as_deref() == Some("bind")).then_some(Bind::Single))
}

/// One mount of the spec with what could be prepared outside the container.
#[derive(Debug)]
pub(crate) struct Prepared<'a> {
    mount: &'a Mount,
    options: MountOptions,
    source: Option<Source>,
}

impl<'a> Prepared<'a> {
    /// Opens what a mount binds, and makes what the container's user namespace may not. `cgroup` is given where the container
    /// shares the guest's cgroup namespace: its view is then a bind of its own cgroup.
    pub(crate) fn open(
        mount: &'a Mount,
        namespaces: &Plan,
        cgroup: Option<&Path>,
    ) -> Result<Self, LaunchError> {
        let options = MountOptions::parse(mount.options().as_deref().unwrap_or_default())?;
        let source = if options.remount {
            None
        } else if let Some(bind) = bind_kind(mount, &options) {
            let path = mount.source().clone().unwrap_or_default();
            let source = Source::open(&path, bind).map_err(|errno| {
                failed(mount, &format!("stat {}: {}", path.display(), errno.text()))
            })?;
            Some(source)
        } else if is_cgroup(mount) {
            cgroup
                .map(|path| Source::open(path, Bind::Recursive))
                .transpose()
                .map_err(|errno| failed(mount, &errno.text()))?
        } else if namespaces.has_user() && shows_the_guests(mount, namespaces) {
            let tree =
                file_system(mount, &options, None).map_err(|reason| failed(mount, &reason))?;
            Some(Source {
                tree,
                directory: true,
            })
        } else {
            None
        };
        Ok(Self {
            mount,
            options,
            source,
        })
    }

    /// Whether this puts an existing tree at `/dev`, so that no device is to be made there.
    pub(crate) fn binds_dev(&self) -> bool {
        self.source.is_some() && clean(self.mount.destination()) == Path::new("/dev")
    }

    /// Mounts it below `root`. A read-only tmpfs is still writable: it comes back as `Some`, to be
    /// finished once devices are in it.
    pub(crate) fn mount(self, root: impl AsFd) -> Result<Option<OwnedFd>, LaunchError> {
        let Self {
            mount,
            options,
            source,
        } = self;
        let destination = clean(mount.destination());
        if destination == Path::new("/") {
            return Err(LaunchError::invalid(
                "a mount's destination is /: that is the rootfs itself",
            ));
        }
        let missing = match &source {
            Some(source) if !source.directory => Missing::MakeFile,
            _ => Missing::MakeDirectory,
        };
        let existed = resolve(&root, &destination, Missing::Fail).is_ok();
        let target = resolve(&root, &destination, missing)
            .map_err(|errno| failed(mount, &format!("create mountpoint: {}", errno.text())))?;
        check_proc(mount, &destination, &target)?;
        if options.remount {
            reconfigure(&options, &target).map_err(|reason| failed(mount, &reason))?;
            return apply(mount, &options, &target, false).map(|()| None);
        }
        let late_read_only = source.is_none()
            && mount.typ().as_deref() == Some("tmpfs")
            && options.attributes.set & attr::RDONLY != 0;
        let is_bind = source.is_some();
        let tree = match source {
            Some(source) => source.tree,
            None => {
                let existing = existed.then_some(&target);
                let tree = file_system(mount, &options, existing)
                    .map_err(|reason| failed(mount, &reason))?;
                if options.copy_up && existed {
                    copy_up::copy(&target, &tree)
                        .map_err(|error| failed(mount, &format!("tmpcopyup: {}", error.text())))?;
                }
                tree
            }
        };
        let mut options = options;
        if late_read_only {
            options.attributes.set &= !attr::RDONLY;
        }
        apply(mount, &options, &tree, is_bind)?;
        attach(&tree, &target).map_err(|errno| failed(mount, &errno.text()))?;
        Ok(late_read_only.then_some(tree))
    }
}

/// Whether a file system shows a namespace that is the guest's own: only who rules that namespace may mount it.
fn shows_the_guests(mount: &Mount, namespaces: &Plan) -> bool {
    let shown = match mount.typ().as_deref() {
        Some("sysfs") => LinuxNamespaceType::Network,
        Some("mqueue") => LinuxNamespaceType::Ipc,
        Some("proc") => LinuxNamespaceType::Pid,
        _ => return false,
    };
    !namespaces.has(shown)
}

fn is_cgroup(mount: &Mount) -> bool {
    matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"))
}

/// The sentence that runc's users know.
fn failed(mount: &Mount, reason: &str) -> LaunchError {
    let source = match (mount.source(), mount.typ()) {
        (Some(source), _) => source.display().to_string(),
        (None, Some(typ)) => typ.clone(),
        (None, None) => String::new(),
    };
    LaunchError::InvalidSpec(format!(
        "error mounting {source:?} to rootfs at {:?}: {reason}",
        mount.destination()
    ))
}

/// Destinations may be relative in old specs, and unclean in any.
fn clean(path: &Path) -> PathBuf {
    Path::new("/")
        .join(path)
        .components()
        .filter(|part| !matches!(part, std::path::Component::CurDir))
        .collect()
}

/// Refuses to hide parts of /proc: programs trust it.
fn check_proc(mount: &Mount, destination: &Path, target: &OwnedFd) -> Result<(), LaunchError> {
    let on_proc = rustix::fs::fstatfs(target).is_ok_and(|fs| fs.f_type == PROC_SUPER_MAGIC);
    let is_proc_again = mount.typ().as_deref() == Some("proc");
    let allowed = PROC_MOUNT_POINTS
        .iter()
        .any(|path| destination == Path::new(path));
    if on_proc && !is_proc_again && !allowed {
        return Err(failed(
            mount,
            "it cannot be mounted because it is inside /proc",
        ));
    }
    Ok(())
}

fn apply(
    mount: &Mount,
    options: &MountOptions,
    tree: &OwnedFd,
    is_bind: bool,
) -> Result<(), LaunchError> {
    if is_bind && options.propagation.is_empty() {
        // As runc has it: what the guest mounts later shows up, what the container mounts stays inside.
        set_propagation(tree, libc::MS_SLAVE, true)
            .map_err(|errno| failed(mount, &errno.text()))?;
    }
    for propagation in &options.propagation {
        set_propagation(tree, propagation.kind, propagation.recursive)
            .map_err(|errno| failed(mount, &errno.text()))?;
    }
    for (change, recursive) in [
        (options.recursive_attributes, true),
        (options.attributes, false),
    ] {
        if change.is_empty() {
            continue;
        }
        let mut change = change.attributes();
        if !recursive {
            // Clearing what is not set is refused on mounts that a user namespace has locked.
            change.clear &= current_attributes(tree) | attr::ATIME_MASK;
        }
        mount_setattr(tree, recursive, &change)
            .map_err(|error| failed(mount, &format!("mount_setattr: {}", error.text())))?;
    }
    Ok(())
}

fn set_propagation(tree: &OwnedFd, kind: u64, recursive: bool) -> std::io::Result<()> {
    mount_setattr(
        tree,
        recursive,
        &MountAttributes {
            propagation: kind,
            ..MountAttributes::default()
        },
    )
}

/// The attributes that a mount has now, as far as statvfs tells.
fn current_attributes(tree: &OwnedFd) -> u64 {
    let Ok(stat) = rustix::fs::fstatvfs(tree) else {
        return u64::MAX;
    };
    [
        (StatVfsMountFlags::RDONLY, attr::RDONLY),
        (StatVfsMountFlags::NOSUID, attr::NOSUID),
        (StatVfsMountFlags::NODEV, attr::NODEV),
        (StatVfsMountFlags::NOEXEC, attr::NOEXEC),
        (StatVfsMountFlags::NODIRATIME, attr::NODIRATIME),
    ]
    .into_iter()
    .filter(|(flag, _)| stat.f_flag.contains(*flag))
    .fold(attr::NOSYMFOLLOW, |bits, (_, bit)| bits | bit)
}

/// Makes a new mount of a file system type, detached.
fn file_system(
    mount: &Mount,
    options: &MountOptions,
    existing: Option<&OwnedFd>,
) -> Result<OwnedFd, String> {
    let cgroup = is_cgroup(mount);
    let typ = match mount.typ().as_deref() {
        _ if cgroup => "cgroup2",
        Some(typ) if !typ.is_empty() => typ,
        _ => return Err("the mount has neither a type nor the bind option".to_owned()),
    };
    let mut data: Vec<(&str, Option<&str>)> = Vec::new();
    if !cgroup {
        data.extend(
            options
                .data
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_deref())),
        );
    }
    // A tmpfs takes over the mode of the directory it covers.
    let mode = existing
        .filter(|_| typ == "tmpfs" && options.data_value("mode").is_none())
        .and_then(|fd| rustix::fs::fstat(fd).ok())
        .map(|stat| format!("{:o}", stat.st_mode & 0o7777));
    if let Some(mode) = &mode {
        data.push(("mode", Some(mode)));
    }
    let source = mount.source().as_deref().and_then(Path::to_str);
    let mut flags = options.superblock.clone();
    let read_only = options.attributes.set | options.recursive_attributes.set;
    // A mount that is read-only does not keep a file system from writing to its disk: a journal is replayed, a disk that is
    // read-only itself refused. Of the others one file system may have many mounts, and some are to be written to.
    if read_only & attr::RDONLY != 0 && is_on_disk(typ, &known_file_systems()) {
        flags.push("ro");
    }
    new_file_system(typ, source, &flags, &data)
}

/// The guest kernel's list: a type a line, after `nodev` where it is not on a disk.
fn known_file_systems() -> String {
    std::fs::read_to_string("/proc/filesystems").unwrap_or_default()
}

fn is_on_disk(typ: &str, file_systems: &str) -> bool {
    file_systems
        .lines()
        .any(|line| line.strip_prefix('\t') == Some(typ))
}

/// Gives the file system at `target` the options of a remount that are not the mount's alone. (A remount of a bind is: the
/// kernel, too, ignores the rest then.)
fn reconfigure(options: &MountOptions, target: &OwnedFd) -> Result<(), String> {
    let nothing = options.superblock.is_empty() && options.data.is_empty();
    if nothing || options.bind.is_some() {
        return Ok(());
    }
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let fs = fspick(target, "", flags).map_err(|errno| errno.text())?;
    let data: Vec<_> = options
        .data
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_deref()))
        .collect();
    in_kernels_words(&fs, || {
        configure(&fs, &options.superblock, &data)?;
        fsconfig_reconfigure(&fs).map_err(|errno| (errno, "remount".to_owned()))
    })
}

/// Makes a new file system and a detached mount of it, or says why not in the kernel's own words.
pub(crate) fn new_file_system(
    typ: &str,
    source: Option<&str>,
    flags: &[&str],
    data: &[(&str, Option<&str>)],
) -> Result<OwnedFd, String> {
    let fs = fsopen(typ, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| match errno {
        Errno::NODEV => format!("the guest's kernel has no file system {typ:?}"),
        errno => errno.text(),
    })?;
    in_kernels_words(&fs, || {
        let named = |what: &str, errno| (errno, what.to_owned());
        if let Some(source) = source.filter(|source| !source.is_empty()) {
            fsconfig_set_string(&fs, "source", source).map_err(|e| named("source", e))?;
        }
        configure(&fs, flags, data)?;
        fsconfig_create(&fs).map_err(|e| named("mount", e))?;
        fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
            .map_err(|e| named("mount", e))
    })
}

/// Sets flags and options of a file system context. The error names the one that it does not take.
fn configure(
    fs: &OwnedFd,
    flags: &[&str],
    data: &[(&str, Option<&str>)],
) -> Result<(), (Errno, String)> {
    let flags = flags.iter().map(|flag| (*flag, None));
    for (key, value) in flags.chain(data.iter().copied()) {
        match value {
            Some(value) => fsconfig_set_string(fs, key, value),
            None => fsconfig_set_flag(fs, key),
        }
        .map_err(|errno| (errno, key.to_owned()))?;
    }
    Ok(())
}

/// Does something with a file system context, and adds to its error what the kernel says about it.
fn in_kernels_words<T>(
    fs: &OwnedFd,
    work: impl FnOnce() -> Result<T, (Errno, String)>,
) -> Result<T, String> {
    work().map_err(|(errno, what)| {
        let said = kernel_log(fs);
        if said.is_empty() {
            format!("{what}: {}", errno.text())
        } else {
            format!("{what}: {}: {said}", errno.text())
        }
    })
}

/// What the kernel has written into a file system context: one message a read.
fn kernel_log(fs: &OwnedFd) -> String {
    let Ok(copy) = fs.try_clone() else {
        return String::new();
    };
    let mut file = File::from(copy);
    let mut lines: Vec<String> = Vec::new();
    let mut line = [0; 512];
    while let Ok(length) = file.read(&mut line) {
        let text = line.get(..length).unwrap_or_default();
        // "e tmpfs: Bad value for 'size'": the letter is the level.
        let text = String::from_utf8_lossy(text.get(2..).unwrap_or_default());
        lines.push(text.trim().to_owned());
        if length == 0 || lines.len() == 8 {
            break;
        }
    }
    lines.join("; ")
}

/// Makes a mount read-only.
pub(crate) fn make_read_only(mount: impl AsFd) -> Result<(), LaunchError> {
    let attributes = MountAttributes {
        set: attr::RDONLY,
        ..MountAttributes::default()
    };
    mount_setattr(mount, false, &attributes).step(|| "making a mount read-only".to_owned())
}

/// Spreads mounts of the whole tree at `/` by `kind` (MS_SLAVE and so on).
pub(crate) fn set_root_propagation(kind: u64, recursive: bool) -> Result<(), LaunchError> {
    let root = rustix::fs::openat(
        CWD,
        "/",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .step(|| "opening /".to_owned())?;
    set_propagation(&root, kind, recursive)
        .step(|| "setting the propagation of the rootfs".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_a_disk() {
        let list = "nodev\tsysfs\nnodev\ttmpfs\n\text4\n\tsquashfs\nnodev\toverlay\n\tfuseblk\nnodev\tfuse\n";
        for typ in ["ext4", "squashfs", "fuseblk"] {
            assert!(is_on_disk(typ, list), "{typ}");
        }
        for typ in ["sysfs", "tmpfs", "overlay", "fuse", "xfs", "", "ext"] {
            assert!(!is_on_disk(typ, list), "{typ}");
        }
    }
}
