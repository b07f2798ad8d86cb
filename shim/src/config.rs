//! The node's settings: `/etc/husk/config.toml`.
//!
//! A file that is not there means the defaults; a file that is there must be right: an unknown key or a value out
//! of its range is an error that names file, line and key, because a typo that silently means the default is found only
//! in production. `deploy/config.toml` shows every key with its default. A pod may change a few of them by annotation
//! ([`crate::annotations`]), each only if `enabled_annotations` lists it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_protocol::vm::{CachePolicy, MAX_VCPUS, MIN_MEMORY_MIB};
use serde::Deserialize;
use toml::Spanned;

use crate::annotations::Annotation;

/// Where the settings are unless `$HUSK_CONFIG` or the runtime options' `ConfigPath` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/husk/config.toml";
/// Environment variable that names another file.
pub const PATH_VARIABLE: &str = "HUSK_CONFIG";
/// More than any machine has; catches a size given in bytes.
const MEMORY_CEILING_MIB: u64 = 16 * 1024 * 1024;

/// The settings, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Guest kernel: an uncompressed ELF `vmlinux` with a PVH note.
    pub kernel: PathBuf,
    /// Initramfs that holds the agent.
    pub initramfs: PathBuf,
    /// The `husk-vmm` binary.
    pub vmm: PathBuf,
    /// vCPUs of a pod that gives no CPU limit.
    pub default_vcpus: u8,
    /// Guest memory of a pod that gives no memory limit, in MiB.
    pub default_memory_mib: u64,
    /// Most vCPUs a pod gets, whatever it asks for. At most the machine's CPUs by default.
    pub max_vcpus: u8,
    /// Most guest memory a pod gets, in MiB. The machine's memory by default.
    pub max_memory_mib: u64,
    /// vCPUs that a running pod's VM may grow to; 0: it keeps those it was started with.
    pub grow_vcpus: u8,
    /// MiB of memory that a running pod's VM may grow to; 0: it keeps what it was started with.
    pub grow_memory_mib: u64,
    /// virtio-fs cache policy of the pod's share.
    pub cache: CachePolicy,
    /// Appended to the guest kernel's command line.
    pub kernel_params: String,
    /// The host's kernel carries pods' packets, where it can.
    pub vhost_net: bool,
    /// The VMM's user 0 is not the host's, where the kernel can do that.
    pub user_namespace: bool,
    /// The guest logs its boot on the serial console, into the shim's log. Slow.
    pub debug_console: bool,
    /// What the shim logs.
    pub log_level: LogLevel,
    /// Directory for what a running pod keeps on disk.
    pub state_dir: PathBuf,
    /// Directory of the shims' sockets.
    pub socket_dir: PathBuf,
    /// How long a VM may take until its agent has dialled.
    pub start_timeout: Duration,
    /// Annotations that a pod may use.
    pub enabled_annotations: Vec<Annotation>,
}

/// How much the shim logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What failed.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what happens to a pod.
    Info,
    /// And why. `-debug` means at least this.
    Debug,
    /// Everything.
    Trace,
}

/// The file as written; every key may be absent.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    kernel: Option<Spanned<PathBuf>>,
    initramfs: Option<Spanned<PathBuf>>,
    vmm: Option<Spanned<PathBuf>>,
    default_vcpus: Option<Spanned<i64>>,
    default_memory_mib: Option<Spanned<i64>>,
    max_vcpus: Option<Spanned<i64>>,
    max_memory_mib: Option<Spanned<i64>>,
    grow_vcpus: Option<Spanned<i64>>,
    grow_memory_mib: Option<Spanned<i64>>,
    cache: Option<CachePolicy>,
    kernel_params: Option<String>,
    vhost_net: Option<bool>,
    user_namespace: Option<bool>,
    debug_console: Option<bool>,
    log_level: Option<LogLevel>,
    state_dir: Option<Spanned<PathBuf>>,
    socket_dir: Option<Spanned<PathBuf>>,
    start_timeout_ms: Option<Spanned<i64>>,
    enabled_annotations: Option<Vec<Annotation>>,
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is named explicitly, or exists, and cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line is wrong.
    #[error("configuration {path}, line {line}{}: {reason}", key.as_ref().map(|k| format!(", key {k}")).unwrap_or_default())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The key, where the line has one.
        key: Option<String>,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// An annotation is ours and cannot be used.
    #[error("annotation {name}: {reason}")]
    Annotation {
        /// Its full name.
        name: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        let max_vcpus = std::thread::available_parallelism()
            .map(|n| u8::try_from(n.get()).unwrap_or(MAX_VCPUS).min(MAX_VCPUS))
            .unwrap_or(1);
        Self {
            kernel: lib_dir().join("vmlinux"),
            initramfs: lib_dir().join("initramfs.cpio"),
            vmm: lib_dir().join("husk-vmm"),
            default_vcpus: 1,
            default_memory_mib: 512,
            max_vcpus,
            max_memory_mib: host_memory_mib()
                .unwrap_or(MEMORY_CEILING_MIB)
                .max(MIN_MEMORY_MIB),
            grow_vcpus: 0,
            grow_memory_mib: 0,
            cache: CachePolicy::Auto,
            kernel_params: String::new(),
            vhost_net: true,
            user_namespace: true,
            debug_console: false,
            log_level: LogLevel::Info,
            state_dir: PathBuf::from("/run/husk"),
            socket_dir: PathBuf::from("/run/containerd/s"),
            start_timeout: Duration::from_secs(60),
            enabled_annotations: Vec::new(),
        }
    }
}

impl Config {
    /// Reads the settings: `explicit` (the runtime options' `ConfigPath`), else the file in `$HUSK_CONFIG`, else
    /// [`DEFAULT_PATH`]. Only the last may be missing.
    ///
    /// # Errors
    /// [`ConfigError`], a sentence for the person who wrote the file.
    pub fn load(explicit: Option<&Path>) -> Result<Self, ConfigError> {
        let named = explicit.map(Path::to_owned).or_else(Self::named);
        let path = named.clone().unwrap_or_else(|| DEFAULT_PATH.into());
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// The file that the environment names.
    pub fn named() -> Option<PathBuf> {
        std::env::var_os(PATH_VARIABLE)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    }

    /// Reads settings from a text; `path` is for messages.
    ///
    /// # Errors
    /// [`ConfigError::Line`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let reader = Reader { text, path };
        let file: File = toml::from_str(text)
            .map_err(|e| reader.error(e.span().map_or(0, |s| s.start), e.message().to_owned()))?;
        let mut config = Self::default();
        reader.path(file.kernel, &mut config.kernel)?;
        reader.path(file.initramfs, &mut config.initramfs)?;
        reader.path(file.vmm, &mut config.vmm)?;
        reader.path(file.state_dir, &mut config.state_dir)?;
        reader.path(file.socket_dir, &mut config.socket_dir)?;
        reader.number(&file.max_vcpus, 1, MAX_VCPUS, &mut config.max_vcpus)?;
        reader.number(
            &file.max_memory_mib,
            MIN_MEMORY_MIB,
            MEMORY_CEILING_MIB,
            &mut config.max_memory_mib,
        )?;
        // A default above a smaller machine's maximum is brought down; one that the file asks for must fit.
        config.default_vcpus = config.default_vcpus.min(config.max_vcpus);
        config.default_memory_mib = config.default_memory_mib.min(config.max_memory_mib);
        reader.number(
            &file.default_vcpus,
            1,
            config.max_vcpus,
            &mut config.default_vcpus,
        )?;
        reader.number(
            &file.default_memory_mib,
            MIN_MEMORY_MIB,
            config.max_memory_mib,
            &mut config.default_memory_mib,
        )?;
        reader.number(
            &file.grow_vcpus,
            0,
            config.max_vcpus,
            &mut config.grow_vcpus,
        )?;
        reader.number(
            &file.grow_memory_mib,
            0,
            config.max_memory_mib,
            &mut config.grow_memory_mib,
        )?;
        let mut timeout_ms = 0_u64;
        reader.number(&file.start_timeout_ms, 100, 600_000, &mut timeout_ms)?;
        if file.start_timeout_ms.is_some() {
            config.start_timeout = Duration::from_millis(timeout_ms);
        }
        config.cache = file.cache.unwrap_or(config.cache);
        config.kernel_params = file.kernel_params.unwrap_or(config.kernel_params);
        config.vhost_net = file.vhost_net.unwrap_or(config.vhost_net);
        config.user_namespace = file.user_namespace.unwrap_or(config.user_namespace);
        config.debug_console = file.debug_console.unwrap_or(config.debug_console);
        config.log_level = file.log_level.unwrap_or(config.log_level);
        config.enabled_annotations = file
            .enabled_annotations
            .unwrap_or(config.enabled_annotations);
        Ok(config)
    }
}

/// Turns places in the text into file, line and key.
struct Reader<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Reader<'_> {
    fn error(&self, offset: usize, reason: String) -> ConfigError {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let key = self
            .text
            .lines()
            .nth(line - 1)
            .and_then(|l| l.split_once('='))
            .map(|(key, _)| key.trim().to_owned())
            .filter(|key| !key.is_empty() && !key.starts_with('#'));
        ConfigError::Line {
            path: self.path.to_owned(),
            line,
            key,
            reason,
        }
    }

    fn path(
        &self,
        value: Option<Spanned<PathBuf>>,
        target: &mut PathBuf,
    ) -> Result<(), ConfigError> {
        let Some(value) = value else { return Ok(()) };
        if !value.as_ref().is_absolute() {
            let reason = format!("{:?} is not an absolute path", value.as_ref());
            return Err(self.error(value.span().start, reason));
        }
        *target = value.into_inner();
        Ok(())
    }

    fn number<T>(
        &self,
        value: &Option<Spanned<i64>>,
        min: T,
        max: T,
        target: &mut T,
    ) -> Result<(), ConfigError>
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display,
    {
        let Some(value) = value else { return Ok(()) };
        match T::try_from(*value.as_ref()) {
            Ok(n) if n >= min && n <= max => {
                *target = n;
                Ok(())
            }
            _ => {
                let reason = format!(
                    "{} is out of range, allowed is {min} to {max}",
                    value.as_ref()
                );
                Err(self.error(value.span().start, reason))
            }
        }
    }
}

/// Where kernel, initramfs and VMM are: `lib/husk` of the prefix that the shim is installed in, `/usr/local/lib/husk` for
/// a shim in `/usr/local/bin`.
fn lib_dir() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.parent()?.join("lib/husk")))
        .unwrap_or_else(|| PathBuf::from("/usr/lib/husk"))
}

fn host_memory_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    Some(kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXAMPLE: &str = include_str!("../../deploy/config.toml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/husk/config.toml"))
    }

    fn error(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    /// The example with every key switched on.
    fn uncommented() -> String {
        EXAMPLE
            .lines()
            .map(|l| {
                l.strip_prefix('#')
                    .filter(|l| !l.starts_with(' ') && l.contains(" = "))
                    .unwrap_or("")
            })
            .fold(String::new(), |all, line| all + line + "\n")
    }

    #[test]
    fn the_example_shows_every_key_with_its_default() {
        assert_eq!(parse(EXAMPLE).unwrap(), Config::default());
        let defaults = Config::default();
        let shown = Config {
            // These depend on the machine and on where husk is installed.
            kernel: defaults.kernel.clone(),
            initramfs: defaults.initramfs.clone(),
            vmm: defaults.vmm.clone(),
            max_vcpus: defaults.max_vcpus,
            max_memory_mib: defaults.max_memory_mib,
            ..parse(&uncommented()).unwrap()
        };
        assert_eq!(shown, defaults);
        // One line a key of the file, and one more is unknown.
        let message = error("nonsense = 1");
        let known = message.split('`').skip(3).step_by(2).collect::<Vec<_>>();
        assert!(known.len() >= 15, "{message}");
        for key in known {
            assert!(
                uncommented().contains(&format!("{key} = ")),
                "{key} is missing in deploy/config.toml"
            );
        }
    }

    #[test]
    fn errors_name_file_line_key_and_what_is_allowed() {
        let message = error("# first\n\nkernle = \"/x\"\n");
        assert!(
            message.contains("/etc/husk/config.toml, line 3, key kernle"),
            "{message}"
        );
        assert!(message.contains("`kernel`"), "{message}");
        let message = error("default_memory_mib = 512\ncache = \"sometimes\"");
        assert!(
            message.contains("line 2, key cache") && message.contains("`never`, `auto`, `always`"),
            "{message}"
        );
        let message = error("max_vcpus = 33");
        assert!(
            message.contains("line 1, key max_vcpus") && message.contains("1 to 32"),
            "{message}"
        );
        let message = error("\ndefault_memory_mib = 63");
        assert!(
            message.contains("line 2, key default_memory_mib") && message.contains("64 to"),
            "{message}"
        );
        let message = error("kernel = \"vmlinux\"");
        assert!(
            message.contains("key kernel") && message.contains("absolute"),
            "{message}"
        );
        let message = error("log_level = 3");
        assert!(message.contains("line 1, key log_level"), "{message}");
        let message = error("vmm = \"/a\"\nvmm = \"/b\"");
        assert!(
            message.contains("line 2, key vmm") && message.contains("duplicate"),
            "{message}"
        );
        let message = error("kernel = \"/a\"\nthis is no toml\n");
        assert!(message.contains("line 2"), "{message}");
        let message = error("max_memory_mib = 512\ngrow_memory_mib = 513");
        assert!(
            message.contains("line 2, key grow_memory_mib") && message.contains("0 to 512"),
            "{message}"
        );
        let message = error("max_vcpus = 2\ndefault_vcpus = 3");
        assert!(
            message.contains("line 2, key default_vcpus") && message.contains("1 to 2"),
            "{message}"
        );
    }

    #[test]
    fn a_smaller_maximum_brings_the_default_down() {
        let config = parse("max_memory_mib = 128").unwrap();
        assert_eq!(config.default_memory_mib, 128);
    }

    #[test]
    fn a_named_file_must_be_there() {
        let message = Config::load(Some(Path::new("/no/such/config.toml")))
            .unwrap_err()
            .to_string();
        assert!(message.contains("/no/such/config.toml"), "{message}");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(?s).{0,200}") {
            let _ = parse(&text).map_err(|e| e.to_string());
        }
    }
}
