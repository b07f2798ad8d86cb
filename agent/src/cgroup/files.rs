//! The files of the cgroup hierarchy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where cgroup v2 is mounted in this mount namespace.
pub(super) fn hierarchy_root() -> io::Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    find_root(&table)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup2 file system is mounted"))
}

fn find_root(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        // id parent major:minor root mount-point options… - type source options
        let (mount, file_system) = line.split_once(" - ")?;
        if file_system.split(' ').next()? != "cgroup2" {
            return None;
        }
        let mut fields = mount.split(' ');
        let root = fields.nth(3)?;
        let mount_point = fields.next()?;
        (root == "/").then(|| PathBuf::from(mount_point))
    })
}

/// Lets children use every controller that this cgroup has. One that cannot be handed down is missed when a
/// limit needs it, and the error says so then.
pub(crate) fn hand_down_controllers(cgroup: &Path) {
    let list = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    let enabled = list("cgroup.subtree_control");
    let missing: Vec<String> = list("cgroup.controllers")
        .split_ascii_whitespace()
        .filter(|name| !enabled.split_ascii_whitespace().any(|other| other == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return;
    }
    let control = cgroup.join("cgroup.subtree_control");
    if fs::write(&control, missing.join(" ")).is_ok() {
        return;
    }
    // All or nothing failed: hand down the ones that can be.
    for name in missing {
        if let Err(error) = fs::write(&control, &name) {
            tracing::warn!("cgroup controller {name} in {}: {error}", cgroup.display());
        }
    }
}

/// A value of a file of `key value` lines; 0 where the key is missing.
pub(super) fn keyed(file: &Path, key: &str) -> io::Result<u64> {
    Ok(fs::read_to_string(file)?
        .lines()
        .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
        .unwrap_or(0))
}

/// A cgroup and all below it, parents first.
pub(super) fn tree(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = vec![path.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        next += 1;
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && next > 1 => continue,
            other => other?,
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// Removes a cgroup and all below it. Gone already is fine.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let all = match tree(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for directory in all.iter().rev() {
        match fs::remove_dir(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The directory of a process's cgroup.
pub(super) fn cgroup_of(pid: i32) -> io::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    Ok(hierarchy_root()?.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found_whole() {
        let table = "30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            31 24 0:27 /sub /mnt rw - cgroup2 cgroup2 rw\n\
            32 24 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            find_root(table).unwrap(),
            Path::new("/sys/fs/cgroup/unified")
        );
        assert!(find_root("nonsense\n").is_none());
    }

    #[test]
    fn keys_are_whole_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "oom 7\noom_kill 3\noom_group_kill 1\n").unwrap();
        assert_eq!(keyed(file.path(), "oom_kill").unwrap(), 3);
        assert_eq!(keyed(file.path(), "oom").unwrap(), 7);
        assert_eq!(keyed(file.path(), "other").unwrap(), 0);
    }

    #[test]
    fn trees_are_listed_parents_first() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/b")).unwrap();
        let all = tree(root.path()).unwrap();
        assert_eq!(all.len(), 3);
        assert_eq!(all[0], root.path());
        remove_tree(&root.path().join("a")).unwrap();
        remove_tree(&root.path().join("a")).unwrap();
        assert_eq!(tree(root.path()).unwrap().len(), 1);
    }
}
