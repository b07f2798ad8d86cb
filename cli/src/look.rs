//! `husk ps` and `inspect`.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::Result;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;

use crate::{
    args,
    command::Code,
    container::{Container, State, Status},
    human, log, network,
    place::Place,
    table,
};

/// A line of `husk ps`, with docker's keys.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Line {
    #[serde(rename = "ID")]
    id: String,
    image: String,
    command: String,
    created_at: String,
    running_for: String,
    status: String,
    state: State,
    ports: String,
    names: String,
}

pub(crate) fn list(place: &Place, args: &args::Ps) -> Result<()> {
    let mut lines = Vec::new();
    for container in place.containers()?.all()? {
        let status = container.status()?;
        if args.all || status.state == State::Running {
            lines.push(line(&container, &status, args.no_trunc));
        }
    }
    if args.quiet {
        let mut out = io::stdout().lock();
        for line in &lines {
            writeln!(out, "{}", line.id)?;
        }
        return Ok(());
    }
    let headings = [
        "CONTAINER ID",
        "IMAGE",
        "COMMAND",
        "CREATED",
        "STATUS",
        "PORTS",
        "NAMES",
    ];
    table::print(args.format, &headings, &lines, |line| {
        [
            &line.id,
            &line.image,
            &line.command,
            &line.running_for,
            &line.status,
            &line.ports,
            &line.names,
        ]
        .map(String::clone)
        .to_vec()
    })
}

fn line(container: &Container, status: &Status, no_trunc: bool) -> Line {
    let record = &container.record;
    let command = format!("{:?}", record.command.join(" "));
    let ago = |time: &Option<String>| since(time.as_deref().unwrap_or_default());
    Line {
        id: if no_trunc {
            record.id.clone()
        } else {
            container.short_id().to_owned()
        },
        image: record.image.clone(),
        command: match command.chars().count() {
            21.. if !no_trunc => command.chars().take(19).chain("…\"".chars()).collect(),
            _ => command,
        },
        created_at: record.created.clone(),
        running_for: since(&record.created),
        status: match status.state {
            State::Created => "Created".to_owned(),
            State::Running => format!("Up {}", ago(&status.started).trim_end_matches(" ago")),
            State::Exited => {
                let code = status.exit_code.unwrap_or_default();
                format!("Exited ({code}) {}", ago(&status.finished))
                    .trim_end()
                    .to_owned()
            }
        },
        state: status.state,
        ports: match status.state {
            State::Running => {
                let ports = record.ports.iter().map(ToString::to_string);
                ports.collect::<Vec<_>>().join(", ")
            }
            _ => String::new(),
        },
        names: record.name.clone(),
    }
}

fn since(time: &str) -> String {
    let Ok(time) = DateTime::parse_from_rfc3339(time) else {
        return String::new();
    };
    let passed = Utc::now().signed_duration_since(time.with_timezone(&Utc));
    // A clock may be wrong.
    human::ago(passed.to_std().unwrap_or(Duration::ZERO))
}

pub(crate) fn inspect(place: &Place, args: &args::Containers) -> Result<()> {
    let containers = place.containers()?;
    let (mut all, mut failed) = (Vec::new(), false);
    for word in &args.containers {
        let container = match containers.find(word) {
            Ok(container) => container,
            Err(error) => {
                eprintln!("husk: {error:#}");
                failed = true;
                continue;
            }
        };
        let (record, status) = (&container.record, container.status()?);
        all.push(json!({
            "Id": record.id, "Name": record.name, "Created": record.created, "Image": record.image_id, "Path": record.command.first(),
            "Args": record.command.get(1..),
            "State": {
                "Status": status.state, "Running": status.state == State::Running, "Pid": status.pid.unwrap_or(0),
                "ExitCode": status.exit_code.unwrap_or(0), "Error": status.error.unwrap_or_default(), "StartedAt": status.started,
                "FinishedAt": status.finished,
            },
            "LogPath": log::files(&container.dir)[1],
            "Config": {
                "Image": record.image, "Hostname": record.spec["hostname"], "Tty": record.terminal, "OpenStdin": record.stdin,
                "Env": record.spec["process"]["env"], "StopSignal": record.stop_signal, "WorkingDir": record.spec["process"]["cwd"],
            },
            "HostConfig": {"AutoRemove": record.remove},
            "NetworkSettings": {
                "Network": record.network, "Ports": record.ports,
                "Addresses": network::attached(&container).map(|attached| attached.addresses),
            },
            "Shim": status.address,
            "Spec": record.spec,
        }));
    }
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&all)?)?;
    match failed {
        true => Err(Code::silent(1)),
        false => Ok(()),
    }
}
