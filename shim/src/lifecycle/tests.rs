//! The order of events: by example, and over random interleavings.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn exit(status: u32) -> Exit {
    Exit {
        status,
        at: SystemTime::UNIX_EPOCH,
    }
}

fn started(id: &str) -> Announcement {
    Announcement::Started { exec_id: id.into() }
}

fn exited(id: &str, status: u32) -> Announcement {
    Announcement::Exited {
        exec_id: id.into(),
        exit: exit(status),
    }
}

#[test]
fn a_process_that_ends_at_once_starts_first() {
    let mut life = Lifecycle::default();
    life.begin_start("").unwrap();
    life.ended("", exit(3));
    assert_eq!(life.take_announcements(), []);
    life.started("");
    assert_eq!(life.take_announcements(), [started(""), exited("", 3)]);
    assert_eq!(life.stage("").unwrap(), Stage::Exited(exit(3)));
}

#[test]
fn the_inits_exit_waits_for_its_execs() {
    let mut life = Lifecycle::default();
    life.begin_start("").unwrap();
    life.started("");
    life.add_exec("e").unwrap();
    life.begin_start("e").unwrap();
    life.started("e");
    life.take_announcements();
    life.ended("", exit(0));
    assert_eq!(life.take_announcements(), []);
    assert!(life.add_exec("late").is_err());
    life.ended("e", exit(137));
    assert_eq!(life.take_announcements(), [exited("e", 137), exited("", 0)]);
}

#[test]
fn a_failed_init_start_is_an_exit_and_a_failed_exec_is_none() {
    let mut life = Lifecycle::default();
    life.begin_start("").unwrap();
    life.start_failed("", exit(127));
    assert_eq!(life.take_announcements(), [exited("", 127)]);

    let mut life = Lifecycle::default();
    life.begin_start("").unwrap();
    life.started("");
    life.add_exec("e").unwrap();
    life.begin_start("e").unwrap();
    life.take_announcements();
    life.start_failed("e", exit(126));
    assert_eq!(life.take_announcements(), []);
    assert_eq!(life.remove_exec("e").unwrap(), exit(126));
}

#[test]
fn an_exec_that_never_started_ends_in_silence() {
    let mut life = Lifecycle::default();
    life.add_exec("e").unwrap();
    life.take_announcements();
    life.ended("e", exit(1));
    assert_eq!(life.take_announcements(), []);
    assert_eq!(*life.watch("e").unwrap().borrow(), Some(exit(1)));
}

#[derive(Debug, Clone)]
enum Step {
    Begin(usize),
    Started(usize),
    Failed(usize),
    Ended(usize),
    Add(usize),
    Remove(usize),
    Pause,
    Resume,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..4).prop_map(Step::Begin),
        4 => (0usize..4).prop_map(Step::Started),
        1 => (0usize..4).prop_map(Step::Failed),
        3 => (0usize..4).prop_map(Step::Ended),
        4 => (1usize..4).prop_map(Step::Add),
        1 => (1usize..4).prop_map(Step::Remove),
        1 => Just(Step::Pause),
        1 => Just(Step::Resume),
    ]
}

const IDS: [&str; 4] = ["", "a", "b", "c"];

proptest! {
    /// Whatever happens in whatever order, the announcements keep the order that engines rely on.
    #[test]
    fn the_order_of_events_always_holds(steps in proptest::collection::vec(step(), 0..60)) {
        let mut life = Lifecycle::default();
        let mut log = Vec::new();
        for step in steps {
            match step {
                Step::Begin(i) => drop(life.begin_start(IDS[i])),
                Step::Started(i) => life.started(IDS[i]),
                Step::Failed(i) => life.start_failed(IDS[i], exit(127)),
                Step::Ended(i) => life.ended(IDS[i], exit(i as u32)),
                Step::Add(i) => drop(life.add_exec(IDS[i])),
                Step::Remove(i) => {
                    if life.remove_exec(IDS[i]).is_ok() {
                        log.extend(life.take_announcements());
                        // The id may be used again: start its history afresh.
                        log.retain(|a| !matches!(a,
                            Announcement::ExecAdded { exec_id }
                            | Announcement::Started { exec_id }
                            | Announcement::Exited { exec_id, .. } if exec_id == IDS[i]));
                    }
                }
                Step::Pause => life.paused(),
                Step::Resume => life.resumed(),
            }
            log.extend(life.take_announcements());
        }
        let mut added = BTreeSet::new();
        let mut running = BTreeSet::new();
        let mut over = BTreeSet::new();
        for announcement in &log {
            prop_assert!(!over.contains(""), "nothing follows the init's exit: {log:?}");
            match announcement {
                Announcement::ExecAdded { exec_id } => prop_assert!(added.insert(exec_id.as_str())),
                Announcement::Started { exec_id } => {
                    prop_assert!(exec_id.is_empty() || added.contains(exec_id.as_str()));
                    prop_assert!(running.insert(exec_id.as_str()));
                }
                Announcement::Exited { exec_id, .. } => {
                    prop_assert!(exec_id.is_empty() || running.contains(exec_id.as_str()));
                    prop_assert!(over.insert(exec_id.as_str()));
                }
                Announcement::Paused | Announcement::Resumed => {
                    prop_assert!(running.contains(""));
                }
            }
        }
        if over.contains("") {
            for id in running {
                prop_assert!(over.contains(id), "{id:?} was left without an exit: {log:?}");
            }
        }
        // A waiter is released exactly when the machine says so.
        if let Stage::Exited(e) = life.stage("").unwrap() {
            prop_assert_eq!(log.last(), Some(&exited("", e.status)));
        }
    }
}
