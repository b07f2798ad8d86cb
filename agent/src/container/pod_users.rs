//! Makes the namespaces of a pod that has users of its own: see [`crate::users`].

use std::fs::{self, File};
use std::io::{self, Read as _};

use husk_protocol::guest_path;
use nix::mount::{MsFlags, mount};

use super::error::{LaunchError, Step};
use super::sys::{self, Forked};
use crate::net;

/// Makes both, binds them where containers and the agent look for them, and moves the VM's network devices.
pub(super) fn make(uid_map: &str, gid_map: &str) -> Result<(), LaunchError> {
    let (mut reader, writer) = io::pipe().step(|| "making a pipe".to_owned())?;
    let forked = sys::fork_into(libc::CLONE_NEWUSER | libc::CLONE_NEWNET)
        .step(|| "making the pod's user namespace".to_owned())?;
    let Forked::Parent(pid) = forked else {
        // It holds the namespaces until its parent has bound them, or is gone.
        drop(writer);
        let _ = reader.read(&mut [0]);
        std::process::exit(0)
    };
    for (file, map) in [("uid_map", uid_map), ("gid_map", gid_map)] {
        fs::write(format!("/proc/{pid}/{file}"), map)
            .spec_step(|| format!("writing {file} {map:?} of the pod's users"))?;
    }
    net::move_devices(pid).map_err(|error| LaunchError::internal(error.to_string()))?;
    for (namespace, at) in [("user", guest_path::USERS), ("net", guest_path::NETWORK)] {
        let what = || format!("binding the pod's {namespace} namespace to {at}");
        File::create(at).step(what)?;
        let source = format!("/proc/{pid}/ns/{namespace}");
        let none = None::<&str>;
        mount(Some(source.as_str()), at, none, MsFlags::MS_BIND, none).step(what)?;
    }
    // Until here.
    drop(writer);
    Ok(())
}
