//! What a pull shows of itself: bars on a terminal, lines in a pipe, JSON where it is asked for.

use std::{
    collections::HashMap,
    io::{self, IsTerminal as _, Write as _},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use husk_image::{
    layer::Sha256Digest,
    pull::{Event, Progress},
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;

use crate::args;

/// A progress that is told when it is over.
pub(crate) trait Shown: Progress {
    /// Nothing more will come.
    fn end(&self) {}
}

impl Shown for () {}

pub(crate) fn of(args: &args::Pull) -> Arc<dyn Shown> {
    if args.json {
        Arc::new(Json::default())
    } else if args.quiet {
        Arc::new(())
    } else if io::stdout().is_terminal() {
        Arc::new(Bars::default())
    } else {
        Arc::new(Lines::default())
    }
}

/// Beside something else, which has the output: bars on a terminal, or nothing.
pub(crate) fn beside(quiet: bool) -> Arc<dyn Shown> {
    if !quiet && io::stderr().is_terminal() {
        // indicatif draws on standard error.
        return Arc::new(Bars::default());
    }
    Arc::new(())
}

/// The short name of a layer, as docker shows it.
fn short(digest: &Sha256Digest) -> String {
    digest.hex().chars().take(12).collect()
}

/// The least time between two lines that tell how far a layer is.
const BETWEEN: Duration = Duration::from_millis(200);

/// One object a line.
#[derive(Default)]
struct Json {
    /// Of each layer: its bytes, and when it was last told of.
    layers: Mutex<HashMap<Sha256Digest, (u64, Option<Instant>)>>,
}

impl Json {
    /// Is it time to tell of a layer again?
    fn is_due(&self, digest: &Sha256Digest, bytes: u64) -> bool {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((size, told)) = layers.get_mut(digest) else {
            return true;
        };
        let is_due = *size == bytes || told.is_none_or(|told| told.elapsed() >= BETWEEN);
        if is_due {
            *told = Some(Instant::now());
        }
        is_due
    }
}

impl Progress for Json {
    fn event(&self, event: Event<'_>) {
        let line = match event {
            Event::Asking { registry } => json!({"status": "asking", "registry": registry}),
            Event::NextRegistry { registry, error } => {
                json!({"status": "failed over", "registry": registry, "error": error.to_string()})
            }
            Event::Layer { digest, size } => {
                let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
                layers.insert(*digest, (size, None));
                json!({"status": "layer", "digest": digest.to_string(), "size": size})
            }
            Event::Fetched { digest, bytes } => {
                if !self.is_due(digest, bytes) {
                    return;
                }
                json!({"status": "downloading", "digest": digest.to_string(), "bytes": bytes})
            }
            Event::There { digest } => json!({"status": "exists", "digest": digest.to_string()}),
            Event::Again {
                digest,
                pause,
                error,
            } => json!({
                "status": "retrying", "digest": digest.to_string(), "seconds": pause.as_secs_f64(), "error": error.to_string(),
            }),
            Event::Unpacked { digest } => {
                json!({"status": "unpacked", "digest": digest.to_string()})
            }
        };
        // A reader that has gone does not stop the pull.
        let _ = writeln!(io::stdout(), "{line}");
    }
}

impl Shown for Json {}

/// A line for each thing that has been done.
#[derive(Default)]
struct Lines {
    sizes: Mutex<HashMap<Sha256Digest, u64>>,
}

impl Progress for Lines {
    fn event(&self, event: Event<'_>) {
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match event {
            Event::Asking { .. } => return,
            Event::NextRegistry { registry, error } => format!("{registry}: {error}"),
            Event::Layer { digest, size } => {
                sizes.insert(*digest, size);
                format!("{}: Pulling fs layer", short(digest))
            }
            Event::Fetched { digest, bytes } => {
                if sizes.get(digest) != Some(&bytes) {
                    return;
                }
                sizes.remove(digest);
                format!("{}: Download complete", short(digest))
            }
            Event::There { digest } => format!("{}: Already exists", short(digest)),
            Event::Again { digest, error, .. } => format!("{}: Retrying: {error}", short(digest)),
            Event::Unpacked { digest } => format!("{}: Pull complete", short(digest)),
        };
        // A reader that has gone does not stop the pull.
        let _ = writeln!(io::stdout(), "{line}");
    }
}

impl Shown for Lines {}

/// A bar for each layer.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    bars: Mutex<HashMap<Sha256Digest, ProgressBar>>,
}

impl Bars {
    fn with(&self, digest: &Sha256Digest, act: impl FnOnce(&ProgressBar)) {
        let bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = bars.get(digest) {
            act(bar);
        }
    }
}

impl Progress for Bars {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Asking { .. } => {}
            Event::NextRegistry { registry, error } => {
                // The terminal may have gone.
                let _ = self.all.println(format!("{registry}: {error}"));
            }
            Event::Layer { digest, size } => {
                let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
                bars.entry(*digest).or_insert_with(|| {
                    let template = "{prefix}: {msg:18} {bar:30} {bytes}/{total_bytes}";
                    let style = ProgressStyle::with_template(template);
                    let bar = ProgressBar::new(size)
                        .with_prefix(short(digest))
                        .with_message("Waiting");
                    self.all
                        .add(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
                });
            }
            Event::Fetched { digest, bytes } => self.with(digest, |bar| {
                bar.set_position(bytes);
                bar.set_message(match bar.length() == Some(bytes) {
                    true => "Extracting",
                    false => "Downloading",
                });
            }),
            Event::There { digest } => self.with(digest, |bar| {
                bar.set_position(bar.length().unwrap_or_default());
                bar.set_message("Already exists");
            }),
            Event::Again { digest, error, .. } => {
                let _ = self.all.println(format!("{}: {error}", short(digest)));
                self.with(digest, |bar| bar.set_message("Retrying"));
            }
            Event::Unpacked { digest } => {
                self.with(digest, |bar| bar.finish_with_message("Pull complete"));
            }
        }
    }
}

impl Shown for Bars {
    fn end(&self) {
        let bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        // The bars of a pull that failed stay as they are.
        bars.values().for_each(ProgressBar::abandon);
    }
}
