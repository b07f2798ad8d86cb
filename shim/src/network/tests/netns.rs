//! A network namespace of a test's own.

use std::{
    io,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread::{self, JoinHandle},
};

use nix::sched::{CloneFlags, unshare};

use crate::network::namespace::Namespace;

/// It lives as long as the thread that made it, so nothing is left behind.
pub struct Netns {
    path: PathBuf,
    keep: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Netns {
    pub fn new() -> Self {
        let (keep, end) = mpsc::channel();
        let (made, path) = mpsc::channel();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let thread = nix::unistd::gettid();
            made.send(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))
                .unwrap();
            // Until the other end is dropped.
            let _: Result<(), _> = end.recv();
        });
        let netns = Self {
            path: path.recv().unwrap().into(),
            keep: Some(keep),
            thread: Some(thread),
        };
        netns.ip("link set lo up");
        netns
    }

    /// This one and, joined to its `eth0` (10.0.0.2, fd00::2), another that has the `peer` (10.0.0.1, fd00::1). All up.
    pub fn pair() -> (Self, Self) {
        let (pod, outside) = (Self::new(), Self::new());
        outside.ip("link add peer type veth peer name eth0");
        pod.take(&outside, "eth0");
        outside.ip("addr add 10.0.0.1/24 dev peer");
        outside.ip("addr add fd00::1/64 dev peer nodad");
        outside.ip("link set peer up");
        pod.ip("addr add 10.0.0.2/24 dev eth0");
        pod.ip("addr add fd00::2/64 dev eth0 nodad");
        pod.ip("link set eth0 up");
        (pod, outside)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An interface of another one moves here.
    pub fn take(&self, from: &Self, interface: &str) {
        // `ip` takes a pid or a name below /run/netns. The thread's id is one to it.
        let thread = self.path.iter().nth(4).unwrap().to_str().unwrap();
        from.ip(&format!("link set {interface} netns {thread}"));
    }

    /// Runs `ip` inside; what it says.
    pub fn ip(&self, arguments: &str) -> String {
        self.command("ip", arguments)
    }

    /// Runs `tc` inside; what it says.
    pub fn tc(&self, arguments: &str) -> String {
        self.command("tc", arguments)
    }

    fn command(&self, program: &str, arguments: &str) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net={}", self.path.display()))
            .arg(program)
            .args(arguments.split_whitespace())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{program} {arguments}: {said}{error}"
        );
        said
    }

    /// Does something inside.
    pub async fn inside<T: Send + 'static>(
        &self,
        what: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> T {
        let namespace = Namespace::find(&self.path).unwrap();
        namespace.enter("test", what).await.unwrap()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.keep.take();
        self.thread.take().unwrap().join().unwrap();
    }
}
