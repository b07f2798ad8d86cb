//! Users by name, from the container's own /etc/passwd and /etc/group.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt as _;

use super::error::LaunchError;

/// The files come from an image: no sane one is longer.
const MAX_FILE: u64 = 4 << 20;

/// What the files say about a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
    /// Groups that list the user.
    pub(crate) groups: Vec<u32>,
}

/// Looks a user up by name or, where it is all digits, by uid.
pub(crate) fn by_name(name: &str) -> Result<Account, LaunchError> {
    let (passwd, group) = (read("/etc/passwd"), read("/etc/group"));
    find_name(name, &passwd, &group).ok_or_else(|| {
        LaunchError::invalid(format!(
            "unable to find user {name}: no matching entries in passwd file"
        ))
    })
}

/// The home directory of a uid; `/` for one without an entry.
pub(crate) fn home_of(uid: u32) -> String {
    let passwd = read("/etc/passwd");
    entries(&passwd)
        .find(|entry| entry.uid == uid)
        .map(|entry| entry.home.to_owned())
        .filter(|home| !home.is_empty())
        .unwrap_or_else(|| "/".to_owned())
}

fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    // A pipe must not hold the launch up.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    if let Some(file) = file.ok().filter(is_regular) {
        // A file that ends in the middle of something still says what it said before.
        let _ = file.take(MAX_FILE).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file())
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn entries(passwd: &str) -> impl Iterator<Item = Entry<'_>> {
    passwd.lines().filter_map(|line| {
        // name:password:uid:gid:gecos:home:shell
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Entry {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn find_name(name: &str, passwd: &str, group: &str) -> Option<Account> {
    let number = name.parse::<u32>().ok();
    let entry = entries(passwd)
        .find(|entry| entry.name == name)
        .or_else(|| entries(passwd).find(|entry| Some(entry.uid) == number));
    let Some(entry) = entry else {
        return number.map(|uid| Account {
            uid,
            gid: 0,
            home: "/".to_owned(),
            groups: Vec::new(),
        });
    };
    let groups = group
        .lines()
        .filter_map(|line| {
            // name:password:gid:members
            let mut fields = line.split(':');
            let gid = fields.nth(2)?.parse().ok()?;
            let listed = fields.next()?.split(',').any(|member| member == entry.name);
            listed.then_some(gid)
        })
        .collect();
    Some(Account {
        uid: entry.uid,
        gid: entry.gid,
        home: entry.home.to_owned(),
        groups,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nwww:x:33:34::/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nlogs:x:4:adm,www\nweb:x:50:www\n";

    #[test]
    fn names_and_numbers() {
        let www = find_name("www", PASSWD, GROUP).unwrap();
        assert_eq!((www.uid, www.gid, www.home.as_str()), (33, 34, "/var/www"));
        assert_eq!(www.groups, [4, 50]);
        assert_eq!(find_name("33", PASSWD, GROUP).unwrap(), www);
        assert_eq!(find_name("77", PASSWD, GROUP).unwrap().gid, 0);
        assert!(find_name("nobody", PASSWD, GROUP).is_none());
    }

    /// As an image may have them: CVE-2026-47262.
    #[test]
    fn an_endless_file_is_read_in_part_and_what_is_no_file_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(at("group"), GROUP).unwrap();
        let endless = OpenOptions::new().write(true).open(at("group")).unwrap();
        endless.set_len(8 << 30).unwrap();
        let text = read(&at("group"));
        assert_eq!(text.len() as u64, MAX_FILE);
        assert_eq!(find_name("www", PASSWD, &text).unwrap().groups, [4, 50]);
        // Nobody writes to the pipe: to wait for it would be for good.
        nix::unistd::mkfifo(at("pipe").as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in [&at("pipe"), &at("none"), "/dev/zero", "/etc"] {
            assert_eq!(read(name), "");
        }
    }

    proptest! {
        #[test]
        fn any_file_is_read(passwd in ".{0,80}", group in ".{0,80}", name in ".{0,8}") {
            let _ = find_name(&name, &passwd, &group);
        }
    }
}
