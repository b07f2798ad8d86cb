//! Networks, names and published ports.

use anyhow::{Context as _, Result, ensure};
use husk_tests::{host, wait};

use super::{Husk, IMAGE};
use crate::context::Context;

pub fn networks(suite: &Context) -> Result<()> {
    let husk = Husk::new(suite)?;
    let serve = "mkdir /w; echo page >/w/index.html; exec httpd -f -p 80 -h /w";
    let web = [
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        "127.0.0.1:18080:80",
        IMAGE,
        "sh",
        "-c",
        serve,
    ];
    husk.text(&web)?;
    ensure!(husk.text(&["ps"])?.contains("127.0.0.1:18080->80/tcp"));
    let fetch = |from: &str| {
        let script = format!(
            "import urllib.request as r; print(r.urlopen('http://{from}/', timeout=5).read().decode().strip())"
        );
        host::run(&["python3", "-c", &script])
    };
    let address = husk.inspect("web")?["NetworkSettings"]["Addresses"][0].clone();
    let address = address.as_str().context("it has no address")?.to_owned();
    for from in [&*address, "127.0.0.1:18080"] {
        let page = wait::until(&format!("a page from {from}"), || fetch(from).ok())?;
        ensure!(page == "page", "{page}");
    }
    // By its name, from one that comes later; and the later one by its own.
    let get = [
        "run",
        "--rm",
        "--name",
        "later",
        IMAGE,
        "sh",
        "-c",
        "wget -q -O- http://web/; grep -c later /etc/hosts",
    ];
    ensure!(husk.text(&get)? == "page\n1");
    husk.text(&["run", "-d", "--name", "third", IMAGE, "sleep", "1000"])?;
    wait::until("the name of the newcomer", || {
        husk.text(&["exec", "web", "grep", "third", "/etc/hosts"])
            .ok()
    })?;
    // Another network does not know them.
    husk.text(&["network", "create", "mine"])?;
    let alone = [
        "run",
        "--rm",
        "--network",
        "mine",
        IMAGE,
        "sh",
        "-c",
        "ip -o -4 addr show eth0 | wc -l; grep -c web /etc/hosts",
    ];
    let out = husk.run(&alone)?.exited(1)?;
    ensure!(out.text() == "1\n0", "{out:?}");
    husk.text(&["network", "rm", "mine"])?;
    husk.run(&["network", "rm", "bridge"])?.exited(1)?;
    let out = husk
        .run(&["run", "--network", "host", IMAGE])?
        .exited(125)?;
    ensure!(out.errors().contains("of its own"), "{out:?}");
    Ok(())
}
