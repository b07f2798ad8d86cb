//! The VMM's user namespace: its user 0 is nobody on the host.
//!
//! Whoever takes a VMM over has its capabilities over files whose owners its user namespace knows. That of a pod knows all ids of the host but
//! root's: user 0 inside is an id that no account has, one a pod, and every other id is itself, so that a file of an image keeps its
//! owner, whatever that is. What root owns on the disk is shown as the pod's user 0, in the mounts of the pod's share and nowhere
//! else ([`crate::idmap`]); on the disk it stays root's.
//!
//! A root file system must be on something that the kernel can map, which the common ones are; a pod whose engine brings it as an overlay of its
//! own ([`VmmUsers::can_show`]) has no such namespace. A volume that is on something else (NFS, FUSE, an
//! overlay; tmpfs before Linux 6.3) is shown as it is: what belongs to root there belongs to nobody in the guest, whose root has the
//! rights of others there.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use nix::{
    sys::utsname::uname,
    unistd::{Gid, Uid, setfsgid, setfsuid},
};
use rustix::thread::{capabilities, set_capabilities};
use tracing::{info, warn};

use crate::engine_mounts::EngineMounts;
use crate::idmap::{self, IdMap, IdMapError, Layers};

/// Above what distributions, directory services and container engines hand out. A process id is added, of which there are 2^22 at most.
const FIRST_ID: u32 = 0xf000_0000;

/// The last id that there is: -1 is none (setreuid(2)).
const LAST_ID: u32 = u32::MAX - 1;

/// From this on the layers of an overlay can be mapped (Documentation/filesystems/overlayfs.rst of Linux 5.19).
const SINCE: (u32, u32) = (5, 19);

/// A pod's.
#[derive(Debug, Clone)]
pub struct VmmUsers {
    id: u32,
    namespace: Arc<OwnedFd>,
}

impl VmmUsers {
    /// For the pod of this process; `None` where the kernel makes no user namespaces, or cannot map what a container's root file system is made
    /// of.
    #[must_use]
    pub fn make() -> Option<Self> {
        let release = uname().ok()?.release().to_string_lossy().into_owned();
        if version(&release).is_none_or(|version| version < SINCE) {
            info!(
                release,
                "the VMM gets no user namespace: this kernel cannot map an overlay's layers"
            );
            return None;
        }
        // Ours while this process lives, and the VMM does not outlive it.
        let id = FIRST_ID | std::process::id();
        let map = map(id);
        let map = IdMap {
            uids: map.clone(),
            gids: map,
        };
        match map.user_namespace() {
            Ok(namespace) => Some(Self {
                id,
                namespace: Arc::new(namespace),
            }),
            Err(error) => {
                warn!(%error, "the VMM gets no user namespace: the kernel makes none (see the sysctl user.max_user_namespaces)");
                None
            }
        }
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Shows a mount that is not attached yet to the VMM as its own user's, with those below it if `below`, where they can be. `what`: for
    /// people.
    ///
    /// # Errors
    /// [`IdMapError`].
    pub fn map(&self, tree: BorrowedFd<'_>, below: bool, what: &Path) -> Result<(), IdMapError> {
        let mapped = idmap::map(tree, below, self.namespace(), what);
        match mapped {
            Err(IdMapError::Unmappable(..)) if below => {
                idmap::map(tree, false, self.namespace(), what)?;
                warn!(mount = %what.display(), "what is mounted below is shown as it is, as not all of it can be mapped: root's files are nobody's to the guest");
                Ok(())
            }
            mapped => mapped,
        }
    }

    /// Whether a root file system that an engine has mounted can be [mapped](Self::map). An overlay cannot, and its layers are in use by the
    /// engine's own mount: Docker copies files by it while the container runs. What else is wrong with it is for the start to say.
    #[must_use]
    pub fn can_show(&self, engine: &EngineMounts, root: &Path) -> bool {
        let mapped = engine
            .copy(root, false)
            .map_err(IdMapError::from)
            .and_then(|tree| idmap::map(tree, false, self.namespace(), root));
        if let Err(IdMapError::Unmappable(_, error)) = &mapped {
            info!(root = %root.display(), %error, "the VMM gets no user namespace: the engine has mounted the root file system, and the kernel cannot show root's files in it as another's");
            return false;
        }
        true
    }

    /// The layers of an overlay, none of which is mapped otherwise.
    #[must_use]
    pub fn layers(&self) -> Layers<'_> {
        Layers {
            lower: self.namespace(),
            upper: Some(self),
        }
    }

    /// Has the calling thread make files as the VMM's user 0 does, with the capabilities that it has.
    ///
    /// # Errors
    /// The capabilities cannot be had back.
    pub fn act_as_root(&self) -> io::Result<()> {
        setfsgid(Gid::from_raw(self.id));
        // Takes the file capabilities out of the effective set (capabilities(7)).
        setfsuid(Uid::from_raw(self.id));
        let mut sets = capabilities(None)?;
        sets.effective = sets.permitted;
        Ok(set_capabilities(None, sets)?)
    }
}

/// As `uid_map` of proc(5) has it: 0 inside is `id` outside, and everybody else is himself.
fn map(id: u32) -> String {
    format!(
        "0 {id} 1\n1 1 {}\n{after} {after} {}\n",
        id - 1,
        LAST_ID - id,
        after = id + 1
    )
}

/// Of a release like `6.12.57+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::chown};

    use super::*;
    use crate::{
        idmap::tests::{on_tmpfs, owner},
        mount::{MountError, MountRequest, apply_here},
    };

    #[test]
    fn everybody_is_himself_but_root_who_is_nobody() {
        let id = FIRST_ID + 7;
        assert_eq!(
            map(id),
            "0 4026531847 1\n1 1 4026531846\n4026531848 4026531848 268435447\n"
        );
        // The last of the third range.
        assert_eq!(u64::from(id) + u64::from(LAST_ID - id), u64::from(LAST_ID));
    }

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(version("6.12.57+deb13-amd64"), Some((6, 12)));
        assert_eq!(version("5.4-rc1"), Some((5, 4)));
        assert_eq!(version("next"), None);
        assert!(version("5.4.0") < Some(SINCE) && version("5.19.1") >= Some(SINCE));
    }

    fn request(kind: &str, source: &Path, options: &[String]) -> MountRequest {
        MountRequest {
            kind: kind.into(),
            source: source.display().to_string(),
            options: options.to_vec(),
            ..MountRequest::default()
        }
    }

    /// As the VMM does something: user 0 of its namespace, with the capabilities of a file server. Who else does it is the host's root.
    fn as_vmm<T: Send>(users: &VmmUsers, act: impl FnOnce() -> T + Send) -> T {
        let act = || {
            users.act_as_root().unwrap();
            act()
        };
        std::thread::scope(|scope| scope.spawn(act).join().unwrap())
    }

    #[test]
    fn the_vmm_owns_what_is_roots_on_the_disk() {
        let users = VmmUsers::make().unwrap();
        let id = users.id;
        on_tmpfs(|dir| {
            let at = |name: &str| dir.join(name);
            for name in [
                "lower",
                "snapshot",
                "snapshot/upper",
                "snapshot/work",
                "shown",
                "volume",
                "seen",
            ] {
                fs::create_dir(at(name)).unwrap();
            }
            fs::write(at("lower/root"), "").unwrap();
            fs::write(at("lower/other"), "").unwrap();
            chown(at("lower/other"), Some(1000), Some(1001)).unwrap();
            let options = [
                format!("lowerdir={}", at("lower").display()),
                format!("upperdir={}", at("snapshot/upper").display()),
                format!("workdir={}", at("snapshot/work").display()),
            ];
            let overlay = request("overlay", Path::new("overlay"), &options);
            let volume = request("bind", &at("volume"), &["rbind".into()]);
            apply_here(&overlay, &at("shown"), Some(&users)).unwrap();
            apply_here(&volume, &at("seen"), Some(&users)).unwrap();
            assert_eq!(owner(&at("shown/root")), (id, id));
            assert_eq!(owner(&at("shown/other")), (1000, 1001));
            // The host's root is nobody there.
            fs::write(at("shown/hosts"), "").unwrap_err();
            fs::write(at("seen/hosts"), "").unwrap_err();
            as_vmm(&users, || {
                fs::write(at("shown/made"), "").unwrap();
                fs::write(at("shown/root"), "changed").unwrap();
                fs::write(at("shown/other"), "changed").unwrap();
                fs::remove_file(at("shown/other")).unwrap();
                fs::create_dir(at("shown/dir")).unwrap();
                chown(at("shown/dir"), Some(77), Some(0)).unwrap_err();
                chown(at("shown/dir"), Some(77), Some(id)).unwrap();
                fs::write(at("seen/made"), "").unwrap();
            });
            for (path, owned) in [
                ("snapshot/upper/made", (0, 0)),
                ("snapshot/upper/root", (0, 0)),
                ("snapshot/upper/dir", (77, 0)),
                ("lower/root", (0, 0)),
                ("volume/made", (0, 0)),
            ] {
                assert_eq!(owner(&at(path)), owned, "{path}");
            }
            assert!(!at("shown/other").exists() && at("lower/other").exists());
        });
    }

    #[test]
    fn an_overlay_that_is_mounted_cannot_be_shown() {
        let users = VmmUsers::make().unwrap();
        on_tmpfs(|dir| {
            for name in ["lower", "upper", "work", "merged"] {
                fs::create_dir(dir.join(name)).unwrap();
            }
            let merged = dir.join("merged");
            let engine = EngineMounts::of_this_thread().unwrap();
            assert!(users.can_show(&engine, &merged));
            let at = |name: &str| format!("{name}dir={}", dir.join(name).display());
            let options = ["lower", "upper", "work"].map(at);
            let overlay = request("overlay", Path::new("overlay"), &options);
            apply_here(&overlay, &merged, None).unwrap();
            assert!(!users.can_show(&engine, &merged));
            assert!(users.can_show(&engine, &dir.join("missing")));
        });
    }

    #[test]
    fn what_cannot_be_mapped_is_told() {
        let users = VmmUsers::make().unwrap();
        on_tmpfs(|dir| {
            let seen = dir.join("seen");
            fs::create_dir(&seen).unwrap();
            let proc = request("bind", Path::new("/proc/self"), &["bind".into()]);
            let error = apply_here(&proc, &seen, Some(&users)).unwrap_err();
            assert!(matches!(error, MountError::Owners { .. }), "{error}");
            assert!(
                error.to_string().contains("user_namespace = false"),
                "{error}"
            );
            // With mounts below that cannot be, it is mapped itself.
            let below = dir.join("volume/proc");
            fs::create_dir_all(&below).unwrap();
            let proc = request("proc", Path::new("proc"), &[]);
            apply_here(&proc, &below, None).unwrap();
            let volume = request("rbind", &dir.join("volume"), &[]);
            apply_here(&volume, &seen, Some(&users)).unwrap();
            assert_eq!(owner(&seen).0, users.id);
            assert_eq!(owner(&seen.join("proc")).0, 0);
            // A file system that is mounted for the container alone.
            let own = request("tmpfs", Path::new("tmpfs"), &["mode=700".into()]);
            let at = dir.join("own");
            fs::create_dir(&at).unwrap();
            apply_here(&own, &at, Some(&users)).unwrap();
            assert_eq!(owner(&at).0, users.id);
        });
    }
}
