//! What a container tells the world: its changes of state as containerd's events.

use std::{
    fs,
    sync::PoisonError,
    time::{Duration, Instant},
};

use containerd_shim_protos::events::task as events;
use tracing::{info, warn};

use super::Container;
use crate::lifecycle::{Announcement, Exit, Stage};

/// Between two announcements of OOM kills.
const OOM_PAUSE: Duration = Duration::from_secs(1);

impl Container {
    pub(super) fn publish(&self, announcement: &Announcement) {
        let (container_id, pid) = (self.id.clone(), self.pid());
        match announcement {
            Announcement::ExecAdded { exec_id } => self.publisher.send(events::TaskExecAdded {
                container_id,
                exec_id: exec_id.clone(),
                ..Default::default()
            }),
            Announcement::Started { exec_id } if exec_id.is_empty() => {
                self.publisher.send(events::TaskStart {
                    container_id,
                    pid,
                    ..Default::default()
                })
            }
            Announcement::Started { exec_id } => self.publisher.send(events::TaskExecStarted {
                container_id,
                exec_id: exec_id.clone(),
                pid,
                ..Default::default()
            }),
            Announcement::Paused => self.publisher.send(events::TaskPaused {
                container_id,
                ..Default::default()
            }),
            Announcement::Resumed => self.publisher.send(events::TaskResumed {
                container_id,
                ..Default::default()
            }),
            Announcement::Exited { exec_id, exit } => {
                info!(
                    container = container_id,
                    exec = exec_id,
                    status = exit.status,
                    "process ended"
                );
                self.publisher.send(events::TaskExit {
                    id: if exec_id.is_empty() {
                        container_id.clone()
                    } else {
                        exec_id.clone()
                    },
                    container_id,
                    pid,
                    exit_status: exit.status,
                    exited_at: Some(exit.at.into()).into(),
                    ..Default::default()
                });
            }
        }
    }

    /// Announces that the kernel has killed for memory, unless that many kills have been announced already or there was an announcement
    /// just now. Nothing follows the init's exit.
    pub fn announce_oom(&self, kills: u64) {
        // Held across the send: the exit is queued under the same lock.
        let life = self.life();
        if matches!(life.stage(""), Ok(Stage::Ending(_) | Stage::Exited(_))) {
            return;
        }
        let mut announced = self.ooms.lock().unwrap_or_else(PoisonError::into_inner);
        let is_soon = announced
            .last
            .is_some_and(|last| last.elapsed() < OOM_PAUSE);
        if kills > announced.kills && !is_soon {
            if announced.kills == 0 {
                self.leave_word_of_oom();
            }
            announced.kills = kills;
            announced.last = Some(Instant::now());
            self.publisher.send(events::TaskOOM {
                container_id: self.id.clone(),
                ..Default::default()
            });
        }
        drop(life);
    }

    /// For CRI-O, which takes no events: it looks for this file when a container has ended with other than 0.
    fn leave_word_of_oom(&self) {
        let file = self.bundle.join("oom");
        if let Err(error) = fs::write(&file, "") {
            warn!(file = %file.display(), %error, "cannot leave word of an OOM kill");
        }
    }

    /// Announces that the container has been deleted.
    pub fn announce_delete(&self, exit: Exit) {
        self.publisher.send(events::TaskDelete {
            container_id: self.id.clone(),
            id: self.id.clone(),
            pid: self.pid(),
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        });
    }
}
