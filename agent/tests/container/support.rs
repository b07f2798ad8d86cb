//! A rootfs, a spec to vary, and a container to run.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, Once};
use std::thread;
use std::time::Duration;

use husk_agent::container::{Container, Io, LaunchError, Launched, StdioFds, use_executable};
use nix::sys::wait::{WaitStatus, waitpid};
use serde_json::{Value, json};

static SET_UP: Once = Once::new();
static ENDED: Mutex<BTreeMap<i32, i32>> = Mutex::new(BTreeMap::new());
static CHANGED: Condvar = Condvar::new();
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// What a process left behind.
#[derive(Debug)]
pub struct Output {
    /// The exit code, 128+n for a signal.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A bundle: a rootfs and the spec for a container in it.
pub struct Bundle {
    pub directory: Arc<tempfile::TempDir>,
    pub id: String,
    pub spec: Value,
}

/// A container that waits at its gate, with our ends of its streams.
pub struct Waiting {
    pub container: Container,
    pub launched: Launched,
    pub streams: Streams,
}

/// Our ends of a process's output.
pub struct Streams {
    /// Keeps the rootfs.
    _directory: Option<Arc<tempfile::TempDir>>,
    stdout: io::PipeReader,
    stderr: io::PipeReader,
}

impl Bundle {
    /// A busybox rootfs and a spec like containerd's default, running `args`.
    pub fn new(args: &[&str]) -> Self {
        SET_UP.call_once(|| {
            use_executable(PathBuf::from(env!("CARGO_BIN_EXE_husk-agent")));
            nix::sys::prctl::set_child_subreaper(true).unwrap();
            thread::spawn(reap);
        });
        let directory = Arc::new(tempfile::tempdir().unwrap());
        let root = directory.path().join("rootfs");
        for name in ["bin", "etc", "proc", "sys", "dev", "tmp", "root"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "echo", "id", "ls", "mkdir", "mount", "umount", "ps", "stat", "sleep",
            "touch", "hostname", "env", "pwd", "tty", "stty", "readlink", "ip", "mknod", "dd",
            "test", "grep", "head", "wc", "uname", "chmod", "kill", "true", "unshare", "date",
            "ln", "tr", "yes", "nproc", "cut",
        ] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/var/www:/bin/sh\n",
        )
        .unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\nlogs:x:4:www\n").unwrap();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        Self {
            id: format!("test-{}-{number}", std::process::id()),
            spec: default_spec(&root, args),
            directory,
        }
    }

    /// One that runs a shell script.
    pub fn sh(script: &str) -> Self {
        Self::new(&["/bin/sh", "-c", script])
    }

    /// The rootfs.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// Sets a field by its JSON pointer.
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match self.spec.pointer_mut(parent).unwrap() {
            Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
            object => object[key] = value,
        }
        self
    }

    /// Adds a mount.
    pub fn with_mount(mut self, mount: Value) -> Self {
        self.spec["mounts"].as_array_mut().unwrap().push(mount);
        self
    }

    /// Drops a namespace of the default spec.
    pub fn without_namespace(mut self, name: &str) -> Self {
        self.spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .retain(|namespace| namespace["type"] != name);
        self
    }

    /// Adds a namespace, or replaces it.
    pub fn with_namespace(self, namespace: Value) -> Self {
        let mut changed = self.without_namespace(namespace["type"].as_str().unwrap());
        changed.spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(namespace);
        changed
    }

    /// Creates the container, up to its gate.
    pub async fn create(&self) -> Result<Waiting, LaunchError> {
        self.create_joining(None).await
    }

    /// Creates one that may join another's namespaces.
    pub async fn create_joining(&self, joined: Option<&Container>) -> Result<Waiting, LaunchError> {
        let (io, mut streams) = pipes();
        streams._directory = Some(Arc::clone(&self.directory));
        let (container, launched) =
            Container::create(&self.id, self.spec.to_string().as_bytes(), io, joined).await?;
        Ok(Waiting {
            container,
            launched,
            streams,
        })
    }

    /// Runs it to its end and deletes it.
    pub async fn run(&self) -> Output {
        let waiting = self.create().await.unwrap();
        let output = waiting.streams.finish(waiting.launched).await.unwrap();
        waiting.container.delete().await.unwrap();
        output
    }

    /// The error that creating it ends in; checks that nothing stays behind.
    pub async fn fail(&self) -> LaunchError {
        let error = self.create().await.err().unwrap();
        assert!(!cgroup_exists(&self.id), "a cgroup stayed behind");
        error
    }
}

impl Waiting {
    /// Lets the init run; the container stays.
    pub async fn start(self) -> (Container, i32, Streams) {
        let pid = self.launched.pid;
        self.launched.gate.release().await.unwrap();
        (self.container, pid, self.streams)
    }
}

impl Streams {
    /// Lets the process run, and collects what it leaves.
    pub async fn finish(self, launched: Launched) -> Result<Output, LaunchError> {
        let pid = launched.pid;
        let released = launched.gate.release().await;
        if released.is_err() {
            wait(pid);
        }
        released?;
        Ok(self.collect(pid).await)
    }

    /// Reads to the end and waits.
    pub async fn collect(self, pid: i32) -> Output {
        let read = |mut reader: io::PipeReader| {
            thread::spawn(move || {
                let mut text = Vec::new();
                reader.read_to_end(&mut text).unwrap();
                String::from_utf8_lossy(&text).into_owned()
            })
        };
        let (stdout, stderr) = (read(self.stdout), read(self.stderr));
        tokio::task::spawn_blocking(move || Output {
            stdout: stdout.join().unwrap(),
            stderr: stderr.join().unwrap(),
            code: wait(pid),
        })
        .await
        .unwrap()
    }

    /// Reads one line.
    pub fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while self.stdout.read(&mut byte).unwrap() == 1 && byte != [b'\n'] {
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }
}

/// Runs a further process to its end.
pub async fn exec(container: &Container, process: Value) -> Result<Output, LaunchError> {
    let (io, streams) = pipes();
    let launched = container.exec(process.to_string().as_bytes(), io).await?;
    streams.finish(launched).await
}

/// Runs a further shell script to its end.
pub async fn exec_sh(container: &Container, script: &str) -> Output {
    exec(container, json!({"args": ["/bin/sh", "-c", script]}))
        .await
        .unwrap()
}

/// Kills what runs and deletes.
pub async fn destroy(container: Container, pid: i32) {
    container.cgroup().kill().unwrap();
    tokio::task::spawn_blocking(move || wait(pid))
        .await
        .unwrap();
    container.delete().await.unwrap();
}

/// Streams for a process, and our ends.
pub fn pipes() -> (Io, Streams) {
    let (stdout, child_stdout) = io::pipe().unwrap();
    let (stderr, child_stderr) = io::pipe().unwrap();
    let stdin = OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let io = Io::Pipes(StdioFds {
        stdin,
        stdout: child_stdout.into(),
        stderr: child_stderr.into(),
    });
    let streams = Streams {
        _directory: None,
        stdout,
        stderr,
    };
    (io, streams)
}

/// Waits for a process, which becomes ours when the one that made it has ended.
pub fn wait(pid: i32) -> i32 {
    let mut ended = ENDED.lock().unwrap();
    loop {
        if let Some(code) = ended.remove(&pid) {
            return code;
        }
        ended = CHANGED.wait(ended).unwrap();
    }
}

/// Reaps every child, as PID 1 does: a pid namespace only ends when all its zombies are gone.
fn reap() {
    loop {
        let (pid, code) = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
            Ok(_) => continue,
            // None at the moment.
            Err(_) => {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
        };
        ENDED.lock().unwrap().insert(pid.as_raw(), code);
        CHANGED.notify_all();
    }
}

/// Where this machine has cgroup v2.
pub fn cgroup_root() -> PathBuf {
    let unified = Path::new("/sys/fs/cgroup/unified");
    if unified.exists() {
        unified.to_owned()
    } else {
        PathBuf::from("/sys/fs/cgroup")
    }
}

fn cgroup_exists(id: &str) -> bool {
    cgroup_root().join("containers").join(id).exists()
}

fn default_spec(root: &Path, args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": root},
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": args,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": "/default/test",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
                {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "seccomp": serde_json::from_str::<Value>(include_str!("../../../deploy/seccomp-default.json")).unwrap(),
        },
    })
}
