//! What docs/engines/docker.md has a reader do.

use anyhow::{Context as _, Result, ensure};
use husk_tests::ctr;

use crate::context::Context;

const PAGE: &str = include_str!("../../../../docs/engines/docker.md");

/// The page's blocks of this kind.
fn blocks(kind: &str) -> Result<Vec<&'static str>> {
    PAGE.split(&format!("```{kind}\n"))
        .skip(1)
        .map(|rest| Ok(rest.split_once("```").context("the block does not end")?.0))
        .collect()
}

/// The first one of this kind.
///
/// # Errors
/// There is none.
pub fn block(kind: &str) -> Result<&'static str> {
    let first = blocks(kind)?.into_iter().next();
    first.with_context(|| format!("no {kind} on the page"))
}

/// Every line of the page's console blocks after a `$`, in a shell, one after another.
pub fn commands(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let mut count = 0;
    for block in blocks("console")? {
        for line in block.lines().filter_map(|line| line.strip_prefix("$ ")) {
            ctr::output(docker.program("sh").args(["-ec", line]))?
                .ok()
                .with_context(|| line.to_owned())?;
            count += 1;
        }
    }
    ensure!(count > 5, "{count} commands");
    Ok(())
}
