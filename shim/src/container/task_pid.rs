//! A pid for each container of a pod.
//!
//! In the guest a container has processes; on the host it has none. The VMM's pid, which stands for all of them, does not tell them apart,
//! and engines do so by pid: a container that is to share the processes of one other (CRI's TARGET, `kubectl debug --target`) has the
//! path `/proc/<pid of that one's task>/ns/pid` in its spec. So each has a thread of the shim that does nothing, whose id is a pid
//! for everything that looks into /proc, is no other's while the container is there, and cannot outlive the shim.

use std::{io, sync::mpsc, thread};

/// The least that a thread can have (`PTHREAD_STACK_MIN`), in bytes: it waits, no more.
const STACK: usize = 16 << 10;

/// A pid of this host that is its owner's until it is dropped.
#[derive(Debug)]
pub struct TaskPid {
    pid: u32,
    /// Gone with this: the thread ends.
    _alive: mpsc::Sender<()>,
}

impl TaskPid {
    /// Takes one.
    ///
    /// # Errors
    /// When no thread is to be had.
    pub fn new() -> io::Result<Self> {
        let (alive, over) = mpsc::channel::<()>();
        let (tell, told) = mpsc::sync_channel(1);
        let wait = move || {
            if tell.send(rustix::thread::gettid()).is_ok() {
                // Nothing is ever sent.
                let _ = over.recv();
            }
        };
        thread::Builder::new()
            .name("husk-task".into())
            .stack_size(STACK)
            .spawn(wait)?;
        let tid = told.recv().map_err(io::Error::other)?;
        Ok(Self {
            pid: tid.as_raw_nonzero().get().unsigned_abs(),
            _alive: alive,
        })
    }

    /// The pid.
    pub fn get(&self) -> u32 {
        self.pid
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn each_is_another_and_goes_with_its_owner() {
        let (a, b) = (TaskPid::new().unwrap(), TaskPid::new().unwrap());
        assert!(a.get() != b.get() && a.get() != std::process::id());
        let namespace = |pid: u32| PathBuf::from(format!("/proc/{pid}/ns/pid"));
        assert!(namespace(a.get()).exists() && namespace(b.get()).exists());
        let gone = namespace(a.get());
        drop(a);
        while gone.exists() {
            thread::yield_now();
        }
        assert!(namespace(b.get()).exists());
    }
}
