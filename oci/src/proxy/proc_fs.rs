//! A container's `/proc`, as far as `podman top` reads it: the pids and `stat`, `status`, `cmdline` and `ns/pid` of each, and the `btime` of `stat`.
//!
//! The proxy serves it itself, by FUSE. It has nothing until somebody looks, and then what the guest says at that moment.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, UNIX_EPOCH},
};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    Request, Session, SessionACL,
};
use rustix::{
    fs::{Mode, OFlags, open},
    mount::MountAttrFlags,
};

use super::{
    files::detached,
    processes::{Processes, Texts},
};

/// How old what the guest has said may be for whoever opens a file; who lists the pids gets news.
const FRESH: Duration = Duration::from_secs(1);

/// The kernel is to remember nothing.
const AT_ONCE: Duration = Duration::ZERO;

/// Asks the guest. `None`: it does not say.
pub(super) type Ask = Box<dyn Fn() -> Option<Processes> + Send + Sync>;

/// One that nobody serves yet.
pub(super) struct ProcFs {
    device: OwnedFd,
    /// This process' pid namespace, as its link in `/proc` names it.
    namespace: PathBuf,
}

impl ProcFs {
    /// Makes one, and its mount, which is not attached anywhere. Nobody may look into it before it is served.
    ///
    /// # Errors
    /// The host has no FUSE.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = open("/dev/fuse", flags, Mode::empty())?;
        let fd = device.as_raw_fd().to_string();
        let options = [
            ("source", "husk"),
            ("fd", &*fd),
            ("rootmode", "40555"),
            ("user_id", "0"),
            ("group_id", "0"),
        ];
        let (_, mount) = detached("fuse", &options, MountAttrFlags::MOUNT_ATTR_RDONLY)?;
        let namespace = fs::read_link("/proc/self/ns/pid")?;
        Ok((Self { device, namespace }, mount))
    }

    /// Serves it on a thread of its own for as long as this process lives.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn serve(self, ask: Ask) -> io::Result<()> {
        let Self { device, namespace } = self;
        let tree = Tree {
            ask,
            namespace,
            state: Mutex::default(),
        };
        let serve = move || {
            // Nobody is told of its end: who looks sees an error.
            let session = Session::from_fd(tree, device, SessionACL::Owner, Config::default());
            let _ = session.and_then(Session::run);
        };
        let thread = thread::Builder::new().name("proc".to_owned());
        thread.spawn(serve).map(drop)
    }
}

/// A file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Root,
    /// `stat`, of the guest.
    Boot,
    Process(u32, Part),
}

/// What there is of each process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Directory,
    Stat,
    Status,
    Cmdline,
    Namespaces,
    PidNamespace,
}

/// By number; the name, and what it is in.
const PARTS: [(Part, &str, Option<Part>); 6] = [
    (Part::Directory, "", None),
    (Part::Stat, "stat", Some(Part::Directory)),
    (Part::Status, "status", Some(Part::Directory)),
    (Part::Cmdline, "cmdline", Some(Part::Directory)),
    (Part::Namespaces, "ns", Some(Part::Directory)),
    (Part::PidNamespace, "pid", Some(Part::Namespaces)),
];

impl Node {
    /// Its inode: a pid and a part, of which pid 0, nobody's, has the root and its file.
    fn number(self) -> INodeNo {
        INodeNo(match self {
            Self::Root => INodeNo::ROOT.0,
            Self::Boot => INodeNo::ROOT.0 + 1,
            Self::Process(pid, part) => u64::from(pid) << 3 | part as u64,
        })
    }

    fn of(number: INodeNo) -> Option<Self> {
        let pid = u32::try_from(number.0 >> 3).ok()?;
        let low = usize::try_from(number.0 & 7).ok()?;
        match (pid, low) {
            (0, 1) => Some(Self::Root),
            (0, 2) => Some(Self::Boot),
            (0, _) => None,
            (pid, part) => PARTS.get(part).map(|(part, ..)| Self::Process(pid, *part)),
        }
    }

    fn kind(self) -> FileType {
        match self {
            Self::Root | Self::Process(_, Part::Directory | Part::Namespaces) => {
                FileType::Directory
            }
            Self::Process(_, Part::PidNamespace) => FileType::Symlink,
            _ => FileType::RegularFile,
        }
    }

    /// As in procfs files have no size.
    fn attributes(self) -> FileAttr {
        let kind = self.kind();
        FileAttr {
            ino: self.number(),
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: match kind {
                FileType::Directory => 0o555,
                FileType::Symlink => 0o777,
                _ => 0o444,
            },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// What is in a directory, of what there is.
    fn entries(self, processes: &Processes) -> Vec<(Node, String)> {
        match self {
            Self::Root => {
                let pids = processes.all.keys();
                let pids = pids.map(|pid| (Self::Process(*pid, Part::Directory), pid.to_string()));
                let boot = (Self::Boot, "stat".to_owned());
                [boot].into_iter().chain(pids).collect()
            }
            Self::Process(pid, inside) => PARTS
                .iter()
                .filter(|(.., parent)| *parent == Some(inside))
                .map(|(part, name, _)| (Self::Process(pid, *part), (*name).to_owned()))
                .collect(),
            Self::Boot => Vec::new(),
        }
    }

    /// What a file says.
    fn text(self, processes: &Processes) -> Option<Vec<u8>> {
        let of = |pid: u32| processes.all.get(&pid);
        let text =
            |pid: u32, part: fn(&Texts) -> &Vec<u8>| of(pid).map(|texts| part(texts).clone());
        match self {
            Self::Boot => Some(format!("btime {}\n", processes.boot_time).into_bytes()),
            Self::Process(pid, Part::Stat) => text(pid, |texts| &texts.stat),
            Self::Process(pid, Part::Status) => text(pid, |texts| &texts.status),
            Self::Process(pid, Part::Cmdline) => text(pid, |texts| &texts.cmdline),
            Self::Root | Self::Process(..) => None,
        }
    }
}

/// The file system.
struct Tree {
    ask: Ask,
    namespace: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last: Option<(Instant, Arc<Processes>)>,
    files: HashMap<u64, Vec<u8>>,
    directories: HashMap<u64, Vec<(Node, String)>>,
    next: u64,
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Tree {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest has said, not longer ago than this.
    fn processes(&self, oldest: Duration) -> Result<Arc<Processes>, Errno> {
        if let Some((at, processes)) = &self.state().last
            && at.elapsed() < oldest
        {
            return Ok(Arc::clone(processes));
        }
        let processes = Arc::new((self.ask)().ok_or(Errno::EIO)?);
        self.state().last = Some((Instant::now(), Arc::clone(&processes)));
        Ok(processes)
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<Node, Errno> {
        let parent = Node::of(parent).ok_or(Errno::ENOENT)?;
        let processes = match parent {
            Node::Root => self.processes(FRESH)?,
            _ => Arc::default(),
        };
        let mut entries = parent.entries(&processes).into_iter();
        let found = entries.find(|(_, entry)| entry.as_bytes() == name.as_bytes());
        found.map(|(node, _)| node).ok_or(Errno::ENOENT)
    }
}

/// One request at a time.
impl Filesystem for Tree {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name) {
            Ok(node) => reply.entry(&AT_ONCE, &node.attributes(), Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match Node::of(ino) {
            Some(node) => reply.attr(&AT_ONCE, &node.attributes()),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match Node::of(ino) {
            Some(Node::Process(_, Part::PidNamespace)) => {
                reply.data(self.namespace.as_os_str().as_bytes());
            }
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let open = || {
            let processes = self.processes(FRESH)?;
            let text = Node::of(ino).and_then(|node| node.text(&processes));
            text.ok_or(Errno::ESRCH)
        };
        match open() {
            Ok(text) => {
                let mut state = self.state();
                let number = state.number();
                state.files.insert(number, text);
                // Read to its end whatever its size is said to be.
                reply.opened(FileHandle(number), FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.state();
        let text = state.files.get(&fh.0).map_or(&[][..], Vec::as_slice);
        let from = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(text.len());
        let rest = text.get(from..).unwrap_or_default();
        reply.data(rest.get(..size as usize).unwrap_or(rest));
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.state().files.remove(&fh.0);
        reply.ok();
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let open = || {
            let node = Node::of(ino).ok_or(Errno::ENOENT)?;
            let processes = match node {
                Node::Root => self.processes(AT_ONCE)?,
                _ => Arc::default(),
            };
            Ok(node.entries(&processes))
        };
        match open() {
            Ok(entries) => {
                let mut state = self.state();
                let number = state.number();
                state.directories.insert(number, entries);
                reply.opened(FileHandle(number), FopenFlags::empty());
            }
            Err(error) => reply.error(error),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let state = self.state();
        let entries = state.directories.get(&fh.0).into_iter().flatten();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (next, (node, name)) in (1..).zip(entries).skip(from) {
            if reply.add(node.number(), next, node.kind(), name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.state().directories.remove(&fh.0);
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use husk_protocol::agent::DescribeProcessesResponse;

    use super::{super::processes::tests::process, *};

    fn told(pids: &[u32]) -> Processes {
        DescribeProcessesResponse {
            boot_time: 1_764_448_000,
            processes: pids.iter().map(|pid| process(*pid, "sh")).collect(),
            ..DescribeProcessesResponse::default()
        }
        .into()
    }

    /// Where one is that is served, without being mounted anywhere. Needs root and a FUSE, as husk's host does.
    fn served(ask: Ask) -> (OwnedFd, PathBuf) {
        let (proc, mount) = ProcFs::new().unwrap();
        proc.serve(ask).unwrap();
        let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
        (mount, path.into())
    }

    fn names(path: PathBuf) -> Vec<String> {
        let entries = fs::read_dir(path).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
        let mut names: Vec<_> = entries.map(|entry| name(entry).unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn it_is_read_as_procfs_is() {
        let (_mount, at) = served(Box::new(|| Some(told(&[1, 70]))));
        assert_eq!(names(at.join("")), ["1", "70", "stat"]);
        assert_eq!(names(at.join("70")), ["cmdline", "ns", "stat", "status"]);
        assert_eq!(names(at.join("70/ns")), ["pid"]);
        let read = |path: &str| fs::read(at.join(path)).unwrap();
        let wanted = process(70, "sh");
        assert_eq!(read("70/stat"), wanted.stat);
        assert_eq!(read("70/status"), wanted.status);
        assert_eq!(read("70/cmdline"), b"sh\0-x\0");
        assert_eq!(read("stat"), b"btime 1764448000\n");
        let namespace = |path: PathBuf| fs::read_link(path).unwrap();
        assert_eq!(
            namespace(at.join("1/ns/pid")),
            namespace("/proc/self/ns/pid".into())
        );
        let kind = |path: &str| fs::metadata(at.join(path)).unwrap().file_type();
        assert!(kind("70").is_dir() && kind("70/stat").is_file());
        for path in ["2", "070", "+1", "70/stat/x", "70/environ", "70/70", "pid"] {
            fs::metadata(at.join(path)).unwrap_err();
        }
        let error = fs::write(at.join("70/stat"), "").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }

    #[test]
    fn a_list_is_news_and_one_that_fails_is_an_error() {
        static ASKED: AtomicU32 = AtomicU32::new(0);
        let (_mount, at) = served(Box::new(|| match ASKED.fetch_add(1, Ordering::Relaxed) {
            0 => Some(told(&[1, 2])),
            1 => Some(told(&[1])),
            _ => None,
        }));
        assert_eq!(names(at.join("")), ["1", "2", "stat"]);
        assert_eq!(names(at.join("")), ["1", "stat"]);
        fs::metadata(at.join("2")).unwrap_err();
        let error = fs::read_dir(at.join("")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn long_lists_and_texts_come_whole() {
        let pids: Vec<u32> = (1..=1000).collect();
        let (_mount, at) = served(Box::new(move || {
            let mut told = told(&pids);
            for texts in told.all.values_mut() {
                texts.cmdline = vec![b'x'; 40 << 10];
            }
            Some(told)
        }));
        assert_eq!(names(at.join("")).len(), 1001);
        assert_eq!(fs::read(at.join("1000/cmdline")).unwrap().len(), 40 << 10);
    }

    #[test]
    fn every_node_has_a_number_of_its_own() {
        let parts = PARTS.map(|(part, ..)| part);
        let of = |pid: u32| parts.map(|part| Node::Process(pid, part)).to_vec();
        let all = [vec![Node::Root, Node::Boot], of(1), of(2), of(4 << 20)].concat();
        for node in &all {
            assert_eq!(Node::of(node.number()), Some(*node));
        }
        for number in [0, 3, 7, (1 << 3) + 6, u64::MAX] {
            assert_eq!(Node::of(INodeNo(number)), None, "{number}");
        }
    }
}
