//! `husk images`, `rmi`, `tag` and `prune`.

use std::{
    collections::BTreeSet,
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use chrono::{DateTime, Utc};
use husk_image::{
    layer::Sha256Digest,
    manifest::Platform,
    name::ImageName,
    store::{Listed, Store, Swept},
};
use serde::Serialize;

use crate::{
    args, human, lifecycle,
    place::{Place, find, id},
    table,
};

/// What the name of an image with neither has in its place.
const NONE: &str = "<none>";

/// A line of `husk images`, with docker's keys.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Line {
    repository: String,
    tag: String,
    digest: String,
    #[serde(rename = "ID")]
    id: String,
    created_at: String,
    created_since: String,
    size: String,
    /// The same as a number.
    bytes: u64,
    /// The image can be run here.
    runs_here: bool,
}

pub(crate) fn list(place: &Place, args: &args::Images) -> Result<()> {
    let mut images = place.store()?.list(&Platform::here())?;
    if let Some(word) = &args.name {
        let whole: ImageName = word.parse()?;
        let repository = |name: &str| split(name).0;
        // With a tag it is that one, without one all of the repository.
        let is_tagged =
            whole.digest().is_some() || word.rsplit('/').next().is_some_and(|w| w.contains(':'));
        images.retain(|image| match is_tagged {
            true => image.name == whole.to_string(),
            false => {
                repository(&image.name) == repository(&whole.to_string()) || image.name == *word
            }
        });
    }
    let lines: Vec<Line> = images.iter().map(|image| line(image, args)).collect();
    if args.quiet {
        let mut out = io::stdout().lock();
        for line in &lines {
            writeln!(out, "{}", line.id)?;
        }
        return Ok(());
    }
    let mut headings = vec!["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"];
    if args.digests {
        headings.insert(2, "DIGEST");
    }
    table::print(args.format, &headings, &lines, |line| {
        let mut row = vec![
            &line.repository,
            &line.tag,
            &line.id,
            &line.created_since,
            &line.size,
        ];
        if args.digests {
            row.insert(2, &line.digest);
        }
        row.into_iter().cloned().collect()
    })
}

fn line(image: &Listed, args: &args::Images) -> Line {
    let (repository, tag) = split(&image.name);
    let created = image.image.as_ref().and_then(|image| {
        let text = image.config.created().as_deref()?;
        Some(DateTime::parse_from_rfc3339(text).ok()?.with_timezone(&Utc))
    });
    let since = created.map(|created| {
        let passed = Utc::now().signed_duration_since(created);
        // A clock may be wrong.
        human::ago(passed.to_std().unwrap_or(Duration::ZERO))
    });
    let whole = image.descriptor.digest().to_string();
    let short: String = id(image).chars().take(12).collect();
    Line {
        repository: docker_name(&repository),
        tag,
        id: if args.no_trunc { whole.clone() } else { short },
        digest: whole,
        created_at: created.map_or_else(|| "N/A".to_owned(), |created| created.to_rfc3339()),
        created_since: since.unwrap_or_else(|| "N/A".to_owned()),
        size: human::size(image.size),
        bytes: image.size,
        runs_here: image.image.is_some(),
    }
}

/// A name's repository, and its tag. What no registry's name is has all of it as its repository.
fn split(name: &str) -> (String, String) {
    let Ok(parsed) = name.parse::<ImageName>() else {
        return (name.to_owned(), NONE.to_owned());
    };
    if parsed.to_string() != name {
        return (name.to_owned(), NONE.to_owned());
    }
    let repository = format!("{}/{}", parsed.registry(), parsed.repository());
    let tag = name.strip_prefix(&format!("{repository}:"));
    (repository, tag.unwrap_or(NONE).to_owned())
}

/// Docker Hub's, without what docker leaves out.
fn docker_name(repository: &str) -> String {
    let hub = repository.strip_prefix("docker.io/");
    let name = hub.map(|name| name.strip_prefix("library/").unwrap_or(name));
    name.unwrap_or(repository).to_owned()
}

pub(crate) fn tag(place: &Place, args: &args::Tag) -> Result<()> {
    let store = place.store()?;
    let name: ImageName = args.name.parse()?;
    if name.digest().is_some() {
        bail!(
            "{:?} has a digest: only a registry gives such names",
            args.name
        );
    }
    let images = store.list(&Platform::here())?;
    let found = find(&images, &args.image)?;
    let image = found.first().context("there is no image")?;
    Ok(store.tag(&name.to_string(), &image.descriptor)?)
}

/// The layers that containers stand on.
fn kept(place: &Place) -> Result<BTreeSet<Sha256Digest>> {
    let containers = place.containers()?.all()?;
    let chains = containers
        .iter()
        .flat_map(|container| &container.record.chain);
    // They are the store's own names for them.
    chains
        .map(|hex| Ok(format!("sha256:{hex}").parse()?))
        .collect()
}

pub(crate) fn remove(place: &Place, args: &args::Rmi) -> Result<()> {
    let store = place.store()?;
    let mut out = io::stdout().lock();
    let mut failed = false;
    for word in &args.images {
        match names_to_remove(place, &store, word, args.force) {
            Ok(names) => {
                for name in names {
                    if store.untag(&name)? {
                        writeln!(out, "Untagged: {name}")?;
                    }
                }
            }
            // As docker does: the others go nevertheless.
            Err(_) if args.force => {}
            Err(error) => {
                eprintln!("husk: {error:#}");
                failed = true;
            }
        }
    }
    let swept = store.sweep(|| kept(place))?;
    if swept.is_none() {
        eprintln!(
            "husk: somebody is pulling or loading: what no name leads to goes with the next `husk prune`"
        );
    }
    if failed {
        bail!("not every image was removed");
    }
    Ok(())
}

fn names_to_remove(place: &Place, store: &Store, word: &str, force: bool) -> Result<Vec<String>> {
    let images = store.list(&Platform::here())?;
    let found = find(&images, word)?;
    let is_it = |image: &Listed, id: &str| {
        image
            .image
            .as_ref()
            .is_some_and(|i| i.digest.to_string() == id)
    };
    let names_left = |image: &Listed| {
        let same = |other: &&Listed| other.descriptor.digest() == image.descriptor.digest();
        images.iter().filter(same).count() - found.len()
    };
    for container in place.containers()?.all()? {
        let used = found
            .iter()
            .find(|image| is_it(image, &container.record.image_id));
        if let Some(image) = used.filter(|image| !force && names_left(image) == 0) {
            bail!(
                "{} is the image of container {}: remove that first, or --force takes the image's name away and leaves the container what it has",
                image.name,
                container.record.name
            );
        }
    }
    if found.len() > 1 && !force {
        let names: Vec<&str> = found.iter().map(|image| &*image.name).collect();
        bail!(
            "{word} has several names ({}): name one, or --force removes all",
            names.join(", ")
        );
    }
    Ok(found.iter().map(|image| image.name.clone()).collect())
}

pub(crate) fn prune(place: &Place, args: &args::Prune) -> Result<()> {
    let store = place.store()?;
    let what = match args.all {
        true => "all containers that do not run, and all images that no container has",
        false => "all containers that do not run, and what no image's name leads to",
    };
    if !args.force && !confirmed(&format!("This removes {what}. Go on?"))? {
        bail!("nothing was removed");
    }
    let mut out = io::stdout().lock();
    for name in lifecycle::remove_ended(place)? {
        writeln!(out, "Removed container: {name}")?;
    }
    if args.all {
        let containers = place.containers()?.all()?;
        for image in store.list(&Platform::here())? {
            let digest = image.image.map(|image| image.digest.to_string());
            if containers
                .iter()
                .any(|c| digest.as_ref() == Some(&c.record.image_id))
            {
                continue;
            }
            store.untag(&image.name)?;
            writeln!(out, "Untagged: {}", image.name)?;
        }
    }
    drop(out);
    let swept = store.sweep(|| kept(place))?.context(
        "somebody is pulling or loading an image: nothing was swept, try again when that has ended",
    )?;
    told(&swept)
}

fn told(swept: &Swept) -> Result<()> {
    let size = human::size(swept.bytes);
    let (blobs, layers) = (swept.blobs, swept.layers);
    writeln!(
        io::stdout(),
        "Removed {blobs} blobs ({size}) and {layers} unpacked layers"
    )?;
    Ok(())
}

fn confirmed(question: &str) -> Result<bool> {
    let input = io::stdin();
    if !input.is_terminal() {
        bail!("{question} Nobody can be asked: --force answers yes");
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    input.lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fall_apart_as_dockers_do() {
        let hex = "0".repeat(64);
        for (name, repository, tag) in [
            ("docker.io/library/busybox:1", "busybox", "1"),
            ("docker.io/a/b:latest", "a/b", "latest"),
            ("localhost:5000/a:1", "localhost:5000/a", "1"),
            (&format!("docker.io/library/x@sha256:{hex}"), "x", NONE),
            ("from skopeo", "from skopeo", NONE),
            ("short", "short", NONE),
        ] {
            let (found, found_tag) = split(name);
            assert_eq!((&*docker_name(&found), &*found_tag), (repository, tag));
        }
    }
}
