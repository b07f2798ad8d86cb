//! Volumes as the kubelet prepares them on the host, in one container of a user who is not root.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, chown},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use husk_tests::cri::{container, security, v1};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::context::Context;

/// The pod's `fsGroup`.
const GROUP: u32 = 2000;

/// A mount of the host; dropped, it is taken down.
pub struct Mounted(PathBuf);

impl Mounted {
    pub fn new(kind: Option<&str>, source: &Path, at: PathBuf, data: Option<&str>) -> Result<Self> {
        let flags = if kind.is_some() {
            MsFlags::empty()
        } else {
            MsFlags::MS_BIND
        };
        mount(Some(source), &at, kind, flags, data)?;
        Ok(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A test that leaves something behind is caught by the leak checks.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// An emptyDir, as `fsGroup` has it: nobody else's.
fn make_volume(path: &Path) -> Result<()> {
    fs::create_dir(path)?;
    chown(path, None, Some(GROUP))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o2770))?;
    Ok(())
}

const SCRIPT: &str = "
    echo mine >/data/file && mkdir /data/dir && echo deep >/data/dir/file && echo mine >>/data/shared || exit 10
    echo part >/sub/file && cat /etc/app.conf && echo more >>/etc/app.conf || exit 11
    echo the-reason >/dev/termination-log || exit 12
    df -k /memory | awk 'END { print $2 }'
    dd if=/dev/zero of=/memory/fill bs=64k count=64 2>&1 | grep -o 'No space left on device'
    test -S /socket && test -f /etc/app.conf && test -d /sub && echo kinds
    chmod 600 /data/file || echo no chmod: $?
    cat /proc/self/status | grep Seccomp:";

pub fn of_a_user(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let data = at("data");
    make_volume(&data)?;
    fs::write(data.join("shared"), "")?;
    chown(data.join("shared"), None, Some(GROUP))?;
    fs::set_permissions(data.join("shared"), fs::Permissions::from_mode(0o660))?;
    // subPaths: the kubelet binds a directory or a file of the volume to a place of their own.
    fs::create_dir(data.join("part"))?;
    fs::set_permissions(data.join("part"), fs::Permissions::from_mode(0o2777))?;
    fs::write(data.join("app.conf"), "setting\n")?;
    fs::set_permissions(data.join("app.conf"), fs::Permissions::from_mode(0o666))?;
    fs::create_dir(at("0"))?;
    fs::write(at("1"), "")?;
    let _sub_paths = [
        Mounted::new(None, &data.join("part"), at("0"), None)?,
        Mounted::new(None, &data.join("app.conf"), at("1"), None)?,
    ];
    fs::write(at("termination-log"), "")?;
    fs::set_permissions(at("termination-log"), fs::Permissions::from_mode(0o666))?;
    // medium: Memory, sizeLimit: 1Mi.
    fs::create_dir(at("memory"))?;
    let _memory = Mounted::new(
        Some("tmpfs"),
        Path::new("tmpfs"),
        at("memory"),
        Some("size=1048576,mode=0777"),
    )?;
    let _socket = UnixListener::bind(at("socket"))?;
    let profile = at("profile.json");
    let rule = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["chmod", "fchmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }],
    });
    fs::write(&profile, rule.to_string())?;

    let pod = suite.cri()?.pod()?;
    let mut config = container(&["sh", "-c", SCRIPT]);
    let context = security(&mut config);
    context.run_as_user = Some(v1::Int64Value { value: 1000 });
    context.run_as_group = Some(v1::Int64Value { value: 3000 });
    context.supplemental_groups = vec![GROUP.into()];
    context.seccomp = Some(v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::Localhost.into(),
        localhost_ref: profile.to_string_lossy().into_owned(),
    });
    let mount = |host: PathBuf, inside: &str| v1::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.into(),
        ..Default::default()
    };
    config.mounts = vec![
        mount(data.clone(), "/data"),
        mount(at("0"), "/sub"),
        mount(at("1"), "/etc/app.conf"),
        mount(at("termination-log"), "/dev/termination-log"),
        mount(at("memory"), "/memory"),
        mount(at("socket"), "/socket"),
    ];
    let ended = pod.start(config)?.ended()?;
    ensure!(ended.code == 0, "{ended:?}");
    let wanted = "setting\n1024\nNo space left on device\nkinds\nno chmod: 1\nSeccomp:\t2";
    ensure!(ended.out == wanted, "{ended:?}");
    let text = |path: PathBuf| fs::read_to_string(path);
    ensure!(text(at("termination-log"))? == "the-reason\n");
    ensure!(text(data.join("part/file"))? == "part\n");
    ensure!(text(data.join("app.conf"))? == "setting\nmore\n");
    ensure!(text(data.join("shared"))? == "mine\n");
    // The group goes with the directory.
    for made in ["file", "dir", "dir/file"] {
        let of = fs::metadata(data.join(made))?;
        ensure!(
            (of.uid(), of.gid()) == (1000, GROUP),
            "{made}: {}:{}",
            of.uid(),
            of.gid()
        );
    }
    ensure!(fs::metadata(data.join("part/file"))?.uid() == 1000);
    Ok(())
}
