//! A husk-vmm process and the test's end of its control channel, with a guest made for the test.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, PipeReader, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    process::{Child, Command},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use command_fds::{CommandFdExt as _, FdMapping};
use husk_tests::wait;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

use crate::context::Context;

const CONTROL: i32 = 3;
const KVM: i32 = 4;
const KERNEL: i32 = 5;
const INITRAMFS: i32 = 6;
const VSOCK: i32 = 7;
const CONSOLE: i32 = 8;
const MAX_PACKET: usize = 64 * 1024;

/// A husk-vmm that waits for its launch.
pub struct Vmm {
    child: Child,
    channel: OwnedFd,
    /// Our end of the vsock bridge: a guest that nobody answers.
    _bridge: OwnedFd,
    console: Option<BufReader<PipeReader>>,
    requests: u64,
}

/// Starts a program as the shim does: as the first of a PID namespace. The thread that asks for one ends here.
fn apart(mut command: Command) -> Result<Child> {
    let started = thread::scope(|scope| {
        let spawn = || {
            unshare(CloneFlags::CLONE_NEWPID)?;
            command.spawn()
        };
        scope.spawn(spawn).join()
    });
    Ok(started.map_err(|_| anyhow!("the thread has failed"))??)
}

/// What the guest is made from, and what runs it.
#[derive(Default)]
pub struct Guest<'a> {
    /// Shell script that is the guest's `/init`; `$b` is busybox.
    pub init: &'a str,
    /// Kernel, if not husk's.
    pub kernel: Option<&'a str>,
    /// VMM beside husk's, if not husk's.
    pub vmm: Option<&'a str>,
}

impl Vmm {
    /// Starts husk-vmm for a guest.
    pub fn start(context: &Context, guest: &Guest<'_>) -> Result<Self> {
        let lib = context.bin.join("../lib/husk");
        let kernel = match guest.kernel {
            Some(path) => path.into(),
            None => lib.join("vmlinux"),
        };
        let busybox = fs::read(context.rootfs.join("bin/busybox"))?;
        let mut initramfs = tempfile::NamedTempFile::new()?;
        initramfs.write_all(&archive(&busybox, guest.init))?;
        let (channel, theirs) = seqpacket()?;
        // A VMM that hangs must not hang the suite.
        let limit = TimeVal::new(wait::HANG.as_secs().try_into()?, 0);
        setsockopt(&channel, sockopt::ReceiveTimeout, &limit)?;
        let (bridge, vsock) = seqpacket()?;
        let (console, output) = std::io::pipe()?;
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
        let mapping = |parent_fd, child_fd| FdMapping {
            parent_fd,
            child_fd,
        };
        let mut command = Command::new(lib.join(guest.vmm.unwrap_or("husk-vmm")));
        command.args(["--control-fd", "3"]).fd_mappings(vec![
            mapping(theirs, CONTROL),
            mapping(kvm.into(), KVM),
            mapping(File::open(kernel)?.into(), KERNEL),
            mapping(File::open(initramfs.path())?.into(), INITRAMFS),
            mapping(vsock, VSOCK),
            mapping(output.into(), CONSOLE),
        ])?;
        let child = apart(command).context("cannot start husk-vmm")?;
        Ok(Self {
            child,
            channel,
            _bridge: bridge,
            console: Some(BufReader::new(console)),
            requests: 0,
        })
    }

    /// The configuration that fits what [`Vmm::start`] passed on.
    pub fn config(vcpus: u8, memory_mib: u64) -> Value {
        json!({
            "version": 4, "id": "e2e", "vcpus": vcpus, "max_vcpus": vcpus, "memory_mib": memory_mib,
            "max_memory_mib": memory_mib, "kvm_fd": KVM, "kernel_fd": KERNEL, "initramfs_fd": INITRAMFS,
            "kernel_params": "", "vsock_fd": VSOCK, "shares": [], "nics": [], "console_fd": CONSOLE,
            "debug_console": false,
        })
    }

    /// Sends one request and gives its outcome: the answer, or the error's text.
    pub fn call(&mut self, call: Value) -> Result<Result<Value, String>> {
        self.requests += 1;
        let packet = serde_json::to_vec(&json!({ "id": self.requests, "call": call }))?;
        send(self.channel.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL)?;
        let message = self.hear()?;
        let reply = &message["reply"];
        if reply["id"] != json!(self.requests) {
            bail!("not the reply to request {}: {message}", self.requests);
        }
        Ok(match &reply["result"]["Err"] {
            Value::String(text) => Err(text.clone()),
            _ => Ok(reply["result"]["Ok"].clone()),
        })
    }

    /// Sends a request that must succeed.
    pub fn ask(&mut self, call: Value) -> Result<Value> {
        match self.call(call.clone())? {
            Ok(answer) => Ok(answer),
            Err(text) => bail!("{call} failed: {text}"),
        }
    }

    fn hear(&self) -> Result<Value> {
        let mut packet = vec![0; MAX_PACKET];
        let len = recv(self.channel.as_raw_fd(), &mut packet, MsgFlags::empty())
            .context("nothing on the control channel")?;
        if len == 0 {
            bail!("husk-vmm closed the control channel");
        }
        Ok(serde_json::from_slice(&packet[..len])?)
    }

    /// Waits for the event that says how the VM ended.
    pub fn exited(&self) -> Result<Value> {
        let message = self.hear()?;
        match &message["event"]["exited"] {
            Value::Null => bail!("not the end of the VM: {message}"),
            exit => Ok(exit.clone()),
        }
    }

    /// Waits for the process and gives its exit code.
    pub fn exit_code(&mut self) -> Result<Option<i32>> {
        let status = wait::until("husk-vmm to end", || self.child.try_wait().ok().flatten())?;
        Ok(status.code())
    }

    /// Closes the test's end of the control channel, as a shim that dies does.
    pub fn hang_up(&mut self) -> Result<()> {
        let (other, _) = seqpacket()?;
        drop(std::mem::replace(&mut self.channel, other));
        Ok(())
    }

    /// Console lines up to one that starts with `prefix`, which comes last.
    pub fn console_until(&mut self, prefix: &str) -> Result<Vec<String>> {
        let console = self
            .console
            .as_mut()
            .context("the console was given away")?;
        let mut lines = Vec::new();
        for line in console.lines() {
            lines.push(line?.trim_end().to_owned());
            if lines.last().is_some_and(|line| line.starts_with(prefix)) {
                return Ok(lines);
            }
        }
        bail!("the console ended without {prefix:?}: {lines:#?}")
    }

    /// Console lines until the guest is no more.
    pub fn console_to_its_end(&mut self) -> Result<Vec<String>> {
        let console = self.console.take().context("the console was given away")?;
        let lines = console.lines();
        Ok(lines.collect::<Result<_, _>>()?)
    }

    /// CPU time that the guest has had in all its vCPUs, in clock ticks.
    pub fn guest_ticks(&self) -> Result<u64> {
        let mut ticks = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let dir = task?.path();
            if fs::read_to_string(dir.join("comm"))?.starts_with("vcpu") {
                let stat = fs::read_to_string(dir.join("stat"))?;
                // guest_time is field 43; field 2, the name, has no space. What the thread itself takes, on its way to
                // sleep for example, does not count.
                let guest_time = stat.split(' ').nth(42).context("no guest time")?;
                ticks += guest_time.parse::<u64>()?;
            }
        }
        Ok(ticks)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Already ended in a test that went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn seqpacket() -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// An initramfs ("newc" cpio) of busybox and an `/init` script.
fn archive(busybox: &[u8], init: &str) -> Vec<u8> {
    let script = format!("#!/busybox sh\nb=/busybox\n{init}\n");
    let mut archive = Vec::new();
    let files = [
        ("busybox", busybox),
        ("init", script.as_bytes()),
        ("TRAILER!!!", &[]),
    ];
    for (name, content) in files {
        archive.extend(b"070701");
        // Inode, mode, uid, gid, links, mtime, size, four device numbers, length of the name, checksum.
        let mode = 0o100_755;
        let fields = [
            0,
            mode,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        for field in fields {
            archive.extend(format!("{field:08x}").as_bytes());
        }
        for part in [&[name.as_bytes(), &[0]].concat(), content] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    }
    archive
}
