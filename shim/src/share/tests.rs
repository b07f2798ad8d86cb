//! What the guest may do in a share, and what of the host's mounts follows there.

use std::os::{fd::IntoRawFd as _, unix::fs::symlink};

use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use super::*;

fn spec(bundle: &Path, json: serde_json::Value) -> BundleSpec {
    BundleSpec::parse(bundle, &serde_json::to_vec(&json).unwrap()).unwrap()
}

#[test]
fn an_id_that_climbs_is_refused() {
    let share = Share::without_mounts("/nowhere".into());
    for id in ["", ".", "..", "a/b"] {
        assert!(share.container_dir(id).is_err(), "{id:?}");
    }
}

#[test]
fn a_bundle_without_rootfs_is_named_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("share")).unwrap();
    let share = Share::without_mounts(dir.path().join("share"));
    let spec = spec(
        dir.path(),
        json!({"ociVersion": "1", "root": {"path": "rootfs"}}),
    );
    let error = share.add("c", &[], &spec).unwrap_err();
    assert!(matches!(error, ShareError::NoRootfs { .. }), "{error}");
    assert!(error.to_string().contains("rootfs"));
    assert!(!dir.path().join("share/c").exists());
}

#[test]
fn data_behind_a_mount_point_is_never_removed() {
    let dir = tempfile::tempdir().unwrap();
    let share = Share::without_mounts(dir.path().to_owned());
    fs::create_dir_all(dir.path().join("c/rootfs")).unwrap();
    fs::write(dir.path().join("c/rootfs/data"), "precious").unwrap();
    share.remove("c");
    assert_eq!(
        fs::read(dir.path().join("c/rootfs/data")).unwrap(),
        b"precious"
    );
}

#[test]
fn a_link_in_the_share_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (root, host) = (dir.path().join("share"), dir.path().join("host"));
    fs::create_dir_all(root.join("c")).unwrap();
    fs::create_dir(&host).unwrap();
    fs::write(host.join("authorized_keys"), "precious").unwrap();
    let share = Share::without_mounts(root.clone());
    symlink(&host, root.join("c/mounts")).unwrap();
    share.remove("c");
    assert!(host.join("authorized_keys").exists());
    assert!(!root.join("c").exists(), "the link itself goes");
    symlink(&host, root.join("c")).unwrap();
    let file = spec(
        dir.path(),
        json!({"ociVersion": "1", "root": {"path": "."},
            "mounts": [{"destination": "/f", "type": "bind", "source": host.join("authorized_keys")}]}),
    );
    share.add("c", &[], &file).unwrap();
    assert!(root.join("c/mounts/0").is_file());
    assert_eq!(fs::read_dir(&host).unwrap().count(), 1);
    share.remove("c");
    assert!(!root.join("c").exists());
}

/// A published share in a mount namespace of its own, on a thread of its own. Needs root, as husk does.
fn published(test: impl FnOnce(&Path, &Share) + Send) {
    let run = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (share, served) = (dir.path().join("share"), dir.path().join("served"));
        fs::create_dir(&share).unwrap();
        fs::create_dir(&served).unwrap();
        publish(&share, &served).unwrap();
        let engine = EngineMounts::of_this_thread().unwrap();
        test(dir.path(), &Share::new(share, served, None, engine));
        cleanup::unmount_below(dir.path()).unwrap();
        cleanup::remove_tree(&dir.path().join("share")).unwrap();
        cleanup::remove_tree(&dir.path().join("served")).unwrap();
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap());
}

fn errno(result: io::Result<()>) -> Option<i32> {
    result.unwrap_err().raw_os_error()
}

#[test]
fn the_guest_writes_to_its_mounts_and_not_to_what_holds_them() {
    published(|dir, share| {
        let bundle = dir.join("bundle");
        let (data, fixed) = (dir.join("data"), dir.join("fixed"));
        for made in [&bundle.join("rootfs"), &data, &fixed, &fixed.join("sub")] {
            fs::create_dir_all(made).unwrap();
        }
        let tmpfs = Some("tmpfs");
        mount(
            tmpfs,
            &fixed.join("sub"),
            tmpfs,
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        fs::write(dir.join("file"), "host").unwrap();
        let bind = |source: &Path, options: &[&str]| json!({"destination": "/x", "type": "bind", "source": source, "options": options});
        let spec = spec(
            &bundle,
            json!({"ociVersion": "1", "root": {"path": "rootfs", "readonly": true}, "mounts": [
                bind(&data, &["rbind", "rw"]),
                bind(&fixed, &["rbind", "ro", "rslave"]),
                bind(&dir.join("file"), &["bind", "ro"]),
                bind(&dir.join("file"), &["bind"]),
            ]}),
        );
        // Opened first, as by a VMM that is started before the container is created.
        let served = PathBuf::from(format!(
            "/proc/self/fd/{}",
            share.open_root().unwrap().into_raw_fd()
        ));
        share.add("c", &[], &spec).unwrap();
        let c = served.join("c");
        fs::write(c.join("rootfs/made"), "by the guest").unwrap();
        fs::write(c.join("mounts/0/made"), "by the guest").unwrap();
        fs::write(c.join("mounts/3"), "by the guest").unwrap();
        assert!(bundle.join("rootfs/made").exists() && data.join("made").exists());
        assert_eq!(fs::read(dir.join("file")).unwrap(), b"by the guest");

        let read_only = Some(libc::EROFS);
        assert_eq!(errno(fs::create_dir(served.join("x"))), read_only);
        assert_eq!(errno(fs::create_dir(c.join("x"))), read_only);
        assert_eq!(errno(fs::create_dir(c.join("mounts/x"))), read_only);
        assert_eq!(errno(fs::write(c.join("mounts/1/x"), "")), read_only);
        assert_eq!(errno(fs::write(c.join("mounts/1/sub/x"), "")), read_only);
        assert_eq!(errno(fs::write(c.join("mounts/2"), "")), read_only);
        fs::write(fixed.join("sub/host"), "may").unwrap();
        // Where the mount point itself is busy or read-only, only that it fails counts.
        fs::rename(c.join("mounts"), c.join("moved")).unwrap_err();
        fs::remove_dir(c.join("rootfs")).unwrap_err();
        // What the host mounts later would come writable.
        fs::create_dir(fixed.join("late")).unwrap();
        mount(
            tmpfs,
            &fixed.join("late"),
            tmpfs,
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        assert_eq!(errno(fs::write(c.join("mounts/1/late/x"), "")), read_only);

        share.remove("c");
        assert!(!served.join("c").exists());
        assert!(data.join("made").exists() && dir.join("file").exists());
        assert_eq!(share.add("c", &[], &spec).unwrap().mounts.len(), 4);
        share.remove("c");
        assert_eq!(fs::read_dir(&share.root).unwrap().count(), 0);
    });
}

/// HostToContainer, and None.
#[test]
fn what_the_host_mounts_later_follows_where_it_is_wanted() {
    published(|dir, share| {
        let (host, data) = (dir.join("host"), dir.join("data"));
        for made in [&dir.join("bundle/rootfs"), &host.join("late"), &data] {
            fs::create_dir_all(made).unwrap();
        }
        let bind = |from: &Path, to: &Path| {
            mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        };
        let change =
            |at: &Path, flags| mount(None::<&str>, at, None::<&str>, flags, None::<&str>).unwrap();
        // A shared mount of the host's, and how the shim's mount namespace has it.
        bind(&host, &host).unwrap();
        change(&host, MsFlags::MS_PRIVATE);
        change(&host, MsFlags::MS_SHARED);
        bind(&host, &data).unwrap();
        change(&data, MsFlags::MS_SLAVE);
        let wanted = |options: &[&str]| json!({"destination": "/x", "type": "bind", "source": &data, "options": options});
        let spec = spec(
            &dir.join("bundle"),
            json!({"ociVersion": "1", "root": {"path": "rootfs"},
                "mounts": [wanted(&["rbind", "rslave", "rw"]), wanted(&["rbind", "rprivate", "rw"])]}),
        );
        share.add("c", &[], &spec).unwrap();
        let tmpfs = Some("tmpfs");
        mount(
            tmpfs,
            &host.join("late"),
            tmpfs,
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        fs::write(host.join("late/file"), "").unwrap();
        let seen = |n: u8| {
            share
                .served
                .join(format!("c/mounts/{n}/late/file"))
                .exists()
        };
        assert_eq!((seen(0), seen(1)), (true, false));
        share.remove("c");
        assert!(host.join("late/file").exists());
    });
}

/// The host's root holds the share itself.
#[test]
fn a_bind_mount_of_everything_does_not_loop() {
    published(|dir, share| {
        fs::create_dir_all(dir.join("bundle/rootfs")).unwrap();
        for options in [["rbind", "rslave"], ["rbind", "ro"]] {
            let spec = spec(
                &dir.join("bundle"),
                json!({"ociVersion": "1", "root": {"path": "rootfs"}, "mounts": [
                    {"destination": "/host", "type": "bind", "source": "/", "options": options},
                ]}),
            );
            share.add("c", &[], &spec).unwrap();
            assert!(share.served.join("c/mounts/0/etc").exists());
            share.remove("c");
            assert_eq!(fs::read_dir(&share.root).unwrap().count(), 0);
        }
    });
}

#[test]
fn a_rootfs_mount_has_its_flags_in_what_is_served() {
    published(|dir, share| {
        fs::create_dir_all(dir.join("layer/sub")).unwrap();
        let request = |source: &str, target: &str, options: &[&str]| MountRequest {
            kind: "bind".into(),
            source: dir.join(source).display().to_string(),
            target: target.into(),
            options: options.iter().map(|&o| o.into()).collect(),
        };
        let spec = spec(dir, json!({"ociVersion": "1", "root": {"path": "rootfs"}}));
        let requests = [
            request("layer", "", &["rbind", "ro", "private"]),
            request("layer/sub", "sub", &["rbind", "rw"]),
        ];
        share.add("c", &requests, &spec).unwrap();
        let rootfs = share.served.join("c/rootfs");
        assert_eq!(errno(fs::write(rootfs.join("x"), "")), Some(libc::EROFS));
        fs::write(rootfs.join("sub/x"), "").unwrap();
        share.remove("c");
    });
}
