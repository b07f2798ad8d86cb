//! What is written of a pod, what is read of it again, and two who want the same directory.

use super::*;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

fn sleeper() -> std::process::Child {
    Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_process_is_known_by_its_start_time() {
    let me = ProcessId::current().unwrap();
    assert!(me.is_alive());
    let other = ProcessId {
        starttime: me.starttime + 1,
        ..me
    };
    assert!(!other.is_alive());
    // Not us: nothing is killed.
    assert!(other.kill(Duration::from_secs(1)).unwrap());
    // The name may look like the rest of the line.
    assert_eq!(
        starttime("7 (a) b) S 1 2 3) S 1 7 7 0 -1 4 5 6 7 8 9 10 11 12 20 0 1 0 4711 5 6"),
        Some(4711)
    );
    assert_eq!(starttime("garbage"), None);
}

#[test]
fn kill_ends_exactly_that_process() {
    let mut child = sleeper();
    let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
    assert!(id.is_alive());
    assert!(id.kill(Duration::from_secs(10)).unwrap());
    assert!(!id.is_alive(), "a zombie counts as ended");
    child.wait().unwrap();
    assert!(id.kill(Duration::from_secs(10)).unwrap());
}

#[test]
fn state_is_stored_changed_and_removed_with_its_directories() {
    let root = tempfile::tempdir().unwrap();
    let state_dir = root.path().join("husk");
    let pod = PodDir::new(&state_dir, "k8s.io", "pod-1").unwrap();
    assert_eq!(pod.load(), None);
    pod.create().unwrap();
    pod.create().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(pod.path()), mode(&pod.share())), (0o700, 0o700));
    let state = PodState {
        shim: ProcessId::current().ok(),
        socket: "/s".into(),
        ..Default::default()
    };
    pod.store(&state).unwrap();
    pod.update(|s| {
        s.containers.insert("c".into());
    })
    .unwrap();
    let got = pod.load().unwrap();
    assert_eq!((got.shim, got.containers.len()), (state.shim, 1));
    let other = PodDir::new(&state_dir, "k8s.io", "pod-2").unwrap();
    other.create().unwrap();
    assert_eq!(pod.siblings().len(), 2);
    pod.remove().unwrap();
    pod.remove().unwrap();
    assert!(other.path().exists());
    other.remove().unwrap();
    assert!(!state_dir.exists(), "nothing of husk is left");
}

#[test]
fn a_state_directory_is_named_without_links() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().canonicalize().unwrap();
    let (real, link) = (root.join("data/husk"), root.join("husk"));
    std::os::unix::fs::symlink("data/husk", &link).unwrap();
    assert_eq!(find_state_dir(&link), link);
    // Also when its target is not there (any more).
    for _ in 0..2 {
        assert_eq!(make_state_dir(&link).unwrap(), real);
        assert_eq!(find_state_dir(&link), real);
        let pod = PodDir::new(&find_state_dir(&link), "ns", "pod").unwrap();
        pod.create().unwrap();
        pod.remove().unwrap();
        assert!(!real.exists());
    }
    std::os::unix::fs::symlink("loop", root.join("loop")).unwrap();
    let error = make_state_dir(&root.join("loop")).unwrap_err().to_string();
    assert!(error.contains("loop"), "{error}");
}

#[test]
fn a_state_directory_is_made_while_the_last_pod_takes_it_away() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("husk");
    // One end for each start, at whatever moment: many would take it away as often as there are tries, on a machine that is busy enough.
    const STARTS: usize = 2000;
    let starts = AtomicUsize::new(0);
    let made = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut ended = 0;
            while ended < STARTS {
                let begun = starts.load(Ordering::Relaxed);
                if begun > ended {
                    ended = begun;
                    let _ = fs::remove_dir(&dir);
                }
                std::hint::spin_loop();
            }
        });
        let start = |_| {
            starts.fetch_add(1, Ordering::Relaxed);
            make_state_dir(&dir)
        };
        (0..STARTS).map(start).collect::<Vec<_>>()
    });
    let failed: Vec<_> = made.iter().filter(|made| made.is_err()).collect();
    assert!(
        failed.is_empty(),
        "{} of {STARTS}: {:?}",
        failed.len(),
        failed[0]
    );
}

#[test]
fn a_bundle_leads_to_its_pod() {
    let root = tempfile::tempdir().unwrap();
    let pod = PodDir::new(&root.path().join("husk"), "n", "pod").unwrap();
    assert_eq!(PodDir::of_bundle(root.path()), None);
    pod.link_bundle(root.path()).unwrap();
    pod.link_bundle(root.path()).unwrap();
    assert_eq!(PodDir::of_bundle(root.path()), Some(pod));
}

#[test]
fn the_namespace_is_held_by_one_at_a_time() {
    let root = tempfile::tempdir().unwrap();
    let pod = PodDir::new(&root.path().join("husk"), "n", "pod").unwrap();
    let lock = pod.lock_namespace(Duration::ZERO).unwrap();
    assert_eq!(
        pod.lock_namespace(Duration::ZERO).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    // The directory goes with its last pod while somebody waits: the waiter makes a new one.
    pod.create().unwrap();
    pod.remove().unwrap();
    drop(lock);
    let _lock = pod.lock_namespace(Duration::from_secs(5)).unwrap();
    pod.create().unwrap();
}

#[test]
fn an_id_is_one_harmless_path_component() {
    for id in [
        "",
        ".",
        "..",
        "a/b",
        ".hidden",
        "a b",
        "ä",
        &"x".repeat(201),
    ] {
        assert!(
            PodDir::new(Path::new("/run/husk"), "ns", id).is_err(),
            "{id:?}"
        );
        assert!(
            PodDir::new(Path::new("/run/husk"), id, "pod").is_err(),
            "{id:?}"
        );
    }
    assert!(PodDir::new(Path::new("/run/husk"), "k8s.io", "8f_a-b.c").is_ok());
}
