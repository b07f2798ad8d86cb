//! A user has used up what the host's quota gives it.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use anyhow::{Result, ensure};
use husk_tests::cri::{container, security, v1};

use super::{disk::Disk, shared};
use crate::context::Context;

/// Whose quota it is, in KiB and files.
const USER: u32 = 1000;
const KIB: u64 = 1024;
const FILES: u64 = 20;

/// Room first, then names; each refusal is said in the words of the errno, and what is removed is given back.
const SCRIPT: &str = "
    cd /shared
    dd if=/dev/zero of=big bs=64k count=64 2>&1 | grep -o 'Disk quota exceeded'
    cat /dev/zero >>big 2>/dev/null
    : >little && echo x 2>&1 >little | grep -o 'Disk quota exceeded'
    test $(stat -c %s big) -le 1048576 && rm big && head -c 500000 /dev/zero >big && stat -c %s big
    for n in $(seq 1 50); do : >file-$n || break; done 2>&1 | grep -o 'Disk quota exceeded'
    mkdir dir 2>&1 | grep -o 'Disk quota exceeded'
    ln -s little link 2>&1 | grep -o 'Disk quota exceeded'
    rm file-*
    mkdir dir && ln -s little link && echo again >little && cat little
    rm -r dir link little big";

/// Quotas count by the host's ids, which the pod's users but root are.
pub fn of_a_user(suite: &Context) -> Result<()> {
    let dir = Path::new("/run/husk-e2e-quota");
    let disk = Disk::with_quotas(dir)?;
    let volume = disk.root().join("volume");
    fs::create_dir(&volume)?;
    fs::set_permissions(&volume, Permissions::from_mode(0o777))?;
    disk.limit(USER, KIB, FILES)?;
    let pod = suite.cri()?.pod()?;
    let start = |user: u32, script: &str| {
        let mut config = container(&["sh", "-c", script]);
        security(&mut config).run_as_user = Some(v1::Int64Value { value: user.into() });
        config.mounts.push(shared(&volume));
        pod.start(config)
    };
    // Another's is another's.
    let other = start(
        1001,
        "head -c 600000 /dev/zero >/shared/other; exec sleep 1000000",
    )?;
    let ended = start(USER, SCRIPT)?.ended()?;
    let exceeded = "Disk quota exceeded\n";
    let wanted = format!("{exceeded}{exceeded}500000\n{exceeded}{exceeded}{exceeded}again");
    ensure!(ended.out == wanted, "{ended:?}");
    other.sh("echo more >>/shared/other")?.ok()?;
    let left = fs::read_dir(&volume)?.count();
    let of = fs::metadata(volume.join("other"))?;
    ensure!(
        (left, of.uid(), of.len()) == (1, USER + 1, 600_005),
        "{left}, {of:?}"
    );
    Ok(())
}
