//! `husk pull`.

use std::{io::Write as _, sync::Arc};

use anyhow::{Context as _, Result};
use husk_image::{
    layer::Limits,
    manifest::Platform,
    name::ImageName,
    pull::{Options, Pulled, pull as pull_image},
};

use crate::{
    args,
    place::{Place, platform},
    progress::{self, Shown},
};

/// For a container that wants an image which is not there. What the pull shows goes where errors go: the output is the container's.
pub(crate) fn pull_for_run(place: &Place, name: &ImageName, quiet: bool) -> Result<Pulled> {
    let options = Options {
        platform: Platform::here(),
        limits: Limits::default(),
        settings: place.settings()?,
    };
    get(place, name, &options, progress::beside(quiet))
}

fn get(
    place: &Place,
    name: &ImageName,
    options: &Options,
    progress: Arc<dyn Shown>,
) -> Result<Pulled> {
    let store = place.store()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting threads")?;
    let pulled = runtime.block_on(pull_image(
        &store,
        name,
        options,
        Arc::clone(&progress) as _,
    ));
    // What is left waits for a helper or a lock, and ends with the process.
    runtime.shutdown_background();
    progress.end();
    pulled.with_context(|| format!("pulling {name}"))
}

pub(crate) fn pull(place: &Place, args: &args::Pull) -> Result<()> {
    let name: ImageName = args.image.parse()?;
    let options = Options {
        platform: platform(args.platform.as_deref())?,
        limits: Limits::default(),
        settings: place.settings()?,
    };
    let store = place.store()?;
    let before = store
        .names()?
        .into_iter()
        .find(|(other, _)| *other == name.to_string());
    let pulled = get(place, &name, &options, progress::of(args))?;
    let was_there =
        before.is_some_and(|(_, old)| old.digest().as_ref() == pulled.digest.to_string());
    told(args, &name, &pulled, was_there)
}

/// The end, as docker tells it.
fn told(args: &args::Pull, name: &ImageName, pulled: &Pulled, was_there: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        let end = serde_json::json!({
            "status": "pulled", "name": name.to_string(), "digest": pulled.digest.to_string(), "new": !was_there,
        });
        writeln!(out, "{end}")?;
        return Ok(());
    }
    if !args.quiet {
        writeln!(out, "Digest: {}", pulled.digest)?;
        let status = match was_there {
            true => "Image is up to date",
            false => "Downloaded newer image",
        };
        writeln!(out, "Status: {status} for {name}")?;
    }
    writeln!(out, "{name}")?;
    Ok(())
}
