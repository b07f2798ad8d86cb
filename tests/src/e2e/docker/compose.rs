//! `docker compose` with the file on docs/engines/docker.md: a database, and a web server that is reached from the host before it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use husk_tests::{
    ctr::{self, Output},
    docker::Docker,
    host, wait,
};

use super::page;
use crate::context::Context;

/// From the Debian tree to `$0`, what these two and a shell need: the whole of it takes Docker a minute to import.
const TREE: &str = r#"
mkdir -p "$0"/run "$0"/var/log/nginx "$0"/usr/bin "$0"/usr/sbin "$0"/usr/lib/x86_64-linux-gnu "$0"/usr/lib64
for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$0/$dir"; done
cd /srv/debian-rootfs
programs="usr/bin/redis-server usr/bin/redis-cli usr/bin/sh usr/sbin/nginx usr/lib/nginx/modules/ngx_stream_module.so"
libraries=$(chroot . ldd $programs | grep -o '/lib[^ :]* ' | sort -u | sed 's,^/,,')
cp -aL --parents $programs $libraries etc/passwd etc/group var/lib/nginx "$0"
"#;

/// A project of compose's; dropped, nothing of it is left.
struct Project<'a> {
    docker: &'a Docker,
    name: String,
    dir: &'a Path,
}

impl Project<'_> {
    fn run(&self, arguments: &[&str]) -> Result<Output> {
        let head = ["compose", "--project-name", &self.name];
        let mut command = self.docker.command(&[&head, arguments].concat());
        ctr::output(command.current_dir(self.dir))
    }

    fn ok(&self, arguments: &[&str]) -> Result<String> {
        Ok(self.run(arguments)?.ok()?.text())
    }
}

impl Drop for Project<'_> {
    fn drop(&mut self) {
        let _ = self.run(&["down", "--volumes", "--timeout", "0"]);
    }
}

/// What the database answers by way of the web server, once it answers.
fn asked(address: &str, query: &str) -> Result<String> {
    wait::until(&format!("an answer to {query:?}"), || {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(wait::HANG)).ok()?;
        stream.write_all(format!("{query}\r\n").as_bytes()).ok()?;
        let mut answer = vec![0; 64];
        let length = stream.read(&mut answer).ok()?;
        let _ = stream.shutdown(Shutdown::Both);
        answer.truncate(length);
        (length > 0).then(|| String::from_utf8_lossy(&answer).trim_end().to_owned())
    })
}

pub fn compose(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let dir = tempfile::tempdir()?;
    let tree = dir.path().join("tree");
    host::run(&["sh", "-ec", TREE, &tree.display().to_string()])?;
    docker.import(&tree, "debian:husk")?;
    fs::write(dir.path().join("compose.yaml"), page::block("yaml")?)?;
    let project = Project {
        docker,
        name: docker.fresh("shop"),
        dir: dir.path(),
    };
    project.ok(&["up", "--detach"])?;
    let format = "{{.Service}} {{.State}} {{.Health}}";
    let services = project.ok(&["ps", "--all", "--format", format])?;
    let mut services: Vec<&str> = services.lines().map(str::trim_end).collect();
    services.sort_unstable();
    ensure!(
        services == ["db running healthy", "web running"],
        "{services:?}"
    );
    let address = project.ok(&["port", "web", "6379"])?;
    let set = asked(&address, "SET fruit pear")?;
    ensure!(set == "+OK", "{set}");
    let fruit = project.ok(&["exec", "-T", "db", "redis-cli", "get", "fruit"])?;
    ensure!(fruit == "pear", "{fruit}");
    let logs = project.ok(&["logs", "--no-color", "web"])?;
    ensure!(logs.contains("asks") && logs.contains(":6379"), "{logs}");

    // Another container with the same volume and, maybe, another address.
    project.ok(&["up", "--detach", "--wait", "--force-recreate", "db"])?;
    let fruit = asked(&address, "GET fruit")?;
    ensure!(fruit == "$4\r\npear", "{fruit}");

    let volume = format!("{}_data", project.name);
    docker.ok(&["volume", "inspect", &volume])?;
    project.ok(&["down", "--volumes"])?;
    let left = project.ok(&["ps", "--all", "--quiet"])?;
    ensure!(left.is_empty(), "{left}");
    for (kind, name) in [
        ("volume", &volume),
        ("network", &format!("{}_default", project.name)),
    ] {
        if docker.run(&[kind, "inspect", name])?.code == 0 {
            bail!("the {kind} {name} is left");
        }
    }
    TcpStream::connect(&address)
        .err()
        .context("the published port answers still")?;
    Ok(())
}
