//! The end of the guest.

use std::convert::Infallible;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::reboot::{RebootMode, reboot};

/// How long file systems may take to write back: their server on the host may be gone.
const SYNC_PATIENCE: Duration = Duration::from_secs(3);

/// Writes back what the file systems hold and powers the guest off.
pub fn off() -> nix::Result<Infallible> {
    let (done, synced) = mpsc::channel();
    // A thread that hangs in the kernel ends with the guest.
    let syncing = thread::Builder::new().name("sync".into()).spawn(move || {
        nix::unistd::sync();
        // Nobody listens once the patience is over.
        let _ = done.send(());
    });
    if syncing.is_ok() {
        let _ = synced.recv_timeout(SYNC_PATIENCE);
    }
    reboot(RebootMode::RB_POWER_OFF)
}
