//! Volumes that the host keeps up to date: copies of the kubelet's directories on the guest's own tmpfs.
//!
//! A file system of the host cannot tell a guest that something changed, and programs wait for just that: inotify on `..data`. So the
//! host sends such a volume whole, and the agent brings its directory there as the kubelet's AtomicWriter would have, step by
//! step: who watches it in a container sees the events of a plain host, and who reads it sees the old state or the new one.
//! [`list`] checks a request once, into types; [`apply`] does the work.
//!
//! A volume of [`huge_pages`] is here as well, since it is one of the pod's that its containers bind: but the host only says where.

mod apply;
mod huge_pages;
mod list;

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use rustix::fs::CWD;

use crate::directory;
use crate::error::AgentError;
pub use list::Plan;

/// The guest's volumes.
#[derive(Debug)]
pub struct Volumes {
    base: PathBuf,
    /// One change at a time: a host that gave up waiting for one may ask for the next.
    turn: Mutex<()>,
}

impl Volumes {
    /// Volumes below a directory that no container sees more of than one volume.
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self {
            base: base.into(),
            turn: Mutex::default(),
        }
    }

    /// Brings a volume to what the plan says. Blocks.
    ///
    /// # Errors
    /// [`AgentError::Guest`] naming the entry; the call can be repeated.
    pub fn sync(&self, plan: &Plan) -> Result<(), AgentError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let base = fs::create_dir_all(&self.base)
            .and_then(|()| Ok(directory::open(CWD, self.base.as_os_str())?));
        let base =
            base.map_err(|e| AgentError::guest(format!("opening {}", self.base.display()), e))?;
        if plan.has_huge_pages {
            huge_pages::make(&base, &self.base, plan)
        } else if plan.entries.is_empty() {
            apply::remove(&base, OsStr::new(&plan.id))
                .map_err(|e| AgentError::guest(format!("removing volume {:?}", plan.id), e))
        } else {
            apply::apply(&base, plan)
        }
    }
}
