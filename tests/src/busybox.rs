//! The root file system that most containers of the tests have.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::Command,
};

use anyhow::Result;

/// Lays the machine's busybox out with all its applets, and with the users root and `user` (1000).
///
/// # Errors
/// There is no busybox, or no room.
pub fn lay_out(to: &Path) -> Result<()> {
    for dir in [
        "bin",
        "dev",
        "etc",
        "proc",
        "sys",
        "root",
        "tmp",
        "var",
        "home/user",
    ] {
        fs::create_dir_all(to.join(dir))?;
    }
    fs::set_permissions(to.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::copy("/bin/busybox", to.join("bin/busybox"))?;
    let applets = Command::new("/bin/busybox").arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout)
        .lines()
        .filter(|a| *a != "busybox")
    {
        symlink("busybox", to.join("bin").join(applet))?;
    }
    fs::write(
        to.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )?;
    fs::write(
        to.join("etc/group"),
        "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n",
    )?;
    Ok(())
}
