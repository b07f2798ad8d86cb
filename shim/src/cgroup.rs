//! The pod's cgroup on the host: where its VMM is accounted, below the limits that the engine has set for the pod.
//!
//! The shim goes along: what a guest makes it do is the pod's. It leaves when the VM has gone, so that whoever has made the cgroup can remove it.
//!
//! The limits of one container are enforced by the guest's kernel; here only the whole counts. The VMM goes into the cgroup
//! that the spec names for the container, so whatever limits its parents carry (a Kubernetes pod's cgroup) bind the VM.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    sync::OnceLock,
};

use rustix::fs::{XattrFlags, getxattr, setxattr};
use tracing::debug;

use crate::spec::HUGE_PAGE_SIZE;

/// Extended attribute of a cgroup that husk made above a pod's own.
const MARK: &str = "user.husk.made";

/// The unified hierarchy.
const ROOT: &str = "/sys/fs/cgroup";

/// Whether the host has the unified hierarchy (cgroup v2).
pub fn is_unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// The pod's place in the unified hierarchy. It may be there already, made by the engine or a person: then it is theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCgroup(PathBuf);

impl PodCgroup {
    /// A systemd triple (`slice:prefix:name`) becomes the scope that systemd would make.
    fn locate(root: &Path, cgroups_path: &Path) -> Option<PathBuf> {
        let text = cgroups_path.to_str()?;
        let below = match text.split(':').collect::<Vec<_>>().as_slice() {
            [slice, prefix, name] => slice_path(slice).join(format!("{prefix}-{name}.scope")),
            _ => cgroups_path.to_owned(),
        };
        let mut path = root.to_owned();
        for component in below.components() {
            match component {
                Component::Normal(name) => path.push(name),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => return None,
            }
        }
        (path != root).then_some(path)
    }

    /// The cgroup that the spec's `cgroupsPath` names; `None` where it names none that can be used.
    pub fn of_spec(cgroups_path: &Path) -> Option<Self> {
        Self::locate(Path::new(ROOT), cgroups_path).map(Self)
    }

    /// Whether somebody has made it.
    pub fn exists(&self) -> bool {
        self.0.exists()
    }

    /// Makes the cgroup and puts the process in. Returns whether it is husk's own, to be removed with the pod.
    ///
    /// # Errors
    /// When the file system refuses; nothing of it stays then.
    pub fn place(&self, pid: u32) -> io::Result<bool> {
        self.place_below(Path::new(ROOT), pid)
    }

    fn place_below(&self, root: &Path, pid: u32) -> io::Result<bool> {
        let is_new = make(root, &self.0)?;
        let entered = fs::write(self.0.join("cgroup.procs"), pid.to_string());
        if entered.is_err() && is_new {
            // Nobody is in it.
            let _ = fs::remove_dir(&self.0);
            remove_parents(&self.0);
        }
        entered.map(|()| is_new)
    }

    /// Puts this process in as well, until [`go_home`].
    ///
    /// # Errors
    /// When it cannot be told where it is now, or the file system refuses.
    pub fn join(&self) -> io::Result<()> {
        let home = match HOME.get() {
            Some(home) => home,
            None => {
                let now = own(&fs::read_to_string("/proc/self/cgroup")?)?;
                HOME.get_or_init(|| now)
            }
        };
        match *home == self.0 {
            true => Ok(()),
            false => fs::write(self.0.join("cgroup.procs"), std::process::id().to_string()),
        }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Bytes of memory that the processes in it may use now: the smallest limit of it and those above it. `None`: no limit.
    pub fn memory_limit(&self) -> Option<u64> {
        self.memory_limit_below(Path::new(ROOT))
    }

    /// Bytes of huge pages of a guest's size that they may use: the kubelet writes there what all of a pod's containers may. `None`: no
    /// limit.
    pub fn huge_pages_limit(&self) -> Option<u64> {
        self.limit_below(Path::new(ROOT), &format!("hugetlb.{HUGE_PAGE_SIZE}.max"))
    }

    fn memory_limit_below(&self, root: &Path) -> Option<u64> {
        self.limit_below(root, "memory.max")
    }

    fn limit_below(&self, root: &Path, file: &str) -> Option<u64> {
        let limits = self.0.ancestors().take_while(|path| *path != root);
        limits
            .filter_map(|path| {
                let text = fs::read_to_string(path.join(file)).ok()?;
                // "max" is no number.
                text.trim().parse().ok()
            })
            .min()
    }
}

/// Where this process was before it joined a pod's cgroup.
static HOME: OnceLock<PathBuf> = OnceLock::new();

/// The cgroup that a process is in, by its `/proc/PID/cgroup` (cgroups(7)).
fn own(text: &str) -> io::Result<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.ok_or_else(|| io::Error::other("it is in no cgroup of v2"))?;
    Ok(Path::new(ROOT).join(path))
}

/// Puts this process back where it was before it [joined](PodCgroup::join) one.
///
/// # Errors
/// When the file system refuses.
pub fn go_home() -> io::Result<()> {
    match HOME.get() {
        Some(home) => fs::write(home.join("cgroup.procs"), std::process::id().to_string()),
        None => Ok(()),
    }
}

/// Makes a cgroup and those above it that are missing; returns whether it was missing itself. Those above are marked: nobody else
/// will remove them.
fn make(root: &Path, path: &Path) -> io::Result<bool> {
    let parent = path
        .parent()
        .filter(|parent| *parent != root && parent.starts_with(root));
    if let Some(parent) = parent
        && !parent.exists()
        && make(root, parent)?
        && let Err(error) = setxattr(parent, MARK, b"1", XattrFlags::empty())
    {
        debug!(%error, cgroup = %parent.display(), "a cgroup that cannot be marked as husk's will stay");
    }
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the cgroups above this one that husk made for it or its like, up to the first that is somebody else's or still in use.
pub fn remove_parents(path: &Path) {
    for parent in path.ancestors().skip(1).take_while(|p| p.starts_with(ROOT)) {
        let mut value = [0; 1];
        let is_ours = getxattr(parent, MARK, &mut value).is_ok();
        // The kernel refuses while a cgroup or a process is in it.
        if !is_ours || fs::remove_dir(parent).is_err() {
            return;
        }
    }
}

/// The directories of a slice: `a-b.slice` lies in `a.slice`.
fn slice_path(slice: &str) -> PathBuf {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::new();
    if name.is_empty() || name == "-" {
        return path;
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_directory_is_made() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b/c");
        assert!(make(root.path(), &path).unwrap());
        assert!(path.is_dir());
        assert!(make(root.path(), &root.path().join("top")).unwrap());
        assert!(root.path().join("top").is_dir());
    }

    #[test]
    fn a_cgroup_that_was_there_is_somebody_elses() {
        let root = tempfile::tempdir().unwrap();
        let theirs = PodCgroup(root.path().join("user/box"));
        assert!(!theirs.exists());
        fs::create_dir_all(theirs.path()).unwrap();
        assert!(theirs.exists());
        assert!(!theirs.place_below(root.path(), 7).unwrap());
        assert_eq!(
            fs::read_to_string(theirs.path().join("cgroup.procs")).unwrap(),
            "7"
        );
        // Nor is it removed when the process does not get in.
        fs::remove_file(theirs.path().join("cgroup.procs")).unwrap();
        fs::create_dir(theirs.path().join("cgroup.procs")).unwrap();
        assert!(theirs.place_below(root.path(), 7).is_err());
        assert!(theirs.exists());
        let ours = PodCgroup(root.path().join("user/own"));
        assert!(ours.place_below(root.path(), 7).unwrap());
    }

    #[test]
    fn the_smallest_memory_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = PodCgroup(root.path().join("kubepods/pod/box"));
        let limit = |path: &str, text: &str| {
            fs::write(root.path().join(path).join("memory.max"), text).unwrap();
            cgroup.memory_limit_below(root.path())
        };
        fs::create_dir_all(cgroup.path()).unwrap();
        assert_eq!(cgroup.memory_limit_below(root.path()), None);
        assert_eq!(limit("kubepods/pod/box", "max\n"), None);
        assert_eq!(limit("kubepods", "8589934592\n"), Some(8 << 30));
        assert_eq!(limit("kubepods/pod", "134217728\n"), Some(128 << 20));
        // Nobody's above the hierarchy.
        assert_eq!(limit(".", "4096\n"), Some(128 << 20));
        // Those on huge pages, which the kubelet writes for the pod.
        let huge = "hugetlb.2MB.max";
        fs::write(cgroup.path().join(huge), "max\n").unwrap();
        assert_eq!(cgroup.limit_below(root.path(), huge), None);
        fs::write(root.path().join("kubepods/pod").join(huge), "0\n").unwrap();
        assert_eq!(cgroup.limit_below(root.path(), huge), Some(0));
    }

    #[test]
    fn paths_of_both_drivers() {
        let locate = |path: &str| {
            PodCgroup::locate(Path::new("/c"), Path::new(path)).map(|p| p.display().to_string())
        };
        assert_eq!(locate("/default/box").as_deref(), Some("/c/default/box"));
        assert_eq!(locate("rel/box").as_deref(), Some("/c/rel/box"));
        assert_eq!(
            locate("kubepods-burstable-pod1.slice:cri-containerd:abc").as_deref(),
            Some(
                "/c/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope"
            )
        );
        assert_eq!(locate("/a/../../etc"), None);
        assert_eq!(locate("/"), None);
    }
}
