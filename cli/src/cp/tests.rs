use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Mode, mknodat, openat};

use super::*;

const ALL: Keep = Keep {
    owner: true,
    privileges: true,
    root: Owners::HOST,
};
const TO_HOST: Keep = Keep {
    owner: false,
    privileges: false,
    root: Owners::HOST,
};

/// A host's directory and a container's root, which is hostile.
struct Both {
    dir: tempfile::TempDir,
    root: OwnedFd,
}

impl Both {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["host", "root/etc", "root/there"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let root = openat(CWD, dir.path().join("root"), DIRECTORY, Mode::empty()).unwrap();
        Self { dir, root }
    }

    fn host(&self, name: &str) -> PathBuf {
        self.dir.path().join("host").join(name)
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.dir.path().join("root").join(name)
    }

    fn put(&self, from: &str, to: &str) -> Result<()> {
        let from = self.host("").join(from).display().to_string();
        let (source, named) = source(&Root::host(), Owners::HOST, from.as_bytes(), false)?;
        let there = There::of(&Root::container(&self.root), &from_root(to.as_bytes()))?;
        copy(&source, &named, there, to.as_bytes(), ALL)
    }

    fn get(&self, from: &str, to: &str, follow: bool) -> Result<()> {
        let to = format!("{}/{to}", self.host("").display());
        let there = There::of(&Root::host(), to.as_bytes())?;
        let (source, named) = source(
            &Root::container(&self.root),
            Owners::HOST,
            from.as_bytes(),
            follow,
        )?;
        copy(&source, &named, there, to.as_bytes(), TO_HOST)
    }
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn ends_are_told_apart_as_docker_does() {
    let of = |word: &'static str| End::of(OsStr::new(word)).map_err(|error| error.to_string());
    let host = |path: &'static str| Ok(End::Host(path.as_bytes()));
    let container = |name, path: &'static str| {
        let path = path.as_bytes();
        Ok(End::Container { name, path })
    };
    assert_eq!(of("-"), Ok(End::Stream));
    assert_eq!(of("file"), host("file"));
    assert_eq!(of("./file:name"), host("./file:name"));
    assert_eq!(of("/a:b"), host("/a:b"));
    assert_eq!(of("web:/etc/x"), container("web", "/etc/x"));
    assert_eq!(of("web:etc:x"), container("web", "etc:x"));
    assert!(of("web:").unwrap_err().contains("no path"));
    assert!(of(":/etc").unwrap_err().contains("no container"));
}

/// Each rule of docs.docker.com, "docker container cp", in its order.
#[test]
fn files_and_directories_go_where_docker_puts_them() {
    let both = Both::new();
    fs::write(both.host("file"), "file").unwrap();
    fs::create_dir_all(both.host("dir/sub")).unwrap();
    fs::write(both.host("dir/sub/deep"), "deep").unwrap();

    both.put("file", "/new").unwrap();
    assert_eq!(text(both.inside("new")), "file");
    let error = format!("{:#}", both.put("file", "/no/").unwrap_err());
    assert!(error.contains("there is no directory /no/"), "{error}");
    fs::write(both.host("other"), "other").unwrap();
    both.put("other", "/new").unwrap();
    assert_eq!(text(both.inside("new")), "other");
    both.put("file", "/there").unwrap();
    both.put("file", "there/").unwrap();
    assert_eq!(text(both.inside("there/file")), "file");

    both.put("dir", "/made").unwrap();
    assert_eq!(text(both.inside("made/sub/deep")), "deep");
    let error = format!("{:#}", both.put("dir", "/new").unwrap_err());
    assert!(
        error.contains("a directory cannot be copied to a file"),
        "{error}"
    );
    both.put("dir/", "/there").unwrap();
    assert_eq!(text(both.inside("there/dir/sub/deep")), "deep");
    both.put("dir/.", "/there").unwrap();
    assert_eq!(text(both.inside("there/sub/deep")), "deep");

    // No parents are made.
    for from in ["file", "dir"] {
        let error = format!("{:#}", both.put(from, "/no/where").unwrap_err());
        assert!(error.contains("there is no directory /no"), "{error}");
    }
    let error = format!("{:#}", both.put("nothing", "/x").unwrap_err());
    assert!(error.contains("nothing"), "{error}");
    assert!(both.put("file/.", "/x").is_err());
    // All of a container's root, into a directory that is there.
    both.get("/", "", false).unwrap();
    assert_eq!(text(both.host("made/sub/deep")), "deep");
}

#[test]
fn what_is_there_is_not_replaced_by_another_kind() {
    let both = Both::new();
    fs::write(both.host("x"), "file").unwrap();
    fs::create_dir_all(both.inside("there/x")).unwrap();
    let error = format!("{:#}", both.put("x", "/there").unwrap_err());
    assert!(error.contains("there is a directory"), "{error}");
    assert_eq!(
        fs::read_dir(both.inside("there")).unwrap().count(),
        1,
        "something is left"
    );
    fs::create_dir_all(both.host("y")).unwrap();
    fs::write(both.inside("there/y"), "file").unwrap();
    let error = format!("{:#}", both.put("y", "/there").unwrap_err());
    assert!(error.contains("no directory"), "{error}");
}

#[test]
fn links_of_a_container_lead_nowhere_but_into_it() {
    let both = Both::new();
    fs::write(both.dir.path().join("secret"), "the host's").unwrap();
    fs::write(both.inside("secret"), "the container's").unwrap();
    let up = "../../../../../../../../..";
    symlink("/", both.inside("slash")).unwrap();
    symlink(both.dir.path(), both.inside("absolute")).unwrap();
    symlink(format!("{up}/secret"), both.inside("there/up")).unwrap();
    symlink("/proc/self/root/etc/passwd", both.inside("magic")).unwrap();

    both.get("/slash/secret", "a", false).unwrap();
    both.get("/there/up", "b", true).unwrap();
    both.get(&format!("{up}/secret"), "c", false).unwrap();
    for name in ["a", "b", "c"] {
        assert_eq!(text(both.host(name)), "the container's", "{name}");
    }
    assert!(both.get("/absolute/secret", "d", false).is_err());
    assert!(both.get("/magic", "d", true).is_err());
    // Unasked, the link itself.
    both.get("/there/up", "link", false).unwrap();
    assert!(
        fs::symlink_metadata(both.host("link"))
            .unwrap()
            .is_symlink()
    );

    fs::write(both.host("new"), "new").unwrap();
    both.put("new", "/slash/etc/new").unwrap();
    assert_eq!(text(both.inside("etc/new")), "new");
    assert!(both.put("new", "/absolute/new").is_err());
    assert!(!both.dir.path().join("new").exists());
    // What a link leads to is what is written to, and it stays a link.
    both.put("new", "/there/up").unwrap();
    assert_eq!(text(both.inside("secret")), "new");
    assert!(
        fs::symlink_metadata(both.inside("there/up"))
            .unwrap()
            .is_symlink()
    );
    assert_eq!(text(both.dir.path().join("secret")), "the host's");
}

#[test]
fn a_link_in_what_was_copied_is_not_walked_through() {
    let both = Both::new();
    fs::create_dir_all(both.inside("there/x")).unwrap();
    fs::write(both.inside("there/x/file"), "new").unwrap();
    // As if the container had told the name twice, first as a link.
    fs::create_dir_all(both.host("to/there")).unwrap();
    fs::create_dir_all(both.host("victim")).unwrap();
    symlink(both.host("victim"), both.host("to/there/x")).unwrap();
    let error = format!("{:#}", both.get("/there", "to", false).unwrap_err());
    assert!(error.contains("no directory"), "{error}");
    assert_eq!(fs::read_dir(both.host("victim")).unwrap().count(), 0);
}

#[test]
fn pipes_and_devices_are_left_out_and_never_opened() {
    let both = Both::new();
    for (name, kind) in [
        ("pipe", FileType::Fifo),
        ("device", FileType::CharacterDevice),
    ] {
        // A reader of the pipe would wait for ever; /dev/full gives zeros for ever.
        let device = rustix::fs::makedev(1, 7);
        mknodat(
            CWD,
            both.inside("there").join(name),
            kind,
            Mode::RUSR,
            device,
        )
        .unwrap();
    }
    fs::write(both.inside("there/file"), "file").unwrap();
    both.get("/there", "", false).unwrap();
    let names = fs::read_dir(both.host("there")).unwrap();
    assert_eq!(
        names
            .map(|entry| entry.unwrap().file_name())
            .collect::<Vec<_>>(),
        ["file"]
    );
    fs::write(both.host("x"), "x").unwrap();
    assert!(both.put("x", "/there/pipe").is_err());
    for name in ["pipe", "device"] {
        let error = both.get(&format!("/there/{name}"), "y", false).unwrap_err();
        assert!(format!("{error:#}").contains("neither"), "{error:#}");
    }
}

#[test]
fn a_directory_that_is_there_keeps_what_it_has() {
    let both = Both::new();
    for name in ["host/dir/sub", "root/there/dir"] {
        let path = both.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o750)).unwrap();
    }
    fs::set_permissions(both.host("dir"), PermissionsExt::from_mode(0o711)).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1000);
    for name in ["host/dir/sub", "host/dir"] {
        let dir = fs::File::open(both.dir.path().join(name)).unwrap();
        dir.set_modified(old).unwrap();
    }
    both.put("dir", "/there").unwrap();
    let found = |name: &str| fs::metadata(both.inside(name)).unwrap();
    assert_eq!(found("there/dir").mode() & 0o7777, 0o750);
    assert_ne!(found("there/dir").modified().unwrap(), old);
    // A new one is as its source.
    assert_eq!(found("there/dir/sub").mode() & 0o7777, 0o750);
    assert_eq!(found("there/dir/sub").modified().unwrap(), old);
}

#[test]
fn a_programs_rights_stay_in_the_container() {
    let both = Both::new();
    fs::write(both.inside("su"), "su").unwrap();
    fs::set_permissions(both.inside("su"), PermissionsExt::from_mode(0o6751)).unwrap();
    rustix::fs::chown(
        both.inside("su"),
        Some(rustix::fs::Uid::from_raw(7)),
        Some(rustix::fs::Gid::from_raw(8)),
    )
    .unwrap();
    both.get("/su", "su", false).unwrap();
    let there = fs::metadata(both.host("su")).unwrap();
    let own = rustix::process::geteuid().as_raw();
    assert_eq!((there.mode() & 0o7777, there.uid()), (0o751, own));
    // The other way all of it goes along.
    fs::set_permissions(both.host("su"), PermissionsExt::from_mode(0o4755)).unwrap();
    both.put("su", "/back").unwrap();
    assert_eq!(
        fs::metadata(both.inside("back")).unwrap().mode() & 0o7777,
        0o4755
    );
    let times = |path| fs::metadata(path).unwrap().modified().unwrap();
    assert_eq!(times(both.host("su")), times(both.inside("back")));
}

#[test]
fn holes_stay_holes() {
    let both = Both::new();
    let file = fs::File::create(both.inside("huge")).unwrap();
    file.set_len(1 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"end", (1 << 40) - 3).unwrap();
    both.get("/huge", "huge", false).unwrap();
    let there = fs::metadata(both.host("huge")).unwrap();
    assert_eq!(there.len(), 1 << 40);
    assert!(there.blocks() < 10_000, "{} blocks", there.blocks());
    let mut end = [0; 3];
    let file = fs::File::open(both.host("huge")).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut end, (1 << 40) - 3).unwrap();
    assert_eq!(&end, b"end");
}

#[test]
fn a_failure_says_what_has_been_copied() {
    let both = Both::new();
    for name in ["a", "b"] {
        fs::create_dir_all(both.host("dir")).unwrap();
        fs::write(both.host("dir").join(name), "12345").unwrap();
    }
    fs::create_dir_all(both.host("dir/z/z")).unwrap();
    fs::create_dir_all(both.inside("there/dir")).unwrap();
    fs::write(both.inside("there/dir/z"), "in the way").unwrap();
    let error = format!("{:#}", both.put("dir", "/there").unwrap_err());
    // The order is the file system's: what came before it counts.
    let is_told = error.contains("files, directories and links of") && error.contains("z");
    assert!(is_told, "{error}");
    let error = format!("{:#}", both.put("dir/z", "/there/dir").unwrap_err());
    assert!(error.contains("nothing has been copied"), "{error}");
}

#[test]
fn a_directory_is_not_copied_into_itself() {
    let both = Both::new();
    fs::write(both.inside("there/file"), "file").unwrap();
    let (source, named) =
        source(&Root::container(&both.root), Owners::HOST, b"/there", false).unwrap();
    let there = There::of(&Root::container(&both.root), b"/there").unwrap();
    let error = copy(&source, &named, there, b"/there", ALL).unwrap_err();
    assert!(format!("{error:#}").contains("into itself"), "{error:#}");
}

#[test]
fn a_stream_goes_out_and_in_again() {
    let both = Both::new();
    fs::create_dir_all(both.inside("there/sub")).unwrap();
    fs::write(both.inside("there/sub/file"), "content").unwrap();
    symlink("sub/file", both.inside("there/link")).unwrap();
    let long = "n".repeat(200);
    fs::write(both.inside("there").join(&long), "long").unwrap();
    let (source, named) =
        source(&Root::container(&both.root), Owners::HOST, b"/there", false).unwrap();
    let mut archive = Vec::new();
    let mut writer = stream::Writer::new(&mut archive);
    source.walk(named.name, &mut writer).unwrap();
    writer.finish().unwrap();

    symlink("/etc", both.inside("elsewhere")).unwrap();
    let mut maker = Maker::below(Root::container(&both.root), b"/elsewhere", ALL);
    stream::read(&*archive, &mut maker).unwrap();
    let there = both.inside("etc/there");
    assert_eq!(text(there.join("sub/file")), "content");
    assert_eq!(text(there.join("link")), "content");
    assert_eq!(text(there.join(&long)), "long");
    assert_eq!(maker.made.bytes, 11);
}

/// An archive with one entry of each of these.
fn archive(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, link) in entries {
        let mut header = tar::Header::new_ustar();
        // As it is: the crate's own setters refuse what a hostile archive has.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_size(0);
        header.set_uid(7);
        header.set_gid(7);
        header.set_mtime(0);
        header.set_cksum();
        builder.append(&header, &b""[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn archives_stay_inside_and_make_what_they_take_for_granted() {
    use tar::EntryType::{Char, Link, Regular, Symlink};
    let both = Both::new();
    let into = |entries: &[(tar::EntryType, &str, &str)]| {
        let keep = Keep {
            owner: false,
            privileges: true,
            root: Owners::HOST,
        };
        let mut maker = Maker::below(Root::container(&both.root), b"/there", keep);
        stream::read(&*archive(entries), &mut maker)
    };
    into(&[
        (Regular, "./a/b/file", ""),
        (Link, "a/same", "a/b/file"),
        (Link, "a/same", "a/b/file"),
        (Symlink, "out", "/"),
        (Regular, "out/through", ""),
        (Regular, ".wh.kept", ""),
        (Char, "device", ""),
    ])
    .unwrap();
    let inode = |name: &str| fs::metadata(both.inside(name)).unwrap().ino();
    assert_eq!(inode("there/a/b/file"), inode("there/a/same"));
    assert_eq!(fs::read_dir(both.inside("there/a")).unwrap().count(), 2);
    assert!(both.inside("through").exists() && both.inside("there/.wh.kept").exists());
    assert!(!both.inside("there/device").exists());
    assert_eq!(fs::metadata(both.inside("through")).unwrap().uid(), 0);
    for bad in [
        (Regular, "../x", ""),
        (Regular, "a/../../x", ""),
        (Link, "x", "../../etc/passwd"),
        (Link, "x", "nothing"),
        (Symlink, "x", ""),
        (Regular, "/", ""),
    ] {
        assert!(into(&[bad]).is_err(), "{bad:?}");
    }
    assert!(
        stream::read(
            &b"no archive, but long enough to be one"[..],
            &mut Maker::new(&both.root, ALL)
        )
        .is_err()
    );
}
