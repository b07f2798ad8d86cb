//! What reaches the agent: specs, paths in a container's root file system, volumes, networks. No path leads out of its root, a volume becomes
//! what was asked for or an error, and a spec that is taken has what the rest of the agent counts on.
#![no_main]

use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::{MetadataExt as _, symlink},
        },
    },
    path::{Path, PathBuf},
    sync::OnceLock,
};

use husk_agent::{
    container::fuzzing,
    net,
    volume::{Plan, Volumes},
};
use husk_fuzz::sandbox::Sandbox;
use husk_protocol::agent::{
    ContainerStatsResponse, Event, Network, SyncVolumeRequest, VolumeEntry, WaitProcessResponse,
    volume_entry::Content,
};
use libfuzzer_sys::fuzz_target;
use nix::{sys::stat::Mode, unistd::mkfifo};
use protobuf::Message;
use serde_json::{Value, json};

#[derive(arbitrary::Arbitrary, Debug)]
enum Input {
    Spec {
        changes: Vec<(Field, Json)>,
        exec: Json,
    },
    Text(Vec<u8>),
    Files(Files),
    Network(Vec<u8>),
    Answer(Vec<u8>),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Files {
    Walk {
        /// What a container has put where.
        made: Vec<Made>,
        paths: Vec<(Text, Make)>,
    },
    Volume {
        made: Vec<Made>,
        syncs: Vec<Sync>,
    },
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Make {
    Nothing,
    Directory,
    File,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Made {
    dir: u8,
    name: u8,
    what: What,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum What {
    Link(Text),
    File(u8),
    Directory,
    Fifo,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Sync {
    id: Text,
    entries: Vec<Entry>,
    made: Vec<Made>,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Entry {
    path: Text,
    mode: u16,
    owner: u8,
    kind: Kind,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Kind {
    Directory,
    File(Vec<u8>),
    Link(Text),
}

/// A path.
#[derive(arbitrary::Arbitrary, Debug)]
enum Text {
    One(u8),
    Two(u8, u8),
    Three(u8, u8, u8),
    Absolute(u8, u8),
    Out(u8),
    Empty,
    Any(Vec<u8>),
}

const NAMES: [&str; 16] = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "..data",
    "a",
    "b",
    "..",
    ".",
    "d",
    "..data_tmp",
    "..2024",
    "d",
    "e",
    "c",
];

impl Text {
    fn bytes(&self) -> Vec<u8> {
        let name = |which: &u8| NAMES[usize::from(which % 16)];
        match self {
            Self::One(one) => name(one).into(),
            Self::Two(one, two) => format!("{}/{}", name(one), name(two)).into(),
            Self::Three(one, two, three) => {
                format!("{}/{}/{}", name(one), name(two), name(three)).into()
            }
            Self::Absolute(one, two) => format!("/{}/{}", name(one), name(two)).into(),
            Self::Out(which) => {
                let out = [
                    "/outside",
                    "/outside/file",
                    "../../outside/dir",
                    "../../../beside",
                ];
                out[usize::from(which % 4)].into()
            }
            Self::Empty => Vec::new(),
            Self::Any(bytes) => bytes.clone(),
        }
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(std::ffi::OsString::from_vec(self.bytes()))
    }
}

fuzz_target!(|input: Input| {
    match input {
        Input::Spec { changes, exec } => spec(&changes, &exec),
        Input::Text(text) => text_of_any_kind(&text),
        Input::Files(files) => {
            static SANDBOX: OnceLock<Sandbox<Files>> = OnceLock::new();
            SANDBOX.get_or_init(|| Sandbox::new(work)).give(files);
        }
        Input::Network(bytes) => {
            if let Ok(network) = Network::parse_from_bytes(&bytes) {
                let _ = net::Config::new(network).map_err(|error| error.to_string());
            }
        }
        Input::Answer(bytes) => {
            comes_back::<WaitProcessResponse>(&bytes);
            comes_back::<ContainerStatsResponse>(&bytes);
            comes_back::<Event>(&bytes);
        }
    }
});

/// A message is read as what it says, or not at all.
fn comes_back<T: Message>(bytes: &[u8]) {
    if let Ok(message) = T::parse_from_bytes(bytes) {
        let again = message.write_to_bytes().unwrap();
        assert!(T::parse_from_bytes(&again).unwrap() == message);
    }
}

fn text_of_any_kind(text: &[u8]) {
    let _ = fuzzing::resources(text).map_err(|error| error.to_string());
    let _ = fuzzing::spec(text, text).map_err(|error| error.to_string());
    if let Ok(id) = str::from_utf8(text)
        && fuzzing::id(id).is_ok()
    {
        // It becomes a directory of its own.
        let path = Path::new("/base").join(id);
        assert_eq!(path.parent(), Some(Path::new("/base")));
        assert_eq!(path.file_name(), Some(id.as_ref()));
    }
}

#[derive(arbitrary::Arbitrary, Debug, Clone, Copy)]
enum Field {
    Args,
    Cwd,
    Env,
    User,
    Bounding,
    Rlimits,
    Mounts,
    MountOptions,
    MountDestination,
    Namespaces,
    Namespace,
    Mappings,
    Sysctl,
    Resources,
    Devices,
    Seccomp,
    SeccompCalls,
    SeccompArguments,
    Masked,
    Propagation,
    Hooks,
    Root,
    Process,
    Linux,
    Hostname,
    TimeOffsets,
    Annotations,
}

/// What a field may be.
#[derive(arbitrary::Arbitrary, Debug)]
enum Json {
    Null,
    Number(i64),
    Large(u64),
    Bool(bool),
    Word(u8),
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(u8, Json)>),
}

/// Words that mean something somewhere in a spec.
const WORDS: [&str; 48] = [
    "mount",
    "pid",
    "network",
    "user",
    "uts",
    "ipc",
    "cgroup",
    "time",
    "/proc",
    "/",
    "/a",
    "proc",
    "bind",
    "rbind",
    "ro",
    "nosuid",
    "rslave",
    "tmpcopyup",
    "mode=755",
    "CAP_SYS_ADMIN",
    "CAP_NONE",
    "type",
    "path",
    "options",
    "source",
    "destination",
    "names",
    "action",
    "args",
    "op",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_ALLOW",
    "SCMP_CMP_EQ",
    "SCMP_CMP_MASKED_EQ",
    "index",
    "value",
    "valueTwo",
    "read",
    "clone",
    "hostID",
    "containerID",
    "size",
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_forward",
    "uid",
    "gid",
    "major",
    "minor",
];

impl Json {
    fn value(&self, depth: u8) -> Value {
        match self {
            Self::Number(number) => (*number).into(),
            Self::Large(number) => (*number).into(),
            Self::Bool(flag) => (*flag).into(),
            Self::Word(which) => WORDS[usize::from(*which) % WORDS.len()].into(),
            Self::Text(text) => text.clone().into(),
            Self::Array(all) if depth < 6 => all.iter().map(|one| one.value(depth + 1)).collect(),
            Self::Object(all) if depth < 6 => {
                let field = |(key, one): &(u8, Self)| {
                    let key = WORDS[usize::from(*key) % WORDS.len()];
                    (key.to_owned(), one.value(depth + 1))
                };
                Value::Object(all.iter().map(field).collect())
            }
            _ => Value::Null,
        }
    }
}

/// A spec as engines write it, in which each part may be changed.
fn usual() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": { "path": "/run/husk/share/c/rootfs", "readonly": true },
        "hostname": "pod",
        "process": {
            "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/", "env": ["PATH=/bin"],
            "capabilities": { "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }]
        },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec"] }],
        "annotations": { "io.husk.init": "true" },
        "linux": {
            "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "uts" }],
            "resources": { "memory": { "limit": 1 << 20 }, "devices": [{ "allow": false, "access": "rwm" }] },
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{ "names": ["read", "clone"], "action": "SCMP_ACT_ALLOW",
                    "args": [{ "index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ" }] }]
            },
            "maskedPaths": ["/proc/kcore"], "sysctl": { "kernel.shm_rmid_forced": "1" }
        }
    })
}

impl Field {
    fn place(self) -> &'static str {
        match self {
            Self::Args => "/process/args",
            Self::Cwd => "/process/cwd",
            Self::Env => "/process/env",
            Self::User => "/process/user",
            Self::Bounding => "/process/capabilities/bounding",
            Self::Rlimits => "/process/rlimits",
            Self::Mounts => "/mounts",
            Self::MountOptions => "/mounts/0/options",
            Self::MountDestination => "/mounts/0/destination",
            Self::Namespaces => "/linux/namespaces",
            Self::Namespace => "/linux/namespaces/1",
            Self::Mappings => "/linux/uidMappings",
            Self::Sysctl => "/linux/sysctl",
            Self::Resources => "/linux/resources",
            Self::Devices => "/linux/resources/devices",
            Self::Seccomp => "/linux/seccomp",
            Self::SeccompCalls => "/linux/seccomp/syscalls",
            Self::SeccompArguments => "/linux/seccomp/syscalls/0/args/0",
            Self::Masked => "/linux/maskedPaths",
            Self::Propagation => "/linux/rootfsPropagation",
            Self::Hooks => "/hooks",
            Self::Root => "/root/path",
            Self::Process => "/process",
            Self::Linux => "/linux",
            Self::Hostname => "/hostname",
            Self::TimeOffsets => "/linux/timeOffsets",
            Self::Annotations => "/annotations",
        }
    }
}

fn spec(changes: &[(Field, Json)], exec: &Json) {
    let mut tree = usual();
    for (field, json) in changes.iter().take(16) {
        let place = field.place();
        if let Some(old) = tree.pointer_mut(place) {
            *old = json.value(0);
        } else if let Some((parent, name)) = place.rsplit_once('/')
            && let Some(fields) = tree.pointer_mut(parent).and_then(Value::as_object_mut)
        {
            fields.insert(name.to_owned(), json.value(0));
        }
    }
    let written = serde_json::to_vec(&tree).unwrap();
    let exec = serde_json::to_vec(&exec.value(0)).unwrap();
    match fuzzing::spec(&written, &exec) {
        Ok((spec, exec)) => {
            assert!(spec.root().as_ref().unwrap().path().is_absolute());
            let process = [spec.process().as_ref(), exec.as_ref().ok()];
            for process in process.into_iter().flatten() {
                assert!(!process.args().as_ref().unwrap().is_empty());
                assert!(process.cwd().is_absolute());
                let strings = process.args().iter().chain(process.env()).flatten();
                assert!(strings.into_iter().all(|text| !text.contains('\0')));
            }
            if let Err(error) = exec {
                let _ = error.to_string();
            }
        }
        Err(error) => drop(error.to_string()),
    }
}

fn work(dir: &Path, files: Files) {
    // `/inside/N/beside` is there to be hit as well.
    fs::create_dir(dir.join("beside")).unwrap();
    let root = dir.join("root");
    match files {
        Files::Walk { made, paths } => {
            make(&root, &made);
            walk(&root, &paths);
        }
        Files::Volume { made, syncs } => {
            for sync in syncs.iter().take(8) {
                volume(&root, sync, &made);
            }
        }
    }
    let beside = fs::read_dir(dir.join("beside")).unwrap().count();
    assert_eq!(beside, 0, "it made something beside its root");
}

/// What a container has made of its directory. Nothing here follows a link.
fn make(root: &Path, all: &[Made]) {
    let _ = fs::create_dir_all(root.join("d/e"));
    for Made { dir, name, what } in all.iter().take(24) {
        let dir = root.join(["", "d", "d/e"][usize::from(dir % 3)]);
        let is_real = dir
            .ancestors()
            .take_while(|dir| *dir != root)
            .all(|dir| fs::symlink_metadata(dir).is_ok_and(|stat| stat.is_dir()));
        if !is_real || fs::symlink_metadata(&dir).is_err() {
            continue;
        }
        let path =
            dir.join(["a", "b", "c", "d", "e", "..data", "..data_tmp"][usize::from(name % 7)]);
        let _ = match what {
            What::Link(target) => symlink(target.path(), path),
            What::File(size) => match fs::symlink_metadata(&path) {
                Ok(_) => Ok(()),
                Err(_) => fs::write(path, vec![1; usize::from(*size)]),
            },
            What::Directory => fs::create_dir(path),
            What::Fifo => mkfifo(&path, Mode::S_IRWXU).map_err(Into::into),
        };
    }
}

fn walk(root: &Path, paths: &[(Text, Make)]) {
    let base = fs::File::open(root).unwrap();
    for (path, make) in paths.iter().take(16) {
        let path = path.path();
        if path.as_os_str().as_bytes().contains(&0) {
            continue;
        }
        let make = match make {
            Make::Nothing => None,
            Make::Directory => Some(true),
            Make::File => Some(false),
        };
        if let Ok(found) = fuzzing::walk(base.as_fd(), &path, make) {
            let real = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).unwrap();
            assert!(real.starts_with(root), "{path:?} leads to {real:?}");
            let stat = fs::metadata(format!("/proc/self/fd/{}", found.as_raw_fd()));
            assert!(stat.is_ok());
        }
    }
}

fn volume(base: &Path, sync: &Sync, before: &[Made]) {
    let id = String::from_utf8_lossy(&sync.id.bytes()).into_owned();
    let mut request = SyncVolumeRequest {
        volume_id: id.clone(),
        ..Default::default()
    };
    request.entries.push(VolumeEntry {
        mode: 0o755,
        ..Default::default()
    });
    for entry in sync.entries.iter().take(32) {
        let content = match &entry.kind {
            Kind::Directory => None,
            Kind::File(bytes) => Some(Content::File(bytes.clone())),
            Kind::Link(text) => Some(Content::Link(text.bytes())),
        };
        request.entries.push(VolumeEntry {
            path: entry.path.bytes(),
            mode: u32::from(entry.mode),
            uid: u32::from(entry.owner),
            gid: u32::from(entry.owner),
            content,
            ..Default::default()
        });
    }
    let plan = match Plan::new(request.clone()) {
        Ok(plan) => plan,
        Err(error) => return drop(error.to_string()),
    };
    let root = base.join(&id);
    assert_eq!(root.parent(), Some(base), "an id that is no name");
    let _ = fs::create_dir_all(base);
    if fs::symlink_metadata(&root).is_ok_and(|stat| stat.is_dir()) {
        make(&root, before);
        make(&root, &sync.made);
    }
    match Volumes::new(base).sync(&plan) {
        Ok(()) => is_so(&root, &request),
        Err(error) => drop(error.to_string()),
    }
}

/// The volume is what was asked for, and nothing else is in it.
fn is_so(root: &Path, request: &SyncVolumeRequest) {
    let mut wanted: BTreeMap<PathBuf, &VolumeEntry> = BTreeMap::new();
    for entry in &request.entries {
        let path = std::ffi::OsStr::from_bytes(&entry.path);
        wanted.insert(root.join(path), entry);
    }
    let mut dirs = vec![root.to_owned()];
    let mut count = 1;
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            assert!(wanted.contains_key(&path), "{path:?} is there as well");
            count += 1;
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                dirs.push(path);
            }
        }
    }
    assert_eq!(count, request.entries.len());
    for (path, entry) in wanted {
        let stat = fs::symlink_metadata(&path).unwrap();
        match &entry.content {
            Some(Content::Link(text)) => {
                assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), text);
                continue;
            }
            Some(Content::File(bytes)) => assert_eq!(&fs::read(&path).unwrap(), bytes),
            _ => assert!(stat.is_dir()),
        }
        assert_eq!(stat.mode() & 0o7777, entry.mode);
        assert_eq!((stat.uid(), stat.gid()), (entry.uid, entry.gid));
    }
}
