//! What conmon would find out by the container's cgroup on the host, if the guest's kernel did not count there.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::symlink, process::parent_id},
    path::{Path, PathBuf},
};

/// The file that says that a container was killed for want of memory, for shim, conmon and engines alike.
const OOM: &str = "oom";

/// Has the shim's word of an OOM kill, a file in its bundle, be where conmon would leave its own for an engine of this bundle. Nothing where
/// the caller is not conmon.
pub(crate) fn lead_word_of_oom(shims_bundle: &Path, engines_bundle: &Path) {
    let Ok(line) = fs::read(format!("/proc/{}/cmdline", parent_id())) else {
        return;
    };
    if let Some(directory) = exit_directory(&line, engines_bundle) {
        // Without, the container works all the same.
        let _ = symlink(directory.join(OOM), shims_bundle.join(OOM));
    }
}

/// Where a conmon of this command line leaves such files: `--persist-dir`, or else its working directory, which is the bundle (conmon,
/// src/oom.c and src/cli.c).
fn exit_directory(line: &[u8], bundle: &Path) -> Option<PathBuf> {
    let mut words = line.split(|&byte| byte == 0).map(OsStr::from_bytes);
    if Path::new(words.next()?).file_name()? != "conmon" {
        return None;
    }
    let directory = words
        .skip_while(|word| *word != "--persist-dir")
        .nth(1)
        .map(Path::new)
        .filter(|path| path.is_absolute());
    Some(directory.unwrap_or(bundle).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conmon_says_where() {
        let bundle = Path::new("/b");
        let of = |line: &str| exit_directory(line.replace(' ', "\0").as_bytes(), bundle);
        let podmans = "/usr/bin/conmon --api-version 1 -c x --persist-dir /run/libpod/persist/x --full-attach";
        assert_eq!(of(podmans), Some("/run/libpod/persist/x".into()));
        assert_eq!(of("conmon -b /b -c x"), Some("/b".into()));
        assert_eq!(of("conmon --persist-dir"), Some("/b".into()));
        assert_eq!(of("conmon --persist-dir here"), Some("/b".into()));
        assert_eq!(of("buildah-oci-runtime"), None);
        assert_eq!(of(""), None);
    }
}
