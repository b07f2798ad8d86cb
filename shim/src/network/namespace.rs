//! A network namespace, entered by threads that are made for it.
//!
//! A thread that has moved into another network namespace would take whatever it does next along, and the shim's threads all serve
//! everything. So each visit has a thread of its own, which ends with it. It is short: a socket or a `/dev/net/tun` opened
//! there belongs to that namespace for good, and is then used from the shim's own tasks.

use std::{
    fs::{self, File, Metadata},
    io,
    os::linux::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
};

use futures::channel::mpsc::UnboundedReceiver;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{
    Handle, MulticastGroup, packet_core::NetlinkMessage, packet_route::RouteNetlinkMessage,
    sys::SocketAddr,
};
use tokio::{runtime, sync::oneshot};

use super::NetworkError;

/// What the kernel tells unasked.
pub type Notices = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// What tells that somebody sets an interface up.
const CHANGES: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];

/// A network namespace that a file stands for. It is not kept alive by this: the engine takes it away when it likes.
#[derive(Debug, Clone)]
pub struct Namespace {
    path: PathBuf,
    id: Id,
}

/// What makes a namespace the same one, whatever file stands for it: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Id(u64, u64);

impl Id {
    fn of(metadata: &Metadata) -> Self {
        Self(metadata.st_dev(), metadata.st_ino())
    }
}

impl Namespace {
    /// The namespace that this file stands for now.
    ///
    /// # Errors
    /// [`NetworkError::HostNetwork`] for the shim's own, which is the host's; [`NetworkError::Namespace`] when it is not there.
    pub fn find(path: &Path) -> Result<Self, NetworkError> {
        let stat = |path: &Path| {
            fs::metadata(path).map_err(|source| NetworkError::Namespace {
                doing: "find",
                path: path.to_owned(),
                source,
            })
        };
        let id = Id::of(&stat(path)?);
        if id == Id::of(&stat(Path::new("/proc/self/ns/net"))?) {
            return Err(NetworkError::HostNetwork);
        }
        Ok(Self {
            path: path.to_owned(),
            id,
        })
    }

    /// A netlink socket in the namespace.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`].
    pub async fn connect(&self) -> Result<Handle, NetworkError> {
        let (handle, _) = self.listen(&[]).await?;
        Ok(handle)
    }

    /// A netlink socket that also hears of changes to interfaces, addresses and routes.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`].
    pub async fn watch(&self) -> Result<(Handle, Notices), NetworkError> {
        self.listen(&CHANGES).await
    }

    async fn listen(
        &self,
        groups: &'static [MulticastGroup],
    ) -> Result<(Handle, Notices), NetworkError> {
        let runtime = runtime::Handle::current();
        let open = move || {
            let _runtime = runtime.enter();
            rtnetlink::new_multicast_connection(groups)
        };
        let (connection, handle, notices) = self.enter("open a netlink socket in", open).await?;
        // Ends with the last handle.
        tokio::spawn(connection);
        Ok((handle, notices))
    }

    /// Does something inside, on a thread of its own.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`], also when the file stands for another namespace by now.
    pub async fn enter<T: Send + 'static>(
        &self,
        doing: &'static str,
        inside: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let error = |doing, source| self.failed(doing, source);
        let (sender, result) = oneshot::channel();
        let (path, id) = (self.path.clone(), self.id);
        let visit = move || {
            let entered = enter(&path, id).map_err(|e| ("enter", e));
            // Nobody waits any more: the start was given up.
            let _ = sender.send(entered.and_then(|()| inside().map_err(|e| (doing, e))));
        };
        thread::Builder::new()
            .name("netns".into())
            .spawn(visit)
            .map_err(|e| error("make a thread for", e))?;
        match result.await {
            Ok(result) => result.map_err(|(doing, source)| error(doing, source)),
            Err(_) => Err(error(doing, io::Error::other("its thread has failed"))),
        }
    }

    /// What could not be done in it.
    pub fn failed(&self, doing: &'static str, source: io::Error) -> NetworkError {
        NetworkError::Namespace {
            doing,
            path: self.path.clone(),
            source,
        }
    }
}

/// Moves the calling thread.
fn enter(path: &Path, id: Id) -> io::Result<()> {
    let file = File::open(path)?;
    if Id::of(&file.metadata()?) != id {
        return Err(io::Error::other("another one has taken its place"));
    }
    Ok(setns(&file, CloneFlags::CLONE_NEWNET)?)
}
