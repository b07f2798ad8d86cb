//! Guests and containers that attack. What they may not have is on the host, and looked at afterwards.
//!
//! The guest is bare-metal code of ours in place of a kernel (`tests/hostile/guest`), behind the real shim and in the real jail. It
//! tells of each attempt, but the host has the last word: a directory that the pod has no business with, a process, and what is left
//! behind. Each safeguard is also left out once (`husk-vmm-weakened`): the same attack must then succeed, or it would show nothing.

mod attack;
mod containers;
mod devices;

pub use containers::exchange_workload;

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::{Test, context::Context, husk_test};
use attack::{Attack, Guest, Report};

pub const TESTS: &[Test] = &[
    husk_test("queues", queues),
    husk_test("files", files),
    husk_test("sockets", sockets),
    husk_test("network", devices::network),
    husk_test("memory", devices::memory),
    husk_test("memory_that_is_granted", devices::memory_granted),
    husk_test("races", devices::races),
    husk_test("files_held_open", devices::files_held_open),
    husk_test("exits", devices::exits),
    husk_test("no_door_in_a_release", no_door),
    husk_test("names_unchecked", names_unchecked),
    husk_test("an_owned_vmm_and_the_hosts_files", owned_files),
    husk_test("an_owned_vmm_and_its_filter", owned_calls),
    husk_test("an_owned_vmm_without_a_filter", owned_without_filter),
    husk_test("the_attacks_bite", bite),
    husk_test("containers_privileged", containers::privileged),
    husk_test("containers_dials", containers::dials),
    husk_test(
        "containers_mounts_and_exchanges",
        containers::mounts_and_exchanges,
    ),
    husk_test(
        "containers_working_directories",
        containers::working_directories,
    ),
    husk_test(
        "containers_root_file_systems",
        containers::root_file_systems,
    ),
];

/// The words of a pod whose guest has turned itself off before an agent came.
const OFF: &str = "the guest powered itself off";
/// And of one whose VMM the kernel has ended.
const FORBIDDEN: &str = "a system call that its jail forbids";

/// Malformed chains, rings, registers and resets; beside it, another pod goes on.
fn queues(suite: &Context) -> Result<()> {
    let report = beside_a_neighbour(suite, &Guest::new("hostile=queues"), 100)?;
    ensure!(report.names_faults(), "{report:?}");
    Ok(())
}

/// Names, links, special files, handles and lengths; an exchange of a directory for a link while it is used.
fn files(suite: &Context) -> Result<()> {
    beside_a_neighbour(suite, &Guest::new("hostile=files"), 140).map(drop)
}

/// Packets of nobody and dials to whom the pod was not given.
fn sockets(suite: &Context) -> Result<()> {
    beside_a_neighbour(suite, &Guest::new("hostile=sockets"), 40).map(drop)
}

/// Runs a guest that comes to its end beside a pod that has to live on.
fn beside_a_neighbour(suite: &Context, guest: &Guest<'_>, least: usize) -> Result<Report> {
    let neighbour = suite.detached(&[], &["sleep", "1000"])?;
    let attack = Attack::prepare()?;
    let report = attack.run(suite, guest)?;
    report.all_held(least)?;
    report.ended(OFF)?;
    attack.nothing_moved()?;
    let answer = neighbour.exec(&["echo", "still here"])?.ok()?;
    ensure!(answer.text() == "still here", "{answer:?}");
    Ok(report)
}

/// What the other tests go through is not in the program that is installed.
fn no_door(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    let report = attack.run(suite, &Guest::new("hostile=door try=nothing"))?;
    report.all_held(1)?;
    attack.nothing_moved()?;
    let contains = |name: &str| -> Result<bool> {
        let program = fs::read(suite.bin.join("../lib/husk").join(name))
            .with_context(|| format!("cannot read {name}"))?;
        Ok(program.windows(9).any(|bytes| bytes == b"weakened="))
    };
    ensure!(!contains("husk-vmm")? && contains("husk-vmm-weakened")?);
    Ok(())
}

/// Without the check of names, the jail's root is what holds.
fn names_unchecked(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    let report = attack.run(suite, &Guest::new("hostile=files").without("names"))?;
    ensure!(
        report.moved("looked up \"..\""),
        "the names were checked: {report:?}"
    );
    ensure!(
        !report.moved("the removal of a file outside (Ok"),
        "{report:?}"
    );
    attack.nothing_moved()
}

/// A thread of the file server that does what the guest says finds no file of the host.
fn owned_files(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    let report = attack.run(
        suite,
        &Guest::new("hostile=door try=files").without("nothing"),
    )?;
    report.all_held(15)?;
    attack.nothing_moved()
}

/// What no thread may call ends the VM, and the pod's error says why.
fn owned_calls(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    // One of each sort; the lists themselves are compared with what nobody may (`jail::seccomp::tests`).
    for call in [
        "execve",
        "socket",
        "mount",
        "bpf",
        "executable",
        "vcpu_mkdir",
    ] {
        let words = format!("hostile=door try={call}");
        let report = attack.run(suite, &Guest::new(&words).without("nothing"))?;
        report.ended(FORBIDDEN).context(call)?;
        ensure!(!report.is_done(), "{call}: {report:?}");
    }
    attack.nothing_moved()
}

/// Without the filter, capabilities, namespaces and the jail's root hold.
fn owned_without_filter(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    let report = attack.run(
        suite,
        &Guest::new("hostile=door try=second").without("seccomp"),
    )?;
    report.all_held(25)?;
    report.ended(OFF)?;
    attack.nothing_moved()
}

/// With the safeguards left out, each attack is seen by the guest and on the host.
fn bite(suite: &Context) -> Result<()> {
    // The file server without a check of names, on the host's own root.
    let attack = Attack::prepare()?;
    let report = attack.run(suite, &Guest::new("hostile=files").without("names,jail"))?;
    let is_removed = report.moved("the removal of a file outside (Ok");
    ensure!(is_removed && attack.secret().is_err(), "{report:?}");
    ensure!(attack.nothing_moved().is_err());

    // The VMM's threads outside of the jail.
    let attack = Attack::prepare()?;
    let report = attack.run(suite, &Guest::new("hostile=door try=files").without("jail"))?;
    ensure!(report.moved("read \"a secret\" by its path"), "{report:?}");
    ensure!(attack.secret()? == "moved", "{report:?}");
    ensure!(attack.has_planted(), "{report:?}");

    // And with no filter: a program of the host's runs.
    let attack = Attack::prepare()?;
    attack.run(
        suite,
        &Guest::new("hostile=door try=execve").without("jail,seccomp"),
    )?;
    attack.planted_in_time()?;

    // A call that the filter would have ended the VM for goes through.
    let attack = Attack::prepare()?;
    let report = attack.run(
        suite,
        &Guest::new("hostile=door try=socket").without("seccomp"),
    )?;
    ensure!(report.moved("socket"), "{report:?}");
    report.ended(OFF)
}
