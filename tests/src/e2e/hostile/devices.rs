//! Devices that only some pods have, and guests that do two things at once: a network, memory to plug, a second processor, many files.

use std::{
    collections::BTreeSet,
    fs,
    net::UdpSocket,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::host::{self, Netns};
use serde_json::{Value, json};

use super::{
    OFF,
    attack::{Attack, Guest, Report},
    beside_a_neighbour,
};
use crate::{
    context::Context,
    vmm::process::{self, Vmm},
};

/// What the VMM ends with where its guest's processor has touched what is not there.
const UNREACHABLE: &str = "KVM cannot reach a page of the guest's";
/// And where a device has.
const UNPLUGGED: &str = "a device work on memory that it has not plugged";

/// The host's end of the pod's link; the guest knows the addresses (`tests/hostile/guest/src/net.rs`).
const HOST: &str = "10.97.0.1";
const GUEST: &str = "10.97.0.2";
/// Where honest packets go.
const PORT: u16 = 9797;

/// Two processors, and so two pairs of queues, which the VMM works on; memory to plug beside them.
const PAIRS: &str = "default_vcpus = 2\nmax_vcpus = 2\ngrow_memory_mib = 1024\nvhost_net = false\n";

/// Headers that lie, sizes, chains, commands and buffers that no driver makes, on queues that the VMM works on.
pub fn network(suite: &Context) -> Result<()> {
    let netns = Netns::new("husk-hostile")?;
    for command in [
        "link add husk-hostile-h address 02:00:00:00:97:01 type veth peer name eth0 address 02:00:00:00:97:02 netns husk-hostile",
        "addr add 10.97.0.1/24 dev husk-hostile-h",
        "link set husk-hostile-h up",
        "neigh add 10.97.0.2 lladdr 02:00:00:00:97:02 dev husk-hostile-h nud permanent",
        "-n husk-hostile link set lo up",
        "-n husk-hostile addr add 10.97.0.2/24 dev eth0",
        "-n husk-hostile link set eth0 up",
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        host::run(&[&["ip"], &words[..]].concat())?;
    }
    let heard = UdpSocket::bind((HOST, PORT))?;
    heard.set_nonblocking(true)?;
    let links = || host::run(&["ip", "-o", "link"]);
    let before = links()?;
    let path = format!("network:{}", netns.path());
    let guest = Guest {
        settings: PAIRS,
        flags: &["--with-ns", &path],
        ..Guest::new("hostile=net")
    };
    let report = while_the_host_sends(|| beside_a_neighbour(suite, &guest, 100))?;
    ensure!(report.names_faults(), "{report:?}");
    let mut honest = BTreeSet::new();
    let mut packet = [0; 64];
    while let Ok(len) = heard.recv(&mut packet) {
        let words = String::from_utf8_lossy(&packet[..len]).into_owned();
        if words.starts_with("honest ") {
            honest.insert(words);
        }
    }
    let sent = report.count("honest packets")?;
    ensure!(sent > 5 && honest.len() == sent, "{honest:?} of {sent}");
    let after = links()?;
    ensure!(
        after == before,
        "the host's links were\n{before}\nand are\n{after}"
    );
    Ok(())
}

/// Sends packets to the guest without end, of several lengths.
fn while_the_host_sends<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    let socket = UdpSocket::bind((HOST, 0))?;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let packet = [b'x'; 1400];
            for len in [1, 300, 1400].into_iter().cycle() {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                // Nobody need take it.
                let _ = socket.send_to(&packet[..len], (GUEST, 9));
                thread::sleep(Duration::from_millis(2));
            }
        });
        let result = run();
        is_over.store(true, Ordering::Relaxed);
        result
    })
}

/// Requests that can never be carried out, and each way to touch what is not plugged.
pub fn memory(suite: &Context) -> Result<()> {
    let settings = "grow_memory_mib = 1024\n";
    let guest = Guest {
        settings,
        ..Guest::new("hostile=memory try=requests")
    };
    beside_a_neighbour(suite, &guest, 30)?;
    let attack = Attack::prepare()?;
    for (way, words) in [
        ("processor", UNREACHABLE),
        ("device", UNPLUGGED),
        ("rings", UNPLUGGED),
    ] {
        let what = format!("hostile=memory try={way}");
        let guest = Guest {
            settings,
            ..Guest::new(&what)
        };
        let report = attack.run(suite, &guest)?;
        ensure!(
            !report.is_done() && !report.has_moved(),
            "{way}: {report:?}"
        );
        report.ended(words).context(way)?;
    }
    attack.nothing_moved()
}

/// MiB of the guests below, and what they are given beside it.
const RAM: u64 = 128;
const GRANTED: u64 = 16;

/// What the host gives is plugged, and nothing else. No agent ever asks for these guests: the test has the shim's place.
pub fn memory_granted(suite: &Context) -> Result<()> {
    let (report, _) = granted(suite, "granted", None)?;
    report.all_held(30)?;
    report.ended("power-off")?;
    let (report, _) = granted(suite, "processor_again", None)?;
    ensure!(!report.has_moved(), "{report:?}");
    report.ended(UNREACHABLE)?;
    // Nobody is left to say how it ended.
    let (report, signal) = granted(suite, "answer", None)?;
    ensure!(
        signal.is_none() && !report.has_moved(),
        "{report:?}, {signal:?}"
    );
    // A device that does not look at what was granted is seen through.
    let (report, _) = granted(suite, "granted", Some("plug"))?;
    ensure!(
        report.moved("request 0: all that there is (Some(0)"),
        "{report:?}"
    );
    Ok(())
}

/// Runs a guest by a VMM of our own, without these safeguards, and gives it memory. What it told, and the process's exit code.
fn granted(suite: &Context, way: &str, without: Option<&str>) -> Result<(Report, Option<i32>)> {
    let kernel = suite.bin.join("../lib/husk/hostile.elf");
    let guest = process::Guest {
        kernel: Some(&kernel.to_string_lossy()),
        vmm: without.map(|_| "husk-vmm-weakened"),
        ..process::Guest::default()
    };
    let mut vmm = Vmm::start(suite, &guest)?;
    let mut config = Vmm::config(1, RAM);
    config["max_memory_mib"] = json!(2 * RAM);
    let left_out = without.unwrap_or_default();
    config["kernel_params"] = json!(format!("hostile=memory try={way} weakened={left_out}"));
    vmm.ask(json!({ "launch": config }))?;
    vmm.ask(json!({ "set-memory": { "target_mib": RAM + GRANTED } }))?;
    let console = vmm.console_to_its_end()?;
    let exited = match vmm.exited() {
        Ok(Value::String(end)) => end,
        Ok(end) => end.to_string(),
        Err(error) => format!("{error:#}"),
    };
    Ok((Report::of(&console, exited), vmm.exit_code()?))
}

/// A second processor changes descriptors, rings, headers and names while devices read them.
pub fn races(suite: &Context) -> Result<()> {
    let guest = Guest {
        settings: "default_vcpus = 2\nmax_vcpus = 2\n",
        ..Guest::new("hostile=races")
    };
    beside_a_neighbour(suite, &guest, 8)?;
    // A file server that serves what it has not checked is found out by the same.
    let attack = Attack::prepare()?;
    let guest = Guest {
        what: "hostile=races try=names",
        ..guest.without("copies,seccomp")
    };
    let report = attack.run(suite, &guest)?;
    ensure!(report.moved("a path served as a name"), "{report:?}");
    attack.nothing_moved()
}

/// Descriptors of the VMM whose guest takes all that it gets, and files for that guest to know: more than it may.
const DESCRIPTORS: u64 = 1200;
const FILES: u32 = 1300;

/// Who opens files without end is refused, and nobody else is.
pub fn files_held_open(suite: &Context) -> Result<()> {
    let neighbour = suite.detached(&[], &["sleep", "1000"])?;
    let attack = Attack::prepare()?;
    for number in 0..FILES {
        fs::write(attack.volume().join(format!("{number:06}")), "")?;
    }
    let guest = Guest {
        descriptors: Some(DESCRIPTORS),
        ..Guest::new("hostile=held_open")
    };
    let report = attack.run(suite, &guest)?;
    report.all_held(6)?;
    report.ended(OFF)?;
    attack.nothing_moved()?;
    neighbour
        .exec(&["sh", "-c", "ls -R /etc >/dev/null && cat /etc/passwd"])?
        .ok()?;
    Ok(())
}

/// Where KVM cannot go on, the VM ends and the pod's error says why, with vCPU and registers.
pub fn exits(suite: &Context) -> Result<()> {
    let attack = Attack::prepare()?;
    for (way, words) in [
        ("triple_fault", "triple fault"),
        ("run_registers", "KVM could not emulate an instruction"),
        ("add_registers", "KVM could not emulate an instruction"),
    ] {
        let what = format!("hostile=exits try={way}");
        let report = attack.run(suite, &Guest::new(&what))?;
        report.ended(words).context(way)?;
        report.ended("vCPU 0").context(way)?;
        report.ended("rip=0x").context(way)?;
    }
    attack.nothing_moved()
}
