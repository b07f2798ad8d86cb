//! containerd's events, as `ctr events` prints them.

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{containerd::Containerd, ctr::Running, wait};

/// `ctr events`, from before what a test does. Dropped, it ends.
pub struct Events(Running);

impl Events {
    /// Listens from now on.
    ///
    /// # Errors
    /// `ctr events` does not start, or shows nothing.
    pub fn listen(containerd: &Containerd) -> Result<Self> {
        let events = Self(Running::start(containerd.ctr().arg("events"), false)?);
        // The stream has begun once it shows something that came after it.
        wait::until("ctr events to listen", || {
            let probe = containerd.fresh_id("probe");
            containerd.run_ctr(&["namespaces", "create", &probe]).ok()?;
            containerd.run_ctr(&["namespaces", "remove", &probe]).ok()?;
            (!events.0.text_so_far().is_empty()).then_some(())
        })?;
        Ok(events)
    }

    /// The lines about this container so far.
    pub fn of(&self, id: &str) -> Vec<String> {
        let quoted = format!("\"{id}\"");
        let text = self.0.text_so_far();
        text.lines()
            .filter(|line| line.contains(&quoted))
            .map(str::to_owned)
            .collect()
    }

    /// The lines about this container, once its removal is among them: containerd says nothing of it after that.
    ///
    /// # Errors
    /// The removal is not told; with what was.
    pub fn until_removed(&self, id: &str) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        wait::until("the event of the removal", || {
            lines = self.of(id);
            (!topic(&lines, "/containers/delete").is_empty()).then_some(())
        })
        .with_context(|| format!("events so far: {lines:#?}"))?;
        Ok(lines)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = kill(Pid::from_raw(self.0.pid().cast_signed()), Signal::SIGKILL);
    }
}

/// The ends of a container's init among its lines: those of its execs have another id.
pub fn init_exits<'a>(lines: &'a [String], id: &str) -> Vec<&'a str> {
    let own = format!("\"id\":\"{id}\"");
    topic(lines, "/tasks/exit")
        .into_iter()
        .filter(|line| line.contains(&own))
        .collect()
}

/// The lines of one topic, `/tasks/exit` say.
pub fn topic<'a>(lines: &'a [String], topic: &str) -> Vec<&'a str> {
    lines
        .iter()
        .filter(|line| line.split_whitespace().any(|word| word == topic))
        .map(String::as_str)
        .collect()
}
