//! Files of images and for containers: who its user is, what of the host it sees.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use serde_json::{Value, json};

use crate::root::{DIRECTORY, PLACE, Root, reopen};

/// The most bytes of an image's /etc/passwd or /etc/group that are read.
const MOST: u64 = 4 << 20;

/// Whom a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Whom USER[:GROUP] means in these layers, the topmost first (moby, oci.WithUser; runc, libcontainer/user).
pub(crate) fn identity(layers: &[PathBuf], text: &str) -> Result<Identity> {
    let passwd = read(layers, "etc/passwd")?;
    let group = read(layers, "etc/group")?;
    identity_in(&passwd, &group, text)
}

fn identity_in(passwd: &str, group: &str, text: &str) -> Result<Identity> {
    let (user, wanted_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let rows = |file: &'static str, text: &str| -> Vec<Vec<String>> {
        let row = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
        let least = if file == "passwd" { 6 } else { 4 };
        text.lines()
            .map(row)
            .filter(|row| row.len() >= least)
            .collect()
    };
    let number = |row: &[String], at: usize| row.get(at).and_then(|text| text.parse::<u32>().ok());
    let word = |row: &[String], at: usize| row.get(at).cloned().unwrap_or_default();
    let id: Option<u32> = user.parse().ok();
    let users = rows("passwd", passwd);
    // A name goes before a number.
    let found = users.iter().find(|row| word(row, 0) == user);
    let found = found.or_else(|| {
        users
            .iter()
            .find(|row| id.is_some() && number(row, 2) == id)
    });
    let (uid, own_gid, name, home) = match (found, id) {
        (Some(row), _) => (
            number(row, 2).context("the image's /etc/passwd has a user without a number")?,
            number(row, 3).unwrap_or(0),
            word(row, 0),
            word(row, 5),
        ),
        (None, Some(id)) => (id, 0, String::new(), String::new()),
        (None, None) => bail!("the image has no user {user:?}: its /etc/passwd does not name it"),
    };
    let groups = rows("group", group);
    let (gid, extra) = match wanted_group {
        Some(wanted) => {
            let found = groups.iter().find(|row| word(row, 0) == wanted);
            let gid = found
                .and_then(|row| number(row, 2))
                .or_else(|| wanted.parse().ok());
            let gid = gid.with_context(|| {
                format!("the image has no group {wanted:?}: its /etc/group does not name it")
            })?;
            (gid, Vec::new())
        }
        None => {
            let has = |row: &&Vec<String>| {
                !name.is_empty() && word(row, 3).split(',').any(|member| member == name)
            };
            (
                own_gid,
                groups
                    .iter()
                    .filter(has)
                    .filter_map(|row| number(row, 2))
                    .collect(),
            )
        }
    };
    Ok(Identity {
        uid,
        gid,
        groups: extra,
        home: if home.is_empty() {
            "/".to_owned()
        } else {
            home
        },
    })
}

/// A file of an image as the container sees it; empty where there is none. Links lead where they would in the container, as far as one layer
/// has all of the way.
fn read(layers: &[PathBuf], name: &str) -> Result<String> {
    for layer in layers {
        let root = openat(CWD, layer, DIRECTORY, Mode::empty())
            .with_context(|| format!("opening the layer {}", layer.display()))?;
        // Found first and opened when it is known to be a file: opening a device node acts, as root and on the host's device.
        let found = match Root::container(&root).open(name.as_bytes(), PLACE) {
            Ok(found) => File::from(found),
            Err(Errno::NOENT) => continue,
            // A link that leads nowhere in its layer, or overlayfs' own mark of what was deleted: a device that has no driver.
            Err(_) => return Ok(String::new()),
        };
        if !found.metadata()?.is_file() {
            return Ok(String::new());
        }
        let file = reopen(&found, OFlags::RDONLY)
            .with_context(|| format!("reading {name} in {}", layer.display()))?;
        let mut text = Vec::new();
        file.take(MOST).read_to_end(&mut text)?;
        return Ok(String::from_utf8_lossy(&text).into_owned());
    }
    Ok(String::new())
}

/// What -v says: a mount of the specification. `volumes`: where those are that have a name. What of the host is named and is not there becomes a directory, as docker does it.
pub(crate) fn volume(volumes: &Path, word: &str) -> Result<Value> {
    let bad = || format!("-v {word:?} is not SOURCE:TARGET[:ro]");
    let parts: Vec<&str> = word.split(':').collect();
    let (source, target, options) = match *parts {
        [source, target] => (source, target, ""),
        [source, target, options] => (source, target, options),
        _ => bail!(bad()),
    };
    if !target.starts_with('/') {
        bail!("{}: the target is not absolute", bad());
    }
    let mut all = vec!["rbind", "rprivate"];
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" | "readonly" => all.push("ro"),
            "rw" => all.push("rw"),
            // SELinux's labels: husk sets none.
            "z" | "Z" => {}
            _ => bail!(
                "{}: husk knows the options ro and rw, not {option:?}",
                bad()
            ),
        }
    }
    let path = if source.starts_with('/') {
        PathBuf::from(source)
    } else if source.starts_with('.') || source.starts_with('~') {
        bail!("{}: a directory is named by its absolute path", bad());
    } else {
        let is_sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if source.is_empty()
            || !source.chars().all(is_sound)
            || !source.starts_with(|c: char| c.is_ascii_alphanumeric())
        {
            bail!(
                "{}: a volume's name has letters, digits, \"_\", \".\" and \"-\"",
                bad()
            );
        }
        volumes.join(source)
    };
    match fs::metadata(&path) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        }
        Err(error) => return Err(error).with_context(|| format!("looking at {}", path.display())),
    }
    Ok(json!({"destination": target, "type": "bind", "source": path, "options": all}))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:100:101::/srv:/bin/sh\n7:x:8:9::/seven:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,app\nvideo:x:44:app\n";

    fn who(text: &str) -> (u32, u32, Vec<u32>, String) {
        let who = identity_in(PASSWD, GROUP, text).unwrap();
        (who.uid, who.gid, who.groups, who.home)
    }

    #[test]
    fn users_are_those_of_the_image() {
        assert_eq!(who(""), (0, 0, vec![10], "/root".to_owned()));
        assert_eq!(who("app"), (100, 101, vec![10, 44], "/srv".to_owned()));
        assert_eq!(who("100"), who("app"));
        assert_eq!(who("app:video"), (100, 44, vec![], "/srv".to_owned()));
        assert_eq!(who("1000:5"), (1000, 5, vec![], "/".to_owned()));
        // A name goes before a number.
        assert_eq!(who("7"), (8, 9, vec![], "/seven".to_owned()));
        for text in ["nobody", "app:nobody", "-1"] {
            assert!(identity_in(PASSWD, GROUP, text).is_err(), "{text}");
        }
        assert_eq!(identity_in("", "", "").unwrap().uid, 0);
    }

    #[test]
    fn an_images_links_lead_nowhere_but_into_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let layers = ["upper", "lower"].map(|name| dir.path().join(name));
        for layer in &layers {
            fs::create_dir_all(layer.join("etc")).unwrap();
        }
        fs::write(layers[1].join("etc/passwd"), "lower").unwrap();
        assert_eq!(read(&layers, "etc/passwd").unwrap(), "lower");
        std::os::unix::fs::symlink("/etc/passwd", layers[0].join("etc/passwd")).unwrap();
        // It would be its own; the lower one is hidden by it in the container, and the host's is out of reach.
        assert_ne!(
            read(&layers, "etc/passwd").unwrap(),
            fs::read_to_string("/etc/passwd").unwrap()
        );
        assert_eq!(read(&layers, "etc/group").unwrap(), "");
    }

    /// CVE-2026-47262.
    #[test]
    fn an_endless_file_is_read_in_part() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/group"), GROUP).unwrap();
        let endless = File::options()
            .write(true)
            .open(dir.path().join("etc/group"));
        endless.unwrap().set_len(8 << 30).unwrap();
        let text = read(&[dir.path().to_owned()], "etc/group").unwrap();
        assert_eq!(text.len() as u64, MOST);
        assert_eq!(identity_in(PASSWD, &text, "app").unwrap().groups, [10, 44]);
    }

    /// A pipe that nobody writes to would hold up who opens it; the host's devices are opened by their nodes.
    #[test]
    fn what_is_no_file_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let layers = [dir.path().to_owned()];
        fs::create_dir(dir.path().join("etc")).unwrap();
        let pipe = dir.path().join("etc/passwd");
        rustix::fs::mkfifoat(CWD, &pipe, Mode::RUSR).unwrap();
        let watch = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::NONBLOCK).unwrap();
        let opened = rustix::fs::inotify::WatchFlags::OPEN;
        rustix::fs::inotify::add_watch(&watch, &pipe, opened).unwrap();
        assert_eq!(read(&layers, "etc/passwd").unwrap(), "");
        let mut events = [0; 64];
        let seen = rustix::io::read(&watch, &mut events);
        assert_eq!(seen.unwrap_err(), Errno::AGAIN, "it was opened");
    }

    #[test]
    fn volumes_are_directories_of_the_host_or_have_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().join("new/er");
        let mount = volume(dir.path(), &format!("{}:/t:ro", here.display())).unwrap();
        assert!(here.is_dir());
        assert_eq!(mount["options"], json!(["rbind", "rprivate", "ro"]));
        let mount = volume(dir.path(), "data:/t").unwrap();
        assert_eq!(mount["source"], json!(dir.path().join("data")));
        for word in [
            "x",
            "./x:/t",
            "/x:t",
            "/x:/t:rw:more",
            "/x:/t:exec",
            "../x:/t",
            ":/t",
            "a/b:/t",
        ] {
            assert!(volume(dir.path(), word).is_err(), "{word}");
        }
    }
}
