//! `husk load`, `save` and `import`.

use std::{
    fs::{self, File},
    io::{self, BufWriter, IsTerminal as _, Read, Write},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use husk_image::{layer::Limits, manifest::Platform, name::ImageName};

use crate::{
    args::{self, ArchiveFormat},
    place::{Place, find, platform},
};

pub(crate) fn load(place: &Place, args: &args::Load) -> Result<()> {
    let (archive, what) = source(args.input.as_deref(), "husk load -i FILE")?;
    let names = place
        .store()?
        .load(archive)
        .with_context(|| format!("loading {what}"))?;
    let mut out = io::stdout().lock();
    for name in names.iter().filter(|_| !args.quiet) {
        writeln!(out, "Loaded image: {name}")?;
    }
    Ok(())
}

pub(crate) fn save(place: &Place, args: &args::Save) -> Result<()> {
    let store = place.store()?;
    let images = store.list(&Platform::here())?;
    let mut names = Vec::new();
    for word in &args.images {
        let found = find(&images, word)?;
        names.extend(found.iter().map(|image| &*image.name));
    }
    let save = |archive: &mut dyn Write| match args.format {
        ArchiveFormat::Oci => store.save(&names, archive),
        ArchiveFormat::Docker => store.save_for_docker(&names, &Platform::here(), archive),
    };
    let Some(path) = &args.output else {
        let out = io::stdout();
        if out.is_terminal() {
            bail!("an archive is nothing for a terminal: -o FILE writes it to a file");
        }
        return Ok(save(&mut BufWriter::new(out.lock()))?);
    };
    // Half an archive never has the name.
    let mut new = path.clone().into_os_string();
    new.push(format!(".{}.new", std::process::id()));
    let new = Path::new(&new);
    let write = || {
        let file = File::create(new).with_context(|| format!("writing {}", new.display()))?;
        save(&mut BufWriter::with_capacity(256 << 10, &file))?;
        file.sync_all()?;
        fs::rename(new, path).with_context(|| format!("writing {}", path.display()))
    };
    let written = write();
    if written.is_err() {
        // It may not have come to be.
        let _ = fs::remove_file(new);
    }
    written
}

pub(crate) fn import(place: &Place, args: &args::Import) -> Result<()> {
    let name: ImageName = args.name.parse()?;
    let platform = platform(args.platform.as_deref())?;
    let path = (args.file != Path::new("-")).then_some(&*args.file);
    let (archive, what) = source(path, "husk import FILE NAME")?;
    let digest = place
        .store()?
        .import(archive, &name.to_string(), &platform, Limits::default())
        .with_context(|| format!("importing {what}"))?;
    writeln!(io::stdout(), "{digest}")?;
    Ok(())
}

/// A file, or standard input; and what to call it.
fn source(path: Option<&Path>, usage: &str) -> Result<(Box<dyn Read>, String)> {
    if let Some(path) = path {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        return Ok((Box::new(file), path.display().to_string()));
    }
    if io::stdin().is_terminal() {
        bail!(
            "an archive is expected on standard input, which is a terminal: `{usage}` reads a file"
        );
    }
    Ok((Box::new(io::stdin().lock()), "standard input".to_owned()))
}
