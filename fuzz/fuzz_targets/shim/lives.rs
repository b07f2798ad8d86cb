//! The lives of a container's processes, in whatever order a guest and an engine have it. What is announced keeps the order that engines rely
//! on, and whoever waits for an end hears of it.

use std::{collections::BTreeMap, time::SystemTime};

use arbitrary::{Arbitrary, Unstructured};
use tokio::sync::watch;

use crate::lifecycle::{Announcement, Exit, Lifecycle, Stage};

/// What happens. Process 0 is the init.
#[derive(Debug)]
pub enum Step {
    Add(u8),
    Begin(u8),
    Started(u8),
    Failed(u8, u8),
    Ended(u8, u8),
    Remove(u8),
    Pause,
    Resume,
    Watch(u8),
}

impl<'a> Arbitrary<'a> for Step {
    /// In one byte: what makes trouble is several steps in their order.
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let byte: u8 = u.arbitrary()?;
        let (which, status) = (byte >> 4 & 3, byte >> 6);
        Ok(match byte & 0xf {
            0 | 1 => Self::Add(which),
            2..=4 => Self::Begin(which),
            5..=7 => Self::Started(which),
            8 => Self::Failed(which, status),
            9..=11 => Self::Ended(which, status),
            12 => Self::Remove(which),
            13 => Self::Pause,
            14 => Self::Resume,
            _ => Self::Watch(which),
        })
    }
}

const IDS: [&str; 4] = ["", "a", "b", "c"];

fn id(which: u8) -> &'static str {
    IDS[usize::from(which % 4)]
}

fn exit(status: u8) -> Exit {
    Exit {
        status: status.into(),
        at: SystemTime::UNIX_EPOCH,
    }
}

/// What the world has heard about a process.
#[derive(Default)]
struct Heard {
    has_begun: bool,
    has_started: bool,
    exit: Option<Exit>,
}

#[derive(Default)]
struct World {
    life: Lifecycle,
    /// The init, and those execs that were added.
    heard: BTreeMap<String, Heard>,
    is_paused: bool,
    watches: Vec<(String, watch::Receiver<Option<Exit>>)>,
}

/// All of it, and then the end of all.
pub fn run(steps: &[Step]) {
    let mut world = World::default();
    world.heard.insert(String::new(), Heard::default());
    for step in steps.iter().take(256) {
        world.step(step);
        world.announce();
    }
    world.finish();
}

impl World {
    fn step(&mut self, step: &Step) {
        let life = &mut self.life;
        match step {
            Step::Add(which) => {
                // The init is there from the first.
                let id = IDS[1 + usize::from(which % 3)];
                let may = matches!(
                    life.stage(""),
                    Ok(Stage::Created | Stage::Starting { .. } | Stage::Running)
                );
                let is_new = !self.heard.contains_key(id);
                assert_eq!(life.add_exec(id).is_ok(), may && is_new);
            }
            Step::Begin(which) => {
                let id = id(*which);
                let is_created = life.stage(id).is_ok_and(|stage| stage == Stage::Created);
                let may = id.is_empty() || life.stage("").unwrap() == Stage::Running;
                let result = life.begin_start(id);
                assert_eq!(result.is_ok(), is_created && may, "{id:?}");
                if result.is_ok() {
                    self.heard.get_mut(id).unwrap().has_begun = true;
                }
            }
            Step::Started(which) => life.started(id(*which)),
            Step::Failed(which, status) => life.start_failed(id(*which), exit(*status)),
            Step::Ended(which, status) => life.ended(id(*which), exit(*status)),
            Step::Remove(which) => {
                let id = IDS[1 + usize::from(which % 3)];
                if life.remove_exec(id).is_ok() {
                    let heard = self.heard.remove(id).unwrap();
                    assert!(
                        !heard.has_started || heard.exit.is_some(),
                        "{id:?} is forgotten while it runs"
                    );
                    self.watches.retain(|(watched, _)| watched != id);
                }
            }
            Step::Pause => {
                let may = life.check_pause().is_ok();
                assert!(!may || !self.is_paused);
                if may {
                    life.paused();
                }
            }
            Step::Resume => {
                let may = life.check_resume().is_ok();
                assert!(!may || self.is_paused);
                life.resumed();
            }
            Step::Watch(which) => {
                if let Ok(watch) = life.watch(id(*which)) {
                    self.watches.push((id(*which).to_owned(), watch));
                }
            }
        }
    }

    /// Hears what there is, as the world does, and wakes those who wait.
    fn announce(&mut self) {
        for announcement in self.life.take_announcements() {
            let init = &self.heard[""];
            assert!(
                init.exit.is_none(),
                "{announcement:?} behind the init's exit"
            );
            match announcement {
                Announcement::ExecAdded { exec_id } => {
                    let before = self.heard.insert(exec_id, Heard::default());
                    assert!(before.is_none(), "added twice");
                }
                Announcement::Started { exec_id } => {
                    let heard = self.heard.get_mut(&exec_id).unwrap();
                    assert!(heard.has_begun && !heard.has_started && heard.exit.is_none());
                    heard.has_started = true;
                }
                Announcement::Paused => {
                    assert!(init.has_started && !self.is_paused);
                    self.is_paused = true;
                }
                Announcement::Resumed => {
                    assert!(self.is_paused);
                    self.is_paused = false;
                }
                Announcement::Exited { exec_id, exit } => {
                    if exec_id.is_empty() {
                        for (id, heard) in &self.heard {
                            let is_over = !heard.has_started || heard.exit.is_some();
                            assert!(id.is_empty() || is_over, "the init ends before {id:?}");
                        }
                    }
                    let heard = self.heard.get_mut(&exec_id).unwrap();
                    assert!(heard.has_started || exec_id.is_empty(), "an end, no start");
                    assert_eq!(heard.exit, None, "{exec_id:?} ends twice");
                    heard.exit = Some(exit);
                    self.life.wake(&exec_id, exit);
                }
            }
        }
        for (id, watch) in &self.watches {
            let heard = &self.heard[id];
            let woken = *watch.borrow();
            assert!(
                !heard.has_started || woken == heard.exit,
                "{id:?}: {woken:?} is not what was announced"
            );
        }
    }

    /// The guest has told of all ends, or has gone.
    fn finish(&mut self) {
        for id in IDS.into_iter().rev() {
            self.life.started(id);
            self.life.ended(id, exit(1));
            self.announce();
        }
        assert!(self.heard[""].exit.is_some(), "the init never ends");
        for (id, heard) in &self.heard {
            assert!(
                !heard.has_started || heard.exit.is_some(),
                "{id:?} never ends"
            );
        }
        for (id, watch) in &self.watches {
            assert!(
                watch.borrow().is_some(),
                "who waits for {id:?} waits for ever"
            );
        }
        assert!(self.life.running_execs().is_empty());
        assert!(self.life.add_exec("late").is_err());
    }
}
