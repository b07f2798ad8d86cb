//! A terminal: the container has one, it has the client's size, and follows when that changes.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    process::{Child, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{ctr::exit_code, wait};
use nix::{
    pty::{Winsize, openpty},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Test, context::Context, test};

pub const TESTS: &[Test] = &[
    test("has_a_terminal_and_follows_its_size", follows_size),
    test("exec_with_a_terminal", exec_with_a_terminal),
    test("control_c_interrupts", control_c),
];

/// `ctr`, or `husk`, on a pseudo-terminal of ours.
pub struct Session {
    child: Child,
    master: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, Winsize);

pub const fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Session {
    pub fn start(command: &mut std::process::Command, initial: Winsize) -> Result<Self> {
        let pty = openpty(Some(&initial), None)?;
        let slave: OwnedFd = pty.slave;
        let child = command
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave))
            .spawn()
            .context("starting ctr on a terminal")?;
        let master = File::from(pty.master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, all) = (master.try_clone()?, Arc::clone(&seen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                all.extend(buffer.iter().take(n));
            }
        });
        Ok(Self {
            child,
            master,
            seen,
        })
    }

    pub fn type_in(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    fn text(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&seen).into_owned()
    }

    pub fn expect(&self, part: &str) -> Result<()> {
        wait::until(&format!("{part:?} on the terminal"), || {
            self.text().contains(part).then_some(())
        })
        .with_context(|| format!("the terminal shows:\n{}", self.text()))
    }

    #[allow(unsafe_code, reason = "an ioctl on a pty of ours")]
    pub fn resize(&self, to: Winsize) -> Result<()> {
        // SAFETY: the fd is an open pty and `to` a valid winsize that outlives the call.
        unsafe { set_size(self.master.as_raw_fd(), &raw const to) }?;
        // It is not ctr's controlling terminal, so the kernel tells nobody.
        kill(
            Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGWINCH,
        )?;
        Ok(())
    }

    pub fn finish(mut self) -> Result<i32> {
        let status = wait::until("ctr to end", || self.child.try_wait().transpose())
            .with_context(|| format!("the terminal shows:\n{}", self.text()));
        if status.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        Ok(exit_code(status??))
    }
}

fn follows_size(suite: &Context) -> Result<()> {
    let id = suite.containerd.fresh_id("tty");
    let mut command = suite
        .containerd
        .run_command(suite.runtime, &id, &["--rm", "--tty"], &["sh"]);
    let mut session = Session::start(&mut command, size(33, 77))?;
    is_terminal_of_size(&mut session)?;
    session.type_in("exit 7\n")?;
    let code = session.finish()?;
    ensure!(code == 7, "exit code {code}");
    Ok(())
}

/// A shell that was started at 33 lines of 77 columns has a terminal of that size, and of the next one.
pub fn is_terminal_of_size(session: &mut Session) -> Result<()> {
    session.type_in("tty\n")?;
    session.expect("/dev/pts/0")?;
    has_size(session, "33 77")?;
    session.resize(size(44, 99))?;
    has_size(session, "44 99")
}

/// The container's terminal gets this size: ctr tells it a moment after the start.
pub fn has_size(session: &mut Session, wanted: &str) -> Result<()> {
    session.type_in(&format!(
        "until [ \"$(stty size 2>&1)\" = '{wanted}' ]; do sleep 0.1; done; echo \"size $(stty size)\"\n"
    ))?;
    session.expect(&format!("size {wanted}"))
}

fn exec_with_a_terminal(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let mut command = suite.containerd.ctr();
    command.args([
        "task",
        "exec",
        "--tty",
        "--exec-id",
        "tty",
        &container.id,
        "sh",
    ]);
    let mut session = Session::start(&mut command, size(24, 80))?;
    session.type_in("test -t 0 && test -t 1 && test -t 2 && echo all-$((1 + 2))\n")?;
    session.expect("all-3")?;
    session.type_in("exit 5\n")?;
    let code = session.finish()?;
    ensure!(code == 5, "exit code {code}");
    Ok(())
}

fn control_c(suite: &Context) -> Result<()> {
    let id = suite.containerd.fresh_id("tty");
    let mut command = suite
        .containerd
        .run_command(suite.runtime, &id, &["--rm", "--tty"], &["sh"]);
    let mut session = Session::start(&mut command, size(24, 80))?;
    // The interrupt may come before the sleep does, and is then the shell's alone, which hears it when the sleep is over.
    session.type_in("trap 'echo int-$((2 + 2))' INT; echo rea''dy; sleep 30\n")?;
    session.expect("ready")?;
    session.type_in("\u{3}")?;
    session.expect("int-4")?;
    session.type_in("exit 0\n")?;
    let code = session.finish()?;
    ensure!(code == 0, "exit code {code}");
    Ok(())
}
