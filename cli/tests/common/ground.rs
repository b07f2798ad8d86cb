//! A registry with two images, and `husk` with a home of its own.

#![allow(
    dead_code,
    reason = "each of the tests that share it uses a part of it"
)]

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use husk_image::store::Store;

use crate::{
    common::{noise, run, tree},
    images::{layer, publish},
    registry::Registry,
};

/// Bytes of the file in each image's upper layer.
pub const LONG: usize = 3 << 20;

/// A registry with `one:1` and `two:1`, which have their lower layer in common.
pub struct Ground {
    pub registry: Registry,
    pub dir: tempfile::TempDir,
    /// What the registry needs.
    pub kept: Vec<tempfile::TempDir>,
}

impl Ground {
    pub fn new() -> Self {
        Self::on(Registry::new(), &[])
    }

    pub fn on(registry: Registry, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        let store = Store::open(&layout).unwrap();
        let lower = dir.path().join("lower");
        fs::create_dir(&lower).unwrap();
        tree(&lower);
        let lower = layer(&lower);
        for (name, byte) in [("one", 1), ("two", 2)] {
            let upper = dir.path().join(name);
            fs::create_dir(&upper).unwrap();
            fs::write(upper.join("long"), noise(byte, LONG)).unwrap();
            publish(&store, name, &[lower.clone(), layer(&upper)]);
            registry.push(&layout, name, &format!("{name}:1"), flags);
        }
        Self {
            registry,
            dir,
            kept: Vec::new(),
        }
    }

    /// `husk`, with a home of its own.
    pub fn husk(&self, args: &[&str]) -> Command {
        self.husk_in("root", args)
    }

    pub fn husk_in(&self, root: &str, args: &[&str]) -> Command {
        let mut husk = Command::new(env!("CARGO_BIN_EXE_husk"));
        let home = self.dir.path().join("home");
        husk.env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", home)
            .env("HUSK_ROOT", self.dir.path().join(root))
            .arg("--registries")
            .arg(self.dir.path().join("registries.toml"))
            .args(args)
            .stdin(Stdio::null());
        husk
    }

    pub fn one(&self) -> String {
        format!("{}/one:1", self.registry.host)
    }
}

pub fn output(command: &mut Command) -> Output {
    command.output().unwrap()
}

/// What a command prints; it must succeed.
pub fn text(command: &mut Command) -> String {
    String::from_utf8(run(command)).unwrap()
}

/// What a command says on standard error; it must fail with this code.
pub fn error(command: &mut Command, code: i32) -> String {
    let output = output(command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    said
}
