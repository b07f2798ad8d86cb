//! A shared directory's files as virtiofsd has them, but for what the guest may keep of them ([`Kept`]).

use std::ffi::CStr;
use std::io;
use std::time::{Duration, SystemTime};

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;
use virtiofsd::passthrough::PassthroughFs;

use super::kept::{Kept, Version};

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;

/// The files of one share.
pub struct Files {
    inner: PassthroughFs,
    /// None where the policy says it once and for all.
    kept: Option<Kept>,
}

impl Files {
    /// These, of which the guest keeps what `kept` says.
    pub fn new(inner: PassthroughFs, kept: Option<Kept>) -> Self {
        Self { inner, kept }
    }

    /// What of a file that was opened for reading the guest need not drop.
    fn keep(&self, ctx: Context, inode: Inode, handle: Option<Handle>) -> OpenOptions {
        let is_kept = || {
            let (kept, handle) = (self.kept.as_ref()?, handle?);
            let (attr, _) = self.inner.getattr(ctx, inode, Some(handle)).ok()?;
            Some(kept.open(inode, handle, Version::of(&attr)?, SystemTime::now()))
        };
        match is_kept() {
            Some(true) => OpenOptions::KEEP_CACHE,
            _ => OpenOptions::empty(),
        }
    }

    fn used(&self, handle: Handle) {
        if let Some(kept) = &self.kept {
            kept.used(handle);
        }
    }
}

/// Functions that are virtiofsd's own.
macro_rules! as_they_are {
    {
        $(
            fn $name:ident$(<$($generic:ident: $bound:path),*>)?(&self $(, $argument:ident: $type:ty)* $(,)?)$( -> $result:ty)?;
        )*
    } => {
        $(
            fn $name$(<$($generic: $bound),*>)?(&self $(, $argument: $type)*)$( -> $result)? {
                self.inner.$name($($argument),*)
            }
        )*
    }
}

// What is not here has an answer of the trait's, with which virtiofsd is content too.
impl FileSystem for Files {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn open(
        &self,
        ctx: Context,
        inode: Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let (handle, mut options) = self.inner.open(ctx, inode, kill_priv, flags)?;
        // What the guest itself writes it also holds, but the version changes with each write.
        let writes = (libc::O_ACCMODE | libc::O_TRUNC).cast_unsigned();
        if flags & writes == libc::O_RDONLY.cast_unsigned() {
            options |= self.keep(ctx, inode, handle);
        }
        Ok((handle, options))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.used(handle);
        self.inner
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn release(
        &self,
        ctx: Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.used(handle);
        self.inner
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    as_they_are! {
        fn init(&self, capable: FsOptions) -> io::Result<FsOptions>;
        fn destroy(&self);
        fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry>;
        fn forget(&self, ctx: Context, inode: Inode, count: u64);
        fn batch_forget(&self, ctx: Context, requests: Vec<(Inode, u64)>);
        fn getattr(&self, ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(fuse::Attr, Duration)>;
        fn setattr(
            &self,
            ctx: Context,
            inode: Inode,
            attr: fuse::SetattrIn,
            handle: Option<Handle>,
            valid: SetattrValid,
        ) -> io::Result<(fuse::Attr, Duration)>;
        fn readlink(&self, ctx: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn symlink(
            &self,
            ctx: Context,
            linkname: &CStr,
            parent: Inode,
            name: &CStr,
            extensions: Extensions,
        ) -> io::Result<Entry>;
        fn mknod(
            &self,
            ctx: Context,
            parent: Inode,
            name: &CStr,
            mode: u32,
            rdev: u32,
            umask: u32,
            extensions: Extensions,
        ) -> io::Result<Entry>;
        fn mkdir(
            &self,
            ctx: Context,
            parent: Inode,
            name: &CStr,
            mode: u32,
            umask: u32,
            extensions: Extensions,
        ) -> io::Result<Entry>;
        fn unlink(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rmdir(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rename(
            &self,
            ctx: Context,
            olddir: Inode,
            oldname: &CStr,
            newdir: Inode,
            newname: &CStr,
            flags: u32,
        ) -> io::Result<()>;
        fn link(&self, ctx: Context, inode: Inode, newparent: Inode, newname: &CStr) -> io::Result<Entry>;
        fn create(
            &self,
            ctx: Context,
            parent: Inode,
            name: &CStr,
            mode: u32,
            kill_priv: bool,
            flags: u32,
            umask: u32,
            extensions: Extensions,
        ) -> io::Result<(Entry, Option<Handle>, OpenOptions)>;
        fn write<R: ZeroCopyReader>(
            &self,
            ctx: Context,
            inode: Inode,
            handle: Handle,
            r: R,
            size: u32,
            offset: u64,
            lock_owner: Option<u64>,
            delayed_write: bool,
            kill_priv: bool,
            flags: u32,
        ) -> io::Result<usize>;
        fn flush(&self, ctx: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn fallocate(
            &self,
            ctx: Context,
            inode: Inode,
            handle: Handle,
            mode: u32,
            offset: u64,
            length: u64,
        ) -> io::Result<()>;
        fn statfs(&self, ctx: Context, inode: Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(
            &self,
            ctx: Context,
            inode: Inode,
            name: &CStr,
            value: &[u8],
            flags: u32,
            extra_flags: SetxattrFlags,
        ) -> io::Result<()>;
        fn getxattr(&self, ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(&self, ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(&self, ctx: Context, inode: Inode, name: &CStr) -> io::Result<()>;
        fn opendir(&self, ctx: Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)>;
        fn readdir(
            &self,
            ctx: Context,
            inode: Inode,
            handle: Handle,
            size: u32,
            offset: u64,
        ) -> io::Result<Self::DirIter>;
        fn fsyncdir(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn releasedir(&self, ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        fn access(&self, ctx: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn lseek(&self, ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn copyfilerange(
            &self,
            ctx: Context,
            inode_in: Inode,
            handle_in: Handle,
            offset_in: u64,
            inode_out: Inode,
            handle_out: Handle,
            offset_out: u64,
            len: u64,
            flags: u64,
        ) -> io::Result<usize>;
        fn syncfs(&self, ctx: Context, inode: Inode) -> io::Result<()>;
    }
}
