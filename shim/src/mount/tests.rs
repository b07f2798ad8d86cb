//! Options as engines write them, and targets that lead elsewhere.

use super::{options::propagation, *};

fn request(kind: &str, options: &[&str]) -> MountRequest {
    MountRequest {
        kind: kind.into(),
        source: "/s".into(),
        target: String::new(),
        options: options.iter().map(|&o| o.into()).collect(),
    }
}

#[test]
fn options_are_flags_propagation_or_data() {
    let options = parse(&request(
        "overlay",
        &["ro", "rw", "nodev", "index=off", "rslave", "lowerdir=/a:/b"],
    ))
    .unwrap();
    assert_eq!(options.flags, MsFlags::MS_NODEV);
    assert_eq!(options.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
    assert_eq!(options.data, ["index=off", "lowerdir=/a:/b"]);
    let bind = parse(&request("bind", &["rbind", "ro"])).unwrap();
    assert_eq!(
        bind.flags,
        MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY
    );
    assert!(parse(&request("ext4", &["loop"])).is_err());
}

#[test]
fn relative_and_rprivate_are_not_confused() {
    assert_eq!(propagation("relatime"), None);
    assert_eq!(
        propagation("rprivate"),
        Some(MsFlags::MS_PRIVATE | MsFlags::MS_REC)
    );
    assert_eq!(propagation("private"), Some(MsFlags::MS_PRIVATE));
}

/// Needs root, as husk does: mounts, in a mount namespace of the test's own.
#[test]
fn a_target_is_no_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let (base, outside) = (dir.path().join("base"), dir.path().join("outside"));
    for path in [&base.join("a/b"), &outside.join("b"), &base.join("source")] {
        std::fs::create_dir_all(path).unwrap();
    }
    std::os::unix::fs::symlink(&outside, base.join("link")).unwrap();
    let base = &base;
    let mounted = |target: &str| {
        let request = MountRequest {
            kind: "tmpfs".into(),
            source: "tmpfs".into(),
            target: target.into(),
            options: Vec::new(),
        };
        std::thread::scope(|scope| {
            let apart = || {
                unshare(CloneFlags::CLONE_NEWNS).unwrap();
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
                apply_here(&request, base, None).map_err(|e| e.to_string())?;
                let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
                let last = mounts.lines().last().unwrap().split(' ').nth(4).unwrap();
                Ok(last.to_owned())
            };
            scope.spawn(apart).join().unwrap()
        })
    };
    let at = |path: &str| Ok::<_, String>(base.join(path).to_str().unwrap().to_owned());
    assert_eq!(mounted(""), Ok(base.to_str().unwrap().to_owned()));
    assert_eq!(mounted("/a/./b"), at("a/b"));
    for way_out in ["a/../../outside", "link", "link/b", "a/b/c", ".."] {
        let refused = mounted(way_out).unwrap_err();
        assert!(refused.contains("without links"), "{way_out}: {refused}");
    }
}

#[test]
fn layers_become_relative_to_what_they_share() {
    let data = [
        "index=off".to_owned(),
        "lowerdir=/v/s/1/fs:/v/s/22/fs".to_owned(),
        "upperdir=/v/s/3/fs".to_owned(),
    ];
    let (common, data) = relative_layers(&data);
    assert_eq!(common, Path::new("/v/s"));
    assert_eq!(
        data,
        ["index=off", "lowerdir=1/fs:22/fs", "upperdir=/v/s/3/fs"]
    );
}

#[test]
fn a_missing_source_is_named() {
    let mut request = request("bind", &["rbind"]);
    request.source = "/no/such/dir".into();
    let error = apply_here(&request, Path::new("/tmp"), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/no/such/dir") && error.contains("no such file"),
        "{error}"
    );
}
