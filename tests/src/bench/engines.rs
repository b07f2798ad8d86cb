//! One container from `run --rm` to its end by an engine's own client, as people type it: husk beside the engine's own runtime.

use std::{process::Command, time::Instant};

use anyhow::{Context as _, Result};
use husk_tests::{
    busybox, ctr, docker,
    docker::Docker,
    podman::{IMAGE, Podman},
    runtime::Runtime,
};

use crate::{Bench, Row, SAMPLES, Table};

/// An engine that runs, and how it is asked.
struct Engine<'a> {
    /// The figure's name.
    row: &'static str,
    /// They take turns.
    runtimes: &'static [Runtime],
    /// `run --rm` of a container whose command is `true`.
    command: Box<dyn Fn(Runtime) -> Command + 'a>,
}

/// Starts the engines, and measures one after another.
pub fn measure(bench: &Bench, table: &mut Table) -> Result<()> {
    let tree = bench.containerd.dir().join("busybox");
    busybox::lay_out(&tree)?;
    let docker = Docker::start(&bench.containerd, Runtime::Husk, &tree)?;
    table.push(run_rm(&of_docker(&docker))?);
    let podman = [bench.bin.join("husk-oci"), "/usr/bin/crun".into()].map(|p| Podman::new(&p));
    podman[0].import(&tree)?;
    table.push(run_rm(&of_podman(&podman))?);
    Ok(())
}

fn of_docker(docker: &Docker) -> Engine<'_> {
    Engine {
        row: "docker_run_rm",
        runtimes: &[Runtime::Husk, Runtime::Runc],
        command: Box::new(|runtime| {
            let run = ["run", "--rm", "--runtime", runtime.name()];
            docker.command(&[&run[..], &[docker::BUSYBOX, "true"]].concat())
        }),
    }
}

fn of_podman([husk, crun]: &[Podman; 2]) -> Engine<'_> {
    Engine {
        row: "podman_run_rm",
        runtimes: &[Runtime::Husk, Runtime::Crun],
        command: Box::new(move |runtime| {
            let podman = match runtime {
                Runtime::Husk => husk,
                _ => crun,
            };
            podman.command(&["run", "--rm", IMAGE, "true"])
        }),
    }
}

/// Milliseconds of one container each; who comes first changes from sample to sample.
fn run_rm(engine: &Engine<'_>) -> Result<Row> {
    let mut row = Row::new(engine.row, "ms");
    // One more than counts: it warms what the later ones share.
    for sample in 0..=SAMPLES {
        let mut order = engine.runtimes.to_vec();
        order.rotate_left(sample % engine.runtimes.len());
        for runtime in order {
            let begin = Instant::now();
            ctr::output(&mut (engine.command)(runtime))?
                .ok()
                .with_context(|| format!("{} with {runtime}", engine.row))?;
            if sample > 0 {
                row.add(runtime, begin.elapsed().as_secs_f64() * 1000.0);
            }
        }
    }
    Ok(row)
}
