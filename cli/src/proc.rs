//! What the kernel tells of processes, in /proc.

/// A field of a process' `status` (proc_pid_status(5)).
pub(crate) fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.strip_prefix(':')?;
        Some(value.trim())
    })
}

/// A line of `mountinfo` (proc_pid_mountinfo(5)).
pub(crate) struct Mount<'a> {
    /// Where it is, as the kernel writes it: blanks and backslashes in octal.
    pub(crate) at: &'a str,
    /// Options of this mount, without those of its file system.
    pub(crate) options: Vec<&'a str>,
}

/// The mounts of a `mountinfo`.
pub(crate) fn mounts(mountinfo: &str) -> impl Iterator<Item = Mount<'_>> {
    mountinfo.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(4);
        Some(Mount {
            at: fields.next()?,
            options: fields.next()?.split(',').collect(),
        })
    })
}
