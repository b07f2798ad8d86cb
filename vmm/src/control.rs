//! The shim's channel: one VM's life as a conversation.
//!
//! The first request launches the VM, the others steer it, and the loop ends with the VM, the shim, or a stop. It waits for a
//! request or for the VM's end, and nothing is ever polled. Whatever ends the loop ends the process.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use husk_protocol::vm::{
    Answer, BadConfig, Call, Event, FromVmm, MAX_PACKET, Reply, Request, VERSION, VmConfig, VmExit,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};

use crate::jail;
use crate::parts::{Inherited, Parts};
use crate::rights::{self, Received};
use crate::sentence;
use crate::vm::Vm;

/// Why the conversation broke off.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Reading failed.
    #[error("cannot read from the control channel")]
    Receive(#[source] io::Error),
    /// Writing failed.
    #[error("cannot write to the control channel")]
    Send(#[source] io::Error),
    /// Waiting failed.
    #[error("cannot wait for the control channel")]
    Wait(#[source] io::Error),
    /// Not a request.
    #[error("the shim sent something that is not a request")]
    Malformed(#[source] serde_json::Error),
    /// Longer than a packet may be.
    #[error("the shim sent a packet longer than {MAX_PACKET} bytes")]
    TooLong,
    /// A message of ours could not be written as JSON.
    #[error("cannot encode a message")]
    Encode(#[source] serde_json::Error),
    /// The VM did not start; the shim has been told.
    #[error("the VM was not started: {0}")]
    Launch(String),
}

/// One end of the `SOCK_SEQPACKET` channel.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Speaks through `socket`.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// The next request and the descriptors beside it; `None` when the shim has closed its end.
    fn receive(&self) -> Result<Option<(Request, Beside)>, ControlError> {
        // One more than allowed, so that a longer packet is seen to be longer.
        let mut packet = vec![0; MAX_PACKET + 1];
        let Received { len, fds } = loop {
            match rights::receive(self.as_fd(), &mut packet, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(None),
                result => break result.map_err(|e| ControlError::Receive(e.into()))?,
            }
        };
        match packet.get(..len) {
            Some([]) => Ok(None),
            Some(packet) if len <= MAX_PACKET => match serde_json::from_slice(packet) {
                Ok(request) => Ok(Some((request, Beside(fds)))),
                Err(error) => {
                    if let Some((id, text)) = refusal(packet, &error) {
                        self.reply(id, Err(text))?;
                    }
                    Err(ControlError::Malformed(error))
                }
            },
            _ => Err(ControlError::TooLong),
        }
    }

    /// Sends a message; a shim that has gone is not an error here, the next [`Self::receive`] will tell.
    fn send(&self, message: &FromVmm) -> Result<(), ControlError> {
        let packet = serde_json::to_vec(message).map_err(ControlError::Encode)?;
        loop {
            match send(self.0.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL) {
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(()),
                result => return result.map(drop).map_err(|e| ControlError::Send(e.into())),
            }
        }
    }

    fn reply(&self, id: u64, result: Result<Answer, String>) -> Result<(), ControlError> {
        // JSON writes a control character as six bytes: an eighth of a packet always fits.
        let result = result.map_err(|mut text| {
            let end = text.floor_char_boundary(MAX_PACKET / 8);
            text.truncate(end);
            text
        });
        self.send(&FromVmm::Reply(Reply { id, result }))
    }

    fn exited(&self, exit: VmExit) -> Result<(), ControlError> {
        self.send(&FromVmm::Event(Event::Exited(exit)))
    }
}

/// The descriptors that came beside a request; `None` if some were lost. They are closed unless it takes them.
#[derive(Debug)]
struct Beside(Option<Vec<OwnedFd>>);

impl Beside {
    fn take(self) -> Result<Vec<OwnedFd>, String> {
        self.0.ok_or_else(|| {
            "not all of the descriptors beside the request arrived: husk-vmm has too many open"
                .into()
        })
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What to answer, under which id, to a packet that `error` says is no request. A shim of another version may well send fields
/// that are unknown here, and must hear that it is the version.
fn refusal(packet: &[u8], error: &serde_json::Error) -> Option<(u64, String)> {
    let packet: serde_json::Value = serde_json::from_slice(packet).ok()?;
    let id = packet.get("id")?.as_u64()?;
    let version = packet
        .pointer("/call/launch/version")
        .and_then(serde_json::Value::as_u64)
        .and_then(|version| u32::try_from(version).ok());
    let text = match version {
        Some(version) if version != VERSION => BadConfig::Version(version).to_string(),
        _ => format!("this is no request that husk-vmm knows: {error}"),
    };
    Some((id, text))
}

/// Serves one VM from its launch to its end. `started` is when the process began.
///
/// # Errors
/// The channel broke, or the VM could not be launched (of which the shim has been told).
pub fn serve(channel: &Channel, mut fds: Inherited, started: u64) -> Result<(), ControlError> {
    let Some(mut vm) = launch(channel, &mut fds, started)? else {
        tracing::info!("the shim went before it asked for a VM");
        return Ok(());
    };
    let exit = converse(channel, &mut vm);
    // A broken channel ends the VM like a closed one.
    let (exit, result) = match exit {
        Ok(exit) => (exit, Ok(())),
        Err(error) => (VmExit::Stopped, Err(error)),
    };
    vm.stop();
    vm.drain_console();
    tracing::info!(exit = ?exit, "the VM is over");
    let told = channel.exited(exit);
    // The process ends now, and takes every thread along. Dropping the VM would wait for file requests that the host's disk
    // holds up.
    std::mem::forget(vm);
    told.and(result)
}

/// Answers requests until one launches a VM.
fn launch(
    channel: &Channel,
    fds: &mut Inherited,
    started: u64,
) -> Result<Option<Vm>, ControlError> {
    loop {
        // What is launched names its descriptors by number: they were inherited.
        let Some((Request { id, call }, _)) = channel.receive()? else {
            return Ok(None);
        };
        let Call::Launch(config) = call else {
            channel.reply(id, Err("no VM has been launched yet".into()))?;
            continue;
        };
        match build(*config, fds, started) {
            Ok(vm) => {
                channel.reply(id, Ok(Answer::Launched(vm.launch_times())))?;
                return Ok(Some(vm));
            }
            Err(text) => {
                channel.reply(id, Err(text.clone()))?;
                return Err(ControlError::Launch(text));
            }
        }
    }
}

fn build(config: VmConfig, fds: &mut Inherited, started: u64) -> Result<Vm, String> {
    let users = fds.take_users(&config).map_err(|e| sentence(&e))?;
    let mut parts = Parts::inherit(config, fds).map_err(|e| sentence(&e))?;
    #[cfg(feature = "weakened")]
    crate::weakened::choose(&parts.kernel_params);
    jail::enter(&mut parts.shares, users).map_err(|e| sentence(&e))?;
    Vm::launch(parts, started).map_err(|e| sentence(&e))
}

/// Answers requests until the VM ends, is stopped, or the shim goes; says how it ended.
fn converse(channel: &Channel, vm: &mut Vm) -> Result<VmExit, ControlError> {
    loop {
        match wait(channel.as_fd(), vm.ended(), vm.memory_set())? {
            Ready::End => return Ok(vm.exit()),
            Ready::MemorySet => {
                if let Some(memory_mib) = vm.take_memory_set() {
                    channel.send(&FromVmm::Event(Event::MemorySet { memory_mib }))?;
                }
            }
            Ready::Request => match channel.receive()? {
                None => return Ok(VmExit::Stopped),
                Some((Request { id, call }, beside)) => {
                    let stop = matches!(call, Call::Stop);
                    channel.reply(id, answer(vm, call, beside))?;
                    if stop {
                        return Ok(VmExit::Stopped);
                    }
                }
            },
        }
    }
}

fn answer(vm: &mut Vm, call: Call, beside: Beside) -> Result<Answer, String> {
    match call {
        Call::Launch(_) => return Err("the VM has been launched already".into()),
        Call::Pause => vm.pause(),
        Call::Resume => vm.resume(),
        Call::SetBalloon { target_mib } => vm.set_balloon(target_mib).map_err(|e| sentence(&e))?,
        Call::AttachNic { nic, vhost } => {
            let mut taps = beside.take()?;
            let vhosts = if vhost {
                taps.split_off(taps.len() / 2)
            } else {
                Vec::new()
            };
            vm.attach_nic(nic, taps, vhosts).map_err(|e| sentence(&e))?;
        }
        Call::SetMemory { target_mib } => vm.set_memory(target_mib).map_err(|e| sentence(&e))?,
        Call::Info => return vm.info().map(Answer::Info).map_err(|e| sentence(&e)),
        Call::Stop => vm.stop(),
    }
    Ok(Answer::Done)
}

enum Ready {
    /// The VM has ended. Looked at first: what the shim asks now comes too late.
    End,
    /// The guest has the memory that it was to have.
    MemorySet,
    /// A request, or the end of the channel.
    Request,
}

fn wait(
    channel: BorrowedFd<'_>,
    ended: BorrowedFd<'_>,
    memory_set: Option<BorrowedFd<'_>>,
) -> Result<Ready, ControlError> {
    let mut fds = vec![
        PollFd::new(ended, PollFlags::POLLIN),
        PollFd::new(channel, PollFlags::POLLIN),
    ];
    fds.extend(memory_set.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(ControlError::Wait(error.into())),
            Ok(_) => break,
        }
    }
    let is_ready = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(true));
    Ok(match (is_ready(0), is_ready(2)) {
        (true, _) => Ready::End,
        (_, true) => Ready::MemorySet,
        _ => Ready::Request,
    })
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::RawFd;

    use husk_protocol::vm::FromVmm;
    use nix::sys::socket::{
        AddressFamily, ControlMessage, SockFlag, SockType, recv, sendmsg, socketpair,
    };

    use super::*;

    fn pair() -> (Channel, OwnedFd) {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        (Channel::new(ours), theirs)
    }

    fn say(shim: &OwnedFd, packet: &[u8]) {
        send(shim.as_raw_fd(), packet, MsgFlags::empty()).unwrap();
    }

    fn say_with(shim: &OwnedFd, packet: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let iov = [IoSlice::new(packet)];
        sendmsg::<()>(shim.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None).unwrap();
    }

    /// A pipe's two ends: reading from the first ends when every copy of the second is closed.
    fn pipe() -> (std::fs::File, OwnedFd) {
        let (reads, writes) = nix::unistd::pipe().unwrap();
        (reads.into(), writes)
    }

    fn hear(shim: &OwnedFd) -> FromVmm {
        let mut packet = vec![0; MAX_PACKET];
        let len = recv(shim.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
        serde_json::from_slice(&packet[..len]).unwrap()
    }

    fn error_text(message: FromVmm) -> (u64, String) {
        match message {
            FromVmm::Reply(Reply {
                id,
                result: Err(text),
            }) => (id, text),
            other => panic!("unexpected {other:?}"),
        }
    }

    #[test]
    fn a_shim_that_goes_ends_the_process_in_order() {
        let (channel, shim) = pair();
        drop(shim);
        serve(&channel, Inherited::default(), 0).unwrap();
    }

    #[test]
    fn nothing_comes_before_the_launch() {
        let (channel, shim) = pair();
        say(&shim, br#"{"id":7,"call":"pause"}"#);
        say(&shim, br#"{"id":8,"call":"info"}"#);
        nix::sys::socket::shutdown(shim.as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
        serve(&channel, Inherited::default(), 0).unwrap();
        for id in [7, 8] {
            assert_eq!(
                error_text(hear(&shim)),
                (id, "no VM has been launched yet".into())
            );
        }
    }

    #[test]
    fn descriptors_come_with_their_request() {
        let (channel, shim) = pair();
        let (mut end, writes) = pipe();
        let request = br#"{"id":7,"call":{"attach-nic":{"nic":1,"vhost":false}}}"#;
        say_with(&shim, request, &[writes.as_raw_fd(); 2]);
        say(&shim, request);
        drop(writes);
        for count in [2, 0] {
            let (Request { call, .. }, beside) = channel.receive().unwrap().unwrap();
            let vhost = false;
            assert_eq!(call, Call::AttachNic { nic: 1, vhost });
            assert_eq!(beside.take().unwrap().len(), count);
        }
        assert_eq!(
            io::Read::read(&mut end, &mut [0]).unwrap(),
            0,
            "none is left open"
        );
        assert!(Beside(None).take().unwrap_err().contains("not all"));
    }

    #[test]
    fn descriptors_that_no_request_takes_are_closed() {
        let (channel, shim) = pair();
        let (mut end, writes) = pipe();
        let fds = [writes.as_raw_fd()];
        for request in [
            &br#"{"id":1,"call":{"attach-nic":{"nic":0,"vhost":false}}}"#[..],
            br#"{"id":1,"call":"info"}"#,
        ] {
            say_with(&shim, request, &fds);
        }
        say_with(&shim, b"noise", &fds);
        drop(writes);
        assert!(matches!(
            serve(&channel, Inherited::default(), 0),
            Err(ControlError::Malformed(_))
        ));
        for _ in 0..2 {
            let (_, text) = error_text(hear(&shim));
            assert_eq!(text, "no VM has been launched yet");
        }
        assert_eq!(io::Read::read(&mut end, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_bad_configuration_is_answered_with_its_reason() {
        let (channel, shim) = pair();
        let config = VmConfig {
            version: husk_protocol::vm::VERSION,
            id: "pod".into(),
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 64,
            max_memory_mib: 64,
            kvm_fd: 1_000_000,
            kernel_fd: 1_000_001,
            initramfs_fd: 1_000_002,
            kernel_params: String::new(),
            vsock_fd: 1_000_003,
            shares: Vec::new(),
            nics: Vec::new(),
            console_fd: None,
            user_namespace_fd: None,
            debug_console: false,
        };
        let call = Call::Launch(Box::new(config));
        say(
            &shim,
            &serde_json::to_vec(&Request { id: 1, call }).unwrap(),
        );
        assert!(matches!(
            serve(&channel, Inherited::default(), 0),
            Err(ControlError::Launch(_))
        ));
        let (id, text) = error_text(hear(&shim));
        assert_eq!(id, 1);
        assert!(
            text.contains("kvm_fd is fd 1000000, which is not open"),
            "{text}"
        );
    }

    #[test]
    fn what_is_no_request_is_answered_if_it_has_an_id() {
        let launch = |version: u32| {
            format!(r#"{{"id":4,"call":{{"launch":{{"version":{version},"surprise":1}}}}}}"#)
        };
        for (packet, says) in [
            (launch(VERSION + 1), "install both from one release"),
            (launch(VERSION), "unknown field `surprise`"),
            (r#"{"id":4,"call":"dance"}"#.into(), "dance"),
            (r#"{"id":4}"#.into(), "call"),
        ] {
            let (channel, shim) = pair();
            say(&shim, packet.as_bytes());
            assert!(matches!(
                serve(&channel, Inherited::default(), 0),
                Err(ControlError::Malformed(_))
            ));
            let (id, text) = error_text(hear(&shim));
            assert_eq!(id, 4);
            assert!(text.contains(says), "{text}");
        }
    }

    #[test]
    fn noise_on_the_channel_is_an_error() {
        for noise in [
            &b"hello"[..],
            br#"{"id":1,"call":"dance"}"#,
            &[b' '; MAX_PACKET + 1],
        ] {
            let (channel, shim) = pair();
            say(&shim, noise);
            assert!(matches!(
                serve(&channel, Inherited::default(), 0),
                Err(ControlError::Malformed(_) | ControlError::TooLong)
            ));
        }
    }

    #[test]
    fn an_endless_error_still_fits_a_packet() {
        let (channel, shim) = pair();
        for bit in ["\"ä", "\u{1}"] {
            channel.reply(3, Err(bit.repeat(MAX_PACKET))).unwrap();
            assert_eq!(error_text(hear(&shim)).0, 3);
        }
    }
}
