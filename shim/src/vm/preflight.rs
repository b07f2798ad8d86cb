//! What can be known to fail before a VM is tried, said in words that help.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
    path::Path,
};

use super::VmError;

/// Memory that the host keeps for itself and for this pod's shim and VMM, in MiB.
const HOST_RESERVE_MIB: u64 = 32;

/// Opens `/dev/kvm` after checking that it can run a guest at all.
///
/// # Errors
/// [`VmError::NoKvm`], [`VmError::KvmDenied`], [`VmError::KvmPvm`].
pub fn open_kvm() -> Result<OwnedFd, VmError> {
    open_kvm_at(Path::new("/dev/kvm"), Path::new("/sys/module"))
}

fn open_kvm_at(device: &Path, modules: &Path) -> Result<OwnedFd, VmError> {
    let kvm = OpenOptions::new().read(true).write(true).open(device);
    let kvm = match kvm {
        Ok(kvm) => kvm,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => return Err(VmError::NoKvm),
        // ENXIO and ENODEV: the node is there and no module behind it.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
            return Err(VmError::NoKvm);
        }
        Err(e) => return Err(VmError::KvmDenied(e)),
    };
    let loaded = |name: &str| modules.join(name).exists();
    if loaded("kvm_pvm") && !loaded("kvm_amd") && !loaded("kvm_intel") {
        return Err(VmError::KvmPvm);
    }
    Ok(kvm.into())
}

/// Opens one of husk's files.
///
/// # Errors
/// [`VmError::File`] naming the path and the configuration key.
pub fn open_file(what: &'static str, key: &'static str, path: &Path) -> Result<OwnedFd, VmError> {
    let error = |source| VmError::File {
        what,
        path: path.to_owned(),
        key,
        source,
    };
    let file = File::open(path).map_err(error)?;
    let is_file = file.metadata().map_err(error)?.is_file();
    if !is_file {
        return Err(error(io::Error::other("not a regular file")));
    }
    Ok(file.into())
}

/// Is there room for a VM of this size? Its memory is only taken page by page, but a guest that is promised more than there is
/// meets the host's OOM killer later, without a word.
///
/// # Errors
/// [`VmError::HostMemory`].
pub fn check_memory(wanted_mib: u64) -> Result<(), VmError> {
    match std::fs::read_to_string("/proc/meminfo") {
        Ok(meminfo) => check_memory_in(&meminfo, wanted_mib),
        Err(_) => Ok(()),
    }
}

fn check_memory_in(meminfo: &str, wanted_mib: u64) -> Result<(), VmError> {
    let available_kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok());
    match available_kib.map(|kib| kib / 1024) {
        Some(available_mib) if available_mib < wanted_mib.saturating_add(HOST_RESERVE_MIB) => {
            Err(VmError::HostMemory {
                wanted_mib,
                available_mib,
            })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_kvm_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let (device, modules) = (dir.path().join("kvm"), dir.path().join("module"));
        let open = || open_kvm_at(&device, &modules);
        assert!(matches!(open(), Err(VmError::NoKvm)));
        std::fs::write(&device, "").unwrap();
        std::fs::create_dir_all(modules.join("kvm_pvm")).unwrap();
        assert!(matches!(open(), Err(VmError::KvmPvm)));
        std::fs::create_dir_all(modules.join("kvm_amd")).unwrap();
        assert!(open().is_ok());
        std::fs::remove_file(&device).unwrap();
        std::fs::create_dir(&device).unwrap();
        assert!(matches!(open(), Err(VmError::KvmDenied(_))));
    }

    #[test]
    fn a_missing_file_names_path_and_key() {
        let error = open_file("guest kernel", "kernel", Path::new("/no/vmlinux"))
            .unwrap_err()
            .to_string();
        for part in ["guest kernel", "/no/vmlinux", "`kernel`", "make install"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(open_file("guest kernel", "kernel", Path::new("/")).is_err());
    }

    #[test]
    fn memory_is_compared_with_what_is_available() {
        let meminfo = "MemTotal: 2048000 kB\nMemAvailable:    524288 kB\n";
        assert!(check_memory_in(meminfo, 256).is_ok());
        let error = check_memory_in(meminfo, 512).unwrap_err().to_string();
        assert!(error.contains("512 MiB"), "{error}");
        assert!(check_memory_in("nothing known", u64::MAX).is_ok());
    }
}
