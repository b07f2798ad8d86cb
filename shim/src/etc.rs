//! The files below /etc that are a pod's and not an image's: host name, hosts, resolver.
//!
//! CRI makes them for a pod with a pause container and mounts them into each of its containers. For a pod of the Sandbox API it leaves
//! them to the sandbox, so husk makes the same files from the pod's configuration and mounts them the same way.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use crate::{
    pod::{Dns, PodSpec},
    spec::Users,
};

/// The files, by their name in husk's directory and in /etc.
const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// A pod's files on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFiles(PathBuf);

impl PodFiles {
    /// Writes a pod's files into this directory, which is made. What the pod does not say is the host's, as with CRI. They belong to the
    /// pod's root. Blocks.
    ///
    /// # Errors
    /// When the file system refuses, with the path.
    pub fn write(dir: &Path, pod: &PodSpec) -> io::Result<Self> {
        let resolv_conf = match resolv_conf(&pod.dns) {
            text if text.is_empty() => host_file("/etc/resolv.conf")?,
            text => text.into_bytes(),
        };
        let hostname = format!("{}\n", pod.hostname).into_bytes();
        let about = |path: &Path, e: io::Error| {
            io::Error::new(e.kind(), format!("cannot write {}: {e}", path.display()))
        };
        let root = pod.users.as_ref().and_then(Users::root);
        fs::create_dir_all(dir).map_err(|e| about(dir, e))?;
        for (name, text) in NAMES
            .iter()
            .zip([hostname, host_file("/etc/hosts")?, resolv_conf])
        {
            let path = dir.join(name);
            fs::write(&path, text).map_err(|e| about(&path, e))?;
            if let Some((user, group)) = root {
                chown(&path, Some(user), Some(group)).map_err(|e| about(&path, e))?;
            }
        }
        Ok(Self(dir.to_owned()))
    }

    /// Each file: its place in a container, and on the host.
    pub fn mounts(&self) -> impl Iterator<Item = (String, PathBuf)> {
        NAMES
            .iter()
            .map(|name| (format!("/etc/{name}"), self.0.join(name)))
    }
}

/// A file of the host's own; empty where it has none.
fn host_file(path: &str) -> io::Result<Vec<u8>> {
    match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(|e| io::Error::new(e.kind(), format!("cannot read {path}: {e}"))),
    }
}

fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    // Writing to a String does not fail. The order is CRI's.
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_pods_files_say_what_its_configuration_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut pod = PodSpec {
            hostname: "web-0".into(),
            dns: Dns {
                servers: vec!["10.0.0.10".into(), "10.0.0.11".into()],
                searches: vec!["a.local".into(), "local".into()],
                options: vec!["ndots:5".into()],
            },
            ..PodSpec::default()
        };
        let files = PodFiles::write(&dir.path().join("etc"), &pod).unwrap();
        let read = |place: &str| {
            let (_, path) = files.mounts().find(|(to, _)| to == place).unwrap();
            fs::read_to_string(path).unwrap()
        };
        assert_eq!(read("/etc/hostname"), "web-0\n");
        assert_eq!(
            read("/etc/resolv.conf"),
            "search a.local local\nnameserver 10.0.0.10\nnameserver 10.0.0.11\noptions ndots:5\n"
        );
        let host = |path| String::from_utf8(host_file(path).unwrap()).unwrap();
        assert_eq!(read("/etc/hosts"), host("/etc/hosts"));
        pod.dns = Dns::default();
        PodFiles::write(&dir.path().join("etc"), &pod).unwrap();
        assert_eq!(read("/etc/resolv.conf"), host("/etc/resolv.conf"));
    }

    #[test]
    fn they_belong_to_the_pods_root() {
        let dir = tempfile::tempdir().unwrap();
        let own = fs::metadata(dir.path()).unwrap();
        // Another group takes a privileged user, who is there in CI.
        let group = own.gid() + u32::from(own.uid() == 0);
        let pod = PodSpec {
            users: Some(Users {
                uid_map: format!("7 9 1\n0 {} 7\n", own.uid()),
                gid_map: format!("0 {group} 65536\n"),
            }),
            ..PodSpec::default()
        };
        let files = PodFiles::write(dir.path(), &pod).unwrap();
        for (_, path) in files.mounts() {
            let file = fs::metadata(path).unwrap();
            assert_eq!((file.uid(), file.gid()), (own.uid(), group));
        }
    }
}
