use clap::Parser as _;
use proptest::prelude::*;

use super::*;
use crate::args::{Args, Command, Create};

fn create(words: &[&str]) -> Create {
    let all = ["husk", "create"].iter().chain(words).copied();
    match Args::try_parse_from(all).unwrap().command {
        Command::Create(create) => create,
        other => panic!("{other:?}"),
    }
}

fn config(value: Value) -> Config {
    serde_json::from_value(value).unwrap()
}

fn spec(words: &[&str]) -> Result<Value> {
    let args = create(words);
    let config = config(json!({"Cmd": ["sh"], "WorkingDir": "/srv"}));
    let identity = Identity {
        uid: 5,
        gid: 6,
        groups: vec![7],
        home: "/home/x".to_owned(),
    };
    let env = environment(&args, &config, &identity, |_| None)?;
    build(&Parts {
        id: "abc",
        args: &args,
        config: &config,
        command: &command(&args, &config)?,
        identity: &identity,
        env: &env,
        mounts: Vec::new(),
    })
}

#[test]
fn entry_point_and_command_replace_the_images() {
    let image = config(json!({"Entrypoint": ["entry"], "Cmd": ["a", "b"]}));
    for (words, wanted) in [
        (&["x"][..], &["entry", "a", "b"][..]),
        (&["x", "c", "-d"], &["entry", "c", "-d"]),
        (&["--entrypoint", "other", "x"], &["other"]),
        (&["--entrypoint", "other", "x", "c"], &["other", "c"]),
        (&["--entrypoint", "", "x", "c"], &["c"]),
    ] {
        assert_eq!(command(&create(words), &image).unwrap(), wanted);
    }
    assert!(command(&create(&["x"]), &config(json!({}))).is_err());
}

#[test]
fn the_environment_is_the_images_then_files_then_flags() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("env");
    std::fs::write(&file, "# remark\n\nA=file\nB=file\nMINE\n").unwrap();
    let file = file.display().to_string();
    let args = create(&["--env-file", &file, "-e", "B=flag", "-e", "GONE", "-t", "x"]);
    let image = config(json!({"Env": ["A=image", "GONE=image", "KEPT=a=b"]}));
    let identity = Identity {
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        home: "/root".to_owned(),
    };
    let caller = |name: &str| (name == "MINE").then(|| "caller".to_owned());
    let env = environment(&args, &image, &identity, caller).unwrap();
    for (key, value) in [
        ("A", "file"),
        ("B", "flag"),
        ("MINE", "caller"),
        ("KEPT", "a=b"),
        ("HOME", "/root"),
        ("TERM", "xterm"),
    ] {
        assert_eq!(env[key], value);
    }
    assert!(!env.contains_key("GONE"));
    let args = create(&["-e", "=x", "x"]);
    assert!(environment(&args, &image, &identity, |_| None).is_err());
}

#[test]
fn flags_are_in_the_specification() {
    let spec = spec(&[
        "--memory",
        "64m",
        "--cpus",
        "1.5",
        "--pids-limit",
        "9",
        "--read-only",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "net_admin",
        "--ulimit",
        "nofile=5:6",
        "--security-opt",
        "no-new-privileges",
        "--security-opt",
        "seccomp=unconfined",
        "--tmpfs",
        "/t:size=1m",
        "--annotation",
        "a.b=c",
        "--init",
        "x",
    ])
    .unwrap();
    let resources = &spec["linux"]["resources"];
    assert_eq!(resources["memory"]["limit"], 64 << 20);
    assert_eq!(
        resources["cpu"],
        json!({"quota": 150_000, "period": 100_000})
    );
    assert_eq!(resources["pids"]["limit"], 9);
    assert_eq!(spec["root"]["readonly"], true);
    let process = &spec["process"];
    assert_eq!(
        process["capabilities"]["bounding"],
        json!(["CAP_NET_ADMIN"])
    );
    // Not root's.
    assert_eq!(process["capabilities"]["effective"], json!([]));
    assert_eq!(
        process["user"],
        json!({"uid": 5, "gid": 6, "additionalGids": [7]})
    );
    assert_eq!(
        process["rlimits"],
        json!([{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}])
    );
    assert_eq!(process["noNewPrivileges"], true);
    assert_eq!(process["cwd"], "/srv");
    assert!(spec["linux"].get("seccomp").is_none());
    let is_ours = |mount: &&Value| mount["destination"] == "/t";
    let tmpfs = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .find(is_ours)
        .unwrap();
    assert!(
        tmpfs["options"]
            .as_array()
            .unwrap()
            .contains(&json!("size=1m"))
    );
    assert_eq!(
        spec["annotations"],
        json!({"a.b": "c", "io.husk.init": "true"})
    );
    // It is one, for the crate that the shim reads it with.
    serde_json::from_value::<oci_spec::runtime::Spec>(spec).unwrap();
}

#[test]
fn mistakes_are_told() {
    for words in [
        &["--memory", "1k", "x"][..],
        &["--memory", "many", "x"],
        &["--cpus", "0", "x"],
        &["--cap-add", "NOTHING", "x"],
        &["--ulimit", "nofile", "x"],
        &["--ulimit", "nofile=9:1", "x"],
        &["--security-opt", "apparmor=x", "x"],
        &["--security-opt", "seccomp=/nonexistent", "x"],
        &["--tmpfs", "relative", "x"],
        &["--annotation", "x", "x"],
        &["-w", "relative", "x"],
    ] {
        assert!(spec(words).is_err(), "{words:?}");
    }
}

proptest! {
    #[test]
    fn sizes_never_panic(text in "[0-9.kmgtbKMGTBi-]{0,12}") {
        // Whatever it is.
        let _ = bytes(&text);
    }
}

#[test]
fn sizes_are_read_as_docker_reads_them() {
    for (text, wanted) in [
        ("1", 1),
        ("2k", 2048),
        ("64m", 64 << 20),
        ("1.5g", 3 << 29),
        ("1GiB", 1 << 30),
        ("7b", 7),
    ] {
        assert_eq!(bytes(text).unwrap(), wanted, "{text}");
    }
    for text in ["", "m", "1x", "-1", "1.2.3m"] {
        assert!(bytes(text).is_err(), "{text}");
    }
}
