//! The runtimes that a suite or a bench can ask containerd for.

use std::fmt;

/// gVisor's `runsc` with the flags it needs in the testbed, where the bench puts it. (systrap: the emulated machine has no
/// platform that is faster. No network: it takes each network namespace of a kernel as new as 6.12 for the root one, in which
/// its own refuses to be.)
pub const RUNSC: &str = "/run/husk-runsc";

/// The script at [`RUNSC`].
pub const RUNSC_SCRIPT: &str = "#!/bin/sh\nexec runsc --platform=systrap --network=none \"$@\"\n";

/// A runtime under test or beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Runtime {
    /// Ours.
    Husk,
    /// runc, the control: a test that fails on it is wrong.
    Runc,
    /// crun.
    Crun,
    /// gVisor.
    Runsc,
}

impl Runtime {
    /// The name in tables and in `bench.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Husk => "husk",
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Runsc => "runsc",
        }
    }

    /// The shim that containerd starts for it.
    pub fn containerd_type(self) -> &'static str {
        match self {
            Self::Husk => "io.containerd.husk.v2",
            Self::Runc | Self::Crun | Self::Runsc => "io.containerd.runc.v2",
        }
    }

    /// What runc's shim runs in runc's place.
    pub fn binary(self) -> Option<&'static str> {
        match self {
            Self::Husk | Self::Runc => None,
            Self::Crun => Some("crun"),
            Self::Runsc => Some(RUNSC),
        }
    }

    /// The flags that make `ctr run` use it.
    pub fn ctr_flags(self) -> Vec<&'static str> {
        let mut flags = vec!["--runtime", self.containerd_type()];
        if let Some(binary) = self.binary() {
            flags.extend(["--runc-binary", binary]);
        }
        flags
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Runtime {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        [Self::Husk, Self::Runc, Self::Crun, Self::Runsc]
            .into_iter()
            .find(|r| r.name() == name)
            .ok_or_else(|| anyhow::anyhow!("unknown runtime {name:?}: husk, runc, crun or runsc"))
    }
}
