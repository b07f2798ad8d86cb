//! Finding the executable, in the words of Go's exec.LookPath, which runc's users know.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, statat};
use rustix::io::Errno;

use super::error::{LaunchError, OsError};

/// Finds what `name` runs. The process has the container's root, the user's ids and the working directory.
pub(crate) fn find(name: &str, env: &[String]) -> Result<PathBuf, LaunchError> {
    if name.contains('/') {
        return match check(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Unusable::Missing(errno)) => Err(LaunchError::NotFound(format!(
                "exec: {name:?}: stat {name}: {}",
                errno.text()
            ))),
            Err(Unusable::Directory) => Err(LaunchError::PermissionDenied(format!(
                "exec: {name:?}: is a directory"
            ))),
            Err(Unusable::Forbidden(errno)) => Err(LaunchError::PermissionDenied(format!(
                "exec: {name:?}: {}",
                errno.text()
            ))),
        };
    }
    for directory in search_path(env).split(|byte| *byte == b':') {
        let directory = if directory.is_empty() {
            Path::new(".")
        } else {
            Path::new(OsStr::from_bytes(directory))
        };
        let candidate = directory.join(name);
        if !name.is_empty() && check(&candidate).is_ok() {
            if candidate.is_absolute() {
                return Ok(candidate);
            }
            return Err(LaunchError::NotFound(format!(
                "exec: {name:?}: cannot run executable found relative to current directory"
            )));
        }
    }
    Err(LaunchError::NotFound(format!(
        "exec: {name:?}: executable file not found in $PATH"
    )))
}

/// execve's own refusal, after the look-up had found the file.
pub(crate) fn exec_failed(path: &Path, errno: impl OsError) -> LaunchError {
    let message = format!("exec {}: {}", path.display(), errno.text());
    match errno.errno() {
        // The interpreter or the dynamic loader is missing.
        libc::ENOENT => LaunchError::NotFound(message),
        libc::EACCES | libc::EPERM | libc::ENOEXEC | libc::EISDIR => {
            LaunchError::PermissionDenied(message)
        }
        _ => LaunchError::Internal(message),
    }
}

fn search_path(env: &[String]) -> &[u8] {
    // Of a repeated variable the last one counts, as when runc sets them one after another.
    env.iter()
        .rev()
        .find_map(|variable| variable.strip_prefix("PATH="))
        .unwrap_or_default()
        .as_bytes()
}

enum Unusable {
    Missing(Errno),
    Directory,
    Forbidden(Errno),
}

fn check(path: &Path) -> Result<(), Unusable> {
    let stat = statat(CWD, path, AtFlags::empty()).map_err(|errno| match errno {
        Errno::ACCESS => Unusable::Forbidden(errno),
        errno => Unusable::Missing(errno),
    })?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Unusable::Directory);
    }
    match accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        // An old seccomp profile that does not know faccessat2: the mode has to do, as in Go.
        Err(Errno::PERM | Errno::NOSYS) if stat.st_mode & 0o111 != 0 => Ok(()),
        other => other.map_err(Unusable::Forbidden),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_words_of_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for (name, mode) in [("run", 0o755), ("data", 0o644)] {
            fs::write(path(name), "").unwrap();
            fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let env = [format!("PATH=/nowhere:{}", dir.path().display())];
        assert_eq!(find("run", &env).unwrap(), Path::new(&path("run")));
        for missing in ["foo", "data"] {
            assert_eq!(
                find(missing, &env).unwrap_err(),
                LaunchError::NotFound(format!(
                    "exec: \"{missing}\": executable file not found in $PATH"
                ))
            );
        }
        assert_eq!(
            find("/x", &env).unwrap_err().to_string(),
            "exec: \"/x\": stat /x: no such file or directory"
        );
        assert_eq!(
            find(&path("data"), &env).unwrap_err(),
            LaunchError::PermissionDenied(format!("exec: {:?}: permission denied", path("data")))
        );
        assert_eq!(
            find("/etc", &env).unwrap_err().to_string(),
            "exec: \"/etc\": is a directory"
        );
        assert!(find("sh", &[]).is_err());
        assert!(find("", &env).is_err());
    }
}
