//! `husk` and images, as its users meet it: the program, a registry, and what it prints.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

#[path = "../../image/tests/common/mod.rs"]
mod common;
#[path = "common/ground.rs"]
mod ground;
#[path = "../../image/tests/common/images.rs"]
mod images;
#[path = "../../image/tests/common/registry.rs"]
mod registry;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{listing, noise, run};
use ground::{Ground, LONG, error, output, text};
use husk_image::{manifest::Platform, store::Store};
use registry::{Fault, Proxy};
use serde_json::Value;

fn json(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// A layer of the store, unpacked, that has the long file of an image.
fn has_long(root: &Path, image: &str) -> bool {
    let seed = if image == "one" { 1 } else { 2 };
    let store = Store::open(&root.join("images")).unwrap();
    let names = store.names().unwrap();
    let Some((name, _)) = names.iter().find(|(name, _)| name.contains(image)) else {
        return false;
    };
    let found = store.image(name, &Platform::here()).unwrap().unwrap();
    let layers = store.unpack(&found.layers, Default::default()).unwrap();
    let lower = listing(&layers[1]);
    lower.len() > 5 && fs::read(layers[0].join("long")).unwrap() == noise(seed, LONG)
}

#[test]
fn images_are_pulled_listed_named_and_removed() {
    let ground = Ground::new();
    let one = ground.one();
    let said = text(&mut ground.husk(&["pull", &one]));
    assert_eq!(said.matches("Pull complete").count(), 2, "{said}");
    assert!(
        said.contains(&format!("Status: Downloaded newer image for {one}")),
        "{said}"
    );
    assert!(said.ends_with(&format!("{one}\n")), "{said}");
    let said = text(&mut ground.husk(&["pull", &one]));
    assert!(
        said.contains("Already exists") && said.contains("up to date"),
        "{said}"
    );
    assert_eq!(
        text(&mut ground.husk(&["pull", "--quiet", &one])),
        format!("{one}\n")
    );
    let two = format!("{}/two:1", ground.registry.host);
    let events = json(&text(&mut ground.husk(&["pull", "--json", &two])));
    let count = |status: &str| events.iter().filter(|e| e["status"] == status).count();
    assert_eq!(
        (
            count("layer"),
            count("unpacked"),
            count("exists"),
            count("pulled")
        ),
        (2, 2, 1, 1)
    );

    let list = text(&mut ground.husk(&["images"]));
    let first = list.lines().next().unwrap();
    let words: Vec<_> = first
        .split("   ")
        .map(str::trim)
        .filter(|word| !word.is_empty())
        .collect();
    assert_eq!(words, ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"]);
    assert_eq!(list.lines().count(), 3, "{list}");
    let items = json(&text(
        &mut ground.husk(&["images", "--format", "json", &one]),
    ));
    assert_eq!(items.len(), 1);
    assert_eq!(items[0]["Tag"], "1");
    assert!(items[0]["Bytes"].as_u64().unwrap() > LONG as u64);
    let id = items[0]["ID"].as_str().unwrap();
    assert_eq!(
        text(&mut ground.husk(&["images", "-q", &one])),
        format!("{id}\n")
    );

    run(&mut ground.husk(&["tag", &one, "mine"]));
    run(&mut ground.husk(&["tag", id, "mine:2"]));
    let list = text(&mut ground.husk(&["images", "mine"]));
    assert_eq!(list.lines().count(), 3, "{list}");
    let said = error(&mut ground.husk(&["rmi", id]), 1);
    assert!(said.contains("several names"), "{said}");
    assert_eq!(
        text(&mut ground.husk(&["rmi", "mine"])),
        "Untagged: docker.io/library/mine:latest\n"
    );
    assert_eq!(
        text(&mut ground.husk(&["rmi", "--force", id, "nothing"]))
            .lines()
            .count(),
        2
    );
    let said = error(&mut ground.husk(&["rmi", &one]), 1);
    assert!(said.contains("there is no image"), "{said}");
    // What two has stays.
    assert!(has_long(&ground.dir.path().join("root"), "two"));
    let said = error(&mut ground.husk(&["prune", "--all"]), 1);
    assert!(said.contains("--force"), "{said}");
    let said = text(&mut ground.husk(&["prune", "--all", "--force"]));
    assert!(
        said.contains("Removed 4 blobs") && said.contains("2 unpacked"),
        "{said}"
    );
    let blobs = ground.dir.path().join("root/images/blobs/sha256");
    assert_eq!(fs::read_dir(blobs).unwrap().count(), 0);
}

#[test]
fn images_travel_in_archives() {
    let ground = Ground::new();
    let one = ground.one();
    run(&mut ground.husk(&["pull", "-q", &one]));
    let path = |name: &str| ground.dir.path().join(name).display().to_string();
    let archive = path("one.tar");
    run(&mut ground.husk(&["save", "-o", &archive, &one]));
    let piped = run(&mut ground.husk(&["save", &one]));
    assert_eq!(piped, fs::read(&archive).unwrap());
    let said = text(&mut ground.husk_in("other", &["load", "-i", &archive]));
    assert_eq!(said, format!("Loaded image: {one}\n"));
    let mut load = ground.husk_in("third", &["load"]);
    run(load.stdin(fs::File::open(&archive).unwrap()));
    assert!(has_long(&ground.dir.path().join("other"), "one"));
    assert!(has_long(&ground.dir.path().join("third"), "one"));
    // Docker's older kind: the image is known by its configuration.
    let docker = path("docker.tar");
    let for_docker = &["save", "--format", "docker-archive", &one];
    run(ground.husk(for_docker).args(["-o", &docker]));
    assert_eq!(
        run(&mut ground.husk(for_docker)),
        fs::read(&docker).unwrap()
    );
    let said = text(&mut ground.husk_in("fourth", &["load", "-i", &docker]));
    assert_eq!(said, format!("Loaded image: {one}\n"));
    assert!(has_long(&ground.dir.path().join("fourth"), "one"));
    let said = error(&mut ground.husk(&["save", "--format", "tar", &one]), 2);
    assert!(said.contains("oci-archive, docker-archive"), "{said}");
    // A root file system.
    let tar = path("root.tar");
    run(Command::new("tar").args(["-cf", &tar, "-C", &path("lower"), "."]));
    let said = text(&mut ground.husk(&["import", &tar, "mine:import"]));
    assert!(said.starts_with("sha256:"), "{said}");
    assert_eq!(
        text(&mut ground.husk(&["images", "-q", "mine"])).trim(),
        &said[7..19]
    );
    // What is none.
    fs::write(path("text"), "not an archive").unwrap();
    let said = error(&mut ground.husk(&["load", "-i", &path("text")]), 1);
    assert!(said.contains(&path("text")), "{said}");
    let said = error(&mut ground.husk(&["load", "-i", &path("nothing")]), 1);
    assert!(
        said.contains("nothing") && said.contains("No such file"),
        "{said}"
    );
    let said = error(
        &mut ground.husk(&["save", "-o", &path("no/such/dir"), &one]),
        1,
    );
    assert!(said.contains("no/such/dir"), "{said}");
    assert!(!error(&mut ground.husk(&["save", "-o", &path("x"), "nothing"]), 1).is_empty());
    assert!(!Path::new(&path("x")).exists());
}

#[test]
fn mistakes_are_told() {
    let ground = Ground::new();
    for (args, code, words) in [
        (&["pull", "Not An Image"][..], 1, "names no image"),
        (&["pull", "UPPER"], 1, "lowercase"),
        (&["pull", "127.0.0.1:1/x"], 1, "127.0.0.1:1"),
        (&["pull", "--platform", "linux", "x"], 1, "OS/ARCH"),
        (&["pull"], 2, "Usage: husk pull"),
        (&["images", "--format", "xml"], 2, "table, json"),
        (&["tag", "nothing", "x"], 1, "`husk pull nothing`"),
        (&["load"], 1, "standard input"),
    ] {
        let said = error(&mut ground.husk(args), code);
        assert!(said.contains(words), "{args:?}: {said}");
    }
    let settings = ground.dir.path().join("registries.toml");
    fs::write(&settings, "[registry.\"docker.io\"]\nmirror = [\"x\"]\n").unwrap();
    let said = error(&mut ground.husk(&["pull", "x"]), 1);
    assert!(
        said.contains("registries.toml") && said.contains("line 2") && said.contains("mirrors"),
        "{said}"
    );
    for args in [
        &["--help"][..],
        &["version"],
        &["version", "--format", "json"],
        &["completion", "bash"],
    ] {
        assert!(!text(&mut ground.husk(args)).is_empty(), "{args:?}");
    }
    // A reader that has seen enough.
    let mut piped = Command::new("sh");
    piped.arg("-c").arg(format!(
        "{} completion bash | head -n 1",
        env!("CARGO_BIN_EXE_husk")
    ));
    assert!(output(&mut piped).stderr.is_empty());
}

#[test]
fn an_image_without_its_signature_is_neither_pulled_nor_run() {
    let ground = Ground::new();
    let key = ground.dir.path().join("key.pub");
    let mut openssl = Command::new("openssl");
    openssl.args(["ecparam", "-name", "prime256v1", "-genkey", "-noout"]);
    run(openssl.arg("-out").arg(ground.dir.path().join("key")));
    let mut openssl = Command::new("openssl");
    openssl.args(["pkey", "-pubout", "-in"]);
    openssl.arg(ground.dir.path().join("key"));
    run(openssl.arg("-out").arg(&key));
    let settings = ground.dir.path().join("registries.toml");
    let say = |rule: &str| fs::write(&settings, format!("[signatures]\n\"*\" = {rule}\n")).unwrap();
    say(&format!("[{key:?}]"));
    let one = ground.one();
    for (args, code) in [
        (&["pull", &*one][..], 1),
        (&["run", "--rm", "--network", "none", &one], 125),
    ] {
        let said = error(&mut ground.husk(args), code);
        for word in ["is not signed", "registries.toml", "key.pub"] {
            assert!(said.contains(word), "{args:?}: {said}");
        }
    }
    assert_eq!(text(&mut ground.husk(&["images", "-q"])), "");
    say("\"reject\"");
    let said = error(&mut ground.husk(&["pull", &one]), 1);
    assert!(said.contains("rejects") && said.contains(&one), "{said}");
    say("\"acept\"");
    let said = error(&mut ground.husk(&["pull", &one]), 1);
    assert!(
        said.contains("line 2") && said.contains("\"accept\", \"reject\", or a list"),
        "{said}"
    );
    say("\"accept\"");
    run(&mut ground.husk(&["pull", &one]));
}

/// Waits until a file has so many bytes; the child must still run.
fn wait_for_bytes(child: &mut Child, dir: &Path, bytes: u64) {
    let begin = Instant::now();
    loop {
        let files = fs::read_dir(dir).into_iter().flatten().flatten();
        let most = files.filter_map(|f| Some(f.metadata().ok()?.len())).max();
        if most.unwrap_or(0) >= bytes {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        assert!(begin.elapsed() < Duration::from_secs(60), "no bytes come");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_killed_pull_goes_on_where_it_was() {
    let ground = Ground::new();
    let proxy = Proxy::new(&ground.registry.host, |request, before| {
        // The long layers, once.
        if before == 0 && request.path.contains("/blobs/") {
            Fault::Stall(2_000_000)
        } else {
            Fault::None
        }
    });
    let one = format!("{}/one:1", proxy.host);
    let mut pull = ground
        .husk(&["pull", &one])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for_bytes(
        &mut pull,
        &ground.dir.path().join("root/images/ingest"),
        2_000_000,
    );
    pull.kill().unwrap();
    pull.wait().unwrap();
    assert_eq!(text(&mut ground.husk(&["images", "-q"])), "");
    run(&mut ground.husk(&["pull", &one]));
    let went_on = proxy
        .seen()
        .iter()
        .any(|request| request.header("range") == Some("bytes=2000000-"));
    assert!(went_on, "it began anew");
    assert!(has_long(&ground.dir.path().join("root"), "one"));
}

#[test]
fn a_pull_killed_at_any_time_leaves_a_store_that_works() {
    let ground = Ground::new();
    let one = ground.one();
    let began = Instant::now();
    run(&mut ground.husk_in("whole", &["pull", &one]));
    let whole = began.elapsed();
    for part in 0..12 {
        let root = format!("part-{}", part % 3);
        let mut pull = ground
            .husk_in(&root, &["pull", &one])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(whole * part / 12);
        // It may have ended.
        let _ = pull.kill();
        pull.wait().unwrap();
        text(&mut ground.husk_in(&root, &["images"]));
    }
    for part in 0..3 {
        let root = format!("part-{part}");
        run(&mut ground.husk_in(&root, &["pull", &one]));
        assert!(has_long(&ground.dir.path().join(&root), "one"));
        run(&mut ground.husk_in(&root, &["rmi", &one]));
        let images = ground.dir.path().join(root).join("images");
        for dir in ["blobs/sha256", "layers", "ingest"] {
            assert_eq!(fs::read_dir(images.join(dir)).unwrap().count(), 0, "{dir}");
        }
    }
}

#[test]
fn eight_pulls_at_once_share_what_the_images_share() {
    let ground = Ground::new();
    let proxy = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let mut pulls: Vec<_> = (0..8)
        .map(|at| {
            let name = format!(
                "{}/{}:1",
                proxy.host,
                if at % 2 == 0 { "one" } else { "two" }
            );
            ground
                .husk(&["pull", "-q", &name])
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for pull in &mut pulls {
        assert!(pull.wait().unwrap().success());
    }
    let root = ground.dir.path().join("root");
    assert!(has_long(&root, "one") && has_long(&root, "two"));
    let seen = proxy.seen();
    let mut blobs: Vec<_> = seen
        .iter()
        .filter_map(|request| request.path.split_once("/blobs/").map(|(_, digest)| digest))
        .collect();
    let all = blobs.len();
    blobs.sort_unstable();
    blobs.dedup();
    // Three layers and two configurations, each once.
    assert_eq!((blobs.len(), all), (5, 5));
}

/// A small file system. Dropped, it is unmounted.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn new(at: &'a Path, bytes: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(at));
        Self(at)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        run(Command::new("umount").arg(self.0));
    }
}

#[test]
fn a_full_disk_is_told_and_loses_nothing() {
    let ground = Ground::new();
    let at = ground.dir.path().join("small");
    // The blob has room, and what is in it has not.
    let _small = Small::new(&at, "5M");
    let one = ground.one();
    let said = error(&mut ground.husk_in("small", &["pull", &one]), 1);
    assert!(said.contains("No space left on device"), "{said}");
    assert_eq!(text(&mut ground.husk_in("small", &["images", "-q"])), "");
    run(Command::new("mount")
        .args(["-o", "remount,size=50M"])
        .arg(&at));
    run(&mut ground.husk_in("small", &["pull", &one]));
    assert!(has_long(&at, "one"));
}

#[test]
fn a_host_without_certificates_can_pull() {
    let ground = Ground::new();
    let empty = ground.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let mut pull = ground.husk(&["pull", "-q", &ground.one()]);
    pull.env("SSL_CERT_DIR", &empty)
        .env("SSL_CERT_FILE", empty.join("none"));
    run(&mut pull);
}

#[test]
fn the_environments_proxy_is_used() {
    let ground = Ground::new();
    let proxy = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let settings = ground.dir.path().join("registries.toml");
    fs::write(
        &settings,
        "[registry.\"registry.invalid:5000\"]\nplain_http = true\n",
    )
    .unwrap();
    let pull = &["pull", "-q", "registry.invalid:5000/one:1"];
    let address = format!("http://{}", proxy.host);
    run(ground.husk(pull).env("http_proxy", &address));
    assert!(
        proxy
            .seen()
            .iter()
            .all(|request| request.path.starts_with("http://registry.invalid:5000/"))
    );
    let mut without = ground.husk_in("other", pull);
    let said = error(
        without
            .env("http_proxy", &address)
            .env("no_proxy", "registry.invalid"),
        1,
    );
    assert!(said.contains("registry.invalid"), "{said}");
}
