//! `husk cp`: files between the host and a container, by docker's rules (docs.docker.com, "docker container cp").
//!
//! Nothing runs in the container for it, so any image will do, running or not. Its files are looked at on the host ([`tree`]), and as a
//! container is hostile, no path of it leads anywhere but below its root ([`crate::root`]), whatever it changes meanwhile ([`walk`], [`make`]).

mod make;
mod owners;
mod stream;
mod tree;
mod walk;

use std::{
    ffi::OsStr,
    io::{self, BufWriter, IsTerminal as _},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::{
    fs::{FileType, OFlags, fstat},
    io::Errno,
};

use self::{
    make::{Keep, Made, Maker, Replace},
    owners::Owners,
    tree::Tree,
    walk::Source,
};
use crate::{
    args,
    container::Container,
    human,
    place::Place,
    root::{DIRECTORY, PLACE, Root, split},
};

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum End<'a> {
    /// "-"
    Stream,
    Host(&'a [u8]),
    Container {
        name: &'a str,
        path: &'a [u8],
    },
}

impl<'a> End<'a> {
    /// Reads a word of the command line. What begins with "/" or "." is the host's, colon or not.
    fn of(word: &'a OsStr) -> Result<Self> {
        let bytes = word.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        let Some(at) = colon.filter(|_| !bytes.starts_with(b"/") && !bytes.starts_with(b"."))
        else {
            return Ok(Self::Host(bytes));
        };
        let (name, path) = (bytes.get(..at), bytes.get(at + 1..));
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        match (name.filter(|name| !name.is_empty()), path) {
            (_, None | Some(b"")) => bail!("{word:?} names no path behind its colon"),
            (Some(name), Some(path)) => Ok(Self::Container { name, path }),
            _ => bail!(
                "{word:?} names no container before its colon: ./ before it makes it a file of the host"
            ),
        }
    }
}

pub(crate) fn cp(place: &Place, args: &args::Cp) -> Result<()> {
    let find = |name: &str| place.containers()?.find(name);
    match (End::of(&args.source)?, End::of(&args.destination)?) {
        (End::Container { name, path }, End::Host(to)) => {
            from_container(&find(name)?, path, to, args)
        }
        (End::Container { name, path }, End::Stream) => stream_out(&find(name)?, path, args),
        (End::Host(from), End::Container { name, path }) => {
            to_container(from, &find(name)?, path, args)
        }
        (End::Stream, End::Container { name, path }) => stream_in(&find(name)?, path, args),
        (End::Container { .. }, End::Container { .. }) => {
            bail!(
                "husk does not copy between containers: `husk cp A:PATH - | husk cp - B:PATH` does"
            )
        }
        _ => bail!("neither is a container's: one of the two is CONTAINER:PATH"),
    }
}

fn from_container(container: &Container, path: &[u8], to: &[u8], args: &args::Cp) -> Result<()> {
    // The host's side first: it needs no mounts.
    let there = There::of(&Root::host(), to)?;
    let tree = Tree::open(container)?;
    let (source, named) = of_container(&tree, container, path, args.follow_link)?;
    let keep = Keep {
        owner: args.archive,
        privileges: args.archive,
        root: Owners::HOST,
    };
    copy(&source, &named, there, to, keep)
}

fn to_container(from: &[u8], container: &Container, path: &[u8], args: &args::Cp) -> Result<()> {
    let (source, named) = source(&Root::host(), Owners::HOST, from, args.follow_link)?;
    let tree = Tree::open(container)?;
    tree.owners.act_as_root()?;
    let there = There::of(&Root::container(&tree.root), &from_root(path))?;
    tree.check(there.directory(), &lossy(path), &container.record.name)?;
    let keep = Keep {
        owner: args.archive,
        privileges: true,
        root: tree.owners,
    };
    copy(&source, &named, there, path, keep)
}

fn stream_out(container: &Container, path: &[u8], args: &args::Cp) -> Result<()> {
    let out = io::stdout();
    if out.is_terminal() {
        bail!("an archive is nothing for a terminal: write it to a file or a pipe");
    }
    let tree = Tree::open(container)?;
    let (source, named) = of_container(&tree, container, path, args.follow_link)?;
    let mut writer = stream::Writer::new(BufWriter::with_capacity(256 << 10, out.lock()));
    let top = if named.contents { &[][..] } else { named.name };
    source.walk(top, &mut writer)?;
    writer.finish()
}

fn stream_in(container: &Container, path: &[u8], args: &args::Cp) -> Result<()> {
    let tree = Tree::open(container)?;
    tree.owners.act_as_root()?;
    let root = Root::container(&tree.root);
    let path = from_root(path);
    let dir = root.open(&path, DIRECTORY);
    let dir = dir.with_context(|| {
        format!(
            "an archive is unpacked into a directory of the container, and {} is none",
            lossy(&path)
        )
    })?;
    tree.check(&dir, &lossy(&path), &container.record.name)?;
    let keep = Keep {
        owner: args.archive,
        privileges: true,
        root: tree.owners,
    };
    let mut maker = Maker::below(root, &path, keep);
    let copied = stream::read(io::stdin().lock(), &mut maker);
    told(copied, &maker.made)
}

/// A container's paths begin at its root, however they are written.
fn from_root(path: &[u8]) -> Vec<u8> {
    let at = path.iter().position(|byte| *byte != b'/');
    let below = path.get(at.unwrap_or(path.len())..).unwrap_or_default();
    [b"/", below].concat()
}

/// What the source is called.
struct Named<'a> {
    /// Empty where it has no name of its own.
    name: &'a [u8],
    /// Not the directory, but what is in it.
    contents: bool,
}

/// What is at a path of a container's, where the host has something of it.
fn of_container<'a>(
    tree: &Tree,
    container: &Container,
    path: &'a [u8],
    follow: bool,
) -> Result<(Source, Named<'a>)> {
    let (source, named) = source(&Root::container(&tree.root), tree.owners, path, follow)?;
    tree.check(&source.place, &lossy(path), &container.record.name)?;
    Ok((source, named))
}

fn source<'a>(
    root: &Root<'_>,
    owners: Owners,
    path: &'a [u8],
    follow: bool,
) -> Result<(Source, Named<'a>)> {
    let flags = if follow {
        PLACE
    } else {
        PLACE | OFlags::NOFOLLOW
    };
    let place = root
        .open(path, flags)
        .with_context(|| format!("finding {}", lossy(path)))?;
    let source = Source::new(place, owners)?;
    if !source.can_be_copied() {
        bail!("{} is neither a file, a directory nor a link", lossy(path));
    }
    let name = split(path).1.unwrap_or_default();
    // Of what has no name, the contents are all that can be copied into something.
    let contents = path == b"." || path.ends_with(b"/.") || name.is_empty();
    Ok((source, Named { name, contents }))
}

/// What is at the destination.
enum There {
    Directory(OwnedFd),
    /// Something else: itself, and its name in its directory.
    Other(OwnedFd, OwnedFd, Vec<u8>),
    /// Nothing; its directory, its name, and whether that says that it is a directory.
    Nothing(OwnedFd, Vec<u8>, bool),
}

impl There {
    fn of(root: &Root<'_>, path: &[u8]) -> Result<Self> {
        let what = || format!("finding {}", lossy(path));
        let place = match root.open(path, PLACE) {
            Ok(place) => Some(place),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error).with_context(what),
        };
        if let Some(dir) = place
            .as_ref()
            .filter(|place| is(place, FileType::Directory))
        {
            return Ok(Self::Directory(dir.try_clone()?));
        }
        let (parent, name) = split(path);
        let name = name
            .ok_or_else(|| anyhow!("there is no directory {}", lossy(path)))?
            .to_vec();
        let dir = root.open(parent, DIRECTORY);
        let dir =
            dir.with_context(|| format!("there is no directory {} to copy into", lossy(parent)))?;
        Ok(match place {
            Some(place) if is(&place, FileType::RegularFile) => Self::Other(place, dir, name),
            Some(_) => bail!("{} is neither a file nor a directory", lossy(path)),
            None => Self::Nothing(dir, name, path.ends_with(b"/")),
        })
    }

    /// What is made lies here.
    fn directory(&self) -> &OwnedFd {
        match self {
            Self::Directory(dir) | Self::Other(_, dir, _) | Self::Nothing(dir, ..) => dir,
        }
    }
}

fn is(place: &OwnedFd, kind: FileType) -> bool {
    fstat(place).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == kind)
}

/// Copies by docker's rules.
fn copy(source: &Source, named: &Named<'_>, there: There, to: &[u8], keep: Keep) -> Result<()> {
    let mut maker;
    let copied = match &there {
        There::Directory(dir) => {
            maker = Maker::new(dir, keep);
            let is_whole = named.contents && source.is_directory();
            let top = if is_whole { &[][..] } else { named.name };
            source.walk(top, &mut maker)
        }
        There::Other(..) if source.is_directory() => {
            bail!(
                "a directory cannot be copied to a file: {} is one",
                lossy(to)
            )
        }
        There::Other(place, dir, name) => {
            maker = Maker::new(dir, keep);
            source.walk(
                name,
                &mut Replace {
                    maker: &mut maker,
                    place,
                    dir,
                },
            )
        }
        There::Nothing(_, _, true) if !source.is_directory() => {
            bail!("there is no directory {}", lossy(to))
        }
        There::Nothing(dir, name, _) => {
            maker = Maker::new(dir, keep);
            source.walk(name, &mut maker)
        }
    };
    told(copied, &maker.made)
}

/// An error says what has been done before it.
fn told(copied: Result<()>, made: &Made) -> Result<()> {
    copied.map_err(|error| match made.entries {
        0 => error.context("nothing has been copied"),
        entries => error.context(format!(
            "{entries} files, directories and links of {} have been copied, the rest has not",
            human::size(made.bytes)
        )),
    })
}

/// For messages.
fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
mod tests;
