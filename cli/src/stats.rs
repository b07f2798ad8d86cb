//! `husk stats`: what containers use, as their guest's cgroups have it.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::{
    api::StatsRequest, cgroups_v2::metrics::Metrics, protobuf::Message as _,
};
use serde::Serialize;
use tokio::time::sleep;

use crate::{
    args,
    container::{Container, State},
    human,
    place::Place,
    run::on_threads,
    shim::{self, said, soon},
    table,
};

/// Between two looks.
const BETWEEN: Duration = Duration::from_secs(1);

/// What the shim's Stats answers on a host with cgroup v2, which husk wants.
const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// A look at a container.
struct Sample {
    at: Instant,
    cpu: Duration,
    memory: u64,
    limit: u64,
    pids: u64,
}

/// A line of `husk stats`, with docker's keys.
#[derive(Serialize)]
struct Line {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Name")]
    name: String,
    #[serde(rename = "CPUPerc")]
    cpu: String,
    #[serde(rename = "MemUsage")]
    memory: String,
    #[serde(rename = "MemPerc")]
    part: String,
    #[serde(rename = "PIDs")]
    pids: String,
}

pub(crate) fn stats(place: &Place, args: &args::Stats) -> Result<()> {
    on_threads(show(place, args))
}

async fn show(place: &Place, args: &args::Stats) -> Result<()> {
    loop {
        let containers = wanted(place, &args.containers)?;
        let before = look_at_all(&containers).await;
        sleep(BETWEEN).await;
        let now = look_at_all(&containers).await;
        let lines: Vec<Line> = containers
            .iter()
            .zip(before.iter().zip(&now))
            // One that has ended between the two has nothing to tell.
            .filter_map(|(container, (before, now))| {
                Some(line(container, before.as_ref()?, now.as_ref()?))
            })
            .collect();
        if !args.no_stream && io::stdout().is_terminal() {
            // Clears the screen and goes to its corner (ECMA-48, ED and CUP).
            write!(io::stdout(), "\x1b[2J\x1b[H")?;
        }
        let headings = [
            "CONTAINER ID",
            "NAME",
            "CPU %",
            "MEM USAGE / LIMIT",
            "MEM %",
            "PIDS",
        ];
        table::print(args.format, &headings, &lines, |line| {
            [
                &line.id,
                &line.name,
                &line.cpu,
                &line.memory,
                &line.part,
                &line.pids,
            ]
            .map(String::clone)
            .to_vec()
        })?;
        if args.no_stream {
            return Ok(());
        }
    }
}

/// Those that were named, which must run, or all that do.
fn wanted(place: &Place, words: &[String]) -> Result<Vec<Container>> {
    let containers = place.containers()?;
    if words.is_empty() {
        let runs = |c: &Container| {
            c.status()
                .is_ok_and(|status| status.state == State::Running)
        };
        return Ok(containers.all()?.into_iter().filter(runs).collect());
    }
    let mut found = Vec::new();
    for word in words {
        let container = containers.find(word)?;
        if container.status()?.state != State::Running {
            bail!("container {} is not running", container.record.name);
        }
        found.push(container);
    }
    Ok(found)
}

/// At all of them at once: one whose guest is slow to answer does not make the others' figures older.
async fn look_at_all(containers: &[Container]) -> Vec<Option<Sample>> {
    let looks: Vec<_> = containers
        .iter()
        .map(|container| tokio::spawn(look(container.clone())))
        .collect();
    let mut samples = Vec::new();
    for (look, container) in looks.into_iter().zip(containers) {
        let sample = look.await.map_err(anyhow::Error::from).flatten();
        samples.push(match sample {
            Ok(sample) => Some(sample),
            Err(error) => {
                let name = &container.record.name;
                tracing::debug!("asking for the figures of {name}: {error:#}");
                None
            }
        });
    }
    samples
}

async fn look(container: Container) -> Result<Sample> {
    let address = container.status()?.address.context("it has no shim")?;
    let request = StatsRequest {
        id: container.record.id,
        ..StatsRequest::default()
    };
    let answer = said(shim::connect(&address).await?.stats(soon(), &request).await)?;
    let stats = answer
        .stats
        .into_option()
        .context("the shim has no figures")?;
    if stats.type_url != TYPE {
        bail!(
            "the shim has figures of the kind {}: the host has no cgroup v2",
            stats.type_url
        );
    }
    let metrics = Metrics::parse_from_bytes(&stats.value)?;
    Ok(Sample {
        at: Instant::now(),
        cpu: Duration::from_micros(metrics.cpu.usage_usec),
        memory: metrics.memory.usage,
        limit: metrics.memory.usage_limit,
        pids: metrics.pids.current,
    })
}

fn line(container: &Container, before: &Sample, now: &Sample) -> Line {
    let passed = now.at.duration_since(before.at).as_secs_f64();
    let used = now.cpu.saturating_sub(before.cpu).as_secs_f64();
    // Without a limit it has the largest number.
    let is_limited = now.limit > 0 && now.limit < u64::MAX / 2;
    let limit = if is_limited {
        human::size(now.limit)
    } else {
        "-".to_owned()
    };
    let part = match is_limited {
        true => format!("{:.2}%", 100.0 * now.memory as f64 / now.limit as f64),
        false => "-".to_owned(),
    };
    Line {
        id: container.short_id().to_owned(),
        name: container.record.name.clone(),
        cpu: format!("{:.2}%", 100.0 * used / passed.max(f64::EPSILON)),
        memory: format!("{} / {limit}", human::size(now.memory)),
        part,
        pids: now.pids.to_string(),
    }
}
