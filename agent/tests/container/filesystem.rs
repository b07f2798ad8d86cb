//! The rootfs, its mounts and devices.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::Bundle;

#[tokio::test]
async fn the_root_is_the_images_alone() {
    let bundle = Bundle::sh(
        "ls / | tr '\\n' ' '; echo; grep -c . /proc/self/mountinfo; touch /new && echo writable",
    );
    let output = bundle.run().await;
    let mut lines = output.stdout.lines();
    assert_eq!(lines.next().unwrap(), "bin dev etc proc root run sys tmp ");
    // The root, seven mounts of the spec, ten paths masked or read-only at the most: none of the guest's.
    let mounts: u32 = lines.next().unwrap().parse().unwrap();
    assert!((8..=20).contains(&mounts), "{mounts}");
    assert_eq!(lines.next().unwrap(), "writable");
    assert!(bundle.root().join("new").exists());
}

#[tokio::test]
async fn a_read_only_root() {
    let output = Bundle::sh(
        "touch /new || echo refused; touch /run/x && echo run; touch /dev/shm/x && echo shm",
    )
    .with("/root/readonly", json!(true))
    .run()
    .await;
    assert_eq!(output.stdout, "refused\nrun\nshm\n", "{output:?}");
}

#[tokio::test]
async fn default_devices_and_links() {
    let output = Bundle::sh(
        "for d in null zero full random urandom tty; do stat -c '%n %t:%T %a %F' /dev/$d; done; \
         for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; head -c 3 /dev/zero | wc -c; echo x > /dev/null",
    )
    .run()
    .await;
    assert_eq!(
        output.stdout,
        "/dev/null 1:3 666 character special file\n/dev/zero 1:5 666 character special file\n\
         /dev/full 1:7 666 character special file\n/dev/random 1:8 666 character special file\n\
         /dev/urandom 1:9 666 character special file\n/dev/tty 5:0 666 character special file\n\
         /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n3\n",
        "{output:?}"
    );
}

#[tokio::test]
async fn devices_of_the_spec_and_their_rules() {
    let bundle = Bundle::sh(
        "stat -c '%t:%T %a %u:%g' /dev/extra/kmsg; ( : > /dev/extra/kmsg ) && echo 1; \
         cat /dev/extra/port 2>&1; stat -c %F /dev/pipe; mknod /dev/made c 1 1 && cat /dev/made 2>&1",
    )
    .with(
        "/linux/devices",
        json!([
            {"path": "/dev/extra/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o640, "uid": 3, "gid": 4},
            {"path": "/dev/extra/port", "type": "c", "major": 1, "minor": 4},
            {"path": "/dev/pipe", "type": "p"},
        ]),
    )
    .with(
        "/linux/resources/devices",
        json!([{"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw"}]),
    );
    let output = bundle.run().await;
    let refused = "Operation not permitted";
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[..2], ["1:b 640 3:4", "1"], "{output:?}");
    assert!(
        lines[2].contains(refused) && lines[3] == "fifo" && lines[4].contains(refused),
        "{output:?}"
    );
}

#[tokio::test]
async fn binds_with_options() {
    let bundle = Bundle::sh(
        "cat /data/file /single; touch /data/x || echo ro; cp /bin/busybox /noexec/b; /noexec/b true || echo noexec; \
         touch /data/sub/x || echo sub-ro; touch /plain/sub/x && echo plain-sub; cat /in/the/file",
    );
    let source = bundle.directory.path().join("source");
    fs::create_dir_all(source.join("sub")).unwrap();
    fs::write(source.join("file"), "content\n").unwrap();
    symlink("busybox", bundle.root().join("bin/cp")).unwrap();
    nix::mount::mount(
        Some("tmpfs"),
        &source.join("sub"),
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let output = bundle
        .with_mount(json!({"destination": "/data", "type": "bind", "source": source, "options": ["rbind", "rro"]}))
        .with_mount(json!({"destination": "/plain", "type": "bind", "source": source, "options": ["rbind", "ro", "rprivate"]}))
        .with_mount(json!({"destination": "/noexec", "type": "tmpfs", "source": "x", "options": ["noexec", "size=4m"]}))
        .with_mount(json!({"destination": "/single", "source": source.join("file"), "options": ["bind", "ro"]}))
        .with_mount(json!({"destination": "/in/the/file", "source": source.join("file"), "options": ["bind"]}))
        .run()
        .await;
    nix::mount::umount(&source.join("sub")).unwrap();
    assert_eq!(
        output.stdout, "content\ncontent\nro\nnoexec\nsub-ro\nplain-sub\ncontent\n",
        "{output:?}"
    );
}

/// debugfs mounts tracefs at its `tracing` when that is opened, as a virtio-fs share mounts what the host has there.
#[tokio::test]
async fn what_opening_a_source_mounts_goes_with_the_launch() {
    let bundle = Bundle::sh("ls /automounted | grep -c trace");
    let debug = bundle.directory.path().join("debug");
    fs::create_dir(&debug).unwrap();
    nix::mount::mount(
        Some("debugfs"),
        &debug,
        Some("debugfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let automounts = fs::read_dir(&debug)
        .unwrap()
        .any(|entry| entry.unwrap().file_name() == "tracing");
    let output = bundle
        .with_mount(json!({"destination": "/automounted", "source": debug.join("tracing"), "options": ["rbind"]}))
        .run()
        .await;
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    nix::mount::umount2(&debug, nix::mount::MntFlags::MNT_DETACH).unwrap();
    assert!(automounts, "this kernel has no tracefs");
    assert_ne!(output.stdout, "0\n", "{output:?}");
    let left = format!("{}/tracing", debug.display());
    assert!(!table.contains(&left), "{table}");
}

#[tokio::test]
async fn mount_options_reach_the_kernel() {
    let output = Bundle::sh("grep -E ' /(m|n|o) ' /proc/self/mounts")
        .with_mount(json!({"destination": "/m", "type": "tmpfs", "source": "src",
            "options": ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "mode=700", "size=1m"]}))
        .with_mount(json!({"destination": "/n", "type": "tmpfs", "source": "src", "options": ["strictatime", "sync"]}))
        .with_mount(json!({"destination": "/o", "type": "ramfs", "source": "src", "options": ["relatime", "nosymfollow"]}))
        .run()
        .await;
    let lines: Vec<&str> = output.stdout.lines().collect();
    for option in [
        "ro",
        "nosuid",
        "nodev",
        "noexec",
        "noatime",
        "nodiratime",
        "size=1024k",
        "mode=700",
    ] {
        assert!(
            lines[0].split([' ', ',']).any(|o| o == option),
            "{option}: {lines:?}"
        );
    }
    assert!(
        lines[1].contains("sync") && !lines[1].contains("relatime"),
        "{lines:?}"
    );
    assert!(
        lines[2].contains("relatime") && lines[2].contains("nosymfollow"),
        "{lines:?}"
    );
}

#[tokio::test]
async fn a_remount_changes_the_mount_and_its_file_system() {
    let mount = |options: &[&str]| json!({"destination": "/m", "type": "tmpfs", "source": "src", "options": options});
    let remounted = |options: &'static [&str]| {
        Bundle::sh("grep ' /m ' /proc/self/mounts")
            .with_mount(mount(&["size=1m", "mode=700"]))
            .with_mount(mount(options))
    };
    let output = remounted(&["remount", "nosuid", "size=2m"]).run().await;
    for option in ["size=2048k", "mode=700", "nosuid"] {
        assert!(
            output.stdout.split([' ', ',']).any(|o| o == option),
            "{option}: {output:?}"
        );
    }
    // Of a bind only the mount is remounted.
    let bind = remounted(&["bind", "remount", "size=2m", "ro"]).run().await;
    assert!(bind.stdout.contains("size=1024k"), "{bind:?}");
    assert!(bind.stdout.contains(" ro,"), "{bind:?}");
    let error = remounted(&["remount", "nonsense=1"]).fail().await;
    assert!(error.to_string().contains("nonsense"), "{error}");
}

/// The mount alone being read-only, a disk that is read-only could not be mounted at all.
#[tokio::test]
async fn a_read_only_mount_of_a_disk_is_a_read_only_file_system() {
    let bundle = Bundle::sh("grep ' /disk ' /proc/self/mountinfo");
    let image = bundle.directory.path().join("image");
    fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
    // Its status goes to the reaper of these tests: what it prints tells as much.
    let shell = |script: &str| {
        let child = Command::new("sh")
            .args(["-c", script])
            .arg(&image)
            .stdout(Stdio::piped())
            .spawn();
        let mut printed = String::new();
        let mut stdout = child.unwrap().stdout.unwrap();
        stdout.read_to_string(&mut printed).unwrap();
        printed
    };
    let device = shell(r#"mke2fs -q -t ext4 "$0" && losetup --find --show --read-only "$0""#);
    let device = device.trim();
    if device.is_empty() {
        println!("NOT RUN: no mke2fs, or no loop devices, on this machine");
        return;
    }
    let output = bundle
        .with_mount(
            json!({"destination": "/disk", "type": "ext4", "source": device, "options": ["ro"]}),
        )
        .with(
            "/linux/resources/devices",
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": 7, "access": "r"}]),
        )
        .create()
        .await;
    // Gone with its last mount.
    shell(&format!("losetup --detach {device}"));
    let waiting = output.unwrap();
    let output = waiting.streams.finish(waiting.launched).await.unwrap();
    waiting.container.delete().await.unwrap();
    let (_, file_system) = output.stdout.split_once(" - ").unwrap();
    assert!(
        file_system.trim_end().split([' ', ',']).any(|o| o == "ro"),
        "{output:?}"
    );
}

#[tokio::test]
async fn errors_name_the_mount() {
    let missing = Bundle::sh("true")
        .with_mount(json!({"destination": "/mnt", "source": "/no/such", "options": ["bind"]}))
        .fail()
        .await;
    assert_eq!(
        missing.to_string(),
        "error mounting \"/no/such\" to rootfs at \"/mnt\": stat /no/such: no such file or directory"
    );
    for (mount, words) in [
        (
            json!({"destination": "/mnt", "type": "nofs", "source": "x"}),
            "no file system \"nofs\"",
        ),
        (
            json!({"destination": "/mnt", "type": "tmpfs", "source": "x", "options": ["size=many"]}),
            "size",
        ),
        (
            json!({"destination": "/proc/self", "type": "tmpfs", "source": "x"}),
            "inside /proc",
        ),
        (
            json!({"destination": "/", "type": "tmpfs", "source": "x"}),
            "rootfs itself",
        ),
        (
            json!({"destination": "/mnt", "source": "/etc", "options": ["bind", "idmap"]}),
            "idmap",
        ),
    ] {
        let error = Bundle::sh("true").with_mount(mount).fail().await;
        assert!(error.to_string().contains(words), "{error}");
    }
    let error = Bundle::sh("true")
        .with("/root/path", json!("/no/rootfs"))
        .fail()
        .await;
    assert_eq!(
        error.to_string(),
        "invalid rootfs: stat /no/rootfs: no such file or directory"
    );
}

#[tokio::test]
async fn links_in_the_image_do_not_escape() {
    let bundle = Bundle::sh("cat /evil/x/marker; ls /dangling");
    let outside = bundle.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink("../../outside", bundle.root().join("evil")).unwrap();
    symlink("/target/of/link", bundle.root().join("dangling")).unwrap();
    let source = bundle.directory.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("marker"), "here\n").unwrap();
    let bundle = bundle
        .with_mount(json!({"destination": "/evil/x", "source": source, "options": ["bind"]}))
        .with_mount(json!({"destination": "/dangling", "source": source, "options": ["bind"]}));
    let output = bundle.run().await;
    assert_eq!(output.stdout, "here\nmarker\n", "{output:?}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(bundle.root().join("outside/x").is_dir());
    assert!(bundle.root().join("target/of/link").is_dir());
}

#[tokio::test]
async fn masked_and_read_only_paths() {
    let bundle = Bundle::sh(
        "cat /secret-file | wc -c; ls /secret-dir | wc -l; touch /frozen/x || echo frozen; cat /frozen/kept; \
         echo 1 > /proc/sys/kernel/hostname || echo proc-sys; touch /secret-dir/x || echo masked; wc -c < /linked",
    );
    let root = bundle.root();
    fs::write(root.join("secret-file"), "secret").unwrap();
    for name in ["secret-dir", "frozen"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    fs::write(root.join("secret-dir/s"), "").unwrap();
    fs::write(root.join("frozen/kept"), "kept\n").unwrap();
    symlink("secret-file", root.join("linked")).unwrap();
    let output = bundle
        .with(
            "/linux/maskedPaths",
            json!(["/secret-file", "/secret-dir", "/not/there"]),
        )
        .with(
            "/linux/readonlyPaths",
            json!(["/frozen", "/proc/sys", "/neither"]),
        )
        .run()
        .await;
    assert_eq!(
        output.stdout, "0\n0\nfrozen\nkept\nproc-sys\nmasked\n0\n",
        "{output:?}"
    );
}

#[tokio::test]
async fn what_masks_a_file_is_not_the_containers_to_change() {
    let bundle = Bundle::sh("stat -c %t:%T /secret; echo x > /secret && chmod 666 /secret");
    fs::write(bundle.root().join("secret"), "secret").unwrap();
    let output = bundle
        .with("/linux/maskedPaths", json!(["/secret"]))
        .run()
        .await;
    assert_eq!(output.stdout, "1:3\n", "{output:?}");
    // The mode is what it was either way: had it gone through, it would have been to the machine's own /dev/null.
    assert!(output.stderr.contains("Read-only"), "{output:?}");
}

#[tokio::test]
async fn a_tmpfs_that_copies_up() {
    let bundle =
        Bundle::sh("cat /etc/passwd | head -n 1; stat -c %a /etc /old; echo x > /etc/new; ls /old");
    fs::create_dir(bundle.root().join("old")).unwrap();
    fs::write(bundle.root().join("old/file"), "").unwrap();
    fs::set_permissions(bundle.root().join("old"), fs::Permissions::from_mode(0o751)).unwrap();
    let bundle = bundle
        .with_mount(json!({"destination": "/etc", "type": "tmpfs", "source": "t", "options": ["tmpcopyup"]}))
        .with_mount(json!({"destination": "/old", "type": "tmpfs", "source": "t"}));
    let output = bundle.run().await;
    assert_eq!(
        output.stdout, "root:x:0:0:root:/root:/bin/sh\n755\n751\n",
        "{output:?}"
    );
    assert!(!bundle.root().join("etc/new").exists());
}

#[tokio::test]
async fn dev_may_be_the_callers() {
    let output = Bundle::sh("ls /dev/null && stat -c %F /dev/kmsg")
        .with(
            "/mounts",
            json!([{"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind", "ro"]}]),
        )
        .with("/linux/maskedPaths", json!([]))
        .run()
        .await;
    assert_eq!(
        output.stdout, "/dev/null\ncharacter special file\n",
        "{output:?}"
    );
}

#[tokio::test]
async fn the_cgroup_file_system_shows_the_containers_own() {
    let mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]});
    for shared in [false, true] {
        let mut bundle = Bundle::sh("wc -l < /sys/fs/cgroup/cgroup.procs; mkdir /sys/fs/cgroup/x || echo ro; ls -d /sys/fs/cgroup/containers")
            .with_mount(mount.clone());
        if shared {
            bundle = bundle.without_namespace("cgroup");
        }
        let output = bundle.run().await;
        // The shell and wc.
        assert_eq!(output.stdout, "2\nro\n", "{output:?}");
    }
}

#[tokio::test]
async fn propagation() {
    let bundle =
        Bundle::sh("grep -E '^[0-9]+ [0-9]+ [0-9:]+ [^ ]+ (/|/vol) ' /proc/self/mountinfo");
    let output = bundle
        .with("/linux/rootfsPropagation", json!("shared"))
        .with_mount(
            json!({"destination": "/vol", "source": "/etc", "options": ["rbind", "rprivate"]}),
        )
        .run()
        .await;
    let (volumes, roots): (Vec<&str>, Vec<&str>) = output
        .stdout
        .lines()
        .partition(|line| line.contains(" /vol "));
    assert_eq!(volumes.len(), 1, "{output:?}");
    assert!(
        volumes
            .iter()
            .all(|line| !line.contains("shared:") && !line.contains("master:")),
        "{output:?}"
    );
    assert!(roots.last().unwrap().contains("shared:"), "{output:?}");
}
