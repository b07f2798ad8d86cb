//! `husk` and images for who is not root: the program, as user 65534.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

#[path = "../../image/tests/common/mod.rs"]
mod common;
#[path = "../../image/tests/common/images.rs"]
mod images;
#[path = "../../image/tests/common/mounted.rs"]
mod mounted;
#[path = "../../image/tests/common/registry.rs"]
mod registry;

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use common::{listing, run, same, tree};
use husk_image::{layer::Limits, manifest::Platform, store::Store};
use images::{layer, publish};
use mounted::Mounted;
use registry::Registry;
use rustix::fs::{XattrFlags, lsetxattr};

/// Who owns nothing.
const NOBODY: u32 = 65534;

/// A user's home, a registry with an image, its layout, and the program where the user finds it.
struct Ground {
    registry: Registry,
    dir: tempfile::TempDir,
}

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new();
        let ground = Self { registry, dir };
        fs::set_permissions(ground.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // The directory that it was built in may be closed to others.
        fs::copy(env!("CARGO_BIN_EXE_husk"), ground.path("husk")).unwrap();
        fs::create_dir(ground.path("home")).unwrap();
        chown(ground.path("home"), Some(NOBODY), Some(NOBODY)).unwrap();
        let layout = ground.path("layout");
        image(&Store::open(&layout).unwrap(), &ground.path("trees"));
        ground.registry.push(&layout, "one", "one:1", &[]);
        ground
    }

    fn one(&self) -> String {
        format!("{}/one:1", self.registry.host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command as the user, without any right.
    fn user(&self, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .args(["--bounding-set", "-all", "--inh-caps", "-all"])
            .arg(program)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("XDG_DATA_HOME", self.path("home/data"))
            .current_dir("/");
        command
    }

    fn husk(&self, args: &[&str]) -> Command {
        let mut husk = self.user(&self.path("husk"));
        husk.args(args);
        husk
    }

    /// The image's layers in the user's store, the topmost first.
    fn layers(&self) -> Vec<PathBuf> {
        let store = Store::open(&self.path("home/data/husk/images")).unwrap();
        let image = store
            .image(&self.one(), &Platform::here())
            .unwrap()
            .unwrap();
        store.unpack(&image.layers, Limits::default()).unwrap()
    }
}

/// Two layers with all that root alone may do, and with directories that are closed to their owner.
fn image(store: &Store, dir: &Path) {
    let (lower, upper) = (dir.join("lower"), dir.join("upper"));
    let mode = |root: &Path, name: &str, mode| {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    for (root, names) in [
        (
            &lower,
            &["closed/in/file", "readonly/gone", "readonly/file"][..],
        ),
        (&upper, &["closed/new", "readonly/.wh.gone", "readonly/new"]),
    ] {
        for name in names {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), name).unwrap();
        }
    }
    tree(&lower);
    chown(lower.join("closed/in"), Some(5), Some(0)).unwrap();
    chown(lower.join("readonly/file"), Some(0), Some(42)).unwrap();
    // A pipe's owner has no place.
    chown(lower.join("fifo"), Some(5), Some(6)).unwrap();
    lsetxattr(lower.join("readonly"), "user.k", b"v", XattrFlags::empty()).unwrap();
    for root in [&lower, &upper] {
        mode(root, "closed", 0o0);
        mode(root, "readonly", 0o555);
        mode(root, ".", 0o555);
    }
    // What its owner may not read and write, umoci loses the attributes of, or does not unpack at all.
    mode(&lower, "closed/in", 0o600);
    publish(store, "one", &[layer(&lower), layer(&upper)]);
}

fn error(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    said
}

fn text(command: &mut Command) -> String {
    String::from_utf8(run(command)).unwrap()
}

#[test]
fn an_image_is_the_tree_that_umoci_makes_of_it_without_root() {
    let ground = Ground::new();
    let pulled = ground
        .husk(&["--debug", "pull", "-q", &ground.one()])
        .output()
        .unwrap();
    let said = String::from_utf8(pulled.stderr).unwrap();
    assert!(pulled.status.success(), "{said}");
    for (what, of) in [
        ("\"security.capability\"", "\"empty\""),
        ("owner", "\"fifo\""),
        ("device 1:3", "\"null\""),
    ] {
        let told =
            |line: &str| line.contains("left out") && line.contains(what) && line.contains(of);
        assert!(said.lines().any(told), "{what} {of}: {said}");
    }
    let mut umoci = ground.user(Path::new("umoci"));
    umoci.args(["unpack", "--rootless", "--image"]);
    umoci.arg(format!("{}:one", ground.path("layout").display()));
    run(umoci.arg(ground.path("home/umoci")));
    // Whom the files are, the kernel does not mind: so that root can look at what the user has.
    let mounted = Mounted::new(&ground.layers(), ground.path("merged"), "ro,userxattr");
    let theirs = listing(&ground.path("home/umoci/rootfs"));
    same(&listing(mounted.path()), &theirs);
    let about = |name: &str| &theirs[Path::new(name)];
    assert!(about("closed").starts_with("40000 65534:65534"));
    assert!(about("file").contains("user.rootlesscontainers"));
}

#[test]
fn what_was_unpacked_without_root_goes_again() {
    let ground = Ground::new();
    run(&mut ground.husk(&["pull", "-q", &ground.one()]));
    let images = ground.path("home/data/husk/images");
    let mode = fs::metadata(&images).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    // Half of one, of somebody who was cut off when its directories were closed already.
    for layer in ground.layers() {
        fs::rename(&layer, layer.with_extension("new")).unwrap();
        fs::set_permissions(layer.with_extension("new"), fs::Permissions::from_mode(0o0)).unwrap();
    }
    run(&mut ground.husk(&["pull", "-q", &ground.one()]));
    let archive = ground.path("home/one.tar").display().to_string();
    run(&mut ground.husk(&["save", "-o", &archive, &ground.one()]));
    run(&mut ground.husk(&["rmi", &ground.one()]));
    for dir in ["blobs/sha256", "layers", "ingest"] {
        assert_eq!(fs::read_dir(images.join(dir)).unwrap().count(), 0, "{dir}");
    }
    let said = text(&mut ground.husk(&["load", "-i", &archive]));
    assert_eq!(said, format!("Loaded image: {}\n", ground.one()));
    run(&mut ground.husk(&["tag", &ground.one(), "mine"]));
    assert_eq!(text(&mut ground.husk(&["images"])).lines().count(), 3);
    let said = text(&mut ground.husk(&["prune", "--all", "--force"]));
    assert!(said.contains("Removed 4 blobs"), "{said}");
}

/// A file system without extended attributes. Dropped, it is unmounted.
struct Plain(PathBuf);

impl Plain {
    fn new(at: PathBuf) -> Self {
        fs::create_dir(&at).unwrap();
        run(Command::new("mount")
            .args(["-t", "ramfs", "ramfs"])
            .arg(&at));
        chown(&at, Some(NOBODY), Some(NOBODY)).unwrap();
        Self(at)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}

#[test]
fn owners_that_cannot_be_kept_are_not_lost_in_silence() {
    let ground = Ground::new();
    let plain = Plain::new(ground.path("plain"));
    let mut pull = ground.husk(&["pull", "-q", &ground.one()]);
    let said = error(pull.env("HUSK_ROOT", plain.0.join("husk")), 1);
    assert!(
        said.contains("\"user.\" attribute") && said.contains("not supported"),
        "{said}"
    );
    let layers = plain.0.join("husk/images/layers");
    assert_eq!(fs::read_dir(layers).unwrap().count(), 0);
}

#[test]
fn what_takes_root_says_so() {
    let ground = Ground::new();
    for (args, code) in [
        (&["run", "--rm", "x", "true"][..], 125),
        (&["create", "x"], 1),
        (&["start", "x"], 1),
    ] {
        let said = error(&mut ground.husk(args), code);
        assert!(
            said.contains("takes root") && said.contains("user 65534"),
            "{said}"
        );
    }
    assert!(text(&mut ground.husk(&["ps"])).starts_with("CONTAINER ID"));
    // Another's place.
    let said = error(
        ground
            .husk(&["images"])
            .env("HUSK_ROOT", "/var/lib/husk/no"),
        1,
    );
    assert!(said.contains("--root"), "{said}");
    let mut husk = Command::new(ground.path("husk"));
    let said = error(
        husk.args(["images", "--root"])
            .arg(ground.path("home/data/husk")),
        1,
    );
    assert!(said.contains("is user 65534's"), "{said}");
}
