//! What the guest's kernel remembers of the share.
//!
//! The kernel asks the host again for a path only when somebody looks it up. Until then it believes that a deleted container's directory
//! is there, and the host keeps the file systems below it, and their room on its disk (see `vmm/src/virtio/fs.rs`). So somebody looks.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use husk_protocol::guest_path;
use tokio::time::sleep;

/// Before the first look. What a look has confirmed is believed for another second, under the share's ordinary cache policy.
const PAUSE: Duration = Duration::from_millis(500);

/// The host unmounts when the agent has deleted the container, which takes a busy one long. Each pause is half as long again as the last: in
/// all they are 24 minutes.
const LOOKS: u32 = 18;

/// Makes the kernel forget a deleted container's files, as soon as the host has taken them away. Must be called within a tokio runtime.
pub fn forget(container_id: &str) {
    let dir = PathBuf::from(guest_path::SHARE).join(container_id);
    tokio::spawn(async move {
        if !is_gone(dir.clone()).await {
            tracing::debug!(dir = %dir.display(), "the host has not taken it away");
        }
    });
}

async fn is_gone(dir: PathBuf) -> bool {
    let mut pause = PAUSE;
    for _ in 0..LOOKS {
        sleep(pause).await;
        pause += pause / 2;
        let dir = dir.clone();
        let look = tokio::task::spawn_blocking(move || dir.symlink_metadata());
        if let Ok(Err(error)) = look.await
            && error.kind() == io::ErrorKind::NotFound
        {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn looks_until_it_is_gone_but_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        assert!(!is_gone(path.clone()).await);
        let going = tokio::spawn(is_gone(path));
        sleep(PAUSE * 100).await;
        dir.close().unwrap();
        assert!(going.await.unwrap());
    }
}
