//! husk-vmm as a child process.
//!
//! The VMM opens nothing by itself: it inherits `/dev/kvm`, kernel, initramfs, the share's root, its end of the vsock bridge and the console's
//! pipe under fixed numbers, and gets the rest as one message on its control channel. It ends with that channel, so it cannot outlive
//! the shim.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd, RawFd},
        unix::process::ExitStatusExt as _,
    },
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use async_trait::async_trait;
use command_fds::{CommandFdExt as _, FdMapping};
use husk_protocol::{
    guest_path,
    vm::{Answer, CachePolicy, Call, LaunchTimes, ShareConfig, VERSION, VmConfig},
};
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::{
    net::unix::pipe,
    process::{Child, Command},
    runtime::Handle,
    sync::{mpsc, watch},
    time::timeout,
};
use tracing::{info, warn};

use crate::network::tap::Queues;

use super::{
    Driver, LaunchPlan, Machine, Spawned, VmEnd, VmError, bridge,
    console::{self, Tail},
    control::{Control, ControlError},
    preflight,
    seqpacket::Seqpacket,
};

/// Connections of the guest that wait to be taken care of.
const CONNECTION_QUEUE: usize = 64;

/// How long the last lines and words of a VMM that has ended may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long the VMM may take to give a network device its tap.
const ATTACH: Duration = Duration::from_secs(30);

/// How long the guest may take to plug memory: its driver does so at once, in pieces of 128 MiB, but may have to wait for a CPU.
const PLUG: Duration = Duration::from_secs(20);

// Fds of the VMM, by number. 0 to 2 are the standard ones.
const CONTROL_FD: RawFd = 3;
const KVM_FD: RawFd = 4;
const KERNEL_FD: RawFd = 5;
const INITRAMFS_FD: RawFd = 6;
const VSOCK_FD: RawFd = 7;
const SHARE_FD: RawFd = 8;
const CONSOLE_FD: RawFd = 9;
const USERS_FD: RawFd = 10;

/// Starts husk-vmm.
#[derive(Debug, Clone)]
pub struct HuskVmm {
    /// The binary.
    pub vmm: PathBuf,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initramfs: PathBuf,
    /// Cache policy of the share.
    pub cache: CachePolicy,
    /// For the log.
    pub pod: String,
}

/// A running husk-vmm.
struct Process {
    pid: u32,
    pidfd: OwnedFd,
    control: Arc<Control>,
    cache: CachePolicy,
    /// Its user namespace, where it has one.
    users_fd: Option<RawFd>,
    kernel: PathBuf,
    initramfs: PathBuf,
    console: Tail,
    ended: watch::Sender<Option<Arc<VmEnd>>>,
}

fn host(doing: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { doing, source }
}

impl Driver for HuskVmm {
    fn spawn(&self, share_root: OwnedFd, users: Option<OwnedFd>) -> Result<Spawned, VmError> {
        let vmm = preflight::open_file("VMM", "vmm", &self.vmm)?;
        drop(vmm);
        let kernel = preflight::open_file("guest kernel", "kernel", &self.kernel)?;
        let initramfs = preflight::open_file("initramfs", "initramfs", &self.initramfs)?;
        let kvm = preflight::open_kvm()?;
        let (control, control_fd) =
            Seqpacket::pair().map_err(host("make the VMM's control channel"))?;
        let (vsock, vsock_fd) = Seqpacket::pair().map_err(host("make the vsock bridge"))?;
        let (console_fd, console) =
            console_pipe().map_err(host("make the guest console's pipe"))?;
        let mapping = |parent_fd, child_fd| FdMapping {
            parent_fd,
            child_fd,
        };
        let users_fd = users.as_ref().map(|_| USERS_FD);
        let mut mappings = vec![
            mapping(control_fd, CONTROL_FD),
            mapping(kvm, KVM_FD),
            mapping(kernel, KERNEL_FD),
            mapping(initramfs, INITRAMFS_FD),
            mapping(vsock_fd, VSOCK_FD),
            mapping(share_root, SHARE_FD),
            mapping(console_fd, CONSOLE_FD),
        ];
        mappings.extend(users.map(|users| mapping(users, USERS_FD)));
        let mut command = Command::new(&self.vmm);
        command
            .arg("--control-fd")
            .arg(CONTROL_FD.to_string())
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .fd_mappings(mappings)
            .map_err(|e| VmError::Other(e.to_string()))?;
        let child = apart(|| command.spawn())
            .map_err(host("make a network and a PID namespace for the VMM"))?
            .map_err(|source| VmError::File {
                what: "VMM",
                path: self.vmm.clone(),
                key: "vmm",
                source,
            })?;
        // Its copies of the VMM's fds must go, or the end of the VMM would not be seen.
        drop(command);
        let control = Control::new(control);
        let machine = self.watch_over(child, control, console, users_fd)?;
        let (sender, connections) = mpsc::channel(CONNECTION_QUEUE);
        tokio::spawn(bridge::accept(vsock, sender));
        Ok(Spawned {
            machine,
            connections,
        })
    }
}

/// Does something in a new network namespace and beside a new PID namespace, for a process that is started there. The VMM has no
/// business on the host's network, nor with its processes, and an engine that goes to a task's network by its pid, as Docker does, must
/// not come upon the host's. The VMM cannot do this itself: only a new process is in a new PID namespace.
fn apart<T: Send>(start: impl FnOnce() -> T + Send) -> io::Result<T> {
    let runtime = Handle::current();
    thread::scope(|scope| {
        // A thread of its own: the shim's stay where they are.
        let inside = thread::Builder::new()
            .name("apart".into())
            .spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID)?;
                let _runtime = runtime.enter();
                Ok(start())
            })?;
        inside
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("its thread has failed")))
    })
}

/// How gladly the kernel kills this process when memory runs out (`process.oomScoreAdj` of the spec).
///
/// # Errors
/// When the process has gone, or the value is refused.
pub fn set_oom_score_adj(pid: u32, score: i32) -> io::Result<()> {
    fs::write(
        format!("/proc/{pid}/oom_score_adj"),
        score.clamp(-1000, 1000).to_string(),
    )
}

/// The write end for the VMM (blocking) and the read end for us.
fn console_pipe() -> io::Result<(OwnedFd, pipe::Receiver)> {
    let (sender, receiver) = pipe::pipe()?;
    Ok((sender.into_blocking_fd()?, receiver))
}

impl HuskVmm {
    /// From here on the process is reaped and its end told, whatever happens.
    fn watch_over(
        &self,
        mut child: Child,
        control: Arc<Control>,
        console: pipe::Receiver,
        users_fd: Option<RawFd>,
    ) -> Result<Arc<Process>, VmError> {
        let pid = child.id().unwrap_or_default();
        let pidfd = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|e| VmError::Host {
                doing: "watch the VMM process",
                source: e.into(),
            })?;
        let process = Arc::new(Process {
            pid,
            pidfd,
            control,
            cache: self.cache,
            users_fd,
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            console: Tail::default(),
            ended: watch::Sender::new(None),
        });
        let pod = self.pod.clone();
        let stderr_tail = Tail::default();
        let stderr = child.stderr.take();
        let stderr_task = {
            let (pod, tail) = (pod.clone(), stderr_tail.clone());
            tokio::spawn(async move {
                if let Some(stderr) = stderr {
                    console::follow(
                        stderr,
                        tail,
                        |line| info!(target: "husk_vmm", pod, "{line}"),
                    )
                    .await;
                }
            })
        };
        let console_task = {
            let (pod, tail) = (pod.clone(), process.console.clone());
            tokio::spawn(console::follow(
                console,
                tail,
                move |line| info!(target: "guest", pod, "{line}"),
            ))
        };
        let machine = Arc::clone(&process);
        tokio::spawn(async move {
            let status = child.wait().await;
            // The process is over: what it has said is in the sockets and pipes, so these end by themselves.
            let closed = timeout(LAST_WORDS, process.control.closed()).await.ok();
            let _ = timeout(LAST_WORDS, console_task).await;
            let _ = timeout(LAST_WORDS, stderr_task).await;
            let process_end = describe(&status, stderr_tail.lines().pop());
            let end = VmEnd::new(
                closed.and_then(|c| c.exit),
                process_end,
                process.console.lines(),
            );
            info!(pod, reason = end.reason, ?status, "VM ended");
            for line in &end.console {
                warn!(target: "guest", pod, "last console lines: {line}");
            }
            process.ended.send_replace(Some(Arc::new(end)));
        });
        Ok(machine)
    }
}

/// How the process ended, for a VMM that could not say so itself. Where it gave up on its own, its last word is the reason.
fn describe(status: &io::Result<ExitStatus>, last_word: Option<String>) -> String {
    match (status, last_word) {
        (Ok(status), _) if status.signal() == Some(libc::SIGSYS) => format!(
            "husk-vmm ended ({status}): it made a system call that its jail forbids, which the kernel's log (dmesg, audit type 1326) names"
        ),
        (Ok(status), _) if status.signal() == Some(libc::SIGSEGV) => format!(
            "husk-vmm ended ({status}): the guest had a device work on memory that it has not plugged, or husk has a bug"
        ),
        (Ok(status), Some(word)) if status.code().is_some_and(|code| code != 0) => {
            format!("husk-vmm ended ({status}): {word}")
        }
        (Ok(status), _) => format!("husk-vmm ended ({status})"),
        (Err(error), _) => format!("husk-vmm cannot be waited for: {error}"),
    }
}

/// What the end of the VMM looks like from its control channel.
const CLOSED: &str = "husk-vmm closed its control channel";

fn unexpected(answer: &Answer) -> VmError {
    VmError::Other(format!("husk-vmm gave an unexpected answer: {answer:?}"))
}

#[async_trait]
impl Machine for Process {
    fn pid(&self) -> u32 {
        self.pid
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<LaunchTimes, VmError> {
        preflight::check_memory(plan.size.memory_mib)?;
        let config = VmConfig {
            version: VERSION,
            id: plan.id,
            vcpus: plan.size.vcpus,
            max_vcpus: plan.max.vcpus,
            memory_mib: plan.size.memory_mib,
            max_memory_mib: plan.max.memory_mib,
            kvm_fd: KVM_FD,
            kernel_fd: KERNEL_FD,
            initramfs_fd: INITRAMFS_FD,
            kernel_params: plan.kernel_params,
            vsock_fd: VSOCK_FD,
            shares: vec![ShareConfig {
                tag: guest_path::SHARE_TAG.into(),
                root_fd: SHARE_FD,
                cache: self.cache,
            }],
            nics: plan.nics,
            console_fd: Some(CONSOLE_FD),
            user_namespace_fd: self.users_fd,
            debug_console: plan.debug_console,
        };
        match self.control.call(Call::Launch(Box::new(config))).await {
            Ok(Answer::Launched(times)) => Ok(times),
            Ok(other) => Err(unexpected(&other)),
            Err(ControlError::Refused(reason)) => Err(VmError::Refused {
                reason,
                kernel: self.kernel.clone(),
                initramfs: self.initramfs.clone(),
            }),
            Err(ControlError::Closed) => {
                let mut ended = self.ended();
                let end = timeout(LAST_WORDS * 3, ended.wait_for(Option::is_some)).await;
                let reason = match end {
                    Ok(Ok(end)) => end.as_ref().map(|end| end.reason.clone()),
                    _ => None,
                };
                Err(VmError::Ended(reason.unwrap_or_else(|| CLOSED.into())))
            }
        }
    }

    async fn attach_nic(&self, nic: u8, queues: Queues) -> Result<(), VmError> {
        let Queues { taps, vhosts } = queues;
        let vhost = !vhosts.is_empty();
        let fds = taps.into_iter().chain(vhosts).collect();
        let attached = self.control.call_with(Call::AttachNic { nic, vhost }, fds);
        let Ok(attached) = timeout(ATTACH, attached).await else {
            return Err(VmError::Other(format!(
                "husk-vmm did not connect the VM's network device {nic} within {ATTACH:?}"
            )));
        };
        match attached {
            Ok(Answer::Done) => Ok(()),
            Ok(other) => Err(unexpected(&other)),
            Err(ControlError::Refused(reason)) => Err(VmError::Other(format!(
                "husk-vmm cannot connect the VM's network device {nic}: {reason}"
            ))),
            Err(ControlError::Closed) => Err(VmError::Ended(CLOSED.into())),
        }
    }

    async fn set_memory(&self, from_mib: u64, to_mib: u64) -> Result<(), VmError> {
        preflight::check_memory(to_mib.saturating_sub(from_mib))?;
        let call = Call::SetMemory { target_mib: to_mib };
        let plugged = async {
            self.control.call(call).await?;
            self.control.memory_set(to_mib).await
        };
        match timeout(PLUG, plugged).await {
            Ok(result) => result.map_err(|e| VmError::Other(e.to_string())),
            Err(_) => Err(VmError::Unplugged(PLUG)),
        }
    }

    fn kill(&self) {
        match pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => warn!(pid = self.pid, %error, "cannot kill the VMM"),
        }
    }

    fn ended(&self) -> watch::Receiver<Option<Arc<VmEnd>>> {
        self.ended.subscribe()
    }

    fn console_tail(&self) -> Vec<String> {
        self.console.lines()
    }
}

#[cfg(test)]
mod tests {
    use husk_protocol::vm::VmExit;

    use super::*;

    #[test]
    fn the_reason_is_the_vmms_own_where_it_gave_one() {
        let tail = vec!["Kernel panic".to_owned()];
        let panic = VmEnd::new(
            Some(VmExit::GuestPanic { console: vec![] }),
            "status".into(),
            tail.clone(),
        );
        assert_eq!(panic.reason, "the guest kernel panicked");
        assert_eq!(panic.console, tail);
        assert!(
            VmEnd::new(Some(VmExit::PowerOff), String::new(), tail.clone())
                .console
                .is_empty()
        );
        assert_eq!(VmEnd::new(None, "signal 9".into(), tail).reason, "signal 9");
    }

    #[test]
    fn a_vmm_has_a_score_of_its_own() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let path = format!("/proc/{}/oom_score_adj", child.id());
        for (score, set) in [(500, "500"), (7000, "1000"), (0, "0")] {
            set_oom_score_adj(child.id(), score).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap().trim(), set);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn a_vmm_is_not_on_the_hosts_network_nor_among_its_processes() {
        let link = |path: String| std::fs::read_link(path).unwrap();
        for (namespace, childs) in [("net", "net"), ("pid", "pid_for_children")] {
            let own = link(format!("/proc/self/ns/{namespace}"));
            let mut command = Command::new("readlink");
            command
                .arg(format!("/proc/self/ns/{namespace}"))
                .stdout(Stdio::piped());
            let child = apart(|| command.spawn()).unwrap().unwrap();
            let output = child.wait_with_output().await.unwrap();
            let its = String::from_utf8(output.stdout).unwrap();
            assert!(its.starts_with(&format!("{namespace}:[")), "{its}");
            assert_ne!(its.trim(), own.to_str().unwrap());
            for whose in ["self", "thread-self"] {
                assert_eq!(link(format!("/proc/{whose}/ns/{childs}")), own);
            }
        }
    }

    /// How a shell that stands in for the VMM ended, in the shim's words.
    async fn end_of(script: &str, kill: bool) -> String {
        let driver = HuskVmm {
            vmm: "/bin/sh".into(),
            kernel: "/dev/null".into(),
            initramfs: "/dev/null".into(),
            cache: CachePolicy::Auto,
            pod: "p".into(),
        };
        let child = Command::new("/bin/sh")
            .args(["-c", script])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (ours, theirs) = Seqpacket::pair().unwrap();
        let (console_write, console_read) = console_pipe().unwrap();
        let process = driver
            .watch_over(child, Control::new(ours), console_read, None)
            .unwrap();
        drop((theirs, console_write));
        let mut ended = process.ended();
        if kill {
            process.kill();
        }
        let end = ended
            .wait_for(Option::is_some)
            .await
            .unwrap()
            .clone()
            .unwrap();
        process.kill();
        end.reason.clone()
    }

    #[tokio::test]
    async fn the_end_of_the_process_is_told() {
        let reason = end_of("echo broken >&2; exec sleep 60", true).await;
        assert!(reason.contains("signal: 9"), "{reason}");
    }

    /// However late its last word is read: here it comes after the process has ended.
    #[tokio::test]
    async fn a_vmm_that_gives_up_is_told_with_its_last_word() {
        let reason = end_of("(sleep 0.3; echo no such device >&2) & exit 1", false).await;
        assert!(reason.contains("exit status: 1"), "{reason}");
        assert!(reason.contains("no such device"), "{reason}");
    }

    #[tokio::test]
    async fn a_vmm_that_broke_out_of_its_calls_is_told_so() {
        let reason = end_of("kill -SYS $$", false).await;
        assert!(reason.contains("its jail forbids"), "{reason}");
    }

    #[tokio::test]
    async fn a_vmm_that_touched_what_is_not_there_is_told_so() {
        let reason = end_of("kill -SEGV $$", false).await;
        assert!(reason.contains("has not plugged"), "{reason}");
    }
}
