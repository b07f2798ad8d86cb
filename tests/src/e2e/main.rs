//! The end-to-end suites: real containerd, real VMs, real containers.
//!
//! `husk-e2e` runs as root where VMs can run (the testbed, or a host with hardware KVM). It takes cargo test's flags: a
//! name filters, `--list` lists, `--test-threads 1` runs one at a time. `HUSK_TEST_RUNTIME=runc` runs the tests that
//! hold for any runtime on runc, as a control: one that fails there is wrong.

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result};
use husk_tests::{containerd::Containerd, runtime::Runtime};
use libtest_mimic::{Arguments, Failed, Trial};

mod bad_input;
mod cgroup;
mod cli;
mod context;
mod crio;
mod deploy;
mod docker;
mod doctor;
mod durations;
mod exec;
mod faults;
mod features;
mod growth;
mod hostile;
mod io;
mod isolation;
mod kubelet;
mod lifecycle;
mod limits;
mod many;
mod net;
mod oci;
mod podman;
mod pods;
mod run;
mod sandbox_api;
mod settings;
mod sharing;
mod signals;
mod storms;
mod streams;
mod survival;
mod systemd;
mod task;
mod terminal;
mod vm;
mod vmm;
mod volumes;
mod workload;

use context::Context as Suite;

/// One test: its name, whether it only makes sense on husk, a path that it needs, and what it does.
pub struct Test {
    name: &'static str,
    husk_only: bool,
    needs: &'static str,
    run: fn(&Suite) -> Result<()>,
}

impl Test {
    /// It is a test only where this path exists.
    pub const fn needs(self, path: &'static str) -> Self {
        Self {
            needs: path,
            ..self
        }
    }

    /// Is it a test here? Where it is not for want of something, that is said.
    fn is_for(&self, suite: &str, runtime: Runtime) -> bool {
        if self.husk_only && runtime != Runtime::Husk {
            return false;
        }
        let is_here = self.needs.is_empty() || Path::new(self.needs).exists();
        if !is_here {
            eprintln!(
                "{suite}::{} is no test here: there is no {}",
                self.name, self.needs
            );
        }
        is_here
    }
}

/// A test that holds for any runtime.
pub const fn test(name: &'static str, run: fn(&Suite) -> Result<()>) -> Test {
    Test {
        name,
        husk_only: false,
        needs: "",
        run,
    }
}

/// A test of something that only husk has.
pub const fn husk_test(name: &'static str, run: fn(&Suite) -> Result<()>) -> Test {
    Test {
        name,
        husk_only: true,
        needs: "",
        run,
    }
}

/// The suites. Those marked alone count what the whole host holds, so nothing runs beside them.
const SUITES: &[(&str, bool, &[Test])] = &[
    ("run", false, run::TESTS),
    ("io", false, io::TESTS),
    ("terminal", false, terminal::TESTS),
    ("signals", false, signals::TESTS),
    ("storms", false, storms::TESTS),
    ("exec", false, exec::TESTS),
    ("limits", false, limits::TESTS),
    ("isolation", false, isolation::TESTS),
    ("task", false, task::TESTS),
    ("oci", false, oci::TESTS),
    ("docker", false, docker::TESTS),
    ("systemd", false, systemd::TESTS),
    ("pods", false, pods::TESTS),
    ("sharing", false, sharing::TESTS),
    ("features", false, features::TESTS),
    ("net", false, net::TESTS),
    // They change what the host has.
    ("net_alone", true, net::ALONE),
    ("bulk", false, net::BULK),
    ("kubelet", false, kubelet::TESTS),
    ("survival", true, survival::TESTS),
    ("many", true, many::TESTS),
    ("sandbox_api", false, sandbox_api::TESTS),
    ("sandbox_alone", true, sandbox_api::ALONE),
    ("streams", false, streams::TESTS),
    ("streams_alone", true, streams::ALONE),
    ("volumes", false, volumes::TESTS),
    ("vm", false, vm::TESTS),
    // 32 vCPUs want the machine for themselves.
    ("vmm", true, vmm::TESTS),
    ("lifecycle", false, lifecycle::TESTS),
    ("host", true, lifecycle::ALONE),
    ("bad_input", true, bad_input::TESTS),
    // It looks for what is left.
    ("crio", true, crio::TESTS),
    ("faults", true, faults::TESTS),
    // They change the settings of the node.
    ("growth", true, growth::TESTS),
    // What they leave is looked for.
    ("hostile", true, hostile::TESTS),
    ("deploy", true, deploy::TESTS),
    ("cli", false, cli::TESTS),
    ("podman", false, podman::TESTS),
    // They look for what is left.
    ("cli_alone", true, cli::ALONE),
];

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    // Runs inside a container.
    if let [name, dir] = words.as_slice() {
        let workload: Option<fn(&Path) -> Result<()>> = match name.as_str() {
            "watch-workload" => Some(volumes::watch_workload),
            "read-ahead-workload" => Some(survival::read_ahead_workload),
            "exchange-workload" => Some(hostile::exchange_workload),
            "map-workload" => Some(features::map_workload),
            _ => None,
        };
        if let Some(workload) = workload {
            return told(workload(Path::new(dir)).map(|()| ExitCode::SUCCESS));
        }
    }
    let mut arguments = Arguments::from_args();
    // Three VMs at a time keep two cores busy.
    arguments.test_threads.get_or_insert(3);
    told(run(&arguments))
}

fn told(result: Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("husk-e2e: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let runtime: Runtime = env::var("HUSK_TEST_RUNTIME")
        .unwrap_or_else(|_| "husk".into())
        .parse()?;
    if arguments.list {
        let trials = SUITES.iter().flat_map(|(suite, _, tests)| {
            tests
                .iter()
                .filter(|test| test.is_for(suite, runtime))
                .map(move |test| Trial::test(format!("{suite}::{}", test.name), || Ok(())))
        });
        return Ok(libtest_mimic::run(arguments, trials.collect()).exit_code());
    }
    let bin = env::current_exe()?
        .parent()
        .map(Path::to_owned)
        .context("husk-e2e has no directory")?;
    let dir = PathBuf::from("/run/husk-e2e");
    let containerd = Containerd::start(&dir, &bin)?;
    containerd.import(Path::new("/srv/images/busybox.tar"))?;
    let suite = Arc::new(Suite::new(containerd, runtime, bin)?);

    // Two rounds: side by side, then one at a time. Both must pass.
    let together = libtest_mimic::run(arguments, trials(&suite, false));
    let alone = Arguments {
        test_threads: Some(1),
        ..arguments.clone()
    };
    let apart = libtest_mimic::run(&alone, trials(&suite, true));
    let failed = together.has_failed() || apart.has_failed();
    suite.durations.print();
    if failed {
        eprintln!(
            "the end of containerd's log:\n{}",
            suite.containerd.log_tail(60)
        );
        if let Some(log) = suite.docker_log() {
            eprintln!("the end of Docker's log:\n{log}");
        }
        if let Some(log) = suite.cri_log() {
            eprintln!("the end of its log where it serves CRI:\n{log}");
        }
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn trials(suite: &Arc<Suite>, alone: bool) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, _, tests) in SUITES.iter().filter(|(_, is_alone, _)| *is_alone == alone) {
        for test in tests.iter().filter(|t| t.is_for(name, suite.runtime)) {
            let suite = Arc::clone(suite);
            let name = format!("{name}::{}", test.name);
            trials.push(Trial::test(name.clone(), move || {
                let begin = Instant::now();
                let result = (test.run)(&suite);
                suite.durations.add(name, begin.elapsed());
                result.map_err(|error| Failed::from(format!("{error:?}")))
            }));
        }
    }
    trials
}
