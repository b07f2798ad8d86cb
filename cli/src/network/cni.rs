//! CNI's plugins, run one after another (CNI specification 1.0, sections 2 to 4).

use std::{
    env,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::Port;

/// Where plugins are, unless CNI_PATH says otherwise: Debian's place, and everybody else's.
const PATHS: &str = "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni";

/// The interface's name in the container.
const INTERFACE: &str = "eth0";

/// A network's plugins, for one container.
pub(super) struct Plugins<'a> {
    pub(super) id: &'a str,
    pub(super) namespace: &'a Path,
    pub(super) list: &'a Value,
    pub(super) ports: &'a [Port],
}

impl Plugins<'_> {
    /// Connects it: the addresses that it has.
    pub(super) fn add(&self) -> Result<Vec<String>> {
        let mut result = Value::Null;
        for plugin in self.plugins()? {
            result = self.run("ADD", plugin, &result)?;
        }
        let addresses = result["ips"].as_array().into_iter().flatten();
        let address = |ip: &Value| Some(ip["address"].as_str()?.split('/').next()?.to_owned());
        Ok(addresses.filter_map(address).collect())
    }

    /// Gives back whatever it has.
    pub(super) fn del(&self) -> Result<()> {
        let mut failed = None;
        for plugin in self.plugins()?.iter().rev() {
            // The others give back what is theirs nevertheless.
            if let Err(error) = self.run("DEL", plugin, &Value::Null) {
                failed = Some(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn plugins(&self) -> Result<&Vec<Value>> {
        let plugins = self.list["plugins"].as_array();
        plugins.context("the network's configuration has no list of plugins")
    }

    fn run(&self, command: &str, plugin: &Value, before: &Value) -> Result<Value> {
        let kind = plugin["type"]
            .as_str()
            .context("a plugin of the network has no type")?;
        let program = find(kind)?;
        let mut config = plugin.clone();
        config["cniVersion"] = self.list["cniVersion"].clone();
        config["name"] = self.list["name"].clone();
        if !before.is_null() {
            config["prevResult"] = before.clone();
        }
        if plugin["capabilities"]["portMappings"] == true {
            config["runtimeConfig"] = json!({"portMappings": self.ports});
        }
        let paths = paths();
        let mut child = Command::new(&program)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", self.id)
            .env("CNI_NETNS", self.namespace)
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", &paths)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("running the CNI plugin {}", program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read says why.
            let _ = stdin.write_all(config.to_string().as_bytes());
        }
        let output = child.wait_with_output()?;
        let result = serde_json::from_slice::<Value>(&output.stdout);
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let why = result.ok().and_then(|error| {
                let message = error["msg"].as_str()?.to_owned();
                Some(match error["details"].as_str() {
                    Some(details) if !details.is_empty() => format!("{message}: {details}"),
                    _ => message,
                })
            });
            bail!(
                "the CNI plugin {kind} says: {}",
                why.as_deref().unwrap_or(said.trim())
            );
        }
        match command {
            "DEL" => Ok(Value::Null),
            _ => result.with_context(|| format!("reading what the CNI plugin {kind} says")),
        }
    }
}

fn paths() -> String {
    env::var("CNI_PATH").unwrap_or_else(|_| PATHS.to_owned())
}

pub(super) fn find(kind: &str) -> Result<PathBuf> {
    if kind.contains('/') {
        bail!("{kind:?} is no CNI plugin's name");
    }
    let paths = paths();
    let found = env::split_paths(&paths)
        .map(|dir| dir.join(kind))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!("there is no CNI plugin {kind} in {paths}: install containernetworking-plugins, or take --network none")
    })
}
