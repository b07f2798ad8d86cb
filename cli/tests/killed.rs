//! `husk pull`, killed while it unpacks: no half of a layer is ever taken for a whole one, and none of them stays.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

#[path = "../../image/tests/common/mod.rs"]
mod common;
#[path = "../../image/tests/common/images.rs"]
mod images;
#[path = "../../image/tests/common/registry.rs"]
mod registry;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use common::{in_memory, listing, run, same};
use husk_image::{manifest::Platform, store::Store};
use images::{layer, publish};
use registry::Registry;

/// Directories of each layer, and files in each of them.
const MANY: (usize, usize) = (20, 20);

/// A registry with an image of two layers of many files, and a place for a store.
struct Ground {
    registry: Registry,
    dir: tempfile::TempDir,
}

type Tree = BTreeMap<PathBuf, String>;

impl Ground {
    fn new() -> Self {
        let dir = in_memory(32 << 20);
        let registry = Registry::new();
        let ground = Self { registry, dir };
        let (layout, lower, upper) = (
            ground.path("layout"),
            ground.path("lower"),
            ground.path("upper"),
        );
        for (root, what) in [(&lower, "lower"), (&upper, "upper")] {
            for at in 0..MANY.0 {
                let many = root.join(format!("many/{at}"));
                fs::create_dir_all(&many).unwrap();
                for file in 0..MANY.1 {
                    fs::write(many.join(format!("{what}-{file}")), what.repeat(file)).unwrap();
                }
                fs::set_permissions(&many, fs::Permissions::from_mode(0o2750)).unwrap();
            }
        }
        fs::write(upper.join("many/0/.wh.lower-0"), "").unwrap();
        fs::write(upper.join("many/1/.wh..wh..opq"), "").unwrap();
        let store = Store::open(&layout).unwrap();
        publish(&store, "one", &[layer(&lower), layer(&upper)]);
        ground.registry.push(&layout, "one", "one:1", &[]);
        ground
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn husk(&self, args: &[&str]) -> Command {
        let mut husk = Command::new(env!("CARGO_BIN_EXE_husk"));
        husk.env("HUSK_ROOT", self.path("root"))
            .args(args)
            .stdin(Stdio::null());
        husk
    }

    fn one(&self) -> String {
        format!("{}/one:1", self.registry.host)
    }

    fn layers(&self) -> PathBuf {
        self.path("root/images/layers")
    }

    /// What is there of layers, by name.
    fn all(&self) -> BTreeMap<String, Tree> {
        let layers = fs::read_dir(self.layers()).unwrap();
        layers
            .map(|layer| layer.unwrap())
            .map(|layer| {
                let name = layer.file_name().into_string().unwrap();
                let mut tree = listing(&layer.path());
                for about in tree
                    .values_mut()
                    .filter(|about| about.starts_with("20000 "))
                {
                    // A deletion has the time at which it was unpacked.
                    *about = "deletion".to_owned();
                }
                (name, tree)
            })
            .collect()
    }

    /// Nothing is unpacked; the blobs stay.
    fn forget(&self) {
        for layer in fs::read_dir(self.layers()).unwrap() {
            fs::remove_dir_all(layer.unwrap().path()).unwrap();
        }
    }
}

/// Entries of a tree that is being made: what goes in between counts for nothing.
fn count(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => 1 + count(&entry.path()),
            _ => 1,
        })
        .sum()
}

#[test]
fn a_pull_killed_while_it_unpacks_leaves_no_half_of_a_layer() {
    let ground = Ground::new();
    run(&mut ground.husk(&["pull", "-q", &ground.one()]));
    let whole = ground.all();
    let total = count(&ground.layers());
    assert!(total > 2 * MANY.0 * MANY.1 && whole.len() == 2);
    // From nothing to all of it, and once more where the disk is waited for and names are given.
    let moments = 12;
    let mut halves = 0;
    for moment in 0..=moments {
        // Every third goes on where the one before was killed.
        if moment % 3 == 0 {
            ground.forget();
        }
        let mut pull = ground
            .husk(&["pull", "-q", &ground.one()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let wanted = total * moment / moments;
        let ended = loop {
            if count(&ground.layers()) >= wanted {
                break false;
            }
            if pull.try_wait().unwrap().is_some() {
                break true;
            }
            thread::sleep(Duration::from_micros(200));
        };
        pull.kill().unwrap();
        let status = pull.wait().unwrap();
        assert!(!ended || status.success(), "{status}");
        for (name, tree) in ground.all() {
            match name.strip_suffix(".new") {
                Some(_) => halves += 1,
                None => same(&tree, &whole[&name]),
            }
        }
        // The image is one that can be looked at.
        run(&mut ground.husk(&["images"]));
    }
    assert!(
        halves > moments / 4,
        "{halves} of {moments} were cut off in the middle"
    );

    // Whoever comes next makes it whole.
    run(&mut ground.husk(&["pull", "-q", &ground.one()]));
    let again = ground.all();
    assert_eq!(
        again.keys().collect::<Vec<_>>(),
        whole.keys().collect::<Vec<_>>()
    );
    for (name, tree) in &again {
        same(tree, &whole[name]);
    }
    let store = Store::open(&ground.path("root/images")).unwrap();
    let image = store.image(&ground.one(), &Platform::here()).unwrap();
    assert_eq!(image.unwrap().layers.len(), 2);
}

#[test]
fn what_a_killed_unpack_leaves_goes_with_a_prune() {
    let ground = Ground::new();
    run(&mut ground.husk(&["pull", "-q", &ground.one()]));
    let total = count(&ground.layers());
    let mut halves = 0;
    for part in 1..4 {
        ground.forget();
        let mut pull = ground
            .husk(&["pull", "-q", &ground.one()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while count(&ground.layers()) < total * part / 4 && pull.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_micros(200));
        }
        pull.kill().unwrap();
        pull.wait().unwrap();
        halves += usize::from(ground.all().keys().any(|name| name.ends_with(".new")));
        // A prune that is killed, too.
        let mut prune = ground
            .husk(&["prune", "--force"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let there = count(&ground.layers());
        while count(&ground.layers()) > there / 2 && prune.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_micros(200));
        }
        prune.kill().unwrap();
        prune.wait().unwrap();
        run(&mut ground.husk(&["prune", "--force"]));
        assert!(!ground.all().keys().any(|name| name.ends_with(".new")));
    }
    assert!(halves > 0, "none was cut off in the middle");
    run(&mut ground.husk(&["rmi", &ground.one()]));
    for dir in ["blobs/sha256", "layers", "ingest"] {
        let dir = ground.path("root/images").join(dir);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "{}", dir.display());
    }
}
