//! Brings vCPUs online that the guest did not boot with.
//!
//! The VM has all the vCPUs that it may ever use, and the kernel boots with some of them (`maxcpus=`). The others wait in sysfs
//! (Documentation/core-api/cpu_hotplug.rst) until the pod needs them.

use std::fs;
use std::io;
use std::path::Path;

use crate::cgroup::cpu_list;

/// Where the kernel lists its CPUs.
pub const SYSFS: &str = "/sys/devices/system/cpu";

/// Brings CPUs online, lowest first, until `wanted` are; never takes one away. Returns how many are online: fewer than wanted where
/// there are no more.
///
/// # Errors
/// The list of CPUs cannot be read, or one that is there does not come online; those before it have.
pub fn bring_online(sysfs: &Path, wanted: u32) -> io::Result<u32> {
    let list = |name: &str| {
        let text = fs::read_to_string(sysfs.join(name))?;
        cpu_list::parse(&text).ok_or_else(|| {
            io::Error::other(format!("{name} is {text:?}, which is no list of CPUs"))
        })
    };
    let (present, online) = (list("present")?, list("online")?);
    let mut count = u32::try_from(online.len()).unwrap_or(u32::MAX);
    for cpu in present.difference(&online) {
        if count >= wanted {
            break;
        }
        fs::write(sysfs.join(format!("cpu{cpu}/online")), "1")?;
        count += 1;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs of a guest with CPUs 0 to 5 that booted with 0 and 1; 3 is online since.
    fn sysfs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("present"), "0-5\n").unwrap();
        fs::write(dir.path().join("online"), "0-1,3\n").unwrap();
        for cpu in 0..6 {
            let cpu_dir = dir.path().join(format!("cpu{cpu}"));
            fs::create_dir(&cpu_dir).unwrap();
            // The first one cannot be taken offline: it has no such file.
            if cpu > 0 {
                let online = if matches!(cpu, 1 | 3) { "1" } else { "0" };
                fs::write(cpu_dir.join("online"), online).unwrap();
            }
        }
        dir
    }

    fn online(dir: &Path) -> Vec<u32> {
        (1..6)
            .filter(|cpu| fs::read_to_string(dir.join(format!("cpu{cpu}/online"))).unwrap() == "1")
            .collect()
    }

    #[test]
    fn as_many_as_are_wanted_come_online() {
        for (wanted, count, others) in [
            (0, 3, vec![1, 3]),
            (3, 3, vec![1, 3]),
            (4, 4, vec![1, 2, 3]),
            (5, 5, vec![1, 2, 3, 4]),
            (u32::MAX, 6, vec![1, 2, 3, 4, 5]),
        ] {
            let dir = sysfs();
            assert_eq!(bring_online(dir.path(), wanted).unwrap(), count);
            assert_eq!(online(dir.path()), others);
        }
    }

    #[test]
    fn one_that_does_not_come_online_is_an_error() {
        let dir = sysfs();
        let file = dir.path().join("cpu4/online");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert!(bring_online(dir.path(), 6).is_err());
        fs::remove_dir(&file).unwrap();
        fs::write(&file, "0").unwrap();
        assert_eq!(online(dir.path()), [1, 2, 3]);
    }

    #[test]
    fn a_list_that_is_none_is_an_error() {
        let dir = sysfs();
        fs::write(dir.path().join("present"), "many\n").unwrap();
        let error = bring_online(dir.path(), 6).unwrap_err().to_string();
        assert!(
            error.contains("present") && error.contains("many"),
            "{error}"
        );
    }
}
