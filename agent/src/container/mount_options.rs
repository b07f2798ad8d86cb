//! The option strings of a mount, sorted into what the kernel's mount API wants.
//!
//! One string list mixes four things: attributes of the mount (`ro`, `nosuid`; `rro` for the whole tree), its
//! propagation (`rslave`), flags of the file system (`sync`), and the file system's own `key=value` data. A
//! later option overrides an earlier one of the same kind, as with mount(8). Names are runc's.

use super::error::LaunchError;
use super::sys::MountAttributes;

/// MOUNT_ATTR_* of linux/mount.h.
pub(crate) mod attr {
    pub(crate) const RDONLY: u64 = 0x01;
    pub(crate) const NOSUID: u64 = 0x02;
    pub(crate) const NODEV: u64 = 0x04;
    pub(crate) const NOEXEC: u64 = 0x08;
    /// The field of the three atime modes.
    pub(crate) const ATIME_MASK: u64 = 0x70;
    pub(crate) const NOATIME: u64 = 0x10;
    pub(crate) const STRICTATIME: u64 = 0x20;
    pub(crate) const NODIRATIME: u64 = 0x80;
    pub(crate) const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// Attributes to set and to clear. Not both for the same bit, except within the atime field.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct AttributeChange {
    pub(crate) set: u64,
    pub(crate) clear: u64,
}

impl AttributeChange {
    fn set(&mut self, bits: u64) {
        self.set |= bits;
        self.clear &= !bits;
    }

    fn clear(&mut self, bits: u64) {
        self.clear |= bits;
        self.set &= !bits;
    }

    /// The atime mode is a field, not a bit: the kernel wants it cleared whenever it is set.
    fn atime(&mut self, mode: u64) {
        self.set = self.set & !attr::ATIME_MASK | mode;
        self.clear |= attr::ATIME_MASK;
    }

    /// Applies one option by its name without the recursive `r`; false if it is none of ours.
    fn apply(&mut self, name: &str) -> bool {
        match name {
            "ro" => self.set(attr::RDONLY),
            "rw" => self.clear(attr::RDONLY),
            "nosuid" => self.set(attr::NOSUID),
            "suid" => self.clear(attr::NOSUID),
            "nodev" => self.set(attr::NODEV),
            "dev" => self.clear(attr::NODEV),
            "noexec" => self.set(attr::NOEXEC),
            "exec" => self.clear(attr::NOEXEC),
            "nodiratime" => self.set(attr::NODIRATIME),
            "diratime" => self.clear(attr::NODIRATIME),
            "nosymfollow" => self.set(attr::NOSYMFOLLOW),
            "symfollow" => self.clear(attr::NOSYMFOLLOW),
            "noatime" => self.atime(attr::NOATIME),
            "strictatime" => self.atime(attr::STRICTATIME),
            // relatime is the kernel's default, so it is also what undoing another mode leads to.
            "relatime" | "atime" | "norelatime" | "nostrictatime" => self.atime(0),
            _ => return false,
        }
        true
    }

    /// Nothing to do.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// For mount_setattr(2).
    pub(crate) fn attributes(self) -> MountAttributes {
        MountAttributes {
            set: self.set,
            clear: self.clear,
            ..MountAttributes::default()
        }
    }
}

/// A change of how mounts spread: MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Propagation {
    pub(crate) kind: u64,
    pub(crate) recursive: bool,
}

impl Propagation {
    /// Parses `private`, `rslave` and the like.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (recursive, kind) = match name.strip_prefix('r') {
            Some(rest) => (true, rest),
            None => (false, name),
        };
        let kind = match kind {
            "shared" => libc::MS_SHARED,
            "slave" => libc::MS_SLAVE,
            "private" => libc::MS_PRIVATE,
            "unbindable" => libc::MS_UNBINDABLE,
            _ => return None,
        };
        Some(Self { kind, recursive })
    }
}

/// Whether a mount binds an existing tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bind {
    /// The one mount.
    Single,
    /// With everything mounted below.
    Recursive,
}

/// A mount's options, sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    pub(crate) bind: Option<Bind>,
    pub(crate) remount: bool,
    pub(crate) attributes: AttributeChange,
    pub(crate) recursive_attributes: AttributeChange,
    pub(crate) propagation: Vec<Propagation>,
    /// Flags of the file system itself, by their fsconfig names.
    pub(crate) superblock: Vec<&'static str>,
    /// The file system's own options: key, and value if there is one.
    pub(crate) data: Vec<(String, Option<String>)>,
    /// Fill the new tmpfs with what its mount point held.
    pub(crate) copy_up: bool,
}

impl MountOptions {
    /// Sorts the options of one mount.
    pub(crate) fn parse<S: AsRef<str>>(options: &[S]) -> Result<Self, LaunchError> {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option.as_ref())?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<(), LaunchError> {
        if option.contains('\0') {
            return Err(LaunchError::invalid(format!(
                "mount option {option:?} contains a NUL byte"
            )));
        }
        if self.attributes.apply(option) {
            return Ok(());
        }
        if let Some(propagation) = Propagation::parse(option) {
            self.propagation.push(propagation);
            return Ok(());
        }
        match option {
            "" | "defaults" | "loud" | "silent" | "iversion" | "noiversion" => {}
            "bind" => self.bind = Some(self.bind.unwrap_or(Bind::Single)),
            "rbind" => self.bind = Some(Bind::Recursive),
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "sync" => self.superblock_flag("sync"),
            "dirsync" => self.superblock_flag("dirsync"),
            "lazytime" => self.superblock_flag("lazytime"),
            "mand" => self.superblock_flag("mand"),
            "async" => self.superblock.retain(|flag| *flag != "sync"),
            "nolazytime" => self.superblock.retain(|flag| *flag != "lazytime"),
            "nomand" => self.superblock.retain(|flag| *flag != "mand"),
            "idmap" | "ridmap" => {
                return Err(LaunchError::invalid(format!(
                    "mount option {option:?} is not supported: the guest's shared file system has no idmapped mounts"
                )));
            }
            _ => {
                let recursive = option
                    .strip_prefix('r')
                    .is_some_and(|name| self.recursive_attributes.apply(name));
                if !recursive {
                    self.data.push(match option.split_once('=') {
                        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                        None => (option.to_owned(), None),
                    });
                }
            }
        }
        Ok(())
    }

    fn superblock_flag(&mut self, flag: &'static str) {
        if !self.superblock.contains(&flag) {
            self.superblock.push(flag);
        }
    }

    /// The value of a `key=value` option; the last one counts.
    pub(crate) fn data_value(&self, key: &str) -> Option<&str> {
        self.data
            .iter()
            .rev()
            .find(|(name, _)| name == key)
            .and_then(|(_, value)| value.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        MountOptions::parse(options).unwrap()
    }

    #[test]
    fn docker_volume() {
        let options = parse(&["rbind", "rprivate", "ro", "nosuid"]);
        assert_eq!(options.bind, Some(Bind::Recursive));
        assert_eq!(options.attributes.set, attr::RDONLY | attr::NOSUID);
        assert_eq!(
            options.propagation,
            [Propagation {
                kind: libc::MS_PRIVATE,
                recursive: true
            }]
        );
        assert!(options.data.is_empty());
    }

    #[test]
    fn later_wins_and_atime_is_a_field() {
        let options = parse(&["ro", "rw", "noatime", "strictatime"]);
        assert_eq!(options.attributes.set, attr::STRICTATIME);
        assert_eq!(options.attributes.clear, attr::RDONLY | attr::ATIME_MASK);
        assert_eq!(parse(&["noatime", "relatime"]).attributes.set, 0);
    }

    #[test]
    fn recursive_attributes_do_not_swallow_their_neighbours() {
        let options = parse(&[
            "rro",
            "rnosuid",
            "rw",
            "relatime",
            "remount",
            "rootcontext=x",
        ]);
        assert_eq!(
            options.recursive_attributes.set,
            attr::RDONLY | attr::NOSUID
        );
        assert_eq!(options.attributes.clear & attr::RDONLY, attr::RDONLY);
        assert!(options.remount);
        assert_eq!(options.data_value("rootcontext"), Some("x"));
        assert_eq!(parse(&["rrw"]).recursive_attributes.clear, attr::RDONLY);
        assert_eq!(
            parse(&["rrelatime"]).recursive_attributes.clear,
            attr::ATIME_MASK
        );
    }

    #[test]
    fn data_and_extensions() {
        let options = parse(&["size=64m", "mode=1777", "tmpcopyup", "newinstance"]);
        assert!(options.copy_up);
        assert_eq!(options.data_value("mode"), Some("1777"));
        assert_eq!(options.data.len(), 3);
        assert!(MountOptions::parse(&["idmap"]).is_err());
        assert!(MountOptions::parse(&["a\0b"]).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_sorted_or_refused(options in proptest::collection::vec(".{0,12}", 0..8)) {
            let _ = MountOptions::parse(&options);
        }

        #[test]
        fn never_sets_what_it_clears(
            options in proptest::collection::vec(
                proptest::sample::select(vec![
                    "ro", "rw", "rro", "rrw", "nosuid", "suid", "dev", "nodev", "exec", "noexec", "noatime",
                    "relatime", "strictatime", "rnoatime", "diratime", "nodiratime", "symfollow", "nosymfollow",
                ]),
                0..12,
            )
        ) {
            let parsed = MountOptions::parse(&options).unwrap();
            for change in [parsed.attributes, parsed.recursive_attributes] {
                prop_assert_eq!(change.set & change.clear & !attr::ATIME_MASK, 0);
                let atime = change.set & attr::ATIME_MASK;
                prop_assert!(atime == 0 || change.clear & attr::ATIME_MASK == attr::ATIME_MASK);
                prop_assert!(atime.count_ones() <= 1);
            }
            if let Some(last) = options.iter().rev().find(|o| **o == "ro" || **o == "rw") {
                prop_assert_eq!(parsed.attributes.set & attr::RDONLY != 0, *last == "ro");
            }
        }
    }
}
