//! Volumes of the kubelet's, mirrored in a fake guest.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use husk_protocol::{guest_path, volume::MAX_BYTES};
use tokio::time::timeout;
use ttrpc::Code;

use super::{
    code,
    world::{LIMIT, World},
};

type Entries = BTreeMap<String, String>;

/// A kubelet's volume of one key, beside the bundle.
struct Volume(PathBuf);

impl Volume {
    fn new(world: &World, kind: &str) -> Self {
        let dir = world.bundle().join("../pods/uid/volumes").join(kind);
        fs::create_dir_all(dir.join("config")).unwrap();
        // As it is named in a spec: without `..`.
        let volume = Self(dir.join("config").canonicalize().unwrap());
        symlink("..data/key", volume.0.join("key")).unwrap();
        volume
    }

    /// The kubelet's AtomicWriter.
    fn write(&self, version: &str, value: &str) {
        let at = |name: &str| self.0.join(name);
        let old = fs::read_link(at("..data"));
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("key"), value).unwrap();
        symlink(version, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        if let Ok(old) = old {
            fs::remove_dir_all(self.0.join(old)).unwrap();
        }
    }
}

fn entries(version: &str, value: &str) -> Entries {
    [
        ("", "/"),
        (version, "/"),
        (&format!("{version}/key"), value),
        ("..data", version),
        ("key", "..data/key"),
    ]
    .map(|(path, content)| (path.to_owned(), content.to_owned()))
    .into()
}

impl World {
    /// Gives the bundle these mounts: source and options.
    fn mount(&self, mounts: &[(&Path, &[&str])]) {
        let config = self.bundle().join("config.json");
        let mut spec: serde_json::Value =
            serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        let mount = |(source, options): &(&Path, &[&str])| serde_json::json!({"destination": "/m", "type": "bind", "source": source, "options": options});
        spec["mounts"] = mounts.iter().map(mount).collect();
        fs::write(config, spec.to_string()).unwrap();
    }

    fn sources(&self) -> Vec<String> {
        self.guest.sources.lock().unwrap().clone()
    }

    /// Waits until the guest has these volumes.
    async fn has(&self, wanted: &[(&str, Entries)]) {
        let wanted = wanted.iter().cloned().map(|(id, e)| (id.to_owned(), e));
        let wanted: BTreeMap<_, _> = wanted.collect();
        let mut volumes = self.guest.volumes.subscribe();
        let seen = timeout(LIMIT, volumes.wait_for(|now| *now == wanted)).await;
        if seen.is_err() {
            panic!(
                "wanted {wanted:?}, there is {:?}",
                self.guest.volumes.borrow()
            );
        }
    }
}

fn share(index: usize) -> String {
    format!("{}/c/mounts/{index}", guest_path::SHARE)
}

#[tokio::test]
async fn a_volume_follows_the_kubelet_and_goes_with_its_last_container() {
    let w = World::new().await;
    // Another container keeps the pod.
    w.create_as("other").await.unwrap();
    let (config, secret) = (
        Volume::new(&w, "kubernetes.io~configmap"),
        Volume::new(&w, "kubernetes.io~secret"),
    );
    config.write("..1", "one");
    secret.write("..1", "hush");
    w.mount(&[
        (&config.0, &["rbind", "ro"]),
        (&w.bundle(), &["rbind", "ro"]),
        (&secret.0, &["rbind", "rprivate", "ro"]),
    ]);
    w.create().await.unwrap();
    let mirror = |id: &str| format!("{}/{id}", guest_path::VOLUMES);
    assert_eq!(w.sources(), [mirror("1"), share(1), mirror("2")]);
    w.has(&[("1", entries("..1", "one")), ("2", entries("..1", "hush"))])
        .await;
    config.write("..2", "two");
    w.has(&[("1", entries("..2", "two")), ("2", entries("..1", "hush"))])
        .await;
    // Another container starts with what is there now, the same volume.
    w.mount(&[(&config.0, &["rbind", "ro"])]);
    config.write("..3", "three");
    w.create_as("d").await.unwrap();
    assert_eq!(w.sources(), [mirror("1")]);
    let now = w.guest.volumes.borrow()["1"].clone();
    assert_eq!(now, entries("..3", "three"));
    w.remove("c").await.unwrap();
    w.has(&[("1", entries("..3", "three"))]).await;
    config.write("..4", "four");
    w.has(&[("1", entries("..4", "four"))]).await;
    w.remove("d").await.unwrap();
    w.has(&[]).await;
}

#[tokio::test]
async fn what_cannot_be_mirrored_stays_on_virtio_fs() {
    let w = World::new().await;
    w.create_as("other").await.unwrap();
    let (large, written) = (
        Volume::new(&w, "kubernetes.io~projected"),
        Volume::new(&w, "kubernetes.io~configmap"),
    );
    large.write("..1", &"x".repeat(MAX_BYTES));
    written.write("..1", "x");
    w.mount(&[(&large.0, &["rbind", "ro"]), (&written.0, &["rbind", "rw"])]);
    w.create().await.unwrap();
    assert_eq!(w.sources(), [share(0), share(1)]);
    w.remove("c").await.unwrap();
    // Nor does a guest that refuses it keep a container from running.
    w.mount(&[(&written.0, &["rbind", "ro"])]);
    let refusal = (Code::INTERNAL, "no space left".to_owned());
    *w.guest.volume_error.lock().unwrap() = Some(refusal);
    w.create().await.unwrap();
    assert_eq!(w.sources(), [share(0)]);
    // What it may have of it is removed.
    w.called("sync 2 0").await;
}

#[tokio::test]
async fn a_change_that_the_guest_did_not_take_comes_again() {
    let w = World::new().await;
    let config = Volume::new(&w, "kubernetes.io~downward-api");
    config.write("..1", "one");
    w.mount(&[(&config.0, &["rbind", "ro"])]);
    w.create().await.unwrap();
    let refusal = (Code::INTERNAL, "busy".to_owned());
    *w.guest.volume_error.lock().unwrap() = Some(refusal);
    w.guest.calls.lock().unwrap().clear();
    config.write("..2", "two");
    w.called("sync 1 5").await;
    *w.guest.volume_error.lock().unwrap() = None;
    w.has(&[("1", entries("..2", "two"))]).await;
    // Too large now: the containers keep what they have until it fits again.
    config.write("..3", &"x".repeat(MAX_BYTES));
    config.write("..4", "four");
    w.has(&[("1", entries("..4", "four"))]).await;
}

#[tokio::test]
async fn a_container_that_fails_leaves_no_volume() {
    let w = World::new().await;
    w.create_as("other").await.unwrap();
    let config = Volume::new(&w, "kubernetes.io~configmap");
    config.write("..1", "one");
    w.mount(&[(&config.0, &["rbind", "ro"])]);
    let refusal = (Code::INVALID_ARGUMENT, "no such spec".to_owned());
    *w.guest.create_error.lock().unwrap() = Some(refusal);
    assert_eq!(code(w.create().await).0, Code::INVALID_ARGUMENT);
    w.called("sync 1 5").await;
    w.called("sync 1 0").await;
    w.has(&[]).await;
}
