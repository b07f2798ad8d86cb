//! An overlay is writable, or it is not there.
//!
//! Where the kernel cannot prepare an overlay's work directory, on a full disk above all, it mounts the overlay all the same, read-only, and
//! says so in its log alone (ovl_make_workdir of fs/overlayfs/super.c). A container would start and find its root file system read-only.

use std::{fs, io, path::Path};

use nix::{
    mount::{MntFlags, umount2},
    sys::statvfs::{FsFlags, statvfs},
};

/// What is made in the work directory to learn why the kernel could not.
const PROBE: &str = "husk-probe";

/// Checks a fresh overlay that nobody wanted read-only; one that is goes again. `data`: the options that it was mounted with.
///
/// # Errors
/// Why it is read-only.
pub fn ensure_writable(target: &Path, data: &[String]) -> io::Result<()> {
    let Some(work) = data.iter().find_map(|o| o.strip_prefix("workdir=")) else {
        // Without an upper directory it is read-only by nature.
        return Ok(());
    };
    if !statvfs(target)?.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    umount2(target, MntFlags::MNT_DETACH)?;
    let probe = Path::new(work).join(PROBE);
    fs::create_dir(&probe)?;
    fs::remove_dir(&probe)?;
    Err(io::Error::other(format!(
        "the kernel mounts it read-only, its log says why: it cannot use the work directory {work}"
    )))
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::mount::{MountRequest, apply_here};

    /// Needs root, as husk does.
    #[test]
    fn a_full_disk_under_an_overlay_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::create_dir(&disk).unwrap();
        // Room for its root and four directories, but for nothing in the work directory.
        mount(
            Some("tmpfs"),
            &disk,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("nr_inodes=5"),
        )
        .unwrap();
        for name in ["lower", "upper", "work", "target"] {
            fs::create_dir(disk.join(name)).unwrap();
        }
        let (lower, upper, work) = (disk.join("lower"), disk.join("upper"), disk.join("work"));
        let request = MountRequest {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![
                format!("lowerdir={}", lower.display()),
                format!("upperdir={}", upper.display()),
                format!("workdir={}", work.display()),
            ],
        };
        let target = disk.join("target");
        let full = apply_here(&request, &target, None).map_err(|e| e.to_string());
        mount(
            None::<&str>,
            &disk,
            None::<&str>,
            MsFlags::MS_REMOUNT,
            Some("nr_inodes=50"),
        )
        .unwrap();
        let roomy = apply_here(&request, &target, None).map_err(|e| e.to_string());
        // Nothing is on the target but the second one.
        let unmounted = [target.as_path(), &disk].map(|path| umount2(path, MntFlags::empty()));
        assert!(full.unwrap_err().contains("No space left on device"));
        roomy.unwrap();
        assert_eq!(unmounted, [Ok(()), Ok(())]);
    }
}
