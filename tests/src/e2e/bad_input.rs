//! Bad input gets a clear error, and the host stays as it was.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::{api::CreateTaskRequest, ttrpc};
use husk_tests::{
    ctr::Output,
    host::Traces,
    task::{self, Shim, context},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::{Test, context::Context, husk_test};

pub const TESTS: &[Test] = &[
    husk_test("no_dev_kvm", no_dev_kvm),
    husk_test("no_permission_on_dev_kvm", no_permission_on_dev_kvm),
    husk_test("dev_kvm_is_something_else", wrong_dev_kvm),
    husk_test("missing_kernel", missing_kernel),
    husk_test("wrong_kernel", wrong_kernel),
    husk_test("missing_vmm", missing_vmm),
    husk_test("broken_config_names_the_line", broken_config),
    husk_test("more_memory_than_the_host_has", too_much_memory),
    husk_test("root_file_system_missing", rootfs_missing),
    husk_test("bundle_without_rootfs", bundle_without_rootfs),
    husk_test("config_json_that_is_none", invalid_config_json),
    husk_test("initramfs_without_an_agent", empty_initramfs),
];

/// Runs `true` with a configuration of its own.
fn run_with_config(suite: &Context, config: &str) -> Result<Output> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("config.toml");
    fs::write(&path, config)?;
    suite.run(
        &["--runtime-config-path", &path.to_string_lossy()],
        &["true"],
    )
}

/// It fails, the sentence says these words, and the host is as before.
pub fn fails(suite: &Context, config: &str, words: &[&str]) -> Result<()> {
    let before = Traces::now();
    let out = run_with_config(suite, config)?;
    ensure!(out.code != 0, "{out:?}");
    for word in words {
        ensure!(out.errors().contains(word), "no {word:?} in {out:?}");
    }
    before.restored()
}

/// Puts something else in place of `/dev/kvm` while `test` runs.
fn without_kvm(replacement: Option<&str>, test: impl FnOnce() -> Result<()>) -> Result<()> {
    let (kvm, aside) = (Path::new("/dev/kvm"), Path::new("/dev/kvm.aside"));
    fs::rename(kvm, aside)?;
    if let Some(text) = replacement {
        fs::write(kvm, text)?;
    }
    let result = test();
    // Missing is as it should be where there was no replacement.
    let _ = fs::remove_file(kvm);
    fs::rename(aside, kvm)?;
    result
}

fn no_dev_kvm(suite: &Context) -> Result<()> {
    without_kvm(None, || fails(suite, "", &["/dev/kvm"]))
}

fn wrong_dev_kvm(suite: &Context) -> Result<()> {
    without_kvm(Some("not a device"), || fails(suite, "", &["/dev/kvm"]))
}

fn missing_kernel(suite: &Context) -> Result<()> {
    fails(
        suite,
        "kernel = \"/no/such/vmlinux\"\n",
        &["/no/such/vmlinux"],
    )
}

fn wrong_kernel(suite: &Context) -> Result<()> {
    fails(suite, "kernel = \"/etc/passwd\"\n", &["/etc/passwd", "ELF"])
}

fn missing_vmm(suite: &Context) -> Result<()> {
    fails(
        suite,
        "vmm = \"/no/such/husk-vmm\"\n",
        &["/no/such/husk-vmm"],
    )
}

fn broken_config(suite: &Context) -> Result<()> {
    fails(
        suite,
        "# a comment\nkernal = \"/boot/vmlinux\"\n",
        &["config.toml", "kernal", "line 2"],
    )
}

fn too_much_memory(suite: &Context) -> Result<()> {
    fails(
        suite,
        "default_memory_mib = 900000\nmax_memory_mib = 900000\n",
        &["memory", "MiB"],
    )
}

fn rootfs_missing(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let mut run = suite.spec(&["true"])?;
    run.spec["root"]["path"] = json!("/no/such/rootfs");
    let out = run.run()?;
    ensure!(
        out.code != 0 && out.errors().contains("/no/such/rootfs"),
        "{out:?}"
    );
    before.restored()
}

fn no_permission_on_dev_kvm(suite: &Context) -> Result<()> {
    // Root passes every mode; a device on a file system without devices is refused to root as well (EACCES).
    let nodev = tempfile::tempdir()?;
    let tmpfs = Some("tmpfs");
    mount(tmpfs, nodev.path(), tmpfs, MsFlags::MS_NODEV, None::<&str>)?;
    let result = (|| {
        let node = nodev.path().join("kvm");
        // KVM is the misc device 10:232 (Documentation/admin-guide/devices.txt).
        let (kind, number) = (
            nix::sys::stat::SFlag::S_IFCHR,
            nix::sys::stat::makedev(10, 232),
        );
        nix::sys::stat::mknod(&node, kind, nix::sys::stat::Mode::S_IRWXU, number)?;
        let none = None::<&str>;
        mount(Some(&node), "/dev/kvm", none, MsFlags::MS_BIND, none)?;
        let result = fails(suite, "", &["/dev/kvm", "ermission"]);
        umount2("/dev/kvm", MntFlags::MNT_DETACH)?;
        result
    })();
    umount2(nodev.path(), MntFlags::MNT_DETACH)?;
    result
}

/// A spec that would run, had it the rest of its bundle.
fn plain_spec() -> String {
    json!({
        "ociVersion": "1.2.0",
        "root": { "path": "rootfs" },
        "process": { "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "linux": { "namespaces": [{ "type": "network" }] },
    })
    .to_string()
}

/// The words with which Create fails on this bundle; then the bundle's shim is deleted and the host is as before.
fn create_fails(shim: Shim, id: &str, spoil: impl FnOnce(&Path) -> Result<()>) -> Result<String> {
    let tasks = task::connect(&shim.start()?)?;
    spoil(shim.bundle())?;
    let request = CreateTaskRequest {
        id: id.to_owned(),
        bundle: shim.bundle().to_string_lossy().into_owned(),
        ..Default::default()
    };
    let answer = tasks.create(context(), &request);
    drop(shim);
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => Ok(status.message().to_owned()),
        other => anyhow::bail!("a clear refusal was expected, not {other:?}"),
    }
}

fn bundle_without_rootfs(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let id = suite.containerd.fresh_id("bundle");
    let shim = Shim::new(&suite.bin, id.clone(), &plain_spec(), false)?;
    let words = create_fails(shim, &id, |_| Ok(()))?;
    ensure!(words.contains("rootfs"), "{words}");
    before.restored()
}

fn invalid_config_json(suite: &Context) -> Result<()> {
    let before = Traces::now();
    // Broken from the start: there is no shim.
    let id = suite.containerd.fresh_id("bundle");
    let shim = Shim::new(&suite.bin, id, "{\"ociVersion\": \"1.2.0\",", true)?;
    let words = shim.start().err().context("it started")?.to_string();
    ensure!(words.contains("config.json"), "{words}");
    drop(shim);
    // Broken behind the shim's back.
    let id = suite.containerd.fresh_id("bundle");
    let shim = Shim::new(&suite.bin, id.clone(), &plain_spec(), true)?;
    let words = create_fails(shim, &id, |bundle| {
        Ok(fs::write(
            bundle.join("config.json"),
            json!({
                "ociVersion": "1.2.0", "root": { "path": "rootfs" }, "process": { "args": "true" },
                "linux": { "namespaces": [{ "type": "network" }] },
            })
            .to_string(),
        )?)
    })?;
    ensure!(
        words.contains("config.json") || words.contains("args"),
        "{words}"
    );
    before.restored()
}

fn empty_initramfs(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("initramfs.cpio");
    fs::write(&path, "not an archive")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
    fails(
        suite,
        &format!("initramfs = \"{}\"\n", path.display()),
        &["panic"],
    )
}
